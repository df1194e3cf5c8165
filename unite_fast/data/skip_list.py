"""The record that `unite-fast data check` leaves beside the images, and that training leaves files out by.

It lies in the data set rather than behind a configuration key, so that it holds for every run on these images, for
training and held-out sets alike, and moves with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from unite_fast.errors import UserError

CHECK_RECORD = "unite_fast_check.json"


def read_skip_list(root: Path) -> dict[str, str]:
    """Images to leave out, by name (class/file), and why; empty where nothing was checked.

    Raises:
        UserError: the record cannot be read or is damaged.
    """
    path = root / CHECK_RECORD
    try:
        skip = json.loads(path.read_text(encoding="utf-8"))["skip"]
        if not all(isinstance(reason, str) for reason in skip.values()):
            raise ValueError
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{path} is damaged: run `unite-fast data check {root}` again, or remove it to leave no image out"
        ) from None
    return skip


def describe_skipped(root: Path, skipped: Mapping[str, str], total: int) -> str:
    """One line for the log about the images that are left out."""
    some = "; ".join(f"{name} ({reason})" for name, reason in list(skipped.items())[:5])
    more = "; …" if len(skipped) > 5 else ""
    return f"left out {len(skipped)} of {total} images of {root}, as listed in {CHECK_RECORD}: {some}{more}"

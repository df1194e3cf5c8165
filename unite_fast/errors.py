"""The one exception that stands for a user's mistake."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """What went wrong, where, and what to do about it; shown as one message without a traceback."""


def require_none(problems: Sequence[str], what: str) -> None:
    """Refuse what is wrong in several places at once, so that a user mends it at once.

    Args:
        problems: a sentence each.
        what: heads them where there are several.

    Raises:
        UserError: there are any; says all.
    """
    if problems:
        raise UserError(problems[0] if len(problems) == 1 else "\n  ".join([f"{what}:", *problems]))

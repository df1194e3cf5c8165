"""The environment of a run: one line in sessions.jsonl for each time it is started or resumed."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from unite_fast.config import Config
from unite_fast.engine.batch import Batch
from unite_fast.engine.world import World
from unite_fast.errors import UserError
from unite_fast.evaluation.protocol import git_state
from unite_fast.records import SESSIONS
from unite_fast.versions import versions


def record_session(
    folder: Path,
    config: Config,
    world: World,
    batch: Batch,
    *,
    draws_per_chunk: int,
    first_step: int,
    samples: Mapping[str, Any],
) -> None:
    """Append what this start or resumption of the run runs on to sessions.jsonl.

    Raises:
        UserError: the file cannot be written.
    """
    on_gpu = world.device.type == "cuda"
    session = {
        "started": time.time(),
        "first_step": first_step,
        "device": torch.cuda.get_device_name(world.device) if on_gpu else platform.processor() or platform.machine(),
        "ranks": world.size,
        "micro_batch": batch.micro_batch,
        "accumulation": batch.accumulation,
        "global_batch": batch.global_batch,
        "draws_per_chunk": draws_per_chunk,
        "zero_stage": config.train.zero_stage,
        "samples": samples,
        "cuda": torch.version.cuda if on_gpu else None,
        "versions": versions("python", "unite_fast", "torch", "triton", "deepspeed", "safetensors"),
        "commit": source_commit(),
    }
    try:
        with open(folder / SESSIONS, "a", encoding="utf-8") as file:
            file.write(json.dumps(session) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {folder / SESSIONS}: {error.strerror}") from None


def changed_samples(before: Mapping[str, Any] | None, now: Mapping[str, Any], unit: str) -> str | None:
    """A warning for a resumed run whose training data are not those of its checkpoint; None where they are.

    A run must be able to go on without an image that broke, unattended, so this is no error.

    Args:
        before: `Modality.samples` as the checkpoint has it; None in checkpoints of earlier versions.
        now: of the data as they are.
        unit: what samples are called, in the plural.
    """
    if before is None or before == now:
        return None
    if before["count"] == now["count"]:
        what = f"{now['count']} {unit} as before, but not the same ones or not in the same order"
    else:
        what = f"{before['count']} {unit} when the checkpoint was saved, {now['count']} now"
    return (
        f"the training data changed: {what}. The run goes on with the data as they are, in another order than it would "
        f"have had: in this epoch some {unit} may come twice and some not at all. If that is not meant, stop it "
        f"(Ctrl-C), put back what was in data.path, or set it to where that is, and --resume again"
    )


def changed_classes(before: Sequence[str] | None, now: Sequence[str], unit: str) -> str | None:
    """A warning for a resumed run whose labels stand for other classes than before; None for the same.

    No error: a renamed folder may keep its place, and a model may be trained on with other classes of the same number.

    Args:
        before: class names by label, as the checkpoint has them; None in imported ones.
        now: of the data as they are.
        unit: what samples are called, in the plural.
    """
    moved = [] if before is None else [pair for pair in zip(before, now, strict=False) if pair[0] != pair[1]]
    if not moved:
        return None
    some = ", ".join(f"{was!r} is {is_!r}" for was, is_ in moved[:3]) + (", …" if len(moved) > 3 else "")
    return (
        f"the classes changed: what was {some}. Labels are numbers, so {len(moved)} of {len(now)} go on as labels of "
        f"other {unit}, unless only names changed. If that is not meant, stop the run (Ctrl-C), put back what was in "
        f"data.path, with the names it had, and --resume again"
    )


def source_commit() -> str | None:
    """Git commit of the source tree that runs, with a + where files differ from it; None outside a checkout."""
    state = git_state()
    return None if state is None else state["commit"] + "+" * state["changed"]

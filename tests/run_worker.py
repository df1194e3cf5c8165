"""What each rank does in test_run_ranks.py: whole runs, one after the other, in one process group.

Usage: run_worker.py FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from runs import config, latest_step
from torch import Tensor

from unite_fast.config import Config
from unite_fast.engine import loop, world
from unite_fast.errors import UserError
from unite_fast.evaluation import evaluator

IMAGES, RANKS, GLOBAL_BATCH, SAVED, STEPS = 40, 2, 6, 3, 6
STAGES = {"zero0": 0, "zero2": 2}


def run_config(folder: Path, name: str, *, ranks: int = RANKS, stage: int = 0, **train: object) -> Config:
    """A run whose micro-batches are the same ones whatever the number of ranks that they are dealt to."""
    return config(
        folder, name=name,
        train={
            "steps": STEPS, "global_batch": GLOBAL_BATCH, "accumulation": RANKS // ranks, "zero_stage": stage,
            "checkpoint_every": SAVED, "log_every": 1, "device": "cpu", **train,
        },
        optimizer={"ema_decays": [0.5]},
        data={"val_path": str(folder / "val")},
        evaluation={
            "every": SAVED, "sheet_columns": 2, "metrics_epochs": SAVED * GLOBAL_BATCH / IMAGES, "samples_per_class": 5,
            "batch": 3,
        },
    )  # fmt: skip


def stopped_by_one(folder: Path, rank: int) -> int | None:
    """The step that a run is saved at after a signal to rank 1 alone in its second."""
    advance = loop.ProgressLine.advance

    def told(self: loop.ProgressLine, step: int, record: dict | None) -> None:
        advance(self, step, record)
        if step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(loop.ProgressLine, "advance", told):
        return latest_step(loop.train(run_config(folder, "one", stage=1)))


def stopped_measuring(folder: Path, rank: int) -> int | None:
    """The same after a signal to both while rank 0 generates and rank 1, which has no piece left, waits for it.

    Ends the process group.
    """
    barrier, draw = world.World.barrier, evaluator.draw
    waiting = folder / "waiting"

    began = []

    def wait(self: world.World) -> None:
        if began:
            waiting.write_text(str(os.getpid()))
        barrier(self)

    def drawn(*arguments: Any, **options: Any) -> Tensor:
        made = draw(*arguments, **options)
        began.append(rank)
        if rank == 0:
            until = time.monotonic() + 60
            while not waiting.exists() and time.monotonic() < until:
                time.sleep(0.01)
            for process in (int(waiting.read_text()), os.getpid()):
                os.kill(process, signal.SIGTERM)
        return made

    with mock.patch.object(world.World, "barrier", wait), mock.patch.object(evaluator, "draw", drawn):
        settings = run_config(folder, "measuring", stage=1).model_dump()
        settings["evaluation"]["every"] = STEPS  # pictures have a barrier of their own
        return latest_step(loop.train(Config.parse(settings)))


def other_data(folder: Path, rank: int) -> str:
    """What a rank is told whose training data are not those of the others."""
    settings = run_config(folder, "other").model_dump()
    if rank == 1:
        settings["data"]["path"] = settings["data"]["val_path"]
    try:
        loop.train(Config.parse(settings))
    except UserError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    place = world.join_world("cpu")
    rank, report = place.rank, {"place": [place.rank, place.size, place.local_size]}
    with mock.patch.object(loop, "leave_world", lambda: None):
        for name, stage in STAGES.items():
            loop.train(run_config(folder, name, stage=stage))
        loop.train(run_config(folder, "resumed", stage=1), resume=True)
        report |= {"one": stopped_by_one(folder, rank), "other": other_data(folder, rank)}
    report["measuring"] = stopped_measuring(folder, rank)
    (folder / f"rank{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""One of two ranks whose pretended GPUs differ in memory: writes the micro-batch and chunk that they agree on."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from unite_fast.analysis.extent import Extent
from unite_fast.config import Config
from unite_fast.engine.fitting import fit
from unite_fast.engine.world import join_world, leave_world

FITS = (14, 7)  # the largest chunk of each rank


def main() -> None:
    config = Config.load(Path(__file__).parent.parent / "configs" / "b_h100.json", ["train.micro_batch=16"])
    world = join_world("cpu")

    def try_step(run: Config, size: int) -> None:
        if run.objective.chunk > FITS[world.rank]:
            raise torch.OutOfMemoryError

    pretended = SimpleNamespace(device=torch.device("cuda"), size=world.size, all_true=world.all_true)
    batch, run = fit(config, pretended, Extent, try_step)
    (Path(sys.argv[1]) / str(world.rank)).write_text(f"{batch.micro_batch} {run.objective.chunk}")
    leave_world()


if __name__ == "__main__":
    main()

"""The small UNITE of the tests of torch.compile and FP8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine_unite import unite_config
from ranks import TESTS, torchrun

from unite_fast.config import Config


def compile_config(*, stage: int = 0, draws: int = 3, **train: Any) -> Config:
    """A block each, draws in chunks of two and what is left, compiled unless `train` says otherwise."""
    values = unite_config(stage=stage, kind="adamw" if stage == 3 else "muon", stop_gradient=True).model_dump()
    values["model"] |= dict(depth=1, context_start=0)
    values["objective"] |= dict(flow_draws=draws, draws_per_chunk=2)
    values["train"] |= dict(compile=True) | train
    return Config.parse(values)


def run_ranks(folder: Path, option: str, *, ranks: int, stages: list[str]) -> list[dict[str, Any]]:
    """Steps under those ZeRO stages in processes of their own, see compile_worker.py: each rank's report by stage."""
    program = [TESTS / "compile_worker.py", folder, option, *stages]
    torchrun(program, ranks=ranks, cwd=folder, DS_ACCELERATOR="cpu")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]

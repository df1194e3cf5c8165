"""The small UNITE of the tests of torch.compile and FP8."""

from __future__ import annotations

from typing import Any

from engine_unite import unite_config

from unite_fast.config import Config


def compile_config(*, stage: int = 0, draws: int = 3, **train: Any) -> Config:
    """A block each, draws in chunks of two and what is left, compiled unless `train` says otherwise."""
    values = unite_config(stage=stage, kind="adamw" if stage == 3 else "muon", stop_gradient=True).model_dump()
    values["model"] |= dict(depth=1, context_start=0)
    values["objective"] |= dict(flow_draws=draws, draws_per_chunk=2)
    values["train"] |= dict(compile=True) | train
    return Config.parse(values)

"""The small UNITE of the tests of torch.compile and FP8."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
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


def run_ranks(folder: Path, option: str, *, ranks: int, stages: list[str]) -> list[dict[str, Any]]:
    """Steps under those ZeRO stages in processes of their own, see compile_worker.py: each rank's report by stage."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(port),
         str(here / "compile_worker.py"), str(folder), option, *stages],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=300, cwd=folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]

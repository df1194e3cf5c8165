"""Ranks on this machine, for tests: a lone one, and several for what they do together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unite_fast.engine.world import World

TESTS = Path(__file__).resolve().parent
ALONE = World(0, 1, 0, torch.device("cpu"))


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(
    program: Sequence[Any], *, ranks: int = 2, cwd: Path = TESTS.parent, timeout: int = 300, **environment: str
) -> None:
    """Run a script, or `-m` and a module, with its arguments on so many ranks of one thread each; they must succeed."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    # Its agent chooses the port and holds it from then on; one that was found free before may be gone when it starts.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", str(ranks), *program],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True, timeout=timeout, cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-8000:]

"""The steps on a GPU that is not there, of imagined_steps.py, in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
imagined = pytest.importorskip(
    "imagined", reason="this PyTorch keeps what imagined.py uses elsewhere", exc_type=ImportError
)


@pytest.mark.skipif(imagined.missing() is not None, reason=str(imagined.missing()))
@pytest.mark.timeout(3600)  # of a whole file, whose tests have the usual limit each: 200 s, 600 s on a busy machine
def test_steps_on_an_imagined_gpu():
    steps = Path(__file__).with_name("imagined_steps.py")
    command = [sys.executable, "-m", "pytest", steps, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=steps.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout.splitlines()[-1]

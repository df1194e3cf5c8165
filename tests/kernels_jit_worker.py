"""Compile kernels as Triton's launcher would on a GPU, from what it was given: one JSON object a line on stdin.

Runs as a process of its own, because Triton's interpreter, once chosen, replaces the launcher for the whole process:
`python kernels_jit_worker.py 90`. Prints a line for each kernel. No GPU is asked; the driver's place is taken by one
that names the compute capability and nothing else.
"""

from __future__ import annotations

import importlib
import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Driver:
    """What the launcher asks of a driver before it compiles."""

    def __init__(self, capability: int):
        self._capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)


if __name__ == "__main__":
    driver.set_active(Driver(int(sys.argv[1])))
    for line in sys.stdin:
        launch = json.loads(line)
        kernel = getattr(importlib.import_module(launch["module"]), launch["function"])
        arguments = [
            torch.empty(16, dtype=getattr(torch, value)) if isinstance(value, str) else value
            for value in launch["arguments"]
        ]
        compiled = kernel.run(*arguments, grid=(1,), warmup=True, **launch["constants"])
        print(launch["function"], len(compiled.asm["cubin"]), flush=True)

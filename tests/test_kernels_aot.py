"""Every kernel compiled ahead of time for three generations of GPUs, none needed: spills, access widths, registers."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from kernels_aot_worker import chosen

from unite_kernels.specialisation import CAPABILITIES, specialisations

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Triton brings ptxas on Linux x86_64 alone"
)
WORKER = Path(__file__).with_name("kernels_aot_worker.py")
WORKERS = 2
# CUDA C++ programming guide, technical specifications by compute capability: shared memory (KiB) a multiprocessor.
# Registers (65536), warps (64) and programs (32) are the same on all three.
SHARED = {80: 164, 90: 228, 100: 228}


def occupancy(kernel: dict) -> int:
    """Warps that a multiprocessor holds, predicted: of registers (256 a warp at a time) and shared memory (1 KiB
    more a program for the system)."""
    registers = -(-kernel["registers"] * 32 // 256) * 256 * kernel["warps"]
    programs = min(65536 // registers, SHARED[kernel["capability"]] * 1024 // (kernel["shared"] + 1024), 32)
    return min(programs * kernel["warps"], 64)


@pytest.fixture(scope="module", params=CAPABILITIES, ids=lambda capability: f"sm_{capability}")
def kernels(request):
    """What the workers report for one capability."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    running = [
        subprocess.Popen(
            [sys.executable, WORKER, str(request.param), str(first), str(WORKERS)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for first in range(WORKERS)
    ]  # fmt: skip
    results = [process.communicate() for process in running]
    for process, (_, errors) in zip(running, results, strict=True):
        assert process.returncode == 0, errors
    return sorted((json.loads(line) for out, _ in results for line in out.splitlines()), key=lambda k: k["name"])


def test_machine_code(kernels, capsys):
    capability = kernels[0]["capability"]
    head = f"{f'sm_{capability}':46} registers  shared  loads  stores  predicted occupancy"
    lines = [
        f"{k['name']:46} {k['registers']:5} ≤{k['max_registers']:3} {k['shared']:7} {k['load_bytes'][0]:5}"
        f" {k['store_bytes'][0]:7}  {occupancy(k):6} of 64 warps"
        for k in kernels
    ]
    with capsys.disabled():
        print("", head, *lines, sep="\n")
    faults = []
    for k in kernels:
        if k["stack"] or k["local"]:
            faults.append(f"{k['name']} spills: stack {k['stack']}, local {k['local']}")
        if k["registers"] > k["max_registers"]:
            faults.append(f"{k['name']} takes {k['registers']} registers, its cap is {k['max_registers']}")
        for kind in ("load_bytes", "store_bytes"):
            found, declared = k[kind]
            if found < declared:
                faults.append(f"{k['name']}: {kind} {found}, declared {declared}")
    assert not faults, "\n".join(faults)


def test_every_kernel_is_there(kernels):
    capability = kernels[0]["capability"]
    assert [k["name"] for k in kernels] == sorted(entry.name for entry in chosen(capability))
    assert {entry.kernel for entry in chosen(capability)} == {
        entry.kernel for entry in specialisations() if capability in entry.capabilities
    }

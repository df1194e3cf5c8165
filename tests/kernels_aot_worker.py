"""Compile specialisations for one compute capability and print what the machine code says, one JSON object a line.

Runs as a process of its own, because Triton's interpreter, once chosen, replaces the compiler for the whole process:
`python kernels_aot_worker.py 90 0 2` does every second kernel of `chosen`, from the first, for sm_90.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton

from unite_kernels.specialisation import CAPABILITIES, Specialisation, compile_ahead, specialisations

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def tool(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def access_bytes(opcodes: list[str]) -> int:
    """Widest of LDG.E.128, LDG.E.64.CONSTANT, STG.E, STG.E.U16, LDGSTS.E.BYPASS.128, …: 4 where none is named."""
    widths = [re.search(r"\.[US]?(8|16|64|128)\b", opcode) for opcode in opcodes]
    return max((int(width[1]) // 8 if width else 4 for width in widths), default=0)


def chosen(capability: int) -> list[Specialisation]:
    """All of a capability; of the newest the one of each kernel with the highest cap on registers: all take minutes."""
    entries = [entry for entry in specialisations() if capability in entry.capabilities]
    if capability == max(CAPABILITIES):
        entries = list({e.kernel: e for e in sorted(entries, key=lambda e: e.max_registers)}.values())
    return entries


def report(entry: Specialisation, capability: int) -> dict:
    compiled = compile_ahead(entry, capability)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = tool(str(TOOLS / "cuobjdump"), "--dump-resource-usage", str(cubin))
        code = tool(str(TOOLS / "nvdisasm"), "-c", str(cubin))
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    opcodes = re.findall(r"\b(?:LDGSTS|LDG|STG|LDL|STL)\b[.\w]*", code)
    return {
        "name": entry.name,
        "capability": capability,
        "warps": entry.num_warps,
        "registers": registers,
        "max_registers": entry.max_registers,
        "shared": compiled.metadata.shared,
        "stack": stack,
        "local": local + sum(opcode[:3] in ("LDL", "STL") for opcode in opcodes),
        "load_bytes": [access_bytes([o for o in opcodes if o.startswith("LDG")]), entry.load_bytes],
        "store_bytes": [access_bytes([o for o in opcodes if o.startswith("STG")]), entry.store_bytes],
    }


if __name__ == "__main__":
    capability, first, workers = map(int, sys.argv[1:])
    for entry in chosen(capability)[first::workers]:
        print(json.dumps(report(entry, capability)), flush=True)

"""Kernels compiled ahead of time, without a GPU: which shapes, with which options, and how.

Each family of operators lists its own in `aot_specialisations()`; the tests check the machine code of every one of
them, and the C library is built from the same list.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .toolchain import AVAILABLE, triton

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

# Modules of this package that define aot_specialisations().
FAMILIES = (
    "adaln_kernels", "flow", "fp8", "latent", "muon", "philox", "pixels", "qk_rope", "rectify", "resample", "swiglu",
)  # fmt: skip
CAPABILITIES = (80, 90, 100)  # A100, H100 and H200, B200


@dataclass(frozen=True)
class Specialisation:
    """One kernel at one shape.

    Attributes:
        name: a C identifier, unique in the package.
        kernel: the `triton.jit` function.
        arguments: its run-time arguments in order, with Triton's types: "*bf16", "*fp32", "i32", "fp32", …
        constants: all its other arguments; a pointer that is absent is None here.
        num_warps: 32-thread warps a program.
        aligned: run-time arguments whose value (an address in bytes, or an integer) is a multiple of 16.
        max_registers: a thread's cap, from which follows how many programs a multiprocessor holds.
        load_bytes, store_bytes: least width of the widest global load and store; below 16 only where the shape forbids
            more or the bytes do not matter.
        capabilities: those whose instructions it needs.
    """

    name: str
    kernel: triton.runtime.JITFunction
    arguments: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int
    aligned: tuple[str, ...]
    max_registers: int
    load_bytes: int = 16
    store_bytes: int = 16
    capabilities: tuple[int, ...] = CAPABILITIES


def specialisations() -> list[Specialisation]:
    """Those of every family, in the order of FAMILIES.

    Raises:
        RuntimeError: Triton is not installed.
    """
    if not AVAILABLE:
        raise RuntimeError("specialisations: Triton is not installed: pip install triton (Linux)")
    modules = [importlib.import_module(f".{family}", __package__) for family in FAMILIES]
    found = [entry for module in modules for entry in module.aot_specialisations()]
    names = [entry.name for entry in found]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"specialisations: {', '.join(repeated)} appear twice; a name belongs to one kernel and shape")
    return found


def compile_ahead(entry: Specialisation, capability: int) -> CompiledKernel:
    """Compile for a compute capability (80, 90, 100): `.asm["cubin"]`, `.asm["ptx"]`, `.metadata.shared` (bytes).

    Raises:
        RuntimeError: under Triton's interpreter, which replaces the compiler.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(entry.kernel, triton.runtime.JITFunction):
        raise RuntimeError("compile_ahead: Triton's interpreter is on; unset TRITON_INTERPRET and start again")
    names = entry.kernel.arg_names
    source = ASTSource(
        fn=entry.kernel,
        signature={name: entry.arguments.get(name, "constexpr") for name in names},
        constexprs={(index,): entry.constants[name] for index, name in enumerate(names) if name in entry.constants},
        attrs={(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name in entry.aligned},
    )
    options = {"num_warps": entry.num_warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

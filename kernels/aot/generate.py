"""Compile kernels ahead of time, without a GPU, and wrap each in a C function.

`python generate.py --output DIR --version 0.1.0 --capabilities 80 90 --kernels NAME …` writes DIR/NAME.c for every
kernel (its machine code as arrays, and the function) and DIR/unite_kernels.h. Called by the build; see CMakeLists.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import re
import string
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent
C_TYPES = {"i32": "int32_t", "i64": "int64_t", "fp32": "float"}
BYTES = {"i32": 4, "i64": 8, "fp32": 4}


def import_kernels() -> None:
    """Import unite_kernels from the source tree that holds this file, whatever else is installed."""
    # The interpreter replaces the compiler; line information would put this machine's paths into the library.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    package = HERE.parent
    spec = importlib.util.spec_from_file_location(
        "unite_kernels", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["unite_kernels"] = module
    spec.loader.exec_module(module)


def constants_of(entry) -> dict[str, int]:
    """Integers that a rule's expressions may name."""
    from unite_kernels.adaln_kernels import AHEAD_CHUNK

    integers = {name: int(value) for name, value in entry.constants.items() if value is not None}
    return integers | {"AHEAD_CHUNK": AHEAD_CHUNK}


def derived_of(entry, rule) -> dict[str, str]:
    """Arguments that the C function computes: the rule's, and 0 for the stride of a tensor that is absent."""
    absent = {name for name, value in entry.constants.items() if value is None}
    strides = {name: "0" for name in entry.arguments if name.removesuffix("_stride") in absent}
    return strides | rule.derived


def wide(expression: str) -> str:
    """A rule's expression as C, in wide integers. Names in lower case are arguments, in upper case constants."""
    return re.sub(r"\b[a-z]\w*\b(?!\()", r"(unite_wide)\g<0>", expression).replace("cdiv(", "unite_cdiv(")


def check_parameters(entry, ptx: str) -> int:
    """Number of 8-byte scratch pointers that Triton appended to a kernel's arguments.

    Raises:
        RuntimeError: this Triton passes arguments in another way than the C function would.
    """
    listed = re.search(r"\.entry\s+\w+\((.*?)\)\s*\.reqntid (\d+)", ptx, re.DOTALL)
    if not listed:
        raise RuntimeError(f"{entry.name}: no parameter list in the PTX of this version of Triton")
    found = [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", listed[1])]
    expected = [BYTES.get(kind, 8) for kind in entry.arguments.values()]
    scratch = found[len(expected) :]
    if found[: len(expected)] != expected or any(size != 8 for size in scratch):
        raise RuntimeError(f"{entry.name}: parameters of {found} bytes in the PTX, of {expected} in its specialisation")
    if int(listed[2]) != 32 * entry.num_warps:
        raise RuntimeError(f"{entry.name}: compiled for {listed[2]} threads instead of {32 * entry.num_warps}")
    return len(scratch)


def array(name: str, data: bytes) -> str:
    # Aligned, for the driver reads the ELF header's 64-bit fields in place.
    rows = (data[start : start + 32] for start in range(0, len(data), 32))
    body = ",\n".join(",".join(map(str, row)) for row in rows)
    return f"static const unsigned char {name}[] __attribute__((aligned(16))) = {{\n{body}}};"


def compile_images(entry, capabilities: list[int]) -> dict:
    """Fields of the template that hold machine code.

    Raises:
        SystemExit: a capability is none of Triton's assembler.
        RuntimeError: the kernel needs what the C function does not provide.
    """
    from triton.runtime.errors import PTXASError

    from unite_kernels.specialisation import compile_ahead

    arrays, images, scratch, symbols = [], [], set(), set()
    for capability in capabilities:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):  # all PTX that its assembler refuses
                compiled = compile_ahead(entry, capability)
        except PTXASError as error:
            unknown = re.search(r"Value '\w+' is not defined for option 'gpu-name'", str(error))
            if unknown:
                message = f"UNITE_CAPABILITIES: Triton's assembler knows no {capability}: {unknown[0]}"
                raise SystemExit(message) from None
            print(printed.getvalue())
            raise
        metadata, ptx = compiled.metadata, compiled.asm["ptx"]
        if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1:
            raise RuntimeError(f"{entry.name}: needs scratch memory or clusters, which the C library does not provide")
        scratch.add(check_parameters(entry, ptx))
        symbols.add(metadata.name)
        forms = [("cubin", 0, compiled.asm["cubin"])]
        # Later architectures compile the oldest PTX; Triton's from 9.0 on is for one architecture alone.
        if capability < 90 and capability == min(capabilities):
            forms.append(("ptx", 1, ptx.encode() + b"\0"))
        for form, is_ptx, data in forms:
            arrays.append(array(f"{form}_{capability}", data))
            images.append(f"    {{{capability}, {is_ptx}, {metadata.shared}, {form}_{capability}}},")
    if len(scratch) != 1 or len(symbols) != 1:
        raise RuntimeError(f"{entry.name}: the architectures differ in their parameters or names")
    return {
        "arrays": "\n\n".join(arrays),
        "images": "\n".join(images),
        "count": len(images),
        "symbol": symbols.pop(),
        "scratch_count": scratch.pop(),
    }


def signature(entry, rule) -> dict[str, str]:
    """C types of the function's parameters in order: pointers, sizes, numbers. The CUDA stream, before them, is called
    cuda_stream, since flow's kernel has a number called stream."""
    derived = derived_of(entry, rule)
    pointers = {name: "CUdeviceptr" for name, kind in entry.arguments.items() if kind.startswith("*")}
    sizes = {name: "int32_t" for name in rule.sizes}
    numbers = {n: C_TYPES[k] for n, k in entry.arguments.items() if n not in pointers and n not in derived}
    return pointers | sizes | numbers


def aligned_integers(entry, rule) -> list[str]:
    """Parameters of the C function that are integers and, as the kernel was compiled, multiples of 16."""
    return [name for name, kind in signature(entry, rule).items() if kind.startswith("int") and name in entry.aligned]


def declaration(entry, rule) -> str:
    types = {}
    for name, kind in entry.arguments.items():
        if kind.startswith("*"):
            types.setdefault(kind[1:], []).append(name)
    elements = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in types.items())
    about = rule.about.format(**constants_of(entry))
    sizes = [name for name in aligned_integers(entry, rule) if not name.endswith("_stride")]  # strides: the file's head
    multiples = "".join(f" {name} must be a multiple of 16." for name in sizes)
    text = f"{about}{multiples} Elements: {elements}."
    comment = textwrap.fill(text, 116, initial_indent="/* ", subsequent_indent=" * ")
    types_of_parameters = signature(entry, rule).items()
    parameters = ", ".join(["CUstream cuda_stream", *(f"{kind} {name}" for name, kind in types_of_parameters)])
    # A parameter's type and name stay on one line.
    code = f"UNITE_API int unite_{entry.name}({parameters});".replace(", ", ",\0").replace(" ", "\1")
    wrapped = textwrap.fill(code.replace("\0", " "), 118, subsequent_indent="    ", break_long_words=False)
    return f"{comment} */\n" + wrapped.replace("\1", " ")


def source(entry, rule, capabilities: list[int]) -> str:
    from launches import rule_name

    parameters = signature(entry, rule)
    derived = derived_of(entry, rule)
    integers = [name for name, kind in parameters.items() if kind.startswith("int")]
    expressions = [*rule.grid, *derived.values()]
    constants = {n: v for n, v in constants_of(entry).items() if any(re.search(rf"\b{n}\b", e) for e in expressions)}
    lines = []
    for name, expression in derived.items():
        lines.append(f"    unite_wide wide_{name} = {wide(expression)};")
        lines.append(f"    if (wide_{name} > INT32_MAX)\n        return UNITE_ERROR_ARGUMENT;")
        lines.append(f"    int32_t {name} = (int32_t)wide_{name};")
    wrong = [f"!unite_address_ok({name})" for name, kind in parameters.items() if kind == "CUdeviceptr"]
    wrong += [f"{name} % 16 != 0" for name in aligned_integers(entry, rule)]
    images = compile_images(entry, capabilities)
    scratch = [f"scratch_{index}" for index in range(images.pop("scratch_count"))]
    return string.Template((HERE / "kernel.c.in").read_text()).substitute(
        images,
        origin=f"{rule_name(entry.kernel)} of unite_kernels",
        function=f"unite_{entry.name}",
        parameters=", ".join(["CUstream cuda_stream", *(f"{kind} {name}" for name, kind in parameters.items())]),
        threads=32 * entry.num_warps,
        constants=f"    enum {{ {', '.join(f'{n} = {v}' for n, v in constants.items())} }};\n" if constants else "",
        negative=" || ".join(f"{name} < 0" for name in integers),
        derived="".join(f"{line}\n" for line in lines),
        grid_x=wide(rule.grid[0]),
        grid_y=wide(rule.grid[1]),
        misaligned=" || ".join(wrong),
        scratch="".join(f"    CUdeviceptr {name} = 0; /* Triton's, unused by this kernel */\n" for name in scratch),
        arguments=", ".join(f"&{name}" for name in (*entry.arguments, *scratch)),
    )


def devices(capabilities: list[int]) -> str:
    """The devices that code for these capabilities runs on, for the header."""
    # Machine code before 9.0 runs on later minor versions too, but on no earlier one.
    first = {c // 10 if c < 90 else c: c for c in sorted(capabilities, reverse=True)}
    served = [f"{c // 10}.{c % 10}" + (f" to {c // 10}.9" if c < 89 else "") for c in sorted(first.values())]
    oldest = min(capabilities)
    later = f", and by the driver's own compiler every one after {oldest // 10}.{oldest % 10}" if oldest < 90 else ""
    return f"compute capability {', '.join(served)}{later}"


def write(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def choose(names: list[str]) -> list[tuple]:
    """(specialisation, rule) of every name.

    Raises:
        SystemExit: a name is unknown, or its kernel has no rule yet.
    """
    from launches import RULES, rule_name

    from unite_kernels.specialisation import specialisations

    entries = {entry.name: entry for entry in specialisations() if rule_name(entry.kernel) in RULES}
    unknown = [name for name in names if name not in entries]
    if unknown:
        raise SystemExit(f"UNITE_KERNELS: no {', '.join(unknown)}; there are {', '.join(entries)}")
    return [(entries[name], RULES[rule_name(entries[name].kernel)]) for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--capabilities", type=int, nargs="+", required=True)
    parser.add_argument("--kernels", nargs="+", required=True)
    arguments = parser.parse_args()
    import_kernels()
    chosen = choose(arguments.kernels)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for entry, rule in chosen:
        write(arguments.output / f"{entry.name}.c", source(entry, rule, arguments.capabilities))
    header = string.Template((HERE / "unite_kernels.h.in").read_text()).substitute(
        version=arguments.version,
        devices=devices(arguments.capabilities),
        functions="\n\n".join(declaration(entry, rule) for entry, rule in chosen),
    )
    write(arguments.output / "unite_kernels.h", header)


if __name__ == "__main__":
    main()

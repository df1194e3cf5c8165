"""What the generator of the C library refuses and writes (kernels/aot/generate.py), without building the library."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripts import load_script

from unite_kernels import specialisation

GENERATE = Path(__file__).resolve().parents[1] / "kernels" / "aot" / "generate.py"


@pytest.fixture(scope="module")
def generate():
    return load_script(GENERATE)


ENTRY = SimpleNamespace(name="scale", arguments={"x": "*bf16", "rows": "i32", "seed": "i64"}, num_warps=4)
PARAMETERS = (".u64 .ptr .global .align 1 ", ".u32 ", ".u64 ")


def ptx(*parameters: str, threads: int = 128) -> str:
    """The head of a kernel as Triton writes it."""
    listed = ",\n".join(f"\t.param {kind}scale_param_{place}" for place, kind in enumerate(parameters))
    return f".target sm_80\n.visible .entry scale(\n{listed}\n)\n.reqntid {threads}\n{{\n}}\n"


@pytest.mark.parametrize("scratch", [0, 2])
def test_scratch_pointers_are_counted(generate, scratch):
    assert generate.check_parameters(ENTRY, ptx(*PARAMETERS, *[".u64 .ptr .global .align 1 "] * scratch)) == scratch


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ptx(*PARAMETERS[:2]), r"parameters of \[8, 4\] bytes in the PTX, of \[8, 4, 8\] in its specialisation"),
        (ptx(PARAMETERS[0], ".u64 ", ".u32 "), r"parameters of \[8, 8, 4\] bytes"),
        (ptx(*PARAMETERS, ".u32 "), r"parameters of \[8, 4, 8, 4\] bytes"),
        (ptx(*PARAMETERS, threads=64), "compiled for 64 threads instead of 128"),
        (".target sm_80", "no parameter list"),
    ],
)
def test_another_calling_convention_is_refused(generate, text, message):
    """The C function would pass the driver addresses of what is no argument."""
    with pytest.raises(RuntimeError, match=f"scale: .*{message}"):
        generate.check_parameters(ENTRY, text)


def fake_compiler(monkeypatch, of_capability) -> None:
    """Has every capability compile to what the function says: attributes of the metadata, and the PTX as `ptx`."""

    def compile_ahead(entry, capability):
        found = {"name": "scale", "shared": 512, "num_ctas": 1, "global_scratch_size": 0, "profile_scratch_size": 0}
        found |= {"ptx": ptx(*PARAMETERS)} | of_capability(capability)
        return SimpleNamespace(metadata=SimpleNamespace(**found), asm={"ptx": found["ptx"], "cubin": b"\1\2\3"})

    monkeypatch.setattr(specialisation, "compile_ahead", compile_ahead)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"global_scratch_size": 1}, "needs scratch memory or clusters"),
        ({"profile_scratch_size": 1}, "needs scratch memory or clusters"),
        ({"num_ctas": 2}, "needs scratch memory or clusters"),
        ({"name": "scale_1"}, "the architectures differ"),
        ({"ptx": ptx(*PARAMETERS, ".u64 ")}, "the architectures differ"),
    ],
)
def test_what_the_library_cannot_launch_is_refused(generate, monkeypatch, odd, message):
    fake_compiler(monkeypatch, lambda capability: odd if capability == 90 else {})
    with pytest.raises(RuntimeError, match=f"scale: {message}"):
        generate.compile_images(ENTRY, [80, 90])


def test_images(generate, monkeypatch):
    """Machine code of every capability with its shared memory, PTX of the oldest alone, ended as C's strings are."""
    fake_compiler(monkeypatch, lambda capability: {"shared": capability})
    fields = generate.compile_images(ENTRY, [90, 86, 80])
    images = ["{90, 0, 90, cubin_90}", "{86, 0, 86, cubin_86}", "{80, 0, 80, cubin_80}", "{80, 1, 80, ptx_80}"]
    assert fields["images"].split() == "".join(f"{image}, " for image in images).split()
    assert fields["count"] == 4 and fields["scratch_count"] == 0 and fields["symbol"] == "scale"
    assert "{\n1,2,3};" in fields["arrays"] and fields["arrays"].replace("\n", "").endswith(",125,10,0};")


def test_sums_count_the_chunks_that_backward_passes_write(generate):
    entries = specialisation.specialisations()
    backward = [entry for entry in entries if "norm_backward" in entry.name or "boundary_backward" in entry.name]
    chunks = {entry.constants["CHUNK"] for entry in backward}
    assert chunks == {generate.constants_of(entry)["AHEAD_CHUNK"] for entry in entries if "norm_sum" in entry.name}


@pytest.mark.parametrize(
    ("capabilities", "text"),
    [
        ([90, 80], "compute capability 8.0 to 8.9, 9.0, and by the driver's own compiler every one after 8.0"),
        ([89], "compute capability 8.9, and by the driver's own compiler every one after 8.9"),
        ([80, 86, 100], "compute capability 8.0 to 8.9, 10.0, and by the driver's own compiler every one after 8.0"),
        ([90, 120], "compute capability 9.0, 12.0"),
    ],
)
def test_devices_named_in_the_header(generate, capabilities, text):
    assert generate.devices(capabilities) == text


def test_files_are_written_aside(generate, monkeypatch, tmp_path):
    path = tmp_path / "scale.c"
    generate.write(path, "first")
    monkeypatch.setattr(Path, "replace", lambda *paths: None)  # as if it had ended before
    generate.write(path, "second")
    assert path.read_text() == "first"


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Triton compiles on Linux x86_64"
)
@pytest.mark.parametrize(
    ("capability", "kernels", "message"),
    [
        # The second has no rule of its launch.
        ("80", ["philox", "fp8_largest_bf16"], "UNITE_KERNELS: no philox, fp8_largest_bf16; there are rms_norm_"),
        ("95", ["philox_uniform"], "UNITE_CAPABILITIES: Triton's assembler knows no 95: "),
    ],
)
def test_mistakes_are_said_in_a_sentence(tmp_path, capability, kernels, message):
    """Under Triton's interpreter, too, which other tests run in."""
    command = [sys.executable, "-B", GENERATE, "--output", tmp_path / "out", "--version", "0.1.0"]
    command += ["--capabilities", capability, "--kernels", *kernels]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(message), done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
    assert not (tmp_path / "out" / "unite_kernels.h").exists()

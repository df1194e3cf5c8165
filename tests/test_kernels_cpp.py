"""The C library: built, installed, moved and used from outside the tree, with no GPU and no CUDA toolkit.

What it tells the driver is read from a driver of our own, a shared library that prints the calls it gets.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

LINUX = (platform.system(), platform.machine()) == ("Linux", "x86_64")
MISSING = [tool for tool in ("cmake", "cc", "c++") if shutil.which(tool) is None]
needs_build = pytest.mark.skipif(
    not LINUX or bool(MISSING), reason=f"needs {', '.join(MISSING)}" if MISSING else "Triton compiles on Linux x86_64"
)

DRIVER = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long address;
static int setting(const char *name) { const char *text = getenv(name); return text ? atoi(text) : 0; }

int cuInit(unsigned flags) { (void)flags; return setting("INIT_CODE"); }
int cuGetErrorString(int code, const char **text) { *text = "words of the driver"; return code < 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    (void)device;
    *value = attribute == 75 ? setting("CAPABILITY") / 10 : setting("CAPABILITY") % 10;
    return attribute != 75 && attribute != 76;
}
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
#ifndef OLD
int cuCtxGetId(void *context, address *id) { *id = (address)context; return 0; }
#endif
static __thread int depth;
int cuCtxPushCurrent_v2(void *context) { (void)context; depth++; return 0; }
int cuCtxPopCurrent_v2(void **context) { *context = 0; depth--; return depth != 0; }
/* Every stream has a context of its own, called by the stream's address. */
int cuStreamGetCtx(void *stream, void **context) { *context = stream; return stream ? 0 : 201; }
int cuModuleLoadData(void **module, const void *image)
{
    uint32_t flags;
    memcpy(&flags, (const char *)image + 48, 4); /* e_flags of ELF64 hold the architecture */
    if (memcmp(image, "\x7f" "ELF", 4))
        printf("load ptx%s\n", strstr(image, ".target sm_80") ? " sm_80" : "");
    else
        printf("load cubin %x\n", flags);
    *module = (void *)image;
    return depth != 1;
}
int cuModuleUnload(void *module) { (void)module; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name)
{
    (void)name;
    *function = module;
    return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value)
{
    (void)function;
    return attribute != 8 || value <= 49152;
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                   unsigned threads_z, unsigned shared, void *stream, void **arguments, void **extra)
{
    flockfile(stdout); /* threads' lines stay whole */
    printf("launch %u %u %u threads %u %u %u stream %lx arguments", x, y, z, threads, threads_y, threads_z,
           (unsigned long)stream);
    for (const char *kind = getenv("ARGUMENTS"); kind && *kind; kind++, arguments++) {
        if (*kind == 'p') printf(" %llx", *(address *)*arguments);
        if (*kind == 'i') printf(" %d", *(int *)*arguments);
        if (*kind == 'f') printf(" %g", *(float *)*arguments);
    }
    printf("\n");
    funlockfile(stdout);
    fflush(stdout);
    (void)shared;
    return depth != 1 || function == 0 || extra != 0;
}
"""


def sh(*command, **environment) -> str:
    done = subprocess.run(
        [str(part) for part in command], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    """An installation that was moved after it was made, its build folder gone."""
    folder = tmp_path_factory.mktemp("cpp")
    build, made, moved = folder / "build", folder / "made", folder / "moved"
    sh("cmake", "-B", build, "-S", ROOT, f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_C_FLAGS=-Werror")
    sh("cmake", "--build", build, "--parallel", "2")
    sh("cmake", "--install", build, "--prefix", made)
    shutil.rmtree(build)
    made.rename(moved)
    return moved


@pytest.fixture(scope="module")
def library(prefix) -> Path:
    (found,) = prefix.glob("lib*/libunite_kernels.so")
    return found


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """Makes folders with our driver in them, for LD_LIBRARY_PATH."""

    def make(*flags: str) -> str:
        folder = tmp_path_factory.mktemp("driver")
        (folder / "driver.c").write_text(DRIVER)
        sh("cc", "-shared", "-fPIC", *flags, folder / "driver.c", "-o", folder / "libcuda.so.1")
        return str(folder)

    return make


def call(library: Path, code: str, **environment) -> list[str]:
    """Lines printed by Python code that has the library as `u`, in a process that sees the given environment."""
    start = f"import ctypes\nu = ctypes.CDLL({str(library)!r})\nu.unite_error_string.restype = ctypes.c_char_p\n"
    start += "p, f = ctypes.c_uint64, ctypes.c_float\n"
    return sh(sys.executable, "-c", start + code, **environment).splitlines()


@needs_build
def test_nothing_in_the_package_names_this_machine(prefix, library):
    roots = [str(part).encode() for part in (ROOT, prefix.parent, Path(sys.prefix))]
    for path in (p for p in prefix.rglob("*") if p.is_file()):
        assert not [root for root in roots if root in path.read_bytes()], path
    assert (prefix / "include" / "unite_kernels.h").is_file()
    assert list(library.parent.glob("libunite_kernels.a"))


@needs_build
def test_example_outside_the_tree(prefix, tmp_path):
    sources = shutil.copytree(ROOT / "examples" / "cpp", tmp_path / "example")
    sh("cmake", "-B", tmp_path / "build", "-S", sources, f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_CXX_FLAGS=-Werror")
    sh("cmake", "--build", tmp_path / "build")
    try:
        ctypes.CDLL("libcuda.so.1")
        driver = True
    except OSError:
        driver = False
    for program in ("swiglu", "swiglu_static"):
        done = subprocess.run([tmp_path / "build" / program], capture_output=True, text=True, check=False)
        if torch.cuda.is_available():
            assert done.returncode == 0 and "agrees" in done.stdout, done.stdout
        else:
            assert done.returncode == 2, done.stdout
            if not driver:
                assert "unite_initialize: error -1: the CUDA driver is not installed" in done.stdout


@needs_build
@pytest.mark.parametrize(
    ("capability", "image"), [("80", "8"), ("86", "8"), ("90", "9"), ("100", "ptx"), ("120", "ptx")]
)
def test_launch(library, driver, capability, image):
    """Grid, threads and arguments reach the driver, with the image that the device can run."""
    code = "print(u.unite_swiglu_forward_bf16_2048(p(0x10), p(0x100), p(0x200), 37))"
    loaded, launched, code = call(library, code, LD_LIBRARY_PATH=driver(), CAPABILITY=capability, ARGUMENTS="ppi")
    assert code == "0"
    assert launched == "launch 37 2 1 threads 128 1 1 stream 10 arguments 100 200 37"
    if image == "ptx":
        assert loaded == "load ptx sm_80"
    else:
        # The architecture is the low byte of the ELF header's flags, in the newer of the two layouts the second one.
        assert loaded.startswith("load cubin")
        flags = int(loaded.split()[-1], 16)
        assert {"8": 80, "9": 90}[image] in (flags & 0xFF, flags >> 8 & 0xFF), loaded


@needs_build
def test_derived_arguments(library, driver):
    """Sizes of the caller become the kernel's own: 3 samples of 33 tokens are 3 · ⌈33 / 16⌉ programs of 16 tokens."""
    code = """
print(u.unite_rms_norm_forward_bf16_768(p(0x10), p(16), p(32), p(48), p(64), p(80), 3, 33, 768, 1536, f(0.5)))
"""
    lines = call(library, code, LD_LIBRARY_PATH=driver(), CAPABILITY="90", ARGUMENTS="pppppiiiiif")
    assert lines[1:] == [
        "launch 9 1 1 threads 128 1 1 stream 10 arguments 10 20 30 40 50 33 3 0 768 1536 0.5",
        "0",
    ]


@needs_build
def test_seeds_of_64_bits(library, driver):
    code = "print(u.unite_philox_normal(p(0x10), p(0x100), p(0x200), 2, p(1 << 40), 3, 4, 32))"
    lines = call(library, code, LD_LIBRARY_PATH=driver(), CAPABILITY="90", ARGUMENTS="pppiii")
    assert lines[1:] == ["launch 1 2 1 threads 128 1 1 stream 10 arguments 100 200 10000000000 3 4 32", "0"]


@needs_build
def test_packed_samples(library, driver):
    """Programs are those of three samples as long as the longest, 33 tokens, and the offsets tell them their own."""
    code = """
streams = [p(16 * i) for i in range(1, 10)]
print(u.unite_packed_block_boundary_forward_bf16_384(p(0x10), *streams, p(0x100), 3, 33, 768, 768, 768, f(0.5)))
print(u.unite_packed_rms_norm_forward_bf16_384(p(0x10), *streams[:5], p(0), 3, 33, 768, 768, f(0.5)))
"""
    lines = call(library, code, LD_LIBRARY_PATH=driver(), CAPABILITY="90", ARGUMENTS="ppppppppppiiiiif")
    assert lines[1:] == [
        "launch 9 1 1 threads 64 1 1 stream 10 arguments "
        "10 20 30 40 50 60 70 80 90 100 33 3 768 768 768 0.5",
        "0",
        "-4",  # no offsets
    ]


@needs_build
def test_contexts_and_threads(library, driver):
    """A kernel is loaded once a context, however many threads launch it at the same time."""
    code = """
import threading
def work(stream):
    for _ in range(50):
        assert u.unite_swiglu_forward_bf16_2048(p(stream), p(0x100), p(0x200), 1) == 0
        assert u.unite_swiglu_backward_bf16_2048(p(stream), p(0x100), p(0x200), p(0x300), 1) == 0
threads = [threading.Thread(target=work, args=(0x10 * (1 + i % 3),)) for i in range(9)]
[t.start() for t in threads]
[t.join() for t in threads]
"""
    lines = call(library, code, LD_LIBRARY_PATH=driver(), CAPABILITY="90")
    assert sum(line.startswith("load") for line in lines) == 3 * 2
    assert sum(line.startswith("launch") for line in lines) == 9 * 50 * 2


@needs_build
def test_errors(library, driver):
    code = """
launch = u.unite_swiglu_forward_bf16_2048
for code in (
    launch(p(0x10), p(0x100), p(0x201), 1),  # not aligned
    launch(p(0x10), p(0), p(0x200), 1),      # no tensor
    launch(p(0x10), p(0x100), p(0x200), -1),
    u.unite_rms_norm_forward_bf16_768(p(0x10), p(16), p(32), p(48), p(64), p(80), 1, 1, 768, 770, f(1)),  # stride
    u.unite_rms_norm_forward_bf16_768(p(0x10), p(16), p(32), p(48), p(64), p(80), 2**31 - 1, 64, 768, 768, f(1)),
    u.unite_philox_normal(p(0x10), p(0x100), p(0x200), 1, ctypes.c_int64(0), 0, 0, 17),  # a size that must be aligned
    u.unite_philox_normal(p(0x10), p(0x100), p(0x200), 1, ctypes.c_int64(-1), 0, 0, 16),  # no seed
    u.unite_rms_norm_forward_bf16_768(p(0x10), p(16), p(32), p(48), p(64), p(80), 1, 1, 768, -768, f(1)),
    u.unite_qk_norm_rope_forward_bf16_12x64(  # 12 * 2**30 rows, which are 0 in 32 bits
        p(0x10), p(16), p(32), p(48), p(64), p(80), p(96), 2**20, 2**10, 0, f(1)
    ),
    u.unite_patch_l1_forward_bf16(p(0x10), p(16), p(32), p(48), p(64), 65536),  # programs along the second axis
    launch(p(0x10), p(0), p(0), 0),          # nothing to do
    launch(p(0), p(0x100), p(0x200), 1),     # no current context
    launch(p(0x10), p(0x100), p(0x200), 1),
    launch(p(0x10), p(0x100), p(0x200), 1),  # what was not loaded is not kept
):
    print(code, u.unite_error_string(code).decode())
"""
    lines = call(library, code, LD_LIBRARY_PATH=driver(), CAPABILITY="75")
    codes = [int(line.split()[0]) for line in lines]
    assert codes == [-4] * 10 + [0, 201, -3, -3]
    assert "an address is 0" in lines[1] and "an integer is negative" in lines[6]
    assert "a size is no multiple of 16" in lines[5]
    assert lines[11] == "201 words of the driver"
    assert "architecture" in lines[12]


@needs_build
def test_the_header_says_which_sizes_are_multiples_of_16(prefix):
    header = (prefix / "include" / "unite_kernels.h").read_text()
    for function, sizes in {
        "philox_normal": ["count"],
        "latent_norm_mix_forward_fp32_32": ["tokens"],
        "lpips_distance_forward_bf16_64": ["pixels"],
        "block_boundary_sum_bf16": ["width"],
        "block_boundary_forward_bf16_768": [],
        "swiglu_forward_bf16_2048": [],
        "swiglu_backward_bf16_2736": [],  # of C = 1024
    }.items():
        comment = header.split(f"UNITE_API int unite_{function}(")[0].rsplit("/*", 1)[1]
        comment = " ".join(comment.replace("*", " ").split())
        assert re.findall(r"(\w+) must be a multiple of 16", comment) == sizes, function


@needs_build
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("CAPABILITIES=9.0", 'has "9.0"; a compute capability is written without point and letters: 80, 90, 100'),
        ("CAPABILITIES=80;sm_90", 'has "sm_90"'),
        ("CAPABILITIES=", "UNITE_CAPABILITIES is empty"),
        ("KERNELS=", "UNITE_KERNELS is empty"),
    ],
)
def test_settings_are_refused_while_configuring(tmp_path, setting, message):
    command = ["cmake", "-B", tmp_path, "-S", ROOT, f"-DPython3_EXECUTABLE={sys.executable}", f"-DUNITE_{setting}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and message in " ".join(done.stderr.split()), done.stderr


@needs_build
def test_settings_may_repeat_themselves(tmp_path):
    """And the environment may keep Python from importing what stands beside a script."""
    settings = ["-DUNITE_CAPABILITIES=90;86;86", "-DUNITE_KERNELS=philox_uniform;philox_uniform"]
    sh("cmake", "-B", tmp_path, "-S", ROOT, f"-DPython3_EXECUTABLE={sys.executable}", *settings)
    sh("cmake", "--build", tmp_path, PYTHONSAFEPATH="1")
    header = " ".join((tmp_path / "generated" / "unite_kernels.h").read_text().split())
    assert "Devices: compute capability 8.6 to 8.9, 9.0, and by the driver's own compiler every one after" in header


@needs_build
def test_as_a_folder_of_another_project(tmp_path):
    """By the names of the installed package, its header found and made first."""
    (tmp_path / "CMakeLists.txt").write_text(f"""
cmake_minimum_required(VERSION 3.20)
project(other LANGUAGES CXX)
add_subdirectory({ROOT} unite_kernels)
foreach(library unite_kernels unite_kernels_static)
  add_executable(uses_${{library}} "{ROOT}/examples/cpp/swiglu.cpp")
  target_compile_features(uses_${{library}} PRIVATE cxx_std_17)
  target_link_libraries(uses_${{library}} PRIVATE unite_kernels::${{library}} ${{CMAKE_DL_LIBS}})
endforeach()
""")
    settings = ["-DUNITE_CAPABILITIES=90", "-DUNITE_KERNELS=swiglu_forward_bf16_2048"]
    sh("cmake", "-B", tmp_path / "build", "-S", tmp_path, f"-DPython3_EXECUTABLE={sys.executable}", *settings)
    sh("cmake", "--build", tmp_path / "build", "--parallel", "2")
    for library in ("unite_kernels", "unite_kernels_static"):
        done = subprocess.run([tmp_path / "build" / f"uses_{library}"], capture_output=True, text=True, check=False)
        assert done.returncode in (0, 2), done.stderr  # as in the example: 2 without a GPU


@needs_build
@pytest.mark.parametrize(("flags", "init", "expected"), [(["-DOLD"], "0", -2), ([], "100", 100)])
def test_driver_that_cannot_be_used(library, driver, flags, init, expected):
    code = "print(u.unite_initialize(), u.unite_initialize())"
    assert call(library, code, LD_LIBRARY_PATH=driver(*flags), INIT_CODE=init) == [f"{expected} {expected}"]

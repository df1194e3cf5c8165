"""What makes UNITE fast on this machine: what is active, what a missing part costs, how to get it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MIN_TORCH = (2, 11)
# Wide enough that overhead is a small share, small enough for CPUs that emulate bfloat16 (1.2 GFLOP/s: 30 ms).
MATMUL_CPU, MATMUL_CUDA = 256, 4096
MATMUL_REPEATS = 10
# Whose versions a report of a problem should carry, beside those that the parts tell.
PACKAGES = ("unite_fast", "numpy", "pillow", "pydantic", "safetensors", "torchdiffeq")


class Missing(Exception):
    """A part is not there or cannot be used here; the message says why."""


@dataclass(frozen=True)
class Part:
    """Something that speeds training up.

    Attributes:
        name: of the part.
        probe: says in a line what is active; raises Missing, or anything else where the part is broken.
        cost: what is lost without it.
        remedy: how to get it.
    """

    name: str
    probe: Callable[[], str]
    cost: str
    remedy: str


@dataclass(frozen=True)
class Finding:
    """The state of one part on this machine."""

    name: str
    active: bool
    detail: str
    cost: str
    remedy: str


def examine() -> list[Finding]:
    """Probe every part; a part whose import fails in any way is reported as missing, with what it raised."""
    return [_examine(part) for part in PARTS]


def _examine(part: Part) -> Finding:
    try:
        # Imports of large packages print banners and warnings, which belong neither into a table nor into JSON.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return Finding(part.name, True, part.probe(), "", "")
    except Missing as reason:
        detail = str(reason)
    except (Exception, SystemExit) as error:
        first = str(error).strip().splitlines() or [""]
        detail = f"broken: {type(error).__name__}: {first[0][:200]}"
    return Finding(part.name, False, detail, part.cost, part.remedy)


def _torch() -> str:
    torch = _import("torch")
    built = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU"
    )
    version = tuple(int(number) for number in torch.__version__.split("+")[0].split(".")[:2])
    if version < MIN_TORCH:
        raise Missing(f"{torch.__version__} is older than {'.'.join(map(str, MIN_TORCH))}")
    return f"{torch.__version__}, built for {built}, Python {platform.python_version()}"


def _cuda() -> str:
    torch = _import("torch")
    if not torch.cuda.is_available():
        raise Missing("this PyTorch is built without CUDA" if torch.version.cuda is None else "no device, or no driver")
    names = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        names.append(f"{device.name} (capability {device.major}.{device.minor}, {device.total_memory / 2**30:.0f} GiB)")
    return "; ".join(names)


def _bf16() -> str:
    torch = _import("torch")
    cuda = torch.cuda.is_available()
    rates = {name: _matmul_rate(getattr(torch, name), cuda) for name in ("float32", "bfloat16")}
    unit = "TFLOP/s" if cuda else "GFLOP/s"
    divisor = 1e12 if cuda else 1e9
    measured = ", ".join(f"{name} {rate / divisor:.3g} {unit}" for name, rate in rates.items())
    if not cuda:
        raise Missing(f"needs a CUDA device; matrix products on this CPU: {measured}")
    if torch.cuda.get_device_capability() < _import("unite_fast.engine.backend").MIN_BF16_CAPABILITY:
        raise Missing(f"the device only emulates it; matrix products: {measured}")
    inside = _import("unite_fast.model.casts").adds_products(torch.device("cuda", torch.cuda.current_device()))
    return f"matrix products: {measured}; weights' gradients are added up {'inside' if inside else 'outside'} of them"


def _matmul_rate(dtype: object, cuda: bool) -> float:
    """Operations a second of a square matrix product by the library that the model's take, best of a few."""
    torch, product = _import("torch"), _import("unite_fast.model.linear").linear_product
    side = MATMUL_CUDA if cuda else MATMUL_CPU
    a = torch.randn(side, side, device="cuda" if cuda else "cpu").to(dtype)  # equal numbers would flatter a GPU
    best = float("inf")
    for _ in range(1 + MATMUL_REPEATS):
        started = time.perf_counter()
        product(a, a)
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def _triton() -> str:
    triton = _import("triton")
    if not _import("torch").cuda.is_available():
        raise Missing(f"{triton.__version__} is installed but idle: needs a CUDA device")
    return f"{triton.__version__}, runs the fused operators of unite_kernels"


def _cpu_operators() -> str:
    cpu = _import("unite_kernels.cpu")
    if cpu.LIBRARY is None:
        raise Missing(cpu.STATE)
    products = " and Newton-Schulz" if cpu.LIBRARY.unite_multiplies() else ""
    return f"compiled, runs a block's fused operators{products} in float32 on a CPU"


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")):
        found = shutil.which(name)
        if found:
            return found
    raise Missing("none of $CC, cc, gcc, clang is on the PATH")


def _compile() -> str:
    torch = _import("torch")
    from unite_fast.engine.compiling import missing_for_compile

    cuda = torch.cuda.is_available()
    missing = missing_for_compile(torch.device("cuda" if cuda else "cpu"))
    if missing:
        raise Missing(missing)
    return f"train.compile can work here: it writes {'Triton' if cuda else 'C++'} and builds it in the first step"


def _fp8() -> str:
    torch = _import("torch")
    from unite_kernels.fp8 import MIN_CAPABILITY

    if not torch.cuda.is_available():
        raise Missing("a CPU only emulates FP8, and that is slow: needs a CUDA device")
    if torch.cuda.get_device_capability() < MIN_CAPABILITY:
        raise Missing("the device has no FP8 products")
    return "the device has FP8 products, for train.fp8"


def _flash() -> str:
    if not _import("torch").cuda.is_available():
        raise Missing("needs a CUDA device; attention uses torch's scaled_dot_product_attention")
    from unite_fast.model.attention import flash_backend

    backend = flash_backend()
    if backend is None:
        raise Missing("not installed for this device; attention uses torch's scaled_dot_product_attention")
    return backend.name


def _dali() -> str:
    return str(_import("nvidia.dali").__version__)


def _apex() -> str:
    # NVIDIA's build brings the extension amp_C; the package named apex on PyPI is a web toolkit without it.
    if _spec("apex") is not None and _spec("amp_C") is None:
        raise Missing(
            "a package named apex is installed that is not NVIDIA's, or one built without its CUDA extensions"
        )
    if _spec("apex") is None:
        raise Missing("not installed")
    if not _import("torch").cuda.is_available():
        raise Missing("installed but idle: needs a CUDA device")
    from apex.optimizers import FusedAdam

    return f"{FusedAdam.__module__}.{FusedAdam.__name__}"


def _deepspeed() -> str:
    return str(_import("deepspeed").__version__)


def _deepspeed_ops() -> str:
    _import("deepspeed")
    installed = _import("deepspeed.git_version_info").installed_ops
    ready = sorted(name for name, is_built in installed.items() if is_built)
    built = {path.parent.name for path in _extension_cache().glob("**/*.so")}
    ready += [f"{name} (cached)" for name in sorted(built & set(installed))]
    if not ready:
        tool = "ninja is there to build them on first use" if _ninja() else "ninja, which builds them, is missing"
        raise Missing(f"none is built yet; {tool}")
    return ", ".join(ready)


def _extension_cache() -> Path:
    """Where PyTorch keeps extensions that were built on first use."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(given) if given else Path.home() / ".cache" / "torch_extensions"


def _ninja() -> bool:
    return shutil.which("ninja") is not None or Path(sys.executable).with_name("ninja").is_file()


def _spec(name: str) -> object | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):  # a module that is half there
        return None


def _import(name: str):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise Missing("not installed") from None
        raise


PARTS = (
    Part(
        "PyTorch",
        _torch,
        "nothing runs",
        "pip install 'torch>=2.11' (https://pytorch.org/get-started/locally picks the build for your driver)",
    ),
    Part(
        "CUDA",
        _cuda,
        "training runs on the CPU: minutes for the quickstart, out of the question for ImageNet",
        "an NVIDIA GPU with its driver (`nvidia-smi` shows it) and a CUDA build of PyTorch",
    ),
    Part(
        "bfloat16",
        _bf16,
        "training computes in float32: twice the memory traffic, a fraction of the matrix speed of a GPU",
        "a GPU of capability 8.0 or newer (A100, RTX 30, H100 …); train.precision auto uses it by itself",
    ),
    Part(
        "Triton",
        _triton,
        "the fused operators run as plain PyTorch, which reads and writes activations several times",
        "pip install triton on Linux, and a CUDA device",
    ),
    Part(
        "CPU operators",
        _cpu_operators,
        "on a CPU plain PyTorch runs these, a training step takes a tenth to a half longer",
        "a C compiler, GCC on Linux, and then pip install --force-reinstall --no-deps --editable . in the repository",
    ),
    Part(
        "C compiler",
        _compiler,
        "Triton and torch.compile cannot build their launchers, DeepSpeed cannot build its operators",
        "apt install build-essential, or dnf install gcc gcc-c++; or point CC at one",
    ),
    Part(
        "torch.compile",
        _compile,
        "train.compile is refused: the passes run operator by operator",
        "apt install g++ python3-dev, or dnf install gcc-c++ python3-devel; on CUDA pip install triton",
    ),
    Part(
        "FP8",
        _fp8,
        "matrix products run in bfloat16; train.fp8 is refused, or emulated on a CPU",
        "a GPU of capability 8.9 or newer (RTX 40, H100, H200)",
    ),
    Part(
        "FlashAttention",
        _flash,
        "attention goes through torch's own kernels",
        "on Hopper build FlashAttention 3 (folder hopper/ of github.com/Dao-AILab/flash-attention); "
        "elsewhere pip install flash-attn --no-build-isolation",
    ),
    Part(
        "DALI",
        _dali,
        "images are decoded by Pillow in worker processes: many CPU cores per GPU are needed",
        "pip install nvidia-dali-cuda130 (or the package of your CUDA version)",
    ),
    Part(
        "NVIDIA Apex",
        _apex,
        "AdamW runs as torch's own fused kernel instead of Apex's",
        "build it from github.com/NVIDIA/apex with --cpp_ext --cuda_ext; `pip install apex` is another project",
    ),
    Part(
        "DeepSpeed",
        _deepspeed,
        "training runs on one process, without ZeRO",
        "pip install 'unite_fast[deepspeed]'",
    ),
    Part(
        "DeepSpeed ops",
        _deepspeed_ops,
        "nothing is lost: the trainer brings its own optimizer and communicates through NCCL or gloo",
        "not needed; DS_BUILD_OPS=1 while installing DeepSpeed builds them",
    ),
)

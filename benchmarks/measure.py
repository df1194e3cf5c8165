"""Clocks: one timed call at a time, the device's copy bandwidth, and what a record holds."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gate import RECORDS

from unite_fast.model.linear import linear_product
from unite_kernels.cpu import cpuinfo
from unite_kernels.toolchain import AVAILABLE, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Written before every timed call on a GPU. 8 GiB take about 2 ms at 4 TB/s: the host enqueues the call meanwhile (the
# longest, flow_noise in eager PyTorch, is some 150 launches of 5 to 10 µs), so that launches are not timed; and no L2
# cache keeps the inputs.
SWEEP_BYTES, SWEEPS = 2**30, 8
# Far beyond any cache: the largest L2 of a GPU is 128 MB, a server CPU's L3 shares reach 32 MB a few cores.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
ROUNDS = {"cuda": 50, "cpu": 20}
MAKERS = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}  # of x86-64 CPUs, as /proc/cpuinfo calls them


class Clock:
    """Times calls on the device; called, it says how many seconds it has timed so far.

    So pytest-benchmark can use it as its timer: it runs only while a call that is asked for runs.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._sweep = None

    def __call__(self) -> float:
        return self.now

    def advance(self, run: Callable[[], object]) -> float:
        """Time a call, let the clock run for that long, and return it."""
        return self.count(self.seconds(run))

    def count(self, seconds: float) -> float:
        """Let the clock run for as long as a call took that was timed otherwise, and return that."""
        self.now += seconds
        return seconds

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds of one call; on a GPU those of the device, from cold caches and without launches."""
        if DEVICE == "cpu":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        if self._sweep is None:
            self._sweep = torch.empty(SWEEP_BYTES, dtype=torch.int8, device=DEVICE)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(SWEEPS):
            self._sweep.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


CLOCK = Clock()


def copy_bandwidth() -> float:
    """Bytes a second of a large copy, each byte counted twice (read and written): the median of ROUNDS."""
    source = torch.ones(COPY_BYTES[DEVICE], dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    own_seconds(lambda: target.copy_(source))  # the first write of fresh pages costs page faults
    times = [own_seconds(lambda: target.copy_(source)) for _ in range(ROUNDS[DEVICE])]
    return 2 * source.nbytes / spread(times)["median"]


def matmul_rate() -> float:
    """Operations a second of a large matrix product in the dtype of training, by the library that a Linear takes: what
    MFU is a share of."""
    side, dtype = (8192, torch.bfloat16) if DEVICE == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
    for _ in range(3):
        linear_product(a, b)
    times = [own_seconds(lambda: linear_product(a, b)) for _ in range(ROUNDS[DEVICE])]
    return 2 * side**3 / spread(times)["median"]


MATMUL_PEAK = f"measured: {'8192³ in bfloat16' if DEVICE == 'cuda' else '1024³ in float32'}"


def own_seconds(run: Callable[[], object]) -> float:
    """Seconds that the device works on one call: between two events on a GPU, processor time of this process on a CPU,
    where the wall clock also counts waiting for a core that others hold.
    """
    return CLOCK.seconds(run) if DEVICE == "cuda" else wall_and_process_seconds(run)[1]


def wall_and_process_seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of one call from idle device to idle device, launches included, and this process's share of them."""
    _wait()
    process, wall = time.process_time(), time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - wall, time.process_time() - process


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def tail(times: list[float]) -> float:
    """95th percentile over median."""
    ends = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    return ends[1] / ends[0]


def device_class() -> str:
    """What a baseline is of: the name of a GPU, the maker and the vector instructions of a CPU."""
    if DEVICE == "cuda":
        return _slug(torch.cuda.get_device_properties(0).name).lower()
    maker = MAKERS.get(cpuinfo("vendor_id"), platform.machine())
    return _slug(f"cpu-{maker}-{torch.backends.cpu.get_cpu_capability()}").lower()


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text).strip("-")


def spread(times: list[float]) -> dict[str, float]:
    """Quartiles of timed calls, seconds."""
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    quartiles = torch.tensor(times, dtype=torch.float64).quantile(quarters).tolist()
    return dict(zip(("low", "median", "high"), quartiles, strict=True))


def environment() -> dict:
    """The machine and the libraries a number belongs to."""
    described = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__ if AVAILABLE else None,
        "cuda": torch.version.cuda,
        "device_class": device_class(),
    }
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        capability = f"{properties.major}.{properties.minor}"
        return described | {"device": properties.name, "capability": capability, "memory": properties.total_memory}
    return described | {"device": cpuinfo("model name") or platform.machine(), "threads": torch.get_num_threads()}


def source() -> dict:
    """The commit that is checked out, and whether there are changes beside it; None for both where git does not say."""
    commit = _git("rev-parse", "HEAD")
    # Records of the runs before are no change of what is measured.
    changes = _git("status", "--porcelain", "--", ":/", ":(exclude)records")
    if commit is None or changes is None:
        return {"commit": None, "uncommitted_changes": None}
    return {"commit": commit, "uncommitted_changes": bool(changes)}


def _git(*arguments: str) -> str | None:
    """What git says of the tree this file is in; None without git or outside of a repository."""
    try:
        ran = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def write_record(
    checkout: dict, bandwidth: float | None, results: list[dict], inputs: list[dict], complete: bool
) -> Path:
    """Write one run's results under records/ and return the file.

    Args:
        checkout: what `source` said before anything was measured.
        bandwidth: bytes a second of a copy, where it was measured.
        results: the rows of steps, parts, operators, sampling and metrics.
        inputs: the rows of loaders.
        complete: all benchmarks ran, as a baseline wants it.
    """
    where = environment()
    name = "_".join(_slug(where[key]) for key in ("device", "date"))
    path = RECORDS / f"{name}.json"
    RECORDS.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    rows = {"results": results, "input": inputs}
    record = where | checkout | {"complete": complete, "copy_bytes_per_second": bandwidth} | rows
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path

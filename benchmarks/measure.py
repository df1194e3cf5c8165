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

from unite_kernels.toolchain import AVAILABLE, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RECORDS = Path(__file__).with_name("records")
# Written before every timed call on a GPU. 8 GiB take about 2 ms at 4 TB/s: the host enqueues the call meanwhile (the
# longest, flow_noise in eager PyTorch, is some 150 launches of 5 to 10 µs), so that launches are not timed; and no L2
# cache keeps the inputs.
SWEEP_BYTES, SWEEPS = 2**30, 8
# Far beyond any cache: the largest L2 of a GPU is 128 MB, a server CPU's L3 shares reach 32 MB a few cores.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
ROUNDS = {"cuda": 50, "cpu": 20}


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
        seconds = self.seconds(run)
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
    CLOCK.seconds(lambda: target.copy_(source))  # the first write of fresh pages costs page faults
    times = [CLOCK.seconds(lambda: target.copy_(source)) for _ in range(ROUNDS[DEVICE])]
    return 2 * source.nbytes / spread(times)["median"]


def spread(times: list[float]) -> dict[str, float]:
    """Quartiles of timed calls, seconds."""
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    quartiles = torch.tensor(times, dtype=torch.float64).quantile(quarters).tolist()
    return dict(zip(("low", "median", "high"), quartiles, strict=True))


def environment() -> dict:
    """The machine and the software a number belongs to."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    changes = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True)
    described = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "uncommitted_changes": bool(changes.stdout.strip()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__ if AVAILABLE else None,
        "cuda": torch.version.cuda,
    }
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        capability = f"{properties.major}.{properties.minor}"
        return described | {"device": properties.name, "capability": capability, "memory": properties.total_memory}
    return described | {"device": _processor(), "threads": torch.get_num_threads()}


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def write_record(bandwidth: float | None, results: list[dict]) -> Path:
    """Write one run's results under records/ and return the file."""
    where = environment()
    name = "_".join("".join(c if c.isalnum() else "-" for c in where[key]).strip("-") for key in ("device", "date"))
    path = RECORDS / f"{name}.json"
    RECORDS.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    record = where | {"copy_bytes_per_second": bandwidth, "results": results}
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path

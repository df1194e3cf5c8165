"""Global batch, micro-batch and accumulation: any two fix the third; `auto` measures the micro-batch that fits."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from unite_fast.config import TrainConfig
from unite_fast.errors import UserError

# A process that the kernel kills for memory leaves no message, so on a CPU the search stops at half of what is free.
CPU_MEMORY_SHARE = 0.5
# Triton's and CUDA's own words, those of cuBLAS and cuDNN, and those of PyTorch's allocator on a CPU.
OUT_OF_MEMORY = (
    "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory",
)  # fmt: skip
# auto without a global batch has no divisor to stop at; activations of more images than this only cost latency.
AUTO_LIMIT = 1024


class Batch(NamedTuple):
    """Images of a step: global_batch = micro_batch · accumulation · ranks."""

    micro_batch: int
    accumulation: int
    global_batch: int


def resolve_batch(train: TrainConfig, world_size: int, micro_batch: int | None = None) -> Batch:
    """The three batch numbers.

    Args:
        train: its `global_batch`, `micro_batch` and `accumulation`.
        world_size: ranks that share the global batch.
        micro_batch: the measured value that stands for `auto`, see `micro_batch_candidates`.

    Raises:
        UserError: the numbers do not divide, or all three are given and disagree.
    """
    micro = train.micro_batch if isinstance(train.micro_batch, int) else micro_batch
    accumulation, total = train.accumulation, train.global_batch
    if total is None:
        if micro is None:
            raise ValueError("train.micro_batch is auto: measure it first")
        return Batch(micro, accumulation, micro * accumulation * world_size)
    if micro is not None and accumulation is not None:
        if micro * accumulation * world_size != total:
            raise UserError(
                f"micro_batch {micro} × accumulation {accumulation} × {world_size} ranks = "
                f"{micro * accumulation * world_size}, but train.global_batch is {total}: leave one of the three out"
            )
        return Batch(micro, accumulation, total)
    given, name = (micro, "micro_batch") if micro is not None else (accumulation, "accumulation")
    if given is None:
        raise ValueError("train.micro_batch is auto: measure it first")
    if total % (given * world_size):
        raise UserError(
            f"train.global_batch {total} is not divisible by {name} {given} × {world_size} ranks = "
            f"{given * world_size}"
        )
    other = total // (given * world_size)
    return Batch(micro, other, total) if micro is not None else Batch(other, accumulation, total)


def micro_batch_candidates(train: TrainConfig, world_size: int) -> list[int]:
    """Ascending micro-batches that `auto` may choose from; one value where the other keys already fix it.

    Raises:
        UserError: the global batch cannot be shared by the ranks.
    """
    if train.global_batch is None:
        return [2**power for power in range(AUTO_LIMIT.bit_length())]
    share = train.accumulation or 1
    if train.global_batch % (world_size * share):
        raise UserError(
            f"train.global_batch {train.global_batch} is not divisible by {world_size} ranks"
            + (f" × accumulation {share}" if train.accumulation else "")
        )
    per_rank = train.global_batch // (world_size * share)
    if train.accumulation:
        return [per_rank]
    return [count for count in range(1, per_rank + 1) if per_rank % count == 0]


def find_micro_batch(
    try_step: Callable[[int], None],
    candidates: list[int],
    *,
    agree: Callable[[bool], bool] = lambda fits: fits,
) -> int:
    """Largest candidate whose step fits into memory.

    Args:
        try_step, candidates, agree: as in `find_largest`; for candidates see `micro_batch_candidates`.

    Raises:
        UserError: not even the smallest candidate fits.
    """
    found = find_largest(try_step, candidates, agree=agree)
    if found is None:
        raise UserError(
            f"not even a micro-batch of {candidates[0]} fits into memory: use a smaller model, "
            "set model.checkpoint_activations to true, or use more devices"
        )
    return found


def find_largest(
    try_step: Callable[[int], None],
    candidates: list[int],
    *,
    agree: Callable[[bool], bool] = lambda fits: fits,
) -> int | None:
    """Largest candidate whose step fits into memory, None if none does: doubling, then bisection.

    Args:
        try_step: runs the forward and backward passes of one micro-batch at that size, without communication, and
            raises what `is_out_of_memory` knows where it does not fit.
        candidates: ascending sizes, of the micro-batch or of the flow pass's chunks.
        agree: combines the ranks' answers, `World.all_true`; every rank then takes the same path.
    """

    def fits(size: int) -> bool:
        fitted = True
        try:
            try_step(size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fitted = False
        # Outside the handler: its traceback would keep the failed step's activations alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return agree(fitted)

    good, bad, trial = -1, len(candidates), 0
    while bad - good > 1:
        if fits(candidates[trial]):
            good = trial
        else:
            bad = trial
        if bad == len(candidates):
            doubled = 2 * candidates[good]
            trial = next((i for i in range(good + 1, bad) if candidates[i] >= doubled), bad - 1)
        else:
            trial = (good + bad) // 2
    return None if good < 0 else candidates[good]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device's memory ran out.

    PyTorch's CUDA allocator raises a class of its own; other allocations (a kernel that Triton loads, a library's
    handle) and the CPU allocator raise a RuntimeError that says so.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def bounded_on_cpu(
    try_step: Callable[[int], None],
    *,
    processes: int = 1,
    available: Callable[[], int] | None = None,
    peak: Callable[[], int] | None = None,
) -> Callable[[int], None]:
    """`try_step` for a CPU, where running out of memory kills the process instead of raising.

    Sizes grow, so the growth of the process's peak memory over the last size predicts the next one; a step predicted
    to need more than half of the free memory raises torch.OutOfMemoryError without being run.

    Args:
        processes: on this machine that try sizes at once, each with its share of what is free.
        available, peak: bytes free on the machine and bytes this process has needed at most; measured if None.
    """
    available = available or _available_bytes
    peak = peak or peak_resident_bytes
    measured: dict[int, int] = {}
    baseline = peak()

    def bounded(size: int) -> None:
        smaller = [done for done in measured if done <= size]
        if smaller:
            last = max(smaller)
            if measured[last] * size / last > CPU_MEMORY_SHARE * available() / processes:
                raise torch.OutOfMemoryError(f"a micro-batch of {size} is predicted not to fit")
        try_step(size)
        measured[size] = peak() - baseline

    return bounded


def _available_bytes() -> int:
    try:
        # Free pages alone would leave out the page cache, which a training set fills and the kernel gives back.
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """Most memory this process has needed so far, code and libraries included."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

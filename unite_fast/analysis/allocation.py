"""How many bytes PyTorch's allocator held at most while something ran, on CUDA and on CPUs alike."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_allocated(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes above those allocated before, at the worst moment of `run()`. Waits for the device.

    CUDA's allocator keeps the number; on a CPU every allocation is taken from torch.profiler's record.
    """
    gc.collect()  # tensors in reference cycles would be freed while it runs and taken off what it holds
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    quiet_profiler()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    tree = recorded.profiler.kineto_results.experimental_event_tree()
    sizes = sorted((e.start_time_ns, e.extra_fields.alloc_size) for e in _flat(tree) if "Alloc" in str(e.tag))
    held = peak = 0
    for _, size in sizes:
        held += size
        peak = max(peak, held)
    return peak


def _flat(events: Iterable[Any]) -> Iterable[Any]:
    stack = list(events)
    while stack:
        event = stack.pop()
        yield event
        stack.extend(event.children)


def quiet_profiler() -> None:
    """Keep the profiler's library from announcing every start and stop on stderr."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")

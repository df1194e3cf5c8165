"""Work in processes that can be killed: native code that hangs or crashes costs its own item and nothing else."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from multiprocessing.synchronize import Semaphore
from typing import TypeVar

from unite_fast.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

# A worker takes half a second to start, which this many items of a few milliseconds repay.
FEWEST = 16


class Lost(StrEnum):
    """Why an item has no result."""

    timeout = "timeout"
    crash = "crash"


def bounded_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    seconds: float,
    processes: int | None = None,
    advance: Callable[[int], None] = lambda units: None,
) -> Iterator[Result | Lost]:
    """Results of function(item) in the order of the items, computed by worker processes.

    A worker that takes longer than `seconds` over an item is killed, one that dies is replaced, and the other items go
    on. An exception that the function raises is raised here. What the workers' native code prints is thrown away.

    Args:
        function: of a module's top level; its module should not import torch, which takes seconds. The main module
            needs its `if __name__ == "__main__":`, as with all of multiprocessing.
        items: what can be pickled.
        seconds: limit of one item, by the clock.
        processes: workers, by default one a core that this process may use.
        advance: told of every finished item.

    Raises:
        UserError: the package pebble is missing.
    """
    try:
        from pebble import ProcessExpired, ProcessPool
    except ImportError:
        raise UserError("worker processes need the package pebble: pip install 'unite_fast[molecules]'") from None
    if not items:
        return
    # Forking this process would copy its threads' locks and its CUDA state.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", function.__module__])
    workers = min(processes or available_cores(), math.ceil(len(items) / FEWEST))
    started = context.Semaphore(0)
    pool = ProcessPool(max_workers=workers, context=context, initializer=_prepare, initargs=(function, started))
    try:
        # pool.map would count the wait for a free worker as an item's own time.
        for future in [pool.schedule(function, args=(item,), timeout=seconds) for item in items]:
            try:
                result: Result | Lost = future.result()
            except TimeoutError:
                result = Lost.timeout
            except ProcessExpired:
                result = Lost.crash
            advance(1)
            yield result
        for _ in range(workers):
            # A worker stopped while it starts would print a traceback; one that takes a minute may do so.
            started.acquire(timeout=60)
    finally:
        pool.stop()
        pool.join()


def available_cores() -> int:
    """Cores that this process may use: a container or a scheduler often grants fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare(function: Callable, started: Semaphore) -> None:
    """Start of a worker. That the function comes along has its module imported before any item's time runs."""
    # RDKit's Hückel code prints warnings about close atoms straight to the C library's standard output.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    started.release()

"""Work on many images spread over processes, with the image in each one's hands known."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from unite_fast.errors import UserError

Holding = Callable[[int], None]  # told the number of every image before it is touched
PID, HELD, DONE, FIELDS = 0, 1, 2, 3  # columns of the board that workers keep


def spread(
    work: Callable[[Any, Holding], Any],
    tasks: Sequence[Any],
    *,
    jobs: int,
    advance: Callable[[int], None],
    path: Callable[[int], str],
    preload: Sequence[str] = (),
) -> Iterator[tuple[Any, Any]]:
    """Call `work(task, holding)` for every task, in whatever order the results come.

    Args:
        work: picklable; calls holding(image) before each image.
        tasks: picklable arguments.
        jobs: processes; with one, or one task, everything happens in this process.
        advance: told now and then how many images are done.
        path: names an image, for the error.
        preload: modules that `work` will import, imported once for all processes.

    Yields:
        Pairs of task and result.

    Raises:
        UserError: a process died; says over which image.
        Exception: what `work` raises.
    """
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        done = 0
        for task in tasks:

            def holding(image: int) -> None:
                nonlocal done
                advance(done)
                done += 1

            yield task, work(task, holding)
        advance(done)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "unite_fast.data.source", *preload])
    board = context.RawArray("q", FIELDS * jobs)
    places = context.Value("i", 0)
    finished_all = False
    pool = ProcessPoolExecutor(jobs, context, _begin, (work, board, places))
    try:
        futures = {pool.submit(_run, task): task for task in tasks}
        while futures:
            finished, _ = wait(futures, timeout=0.2, return_when=FIRST_COMPLETED)
            advance(sum(board[DONE::FIELDS]))
            for future in finished:
                yield futures.pop(future), future.result()
        pool.shutdown()
        finished_all = True
    except BrokenProcessPool:
        held = [board[i + HELD] for i in range(0, len(board), FIELDS) if board[i + PID] and board[i + HELD] >= 0]
        raise UserError(
            f"a worker process died; in hand were {', '.join(path(image) for image in held) or 'no images'}. If the "
            f"machine ran out of memory, lower --jobs; if it is one file each time, remove the file"
        ) from None
    finally:
        if not finished_all:  # a mistake or Ctrl-C: left alone, a worker would finish its task first, for a minute
            pool.shutdown(wait=False, cancel_futures=True)
            for pid in filter(None, board[PID::FIELDS]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def leave_with_parent() -> None:
    """Called in a worker process: end it when the process that asked for it ends, however that happens."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_work: Callable[[Any, Holding], Any]
_board: Any
_place = 0


def _begin(work: Callable[[Any, Holding], Any], board: Any, places: Any) -> None:
    global _work, _board, _place
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    leave_with_parent()
    with places.get_lock():
        _place = FIELDS * places.value
        places.value += 1
    _work, _board = work, board
    _board[_place + HELD] = -1
    _board[_place + PID] = os.getpid()


def _run(task: Any) -> Any:
    def holding(image: int) -> None:
        _board[_place + DONE] += _board[_place + HELD] >= 0
        _board[_place + HELD] = image

    result = _work(task, holding)
    _board[_place + DONE] += _board[_place + HELD] >= 0
    _board[_place + HELD] = -1
    return result

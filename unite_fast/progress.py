"""Progress of long work: a bar with rate and time left on a terminal, a line on stderr now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOG_EVERY = 15.0  # seconds between lines where there is no terminal


@contextmanager
def track(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far a piece of work has come.

    Args:
        what: a few words, such as "perceiving bonds".
        total: units of work.

    Yields:
        A function to call with the number of units just done.
    """
    if sys.stderr.isatty():
        with _bar(what, total) as advance:
            yield advance
        return
    start = last = time.monotonic()
    done = 0

    def advance(units: int) -> None:
        nonlocal done, last
        done += units
        now = time.monotonic()
        if done and now - last >= LOG_EVERY:
            last = now
            rate = done / (now - start)
            line = f"{what}: {done} of {total}, {rate:.1f} per second, {(total - done) / rate:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    yield advance


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TaskProgressColumn as Rate

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(text_format="", show_speed=True),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda units: bar.advance(task, units)

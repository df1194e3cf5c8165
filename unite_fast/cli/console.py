"""What every command shares: printing, progress, the device, batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from unite_fast.errors import UserError

if TYPE_CHECKING:
    import torch


class Device(StrEnum):
    """Where a command computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Which(StrEnum):
    """Which of a checkpoint's two sets of weights."""

    ema = "ema"
    model = "model"


SeedOption = Annotated[
    int, typer.Option(help="Seed of the noise; the same seed gives the same result.", min=0, max=2**31 - 1)
]
BatchOption = Annotated[int, typer.Option(help="Images computed at a time; lower it if memory runs out.", min=1)]
DeviceOption = Annotated[Device, typer.Option(help="auto takes CUDA if there is one.")]


def plain(text: object) -> Text:
    """Text of a table cell or title that is no markup: brackets in a file's name would be read as such.

    What is no UTF-8 in a name is written as \\udcff: a terminal may refuse it.
    """
    return Text(str(text).encode("utf-8", "backslashreplace").decode())


def out() -> Console:
    """The console for results."""
    return Console(highlight=False)


def error(message: str) -> None:
    """Print a mistake on stderr, unwrapped, so that it is one line in a log too."""
    Console(stderr=True, highlight=False).print(Text(f"error: {message}", style="red"), soft_wrap=True)


def warn(message: str) -> None:
    """Print a warning on stderr."""
    Console(stderr=True, highlight=False).print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)


class Rate(ProgressColumn):
    """Items a second of a progress bar."""

    def render(self, task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.3g}/s")


@contextmanager
def progress(what: str, total: int) -> Iterator[Progress]:
    """A bar on stderr that goes away when done, with its only task already added; none where stderr is a file."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task(what, total=total)
        yield bar


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """What moves the bar of `progress` on by so many."""
    with progress(what, total) as shown:
        yield lambda done: shown.advance(shown.task_ids[0], done)


def pick_device(wanted: Device) -> torch.device:
    """The torch device behind the option.

    Raises:
        UserError: CUDA asked for and absent.
    """
    import torch

    if wanted is Device.cuda and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device; `unite-fast doctor` says more")
    if wanted is Device.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def explain_memory(batch: int) -> Iterator[None]:
    """Turn a device's out-of-memory error into advice."""
    from unite_fast.engine.batch import is_out_of_memory

    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"the device ran out of memory at --batch {batch}: try --batch {max(1, batch // 2)}") from None

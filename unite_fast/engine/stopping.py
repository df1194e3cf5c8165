"""A clean stop before the last step: SIGTERM or Ctrl-C on any rank, agreed on by all."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from unite_fast.engine.world import World

# DeepSpeed's launcher answers the Ctrl-C that a terminal has sent to its ranks as well with SIGTERM, milliseconds
# later: what follows a first signal this soon is no sign of impatience.
IMPATIENT_SECONDS = 2.0


class Interrupted(BaseException):
    """A signal when nothing is left to save; not an Exception, so that error recovery does not swallow it."""


class StopSignals:
    """Context that records SIGTERM and SIGINT, and lets all ranks agree on when to stop.

    The first asks for a stop. A later SIGINT raises KeyboardInterrupt, without waiting for the step and the save; a
    later SIGTERM changes nothing, as launchers repeat it.

    Attributes:
        received: the signal that asked this rank to stop, or None.
    """

    def __init__(self, world: World):
        self.received: signal.Signals | None = None
        self._world, self._at, self._at_once = world, 0.0, False
        self._asked: _Vote | None = None
        self._beside: torch.cuda.Stream | None = None  # where votes are cast

    def __enter__(self) -> StopSignals:
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._handlers = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def told(self) -> bool:
        """Whether to stop before the next step; every rank asks before each step and gets the same answer.

        With several GPUs the answer is to the question of the step before: it has arrived by now, so that no host waits
        for its device.
        """
        if self._world.size == 1:
            return self.received is not None
        if self._world.device.type == "cpu":
            return self.told_now()
        self._beside = self._beside or torch.cuda.Stream(self._world.device)
        before, self._asked = self._asked, _Vote(self._world, self.received is not None, self._beside)
        return before is not None and before.read()

    def told_now(self) -> bool:
        """Whether any rank has been told to stop. Collective; waits for the device."""
        return not self._world.all_true(self.received is None)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Context around work that may be aborted because everything is saved: a signal raises Interrupted inside.

        So does an earlier signal, on any rank. Collective.
        """
        if self.told_now():
            raise Interrupted
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _on_signal(self, number: int, frame: object) -> None:
        if self.received is None:
            self.received, self._at = signal.Signals(number), time.monotonic()
            if self._at_once:
                raise Interrupted
        elif number == signal.SIGINT and time.monotonic() - self._at >= IMPATIENT_SECONDS:
            raise KeyboardInterrupt


class _Vote:
    """Among GPUs, whether a flag is set on any rank.

    Asking does not wait for the device, reading waits for the asking alone. Collectives end in their order: on the
    step's own stream the next forward would wait, with the vote, for all updated weights that are still on their way.
    """

    def __init__(self, world: World, flag: bool, beside: torch.cuda.Stream):
        self._answer = torch.tensor(int(flag), dtype=torch.int32).pin_memory()
        with torch.cuda.stream(beside):
            vote = self._answer.to(world.device, non_blocking=True)
            dist.all_reduce(vote, op=dist.ReduceOp.MAX)
            self._answer.copy_(vote, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> bool:
        self._arrived.synchronize()
        return bool(self._answer)

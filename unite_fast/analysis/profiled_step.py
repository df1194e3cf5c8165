"""The whole optimizer step of a profile: the real engine on the run's data, timed, and traced for Perfetto."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from unite_fast.analysis.allocation import peak_allocated, quiet_profiler
from unite_fast.analysis.extent import Extent
from unite_fast.config import Config
from unite_fast.engine.batch import Batch, peak_resident_bytes
from unite_fast.engine.engine import Engine
from unite_fast.engine.world import World
from unite_fast.errors import UserError
from unite_fast.modality import Inputs, Modality, Stream
from unite_fast.objective.draws import SeededDraws
from unite_fast.objective.two_pass import TwoPassObjective, two_pass_step

UPDATE = "optimizer"  # its range in the trace


def now(device: torch.device) -> float:
    """Seconds on the clock once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class StepMemory(NamedTuple):
    """Bytes on this rank.

    Attributes:
        weights: of the model, and what the optimizer steps where that is beside them (ZeRO).
        gradients: of all trained weights, which are whole until the last backward reduces them.
        optimizer: momentum and moments.
        ema: averaged weights, of all decays.
        peak: at the worst moment of the steps: allocated on a GPU, resident on a CPU, where it holds the process's code
            and libraries and what came before as well.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    peak: int


class Feed:
    """Micro-batches of the run's data where it is there, else the same made-up one again and again.

    Attributes:
        real: whether the data is there.
    """

    def __init__(self, config: Config, world: World, batch: Batch, modality: Modality):
        self._config, self._world, self._batch, self._modality = config, world, batch, modality
        self.real = modality.has_data(config)
        self._stream: Stream | None = None
        self._made: Inputs | None = None

    def made_up(self) -> Inputs:
        """A micro-batch made on the device."""
        if self._made is None:
            made = self._modality.probe(self._config, self._batch.micro_batch, self._world.device)
            self._made = made._replace(weight=1 / self._batch.accumulation)
        return self._made

    def next(self) -> Inputs:
        """The next micro-batch on the device."""
        if not self.real:
            return self.made_up()
        if self._stream is None:
            self._stream = self._modality.stream(self._config, self._batch, self._world, start_step=0)
        return self._modality.inputs(self._config, next(self._stream), self._batch, self._world)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


class ProfiledStep:
    """The real optimizer step on the real engine.

    Attributes:
        extent: of the newest step.
    """

    def __init__(
        self, config: Config, world: World, objective: TwoPassObjective, model: nn.Module, batch: Batch, feed: Feed,
    ):  # fmt: skip
        self.config, self.world, self.objective, self.batch = config, world, objective, batch
        self.model = model
        self.engine = Engine(model, config, world, steps_per_epoch=1000, global_batch=batch.global_batch)
        self.extent = Extent(0)
        self._feed = feed
        self._one: Inputs | None = None

    def timed(self) -> tuple[float, float, float]:
        """One step: seconds in all, waiting for data, and in the update."""
        device = self.world.device
        self.extent = Extent(0)
        began, waited = now(device), 0.0
        for index in range(self.batch.accumulation):
            asked = time.perf_counter()
            with record_function("wait for data"):
                inputs = self._feed.next()
            waited += time.perf_counter() - asked
            self.extent += inputs.extent
            self._passes(inputs, index)
        passed = now(device)
        with record_function(UPDATE):
            self.engine.step()
            ended = now(device)  # inside, so that what is traced is what is timed
        return ended - began, waited, ended - passed

    def memory(self) -> StepMemory:
        """Of the steps so far; on a GPU since its peak was last reset."""
        engine, device = self.engine, self.world.device
        masters, averages = engine.backend.layout.masters, engine.ema
        # ZeRO 3 empties the parameters and keeps this rank's piece of each beside it.
        parameters = [getattr(parameter, "ds_tensor", parameter) for parameter in self.model.parameters()]
        return StepMemory(
            weights=stored([*parameters, *self.model.buffers(), *masters]),
            gradients=sum(f.shape.numel() * masters[f.master].element_size() for f in engine.backend.layout.fragments),
            optimizer=stored(value for state in engine.optimizer.state.values() for value in state.values()),
            ema=stored(averages.of(master, decay) for decay in averages.decays for master in masters),
            peak=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes(),
        )

    def memory_of_update(self) -> int:
        """Bytes that the update of one more step allocates at most."""
        # A CPU's profiler warns on stderr of what was there before it and goes: the last step's coefficient, gradients.
        kept: list[Tensor | None] = [self.engine.optimizer.clip_coefficient]

        def keep(optimizer: torch.optim.Optimizer, *_) -> None:
            kept.extend(p.grad for group in optimizer.param_groups for p in group["params"])

        for index in range(self.batch.accumulation):
            self._passes(self._feed.next(), index)
        hook = self.engine.optimizer.register_step_pre_hook(keep)
        try:
            return peak_allocated(self.engine.step, self.world.device)
        finally:
            hook.remove()

    def of_one_sample(self, modality: Modality) -> None:
        """A step on a single made-up sample: the same launches for a device that has almost nothing to do."""
        if self._one is None:
            self._one = modality.probe(self.config, 1, self.world.device)
        self._passes(self._one, self.batch.accumulation - 1)
        self.engine.step()

    def _passes(self, inputs: Inputs, index: int) -> None:
        config, accumulation = self.config, self.batch.accumulation
        draws = SeededDraws(
            config.objective, seed=config.train.seed, step=self.engine.step_count,
            stream=self.world.rank * accumulation + index, device=self.world.device,
        )  # fmt: skip
        two_pass_step(
            self.engine, self.objective, inputs.data, inputs.labels, draws, shape=inputs.shape, weight=inputs.weight,
            last=index + 1 == accumulation,
        )  # fmt: skip

    def traced(self, path: Path | None) -> tuple[float, float]:
        """Seconds a step in collectives alone, and how many of them in the update.

        From a trace of two steps that is also written to `path`.
        """
        if path is None and self.world.size == 1:
            return 0.0, 0.0
        activities = [ProfilerActivity.CPU]
        if self.world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        quiet_profiler()
        with self._named(), profile(activities=activities, acc_events=True) as recorded:
            for _ in range(2):
                with record_function("step"):
                    self.timed()
        if path is not None and self.world.is_main:
            _write_trace(recorded, path)
        whole, update = (seconds_of_collectives_alone(recorded.events(), during) for during in (None, UPDATE))
        return whole / 2, update / 2

    @contextmanager
    def _named(self):
        """Ranges of the parts in the trace, from hooks that go away again; compiled passes run no hooks."""
        lpips = getattr(self.objective, "lpips", None)  # of images
        modules = {"lpips": lpips}
        if not self.config.train.compile:
            modules |= {"encoder": self.model.encoder, "decoder": self.model.decoder}
        open_ranges: list[record_function] = []

        def enter(name: str) -> Callable[..., None]:
            def hook(*_) -> None:
                open_ranges.append(record_function(name))
                open_ranges[-1].__enter__()

            return hook

        def leave(*_) -> None:
            open_ranges.pop().__exit__(None, None, None)

        hooks = []
        for name, module in modules.items():
            if module is not None:
                hooks += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def stored(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def seconds_of_collectives_alone(events: Sequence[Any], during: str | None = None) -> float:
    """Seconds in which collectives of a profiler's events run and nothing is computed: what overlap does not hide.

    Args:
        events: the profiler's.
        during: counts those within the host's ranges of this name only; None counts all.
    """
    windows = [(-math.inf, math.inf)]
    if during is not None:
        named = (e for e in events if e.name == during and e.device_type == torch.autograd.DeviceType.CPU)
        windows = [(e.time_range.start, e.time_range.end) for e in named]
    alone = 0.0
    for opened, closed in windows:
        spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for event in events:
            start, end = max(event.time_range.start, opened), min(event.time_range.end, closed)
            collective = _is_collective(event)
            if collective is not None and start < end:
                spans[collective].append((start, end))
        alone += _covered(spans[True] + spans[False]) - _covered(spans[False])
    return alone / 1e6


def _is_collective(event: Any) -> bool | None:
    """Of a profiler event: NCCL's kernels on a GPU, gloo's ranges on a CPU; None of what is no computing either."""
    if event.device_type == torch.autograd.DeviceType.CUDA:
        # "nccl:all_reduce" and the like are ranges around the kernels; named ranges are on the device's timeline too.
        named_range = event.is_user_annotation or event.name.startswith("nccl:")
        return None if named_range else event.name.startswith("nccl")
    if event.name.startswith("gloo:"):
        return True
    return False if event.name.startswith("aten::") and not torch.cuda.is_available() else None


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans (start, end)."""
    length, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def _write_trace(recorded: profile, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # the profiler itself reports no error where it cannot write
        recorded.export_chrome_trace(str(temporary))
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write trace {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)

"""Where a training step's time and memory go, measured, beside the floor that counted operations and bytes set.

Each part runs alone, forward and backward, on inputs of the step's own size, so that a backward pass belongs to one
part; the whole step runs on the real engine, and what the parts do not explain is shown as such. The training step
itself carries no instrument.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

import unite_kernels as uk
from unite_fast.analysis.allocation import peak_allocated, quiet_profiler
from unite_fast.analysis.counts import Part, Rates, image_operations, step_parts
from unite_fast.analysis.memory import predict
from unite_fast.analysis.update import flow_passes, update_part
from unite_fast.config import Config
from unite_fast.data.loader import ImageStream
from unite_fast.engine.backend import AutocastForward, autocast_dtype
from unite_fast.engine.batch import Batch, micro_batch_candidates, resolve_batch
from unite_fast.engine.engine import Engine
from unite_fast.engine.world import World
from unite_fast.errors import UserError
from unite_fast.model.unite import Unite
from unite_fast.objective.draws import SeededDraws
from unite_fast.objective.two_pass import Objective, two_pass_step

# Wide enough that launching is a small share of it: 137 GFLOP on a GPU, 0.27 on a CPU core.
MATMUL_SIDE = {"cuda": 8192, "cpu": 512}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}  # beyond any cache
REPEATS = 10
WARM_UP = 2


@dataclass(frozen=True)
class Row:
    """One part of a step.

    Attributes:
        calls: times a step.
        forward, backward: measured seconds of all calls; backward is 0 where there is none.
        floor: seconds that counted operations and bytes need at least, at the device's measured rates; None where
            nothing is counted.
        operations: counted, of all calls.
        memory: bytes that one call allocates at most.
    """

    name: str
    calls: int
    forward: float
    backward: float
    floor: float | None
    operations: int
    memory: int

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Measured:
    """A profile.

    Attributes:
        rates: of the device, measured before anything else.
        rows: the parts, the optimizer, EMA.
        step: median seconds of a whole optimizer step, waiting included.
        waiting: seconds of it spent waiting for data; None with made-up images.
        communication: seconds of it inside collectives; on one rank 0.
        images: of a step on this rank.
        mfu: counted operations of a step over its time and the measured matmul rate.
    """

    rates: Rates
    rows: list[Row]
    step: float
    waiting: float | None
    communication: float
    images: int
    mfu: float

    @property
    def other(self) -> float:
        """What neither the parts nor communication nor waiting explain: draws, copies, launching."""
        return self.step - sum(row.seconds for row in self.rows) - self.communication - (self.waiting or 0.0)

    @property
    def efficiency(self) -> float:
        """Floor of everything counted over the step's time without waiting and communication: what `plan` asks for."""
        floor = sum(row.floor for row in self.rows if row.floor is not None)
        return floor / (self.step - self.communication - (self.waiting or 0.0))


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Operations a second of a large matrix product in this dtype and bytes a second of a large copy, best of ten."""
    side = MATMUL_SIDE[device.type]
    a = torch.ones(side, side, dtype=dtype, device=device)
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    product = torch.empty_like(a)
    matmul = min(times(lambda: torch.mm(a, a, out=product), device, REPEATS))
    copy = min(times(lambda: target.copy_(source), device, REPEATS))
    return Rates(2 * side**3 / matmul, 2 * COPY_BYTES[device.type] / copy)


def times(run: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of `repeats` runs, after two that do not count."""
    found = []
    for index in range(WARM_UP + repeats):
        began = _now(device)
        run()
        found.append(_now(device) - began)
    return found[WARM_UP:]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(
    config: Config,
    world: World,
    *,
    steps: int,
    micro_batch: int | None = None,
    trace: Path | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Measured:
    """Profile a configuration on this process's device.

    Args:
        config: the run; nothing is written into its folder.
        world: this process.
        steps: optimizer steps that the whole-step time is the median of.
        micro_batch: images a backward; the configuration's if None, and of `auto` the largest that is predicted to fit.
        trace: file for the Chrome trace of two steps, which Perfetto and chrome://tracing read; None writes none.
        say: told what is going on.

    Raises:
        UserError: batch keys that do not fit, missing LPIPS weights, memory, a path that cannot be written.
    """
    device = world.device
    uk.set_backend(config.train.kernels)
    dtype = autocast_dtype(config, device)
    say(f"measuring the {device.type}'s rates")
    rates = measure_rates(device, dtype or torch.float32)
    objective = Objective(config.objective, config.model.num_classes, device, dtype)
    batch = _batch(config, world, micro_batch)
    torch.manual_seed(config.train.seed)
    model = Unite(config.model).to(device)
    try:
        say(f"measuring the parts on {batch.micro_batch} images")
        rows = _parts(config, model, objective, batch, rates, device)
        say(f"measuring {WARM_UP + steps} steps of {batch.global_batch} images")
        step = _Step(config, world, objective, model, batch)
        try:
            whole, waits, updates, averages = [], [], [], []
            for index in range(WARM_UP + steps):
                taken = step.timed()
                if index >= WARM_UP:
                    whole.append(taken[0]), waits.append(taken[1]), updates.append(taken[2])
                    averages += times(step.engine.ema.update, device, 1)
            communication = step.traced(trace)
        finally:
            step.close()
    except torch.OutOfMemoryError:
        raise UserError(
            f"a micro-batch of {batch.micro_batch} does not fit into memory: give a smaller --micro-batch"
        ) from None
    return _measured(config, world, batch, rates, rows, whole, waits if step.real else None, updates, averages,
                     communication)  # fmt: skip


def _measured(config, world, batch, rates, rows, whole, waits, updates, averages, communication) -> Measured:
    dtype = "fp32" if autocast_dtype(config, world.device) is None else "bf16"
    update = update_part(
        config.model, config.optimizer, stage=config.train.zero_stage, ranks=world.size, dtype=dtype
    )
    ema = tuple(op for op in update.ops if op.name == "EMA")
    average = statistics.median(averages)
    rest = Part("optimizer", tuple(op for op in update.ops if op.name != "EMA"), False, update.width)
    optimizer = max(0.0, statistics.median(updates) - average)
    rows = [
        *rows,
        Row("optimizer", 1, optimizer, 0.0, rest.floor(1, rates)[0], rest.forward, 0),
        Row("EMA", 1, average, 0.0, Part("EMA", ema, False, update.width).floor(1, rates)[0], 0, 0),
    ]
    step = statistics.median(whole)
    images = batch.micro_batch * batch.accumulation
    operations = images * image_operations(config.model, config.objective)
    return Measured(
        rates, rows, step, statistics.median(waits) if waits else None, communication, images,
        operations / step / rates.matmul,
    )  # fmt: skip


def _batch(config: Config, world: World, micro_batch: int | None) -> Batch:
    train = config.train
    if micro_batch is not None:
        return Batch(micro_batch, train.accumulation or 1, micro_batch * (train.accumulation or 1) * world.size)
    if train.micro_batch != "auto":
        return resolve_batch(train, world.size)
    candidates = micro_batch_candidates(train, world.size)
    if world.device.type == "cuda":
        room = 0.92 * torch.cuda.mem_get_info(world.device)[0]  # as `plan` assumes
        fits = [c for c in candidates if predict(config, micro_batch=c, ranks=world.size).peak <= room]
        return resolve_batch(train, world.size, max(fits, default=candidates[0]))
    return resolve_batch(train, world.size, candidates[0])


def _parts(
    config: Config, model: Unite, objective: Objective, batch: Batch, rates: Rates, device: torch.device
) -> list[Row]:
    """Each part alone, forward and backward, on inputs as large as the step's."""
    dtype = autocast_dtype(config, device)
    counted = step_parts(
        config.model, config.objective, dtype="fp32" if dtype is None else "bf16", device=device.type
    )
    chunk = min(config.objective.draws_per_chunk, config.objective.flow_draws)
    rows = []
    for name, (forward, inputs) in _isolated(config, model, objective, batch, device, chunk).items():
        part = counted[name]
        calls = batch.accumulation * (flow_passes(config) if name == "denoise" else 1)
        images = batch.micro_batch * (chunk if name == "denoise" else 1)
        ahead, back = [], []

        def once(forward=forward, inputs=inputs, ahead=ahead, back=back) -> None:
            began = _now(device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                out = forward(*inputs)
            middle = _now(device)
            torch.autograd.backward(out, [torch.ones_like(value) for value in out])
            ahead.append(middle - began)
            back.append(_now(device) - middle)
            for tensor in (*inputs, *model.parameters()):
                tensor.grad = None

        for _ in range(WARM_UP + REPEATS):
            once()
        memory = peak_allocated(once, device)
        floor = sum(part.floor(images, rates))
        rows.append(
            Row(
                name, calls, calls * statistics.median(ahead[WARM_UP:-1]), calls * statistics.median(back[WARM_UP:-1]),
                calls * floor, calls * images * part.operations, memory,
            )
        )  # fmt: skip
    return rows


def _isolated(
    config: Config, model: Unite, objective: Objective, batch: Batch, device: torch.device, chunk: int
) -> dict[str, tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]]:
    """Part -> (forward that returns what gradients come back to, its inputs)."""
    sizes, count = config.model, batch.micro_batch
    images = torch.rand(count, 3, sizes.image_size, sizes.image_size, device=device)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    shape = torch.Size((count, sizes.registers, sizes.latent_dim))
    draws = SeededDraws(config.objective, seed=0, step=0, stream=0, device=device)
    noise, t, mix, added = draws.tokenize(shape)
    null = torch.full_like(labels, model.null_label)
    latents = torch.randn(shape, device=device)

    def tokenize() -> tuple[Tensor, ...]:
        latent = model.encoder(noise, t, null, model.patches(images))
        if mix is not None:
            return model.latent_norm.mix(latent, *mix)
        z0 = model.latent_norm(latent)
        return (z0 if added is None else z0 + added,)

    def decode(latent: Tensor) -> tuple[Tensor, ...]:
        return uk.patch_l1(model.decoder(latent), images, sizes.patch_size)

    def denoise() -> tuple[Tensor, ...]:
        return (objective.flow(model, latents, labels, draws, 0, chunk),)

    found = {
        "tokenize": (tokenize, []),
        "decode": (decode, [latents.clone().requires_grad_()]),
        "denoise": (denoise, []),
    }
    if objective.lpips is not None:
        picture = torch.rand_like(images).contiguous(memory_format=torch.channels_last)
        picture = picture.to(autocast_dtype(config, device) or torch.float32).requires_grad_()
        found["lpips"] = (lambda image: (objective.lpips(images, image),), [picture])
    return {name: found[name] for name in ("tokenize", "decode", "lpips", "denoise") if name in found}


class _Step:
    """The real optimizer step on the real engine, with the run's data where it is there."""

    def __init__(self, config: Config, world: World, objective: Objective, model: Unite, batch: Batch):
        self.config, self.world, self.objective, self.batch = config, world, objective, batch
        self.model = model
        self.engine = Engine(model, config, world, steps_per_epoch=1000, global_batch=batch.global_batch)
        self.real = Path(config.data.path).is_dir()
        self._stream = self._open() if self.real else None

    def _open(self) -> ImageStream:
        config = self.config
        return ImageStream(
            config.data, image_size=config.model.image_size, num_classes=config.model.num_classes,
            seed=config.train.seed, global_batch=self.batch.global_batch, micro_batch=self.batch.micro_batch,
            accumulation=self.batch.accumulation, rank=self.world.rank, world_size=self.world.size,
        )  # fmt: skip

    def timed(self) -> tuple[float, float, float]:
        """One step: seconds in all, waiting for data, and in the update."""
        device = self.world.device
        began, waited = _now(device), 0.0
        for index in range(self.batch.accumulation):
            asked = time.perf_counter()
            with record_function("wait for data"):
                images, labels = self._next()
            waited += time.perf_counter() - asked
            self._passes(images, labels, index)
        passed = _now(device)
        with record_function("optimizer"):
            self.engine.step()
        ended = _now(device)
        return ended - began, waited, ended - passed

    def _next(self) -> tuple[Tensor, Tensor]:
        device, size = self.world.device, self.config.model.image_size
        if self._stream is None:
            count = self.batch.micro_batch
            return (
                torch.full((count, 3, size, size), 0.5, device=device),
                torch.zeros(count, dtype=torch.int64, device=device),
            )
        loaded = next(self._stream)
        return loaded.images.to(device).float().div_(255), loaded.labels.to(device)

    def _passes(self, images: Tensor, labels: Tensor, index: int) -> None:
        config, accumulation = self.config, self.batch.accumulation
        draws = SeededDraws(
            config.objective, seed=config.train.seed, step=self.engine.step_count,
            stream=self.world.rank * accumulation + index, device=self.world.device,
        )  # fmt: skip
        shape = torch.Size((images.shape[0], config.model.registers, config.model.latent_dim))
        two_pass_step(
            self.engine, self.objective, images, labels, draws, shape=shape, weight=1 / accumulation,
            last=index + 1 == accumulation,
        )  # fmt: skip

    def traced(self, path: Path | None) -> float:
        """Seconds a step inside collectives, from a trace of two steps that is also written to `path`."""
        if path is None and self.world.size == 1:
            return 0.0
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
        return sum(_collective_seconds(event) for event in recorded.events()) / 2

    @contextmanager
    def _named(self):
        """Ranges of the parts in the trace, from hooks that go away again."""
        modules = {"encoder": self.model.encoder, "decoder": self.model.decoder, "lpips": self.objective.lpips}
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

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


def _collective_seconds(event: Any) -> float:
    """Of a profiler event that is a collective: NCCL's kernels on GPUs, gloo's ranges on CPUs."""
    name = event.name
    if name.startswith("nccl") and event.device_type == torch.autograd.DeviceType.CUDA:
        return event.device_time / 1e6
    return event.cpu_time / 1e6 if name.startswith("gloo:") else 0.0


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

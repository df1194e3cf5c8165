"""The run: data in, optimizer steps, records, checkpoints, a clean end."""

from __future__ import annotations

import math
import signal
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import unite_kernels as uk
from unite_fast.analysis.devices import stated_peak
from unite_fast.config import Config
from unite_fast.engine import checkpoint
from unite_fast.engine.batch import is_out_of_memory
from unite_fast.engine.backend import autocast_dtype
from unite_fast.engine.compiling import check_compile, compile_perceptual, watched
from unite_fast.engine.engine import Engine
from unite_fast.engine.fitting import Trial, fit
from unite_fast.engine.fp8 import check_fp8
from unite_fast.engine.lock import sole_trainer
from unite_fast.engine.meter import Meter
from unite_fast.engine.monitor import CollapseWatch, ProgressLine, Records, check_wandb
from unite_fast.engine.session import changed_samples, record_session
from unite_fast.engine.world import World, init_world
from unite_fast.errors import UserError
from unite_fast.modality import counted_operations, modality_of
from unite_fast.objective.draws import SeededDraws
from unite_fast.objective.two_pass import StepLosses, two_pass_step
from unite_fast.weights import write_text


def train(config: Config, *, resume: bool = False) -> Path:
    """Train, evaluate and write everything into the run folder.

    Args:
        config: the whole run.
        resume: continue from the newest checkpoint of the run folder, or begin where there is none.

    Returns:
        The run folder.

    Raises:
        UserError: anything the user can mend: data, sizes, memory, disk, a loss that is not finite.
    """
    world = init_world(config)
    try:
        with sole_trainer(Path(config.runs) / config.name, world):
            return Run(config, world, resume=resume).go()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{world.device.type} memory ran out ({str(error).splitlines()[0]}): set train.micro_batch to auto or to a "
            f"smaller number, or model.checkpoint_activations to true; what was saved continues with --resume"
        ) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Run:
    """One training run of one process."""

    def __init__(self, config: Config, world: World, *, resume: bool):
        self.config, self.world = config, world
        self.folder = Path(config.runs) / config.name
        latest = checkpoint.latest(self.folder)
        if latest is not None and not resume:
            raise UserError(
                f"{self.folder} already holds a run: add --resume to continue it, or choose another name "
                f"(--set name=…)"
            )
        if config.train.kernels == "triton" and world.device.type != "cuda" and not uk.dispatch.INTERPRETED:
            raise UserError(
                "train.kernels is triton but this run is on a CPU: set it to auto (or set TRITON_INTERPRET=1 to debug)"
            )
        check_wandb(config.train.wandb)
        check_compile(config, world.device)
        check_fp8(config, world.device)
        uk.set_backend(config.train.kernels)
        torch.manual_seed(config.train.seed)
        self.modality = modality_of(config)
        self.objective = self.modality.objective(config, world.device, autocast_dtype(config, world.device))
        trial = Trial(config, world, self.modality, self.objective)
        self.batch, resolved = fit(config, world, partial(self.modality.largest, config), trial)
        del trial  # and with it the model and the memory that it tried steps with
        self.objective.config = resolved.objective
        first_step = 0 if latest is None else checkpoint.step_of(latest)
        self.stream = self.modality.stream(config, self.batch, world, start_step=first_step)
        torch.manual_seed(config.train.seed)
        model = self.modality.network(config.model)
        steps_per_epoch = self.stream.steps_per_epoch
        self.engine = Engine(
            model, config, world, steps_per_epoch=steps_per_epoch, global_batch=self.batch.global_batch
        )
        if config.train.compile:
            compile_perceptual(self.objective)
        self.total = config.train.steps or max(1, math.ceil(config.train.epochs * steps_per_epoch))
        self._seconds_before = 0.0  # of training, in the sessions that this one resumes
        self.samples = self.modality.samples(self.stream) if world.is_main else None
        self._changed: str | None = None
        if latest is not None:
            kept = checkpoint.load(self.engine, latest)
            self._seconds_before = float(kept.get("training_seconds", 0.0))
            if self.samples is not None:
                self._changed = changed_samples(kept.get("samples"), self.samples, self.modality.unit)
        if world.is_main:
            write_text(config.to_json(), self.folder / "config.json")
        self.first_step = self.engine.step_count
        self.report = self.modality.report(config, self.folder, world, self.engine, self.stream)
        self._stop: signal.Signals | None = None

    def go(self) -> Path:
        """Train to the end, or until a signal; then evaluate."""
        config, engine = self.config, self.engine
        records = None
        if self.world.is_main:
            record_session(
                self.folder, config, self.world, self.batch, draws_per_chunk=self.objective.config.chunk,
                first_step=self.first_step, samples=self.samples,
            )  # fmt: skip
            records = Records(self.folder, config, first_step=self.first_step)
        line = ProgressLine(self.total, self.first_step, enabled=self.world.is_main)
        meter = Meter(
            self.world,
            self.batch,
            self.stream.steps_per_epoch,
            unit=self.modality.unit,
            operations=partial(counted_operations, config),
            peak=stated_peak(self.world.device, autocast_dtype(config, self.world.device)),
        )
        watch = CollapseWatch()
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        compiling = ExitStack()
        try:
            self._announce(line)
            if config.train.compile:
                compiling.enter_context(watched(meter.paused, line.paused, say=line.say))
            while engine.step_count < self.total and not self._stopping():
                meter.begin()
                losses = self._micro_batches(meter)
                meter.add(losses, engine.step())
                step = engine.step_count
                record = None
                saves = step % config.train.checkpoint_every == 0 or step == self.total
                shows = config.evaluation.every and step % config.evaluation.every == 0 and step < self.total
                if step % config.train.log_every == 0 or saves or shows or step == self.first_step + 1:
                    record = meter.read(step, engine.last_lr)
                    self._check_finite(record)
                    warning = watch.check(step, record["z0_std"])
                    if warning:
                        line.say(f"warning: {warning}")
                    if records:
                        records.write(record)
                line.advance(step, record)
                if saves:
                    self._save(meter)
                if shows:
                    with meter.paused():
                        self.report.pictures(step)
                if step < self.total and self.report.due(step, self.stream.steps_per_epoch):
                    with meter.paused():
                        measured = self.report.measure(step)
                    if records:
                        records.scalars(step, measured)
            if self._stop is not None:
                if checkpoint.latest_step(self.folder) != engine.step_count:
                    self._save(meter)
                line.close()
                line.say(
                    f"stopped by {self._stop.name} at step {engine.step_count} of {self.total}, saved; "
                    f"continue with --resume"
                )
                return self.folder
        finally:
            compiling.close()
            line.close()
            if records:
                records.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.stream.close()
        self.report.finish(engine.step_count, self._seconds_before + meter.seconds)
        return self.folder

    def _micro_batches(self, meter: Meter) -> StepLosses:
        """Forward and backward of one optimizer step: the mean losses and the last micro-batch's latents."""
        parts: list[StepLosses] = []
        for index in range(self.batch.accumulation):
            with meter.waiting():
                micro_batch = next(self.stream)
            inputs = self.modality.inputs(self.config, micro_batch, self.batch, self.world)
            meter.count(inputs.extent)
            draws = SeededDraws(
                self.config.objective,
                seed=self.config.train.seed,
                step=self.engine.step_count,
                stream=self.world.rank * self.batch.accumulation + index,
                device=self.world.device,
            )
            losses = two_pass_step(
                self.engine,
                self.objective,
                inputs.data,
                inputs.labels,
                draws,
                shape=inputs.shape,
                weight=inputs.weight,
                last=index + 1 == self.batch.accumulation,
            )
            parts.append(losses.scaled(inputs.weight))
        return StepLosses.sum(parts)

    def _announce(self, line: ProgressLine) -> None:
        objective = self.objective.config
        parameters = sum(parameter.numel() for parameter in self.engine.parameters.values())
        line.say(
            f"{self.config.name}: {parameters / 1e6:.1f} M parameters, {self.total} steps of "
            f"{self.batch.global_batch} {self.modality.unit} ({self.world.size} × {self.batch.micro_batch} × "
            f"{self.batch.accumulation}), {objective.flow_draws} flow draws in chunks of {objective.chunk}, "
            f"{self.stream.steps_per_epoch:.1f} steps an epoch, on "
            f"{self.world.device.type} -> {self.folder}"
        )
        if self.first_step:
            line.say(f"continuing after step {self.first_step}")
        if self.first_step > self.total:
            line.say(
                f"warning: that is more than the {self.total} steps which the configuration asks for: nothing is trained, "
                f"and what a finished run leaves is of step {self.first_step}"
            )
        if self._changed:
            line.say(f"warning: {self._changed}")

    def _save(self, meter: Meter) -> None:
        with meter.paused():
            extra = {
                "images": self.engine.step_count * self.batch.global_batch,
                "class_names": list(self.stream.classes),
                "data": self.stream.mode,
                "samples": self.samples,
                "training_seconds": self._seconds_before + meter.seconds,
            }
            checkpoint.save(self.engine, self.folder, extra)

    def _check_finite(self, record: dict[str, float]) -> None:
        watched = [name for name in record if name.startswith("loss_")] + ["grad_norm"]
        bad = [name for name in watched if not math.isfinite(record[name])]
        if not bad:
            return
        kept = checkpoint.latest(self.folder)
        raise UserError(
            f"{' and '.join(bad)} became not finite (NaN or infinite) between steps "
            f"{max(self.first_step, record['step'] - self.config.train.log_every)} and {record['step']}; "
            + (f"the last good checkpoint is {kept}" if kept else "no checkpoint had been saved yet")
            + "; lower optimizer.lr or optimizer.clip_norm, or train with train.precision = fp32, and --resume"
        )

    def _on_signal(self, number: int, frame: object) -> None:
        if self._stop is not None:
            raise KeyboardInterrupt  # the second signal does not wait for the step and the save
        self._stop = signal.Signals(number)

    def _stopping(self) -> bool:
        """True on every rank once any rank was told to stop; ranks ask each other at log steps only."""
        if self.world.size == 1:
            return self._stop is not None
        if self.engine.step_count % self.config.train.log_every:
            return False
        stop = not self.world.all_true(self._stop is None)
        if stop and self._stop is None:
            self._stop = signal.SIGTERM
        return stop

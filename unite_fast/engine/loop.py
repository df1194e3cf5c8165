"""The run: data in, optimizer steps, records, checkpoints, a clean end."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

import unite_kernels as uk
from unite_fast.analysis.devices import stated_peak
from unite_fast.config import Config
from unite_fast.engine import checkpoint
from unite_fast.engine.agreement import (
    check_precision,
    check_same_rounding,
    newest_checkpoint,
    require_same_config,
    require_same_data,
)
from unite_fast.engine.backend import autocast_dtype
from unite_fast.engine.batch import Batch, is_out_of_memory
from unite_fast.engine.compiling import check_compile, compile_perceptual, watched
from unite_fast.engine.engine import Engine
from unite_fast.engine.fitting import Trial, fit
from unite_fast.engine.fp8 import check_fp8
from unite_fast.engine.lock import sole_trainer
from unite_fast.engine.meter import Meter
from unite_fast.engine.monitor import CollapseWatch, ProgressLine, Records, check_wandb
from unite_fast.engine.optim import schedule_doubt
from unite_fast.engine.report import Due
from unite_fast.engine.session import changed_classes, changed_samples, record_session
from unite_fast.engine.stopping import Interrupted, StopSignals
from unite_fast.engine.world import World, init_world, leave_world
from unite_fast.errors import UserError
from unite_fast.importing import Trained
from unite_fast.modality import Stream, counted_operations, modality_of
from unite_fast.objective.draws import SeededDraws
from unite_fast.objective.two_pass import StepLosses, TwoPassObjective, two_pass_step
from unite_fast.records import METRICS
from unite_fast.starting import begin_from, starting_weights
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
            f"smaller number, or model.checkpoint_activations to true; --resume continues from the last checkpoint"
        ) from None
    finally:
        leave_world()


class Run:
    """One training run of one process."""

    def __init__(self, config: Config, world: World, *, resume: bool):
        self.config, self.world, self.modality = config, world, modality_of(config)
        self.folder = Path(config.runs) / config.name
        self._notices: list[str] = []
        # What can be checked is checked before memory is measured, which takes minutes.
        latest = self._agree(resume=resume)
        state = None if latest is None else checkpoint.read_state(latest)
        _check_settings(config, world)
        _require_files(config, world, self.modality.absent_files(config, world.device), begins=latest is None)
        files = self.modality.evaluation_files(config, world.device)
        start = starting_weights(config, world) if latest is None else None
        # Before the data are opened: their order depends on the batch, and a decoder takes memory of the GPU.
        self.batch, self.objective = self._fit()
        self.stream = self._open_stream(state)
        self.samples = self.modality.samples(self.stream)
        require_same_data(self.samples, world, self.modality.unit)
        self.engine = self._build(start)
        # Of training before this session.
        self._seconds_before = 0.0 if latest is None else self._load(latest, state)
        self.first_step = self.engine.step_count
        # Not asked of the folder: a node may see it as it was before the last save, and saving is collective.
        self._saved = None if latest is None else self.first_step
        self.total = self._total_steps(latest)
        # Only now: what is refused above leaves the folder as it was.
        if world.is_main:
            write_text(config.to_json(), self.folder / "config.json")
        self.report = self.modality.report(config, self.folder, world, self.engine, self.stream, files)
        self._stop = StopSignals(world)

    def _agree(self, *, resume: bool) -> Path | None:
        """The checkpoint that all ranks continue from, or None for a run that begins. Collective."""
        # First, because the configuration decides what the ranks exchange from here on.
        require_same_config(self.config, self.world)
        doubts = check_same_rounding(self.config, self.world), check_precision(self.config, self.world)
        self._notices += [f"warning: {doubt}" for doubt in doubts if doubt]
        latest = newest_checkpoint(self.folder, self.world)
        if latest is not None and not resume:
            raise UserError(
                f"{self.folder} already holds a run: add --resume to continue it, or choose another name "
                f"(--set name=…)"
            )
        if latest is None and resume:
            self._notices.append(f"no checkpoint in {self.folder}: the run begins")
        return latest

    def _fit(self) -> tuple[Batch, TwoPassObjective]:
        """The batch that fits into memory, and the objective with the chunk of flow draws that does. Collective."""
        config, world = self.config, self.world
        uk.set_backend(config.train.kernels)  # the trial needs the memory of the run's own kernels
        objective = self.modality.objective(config, world.device, autocast_dtype(config, world.device))
        trial = Trial(config, world, self.modality, objective)
        batch, fitted = fit(config, world, partial(self.modality.largest, config), trial)
        trial.close()
        # In place of what was tried last. The objective alone has the number: the run's configuration, which is kept in
        # checkpoints, says `auto`, since another device may fit another chunk.
        objective.config = fitted.objective
        if config.train.compile:
            compile_perceptual(objective)
        return batch, objective

    def _open_stream(self, state: dict[str, Any] | None) -> Stream:
        """The training data, from where a checkpoint's state.json, if any, says that they were."""
        seen = 0 if state is None else checkpoint.samples_seen(state, self.batch.global_batch)
        # Where the batch was another once, the data go on at the next of today's: less than a batch is left out.
        start_step = math.ceil(seen / self.batch.global_batch)
        return self.modality.stream(self.config, self.batch, self.world, start_step=start_step)

    def _build(self, start: Trained | None) -> Engine:
        """The network with its first weights, random or those of `train.start_from`, in its engine."""
        config = self.config
        # Not before the trial, whose random numbers depend on what fits: the weights depend on the seed alone.
        torch.manual_seed(config.train.seed)
        model = self.modality.network(config.model)
        model.tokenize_t_max = config.objective.tokenize_t_max
        if start is not None:  # before the engine copies the weights: for the averages, and under ZeRO for its slices
            self._notices.append(begin_from(start, model, self.stream.classes))
        return Engine(
            model,
            config,
            self.world,
            steps_per_epoch=self.stream.steps_per_epoch,
            global_batch=self.batch.global_batch,
        )

    def _load(self, latest: Path, state: dict[str, Any]) -> float:
        """Continue from a checkpoint, and note what changed since. Returns the seconds of training before it."""
        kept = checkpoint.load(self.engine, latest)
        changed = changed_samples(kept.get("samples"), self.samples, self.modality.unit)
        classes = changed_classes(kept.get("class_names"), self.stream.classes, self.modality.unit)
        self._notices += [f"warning: {warning}" for warning in (changed, classes) if warning]
        if keys := checkpoint.changed_keys(state, self.config):
            self._notices.append(f"changed since the checkpoint: {', '.join(keys)}")
        return float(kept.get("training_seconds", 0.0))

    def _total_steps(self, latest: Path | None) -> int:
        """Optimizer steps of the whole run. Raises a UserError where none is left and none was trained here."""
        # Steps of another batch count by the share of an epoch that they were of.
        done, other = self.engine.step_count, self.engine.step_count - self.engine.progress
        train = self.config.train
        total = train.steps or max(1, math.ceil(train.epochs * self.stream.steps_per_epoch + other))
        if done >= total and not (self.folder / METRICS).is_file():
            raise UserError(
                f"{latest} is at step {done} and the run ends at step {total}: nothing is left to train, and nothing "
                "was trained here; set train.steps or train.epochs higher"
            )
        return total

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
        around = ExitStack()
        try:
            around.enter_context(self._stop)
            self._announce(line)
            if config.train.compile:
                around.enter_context(watched(meter.paused, line.paused, say=line.say))
            if self.first_step:
                self._evaluate(self._due(self.first_step) - self.report.made(self.first_step), meter, records)
            while engine.step_count < self.total and not self._stop.told():
                meter.begin()
                losses = self._micro_batches(meter)
                meter.add(losses, engine.step())
                step = engine.step_count
                record = None
                due = self._due(step)
                saves = bool(due) or step % config.train.checkpoint_every == 0 or step == self.total
                if step % config.train.log_every == 0 or saves or step == self.first_step + 1:
                    record = meter.read(step, engine.samples_seen, engine.last_lr)
                    self._check_finite(record)
                    warning = watch.check(step, record.get("z0_std"))
                    if warning:
                        line.say(f"warning: {warning}")
                    if records:
                        records.write(record)
                line.advance(step, record)
                if saves:
                    self._save(meter)
                self._evaluate(due, meter, records)
            if self._stop.told_now():
                if self._saved != engine.step_count:
                    self._save(meter)
                self._say_stopped(line)
                return self.folder
        except Interrupted:
            self._say_stopped(line)
            return self.folder
        finally:
            around.close()
            line.close()
            if records:
                records.close()
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

    def _due(self, step: int) -> set[Due]:
        """What is due after a step; after the last the end makes it."""
        due: set[Due] = set()
        if step >= self.total:
            return due
        if self.config.evaluation.every and step % self.config.evaluation.every == 0:
            due.add("pictures")
        if self.report.due(self.engine.progress, self.stream.steps_per_epoch):
            due.add("metrics")
        return due

    def _evaluate(self, due: set[Due], meter: Meter, records: Records | None) -> None:
        """Make what is due of a step that is saved: it may take long, and a stop breaks it off."""
        if not due:
            return
        step = self.engine.step_count
        with meter.paused(), self._stop.at_once():
            if "pictures" in due:
                self.report.pictures(step)
            if "metrics" in due:
                measured = self.report.measure(step)
                if records:
                    records.scalars(step, measured)

    def _say_stopped(self, line: ProgressLine) -> None:
        line.close()
        name = self._stop.received.name if self._stop.received else "a signal to another rank"
        line.say(f"stopped by {name} at step {self.engine.step_count} of {self.total}, saved; continue with --resume")

    def _announce(self, line: ProgressLine) -> None:
        objective = self.objective.config
        line.say(
            f"{self.config.name}: {self.engine.parameter_count / 1e6:.1f} M parameters, {self.total} steps of "
            f"{self.batch.global_batch} {self.modality.unit} ({self.world.size} × {self.batch.micro_batch} × "
            f"{self.batch.accumulation}), {objective.flow_draws} flow draws in chunks of {objective.chunk}, "
            f"{self.stream.steps_per_epoch:.1f} steps per epoch, on "
            f"{self.world.device.type} -> {self.folder}"
        )
        if self.first_step:
            line.say(
                f"continuing after step {self.first_step}: {self.engine.samples_seen} {self.modality.unit}, epoch "
                f"{self.engine.progress / self.stream.steps_per_epoch:.2f}"
            )
        if self.first_step > self.total:
            line.say(
                f"warning: that is more than the {self.total} steps which the configuration asks for: nothing is "
                f"trained, and what a finished run leaves is of step {self.first_step}"
            )
        if doubt := schedule_doubt(self.total, self.stream.steps_per_epoch, self.config.optimizer):
            line.say(f"warning: {doubt}")
        for notice in self._notices:
            line.say(notice)

    def _save(self, meter: Meter) -> None:
        with meter.paused():
            extra = {
                "images": self.engine.samples_seen,
                "class_names": list(self.stream.classes),
                "data": self.stream.mode,
                "samples": self.samples,
                "training_seconds": self._seconds_before + meter.seconds,
            }
            checkpoint.save(self.engine, self.folder, extra)
        self._saved = self.engine.step_count

    def _check_finite(self, record: dict[str, float]) -> None:
        watched = [name for name in record if name.startswith("loss_")] + ["grad_norm"]
        bad = [name for name in watched if not math.isfinite(record[name])]
        if not bad:
            return
        kept = checkpoint.latest(self.folder)
        raise UserError(
            f"{' and '.join(bad)} became NaN or infinite between steps "
            f"{max(self.first_step, record['step'] - self.config.train.log_every)} and {record['step']}; "
            + (f"the last good checkpoint is {kept}" if kept else "no checkpoint had been saved yet")
            + "; lower optimizer.lr or optimizer.clip_norm"
            + (", or train with train.precision = fp32" if autocast_dtype(self.config, self.world.device) else "")
            + ", and --resume"
        )


def _check_settings(config: Config, world: World) -> None:
    """Raise a UserError for a key that asks for what this machine or its packages lack."""
    if config.train.kernels == "triton" and world.device.type != "cuda" and not uk.dispatch.INTERPRETED:
        raise UserError(
            "train.kernels is triton but this run is on a CPU: set it to auto (or set TRITON_INTERPRET=1 to debug)"
        )
    check_wandb(config.train.wandb)
    check_compile(config, world.device)
    check_fp8(config, world.device)


def _require_files(config: Config, world: World, absent: list[str], *, begins: bool) -> None:
    """Raise a UserError for all that the run names and does not find, before minutes of measuring. Collective.

    Args:
        absent: a sentence for each missing file beside the data.
        begins: the run has no checkpoint, so that it reads `train.start_from`.
    """
    places = [
        (f"data.{key}", getattr(config.data, key, None), "set it to where the data are, or put them there")
        for key in ("path", "val_path")
    ]
    if begins:
        places.append(("train.start_from", config.train.start_from, "set it to a run, a checkpoint or an export"))
    missing = [
        f"{key}: there is no {path}" + ("" if Path(path).is_absolute() else f" in {Path.cwd()}") + f": {advice}"
        for key, path, advice in places
        if path is not None and not Path(path).exists()
    ]
    world.require_none(missing + absent, f"{config.name} needs what is not there")

"""What a run reports while it trains: records, TensorBoard, the progress line, the collapse warning."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from unite_fast.errors import UserError
from unite_fast.records import METRICS, losses, read_lines

if TYPE_CHECKING:
    from unite_fast.config import Config

# In the quickstart the deviation is 0.005 while the latents are still alike, and 0.2 to 0.45 from step 130 on.
COLLAPSED_STD = 0.05
# The final layer starts at zero, so every image has the same latent at first; the watch lets this many steps pass.
COLLAPSE_GRACE_STEPS = 200


class CollapseWatch:
    """Warns once per collapse when the latents of different samples become the same."""

    def __init__(self):
        self._warned = False

    def check(self, step: int, z0_std: float | None) -> str | None:
        """A warning that says what to change, or None, as where the deviation is not known."""
        if z0_std is None:
            return None
        if step < COLLAPSE_GRACE_STEPS or z0_std >= COLLAPSED_STD:
            self._warned = self._warned and z0_std < COLLAPSED_STD
            return None
        if self._warned:
            return None
        self._warned = True
        return (
            f"step {step}: latents collapse, their standard deviation across samples is {z0_std:.3f} (healthy: above "
            f"0.2). The flow loss falls because nothing is left to predict. Raise objective.l1_weight (of molecules "
            f"objective.position_weight), lower objective.flow_weight or objective.flow_draws, or lower optimizer.lr."
        )


def check_wandb(project: str | None) -> None:
    """Refuse a run that asks for Weights & Biases where it is not installed.

    Raises:
        UserError: the package is missing.
    """
    if project is not None and find_spec("wandb") is None:
        raise UserError(
            "train.wandb needs the package wandb, which is not installed: "
            "pip install 'unite_fast[wandb]', or set train.wandb to null (TensorBoard events are written anyway)"
        )


class Records:
    """metrics.jsonl, TensorBoard events and, where `train.wandb` names a project, Weights & Biases of one run folder.

    On resume, records of steps that the checkpoint does not hold are dropped: the run will write them again.
    """

    def __init__(self, folder: Path, config: Config, *, first_step: int):
        from torch.utils.tensorboard import SummaryWriter  # imports torch, which those who only read need not

        self._path = folder / METRICS
        try:
            self._keep_before(first_step)
            self._file = open(self._path, "a", encoding="utf-8", buffering=1)
            # TensorBoard drops this step and what follows it.
            self._board = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1 if first_step else None)
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror or error}") from None
        self._wandb = None if config.train.wandb is None else _wandb_run(folder, config)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; `step` is its key."""
        counts = ("step", "images", "molecules", "time")
        with self._written():
            self._file.write(json.dumps(record) + "\n")
            for name, value in record.items():
                if name not in counts:
                    self._board.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            # No `step=`: W&B drops steps that do not rise, and a resumed run repeats those after its checkpoint.
            self._wandb.log({name: value for name, value in record.items() if name != "time"})

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Metrics of an evaluation, for TensorBoard; the evaluation keeps its own record."""
        with self._written():
            for name, value in values.items():
                self._board.add_scalar(f"evaluation/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step} | {f"evaluation/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """Close all; a disk that is full by now has been reported by what was written before."""
        for stream in (self._file, self._board):
            with suppress(OSError):
                stream.close()
        if self._wandb is not None:
            self._wandb.finish()

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # TensorBoard's is that of its writing thread, some records ago
            raise UserError(
                f"cannot write records into {self._path.parent}: {error.strerror or error}; --resume continues "
                f"from the last checkpoint"
            ) from None

    def _keep_before(self, first_step: int) -> None:
        from unite_fast.weights import write_text  # imports torch, too

        if not self._path.exists():
            return
        kept = [record for record in read_lines(self._path) if record.get("step", math.inf) <= first_step]
        write_text("".join(json.dumps(record) + "\n" for record in kept), self._path)


def _wandb_run(folder: Path, config: Config) -> Any:
    """The W&B run of this run folder: the same one after a resume, by the id kept in wandb.json."""
    import wandb

    from unite_fast.weights import write_json

    kept = folder / "wandb.json"
    try:
        run_id = json.loads(kept.read_text(encoding="utf-8"))["id"]
    except (OSError, ValueError, KeyError, TypeError):
        run_id = None
    try:
        run = wandb.init(
            project=config.train.wandb, name=config.name, id=run_id, resume="allow", dir=str(folder),
            config=config.model_dump(mode="json"),
        )  # fmt: skip
    except Exception as error:  # wandb raises classes of its own: no login, no network, a wrong project name
        raise UserError(
            f"cannot start Weights & Biases ({str(error).splitlines()[0] if str(error) else type(error).__name__}): "
            f"run `wandb login`, set WANDB_MODE=offline, or set train.wandb to null"
        ) from None
    run.define_metric("*", step_metric="step")
    write_json({"id": run.id, "project": config.train.wandb}, kept)
    return run


# What stands on the progress line between the rate and the losses, and how it is written.
_TOLD = {"mfu": "MFU {:.1%}", "data_wait": "wait {:.0%}", "memory_gb": "{:.1f} GB"}


def _told(record: dict[str, Any]) -> list[str]:
    """The rate, where time and memory go, and the losses of a record, for people."""
    rates = [(name, value) for name, value in record.items() if name.endswith("_per_second")]
    return [
        *(f"{value:.0f} {name.removesuffix('_per_second')}/s" for name, value in rates),
        *(text.format(record[name]) for name, text in _TOLD.items() if name in record),
        *(f"{name} {record[key]:.4f}" for key, name in losses(record).items() if key != "loss"),
    ]


class ProgressLine:
    """The live line on a terminal; elsewhere one printed line every `seconds`."""

    def __init__(self, total: int, first: int, *, enabled: bool, seconds: float = 15.0):
        self._console = Console(stderr=True)
        self._live = enabled and self._console.is_terminal
        self._enabled = enabled
        self._total, self._first, self._seconds = total, first, seconds
        self._began = self._printed = time.monotonic()
        self._task: TaskID | None = None
        if self._live:
            columns = (
                TextColumn("step {task.completed}/{task.total}"), BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}"), TextColumn("left"), TimeRemainingColumn(),
            )  # fmt: skip
            self._progress = Progress(*columns, console=self._console)
            self._progress.start()
            self._task = self._progress.add_task("train", total=total, completed=first, text="")

    def advance(self, step: int, record: dict[str, Any] | None) -> None:
        """`step` optimizer steps are done; `record` is the newest log record or None."""
        text = "" if record is None else "  ".join(_told(record))
        if self._live:
            self._progress.update(self._task, completed=step, **({"text": text} if text else {}))
            return
        now = time.monotonic()
        if self._enabled and text and (now - self._printed >= self._seconds or step == self._total):
            self._printed = now
            left = round((now - self._began) / max(1, step - self._first) * (self._total - step))
            self._console.print(f"step {step}/{self._total}  {text}  left {left // 60}:{left % 60:02}")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that says nothing about the steps that are left."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def say(self, message: str) -> None:
        """Print a message above the line."""
        if self._enabled:
            self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._live:
            self._progress.stop()

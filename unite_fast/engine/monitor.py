"""What a run tells the world while it trains: records, TensorBoard, the progress line, the collapse watch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from unite_fast.errors import UserError

# In the quickstart the deviation is 0.005 while the latents are still alike, and 0.2 to 0.45 from step 130 on.
COLLAPSED_STD = 0.05
# The final layer starts at zero, so every image has the same latent at first; the watch lets this many steps pass.
COLLAPSE_GRACE_STEPS = 200


class CollapseWatch:
    """Warns once per collapse when the latents of different images become the same."""

    def __init__(self):
        self._warned = False

    def check(self, step: int, z0_std: float) -> str | None:
        """A warning that says what to change, or None."""
        if step < COLLAPSE_GRACE_STEPS or z0_std >= COLLAPSED_STD:
            self._warned = self._warned and z0_std < COLLAPSED_STD
            return None
        if self._warned:
            return None
        self._warned = True
        return (
            f"step {step}: latents collapse, their standard deviation across images is {z0_std:.3f} (healthy: above "
            f"0.2). The flow loss falls because nothing is left to predict. Raise objective.l1_weight, lower "
            f"objective.flow_weight or objective.flow_draws, or lower optimizer.lr."
        )


class Records:
    """metrics.jsonl and TensorBoard events of one run folder.

    On resume, records of steps that the checkpoint does not hold are dropped: the run will write them again.
    """

    def __init__(self, folder: Path, *, first_step: int):
        self._path = folder / "metrics.jsonl"
        self._keep_before(first_step)
        try:
            self._file = open(self._path, "a", encoding="utf-8", buffering=1)
            self._board = SummaryWriter(folder / "tensorboard", purge_step=first_step or None)
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from None

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; `step` is its key."""
        try:
            self._file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from None
        for name, value in record.items():
            if name not in ("step", "images", "time"):
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def _keep_before(self, first_step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= first_step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                continue  # the half-written last line of a killed run
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self._path)


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
        text = "" if record is None else (
            f"{record['images_per_second']:.0f} images/s  "
            + (f"MFU {record['mfu']:.1%}  " if "mfu" in record else "")
            + f"wait {record['data_wait']:.0%}  {record['memory_gb']:.1f} GB  L1 {record['loss_l1']:.4f}  "
            + (f"LPIPS {record['loss_lpips']:.3f}  " if "loss_lpips" in record else "")
            + f"flow {record['loss_flow']:.3f}"
        )  # fmt: skip
        if self._live:
            self._progress.update(self._task, completed=step, **({"text": text} if text else {}))
            return
        now = time.monotonic()
        if self._enabled and text and (now - self._printed >= self._seconds or step == self._total):
            self._printed = now
            left = (now - self._began) / max(1, step - self._first) * (self._total - step)
            self._console.print(f"step {step}/{self._total}  {text}  left {left // 60:.0f}:{left % 60:02.0f}")

    def say(self, message: str) -> None:
        """Print a message above the line."""
        if self._enabled:
            self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._live:
            self._progress.stop()

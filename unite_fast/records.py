"""What a run folder says about its run, read without torch: configuration, records, sessions, results."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unite_fast.errors import UserError

METRICS, SESSIONS, CONFIG, SUMMARY = "metrics.jsonl", "sessions.jsonl", "config.json", "summary.json"
EVALUATIONS = "evaluations"
LOCK = ".lock"  # says who trains in the folder, and is empty after a trainer that ended by itself
# A run that has not logged for ten of its own intervals, and at least for this long, counts as stopped: a checkpoint
# of XL takes about a minute to write, sheets of samples take several.
SILENT_SECONDS = 600.0


def losses(record: dict[str, Any]) -> dict[str, str]:
    """Key -> name for people of a record's losses, in its order; a term without a name here keeps its own."""
    names = {"loss": "total", "loss_l1": "L1", "loss_lpips": "LPIPS", "loss_element": "elements",
             "loss_position": "positions"}  # fmt: skip
    found = (key for key in record if key == "loss" or key.startswith("loss_"))
    return {key: names.get(key, key.removeprefix("loss_")) for key in found}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Records of a `metrics.jsonl`, by rising step; the last record of a step counts.

    A run that was killed leaves a cut last line, and one that was resumed repeats steps: lines that are no JSON object
    with a `step` are passed over.

    Raises:
        UserError: a file that cannot be read, or that holds no record.
    """
    records = {record["step"]: record for record in read_lines(path) if isinstance(record.get("step"), int)}
    if not records:
        raise UserError(f"{path} holds no record yet: let the run log a step (train.log_every) first")
    return [records[step] for step in sorted(records)]


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines, in its order; anything else in it, a half-written line too, is passed over.

    Raises:
        UserError: a file that cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read metrics {path}: {error.strerror or error}") from None
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


@dataclass(frozen=True)
class RunFolder:
    """A run as its folder tells it.

    Attributes:
        path: the folder.
        config: config.json.
        metrics: records by rising step; empty before the first.
        sessions: one entry for each time that training was started or resumed.
        summary: summary.json, None before the run has ended once.
        evaluations: name -> content of evaluations/NAME.json, by name.
        problems: files that could not be used, and why.
    """

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the run."""
        return str(self.config.get("name", self.path.name))

    @property
    def step(self) -> int:
        """Optimizer steps of the newest record, 0 before the first."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def total(self) -> int | None:
        """Optimizer steps of the whole run; None where epochs are configured and no record tells their length."""
        train = self.config.get("train", {})
        if isinstance(train.get("steps"), int):
            return train["steps"]
        epochs = number(train.get("epochs"))
        for record in reversed(self.metrics):
            epoch = number(record.get("epoch"))
            if epochs and epoch:
                return max(1, math.ceil(epochs * record["step"] / epoch - 1e-6))
        return None

    @property
    def trained(self) -> bool:
        """Whether the last step has been taken."""
        return self.total is not None and self.step >= self.total

    def state(self, now: float | None = None) -> str:
        """`finished`, `evaluating` behind the last step, `training`, `stopped`, `starting` before the first record."""
        if self.trained and (number((self.summary or {}).get("steps")) or 0) >= self.total:
            return "finished"
        times = [value for record in self.metrics[-2:] if (value := number(record.get("time")))]
        if not times:
            return "starting"
        try:
            held = (self.path / LOCK).stat().st_size > 0
        except OSError:  # none, as in a copy of the folder
            held = None
        if held is False or (held is None and self.trained):
            return "stopped"
        if self.trained:  # for as long as that takes, since nothing is recorded meanwhile
            return "evaluating"
        interval = times[-1] - times[0]
        silent = (time.time() if now is None else now) - times[-1]
        return "stopped" if silent > max(SILENT_SECONDS, 10 * interval) else "training"


def number(value: Any) -> float | None:
    """A finite number as a float, None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def duration(seconds: float) -> str:
    """Two units at most: 48 s, 5 min 12 s, 3 h 20 min, 2 d 4 h."""
    for big, small, size, unit in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if seconds >= size:
            rest = int(seconds % size // unit)
            return f"{int(seconds // size)} {big}" + (f" {rest} {small}" if rest else "")
    return f"{seconds:.0f} s"


def open_run(path: str | Path) -> RunFolder:
    """Read a run folder, finished or in training.

    Raises:
        UserError: no such folder, or none that a run has written.
    """
    folder = Path(path)
    if not folder.exists():
        raise UserError(f"no folder {folder}")
    if not (folder / CONFIG).is_file():
        what = "one checkpoint" if folder.parent.name == "checkpoints" else "no run"
        raise UserError(f"{folder} holds {what}: give the run's folder, which holds {CONFIG}")
    problems: list[str] = []
    config = _read_object(folder / CONFIG, problems)
    if config is None:
        raise UserError(problems[0])
    kinds = {"modality": (str, "text")} | dict.fromkeys(("train", "model", "evaluation"), (dict, "an object"))
    for key, (kind, what) in kinds.items():
        if not isinstance(config.get(key, kind()), kind):
            raise UserError(f"{folder / CONFIG} is not a run's configuration: its {key} must be {what}")
    metrics = []
    if (folder / METRICS).is_file():
        try:
            metrics = read_metrics(folder / METRICS)
        except UserError as error:
            problems.append(str(error))
    summary = _read_object(folder / SUMMARY, problems) if (folder / SUMMARY).is_file() else None
    evaluations = {}
    for file in sorted((folder / EVALUATIONS).glob("*.json")):
        content = _read_object(file, problems)
        if content is None:
            continue
        if isinstance(content.get("metrics"), dict) and isinstance(content.get("protocol"), dict):
            evaluations[file.stem] = content
        else:
            problems.append(f"{file} is no evaluation: it has no metrics with a protocol")
    sessions = read_lines(folder / SESSIONS) if (folder / SESSIONS).is_file() else []
    return RunFolder(folder, config, metrics, sessions, summary, evaluations, problems)


def _read_object(path: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"cannot read {path}: {error.strerror or error}")
        return None
    except (ValueError, RecursionError):
        problems.append(f"{path} is not JSON")
        return None
    if not isinstance(content, dict):
        problems.append(f"{path} must hold a JSON object")
        return None
    return content

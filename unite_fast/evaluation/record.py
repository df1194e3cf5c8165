"""Records of evaluations: RUN/evaluations/NAME.json holds metrics, protocol and tables; reading and comparing them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unite_fast.errors import UserError
from unite_fast.evaluation.protocol import FOLDER, READINGS, differences, weights_hash
from unite_fast.evaluation.work import digest
from unite_fast.weights import write_json


def about_model(state: dict[str, Tensor], origin: str, made_by: dict[str, Any]) -> dict[str, Any]:
    """The protocol's `model`: where the weights come from, and their hash, which is the same wherever they lie."""
    names = ("run", "step", "ema_decay", "tokenize_t_max", "imported_from")
    known = {name: made_by[name] for name in names if name in made_by}
    return {"origin": origin, **known, "weights": made_by.get("weights", "ema"), "sha256": weights_hash(state)}


def default_name(protocol: dict[str, Any]) -> str:
    """step_00001000-3f2a9c01: the step, and a digest of the protocol, so that only an equal evaluation is replaced.

    Where the weights were read does not count: a path can be written in several ways, and their hash tells them apart.
    """
    decisive = {key: value for key, value in protocol.items() if key not in ("environment", "warnings")}
    decisive["model"] = {key: value for key, value in protocol["model"].items() if key != "origin"}
    step = protocol["model"].get("step")
    return f"{'model' if step is None else f'step_{step:08d}'}-{digest(decisive)[:8]}"


def write_record(
    path: Path,
    metrics: dict[str, Any],
    protocol: dict[str, Any],
    tables: dict[str, list[dict[str, float]]] | None = None,
) -> None:
    """Write one evaluation atomically.

    A metric that is no finite number is left out and named among the protocol's warnings.

    Raises:
        UserError: full disk or unwritable folder.
    """
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        warning = f"{', '.join(bad)}: no finite number, what the model makes is degenerate"
        protocol = protocol | {"warnings": [*protocol.get("warnings", ()), warning]}
        metrics = {name: value for name, value in metrics.items() if name not in bad}
    write_json({"metrics": metrics, "protocol": protocol, **({"tables": tables} if tables else {})}, path)


@dataclass(frozen=True)
class Row:
    """One evaluation of a comparison."""

    name: str
    metrics: dict[str, float]
    protocol: dict[str, Any]


def read_records(source: Path) -> list[Row]:
    """Evaluations of a run folder, by name, or of one record file.

    Raises:
        UserError: nothing there, or a file that is no record.
    """
    files = [source] if source.is_file() else sorted((source / FOLDER).glob("*.json"))
    if not files:
        missing = "has no evaluations yet: `unite-fast evaluate` makes one" if source.exists() else "does not exist"
        raise UserError(f"{source} {missing}")
    rows = []
    for file in files:
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            metrics, protocol = dict(record["metrics"]), dict(record["protocol"])
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file} is not an evaluation record") from None
        name = file.stem if source.is_file() else f"{source.absolute().name}/{file.stem}"
        rows.append(Row(name, metrics, protocol))
    return rows


def ranking(rows: list[Row], metric: str) -> tuple[list[int], list[str]]:
    """(indices of the best rows, what keeps the values from being compared); none is best where protocols differ.

    Args:
        metric: a key of `READINGS`; rows without it are passed over.
    """
    having = [row for row in rows if metric in row.metrics]
    if len(having) < 2:
        return [], []
    reasons: list[str] = []
    for row in having[1:]:
        reasons += differences(having[0].protocol, row.protocol, metric)
    return ([], list(dict.fromkeys(reasons))) if reasons else (best_of(rows, metric), [])


def best_of(rows: list[Row], metric: str) -> list[int]:
    """Indices of the best value, whatever protocols say; several if it is met several times."""
    values = [row.metrics[metric] for row in rows if metric in row.metrics]
    best = min(values) if READINGS[metric].better == "lower" else max(values)
    return [index for index, row in enumerate(rows) if row.metrics.get(metric) == best]

"""Metrics for people: names, units, which way is better, what real images score, and the protocol behind them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from unite_fast.evaluation.protocol import READINGS
from unite_fast.records import RunFolder, number
from unite_fast.report.charts import Curve, line_chart

# name -> (title, unit, "higher" or "lower" or "" where neither is better, what it says)
GLOSSARY: dict[str, tuple[str, str, str, str]] = {
    "gfid": ("gFID", "", "lower", "Fréchet distance of generated to real images, Inception features"),
    "rfid": ("rFID", "", "lower", "Fréchet distance of reconstructed to original images"),
    "is": ("Inception score", "", "higher", "confident and varied classes"),
    "kid": ("KID", "", "lower", "kernel distance of generated to real images"),
    "precision": ("precision", "", "higher", "share of generated images that look real"),
    "recall": ("recall", "", "higher", "share of real images that the generator reaches"),
    "psnr": ("PSNR", "dB", "higher", "mean over reconstructions"),
    "psnr_std": ("PSNR, spread", "dB", "", "standard deviation over images"),
    "psnr_worst": ("PSNR, worst image", "dB", "higher", ""),
    "ssim": ("SSIM", "", "higher", "structural similarity of reconstructions"),
    "lpips": ("LPIPS", "", "lower", "perceptual distance of reconstructions"),
    "l1": ("L1", "", "lower", "mean absolute error, pixels in 0 … 1"),
    "class_accuracy": ("class accuracy", "", "higher", "generated images that a classifier of real ones recognises"),
    "class_accuracy_worst": ("class accuracy, worst class", "", "higher", ""),
    "frechet_pca": ("Fréchet distance, PCA", "", "lower", "to held-out images; the mean image alone scores about 1"),
    "coverage": ("coverage", "", "higher", "share of held-out images with a generated one nearby"),
    "coverage_worst": ("coverage, worst class", "", "higher", ""),
    "density": ("density", "", "", "generated images per neighbourhood of real ones"),
    "spread": ("spread within a class", "", "", "1 as varied as real images, 0 one image per class"),
    "nearest_train_ratio": ("distance to training images", "", "", "over that of held-out images; near 0 memorised"),
    "near_copies": ("near copies", "", "lower", "share closer to a training image than 99 % of held-out ones"),
}
# Those of molecules go by their keys: name -> (unit, which way is better, what it says).
MOLECULES: dict[str, tuple[str, str, str]] = {
    "reconstruction/element_accuracy": ("", "higher", "atoms of held-out molecules whose element comes back"),
    "reconstruction/elements_exact": ("", "higher", "held-out molecules with every element right"),
    "reconstruction/rmsd": ("Å", "lower", "of held-out molecules after the best rotation, in the mean"),
    "reconstruction/rmsd_median": ("Å", "lower", ""),
    "reconstruction/match": ("", "higher", "held-out molecules that come back as the same molecule"),
    "edm/atom_stable": ("", "higher", "atoms whose bonds, by a table of lengths, add up to their valence"),
    "edm/molecule_stable": ("", "higher", "molecules of such atoms only"),
    "edm/valid": ("", "higher", "molecules whose bonds by that table RDKit accepts"),
    "rdkit/valid": ("", "higher", "molecules whose bonds RDKit perceives and accepts, maybe in pieces"),
    "rdkit/connected": ("", "higher", "valid and in one piece"),
    "rdkit/charged": ("", "lower", "valid with charges, which may stand for missing hydrogens"),
    "rdkit/unique": ("", "higher", "distinct ones among the valid"),
    "rdkit/novel": ("", "higher", "of these, what is no training molecule"),
    "rdkit/valid_unique": ("", "higher", "distinct ones that are valid, over all molecules"),
    "rdkit/valid_connected_unique": ("", "higher", "of these, those in one piece"),
    "rdkit/valid_connected_unique_novel": ("", "higher", "of these, what is no training molecule"),
    "distance/atoms": ("", "lower", "of histograms of atom counts to held-out ones: 0 equal, 1 disjoint"),
    "distance/elements": ("", "lower", "of histograms of elements to held-out ones: 0 equal, 1 disjoint"),
    "distance/bond_lengths": ("Å", "lower", "of distributions of bond lengths to held-out ones"),
}
GLOSSARY |= {name: (name, *rest) for name, rest in MOLECULES.items()}
HEADLINE = (
    "gfid", "rfid", "is", "class_accuracy", "frechet_pca", "psnr", "coverage", "ssim", "lpips",
    "reconstruction/match", "rdkit/valid", "rdkit/connected", "edm/atom_stable",
)  # fmt: skip
# Entries of summary.json that say how the others were measured.
SUMMARY_PROTOCOL = (
    "images_generated", "images_train", "images_held_out", "images_reconstructed", "reconstructed",
    "frechet_components", "neighbours", "feature_side", "data", "steps", "training_seconds", "parameters", "made_by",
)  # fmt: skip
NOT_PROTOCOL = ("model", "environment", "warnings")  # parts of a protocol that may differ between steps of one curve
MOST_LINES = 5  # that a chart has colours for
REAL = ("_train", "_real")  # endings of what real images score by the same protocol


@dataclass(frozen=True)
class Entry:
    """A row of a table of metrics."""

    title: str
    value: str
    real: str
    better: str
    meaning: str


@dataclass
class Grid:
    """A table stored beside metrics, with a chart where its rows are points.

    Attributes:
        legend: of the chart's lines, empty for one.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    legend: list[str] = field(default_factory=list)
    chart: Markup | None = None


@dataclass
class Result:
    """One evaluation.

    Attributes:
        of: which weights, in a few words.
        older: whether weights of a later step have been evaluated.
        warnings: what the evaluation itself says about its numbers.
    """

    name: str
    entries: list[Entry]
    protocol: list[tuple[str, str]]
    grids: list[Grid] = field(default_factory=list)
    of: str = ""
    older: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def compared(self) -> bool:
        """Whether any row says what real images or molecules score."""
        return any(entry.real for entry in self.entries)


def result_tables(run: RunFolder) -> list[Result]:
    """Every stored evaluation, the latest step first, below summary.json unless one of them holds its numbers."""
    results = []
    if run.summary and not any(_holds(content["metrics"], run.summary) for content in run.evaluations.values()):
        metrics = {key: value for key, value in run.summary.items() if key not in SUMMARY_PROTOCOL}
        protocol = {key: run.summary[key] for key in SUMMARY_PROTOCOL if key in run.summary}
        results.append(Result("at the end of training", _entries(metrics), _flat(protocol)))
    newest = max(map(_step, run.evaluations.values()), default=0)
    for name, content in sorted(run.evaluations.items(), key=lambda item: -_step(item[1])):
        protocol = dict(content["protocol"])
        warnings = protocol.pop("warnings", [])
        model = protocol.get("model") if isinstance(protocol.get("model"), dict) else {}
        step, weights = model.get("step"), model.get("weights")
        about = [f"step {step:,}" if isinstance(step, int) else "", f"{weights} weights" if weights else ""]
        results.append(
            Result(
                name, _entries(content["metrics"]), _flat(protocol),
                [_grid(title, rows) for title, rows in _tables(content.get("tables"))],
                ", ".join(part for part in about if part),
                isinstance(step, int) and step < newest,
                [str(warning) for warning in warnings] if isinstance(warnings, list) else [],
            )
        )  # fmt: skip
    return results


def _step(content: dict[str, Any]) -> int:
    """Step of the weights of an evaluation; one that does not say counts as the first."""
    step = _said(content, "model", "step")
    return step if isinstance(step, int) else 0


def _said(content: dict[str, Any], section: str, key: str) -> Any:
    """An entry of an evaluation's protocol, None where it does not say."""
    found = content["protocol"].get(section)
    return found.get(key) if isinstance(found, dict) else None


def _weight(content: dict[str, Any], key: str) -> tuple[int, int, str]:
    """(step, images that the metric was measured on, date) of an evaluation; 0 and "" where it does not say."""
    sections = READINGS[key].sections
    count = _said(content, "generation" if "generation" in sections else "held_out", "count")
    return _step(content), count if isinstance(count, int) else 0, str(_said(content, "environment", "date") or "")


def _holds(metrics: dict[str, Any], summary: dict[str, Any]) -> bool:
    """Whether an evaluation has every metric of summary.json with the same value."""
    measured = {key: value for key, value in summary.items() if key not in SUMMARY_PROTOCOL}
    return bool(measured) and all(metrics.get(key) == value for key, value in measured.items())


def trends(run: RunFolder) -> list[tuple[str, Curve]]:
    """(title, values over steps) of metrics that evaluations of one protocol have measured at several steps."""
    alike: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for content in run.evaluations.values():
        step = _step(content)
        if step:
            model = content["protocol"]["model"]
            kind = {key: value for key, value in content["protocol"].items() if key not in NOT_PROTOCOL}
            kind["weights"] = [model.get("weights"), model.get("ema_decay")]
            alike.setdefault(json.dumps(kind, sort_keys=True), []).append((step, content["metrics"]))
    most = max(alike.values(), key=lambda group: len({step for step, _ in group}), default=[])
    found = []
    for key in HEADLINE:
        points = {step: value for step, metrics in most if (value := number(metrics.get(key))) is not None}
        if len(points) >= 2:
            steps = sorted(points)
            found.append((GLOSSARY[key][0], Curve("", np.array(steps, float), np.array([points[s] for s in steps]))))
    return found


def headline(run: RunFolder) -> list[tuple[str, str, str]]:
    """(title, value with unit, which way is better) of the few numbers that come first.

    Each is of the latest step where it was measured, there of the most images: a trial of a few is no result.
    """
    summary = run.summary or {}
    found = []
    for key in HEADLINE:
        # What was measured at the end of training stands before what has been evaluated of that step since.
        measured = [((number(summary.get("steps")) or 0, 0, ""), summary.get(key))]
        measured += [(_weight(content, key), content["metrics"].get(key)) for content in run.evaluations.values()]
        values = [(weight, value) for weight, one in measured if (value := number(one)) is not None]
        if values:
            value = sorted(values, key=lambda one: one[0])[-1][1]
            title, unit, better, _ = GLOSSARY[key]
            found.append((title, f"{value:.4g}" + (f" {unit}" if unit else ""), better))
    return found[:4]


def _entries(metrics: dict[str, Any]) -> list[Entry]:
    entries = []
    for key, value in metrics.items():
        counted = isinstance(value, int)  # molecules_train is no ceiling of molecules
        base = next((key.removesuffix(end) for end in REAL if key.endswith(end)), None)
        if base in metrics and not counted:
            continue  # stands beside its metric
        title, unit, better, meaning = GLOSSARY.get(key, (key.replace("_", " "), "", "", ""))
        real = None if counted else next((metrics[key + end] for end in REAL if key + end in metrics), None)
        entries.append(Entry(title, _number(value, unit), "" if real is None else _number(real, unit), better, meaning))
    return entries


def _number(value: Any, unit: str = "") -> str:
    plain = number(value)
    if plain is None:
        return "not finite" if isinstance(value, float) else text_of(value)
    text = f"{value:,}" if isinstance(value, int) else f"{plain:.4g}"
    return f"{text} {unit}" if unit else text


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys, values as text."""
    found = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            found += _flat(value, f"{name}: ")
        else:
            found.append((name, text_of(value)))
    return found


def text_of(value: Any) -> str:
    """A JSON value for people."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(text_of(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {text_of(item)}" for key, item in value.items())
    return str(value)


def _tables(tables: Any) -> list[tuple[str, list[dict[str, Any]]]]:
    """(title, rows) of what an evaluation stored beside its metrics; what is no table of objects is passed over."""
    return [
        (str(name).replace("_", " "), rows)
        for name, rows in (tables.items() if isinstance(tables, dict) else ())
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    ]


def _grid(title: str, rows: list[dict[str, Any]]) -> Grid:
    columns, cells = _cells(rows)
    grid = Grid(title, columns, cells)
    lines = _lines(rows)
    if lines:
        grid.legend = [curve.label for curve in lines] if len(lines) > 1 else []
        grid.chart = line_chart(lines, log=False, x_name=columns[0])
    return grid


def _lines(rows: list[dict[str, Any]]) -> list[Curve]:
    """The last column over the first, a line for each setting of those between (guidance, low, high, score)."""
    if len(rows) < 3 or not all(list(row) == list(rows[0]) for row in rows):
        return []
    keys = list(rows[0])
    if len(keys) < 2 or any(number(value) is None for row in rows for value in row.values()):
        return []
    groups: dict[str, dict[float, float]] = {}
    for row in rows:
        label = ", ".join(f"{key} {row[key]:g}" for key in keys[1:-1])
        groups.setdefault(label, {})[float(row[keys[0]])] = float(row[keys[-1]])
    longest = sorted(groups, key=lambda label: -len(groups[label]))[:MOST_LINES]
    found = []
    for label in longest:
        xs = sorted(groups[label])
        found.append(Curve(label, np.array(xs), np.array([groups[label][x] for x in xs])))
    return found if len(found[0].x) >= 2 else []


def _cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    titles = [GLOSSARY[key][0] if key in GLOSSARY else str(key).replace("_", " ") for key in keys]
    return titles, [[_number(row.get(key, "")) for key in keys] for row in rows]

"""Metrics for people: names, units, which way is better, what real images score, and the protocol behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from unite_fast.records import RunFolder, number

# name -> (title, unit, "higher" or "lower" or "" where neither is better, what it says)
GLOSSARY: dict[str, tuple[str, str, str, str]] = {
    "gfid": ("gFID", "", "lower", "Fréchet distance of generated to real images, Inception features"),
    "fid": ("FID", "", "lower", "Fréchet distance to real images, Inception features"),
    "rfid": ("rFID", "", "lower", "Fréchet distance of reconstructed to original images"),
    "is": ("Inception score", "", "higher", "confident and varied classes"),
    "inception_score": ("Inception score", "", "higher", "confident and varied classes"),
    "kid": ("KID", "", "lower", "kernel distance of generated to real images"),
    "precision": ("precision", "", "higher", "share of generated images that look real"),
    "recall": ("recall", "", "higher", "share of real images that the generator reaches"),
    "psnr": ("PSNR", "dB", "higher", "mean over held-out reconstructions"),
    "psnr_std": ("PSNR, spread", "dB", "", "standard deviation over images"),
    "psnr_worst": ("PSNR, worst image", "dB", "higher", ""),
    "ssim": ("SSIM", "", "higher", "structural similarity of reconstructions"),
    "lpips": ("LPIPS", "", "lower", "perceptual distance of reconstructions"),
    "l1": ("L1", "", "lower", "mean absolute error, pixels in 0 … 1"),
    "class_accuracy": ("class accuracy", "", "higher", "generated images that a classifier of real ones recognises"),
    "class_accuracy_worst": ("class accuracy, worst class", "", "higher", ""),
    "frechet_pca": ("Fréchet distance, PCA", "", "lower", "to the held-out images; the mean image alone scores about 1"),
    "coverage": ("coverage", "", "higher", "share of held-out images with a generated one nearby"),
    "coverage_worst": ("coverage, worst class", "", "higher", ""),
    "density": ("density", "", "", "generated images per neighbourhood of real ones"),
    "spread": ("spread within a class", "", "", "1 as varied as real images, 0 one image a class"),
    "nearest_train_ratio": ("distance to training images", "", "", "over that of held-out images; near 0 memorised"),
    "near_copies": ("near copies", "", "lower", "share closer to a training image than 99 % of held-out ones"),
}
HEADLINE = ("gfid", "fid", "rfid", "is", "class_accuracy", "frechet_pca", "psnr", "coverage", "ssim", "lpips")
# Entries of summary.json that say how the others were measured.
SUMMARY_PROTOCOL = (
    "images_generated", "images_train", "images_held_out", "images_reconstructed", "frechet_components", "neighbours",
    "feature_side", "steps", "training_seconds", "parameters", "made_by",
)  # fmt: skip
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
class Result:
    """One evaluation."""

    name: str
    entries: list[Entry]
    protocol: list[tuple[str, str]]
    tables: list[tuple[str, list[str], list[list[str]]]] = field(default_factory=list)

    @property
    def compared(self) -> bool:
        """Whether any row says what real images score."""
        return any(entry.real for entry in self.entries)


def result_tables(run: RunFolder) -> list[Result]:
    """summary.json and every stored evaluation."""
    results = []
    if run.summary:
        metrics = {key: value for key, value in run.summary.items() if key not in SUMMARY_PROTOCOL}
        protocol = {key: run.summary[key] for key in SUMMARY_PROTOCOL if key in run.summary}
        results.append(Result("at the end of training", _entries(metrics), _flat(protocol)))
    for name, content in run.evaluations.items():
        tables = [(title, *_table(rows)) for title, rows in _tables(content.get("tables"))]
        results.append(Result(name, _entries(content["metrics"]), _flat(content["protocol"]), tables))
    return results


def headline(run: RunFolder) -> list[tuple[str, str, str]]:
    """(title, value with unit, which way is better) of the few numbers that come first."""
    metrics: dict[str, Any] = dict(run.summary or {})
    for content in run.evaluations.values():
        metrics |= content["metrics"]
    found = []
    for key in HEADLINE:
        value = number(metrics.get(key))
        if value is not None:
            title, unit, better, _ = GLOSSARY[key]
            found.append((title, f"{value:.4g}" + (f" {unit}" if unit else ""), better))
    return found[:4]


def _entries(metrics: dict[str, Any]) -> list[Entry]:
    entries = []
    for key, value in metrics.items():
        base = next((key.removesuffix(end) for end in REAL if key.endswith(end)), None)
        if base in metrics:
            continue  # stands beside its metric
        title, unit, better, meaning = GLOSSARY.get(key, (key.replace("_", " "), "", "", ""))
        real = next((metrics[key + end] for end in REAL if key + end in metrics), None)
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


def _tables(tables: Any) -> list[tuple[str, list[Any]]]:
    """(title, rows) of what an evaluation stored beside its metrics."""
    if isinstance(tables, list):
        tables = {"table": tables}
    if not isinstance(tables, dict):
        return []
    return [(str(name).replace("_", " "), rows) for name, rows in tables.items() if isinstance(rows, list) and rows]


def _table(rows: list[Any]) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells; rows are objects, or lists of values."""
    if all(isinstance(row, dict) for row in rows):
        keys = list(dict.fromkeys(key for row in rows for key in row))
        titles = [GLOSSARY[key][0] if key in GLOSSARY else str(key).replace("_", " ") for key in keys]
        return titles, [[_number(row.get(key, "")) for key in keys] for row in rows]
    return [], [[_number(cell) for cell in row] if isinstance(row, list) else [_number(row)] for row in rows]

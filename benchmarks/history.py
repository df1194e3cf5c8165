"""The picture of all records: how many times faster ours was than its rivals, over time.

    python benchmarks/history.py      # writes benchmarks/records/history.png
"""

from __future__ import annotations

import datetime
import os
from collections import defaultdict
from pathlib import Path

import gate
import matplotlib

matplotlib.use("Agg")
import matplotlib.dates as dates
import matplotlib.pyplot as plt
from measure import RECORDS

GOAL = {"cpu": ("step quickstart", 1 / 0.8), "gpu": ("step", 1.3)}  # of the project: ratios the step should reach


def series(records: list[dict]) -> dict[str, dict[str, list[tuple[datetime.datetime, float]]]]:
    """Device class -> key of a ratio -> (when, ratio) in order of time."""
    found: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda record: record["date"]):
        when = datetime.datetime.fromisoformat(record["date"])
        for name, ratio in gate.measured(record["results"]).items():
            found[record["device_class"]][name].append((when, ratio.value))
    return found


def draw(folder: Path = RECORDS) -> Path:
    """Write history.png from the records of a folder: a row a class of device, steps in bold, parts behind them."""
    records = [gate.read_record(path) for path in sorted(folder.glob("*.json"))]
    classes = series(records)
    figure, axes = plt.subplots(len(classes), 1, figsize=(11, 4.2 * len(classes)), squeeze=False, layout="constrained")
    for axis, (device_class, lines) in zip(axes.flat, sorted(classes.items()), strict=True):
        steps = [name for name in lines if name.startswith("step ")]
        for name in sorted(lines, key=lambda name: name in steps):
            whens, ratios = zip(*lines[name], strict=True)
            if name in steps:
                axis.plot(whens, ratios, marker="o", markersize=4, linewidth=2.2, label=name, zorder=3)
            elif " of " in name:
                axis.plot(whens, ratios, marker=".", markersize=3, linewidth=0.8, color="0.75", zorder=1)
        axis.plot([], [], color="0.75", linewidth=0.8, marker=".", label="parts of a step")
        prefix, goal = GOAL["cpu" if device_class.startswith("cpu") else "gpu"]
        axis.axhline(goal, color="tab:green", linestyle="--", linewidth=1, label=f"goal of {prefix}: {goal:g}")
        axis.axhline(1, color="0.4", linewidth=0.8)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(plt.FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(plt.FormatStrFormatter("%g"))
        axis.set_ylabel("times faster than the rival")
        axis.set_title(device_class)
        axis.xaxis.set_major_formatter(dates.ConciseDateFormatter(axis.xaxis.get_major_locator()))
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path = folder / "history.png"
    partial = path.with_suffix(".partial")
    figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
    os.replace(partial, path)
    return path


if __name__ == "__main__":
    print(draw())

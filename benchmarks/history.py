"""The picture of all records: how many times faster ours was than its rivals, over time.

    python benchmarks/history.py      # writes benchmarks/records/history.png
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from pathlib import Path

import gate
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from unite_fast.errors import UserError

GOAL = {"cpu": ("step quickstart", 1 / 0.8), "gpu": ("step", 1.3)}  # of the project: ratios the step should reach


def draw(folder: Path = gate.RECORDS) -> Path:
    """Write history.png from the records of a folder: a row a class of device, steps in bold, parts behind them.

    Raises:
        UserError: one of them is no record.
    """
    records = sorted((gate.read_record(path) for path in folder.glob("*.json")), key=lambda record: record["date"])
    classes: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        classes[record["device_class"]].append(record)
    figure, axes = plt.subplots(len(classes), 1, figsize=(11, 4.6 * len(classes)), squeeze=False, layout="constrained")
    for axis, (device_class, runs) in zip(axes.flat, sorted(classes.items()), strict=True):
        _draw_class(axis, device_class, runs)
    path = folder / "history.png"
    partial = path.with_suffix(".partial")
    figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
    os.replace(partial, path)
    return path


def _draw_class(axis: plt.Axes, device_class: str, runs: list[dict]) -> None:
    measured = [gate.measured(run["results"]) for run in runs]
    names = list(dict.fromkeys(name for found in measured for name in found))
    for name in names:
        here = [(number, found[name].value) for number, found in enumerate(measured) if name in found]
        numbers, ratios = zip(*here, strict=True)
        if name.startswith("step "):
            axis.plot(numbers, ratios, marker="o", markersize=5, linewidth=2.2, label=name, zorder=3)
        elif " of " in name:
            axis.plot(numbers, ratios, marker=".", markersize=4, linewidth=0.8, color="0.75", zorder=1)
    axis.plot([], [], color="0.75", linewidth=0.8, marker=".", label="parts of a step")
    prefix, goal = GOAL["cpu" if device_class.startswith("cpu") else "gpu"]
    axis.axhline(goal, color="tab:green", linestyle="--", linewidth=1, label=f"goal of {prefix}: {goal:g}")
    axis.axhline(1, color="0.4", linewidth=0.8)
    axis.set_ylabel("times faster than the rival")
    axis.set_title(f"{device_class}: {runs[-1].get('device', '')}")
    labels = [f"{run['date'][5:16].replace('T', ' ')}\n{(run.get('commit') or '')[:7]}" for run in runs]
    shown = range(0, len(runs), -(-len(runs) // 10))
    axis.set_xticks([*shown], [labels[number] for number in shown], fontsize=7, rotation=30, ha="right")
    axis.set_xlim(-0.5, len(runs) - 0.5)
    axis.grid(axis="y", color="0.92")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


if __name__ == "__main__":
    try:
        print(draw())
    except UserError as error:
        sys.exit(f"history.py: {error}")

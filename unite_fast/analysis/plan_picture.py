"""The picture of a plan: memory by ZeRO stage, and how the run scales."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from unite_fast.analysis.planning import BROKEN
from unite_fast.pictures import COLOURS, save_figure

if TYPE_CHECKING:
    from unite_fast.analysis.planning import Plan

MEMORY = ("weights", "gradients", "optimizer", "ema", "frozen", "casts", "activations")
PALETTE = ("#1f2937", "#2563eb", "#7c3aed", "#db2777", "#9ca3af", "#84cc16", "#bfdbfe")
REST = "#f59e0b"
# Of a step, from the axis up: what of its seconds, its label, its colour.
TIMES = (("compute", "compute", "#bfdbfe"), ("launching", "wait for the host", "#9ca3af"),
         ("gradients", "reduce gradients", "#2563eb"), ("exchange", "exchange for Muon", "#db2777"),
         ("weights", "gather weights", "#f59e0b"), ("update", "update", "#1f2937"))  # fmt: skip


def plan_picture(
    plans: list[Plan],
    scaled: list[Plan],
    simulated: list[float],
    broken: tuple[Plan, str] | None,
    capacity: int,
    title: str,
    path: str | Path,
    *,
    unit: str,
) -> None:
    """Draw memory of a GPU by ZeRO stage, where a step's time goes by number of GPUs, and samples/s against them.

    Args:
        plans: one for each ZeRO stage. scaled: one for each number of GPUs, may be empty;
            what does not fit is left out.
        simulated: seconds of a step of each of `scaled`.
        broken: where scaling breaks, if it does.
        capacity: bytes of a GPU.
        unit: what a batch counts, in the plural.

    Raises:
        UserError: a path that cannot be written.
    """
    from matplotlib.figure import Figure

    simulated = [seconds for p, seconds in zip(scaled, simulated, strict=True) if p.fits]
    scaled = [p for p in scaled if p.fits]
    panels = 3 if scaled else 1
    figure = Figure(figsize=(5 * panels, 3.9), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color="#222222")
    _memory(figure.add_subplot(1, panels, 1), plans, capacity, unit)
    if scaled:
        _time(figure.add_subplot(1, panels, 2), scaled)
        _throughput(figure.add_subplot(1, panels, 3), scaled, simulated, broken, unit)
    save_figure(figure, path)


def _memory(axes: Any, plans: list[Plan], capacity: int, unit: str) -> None:
    names = [f"ZeRO {p.stage}\n{p.micro_batch} {unit}" for p in plans]
    bottom = [0.0] * len(plans)
    for key, colour in zip(MEMORY, PALETTE, strict=True):
        late = [p.memory.later if key == "gradients" else 0 for p in plans]
        heights = [(getattr(p.memory, key) - missing) / 2**30 for p, missing in zip(plans, late, strict=True)]
        if max(heights) > 0:
            axes.bar(names, heights, bottom=bottom, color=colour, label=key if key != "ema" else "EMA", width=0.6)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    # Where not a pass but the reduction of gradients or the update needs the most.
    rest = [max(0.0, p.memory.peak / 2**30 - low) for p, low in zip(plans, bottom, strict=True)]
    if max(rest) > 0.005 * max(bottom):  # else no line is thick enough
        axes.bar(names, rest, bottom=bottom, color=REST, label="behind the passes", width=0.6)
    bottom = [low + height for low, height in zip(bottom, rest, strict=True)]
    title, room = "Memory of a GPU, GiB, and its micro-batch", capacity / 2**30
    if max(bottom) < room / 4:  # beside the whole GPU nothing of the bars could be seen
        title, room = f"Memory of a GPU, GiB of its {room:.0f}", 0.0
    else:
        axes.axhline(room, color="#dc2626", linewidth=1, linestyle="--")
        axes.text(-0.4, room, " the GPU's memory", va="bottom", fontsize=8, color="#dc2626")
    axes.set_ylim(top=max(room, *bottom) * 1.5)
    _style(axes, title)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")


def _time(axes: Any, plans: list[Plan]) -> None:
    names = [str(p.ranks) for p in plans]
    bottom = [0.0] * len(plans)
    for key, label, colour in TIMES:
        heights = [100 * getattr(p.seconds, key) / p.seconds.total for p in plans]
        axes.bar(names, heights, bottom=bottom, color=colour, label=label, width=0.7)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_ylim(0, 140)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlabel("GPUs", fontsize=9, color="#555555")
    _style(axes, "Where a step's time goes, %")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")


def _throughput(
    axes: Any, plans: list[Plan], simulated: list[float], broken: tuple[Plan, str] | None, unit: str
) -> None:
    ranks = [p.ranks for p in plans]
    first = plans[0]
    axes.plot(ranks, [first.samples_per_second * n / first.ranks for n in ranks], color="#9ca3af", linestyle=":",
              label="linear")  # fmt: skip
    axes.plot(ranks, [p.samples_per_second for p in plans], color=COLOURS[1], label="predicted", linewidth=1.6)
    played = [p.global_batch / seconds for p, seconds in zip(plans, simulated, strict=True)]
    axes.plot(ranks, played, color=COLOURS[3], marker="o", linestyle="none", markersize=4, label="simulated")
    if broken:
        axes.axvline(broken[0].ranks, color="#dc2626", linewidth=1, linestyle="--")
        early = broken[0].ranks**2 < ranks[0] * ranks[-1]  # the curve is below, the legend on the left
        axes.text(broken[0].ranks, 0.72 if early else 0.02, f"below {BROKEN:.0%} per GPU", fontsize=8, color="#dc2626",
                  rotation=90, va="top" if early else "bottom", ha="left" if early else "right",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(ranks, [str(n) for n in ranks])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("GPUs", fontsize=9, color="#555555")
    _style(axes, f"{unit.capitalize()} per second")
    axes.legend(facecolor="white", edgecolor="none", framealpha=1, fontsize=8, loc="upper left")


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color="#222222")
    axes.grid(True, axis="y", color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors="#555555", length=0, which="both")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)

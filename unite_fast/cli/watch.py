"""`unite-fast watch`: a run in the terminal, live, from what its folder says."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from unite_fast.cli.console import out
from unite_fast.cli.report import RunArgument
from unite_fast.engine.monitor import CollapseWatch
from unite_fast.records import RunFolder, duration, losses, number, open_run

BARS = "▁▂▃▄▅▆▇█"
TREND = 40  # characters of a sparkline
RECENT = 20  # records that the pace is measured on
# Keys beside losses and rates, which every modality names by itself: title, whether the trend is logarithmic.
ROWS = {
    "grad_norm": ("gradient norm", True), "lr": ("learning rate", False), "z0_std": ("latent deviation", False),
    "z0_rank": ("latent rank", False), "data_wait": ("waiting for data", False),
}  # fmt: skip
RATE = "_per_second"
# A tenth of the time spent waiting is what a second loader process or another crop mode would give back.
WAIT_WARNING = 0.1
# Records that the speed warning compares with the run's median before them.
SLOW_SHARE = 0.7
STATES = {"finished": "green", "evaluating": "cyan", "training": "cyan", "stopped": "yellow", "starting": "cyan"}


def watch(
    run: RunArgument,
    once: Annotated[bool, typer.Option("--once", help="Print the current state and exit.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between updates.", min=0.2, max=3600)] = 2.0,
) -> None:
    """Watch a run: progress, losses, images per second, waiting for data, time left, warnings.

    Only reads the run's folder, from this machine or another, and changes nothing. Ends when the run ends, or with
    Ctrl-C.

    Example: `unite-fast watch runs/l_h100`
    """
    state = open_run(run)
    console = out()
    if once or not console.is_terminal:
        console.print(view(state, time.time()))
        return
    with Live(view(state, time.time()), console=console, auto_refresh=False) as live:
        while state.state() != "finished":
            time.sleep(every)
            state = open_run(run)
            live.update(view(state, time.time()), refresh=True)


def view(run: RunFolder, now: float) -> RenderableType:
    """Everything on screen.

    Args:
        run: the folder as read just now.
        now: seconds since 1970.
    """
    state = run.state(now)
    head = Table.grid(padding=(0, 2))
    head.add_row(Text(run.name, style="bold"), Text(state, style=STATES[state]), Text(_steps(run), style="default"))
    parts: list[RenderableType] = [head]
    if run.total:
        parts.append(_progress(run, state, now))
    if run.metrics:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
        for key, (title, log) in _rows(run.metrics[-1]).items():
            values = [value for record in run.metrics if (value := number(record.get(key))) is not None]
            if values:
                trend = Text(sparkline(values, TREND, log=log), style="cyan")
                table.add_row(title, Text(_value(key, values[-1]), justify="right"), trend)
        parts += [Text(), table]
    else:
        parts.append(Text("no record yet: the first one comes with the first step", style="dim"))
    notes = warnings(run, state, now)
    if notes:
        parts += [Text(), *(Text(f"! {note}", style="yellow") for note in notes)]
    return Panel(Group(*parts), title=Text(str(run.path)), title_align="left", expand=False, padding=(0, 2))


def _rows(record: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    """Key -> (title, logarithmic) of what is shown of a record, in its order."""
    rows, names = {}, losses(record)
    for key in record:
        if key in names:
            rows[key] = (key if key == "loss" else f"  {names[key]}", True)
        elif key.endswith(RATE):
            rows[key] = (f"{key.removesuffix(RATE)}/s", False)
        elif key in ROWS:
            rows[key] = ROWS[key]
    return rows


def warnings(run: RunFolder, state: str, now: float) -> list[str]:
    """What deserves a look, each in a sentence."""
    notes = list(run.problems)
    if not run.metrics:
        return notes
    last = run.metrics[-1]
    bad = [key for key, value in last.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        notes.append(f"{', '.join(bad)} not finite at step {last['step']}")
    if collapse := CollapseWatch().check(last["step"], number(last.get("z0_std"))):
        notes.append(collapse)
    wait = _recent(run, "data_wait")
    if wait is not None and wait > WAIT_WARNING:
        notes.append(f"{100 * wait:.0f} % of the time goes into waiting for data: raise data.workers or data.prefetch")
    for key in (name for name in last if name.endswith(RATE)):
        speeds = [value for record in run.metrics if (value := number(record.get(key)))]
        if len(speeds) < 3 * RECENT:
            continue
        before, lately = _median(speeds[:-RECENT]), _median(speeds[-RECENT:])
        if lately < SLOW_SHARE * before:
            what = f"{key.removesuffix(RATE)}/s"
            notes.append(f"slower than before: {lately:.0f} {what}, {before:.0f} until {RECENT} records ago")
    silent = duration(now - (number(last.get("time")) or now))
    if state == "stopped":
        notes.append(f"no record for {silent}: the run has ended early; --resume continues it")
    if state == "evaluating":
        what = "the last pictures and metrics are being made; if the process has died, --resume makes them"
        notes.append(f"the last step was taken {silent} ago: {what}")
    return notes


def sparkline(values: Sequence[float], width: int, *, log: bool) -> str:
    """Values as a line of bars, the newest at the right; of more values than characters each bar is a mean."""
    if log and min(values) <= 0:
        # A loss of exactly 0 (the flow loss of the first step) would turn the whole line flat.
        positive = [value for value in values if value > 0]
        if not positive:
            return BARS[0] * min(width, len(values))
        values = [max(value, min(positive)) for value in values]
    points = [math.log(value) for value in values] if log else list(values)
    if len(points) > width:
        edges = [round(k * len(points) / width) for k in range(width + 1)]
        points = [sum(points[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(points), max(points)
    if high - low <= 1e-9 * max(abs(high), abs(low), 1e-300):
        return BARS[3] * len(points)
    return "".join(BARS[min(len(BARS) - 1, int((value - low) / (high - low) * len(BARS)))] for value in points)


def seconds_a_step(run: RunFolder) -> float | None:
    """Wall-clock seconds of a step, from the newest records of one session; None before there are two."""
    since = max((step for entry in run.sessions if (step := number(entry.get("first_step"))) is not None), default=0)
    recent = [record for record in run.metrics[-RECENT:] if record["step"] > since]
    times = [(record["step"], value) for record in recent if (value := number(record.get("time")))]
    if len(times) < 2 or times[-1][0] == times[0][0]:
        return None
    pace = (times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0])
    return pace if pace > 0 else None


def _steps(run: RunFolder) -> str:
    epoch = number(run.metrics[-1].get("epoch")) if run.metrics else None
    total = f" of {run.total:,}" if run.total else ""
    return f"step {run.step:,}{total}" + (f", epoch {epoch:.1f}" if epoch else "")


def _progress(run: RunFolder, state: str, now: float) -> Table:
    line = Table.grid(padding=(0, 2))
    pace = seconds_a_step(run)
    left = ""
    if pace and state == "training":
        # The newest record is a while old: steps have been taken since.
        since = now - (number(run.metrics[-1].get("time")) or now)
        left = f"about {duration(max(0.0, pace * (run.total - run.step) - since))} left"
    line.add_row(
        ProgressBar(total=run.total, completed=min(run.step, run.total), width=TREND),
        Text(f"{100 * run.step / run.total:.0f} %"), Text(left, style="cyan"),
    )  # fmt: skip
    return line


def _recent(run: RunFolder, key: str) -> float | None:
    values = [value for record in run.metrics[-RECENT:] if (value := number(record.get(key))) is not None]
    return _median(values) if values else None


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _value(key: str, value: Any) -> str:
    return f"{100 * value:.1f} %" if key == "data_wait" else f"{value:.4g}"

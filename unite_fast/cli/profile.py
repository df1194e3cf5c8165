"""`unite-fast profile`: where a step's time and memory go on this device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unite_fast.cli.console import out, progress

if TYPE_CHECKING:
    from unite_fast.analysis.profiling import Measured


def profile(
    config: Annotated[Path, typer.Option(help="JSON configuration, see the folder configs/.", metavar="FILE")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override one or more keys.", metavar="KEY=VALUE …")
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            help="Images (molecules) per backward. Default: the configuration's; for auto, what is predicted to fit.",
            min=1,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps to time.", min=1)] = 10,
    trace: Annotated[
        Path, typer.Option(help="Chrome trace of two steps, for ui.perfetto.dev.", metavar="FILE", dir_okay=False)
    ] = Path("profile_trace.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Measure where a training step's time and memory go, and how far each part is from its least possible time.

    First the device's rates (large matrix product, large copy), then each part alone forward and backward, then
    whole steps with the run's data (without them: synthetic images, or molecules of 29 atoms), then a trace.
    Molecules differ in size, so their parts are measured and counted on the run's first micro-batch. Nothing is written
    to the run's folder. For several ranks: `torchrun --nproc-per-node 2 --no-python unite-fast profile …`

    Example: `unite-fast profile --config configs/quickstart.json`
    """
    from unite_fast.config import Config
    from unite_fast.train import prepare_process

    parsed = Config.load(config, overrides or ())
    prepare_process()

    from unite_fast.analysis.profiling import measure
    from unite_fast.engine.world import init_world, leave_world

    world = init_world(parsed)
    try:
        with progress("starting", 3) as bar:

            def say(message: str) -> None:
                bar.update(bar.task_ids[0], description=message, advance=1)

            measured = measure(parsed, world, steps=steps, micro_batch=micro_batch, trace=trace, say=say)
    finally:
        leave_world()
    if not world.is_main:
        return
    if as_json:
        typer.echo(json.dumps(_numbers(measured), indent=2))
        return
    _print(measured, parsed.name, world.device.type)
    out().print(f"trace in {trace}: open it at ui.perfetto.dev", markup=False, soft_wrap=True)


def _numbers(measured: Measured) -> dict:
    return {
        "matmul_operations_per_second": measured.rates.matmul,
        "fp8_operations_per_second": measured.rates.fp8,
        "copy_bytes_per_second": measured.rates.copy,
        "step_seconds": measured.step,
        measured.unit: measured.images,
        f"{measured.unit}_per_second": measured.images / measured.step,
        "mfu": measured.mfu,
        "efficiency": measured.efficiency,
        "waiting_seconds": measured.waiting,
        "communication_seconds": measured.communication,
        "other_seconds": measured.other,
        "launch_seconds": measured.launch,
        "memory_bytes": measured.memory._asdict(),
        "parts": [vars(row) for row in measured.rows],
    }


def _share(of_step: float) -> str:
    """Six characters at most, on a busy machine too.

    There parts alone may take twice a step's time, "other" the less.
    """
    return f"{of_step:.1%}" if abs(of_step) < 0.9995 else f"{of_step:.0%}"


def _print(measured: Measured, name: str, device: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    matmul, copy, fp8 = measured.rates
    table = Table(
        title=f"{name}: a step of {measured.images} {measured.unit} takes {_ms(measured.step)} ms on this {device}\n"
        f"(milliseconds; floor and share of it; counted GFLOP; MiB that a call allocates)",
        title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False,
    )  # fmt: skip
    for column in ("", "calls", "forward", "backward", "share", "floor", "of floor", "GFLOP", "MiB"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in measured.rows:
        table.add_row(
            row.name,
            str(row.calls),
            _ms(row.forward),
            _ms(row.backward) if row.backward else "",
            _share(row.seconds / measured.step),
            _ms(row.floor) if row.floor is not None else "",
            f"{row.floor / row.seconds:.0%}" if row.floor and row.seconds else "",
            _figures(row.operations / 1e9) if row.operations else "",
            _figures(row.memory / 2**20) if row.memory else "",
        )
    for label, seconds in (
        ("communication", measured.communication),
        ("data wait", measured.waiting),
        ("other", measured.other),
    ):
        if seconds is not None:
            table.add_row(label, "", _ms(seconds), "", _share(seconds / measured.step))
    out().print(table)
    held = ", ".join(
        f"{_figures(size / 2**20)} MiB of {name}"
        for name, size in zip(("weights", "gradients", "optimizer state", "averages"), measured.memory, strict=False)
    )
    whose = "this process's, code and libraries included" if device == "cpu" else "the step's"
    lines = (
        f"{measured.images / measured.step:.4g} {measured.unit}/s on this rank, {measured.mfu:.1%} of the measured "
        f"matrix rate (MFU), {measured.efficiency:.1%} of the floor without waiting and communication "
        "(`plan --efficiency`)",
        f"rates measured at the start: {matmul / 1e9:.4g} GFLOP/s in large matrix products, "
        + (f"{fp8 / 1e9:.4g} in FP8 (for floors; MFU is not relative to it), " if fp8 else "")
        + f"{copy / 1e9:.3g} GB/s copying",
        f"memory: {held} (gradients until the last backward reduces them); "
        f"peak {_figures(measured.memory.peak / 2**20)} MiB, {whose}",
        "floor: every operator at the slower of its operations and its bytes, inputs read once and outputs written "
        "once; what stays in a cache beats it",
        "parts run alone on inputs of the step's size; other: draws, data conversion, launching, and what parts cost "
        "more or less together",
    )
    if measured.launch is not None:
        lines += (
            f"a kernel's launch takes the host {measured.launch * 1e6:.1f} µs at most, by steps of one of the "
            f"{measured.unit}, which leave the device little to do (`plan --launch-us`)",
        )
    if measured.waiting is None:
        lines += (f"waiting for data was not measured: there is no data, {measured.unit} are made up",)
    for line in lines:
        out().print(f"· {line}", markup=False, soft_wrap=True)


def _ms(seconds: float) -> str:
    """Milliseconds, to four figures or the microsecond."""
    value = seconds * 1e3
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 1 else f"{value:.3f}"


def _figures(value: float) -> str:
    """Three figures, all of a whole number that has more; hundredths of what is less than one."""
    if value < 1:
        return f"{value:.2f}" if value >= 0.01 else "<0.01"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

"""`unite-fast reference` and `unite-fast compare`: what evaluations need, and what they say beside each other."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from unite_fast.cli.console import Device, DeviceOption, out, warn
from unite_fast.errors import UserError

DIFFERENCES_SHOWN = 4  # a metric; the records have all


class Crop(StrEnum):
    """How images come to the size of the model."""

    adm = "adm"
    none = "none"


def reference(
    images: Annotated[Path, typer.Argument(help="Folder to search for images.", metavar="IMAGES")],
    out_file: Annotated[Path, typer.Option("--out", help="The file to write, ending in .npz.", metavar="FILE")],
    inception: Annotated[
        Path | None, typer.Option(help="Inception-v3 weights in the FID layout.", metavar="FILE")
    ] = None,
    size: Annotated[int, typer.Option(help="Side of the model's images.", min=1)] = 256,
    crop: Annotated[
        Crop, typer.Option(help="adm: the protocol's resize and centre crop; none: images must have that size.")
    ] = Crop.adm,
    batch: Annotated[int, typer.Option(help="Images at a time; halved if memory runs out.", min=1)] = 64,
    device: DeviceOption = Device.auto,
) -> None:
    """Compute the mu/sigma statistics that gfid compares with, from a folder of images (the training set, usually).

    The file records how it was made: images, crop, size, extractor weights. Unreadable images are skipped and counted.
    Several GPUs share the work: `torchrun --nproc-per-node 8 -m unite_fast reference …`.

    Example: `unite-fast reference data/imagenet/train --out imagenet256.npz --inception weights/pt_inception-….pth`
    """
    if out_file.suffix != ".npz":
        raise UserError(f"--out {out_file}: the name must end in .npz")

    from unite_fast.engine.world import join_world, leave_world
    from unite_fast.evaluation.frechet import frechet_caveat
    from unite_fast.evaluation.inception import FEATURES
    from unite_fast.evaluation.reference import folder_statistics, write_reference
    from unite_fast.writable import require_writable

    world = join_world(device.value)
    try:
        if world.is_main:
            if out_file.is_dir():
                raise UserError(f"--out {out_file} is a folder: give the name of a file in it")
            require_writable(out_file.parent, "the statistics", "Give --out a file in a folder that takes some.")
        moments, about = folder_statistics(
            images, inception, image_size=size, crop=crop.value, batch=batch, world=world
        )
        if world.is_main:
            write_reference(moments, out_file, about)
            caveat = frechet_caveat(moments.count, FEATURES)
            if caveat:
                warn(caveat)
            skipped = f", {about['skipped']} unreadable ones skipped" if about["skipped"] else ""
            out().print(
                f"mu and sigma of {moments.count} images of {size}×{size} (crop {crop.value}){skipped} in {out_file}",
                markup=False, soft_wrap=True,
            )  # fmt: skip
    finally:
        leave_world()


def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Runs, or evaluation records (RUN/evaluations/NAME.json).", metavar="RUN…")
    ],
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Mark the best value even where protocols differ, with a note.")
    ] = False,
) -> None:
    """Tabulate the evaluations of several runs, with the best value of a metric marked where the protocols agree.

    Numbers of different protocols (images, guidance, solver, seed, reference, held-out images, …) are shown beside
    each other but not ranked; the differences are listed below the table.

    Example: `unite-fast compare runs/quickstart runs/other`
    """
    from rich.table import Table
    from rich.text import Text

    from unite_fast.evaluation.protocol import METRICS, READINGS
    from unite_fast.evaluation.record import best_of, ranking, read_records

    rows = [row for run in runs for row in read_records(run)]
    shown = [name for name in READINGS if any(name in row.metrics for row in rows)]
    if not shown:
        raise UserError(f"the records of {', '.join(map(str, runs))} hold none of {', '.join(METRICS)}")
    notes: dict[str, list[str]] = {}  # what is said of metrics -> which
    names: list[str] = []
    columns: list[list[Text]] = [[] for _ in rows]
    for name in shown:
        best, reasons = ranking(rows, name)
        if reasons:
            best = best_of(rows, name) if anyway else []
            verdict = "ranked all the same, --anyway" if anyway else "not ranked"
            more = f"; and {len(reasons) - DIFFERENCES_SHOWN} more" if len(reasons) > DIFFERENCES_SHOWN else ""
            note = f"{verdict}, protocols differ in {'; '.join(reasons[:DIFFERENCES_SHOWN])}{more}"
            notes.setdefault(note, []).append(name)
        for index, (row, column) in enumerate(zip(rows, columns, strict=True)):
            value = row.metrics.get(name)
            text = "" if value is None else f"{value:.4g}{' *' if index in best else ''}"
            column.append(Text(text, style="bold green" if index in best else ""))
        arrow = "↓" if READINGS[name].better == "lower" else "↑"
        names.append(f"{name} {arrow}{' ≠' if reasons else ''}")
    for number, row in enumerate(rows, start=1):
        out().print(f"[{number}] {row.name}", markup=False, soft_wrap=True)
    # Metrics downwards and evaluations across, by number: names are long, and one metric's values stand beside another.
    # As many evaluations a table as fit in the terminal, which would cut their values.
    room = out().width - max(map(len, ["metric", *names])) - len("│  │")
    widths = [max(len(f"[{i + 1}]"), *map(len, column)) + len("  │") for i, column in enumerate(columns)]
    for group in _groups(widths, room):
        table = Table()
        table.add_column("metric", no_wrap=True)
        for index in group:
            table.add_column(f"[{index + 1}]", justify="right", no_wrap=True)
        for name, *cells in zip(names, *(columns[index] for index in group), strict=True):
            table.add_row(name, *cells)
        out().print(table)
    for note, about in notes.items():
        out().print(f"≠ {', '.join(about)}: {note}", markup=False, soft_wrap=True)


def _groups(widths: list[int], room: int) -> list[list[int]]:
    """Indices in order, as many a group as their widths fit in the room, and one at least."""
    groups: list[list[int]] = []
    left = 0
    for index, width in enumerate(widths):
        if not groups or width > left:
            groups.append([])
            left = room
        groups[-1].append(index)
        left -= width
    return groups

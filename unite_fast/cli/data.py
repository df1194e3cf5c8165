"""`unite-fast data prepare` and `unite-fast data check`: data sets before training."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unite_fast.cli.console import out, plain, progress
from unite_fast.errors import UserError
from unite_fast.workers import available_cores

if TYPE_CHECKING:
    from unite_fast.data.check import Report
    from unite_fast.data.source import ImageSource

NAMED = 20  # files that a command names itself; a check's record holds all
# The names that unite_fast.data.molecules reads, which images are told from without importing RDKit.
MOLECULES = re.compile(r".*\.(xyz|extxyz|sdf|mol|npz|parquet)(\.tar)?(\.(gz|bz2|xz))?", re.IGNORECASE)

app = typer.Typer(no_args_is_help=True, help="Prepare and check data sets.", rich_markup_mode="markdown")

JobsOption = Annotated[
    int | None, typer.Option(help="Number of processes; by default one per core. More help with slow storage.", min=1)
]


@app.command()
def prepare(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Class folders, a tar of class tars, or a folder of class tars.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Output folder.")],
    size: Annotated[
        int | None,
        typer.Option(help="Crop to this size now, as training would; by default the original files are packed.", min=1),
    ] = None,
    shard_images: Annotated[
        int | None,
        typer.Option(help="Maximum number of images per shard; by default 8,192, about 0.9 GB of ImageNet.", min=1),
    ] = None,
    devkit: Annotated[
        Path | None,
        typer.Option(
            help="ILSVRC2012_devkit_t12.tar.gz, which lists the classes of the validation archive.", metavar="FILE"
        ),
    ] = None,
    jobs: JobsOption = None,
) -> None:
    """Pack images into shards: a few large files with an index, for network file systems.

    Training reads this folder instead of class folders, in the same order: set data.path or data.val_path to it.
    Shards are WebDataset tar files. After an interruption, the same command continues where it stopped.
    Images on the skip list of `unite-fast data check` are left out.

    Example: `unite-fast data prepare data/imagenet/train /lustre/imagenet/train`
    """
    from rich.filesize import decimal

    from unite_fast.data.prepare import SHARD_IMAGES
    from unite_fast.data.prepare import prepare as pack

    if _of_molecules(source):
        raise UserError(f"{source} holds molecules, which need no preparation: set data.path to it as it is")
    images = _open(source, devkit)
    with progress("packing", len(images)) as bar:
        done = pack(
            images, destination, size=size, shard_images=shard_images or SHARD_IMAGES, jobs=jobs or available_cores(),
            advance=lambda count: bar.update(bar.task_ids[0], completed=count),
        )  # fmt: skip
    shards = f"{done.shards} shard{'s' * (done.shards > 1)} of {decimal(done.bytes)}"
    before = f", {done.found} of them from before" if done.found else ""
    out().print(
        f"{done.images} images of {len(images.classes)} classes in {shards}{before} in {destination}",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    if done.unreadable:
        out().print(
            f"{len(done.unreadable)} could not be read and have their place, but no content: training will skip them. "
            f"To pack them after all, mend them, remove {destination} and prepare it again",
            markup=False, soft_wrap=True,
        )  # fmt: skip
        _name(done.unreadable)


@app.command()
def check(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Class folders, prepared shards, or molecules.")],
    size: Annotated[int, typer.Option(help="Image size of future runs.", min=1)] = 256,
    jobs: JobsOption = None,
) -> None:
    """Check every image, and list those that training must leave out.

    The list is written to unite_fast_check.json in the folder itself; every run on that folder then leaves the
    unusable images out from the start. Images that are converted (CMYK, 16-bit, …) or whose extension or class is in
    doubt are reported and kept. For shards all checksums are verified. The exit code is 1 if something is unusable.

    Of molecules, a file or a folder of them, nothing is written: a run leaves out by itself what is counted here.

    Example: `unite-fast data check data/imagenet/train`
    """
    if _of_molecules(path):
        _check_molecules(path)
        return
    from unite_fast.data.check import check as examine
    from unite_fast.data.check import require_place
    from unite_fast.data.source import open_source

    images = open_source(path, None, skip=False)
    require_place(path)
    with progress("checking", len(images)) as bar:
        report = examine(
            images, size=size, jobs=jobs or available_cores(),
            advance=lambda count: bar.update(bar.task_ids[0], completed=count),
        )  # fmt: skip
    _show(report)
    if report.skip:
        out().print("unusable:")
        _name(report.skip)
    record = report.save()  # last: a full disk must not take what hours of reading have found
    out().print(
        f"{len(report.skip)} of {report.images} images are unusable and left out of training; all findings are in "
        f"{record}",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    if not report.whole:
        raise typer.Exit(1)


def _of_molecules(path: Path) -> bool:
    """Whether a file, or a folder without sub-folders, is named as molecules are."""
    if not path.is_dir():
        return MOLECULES.fullmatch(path.name) is not None
    try:
        entries = list(path.iterdir())
    except OSError:  # what opens it says why
        return False
    return not any(entry.is_dir() for entry in entries) and any(MOLECULES.fullmatch(entry.name) for entry in entries)


def _check_molecules(path: Path) -> None:
    """Say how many molecules a run would use; reading them warns of the others and of what looks like a mistake."""
    import numpy as np

    from unite_fast.molecules.commands import read

    molecules = read([path])
    counts, gaps = molecules.counts, np.array([]) if molecules.gap is None else molecules.gap[~np.isnan(molecules.gap)]
    gap = f"; gap of {len(gaps)}: {gaps.min():.4g} to {gaps.max():.4g} eV" if len(gaps) else ""
    out().print(
        f"{len(molecules)} molecules of {path} can be used: {counts.min()} to {counts.max()} atoms, "
        f"{counts.mean():.1f} in the mean{gap}",
        markup=False, soft_wrap=True,
    )  # fmt: skip


def _open(path: Path, devkit: Path | None) -> ImageSource:
    from unite_fast.data.archives import is_archive, open_archives
    from unite_fast.data.source import open_source

    if is_archive(path):
        with progress("listing archives", 1) as bar:
            return open_archives(
                path, devkit, lambda done, total: bar.update(bar.task_ids[0], completed=done, total=total)
            )
    if devkit is not None:
        raise UserError(f"--devkit belongs to the validation archive, and {path} is a folder")
    return open_source(path, None)


def _show(report: Report) -> None:
    """A table of what was found, kinds of findings with their numbers and an example."""
    from rich.table import Table

    table = Table(title=plain(f"{report.images} images of {report.root}"), title_justify="left")
    for column in ("", "finding", "images", "for example"):
        table.add_column(column, overflow="fold", justify="right" if column == "images" else "left")
    for verdict, found in (
        ("unusable", [(name, reason) for name, reason in report.skip.items()]),
        ("converted", _flat(report.converted)),
        ("suspicious", _flat(report.mislabelled)),
        ("damaged shard", list(report.shards.items())),
    ):
        kinds: dict[str, list[str]] = defaultdict(list)
        for name, text in found:
            kinds[text if verdict == "converted" else _kind(text)].append(name)
        for kind, names in sorted(kinds.items(), key=lambda item: -len(item[1])):
            table.add_row(verdict, plain(kind), str(len(names)), plain(names[0]))
    if table.row_count:
        out().print(table)


def _kind(text: str) -> str:
    """A finding without what is particular to one file."""
    return re.sub(r"\d+(?! bits)", "…", re.sub(r"^same bytes as .*", "same bytes in another class", text))


def _flat(found: Mapping[str, Iterable[str]]) -> list[tuple[str, str]]:
    return [(name, text) for name, texts in found.items() for text in texts]


def _name(found: Mapping[str, str]) -> None:
    for name, reason in list(found.items())[:NAMED]:
        out().print(plain(f"  {name}: {reason}"), soft_wrap=True)
    if len(found) > NAMED:
        out().print(f"  … and {len(found) - NAMED} more")

"""`unite-fast analyze`: the paper's analyses of a trained model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unite_fast.cli.console import (
    BatchOption,
    Device,
    DeviceOption,
    SeedOption,
    Which,
    bar,
    explain_memory,
    out,
    pick_device,
    plain,
    warn,
)
from unite_fast.cli.evaluate import run_config
from unite_fast.cli.sample import run_folder
from unite_fast.errors import UserError
from unite_fast.writable import require_writable

if TYPE_CHECKING:
    from unite_fast.analysis.activations import Images
    from unite_fast.analysis.study import Study
    from unite_fast.config import Config
    from unite_fast.importing import Trained

FOLDER, RECORD = "analysis", "analysis.json"
PICTURES = (
    "alignment.png", "alignment_matrix.png", "cosine.png", "entropy.png", "trajectories.png", "probing.png",
)  # fmt: skip
TIMES = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1"


def analyze(
    run: Annotated[Path, typer.Option(help="A run, one of its checkpoints, or an exported folder.", metavar="DIR")],
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Output folder; an earlier analysis in it is replaced. Default: analysis/ in the run.",
            metavar="DIR",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images to analyze. Default: the run's held-out images, or else its training images.",
            metavar="DIR",
        ),
    ] = None,
    count: Annotated[
        int, typer.Option(help="Number of these images, evenly spread; memory grows with its square.", min=11, max=2048)
    ] = 512,
    train: Annotated[
        Path | None,
        typer.Option(
            help="Class folders that probes are fitted on. Default: the run's training images.", metavar="DIR"
        ),
    ] = None,
    train_count: Annotated[int, typer.Option(help="How many of them, evenly spread.", min=2)] = 2048,
    times: Annotated[
        str, typer.Option(help="Increasing times to noise latents at, from 0 (noise) to 1 (clean).", metavar="T,T,…")
    ] = TIMES,
    weights: Annotated[
        Which, typer.Option(help="ema, or model: weights without averaging, only in checkpoints.")
    ] = Which.ema,
    ema_decay: Annotated[float | None, typer.Option(help="EMA to use: one of the run's optimizer.ema_decays.")] = None,
    seed: SeedOption = 0,
    batch: BatchOption = 64,
    device: DeviceOption = Device.auto,
) -> None:
    """Analyze a trained image model as the paper does: writes RUN/analysis/analysis.json and pictures.

    Similarity of tokenization and denoising block by block (CKA, CKNNA), how near predicted latents come to z0 at each
    t, the entropy of the weights, decoded predictions along the sampler's path, what linear probes read from latents
    and blocks. The record states what each number depends on.

    Example: `unite-fast analyze --run runs/quickstart`
    """
    chosen = _times(times)

    from unite_fast.analysis.study import Options, protocol, study
    from unite_fast.analysis.study_pictures import draw_all
    from unite_fast.engine.world import World
    from unite_fast.evaluation.protocol import environment
    from unite_fast.evaluation.record import about_model
    from unite_fast.importing import open_trained
    from unite_fast.replacing import replacing
    from unite_fast.weights import write_json

    began = time.monotonic()
    trained = open_trained(run, weights=weights.value, ema_decay=ema_decay)
    if trained.config.modality != "images":
        raise UserError(
            f"{run} is a model of {trained.config.modality}, and analyze supports image models only: "
            f"`unite-fast evaluate` measures it"
        )
    folder = out_dir or run_folder(run) / FOLDER
    require_writable(folder, "the analysis", "Give --out a folder that takes files.")
    images, fitted = _selections(trained, run_config(run), data, count, train, train_count)
    where = pick_device(device)
    model = trained.build(where)
    options = Options(chosen, seed, batch)
    with replacing(folder, former=lambda: (folder / name for name in PICTURES), last=RECORD) as aside:
        with explain_memory(batch):
            result = study(trained, model, images, fitted, options, bar)
        draw_all(result, aside)
        made = {
            "model": about_model(trained.state, trained.origin, trained.made_by),
            **protocol(trained, model, images, fitted, options),
            "environment": environment(World(0, 1, 0, where), time.monotonic() - began),
        }
        write_json(result.record() | {"protocol": made}, aside / RECORD)
    for what, note in result.notes.items():
        warn(f"{what}: {note}")
    _show(result, trained, folder)


def _times(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError:
        found = ()
    rising = all(a < b for a, b in zip(found, found[1:], strict=False))
    if not found or not rising or not 0 <= found[0] or not found[-1] <= 1:
        raise UserError(f"--times {text!r} must be increasing numbers between 0 and 1, such as 0.2,0.5,0.8")
    return found


def _selections(
    trained: Trained, config: Config | None, data: Path | None, count: int, train: Path | None, train_count: int
) -> tuple[Images, Images | str]:
    """The images to analyze; those to fit probes to, or why there are none."""
    from unite_fast.analysis.activations import Images
    from unite_fast.config import DataConfig

    of_run = DataConfig(path="") if config is None else config.data
    known = None if config is None else Path(of_run.val_path or of_run.path)
    if data is None and known is None:
        raise UserError(f"{trained.origin} does not name images to analyze it on: give --data DIR")
    place = data or known
    try:
        images = Images.open(place, of_run, trained.config, trained.class_names, count)
    except UserError as error:
        raise error if data is not None else UserError(f"{error}; --data DIR names other images") from None
    if train is None and config is None:
        return images, "no training images are known to fit probes to: give --train DIR"
    fitted_to = train or Path(of_run.path)
    if fitted_to.resolve() == place.resolve():
        return images, f"probes need other images than {place}, which they would be fitted to: give --data or --train"
    try:
        return images, Images.open(fitted_to, of_run, trained.config, trained.class_names, train_count)
    except UserError as error:
        if train is not None:
            raise
        return images, str(error)


def _show(result: Study, trained: Trained, folder: Path) -> None:
    from rich.table import Table

    step = trained.made_by.get("step")
    title = f"{trained.origin}{'' if step is None else f', step {step}'}, {result.count} images"
    table = Table(title=plain(title), title_justify="left")
    columns = {"t": result.options.times}
    for name, label in (("cka", "CKA"), ("cknna", "CKNNA")):
        same = getattr(result.alignment, name).diagonal(axis1=1, axis2=2)
        columns |= {f"{label}, first block": same[:, 0], f"{label}, last block": same[:, -1]}
    columns["cosine of ẑ0 with z0"] = result.cosine.unlabelled
    for column in columns:
        table.add_column(column, justify="right")
    for t, *values in zip(*columns.values(), strict=True):
        table.add_row(f"{t:g}", *(f"{value:.3f}" for value in values))
    out().print(table)
    probing = result.probing
    if probing is not None:
        best = max(range(len(probing.blocks)), key=probing.blocks.__getitem__)
        out().print(
            f"linear probes: latents {probing.latents:.1%}, block {best} {probing.blocks[best]:.1%} (the best), pixels "
            f"{probing.pixels:.1%}, chance {probing.chance:.1%}",
            markup=False,
        )
    out().print(f"numbers and their protocol in {folder / RECORD}, pictures beside it", markup=False, soft_wrap=True)

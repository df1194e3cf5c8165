"""`unite-fast evaluate`: every metric of a trained model, with the protocol that made it."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unite_fast.cli.console import Device, DeviceOption, Which
from unite_fast.cli.evaluating import Search, Session
from unite_fast.cli.sample import Solver, UnnormalisedOption, _interval, _require_finite, run_folder
from unite_fast.errors import UserError

if TYPE_CHECKING:
    from unite_fast.config import Config
    from unite_fast.engine.world import World
    from unite_fast.evaluation.plan import Plan

PATHS = ("data", "train_data", "reference", "inception")  # strings in a plan, as in a configuration
OF_EVERY_MODALITY = ("run", "weights", "ema_decay", "device")  # options that choose the weights and where to compute
SEARCH_COUNT = 5_000  # images a point; the field's sweeps use 5,000 to 10,000


class Precision(StrEnum):
    """Arithmetic of the network; features and metrics are always computed in full."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class LabelSampling(StrEnum):
    """How the classes of generated images are chosen."""

    balanced = "balanced"
    random = "random"


def evaluate(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="A run, one of its checkpoints, or an exported folder.", metavar="RUN")],
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Of gfid, is, kid, precision, recall, rfid, psnr, ssim, lpips, l1, and small (small labelled sets, "
            "without pretrained networks), separated by commas. Default: what the run's configuration measures.",
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            "--count",
            "--samples",
            help="Number of generated images (a multiple of the number of classes) or molecules. Default: the "
            "configuration's, or 50,000.",
            min=1,
        ),
    ] = None,
    label_sampling: Annotated[
        LabelSampling | None,
        typer.Option(
            help="balanced: the same number of images of each class; random: classes drawn uniformly, any --count. "
            "Default: the configuration's, or balanced."
        ),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="mu/sigma file of the training images, for gfid.", metavar="FILE")
    ] = None,
    inception: Annotated[
        Path | None, typer.Option(help="Inception-v3 weights in the FID layout.", metavar="FILE")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of held-out images. Molecules: the whole data set, which is split as in training.",
            metavar="PATH",
        ),
    ] = None,
    data_count: Annotated[
        int | None,
        typer.Option(
            help="Number of held-out images (evenly spread) or molecules. Default: the configuration's, or all.", min=1
        ),
    ] = None,
    train: Annotated[Path | None, typer.Option(help="Folder of training images, for small.", metavar="DIR")] = None,
    vgg: Annotated[Path | None, typer.Option(help="VGG16 weights, for lpips.", metavar="FILE")] = None,
    linear: Annotated[Path | None, typer.Option(help="LPIPS linear layers, for lpips.", metavar="FILE")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale w; 1 turns guidance off.", min=0)] = None,
    interval: Annotated[str | None, typer.Option(help="Times between which guidance acts.", metavar="LOW,HIGH")] = None,
    solver: Annotated[Solver | None, typer.Option(help="euler, heun or dopri5.")] = None,
    steps: Annotated[int | None, typer.Option(help="Time points of the solver.", min=2)] = None,
    unnormalised: UnnormalisedOption = False,
    search: Annotated[
        str | None,
        typer.Option(
            help="guidance, ema, or both: first find the best of these by gfid (without gfid: frechet_pca of small) "
            "on --search-count images, then measure with them."
        ),
    ] = None,
    search_count: Annotated[
        int | None, typer.Option(help=f"Images per point of a search. Default: {SEARCH_COUNT:,}.", min=1)
    ] = None,
    search_values: Annotated[
        str | None, typer.Option(help="Sweep over these values of w instead of the adaptive search.", metavar="W,W,…")
    ] = None,
    weights: Annotated[
        Which, typer.Option(help="ema, or model: weights without averaging, only in checkpoints.")
    ] = Which.ema,
    ema_decay: Annotated[float | None, typer.Option(help="EMA to use: one of the run's optimizer.ema_decays.")] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of noise, shuffles and subsets. Default for molecules: the run's.", min=0, max=2**31 - 1
        ),
    ] = 0,
    batch: Annotated[int | None, typer.Option(help="Images at a time; halved if memory runs out.", min=1)] = None,
    precision: Annotated[
        Precision, typer.Option(help="auto: as trained; without a record bf16 on CUDA, fp32 elsewhere.")
    ] = Precision.auto,
    save_images: Annotated[
        Path | None,
        typer.Option(
            help="Also keep the generated images, as PNG files; those of another evaluation in DIR are deleted.",
            metavar="DIR",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the record. Default: step and protocol.")] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Measure a trained model and write RUN/evaluations/NAME.json: every number and everything it depends on.

    Options that are left out come from the run's configuration. Each image depends only on the seed and its number; a
    killed evaluation continues where it stopped when started again. Several GPUs share the work:
    `torchrun --nproc-per-node 8 -m unite_fast evaluate RUN …`.

    For molecules every metric is measured, beside its value for held-out real molecules; drawings, histograms, 3-D
    views, SDF and XYZ are written to RUN/evaluations/NAME. Their options are --count (or --samples), --data,
    --data-count, --guidance, --interval, --solver, --steps, --weights, --ema-decay, --seed, --batch, --name and
    --device.

    Example: `unite-fast evaluate runs/b_h100 --metrics gfid,is --reference imagenet256.npz --search guidance`
    """
    _require_finite(guidance)
    window = None if interval is None else _interval(interval)
    wanted = None if metrics is None else tuple(dict.fromkeys(word.strip() for word in metrics.split(",")))
    searches = _searches(search)
    strengths = None if search_values is None else _numbers(search_values)
    if name is not None and (name.startswith(".") or Path(name).name != name):
        raise UserError(f"--name {name!r} must be a file name without a folder that does not begin with a dot")
    if strengths and Search.guidance not in searches:
        raise UserError("--search-values needs --search guidance")
    if search_count is not None and not searches:
        raise UserError("--search-count needs --search guidance or --search ema")
    if Search.ema in searches and (ema_decay is not None or weights is Which.model):
        raise UserError("--search ema chooses among the EMAs: leave out --ema-decay and --weights model")
    if set(searches) == {Search.guidance} and guidance is not None:
        raise UserError("--search guidance finds w: leave out --guidance")
    if Search.guidance in searches and unnormalised:
        raise UserError("--unnormalised is the published sampler without guidance: leave out --search guidance")

    from unite_fast.engine.world import join_world, leave_world
    from unite_fast.importing import open_trained
    from unite_fast.modality import modality

    world = join_world(device.value)
    try:
        trained = open_trained(run, weights=weights.value, ema_decay=ema_decay)
        # While a run goes on, ranks may find different checkpoints, and a search over averages another than this.
        run = Path(world.share(trained.origin))
        if trained.origin != str(run):
            trained = open_trained(run, weights=weights.value, ema_decay=ema_decay)
        _require_place(run_folder(run))
        special = modality(trained.config.modality).commands()
        if special is not None:
            special.evaluate(trained, run_folder(run), world, _typed(context, interval=window))
            return
        config = run_config(run)
        plan = _plan(
            config, world, metrics=wanted, count=count, label_sampling=label_sampling and label_sampling.value,
            seed=seed, batch=batch, precision=precision, data=data, data_count=data_count, train_data=train,
            reference=reference, inception=inception, vgg=vgg, linear=linear, save_images=save_images,
        )  # fmt: skip
        chosen = {"guidance": guidance, "interval": window, "solver": solver and solver.value, "steps": steps,
                  "normalise": False if unnormalised else None}  # fmt: skip
        session = Session(run, plan, world, chosen, weights.value, ema_decay)
        session.go(trained, searches, search_count or SEARCH_COUNT, strengths, name)
    finally:
        leave_world()


def _require_place(run: Path) -> None:
    """Refuse a run that takes neither pieces nor records, before anything is computed for them."""
    from unite_fast.evaluation.protocol import FOLDER, WORK
    from unite_fast.writable import require_writable

    for folder in (run / FOLDER, run / FOLDER / WORK):
        require_writable(
            folder, "evaluations", f"Evaluate a copy of the weights: unite-fast export {run} --out DIR, then "
            f"unite-fast evaluate DIR, with the options that the run's config.json answers here",
        )  # fmt: skip


def run_config(path: Path) -> Config | None:
    """The configuration of a run, None for an exported folder."""
    from unite_fast.config import Config

    file = run_folder(path) / "config.json"
    return Config.load(file) if file.is_file() else None


def _typed(context: typer.Context, **parsed: Any) -> dict[str, Any]:
    """The options of the command line alone, by parameter; defaults are not among them. `parsed` replaces texts."""
    return {
        name: parsed.get(name, value.value if isinstance(value, StrEnum | Solver) else value)
        for name, value in context.params.items()
        if context.get_parameter_source(name).name == "COMMANDLINE" and name not in OF_EVERY_MODALITY
    }


def _plan(config: Config | None, world: World, **given: Any) -> Plan:
    """What the command line says, and what the configuration says where it is silent."""
    from unite_fast.evaluation.plan import Plan, plan_of

    metrics = given.pop("metrics")
    base = Plan(metrics or ()) if config is None else plan_of(config, world.device, metrics)
    precision = given.pop("precision")
    if precision is not Precision.auto:
        base = replace(base, precision=precision.value)
    elif config is None and world.device.type == "cuda":
        base = replace(base, precision="bf16")
    files = {key: str(value) for key in ("vgg", "linear") if (value := given.pop(key)) is not None}
    said = {key: str(value) if key in PATHS else value for key, value in given.items() if value is not None}
    return replace(base, lpips=base.lpips.model_copy(update=files), **said)


def _searches(text: str | None) -> list[Search]:
    words = [] if text is None else [word.strip() for word in text.split(",")]
    for word in words:
        if word not in Search.__members__:
            raise UserError(f"--search {text!r}: {word!r} is not one of {', '.join(Search)}")
    return [Search(word) for word in words]


def _numbers(text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or any(not 0 <= value < float("inf") for value in found):
        raise UserError(f"--search-values {text!r} must be non-negative numbers separated by commas, such as 1,1.5,2")
    return found

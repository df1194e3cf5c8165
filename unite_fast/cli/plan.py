"""`unite-fast plan`: what a run will need and take, before it starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unite_fast.cli.console import out, plain
from unite_fast.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from unite_fast.analysis.extent import Population
    from unite_fast.analysis.planning import Plan
    from unite_fast.config import Config

# Lengths of the published runs (UNITE, reported results), in epochs.
PUBLISHED_EPOCHS = {"B": 240, "M": 240, "L": 120, "XL": 120}
STAGES = (0, 1, 2, 3)
TOO_LARGE = "too large"


def plan(
    preset: Annotated[str | None, typer.Option(help="B, M, L or XL with the published recipe.", metavar="NAME")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A configuration instead of a preset, for example for molecules.", metavar="FILE"),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override one or more keys.", metavar="KEY=VALUE")
    ] = None,
    gpus: Annotated[int, typer.Option(help="Total number of GPUs.", min=1)] = 8,
    gpu: Annotated[
        str, typer.Option(help="GPU model; an unknown name lists the known ones.", metavar="NAME")
    ] = "h100-80",
    per_node: Annotated[int, typer.Option(help="GPUs per node.", min=1)] = 8,
    network: Annotated[
        float, typer.Option(help="Network bandwidth per GPU, Gbit/s; 400 is InfiniBand NDR.", min=1)
    ] = 400.0,
    efficiency: Annotated[
        float | None,
        typer.Option(
            help="Least possible compute time over the real one, 0 to 1; `profile` measures it.", min=0.01, max=1
        ),
    ] = None,
    launch_us: Annotated[
        float | None,
        typer.Option(
            help="The host's time per kernel launch, µs; `profile` measures it on one GPU.", min=0.1, max=1000
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--images",
            "--molecules",
            metavar="COUNT",
            min=1,
            help="Samples per epoch. Default: ImageNet's 1,281,167 images; molecules as in the data, or as in QM9.",
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--out", help="Also plot memory and scaling to this PNG.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Predict memory, micro-batch, flow draws per chunk, times, GPU-hours and communication, for each ZeRO stage.

    Based on counted operations, bytes and launches, a device's rates and stated link speeds; assumptions are listed
    below the tables. Then the same run on 8 to 1,024 GPUs, by formula and by simulation, and where scaling breaks and
    why.

    Example: `unite-fast plan --preset L --gpus 64 --gpu h100-80 --out plan.png`
    """
    run = _config(preset, config, overrides or [])
    if picture is not None and picture.suffix.lower() != ".png":
        raise UserError(f"--out {picture}: the name must end in .png")
    from unite_fast.analysis import planning
    from unite_fast.analysis.devices import Network, find_gpu
    from unite_fast.analysis.launches import LAUNCH_SECONDS
    from unite_fast.analysis.simulation import simulate
    from unite_fast.modality import modality_of

    device = find_gpu(gpu)
    links = Network(per_node, device.link, network * 1e9 / 8)
    share = planning.ASSUMED_EFFICIENCY if efficiency is None else efficiency
    launch = LAUNCH_SECONDS if launch_us is None else launch_us * 1e-6
    modality = modality_of(run)
    unit, population = modality.unit, modality.population(run)
    if samples is not None:
        population = replace(population, samples=samples, source=f"{samples:,} {unit} per epoch, as given")
    options = {"efficiency": share, "launch": launch, "population": population}
    plans = [planning.plan(run, device, links, ranks=gpus, stage=stage, **options) for stage in STAGES]
    stage = min(run.train.zero_stage, 2)  # the simulation plays Muon's exchange, which stage 3 has not
    scaled = planning.scaling(run, device, links, stage=stage, **options)
    simulated = [simulate(run, p, device.rates, links, efficiency=share) for p in scaled]
    broken = planning.breaking_point(scaled)
    if picture is not None:
        from unite_fast.analysis.plan_picture import plan_picture

        label = f"{preset or run.name}, S = {run.objective.flow_draws}, {device.name}"
        plan_picture(plans, scaled, simulated, broken, device.memory, label, picture, unit=unit)
    if as_json:
        rows = [_row(p, run, population, unit) for p in plans]
        line = [
            _row(p, run, population, unit) | {"simulated_step_seconds": s}
            for p, s in zip(scaled, simulated, strict=True)
        ]
        why = {"gpus": broken[0].ranks, "why": broken[1]} if broken else None
        numbers = {"gpu": device._asdict(), "population": vars(population)}
        typer.echo(json.dumps(numbers | {"plans": rows, "scaling": line, "breaks": why}, indent=2))
    else:
        title = f"{preset or run.name}, S = {run.objective.flow_draws}, on {gpus} × {device.name}"
        _print_stages(plans, title, run, population, unit)
        if scaled:
            _print_scaling(scaled, simulated, stage, unit)
            _print_break(scaled, broken)
        _print_chunks(plans, scaled)
        _print_host(plans, scaled, run, launch, launch_us is None)
        in_fp8 = planning.fp8_share(run, plans[0].extent)
        _print_assumptions(device, links, share, efficiency is None, population, in_fp8, unit)
        if picture is not None:
            out().print(f"picture in {picture}", markup=False, soft_wrap=True)


def _config(preset: str | None, path: Path | None, overrides: list[str]) -> Config:
    from unite_fast.config import ENCODER_PRESETS, Config
    from unite_fast.overrides import apply_overrides

    if (preset is None) == (path is None):
        raise UserError("give one of --preset (B, M, L, XL with the published recipe) and --config FILE")
    if path is not None:
        return Config.load(path, overrides)
    if preset not in ENCODER_PRESETS:
        raise UserError(f"unknown preset {preset!r}: choose one of {', '.join(ENCODER_PRESETS)}")
    values = {
        "name": preset,
        "model": {"preset": preset, "decoder": {"preset": "B"}},
        "objective": {"flow_draws": 14},
        "train": {"epochs": PUBLISHED_EPOCHS[preset], "global_batch": 1024, "micro_batch": "auto", "zero_stage": 1},
        "data": {"path": "data/imagenet/train"},
    }
    apply_overrides(values, overrides, Config)
    return Config.parse(values, source=f"preset {preset} with --set")


def _row(p: Plan, run: Config, population: Population, unit: str) -> dict:
    return {
        "zero_stage": p.stage, "optimizer": p.optimizer, "gpus": p.ranks, "fits": p.fits,
        "micro_batch": p.micro_batch, "accumulation": p.accumulation, "global_batch": p.global_batch,
        "draws_per_chunk": p.draws_per_chunk,
        "memory_bytes": vars(p.memory) | {"peak": p.memory.peak},
        "step_seconds": vars(p.seconds) | {"launching": p.seconds.launching, "total": p.seconds.total},
        "communication_share": p.seconds.communication / p.seconds.total,
        f"{unit}_per_second": p.samples_per_second, "mfu": p.mfu,
        "epoch_hours": p.epoch_hours(population.samples), "gpu_hours": _gpu_hours(p, run, population),
    }  # fmt: skip


def _gpu_hours(p: Plan, run: Config, population: Population) -> float:
    """Of the whole run; steps are of the plan's own global batch, which differs where the run gives none."""
    epochs = run.train.epochs or run.train.steps * p.global_batch / population.samples
    return p.epoch_hours(population.samples) * epochs * p.ranks


def _table(title: str, columns: tuple[str, ...]) -> Table:
    """Numbers in 80 columns: headers wrap, cells have no space to wrap at."""
    from rich import box
    from rich.table import Table

    table = Table(title=plain(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="right", vertical="bottom")
    return table


def _print_stages(plans: list[Plan], title: str, run: Config, population: Population, unit: str) -> None:
    length = f"{_short(run.train.epochs)} epochs" if run.train.epochs else f"{run.train.steps:,} steps"
    shortest = min(p.epoch_hours(population.samples) for p in plans)
    # The largest unit that leaves a whole tenth of it.
    name, in_an_hour = next(((n, many) for n, many in (("h", 1), ("min", 60)) if shortest * many >= 0.1), ("s", 3600))
    ends = (f"epoch\n{name}", f"GPU-h, {length}")
    table = _table(title, ("ZeRO", "memory\nGiB", "batch", "step\nms", f"{unit}\n/s", "MFU", "comm.", *ends))
    for p in plans:
        table.add_row(
            f"{p.stage}\u00a0{p.optimizer}",
            f"{'' if p.fits else '>'}{_short(p.memory.peak / 2**30)}",
            *(
                (
                    f"{p.micro_batch}×{p.accumulation}×{p.ranks}",
                    _short(p.seconds.total * 1e3),
                    f"{p.samples_per_second:.0f}",
                    f"{p.mfu:.1%}",
                    f"{p.seconds.communication / p.seconds.total:.1%}",
                    _short(p.epoch_hours(population.samples) * in_an_hour),
                    _short(_gpu_hours(p, run, population)),
                )
                if p.fits
                else (TOO_LARGE,)
            ),
        )
    out().print(table)


def _short(value: float) -> str:
    """Three digits, or all of a larger number's; what is less than a hundredth is only called so."""
    if 0 < value < 0.01:
        return "<0.01"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _print_scaling(plans: list[Plan], simulated: list[float], stage: int, unit: str) -> None:
    shares = ("com-\npute", "host", "gradi-\nents", "Muon", "gather", "up-\ndate")
    table = _table(
        f"the same run on more GPUs, ZeRO {stage}",
        ("GPUs", "batch", "step\nms", "simul.\nms", f"{unit}\n/s a\nGPU", *shares),
    )
    for p, seconds in zip(plans, simulated, strict=True):
        if not p.fits:
            table.add_row(str(p.ranks), f"{p.micro_batch}×{p.accumulation}", TOO_LARGE)
            continue
        s = p.seconds
        parts = (s.compute, s.launching, s.gradients, s.exchange, s.weights, s.update)
        table.add_row(
            str(p.ranks),
            f"{p.micro_batch}×{p.accumulation}",
            _short(s.total * 1e3),
            _short(seconds * 1e3),
            f"{p.samples_per_second / p.ranks:.1f}",
            *(f"{value / s.total:.0%}" for value in parts),
        )
    out().print(table)


def _print_break(plans: list[Plan], broken: tuple[Plan, str] | None) -> None:
    from unite_fast.analysis.planning import BROKEN

    fitting = [p.ranks for p in plans if p.fits]
    if not fitting:
        text = "None of these runs fits into a GPU's memory."
    elif broken is None:
        text = f"Up to {fitting[-1]} GPUs each does at least {BROKEN:.0%} of the work it does among {fitting[0]}."
    else:
        text = (
            f"Scaling breaks at {broken[0].ranks} GPUs: each does less than {BROKEN:.0%} of the work it does among "
            f"{fitting[0]}; {broken[1]}."
        )
    out().print(text, markup=False, soft_wrap=True)


def _print_chunks(plans: list[Plan], scaled: list[Plan]) -> None:
    """Flow draws in one forward and backward: a line, since the tables have no column left."""

    def listed(found: list[tuple[str, int]]) -> str:
        chunks = dict.fromkeys(chunk for _, chunk in found)
        return "; ".join(f"{chunk} ({', '.join(name for name, other in found if other == chunk)})" for chunk in chunks)

    text = "flow draws per chunk: " + listed([(f"ZeRO\u00a0{p.stage}", p.draws_per_chunk) for p in plans])
    if scaled:
        text += "; by GPUs: " + listed([(str(p.ranks), p.draws_per_chunk) for p in scaled])
    out().print(f"· {text}", markup=False, soft_wrap=True)


def _print_host(plans: list[Plan], scaled: list[Plan], run: Config, launch: float, assumed: bool) -> None:
    """Launches, and which steps wait for the host: of the ZeRO stages the table does not say it."""
    from unite_fast.analysis.launches import HOST_SECONDS

    counted = [p for p in plans + scaled if p.seconds.host]
    launches = sorted({round(p.seconds.host / launch) for p in counted})
    stages = [f"ZeRO\u00a0{p.stage}" for p in plans if p.seconds.launching > 0]
    gpus = [str(p.ranks) for p in scaled if p.seconds.launching > 0]
    where = [", ".join(stages), f"{', '.join(gpus)} GPUs" if gpus else ""]
    if len(stages + gpus) == len(plans + scaled):
        where = ["all of these steps"]
    none = "no step of that" if run.train.compile else "none of these steps"
    low, high = (f"{seconds * 1e6:g}" for seconds in HOST_SECONDS)
    text = (
        f"{' to '.join(f'{n:,}' for n in dict.fromkeys((launches[0], launches[-1])))} launches per step at "
        f"{launch * 1e6:g} µs each ({f'assumed, {low} to {high}' if assumed else 'given'}; "
        "without those of ZeRO and collectives); "
        f"it limits {' and '.join(filter(None, where)) or none}"
    )
    if run.train.compile:
        text = (
            "under train.compile launches are fewer and not counted; it may be what limits short steps. ZeRO\u00a03 "
            f"refuses that and is planned without: {text}"
        )
    out().print(f"· host: {text}", markup=False, soft_wrap=True)


def _print_assumptions(
    device, links, efficiency: float, assumed: bool, population: Population, in_fp8: float, unit: str
) -> None:
    matmul, copy, fp8 = device.rates
    source = "measured" if device.measured else "the shares of the datasheet's peak that an H200 was measured to reach"
    lines = (
        f"batch: {unit} of a micro-batch × micro-batches × GPUs; comm.: the share of a step that waits for "
        "communication; GPU-h: training steps alone, without start-up, waiting for data, evaluation, samples and "
        "checkpoints",
        f"data: {population.source}",
        f"rates: {matmul / 1e12:.0f} of {device.matmul / 1e12:.0f} TFLOP/s in bf16 and {copy / 1e12:.2f} of "
        f"{device.memory_bandwidth / 1e12:.2f} TB/s ({source})",
        *(
            [
                f"train.fp8: {in_fp8:.0%} of the passes' operations in FP8 at {fp8 / 1e12:.0f} of "
                f"{device.fp8 / 1e12:.0f} TFLOP/s (assumed: the share of the peak that bf16 reaches), casts of "
                "inputs and gradients counted; MFU stays relative to the bf16 peak; ZeRO 3 refuses FP8 and is planned "
                "in bf16"
            ]
            if in_fp8
            else []
        ),
        f"efficiency: {efficiency:g} of the floor that these rates set"
        + (
            " (assumed, this project's goal on an H200: no step has been timed on a GPU yet; "
            "`unite-fast profile` measures yours)"
            if assumed
            else " (given)"
        ),
        f"links, as stated: {links.node_link / 1e9:.0f} GB/s per GPU inside a node of {links.per_node}, "
        f"{links.link * 8 / 1e9:.0f} Gbit/s per GPU between nodes; assumed: {links.share:.0%} of that is reached, "
        f"{links.node_latency * 1e6:g} and {links.latency * 1e6:g} µs per hop",
        "memory: bf16 compute with float32 weights and the fused operators, on the largest micro-batch that a long run "
        "draws; at most 92 % of the device (assumed)",
        "ZeRO 2 does what ZeRO 1 does: gradients are whole until the last backward of a step reduces them; ZeRO 3 "
        "trains with AdamW (Muon needs whole matrices), its time is that with no layer kept between passes and no "
        "gather hidden, its memory that with all layers kept",
    )
    for line in lines:
        out().print(f"· {line}", markup=False, soft_wrap=True)

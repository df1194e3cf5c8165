"""`unite-fast import` and `unite-fast export`: weights from one form into another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unite_fast.cli.console import Which, out, plain, warn
from unite_fast.errors import UserError

if TYPE_CHECKING:
    from unite_fast.importing import Trained


def import_(
    file: Annotated[Path, typer.Argument(help="A published checkpoint: .pt, .pth or .safetensors.", metavar="FILE")],
    out_dir: Annotated[Path | None, typer.Option("--out", help="Output folder for the model.", metavar="DIR")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Create the run of this configuration, ready for train --resume.", metavar="FILE"),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override keys of --config.", metavar="KEY=VALUE …")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads of the encoder. Default: inferred.", min=1)] = None,
    decoder_heads: Annotated[
        int | None,
        typer.Option(help="Attention heads of the decoder. Default: those of the published size of its width.", min=1),
    ] = None,
    context_start: Annotated[
        int, typer.Option(help="Block before which the context tokens are added; 4 in the published models.", min=0)
    ] = 4,
    weights: Annotated[
        Which | None, typer.Option(help="Which weights of the checkpoint. Default: EMA weights if it has them.")
    ] = None,
) -> None:
    """Convert a published checkpoint to a folder that all other commands and unite_fast.load can read.

    Sizes are inferred from the shapes of the weights. The file is read without running code from it: a file that holds
    Python objects besides tensors is refused, with advice. With --config a training checkpoint, including its EMA and
    optimizer states, becomes the run of that configuration, which train --resume continues.

    Example: `unite-fast import unite_b.pt --out models/unite_b`, or
    `unite-fast import unite_b.pt --config configs/b_h100.json --set name=b_on`
    """
    if out_dir is None and config is None:
        raise UserError("nothing to write: give --out DIR to use the model, --config FILE to train on, or both")
    if config is not None:
        _continue(file, config, overrides or [])
    if out_dir is None:
        return
    from unite_fast.importing import read_published

    trained = read_published(
        file,
        heads=heads,
        decoder_heads=decoder_heads,
        context_start=context_start,
        weights=None if weights is None else weights.value,
    )
    trained.save(out_dir)
    _describe(trained, out_dir)
    if trained.config.context_len:
        out().print(
            f"Shapes tell neither the decoder's heads ({trained.config.decoder.heads}; --decoder-heads sets them) nor "
            f"where the context joins (block {context_start}; --context-start sets it).",
            markup=False,
        )


def _continue(file: Path, config: Path, overrides: list[str]) -> None:
    from unite_fast.config import Config

    parsed = Config.load(config, overrides)
    parsed.require_images("training on from a published checkpoint")
    from unite_fast.published_training import import_training

    made = import_training(file, parsed)
    for difference in made.differences:
        warn(difference)
    again = f"--config {config}" + (f" --set {' '.join(overrides)}" if overrides else "")
    out().print(
        f"{file} is step {made.step} of {made.folder}, with EMA and optimizer states; "
        f"continue with: unite-fast train {again} --resume",
        markup=False, soft_wrap=True,
    )  # fmt: skip


def export(
    source: Annotated[
        Path, typer.Argument(help="A run, one of its checkpoints, or an exported folder.", metavar="RUN")
    ],
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Folder for model.safetensors and model.json.", metavar="DIR")
    ] = None,
    weights: Annotated[
        Which,
        typer.Option(help="ema: averaged weights, for use; model: weights without averaging, only in checkpoints."),
    ] = Which.ema,
    ema_decay: Annotated[
        float | None, typer.Option(help="EMA to use: one of the run's optimizer.ema_decays. Default: ema_decay.")
    ] = None,
    published: Annotated[
        Path | None,
        typer.Option(
            help="Write the weights under the published names: a .pt, .pth or .safetensors file.", metavar="FILE"
        ),
    ] = None,
    with_optimizer: Annotated[
        bool,
        typer.Option(
            "--with-optimizer",
            help="Write a whole training checkpoint to --published: both sets of weights and optimizer states.",
        ),
    ] = False,
) -> None:
    """Write a trained model as safetensors and JSON, which unite_fast.load reads, or under the published names.

    For a run the newest weights are used, even while it is still training.

    Example: `unite-fast export runs/l_h100/checkpoints/step_00050000 --out models/l --published l.pt`
    """
    if out_dir is None and published is None:
        raise UserError("nothing to write: give --out DIR, --published FILE, or both")
    if with_optimizer and published is None:
        raise UserError("--with-optimizer needs --published FILE")
    from unite_fast.importing import open_trained, unpublished_settings, write_published

    trained = open_trained(source, weights=weights.value, ema_decay=ema_decay)
    if out_dir is not None:
        trained.save(out_dir)
        _describe(trained, out_dir)
    if published is not None:
        left_out = []
        if with_optimizer:
            from unite_fast.published_training import export_training

            left_out = export_training(source, published)
        else:
            write_published(trained, published)
        sizes = trained.config
        out().print(
            f"published naming in {published}; it does not record the heads ({sizes.heads} and "
            f"{sizes.decoder.heads} in the decoder) and the block where the context joins ({sizes.context_start})"
            + (f"; without {', '.join(left_out)}, which this trainer does not keep" if left_out else ""),
            markup=False, soft_wrap=True,
        )  # fmt: skip
        for key, own, assumed in unpublished_settings(trained):
            warn(f"{published} does not record {key} {own} either: whoever reads it takes {assumed}")


def _describe(trained: Trained, folder: Path) -> None:
    from rich.table import Table

    sizes, decoder = trained.config, trained.config.decoder
    step = trained.made_by.get("step")
    read, latents = sizes.described()
    table = Table(title=plain(f"model in {folder}"), show_header=False, title_justify="left")
    for name, value in (
        ("from", trained.origin),
        ("weights", f"{trained.made_by.get('weights')}{'' if step is None else f', step {step}'}"),
        ("entries", f"{len(trained.state)}, {sum(t.numel() for t in trained.state.values()) / 1e6:.1f} M parameters"),
        ("encoder", f"{sizes.depth} blocks, width {sizes.width}, {sizes.heads} heads"),
        ("decoder", f"{decoder.depth} blocks, width {decoder.width}, {decoder.heads} heads"),
        (sizes.modality, read),
        ("latents", latents),
        ("context", f"{sizes.context_len} tokens before block {sizes.context_start}" if sizes.context_len else "none"),
        ("classes", str(sizes.num_classes)),
    ):
        table.add_row(name, plain(value))
    out().print(table)

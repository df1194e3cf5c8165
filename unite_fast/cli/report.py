"""`unite-fast report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unite_fast.cli.console import Device, DeviceOption, SeedOption, bar, explain_memory, out, pick_device

RunArgument = Annotated[Path, typer.Argument(help="A run's folder, finished or in training.", metavar="RUN")]


def report(
    run: RunArgument,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="The file to write. Default: report.html in the run.", metavar="FILE")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Do not run the model: show only curves, results, configuration, and sheets on disk."
        ),
    ] = False,
    held_out: Annotated[
        int, typer.Option(help="Maximum number of held-out images for latent statistics.", min=2)
    ] = 256,
    seed: SeedOption = 0,
    batch: Annotated[
        int | None, typer.Option(help="Images computed at a time. Default: evaluation.batch of the run.", min=1)
    ] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Write one HTML page about a run: samples, reconstructions, curves, results with their protocol.

    Also the configuration and the environment; for images a denoising trajectory, the training images nearest to
    samples, and latent statistics. The page is one self-contained file. It states what the run does not have yet.

    Example: `unite-fast report runs/quickstart`
    """
    from unite_fast.records import open_run

    found = open_run(run)  # a wrong folder is told before torch is imported
    from unite_fast.report import write_report

    with explain_memory(batch or found.config.get("evaluation", {}).get("batch", 64)):
        path = write_report(
            run, out=out_file, device=str(pick_device(device)), quick=quick, held_out=held_out, seed=seed, batch=batch,
            progress=bar,
        )  # fmt: skip
    out().print(f"report of {run} in {path} ({path.stat().st_size / 1e6:.1f} MB)", markup=False, soft_wrap=True)

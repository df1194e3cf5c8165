"""`report.html`: everything worth knowing about a run on one page that needs nothing else."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from unite_fast.config import Config
from unite_fast.errors import UserError
from unite_fast.records import open_run
from unite_fast.weights import write_text

if TYPE_CHECKING:
    from unite_fast.model.unite import Unite
    from unite_fast.report.probe import Progress

log = logging.getLogger("unite_fast.report")

PAGE = "report.html"


def write_report(
    folder: str | Path,
    *,
    out: str | Path | None = None,
    model: Unite | None = None,
    device: str = "cpu",
    quick: bool = False,
    held_out: int = 256,
    seed: int = 0,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the report of a run, finished or in training.

    What is missing (weights, data, evaluations) and weights that are damaged are named on the page in the place where
    they would stand. Of a run on anything but images the model is not run, and the sections that need it are left out:
    sheets, curves, results, configuration and environment stand.

    Args:
        folder: the run.
        out: the HTML file; report.html in the run by default.
        model: the run's EMA weights where they are in memory already; else they are read.
        device: for weights that are read.
        quick: leave out all that needs the model; sheets that the run has drawn take the place of samples.
        held_out: held-out images that latent statistics are measured on, at most.
        seed: of the noise.
        batch: images a forward pass; the configuration's by default.
        progress: as `probe.probe`.

    Returns:
        The file.

    Raises:
        UserError: no run there, its configuration is damaged, its model cannot be run, or the page cannot be written.
    """
    from unite_fast.report.page import build

    run = open_run(folder)
    result, why = None, None
    if run.config.get("modality", "images") != "images":
        pass  # the page shows the pictures that the run itself drew
    elif quick:
        why = "The model was not run for this report (--quick)."
    else:
        from unite_fast.engine import checkpoint
        from unite_fast.importing import open_trained
        from unite_fast.report.probe import Options, probe, silent

        if checkpoint.latest(run.path) is None and not (run.path / "export").exists():
            why = "The run has saved no checkpoint yet (train.checkpoint_every), so there is no model to show."
        else:
            config = Config.parse(run.config, source=f"configuration of {run.path}")
            options = Options(
                columns=config.evaluation.sheet_columns, held_out=held_out, seed=seed,
                batch=batch or config.evaluation.batch,
            )  # fmt: skip
            try:
                trained = open_trained(run.path)
            except UserError as error:
                why = f"The model cannot be read, so it was not run: {error}."
                log.warning(why)
            else:
                try:
                    result = probe(trained, model or trained.build(device), config, options, progress or silent)
                except ValueError as error:  # the model refuses, such as sizes that a later version does not know
                    raise UserError(f"cannot run the model of {trained.origin}: {error}") from None
    path = Path(out) if out is not None else run.path / PAGE
    write_text(build(run, result, why_no_probe=why, now=time.time()), path)
    return path

"""The files and folders that metrics need beside the model: which are absent, and what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from unite_fast.config import ModelConfig
from unite_fast.errors import UserError
from unite_fast.evaluation.inception import Inception, absent_inception
from unite_fast.evaluation.reference import Reference, absent_reference, read_reference
from unite_fast.objective.perceptual import Lpips, absent_weights

if TYPE_CHECKING:
    from unite_fast.evaluation.plan import Plan

INCEPTION_OF_GENERATED = frozenset({"gfid", "is", "kid", "precision", "recall"})
INCEPTION = INCEPTION_OF_GENERATED | {"rfid"}
PAIRS = frozenset({"rfid", "psnr", "ssim", "lpips", "l1"})  # of originals and their reconstructions
REAL = frozenset({"kid", "precision", "recall", "rfid"})  # of held-out images' features
LPIPS_OPTIONS = "unite-fast evaluate takes --vgg and --linear"
Files = tuple[Inception | None, Reference | None, Lpips | None]  # what a plan's metrics need beside the model


def absent_inputs(plan: Plan) -> list[str]:
    """What to do about each file and folder of the plan's metrics that is not given or not there, a sentence each."""
    return [*_absent_folders(plan), *absent_files(plan)]


def absent_files(plan: Plan) -> list[str]:
    """What to do about each file of the plan's metrics that is not given or not there, a sentence each."""
    wanted = frozenset(plan.metrics)
    inception = absent_inception(plan.inception) if wanted & INCEPTION else None
    reference = absent_reference(plan.reference) if "gfid" in wanted else None
    lpips = absent_weights(plan.lpips) if "lpips" in wanted else []
    return [*filter(None, (inception, reference)), *(f"lpips: {line} ({LPIPS_OPTIONS})" for line in lpips)]


def _absent_folders(plan: Plan) -> list[str]:
    wanted = frozenset(plan.metrics)
    folders = [("held-out", plan.data, "--data, or data.val_path", {"small"} | PAIRS | REAL)]
    folders += [("training", plan.train_data, "--train, or data.path", {"small"})]
    return [
        f"no folder of {what} images at {path}: give where they are ({key})"
        for what, path, key, metrics in folders
        if path is not None and wanted & metrics and not Path(path).exists()
    ]


def check_files(plan: Plan, sizes: ModelConfig) -> Files:
    """Read the weights and statistics that the plan's metrics need.

    Raises:
        UserError: one that is missing, damaged or of something else.
    """
    wanted = frozenset(plan.metrics)
    inception = Inception.open(plan.inception) if wanted & INCEPTION else None
    reference = lpips = None
    if "gfid" in wanted:
        reference = read_reference(plan.reference, image_size=sizes.image_size, inception=inception.sha256)
    if "lpips" in wanted:
        # As the metric is defined, whatever the loss was fed with.
        try:
            lpips = Lpips.from_config(plan.lpips.model_copy(update={"rescale": True, "dropout": False}))
        except UserError as error:
            raise UserError(f"lpips: {error} ({LPIPS_OPTIONS})") from None
    return inception, reference, lpips

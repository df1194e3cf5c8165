"""What an evaluation measures, and whether it can: asked before anything is drawn."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from unite_fast.config import Config, DataConfig, LpipsConfig
from unite_fast.engine.backend import autocast_dtype
from unite_fast.errors import UserError
from unite_fast.evaluation.features import score_splits
from unite_fast.evaluation.files import INCEPTION_OF_GENERATED
from unite_fast.evaluation.frechet import FEWEST_ROWS
from unite_fast.evaluation.generation import labels_of
from unite_fast.evaluation.held_out import SSIM_WINDOW
from unite_fast.evaluation.protocol import METRICS
from unite_fast.evaluation.small_data import FEWEST_GENERATED


@dataclass(frozen=True)
class Plan:
    """What is measured, on what, by which files.

    Attributes:
        metrics: names of `protocol.METRICS`, and "small" for those of `SmallDataJudge`.
        count: generated images; of balanced labels a multiple of the classes.
        label_sampling: see `generation.labels_of`.
        seed: of all noise, random labels, shuffles and subsets.
        batch: images at a time; halved on the way if memory runs out.
        precision: bf16 runs the network under autocast; features and metrics never.
        reference: mu/sigma file, for gfid.
        inception: Inception-v3 weights, for gfid, is, kid, precision, recall and rfid.
        data: folder of held-out images, for what compares with them; under "small" class folders.
        data_count: how many of them, evenly spread over the sorted paths; None takes all.
        train_data: class folders of the training images, for "small".
        data_config: crop and the like of those folders.
        lpips: weights of LPIPS, for lpips.
        save_images: folder for the generated images as PNG files; those of another evaluation there are deleted.
    """

    metrics: tuple[str, ...]
    count: int = 50_000
    label_sampling: Literal["balanced", "random"] = "balanced"
    seed: int = 0
    batch: int = 64
    precision: Literal["fp32", "bf16"] = "fp32"
    reference: str | None = None
    inception: str | None = None
    data: str | None = None
    data_count: int | None = None
    train_data: str | None = None
    data_config: DataConfig = DataConfig(path="")
    lpips: LpipsConfig = LpipsConfig()
    save_images: Path | None = None

    def labels(self, first: int, stop: int, num_classes: int) -> Tensor:
        """Classes of generated images number first … stop − 1: [stop − first] int64."""
        return labels_of(first, stop, num_classes, sampling=self.label_sampling, seed=self.seed)

    @property
    def on_training(self) -> bool:
        """Whether training images stand in for held-out ones."""
        folders = self.data, self.train_data
        return None not in folders and len({Path(folder).resolve() for folder in folders}) == 1


def plan_of(config: Config, device: torch.device, metrics: tuple[str, ...] | None = None) -> Plan:
    """What a run measures of itself, or these metrics in the same way."""
    evaluation, data = config.evaluation, config.data
    if metrics is None:
        small = ("small",) if evaluation.samples_per_class else ()
        ssim = ("ssim",) if config.model.image_size >= SSIM_WINDOW else ()
        metrics = (*evaluation.metrics, *small, "psnr", *ssim, "l1")
    of_small = evaluation.samples_per_class * config.model.num_classes
    return Plan(
        metrics=metrics,
        count=of_small if of_small and "small" in metrics and not INCEPTION_OF_GENERATED.intersection(metrics)
        else evaluation.count,
        label_sampling=evaluation.label_sampling,
        batch=evaluation.batch,
        precision="fp32" if autocast_dtype(config, device) is None else "bf16",
        reference=evaluation.reference,
        inception=evaluation.inception,
        data=data.val_path or data.path,
        data_count=evaluation.reconstructions,
        train_data=data.path,
        data_config=data,
        lpips=config.objective.lpips,
    )  # fmt: skip


def check_metrics(names: tuple[str, ...]) -> None:
    """Raise a UserError for an unknown metric, or two that go by one name."""
    for name in names:
        if name not in METRICS and name != "small":
            raise UserError(f"unknown metric {name!r}; valid: {', '.join(METRICS)}, small")
    if "small" in names and "precision" in names:
        raise UserError("small has a precision of its own: measure it and Inception's precision in two evaluations")


def check_count(
    plan: Plan, count: int, classes: int, metrics: Collection[str], option: str | None = None
) -> None:
    """Raise a UserError where so many generated images do not serve the metrics.

    Args:
        option: which says how many; None for that of the plan's own count.
    """
    if option is None:
        small_alone = "small" in metrics and not INCEPTION_OF_GENERATED.intersection(metrics)
        option = f"--count, evaluation.{'samples_per_class' if small_alone else 'count'}"
    if plan.label_sampling == "balanced" and (count < classes or count % classes):
        below, above = count // classes * classes, -(-count // classes) * classes
        near = f"{below} or {above}" if below else str(above)
        raise UserError(f"{count} images cannot be balanced over {classes} classes: take {near} ({option})")
    if "small" in metrics:
        counts = torch.bincount(plan.labels(0, count, classes), minlength=classes)
        if counts.min() < FEWEST_GENERATED:
            raise UserError(
                f"small-data metrics need at least {FEWEST_GENERATED} generated images per class, and {count} images "
                f"give class {int(counts.argmin())} only {int(counts.min())}: take more ({option})"
            )
    if "is" in metrics:
        score_splits(count)
    if "gfid" in metrics and count < FEWEST_ROWS:
        raise UserError(f"gfid needs at least {FEWEST_ROWS} generated images, got {count} ({option})")

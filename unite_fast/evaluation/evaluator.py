"""One evaluation: numbered images made by all ranks, metrics computed from them, and the protocol of every number.

`unite-fast evaluate` and the training loop call the same `Evaluator`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unite_fast.config import ModelConfig
from unite_fast.data.loader import load_images
from unite_fast.data.reader import FileReader
from unite_fast.data.source import open_images
from unite_fast.engine.world import World
from unite_fast.errors import UserError
from unite_fast.evaluation.features import (
    check_sides,
    inception_score,
    kernel_distance,
    precision_recall,
    score_splits,
)
from unite_fast.evaluation.files import INCEPTION_OF_GENERATED, PAIRS, REAL, Files, absent_inputs, check_files
from unite_fast.evaluation.frechet import FEWEST_ROWS, frechet_caveat, frechet_distance, gaussian_statistics
from unite_fast.evaluation.generation import Pictures, draw, to_bytes
from unite_fast.evaluation.held_out import SSIM_WINDOW, HeldOut
from unite_fast.evaluation.inception import FEATURES
from unite_fast.evaluation.plan import Plan, check_count, check_metrics
from unite_fast.evaluation.protocol import DEFINITIONS, environment, names_hash
from unite_fast.evaluation.reconstruction import require_finite, summarise
from unite_fast.evaluation.small_data import SmallDataJudge
from unite_fast.evaluation.work import Work, digest
from unite_fast.model.unite import Unite

# Raised when pieces of former versions must not be continued, because images or features come out differently.
PIECES = 2


@dataclass(frozen=True)
class Evaluation:
    """Numbers and what made them, as stored in RUN/evaluations."""

    metrics: dict[str, float | int]
    protocol: dict[str, Any]


class Evaluator:
    """Measures models of one size by one plan; every input is checked when it is built, by all ranks together.

    Args:
        plan: what to measure.
        sizes: of the models.
        world: the ranks that share the work; rank 0 computes the metrics.
        classes: names that class folders must have, where they are known.
        files: what `check_files` read for this plan, where it was called before; None reads them.

    Raises:
        UserError: an unknown metric, one whose files are not given, missing or wrong, a count that does not serve the
            metrics.
    """

    def __init__(
        self,
        plan: Plan,
        sizes: ModelConfig,
        world: World,
        classes: Iterable[str] | None = None,
        *,
        files: Files | None = None,
    ):
        self.plan, self.sizes, self.world = plan, sizes, world
        wanted = frozenset(plan.metrics)
        check_metrics(plan.metrics)
        if files is None:
            world.require_none(absent_inputs(plan), "what the metrics need is missing")
            files = check_files(plan, sizes)
        self.inception, self.reference, self.lpips = files
        self._of_generated = wanted & INCEPTION_OF_GENERATED
        self._of_pairs, self._of_real = wanted & PAIRS, wanted & REAL
        if "ssim" in wanted and sizes.image_size < SSIM_WINDOW:
            raise UserError(f"ssim needs images of {SSIM_WINDOW} pixels a side, these have {sizes.image_size}")
        if self._of_generated or "small" in wanted or plan.save_images:
            check_count(plan, plan.count, sizes.num_classes, wanted)
        self.held_out = None
        if self._of_pairs or self._of_real:
            if plan.data is None:
                names = ", ".join(name for name in plan.metrics if name in self._of_pairs | self._of_real)
                raise UserError(f"{names} compare with held-out images: give --data FOLDER (data.val_path)")
            side = sizes.image_size
            images = open_images(plan.data, image_size=side, remark=world.is_main)
            reader = FileReader(images, side, plan.data_config.crop)
            self.held_out = HeldOut(reader, plan.data_count, plan.batch, self.inception, self.lpips)
            _check_held_out(wanted, len(self.held_out.chosen), plan.count)
        self.judge = self._small_judge(classes) if "small" in wanted and world.is_main else None

    def _small_judge(self, classes: Iterable[str] | None) -> SmallDataJudge:
        plan = self.plan
        if plan.train_data is None or plan.data is None:
            raise UserError(
                "small-data metrics are fitted to the training images and compare with held-out ones: give both, "
                "--train FOLDER and --data FOLDER (data.path and data.val_path)"
            )
        options = dict(image_size=self.sizes.image_size, num_classes=self.sizes.num_classes, classes=classes)
        train = load_images(plan.train_data, plan.data_config, **options)
        return SmallDataJudge(*train, *load_images(plan.data, plan.data_config, **options))

    def measure(
        self,
        model: Unite,
        about: dict[str, Any],
        sampling: dict[str, Any],
        work: Work,
        *,
        metrics: tuple[str, ...] | None = None,
        count: int | None = None,
    ) -> Evaluation:
        """Make the images and compute the metrics. Collective; the same result on every rank.

        Args:
            model: on this rank's device, in evaluation mode.
            about: the protocol's `model`, with the `sha256` of its weights.
            sampling: options of `generate` beside noise: guidance, interval, solver, steps, time_shift, normalise.
            work: where pieces are kept until the result is on record.
            metrics: fewer than the plan's, as for a point of a search; no images are saved then.
            count: another number of generated images than the plan's.

        Raises:
            UserError: a model whose images hold NaN, too few images for a metric, no readable held-out image.
        """
        began = time.monotonic()
        wanted = self.plan.metrics if metrics is None else metrics
        count = self.plan.count if count is None else count
        pictures = None
        if metrics is None and self.plan.save_images:
            pictures = Pictures(self.plan.save_images, self._labels)
        with self._on_device(model) as device:
            held_out = self._held_out(model, device, about, work, wanted)
            self._require_readable(held_out, wanted, count)  # before hours of drawing
            generated = self._generated(model, device, about, sampling, work, wanted, count, pictures)
        found: dict[str, float | int] = {}
        sections: dict[str, Any] = {}
        if self.world.is_main:
            warnings: list[str] = []
            found = self._compute(generated, held_out, wanted, count, warnings)
            sections = {
                "model": about,
                **self._sections(sampling, wanted, count, held_out, work),
                "definitions": {name: _definition(name, count) for name in wanted},
                "warnings": warnings,
                "environment": environment(self.world, time.monotonic() - began),
            }
        return Evaluation(*self.world.share((found, sections)))

    @contextmanager
    def _on_device(self, model: Unite):
        """The feature networks occupy the device only while they are used."""
        device = model.device
        networks: list[nn.Module] = [network for network in (self.inception, self.lpips) if network is not None]
        for network in networks:
            network.to(device)
        try:
            yield device
        finally:
            for network in networks:
                network.cpu()

    def _autocast(self, device: torch.device):
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.plan.precision == "bf16")

    def _generated(self, model, device, about, sampling, work, wanted, count, pictures) -> dict[str, Tensor] | None:
        """features [N, 2048], logits [N, 1008], images [N, 3, H, H] uint8: those that the metrics need."""
        plan, keep_images = self.plan, "small" in wanted
        with_features = bool(self._of_generated.intersection(wanted))
        if not (with_features or keep_images or pictures):
            return None

        w = sampling["guidance"]
        too_strong = f"; or guidance {w:g} is too strong, lower it" if w > 1 else ""

        def make(first: int, stop: int) -> dict[str, Tensor]:
            labels = self._labels(first, stop)
            with self._autocast(device):
                images = draw(model, labels, sampling, seed=plan.seed, first=first)
            require_finite(images, "generated images", too_strong)
            pixels = to_bytes(images)
            if pictures:
                pictures.save(pixels, first)
            made = {"labels": labels}
            if with_features:
                made["features"], made["logits"] = self.inception(pixels)
            return made | ({"images": pixels} if keep_images else {})

        key = self._key("generated", about) | {
            "labels": plan.label_sampling, "sampling": sampling, "images": keep_images,
            "inception": self.inception.sha256 if with_features else None,
        }  # fmt: skip
        if pictures is None:
            return work.gather("generating", key, count, plan.batch, make)
        if self.world.is_main:
            pictures.begin(digest(key | {"count": count}))
        return work.gather("generating", key, count, plan.batch, make, kept=pictures.hold)

    def _labels(self, first: int, stop: int) -> Tensor:
        return self.plan.labels(first, stop, self.sizes.num_classes)

    def _held_out(self, model, device, about, work, wanted) -> dict[str, Tensor] | None:
        """See `HeldOut.measure`."""
        real, pairs = self._of_real.intersection(wanted), self._of_pairs.intersection(wanted)
        if not (real or pairs):
            return None
        # Pictures are told apart by their names below the folder, which those of another may share.
        key = self._key("held-out", about if pairs else {}) | {"data": str(Path(self.plan.data).resolve())}
        return self.held_out.measure(
            model, device, work, key, pairs=pairs, with_real=bool(real), seed=self.plan.seed, autocast=self._autocast
        )

    def _require_readable(self, held_out: dict[str, Tensor] | None, wanted: tuple[str, ...], count: int) -> None:
        """Refuse held-out images of which unreadable files leave too few. Collective."""
        readable = self.world.share(None if held_out is None else len(held_out["number"]))
        if readable == 0:
            raise UserError(f"none of the {len(self.held_out.chosen)} images of {self.plan.data} is readable")
        if readable is not None:
            _check_held_out(wanted, readable, count)

    def _key(self, what: str, about: dict[str, Any]) -> dict[str, Any]:
        plan = self.plan
        return {"what": what, "pieces": PIECES, "model": about.get("sha256"), "seed": plan.seed,
                "precision": plan.precision, "batch": plan.batch, "size": self.sizes.image_size}  # fmt: skip

    def _compute(self, generated, held_out, wanted, count, warnings) -> dict[str, float | int]:
        """The metrics, on rank 0."""
        seed, found = self.plan.seed, {}
        if "gfid" in wanted:
            _warn(warnings, "gfid", frechet_caveat(count, FEATURES))
            statistics = gaussian_statistics(generated["features"].numpy())
            found["gfid"] = frechet_distance(*statistics, self.reference.mu, self.reference.sigma)
        if "is" in wanted:
            found |= inception_score(generated["logits"], seed=seed)
        if "kid" in wanted:
            found |= kernel_distance(held_out["real"], generated["features"], seed=seed)
        if "precision" in wanted or "recall" in wanted:
            both = precision_recall(held_out["real"], generated["features"])
            found |= {name: value for name, value in both.items() if name in wanted}
        if "rfid" in wanted:
            _warn(warnings, "rfid", frechet_caveat(len(held_out["real"]), FEATURES))
            sides = [gaussian_statistics(held_out[side].numpy()) for side in ("real", "rebuilt")]
            found["rfid"] = frechet_distance(*sides[0], *sides[1])
        if held_out is not None and (skipped := len(self.held_out.chosen) - len(held_out["number"])):
            _warn(warnings, "held-out images", f"{skipped} of {len(self.held_out.chosen)} cannot be read, left out")
        if held_out is not None and self.plan.on_training:
            names = ", ".join(name for name in wanted if name in self._of_pairs | self._of_real)
            _warn(warnings, names, "on training images: data.val_path (--data) names no held-out ones")
        if held_out is not None and "psnr" in held_out:
            both = summarise(held_out["psnr"], held_out["l1"])
            found |= {name: value for name, value in both.items() if name.split("_")[0] in (*wanted, "images")}
            found |= {name: float(held_out[name].double().mean()) for name in ("ssim", "lpips") if name in held_out}
        if "small" in wanted:
            found |= self.judge.judge(generated["images"], generated["labels"])
        if self.inception is not None and not self.inception.published:
            _warn(warnings, "inception", "these are not the published weights, the numbers compare with no paper")
        return found

    def _sections(self, sampling, wanted, count, held_out, work) -> dict[str, Any]:
        """The protocol's sections that `protocol.METRICS` refers to."""
        plan, classes = self.plan, self.sizes.num_classes
        network = {"seed": plan.seed, "precision": plan.precision}
        sections: dict[str, Any] = {}
        if self._of_generated.intersection(wanted) or "small" in wanted:
            balanced = plan.label_sampling == "balanced"
            settings = {name: value for name, value in sampling.items() if name != "normalise"}
            sections["generation"] = {
                "count": count, "classes": classes,
                **({"per_class": count // classes} if balanced else {"label_sampling": plan.label_sampling}),
                **network, **settings, "interval": list(sampling["interval"]),
                "normalised": sampling.get("normalise", True),
                "pixels": "uint8, rounded", "image_size": self.sizes.image_size,
            }  # fmt: skip
            if sampling["solver"] == "dopri5":  # whose steps adapt to the batch as a whole
                sections["generation"]["batch"] = min(plan.batch, work.patience.limit or plan.batch)
        if held_out is not None:
            used = len(held_out["number"])
            sections["held_out"] = {
                "path": _place(plan.data), "count": used, "skipped": len(self.held_out.chosen) - used,
                **self.held_out.about, **network, "image_size": self.sizes.image_size,
                **({"training_images": True} if plan.on_training else {}),
            }  # fmt: skip
        if self.inception is not None:
            sections["inception"] = {
                "file": Path(plan.inception).name, "sha256": self.inception.sha256,
                "published": self.inception.published,
            }  # fmt: skip
        if "gfid" in wanted:
            sections["reference"] = self.reference.about
        if "lpips" in wanted:
            sections["lpips"] = {"input": "[-1, 1]", **self.lpips.sha256}
        if "small" in wanted:
            sections["small_data"] = {
                "path": _place(plan.train_data), "held_out": _names(plan.data),
                "train": _names(plan.train_data), "crop": plan.data_config.crop,
            }  # fmt: skip
        return sections


def _check_held_out(wanted: Collection[str], real: int, generated: int) -> None:
    """Raise a UserError where so many held-out images, beside so many generated ones, do not serve the metrics."""
    check_sides(wanted, real, generated)
    if "rfid" in wanted and real < FEWEST_ROWS:
        raise UserError(
            f"rfid needs at least {FEWEST_ROWS} held-out images, got {real} (--data, --data-count, "
            f"evaluation.reconstructions)"
        )


def _place(folder: str) -> str:
    """A path can be written in several ways, which would be several protocols."""
    return str(Path(folder).resolve())


def _names(folder: str) -> str:
    """Hash of the names of a folder's images."""
    source = open_images(folder, remark=False)  # it was opened before, to be read
    return names_hash([source.name(index) for index in range(len(source))])


def _definition(name: str, count: int) -> str:
    return DEFINITIONS[name].format(splits=score_splits(count)) if name == "is" else DEFINITIONS[name]


def _warn(warnings: list[str], what: str, text: str | None) -> None:
    if text:
        warnings.append(f"{what}: {text}")

"""What a run leaves for people: pictures on the way, and at the end metrics, sheets, curves and the exported model."""

from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from unite_fast.config import Config
from unite_fast.data.loader import load_images
from unite_fast.engine.engine import Engine
from unite_fast.engine.world import World
from unite_fast.evaluation.reconstruction import reconstruction_metrics
from unite_fast.evaluation.small_data import SmallDataJudge
from unite_fast.flow.sampling import generate
from unite_fast.model.io import save_model
from unite_fast.model.unite import Unite
from unite_fast.pictures import loss_curves, reconstruction_sheet, sample_sheet
from unite_fast.weights import write_json

SHEET_RECONSTRUCTIONS = 24


class Report:
    """Pictures and metrics of one run, made on the main rank while the others wait.

    Everything that can be wrong with the held-out data is said when the run starts. This is the report on images;
    another modality's replaces what is loaded, drawn and measured.

    Attributes:
        shown: metrics of the final table.
        sheets: pictures of the final table, with what they show.
    """

    shown = (
        "psnr", "class_accuracy", "class_accuracy_real", "frechet_pca", "frechet_pca_train", "coverage",
        "coverage_train", "spread", "nearest_train_ratio", "near_copies",
    )  # fmt: skip
    sheets = (
        ("samples.png", "generated images, class by class"),
        ("reconstructions.png", "held-out originals above their reconstructions"),
    )

    def __init__(self, config: Config, folder: Path, world: World, engine: Engine, classes: tuple[str, ...]):
        self.config, self.folder, self.world, self.engine, self.classes = config, folder, world, engine, classes
        self._judge: SmallDataJudge | None = None
        if not world.is_main:
            return
        self._held_out, self._held_out_labels = self._load(config.data.val_path or config.data.path)
        if config.evaluation.samples_per_class:
            train = self._load(config.data.path)
            self._judge = SmallDataJudge(*train, self._held_out, self._held_out_labels)

    def pictures(self, step: int) -> None:
        """Sheets of the EMA weights as they are now, named by the step."""
        with self.engine.weights(ema=True) as model:
            if self.world.is_main:
                self._sheets(model, f"_{step:08d}")
        self.world.barrier()

    def finish(self, steps: int, seconds: float) -> None:
        """Export the EMA weights, draw sheets and curves, measure, write summary.json, say where things are."""
        state = {name: tensor.cpu() for name, tensor in self.engine.ema_state() if self.world.is_main}
        with self.engine.weights(ema=True) as model:
            if self.world.is_main:
                made_by = self._made_by(steps)
                save_model(state, self.config.model, self.folder / "export", made_by=made_by)
                self._sheets(model, "")
                loss_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")
                summary = self._measure(model) | {
                    "steps": steps,
                    "training_seconds": round(seconds, 1),
                    "parameters": sum(p.numel() for p in self.engine.parameters.values()),
                    "made_by": made_by,
                }
                write_json(summary, self.folder / "summary.json")
                self._show(summary)
        self.world.barrier()

    def _load(self, folder: str) -> tuple[Tensor, Tensor]:
        config = self.config
        return load_images(
            folder, config.data, image_size=config.model.image_size, num_classes=config.model.num_classes,
            limit=None if config.evaluation.samples_per_class else config.evaluation.reconstructions,
            classes=self.classes,
        )  # fmt: skip

    def _sheets(self, model: Unite, suffix: str) -> None:
        evaluation = self.config.evaluation
        spread = torch.linspace(0, len(self._held_out) - 1, min(SHEET_RECONSTRUCTIONS, len(self._held_out))).long()
        originals = self._held_out[spread]
        reconstruction_sheet(originals, self._reconstruct(model, originals), self.folder / f"reconstructions{suffix}.png")
        classes = list(range(min(evaluation.sheet_classes, self.config.model.num_classes)))
        labels = torch.tensor(classes).repeat_interleave(evaluation.sheet_columns)
        sample_sheet(
            self._generate(model, labels), classes, self.classes, evaluation.sheet_columns,
            self.folder / f"samples{suffix}.png",
        )  # fmt: skip

    def _measure(self, model: Unite) -> dict[str, Any]:
        limit = self.config.evaluation.reconstructions
        originals = self._held_out[:limit]
        metrics: dict[str, Any] = reconstruction_metrics(originals, self._reconstruct(model, originals))
        if self._judge is not None:
            count = self.config.evaluation.samples_per_class
            labels = torch.arange(self.config.model.num_classes).repeat_interleave(count)
            metrics |= self._judge.judge(self._generate(model, labels), labels)
        return metrics

    def _reconstruct(self, model: Unite, images: Tensor) -> Tensor:
        """Images [N, 3, H, H] uint8 -> reconstructions in [0, 1], register noise from a fixed seed."""
        generator = torch.Generator(self.world.device).manual_seed(self.config.train.seed)
        pieces = []
        for piece in images.split(self.config.evaluation.batch):
            piece = piece.to(self.world.device).float() / 255
            t = torch.full((len(piece),), self.config.objective.tokenize_t_max / 2, device=piece.device)
            noise = model.latent_noise(len(piece), generator=generator)
            pieces.append(model.decode(model.tokenize(piece, noise=noise, t=t)).clamp(0, 1).cpu())
        return torch.cat(pieces)

    def _generate(self, model: Unite, labels: Tensor) -> Tensor:
        """One image a label under the configured sampling, noise from a fixed seed."""
        sampling = self.config.sampling
        generator = torch.Generator(self.world.device).manual_seed(self.config.train.seed + 1)
        pieces = [
            generate(
                model, piece, guidance=sampling.guidance, interval=sampling.interval, solver=sampling.solver,
                steps=sampling.steps, time_shift=self.config.objective.time_shift,
                noise=model.latent_noise(len(piece), generator=generator),
            ).cpu()
            for piece in labels.split(self.config.evaluation.batch)
        ]  # fmt: skip
        return torch.cat(pieces)

    def _made_by(self, steps: int) -> dict[str, Any]:
        return {
            "run": self.config.name,
            "step": steps,
            "weights": "ema",
            "sampling": self.config.sampling.model_dump(mode="json")
            | {"time_shift": self.config.objective.time_shift},
            "class_names": list(self.classes),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }

    def _show(self, summary: dict[str, Any]) -> None:
        table = Table(title=f"results in {self.folder}", show_header=False, title_justify="left")
        for name in self.shown:
            value = summary.get(name)
            if isinstance(value, float) and math.isfinite(value):
                table.add_row(name, f"{value:.4g}")
        for name, what in (
            *self.sheets,
            ("curves.png", "losses and latent statistics"),
            ("summary.json", "every metric with its protocol"),
            ("export", "EMA weights for unite_fast.load"),
        ):
            table.add_row(str(self.folder / name), what)
        Console().print(table)

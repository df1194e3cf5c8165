"""A run's results: pictures during training, and at the end metrics, sheets, curves and the exported model."""

from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from unite_fast.config import Config
from unite_fast.data.loader import load_images
from unite_fast.engine.engine import Engine
from unite_fast.engine.world import World
from unite_fast.errors import UserError
from unite_fast.evaluation.evaluator import Evaluator
from unite_fast.evaluation.files import Files, absent_files, check_files
from unite_fast.evaluation.generation import draw, encode
from unite_fast.evaluation.plan import Plan, plan_of
from unite_fast.evaluation.protocol import FOLDER, WORK
from unite_fast.evaluation.record import about_model, default_name, write_record
from unite_fast.evaluation.work import Work
from unite_fast.model.io import save_model
from unite_fast.model.unite import Unite
from unite_fast.pictures import loss_curves, reconstruction_sheet, sample_sheet
from unite_fast.report import PAGE, write_report
from unite_fast.weights import write_json

SHEET_RECONSTRUCTIONS = 24
ASKED = "evaluation.metrics asks for it, evaluation.metrics=[] trains without"
Due = Literal["pictures", "metrics"]  # what a run may owe after a step that is not its last


def absent_of_evaluation(config: Config, device: torch.device) -> list[str]:
    """One sentence for each file of a run's own metrics that is not given or does not exist: what to do about it."""
    return [f"{line}; {ASKED}" for line in absent_files(plan_of(config, device))]


def files_of_evaluation(config: Config, device: torch.device) -> tuple[Plan, Files]:
    """The metrics of a run on images, and the files that they need, read.

    Raises:
        UserError: a file that is not given, missing, damaged or of something else.
    """
    plan = plan_of(config, device)
    try:
        return plan, check_files(plan, config.model)
    except UserError as error:
        raise UserError(f"{error}; {ASKED}") from None


class Report:
    """Pictures and metrics of one run: pictures on the main rank while the others wait, metrics on all ranks.

    Anything wrong with the held-out data or with the metrics' files is reported when the run starts. This is the report
    on images; another modality replaces what is loaded, drawn and measured.

    Attributes:
        shown: metrics of the final table.
        sheets: pictures of the final table, with what they show.
        remarks: entries of summary.json on its metrics.
    """

    shown = (
        "gfid", "is", "kid", "precision", "recall", "rfid", "lpips", "psnr", "ssim", "class_accuracy",
        "class_accuracy_real", "frechet_pca", "frechet_pca_train", "coverage", "coverage_train", "spread",
        "nearest_train_ratio", "near_copies",
    )  # fmt: skip
    sheets = (
        ("samples.png", "generated images, class by class"),
        ("reconstructions.png", "held-out originals above their reconstructions"),
        (FOLDER, "every metric with its protocol"),
    )

    def __init__(
        self,
        config: Config,
        folder: Path,
        world: World,
        engine: Engine,
        classes: tuple[str, ...],
        data: dict[str, Any],
        files: tuple[Plan, Files] | None = None,
    ):
        self.config, self.folder, self.world, self.engine, self.classes = config, folder, world, engine, classes
        self._data, self._files = data, files
        self.remarks: dict[str, str] = {}
        self._prepare()

    def _prepare(self) -> None:
        """Load what sheets and metrics need."""
        config = self.config
        plan, files = self._files
        self._evaluator = Evaluator(plan, config.model, self.world, self.classes, files=files)
        self._originals = "training image" if plan.on_training else "original"
        if plan.on_training:
            why = "data.val_path names no held-out ones"
            what = f"training images above their reconstructions: {why}"
            self.sheets = tuple((name, what if name == "reconstructions.png" else text) for name, text in self.sheets)
            self.remarks["reconstructed"] = f"training images: {why}"
        if self.world.is_main:
            self._held_out = load_images(
                plan.data, config.data, image_size=config.model.image_size,
                num_classes=config.model.num_classes, limit=SHEET_RECONSTRUCTIONS, classes=self.classes,
            )[0]  # fmt: skip

    def made(self, step: int) -> set[Due]:
        """What an earlier session left of this step, as the main rank sees it. Collective."""
        found = {"pictures": f"samples_{step:08d}.png", "metrics": f"{FOLDER}/step_{step:08d}-*.json"}
        return self.world.share({name for name, files in found.items() if any(self.folder.glob(files))})

    def pictures(self, step: int) -> None:
        """Sheets of the EMA weights as they are now, named by the step."""
        with self.engine.ema_weights() as model:
            if self.world.is_main:
                self._sheets(model, f"_{step:08d}")
        self.world.barrier()

    def measure(self, step: int) -> dict[str, float | int]:
        """Metrics of the EMA weights as they are now, on record as `unite-fast evaluate` leaves them."""
        with self.engine.ema_weights() as model:
            return self._measure(model, step)

    def due(self, step: int, steps_per_epoch: float) -> bool:
        """Whether an epoch that `evaluation.metrics_epochs` counts ended with this step."""
        every = self.config.evaluation.metrics_epochs
        if every is None:
            return False
        length = every * steps_per_epoch
        return int(step / length) > int((step - 1) / length)

    def finish(self, steps: int, seconds: float) -> None:
        """Export the EMA weights, draw sheets and curves, measure, write summary.json, say where things are."""
        state = {name: tensor.cpu() for name, tensor in self.engine.ema_state() if self.world.is_main}
        with self.engine.ema_weights() as model:
            if self.world.is_main:
                made_by = self._made_by(steps)
                save_model(state, self.config.model, self.folder / "export", made_by=made_by)
                self._sheets(model, "")
                loss_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")
            measured = self._measure(model, steps)
            if self.world.is_main:
                summary = measured | self.remarks | {
                    "steps": steps,
                    "training_seconds": round(seconds, 1),
                    "parameters": self.engine.parameter_count,
                    "made_by": made_by,
                }
                write_json(summary, self.folder / "summary.json")
                write_report(self.folder, model=model)
                self._show(summary)
        self.world.barrier()

    def _sheets(self, model: Unite, suffix: str) -> None:
        evaluation = self.config.evaluation
        spread = torch.linspace(0, len(self._held_out) - 1, min(SHEET_RECONSTRUCTIONS, len(self._held_out))).long()
        originals = self._held_out[spread]
        reconstruction_sheet(
            originals, self._reconstruct(model, originals), self.folder / f"reconstructions{suffix}.png",
            label=self._originals,
        )  # fmt: skip
        classes = list(range(min(evaluation.sheet_classes, self.config.model.num_classes)))
        labels = torch.tensor(classes).repeat_interleave(evaluation.sheet_columns)
        sample_sheet(
            self._generate(model, labels), classes, self.classes, evaluation.sheet_columns,
            self.folder / f"samples{suffix}.png",
        )  # fmt: skip

    def _measure(self, model: Unite, step: int) -> dict[str, Any]:
        """Measure, and keep the record. Collective; the metrics need be whole on the main rank alone."""
        folder = self.folder / FOLDER
        work = Work(folder / WORK, self.world)
        about = about_model(model.state_dict(), str(self.folder), self._made_by(step))
        found = self._evaluator.measure(model, about, self._sampling(), work)
        if self.world.is_main:
            write_record(folder / f"{default_name(found.protocol)}.json", found.metrics, found.protocol)
            work.discard()
        self.world.barrier()
        return found.metrics

    def _reconstruct(self, model: Unite, images: Tensor) -> Tensor:
        """Images [N, 3, H, H] uint8 -> reconstructions in [0, 1]."""
        latents = encode(model, images, seed=0, first=0)
        return model.decode(latents).clamp(0, 1).cpu()

    def _generate(self, model: Unite, labels: Tensor) -> Tensor:
        """One image a label under the configured sampling."""
        pieces, first = [], 0
        for piece in labels.split(self.config.evaluation.batch):
            pieces.append(draw(model, piece, self._sampling(), seed=0, first=first).cpu())
            first += len(piece)
        return torch.cat(pieces)

    def _sampling(self) -> dict[str, Any]:
        """The options of `generate` that the configuration sets."""
        return self.config.sampling.model_dump() | {"time_shift": self.config.objective.time_shift}

    def _made_by(self, steps: int) -> dict[str, Any]:
        return {
            "run": self.config.name,
            "step": steps,
            "weights": "ema",
            "ema_decay": self.config.optimizer.ema_decay,
            "sampling": self._sampling(),
            "tokenize_t_max": self.config.objective.tokenize_t_max,
            "class_names": list(self.classes),
            "data": self._data,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }

    def _show(self, summary: dict[str, Any]) -> None:
        title = f"results in {self.folder}"
        table = Table(Column(overflow="fold"), Column(), title=title, show_header=False, title_justify="left")
        for name in self.shown:
            value = summary.get(name)
            if isinstance(value, float) and math.isfinite(value):
                table.add_row(name, f"{value:.4g}")
        for name, what in (
            (PAGE, "all of it on one page, for a browser"),
            *self.sheets,
            ("curves.png", "losses and latent statistics"),
            ("summary.json", "every metric"),
            ("export", "EMA weights for unite_fast.load"),
        ):
            table.add_row(str(self.folder / name), what)
        Console().print(table)

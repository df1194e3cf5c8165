"""What `unite-fast evaluate` does to a model of images: searches, then the measurement, then the record."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unite_fast.cli.console import out, plain, warn
from unite_fast.cli.sample import require_unguided, run_folder
from unite_fast.errors import UserError

if TYPE_CHECKING:
    from unite_fast.engine.world import World
    from unite_fast.evaluation.evaluator import Evaluator
    from unite_fast.evaluation.plan import Plan
    from unite_fast.importing import Trained


class Search(StrEnum):
    """What a search chooses before the full count is drawn."""

    guidance = "guidance"
    ema = "ema"


@dataclass
class Session:
    """One call: the searches, then the measurement, then the record."""

    run: Path
    plan: Plan
    world: World
    chosen: dict[str, Any]  # sampling settings given on the command line
    weights: str
    ema_decay: float | None

    def go(
        self,
        trained: Trained,
        searches: list[Search],
        search_count: int,
        strengths: list[float] | None,
        name: str | None,
    ) -> None:
        from unite_fast.evaluation.evaluator import Evaluator
        from unite_fast.evaluation.protocol import FOLDER, WORK
        from unite_fast.evaluation.record import default_name, write_record
        from unite_fast.evaluation.work import Work

        began = time.monotonic()
        self.evaluator: Evaluator = Evaluator(self._complete(trained), trained.config, self.world, trained.class_names)
        self.folder = run_folder(self.run) / FOLDER
        self.work = Work(self.folder / WORK, self.world, sole=True)
        self.tables: dict[str, list[dict[str, float]]] = {}
        sampling = self._sampling(trained)
        if searches:
            self._check_search(search_count)
        if Search.ema in searches:
            self.ema_decay = self._best_decay(sampling, search_count)
            trained = self._open(self.ema_decay)
        model, about = self._build(trained)
        if Search.guidance in searches:
            sampling = self._best_guidance(model, about, sampling, search_count, strengths)
        found = self.evaluator.measure(model, about, sampling, self.work)
        if self.world.is_main:
            protocol = found.protocol
            protocol["environment"]["seconds"] = round(time.monotonic() - began, 1)
            if searches:
                over = [str(what) for what in searches]
                protocol["search"] = {"by": self._objective(), "count": search_count, "over": over}
            path = self.folder / f"{name or default_name(protocol)}.json"
            write_record(path, found.metrics, protocol, self.tables)
            if Search.guidance in searches:
                from unite_fast.evaluation.search import search_curve

                about_score = f"{self._objective()} of {search_count} images"
                search_curve(self.tables["guidance"], about_score, path.with_name(f"{path.stem}_guidance.png"))
            self.work.discard()
            _show(found.metrics, protocol, self.tables, path)
        self.world.barrier()

    def _open(self, ema_decay: float | None) -> Trained:
        from unite_fast.importing import open_trained

        return open_trained(self.run, weights=self.weights, ema_decay=ema_decay)

    def _complete(self, trained: Trained) -> Plan:
        """The plan, with the metrics that its files allow where none were named."""
        if self.plan.metrics:
            return self.plan
        found = [*(("gfid",) if self.plan.reference else ()), *(("is",) if self.plan.inception else ())]
        if self.plan.data:
            found += ["psnr", "ssim", "l1", *(("rfid",) if self.plan.inception else ())]
        if not found:
            raise UserError(
                f"no metrics are chosen for {trained.origin}: give --metrics, or the files that metrics need "
                f"(--inception and --reference, --data)"
            )
        return replace(self.plan, metrics=tuple(found))

    def _sampling(self, trained: Trained) -> dict[str, Any]:
        defaults = trained.sampling
        own = {name: getattr(defaults, name) for name in ("guidance", "interval", "solver", "steps")}
        given = {name: value for name, value in self.chosen.items() if value is not None}
        settings = own | given | {"time_shift": trained.time_shift}
        require_unguided(settings)
        return settings

    def _build(self, trained: Trained):
        """The network on its device, and what the protocol says of it."""
        from unite_fast.evaluation.record import about_model

        return trained.build(self.world.device), about_model(trained.state, trained.origin, trained.made_by)

    def _objective(self) -> str:
        return "gfid" if "gfid" in self.evaluator.plan.metrics else "frechet_pca"

    def _scored(self) -> tuple[str, ...]:
        return ("gfid",) if self._objective() == "gfid" else ("small",)

    def _check_search(self, count: int) -> None:
        from unite_fast.evaluation.plan import check_count

        plan = self.evaluator.plan
        if not {"gfid", "small"}.intersection(plan.metrics):
            raise UserError("--search needs a score: add gfid (or small) to --metrics")
        check_count(plan, count, self.evaluator.sizes.num_classes, self._scored(), "--search-count")

    def _score(self, model, about, sampling, count: int) -> float:
        found = self.evaluator.measure(model, about, sampling, self.work, metrics=self._scored(), count=count)
        return float(found.metrics[self._objective()])

    def _best_decay(self, sampling: dict[str, Any], count: int) -> float:
        from unite_fast.engine import checkpoint
        from unite_fast.importing import find_checkpoint

        decays = checkpoint.ema_decays(checkpoint.read_state(find_checkpoint(self.run)))
        if len(decays) < 2:
            raise UserError(f"{self.run} keeps one EMA only: train with optimizer.ema_decays to choose from several")
        rows = self.tables["ema"] = []
        for decay in decays:
            model, about = self._build(self._open(decay))
            rows.append({"ema_decay": decay, "score": self._score(model, about, sampling, count)})
            self._tell(rows[-1])
        return min(rows, key=lambda row: row["score"])["ema_decay"]

    def _best_guidance(self, model, about, sampling, count: int, strengths: list[float] | None) -> dict[str, Any]:
        from unite_fast.evaluation.search import GuidanceSearch

        search = GuidanceSearch(lambda settings: self._score(model, about, settings, count), sampling, told=self._tell)
        self.tables["guidance"] = search.rows
        return search.sweep(strengths) if strengths else search.adapt()

    def _tell(self, row: dict[str, float]) -> None:
        if self.world.is_main:
            settings = "  ".join(f"{key} {value:g}" for key, value in row.items() if key != "score")
            out().print(f"{settings}  {self._objective()} {row['score']:.5g}", markup=False)


def _show(metrics: dict[str, Any], protocol: dict[str, Any], tables: dict[str, Any], path: Path) -> None:
    from rich.table import Table

    for warning in protocol["warnings"]:
        warn(warning)
    model, generation = protocol["model"], protocol.get("generation")
    step = "" if model.get("step") is None else f", step {model['step']}"
    title = f"{model['origin']}{step}, {model['weights']} weights"
    table = Table(title=plain(title), title_justify="left", show_header=False)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.5g}" if isinstance(value, float) else str(value))
    out().print(table)
    if generation:
        low, high = generation["interval"]
        a_class = f"{generation['per_class']} per class" if "per_class" in generation else "of classes drawn at random"
        out().print(
            f"{generation['count']} images, {a_class}; {generation['solver']}, "
            f"{generation['steps']} steps, guidance {generation['guidance']:g} between {low:g} and {high:g}, seed "
            f"{generation['seed']}, {generation['precision']}{'' if generation['normalised'] else ', un-normalised'}",
            markup=False,
        )  # fmt: skip
    out().print(f"with all that made it in {path}", markup=False, soft_wrap=True)

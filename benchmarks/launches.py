"""How many kernels a training step launches, and what that says about CUDA graphs; what step and update move.

    TRITON_INTERPRET=1 python benchmarks/launches.py   # rewrites its section of benchmarks/README.md

Launches and bytes are counted on an imagined GPU (imagined.py), floors as in profile_table.py; no time is measured.
"""

from __future__ import annotations

import os
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from imagined import Watch, imagined
from molecule_subjects import QM9_BATCH, typical_counts
from profile_table import COUNTED, H200, README, on_h200, step_bytes
from subjects import CONFIGS

from unite_fast.analysis.chunks import resolve_chunk
from unite_fast.analysis.extent import Extent
from unite_fast.analysis.launches import HOST_SECONDS
from unite_fast.analysis.planning import compute_time
from unite_fast.analysis.update import trained_weights, update_part
from unite_fast.config import Config
from unite_fast.data.loader import MicroBatch
from unite_fast.engine.batch import Batch
from unite_fast.engine.engine import Engine
from unite_fast.engine.loop import Run
from unite_fast.engine.meter import Meter
from unite_fast.engine.world import World
from unite_fast.modality import modality_of
from unite_fast.molecules.stream import MoleculeBatch
from unite_fast.objective.perceptual import Lpips

BEGIN, END = "<!-- launches: written by launches.py -->\n", "<!-- end of launches -->\n"
DRAWS = (3, 14)
MOLECULES = "qm9_s.json"
KINDS = {
    "casts": ("aten::_to_copy", "aten::_foreach_copy_"),
    "products, attention, convolutions": (
        "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution", "aten::convolution_backward",
        "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_backward",
        "aten::_flash_attention_forward", "aten::_flash_attention_backward",
    ),
    "sums of gradients": ("aten::add_.Tensor", "aten::sum.dim_IntList", "aten::add.Tensor"),
    "ours": ("unite_kernels::",),
}  # fmt: skip
PRODUCTS = ("aten::bmm", "aten::baddbmm")
# Least bytes of a weight beside the products, all else in two sweeps. Muon: gradient read for the norm; then read with
# the momentum, which is written, and the mean in bfloat16; normalised (read twice, written); then result, weight and
# average read, the last two written. AdamW: read for the norm; gradient, weight, average and both moments read, all but
# the gradient written. Not built of it: AdamW's average and clipping are sweeps of their own, and the results of tall
# matrices are turned in one.
LEAST_MUON, LEAST_ADAMW = 4 + (4 + 4 + 4 + 2) + 6 + (2 + 4 * 4), 4 + 9 * 4


class ImaginedRun(Run):
    """The training loop's own optimizer step on an imagined device, without data, records and checkpoints.

    Args:
        config: the run; LPIPS has the weights it was made with.
        device: see `imagined`.
        batch: of its one rank.
        stream: micro-batches.
    """

    def __init__(self, config: Config, device: torch.device, batch: Batch, stream: Iterator[Any]):
        self.world = World(0, 1, 0, device)
        self.modality = modality_of(config)
        # Nothing can be measured here: auto is the chunk that costs no memory.
        config = resolve_chunk(config, self.modality.largest(config, batch.micro_batch), device="cuda")
        self.config, self.batch, self.stream = config, batch, stream
        with mock.patch.object(Lpips, "from_config", _untrained):
            self.objective = self.modality.objective(config, device, torch.bfloat16)
        model = self.modality.network(config.model)
        self.engine = Engine(model, config, self.world, steps_per_epoch=1e6, global_batch=batch.global_batch)
        self.meter = Meter(self.world, batch, 1e6, unit=self.modality.unit)

    def step(self) -> None:
        """What the loop does between two logs."""
        self.meter.begin()
        losses = self._micro_batches(self.meter)
        self.meter.add(losses, self.engine.step())

    def watched(self) -> Watch:
        """One step."""
        with Watch() as watch:
            self.step()
        return watch

    def watched_update(self) -> Watch:
        """Clipping, both optimizers and EMA of a step."""
        with Watch():
            self._micro_batches(self.meter)
        with Watch() as watch:
            self.engine.step()
        return watch


def _untrained(config: Any) -> Lpips:
    return Lpips(rescale=config.rescale, dropout=config.dropout).to(memory_format=torch.channels_last)


def images_ahead(config: Config, batch: int, device: torch.device) -> Iterator[MicroBatch]:
    """Micro-batches that lie on the device, as `stream.Ahead` hands them over."""
    side = config.model.image_size
    images = torch.zeros(batch, 3, side, side, dtype=torch.uint8, device=device)
    labels, indices = (torch.zeros(batch, dtype=torch.int64, device=where) for where in (device, "cpu"))
    step = 0
    while True:
        yield MicroBatch(images, labels, indices, step, 0)
        step += 1


def molecules(config: Config, batch: int) -> Iterator[MoleculeBatch]:
    """Micro-batches on the host, where `MoleculeStream` leaves them, of typical sizes."""
    counts, labels = torch.from_numpy(typical_counts(batch)), torch.full((batch,), config.model.num_classes)
    elements = torch.ones(batch, int(counts.max()), dtype=torch.uint8)
    positions = torch.zeros(*elements.shape, 3)
    step = 0
    while True:
        yield MoleculeBatch(elements, positions, counts, labels, 1.0, step, 0)
        step += 1


@dataclass(frozen=True)
class Counted:
    """A step of one subject on one H200.

    Attributes:
        launches: by kind, "other" among them.
        floor: images -> seconds that the device takes at least.
        images: of the table's step; molecules of a model of them.
        unit: which of the two.
        bytes: that the step moves, by kind.
        needed: bytes that its operators must move; None for molecules.
        moved, least: bytes that clipping, optimizers and EMA move beside their products, and must.
    """

    launches: dict[str, int]
    floor: Callable[[int], float]
    images: int
    unit: str
    bytes: dict[str, int]
    needed: int | None
    moved: int
    least: int

    @property
    def total(self) -> int:
        return sum(self.launches.values())

    def host(self) -> tuple[float, float]:
        """Seconds that the host takes to launch everything, at each of HOST_SECONDS."""
        return self.total * HOST_SECONDS[0], self.total * HOST_SECONDS[1]

    def limited_below(self, seconds: float) -> int:
        """The fewest images whose floor is as long as the host's time."""
        return bisect_left(range(1, 100_000), seconds, key=self.floor) + 1


def step_floor(config: Config, samples: int) -> float:
    """Seconds that a step on so many images, or molecules of typical sizes, takes at least; as in profile_table.py."""
    images = config.modality == "images"
    extent = Extent(samples) if images else Extent.of(torch.from_numpy(typical_counts(samples)))
    return compute_time(config, H200, extent) + sum(update_part(config.model, config.optimizer).floor(1, H200))


def count(config: Config, images: int, device: torch.device) -> Counted:
    """Of a run with a number of draws a chunk, on one micro-batch of so many images."""
    pictures = config.modality == "images"
    made = images_ahead(config, images, device) if pictures else molecules(config, images)
    run = ImaginedRun(config, device, Batch(images, 1, images), made)
    step, update = run.watched(), run.watched_update()
    weights = trained_weights(config.model, config.optimizer.kind)
    return Counted(
        by_kind(step.launches),
        lambda images: step_floor(config, images),
        images,
        config.modality,
        by_kind(step.moved),
        step_bytes(config, images) if pictures else None,
        sum(moved for name, moved in update.moved.items() if name not in PRODUCTS),
        weights.muon * LEAST_MUON + weights.adamw * LEAST_ADAMW,
    )


def by_kind(operators: Counter[str]) -> dict[str, int]:
    """Sums over the operators of each kind, "other" among them."""
    kinds = {kind: sum(n for name, n in operators.items() if name.startswith(names)) for kind, names in KINDS.items()}
    return kinds | {"other": operators.total() - sum(kinds.values())}


def table(counted: dict[str, Counted]) -> list[str]:
    """Subject -> counts, as the README's tables."""
    kinds = list(next(iter(counted.values())).launches)
    low, high = (f"{seconds * 1e6:.0f}" for seconds in HOST_SECONDS)
    lines = [
        f"| step | launches | {' | '.join(kinds)} | host, ms, at {low} and {high} µs "
        "| floor, ms | host limits below |",
        "| --- | --- |" + " --- |" * len(kinds) + " --- | --- | --- |",
    ]
    for name, one in counted.items():
        host, floor = one.host(), one.floor(one.images)
        below = " and ".join(str(one.limited_below(seconds)) for seconds in host)
        lines.append(
            f"| {name} | {one.total} | {' | '.join(str(one.launches[kind]) for kind in kinds)} | "
            f"{host[0] * 1e3:.0f} and {host[1] * 1e3:.0f} | {floor * 1e3:.0f} ({one.images} {one.unit}) | "
            f"{below} {one.unit} |"
        )
    lines += [
        "",
        f"| GB that a step moves | all | {' | '.join(kinds)} | its operators must | more, ms | of the step's floor |",
        "| --- | --- |" + " --- |" * len(kinds) + " --- | --- | --- |",
    ]
    for name, one in counted.items():
        total = sum(one.bytes.values())
        cells = [f"{name}, {one.images} {one.unit}", *(f"{n / 1e9:.1f}" for n in (total, *one.bytes.values()))]
        if one.needed is None:
            cells += ["", "", ""]
        else:
            more = (total - one.needed) / H200.copy
            cells += [f"{one.needed / 1e9:.1f}", f"{more * 1e3:.1f}", f"{more / one.floor(one.images):.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| update and EMA of | GB beside the products | at least | more, ms | of the step's floor |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, one in counted.items():
        more = (one.moved - one.least) / H200.copy
        lines.append(
            f"| {name}, {one.images} {one.unit} | {one.moved / 1e9:.2f} | {one.least / 1e9:.2f} | {more * 1e3:.2f} | "
            f"{more / one.floor(one.images):.1%} |"
        )
    return lines


def chunked(config: Config, samples: int) -> list[Config]:
    """The run with the chunk that costs no memory, and with the largest that one H200 has room for."""
    neutral = resolve_chunk(config, modality_of(config).largest(config, samples), device="cuda")
    return list({run.objective.chunk: run for run in (neutral, on_h200(config, samples))}.values())


def main() -> None:
    counted = {}
    with imagined() as device:
        for preset, file, _, images in COUNTED:
            for draws in DRAWS:
                overrides = ["train.zero_stage=0", "train.precision=bf16", f"objective.flow_draws={draws}"]
                for config in chunked(Config.load(CONFIGS / file, overrides), images):
                    counted[f"{preset} S={draws}, {config.objective.chunk} a chunk"] = count(config, images, device)
        for config in chunked(Config.load(CONFIGS / MOLECULES, overrides[:2]), QM9_BATCH):
            objective = config.objective
            counted[f"qm9_s S={objective.flow_draws}, {objective.chunk} a chunk"] = count(config, QM9_BATCH, device)
    text = README.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{README} does not hold the lines {BEGIN.strip()!r} and {END.strip()!r}")
    partial = README.with_suffix(".partial")
    partial.write_text(before + begin + "\n" + "\n".join(table(counted)) + "\n\n" + end + after, encoding="utf-8")
    os.replace(partial, README)


if __name__ == "__main__":
    main()

"""Molecules in memory, the property that labels them, and the stream of training micro-batches.

Shapes: b molecules of one rank and backward, N atoms of the largest of them.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unite_fast.data.molecules.arrangement import Order, Orientation, aligned
from unite_fast.data.molecules.doubts import doubts
from unite_fast.data.molecules.molecule_set import MoleculeSet, split
from unite_fast.data.sampler import Sampler
from unite_fast.engine.batch import Batch
from unite_fast.engine.world import World
from unite_fast.errors import UserError
from unite_fast.molecules.config import MAX_ATOMS, MoleculeDataConfig

log = logging.getLogger("unite_fast.data")


class MoleculeBatch(NamedTuple):
    """Molecules of one rank and backward, on the host; pinned when there is CUDA."""

    elements: Tensor  # [b, N] uint8, 0 = padding, 1 … 5 = H C N O F
    positions: Tensor  # [b, N, 3] float32 in Å
    counts: Tensor  # [b] int64
    labels: Tensor  # [b] int64
    weight: float  # this micro-batch's share of the step's atoms, times the number of ranks
    step: int
    micro_batch: int


class Parts(NamedTuple):
    """A data set divided, how its molecules are arranged, and the folder that keeps what is made of them."""

    train: MoleculeSet
    held_out: MoleculeSet
    order: Order = "file"
    orientation: Orientation = "random"
    cache: str | None = None


def load_parts(config: MoleculeDataConfig, *, remark: bool = True) -> Parts:
    """Read or make the molecules, arrange and divide them; the held-out part is the validation part.

    Args:
        config: which molecules.
        remark: warn of what was left out, also where a cache holds the rest, and of what looks like a mistake.

    Raises:
        UserError: files that cannot be used, a set too small to divide.
    """
    if config.path is None:
        from unite_fast.data.molecules.sample import SAMPLE_ORDER, sample_set

        order = SAMPLE_ORDER
        molecules = sample_set(config.sample_count, cache=config.cache)
    else:
        from unite_fast.data.molecules.reading import load_molecules

        order = config.order
        molecules = load_molecules(config.path, order=order, strict=config.strict, cache=config.cache)
        if remark and molecules.skipped:
            reasons = ", ".join(f"{count} × {reason}" for reason, count in molecules.skipped.items())
            log.warning("%s: %d molecules; left out: %s", config.path, len(molecules), reasons)
        for doubt in doubts(molecules) if remark else ():
            log.warning("%s: %s", config.path, doubt)
    if config.orientation == "aligned":
        molecules, _ = aligned(molecules)
    parts = split(len(molecules), config.split_seed)
    if not len(parts.train) or not len(parts.validation):
        raise UserError(
            f"{molecules.source} holds {len(molecules)} molecules: too few to hold some out; give at least 5"
        )
    train, held_out = molecules.select(parts.train), molecules.select(parts.validation)
    return Parts(train, held_out, order, config.orientation, config.cache)


def load_for_all(config: MoleculeDataConfig, world: World) -> Parts:
    """`load_parts` on every rank; the main rank goes first, so that the others find the cache it leaves.

    Raises:
        UserError: as `load_parts`, on every rank.
    """
    if world.size == 1:
        return load_parts(config)
    parts = problem = None
    if world.is_main:
        try:
            parts = load_parts(config)
        except UserError as error:
            problem = error
    if not world.all_true(problem is None):
        raise problem or UserError("the main rank cannot use the molecules, see its message")
    return parts or load_parts(config, remark=False)


class PropertyBins:
    """A property in bins of equal share: the label of a molecule is its bin.

    Attributes:
        name: of the property.
        edges: [bins + 1], from the smallest to the largest training value; the outer bins reach on to infinity.
    """

    def __init__(self, name: str, edges: NDArray[np.float64]):
        self.name, self.edges = name, np.asarray(edges, np.float64)

    @classmethod
    def of(cls, molecules: MoleculeSet, name: str, bins: int) -> PropertyBins:
        """Bins of equal share of a set's molecules.

        Raises:
            UserError: the set, or a molecule of it, has no such property, or a bin would hold no molecule, as where
                there are fewer different values than bins.
        """
        values = getattr(molecules, name)
        if values is None:
            raise UserError(
                f"data.condition is {name!r}, but {molecules.source} states none: give it as docs/molecules.md says, "
                f"or set it to null"
            )
        unknown = np.flatnonzero(~np.isfinite(values))
        if len(unknown):
            raise UserError(
                f"data.condition is {name!r}, but {molecules.source} states none for {len(unknown)} of the "
                f"{len(values)} training molecules, {molecules.names[unknown[0]]!r} first: add it, remove them, or set "
                "it to null"
            )
        edges = np.quantile(values.astype(np.float64), np.linspace(0, 1, bins + 1))
        made = cls(name, edges)
        # Quantiles lie between values, so edges rise where values are too few, too: a bin's label is then never seen.
        if not (np.diff(edges) > 0).all() or not np.bincount(made.labels(values), minlength=bins).all():
            raise UserError(
                f"{molecules.source}: {name} of {len(values)} training molecules does not divide into {bins} bins; "
                f"lower model.num_classes"
            )
        return made

    @classmethod
    def from_names(cls, names: tuple[str, ...] | list[str]) -> PropertyBins:
        """From the names that `names` gives, as a trained model carries them."""
        pairs = [name.split(" ")[1].split("–") for name in names]
        return cls(names[0].split(" ")[0], np.array([float(pairs[0][0]), *(float(high) for _, high in pairs)]))

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each bin, `gap 5.1300–5.2100`."""
        return tuple(f"{self.name} {low:.4f}–{high:.4f}" for low, high in zip(self.edges, self.edges[1:]))

    def labels(self, values: NDArray) -> NDArray[np.int64]:
        """Bin of each value."""
        return np.searchsorted(self.edges[1:-1], np.asarray(values, np.float64), side="right").astype(np.int64)


class MoleculeStream:
    """Endless iterator over `MoleculeBatch`, from a given optimizer step on.

    The molecules depend on (seed, global batch, step, micro-batch, rank, world size) alone. All are in memory, QM9
    takes 50 MB, so there are no workers.

    Attributes:
        parts: training and held-out molecules.
        classes: names of the property's bins; empty without a property.
        steps_per_epoch: optimizer steps in one pass over the training molecules.

    Raises:
        UserError: as `PropertyBins.of`.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        condition: str | None,
        num_classes: int,
        seed: int,
        batch: Batch,
        world: World,
        start_step: int = 0,
    ):
        self.parts, train = parts, parts.train
        self.classes: tuple[str, ...] = ()
        self._labels = np.full(len(train), num_classes, np.int64)  # the null label
        if condition is not None:
            bins = PropertyBins.of(train, condition, num_classes)
            self.classes = bins.names
            self._labels = bins.labels(getattr(train, condition))
        self.steps_per_epoch = len(train) / batch.global_batch
        self._sampler = Sampler(
            len(train), seed, batch.global_batch, batch.micro_batch, batch.accumulation, world.rank, world.size
        )
        self._whole = Sampler(len(train), seed, batch.global_batch, batch.global_batch, 1)
        self._ranks = world.size
        self._draws = self._sampler.draws(start_step)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> MoleculeBatch:
        draw = next(self._draws)
        train = self.parts.train
        counts = train.counts[draw.indices]
        # Every rank knows the whole step's molecules, so the mean over its atoms needs no communication.
        whole = train.counts[self._whole.draw(draw.step, 0).indices].sum()
        longest = counts.max()
        arrays = (
            train.elements[draw.indices, :longest], train.positions[draw.indices, :longest], counts,
            self._labels[draw.indices],
        )  # fmt: skip
        tensors = [torch.from_numpy(array) for array in arrays]
        if torch.cuda.is_available():
            tensors = [tensor.pin_memory() for tensor in tensors]
        return MoleculeBatch(*tensors, float(counts.sum() * self._ranks / whole), draw.step, draw.micro_batch)

    @property
    def mode(self) -> dict[str, Any]:
        """Where the molecules come from, how they are arranged, and `atom_histogram`.

        That is [30], training molecules of 0 … 29 atoms, or under a property [bins, 30], those of each bin.
        """
        parts, lengths = self.parts, MAX_ATOMS + 1
        histogram = np.bincount(parts.train.counts, minlength=lengths)
        if self.classes:
            bins = len(self.classes)
            histogram = np.bincount(self._labels * lengths + parts.train.counts, minlength=bins * lengths)
            histogram = histogram.reshape(bins, lengths)
        return {
            "source": parts.train.source,
            "order": parts.order,
            "orientation": parts.orientation,
            "atom_histogram": histogram.tolist(),
        }

    def close(self) -> None:
        """Nothing is open."""

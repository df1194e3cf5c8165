"""What a kind of data brings to the trainer, and nothing else of it is particular to a kind.

The Generative Encoder, the two-pass step, the flow loss, engine, checkpoints, EMA and the command line are shared.
A modality is a folder: a configuration class, a network on top of `TwoPassModel`, an objective on top of
`TwoPassObjective`, a stream of micro-batches, a report, four commands, and the class that lists them, which
`unite_fast.config.MODALITIES` names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from unite_fast.analysis.extent import Extent, Population
from unite_fast.config import MODALITIES, Config, Sizes, imported
from unite_fast.engine.batch import Batch
from unite_fast.engine.world import World
from unite_fast.errors import UserError
from unite_fast.model.two_pass import TwoPassModel
from unite_fast.objective.two_pass import TwoPassObjective

if TYPE_CHECKING:
    from unite_fast.analysis.isolated import Isolated
    from unite_fast.analysis.launches import Launches
    from unite_fast.analysis.parts import Dtype, Part
    from unite_fast.engine.engine import Engine
    from unite_fast.engine.report import Report


class Inputs(NamedTuple):
    """One micro-batch on the device, as `two_pass_step` takes it."""

    data: Any  # what the objective's reconstruction reads
    labels: Tensor  # [B] int64
    shape: torch.Size  # [B, K, D] of the latents
    weight: float  # of this micro-batch in the optimizer step; the weights of a step sum to 1 on average over the ranks
    extent: Extent  # known on the host without asking the device


class Stream(Protocol):
    """Endless micro-batches of one rank, in an order that depends on (seed, step) alone."""

    classes: tuple[str, ...]  # name of each label
    steps_per_epoch: float
    mode: dict[str, Any]  # what checkpoints and exports keep of the training data beside the class names; JSON values

    def __iter__(self) -> Iterator[Any]: ...

    def __next__(self) -> Any: ...

    def close(self) -> None: ...


class Modality(Protocol):
    """A kind of data."""

    name: str
    unit: str  # what a batch counts, in the plural
    alike: bool  # whether every sample costs the same
    sizes: type[Sizes]  # configuration class of the network
    network: type[TwoPassModel]

    def objective(self, config: Any, device: torch.device, autocast: torch.dtype | None) -> TwoPassObjective:
        """The losses."""

    def absent_files(self, config: Any, device: torch.device) -> list[str]:
        """What to do about each file beside the data that a run needs and that is not there, a sentence each."""

    def evaluation_files(self, config: Any, device: torch.device) -> Any:
        """What `report` needs from files beside the data. Raises a UserError for what is wrong with one."""

    def stream(self, config: Any, batch: Batch, world: World, *, start_step: int) -> Stream:
        """The training data from an optimizer step on. Raises a UserError for data that cannot be used."""

    def samples(self, stream: Any) -> dict[str, int | str]:
        """`count` and a `digest` of the training samples, which their order depends on beside seed and batch."""

    def inputs(self, config: Any, micro_batch: Any, batch: Batch, world: World) -> Inputs:
        """A micro-batch of the stream on the device, without waiting for it."""

    def probe(self, config: Any, size: int, device: torch.device) -> Inputs:
        """The largest micro-batch of `size` samples that could come, to measure memory with."""

    def population(self, config: Any) -> Population:
        """The training samples as a plan takes them: counted from the data where they are there, else as stated.

        Raises:
            UserError: data that cannot be used.
        """

    def largest(self, config: Any, size: int) -> Extent:
        """Of the micro-batch that `probe` makes."""

    def has_data(self, config: Any) -> bool:
        """Whether `stream` finds the training data, or makes it itself."""

    def isolated(
        self, config: Any, model: Any, objective: Any, inputs: Inputs, draws: int
    ) -> dict[str, Isolated]:
        """The parts of both passes on a micro-batch, each to run alone; "denoise" on that many draws."""

    def counted(
        self, config: Any, extent: Extent, *, dtype: Dtype, device: Literal["cuda", "cpu"]
    ) -> dict[str, tuple[Part, int]]:
        """Of the parts that `isolated` names: counted operators, and how many times an extent is what they count.

        "denoise" counts one draw.
        """

    def launches(self, config: Any) -> Launches:
        """Kernels that a micro-batch of the run launches on a GPU outside the blocks."""

    def report(self, config: Any, folder: Path, world: World, engine: Engine, stream: Any, files: Any) -> Report:
        """What the run leaves for people; `files` as `evaluation_files` read them."""

    def commands(self) -> ModuleType | None:
        """The module whose sample, reconstruct, tokenize and evaluate serve such models; None: `unite_fast.cli`'s."""


def modality(name: str) -> Modality:
    """The modality of that name.

    Raises:
        UserError: there is none.
    """
    if not isinstance(name, str) or name not in MODALITIES:
        raise UserError(f"unknown modality {name!r}; this version of unite_fast knows {', '.join(MODALITIES)}")
    return imported(MODALITIES[name][1])()


def modality_of(config: Config) -> Modality:
    """The modality of a run."""
    return modality(config.modality)


def counted_operations(config: Config, extent: Extent) -> int:
    """Operations of both passes, forward and backward, on micro-batches of this extent in all.

    Exact for any sum of extents, since operations are linear in it; what activation checkpointing repeats is not
    among them, nor is the optimizer.
    """
    from unite_fast.analysis.counts import repeats

    parts = modality_of(config).counted(config, extent, dtype="bf16", device="cuda")
    return sum(part.operations * times * repeats(name, config.objective) for name, (part, times) in parts.items())

"""The rival of the step on molecules: padded batches under a key mask, every draw in one graph, masked means.

What a careful engineer first writes from the specification, with the encoder, blocks and optimizer step of the rival on
images. `tests/test_bench_plain_molecules.py` shows that loss, gradients and update are those of unite_fast on the same
weights, molecules, rotations and draws.
Shapes: B molecules, N atoms of the largest of them, D latent channels, C width, S flow draws.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from plain_training import PlainTrainer
from plain_unite import PlainDecoderBlock, PlainDraws, PlainEncoder
from torch import Tensor

from unite_fast.model.conditioning import sincos_1d
from unite_fast.molecules.config import ELEMENTS, MoleculeModelConfig, MoleculeObjectiveConfig
from unite_fast.molecules.stream import MoleculeBatch
from unite_fast.objective.perceptual import Lpips

PADDING = -1  # class of no atom


class Padded(NamedTuple):
    """Molecules on the device."""

    elements: Tensor  # [B, N] int64, 0 = padding, 1 … 5 = H C N O F
    positions: Tensor  # [B, N, 3] float32 in Å, zero at padding
    mask: Tensor  # [B, N] bool, the real atoms

    @classmethod
    def of(cls, batch: MoleculeBatch, device: torch.device, quaternions: Tensor | None) -> Padded:
        """A batch of the host on a device, each molecule turned by its own of quaternions [B, 4], if there are any."""
        elements, positions = (x.to(device, non_blocking=True) for x in (batch.elements, batch.positions))
        if quaternions is not None:
            positions = positions @ rotation_matrices(quaternions).transpose(1, 2)
        return cls(elements.long(), positions, elements > 0)


def rotation_matrices(quaternions: Tensor) -> Tensor:
    """Rotations [B, 3, 3] of quaternions [B, 4] of any length; normal numbers give rotations uniform on SO(3)."""
    w, x, y, z = (quaternions / quaternions.norm(dim=1, keepdim=True)).unbind(1)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, dim=1).view(-1, 3, 3)


def centred(positions: Tensor, mask: Tensor) -> Tensor:
    """Positions [B, N, 3] with zero mean over each molecule's atoms."""
    real = mask[..., None]
    return positions - (positions * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)


class PlainAtomEmbedding(nn.Module):
    """Element embedding + MLP(position) + index encoding."""

    def __init__(self, config: MoleculeModelConfig):
        super().__init__()
        width = config.width
        self.element = nn.Embedding(ELEMENTS, width)
        self.lift, self.project = nn.Linear(3, width), nn.Linear(width, width)
        self.register_buffer("index", sincos_1d(torch.arange(config.registers), width), persistent=False)

    def forward(self, molecules: Padded) -> Tensor:
        """[B, N, C] float32; what stands at padding is masked wherever it could be read."""
        with torch.autocast(molecules.positions.device.type, enabled=False):
            moved = self.project(F.silu(self.lift(molecules.positions)))
            element = self.element((molecules.elements - 1).clamp(min=0))
            return element + moved + self.index[: moved.shape[1]]


class PlainAtomDecoder(nn.Module):
    """Latents -> element logits and positions, the heads in float32."""

    def __init__(self, config: MoleculeModelConfig):
        super().__init__()
        sizes = config.decoder
        self.lift = nn.Linear(config.latent_dim, sizes.width)
        self.register_buffer("index", sincos_1d(torch.arange(config.registers), sizes.width), persistent=False)
        self.blocks = nn.ModuleList(PlainDecoderBlock(sizes.width, sizes.heads) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.width, eps=1e-12)
        self.elements, self.positions = nn.Linear(sizes.width, ELEMENTS), nn.Linear(sizes.width, 3)

    def forward(self, latent: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """latent [B, N, D], mask [B, N] -> logits [B, N, 5], positions [B, N, 3] in Å with zero mean."""
        x = self.lift(latent) + self.index[: latent.shape[1]]
        for block in self.blocks:
            x = block(x, mask[:, None, None])
        with torch.autocast(x.device.type, enabled=False):
            x = self.norm(x.float())
            return self.elements(x), centred(self.positions(x), mask)


class PlainMoleculeUnite(nn.Module):
    """The model and its total loss as one graph.

    Args:
        config: sizes; shared weights.
        objective: the published forms of the draws and the flow loss, positions by their absolute error.
    """

    def __init__(self, config: MoleculeModelConfig, objective: MoleculeObjectiveConfig):
        super().__init__()
        self.config, self.objective = config, objective
        self.patches = PlainAtomEmbedding(config)
        self.encoder = PlainEncoder(config)
        self.decoder = PlainAtomDecoder(config)

    def forward(self, molecules: Padded, labels: Tensor, draws: PlainDraws) -> Tensor:
        """Reconstruction loss + flow loss, summed over all S draws, of molecules with labels [B]."""
        null = torch.full_like(labels, self.config.num_classes)
        z0 = self.encoder(draws.noise, draws.t_tokenize, null, self.patches(molecules), molecules.mask)
        return self.reconstruct(z0, molecules, draws) + self.flow(z0.detach(), labels, molecules.mask, draws)

    def reconstruct(self, z0: Tensor, molecules: Padded, draws: PlainDraws) -> Tensor:
        """Cross-entropy of the elements and mean absolute error of the positions, over real atoms."""
        elements, positions, mask = molecules
        logits, found = self.decoder(draws.mixed(z0), mask)
        # Padding's 0 becomes the class that no atom has.
        element = F.cross_entropy(logits.flatten(0, 1), elements.flatten() - 1, ignore_index=PADDING)
        error = ((found - centred(positions, mask)).abs() * mask[..., None]).sum() / (3 * mask.sum())
        return self.objective.element_weight * element + self.objective.position_weight * error

    def flow(self, z1: Tensor, labels: Tensor, mask: Tensor, draws: PlainDraws) -> Tensor:
        """Weighted flow loss of all draws on clean latents z1 [B, N, D], means over real atoms."""
        z_t = draws.noised(z1)
        conditions = torch.where(draws.drop, self.config.num_classes, labels)
        masks = mask.repeat(len(draws.t), 1)
        predicted = self.encoder(z_t.flatten(0, 1), draws.t.flatten(), conditions.flatten(), mask=masks).view_as(z_t)
        error = (z1 - predicted) / (1 - draws.t[..., None, None]).clamp(min=self.objective.t_floor)
        real = error.square() * mask[..., None]
        return self.objective.flow_weight * real.sum() / (mask.sum() * z1.shape[-1])


class PlainMoleculeTrainer(PlainTrainer):
    """The rival's optimizer step on molecules, in rotations of their own where the configuration has them."""

    def network(self, lpips: Lpips | None) -> nn.Module:
        return PlainMoleculeUnite(self.config.model, self.config.objective)

    def step(
        self,
        batch: MoleculeBatch,
        draws: PlainDraws | None = None,
        quaternions: Tensor | None = None,
        *,
        compiled: bool = False,
    ) -> Tensor:
        """One optimizer step on molecules of the host; the detached loss.

        Random orientations are those of quaternions [B, 4], drawn if None.
        """
        size, longest = batch.elements.shape
        if quaternions is None and self.config.data.orientation == "random":
            quaternions = torch.randn(size, 4, device=self.device)
        molecules = Padded.of(batch, self.device, quaternions)
        labels = batch.labels.to(self.device, non_blocking=True)
        return self.train(molecules, labels, draws or self.draws(size, longest), compiled=compiled)

"""The parts of a training step on molecules, each to run alone, as `unite-fast profile` measures them."""

from __future__ import annotations

import torch
from torch import Tensor

from unite_fast.analysis.isolated import Isolated
from unite_fast.modality import Inputs
from unite_fast.molecules.config import ELEMENTS, MoleculeConfig
from unite_fast.molecules.model import MoleculeUnite
from unite_fast.molecules.objective import MoleculeObjective
from unite_fast.objective.draws import SeededDraws


def molecule_parts(
    config: MoleculeConfig, model: MoleculeUnite, objective: MoleculeObjective, inputs: Inputs, draws: int
) -> dict[str, Isolated]:
    """tokenize, decode, loss, and denoise on that many draws."""
    data, labels, shape = inputs.data, inputs.labels, inputs.shape
    elements, positions, packed = data
    device = positions.device
    seeded = SeededDraws(config.objective, seed=0, step=0, stream=0, device=device)
    noise, t, mix, added = seeded.tokenize(shape)
    padded = torch.randn(shape, device=device) * packed.mask[..., None]
    squared = config.objective.position_loss == "mse"

    def tokenize() -> tuple[Tensor, ...]:
        z0, decoder_input = model.latents(elements, positions, packed, noise, t, mix, added)
        return (z0,) if decoder_input is z0 else (z0, decoder_input)

    def decode(latent: Tensor) -> tuple[Tensor, ...]:
        return model.decoder(latent, packed)

    def loss(logits: Tensor, found: Tensor) -> tuple[Tensor, ...]:
        return model.errors(logits, found, elements, positions, packed, squared)

    def denoise() -> tuple[Tensor, ...]:
        return (objective.flow(model, padded, labels, seeded, 0, draws, data),)

    atoms = packed.total
    outputs = [torch.randn(atoms, size, device=device).requires_grad_() for size in (ELEMENTS, 3)]
    return {
        "tokenize": Isolated(tokenize, []),
        "decode": Isolated(decode, [packed.pack(padded).requires_grad_()]),
        "loss": Isolated(loss, outputs),
        "denoise": Isolated(denoise, []),
    }

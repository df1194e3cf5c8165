"""Molecules from noise: the flow's equation under given atom counts (UNITE, sampling).

Shapes: B molecules, N atoms of the largest of them, D latent channels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from unite_fast.data.sampler import counter_hash
from unite_fast.flow.sampling import check_options, integrate, shifted, velocity
from unite_fast.model.arguments import check_integers
from unite_fast.model.packing import Packed
from unite_fast.molecules.model import MoleculeUnite
from unite_kernels import philox_normal

NOISE_STREAM, ENCODE_STREAM = 0, 1  # of the counter-based generator
SOLVERS = ("euler", "heun")
_COUNTS = 21  # first word of the hash that draws atom counts


class Drawn(NamedTuple):
    """Generated molecules, padded to the largest of them."""

    elements: Tensor  # [B, N] uint8, 0 = padding, 1 … 5 = H C N O F
    positions: Tensor  # [B, N, 3] float32 in Å, zero mean
    counts: Tensor  # [B] int64


class _Sized:
    """A model under fixed atom counts, as the sampler of images sees a model."""

    def __init__(self, model: MoleculeUnite, packed: Packed):
        self.null_label, self._model, self._packed = model.null_label, model, packed

    def denoise(self, z: Tensor, t: Tensor, labels: Tensor, *, normalise: bool) -> Tensor:
        times = len(z) // len(self._packed.counts)  # twice as many latents under guidance
        packed = self._packed if times == 1 else self._packed.repeat(times)
        return self._model.denoise(z, t, labels, packed, normalise=normalise)


def draw_counts(histogram: ArrayLike, count: int, *, seed: int, first: int = 0) -> NDArray[np.int64]:
    """Atom counts of molecules number `first` … of a seed: [count].

    Args:
        histogram: [M] training molecules with 0, 1, … M−1 atoms, or [count, M] for each its own.
    """
    cumulative = np.cumsum(np.asarray(histogram, np.float64), axis=-1)
    uniform = counter_hash(_COUNTS, seed, np.arange(first, first + count)) / 2.0**64
    return (cumulative <= uniform[:, None] * cumulative[..., -1:]).sum(-1)


def noise(model: MoleculeUnite, packed: Packed, *, seed: int, first: int, stream: int) -> Tensor:
    """Normal numbers [B, N, D]: those of molecule number first + i depend on (seed, first + i) alone."""
    shape = (model.config.registers, model.config.latent_dim)
    device = model.device
    whole = philox_normal(shape, seed, 0, stream, draws=len(packed.counts), first_draw=first, device=device)
    return whole[:, : packed.length].contiguous()


@torch.no_grad()
def generate(
    model: MoleculeUnite,
    counts: Tensor,
    labels: Tensor | None = None,
    *,
    seed: int = 0,
    first: int = 0,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.1, 1.0),
    solver: str = "euler",
    steps: int = 101,
    time_shift: float = 0.5,
) -> Drawn:
    """Draw one molecule of each atom count.

    Args:
        counts: [B] atoms of each molecule, 1 … 29.
        labels: [B] bins of the property; none if None.
        seed, first: molecule i is number first + i of the seed and depends on nothing else of the call.
        guidance: w ≥ 0; 1 turns guidance off, as do labels of None.
        interval: open interval of t inside which guidance acts.
        solver: `euler` or `heun`.
        steps: number of time points from 0 to 1, at least 2, uniform before the shift.
        time_shift: α of the shift.

    Raises:
        ValueError: an unknown solver, too few steps, guidance, interval or time_shift out of range; counts or labels
            that are no integer tensor [B] or out of range.
    """
    device = model.device
    check_options(SOLVERS, solver, steps, guidance, interval, time_shift)
    check_integers("atom counts", counts, 1, model.config.registers)
    if not len(counts):
        raise ValueError("atom counts must be of one molecule at least, got none")
    if labels is None:
        labels = torch.full(counts.shape, model.null_label)
        guidance = 1.0  # leads from no class to no class
    check_integers("labels", labels, 0, model.null_label, size=len(counts))
    packed = Packed.of(counts, device=device)
    field = velocity(_Sized(model, packed), labels.to(device, torch.int64), guidance=guidance, interval=interval)
    times = shifted(torch.linspace(0, 1, steps), time_shift)  # on the host, see `integrate`
    z = integrate(field, noise(model, packed, seed=seed, first=first, stream=NOISE_STREAM), times, solver)
    elements, positions = model.decode(z, packed)
    return Drawn(elements.to(torch.uint8).cpu(), positions.cpu(), counts)


@torch.no_grad()
def encode(
    model: MoleculeUnite, elements: Tensor, positions: Tensor, counts: Tensor, *, seed: int = 0, first: int = 0
) -> tuple[Tensor, Packed]:
    """Latents [B, N, D] of molecules number first … of a call, and their layout.

    Args:
        elements: [B, ≥ N] uint8.
        positions: [B, ≥ N, 3] in Å, zero mean.
        counts: [B].
    """
    device = model.device
    packed = Packed.of(counts, device=device)
    known = noise(model, packed, seed=seed, first=first, stream=ENCODE_STREAM)
    elements = elements[:, : packed.length].to(device).long()
    return model.tokenize(elements, positions[:, : packed.length].to(device), packed, noise=known), packed


@torch.no_grad()
def reconstruct(
    model: MoleculeUnite, elements: Tensor, positions: Tensor, counts: Tensor, *, seed: int = 0, first: int = 0
) -> Drawn:
    """Molecules through tokenization and decoder; arguments as in `encode`."""
    z0, packed = encode(model, elements, positions, counts, seed=seed, first=first)
    found, places = model.decode(z0, packed)
    return Drawn(found.to(torch.uint8).cpu(), places.cpu(), counts)

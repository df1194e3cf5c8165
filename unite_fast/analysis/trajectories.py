"""What the sampler believes the image to be, along its path."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from unite_fast.evaluation.generation import SAMPLE_STREAM, register_noise
from unite_fast.flow.sampling import T_FLOOR, integrate, shifted, velocity
from unite_fast.model.unite import Unite

TRAJECTORY_TIMES = 9


class Trajectory(NamedTuple):
    """Of B images at T times.

    Attributes:
        times: rising from 0 to 1.
        clean: [T, B, K, D] predictions x̂0 of clean latents; the last are the sample's.
        images: [T, B, 3, H, H] in [0, 1], what they decode to.
    """

    times: list[float]
    clean: Tensor
    images: Tensor


@torch.no_grad()
def trajectory(model: Unite, labels: Tensor, settings: dict[str, Any], seed: int) -> Trajectory:
    """The decoded prediction x̂0 at about evenly spread times of the sampler's own, one image a label.

    x̂0 = z_t + max(1 − t, 0.05) · v(t, z_t), guidance included: what the sampler believes at t. The last image of label
    number i is the one that `generation.draw` makes under number i.

    Args:
        labels: [B] int64.
        settings: guidance, interval, solver, steps and time_shift of `generate`.
        seed: of the noise.
    """
    device = model.device
    labels = labels.to(device)
    times = shifted(torch.linspace(0, 1, settings["steps"], device=device), settings["time_shift"])
    # Even in t: the shift crowds the solver's own points near the noise, where little can be seen.
    wanted = torch.linspace(0, 1, TRAJECTORY_TIMES, device=device)
    stops = torch.unique((times[None] - wanted[:, None]).abs().argmin(1)).tolist()
    field = velocity(model, labels, guidance=settings["guidance"], interval=settings["interval"])
    z = register_noise(model, len(labels), seed=seed, stream=SAMPLE_STREAM, first=0)
    predictions, images, last = [], [], 0
    for stop in stops:
        if stop > last:
            z = integrate(field, z, times[last : stop + 1], settings["solver"])
            last = stop
        t = times[stop]
        clean = z if stop == len(times) - 1 else z + field(t, z) * (1 - t).clamp_min(T_FLOOR)
        predictions.append(clean.cpu())
        images.append(model.decode(clean).clamp(0, 1).cpu())
    return Trajectory([float(times[stop]) for stop in stops], torch.stack(predictions), torch.stack(images))

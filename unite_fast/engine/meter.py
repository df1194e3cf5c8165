"""What a step is measured by: mean losses, latent statistics, images a second, MFU, waiting for data, memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from unite_fast.engine.batch import Batch, peak_resident_bytes
from unite_fast.engine.world import World
from unite_fast.objective.two_pass import StepLosses


def latent_statistics(z0: Tensor) -> Tensor:
    """[standard deviation across images, effective rank] of latents z0 [B, K, D], on the device.

    The deviation is over images, averaged over tokens and channels. The effective rank (Roy & Vetterli 2007) is
    exp(entropy) of the normalised eigenvalues of the D × D channel covariance: 1 (one direction) … D.
    """
    centred = z0.float() - z0.float().mean(dim=0, keepdim=True)
    deviation = centred.square().mean(dim=0).sqrt().mean()
    flat = centred.nan_to_num().flatten(0, 1)  # eigvalsh raises on NaN, and the losses are what should report it
    share = torch.linalg.eigvalsh(flat.T @ flat).clamp_min(0)
    share = share / share.sum().clamp_min(torch.finfo(share.dtype).tiny)
    return torch.stack([deviation, torch.exp(torch.special.entr(share).sum())])


class Meter:
    """Sums of losses on the device, read once a log interval, and where the time went.

    Args:
        world, batch, steps_per_epoch: of the run.
        has_lpips: whether the perceptual loss is trained and recorded.
        operations: counted, of one image in a step.
        peak: operations a second that the device states for the compute dtype; None where it is not known, and then
            no MFU is recorded. A CPU states none, and one measured beside busy neighbours would be another number
            every time; `unite-fast profile` measures it.
    """

    def __init__(
        self,
        world: World,
        batch: Batch,
        steps_per_epoch: float,
        *,
        has_lpips: bool,
        operations: int,
        peak: float | None,
    ):
        self.seconds = 0.0
        self._world, self._batch, self._steps_per_epoch = world, batch, steps_per_epoch
        self._has_lpips, self._operations, self._peak = has_lpips, operations, peak
        self._reset()

    def begin(self) -> None:
        """A step begins."""
        if self._began is None:
            self._began = time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent waiting for data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training: checkpoints, pictures."""
        began = time.monotonic()
        yield
        if self._began is not None:  # else no step has begun since the last reading, and nothing counts yet
            self._began += time.monotonic() - began

    def add(self, losses: StepLosses, grad_norm: Tensor) -> None:
        """Take one optimizer step's losses in, without waiting for the device."""
        values = torch.stack([losses.total, losses.l1, losses.lpips, losses.flow, grad_norm]).float()
        self._sums = values if self._sums is None else self._sums + values
        self._z0, self._steps = losses.z0, self._steps + 1

    def read(self, step: int, lr: float) -> dict[str, float]:
        """The means since the last reading, over all ranks. Waits for the device."""
        values = torch.cat([self._sums / self._steps, latent_statistics(self._z0)])
        if self._world.size > 1:
            dist.all_reduce(values)
            values /= self._world.size
        total, l1, lpips, flow, grad_norm, z0_std, z0_rank = values.tolist()
        elapsed = time.monotonic() - self._began
        self.seconds += elapsed
        rate = self._steps * self._batch.global_batch / elapsed
        mfu = None if self._peak is None else rate / self._world.size * self._operations / self._peak
        record = {
            "step": step,
            "epoch": step / self._steps_per_epoch,
            "images": step * self._batch.global_batch,
            "loss": total,
            "loss_l1": l1,
            **({"loss_lpips": lpips} if self._has_lpips else {}),
            "loss_flow": flow,
            "grad_norm": grad_norm,
            "lr": lr,
            "z0_std": z0_std,
            "z0_rank": z0_rank,
            "images_per_second": rate,
            **({} if mfu is None else {"mfu": mfu}),
            "data_wait": self._waited / elapsed,
            "memory_gb": self._memory() / 1e9,
            "time": time.time(),
        }
        self._reset()
        return record

    def _memory(self) -> int:
        """Most bytes so far on this rank: allocated on the GPU, resident on a CPU. Neither waits for the device."""
        if self._world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._world.device)
        return peak_resident_bytes()

    def _reset(self) -> None:
        self._sums: Tensor | None = None
        self._z0: Tensor | None = None
        self._steps, self._began, self._waited = 0, None, 0.0



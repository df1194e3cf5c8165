"""What a step is measured by: mean losses, latent statistics, images a second, MFU, waiting for data, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from unite_fast.analysis.extent import Extent
from unite_fast.engine.batch import Batch, peak_resident_bytes
from unite_fast.engine.world import World
from unite_fast.objective.two_pass import StepLosses


def latent_statistics(z0: Tensor, mask: Tensor | None = None) -> Tensor:
    """[standard deviation across samples, effective rank] of latents z0 [B, K, D], on the device.

    The deviation is over samples, averaged over tokens and channels; where samples have different numbers of tokens,
    over those that the mask [B, K] calls real. The effective rank (Roy & Vetterli 2007) is
    exp(entropy) of the normalised eigenvalues of the D × D channel covariance: 1 (one direction) … D.
    """
    if mask is None:
        centred = z0.float() - z0.float().mean(dim=0, keepdim=True)
        deviation = centred.square().mean(dim=0).sqrt().mean()
    else:
        real = mask[..., None].float()
        share = real.sum(dim=0).clamp_min(1)  # [K, 1], samples that have the token
        centred = (z0.float() - (z0.float() * real).sum(dim=0) / share) * real
        spread = (centred.square().sum(dim=0) / share).sqrt()
        deviation = (spread * share).sum() / (share.sum() * z0.shape[-1])
    flat = centred.flatten(0, 1)
    # D × D numbers: on the host, so that no GPU loads cuSOLVER for them once its memory is planned. eigvalsh raises on
    # what is not finite, and the losses are what should report that.
    covariance = (flat.T @ flat).cpu().nan_to_num(nan=0, posinf=0, neginf=0)
    share = torch.linalg.eigvalsh(covariance).clamp_min(0)
    share = share / share.sum().clamp_min(torch.finfo(share.dtype).tiny)
    return torch.stack([deviation, torch.exp(torch.special.entr(share).sum()).to(deviation.device)])


class Meter:
    """Sums of losses on the device, read once a log interval, and where the time went.

    Args:
        world, batch, steps_per_epoch: of the run.
        unit: what a batch counts, in the plural.
        operations: counts those of an extent, see `counted_operations`; None counts nothing, and no MFU is recorded.
        peak: operations a second that the device states for the compute dtype, which is bfloat16 with FP8 products,
            too (see `stated_peak`); None where it is not known, and then no MFU is recorded. A CPU states none, and one
            measured beside busy neighbours would be another number every time; `unite-fast profile` measures it.
    """

    def __init__(
        self,
        world: World,
        batch: Batch,
        steps_per_epoch: float,
        *,
        unit: str = "images",
        operations: Callable[[Extent], int] | None = None,
        peak: float | None = None,
    ):
        self.seconds = 0.0
        self._world, self._batch, self._steps_per_epoch, self._unit = world, batch, steps_per_epoch, unit
        self._operations, self._peak = operations, peak
        self._reset()

    def begin(self) -> None:
        """A step begins."""
        if self._began is None:
            self._began = time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the call that fetches data: the time that the device spends waiting for it.

        On CUDA that is the time between the end of what was enqueued before and the moment when the next images lie
        on the device. The host's own time would say too much: where it runs ahead, its waiting costs nothing.
        """
        if self._world.device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            yield
            after.record()
            self._waits.append((before, after))
            return
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

    def count(self, extent: Extent) -> None:
        """Both passes on a micro-batch of this extent."""
        self._extent += extent

    def add(self, losses: StepLosses, grad_norm: Tensor) -> None:
        """Take one optimizer step's losses in, without waiting for the device."""
        values = torch.stack([losses.total, *losses.terms.values(), losses.flow, grad_norm]).float()
        self._sums = values if self._sums is None else self._sums + values
        self._last, self._steps = losses, self._steps + 1

    def read(self, step: int, samples_seen: int, lr: float) -> dict[str, float]:
        """The means since the last reading, over all ranks. Waits for the device."""
        counted = None not in (self._operations, self._peak)
        operations = self._sums.new_tensor([self._operations(self._extent) if counted else 0], dtype=torch.float64)
        latents = latent_statistics(self._last.z0, self._last.mask)
        values = torch.cat([self._sums / self._steps, latents, operations])
        if self._world.size > 1:
            dist.all_reduce(values)
            values /= self._world.size
        total, *terms, flow, grad_norm, z0_std, z0_rank, operations = values.tolist()
        elapsed = time.monotonic() - self._began
        waited = self._waited + sum(before.elapsed_time(after) for before, after in self._waits) / 1000
        self.seconds += elapsed
        rate = self._steps * self._batch.global_batch / elapsed
        record = {
            "step": step,
            "epoch": samples_seen / self._batch.global_batch / self._steps_per_epoch,
            self._unit: samples_seen,
            "loss": total,
            **{f"loss_{name}": value for name, value in zip(self._last.terms, terms, strict=True)},
            "loss_flow": flow,
            "grad_norm": grad_norm,
            "lr": lr,
            **({"z0_std": z0_std, "z0_rank": z0_rank} if len(self._last.z0) > 1 else {}),  # one sample has no spread
            f"{self._unit}_per_second": rate,
            **({"mfu": operations / elapsed / self._peak} if counted else {}),
            "data_wait": waited / elapsed,
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
        self._last: StepLosses | None = None
        self._extent = Extent(0)
        self._steps, self._began, self._waited = 0, None, 0.0
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []



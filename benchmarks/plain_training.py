"""The rival's optimizer step: backward of one graph, Muon a matrix at a time, AdamW, EMA a tensor at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
from plain_unite import PlainDraws, PlainLpips, PlainUnite
from torch import Tensor

from unite_fast.config import Config
from unite_fast.objective.perceptual import Lpips

NS_A, NS_B, NS_C = 3.4445, -4.7750, 2.0315


def plain_name(name: str, depth: int) -> str | None:
    """The plain model's name of a parameter or buffer of ours; None for the unused vector."""
    if name.endswith("time.special"):
        return None
    name = name.replace("latent_norm", "encoder.latent_norm").replace("encoder.time.frequencies", "encoder.frequencies")
    name = name.replace("time.lift", "time.0").replace("time.project", "time.2")
    if not name.startswith("encoder."):
        return name
    if name == "encoder.opening_norm":
        return "encoder.blocks.0.norm1.weight"
    if name.endswith(".next_norm"):
        following = int(name.split(".")[2]) + 1
        return "encoder.final_norm.weight" if following == depth else f"encoder.blocks.{following}.norm1.weight"
    if name.startswith("encoder.modulation."):
        _, _, index, leaf = name.split(".")
        return f"encoder.blocks.{index}.modulation.{leaf}"
    return name + ".weight" if name.endswith(("norm2", "norm3", "q_norm", "k_norm")) else name


def orthogonalised(x: Tensor, steps: int, eps: float) -> Tensor:
    """Newton–Schulz of one matrix, as torch.optim.Muon has it, in the matrix's dtype."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=NS_B, alpha=NS_C), x, beta=NS_A)
    return x.T if tall else x


class FloatMuon(torch.optim.Optimizer):
    """torch.optim.Muon's arithmetic a matrix at a time, in float32.

    torch's own iterates in bfloat16, which a CPU without matrix instructions for it multiplies a hundred times slower
    than float32: against that any float32 step would look fast.
    """

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, momentum: float, eps: float, ns_steps: int):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, eps=eps, ns_steps=ns_steps))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                buffer = state["momentum"]
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                x = orthogonalised(parameter.grad.lerp(buffer, group["momentum"]), group["ns_steps"], group["eps"])
                scale = 0.2 * math.sqrt(max(parameter.shape))
                parameter.add_(x, alpha=-group["lr"] * scale)


class PlainTrainer:
    """Model, optimizers and EMA: what an optimizer step of the rival is.

    Args:
        config: sizes, losses, betas, clip; its published forms only, and either kind of optimizer.
        source: weights to start from.
        lr: learning rate of both optimizers.
        lpips: the perceptual term of ours, whose weights are copied.
        autocast: dtype of the passes; None for float32.
    """

    def __init__(
        self,
        config: Config,
        source: nn.Module,
        *,
        lr: float,
        lpips: Lpips | None = None,
        autocast: torch.dtype | None = None,
    ):
        self.config, self.autocast = config, autocast
        self.model = self.network(lpips)
        depth = config.model.depth
        weights = {plain_name(name, depth): tensor for name, tensor in source.state_dict().items()}
        weights.pop(None)
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        if unexpected or any(not name.startswith("lpips.") for name in missing):
            raise ValueError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
        device = self.device = next(source.parameters()).device
        self.model.to(device)
        self.ema = [parameter.detach().clone() for parameter in self.parameters]
        muon_names = source.matrix_parameters() if config.optimizer.kind == "muon" else ()
        matrices = {plain_name(name, depth) for name in muon_names}
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        settings = config.optimizer
        muon = dict(lr=lr, momentum=settings.momentum, eps=1e-6, ns_steps=settings.newton_schulz_steps)
        matrix_parameters = [p for name, p in named if name in matrices]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [p for name, p in named if name not in matrices],
                lr=lr, betas=settings.betas, eps=settings.eps, weight_decay=0.0,
            )
        ]  # fmt: skip
        if matrix_parameters:
            self.optimizers.append(
                torch.optim.Muon(matrix_parameters, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", **muon)
                if device.type == "cuda"
                else FloatMuon(matrix_parameters, **muon)
            )

    def network(self, lpips: Lpips | None) -> nn.Module:
        """The plain model."""
        perceptual = None if lpips is None else PlainLpips(lpips)
        return PlainUnite(self.config.model, self.config.objective, perceptual)

    @functools.cached_property
    def compiled(self) -> nn.Module:
        """The model under torch.compile, for static shapes."""
        return torch.compile(self.model, dynamic=False)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def cast(self) -> torch.autocast:
        """The precision of the passes."""
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def step(
        self, images: Tensor, labels: Tensor, draws: PlainDraws | None = None, *, compiled: bool = False
    ) -> Tensor:
        """One optimizer step on images [B, 3, H, H], by torch.compile where asked; the detached loss."""
        draws = draws or self.draws(images.shape[0], self.config.model.registers)
        return self.train(images, labels, draws, compiled=compiled)

    def draws(self, batch: int, registers: int) -> PlainDraws:
        """Those of one step on so many samples."""
        shape = (batch, registers, self.config.model.latent_dim)
        return PlainDraws.make(self.config.objective, shape, self.device)

    def train(self, *inputs: Any, compiled: bool) -> Tensor:
        """Passes, backward, both optimizers and EMA on inputs of the model; the detached loss."""
        with self.cast():
            loss = (self.compiled if compiled else self.model)(*inputs)
        loss.backward()
        self.update()
        self.average()
        return loss.detach()

    def update(self) -> None:
        """Clip, then both optimizers."""
        if self.config.optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def average(self) -> None:
        """EMA, a tensor at a time."""
        with torch.no_grad():
            for average, parameter in zip(self.ema, self.parameters, strict=True):
                average.lerp_(parameter, 1 - self.config.optimizer.ema_decay)

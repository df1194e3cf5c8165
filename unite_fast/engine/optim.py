"""Muon on matrices, AdamW on the rest, and the learning-rate schedule (UNITE, arXiv 2603.22283, optimisation)."""

from __future__ import annotations

import importlib.util
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
from torch import Tensor

import unite_kernels as uk
from unite_fast.config import OptimizerConfig
from unite_fast.engine.sharding import MatrixExchange

# Matrices of one shape are orthogonalised together; this many elements at most, 256 MiB in float32, because the
# iteration holds about four tensors of that size.
BATCH_ELEMENTS = 2**26
# ZeRO 1 and 2 reduce Muon's gradients in at most so many stages, each of at least so many elements: 100 MB in float32.
# More would hide little more of the reduction, and cut more matrices in two, which then travel to be orthogonalised.
MAX_STAGES, STAGE_ELEMENTS = 4, 25_000_000
MUON_EPS = 1e-6  # floor of the norm that Newton-Schulz divides by, as published
MUON_STATE = "momentum_buffer"
ADAM_STATES = ("exp_avg", "exp_avg_sq")

Groups = Sequence[tuple[str, Mapping[str, nn.Parameter]]]  # (kind, parameters by name)


def parameter_groups(model: nn.Module, kind: str) -> dict[str, dict[str, nn.Parameter]]:
    """Trained parameters by optimizer, in the model's order.

    Args:
        model: for "muon" it must say which parameters are matrices: `matrix_parameters() -> set[str]`.
        kind: "muon" or "adamw".

    Returns:
        {"muon": {name: parameter}, "adamw": {name: parameter}} without empty groups.
    """
    matrices = model.matrix_parameters() if kind == "muon" else set()
    groups: dict[str, dict[str, nn.Parameter]] = {"muon": {}, "adamw": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["muon" if name in matrices else "adamw"][name] = parameter
    return {kind: group for kind, group in groups.items() if group}


def stages(sizes: Sequence[int]) -> list[list[int]]:
    """Indices of a group's parameters, cut where ZeRO 1 and 2 cut the group into flat ones, last parameter first.

    A backward finishes gradients last parameter first, and each rank owns a slice of each flat group: so the first group
    can be reduced, by all ranks' links at once, while the backward is still at the others.

    Args:
        sizes: elements of the parameters in the model's order.
    """
    cut = max(sum(sizes) / MAX_STAGES, STAGE_ELEMENTS)
    found: list[list[int]] = [[]]
    held = 0
    for index in reversed(range(len(sizes))):
        if held >= cut * len(found):
            found.append([])
        found[-1].append(index)
        held += sizes[index]
    return found


def in_stages(groups: Groups) -> Groups:
    """The groups as ZeRO 1 and 2 lay them out flat: Muon's in `stages`, the rest, which is small, as it is."""
    found: list[tuple[str, Mapping[str, nn.Parameter]]] = []
    for kind, group in groups:
        if kind != "muon":
            found.append((kind, group))
            continue
        names = list(group)
        for indices in stages([parameter.numel() for parameter in group.values()]):
            found.append((kind, {names[index]: group[names[index]] for index in indices}))
    return found


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """[rows, columns] that Muon sees: a parameter of more dimensions is flattened behind its first."""
    return shape[0], shape[1:].numel()


def lr_factor(step: int, steps_per_epoch: float, config: OptimizerConfig) -> float:
    """Learning rate of an optimizer step as a share of the peak: warm-up, hold, cosine, constant.

    Epochs are real passes over the data and are turned into optimizer steps.

    Args:
        step: optimizer steps taken before this one, from 0; the first step of a warm-up moves by 1/warm-up.
        steps_per_epoch: optimizer steps in one pass over the data.
    """
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    if not config.cosine_until_epoch:
        return 1.0
    hold = max(config.hold_until_epoch, config.warmup_epochs) * steps_per_epoch
    end = config.cosine_until_epoch * steps_per_epoch
    if step < hold:
        return 1.0
    if step >= end:
        return config.final_ratio
    progress = (step - hold) / (end - hold)
    return config.final_ratio + (1 - config.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def peak_lr(config: OptimizerConfig, global_batch: int) -> float:
    """lr · global batch / lr_batch; lr as it is where lr_batch is null."""
    return config.lr if config.lr_batch is None else config.lr * global_batch / config.lr_batch


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer, on whole parameters or on ZeRO's flat slices of them.

    Muon (Jordan 2024, scaled as in Liu et al. 2025, arXiv 2502.16982): the momentum m follows the gradient g,
    m += (1 − μ)(g − m); the Nesterov mean g + μ(m − g) is orthogonalised by Newton–Schulz steps; the parameter moves
    by −lr · 0.2 √max(rows, columns) times that, after decoupled decay. The arithmetic is torch.optim.Muon's with
    adjust_lr_fn="match_rms_adamw".

    AdamW is Apex's FusedAdam on CUDA where NVIDIA's Apex is installed, torch's fused AdamW otherwise.

    Args:
        groups: items of what `parameter_groups` returns; Muon's may be several.
        config: betas, eps, decay, momentum, Newton–Schulz steps.
        lr: learning rate until `set_lr`.
    """

    def __init__(self, groups: Groups, config: OptimizerConfig, lr: float):
        self.exchanges: dict[Tensor, MatrixExchange] = {}  # by this rank's slice of a flat group of Muon's
        self.newton_schulz_steps = config.newton_schulz_steps
        self._adamw: torch.optim.Optimizer | None = None
        param_groups = []
        for kind, parameters in groups:
            if kind == "muon":
                group = {"params": list(parameters.values()), "lr": lr}
                group |= {"momentum": config.momentum, "weight_decay": config.weight_decay}
            else:
                self._adamw = _adamw(list(parameters.values()), config, lr)
                group = self._adamw.param_groups[0]
            param_groups.append(group | {"kind": kind})
        super().__init__(param_groups, {})
        if self._adamw is not None:
            self._adamw.state = self.state

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step, all groups; a Python number, so no device is waited for."""
        for group in self.param_groups:
            group["lr"] = lr

    def initialise_state(self, masters: Mapping[str, list[Tensor]]) -> None:
        """Zero state for the tensors that will be stepped: group kind -> masters, ZeRO's slices included."""
        self.state.clear()
        for tensor in masters.get("muon", ()):
            self.state[tensor] = {MUON_STATE: torch.zeros_like(tensor)}
        for tensor in masters.get("adamw", ()):
            self.state[tensor] = {name: torch.zeros_like(tensor) for name in ADAM_STATES}
        self.set_adam_step(0)

    def set_adam_step(self, step: int) -> None:
        """Steps taken, which AdamW's bias correction needs."""
        for group in self.param_groups:
            if group["kind"] == "adamw":
                group["step"] = step  # where Apex keeps it
        for tensor, state in self.state.items():
            if ADAM_STATES[0] in state:
                state["step"] = torch.full((), float(step), device=tensor.device)  # where torch keeps it

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update from the gradients in `.grad`; parameters without a gradient stay as they are."""
        for group in self.param_groups:
            if group["kind"] == "muon":
                self._muon(group)
            elif group["params"]:
                self._adamw.param_groups = [group]
                self._adamw.step()

    def _muon(self, group: dict) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        gradients = [parameter.grad for parameter in parameters]
        momenta = [self.state[parameter][MUON_STATE] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        means = torch._foreach_lerp(gradients, momenta, group["momentum"])
        exchange = self.exchanges.get(parameters[0])
        if exchange is None:
            matrices = [mean.view(matrix_shape(mean.shape)) for mean in means]
            updates = [u.view_as(p) for u, p in zip(self._orthogonalise(matrices), parameters)]
        else:
            updates = [exchange.apply(mean, self._orthogonalise) for mean in means]
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _orthogonalise(self, matrices: list[Tensor]) -> list[Tensor]:
        """Newton–Schulz of each matrix times 0.2 √max(rows, columns), matrices of one shape in one batch."""
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for index, matrix in enumerate(matrices):
            by_shape[matrix.shape].append(index)
        updates: list[Tensor] = [matrices[0]] * len(matrices)
        for shape, indices in by_shape.items():
            together = max(1, BATCH_ELEMENTS // shape.numel())
            for first in range(0, len(indices), together):
                batch = indices[first : first + together]
                stacked = torch.stack([matrices[index] for index in batch])
                scale = 0.2 * math.sqrt(max(shape))
                result = uk.newton_schulz(stacked, steps=self.newton_schulz_steps, eps=MUON_EPS, scale=scale)
                for index, update in zip(batch, result.unbind()):
                    updates[index] = update
        return updates


def apex_adam() -> type[torch.optim.Optimizer] | None:
    """NVIDIA Apex's FusedAdam, or None. (The package named apex on PyPI is another project.)"""
    if not torch.cuda.is_available() or importlib.util.find_spec("amp_C") is None:
        return None
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        return None
    return FusedAdam


def _adamw(parameters: list[nn.Parameter], config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    options = dict(lr=lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    apex = apex_adam() if parameters[0].is_cuda else None
    if apex is not None:
        return apex(parameters, adam_w_mode=True, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)

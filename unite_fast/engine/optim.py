"""Muon on matrices, AdamW on the rest, and the learning-rate schedule (UNITE, arXiv 2603.22283, optimisation)."""

from __future__ import annotations

import importlib.util
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

import unite_kernels as uk
from unite_fast.config import OptimizerConfig
from unite_fast.engine.ema import Ema
from unite_fast.engine.sharding import MatrixExchange

# Matrices of one shape are orthogonalised together; this many elements at most, 256 MiB in float32, because the
# iteration holds about three tensors of that size beside them.
BATCH_ELEMENTS = 2**26
# ZeRO 1 and 2 reduce Muon's gradients in at most so many stages, each of at least so many elements: 100 MB in float32.
# More would hide little more of the reduction, and cut more matrices in two, which then travel to be orthogonalised.
MAX_STAGES, STAGE_ELEMENTS = 4, 25_000_000
MUON_EPS = 1e-6  # floor of the norm that Newton-Schulz divides by, as published
SPENT = 0.1  # share of the peak at which a learning rate trains little more; the published recipe ends at 0.5
MUON_STATE = "momentum_buffer"
ADAM_STATES = ("exp_avg", "exp_avg_sq")

Groups = Sequence[tuple[str, Mapping[str, nn.Parameter]]]  # (kind, parameters by name)


def parameter_groups(model: nn.Module, kind: str) -> dict[str, dict[str, nn.Parameter]]:
    """Trained parameters by optimizer, in the order in which the model reads them.

    Args:
        model: must say that order, `reading_order() -> list[str]`, and for "muon" which parameters are matrices,
            `matrix_parameters() -> set[str]`.
        kind: "muon" or "adamw".

    Returns:
        {"muon": {name: parameter}, "adamw": {name: parameter}} without empty groups.
    """
    matrices = model.matrix_parameters() if kind == "muon" else set()
    groups: dict[str, dict[str, nn.Parameter]] = {"muon": {}, "adamw": {}}
    parameters = dict(model.named_parameters())
    for name in model.reading_order():
        parameter = parameters[name]
        if parameter.requires_grad:
            groups["muon" if name in matrices else "adamw"][name] = parameter
    return {kind: group for kind, group in groups.items() if group}


def stages(sizes: Sequence[int]) -> list[list[int]]:
    """Indices of a group's parameters, split into the flat groups of ZeRO 1 and 2, last parameter first.

    A backward finishes the last parameter's gradient first, and each rank owns a slice of each flat group. So the first
    group can be reduced, over all ranks' links at once, while the backward still computes the others.

    Args:
        sizes: elements of the parameters in the order in which the model reads them.
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


def lr_factor(step: float, steps_per_epoch: float, config: OptimizerConfig) -> float:
    """Learning rate of an optimizer step as a share of the peak: warm-up, hold, cosine, constant.

    Epochs are real passes over the data and are turned into optimizer steps.

    Args:
        step: optimizer steps taken before this one, from 0; the first step of a warm-up moves by 1/warm-up. A fraction
            where some were of another batch (`Engine.progress`).
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


def schedule_doubt(total: int, steps_per_epoch: float, config: OptimizerConfig) -> str | None:
    """A warning if the schedule seems made for other data: its keys count epochs, but a run's length often steps.

    Args:
        total: optimizer steps of the whole run.
    """
    warmup, end = config.warmup_epochs * steps_per_epoch, config.cosine_until_epoch * steps_per_epoch
    if warmup > total:
        return (
            f"optimizer.warmup_epochs = {config.warmup_epochs:g} takes {math.ceil(warmup)} steps of these data, and "
            f"the run ends at step {total}: the learning rate does not reach its peak"
        )
    if end and 2 * end < total and config.final_ratio <= SPENT:
        return (
            f"optimizer.cosine_until_epoch = {config.cosine_until_epoch:g} is step {math.ceil(end)} of {total} with "
            f"these data, and the learning rate then stays at {config.final_ratio:g} of its peak: to end the decay "
            f"with the run, multiply warmup_epochs, hold_until_epoch and cosine_until_epoch by {total / end:.3g}"
        )
    return None


def peak_lr(config: OptimizerConfig, global_batch: int) -> float:
    """lr · global batch / lr_batch; lr as it is where lr_batch is null."""
    return config.lr if config.lr_batch is None else config.lr * global_batch / config.lr_batch


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer, on whole parameters or on ZeRO's flat slices of them.

    Muon (Jordan 2024, scaled as in Liu et al. 2025, arXiv 2502.16982): the momentum m follows the gradient g,
    m += (1 − μ)(g − m); the Nesterov mean g + μ(m − g) is orthogonalised by Newton–Schulz steps; the parameter moves
    by −lr · 0.2 √max(rows, columns) times that, after decoupled decay. The arithmetic is torch.optim.Muon's with
    adjust_lr_fn="match_rms_adamw". Clipping is part of the sweep that makes the mean, and the moving averages are part
    of the one that updates the parameters.

    AdamW is Apex's FusedAdam on CUDA where NVIDIA's Apex is installed, torch's fused AdamW otherwise.

    Args:
        groups: items of what `parameter_groups` returns; Muon's may be several.
        config: betas, eps, decay, momentum, Newton–Schulz steps.
        lr: learning rate until `set_lr`.

    Attributes:
        exchanges: by this rank's slice of a flat group, the exchange that assembles matrices cut by ZeRO 1 and 2.
        clip_coefficient: 0-dim, on the device; the next step multiplies gradients by this. None for no clipping.
        ema: averages that a step updates for Muon's weights, those with a gradient.
    """

    def __init__(self, groups: Groups, config: OptimizerConfig, lr: float):
        self.exchanges: dict[Tensor, MatrixExchange] = {}
        self.clip_coefficient: Tensor | None = None
        self.ema: Ema | None = None
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
                if self.clip_coefficient is not None:
                    gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
                    torch._foreach_mul_(gradients, self.clip_coefficient)
                self._adamw.param_groups = [group]
                self._adamw.step()

    def _muon(self, group: dict) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        gradients = [parameter.grad for parameter in parameters]
        momenta = [self.state[parameter][MUON_STATE] for parameter in parameters]
        clip, exchange = self.clip_coefficient, self.exchanges.get(parameters[0])
        into = partial(uk.muon_momentum_, momenta, gradients, momentum=group["momentum"], coefficient=clip)
        if exchange is None:
            shapes = [matrix_shape(parameter.shape) for parameter in parameters]
            updates = self._orthogonalised(shapes, momenta[0], into)
        else:
            means = [torch.empty_like(m, dtype=uk.newton_schulz_dtype(m)) for m in momenta]
            into(means)
            updates = [exchange.apply(mean, self._orthogonalise) for mean in means]
        averages, decays = ([], []) if self.ema is None else (self.ema.take(parameters), self.ema.decays)
        uk.muon_update_(parameters, updates, group["lr"], group["weight_decay"], averages, decays)

    def _orthogonalise(self, matrices: list[Tensor]) -> list[Tensor]:
        shapes = [matrix.shape for matrix in matrices]
        return self._orthogonalised(shapes, matrices[0], lambda batches: torch._foreach_copy_(batches, matrices))

    def _orthogonalised(
        self, shapes: Sequence[tuple[int, int]], like: Tensor, fill: Callable[[list[Tensor]], object]
    ) -> list[Tensor]:
        """Newton–Schulz of each matrix times 0.2 √max(rows, columns), matrices of one shape in one batch.

        Args:
            shapes: [rows, columns] of each.
            like: on their device.
            fill: writes the matrices into what it is given, views of the batches in the dtype of the iteration.
        """
        batches = matrix_batches(shapes)
        dtype = uk.newton_schulz_dtype(like)
        stacks = [like.new_empty(len(batch), *shapes[batch[0]], dtype=dtype) for batch in batches]
        fill(_unstacked(batches, stacks))
        for index, batch in enumerate(batches):
            scale = 0.2 * math.sqrt(max(shapes[batch[0]]))
            # In the batch's place, whose memory is free then.
            stacks[index] = uk.newton_schulz(stacks[index], steps=self.newton_schulz_steps, eps=MUON_EPS, scale=scale)
        return _unstacked(batches, stacks)


def matrix_batches(shapes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Indices of the matrices of one shape, batches of at most BATCH_ELEMENTS."""
    by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, shape in enumerate(shapes):
        by_shape[tuple(shape)].append(index)
    batches = []
    for shape, indices in by_shape.items():
        together = max(1, BATCH_ELEMENTS // math.prod(shape))
        batches += [indices[first : first + together] for first in range(0, len(indices), together)]
    return batches


def _unstacked(batches: list[list[int]], stacks: list[Tensor]) -> list[Tensor]:
    """The matrices of stacks [n, rows, columns] in the order of their indices."""
    found = {i: matrix for batch, stack in zip(batches, stacks) for i, matrix in zip(batch, stack.unbind())}
    return [found[index] for index in range(len(found))]


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

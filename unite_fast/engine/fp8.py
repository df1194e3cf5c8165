"""FP8 matrix products of the transformer blocks (Micikevicius et al. 2022, arXiv 2209.05433).

A converted Linear has its input, weight and gradient in eight bits (`unite_kernels.fp8_linear`). Weights stay float32
parameters under the same names, so optimizers, DeepSpeed, EMA, checkpoints and exports see what they always see.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor

import unite_kernels as uk
from unite_fast.config import Config
from unite_fast.engine.backend import autocast_dtype
from unite_fast.errors import UserError
from unite_fast.model.aligned import Padding, compute_dtype, pad, padded_placeholder
from unite_fast.model.casts import current_casts
from unite_fast.model.linear import Linear
from unite_kernels.dispatch import aligned
from unite_kernels.fp8 import MIN_CAPABILITY

# Of the blocks of encoder and decoder.
LINEARS = ("qkv", "attention_out", "mlp_in", "mlp_out")


class Fp8Linear(nn.Linear):
    """A Linear whose product, and whose gradients', have operands of eight bits."""

    def forward(self, x: Tensor, padding: Padding | None = None, *, add_bias: bool = True) -> Tensor:
        """As of `Linear`; the weight is quantized once a micro-batch."""
        weight, bias = self.weight, self.bias if add_bias else None
        casts = current_casts()
        quantized = None if casts is None else casts.fp8_weight(weight, padding)
        if padding is not None:
            make = pad if quantized is None else padded_placeholder
            weight = make(weight, padding, dtype=compute_dtype(weight))
        return uk.fp8_linear(x.to(compute_dtype(x)), weight, bias, quantized)


def check_fp8(config: Config, device: torch.device) -> None:
    """Raise a UserError where `train.fp8` is on and cannot work here."""
    if not config.train.fp8 or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
        raise UserError(
            f"train.fp8 needs a GPU of compute capability {least} (RTX 40, H100), this one has {found}: "
            "set train.fp8 to false"
        )
    if autocast_dtype(config, device) is None:
        raise UserError("train.fp8 needs bfloat16 autocast: set train.precision to auto, or train.fp8 to false")


def takes(linear: str, inputs: int, outputs: int) -> bool:
    """Whether a block's Linear of that name and size computes in FP8: its sizes must be `aligned`.

    Only an MLP's hidden width is free, see `swiglu_mlp`.
    """
    sizes = {"mlp_in": [inputs], "mlp_out": [outputs]}.get(linear, [inputs, outputs])
    return linear in LINEARS and all(aligned(size) == size for size in sizes)


def eligible(name: str, linear: nn.Linear) -> bool:
    """Whether a Linear of that dotted name computes in FP8: of a block, and of sizes that `takes` names."""
    return ".blocks." in f".{name}" and takes(name.rpartition(".")[2], linear.in_features, linear.out_features)


def use_fp8(model: nn.Module) -> None:
    """Convert the eligible Linears of a model to FP8; on a CPU it is emulated by rounding.

    Parameters stay the same objects under the same names. Linears that are already converted are left alone.
    """
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Linear and eligible(f"{path}.{name}", child):
                setattr(parent, name, _turned(child, Fp8Linear))


@contextmanager
def without_fp8(model: nn.Module) -> Iterator[None]:
    """Context in which the model computes as if never converted, with the same parameters."""
    swapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Fp8Linear)
    ]
    for parent, name, child in swapped:
        setattr(parent, name, _turned(child, Linear))
    with contextlib.ExitStack() as stack:
        for parent, name, child in swapped:
            stack.callback(setattr, parent, name, child)
        yield


def _turned(linear: nn.Linear, kind: type[nn.Linear]) -> nn.Linear:
    """A Linear of another kind with the same parameters."""
    made = kind(linear.in_features, linear.out_features, bias=False, device="meta")
    made.weight, made.bias = linear.weight, linear.bias
    return made.train(linear.training)

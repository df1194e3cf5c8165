"""FP8 matrix products of the transformer blocks, through torchao (Micikevicius et al. 2022, arXiv 2209.05433).

A converted Linear casts its input, weight and gradient to eight bits at every call, each tensor under a scale of its own:
E4M3 for inputs and weights, E5M2 for gradients. Weights stay float32 parameters under the same names, so optimizers,
DeepSpeed, EMA, checkpoints and exports see what they always see.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn

from unite_fast.config import Config
from unite_fast.engine.backend import autocast_dtype
from unite_fast.errors import UserError

MIN_CAPABILITY = (8, 9)  # Ada; H100 and H200 have 9.0
MULTIPLE = 16  # of both sizes of a weight, what the FP8 products of cuBLASLt are made for
# Of the blocks of encoder and decoder. An MLP's hidden width is filled up to such a multiple (model/aligned.py).
LINEARS = ("qkv", "attention_out", "mlp_in", "mlp_out")


def torchao_float8() -> Any:
    """The module torchao.float8, without the warnings about kernels of other devices that its import prints.

    Raises:
        ImportError: torchao is not installed, or does not fit this torch.
    """
    logger = logging.getLogger("torchao")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import torchao.float8
    finally:
        logger.setLevel(level)
    return torchao.float8


def check_fp8(config: Config, device: torch.device) -> None:
    """Raise a UserError where `train.fp8` is on and cannot work here."""
    if not config.train.fp8:
        return
    off = "or set train.fp8 to false"
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"train.fp8 needs torchao: pip install 'unite_fast[fp8]', {off}")
    try:
        torchao_float8()
    except ImportError as error:
        raise UserError(
            f"train.fp8: torchao cannot be imported ({error}): pip install 'torchao>=0.17', {off}"
        ) from None
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if autocast_dtype(config, device) is None:
            raise UserError(f"train.fp8 goes with bfloat16 around it: set train.precision to auto, {off}")
        if capability < MIN_CAPABILITY:
            found, least = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
            raise UserError(
                f"train.fp8 needs a GPU of compute capability {least} (RTX 40, H100), this one has {found}: {off}"
            )


def takes(linear: str, inputs: int, outputs: int) -> bool:
    """Whether a block's Linear of that name and those sizes computes in FP8: sizes but an MLP's hidden one decide."""
    sizes = {"mlp_in": [inputs], "mlp_out": [outputs]}.get(linear, [inputs, outputs])
    return linear in LINEARS and all(size % MULTIPLE == 0 for size in sizes)


def eligible(name: str, linear: nn.Linear) -> bool:
    """Whether a Linear of that dotted name computes in FP8: of a block, and of sizes that `takes` names."""
    return ".blocks." in f".{name}" and takes(name.rpartition(".")[2], linear.in_features, linear.out_features)


def use_fp8(model: nn.Module, device: torch.device) -> None:
    """Let the eligible Linears of a model compute in FP8; on a CPU, and that is slow, with numbers rounded to it.

    Parameters stay the same objects under the same names. What is converted already stays as it is.
    """
    float8 = torchao_float8()
    # The gradient of a weight sums over tokens, whose number (257 an image in the decoder) is no multiple of 16 everywhere.
    config = float8.Float8LinearConfig(emulate=device.type != "cuda", pad_inner_dim=True)
    float8.convert_to_float8_training(
        model,
        config=config,
        module_filter_fn=lambda module, name: type(module) is nn.Linear and eligible(name, module),
    )


@contextmanager
def without_fp8(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as one that was never converted, with the same parameters."""
    swapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and type(child) is not nn.Linear
    ]
    for parent, name, child in swapped:
        plain = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
        plain.weight, plain.bias = child.weight, child.bias
        setattr(parent, name, plain.train(child.training))
    with contextlib.ExitStack() as stack:
        for parent, name, child in swapped:
            stack.callback(setattr, parent, name, child)
        yield

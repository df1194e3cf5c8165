"""How evenly the weights of the Generative Encoder spread over their range, tensor by tensor."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unite_fast.errors import UserError

BINS = 64
Group = Literal["normalisation/modulation", "attention/MLP"]
GROUPS: tuple[Group, Group] = ("normalisation/modulation", "attention/MLP")
KINDS = (
    "norm1", "norm2", "norm3", "q_norm", "k_norm", "modulation", "qkv", "attention_out", "mlp_in", "mlp_out",
)  # fmt: skip


@dataclass(frozen=True)
class TensorEntropy:
    """One tensor.

    Attributes:
        name: in the state dict.
        encoder: "encoder", or "denoiser" where the second pass has weights of its own.
        depth: of the block that reads it, from 0; the final layer, which has norm1 and modulation, stands behind the
            last.
        group: normalisation gains and modulation matrices, or matrices of attention and MLP.
        kind: what it is within a block, one of `KINDS`.
        size: numbers in it.
        bits: see `histogram_entropy`.
    """

    name: str
    encoder: str
    depth: int
    group: Group
    kind: str
    size: int
    bits: float


def histogram_entropy(weights: Tensor, name: str = "a weight") -> float:
    """Entropy in bits of the histogram of a tensor's values, in 64 equal bins from its smallest value to its largest.

    0 where all values are equal, 6 where every bin holds as many. n values fill n bins at most, so log2(n)
    bounds it, too: a vector scores less than a matrix of the same distribution.

    Raises:
        UserError: NaN or infinite values.
    """
    values = weights.detach().double().flatten().cpu()
    if not bool(torch.isfinite(values).all()):
        raise UserError(f"{name} holds NaN or infinite values: the model has diverged")
    low, high = float(values.min()), float(values.max())
    if low == high:
        return 0.0
    share = torch.histc(values, BINS, low, high) / len(values)
    return float(torch.special.entr(share).sum()) / math.log(2)


def weight_entropies(state: dict[str, Tensor]) -> list[TensorEntropy]:
    """Of every normalisation gain, modulation matrix, and matrix of attention and MLP, by encoder, depth and group.

    Biases are left out, and so are embeddings, positions, the output's Linear and the decoder.

    Args:
        state: of a `TwoPassModel`.

    Raises:
        UserError: NaN or infinite values.
    """
    depth = 1 + max(int(found[1]) for name in state if (found := re.match(r"encoder\.blocks\.(\d+)\.", name)))
    found = []
    for name, tensor in state.items():
        placed = _place(name, depth)
        if placed is not None:
            encoder, at, group, kind = placed
            found.append(
                TensorEntropy(name, encoder, at, group, kind, tensor.numel(), histogram_entropy(tensor, name))
            )
    return sorted(found, key=lambda one: (one.encoder != "encoder", one.depth, KINDS.index(one.kind)))


def _place(name: str, depth: int) -> tuple[str, int, Group, str] | None:
    """(encoder, depth, group, kind) of a tensor, None where it is not looked at.

    A block here owns the norm that opens what follows it (see model/blocks.py); it is counted there.
    """
    encoder, _, rest = name.partition(".")
    if encoder not in ("encoder", "denoiser"):
        return None
    norm, matrix = GROUPS
    if rest == "opening_norm":
        return encoder, 0, norm, "norm1"
    if rest == "final_modulation.weight":
        return encoder, depth, norm, "modulation"
    if inside := re.fullmatch(r"modulation\.(\d+)\.weight", rest):
        return encoder, int(inside[1]), norm, "modulation"
    if inside := re.fullmatch(r"blocks\.(\d+)\.(next_norm|\w+_norm|norm\d)", rest):
        after = inside[2] == "next_norm"
        return encoder, int(inside[1]) + after, norm, "norm1" if after else inside[2]
    if inside := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.weight", rest):
        return encoder, int(inside[1]), matrix, inside[2]
    return None

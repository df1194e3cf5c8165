"""Inception-v3 as TensorFlow's 2015 graph computes it, the feature extractor of the field's FID.

The network is ours, written from the architecture (Szegedy et al. 2015, arXiv 1512.00567) and from what sets the FID
graph apart: average pools leave the padding out of their mean, the last block pools by maximum, there are 1,008
classes, and images are resized as TensorFlow 1 did. The weights are a file, in the layout that pytorch-fid and
torch-fidelity share: `Mixed_5b.branch1x1.conv.weight`, `….bn.running_var`, `fc.weight`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from unite_fast.errors import UserError
from unite_fast.weights import check_named_hash, read_tensors

SIDE = 299  # pixels of a square input
FEATURES, CLASSES = 2048, 1008
BATCH_NORM_EPS = 1e-3
PUBLISHED_HASH = "6726825d"  # begins the SHA-256 of the one file whose numbers the field compares
ADVICE = (
    f"get pt_inception-2015-12-05-{PUBLISHED_HASH}.pth from "
    f"https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights and give its path "
    f"(--inception, or evaluation.inception)"
)

AVERAGE, MAXIMUM = "average", "maximum"  # 3×3 pools inside a block; the maximum alone halves the map


def absent_inception(path: str | Path | None) -> str | None:
    """What to do about weights that are not given or not there; None where they are."""
    if path is None:
        return f"Inception features need the Inception-v3 weights: {ADVICE}"
    return None if Path(path).is_file() else f"no Inception-v3 weights at {path}: {ADVICE}"


class Conv(NamedTuple):
    """A convolution by its name in the weights file; `halves` is stride 2 without padding."""

    name: str
    outputs: int
    kernel: int | tuple[int, int] = 1
    halves: bool = False


Chain = tuple[str | Conv | tuple[Conv, ...], ...]  # a tuple inside is a fork, whose ends are joined


def _a(pooled: int) -> tuple[Chain, ...]:
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, 5)),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3)),
        (AVERAGE, Conv("branch_pool", pooled)),
    )


def _c(width: int) -> tuple[Chain, ...]:
    row, column = (1, 7), (7, 1)
    return (
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", width), Conv("branch7x7_2", width, row), Conv("branch7x7_3", 192, column)),
        (
            Conv("branch7x7dbl_1", width), Conv("branch7x7dbl_2", width, column), Conv("branch7x7dbl_3", width, row),
            Conv("branch7x7dbl_4", width, column), Conv("branch7x7dbl_5", 192, row),
        ),
        (AVERAGE, Conv("branch_pool", 192)),
    )  # fmt: skip


def _e(pool: str) -> tuple[Chain, ...]:
    row, column = (1, 3), (3, 1)
    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), (Conv("branch3x3_2a", 384, row), Conv("branch3x3_2b", 384, column))),
        (
            Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, 3),
            (Conv("branch3x3dbl_3a", 384, row), Conv("branch3x3dbl_3b", 384, column)),
        ),
        (pool, Conv("branch_pool", 192)),
    )  # fmt: skip


_B: tuple[Chain, ...] = (
    (Conv("branch3x3", 384, 3, halves=True),),
    (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3, halves=True)),
    ("halving maximum",),
)
_D: tuple[Chain, ...] = (
    (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, 3, halves=True)),
    (
        Conv("branch7x7x3_1", 192), Conv("branch7x7x3_2", 192, (1, 7)), Conv("branch7x7x3_3", 192, (7, 1)),
        Conv("branch7x7x3_4", 192, 3, halves=True),
    ),
    ("halving maximum",),
)  # fmt: skip
MIXED = {
    "Mixed_5b": _a(32), "Mixed_5c": _a(64), "Mixed_5d": _a(64), "Mixed_6a": _B, "Mixed_6b": _c(128),
    "Mixed_6c": _c(160), "Mixed_6d": _c(160), "Mixed_6e": _c(192), "Mixed_7a": _D, "Mixed_7b": _e(AVERAGE),
    "Mixed_7c": _e(MAXIMUM),
}  # fmt: skip


class Mixed(nn.Module):
    """A block: chains of convolutions side by side, their ends joined over the channels."""

    def __init__(self, inputs: int, chains: tuple[Chain, ...]):
        super().__init__()
        self.chains = chains
        self.outputs = 0
        for chain in chains:
            width = inputs
            for link in chain:
                if isinstance(link, Conv):
                    self.add_module(link.name, _convolution(width, link))
                    width = link.outputs
                elif isinstance(link, tuple):
                    for end in link:
                        self.add_module(end.name, _convolution(width, end))
                    width = sum(end.outputs for end in link)
            self.outputs += width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._run(x, chain) for chain in self.chains], 1)

    def _run(self, x: Tensor, chain: Chain) -> Tensor:
        for link in chain:
            if isinstance(link, Conv):
                x = self._apply_conv(x, link)
            elif isinstance(link, tuple):
                x = torch.cat([self._apply_conv(x, end) for end in link], 1)
            elif link == AVERAGE:
                x = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            elif link == MAXIMUM:
                x = F.max_pool2d(x, 3, stride=1, padding=1)
            else:
                x = F.max_pool2d(x, 3, stride=2)
        return x

    def _apply_conv(self, x: Tensor, link: Conv) -> Tensor:
        return F.relu_(self.get_submodule(link.name)(x))


class Inception(nn.Module):
    """Features and logits of images.

    Every convolution's batch norm is folded into its weight and bias when the weights are loaded.

    Attributes:
        sha256: of the weights file.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = nn.Conv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = nn.Conv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = nn.Conv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = nn.Conv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = nn.Conv2d(80, 192, 3)
        width = 192
        for name, chains in MIXED.items():
            block = Mixed(width, chains)
            self.add_module(name, block)
            width = block.outputs
        self.fc = nn.Linear(FEATURES, CLASSES)
        self.sha256 = ""
        self.eval().requires_grad_(False)

    @classmethod
    def open(cls, path: str | Path | None) -> Inception:
        """Load the weights file.

        Raises:
            UserError: no path, no such file, a truncated or altered one, other weights; says where to get it.
        """
        if absent := absent_inception(path):
            raise UserError(absent)
        model = cls()
        try:
            model.sha256 = check_named_hash(path)
            model.load_folded(read_tensors(path))
        except UserError as error:
            raise UserError(f"Inception-v3 weights: {error}; {ADVICE}") from None
        return model

    @property
    def published(self) -> bool:
        """Whether these are the weights whose numbers the field compares."""
        return self.sha256.startswith(PUBLISHED_HASH)

    def convolutions(self) -> Iterator[tuple[str, nn.Conv2d]]:
        """Every convolution with its name in the weights file."""
        yield from ((name, module) for name, module in self.named_modules() if isinstance(module, nn.Conv2d))

    @torch.no_grad()
    def load_folded(self, state: dict[str, Tensor]) -> None:
        """Take a state dict of convolutions with batch norms: y = γ (W x − mean) / √(var + 0.001) + β.

        Raises:
            UserError: an entry that is missing, of another shape, or that makes weights that are no finite numbers.
        """
        for name, convolution in self.convolutions():
            weight = _entry(state, f"{name}.conv.weight", convolution.weight.shape)
            gamma, beta, mean, variance = (
                _entry(state, f"{name}.bn.{part}", convolution.bias.shape)
                for part in ("weight", "bias", "running_mean", "running_var")
            )
            gain = gamma / (variance + BATCH_NORM_EPS).sqrt()
            convolution.weight.copy_(weight * gain[:, None, None, None])
            convolution.bias.copy_(beta - mean * gain)
        self.fc.weight.copy_(_entry(state, "fc.weight", self.fc.weight.shape))
        self.fc.bias.copy_(_entry(state, "fc.bias", self.fc.bias.shape))
        for name, parameter in self.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise UserError(f"the weights of {name.rpartition('.')[0]!r} hold NaN or infinite values")

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and unbiased logits, in float32 whatever surrounds the call.

        Args:
            images: [N, 3, H, W] uint8 RGB of any size.

        Returns:
            (features [N, 2048] after the last pool, logits [N, 1008] without the classifier's bias, as the Inception
            Score takes them).
        """
        device = images.device.type
        # TF32 convolutions keep 10 bits of the mantissa: 1e-3 in a feature, for distances reported to 1e-2.
        with torch.autocast(device, enabled=False), torch.backends.cudnn.flags(True, allow_tf32=False):
            x = (resize_tf1(images.float(), SIDE) - 128) / 128
            x = F.relu_(self.Conv2d_1a_3x3(x))
            x = F.relu_(self.Conv2d_2a_3x3(x))
            x = F.max_pool2d(F.relu_(self.Conv2d_2b_3x3(x)), 3, stride=2)
            x = F.relu_(self.Conv2d_3b_1x1(x))
            x = F.max_pool2d(F.relu_(self.Conv2d_4a_3x3(x)), 3, stride=2)
            for name in MIXED:
                x = self.get_submodule(name)(x)
            features = x.mean((2, 3))
            return features, F.linear(features, self.fc.weight)


def resize_tf1(images: Tensor, side: int) -> Tensor:
    """Bilinear resize of TensorFlow 1 with corners not aligned: output pixel i lies at i · input/output.

    No half-pixel centres and no antialiasing, unlike every resize of PyTorch.

    Args:
        images: [N, c, H, W] floating point.

    Returns:
        [N, c, side, side].
    """
    for dimension in (3, 2):
        size = images.shape[dimension]
        at = torch.arange(side, device=images.device, dtype=torch.float32) * (size / side)
        low = at.long().clamp_max(size - 1)
        weight = (at - low).to(images.dtype)
        below = images.index_select(dimension, low)
        above = images.index_select(dimension, (low + 1).clamp_max(size - 1))
        images = torch.lerp(below, above, weight if dimension == 3 else weight[:, None])
    return images


def _convolution(inputs: int, link: Conv) -> nn.Conv2d:
    kernel = (link.kernel, link.kernel) if isinstance(link.kernel, int) else link.kernel
    padding = (0, 0) if link.halves else (kernel[0] // 2, kernel[1] // 2)
    return nn.Conv2d(inputs, link.outputs, kernel, stride=2 if link.halves else 1, padding=padding)


def _entry(state: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    if name not in state:
        raise UserError(f"{name!r} is missing: this is not an Inception-v3 in the FID layout")
    if state[name].shape != shape:
        raise UserError(f"{name!r} has shape {list(state[name].shape)}, expected {list(shape)}")
    return state[name].double()

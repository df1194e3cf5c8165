"""LPIPS on VGG16 features (Zhang et al. 2018), the perceptual term of the reconstruction loss.

The network is defined here, its weights are read from files: torchvision's VGG16 state dict (`features.N.weight`) and
the LPIPS 1×1 layers (`lin0.model.1.weight` …). Images are in [0, 1], as in the published configuration.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import unite_kernels as uk
from unite_fast.config import LpipsConfig
from unite_fast.errors import UserError, require_none
from unite_fast.weights import check_named_hash, read_tensors
from unite_kernels.dispatch import use_triton

# VGG16's convolutions by their index in torchvision's `features`, grouped by the maps LPIPS reads:
# relu1_2, relu2_2, relu3_3, relu4_3, relu5_3. A 2×2 max pool stands between the groups.
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
CHANNELS = (64, 128, 256, 512, 512)
# LPIPS's ScalingLayer: ImageNet statistics expressed for images in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
SOURCES = {
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "linear": "lpips/weights/v0.1/vgg.pth of https://github.com/richzhang/PerceptualSimilarity",
}
OFF = "set objective.lpips.weight = 0 to train without the perceptual term"


class VggFeatures(nn.Module):
    """The five feature maps of VGG16 after ReLU: [B, 3, H, W] -> list of [B, c, H/2^s, W/2^s], channels-last."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.ModuleList()
        inputs = 3
        for indices, channels in zip(STAGES, CHANNELS, strict=True):
            stage = nn.ModuleList()
            for _ in indices:
                stage.append(nn.Conv2d(inputs, channels, 3, padding=1))
                inputs = channels
            self.convolutions.append(stage)

    def cast(self, dtype: torch.dtype) -> None:
        """Store the filters in autocast's dtype, to cast them once and not in every pass; for use under autocast."""
        for convolution in self.convolutions.modules():
            if isinstance(convolution, nn.Conv2d):
                convolution.weight.data = convolution.weight.data.to(dtype)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = images.contiguous(memory_format=torch.channels_last)
        maps = []
        for *stage, last in self.convolutions[:-1]:
            for convolution in stage:
                x = _conv_relu(convolution, x)
            found, x = _conv_relu_max_pool(last, x)
            maps.append(found)
        for convolution in self.convolutions[-1]:
            x = _conv_relu(convolution, x)
        return [*maps, x]


class Lpips(nn.Module):
    """LPIPS distance: unit-normalised feature differences, squared, weighted by channel, averaged over space, summed.

    Attributes:
        sha256: of the weights files, by the key that names them.
    """

    def __init__(self, *, rescale: bool = False, dropout: bool = False):
        super().__init__()
        self.sha256: dict[str, str] = {}
        self.rescale = rescale
        self.dropout = dropout
        self.features = VggFeatures()
        self.weights = nn.ParameterList(torch.ones(channels) for channels in CHANNELS)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False)

    @classmethod
    def from_config(cls, config: LpipsConfig) -> Lpips:
        """Build and load the weights that the configuration names.

        Raises:
            UserError: paths that are not given or missing, all of them; one that is unreadable or holds other weights.
                The message names the key that turns the term off.
        """
        require_none(absent_weights(config), "LPIPS needs what is not there")
        model = cls(rescale=config.rescale, dropout=config.dropout)
        try:
            model.sha256 = {"vgg": check_named_hash(config.vgg), "linear": check_named_hash(config.linear)}
            model.load_vgg(read_tensors(config.vgg))
            model.load_linear(read_tensors(config.linear))
        except UserError as error:
            raise UserError(f"objective.lpips: {error}; {OFF}") from None
        return model.to(memory_format=torch.channels_last)

    def load_vgg(self, state: dict[str, Tensor]) -> None:
        """Take the convolutions of a torchvision VGG16 state dict."""
        for stage, indices in zip(self.features.convolutions, STAGES, strict=True):
            for convolution, index in zip(stage, indices, strict=True):
                _assign(convolution.weight, state, f"features.{index}.weight")
                _assign(convolution.bias, state, f"features.{index}.bias")

    def load_linear(self, state: dict[str, Tensor]) -> None:
        """Take the 1×1 layers of an LPIPS state dict, `lin0.model.1.weight` [1, c, 1, 1] … `lin4.model.1.weight`."""
        for index, weight in enumerate(self.weights):
            _assign(weight, state, f"lin{index}.model.1.weight")

    def forward(self, target: Tensor, image: Tensor) -> Tensor:
        """Mean distance of two batches [B, 3, H, W] in [0, 1]; the gradient flows into `image` only."""
        return self.distances(target, image).mean()

    def distances(self, target: Tensor, image: Tensor) -> Tensor:
        """Distance of each pair, [B]; see `forward`."""
        with torch.no_grad():
            target_maps = self.features(self._scaled(target))
        total = torch.zeros(len(image), device=image.device)
        for index, (a, b) in enumerate(zip(target_maps, self.features(self._scaled(image)), strict=True)):
            weight = self.weights[index]
            if self.dropout:
                difference = (_unit(a) - _unit(b)).square()
                total = total + F.conv2d(F.dropout(difference, 0.5), weight.view(1, -1, 1, 1)).mean((1, 2, 3))
            else:
                total = total + uk.lpips_distance(a, b, weight)
        return total

    def _scaled(self, images: Tensor) -> Tensor:
        return ((2 * images - 1 if self.rescale else images) - self.shift) / self.scale


def absent_weights(config: LpipsConfig) -> list[str]:
    """One sentence for each of LPIPS's files that is not given or does not exist: what to do about it."""
    absent = []
    for key, path in (("vgg", config.vgg), ("linear", config.linear)):
        if path is None:
            absent.append(f"objective.lpips.{key} is not set; get {SOURCES[key]} and give its path, or {OFF}")
        elif not Path(path).is_file():
            absent.append(f"objective.lpips.{key}: no file {path}; get {SOURCES[key]} and put it there, or {OFF}")
    return absent


def _conv_relu(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """relu(convolution(x))."""
    product, bias = _convolve(convolution, x)
    return _relu_(product) if bias is None else uk.bias_relu(product, bias)


def _conv_relu_max_pool(convolution: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """`_conv_relu`, and its 2×2 max pool."""
    product, bias = _convolve(convolution, x)
    if bias is not None:
        return uk.bias_relu_max_pool(product, bias)
    found = _relu_(product)
    return found, F.max_pool2d(found, 2)


def _relu_(product: Tensor) -> Tensor:
    """In place, as no backward pass needs a convolution's output: 0.96 of LPIPS's time on a CPU at 64×64 pixels."""
    return F.relu(product, inplace=True)


def _convolve(convolution: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A convolution, and the bias if the fused operator that follows is to add it.

    cuDNN writes a convolution's result and adds the bias in a separate pass. On a CPU the convolution adds it on the
    way: moving it to another operator there made LPIPS 3 % slower.
    """
    if use_triton(x):
        product = F.conv2d(x, convolution.weight, padding=1)
        # cuDNN keeps the order of memory; with torch.backends.cudnn.enabled = False PyTorch's own convolution does not.
        return product.contiguous(memory_format=torch.channels_last), convolution.bias
    return convolution(x), None


def _unit(features: Tensor) -> Tensor:
    """Features over their channel norm; 1e-10 is LPIPS's own."""
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def _assign(parameter: Tensor, state: dict[str, Tensor], name: str) -> None:
    if name not in state:
        raise UserError(f"{name!r} is missing from the weights")
    value = state[name]
    if value.numel() != parameter.numel():
        raise UserError(f"{name!r} has shape {list(value.shape)}, expected {list(parameter.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise UserError(f"{name!r} holds NaN or infinite values")
    parameter.data.copy_(value.reshape(parameter.shape))

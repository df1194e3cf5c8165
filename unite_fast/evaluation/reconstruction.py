"""How close reconstructions are to their originals, on pixels in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from unite_fast.errors import UserError

# An error of 1e-10 (100 dB) is far under one 8-bit step (1/255 in one value of a 256×256 image: 101 dB); without a
# floor one identical pair would make the mean infinite and the record no valid JSON.
MSE_FLOOR = 1e-10


def unit_images(images: Tensor, what: str = "images") -> Tensor:
    """Images as float32 in [0, 1] on the CPU.

    Args:
        images: [N, 3, H, W], uint8 in 0..255 or floating point nominally in [0, 1]; values outside are clipped.
        what: name of the images in error messages.

    Raises:
        UserError: another shape or dtype, no image, or images with NaN or infinite values (says how many).
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise UserError(f"{what} must have the shape [N, 3, height, width], got {list(images.shape)}")
    if len(images) == 0:
        raise UserError(f"no {what}: give at least one image")
    if images.dtype == torch.uint8:
        return images.cpu().float() / 255
    if not images.is_floating_point():
        raise UserError(f"{what} must be uint8 in 0..255 or floating point in [0, 1], got {images.dtype}")
    images = images.detach().float().cpu()
    require_finite(images, what)
    return images.clamp(0, 1)


def require_finite(images: Tensor, what: str, otherwise: str = "") -> None:
    """Raise a UserError that says how many images [N, …] hold NaN or infinite values; `otherwise` ends it."""
    bad = int((~torch.isfinite(images)).flatten(1).any(1).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(images)} {what} contain NaN or infinite values: the network that made them has diverged, "
            f"go back to an earlier checkpoint or lower the learning rate{otherwise}"
        )


def psnr(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, -10 log10(mean (x - x̂)²) dB, data range 1.

    The mean runs over the 3·H·W values of one image. Both sides are clipped to [0, 1], nothing is rounded to 8 bits,
    and identical images read 100 dB.

    Args:
        originals, reconstructions: [N, 3, H, W], uint8 or floating point.

    Returns:
        [N] float64, dB.

    Raises:
        UserError: shapes that differ, wrong dtype, NaN images.
    """
    return -10 * _difference(originals, reconstructions).square().mean(1).clamp_min(MSE_FLOOR).log10()


def l1(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean absolute error of each image, mean |x - x̂|, both clipped to [0, 1].

    Args:
        originals, reconstructions: [N, 3, H, W], uint8 or floating point.

    Returns:
        [N] float64.

    Raises:
        UserError: shapes that differ, wrong dtype, NaN images.
    """
    return _difference(originals, reconstructions).abs().mean(1)


def summarise(psnr: Tensor, l1: Tensor) -> dict[str, float | int]:
    """Means over images, ready for `summary.json`.

    `psnr` is the mean of the per-image PSNR. (The PSNR of the pooled error, which some papers report, is lower: it is
    ruled by the worst images.)

    Args:
        psnr, l1: of each image, [N] float64.

    Returns:
        psnr (dB), psnr_std (dB, over images; 0 for one image), psnr_worst (dB), l1, and images_reconstructed, N.
    """
    return {
        "psnr": float(psnr.mean()),
        "psnr_std": float(psnr.std(correction=0)),
        "psnr_worst": float(psnr.min()),
        "l1": float(l1.mean()),
        "images_reconstructed": len(psnr),
    }


def _difference(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """x - x̂ as [N, 3·H·W] float64."""
    if originals.shape != reconstructions.shape:
        raise UserError(
            f"originals {list(originals.shape)} and reconstructions {list(reconstructions.shape)} must have one shape"
        )
    return (
        unit_images(originals, "originals").double() - unit_images(reconstructions, "reconstructions").double()
    ).flatten(1)

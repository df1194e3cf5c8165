"""Reconstruction metrics against closed forms and torchmetrics."""

import json
import math

import pytest
import torch

from unite_fast.errors import UserError
from unite_fast.evaluation.reconstruction import l1, psnr, summarise, unit_images


def _random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_constant_error_closed_form():
    originals = torch.full((2, 3, 8, 8), 0.5)
    reconstructions = originals.clone()
    reconstructions[0] += 0.1
    reconstructions[1] -= 0.01
    torch.testing.assert_close(
        psnr(originals, reconstructions), torch.tensor([20.0, 40.0], dtype=torch.float64), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        l1(originals, reconstructions), torch.tensor([0.1, 0.01], dtype=torch.float64), rtol=1e-5, atol=0
    )
    metrics = summarise(psnr(originals, reconstructions), l1(originals, reconstructions))
    assert metrics["psnr"] == pytest.approx(30, rel=1e-5)  # mean of the decibels, not decibels of the mean (22.97)
    assert metrics["psnr_std"] == pytest.approx(10, rel=1e-5)
    assert metrics["psnr_worst"] == pytest.approx(20, rel=1e-5)
    assert metrics["l1"] == pytest.approx(0.055, rel=1e-5)
    assert metrics["images_reconstructed"] == 2


def test_agrees_with_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.image")
    originals, reconstructions = _random(6, 3, 16, 12), _random(6, 3, 16, 12, seed=1)
    expected = functional.peak_signal_noise_ratio(
        reconstructions, originals, data_range=1.0, dim=(1, 2, 3), reduction="none"
    )
    torch.testing.assert_close(psnr(originals, reconstructions).float(), expected)


def test_both_sides_are_clipped():
    black, white = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    assert psnr(black - 3, black).item() == 100
    assert l1(white + 5, black - 5).item() == 1
    assert psnr(white, black).item() == 0


def test_identical_images_stay_finite():
    images = _random(3, 3, 8, 8)
    metrics = summarise(psnr(images, images), l1(images, images))
    assert metrics["psnr"] == 100 and metrics["l1"] == 0
    json.dumps(metrics, allow_nan=False)


def test_uint8_and_float_are_the_same_images():
    levels = (_random(4, 3, 8, 8) * 255).round()
    others = (_random(4, 3, 8, 8, seed=1) * 255).round()
    torch.testing.assert_close(psnr(levels.byte(), others.byte()), psnr(levels / 255, others / 255))
    torch.testing.assert_close(psnr(levels.byte(), others / 255), psnr(levels / 255, others / 255))


def test_bfloat16_and_gradients_are_accepted():
    originals = _random(2, 3, 8, 8).bfloat16()
    assert not psnr(originals, originals.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), r"shape \[N, 3, height, width\]"),
        (torch.zeros(2, 1, 8, 8), r"got \[2, 1, 8, 8\]"),
        (torch.zeros(0, 3, 8, 8), "at least one image"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "uint8"),
        (torch.full((2, 3, 8, 8), math.nan), "2 of 2 images contain NaN"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(UserError, match=message):
        unit_images(images)


def test_nan_images_are_counted_and_shapes_compared():
    originals = _random(5, 3, 8, 8)
    broken = originals.clone()
    broken[1, 0, 0, 0], broken[3, 2] = math.nan, math.inf
    with pytest.raises(UserError, match="2 of 5 reconstructions"):
        psnr(originals, broken)
    with pytest.raises(UserError, match="one shape"):
        l1(originals, originals[:1])

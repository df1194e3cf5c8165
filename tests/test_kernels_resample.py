"""ADM's crop against Pillow, bit for bit, on both backends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_trees import picture
from kernel_testing import DEVICE, on_backend
from PIL import Image, __version__
from torch.library import opcheck

import unite_kernels as uk
from unite_kernels import resample
from unite_kernels.resample import _centre_crop, _Tables, crop_plan

TALL_FIRST = int(__version__.split(".")[0]) >= 13
# (width, height, side): none needed, no halving, one, several; odd sizes at every stage; enlarged; wide and tall.
SHAPES = [
    (32, 32, 32), (48, 32, 32), (33, 31, 32), (63, 64, 32), (64, 64, 32), (65, 97, 32), (127, 200, 32), (129, 257, 32),
    (300, 41, 16), (17, 131, 16), (20, 9, 16), (1, 5, 8), (5, 1, 8), (90, 67, 24), (255, 129, 16), (141, 149, 9),
    (7, 301, 5),
]  # fmt: skip


def by_pillow(image: Image.Image, side: int) -> np.ndarray:
    """The protocol in Pillow's own functions."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize(tuple(round(length * scale) for length in image.size), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


def batch(images: list[Image.Image]) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    arrays = [np.asarray(image) for image in images]
    flat = np.concatenate([array.ravel() for array in arrays])
    return torch.from_numpy(flat).to(DEVICE), [array.shape[:2] for array in arrays]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("width", "height", "side"), SHAPES)
def test_against_pillow(backend, width, height, side):
    image = picture(width, height, seed=width + height)
    with on_backend(backend):
        found = uk.centre_crop(*batch([image]), side, tall_first=TALL_FIRST)
    assert np.array_equal(found[0].cpu().numpy(), by_pillow(image, side))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_extreme_pixels(backend):
    """Overshoots of the cubic are cut at 0 and 255."""
    values = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (61, 83, 3), p=(0.3, 0.7))
    image = Image.fromarray(values)
    with on_backend(backend):
        found = uk.centre_crop(*batch([image]), 32)
    assert np.array_equal(found[0].cpu().numpy(), by_pillow(image, 32))


@pytest.mark.parametrize("tall_first", [False, True])
def test_batches_of_unlike_images(tall_first):
    """Other numbers of passes side by side, and both orders of them."""
    images = [picture(*size, seed=i) for i, size in enumerate([(16, 16), (90, 67), (20, 200), (16, 40), (90, 67)])]
    pixels, sizes = batch(images)
    results = []
    for backend in ("torch", "triton"):
        with on_backend(backend):
            results.append(uk.centre_crop(pixels, sizes, 16, tall_first=tall_first))
            alone = [uk.centre_crop(*batch([image]), 16, tall_first=tall_first)[0] for image in images]
        assert torch.equal(results[-1], torch.stack(alone))
    assert torch.equal(*results)


def test_plans_that_are_forgotten_within_a_batch(monkeypatch):
    """As in a batch of more sizes than `crop_plan` keeps."""
    images = [picture(30 + 3 * i % 11, 20 + i % 7, seed=i) for i in range(12)]
    expected = np.stack([by_pillow(image, 8) for image in images])
    monkeypatch.setattr(resample, "crop_plan", crop_plan.__wrapped__)
    with on_backend("triton"):
        found = uk.centre_crop(*batch(images), 8, tall_first=TALL_FIRST)
    assert np.array_equal(found.cpu().numpy(), expected)


def test_orders_differ_for_tall_images_alone():
    for size in ((40, 300), (300, 40), (64, 64)):
        pixels, sizes = batch([picture(*size)])
        assert torch.equal(*(uk.centre_crop(pixels, sizes, 32, tall_first=order) for order in (False, True))) == (
            size != (40, 300)
        )


def test_only_what_the_crop_keeps_is_resampled():
    plan = crop_plan(375, 500, 256)
    assert plan.rows == (0, 375)
    assert plan.columns[0] > 55 and plan.columns[1] < 445
    across, down = plan.passes
    assert not across.vertical and down.vertical
    assert across.weights.shape == (256, 6) == down.weights.shape
    for part in plan.passes:
        assert int(part.first.min()) == 0
        assert int(part.first.max()) + 6 == (375 if part.vertical else plan.columns[1] - plan.columns[0])


def test_no_images():
    for backend in ("torch", "triton"):
        with on_backend(backend):
            assert uk.centre_crop(torch.zeros(0, dtype=torch.uint8, device=DEVICE), [], 8).shape == (0, 8, 8, 3)


def test_opcheck():
    pixels, sizes = batch([picture(20, 30), picture(9, 9)])
    tables = _Tables(sizes, 8, False)
    parts = (tables.table, torch.cat(tables.firsts), torch.cat(tables.weights))
    opcheck(_centre_crop.registered, (pixels, *(x.to(DEVICE) for x in parts), 8, tables.scratch, tables.blocks))


@pytest.mark.parametrize(
    ("error", "sentence", "arguments"),
    [
        (TypeError, "pixels are torch.float32", (torch.zeros(12), [(2, 2)], 2)),
        (ValueError, r"take \(15,\)", (torch.zeros(12, dtype=torch.uint8), [(5, 1)], 2)),
        (ValueError, "none may be below 1", (torch.zeros(12, dtype=torch.uint8), [(2, 2)], 0)),
        (ValueError, "strides", (torch.zeros(24, dtype=torch.uint8)[::2], [(2, 2)], 2)),
    ],
)
def test_refuses(error, sentence, arguments):
    with pytest.raises(error, match=f"centre_crop: .*{sentence}"):
        uk.centre_crop(*arguments)

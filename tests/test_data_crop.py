"""The ADM crop and the colour modes it is given."""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib

import numpy as np
import pytest
from data_trees import picture
from PIL import Image

from unite_fast.data.crop import MAX_PIXELS, WrongSizeError, centre_crop, decode


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def cubic(x: float) -> float:
    """Keys' kernel with a = -1/2."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def resample_rows(values, size, kernel, reach):
    """Antialiased resampling of axis 0 in float64, rounded to 8 bits as between Pillow's two passes."""
    stretch = len(values) / size
    width = max(stretch, 1.0)
    result = np.empty((size, *values.shape[1:]))
    for i in range(size):
        centre = (i + 0.5) * stretch
        first = max(int(centre - reach * width + 0.5), 0)
        last = min(int(centre + reach * width + 0.5), len(values))
        weights = np.array([kernel((j + 0.5 - centre) / width) for j in range(first, last)])
        result[i] = np.tensordot(weights / weights.sum(), values[first:last], 1)
    return np.floor(result.clip(0, 255) + 0.5)


def resample(values, height, width, kernel, reach, rows_first):
    if rows_first:
        values = resample_rows(values, height, kernel, reach)
    values = resample_rows(values.swapaxes(0, 1), width, kernel, reach).swapaxes(0, 1)
    return values if rows_first else resample_rows(values, height, kernel, reach)


def protocol(values: np.ndarray, size: int, rows_first: bool) -> np.ndarray:
    """ADM's centre crop on an array [h, w, 3], without Pillow."""
    values = values.astype(np.float64)
    while min(values.shape[:2]) >= 2 * size:
        values = resample(values, values.shape[0] // 2, values.shape[1] // 2, box, 0.5, rows_first)
    scale = size / min(values.shape[:2])
    height, width = (round(side * scale) for side in values.shape[:2])
    values = resample(values, height, width, cubic, 2.0, rows_first)
    top, left = (height - size) // 2, (width - size) // 2
    return values[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (32, 32, 32), (33, 31, 32), (63, 64, 32), (64, 64, 32), (65, 97, 32), (127, 200, 32), (129, 257, 32),
        (300, 40, 16), (17, 131, 16), (20, 9, 16), (1, 5, 8), (90, 67, 24),
    ],
)  # fmt: skip
def test_adm_crop_against_float_arithmetic(width, height, size):
    image = picture(width, height, seed=width + height)
    found = centre_crop(np.asarray(image), size).astype(int)
    assert found.shape == (size, size, 3)
    # Pillow 13 resizes images more than about 2.5 times as high as wide vertically first, all others horizontally.
    orders = (False, True) if height > 2 * width else (False,)
    candidates = [protocol(np.asarray(image), size, rows_first) for rows_first in orders]
    difference = min((np.abs(found - expected) for expected in candidates), key=np.mean)
    # Pillow's weights are fixed-point numbers of 22 bits: only ties of the rounding fall the other way, by one a pass.
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.02


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (500, 375, 256), (500, 375, 64), (131, 517, 48), (97, 40, 64), (40, 301, 32), (641, 33, 32), (255, 257, 32),
        (1, 9, 8), (64, 48, 48), (64, 64, 32), (1027, 770, 128), (301, 44, 5),
    ],
)  # fmt: skip
def test_adm_crop_bit_for_bit_with_pillow(width, height, size, monkeypatch):
    image = picture(width, height)
    expected = image
    halvings = int(math.log2(min(width, height) / size)) if min(width, height) >= size else 0
    for _ in range(halvings):
        expected = expected.resize((expected.size[0] // 2, expected.size[1] // 2), Image.Resampling.BOX)
    short = min(expected.size)
    target = tuple(round(side * (size / short)) for side in expected.size)
    array = np.array(expected.resize(target, Image.Resampling.BICUBIC))
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    expected = array[top : top + size, left : left + size]
    assert np.array_equal(decode(encoded(image), size, "adm"), expected)
    monkeypatch.setattr("unite_fast.data.resample.STRIP", 1000)  # many strips, the last one narrower
    assert np.array_equal(decode(encoded(image), size, "adm"), expected)


def test_no_crop_keeps_pixels():
    image = picture(24, 24)
    assert np.array_equal(decode(encoded(image), 24, "none"), np.asarray(image))


@pytest.mark.parametrize("size", [(24, 25), (23, 24), (48, 48)])
def test_no_crop_requires_the_size(size):
    with pytest.raises(WrongSizeError, match=f"{size[0]}×{size[1]}.*24×24.*data.crop"):
        decode(encoded(picture(*size)), 24, "none")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_formats(kind):
    found = decode(encoded(picture(16, 16), kind), 16, "none").astype(int)
    lossy = {"JPEG": 60, "GIF": 90, "WEBP": 90}
    assert np.abs(found - np.asarray(picture(16, 16))).mean() <= lossy.get(kind, 0)
    assert found.std() > 30


def test_other_formats_are_refused():
    """EPS would start an interpreter."""
    with pytest.raises(Exception, match="cannot identify"):
        decode(encoded(picture(16, 16), "EPS"), 16, "none")


def test_cmyk():
    inks = np.zeros((8, 8, 4), np.uint8)
    inks[:, 4:] = (255, 0, 0, 0)  # cyan on the right
    for kind in ("JPEG", "TIFF"):
        found = decode(encoded(Image.fromarray(inks, "CMYK"), kind), 8, "none").astype(int)
        assert np.abs(found[:, :3] - (255, 255, 255)).max() < 12
        assert np.abs(found[:, 5:] - (0, 255, 255)).max() < 12


def test_greyscale_and_bilevel():
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    assert np.array_equal(decode(encoded(Image.fromarray(ramp)), 8, "none"), np.repeat(ramp[..., None], 3, -1))
    bilevel = Image.fromarray(ramp).point(lambda value: 255 * (value > 100)).convert("1")
    assert np.unique(decode(encoded(bilevel), 8, "none")).tolist() == [0, 255]


@pytest.mark.parametrize("kind", ["PNG", "PPM", "TIFF"])
def test_16_bit_greyscale_keeps_the_high_byte(kind):
    deep = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)
    found = decode(encoded(Image.fromarray(deep), kind), 8, "none")
    assert np.array_equal(found, np.repeat((deep >> 8)[..., None], 3, -1))


def test_16_bit_rgb_keeps_the_high_byte():
    deep = (np.arange(8 * 8 * 3, dtype=np.uint16) * 341).reshape(8, 8, 3)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(decode(png, 8, "none"), deep >> 8)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_pixels_are_refused(mode):
    with pytest.raises(ValueError, match="no defined range"):
        decode(encoded(Image.new(mode, (8, 8), 1000), "TIFF"), 8, "none")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped(mode):
    image = Image.new("RGBA", (8, 8), (200, 200, 200, 0)).convert(mode)
    assert (decode(encoded(image), 8, "none") == 200).all()


def test_palette_with_transparency():
    image = picture(8, 8).quantize(16)
    expected = np.asarray(image.convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(decode(encoded(image, transparency=bytes([0, 128] * 8)), 8, "none"), expected)
        assert np.array_equal(decode(encoded(image, transparency=3), 8, "none"), expected)


def test_exif_orientation_is_not_applied():
    image = picture(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(encoded(image, "JPEG", exif=exif, quality=95), 8, "none")
    assert np.array_equal(turned, decode(encoded(image, "JPEG", quality=95), 8, "none"))


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (1, 1)])
def test_one_pixel_wide(shape):
    found = decode(encoded(Image.new("RGB", shape, (9, 99, 199))), 16, "adm")
    assert (found == (9, 99, 199)).all()


def bomb(width: int, height: int) -> bytes:
    """A tiny PNG that claims a size."""
    data = bytearray(encoded(Image.new("L", (8, 8))))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


@pytest.mark.parametrize("size", [(30_000, 30_000), (MAX_PIXELS, 2), (11_000, 9_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused(size):
    with pytest.raises((ValueError, Image.DecompressionBombError), match="accepted|limit"):
        decode(bomb(*size), 64, "adm")


def test_long_strip_is_refused():
    with pytest.raises(ValueError, match="long and thin"):
        decode(encoded(Image.new("L", (20_000, 1))), 256, "adm")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_files_are_refused(kind, share):
    data = encoded(picture(64, 64), kind)
    with pytest.raises(Exception):  # noqa: B017 - Pillow's readers raise many kinds
        decode(data[: int(len(data) * share)], 32, "adm")

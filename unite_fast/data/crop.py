"""From encoded bytes to a square RGB array, exactly as the ADM protocol does it.

The protocol (Dhariwal and Nichol 2021, arXiv 2105.05233, also DiT's and UNITE's preprocessing): convert to RGB, halve
with a box filter while the short side is at least twice the target, resize the short side to the target with a bicubic
filter, cut out the centre. FID statistics in the field are computed on these pixels, so every choice below keeps them:

- EXIF orientation is not applied.
- Alpha is dropped, not composited: a transparent pixel keeps the colour stored under it.
- Greyscale, bilevel and palette images become RGB; CMYK and YCCK go through Pillow's own conversion, without ICC.
- 16-bit samples keep their high byte. Pillow does so for 16-bit RGB but clips 16-bit greyscale to white; here both
  keep the high byte.
- Of an animation the first frame counts.
- A JPEG whose pixel data ends early is refused. libjpeg fills what is missing with mid-grey and Pillow says nothing if
  the end-of-image marker is there, so such a file would be trained on as a grey image.
- The resampling is Pillow's, bit for bit, and its order of passes that of the Pillow that is installed. It changed in
  Pillow 13 for images more than about 2.5 times as high as wide (pull request 9549), by one level in about a quarter of
  their pixels; all others are the same in every version.
- 32-bit integer, float and Lab images are refused: their range in 8 bits is a guess.
"""

from __future__ import annotations

import io
import re
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unite_fast.errors import UserError

# 256 MiB as 8-bit RGB, Pillow's own warning limit. It holds for the file and for the resized image, because a
# one-pixel-wide strip becomes wider than any bomb when its short side is brought to the target.
MAX_PIXELS = 2**28 // 3
# The largest accepted image, uncompressed at 16 bits a sample.
MAX_FILE_BYTES = 6 * MAX_PIXELS
# The readers are named because Pillow tries them all otherwise, some of which start other programs (EPS).
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
FIRST_BYTES = {
    b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF",
    b"MM\0*": "TIFF", **{b"P%d" % kind: "PPM" for kind in range(1, 7)},
}  # fmt: skip
EIGHT_BIT = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV"})
END_OF_IMAGE = re.compile(rb"\xff\xd9")  # 24 µs for 80 kB where bytes.find takes 68
# libjpeg reads at most 57 bits ahead of the code it is decoding (MIN_GET_BITS).
READ_AHEAD = bytes(8)


class WrongSizeError(UserError):
    """An image has another size than crop "none" requires."""


def decode(data: bytes, size: int, crop: Literal["adm", "none"]) -> NDArray[np.uint8]:
    """Decode an image and bring it to a square.

    Args:
        data: the encoded file.
        size: side of the square in pixels.
        crop: "adm" resizes and crops; "none" requires size × size pixels.

    Returns:
        [size, size, 3] uint8 RGB, read-only where the decoder owns it.

    Raises:
        WrongSizeError: crop "none" and another size.
        Exception: whatever Pillow raises on a broken file (OSError, SyntaxError, ValueError, struct.error, …);
            ValueError for pixels that have no 8-bit meaning, for decompression bombs and for a JPEG that ends early.
    """
    rgb = decode_whole(data, size, crop)
    return rgb if crop == "none" else centre_crop(rgb, size)


def decode_whole(data: bytes, size: int, crop: Literal["adm", "none"]) -> NDArray[np.uint8]:
    """[h, w, 3], what `decode` crops; raises all that it raises, and does not import PyTorch."""
    exposing = expose_missing_data(data)
    rgb = _open_rgb(data, size, crop)
    if exposing is not data and ends_grey(rgb[-1, -1]):
        _open_rgb(exposing, size, crop)
    if crop == "adm":
        require_croppable(*rgb.shape[:2], size)
    return rgb


def _open_rgb(data: bytes, size: int, crop: Literal["adm", "none"]) -> NDArray[np.uint8]:
    """[h, w, 3] of the whole image; raises as `decode`."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if crop == "none" and (width, height) != (size, size):
            raise WrongSizeError(
                f"is {width}×{height} pixels but data.crop none requires {size}×{size}: set data.crop to adm, "
                f"resize the image, or change model.image_size"
            )
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}×{height} pixels, more than the {MAX_PIXELS} accepted")
        return np.asarray(to_rgb(image))


def ends_grey(last: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether an image's last pixel [..., 3] may stem from a block without data, whose luma libjpeg sets to 128.

    Its colour may come from the blocks around it. One photograph in a hundred ends so by itself.
    """
    return abs(last @ np.array([299, 587, 114]) - 128_000) <= 1_500  # the weights of JPEG's luma, and its rounding


def content_format(data: bytes) -> str | None:
    """Format of a file by its first bytes, one of FORMATS, or None."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((name for start, name in FIRST_BYTES.items() if data.startswith(start)), None)


def expose_missing_data(data: bytes) -> bytes:
    """A file as given, or a JPEG changed so that Pillow fails where it would fill missing pixels with grey. Decoding
    both and comparing their last pixels with grey (`ends_grey`) is what all loaders do alike.

    In a sequential JPEG of one scan the end-of-image marker gives way to zeros, just enough for libjpeg's read-ahead:
    whole pixel data decode as before, and data that end early make the decoder ask for more, which Pillow reports as
    a truncated file. Where no more than the last few bytes are missing the zeros stand for them: a block or two.
    Progressive files are left as they are: without their last scans they are blurred, not grey.

    Args:
        data: an encoded image of any format.

    Returns:
        The bytes to decode.

    Raises:
        ValueError: a JPEG without an end-of-image marker after its pixel data.
    """
    if not data.startswith(b"\xff\xd8"):
        return data
    position, components, sequential = 2, 0, False
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4])
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        segment = data[position + 4 : position + 2 + length]
        position += 2 + length
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(segment) > 5:  # start of frame
            sequential, components = marker <= 0xC1, segment[5]
        if marker == 0xDA:  # start of scan
            end = END_OF_IMAGE.search(data, position)
            if end is None:
                raise ValueError("the file is truncated or overwritten: it has no end-of-image marker")
            one_scan = bool(segment) and segment[0] == components
            return data[: end.start()] + READ_AHEAD if sequential and one_scan else data
    return data  # no JPEG that this function understands; Pillow judges


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any accepted mode, see the module for the choices.

    Raises:
        ValueError: 32-bit integer, float or Lab pixels.
    """
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow opens some 16-bit greyscale files as 32-bit "I"; PNG and PPM have no deeper samples.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode not in EIGHT_BIT:
        raise ValueError(f"pixel mode {image.mode} has no defined range in 8 bits")
    image.load()
    # A transparency entry would only make Pillow warn about what is dropped on purpose.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def centre_crop(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """ADM's centre crop.

    Args:
        image: [h, w, 3].
        size: side of the result.

    Returns:
        [size, size, 3].

    Raises:
        ValueError: as `require_croppable`.
    """
    from unite_fast.data.resample import resample_crop  # imports PyTorch, seconds that checking need not wait

    require_croppable(*image.shape[:2], size)
    return resample_crop(image, size)


def require_croppable(height: int, width: int, size: int) -> None:
    """Refuse what is more work than any photograph.

    Raises:
        ValueError: more than MAX_PIXELS pixels, or so long and thin that they are more with its short side at `size`.
    """
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}×{height} pixels, more than the {MAX_PIXELS} accepted")
    if max(height, width) * size**2 < MAX_PIXELS * min(height, width) / 2:  # halving rounds a side by less than half
        return
    from unite_kernels.resample import crop_sizes  # imports PyTorch

    height, width = crop_sizes(height, width, size)[-1]
    if width * height > MAX_PIXELS:
        raise ValueError(f"too long and thin: {width}×{height} pixels with the short side at {size}")

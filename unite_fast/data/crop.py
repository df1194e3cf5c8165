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
- The resampling is Pillow's, bit for bit. Its order of passes changed in Pillow 13 for images more than about 2.5 times as high as
  wide (pull request 9549), by one level in about a quarter of their pixels; all others are the same in every version. Here it is the order of the
  Pillow that is installed.
- 32-bit integer, float and Lab images are refused: their range in 8 bits is a guess.
"""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unite_fast.data.resample import resample_crop
from unite_fast.errors import UserError
from unite_kernels.resample import crop_sizes

# 256 MiB as 8-bit RGB, Pillow's own warning limit. It holds for the file and for the resized image, because a
# one-pixel-wide strip becomes wider than any bomb when its short side is brought to the target.
MAX_PIXELS = 2**28 // 3
# The largest accepted image, uncompressed at 16 bits a sample.
MAX_FILE_BYTES = 6 * MAX_PIXELS
# The readers are named because Pillow tries them all otherwise, some of which start other programs (EPS).
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
EIGHT_BIT = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV"})


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
            ValueError for pixels that have no 8-bit meaning and for decompression bombs.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if crop == "none" and (width, height) != (size, size):
            raise WrongSizeError(
                f"is {width}×{height} pixels but data.crop none requires {size}×{size}: set data.crop to adm, "
                f"resize the image, or change model.image_size"
            )
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}×{height} pixels, more than the {MAX_PIXELS} accepted")
        rgb = to_rgb(image)
    return np.asarray(rgb) if crop == "none" else centre_crop(np.asarray(rgb), size)


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
    require_croppable(*image.shape[:2], size)
    return resample_crop(image, size)


def require_croppable(height: int, width: int, size: int) -> None:
    """Refuse what is more work than any photograph.

    Raises:
        ValueError: more than MAX_PIXELS pixels, or so long and thin that it has that many with its short side at `size`.
    """
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}×{height} pixels, more than the {MAX_PIXELS} accepted")
    height, width = crop_sizes(height, width, size)[-1]
    if width * height > MAX_PIXELS:
        raise ValueError(f"too long and thin: {width}×{height} pixels with the short side at {size}")

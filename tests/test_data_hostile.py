"""Odd and hostile files, each through the folder, its shards and its pre-cropped shards: the same images, the same
files skipped, counted and named; and what `data check` says of them."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from data_trees import picture, tree, unprivileged  # noqa: F401, a fixture
from PIL import Image

from unite_fast.config import DataConfig
from unite_fast.data.check import check
from unite_fast.data.crop import MAX_FILE_BYTES, expose_missing_data
from unite_fast.data.loader import ImageStream, load_images
from unite_fast.data.prepare import prepare
from unite_fast.data.source import open_source

SIZE = 16
FILES = 9  # usable ones beside the one in question
WIDE = 30_000


def saved(format_: str, image: Image.Image, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, format_, **options)
    return data.getvalue()


def jpeg(image: Image.Image, **options) -> bytes:
    return saved("JPEG", image, **{"quality": 90} | options)


def png(image: Image.Image, **options) -> bytes:
    return saved("PNG", image, **options)


def flat(mode: str, colour, width: int = 24, height: int = 20) -> Image.Image:
    return Image.new(mode, (width, height), colour)


def palette_with_transparency() -> bytes:
    image = flat("P", 1)
    image.putpalette([0, 0, 0, 90, 120, 150])
    return png(image, transparency=1)


def deep_rgb() -> bytes:
    return b"P6\n# deep\n24 20\n65535\n" + np.full((20, 24, 3), 40_000, ">u2").tobytes()


def rotated() -> bytes:
    image = flat("RGB", (220, 30, 30), 40, 40)
    image.paste((30, 30, 220), (20, 0, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn it by 90°
    return jpeg(image, exif=exif, subsampling=0)


def bomb() -> bytes:
    """A header that announces 900 million pixels."""
    data = bytearray(png(flat("L", 7)))
    data[16:24] = struct.pack(">II", WIDE, WIDE)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


PHOTO = jpeg(picture(60, 50))
SKIPPED = {  # content -> reason
    "zero.jpg": (b"", "not an image"),
    "text.png": (b"no image at all", "not an image"),
    "cut.jpg": (PHOTO[: len(PHOTO) // 2], "truncated"),
    "cut-in-header.jpg": (PHOTO[:100], "."),
    "cut.png": (png(picture(60, 50))[:2000], "."),
    "cut.gif": (saved("GIF", picture(60, 50).quantize(32))[:500], "trunc"),
    "cut.bmp": (saved("BMP", picture(60, 50))[:5000], "truncated"),
    "cut.ppm": (b"P6\n24 20\n255\n" + bytes(1000), "truncated"),
    "cut.webp": (saved("WEBP", picture(60, 50))[:900], "."),
    # Pillow fills what is missing with grey and says nothing.
    "cut-and-closed.jpg": (PHOTO[: len(PHOTO) // 2] + b"\xff\xd9", "truncated"),
    "cut-and-filled.jpg": (PHOTO[: len(PHOTO) // 2] + bytes(len(PHOTO) // 2), "truncated"),
    "bomb.png": (bomb(), "exceeds limit of .* decompression bomb"),
    "float.tif": (saved("TIFF", flat("F", 0.5)), "pixel mode F"),
}
CONVERTED = {  # content, pixel it gives in the upper left, what check says
    "named-wrong.JPEG": (png(flat("RGB", (9, 99, 199))), (9, 99, 199), {"content is PNG"}),
    "cmyk.jpg": (jpeg(flat("CMYK", (0, 200, 100, 50)), quality=100), (205, 44, 125), {"CMYK"}),
    "grey.jpg": (jpeg(flat("L", 77)), (77, 77, 77), {"greyscale"}),
    "bilevel.png": (png(flat("1", 1)), (255, 255, 255), {"greyscale"}),
    "palette.png": (palette_with_transparency(), (90, 120, 150), {"palette", "transparency dropped"}),
    "clear.png": (png(flat("RGBA", (200, 100, 50, 0))), (200, 100, 50), {"transparency dropped"}),
    "deep.png": (png(Image.fromarray(np.full((20, 24), 40_000, np.uint16))), (156,) * 3, {"16-bit", "greyscale"}),
    "deep.ppm": (deep_rgb(), (156, 156, 156), {"16-bit"}),
    "rotated.jpg": (rotated(), (220, 30, 30), {"EXIF orientation 6 not applied"}),
    "thin.png": (png(flat("RGB", (5, 6, 7), 1, 40)), (5, 6, 7), set()),
    "wide.png": (png(flat("RGB", (5, 6, 7), WIDE, 8)), (5, 6, 7), set()),
    "animated.gif": (
        saved("GIF", flat("RGB", (9, 99, 199)).quantize(2), save_all=True, append_images=[flat("P", 0)]),
        (9, 99, 199),
        {"palette", "first of several frames"},
    ),
}


def data_set(root: Path, name: str, content: bytes) -> Path:
    tree(root, (3, 3, 3), SIZE)
    (root / "c1" / name).write_bytes(content)
    return root


def stream(root, **options) -> ImageStream:
    config = DataConfig(path=str(root), crop="adm", flip=True, workers=0, max_bad_share=0.5, **options)
    count = FILES + 1
    return ImageStream(
        config, image_size=SIZE, num_classes=3, seed=3, global_batch=count, micro_batch=count, accumulation=1
    )


def served(root) -> tuple[list, dict[str, str]]:
    """Three epochs, and reasons by class/file."""
    with stream(root) as images:
        batches = [next(images) for _ in range(3)]
        # From the end: a temporary folder's random name may itself end in what looks like a class.
        names = [re.search(r"\b(c\d/[\w.-]+)\)?$", path)[1] for path in images.bad_files]
        return batches, dict(zip(names, images.bad_files.values(), strict=True))


def every_form(root: Path) -> list[Path]:
    """The folder, its shards, and shards cropped ahead."""
    for name, size in (("shards", None), ("cropped", SIZE)):
        prepare(open_source(root, 3), root.parent / name, size=size, shard_images=4)
    return [root, root.parent / "shards", root.parent / "cropped"]


@pytest.mark.parametrize("name", SKIPPED)
def test_skipped_alike_everywhere(tmp_path, name):
    content, words = SKIPPED[name]
    forms = every_form(data_set(tmp_path / "d", name, content))
    expected, reasons = served(forms[0])
    assert list(reasons) == [f"c1/{name}"]
    assert re.search(words, reasons[f"c1/{name}"])
    for form in forms:
        batches, again = served(form)
        assert again == reasons
        for a, b in zip(batches, expected, strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.indices, b.indices)
        config = DataConfig(path="", workers=1, max_bad_share=0.5)
        held_out, _ = load_images(form, config, image_size=SIZE, num_classes=3)
        assert len(held_out) == FILES
        report = check(open_source(form, 3, skip=False), size=SIZE)
        assert report.skip == reasons
        report.save()
        left = open_source(form, 3, image_size=SIZE)
        assert (len(left), left.skipped) == (FILES, reasons)


@pytest.mark.parametrize("name", CONVERTED)
def test_converted_alike_everywhere(tmp_path, name):
    content, colour, findings = CONVERTED[name]
    forms = every_form(data_set(tmp_path / "d", name, content))
    expected, _ = served(forms[0])
    rank = sorted([f"{i:03d}.png" for i in range(3)] + [name]).index(name)
    for form in forms:
        batches, reasons = served(form)
        assert reasons == {}
        assert all(sorted(batch.indices.tolist()) == list(range(FILES + 1)) for batch in batches)
        assert all(torch.equal(a.images, b.images) for a, b in zip(batches, expected))
        held_out, _ = load_images(form, DataConfig(path="", workers=1), image_size=SIZE, num_classes=3)
        image = held_out[min(1 + 3 * rank, FILES)].numpy().astype(int)  # classes take turns; c1 has one more
        assert np.abs(image[:, [0, -1], [0, 0]].T - colour).max() <= 2  # both left corners, JPEG's rounding
    for form in forms[:2]:
        report = check(open_source(form, 3, skip=False), size=SIZE)
        said = report.converted.get(f"c1/{name}", []) + report.mislabelled.get(f"c1/{name}", [])
        assert set(said) == findings
        assert report.whole


def test_a_strip_is_usable_at_some_sizes_only(tmp_path):
    root = data_set(tmp_path / "d", "strip.png", png(flat("L", 9, 1, WIDE)))
    assert check(open_source(root, 3), size=SIZE).whole
    assert "too long and thin: 256×" in check(open_source(root, 3), size=256).skip["c1/strip.png"]


def test_oversized_file(tmp_path):
    root = data_set(tmp_path / "d", "huge.png", b"")
    with open(root / "c1" / "huge.png", "r+b") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse: takes no space
    for form in every_form(root):
        _, reasons = served(form)
        assert f"{MAX_FILE_BYTES + 1} bytes, more than" in reasons["c1/huge.png"]


def test_unreadable_permissions(unprivileged):  # noqa: F811
    user = os.geteuid()
    if user == 65534:
        os.seteuid(0)
    root = data_set(unprivileged / "d", "secret.png", png(flat("L", 1)))
    served(root)  # imports what is imported late, which another user may be unable to
    (root / "c1" / "secret.png").chmod(0)
    unprivileged.chmod(0o777)
    if user == 65534:
        os.seteuid(65534)
    expected, reasons = served(root)
    assert reasons == {"c1/secret.png": "permission denied"}
    assert check(open_source(root, 3), size=SIZE).skip == reasons
    for form in every_form(root):
        batches, again = served(form)
        assert again == reasons
        assert all(torch.equal(a.images, b.images) for a, b in zip(batches, expected))


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file that gives an input/output error")
def test_input_output_error(tmp_path):
    root = data_set(tmp_path / "d", "dead.png", b"")
    (root / "c1" / "dead.png").unlink()
    (root / "c1" / "dead.png").symlink_to("/proc/self/mem")  # address 0 cannot be read
    for form in every_form(root):
        _, reasons = served(form)
        assert reasons == {"c1/dead.png": "input/output error"}


def test_file_vanishes_in_mid_epoch(tmp_path):
    root = tree(tmp_path / "d", (3, 4, 3), SIZE)
    with stream(root) as images:
        next(images)
        (root / "c1" / "001.png").unlink()
        indices = [next(images).indices for _ in range(3)]
        assert images.bad_files == {str(root / "c1" / "001.png"): "the file has gone"}
    assert all(4 not in batch for batch in indices)


@pytest.mark.parametrize("when", ["before", "in mid-epoch"])
def test_shard_cut_short(tmp_path, when):
    prepare(open_source(tree(tmp_path / "d", (3, 4, 3), SIZE), 3), tmp_path / "s", size=None, shard_images=4)
    source = open_source(tmp_path / "s", 3)
    lost = source.images_of(1)[-2:].tolist()
    expected = {source.name(i) for i in lost}

    def cut() -> None:
        # In the middle of the first lost image, so that one is there in part and one not at all.
        os.truncate(source.shards[1], int(source._offsets[lost[0]]) + 20)

    if when == "before":
        cut()
    with stream(tmp_path / "s") as images:
        if when != "before":
            next(images)
            cut()
        batches = [next(images) for _ in range(3)]
        assert {re.search(r"\((.*)\)", path).group(1) for path in images.bad_files} == expected
        assert all("000001.tar is cut short" in reason for reason in images.bad_files.values())
    assert all(set(lost).isdisjoint(batch.indices.tolist()) for batch in batches)
    assert all((batch.images[:, 1, 0, 0] == batch.indices).all() for batch in batches)  # nothing else in their place
    report = check(open_source(tmp_path / "s", 3, skip=False), size=SIZE)
    assert set(report.skip) == expected
    assert "bytes of" in report.shards["000001.tar"]


def test_shard_vanishes(tmp_path, caplog):
    prepare(open_source(tree(tmp_path / "d", (3, 4, 3), SIZE), 3), tmp_path / "s", size=None, shard_images=4)
    source = open_source(tmp_path / "s", 3)
    os.unlink(source.shards[2])
    with stream(tmp_path / "s") as images:
        next(images)
        assert set(images.bad_files.values()) == {"the file has gone"}
        assert len(images.bad_files) == len(source.images_of(2))
    assert "000002.tar: no such file" in caplog.text
    assert check(open_source(tmp_path / "s", 3, skip=False), size=SIZE).shards == {"000002.tar": "the file has gone"}


def test_flipped_byte_in_a_shard(tmp_path):
    """Uncompressed pixels and much of a JPEG decode whatever they hold; the checksum knows better."""
    prepare(open_source(tree(tmp_path / "d", (3, 4, 3), SIZE), 3), tmp_path / "s", size=SIZE)
    source = open_source(tmp_path / "s", 3)
    with open(source.shards[0], "r+b") as file:
        file.seek(int(source._offsets[5]) + 100)
        file.write(bytes(200))
    _, reasons = served(tmp_path / "s")
    assert reasons == {"c1/002.png": "000000.tar is damaged: wrong checksum"}
    report = check(open_source(tmp_path / "s", 3), size=SIZE)
    assert report.skip == reasons
    assert "checksum" in report.shards["000000.tar"]


def test_whole_jpegs_keep_every_pixel():
    """What exposes missing data must not touch files that lack nothing."""
    random = np.random.default_rng(0)
    for number in range(150):
        image = picture(*map(int, random.integers(1, 90, 2)), number)
        if number % 5 == 0:
            image = flat("RGB", tuple(map(int, random.integers(0, 256, 3))), *image.size)  # the shortest codes
        image = image.convert(("RGB", "L", "CMYK")[number % 3])
        options = dict(
            quality=int(random.integers(5, 101)), subsampling=int(random.integers(3)), optimize=number % 2 == 0,
            progressive=number % 7 == 0, restart_marker_blocks=number % 4,
        )  # fmt: skip
        content = jpeg(image, **options) + (b"", b"junk after the end", PHOTO)[number % 3]
        assert np.array_equal(_pixels(expose_missing_data(content)), _pixels(content)), options
    both_eyes = saved("MPO", picture(60, 50), save_all=True, append_images=[picture(60, 50, 1)])
    assert np.array_equal(_pixels(expose_missing_data(both_eyes)), _pixels(both_eyes))


def test_closed_jpegs_are_refused_wherever_they_were_cut():
    """But for a last few bytes, whose absence hides a block or two."""
    whole = _pixels(PHOTO)
    start = PHOTO.index(b"\xff\xda") + 14
    for end in range(start, len(PHOTO) - 2, 7):
        content = PHOTO[:end].rstrip(b"\xff") + b"\xff\xd9"
        try:
            pixels = _pixels(expose_missing_data(content))
        except OSError:
            continue
        assert end > len(PHOTO) - 64
        # At 4:2:0 blocks come in squares of 16 × 16 pixels, whose colour is smoothed into their neighbours.
        assert (pixels != whole).any(-1).sum() <= 2 * 18 * 18


def _pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))

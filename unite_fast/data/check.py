"""Looking at every image before training does: `unite-fast data check`.

An image counts as unusable exactly when training could not use it: it is read and decoded by the same functions, and
only not cropped, which cannot fail. What training converts without loss of sense, or what is merely suspicious, is
reported and kept.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unite_fast.data.crop import FORMATS, content_format, decode_whole
from unite_fast.data.processes import Holding, spread
from unite_fast.data.shards import ShardFolder
from unite_fast.data.skip_list import CHECK_RECORD
from unite_fast.data.source import ImageSource, reason_of
from unite_fast.writable import require_writable

CHUNK = 256  # images of a class-folder tree that a process takes at a time
DIGEST = 16  # bytes: by chance, two of 10⁷ different files share one with probability 1e-25
ORIENTATION = 0x0112  # EXIF tag
EXTENSION_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "PNG": (".png",), "GIF": (".gif",), "BMP": (".bmp",),
    "WEBP": (".webp",), "TIFF": (".tif", ".tiff"), "PPM": (".ppm", ".pgm"),
}  # fmt: skip


class Finding(NamedTuple):
    """Something to say about one image."""

    image: int
    kind: Literal["skip", "converted", "mislabelled"]
    text: str


@dataclass
class Report:
    """What a check found; names are class/file, lists are in the order of the images."""

    root: Path
    images: int
    size: int
    skip: dict[str, str] = field(default_factory=dict)  # unusable: training leaves them out
    converted: dict[str, list[str]] = field(default_factory=dict)  # used, after a conversion
    mislabelled: dict[str, list[str]] = field(default_factory=dict)  # used; extension or class is in doubt
    shards: dict[str, str] = field(default_factory=dict)  # damaged shards and what is wrong with them

    @property
    def whole(self) -> bool:
        """Nothing is unusable or damaged."""
        return not self.skip and not self.shards

    def save(self) -> Path:
        """Write the record, of which training reads the entry `skip`; returns its path."""
        from unite_fast.weights import write_json

        path = self.root / CHECK_RECORD
        write_json({name: value for name, value in vars(self).items() if name != "root"}, path)
        return path


def check(
    source: ImageSource, *, size: int, jobs: int = 1, advance: Callable[[int], None] = lambda done: None
) -> Report:
    """Read and decode every image, and verify the checksums of shards.

    Args:
        source: opened with skip=False, because a file may have been repaired since.
        size: image size of the runs to come; a very long and thin image is usable at some sizes only.
        jobs: processes.
        advance: told how many images are done.

    Raises:
        UserError: a process died; says over which image.
    """
    if isinstance(source, ShardFolder):
        tasks = [(shard, source.images_of(shard).tolist()) for shard in range(len(source.shards))]
    else:
        tasks = [(None, list(range(i, min(i + CHUNK, len(source))))) for i in range(0, len(source), CHUNK)]
    findings: list[Finding] = []
    digests = np.zeros((len(source), DIGEST), np.uint8)
    report = Report(source.root, len(source), size)
    work = functools.partial(_examine_all, source, size)
    for (shard, images), (found, part, damage) in spread(work, tasks, jobs=jobs, advance=advance, path=source.path):
        findings += found
        digests[images] = part
        if damage:
            report.shards[os.path.basename(source.shards[shard])] = damage
    findings += _same_bytes(source, digests)
    for image, kind, text in sorted(findings):
        if kind == "skip":
            report.skip[source.name(image)] = text
        else:
            getattr(report, kind).setdefault(source.name(image), []).append(text)
    report.shards = dict(sorted(report.shards.items()))
    return report


def require_place(root: Path) -> None:
    """Refuse a folder that cannot take the record, before hours of reading.

    Raises:
        UserError: says what to do about it.
    """
    require_writable(
        root, CHECK_RECORD, f"Make a folder of your own that links to what is in it (mkdir mine && ln -s {root}/* "
        f"mine/), and check and train on that",
    )  # fmt: skip


def _examine_all(
    source: ImageSource, size: int, task: tuple[int | None, list[int]], holding: Holding
) -> tuple[list[Finding], NDArray[np.uint8], str | None]:
    """Findings on some images, a digest of each (zeros where unusable), and what is wrong with their shard."""
    shard, images = task
    findings: list[Finding] = []
    digests = np.zeros((len(images), DIGEST), np.uint8)
    for place, image in enumerate(images):
        holding(image)
        try:
            data = source.read(image)
            decode_whole(data, size, "adm")
        except Exception as error:  # a hostile file can make a decoder raise anything
            findings.append(Finding(image, "skip", reason_of(error)))
            continue
        digests[place] = np.frombuffer(hashlib.blake2b(data, digest_size=DIGEST).digest(), np.uint8)
        findings += [Finding(image, "converted", text) for text in conversions(data)]
        format_ = content_format(data)
        extension = os.path.splitext(source.name(image))[1].lower()
        if source.prepared_size is None and extension not in EXTENSION_FORMATS.get(format_, ()):
            findings.append(Finding(image, "mislabelled", f"content is {format_}"))
    return findings, digests, None if shard is None else _shard_damage(source, shard)


def conversions(data: bytes) -> list[str]:
    """What `crop.decode` changes in a usable image beyond its size: "CMYK", "16-bit", …"""
    found = []
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        mode = image.mode
        if mode == "CMYK":
            found.append("CMYK")
        elif mode.startswith("I") or _bits(image, data) == 16:
            found.append("16-bit")
        if mode in ("1", "L", "LA") or mode.startswith("I"):
            found.append("greyscale")
        if mode in ("P", "PA"):
            found.append("palette")
        if mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            found.append("transparency dropped")
        try:
            orientation = image.getexif().get(ORIENTATION, 1)
            if orientation != 1:
                found.append(f"EXIF orientation {orientation} not applied")
            if getattr(image, "is_animated", False):
                found.append("first of several frames")
        except Exception:  # damaged metadata beside whole pixels concern nobody
            pass
    return found


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits a sample of the formats that allow more than Pillow's mode tells."""
    if image.format == "PNG":
        return data[24]  # of the header chunk, which comes first
    if image.format == "TIFF":
        return image.tag_v2.get(258, (1,))[0]
    if image.format == "PPM":
        header = re.sub(rb"#[^\n]*", b"", data[:1024]).split()
        return 16 if len(header) > 3 and header[3].isdigit() and int(header[3]) > 255 else 8
    return 8


def _same_bytes(source: ImageSource, digests: NDArray[np.uint8]) -> list[Finding]:
    """Findings on files that lie in more than one class: at most one of the labels is right."""
    usable = np.flatnonzero(digests.any(1))
    keys = digests[usable].view(np.uint64)  # [m, 2]
    order = np.lexsort(keys.T)
    same = (keys[order][1:] == keys[order][:-1]).all(1)
    runs = np.flatnonzero(np.diff(np.concatenate(([False], same, [False])))).reshape(-1, 2)  # first and last of each
    findings = []
    for first, last in runs.tolist():
        group = np.sort(usable[order[first : last + 1]])
        elsewhere = source.labels[group] != source.labels[group[0]]
        if elsewhere.any():
            # The first of another class: a placeholder for missing photographs may be there 100,000 times.
            others = np.where(elsewhere, group[0], group[elsewhere.argmax()])
            findings += [
                Finding(image, "mislabelled", f"same bytes as {source.name(other)}")
                for image, other in zip(group.tolist(), others.tolist())
            ]
    return findings


def _shard_damage(source: ShardFolder, shard: int) -> str | None:
    try:
        with open(source.shards[shard], "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        return reason_of(error)
    if size != source.shard_sizes[shard]:
        return f"{size} bytes of {source.shard_sizes[shard]}"
    if digest != source.shard_sha256[shard].tobytes():
        return "checksum of the file differs from the one it was made with"
    return None

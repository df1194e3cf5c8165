"""Where images come from: one interface for class folders, prepared shards and original archives."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from unite_fast.data.folder import AllImages, ImageFolder
from unite_fast.data.shards import ShardFolder, is_prepared
from unite_fast.data.skip_list import describe_skipped
from unite_fast.errors import UserError

log = logging.getLogger("unite_fast.data")


class ImageSource(Protocol):
    """Encoded images by number, ordered by class and then by name; pickled into worker processes.

    Attributes:
        root: what the user named.
        classes: sorted class names; the position of a name is its label.
        labels: [n] int64.
        skipped: name and reason of the images that the skip list left out; they have no number.
        prepared_size: side of images that were cropped when they were packed; None for original bytes.
    """

    root: Path
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    skipped: dict[str, str]
    prepared_size: int | None

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """class/file, the same in a folder, its shards and the archives it came from."""

    def path(self, index: int) -> str:
        """Where a person finds the image."""

    def read(self, index: int) -> bytes:
        """The encoded bytes, whole or not at all.

        Raises:
            OSError: the file has gone or cannot be read.
            ValueError: what is there is not the whole image, or larger than `crop.decode` accepts.
        """


def open_source(
    path: str | Path,
    num_classes: int | None,
    *,
    image_size: int | None = None,
    skip: bool = True,
    expected: Sequence[str] | None = None,
    remark: bool = True,
) -> ImageSource:
    """A class-folder tree or a folder that `unite-fast data prepare` made.

    Args:
        path: the folder.
        num_classes: how many classes there must be; None takes any number above one.
        image_size: side of the images a run wants; None: nothing is cropped.
        skip: leave out what the skip list of `unite-fast data check` names; False opens everything, unremarked.
        expected: the class names there must be, those of the training data, where they are known.
        remark: log what is amiss with it; where several ranks open the same folder, for one of them.

    Raises:
        UserError: as `ImageFolder` and `ShardFolder`; images that were cropped for another size.
    """
    kind = ShardFolder if is_prepared(Path(path)) else ImageFolder
    source = kind(path, num_classes, skip=skip, expected=expected)
    if None not in (image_size, source.prepared_size) and image_size != source.prepared_size:
        raise UserError(
            f"{path} was prepared with --size {source.prepared_size} but model.image_size is {image_size}, and "
            f"cropping twice would change the pixels: prepare it with --size {image_size} or without --size"
        )
    if remark:
        _remark_skipped(source)
    if remark and skip and isinstance(source, ShardFolder):
        for shard, damage in source.damaged_shards().items():
            warn_once(
                f"shard {source.shards[shard]}: {damage}; images that cannot be read from it are skipped, `unite-fast "
                f"data check {source.root}` lists them"
            )
    return source


def open_images(
    path: str | Path, *, image_size: int | None = None, remark: bool = True
) -> ImageSource | AllImages:
    """Every image below a folder, however deep, or of a prepared folder: for measurements that need no label.

    Args:
        path: the folder.
        image_size: as in `open_source`.
        remark: as in `open_source`.

    Raises:
        UserError: as `AllImages` and `open_source`.
    """
    if is_prepared(Path(path)):
        return open_source(path, None, image_size=image_size, remark=remark)
    images = AllImages(path)
    if remark:
        _remark_skipped(images)
    return images


def _remark_skipped(source: ImageSource | AllImages) -> None:
    if source.skipped:
        warn_once(describe_skipped(source.root, source.skipped, len(source) + len(source.skipped)))


def samples_of(source: ImageSource) -> dict[str, int | str]:
    """What the order of a run's samples depends on beside seed and batch: how many there are, and a digest of their
    names in order. A folder and its shards have the same; so does a file whose content changed under its name.
    """
    digest = hashlib.blake2b(digest_size=16)  # 2 s for ImageNet
    for index in range(len(source)):
        digest.update(os.fsencode(source.name(index)) + b"\0")
    return {"count": len(source), "digest": digest.hexdigest()}


@functools.cache  # a run opens its data for training, for metrics, for sheets and for the report
def warn_once(text: str) -> None:
    """Log a warning about the data, for the first time in this process."""
    log.warning("%s", text)


def reason_of(error: Exception) -> str:
    """Why an image cannot be used, in a few words."""
    if isinstance(error, FileNotFoundError):
        link = error.filename is not None and os.path.islink(error.filename)
        return "a symbolic link to nothing: is its disk mounted?" if link else "the file has gone"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if "cannot identify image file" in str(error):
        return "not an image, or of no accepted format"
    return str(error) or type(error).__name__

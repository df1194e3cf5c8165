"""Prepared data sets: images packed into WebDataset tar files, with an index for random access.

A folder holds `000000.tar`, `000001.tar`, … and `index.safetensors`. A shard is an uncompressed tar of pairs
`000000123.jpg` (the image; the suffix is that of its content) and `000000123.cls` (its label in decimal), as the
webdataset package reads them. The number is the image's place in the order of `ImageFolder`: class, then path.
The index lists the images in that order, so a run may move from the folder to its shards and goes on with the same
images. Shards hold the images in a fixed shuffled order, for readers that stream them.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from unite_fast.data.folder import Names, require_classes
from unite_fast.data.packed import PackedImages
from unite_fast.data.skip_list import CHECK_RECORD, read_skip_list
from unite_fast.errors import UserError

INDEX = "index.safetensors"
PLAN = ".plan"  # in the place of the index while shards are written; holds the fingerprint
FORMAT = 1
UNREADABLE = -1  # size of an image that could not be packed
DTYPES = {
    "labels": np.int64,  # [n]
    "names": np.uint8,  # [bytes], class/file of every image one behind the other
    "name_ends": np.int64,  # [n]
    "shard": np.int32,  # [n]
    "offset": np.int64,  # [n] of the image's first byte in its shard
    "size": np.int64,  # [n] in bytes, or UNREADABLE
    "crc32": np.uint32,  # [n] of the image's bytes
    "shard_size": np.int64,  # [shards] in bytes
    "shard_sha256": np.uint8,  # [shards, 32]
}


@dataclass(frozen=True)
class Index:
    """Content of an index file; `arrays` holds those of DTYPES."""

    classes: tuple[str, ...]
    size: int | None  # side of pre-cropped images; None: original bytes
    unreadable: Mapping[int, str]  # image -> why it could not be packed
    plan: str  # fingerprint of what was packed and how
    arrays: Mapping[str, NDArray]

    def save(self, root: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            UserError: full disk or unwritable folder.
        """
        import torch

        from unite_fast.weights import write_tensors

        facts = {
            "format": FORMAT,
            "classes": self.classes,
            "size": self.size,
            "unreadable": self.unreadable,
            "plan": self.plan,
            "crc32": _checksum(self.arrays),
        }
        # One entry: safetensors writes several in an order that changes from run to run.
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in self.arrays.items()}
        write_tensors(tensors, root / INDEX, {"unite_fast": json.dumps(facts)})

    @classmethod
    def load(cls, root: Path) -> Index:
        """Read and verify the index of a prepared folder.

        Raises:
            UserError: missing, unreadable, of another format, or damaged.
        """
        path = root / INDEX
        try:
            with safe_open(path, "numpy") as file:
                facts = json.loads((file.metadata() or {})["unite_fast"])
                if facts["format"] != FORMAT:
                    raise UserError(
                        f"{path} has format {facts['format']}, this version reads {FORMAT}: prepare it again"
                    )
                arrays = {name: file.get_tensor(name) for name in DTYPES}
            index = cls(
                tuple(facts["classes"]),
                facts["size"],
                {int(image): reason for image, reason in facts["unreadable"].items()},
                facts["plan"],
                arrays,
            )
            whole = facts["crc32"] == _checksum(arrays)
        except OSError as error:
            if (root / PLAN).exists():
                raise UserError(
                    f"{root} is not finished: run the `unite-fast data prepare` that began it again, it will continue"
                ) from None
            raise UserError(f"cannot read {path}: {error.strerror or error}; check that it is there") from None
        except (SafetensorError, ValueError, TypeError, KeyError, AttributeError):
            whole = False
        if not whole:
            raise UserError(f"{path} is damaged: copy it again, or prepare the data set again")
        return index


class ShardFolder(PackedImages):
    """A prepared data set, with the interface and the order of `ImageFolder`; images on its skip list are left out.

    Every image is verified against its checksum as it is read.

    Attributes: see `unite_fast.data.source.ImageSource`.
    """

    def __init__(
        self,
        path: str | Path,
        num_classes: int | None,
        *,
        skip: bool = True,
        expected: Sequence[str] | None = None,
    ):
        """Read the index.

        Args:
            path: the prepared folder.
            num_classes: how many classes there must be; None takes any number above one.
            skip: leave out what the skip list names.
            expected: the class names there must be, those of the training data, where they are known.

        Raises:
            UserError: a missing or damaged index or skip list, other classes than expected, a class without images.
        """
        root = Path(path)
        index = Index.load(root)
        require_classes(root, index.classes, num_classes, expected)
        a = index.arrays
        names = Names(a["names"].tobytes(), a["name_ends"])
        unusable = read_skip_list(root) if skip else {}
        keep = np.ones(len(names), bool)
        if unusable:
            keep = ~names.among(unusable)
            empty = np.setdiff1d(np.arange(len(index.classes)), a["labels"][keep])
            if len(empty):
                raise UserError(
                    f"{len(empty)} of {len(index.classes)} classes in {root} hold no image that {CHECK_RECORD} does "
                    f"not list as unusable, the first is {index.classes[empty[0]]}: repair the source and prepare again"
                )
        rows = np.flatnonzero(keep)
        self.shards = tuple(os.path.join(root, f"{shard:06d}.tar") for shard in range(len(a["shard_size"])))
        super().__init__(
            root, index.classes, a["labels"][rows], names.kept(keep),
            self.shards, a["shard"][rows], a["offset"][rows], a["size"][rows],
        )  # fmt: skip
        self.skipped = {names[row]: unusable[names[row]] for row in np.flatnonzero(~keep)}
        self.prepared_size = index.size
        self.shard_sizes, self.shard_sha256 = a["shard_size"], a["shard_sha256"]
        self._unreadable = index.unreadable
        self._rows, self._crc32 = rows, a["crc32"][rows]

    def path(self, index: int) -> str:
        """Shard, number and name of one image."""
        return f"{self.shards[self._container[index]]}:{self._rows[index]:09d} ({self.name(index)})"

    def read(self, index: int) -> bytes:
        """The encoded bytes of one image.

        Raises:
            OSError: its shard has gone or cannot be read.
            ValueError: the shard is cut short or damaged, or the image could not be packed (says why).
        """
        if self._sizes[index] == UNREADABLE:
            raise ValueError(self._unreadable[int(self._rows[index])])
        data = super().read(index)
        if zlib.crc32(data) != self._crc32[index]:  # 27 µs for 110 kB, where decoding takes 3,000
            raise ValueError(f"{os.path.basename(self.shards[self._container[index]])} is damaged: wrong checksum")
        return data

    def images_of(self, shard: int) -> NDArray[np.int64]:
        """Images that lie in a shard, in the order of their bytes."""
        images = np.flatnonzero(self._container == shard)
        return images[np.argsort(self._offsets[images])]

    def damaged_shards(self) -> dict[int, str]:
        """Shards that are missing or have another size than when they were made, and what is wrong."""
        found = {}
        for shard, (path, size) in enumerate(zip(self.shards, self.shard_sizes.tolist())):
            try:
                here = os.stat(path).st_size
            except OSError as error:
                found[shard] = (error.strerror or str(error)).lower()
                continue
            if here != size:
                found[shard] = f"{here} bytes of {size}"
        return found


def is_prepared(path: Path) -> bool:
    """Whether a folder was made by `unite-fast data prepare`, an unfinished or unreadable one included."""
    return os.path.lexists(path / INDEX) or os.path.lexists(path / PLAN)


def _checksum(arrays: Mapping[str, NDArray]) -> int:
    """CRC-32 over all arrays; ValueError where their types or sizes do not fit together."""
    count, shards = len(arrays["labels"]), len(arrays["shard_size"])
    checksum = 0
    for name, dtype in DTYPES.items():
        array = arrays[name]
        expected = {"names": array.shape, "shard_size": (shards,), "shard_sha256": (shards, 32)}.get(name, (count,))
        if array.dtype != dtype or array.shape != expected:
            raise ValueError(f"{name} is {array.dtype} {array.shape}")
        checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
    return checksum

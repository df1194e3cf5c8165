"""Class-folder image trees: one subfolder per class, sorted names are labels 0, 1, 2, …"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from unite_fast.data.crop import MAX_FILE_BYTES
from unite_fast.data.skip_list import CHECK_RECORD, read_skip_list
from unite_fast.errors import UserError

EXTENSIONS = frozenset(".bmp .gif .jfif .jpe .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())
# Listing a folder waits for the file system, on a network one for milliseconds, so folders are listed side by side.
SCAN_THREADS = 16
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})


class Names:
    """A fixed list of file names in one byte buffer: a million Python strings would be copied into every worker."""

    def __init__(self, blob: bytes, ends: NDArray[np.int64]):
        """Take names apart at `ends` [n], where each one ends in `blob`."""
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Self:
        """Pack strings, names that are no UTF-8 included."""
        encoded = [os.fsencode(name) for name in names]
        return cls(b"".join(encoded), np.cumsum([len(name) for name in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = 0 if index == 0 else self.ends[index - 1]
        return os.fsdecode(self.blob[start : self.ends[index]])

    def among(self, wanted: Iterable[str]) -> NDArray[np.bool_]:
        """[n] which of the names are wanted."""
        encoded = {os.fsencode(name) for name in wanted}
        ends = self.ends.tolist()
        return np.array([self.blob[start:end] in encoded for start, end in zip([0, *ends], ends)], bool)

    def kept(self, keep: NDArray[np.bool_]) -> Names:
        """The names where keep [n] is true."""
        lengths = np.diff(self.ends, prepend=0)
        blob = np.frombuffer(self.blob, np.uint8)[np.repeat(keep, lengths)].tobytes()
        return Names(blob, np.cumsum(lengths[keep], dtype=np.int64))


class ImageFolder:
    """The images of a class-folder tree, ordered by class and then by path inside the class.

    Hidden files and folders (leading dot) are ignored, subfolders of a class belong to it, symbolic links are
    followed. A dangling link named as an image is an image that cannot be read, so that it is counted as one. Images on
    the tree's skip list are left out.

    Attributes: see `unite_fast.data.source.ImageSource`.
    """

    prepared_size = None

    def __init__(
        self,
        path: str | Path,
        num_classes: int | None,
        *,
        skip: bool = True,
        expected: Sequence[str] | None = None,
    ):
        """Scan the tree.

        Args:
            path: folder of class folders.
            num_classes: how many classes there must be; None takes any number above one.
            skip: leave out what the skip list names.
            expected: the class names there must be, those of the training data, where they are known.

        Raises:
            UserError: missing, not a folder, unreadable, dangling links beside the class folders, no class folders, one
                class only, a class without images, other classes than expected, without expectations the splits of a
                data set in place of classes, or a damaged skip list.
        """
        self.root = Path(path)
        self.classes = _class_names(self.root, num_classes, expected)
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            files = list(pool.map(lambda name: _image_names(self.root / name), self.classes))
        self.skipped: dict[str, str] = {}
        if skip and (unusable := read_skip_list(self.root)):
            tree = {label: [f"{label}/{name}" for name in names] for label, names in zip(self.classes, files)}
            self.skipped = {name: unusable[name] for names in tree.values() for name in names if name in unusable}
            files = [
                [name[len(label) + 1 :] for name in names if name not in unusable] for label, names in tree.items()
            ]
        listed = f" that {CHECK_RECORD} does not list as unusable" if self.skipped else ""
        again = f"; if they are mended, run `unite-fast data check {self.root}` again" if self.skipped else ""
        empty = [name for name, names in zip(self.classes, files) if not names]
        if len(empty) == len(files):
            raise UserError(
                f"no readable image in {self.root}: none of its {len(files)} class folders holds a file ending in "
                f"{' '.join(sorted(EXTENSIONS))}{listed}{again}"
            )
        if empty:
            raise UserError(
                f"{len(empty)} of {len(files)} class folders in {self.root} hold no image{listed}: {_some(empty)}; "
                f"fill or remove them{again}"
            )
        self.labels = np.repeat(np.arange(len(files), dtype=np.int64), [len(names) for names in files])
        self._names = Names.of(name for names in files for name in names)
        self._prefix = os.path.join(self.root, "")

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Path of one image inside the tree."""
        return f"{self.classes[self.labels[index]]}/{self._names[index]}"

    def path(self, index: int) -> str:
        """Path of one image."""
        return self._prefix + self.name(index)

    def read(self, index: int) -> bytes:
        """The encoded bytes of one image.

        Raises:
            OSError: the file has gone or cannot be read.
            ValueError: the file is larger than any image that `crop.decode` accepts.
        """
        return _bytes(self.path(index))


class AllImages:
    """Every image below a folder, however deep, ordered by path: for measurements that need no label.

    Attributes:
        root: the folder.
        names: paths relative to it.
        skipped: name and reason of the images that the skip list left out.
    """

    def __init__(self, path: str | Path, *, skip: bool = True):
        """Scan the folder, as `ImageFolder` does a class.

        Args:
            path: the folder.
            skip: leave out what the skip list names.

        Raises:
            UserError: missing, a file, unreadable, or without any image; a damaged skip list.
        """
        self.root = Path(path)
        if not self.root.is_dir():
            raise UserError(f"no folder of images at {self.root}")
        names, unusable = _image_names(self.root), read_skip_list(self.root) if skip else {}
        self.skipped = {name: unusable[name] for name in names if name in unusable}
        self.names = [name for name in names if name not in unusable]
        if not self.names:
            listed = f" that {CHECK_RECORD} does not list as unusable" if self.skipped else ""
            raise UserError(f"no image below {self.root}: no file there ends in {' '.join(sorted(EXTENSIONS))}{listed}")

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Path relative to the root."""
        return self.names[index]

    def path(self, index: int) -> str:
        """Path of one image."""
        return os.path.join(self.root, self.names[index])

    def read(self, index: int) -> bytes:
        """As `ImageFolder.read`."""
        return _bytes(self.path(index))


def _bytes(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{size} bytes, more than the {MAX_FILE_BYTES} accepted")
        return file.readall()


def _class_names(root: Path, num_classes: int | None, expected: Sequence[str] | None) -> tuple[str, ...]:
    try:
        is_folder = stat.S_ISDIR(root.stat().st_mode)
    except FileNotFoundError:
        raise UserError(f"data folder {root} does not exist: give a folder of class folders") from None
    except OSError as error:
        raise UserError(f"cannot open data folder {root}: {error.strerror}; check its permissions") from None
    if not is_folder:
        raise UserError(f"data folder {root} is a file, not a folder: give a folder of class folders")
    entries = _listing(root)
    if dangling := sorted(entry.name for entry in entries if _dangles(entry)):  # without a class all labels would shift
        raise UserError(
            f"data folder {root} holds {len(dangling)} symbolic link{'s' * (len(dangling) > 1)} to nothing: "
            f"{_some(dangling)}; mount the disk that holds the classes, or remove the links"
        )
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not entries:
        raise UserError(f"data folder {root} is empty: put one subfolder per class into it")
    if not names:
        raise UserError(
            f"data folder {root} holds no class folders, only files such as {entries[0].name}: "
            f"put the images of each class into a subfolder of its own"
        )
    hint = ""
    if set(map(str.lower, names)) <= SPLIT_NAMES:
        look = "looks like a split" if len(names) == 1 else "look like the splits"
        hint = f"; {', '.join(names)} {look} of a data set: did you mean {root / names[0]}?"
    require_classes(root, names, num_classes, expected, hint)
    if hint and expected is None:  # two splits would pass for two classes
        raise UserError(f"data folder {root} has no class folders{hint} If they are classes, rename one of them.")
    return tuple(names)


def require_classes(
    root: Path,
    names: Sequence[str],
    num_classes: int | None,
    expected: Sequence[str] | None = None,
    hint: str = "",
) -> None:
    """Refuse a data set of other classes than expected; of one class; of another number than `num_classes` (None: any).

    Raises:
        UserError: says so, followed by the hint.
    """
    if expected is not None and tuple(names) != tuple(expected):
        missing, strange = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
        parts = [f"lack {_some(missing)}"] * bool(missing)
        parts += [f"have {_some(strange)}, which training lacks"] * bool(strange)
        raise UserError(
            f"class folders of {root} differ from those of the training data: they {' and '.join(parts)}; "
            f"both must have the same{hint}"
        )
    if len(names) == 1:
        raise UserError(
            f"data folder {root} has one class only ({names[0]}): class-conditional training needs at least two{hint}"
        )
    if num_classes is not None and len(names) != num_classes:
        raise UserError(
            f"data folder {root} has {len(names)} classes but model.num_classes is {num_classes}: "
            f"set model.num_classes to {len(names)} or correct the folder{hint}"
        )


def _image_names(folder: Path) -> list[str]:
    """Sorted paths of the images below a class folder, relative to it."""
    return sorted(_walk(str(folder), "", ()))


def _walk(folder: str, prefix: str, above: Sequence[tuple[int, int]]) -> Iterator[str]:
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a symbolic link to a folder that contains it would be walked for ever
        return
    for entry in _listing(folder):
        if entry.is_dir():
            yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, identity))
        elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS and (entry.is_file() or _dangles(entry)):
            yield prefix + entry.name


def _dangles(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _listing(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot list folder {folder}: {error.strerror}; check its permissions") from None
    return [entry for entry in found if _leads_somewhere(entry)]


def _leads_somewhere(entry: os.DirEntry[str]) -> bool:
    """False of a link to itself, about which every question fails."""
    try:
        entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise UserError(f"cannot follow {entry.path}: {error.strerror}; check its permissions") from None
    return True


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")

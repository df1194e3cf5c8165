"""ImageNet as it is handed out: tar files, read in place without unpacking.

- training: `ILSVRC2012_img_train.tar`, a tar of one tar a class (`n01440764.tar`, …), or a folder of those;
- validation: `ILSVRC2012_img_val.tar`, 50,000 images without folders, whose classes stand in the development kit
  (`ILSVRC2012_devkit_t12.tar.gz`): the ground truth lists a number for every image in order of name, and the table of
  synsets gives the numbers their names.

The images come in the order in which `ImageFolder` would list the unpacked files.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unite_fast.data.folder import EXTENSIONS, Names, require_classes
from unite_fast.data.packed import PackedImages
from unite_fast.data.shards import is_prepared
from unite_fast.errors import UserError

SCAN_THREADS = 8  # reading a header waits for the file system
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
SYNSETS = "meta.mat"


class Member(NamedTuple):
    """One image inside an archive."""

    label: str  # class name
    name: str
    container: int
    offset: int
    size: int


def is_archive(path: Path) -> bool:
    """Whether the path is a file, which can only be an archive, or a folder of class tars: tar files and no folders."""
    if not path.is_dir():
        return path.is_file()
    return not is_prepared(path) and bool(_tars(path)) and not any(entry.is_dir() for entry in path.iterdir())


def open_archives(
    path: Path, devkit: Path | None = None, advance: Callable[[int, int], None] = lambda done, total: None
) -> PackedImages:
    """The images of original archives.

    Args:
        path: a tar file or a folder of class tars, see the module.
        devkit: the development kit; needed for the validation images, for nothing else.
        advance: told how many class tars of how many were scanned.

    Raises:
        UserError: no tar file, one that is damaged or compressed, no images in it, a missing or wrong development kit.
    """
    if path.is_dir():
        containers = tuple(map(str, _tars(path)))
        scans = [(number, Path(file).stem, None) for number, file in enumerate(containers)]
        flat: list[Member] = []
    else:
        containers = (str(path),)
        with _tar(path) as outer:
            infos = [info for info in outer if info.isreg()]
        scans = [(0, Path(info.name).stem, info) for info in infos if info.name.endswith(".tar")]
        flat = [
            Member("", Path(info.name).name, 0, info.offset_data, info.size) for info in infos if _is_image(info.name)
        ]
    if scans:
        members = _class_tars(containers, scans, advance)
    elif flat:
        if devkit is None:
            raise UserError(
                f"{path} holds images without classes, as the validation archive does: give the development kit "
                f"that lists their classes, --devkit ILSVRC2012_devkit_t12.tar.gz"
            )
        members = _with_classes(flat, devkit)
    else:
        raise UserError(f"{path} holds neither class tars nor images")
    members.sort(key=lambda member: member[:2])
    classes = tuple(sorted({member.label for member in members}))
    require_classes(path, classes, None)
    number = {name: label for label, name in enumerate(classes)}
    return PackedImages(
        path, classes,
        np.array([number[member.label] for member in members], np.int64),
        Names.of(f"{member.label}/{member.name}" for member in members),
        containers,
        np.array([member.container for member in members], np.int32),
        np.array([member.offset for member in members], np.int64),
        np.array([member.size for member in members], np.int64),
    )  # fmt: skip


def _class_tars(
    containers: tuple[str, ...],
    scans: list[tuple[int, str, tarfile.TarInfo | None]],
    advance: Callable[[int, int], None],
) -> list[Member]:
    """Images of class tars, each a file of its own or a member of another tar."""

    def scan(job: tuple[int, str, tarfile.TarInfo | None]) -> list[Member]:
        container, label, inside = job
        with _tar(Path(containers[container]), inside) as tar:
            start = inside.offset_data if inside else 0
            found = [
                Member(label, info.name.removeprefix("./"), container, start + info.offset_data, info.size)
                for info in tar
                if info.isreg() and _is_image(info.name)
            ]
        if not found:
            raise UserError(f"class tar {label}.tar of {containers[container]} holds no image")
        return found

    members: list[Member] = []
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        for done, found in enumerate(pool.map(scan, scans), 1):
            members += found
            advance(done, len(scans))
    return members


def _with_classes(flat: list[Member], devkit: Path) -> list[Member]:
    numbers, synsets = _devkit(devkit)
    if len(numbers) != len(flat):
        raise UserError(f"{devkit} knows the classes of {len(numbers)} images, the archive holds {len(flat)}")
    flat.sort(key=lambda member: member.name)
    try:
        return [member._replace(label=synsets[number]) for member, number in zip(flat, numbers)]
    except KeyError as error:
        raise UserError(f"{devkit}: {GROUND_TRUTH} names class {error}, which {SYNSETS} lacks") from None


def _devkit(path: Path) -> tuple[list[int], dict[int, str]]:
    """Class number of every validation image in order of name, and the synset (n…) of every class number."""
    from scipy.io import loadmat

    found: dict[str, bytes] = {}
    with _tar(path, mode="r:*") as tar:
        for info in tar:
            if Path(info.name).name in (GROUND_TRUTH, SYNSETS):
                found[Path(info.name).name] = tar.extractfile(info).read()
    try:
        numbers = [int(line) for line in found[GROUND_TRUTH].split()]
        table = loadmat(io.BytesIO(found[SYNSETS]), squeeze_me=True)["synsets"]
        return numbers, {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
    except Exception as error:  # a hostile .mat file can make the reader raise anything
        raise UserError(f"{path} is not the ILSVRC2012 development kit: it lacks {GROUND_TRUTH} or {SYNSETS}, or they "
                        f"are damaged ({type(error).__name__}: {error})") from None  # fmt: skip


@contextmanager
def _tar(path: Path, inside: tarfile.TarInfo | None = None, mode: str = "r:"):
    """An opened tar file, or one that is a member of it, of which every member is to be listed."""
    try:
        with tarfile.open(path, mode) as tar:
            if inside is None:
                yield tar
                _require_end(tar)
            else:
                with tarfile.open(fileobj=tar.extractfile(inside), mode=mode) as inner:
                    yield inner
                    _require_end(inner)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        which = f"{inside.name} in {path}" if inside else f"{path}"
        if mode == "r:":
            raise UserError(f"{which} is not a whole, uncompressed tar file: {error}") from None
        # The words of an error may be many lines here, one for each compression that was tried.
        raise UserError(
            f"{which} is not a whole tar file, compressed or not: give ILSVRC2012_devkit_t12.tar.gz as downloaded"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _require_end(tar: tarfile.TarFile) -> None:
    """Refuse an archive, read to its end, that ends otherwise than in zeros: tarfile takes a damaged header for it."""
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it is cut off or damaged at byte {tar.offset}")


def _tars(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*.tar"))


def _is_image(name: str) -> bool:
    path = Path(name)
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")

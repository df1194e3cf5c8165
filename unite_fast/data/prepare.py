"""Packing a data set into shards: `unite-fast data prepare`, see `unite_fast.data.shards` for what comes out.

Work is cut by shard. A shard is written aside and renamed when whole, then its table follows as a small JSON file;
whoever finds both need not write the shard again. The index is the last file to appear, and its presence means that
all is done. The content depends on the images and the options alone: not on the number of processes, the folder's
place on disk, or how often the work was interrupted.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unite_fast.data.crop import content_format, decode
from unite_fast.data.folder import Names
from unite_fast.data.processes import Holding, spread
from unite_fast.data.sampler import permutation
from unite_fast.data.shards import DTYPES, FORMAT, INDEX, PLAN, UNREADABLE, Index
from unite_fast.data.source import ImageSource, reason_of
from unite_fast.errors import UserError

SHARD_IMAGES = 8192  # about 0.9 GB of ImageNet: few enough files, and a cut shard costs 0.6 % of the data
SUFFIXES = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "BMP": "bmp", "WEBP": "webp", "TIFF": "tif", "PPM": "ppm"}
UNKNOWN_SUFFIX = "bin"


class Prepared(NamedTuple):
    """What a call of `prepare` leaves behind."""

    images: int
    shards: int
    found: int  # shards that an earlier call had finished
    bytes: int
    unreadable: dict[str, str]  # name -> why it could not be packed


@dataclass(frozen=True)
class Job:
    """What every process knows."""

    source: ImageSource
    destination: Path
    size: int | None
    parts: list[NDArray[np.int64]]  # images of every shard, in the order of writing

    def shard(self, number: int) -> Path:
        return self.destination / f"{number:06d}.tar"

    def table(self, number: int) -> Path:
        return self.destination / f".{number:06d}.json"


def prepare(
    source: ImageSource,
    destination: Path,
    *,
    size: int | None,
    shard_images: int = SHARD_IMAGES,
    jobs: int = 1,
    advance: Callable[[int], None] = lambda done: None,
) -> Prepared:
    """Write the shards and the index, or what an earlier call left to do.

    An image that cannot be read, or with `size` not be decoded, keeps its place in the index with the reason in place
    of its bytes, so that training skips, counts and names it as it would in the source.

    Args:
        source: the images.
        destination: folder to make; its parents are made too.
        size: side of the ADM crop, stored as uncompressed PPM; None packs the original bytes.
        shard_images: images a shard, at most.
        jobs: processes.
        advance: told how many images are done.

    Raises:
        UserError: a destination that holds something else or lies in the source, no readable image, a source that
            went away, a full disk, a process that died.
    """
    if source.root.resolve() in destination.resolve().parents:
        # It would count as one more class of the source, without images: neither a run nor this command could go on.
        raise UserError(f"{destination} lies in {source.root}, which is to be packed: choose a folder beside it")
    if source.prepared_size is not None and size not in (None, source.prepared_size):
        raise UserError(
            f"{source.root} was itself prepared with --size {source.prepared_size}: take the original images to "
            f"prepare another size"
        )
    size = size or source.prepared_size
    names = Names.of(source.name(image) for image in range(len(source)))
    plan = _fingerprint(source, names, size, shard_images)
    count = -(-len(source) // shard_images)
    job = Job(source, destination, size, np.array_split(permutation(len(source), 0, 0), count))
    try:
        if _begin(destination, plan):
            index, found = Index.load(destination), count
        else:
            missing = [number for number in range(count) if _finished(job, number) is None]
            found = count - len(missing)
            before = sum(len(job.parts[number]) for number in set(range(count)) - set(missing))
            advance(before)
            work = functools.partial(_write_shard, job)
            for number, table in spread(
                work, missing, jobs=jobs, advance=lambda done: advance(before + done), path=source.path,
                preload=["unite_fast.data.resample"] if size else [],
            ):  # fmt: skip
                _save(json.dumps(table), job.table(number))
            index = _collect(job, names, plan)
            index.save(destination)
        _clean(destination)
    except OSError as error:
        raise UserError(
            f"cannot write {destination}: {error.strerror or error}; the same command continues once that is fixed"
        ) from None
    unreadable = {names[image]: reason for image, reason in index.unreadable.items()}
    return Prepared(len(source), count, found, int(index.arrays["shard_size"].sum()), unreadable)


def _fingerprint(source: ImageSource, names: Names, size: int | None, shard_images: int) -> str:
    what = json.dumps([FORMAT, source.classes, size, shard_images]).encode()
    return hashlib.sha256(b"\0".join([what, names.blob, names.ends.tobytes(), source.labels.tobytes()])).hexdigest()


def _begin(destination: Path, plan: str) -> bool:
    """Take or make the folder; whether everything is there already."""
    there = None
    if (destination / INDEX).is_file():
        there = Index.load(destination).plan
        if there == plan:
            return True
    elif (destination / PLAN).is_file():
        there = (destination / PLAN).read_text()
    if there not in (None, plan):
        raise UserError(
            f"{destination} holds shards of other images or made with other options: repeat those, choose another "
            f"folder, or remove it"
        )
    destination.mkdir(parents=True, exist_ok=True)
    if there is None:
        if any(destination.iterdir()):
            raise UserError(f"{destination} is not empty and holds no prepared data: choose another folder")
        _save(plan, destination / PLAN)
    for left in destination.glob(".*.tmp"):  # of a call that was killed
        left.unlink()
    return False


def _finished(job: Job, number: int) -> dict[str, Any] | None:
    """Table of a shard that is whole, else None."""
    try:
        table = json.loads(job.table(number).read_bytes())
        return table if job.shard(number).stat().st_size == table["shard_size"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _Hashed:
    """A file that is written once from front to back, and its SHA-256."""

    def __init__(self, file: io.BufferedWriter):
        self._file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()


def _write_shard(job: Job, number: int, holding: Holding) -> dict[str, Any]:
    """Write one shard; returns its columns of the index, with reasons in place of images that cannot be packed."""
    images = job.parts[number].tolist()
    columns: dict[str, Any] = {"offset": [], "size": [], "crc32": [], "unreadable": {}}
    path = job.shard(number)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            hashed = _Hashed(file)
            with tarfile.open(fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for image in images:
                    holding(image)
                    try:
                        data = _content(job, image)
                    except Exception as error:  # a hostile file can make a decoder raise anything
                        _require_source(job.source.root)
                        columns["unreadable"][str(image)] = reason_of(error)
                        data = None
                    columns["offset"].append(tar.offset + tarfile.BLOCKSIZE)
                    columns["size"].append(UNREADABLE if data is None else len(data))
                    columns["crc32"].append(zlib.crc32(data or b""))
                    if data is not None:
                        suffix = SUFFIXES.get(content_format(data) or "", UNKNOWN_SUFFIX)
                        _add(tar, f"{image:09d}.{suffix}", data)
                        _add(tar, f"{image:09d}.cls", b"%d" % job.source.labels[image])
            file.flush()
            os.fsync(file.fileno())
            columns["shard_size"], columns["shard_sha256"] = file.tell(), hashed.sha256.hexdigest()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return columns


def _require_source(root: Path) -> None:
    """A source that went away, as a network mount can, must not pass for images that cannot be read."""
    try:
        there = root.is_file() or any(root.iterdir())
    except OSError:
        there = False
    if not there:
        raise UserError(f"{root} is no longer there, or empty: the same command continues once it is back")


def _content(job: Job, image: int) -> bytes:
    data = job.source.read(image)
    if job.size is None or job.size == job.source.prepared_size:
        return data
    # Uncompressed, because the point of cropping ahead is time: a 256×256 photograph reads in 0.12 ms as PPM, 1.8 ms
    # as PNG and 3 to 6 ms as the original JPEG, and PNG takes 106 kB to PPM's 197.
    return b"P6\n%d %d\n255\n" % (job.size, job.size) + decode(data, job.size, "adm").tobytes()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # dated 1970, of user 0: the bytes must not depend on who packs, and when
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _collect(job: Job, names: Names, plan: str) -> Index:
    """The index, from the tables of all shards."""
    count, shards = len(job.source), len(job.parts)
    per_image = ("shard", "offset", "size", "crc32")
    arrays = {name: np.zeros(count, DTYPES[name]) for name in per_image} | {
        "labels": job.source.labels,
        "names": np.frombuffer(names.blob, np.uint8).copy(),
        "name_ends": names.ends,
        "shard_size": np.zeros(shards, np.int64),
        "shard_sha256": np.zeros((shards, 32), np.uint8),
    }
    unreadable: dict[int, str] = {}
    for number, images in enumerate(job.parts):
        table = _finished(job, number)
        if table is None:
            raise UserError(f"{job.shard(number)} changed while others were written: run the same command again")
        for name in per_image[1:]:
            arrays[name][images] = table[name]
        arrays["shard"][images] = number
        arrays["shard_size"][number] = table["shard_size"]
        arrays["shard_sha256"][number] = np.frombuffer(bytes.fromhex(table["shard_sha256"]), np.uint8)
        unreadable |= {int(image): reason for image, reason in table["unreadable"].items()}
    if len(unreadable) == count:
        image, reason = next(iter(unreadable.items()))
        raise UserError(f"none of {count} images of {job.source.root} can be read: {job.source.path(image)} ({reason})")
    return Index(job.source.classes, job.size, dict(sorted(unreadable.items())), plan, arrays)


def _clean(destination: Path) -> None:
    for left in (*destination.glob(".*.json"), destination / PLAN):
        left.unlink(missing_ok=True)


def _save(text: str, path: Path) -> None:
    from unite_fast.weights import write_text

    write_text(text, path)

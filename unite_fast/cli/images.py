"""`unite-fast reconstruct` and `unite-fast tokenize`: commands that read images."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unite_fast.cli.console import (
    BatchOption,
    Device,
    DeviceOption,
    SeedOption,
    explain_memory,
    out,
    pick_device,
    plain,
    progress,
    warn,
)
from unite_fast.errors import UserError
from unite_fast.writable import require_writable

if TYPE_CHECKING:
    from torch import Tensor

    from unite_fast.importing import Trained
    from unite_fast.model.unite import Unite

RECORD = "reconstructions.json"
TABLE_ROWS = 20  # more are in the record
PICTURE = re.compile(r"\d{5,}_[^/]*\.png")
LONGEST_STEM = 50  # characters of a file's name, of up to four bytes, that its picture keeps: names end at 255 bytes

RunOption = Annotated[Path, typer.Option(help="A run, one of its checkpoints, or an exported folder.", metavar="DIR")]
ImagesArgument = Annotated[
    list[Path],
    typer.Argument(help="Image files, or folders to search for images; or molecule files.", metavar="IMAGES…"),
]


@dataclass
class Square:
    """One image as the network sees it."""

    path: Path
    pixels: Tensor  # [3, H, H] uint8
    size: tuple[int, int]  # width and height of the file


@dataclass
class Reader:
    """Reads images of any size as squares of `side` pixels and keeps account of what could not be read."""

    paths: list[Path]
    side: int
    skipped: dict[str, str] = field(default_factory=dict)  # path -> reason

    def batches(self, batch: int) -> Iterator[list[Square]]:
        """Readable images, `batch` at a time.

        Raises:
            UserError: none of the files can be read.
        """
        found: list[Square] = []
        for path in self.paths:
            square = self._read(path)
            if square is not None:
                found.append(square)
            if len(found) == batch:
                yield found
                found = []
        if found:
            yield found
        elif len(self.skipped) == len(self.paths):
            first, reason = next(iter(self.skipped.items()))
            raise UserError(f"none of {len(self.paths)} files is a readable image: {first} ({reason})")

    def _read(self, path: Path) -> Square | None:
        import torch
        from PIL import Image

        from unite_fast.data.crop import FORMATS, MAX_FILE_BYTES, decode

        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ValueError(f"larger than the {MAX_FILE_BYTES} bytes accepted")
            data = path.read_bytes()
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                size = image.size
            pixels = decode(data, self.side, "adm")
        except Exception as error:  # a hostile file can make a decoder raise anything; it costs no more than itself
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            self.skipped[str(path)] = (
                "not an image, or of no accepted format" if "cannot identify" in reason else reason
            )
            warn(f"skipped {path}: {self.skipped[str(path)]}")
            return None
        return Square(path, torch.tensor(pixels).permute(2, 0, 1), size)

    def crop_note(self, size: tuple[int, int]) -> str:
        """How a file of that size came to fit, empty where it did."""
        if size == (self.side, self.side):
            return ""
        return f"{size[0]}×{size[1]}, resized and centre-cropped to {self.side}×{self.side}"


def reconstruct(
    run: RunOption,
    images: ImagesArgument,
    out_dir: Annotated[
        Path,
        typer.Option("--out", help="Folder for the pictures; those of an earlier call are replaced.", metavar="DIR"),
    ],
    seed: SeedOption = 0,
    batch: BatchOption = 64,
    device: DeviceOption = Device.auto,
) -> None:
    """Encode images and decode them again: side-by-side pictures, PSNR of each, and the mean.

    Images of another size are resized and centre-cropped exactly as in training. Files that cannot be read are
    skipped and named. The numbers are also in reconstructions.json. A model of molecules takes molecule files:
    RMSD of each, a sheet, reconstructions.sdf and .xyz.

    Example: `unite-fast reconstruct --run runs/quickstart data/digits/val/3 --out reconstructions`
    """
    special, trained = _special(run)
    if special is not None:
        special.reconstruct(trained, images, out_dir, seed=seed, batch=batch, device=device)
        return
    from rich.table import Table

    from unite_fast.evaluation.generation import encode
    from unite_fast.evaluation.reconstruction import psnr
    from unite_fast.pictures import comparison
    from unite_fast.replacing import replacing
    from unite_fast.weights import write_json

    trained, model, reader = _open(trained, images, device, leave_out=out_dir)
    records: list[dict[str, Any]] = []
    with (
        replacing(out_dir, former=lambda: _former(out_dir), last=RECORD) as aside,
        progress("reconstructing", len(reader.paths)) as bar,
        explain_memory(batch),
    ):
        for squares in reader.batches(batch):
            originals = _stack(squares)
            reconstructions = model.decode(encode(model, originals, seed=seed, first=len(records))).clamp(0, 1).cpu()
            for square, original, result, value in zip(
                squares, originals, reconstructions, psnr(originals, reconstructions).tolist(), strict=True
            ):
                picture = f"{len(records):05d}_{square.path.stem[:LONGEST_STEM]}.png"
                comparison(original, result, aside / picture)
                records.append(
                    {"file": str(square.path), "picture": picture, "psnr": value, "size": list(square.size),
                     "note": reader.crop_note(square.size)}
                )  # fmt: skip
            bar.update(bar.task_ids[0], completed=len(records) + len(reader.skipped))
        mean = sum(record["psnr"] for record in records) / len(records)
        cropped = sum(bool(record["note"]) for record in records)
        write_json(
            {
                "model": {"origin": trained.origin, **trained.made_by},
                "seed": seed,
                "psnr": mean,
                "cropped": cropped,
                "images": records,
                "skipped": reader.skipped,
            },
            aside / RECORD,
        )
    table = Table(title=plain(f"reconstructions in {out_dir}"), title_justify="left")
    for column in ("image", "PSNR (dB)", ""):
        table.add_column(column, overflow="fold")
    for record in records[:TABLE_ROWS]:
        table.add_row(plain(record["file"]), f"{record['psnr']:.2f}", record["note"])
    if len(records) > TABLE_ROWS:
        table.add_row("…", "", f"{len(records) - TABLE_ROWS} more in {RECORD}")
    table.add_section()
    table.add_row(f"mean of {len(records)}", f"{mean:.2f}", _account(reader, cropped))
    out().print(table)


def _former(folder: Path) -> Iterator[Path]:
    """Pictures of a former call, by its record: other pictures may well be named as they are."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        named = [str(entry["picture"]) for entry in json.loads((folder / RECORD).read_text())["images"]]
        yield from (folder / name for name in named if PICTURE.fullmatch(name))


def tokenize(
    run: RunOption,
    images: ImagesArgument,
    out_file: Annotated[Path, typer.Option("--out", help="The file to write, ending in .safetensors.", metavar="FILE")],
    seed: SeedOption = 0,
    batch: BatchOption = 64,
    device: DeviceOption = Device.auto,
) -> None:
    """Encode images into latents and write them as safetensors.

    The file holds **latents**, float32 of shape images × registers × channels; its metadata lists the image
    files in the same order under **files**, as JSON. Images are prepared as in reconstruct. A model of molecules takes
    molecule files, and writes their atom **counts** and **order** beside the latents.

    Example: `unite-fast tokenize --run runs/quickstart data/digits/val/3 --out latents.safetensors`
    """
    if out_file.suffix != ".safetensors":
        raise UserError(f"--out {out_file}: the name must end in .safetensors")
    if out_file.is_dir():
        raise UserError(f"--out {out_file} is a folder: give the name of a file in it")
    require_writable(out_file.parent, "the latents", "Give --out a file in a folder that takes some.")

    special, trained = _special(run)
    if special is not None:
        special.tokenize(trained, images, out_file, seed=seed, batch=batch, device=device)
        return
    import torch

    from unite_fast.evaluation.generation import encode
    from unite_fast.weights import write_tensors

    trained, model, reader = _open(trained, images, device)
    files: list[str] = []
    latents: list[Tensor] = []
    cropped = 0
    with progress("tokenizing", len(reader.paths)) as bar, explain_memory(batch):
        for squares in reader.batches(batch):
            latents.append(encode(model, _stack(squares), seed=seed, first=len(files)).cpu())
            files += [str(square.path) for square in squares]
            cropped += sum(bool(reader.crop_note(square.size)) for square in squares)
            bar.update(bar.task_ids[0], completed=len(files) + len(reader.skipped))
    joined = torch.cat(latents)
    if not bool(torch.isfinite(joined).all()):
        raise UserError(f"the latents hold NaN or infinite values: the model of {trained.origin} has diverged")
    metadata = {"files": json.dumps(files), "model": trained.origin, "seed": str(seed)}
    write_tensors({"latents": joined}, out_file, metadata)
    out().print(f"latents {list(joined.shape)} in {out_file} {_account(reader, cropped)}", markup=False, soft_wrap=True)


def _special(run: Path) -> tuple[ModuleType | None, Trained]:
    """The commands of the model's own modality, None for images; and the weights."""
    from unite_fast.importing import open_trained
    from unite_fast.modality import modality

    trained = open_trained(run)
    return modality(trained.config.modality).commands(), trained


def _open(
    trained: Trained, images: list[Path], device: Device, leave_out: Path | None = None
) -> tuple[Trained, Unite, Reader]:
    """The weights, the network on its device, and a reader of the images at its size."""
    paths = find_images(images, leave_out)
    return trained, trained.build(pick_device(device)), Reader(paths, trained.config.image_size)


def find_images(given: list[Path], leave_out: Path | None = None) -> list[Path]:
    """Files as given, and the images below each folder as `AllImages` finds them.

    Args:
        given: files and folders.
        leave_out: a folder that is not searched: pictures of a former call are no input of the next.

    Raises:
        UserError: a path that is not there, a folder without images.
    """
    from unite_fast.data.folder import AllImages

    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = [path / name for name in AllImages(path, skip=False).names]
            if leave_out is not None:
                inside = [file for file in inside if not file.resolve().is_relative_to(leave_out.resolve())]
            if not inside:
                raise UserError(f"no image below {path} except those in {leave_out}, the output folder")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"no image file or folder {path}")
    return found


def _stack(squares: list[Square]) -> Tensor:
    import torch

    return torch.stack([square.pixels for square in squares])


def _account(reader: Reader, cropped: int) -> str:
    """What was done to the files, in brackets; empty where nothing was."""
    notes = []
    if cropped:
        notes.append(f"{cropped} resized and centre-cropped to {reader.side}×{reader.side}")
    if reader.skipped:
        notes.append(f"{len(reader.skipped)} skipped")
    return f"({', '.join(notes)})" if notes else ""

"""`unite-fast sample`."""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
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
    progress,
)
from unite_fast.config import SamplingConfig
from unite_fast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Solver = Enum(
    "Solver", {name: name for name in typing.get_args(SamplingConfig.model_fields["solver"].annotation)}, type=str
)

UnnormalisedOption = Annotated[
    bool,
    typer.Option(
        "--unnormalised",
        help="Leave the latent norm out of every prediction, as the published sampler does without guidance, to "
        "reproduce its numbers at w = 1; only with --guidance 1.",
    ),
]
RECORD, SHEET = "samples.json", "sheet.png"
OURS = re.compile(r"\d{6,}_class\d+\.png")
# A sheet of more is too large to look at: at 256×256 pixels this one is 2,600 × 10,000.
SHEET_IMAGES, SHEET_CLASSES, SHEET_COLUMNS = 400, 40, 10


def sample(
    run: Annotated[Path, typer.Option(help="A run, one of its checkpoints, or an exported folder.", metavar="DIR")],
    classes: Annotated[
        str | None,
        typer.Option(
            help="Class names or indices, separated by commas; a name takes precedence over an index. Default: all."
        ),
    ] = None,
    atoms: Annotated[
        str | None,
        typer.Option(help="Molecules: atom count, or a range. Default: as in training.", metavar="N|LOW-HIGH"),
    ] = None,
    value: Annotated[
        float | None,
        typer.Option(
            "--property",
            help="Molecules: value of the property that the model was conditioned on, such as a gap in eV.",
        ),
    ] = None,
    count: Annotated[
        int, typer.Option(help="Total number of images, distributed over the classes in turn.", min=1, max=2**31 - 1)
    ] = 64,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance scale w; 1 turns guidance off.", min=0)
    ] = None,
    interval: Annotated[
        str | None,
        typer.Option(help="Times between which guidance acts, from 0 (noise) to 1 (image).", metavar="LOW,HIGH"),
    ] = None,
    solver: Annotated[
        Solver | None,
        typer.Option(
            help="euler (fastest), heun (close to dopri5 from 50 steps), or dopri5 (the published one; it adapts "
            "its steps to a whole batch, so its images change slightly with --batch)."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Time points of the solver.", min=2)] = None,
    unnormalised: UnnormalisedOption = False,
    seed: SeedOption = 0,
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Output folder; samples in it are replaced. Default: samples/ in the run.", metavar="DIR"
        ),
    ] = None,
    batch: BatchOption = 64,
    device: DeviceOption = Device.auto,
) -> None:
    """Generate images, or molecules: samples.sdf, samples.xyz, a sheet, a 3-D page, samples.json.

    For images: single PNG files, a sheet by class, and samples.json, which records how they were made.

    Options that are left out come from the run's configuration. A run still in training gives
    its newest checkpoint's averaged (EMA) weights. Image number i depends on the seed and on i alone, not on the
    batch size; a larger --count adds images to those of a smaller one.

    Example: `unite-fast sample --run runs/quickstart --classes 3,5 --count 64 --guidance 2.4 --solver heun`
    """
    window = None if interval is None else _interval(interval)
    _require_finite(guidance)

    import torch

    from unite_fast.evaluation.generation import draw
    from unite_fast.importing import open_trained
    from unite_fast.modality import modality
    from unite_fast.pictures import save_png
    from unite_fast.replacing import replacing
    from unite_fast.weights import write_json

    trained = open_trained(run)
    special = modality(trained.config.modality).commands()
    if special is not None:
        if classes is not None:
            raise UserError("--classes is for images; molecules take --atoms and --property")
        if unnormalised:
            raise UserError("--unnormalised is for image models only")
        special.sample(
            trained, out_dir or run_folder(run) / "samples", atoms=atoms, value=value, count=count, guidance=guidance,
            interval=window, solver=None if solver is None else solver.value, steps=steps, seed=seed, batch=batch,
            device=device,
        )  # fmt: skip
        return
    if atoms is not None or value is not None:
        raise UserError("--atoms and --property are for models of molecules; this one generates images")
    defaults = trained.sampling
    settings: dict[str, Any] = {
        "guidance": defaults.guidance if guidance is None else guidance,
        "interval": defaults.interval if window is None else window,
        "solver": defaults.solver if solver is None else solver.value,
        "steps": defaults.steps if steps is None else steps,
        "time_shift": trained.time_shift,
        **({"normalise": False} if unnormalised else {}),
    }
    require_unguided(settings)
    chosen = _classes(classes, trained.class_names, trained.config.num_classes)
    labels = [chosen[index % len(chosen)] for index in range(count)]
    files = [f"{index:06d}_class{label:04d}.png" for index, label in enumerate(labels)]
    folder = out_dir or run_folder(run) / "samples"
    where = pick_device(device)
    model = trained.build(where)
    shown = _Sheet(chosen[: min(count, SHEET_CLASSES)])
    with (
        replacing(folder, former=lambda: _former(folder), last=RECORD) as aside,
        progress("sampling", count) as bar,
        explain_memory(batch),
    ):
        for first in range(0, count, batch):
            piece = labels[first : first + batch]
            images = draw(model, torch.tensor(piece), settings, seed=seed, first=first).cpu()
            for index, image in enumerate(images, start=first):
                save_png(image, aside / files[index])
                shown.add(labels[index], image)
            bar.advance(bar.task_ids[0], len(piece))
        shown.write(aside / SHEET, trained.class_names)
        names = trained.class_names
        record = {
            "model": {"origin": trained.origin, **trained.made_by},
            "sampling": settings,
            "seed": seed,
            "count": count,
            "classes": [{"index": label, "name": None if names is None else names[label]} for label in chosen],
            "batch": batch,
            "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
            "torch": str(torch.__version__),
            "images": [{"file": file, "class": label} for file, label in zip(files, labels, strict=True)],
        }
        write_json(record, aside / RECORD)
    step = trained.made_by.get("step")
    low, high = settings["interval"]
    out().print(
        f"{count} images of {min(count, len(chosen))} classes in {folder} (sheet: {SHEET}, record: {RECORD})\n"
        f"{trained.made_by.get('weights', 'ema')} weights of {trained.origin}"
        f"{'' if step is None else f', step {step}'}; {settings['solver']}, {settings['steps']} steps, "
        f"guidance {settings['guidance']:g} between {low:g} and {high:g}, seed {seed}",
        markup=False,
        soft_wrap=True,
    )


class _Sheet:
    """Keeps the first images of the first classes for the sheet."""

    def __init__(self, classes: list[int]):
        self._images: dict[int, list[Tensor]] = {label: [] for label in classes}
        self._room = max(1, SHEET_IMAGES // len(classes))

    def add(self, label: int, image: Tensor) -> None:
        row = self._images.get(label)
        if row is not None and len(row) < self._room:
            row.append(image)

    def write(self, path: Path, class_names: list[str] | None) -> None:
        """A class takes as many rows as it needs; the last ones are filled up with white."""
        import torch

        from unite_fast.pictures import sample_sheet

        most = max(len(row) for row in self._images.values())
        columns = min(SHEET_COLUMNS, most)
        rows = math.ceil(most / columns)
        images, labels = [], []
        for label, row in self._images.items():
            blank = torch.ones_like(row[0])
            images += row + [blank] * (rows * columns - len(row))
            labels += [label] * rows
        sample_sheet(torch.stack(images), labels, class_names, columns, path)


def _require_finite(guidance: float | None) -> None:
    if guidance is not None and not math.isfinite(guidance):
        raise UserError(f"--guidance must be a finite number, found {guidance}")


def require_unguided(settings: dict[str, Any]) -> None:
    """Refuse guidance of predictions that are not normalised, which no published number stands for."""
    if not settings.get("normalise", True) and settings["guidance"] != 1:
        raise UserError(
            f"--unnormalised is the published sampler without guidance, and guidance is {settings['guidance']:g}: "
            f"add --guidance 1"
        )


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--interval {text!r} must be two numbers separated by a comma, such as 0.1,1") from None
    if not 0 <= low < high <= 1:
        raise UserError(f"--interval {text} must be two increasing numbers between 0 and 1, such as 0.1,1")
    return low, high


def _classes(text: str | None, names: list[str] | None, num_classes: int) -> list[int]:
    """Indices of the wanted classes, in the order given, each once."""
    if text is None:
        return list(range(num_classes))
    by_name = {name: index for index, name in enumerate(names or ())}
    chosen = []
    for word in (part.strip() for part in text.split(",")):
        if word in by_name:
            chosen.append(by_name[word])
        elif word.isascii() and word.isdigit() and int(word) < num_classes:
            chosen.append(int(word))
        else:
            # Of digits no other number is meant, though it may be a name, as of a data set of digits.
            near = [] if word.isdigit() else difflib.get_close_matches(word, by_name, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid: indices 0 to {num_classes - 1}"
            if by_name and not near:
                hint += f", names such as {next(iter(by_name))!r}"
            raise UserError(f"--classes: this model has no class {word!r}; {hint}")
    return list(dict.fromkeys(chosen))


def _former(folder: Path) -> Iterator[Path]:
    """Samples of a former call."""
    return (path for path in folder.iterdir() if OURS.fullmatch(path.name) or path.name == SHEET)


def run_folder(path: Path) -> Path:
    """The run that a path belongs to: of a checkpoint also, because old checkpoints are deleted with all they hold."""
    for known in (path, path.resolve()):  # from inside of checkpoints/ the path does not say where it is
        if known.parent.name == "checkpoints":
            return known.parents[1]
    return path

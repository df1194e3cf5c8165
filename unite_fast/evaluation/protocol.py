"""What made a number: the protocol stored beside every metric, and which parts of it decide whether two compare."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unite_fast.engine.world import World
from unite_fast.versions import versions

FOLDER = "evaluations"  # of a run; one JSON file an evaluation: metrics, protocol, tables
WORK = ".work"  # in it: pieces of evaluations under way


@dataclass(frozen=True)
class Metric:
    """How to read a number.

    Attributes:
        better: which end is good.
        sections: of the protocol that must agree for two values to compare; the model itself never has to.
    """

    better: Literal["lower", "higher"]
    sections: tuple[str, ...]


_GENERATED = ("generation", "inception")
METRICS = {
    "gfid": Metric("lower", (*_GENERATED, "reference")),
    "is": Metric("higher", _GENERATED),
    "kid": Metric("lower", (*_GENERATED, "held_out")),
    "precision": Metric("higher", (*_GENERATED, "held_out", "small_data")),  # small has one of this name, too
    "recall": Metric("higher", (*_GENERATED, "held_out")),
    "rfid": Metric("lower", ("held_out", "inception")),
    "psnr": Metric("higher", ("held_out",)),
    "ssim": Metric("higher", ("held_out",)),
    "lpips": Metric("lower", ("held_out", "lpips")),
    "l1": Metric("lower", ("held_out",)),
}
# Those of evaluation/small_data.py, asked for together as "small".
SMALL = {
    name: Metric(better, ("generation", "small_data"))
    for name, better in (
        ("class_accuracy", "higher"), ("frechet_pca", "lower"), ("coverage", "higher"), ("density", "higher"),
    )
}  # fmt: skip
# Those of evaluation/molecules.py, by what they depend on; each stands beside its `_real`, which is not ranked.
MOLECULES = {
    name: Metric("lower" if "rmsd" in name or "distance/" in name or name == "rdkit/charged" else "higher", sections)
    for sections, names in (
        (("reconstruction", "held_out"), (
            "reconstruction/element_accuracy", "reconstruction/elements_exact", "reconstruction/rmsd",
            "reconstruction/rmsd_median",
        )),
        (("reconstruction", "held_out", "perception"), ("reconstruction/match",)),
        (("generation",), ("edm/atom_stable", "edm/molecule_stable")),
        (("generation", "perception"), (
            "edm/valid", "rdkit/valid", "rdkit/connected", "rdkit/charged", "rdkit/unique", "rdkit/valid_unique",
            "rdkit/valid_connected_unique",
        )),
        (("generation", "perception", "training"), ("rdkit/novel", "rdkit/valid_connected_unique_novel")),
        (("generation", "held_out"), ("distance/atoms", "distance/elements", "distance/bond_lengths")),
    )
    for name in names
}  # fmt: skip
READINGS = METRICS | SMALL | MOLECULES
# What a number is called in one line, with the choices that its implementations differ in.
DEFINITIONS = {
    "gfid": "Fréchet distance of generated images to the reference, Inception-v3 pool features, float64",
    "is": "Inception Score, {splits}, logits without bias",
    "kid": "squared MMD to held-out images, cubic kernel, 100 subsets of at most 1,000",
    "precision": "share of generated images inside the held-out manifold, k = 3",
    "recall": "share of held-out images inside the generated manifold, k = 3",
    "rfid": "Fréchet distance of reconstructions to their originals, Inception-v3 pool features, float64",
    "psnr": "mean of the per-image PSNR in dB, pixels in [0, 1], not rounded",
    "ssim": "mean SSIM, Gaussian window of 11 pixels inside the image, sigma 1.5, data range 1",
    "lpips": "mean LPIPS-VGG of pairs scaled to [-1, 1]",
    "l1": "mean absolute error, pixels in [0, 1]",
    "small": "see unite_fast/evaluation/small_data.py",
}


def weights_hash(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values: the same for a checkpoint, its export and the model in memory."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def names_hash(names: list[str]) -> str:
    """SHA-256 of the relative paths of a data set, in order."""
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()


def environment(world: World, seconds: float) -> dict[str, Any]:
    """Where and when a number was computed."""
    cuda = world.device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name(world.device) if cuda else "cpu",
        "ranks": world.size,
        "versions": versions(
            "python", "unite_fast", "torch", "triton", "torchmetrics", "numpy", "scipy", "scikit-learn", "rdkit"
        ),
        "git": git_state(),
    }


def git_state() -> dict[str, Any] | None:
    """{"commit", "changed"} of the checkout this package runs from, None where it is installed outside of one."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str | None:
        with contextlib.suppress(OSError):
            done = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True)
            if done.returncode == 0:
                return done.stdout.strip()
        return None

    # An installed copy can lie inside somebody else's repository, whose commit says nothing about it.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", "."))}


def differences(left: dict[str, Any], right: dict[str, Any], metric: str) -> list[str]:
    """Names of the protocol's entries that keep two values of a metric from being compared; "a.b: x / y" each."""
    found = []
    for section in READINGS[metric].sections:
        mine, theirs = left.get(section) or {}, right.get(section) or {}
        for key in sorted({*mine, *theirs}):
            if key not in ("path", "file") and mine.get(key) != theirs.get(key):
                found.append(f"{section}.{key}: {_short(mine.get(key))} / {_short(theirs.get(key))}")
    texts = [side.get("definitions", {}).get(metric) for side in (left, right)]
    if None not in texts and texts[0] != texts[1]:
        found.append(f"definitions.{metric}: {' / '.join(texts)}")
    return found


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else f"{text[:8]}…"

"""Small runs for tests: a folder of two classes of images and a configuration that trains on it in a second."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from unite_fast.config import Config
from unite_fast.engine import checkpoint


def image_tree(root: Path, *, per_class: int = 12, size: int = 16, classes: int = 2) -> Path:
    """Class folders of distinguishable images: class c is brighter by c, with random spots."""
    generator = np.random.default_rng(0)
    for label in range(classes):
        folder = root / f"class_{label}"
        folder.mkdir(parents=True)
        for index in range(per_class):
            pixels = generator.integers(0, 120, (size, size, 3)) + 100 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:03d}.png")
    return root


def settings(folder: Path, **sections: dict) -> dict:
    """A complete small configuration as a dictionary; sections are merged over it."""
    base = {
        "name": "run",
        "runs": str(folder / "runs"),
        "model": {
            "image_size": 16, "patch_size": 8, "registers": 4, "latent_dim": 4, "depth": 2, "width": 16, "heads": 2,
            "num_classes": 2, "context_len": 2, "context_start": 1,
            "decoder": {"depth": 1, "width": 16, "heads": 2, "inner": 16},
        },
        "objective": {"flow_draws": 2, "lpips": {"weight": 0.0}},
        "optimizer": {"lr": 1e-3, "lr_batch": None, "ema_decay": 0.9},
        "train": {"steps": 20, "global_batch": 5, "accumulation": 1, "checkpoint_every": 10, "log_every": 5},
        "data": {"path": str(folder / "train"), "crop": "none", "workers": 0, "cache": True},
        "sampling": {"solver": "euler", "steps": 3},
        "evaluation": {"sheet_columns": 2},
    }  # fmt: skip
    for name, values in sections.items():
        base[name] = {**base[name], **values} if isinstance(values, dict) else values
    return base


def config(folder: Path, **sections: dict) -> Config:
    return Config.parse(settings(folder, **sections))


def config_file(folder: Path, **sections: dict) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(settings(folder, **sections)))
    return path


def latest_step(run: Path) -> int | None:
    """Optimizer steps of the newest checkpoint of a run, or None."""
    path = checkpoint.latest(run)
    return None if path is None else checkpoint.step_of(path)

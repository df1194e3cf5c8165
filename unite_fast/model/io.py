"""A model on disk: `model.safetensors` (weights) and `model.json` (sizes, and how the weights were made)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unite_fast.config import Sizes
from unite_fast.errors import UserError
from unite_fast.modality import modality
from unite_fast.model.two_pass import TOKENIZE_T_MAX, TwoPassModel
from unite_fast.weights import read_tensors, write_json, write_tensors

WEIGHTS, SIZES = "model.safetensors", "model.json"


def save_model(state: dict[str, Tensor], config: Sizes, folder: str | Path, *, made_by: dict[str, Any]) -> None:
    """Write a state dict and its sizes; `made_by` as in `unite_fast.importing.Trained`."""
    folder = Path(folder)
    write_tensors(state, folder / WEIGHTS, metadata={"format": "unite_fast"})
    sizes = {"modality": config.modality, "model": config.model_dump(mode="json"), "made_by": made_by}
    write_json(sizes, folder / SIZES)


def build_model(
    config: Sizes, state: dict[str, Tensor], made_by: dict[str, Any], *, source: str, device: torch.device | str
) -> TwoPassModel:
    """The network with these weights, ready for inference; arguments as of `save_model`.

    Raises:
        UserError: a recorded tokenize_t_max that is no number from 0 to 1; `source` says where it was read.
    """
    t_max = made_by.get("tokenize_t_max", TOKENIZE_T_MAX)
    if not isinstance(t_max, int | float) or isinstance(t_max, bool) or not 0 <= t_max <= 1:
        raise UserError(f"made_by.tokenize_t_max of {source} must be a number from 0 to 1, found {t_max!r}")
    model = modality(config.modality).network(config)
    model.tokenize_t_max = float(t_max)
    model.load_state_dict(state)
    return model.to(device).eval().requires_grad_(False)


def read_model(path: str | Path) -> tuple[Sizes, dict[str, Tensor], dict[str, Any]]:
    """(sizes, state dict, what made it) of an exported folder, or of a run's.

    Raises:
        UserError: nothing to load there, broken files, weights that do not fit the sizes.
    """
    folder = Path(path)
    if not folder.exists():
        raise UserError(f"no folder {folder}")
    if not (folder / SIZES).is_file() and (folder / "export" / SIZES).is_file():
        folder = folder / "export"
    if not (folder / SIZES).is_file():
        raise UserError(
            f"{path} holds no model: neither {SIZES} nor export/{SIZES} is there "
            f"(a run writes export/ when it ends; `unite-fast export` makes one from a checkpoint)"
        )
    try:
        record = json.loads((folder / SIZES).read_text(encoding="utf-8"))
        sizes, made_by, name = record["model"], record.get("made_by", {}), record.get("modality", "images")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / SIZES} is not a model description") from None
    if not isinstance(made_by, dict):
        raise UserError(f"made_by of {folder / SIZES} must be an object, found {made_by!r}")
    config = modality(name).sizes.parse(sizes, source=str(folder / SIZES))
    state = read_tensors(folder / WEIGHTS)
    check_state(state, config, source=str(folder / WEIGHTS))
    return config, state, made_by


def check_state(state: dict[str, Tensor], config: Sizes, *, source: str) -> None:
    """Raise a UserError that names the first entries which do not fit the sizes."""
    expected = modality(config.modality).network.state_shapes(config)
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in expected]
    problems += [
        f"{name} has shape {list(state[name].shape)}, the configuration needs {list(shape)}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{source} does not fit the model's sizes: " + "; ".join(problems[:3]) + more)

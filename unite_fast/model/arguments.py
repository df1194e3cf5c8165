"""Argument checks of a model's public methods and of the samplers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INDICES = (torch.int32, torch.int64)  # what an embedding takes


def kind_of(value: Any) -> str:
    """Description of an argument, for the error message that refuses it."""
    return f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_tensor(name: str, value: Any, *shape: int | str, integer: bool = False) -> None:
    """Refuse all but a tensor of that shape, floating-point or, if `integer`, int32 or int64. Waits for no device.

    Args:
        shape: sizes; a letter stands for any size.

    Raises:
        ValueError: with the argument's name, what it must be and what it is.
    """
    fits = isinstance(value, Tensor) and (value.dtype in INDICES if integer else value.is_floating_point())
    if fits and value.ndim == len(shape):
        if all(isinstance(wanted, str) or wanted == size for wanted, size in zip(shape, value.shape, strict=True)):
            return
    form = "an int32 or int64 tensor" if integer else "a floating-point tensor"
    raise ValueError(f"{name} must be {form} [{', '.join(map(str, shape))}], got {kind_of(value)}")


def check_labels(labels: Any, batch: int, null_label: int) -> None:
    """Refuse all but an integer tensor [batch]; on the CPU, where reading waits for nothing, also labels out of range.

    Raises:
        ValueError: see `check_tensor` and `check_integers`.
    """
    check_tensor("labels", labels, batch, integer=True)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        check_integers("labels", labels, 0, null_label)


def check_integers(name: str, values: Any, low: int, high: int, *, size: int | str = "B") -> None:
    """Refuse all but an integer tensor [size] with values in low … high. Waits for its device.

    Raises:
        ValueError: with the name, and what was expected and found.
    """
    integers = isinstance(values, Tensor) and values.dtype in (torch.uint8, torch.int8, torch.int16, *INDICES)
    if not integers or values.ndim != 1 or size not in ("B", len(values)):
        raise ValueError(f"{name} must be an integer tensor [{size}], got {kind_of(values)}")
    if len(values) and not low <= int(values.min()) <= int(values.max()) <= high:
        raise ValueError(f"{name} must lie in {low}..{high}, got {int(values.min())}..{int(values.max())}")

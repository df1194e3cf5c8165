"""One operator at one shape, as test_operators.py times it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import measure
import torch
from torch import Tensor

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
ON_GPU = measure.DEVICE == "cuda"
# A CPU multiplies and rounds bfloat16 far slower than float32; nobody trains on one in bfloat16.
LOW = torch.bfloat16 if ON_GPU else torch.float32


@dataclass(frozen=True)
class Case:
    """One operator at one shape.

    Attributes:
        shape: for the table.
        ours, eager: functions of `inputs` with one meaning; eager is plain PyTorch.
        inputs: tensors (those that take gradients require them) or None.
        floor: bytes of each direction that is timed; None where arithmetic, not memory, decides.
        compiled: whether torch.compile of eager is a rival on a GPU.
        changed: tensors that both change in place, the same ones.
    """

    shape: str
    ours: Callable
    eager: Callable
    inputs: tuple[Tensor | None, ...]
    floor: dict[str, int | None]
    compiled: bool = True
    changed: tuple[Tensor, ...] = ()


def normal(*shape: int, dtype: torch.dtype = LOW, grad: bool = True) -> Tensor:
    return torch.randn(shape, device=measure.DEVICE).to(dtype).requires_grad_(grad)


def size(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)

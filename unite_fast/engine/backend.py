"""What the engine needs from a framework, and plain PyTorch as the first answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from unite_fast.config import Config
from unite_fast.engine.optim import Groups, MuonAdamW
from unite_fast.engine.sharding import Layout

# On a CPU torch adds a tensor's squares up in float32 one after the other: the norm of so many random elements comes
# out 2e-6 too small, of ten million 4e-4, of fifty million 4e-3.
CPU_NORM_ELEMENTS = 2**18
MIN_BF16_CAPABILITY = (8, 0)


class Backend(Protocol):
    """What differs between plain PyTorch and DeepSpeed."""

    layout: Layout
    masters: dict[str, list[Tensor]]  # group kind -> the tensors the optimizer steps

    def forward(self, phase: str, inputs: dict[str, Any]) -> Any:
        """The model's forward."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of loss; average them over the ranks when it is the step's last."""

    def update(self) -> Tensor:
        """Clip, step the optimizer, drop the gradients; the global norm before clipping, 0-dim."""

    def publish(self) -> None:
        """Make the model compute with the masters' present values."""

    def gathered(self) -> AbstractContextManager[None]:
        """Whole parameters on every rank inside the context, as published, for calls that bypass `forward`."""


class AutocastForward(nn.Module):
    """The model under autocast, inside the wrapper, so that plain PyTorch and DeepSpeed compute alike.

    Args:
        model: whose forward runs.
        dtype: of autocast, None for none.
        compiled: the model's forward under torch.compile, to run in its place. The model itself stays as it is: what
            evaluation calls, its names and its state dict.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype | None, compiled: Callable[..., Any] | None = None
    ):
        super().__init__()
        self.model, self.dtype, self._compiled = model, dtype, compiled

    def forward(self, phase: str, **inputs: Any) -> Any:
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not None):
            return (self._compiled or self.model)(phase, **inputs)


def has_bf16(device: torch.device) -> bool:
    """Whether a device has matrix units for bfloat16, which an older GPU only emulates; one without an index stands for
    a planned GPU, which has."""
    if device.type != "cuda":
        return False
    return device.index is None or torch.cuda.get_device_capability(device) >= MIN_BF16_CAPABILITY


def autocast_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """bfloat16 where `train.precision` asks for it (auto: on a GPU that has it), None for float32."""
    precision = config.train.precision
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and has_bf16(device)) else None


class PlainBackend:
    """One process, whole parameters, no DeepSpeed."""

    def __init__(
        self,
        forward: AutocastForward,
        groups: Groups,
        optimizer: MuonAdamW,
        config: Config,
    ):
        self._forward, self._optimizer, self._clip = forward, optimizer, config.optimizer.clip_norm
        self._parameters = [p for _, group in groups for p in group.values()]
        self.masters = {kind: list(group.values()) for kind, group in groups}
        self.layout = Layout.whole({name: p for _, group in groups for name, p in group.items()})

    def forward(self, phase: str, inputs: dict[str, Any]) -> Any:
        return self._forward(phase, **inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def update(self) -> Tensor:
        norm = gradient_norm(self._parameters)
        self._optimizer.clip_coefficient = clip_coefficient(norm, self._clip)
        self._optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None
        return norm

    def publish(self) -> None:
        """Nothing to do: the masters are the model's parameters."""

    @contextmanager
    def gathered(self) -> Iterator[None]:
        yield


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Global norm of the gradients that there are, 0-dim, without waiting for it."""
    return total_norm([p.grad for p in parameters if p.grad is not None])


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Norm of all elements of tensors on one device, 0-dim, without waiting for it."""
    if tensors and tensors[0].device.type == "cpu":
        tensors = [piece for tensor in tensors for piece in tensor.reshape(-1).split(CPU_NORM_ELEMENTS)]
    return nn.utils.get_total_norm(tensors, foreach=True)


def clip_coefficient(norm: Tensor, max_norm: float | None) -> Tensor | None:
    """What gradients of this global norm are scaled by, 0-dim on its device, so that theirs is at most max_norm.

    That of torch.nn.utils.clip_grad_norm_; None where nothing is clipped.
    """
    return None if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)

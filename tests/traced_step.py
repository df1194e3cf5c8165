"""A training step on tensors without numbers: seconds where the kernels' interpreter takes minutes, and any size.

Every storage that PyTorch or an operator makes is seen, and when it goes; what an operator uses inside is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from test_counts import Plain
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unite_fast.config import Config
from unite_fast.engine.fp8 import use_fp8
from unite_fast.modality import modality_of
from unite_fast.objective.draws import SeededDraws
from unite_fast.objective.two_pass import two_pass_step

CPU = torch.device("cpu")


class Alive(TorchDispatchMode):
    """Bytes of the storages made inside that are alive, and the most that were at one moment."""

    def __init__(self, *before: torch.Tensor):
        super().__init__()
        self._seen = {tensor.untyped_storage()._cdata for tensor in before}
        self.total = self.peak = 0

    def __torch_dispatch__(self, operator: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._seen:
                storage = tensor.untyped_storage()
                self._seen.add(storage._cdata)
                self.total += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.total)
        return made

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.total -= size


def traced_peak(config: Config, size: int, micro_batches: int = 1) -> int:
    """Bytes beside the state, gradients not in it, that the passes of one step need: the largest samples, float32."""
    modality = modality_of(config)
    inputs = modality.probe(config, size, CPU)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = modality.network(config.model)
        if config.train.fp8:
            use_fp8(model)
        objective = modality.objective(config, CPU, None)
        held = [*model.parameters(), *model.buffers()]
        if config.modality == "images":
            inputs = inputs._replace(data=mode.from_tensor(inputs.data), labels=mode.from_tensor(inputs.labels))
            held += [inputs.data, inputs.labels]
        with Alive(*held) as alive:
            for stream in range(micro_batches):
                draws = SeededDraws(config.objective, seed=0, step=0, stream=stream, device=CPU)
                two_pass_step(Plain(model), objective, inputs.data, inputs.labels, draws, shape=inputs.shape)
    return alive.peak

"""One training engine over plain PyTorch and DeepSpeed: passes, gradient accumulation, clipping, the update, EMA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from unite_fast.config import Config
from unite_fast.engine.backend import AutocastForward, Backend, PlainBackend, autocast_dtype
from unite_fast.engine.batch import resolve_batch
from unite_fast.engine.compiling import compiled_passes
from unite_fast.engine.ema import Ema
from unite_fast.engine.fp8 import use_fp8, without_fp8
from unite_fast.engine.optim import MuonAdamW, in_stages, lr_factor, parameter_groups, peak_lr
from unite_fast.engine.world import World


class Engine:
    """Trains a model whose `forward(phase, **inputs)` is called several times per optimizer step.

    A step is: for each pass `outputs = engine(phase, …)`, `engine.backward(loss, last=…)`, then `engine.step()`. A
    loss is the mean over this rank's micro-batch divided by the number of accumulated micro-batches; gradients are
    summed over the passes in place and averaged over the ranks, once, by the last backward.

    One process without ZeRO is plain PyTorch; anything else runs on DeepSpeed. No value is read back from the device,
    except by ZeRO 3's own overflow check.

    Args:
        model: on any device; moved to the world's. Its trained parameters must be float32. `matrix_parameters()`
            names those that Muon updates.
        config: `optimizer` and `train` are read.
        world: see `init_world`.
        steps_per_epoch: optimizer steps in one pass over the data, for the schedule.
        global_batch: images an optimizer step; from the configuration if None, which then must not say `auto`.

    Attributes:
        model: the module that was given, for evaluation inside `weights()`.
        step_count: optimizer steps taken.
        samples_seen: images or molecules in these steps, over all ranks.
        last_lr: learning rate of the latest of them.

    Raises:
        UserError: DeepSpeed is needed and not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        world: World,
        *,
        steps_per_epoch: float,
        global_batch: int | None = None,
    ):
        if global_batch is None:
            global_batch = resolve_batch(config.train, world.size).global_batch
        self.config, self.world = config, world
        self.steps_per_epoch, self.global_batch = steps_per_epoch, global_batch
        self.model = model.to(world.device)
        if config.train.fp8:
            use_fp8(model)
        self.step_count = self.samples_seen = 0
        self.last_lr = 0.0
        self.peak_lr = peak_lr(config.optimizer, global_batch)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups = list(parameter_groups(model, config.optimizer.kind).items())
        if config.train.zero_stage in (1, 2):
            groups = in_stages(groups)
        self.optimizer = MuonAdamW(groups, config.optimizer, self.peak_lr)
        passes = compiled_passes(model, config) if config.train.compile else None
        forward = AutocastForward(model, autocast_dtype(config, world.device), passes)
        if world.size == 1 and config.train.zero_stage == 0:
            self.backend: Backend = PlainBackend(forward, groups, self.optimizer, config)
        else:
            from unite_fast.engine.deepspeed_backend import DeepSpeedBackend

            self.backend = DeepSpeedBackend(forward, groups, self.optimizer, config, world)
        self.optimizer.initialise_state(self.backend.masters)
        self.ema = Ema(self.backend.layout, config.optimizer.ema_decay, config.optimizer.ema_decays)
        self.optimizer.ema = self.ema

    def __call__(self, phase: str, **inputs: Any) -> Any:
        """`model(phase, **inputs)`, under bf16 autocast and torch.compile where the configuration asks for them."""
        return self.backend.forward(phase, inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a scalar loss; `last` marks the optimizer step's final backward, which communicates."""
        self.backend.backward(loss, last)

    def step(self) -> Tensor:
        """Clip, update weights and EMA, drop the gradients.

        Returns:
            Global gradient norm before clipping, 0-dim float32 on the device; not finite if a gradient was not.
        """
        self.last_lr = self.peak_lr * lr_factor(self.progress, self.steps_per_epoch, self.config.optimizer)
        self.optimizer.set_lr(self.last_lr)
        norm = self.backend.update()
        self.ema.update()
        self.step_count += 1
        self.samples_seen += self.global_batch
        return norm

    @property
    def parameter_count(self) -> int:
        """Trained parameters of the whole model, whatever of them ZeRO keeps on this rank."""
        return sum(shape.numel() for shape in self.backend.layout.shapes.values())

    @property
    def progress(self) -> float:
        """Samples seen, in steps of the current batch size: `step_count` unless the batch size has changed."""
        return self.samples_seen / self.global_batch

    @contextmanager
    def ema_weights(self) -> Iterator[nn.Module]:
        """The model with its EMA weights, whole on every rank, in evaluation mode, no gradients.

        FP8 products are off inside. Collective under ZeRO. Training continues unchanged afterwards, except after an
        exception: other ranks may be elsewhere, so nothing collective follows, and a sharded model keeps the EMA's.
        """
        training = self.model.training
        self.ema.swap()
        self.backend.publish()
        self.model.eval()
        try:
            with self.backend.gathered(), without_fp8(self.model), torch.no_grad():
                yield self.model
        except BaseException:
            self.ema.swap()
            raise
        finally:
            self.model.train(training)
        self.ema.swap()
        self.backend.publish()

    def model_state(self) -> Iterator[tuple[str, Tensor]]:
        """(name, new whole tensor) of the float32 weights and the persistent buffers. Collective under ZeRO 1 to 3."""
        yield from self.backend.layout.gather(lambda master: master)
        yield from self._buffer_copies()

    def ema_state(self, decay: float | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, new whole tensor) of the averaged weights and the persistent buffers. Collective as `model_state`.

        `decay` chooses among `optimizer.ema_decays`; None is `optimizer.ema_decay`.
        """
        yield from self.backend.layout.gather(lambda master: self.ema.of(master, decay))
        yield from self._buffer_copies()

    def buffers(self) -> dict[str, Tensor]:
        """Persistent buffers and frozen parameters: what the state dict holds beside the trained parameters."""
        state = self.model.state_dict()
        return {name: tensor for name, tensor in state.items() if name not in self.parameters}

    def _buffer_copies(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.buffers().items():
            yield name, tensor.clone()

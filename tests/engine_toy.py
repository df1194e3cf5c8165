"""A small model with the traits of UNITE that matter to an engine, and its data."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from ranks import ALONE
from torch import Tensor

from unite_fast.config import Config
from unite_fast.engine.engine import Engine

GLOBAL_BATCH, FEATURES = 8, 6


class ToyNorm(nn.Module):
    """A layer whose parameters are used outside its forward, which ZeRO 3's hooks do not see."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.weight


class Toy(nn.Module):
    """A trunk used by both phases, a decoder used by one, parameters of 1 to 4 dimensions, zeros, a buffer."""

    def __init__(self, width: int = 11):
        super().__init__()
        self.patches = nn.Conv2d(1, 5, (2, 3), bias=False)
        self.position = nn.Parameter(torch.randn(3, 5))
        self.first = nn.Linear(5, width)
        self.second = nn.Linear(width, width)
        self.modulation = nn.Linear(width, width)
        nn.init.zeros_(self.modulation.weight)
        self.norm = ToyNorm(width)
        self.decoder = nn.Linear(width, 7)
        self.classes = nn.Embedding(4, width)
        self.register_buffer("frequencies", torch.randn(width))

    def matrix_parameters(self) -> set[str]:
        return {n for n, p in self.named_parameters() if p.ndim >= 2 and n != "position"}

    def reading_order(self) -> list[str]:
        return [name for name, _ in self.named_parameters()]

    def trunk(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(tokens))
        hidden = self.norm.scaled(hidden + self.second(hidden))
        return hidden * (1 + self.modulation(torch.cos(self.frequencies * hidden)))

    def forward(self, phase: str, x: Tensor, labels: Tensor | None = None) -> Any:
        """x [B, 6]: "reconstruct" -> (latent [B, width], loss); "flow" with labels [B] -> loss."""
        if phase == "reconstruct":
            tokens = F.conv2d(x.view(-1, 1, 2, 3), self.patches.weight).flatten(1) + self.position.mean(0)
            latent = self.trunk(tokens)
            return latent, (self.decoder(latent) - 3).square().mean()
        tokens = x[:, :5]
        return (self.trunk(tokens) + self.classes(labels) - 1).square().mean()


def toy_config(*, stage: int = 0, kind: str = "muon", **optimizer: Any) -> Config:
    options = {"kind": kind, "lr": 0.02, "lr_batch": None, "clip_norm": 0.7, "weight_decay": 0.01, "ema_decay": 0.8}
    options |= {"ema_decays": [0.5]}
    return Config.parse(
        {
            "train": {
                "steps": 5, "global_batch": GLOBAL_BATCH, "accumulation": 2, "device": "cpu", "zero_stage": stage,
            },  # fmt: skip
            "optimizer": options | optimizer,
            "data": {"path": "unused"},
        }
    )


def toy_model(width: int = 11) -> Toy:
    torch.manual_seed(3)
    return Toy(width)


def toy_batch(step: int) -> tuple[Tensor, Tensor]:
    """Features [8, 6] and labels [8] of an optimizer step."""
    generator = torch.Generator().manual_seed(step)
    features = torch.randn(GLOBAL_BATCH, FEATURES, generator=generator)
    return features, torch.randint(0, 4, (GLOBAL_BATCH,), generator=generator)


def toy_step(engine: Any, step: int, *, on_backward: Any = lambda: None) -> Tensor:
    """One optimizer step of two micro-batches on this rank's share; the second keeps pass one's graph waiting.

    Returns the gradient norm. `on_backward` is called after each of the four backward passes.
    """
    features, labels = toy_batch(step)
    shares = features.chunk(engine.world.size)[engine.world.rank], labels.chunk(engine.world.size)[engine.world.rank]
    (x0, x1), (y0, y1) = (share.chunk(2) for share in shares)
    engine.backward(engine("reconstruct", x=x0)[1] / 2, last=False)
    on_backward()
    engine.backward(engine("flow", x=x0, labels=y0) / 2, last=False)
    on_backward()
    latent, reconstruction = engine("reconstruct", x=x1)
    engine.backward(engine("flow", x=x1, labels=y1) / 2, last=False)
    on_backward()
    engine.backward(reconstruction / 2 + 0 * latent.sum(), last=True)
    on_backward()
    return engine.step()


def float32_newton_schulz(grad: Tensor, coefficients: tuple, steps: int, eps: float) -> Tensor:
    """torch.optim.Muon's iteration without its cast to bfloat16, so that both sides can agree to 1e-4."""
    a, b, c = coefficients
    x = grad.T if grad.size(0) > grad.size(1) else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if grad.size(0) > grad.size(1) else x


def engine_at(steps: int, *, width: int = 11, keep: int = 3, **optimizer) -> Engine:
    config = toy_config(**optimizer)
    config = config.model_copy(update={"train": config.train.model_copy(update={"keep_checkpoints": keep})})
    engine = Engine(toy_model(width), config, ALONE, steps_per_epoch=10)
    advance(engine, steps)
    return engine


def advance(engine: Engine, steps: int) -> list[float]:
    return [toy_step(engine, step).item() for step in range(engine.step_count, engine.step_count + steps)]


def everything(engine: Engine) -> dict[str, torch.Tensor]:
    names = {id(parameter): name for name, parameter in engine.parameters.items()}
    state = {f"{names[id(p)]}/{k}": t.clone() for p, s in engine.optimizer.state.items() for k, t in s.items()}
    averages = {f"ema/{decay}/{n}": t for decay in (None, *engine.ema.extra) for n, t in engine.ema_state(decay)}
    return dict(engine.model_state()) | averages | state


def assert_identical(left: Engine, right: Engine) -> None:
    a, b = everything(left), everything(right)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []

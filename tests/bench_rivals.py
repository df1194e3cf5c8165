"""What tests of the benchmarks' rivals share: the same draws for both, and comparisons of gradients and updates."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch.nn as nn
from one_graph import RecordedDraws
from torch import Tensor

from unite_fast.engine.engine import Engine
from unite_fast.objective.draws import TokenizeDraws

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from plain_training import PlainTrainer, plain_name
from plain_unite import PlainDraws

# The same float32 arithmetic in another order: 1e-6 to 3e-6 on these models. A wrong term is 1e-2 or more.
CLOSE = 1e-4
NOTHING = 1e-6  # norm of a gradient that is rounding alone, about 1e-8


def error(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm().clamp_min(1e-6)).detach())


def recorded(drawn: PlainDraws) -> RecordedDraws:
    """The rival's draws as ours takes them."""
    tokenize = TokenizeDraws(drawn.noise, drawn.t_tokenize, (drawn.mix_mask, drawn.mix_t, drawn.mix_noise), None)
    return RecordedDraws(tokenize, drawn.flow_noise, drawn.t, drawn.drop)


def assert_same_gradients(model: nn.Module, plain: PlainTrainer, rounding: str | None = None) -> None:
    """Every parameter's gradient; that of the parameter named `rounding` is nothing but that, in both."""
    gradients = {name: p.grad for name, p in plain.model.named_parameters()}
    compared = set()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        other = plain_name(name, model.config.depth)
        if name == rounding:
            assert max(float(g.norm()) for g in (gradients[other], parameter.grad)) < NOTHING
        else:
            assert error(gradients[other], parameter.grad) < CLOSE, name
        compared.add(other)
    assert compared == set(gradients)


def assert_same_update(
    model: nn.Module, engine: Engine, plain: PlainTrainer, start: Mapping[str, Tensor], rounding: str | None = None
) -> None:
    """Weights and EMA since `start`; but for the parameter named `rounding`, whose gradient is nothing but that."""
    theirs = dict(plain.model.named_parameters())
    averages = dict(zip(theirs, plain.ema, strict=True))
    for name, parameter in model.named_parameters():
        other = plain_name(name, model.config.depth)
        if other is None or name == rounding:
            continue
        moved = parameter.detach() - start[name]
        assert float(moved.norm()) > 0, name
        # Of the way moved. AdamW divides a gradient by its own size, which magnifies the rounding of tiny ones.
        assert error(theirs[other].detach() - start[name], moved) < 1e-2, name
        assert error(averages[other] - start[name], engine.ema.of(parameter) - start[name]) < 1e-2, name

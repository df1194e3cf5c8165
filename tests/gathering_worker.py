"""What each rank does in test_gathering.py: the same steps with weights that come late and with weights that are there.

Usage: gathering_worker.py FOLDER
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from engine_toy import toy_config
from engine_unite import unite_config, unite_engine, unite_step
from safetensors.torch import save_file

from unite_fast.config import Config
from unite_fast.engine import deepspeed_backend, optim
from unite_fast.engine.gathering import WeightGather
from unite_fast.engine.world import World, init_world, leave_world

BF16 = {"precision": "bf16"}
STAGE_ELEMENTS = 1000  # the small model's matrices, too, are in several groups
CASES = {
    "fp32": dict(stage=1),
    "bf16": dict(stage=1, train=BF16),
    "flow-into-pass-one": dict(stage=2, train=BF16, stop_gradient=False),
    "two-encoders": dict(stage=2, train=BF16, model={"shared": False}),
    "recomputed": dict(stage=1, train=BF16, model={"checkpoint_activations": True}),
    "adamw": dict(stage=1, train=BF16, kind="adamw"),
}


def configured(*, stage: int, kind: str = "muon", stop_gradient: bool = True, **sections: dict) -> Config:
    values = unite_config(stage=stage, kind=kind, stop_gradient=stop_gradient).model_dump()
    values["model"]["depth"] = 4
    for name, options in sections.items():
        values[name] |= options
    return Config.parse(values)


class Late:
    """Stands for a collective that is through only when somebody waits for it; before, its target is not a number."""

    def __init__(self, target: torch.Tensor, bring: Callable[[], object], waited: Callable[[], None] = lambda: None):
        self.bring, self.waited = bring, waited
        target.fill_(torch.nan)

    def wait(self) -> None:
        self.waited()
        self.bring()


@contextmanager
def late() -> Iterator[tuple[list[int], list[int]]]:
    """No rank has weights after an update until it waits for them.

    Gives the bytes of each tensor that brings them, and the numbers of the gathers in the order in which they are
    waited for.
    """
    gather, reduce, begin = dist.all_gather_into_tensor, dist.all_reduce, WeightGather.begin
    sent, waits, numbers = [], [], itertools.count()

    def call(target: torch.Tensor, mine: torch.Tensor, async_op: bool) -> Late:
        sent.append(target.nbytes)
        number, kept = next(numbers), mine.clone()
        return Late(target, lambda: gather(target, kept), lambda: waits.append(number))

    def noted(tensor: torch.Tensor, async_op: bool = False) -> Late | None:
        if not async_op:  # the gradient norm's
            return reduce(tensor)
        sent.append(tensor.nbytes)
        kept = tensor.clone()
        return Late(tensor, lambda: reduce(tensor.copy_(kept)))

    def poisoned(self: WeightGather) -> None:
        begin(self)
        for group in self._groups:
            group.whole.fill_(torch.nan)

    with (
        mock.patch.object(dist, "all_gather_into_tensor", call),
        mock.patch.object(dist, "all_reduce", noted),
        mock.patch.object(WeightGather, "begin", poisoned),
    ):
        yield sent, waits


@contextmanager
def at_once() -> Iterator[None]:
    """Float32 weights that are there when the update ends, as after DeepSpeed's own step."""
    begin = WeightGather.begin

    def waiting(self: WeightGather) -> None:
        begin(self)
        self.finish()

    with (
        mock.patch.object(deepspeed_backend, "read_in_bf16", lambda *_, fp8: set()),
        mock.patch.object(WeightGather, "begin", waiting),
    ):
        yield


def steps(config: Config, world: World, sent: list[int]) -> tuple[dict, dict[str, torch.Tensor]]:
    """What four steps show, and the weights behind them.

    Gradient norms; the bytes that bring one update together; how many groups are on their way behind each block of the
    next forward; how far the model's parameters are from the float32 averages where somebody looks at them.
    """
    engine, flying = unite_engine(config, world), []
    norms = [unite_step(engine, 0).item()]
    update = sum(sent)
    blocks = [*engine.model.encoder.blocks, *engine.model.decoder.blocks]
    for block in blocks:
        block.register_forward_hook(lambda *_: flying.append(len(engine.backend._gather._flying)))
    norms += [unite_step(engine, step).item() for step in (1, 2)]
    averages = dict(engine.ema_state())
    with engine.ema_weights() as model:
        off = max((parameter - averages[name]).abs().max().item() for name, parameter in model.named_parameters())
    norms.append(unite_step(engine, 3).item())
    seen = {"norms": norms, "sent": update, "flying": flying[: len(blocks)], "off": off}
    return seen, dict(engine.model_state())


def main(folder: Path) -> None:
    optim.STAGE_ELEMENTS = STAGE_ELEMENTS
    world, report = init_world(toy_config()), {}
    for name, case in CASES.items():
        config = configured(**case)
        with late() as (sent, waits):
            report[name], weights = steps(config, world, sent)
        with at_once():
            expected, whole = steps(config, world, [])
        report[name] |= {"expected": expected["norms"], "waits": waits}
        if world.is_main:
            save_file(weights, folder / f"{name}.safetensors")
            save_file(whole, folder / f"{name}.expected.safetensors")
    (folder / f"rank{world.rank}.json").write_text(json.dumps(report))
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

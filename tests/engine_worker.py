"""What each rank does in test_engine_deepspeed.py; run by a launcher, writes what it saw into a folder.

Usage: engine_worker.py FOLDER [--local_rank=N, which the deepspeed launcher adds]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from engine_toy import toy_batch, toy_config, toy_model, toy_step
from engine_unite import unite_config, unite_engine, unite_step
from safetensors.torch import save_file

from unite_fast.engine import checkpoint, deepspeed_backend, optim
from unite_fast.engine.engine import Engine
from unite_fast.engine.world import World, init_world, leave_world

COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "reduce", "reduce_scatter",
    "reduce_scatter_tensor", "reduce_scatter_single", "broadcast", "all_to_all_single", "all_to_all", "send", "isend",
)  # fmt: skip

# Each value of both choices is seen under sharded gradients. In bfloat16 Linears add to the gradients that are there
# (unite_fast/model/casts.py), between the hooks of DeepSpeed and ours.
UNITE = {
    "zero1": dict(stage=1, kind="muon", stop_gradient=True),
    "zero2": dict(stage=2, kind="muon", stop_gradient=False),
    "zero3": dict(stage=3, kind="adamw", stop_gradient=False),
    "zero0.bf16": dict(stage=0, kind="muon", stop_gradient=True, precision="bf16"),
    "zero2.bf16": dict(stage=2, kind="muon", stop_gradient=False, precision="bf16"),
    "zero3.bf16": dict(stage=3, kind="adamw", stop_gradient=True, precision="bf16"),
}


def unite_steps(case: dict) -> range:
    """One in bfloat16: what it rounds otherwise behind an update grows from step to step."""
    return range(1 if "precision" in case else 3)


class Counter:
    """Counts this process's collectives by name."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        for name in COLLECTIVES:
            original = getattr(dist, name, None)
            if original is not None:
                setattr(dist, name, self._counting(name, original))

    def _counting(self, name, original):
        def call(*args, **kwargs):
            self.seen.append(name)
            return original(*args, **kwargs)

        return call

    def take(self) -> list[str]:
        seen, self.seen = self.seen, []
        return seen


def train(engine: Engine, steps: range, counter: Counter) -> dict:
    norms, seen = [], []
    counter.take()
    for step in steps:
        norms.append(toy_step(engine, step, on_backward=lambda: seen.append(counter.take())).item())
        seen.append(counter.take())
    return {"norms": norms, "collectives": seen}


def keep(engine: Engine, folder: Path, name: str) -> None:
    weights, averages = dict(engine.model_state()), dict(engine.ema_state())
    if engine.world.is_main:
        save_file(weights, folder / f"{name}.weights.safetensors")
        save_file(averages, folder / f"{name}.ema.safetensors")


def evaluate_alone(engine: Engine) -> float:
    """An EMA evaluation that rank 0 runs by itself, calling what bypasses the module's forward."""
    with engine.ema_weights() as model:
        value = 0.0
        if engine.world.is_main:
            for _ in range(2):
                value = model.trunk(toy_batch(9)[0][:, :5]).sum().item()
    return value


def main(folder: Path) -> None:
    world = init_world(toy_config())
    counter = Counter()  # before DeepSpeed starts, which keeps references to some of them
    deepspeed_backend.BUCKET_ELEMENTS = 50  # many buckets, with windows that begin and end inside of parameters
    optim.STAGE_ELEMENTS = 50  # and all the stages
    report: dict = {}
    # ZeRO 3 last: for it DeepSpeed replaces torch.nn.functional.linear, for the rest of a process's life.
    for stage, kind in ((0, "muon"), (1, "muon"), (2, "muon"), (3, "adamw")):
        config = toy_config(stage=stage, kind=kind)
        name = f"zero{stage}"
        engine = Engine(toy_model(), config, world, steps_per_epoch=10)
        first = train(engine, range(3), counter)
        saved = checkpoint.save(engine, folder / name, {"stage": stage})
        value = evaluate_alone(engine)
        second = train(engine, range(3, 5), counter)
        keep(engine, folder, name)
        state_bytes = sum(
            tensor.numel() * tensor.element_size()
            for state in engine.optimizer.state.values()
            for tensor in state.values()
            if isinstance(tensor, torch.Tensor)
        )
        resumed = Engine(toy_model(), config, world, steps_per_epoch=10)
        checkpoint.load(resumed, folder / f"single_{kind}" / "checkpoints" / saved.name)
        train(resumed, range(3, 5), counter)
        keep(resumed, folder, f"{name}.from_single")
        report[name] = {
            "norms": first["norms"] + second["norms"],
            "collectives": first["collectives"],
            "state_bytes": state_bytes,
            "ema_bytes": sum(shadow.numel() * 4 for shadow in engine.ema.shadows),
            "straddling": [len(exchange.straddling) for exchange in engine.optimizer.exchanges.values()],
            "trunk": value,
        }
        for unite, case in UNITE.items():
            if case["stage"] == stage:
                engine = unite_engine(unite_config(**case), world)
                report[f"unite.{unite}"] = [unite_step(engine, step).item() for step in unite_steps(case)]
                keep(engine, folder, f"unite.{unite}")
    (folder / f"rank{world.rank}.json").write_text(json.dumps(report))
    refused_save(world, folder)
    leave_world()


def refused_save(world: World, folder: Path) -> None:
    """Rank 0 cannot write; every rank must hear of it instead of waiting for it."""
    from unite_fast.errors import UserError

    engine = Engine(toy_model(), toy_config(stage=2), world, steps_per_epoch=10)
    blocked = folder / "blocked"
    if world.is_main:
        blocked.write_text("a file where the run folder should be")
    try:
        checkpoint.save(engine, blocked, {})
    except UserError as error:
        (folder / f"refused{world.rank}").write_text(str(error))


if __name__ == "__main__":
    main(Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--"))))

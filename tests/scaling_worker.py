"""What each rank does in test_scaling.py: steps under every ZeRO stage, counting what is sent and what is held.

Usage: scaling_worker.py FOLDER
"""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from engine_toy import toy_config
from engine_unite import unite_config, unite_engine, unite_step

from unite_fast.config import Config
from unite_fast.engine import deepspeed_backend, optim
from unite_fast.engine.world import await_gloo, init_world, leave_world

# Whether the whole tensor of a collective is its first argument, or that of the name.
WHOLE = {
    "all_reduce": "tensor",
    "all_gather_into_tensor": "output_tensor",
    "reduce_scatter_tensor": "input",
    "all_to_all_single": "input",
}
# Position of it where it is given without a name.
POSITION = {"all_reduce": 0, "all_gather_into_tensor": 0, "reduce_scatter_tensor": 1, "all_to_all_single": 1}
OTHERS = ("all_gather", "reduce", "reduce_scatter", "all_to_all", "send", "isend")
# ZeRO 3 as it is when layers are too large to be kept between passes; here they are small, and would be.
KEEP_NOTHING = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
STAGE_ELEMENTS = 1000  # the small model's matrices too are reduced in stages
RUNS = {"zero0": (0, "muon"), "zero1": (1, "muon"), "zero2": (2, "muon"), "zero3": (3, "adamw")}


def scaling_config(stage: int, kind: str) -> Config:
    return unite_config(stage=stage, kind=kind, stop_gradient=True)


class Volume:
    """Elements of this process's collectives by name; of an exchange what really leaves for the other rank."""

    def __init__(self) -> None:
        self.elements: Counter[str] = Counter()
        for name in WHOLE:
            setattr(dist, name, self._counting(name, getattr(dist, name)))
        for name in OTHERS:
            setattr(dist, name, self._refused(name))

    def _counting(self, name, original):
        def call(*args, **kwargs):
            tensor = kwargs[WHOLE[name]] if WHOLE[name] in kwargs else args[POSITION[name]]
            self.elements[name] += tensor.numel()
            return original(*args, **kwargs)

        return call

    def _refused(self, name):
        def call(*args, **kwargs):
            raise AssertionError(f"{name} is not in the theory")

        return call

    def take(self) -> dict[str, int]:
        taken, self.elements = dict(self.elements), Counter()
        return taken


def live_bytes() -> int:
    """Bytes of all tensors' storages in this process, each once."""
    await_gloo()  # else the buffers of its last collective may still be there
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def main(folder: Path) -> None:
    optim.STAGE_ELEMENTS = STAGE_ELEMENTS
    world = init_world(toy_config())
    volume = Volume()  # before DeepSpeed starts, which keeps references to some of them
    original = deepspeed_backend.deepspeed_config

    def config_that_keeps_nothing(*arguments):
        made = original(*arguments)
        if made["zero_optimization"]["stage"] == 3:
            made["zero_optimization"] |= KEEP_NOTHING
        return made

    report = {}
    for keeps in (True, False):
        deepspeed_backend.deepspeed_config = original if keeps else config_that_keeps_nothing
        for name, (stage, kind) in RUNS.items():
            if not keeps and stage != 3:
                continue
            before = live_bytes()
            engine = unite_engine(scaling_config(stage, kind), world)
            held = []
            for step in range(2):  # ZeRO 3 learns its order in the first
                volume.take()
                update = engine.backend.update
                engine.backend.update = lambda update=update: (held.append(live_bytes() - before), update())[1]
                unite_step(engine, step)
                engine.backend.update = update
            report[name if keeps else f"{name}.keeps nothing"] = {"sent": volume.take(), "held": held[-1]}
            del engine, update
    (folder / f"rank{world.rank}.json").write_text(json.dumps(report))
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

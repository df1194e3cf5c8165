"""What each rank does in test_compile.py and test_fp8.py: optimizer steps of a small UNITE, by ZeRO stage.

Usage: compile_worker.py FOLDER compile|fp8 STAGE …
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from compile_toy import compile_config
from engine_toy import toy_config
from engine_unite import unite_engine, unite_step
from safetensors.torch import save_file

from unite_fast.engine import compiling
from unite_fast.engine.world import init_world, leave_world


def main(folder: Path, option: str, stages: list[int]) -> None:
    world = init_world(toy_config())
    compiling.BACKEND = "aot_eager"  # the passes are traced and cut the same way, without minutes of a C++ compiler
    counters, report = torch._dynamo.utils.counters, {}
    for stage in stages:
        counters.clear()
        engine = unite_engine(compile_config(stage=stage, draws=1, **{"compile": False, option: True}), world)
        norms = [unite_step(engine, step).item() for step in range(2)]
        with engine.ema_weights() as model:
            evaluated = model.tokenize(torch.zeros(1, 3, 8, 8), noise=torch.ones(1, 4, 6), t=torch.zeros(1))
        norms.append(unite_step(engine, 2).item())
        state = dict(engine.model_state())
        if world.is_main:
            save_file(state | {"evaluated": evaluated}, folder / f"zero{stage}.safetensors")
        report[stage] = {
            "norms": norms,
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": list(counters["graph_break"]),
        }
    (folder / f"rank{world.rank}.json").write_text(json.dumps(report))
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [int(stage) for stage in sys.argv[3:]])

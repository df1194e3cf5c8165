"""The main job through its launchers: two CPU ranks under DeepSpeed, then one process that continues."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import config, config_file, image_tree
from safetensors.torch import load_file

from unite_fast.engine.loop import train

SCRIPT = Path(__file__).resolve().parents[1] / "unite_fast" / "train.py"


def test_two_ranks_then_one_agree_with_one_process(tmp_path):
    pytest.importorskip("deepspeed")
    image_tree(tmp_path / "train")
    batch = {"global_batch": 6, "accumulation": 1, "zero_stage": 2, "device": "cpu", "checkpoint_every": 2, "log_every": 1}
    path = config_file(tmp_path, train={**batch, "steps": 4})
    launcher = Path(sys.executable).with_name("deepspeed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{launcher.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [launcher, "--num_gpus", "2", SCRIPT, "--config", path], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # The same micro-batches on one process: two accumulated in place of two ranks.
    alone = {**batch, "accumulation": 2, "zero_stage": 0, "steps": 6}
    continued = train(config(tmp_path, train=alone), resume=True)
    reference = train(config(tmp_path, train=alone, name="reference"))
    weights = load_file(continued / "checkpoints" / "step_00000006" / "model.safetensors")
    for name, truth in load_file(reference / "checkpoints" / "step_00000006" / "model.safetensors").items():
        assert float((weights[name] - truth).norm() / truth.norm().clamp_min(1e-3)) < 1e-3, name

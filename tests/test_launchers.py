"""The main job through its launchers: two CPU ranks under DeepSpeed, then one process that continues."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from data_trees import wait_until
from ranks import free_port
from runs import config, config_file, image_tree, latest_step
from safetensors.torch import load_file

from unite_fast import train as script
from unite_fast.engine.loop import train

SCRIPT = Path(__file__).resolve().parents[1] / "unite_fast" / "train.py"
LAUNCHER = Path(sys.executable).with_name("deepspeed")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{LAUNCHER.parent}:{os.environ['PATH']}"}


def on_two_ranks(config: Path) -> list[str | Path]:
    """The command; its port is a free one, as DeepSpeed's own may be another run's."""
    return [LAUNCHER, "--num_gpus", "2", "--master_port", str(free_port()), SCRIPT, "--config", config]


def test_a_bad_configuration_is_told_by_rank_0_first(tmp_path, capsys, monkeypatch):
    """Launchers end the others before they tell it, too; a rank that finds it alone tells it in the end."""
    waited = []
    monkeypatch.setattr(script.time, "sleep", waited.append)
    path = config_file(tmp_path, train={"steps": 4})
    launched = {"WORLD_SIZE": "3", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
    slurm = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LAUNCH_NODE_IPADDR": "node0"}
    for environment in ({}, {"RANK": "0"} | launched, {"RANK": "1"} | launched, slurm):
        with monkeypatch.context() as patch:
            for name in (*launched, *slurm, "RANK"):
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            assert script.main(["--config", str(path), "--set", "train.nonsense=1"]) == 2
        assert "train.nonsense" in capsys.readouterr().err
    assert waited == [script.APART, script.APART]


def test_ctrl_c_under_deepspeed_saves_before_the_next_record(tmp_path):
    """The terminal signals the ranks and the launcher, which signals the ranks again; none waits for a log step."""
    pytest.importorskip("deepspeed")
    image_tree(tmp_path / "train")
    rare = {"steps": 10**6, "log_every": 10**5, "checkpoint_every": 10**6}
    train_ = {**rare, "global_batch": 6, "device": "cpu", "zero_stage": 3}
    path = config_file(tmp_path, train=train_, optimizer={"kind": "adamw"}, model={"width": 64})
    process = subprocess.Popen(
        on_two_ranks(path), env=ENVIRONMENT, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a script's background jobs ignore it
    )  # fmt: skip
    run = tmp_path / "runs" / "run"
    metrics = run / "metrics.jsonl"

    def ended() -> bool:
        return process.poll() is not None

    try:
        # Three processes import PyTorch, on a machine that may be busy.
        assert wait_until(lambda: ended() or metrics.exists() and metrics.stat().st_size, seconds=300)
        assert not ended(), process.communicate()[0]
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=120)  # until the ranks, too, have closed it
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "stopped by SIGINT" in said and latest_step(run) > 0
    assert "run: 0.2 M parameters" in said, "of the whole model, though no rank holds it"


def test_two_ranks_then_one_agree_with_one_process(tmp_path):
    pytest.importorskip("deepspeed")
    image_tree(tmp_path / "train")
    batch = {
        "global_batch": 6, "accumulation": 1, "zero_stage": 2, "device": "cpu", "checkpoint_every": 2, "log_every": 1,
    }  # fmt: skip
    path = config_file(tmp_path, train={**batch, "steps": 4})
    done = subprocess.run(on_two_ranks(path), capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    again = subprocess.run(on_two_ranks(path), capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert again.returncode == 2 and (again.stdout + again.stderr).count("add --resume") == 1, again.stderr[-2000:]
    # The same micro-batches on one process: two accumulated in place of two ranks.
    alone = {**batch, "accumulation": 2, "zero_stage": 0, "steps": 6}
    continued = train(config(tmp_path, train=alone), resume=True)
    reference = train(config(tmp_path, train=alone, name="reference"))
    weights = load_file(continued / "checkpoints" / "step_00000006" / "model.safetensors")
    for name, truth in load_file(reference / "checkpoints" / "step_00000006" / "model.safetensors").items():
        assert float((weights[name] - truth).norm() / truth.norm().clamp_min(1e-3)) < 1e-3, name

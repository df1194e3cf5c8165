"""Two DeepSpeed ranks on CPUs against one process with torch.optim.Muon and AdamW on the same global batch."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from engine_toy import float32_newton_schulz, toy_batch, toy_config, toy_model, toy_step
from engine_unite import unite_config, unite_engine, unite_step
from engine_worker import UNITE, unite_steps
from ranks import ALONE, free_port
from safetensors.torch import load_file
from torch import Tensor

from unite_fast.engine import checkpoint, deepspeed_backend, optim
from unite_fast.engine.engine import Engine
from unite_fast.engine.optim import parameter_groups
from unite_fast.engine.reduction import GradientMean
from unite_fast.engine.world import init_world

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
TESTS = Path(__file__).parent
STAGES = {"zero0": "muon", "zero1": "muon", "zero2": "muon", "zero3": "adamw"}
# Float32 sums in another order (micro-batches, ranks) differ in the last bits; Newton–Schulz keeps them small.
TOLERANCE = dict(rtol=1e-4, atol=1e-6)


def reference(kind: str, clip_norm: float | None = 0.7) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and gradient norms of five steps with torch's own optimizers, whole batch, one graph a step."""
    config, model = toy_config(kind=kind).optimizer, toy_model()
    groups = parameter_groups(model, kind)
    # torch.optim.Muon takes two dimensions only: the convolution is optimised through a flattened twin.
    twins = {n: torch.nn.Parameter(p.detach().flatten(1).clone()) for n, p in groups.get("muon", {}).items()}
    options = dict(lr=config.lr, weight_decay=config.weight_decay)
    optimizers = [
        torch.optim.AdamW(groups["adamw"].values(), betas=config.betas, eps=config.eps, foreach=False, **options)
    ]
    if twins:
        optimizers.append(
            torch.optim.Muon(
                twins.values(), momentum=0.95, nesterov=True, eps=1e-6, adjust_lr_fn="match_rms_adamw", **options
            )
        )
    norms = []
    for step in range(5):
        features, labels = toy_batch(step)
        model.zero_grad()
        (model("reconstruct", features)[1] + model("flow", features, labels)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm or float("inf")).item())
        for name, twin in twins.items():
            twin.grad = groups["muon"][name].grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for name, twin in twins.items():
                groups["muon"][name].copy_(twin.view_as(groups["muon"][name]))
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, norms


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[dict[str, Tensor], list[float]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.optim._muon._zeropower_via_newtonschulz", float32_newton_schulz)
        return {kind: reference(kind) for kind in ("muon", "adamw")}


@pytest.fixture(scope="module")
def single() -> dict[str, Engine]:
    """One plain process after five steps, by kind of optimizer."""
    return {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, single: dict[str, Engine]) -> Path:
    """What two ranks left behind: every stage in one launch, since starting costs more than the steps."""
    folder = tmp_path_factory.mktemp("ranks")
    for kind in ("muon", "adamw"):
        engine = Engine(toy_model(), toy_config(kind=kind), ALONE, steps_per_epoch=10)
        for step in range(5):
            toy_step(engine, step)
            if step == 2:
                checkpoint.save(engine, folder / f"single_{kind}", {})
        single[kind] = engine
    launcher = shutil.which("deepspeed", path=str(Path(sys.executable).parent))
    assert launcher, "the deepspeed launcher is not beside the interpreter"
    command = [sys.executable, launcher, "--num_gpus", "2", "--master_port", str(free_port())]
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    result = subprocess.run(
        [*command, str(TESTS / "engine_worker.py"), str(folder)],
        env=environment, capture_output=True, text=True, timeout=300, cwd=folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return folder


def ranks(folder: Path, name: str) -> list[dict]:
    return [json.loads((folder / f"rank{rank}.json").read_text())[name] for rank in range(2)]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", STAGES)
def test_five_steps_match_one_process_with_torch_optimizers(folder, references, name):
    weights, norms = references[STAGES[name]]
    assert_same(load_file(folder / f"{name}.weights.safetensors"), weights)
    assert min(norms) > 0.7, "the clip must bind in every step for this test to mean anything"
    for rank in ranks(folder, name):
        assert rank["norms"] == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("name", STAGES)
def test_ema_of_the_ranks_is_the_single_process_ema(folder, single, name):
    assert_same(load_file(folder / f"{name}.ema.safetensors"), dict(single[STAGES[name]].ema_state()))


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_each_rank_holds_half_of_the_state(folder, single, name):
    def bytes_of(engine: Engine) -> int:
        states = engine.optimizer.state.values()
        return sum(t.numel() * t.element_size() for state in states for t in state.values())

    whole = bytes_of(single[STAGES[name]])
    average = sum(p.numel() * 4 for p in single[STAGES[name]].parameters.values())
    for rank in ranks(folder, name):
        assert 0.45 * whole < rank["state_bytes"] < 0.55 * whole
        assert 0.45 * average < rank["ema_bytes"] < 0.55 * average


@pytest.mark.parametrize("name", STAGES)
def test_only_the_last_backward_of_a_step_reduces_gradients(folder, name):
    reductions = {"all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single"}
    for rank in ranks(folder, name):
        for first in range(0, 15, 5):
            *early, last, _ = rank["collectives"][first : first + 5]
            if name == "zero3":  # weights are fetched by every pass, but gradients must stay
                early = [[call for call in calls if call in reductions] for calls in early]
            assert early == [[], [], []]
            assert any(call in reductions for call in last)


@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_a_matrix_on_the_boundary_is_exchanged_once_each_way(folder, name):
    for rank in ranks(folder, name):
        assert rank["straddling"] == [1, 1, 1, 1]  # of each stage's two slices
        for update in rank["collectives"][4::5]:
            assert update.count("all_to_all_single") == 2 * 4


@pytest.mark.parametrize("name", STAGES)
def test_one_rank_continues_what_two_began(folder, single, name):
    engine = Engine(toy_model(), toy_config(kind=STAGES[name]), ALONE, steps_per_epoch=10)
    extra = checkpoint.load(engine, checkpoint.latest(folder / name))
    assert extra == {"stage": int(name[-1])} and engine.step_count == 3
    for step in (3, 4):
        toy_step(engine, step)
    assert_same(dict(engine.model_state()), dict(single[STAGES[name]].model_state()))
    for decay in (None, 0.5):
        assert_same(dict(engine.ema_state(decay)), dict(single[STAGES[name]].ema_state(decay)))


@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_continue_what_one_began(folder, single, name):
    found = load_file(folder / f"{name}.from_single.weights.safetensors")
    assert_same(found, dict(single[STAGES[name]].model_state()))
    averages = load_file(folder / f"{name}.from_single.ema.safetensors")
    assert_same(averages, dict(single[STAGES[name]].ema_state()))


@pytest.mark.parametrize("name", STAGES)
def test_one_rank_evaluates_the_ema_while_the_other_waits(folder, name):
    model = toy_model()
    averages = load_file(checkpoint.latest(folder / name) / "ema.safetensors")
    model.load_state_dict(averages)
    expected = model.trunk(toy_batch(9)[0][:, :5]).sum().item()
    assert ranks(folder, name)[0]["trunk"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", UNITE)
def test_unite_itself_trains_alike_on_two_ranks(folder, monkeypatch, name):
    if name == "zero3.bf16":  # its Linears are DeepSpeed's own, and round otherwise than ours
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        from deepspeed.runtime.zero.linear import zero3_linear_wrap

        monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
        monkeypatch.setattr("unite_fast.model.linear.current_casts", lambda: None)
    engine = unite_engine(unite_config(**UNITE[name] | {"stage": 0}), ALONE)
    before = dict(engine.model_state())
    norms = [unite_step(engine, step).item() for step in unite_steps(UNITE[name])]
    found = load_file(folder / f"unite.{name}.weights.safetensors")
    for key, weight in engine.model_state():
        assert torch.dist(found[key], weight) <= 2e-3 * torch.dist(before[key], weight) + 1e-6, key
    for rank in ranks(folder, f"unite.{name}"):
        assert rank == pytest.approx(norms, rel=1e-3)


def test_a_save_that_rank_0_cannot_write_is_refused_on_every_rank(folder):
    for rank in range(2):
        assert "cannot write checkpoint" in (folder / f"refused{rank}").read_text()


def test_zero_on_a_lone_process_needs_no_launcher(monkeypatch, references):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(deepspeed_backend, "BUCKET_ELEMENTS", 50)
    monkeypatch.setattr(optim, "STAGE_ELEMENTS", 50)
    final, sent = GradientMean._final, []

    def noted(self: GradientMean, *arguments: Any) -> None:
        final(self, *arguments)
        sent.append(self._next / len(self._windows))

    monkeypatch.setattr(GradientMean, "_final", noted)
    config = toy_config(stage=2)
    world = init_world(config)
    try:
        engine = Engine(toy_model(), config, world, steps_per_epoch=10)
        norms = [toy_step(engine, step).item() for step in range(5)]
        assert_same(dict(engine.model_state()), references["muon"][0])
        assert norms == pytest.approx(references["muon"][1], rel=1e-4)
        assert median(sent) > 0.4, "gradients leave while the last backward still runs"
    finally:
        torch.distributed.destroy_process_group()

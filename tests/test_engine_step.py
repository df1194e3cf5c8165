"""The plain engine's step: averages, clipping, autocast, and what one process does without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_toy import advance, assert_identical, engine_at, toy_batch, toy_config, toy_model, toy_step
from ranks import ALONE

from unite_fast.engine.engine import Engine
from unite_fast.engine.world import World
from unite_fast.errors import UserError


def test_evaluation_sees_the_ema_and_training_goes_on(tmp_path):
    engine, undisturbed = engine_at(3), engine_at(3)
    averages = dict(engine.ema_state())
    addresses = [parameter.data_ptr() for parameter in engine.parameters.values()]
    with engine.ema_weights() as model:
        assert not model.training and not torch.is_grad_enabled()
        assert all(torch.equal(tensor, averages[name]) for name, tensor in model.state_dict().items())
        exported = dict(engine.model_state())
        assert not torch.equal(exported["second.weight"], dict(undisturbed.model_state())["second.weight"])
    assert torch.equal(engine.model.second.weight, undisturbed.model.second.weight) and engine.model.training
    assert addresses == [parameter.data_ptr() for parameter in engine.parameters.values()]
    assert_identical(engine, undisturbed)


def test_states_are_copies(tmp_path):
    """An exported average must not turn into something else when the weights are swapped."""
    engine = engine_at(2)
    averages = dict(engine.ema_state())
    kept = {name: tensor.clone() for name, tensor in averages.items()}
    with engine.ema_weights():
        pass
    advance(engine, 1)
    assert all(torch.equal(averages[name], kept[name]) for name in kept)


def test_ema_follows_its_equation():
    engine = engine_at(0)
    average = {name: tensor for name, tensor in engine.model_state()}
    for _ in range(3):
        advance(engine, 1)
        for name, weight in engine.model_state():
            average[name] = 0.8 * average[name] + 0.2 * weight
    for name, tensor in engine.ema_state():
        torch.testing.assert_close(tensor, average[name], rtol=1e-6, atol=1e-7)


def test_clipping_acts_before_muon_and_is_reported_unclipped():
    clipped, free = engine_at(0), engine_at(0, clip_norm=None)
    assert advance(clipped, 1) == advance(free, 1), "the norm is that before clipping"
    norm = advance(free, 0) or toy_step(engine_at(0, clip_norm=None), 0).item()
    assert norm > 0.7
    for name, parameter in clipped.parameters.items():
        state, other = clipped.optimizer.state[parameter], free.optimizer.state[free.parameters[name]]
        key = "momentum_buffer" if "momentum_buffer" in state else "exp_avg"
        torch.testing.assert_close(state[key], other[key] * (0.7 / norm), rtol=1e-4, atol=1e-7)


def test_bf16_autocast_keeps_float32_weights():
    config = toy_config()
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": "bf16"})})
    engine = Engine(toy_model(), config, ALONE, steps_per_epoch=10)
    features, labels = toy_batch(0)
    products = []
    engine.model.second.register_forward_hook(lambda module, inputs, output: products.append(output.dtype))
    engine.backward(engine("flow", x=features, labels=labels), last=True)
    engine.step()
    assert products == [torch.bfloat16]
    assert {tensor.dtype for _, tensor in engine.model_state()} == {torch.float32}
    moments = (tensor for state in engine.optimizer.state.values() for tensor in state.values())
    assert {tensor.dtype for tensor in moments} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_never_waits_for_the_device():
    config = toy_config()
    config = config.model_copy(update={"train": config.train.model_copy(update={"device": "cuda"})})
    engine = Engine(toy_model(), config, World(0, 1, 0, torch.device("cuda", 0)), steps_per_epoch=10)
    features, labels = (tensor.cuda() for tensor in toy_batch(0))
    for _ in range(2):  # the first step allocates
        engine.backward(engine("flow", x=features, labels=labels), last=True)
        engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.backward(engine("flow", x=features, labels=labels), last=True)
        engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_zero_without_deepspeed_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install 'unite_fast\[deepspeed\]'"):
        Engine(toy_model(), toy_config(stage=1), ALONE, steps_per_epoch=10)


def test_one_process_does_not_import_deepspeed():
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]);"
        "from engine_toy import *; from unite_fast.engine import engine, world;"
        "e = engine.Engine(toy_model(), toy_config(), world.init_world(toy_config()), steps_per_epoch=10);"
        "toy_step(e, 0); sys.exit('deepspeed' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

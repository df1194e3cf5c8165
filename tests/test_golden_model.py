"""The model, its losses, gradients and samples against tensors recorded from the published implementation."""

import pytest
import torch
from golden import (
    FLOW_DRAWS,
    golden,
    golden_model,
    needs_golden,
    our_name,
    published_weights,
    recorded_draws,
    relative_error,
)

from unite_fast import generate
from unite_fast.config import LpipsConfig, ObjectiveConfig
from unite_fast.model.published import to_published
from unite_fast.objective.two_pass import Objective, two_pass_step

pytestmark = needs_golden
OBJECTIVE = ObjectiveConfig(flow_draws=FLOW_DRAWS, lpips=LpipsConfig(weight=0.0))


class Direct:
    """Runs the model's passes and accumulates gradients in place, as an engine on one process does."""

    def __init__(self, model):
        self.model = model

    def __call__(self, phase, **inputs):
        return self.model(phase, **inputs)

    def backward(self, loss, *, last):
        loss.backward()


@pytest.fixture(scope="module")
def g():
    return golden()


@pytest.fixture()
def model(g):
    return golden_model(g)


def test_tokenize_and_decode(g, model):
    with torch.no_grad():
        z0 = model.tokenize(g["in.images"], noise=g["in.register_noise"], t=g["in.tokenize_t"])
        images = model.decode(g["out.decoder_input"])
    assert relative_error(z0, g["out.z0"]) < 1e-5
    assert relative_error(images, g["out.recon"]) < 1e-5


def test_denoise(g, model):
    labels = torch.where(g["in.flow_drop"], model.null_label, g["in.labels"].repeat(FLOW_DRAWS))
    with torch.no_grad():
        prediction = model.denoise(g["out.xt"], g["in.flow_t"], labels)
        raw = model.denoise(g["out.xt"], g["in.flow_t"], labels, normalise=False)
    assert relative_error(prediction, g["out.pred"]) < 1e-5
    assert relative_error(raw, g["out.pred_raw"]) < 1e-5


@pytest.mark.parametrize("draws_per_chunk", [1, 2, 3])
def test_losses_and_every_gradient(g, model, draws_per_chunk):
    config = OBJECTIVE.model_copy(update={"draws_per_chunk": draws_per_chunk})
    objective = Objective(config, model.null_label)
    losses = two_pass_step(
        Direct(model), objective, g["in.images"], g["in.labels"], recorded_draws(g), shape=g["out.z0"].shape
    )
    assert relative_error(losses.terms["l1"], g["out.l1"]) < 1e-5
    assert relative_error(losses.flow, g["out.flow_loss"]) < 1e-5
    assert relative_error(losses.total, g["out.total"]) < 1e-5
    gradients = dict(model.named_parameters())
    seen = set()
    for name, truth in g.items():
        if not name.startswith("grad."):
            continue
        ours = our_name(name.removeprefix("grad."), model)
        if ours is None:
            assert truth.abs().max() == 0, f"{name} has a gradient and no counterpart"
            continue
        seen.add(ours)
        if gradients[ours].grad is None:
            assert ours == "encoder.time.special" and truth.abs().max() == 0
            continue
        assert relative_error(gradients[ours].grad, truth) < 1e-4, name
    assert seen | {"encoder.time.special"} == set(gradients)


@pytest.mark.parametrize(
    ("entry", "options", "tolerance"),
    [
        ("cfg1", dict(guidance=1.0, normalise=False), 1e-3),
        ("cfg2", dict(guidance=2.4, interval=(-1.0, 2.0)), 1e-3),
        ("cfg2_interval", dict(guidance=2.4, interval=(0.1, 1.0)), 2e-2),
    ],
)
def test_samples(g, model, entry, options, tolerance):
    images, z = generate(
        model.eval(), g["in.labels"], noise=g["sample.noise"], solver="dopri5", return_latents=True, **options
    )
    assert relative_error(z, g[f"sample.{entry}.z"]) < tolerance
    assert relative_error(images, g[f"sample.{entry}.images"].clamp(0, 1)) < tolerance


def test_published_names_round_trip(g, model):
    weights = published_weights(g)
    back = to_published(model.state_dict(), model.config)
    assert set(back) == set(weights)
    for name, tensor in weights.items():
        # Theirs are computed in float32: at angles up to 512 rad that is 512 · 6e-8 = 3e-5 off.
        tolerance = 1e-4 if "feat_rope" in name else 1e-6 if "pos_embed" in name else 0.0
        assert torch.allclose(back[name], tensor, rtol=0, atol=tolerance), name

"""The published model's recorded tensors again, with every fused operator on its Triton kernel."""

import pytest
import torch
from golden import FLOW_DRAWS, golden, golden_model, needs_golden, our_name, recorded_draws, relative_error
from kernel_testing import DEVICE, on_backend
from test_golden_model import OBJECTIVE, Direct

from unite_fast.objective.two_pass import Objective, two_pass_step

pytestmark = needs_golden


@pytest.fixture(scope="module")
def g():
    return {name: tensor.to(DEVICE) for name, tensor in golden().items()}


def test_prediction(g):
    model = golden_model(g).to(DEVICE)
    batch = len(g["in.labels"])  # of the first draw: the interpreter takes its time
    labels = g["in.labels"].masked_fill(g["in.flow_drop"][:batch], model.null_label)
    with on_backend("triton"), torch.no_grad():
        prediction = model.denoise(g["out.xt"][:batch], g["in.flow_t"][:batch], labels)
    assert relative_error(prediction, g["out.pred"][:batch]) < 1e-5


@pytest.mark.skipif(DEVICE != "cuda", reason="four minutes in Triton's interpreter: needs a GPU")
def test_losses_and_every_gradient(g):
    model = golden_model(g).to(DEVICE)
    objective = Objective(OBJECTIVE.model_copy(update={"draws_per_chunk": FLOW_DRAWS}), model.null_label)
    with on_backend("triton"):
        losses = two_pass_step(
            Direct(model), objective, g["in.images"], g["in.labels"], recorded_draws(g), shape=g["out.z0"].shape
        )
    for loss, entry in ((losses.terms["l1"], "l1"), (losses.flow, "flow_loss"), (losses.total, "total")):
        assert relative_error(loss, g[f"out.{entry}"]) < 1e-5, entry
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    compared = 0
    for name, truth in g.items():
        ours = our_name(name.removeprefix("grad."), model) if name.startswith("grad.") else None
        if ours is not None:
            assert relative_error(gradients[ours], truth) < 1e-4, name
            compared += 1
    assert compared == len(gradients)

"""Five optimizer steps of the published recipe against the recorded run: losses, gradient norms, final weights."""

import torch
from golden import FLOW_DRAWS, golden, golden_model, needs_golden, our_name, recorded_draws, relative_error
from runs import config

from unite_fast.config import LpipsConfig, ObjectiveConfig
from unite_fast.engine.engine import Engine
from unite_fast.engine.world import World
from unite_fast.objective.two_pass import Objective, two_pass_step

pytestmark = needs_golden


def test_five_steps(tmp_path):
    g = golden()
    model = golden_model(g)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = config(tmp_path, optimizer={"lr": 2e-4, "clip_norm": 3.0}, train={"steps": 5, "global_batch": 2})
    engine = Engine(model, settings, World(0, 1, 0, torch.device("cpu")), steps_per_epoch=1.0)
    losses = ObjectiveConfig(flow_draws=FLOW_DRAWS, draws_per_chunk=1, lpips=LpipsConfig(weight=0.0))
    objective = Objective(losses, model.null_label)
    for loss, norm in g["train.loss_and_grad_norm"]:
        losses = two_pass_step(
            engine, objective, g["in.images"], g["in.labels"], recorded_draws(g), shape=g["out.z0"].shape
        )
        # The recording orthogonalised in bfloat16, this engine in float32 on a CPU: 2e-3 is what that leaves.
        assert relative_error(losses.total, loss) < 2e-3
        assert relative_error(engine.step(), norm) < 2e-2
    finals = {name.removeprefix("train.final."): value for name, value in g.items() if name.startswith("train.final.")}
    assert finals
    for published, final in finals.items():
        ours = our_name(published, model)
        moved, expected = dict(model.named_parameters())[ours] - start[ours], final - start[ours]
        # Of the way that the weights went, not of the weights: an optimizer that stood still would score 1.
        assert relative_error(moved.detach(), expected) < 0.1, published

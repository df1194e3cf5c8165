"""The rival of the benchmarks does the work of ours: same loss, same gradients, same update, on the same draws.

And what the update is counted to cost is what its products take.
"""

from types import SimpleNamespace

import pytest
import torch
from bench_rivals import CLOSE, PlainDraws, PlainTrainer, assert_same_gradients, assert_same_update, error, recorded
from one_graph import one_graph_loss
from plain_unite import PlainLpips  # found by bench_rivals, as are subjects and test_step
from runs import config
from subjects import Subject, Trainers, load
from test_model import tiny
from test_step import Seconds, batch_sizes, compile_anew, steps_seconds, warmed
from torch.utils.flop_counter import FlopCounterMode

from unite_fast.analysis.update import newton_schulz_operations
from unite_fast.config import ObjectiveConfig
from unite_fast.engine.engine import Engine
from unite_fast.engine.world import World
from unite_fast.objective.perceptual import Lpips
from unite_fast.objective.two_pass import Objective, two_pass_step
from unite_kernels.optim import _newton_schulz

CPU = torch.device("cpu")
BATCH = 3


def settings(tmp_path, model, **objective):
    sizes = model.config.model_dump()
    weights = {"l1_weight": 2.0, "flow_weight": 0.7, "lpips": {"weight": 0.0}}
    losses = {"flow_draws": 4, "draws_per_chunk": 1, "t_floor": 0.8, **weights, **objective}
    return config(tmp_path, model=sizes, objective=losses, optimizer={"clip_norm": 0.5})


def both_draws(goal: ObjectiveConfig, shape):
    plain = PlainDraws.make(goal, shape, CPU)
    return plain, recorded(plain)


def batch(model):
    side = model.config.image_size
    shape = (BATCH, model.config.registers, model.config.latent_dim)
    return torch.rand(BATCH, 3, side, side), torch.tensor([0, 2, 1]), torch.Size(shape)


@pytest.mark.parametrize(
    "sizes", [{}, {"registers": 5}, {"context_len": 0}, {"context_start": 0}], ids=["grid", "queries", "plain", "early"]
)
def test_loss_and_gradients_are_ours(tmp_path, sizes):
    model = tiny(**sizes)
    settled = settings(tmp_path, model)
    plain = PlainTrainer(settled, model, lr=1e-3)
    images, labels, shape = batch(model)
    drawn, given = both_draws(settled.objective, shape)
    objective = Objective(settled.objective, model.null_label)
    ours = one_graph_loss(model, objective, images, labels, given, shape=shape)
    theirs = plain.model(images, labels, drawn)
    assert error(theirs, ours) < CLOSE
    ours.backward()
    theirs.backward()
    assert_same_gradients(model, plain)


def test_the_perceptual_term_is_ours():
    torch.manual_seed(0)
    lpips = Lpips()
    plain = PlainLpips(lpips)
    target, image = torch.rand(2, 2, 3, 32, 32)
    image.requires_grad_()
    ours, theirs = lpips(target, image), plain(target, image)
    assert error(theirs, ours) < CLOSE
    (expected,), (found,) = torch.autograd.grad(ours, image), torch.autograd.grad(theirs, image)
    assert float(expected.norm()) > 0 and error(found, expected) < CLOSE


def test_two_steps_move_the_weights_and_the_average_as_ours(tmp_path):
    model = tiny()
    settled = settings(tmp_path, model)
    lr = settled.optimizer.lr
    plain = PlainTrainer(settled, model, lr=lr)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = Engine(model, settled, World(0, 1, 0, CPU), steps_per_epoch=1.0)
    objective = Objective(settled.objective, model.null_label)
    for _ in range(2):
        images, labels, shape = batch(model)
        drawn, given = both_draws(settled.objective, shape)
        two_pass_step(engine, objective, images, labels, given, shape=shape)
        engine.step()
        plain.step(images, labels, drawn)
    assert_same_update(model, engine, plain, start)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("shape", [(16, 16), (16, 24), (96, 16), (16, 33)])
def test_counted_operations_of_newton_schulz_are_those_of_its_products(shape, steps):
    with FlopCounterMode(display=False) as counter:
        _newton_schulz.compute(torch.randn(1, *shape), steps, 1e-6)
    assert newton_schulz_operations(*shape, steps, "fp32") == counter.get_total_flops()


def test_the_contenders_of_a_benchmark_take_the_same_steps():
    """One at a warm-up's rate would leave layers that begin at zero where products with them are denormal."""
    trainers = Trainers(load(Subject("quickstart.json", [], 32), {}))
    assert trainers.config.optimizer.warmup_epochs
    plain = {group["lr"] for optimizer in trainers.plain.optimizers for group in optimizer.param_groups}
    trainers.our_step(*trainers.batch(2))
    assert plain == {trainers.engine.last_lr} == {trainers.config.optimizer.lr}


def test_the_record_holds_the_seconds_that_mfu_and_floors_are_made_of():
    found = {"ours": [Seconds(wall=0.5, process=0.25)] * 3}
    on_cpu, on_gpu = (steps_seconds(found, {"ours": 4}, clock) for clock in ("process", "wall"))
    assert {name: clock["ours"]["median"] for name, clock in on_cpu.items()} == {"seconds": 2, "processor_seconds": 1}
    assert on_gpu == {"seconds": on_cpu["seconds"]}


def test_a_compiled_contender_takes_the_next_batch_that_fits():
    def runs_out(size):
        if size > 16:
            raise torch.OutOfMemoryError("out of memory")

    trainers = SimpleNamespace(batch=lambda size: (size,), drop_gradients=lambda: None)
    sizes = {"ours": 64, "compile": 64}
    batches = warmed(trainers, {"ours": lambda size: None, "compile": runs_out}, sizes)
    assert sizes == {"ours": 64, "compile": 16} and batches == {"ours": (64,), "compile": (16,)}
    with pytest.raises(RuntimeError, match="plain runs out of memory on a batch of 64"):
        warmed(trainers, {"plain": runs_out}, {"plain": 64})


def test_a_step_that_ran_out_of_memory_leaves_no_gradients_to_the_next(monkeypatch):
    """Neither to a smaller one of its contender nor to the other contender's."""
    monkeypatch.setattr("test_step.RESERVE", 0)
    models = {"ours": torch.nn.Linear(1, 1), "plain": torch.nn.Linear(1, 1)}
    trainers = SimpleNamespace(
        engine=SimpleNamespace(model=models["ours"]), plain=SimpleNamespace(model=models["plain"]),
        batch=lambda size: (size,), device="cpu",
    )  # fmt: skip
    trainers.drop_gradients = lambda: Trainers.drop_gradients(trainers)

    def step(who, most):
        def run(size):
            assert all(p.grad is None for model in models.values() for p in model.parameters())
            for p in models[who].parameters():
                p.grad = torch.zeros_like(p)
            if size > most:
                raise torch.OutOfMemoryError("out of memory")
            models[who].zero_grad()

        return run

    steps = {"ours": step("ours", 32), "plain": step("plain", 12)}
    assert batch_sizes(trainers, steps, None) == {"ours": 32, "plain": 12}


def test_no_contender_runs_eager_because_of_those_compiled_before(monkeypatch):
    monkeypatch.setattr("test_step.BATCHES", [1, 2, 3])

    class Model(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(width))

        def forward(self, x):
            return x * self.weight

    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        for widths in (range(1, 10), range(10, 19)):
            compile_anew()
            for width in widths:
                torch.compile(Model(width), backend="eager", dynamic=False)(torch.ones(width))

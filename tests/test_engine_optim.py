"""Muon and AdamW against torch's own, the schedule, and the exchange of matrices that straddle ranks."""

from __future__ import annotations

import pytest
import torch
from engine_toy import float32_newton_schulz, toy_model
from thread_ranks import Ranks

import unite_kernels as uk
from unite_fast.config import ModelConfig, OptimizerConfig
from unite_fast.engine import optim
from unite_fast.engine.backend import clip_coefficient, gradient_norm, total_norm
from unite_fast.engine.ema import Ema
from unite_fast.engine.optim import (
    MuonAdamW,
    lr_factor,
    matrix_shape,
    parameter_groups,
    peak_lr,
    schedule_doubt,
)
from unite_fast.engine.sharding import Layout, MatrixExchange, flat_fragments
from unite_fast.model.unite import Unite


def parameters(shapes: list[tuple[int, ...]]) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {f"p{i}": torch.nn.Parameter(torch.randn(s, generator=generator)) for i, s in enumerate(shapes)}


def run(
    optimizer: torch.optim.Optimizer, tensors: list[torch.nn.Parameter], steps: int = 4, scale: float = 1.0
) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for tensor in tensors:
            tensor.grad = scale * torch.randn(tensor.shape, generator=generator)
        optimizer.step()


def ours(kind: str, named: dict[str, torch.nn.Parameter], config: OptimizerConfig) -> MuonAdamW:
    optimizer = MuonAdamW([(kind, named)], config, config.lr)
    optimizer.initialise_state({kind: list(named.values())})
    return optimizer


@pytest.mark.parametrize(("decay", "scale"), [(0.0, 1.0), (0.1, 1.0), (0.1, 1e-4), (0.1, 1e-8)])
def test_muon_is_torchs_muon(monkeypatch, decay, scale):
    """In float32 on both sides: torch's iteration in bfloat16 alone would differ by 1e-2.

    Small gradients move the weights as large ones do, and less only where eps is above their norm.
    """
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", float32_newton_schulz)
    shapes = [(4, 9), (9, 4), (6, 6), (4, 9), (1, 7)]
    config = OptimizerConfig(lr=0.05, weight_decay=decay, momentum=0.9)
    expected, found = parameters(shapes), parameters(shapes)
    options = dict(momentum=0.9, nesterov=True, eps=1e-6, ns_steps=5, adjust_lr_fn="match_rms_adamw")
    theirs = torch.optim.Muon(expected.values(), lr=0.05, weight_decay=decay, **options)
    run(theirs, list(expected.values()), scale=scale)
    run(ours("muon", found, config), list(found.values()), scale=scale)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_muon_flattens_behind_the_first_dimension():
    flat, deep = parameters([(4, 6)]), parameters([(4, 6)])
    deep = {"p0": torch.nn.Parameter(deep["p0"].detach().view(4, 2, 3))}
    config = OptimizerConfig(lr=0.05)
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(4, 6, generator=generator)
    for named in (flat, deep):
        named["p0"].grad = gradient.view_as(named["p0"]).clone()
        ours("muon", named, config).step()
    assert torch.equal(flat["p0"], deep["p0"].flatten(1))


def test_batches_of_one_shape_may_be_cut(monkeypatch):
    shapes = [(3, 5)] * 5 + [(5, 3)] * 2
    whole, cut = parameters(shapes), parameters(shapes)
    run(ours("muon", whole, OptimizerConfig(lr=0.05)), list(whole.values()))
    monkeypatch.setattr(optim, "BATCH_ELEMENTS", 31)  # two matrices of 15 at a time
    run(ours("muon", cut, OptimizerConfig(lr=0.05)), list(cut.values()))
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-6, atol=1e-7)


def test_adamw_is_torchs_adamw():
    shapes = [(7,), (3, 4), ()]
    config = OptimizerConfig(kind="adamw", lr=0.05, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-5)
    expected, found = parameters(shapes), parameters(shapes)
    reference = torch.optim.AdamW(
        expected.values(), lr=0.05, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-5, foreach=False
    )
    run(reference, list(expected.values()))
    run(ours("adamw", found, config), list(found.values()))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize(("moving", "staying"), [("p0", "p1"), ("p1", "p0")])
def test_parameters_without_gradient_stay(kind, moving, staying):
    named = parameters([(3, 4), (3, 4)])
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    optimizer = ours(kind, named, OptimizerConfig(lr=0.05, weight_decay=0.1))
    named[moving].grad = torch.ones(3, 4)
    optimizer.step()
    assert torch.equal(named[staying], before[staying]) and not torch.equal(named[moving], before[moving])


DECAYS = (0.9, 0.5)


def chain(steps: int, named: dict[str, torch.nn.Parameter], config: OptimizerConfig, gradients) -> list[list]:
    """Weights and averages after steps of one operation after the other: clip, momentum, mean, products, decay, EMA."""
    weights = [p.detach().clone() for p in named.values()]
    momenta = [torch.zeros_like(w) for w in weights]
    averages = [[w.clone() for w in weights] for _ in DECAYS]
    for step in range(steps):
        found = gradients(step)
        holders = [torch.nn.Parameter(w.clone()) for w in weights]
        for holder, gradient in zip(holders, found):
            holder.grad = None if gradient is None else gradient.clone()
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(holders, config.clip_norm)
        for weight, buffer, gradient in zip(weights, momenta, [holder.grad for holder in holders]):
            if gradient is None:
                continue
            buffer.lerp_(gradient, 1 - config.momentum)
            mean = gradient.lerp(buffer, config.momentum)
            scale = 0.2 * max(weight.shape) ** 0.5
            update = uk.newton_schulz(mean[None], config.newton_schulz_steps, eps=optim.MUON_EPS, scale=scale)[0]
            weight.mul_(1 - config.lr * config.weight_decay).add_(update, alpha=-config.lr)
        for decay, tensors in zip(DECAYS, averages):
            for average, weight in zip(tensors, weights):
                average.lerp_(weight, 1 - decay)
    return [weights, *averages]


def random_gradients(shapes: list[tuple[int, ...]], missing: dict[int, int]):
    """step -> gradients; in step s the parameter missing[s] has none."""

    def gradients(step: int) -> list[torch.Tensor | None]:
        generator = torch.Generator().manual_seed(step)
        drawn = [torch.randn(shape, generator=generator) for shape in shapes]
        return [None if missing.get(step) == index else g for index, g in enumerate(drawn)]

    return gradients


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("options", [{}, {"clip_norm": None}, {"clip_norm": 1e3, "weight_decay": 0.0}])
def test_two_sweeps_are_the_chain_of_operations(backend, options):
    """Bit for bit in plain PyTorch; the kernels may round a product and a sum once (4 units in the last place)."""
    # One shape each: batched products may round in another order than single ones.
    shapes = [(4, 9), (9, 5), (6, 6), (1, 7)]
    config = OptimizerConfig(**{"lr": 0.05, "weight_decay": 0.1, "clip_norm": 0.5} | options)
    gradients = random_gradients(shapes, missing={0: 1, 2: 3})
    named = parameters(shapes)
    layout = Layout.whole(named)
    optimizer, ema = ours("muon", named, config), Ema(layout, DECAYS[0], DECAYS[1:])
    optimizer.ema = ema
    tensors = list(named.values())
    uk.set_backend(backend)
    try:
        expected = chain(4, named, config, gradients)
        for step in range(4):
            for tensor, gradient in zip(tensors, gradients(step)):
                tensor.grad = gradient
            optimizer.clip_coefficient = clip_coefficient(gradient_norm(tensors), config.clip_norm)
            optimizer.step()
            ema.update()
    finally:
        uk.set_backend("auto")
    found = [[t.detach() for t in tensors], *([ema.of(t, decay) for t in tensors] for decay in DECAYS)]
    for ours_, theirs in zip(found, expected):
        for a, b in zip(ours_, theirs):
            if backend == "torch":
                assert torch.equal(a, b)
            else:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_averages_taken_by_the_optimizer_are_passed_over_once():
    named = parameters([(2, 3), (4,)])
    ema = Ema(Layout.whole(named), 0.5)
    first, second = named.values()
    start = [p.detach().clone() for p in named.values()]
    with torch.no_grad():
        for p in named.values():
            p.add_(1.0)
    ((taken,),) = ema.take([first])
    assert taken is ema.of(first)
    ema.update()
    assert torch.equal(ema.of(first), start[0])
    torch.testing.assert_close(ema.of(second), start[1] + 0.5)
    ema.update()
    torch.testing.assert_close(ema.of(first), start[0] + 0.5)


def test_clipping_scales_both_groups_and_reads_nothing_back():
    config = OptimizerConfig(lr=0.05, clip_norm=0.5)
    muon, adamw = parameters([(3, 4)]), parameters([(5,)])
    optimizer = MuonAdamW([("muon", muon), ("adamw", adamw)], config, config.lr)
    optimizer.initialise_state({"muon": list(muon.values()), "adamw": list(adamw.values())})
    tensors = [*muon.values(), *adamw.values()]
    for tensor in tensors:
        tensor.grad = torch.full(tensor.shape, 2.0)
    norm = gradient_norm(tensors)
    optimizer.clip_coefficient = clip_coefficient(norm, config.clip_norm)
    optimizer.step()
    clipped = 2.0 * 0.5 / (2.0 * 17**0.5 + 1e-6)
    torch.testing.assert_close(norm, torch.tensor(2.0 * 17**0.5))
    for tensor, name, share in zip(tensors, ("momentum_buffer", "exp_avg"), (0.05, 1 - config.betas[0])):
        torch.testing.assert_close(optimizer.state[tensor][name], torch.full(tensor.shape, share * clipped))


def test_the_norm_of_a_rank_s_slice_counts_every_element():
    torch.manual_seed(0)
    tensors = [torch.randn(2, 2**22), torch.randn(3), torch.randn(0)]
    expected = sum(tensor.double().square().sum() for tensor in tensors).sqrt()
    torch.testing.assert_close(total_norm(tensors).double(), expected, rtol=1e-5, atol=0)
    assert total_norm([]) == 0


def test_groups_follow_the_model():
    model = toy_model()
    groups = parameter_groups(model, "muon")
    assert set(groups["muon"]) == model.matrix_parameters()
    assert set(groups["muon"]) | set(groups["adamw"]) == {name for name, _ in model.named_parameters()}
    assert list(parameter_groups(model, "adamw")) == ["adamw"]


def test_preset_b_has_115_muon_tensors():
    with torch.device("meta"):
        model = Unite(ModelConfig(preset="B"))
    assert len(parameter_groups(model, "muon")["muon"]) == 115


def test_schedule_warms_up_holds_falls_and_stays():
    config = OptimizerConfig(warmup_epochs=2, hold_until_epoch=3, cosine_until_epoch=5, final_ratio=0.5)
    factors = [lr_factor(step, 10, config) for step in range(80)]
    assert factors[0] == pytest.approx(1 / 20) and factors[19] == pytest.approx(1.0)
    assert set(factors[20:30]) == {1.0}
    assert factors[40] == pytest.approx(0.75) and set(factors[50:]) == {0.5}
    assert all(a >= b for a, b in zip(factors[30:], factors[31:]))


def test_schedule_falls_from_the_end_of_a_warm_up_that_nothing_holds():
    config = OptimizerConfig(warmup_epochs=2, cosine_until_epoch=6, final_ratio=0.0)
    factors = [lr_factor(step, 10, config) for step in range(70)]
    assert factors[19] == factors[20] == 1.0 and factors[40] == pytest.approx(0.5) and set(factors[60:]) == {0.0}


def test_a_warm_up_of_a_fraction_of_steps_ends_at_the_peak():
    config = OptimizerConfig(warmup_epochs=1)
    assert [lr_factor(step, 2.5, config) for step in range(4)] == pytest.approx([0.4, 0.8, 1.0, 1.0])


def test_schedule_without_keys_is_constant():
    config = OptimizerConfig()
    assert {lr_factor(step, 3.5, config) for step in range(50)} == {1.0}


def test_a_schedule_of_other_data_is_doubted():
    short = OptimizerConfig(warmup_epochs=0.1, hold_until_epoch=1.8, cosine_until_epoch=4.4, final_ratio=0.02)
    assert schedule_doubt(2000, 450, short) is None  # the molecules' quickstart
    found = schedule_doubt(2000, 2.5, short)
    assert "cosine_until_epoch = 4.4 is step 11 of 2000 with these data" in found and "at 0.02 of its peak" in found
    # What it says to do ends the decay with the run.
    factor = float(found.rsplit(" ", 1)[1])
    scaled = short.model_copy(update={"warmup_epochs": 0.1 * factor, "hold_until_epoch": 1.8 * factor,
                                      "cosine_until_epoch": 4.4 * factor})  # fmt: skip
    assert schedule_doubt(2000, 2.5, scaled) is None and lr_factor(1990, 2.5, scaled) == pytest.approx(0.02, abs=1e-3)
    assert "warmup_epochs = 0.1 takes 2500 steps of these data, and the run ends at step 2000" in schedule_doubt(
        2000, 25000, short
    )
    # The published recipe's decay to half of the peak may end early, and no decay never does.
    assert schedule_doubt(100_000, 10, short.model_copy(update={"final_ratio": 0.5})) is None
    constant = OptimizerConfig(warmup_epochs=0, hold_until_epoch=0, cosine_until_epoch=0)
    assert schedule_doubt(100_000, 10, constant) is None


def test_learning_rate_scales_with_the_batch():
    assert peak_lr(OptimizerConfig(lr=1e-4, lr_batch=384), 1024) == pytest.approx(1e-4 * 1024 / 384)
    assert peak_lr(OptimizerConfig(lr=1e-4, lr_batch=None), 1024) == 1e-4


@pytest.mark.parametrize(
    ("shapes", "size", "padding", "collectives"),
    [
        ([(3, 4), (5, 2), (7, 7), (2, 9), (1, 3)], 2, 2, 2),
        ([(3, 4), (5, 2), (7, 7), (2, 9), (1, 3)], 5, 3, 2),  # the 49 elements of (7, 7) span four ranks
        ([(2, 2), (2, 2)], 2, 0, 0),
        ([(2, 3)], 4, 2, 2),
        ([(2, 2)], 4, 12, 0),  # three ranks hold nothing but padding
    ],
)
def test_exchange_applies_a_function_to_whole_matrices(monkeypatch, shapes, size, padding, collectives):
    matrices = [torch.randn(shape) for shape in shapes]
    flat = torch.cat([matrix.flatten() for matrix in matrices] + [torch.zeros(padding)])
    partition, left = divmod(flat.numel(), size)
    assert left == 0
    group = Ranks(size)
    group.patch(monkeypatch)
    seen: list[int] = []

    def function(mine: list[torch.Tensor]) -> list[torch.Tensor]:
        seen.extend(matrix.numel() for matrix in mine)
        return [matrix * matrix.norm() for matrix in mine]  # depends on every element

    def body(rank: int) -> torch.Tensor:
        exchange = MatrixExchange(shapes, partition, rank, size)
        return exchange.apply(flat[rank * partition : (rank + 1) * partition], function)

    found = torch.cat(group.run(body))
    expected = torch.cat([(matrix * matrix.norm()).flatten() for matrix in matrices] + [torch.zeros(padding)])
    torch.testing.assert_close(found, expected)
    assert sorted(seen) == sorted(rows * columns for rows, columns in shapes), "each matrix on exactly one rank"
    assert group.calls == collectives


def test_a_matrix_in_two_slices_goes_to_the_rank_with_less_to_do():
    """By what a Newton-Schulz step costs: two rows [1, 8] cost 16 multiply-adds, a matrix [3, 4] 36."""
    rows, matrix, cut = [(1, 8), (1, 8)], [(3, 4)], (2, 5)
    for before, after, owner in ((rows, matrix, 0), (matrix, rows, 1)):
        shapes = [*before, cut, *after]
        exchange = MatrixExchange(shapes, 19, 0, 2)
        assert exchange.straddling == [len(before)] and exchange.owners[len(before)] == owner
    load = [0, 0]
    owners = [MatrixExchange([(2, 2)], 2, rank, 2, load).owners for rank in (0, 1)]
    assert owners == [[0], [1]] and load == [8, 8], "what other groups brought a rank counts"


def test_eight_ranks_share_preset_b_evenly_and_move_little():
    with torch.device("meta"):
        matrices = parameter_groups(Unite(ModelConfig(preset="B")), "muon")["muon"]
    shapes = [matrix_shape(parameter.shape) for parameter in matrices.values()]
    partition = -(-sum(rows * columns for rows, columns in shapes) // 8)
    exchange = MatrixExchange(shapes, partition, 0, 8)
    assert len(exchange.straddling) == 7
    load = [0] * 8
    for owner, (rows, columns) in zip(exchange.owners, shapes):
        load[owner] += rows * columns * min(rows, columns)
    assert max(load) < 1.1 * sum(load) / 8


def test_flat_fragments_cover_every_parameter_once():
    shapes = {"a": torch.Size((3, 4)), "b": torch.Size((5,)), "c": torch.Size((2, 2, 4))}
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    flat = torch.cat([value.flatten() for value in values.values()] + [torch.zeros(3)])
    partition = flat.numel() // 4
    covered = {name: torch.zeros(shape.numel()) for name, shape in shapes.items()}
    for rank in range(4):
        master = torch.zeros(partition)
        layout = Layout([master], flat_fragments(shapes, 0, partition, rank), sharded=True)
        layout.scatter(values.__getitem__, lambda m: m)
        assert torch.equal(master, flat[rank * partition : (rank + 1) * partition])
        for fragment in layout.fragments:
            covered[fragment.name][fragment.start : fragment.start + fragment.length] += 1
    assert all(bool((count == 1).all()) for count in covered.values())



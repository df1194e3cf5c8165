"""The two-pass step: the one-graph gradients at flat memory, from addressed draws."""

from collections import Counter

import pytest
import torch
from one_graph import one_graph_loss
from test_model import tiny
from torch.utils._python_dispatch import TorchDispatchMode

import unite_kernels as uk
from unite_fast.config import LpipsConfig, ObjectiveConfig
from unite_fast.engine.backend import AutocastForward
from unite_fast.objective.draws import SeededDraws
from unite_fast.objective.two_pass import Objective, StepLosses, two_pass_step

BATCH = 3


class Accumulating:
    """Runs passes on the model; remembers which backward was called the last."""

    def __init__(self, model):
        self.model, self.lasts = model, []

    def __call__(self, phase, **inputs):
        return self.model(phase, **inputs)

    def backward(self, loss, *, last):
        self.lasts.append(last)
        loss.backward()


def objective(model, **options) -> Objective:
    options = {"draws_per_chunk": 1} | options
    return Objective(ObjectiveConfig(lpips=LpipsConfig(weight=0.0), **options), model.null_label)


def draws(config, *, step=5, stream=0, seed=1) -> SeededDraws:
    return SeededDraws(config, seed=seed, step=step, stream=stream, device=torch.device("cpu"))


def batch(model):
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(BATCH, 3, 16, 16, generator=generator)
    shape = torch.Size((BATCH, model.config.registers, model.config.latent_dim))
    return images, torch.tensor([0, 2, 1]), shape


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(), dict(shared=False), dict(registers=5), dict(latent_norm="rms"),
        dict(latent_norm="none", register_noise=False),
    ],
    ids=["shared", "separate", "queries", "RMSNorm", "no norm, no noise"],
)  # fmt: skip
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_gradients_equal_those_of_one_graph(stop_gradient, sizes, chunk):
    model = tiny(**sizes)
    goal = objective(model, flow_draws=5, draws_per_chunk=chunk, stop_gradient=stop_gradient)
    images, labels, shape = batch(model)
    one = one_graph_loss(model, goal, images, labels, draws(goal.config), shape=shape)
    one.backward()
    expected = gradients(model)
    model.zero_grad()
    engine = Accumulating(model)
    losses = two_pass_step(engine, goal, images, labels, draws(goal.config), shape=shape, weight=0.5)
    found = gradients(model)
    assert set(found) == set(expected)
    for name in expected:
        # The same sums in another order, in float32: 1e-6 on this model.
        error = (2 * found[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-6)
        assert error < 1e-4, name
    assert torch.allclose(losses.total, one.detach(), rtol=1e-5)
    assert engine.lasts == [False] * (len(engine.lasts) - 1) + [True]
    assert len(engine.lasts) == -(-5 // chunk) + 1


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_a_micro_batch_before_the_last_communicates_nothing(stop_gradient):
    model = tiny()
    goal = objective(model, flow_draws=2, stop_gradient=stop_gradient)
    images, labels, shape = batch(model)
    engine = Accumulating(model)
    for last in (False, True):
        two_pass_step(engine, goal, images, labels, draws(goal.config), shape=shape, last=last)
    assert engine.lasts == [False] * 5 + [True]


def test_losses_of_micro_batches_add_up_by_their_weights():
    def losses(factor):
        terms = {"l1": torch.tensor(1.0 * factor), "lpips": torch.tensor(2.0 * factor)}
        return StepLosses(torch.tensor(7.0 * factor), terms, torch.tensor(4.0 * factor), torch.tensor(factor), None)

    whole = StepLosses.sum([losses(1).scaled(0.25), losses(3).scaled(0.75)])
    assert (whole.total, whole.flow, whole.z0) == (17.5, 10.0, 3)
    assert whole.terms == {"l1": 2.5, "lpips": 5.0}


def peak_saved_bytes(model, goal, run) -> int:
    """Largest number of bytes that autograd held for backward at any moment."""
    alive = peak = 0

    class Held:
        def __init__(self, tensor):
            nonlocal alive, peak
            self.tensor = tensor
            alive += tensor.nbytes
            peak = max(peak, alive)

        def __del__(self):
            nonlocal alive
            alive -= self.tensor.nbytes

    images, labels, shape = batch(model)
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        run(images, labels, shape)
    return peak


def test_peak_memory_does_not_grow_with_the_number_of_draws():
    model = tiny()

    def measure(count, stepwise):
        goal = objective(model, flow_draws=count)

        def run(images, labels, shape):
            if stepwise:
                two_pass_step(Accumulating(model), goal, images, labels, draws(goal.config), shape=shape)
            else:
                one_graph_loss(model, goal, images, labels, draws(goal.config), shape=shape).backward()

        return peak_saved_bytes(model, goal, run)

    assert measure(40, True) == measure(1, True)
    assert measure(8, False) > 2 * measure(1, False)  # what the step avoids, and proof that the meter sees it


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("recomputed", [True, False])
def test_a_weight_is_cast_once_for_all_passes(stop_gradient, recomputed, monkeypatch):
    """Under autocast; passes that cast for themselves round every product that is a weight's gradient to bfloat16."""
    model = tiny(checkpoint_activations=recomputed)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    goal = objective(model, flow_draws=3, draws_per_chunk=1, stop_gradient=stop_gradient)
    images, labels, shape = batch(model)
    engine = Accumulating(AutocastForward(model, torch.bfloat16))
    places = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}

    def step():
        casts = Counter()

        class Casts(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                together = function is torch.ops.aten._foreach_copy_.default
                for source in args[1] if together else args[:1]:
                    if (together or function is torch.ops.aten._to_copy.default) and source.data_ptr() in places:
                        casts[places[source.data_ptr()]] += 1
                return function(*args, **(kwargs or {}))

        model.zero_grad()
        with Casts():
            two_pass_step(engine, goal, images, labels, draws(goal.config), shape=shape)
        del casts["encoder.register_position"]  # added, not multiplied: no autocast
        return casts, gradients(model)

    once, ours = step()
    assert len(once) > 20 and set(once.values()) == {1}
    monkeypatch.setattr("unite_fast.model.linear.current_casts", lambda: None)
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        often, theirs = step()
    finally:
        torch.set_autocast_cache_enabled(before)
    assert often.keys() == once.keys() and max(often.values()) >= 4 and ours.keys() == theirs.keys()
    for name, gradient in theirs.items():  # a product's elements are rounded by 2⁻⁹ at most, in turn with others
        assert (ours[name] - gradient).norm() < 2**-7 * gradient.norm(), name


def test_draws_depend_on_seed_step_and_stream_alone():
    config = ObjectiveConfig()
    shape, z1 = torch.Size((4, 6, 4)), torch.zeros(4, 6, 4)
    here = draws(config)
    again = draws(config)
    assert torch.equal(here.tokenize(shape).noise, again.tokenize(shape).noise)
    whole = here.flow(z1, 0, 6)
    parts = [again.flow(z1, first, 2) for first in (0, 2, 4)]
    assert torch.equal(whole.drop, torch.cat([part.drop for part in parts]))
    for field in ("z_t", "t"):  # vectorised loops round their tails differently: one unit in the last place
        joined = torch.cat([getattr(part, field) for part in parts])
        assert torch.allclose(getattr(whole, field), joined, atol=1e-6), field
    on_device = draws(config, step=torch.tensor(5))
    assert torch.equal(on_device.flow(z1, 0, 6).z_t, whole.z_t)
    for other in (draws(config, step=6), draws(config, stream=1), draws(config, seed=2)):
        assert not torch.equal(other.tokenize(shape).noise, here.tokenize(shape).noise)
        assert not torch.equal(other.flow(z1, 0, 6).t, whole.t)


def test_no_two_draws_of_a_step_are_the_same_numbers():
    """Nor do its micro-batches share any: a mask made of the numbers of its times would choose certain times."""
    config = ObjectiveConfig(label_drop=0.5)
    shape = torch.Size((4000, 1, 4))
    series = []
    for stream in (0, 1, 2):
        made = draws(config, stream=stream)
        noise, t, (mask, mix_t, decoder_noise), _ = made.tokenize(shape)
        flow = made.flow(torch.zeros(shape), 0, 2)
        flow_noise = flow.z_t / (1 - flow.t)[:, :, None, None]
        series += [noise[:, 0, 0], decoder_noise[:, 0, 0], *flow_noise[:, :, 0, 0]]
        series += [t, mask, mix_t, *flow.t, *flow.drop]
    together = torch.corrcoef(torch.stack([one.double() for one in series]))
    assert (together - torch.eye(len(series))).abs().max() < 0.08  # 4,000 numbers each: 5 σ


def test_laws_of_the_draws():
    config = ObjectiveConfig(label_drop=0.25, tokenize_t_max=0.01, mix_probability=0.3, mix_t_min=0.7)
    shape = torch.Size((4000, 1, 4))
    noise, t, (mask, mix_t, _), added = draws(config).tokenize(shape)
    assert added is None and abs(float(noise.mean())) < 0.04 and abs(float(noise.std()) - 1) < 0.04
    assert 0 <= float(t.min()) and float(t.max()) <= 0.01 and abs(float(t.mean()) - 0.005) < 3e-4
    assert abs(float(mask.float().mean()) - 0.3) < 0.04
    assert 0.7 <= float(mix_t.min()) and float(mix_t.max()) <= 1 and abs(float(mix_t.mean()) - 0.85) < 0.01
    flow = draws(config).flow(torch.zeros(shape), 0, 1)
    assert abs(float(flow.drop.float().mean()) - 0.25) < 0.04
    # The median of α u / (1 + (α−1) u) with median u = ½ and α = ½ is 1/3.
    assert abs(float(flow.t.median()) - 1 / 3) < 0.02
    uniform = draws(ObjectiveConfig(time_law="uniform")).flow(torch.zeros(shape), 0, 1).t
    assert abs(float(uniform.median()) - 0.5) < 0.03


@pytest.mark.parametrize(("law", "shift"), [("logit_normal", 0.3), ("uniform", 1.0)])
def test_draws_are_the_operators_numbers_by_law_and_address(law, shift):
    """Each law has a stream of its own, of seven for every micro-batch; the uniform law has no shift."""
    config = ObjectiveConfig(
        time_law=law, time_shift=0.3, label_drop=0.3, tokenize_t_max=0.2, mix_probability=0.4, mix_t_min=0.7
    )
    shape, made = torch.Size((40, 4, 3)), draws(config, step=2, stream=3, seed=5)
    streams = ("noise", "t", "mask", "mix t", "mix", "flow", "drop")
    places = {name: (5, 2, 3 * 7 + place) for place, name in enumerate(streams)}
    uniform = {name: uk.philox_uniform(shape[:1], *at) for name, at in places.items()}
    noise, t, (mask, mix_t, mix), _ = made.tokenize(shape)
    assert torch.equal(noise, uk.philox_normal(shape, *places["noise"]))
    assert torch.equal(mix, uk.philox_normal(shape, *places["mix"]))
    assert torch.equal(mask, uniform["mask"] < 0.4)
    torch.testing.assert_close(t, 0.2 * uniform["t"])
    torch.testing.assert_close(mix_t, 0.7 + 0.3 * uniform["mix t"])
    z1, (seed, step, stream) = torch.randn(shape), places["flow"]
    z_t, t, drop = made.flow(z1, 1, 2)
    expected = uk.flow_noise(z1, 2, seed, step, stream=stream, law=law, shift=shift, first_draw=1)
    assert all(map(torch.equal, (z_t, t), expected))
    assert torch.equal(drop, uk.philox_uniform(shape[:1], *places["drop"], draws=2, first_draw=1) < 0.3)


def test_dropout_begins_anew_at_its_address():
    def numbers(**address):
        draws(ObjectiveConfig(), **address).seed_generators()
        return torch.rand(4).tolist()

    first = numbers()
    torch.rand(3)
    assert numbers() == first
    assert all(numbers(**{name: 7}) != first for name in ("step", "stream", "seed"))


def test_the_papers_forms():
    model = tiny()
    images, labels, shape = batch(model)
    additive = ObjectiveConfig(decoder_noise="additive", additive_sigma=0.7, lpips=LpipsConfig(weight=0.0))
    _, _, mix, added = draws(additive).tokenize(torch.Size((500, 4, 4)))
    assert mix is None and abs(float(added.std()) - 0.7) < 0.03
    assert draws(ObjectiveConfig(decoder_noise="none")).tokenize(shape)[2:] == (None, None)
    for options in (
        dict(decoder_noise="additive"), dict(decoder_noise="none"), dict(time_law="uniform", weighting="none"),
    ):  # fmt: skip
        goal = objective(model, flow_draws=2, **options)
        losses = two_pass_step(Accumulating(model), goal, images, labels, draws(goal.config), shape=shape)
        assert torch.isfinite(losses.total)
    for options in (dict(decoder_noise="additive", additive_sigma=0.7), dict(decoder_noise="none")):
        goal = objective(model, **options)
        noise, t, _, added = draws(goal.config).tokenize(shape)
        z0 = model.tokenize(images, noise=noise, t=t)
        _, terms, found = goal.reconstruction(model, images, draws(goal.config), shape)
        l1 = (model.decode(z0 if added is None else z0 + added) - images).abs().mean()
        assert torch.allclose(found, z0, atol=1e-5) and torch.allclose(terms["l1"], l1, rtol=1e-4), options
    goal = objective(model, flow_draws=1, weighting="none", label_drop=0.0)
    z1 = torch.randn(shape)
    z_t, t, _ = draws(goal.config).flow(z1, 0, 1)
    plain = (z1 - model.denoise(z_t[0], t[0], labels)).square().mean()
    assert torch.allclose(goal.flow(model, z1, labels, draws(goal.config), 0, 1), plain, rtol=1e-5)


def test_stop_gradient_decides_whether_flow_reaches_the_tokenizer():
    for stop, reached in ((True, False), (False, True)):
        model = tiny(shared=False)
        goal = objective(model, flow_draws=1, l1_weight=0.0, stop_gradient=stop)
        images, labels, shape = batch(model)
        two_pass_step(Accumulating(model), goal, images, labels, draws(goal.config), shape=shape)
        assert bool(model.encoder.final.weight.grad.abs().max() > 0) is reached
        assert model.denoiser.final.weight.grad.abs().max() > 0 and model.denoiser_norm.weight.grad.abs().max() > 0
        assert bool(model.latent_norm.weight.grad.abs().max() > 0) is reached


@pytest.mark.skipif(not torch.cuda.is_available(), reason="host synchronisation is a matter of CUDA")
def test_a_step_on_a_gpu_does_not_make_the_host_wait():
    device = torch.device("cuda")
    model = tiny().to(device)
    goal = objective(model, flow_draws=3)
    images, labels, shape = batch(model)
    images, labels = images.to(device), labels.to(device)

    def step(number):
        made = SeededDraws(goal.config, seed=0, step=number, stream=0, device=device)
        return two_pass_step(Accumulating(model), goal, images, labels, made, shape=shape)

    step(0)  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(losses.total)

"""Flow noise, the latent norm with noise and the flow loss: statistics, kernels against equations."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_testing import DEVICE, DTYPES, assert_twice_as_good, normal, on_backend
from scipy import stats

import unite_kernels as uk
from unite_kernels.flow import _flow_noise, _flow_noise_backward
from unite_kernels.latent import _flow_loss, _mix, _mix_backward
from unite_kernels.philox import _philox

SHAPES = [(1, 1, 1), (3, 5, 7), (2, 33, 32), (2, 3, 100)]  # [B, K, D]; the model's D is 32
LAWS = ("logit_normal", "uniform")


def tensors(*shapes, dtype=torch.float32, seed=0):
    """Normal tensors of these shapes, each from a seed of its own."""
    return [normal(*shape, dtype=dtype, seed=10 * seed + index) for index, shape in enumerate(shapes)]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_times_have_their_law(law, shift):
    _, t = uk.flow_noise(torch.zeros(20_000, 1, 1), 2, 5, 0, law=law, shift=shift)
    u = t / (shift - (shift - 1) * t)  # the shift undone
    expected = stats.uniform.cdf if law == "uniform" else lambda x: stats.norm.cdf(torch.tensor(x).logit().numpy())
    assert stats.kstest(u.flatten().double().numpy(), expected).pvalue > 1e-4
    assert t.min() >= 0 and t.max() <= 1
    assert abs(torch.corrcoef(t)[0, 1]) < 5 / math.sqrt(20_000)
    # The noise has words of its own.
    numbers = uk.philox_uniform if law == "uniform" else uk.philox_normal
    assert abs(torch.corrcoef(torch.stack((u[0], numbers((20_000,), 5, 0, 0))))[0, 1]) < 5 / math.sqrt(20_000)


def test_flow_noise_is_its_equation_and_an_address():
    (z,) = tensors((4, 6, 8))
    z_t, t = uk.flow_noise(z, 5, 1, 9, stream=2)
    noise = torch.stack([uk.philox_normal(z.shape, 1, 9, 2, first_draw=s, device=DEVICE) for s in range(5)])
    weight = t[:, :, None, None]
    torch.testing.assert_close(z_t, weight * z + (1 - weight) * noise)

    step = torch.tensor(9, device=DEVICE)
    parts = [uk.flow_noise(z, count, 1, step, stream=2, first_draw=first) for first, count in ((0, 2), (2, 3))]
    assert torch.equal(torch.cat([part[0] for part in parts]), z_t)
    assert torch.equal(torch.cat([part[1] for part in parts]), t)
    for other in ((2, 9, 2), (1, 8, 2), (1, 9, 3)):
        seed, step, stream = other
        assert not torch.isclose(uk.flow_noise(z, 5, seed, step, stream=stream)[1], t).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("law", LAWS)
def test_flow_noise_kernel(dtype, shape, law):
    (z,) = tensors(shape, dtype=dtype)
    (grad,) = tensors((3, *shape), dtype=dtype, seed=1)

    def run(z, backend="torch"):
        z = z.detach().requires_grad_()
        with on_backend(backend):
            z_t, t = uk.flow_noise(z, 3, 4, 5, stream=6, law=law, first_draw=7)
        return z_t, t, torch.autograd.grad(z_t, z, grad.to(z_t.dtype))[0]

    assert_twice_as_good(run(z, "triton"), run(z), run(z.float()))


def mix_truth(z, weight, bias, mask, t, noise, eps=1e-5):
    """(z0, decoder input) from the equations, in float64."""
    z, weight, bias, t, noise = (x.double() for x in (z, weight, bias, t, noise))
    centred = z - z.mean(-1, keepdim=True)
    z0 = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias
    chosen = mask[:, None, None].double()
    t = t[:, None, None]
    return z0, chosen * (t * z0 + (1 - t) * noise) + (1 - chosen) * z0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_latent_norm_mix_kernel(dtype, shape):
    z, noise, grad_z0, grad_mixed = tensors(shape, shape, shape, shape, dtype=dtype)
    weight, bias = tensors(shape[2:], shape[2:], seed=1)
    t = torch.linspace(0.7, 1.0, shape[0], device=DEVICE)
    mask = torch.arange(shape[0], device=DEVICE) % 2 == 0

    def run(function, cast=lambda x: x):
        leaves = [cast(x).detach().requires_grad_() for x in (z, weight, bias)]
        outputs = function(*leaves, mask=mask, t=t, noise=noise)
        gradients = torch.autograd.grad(outputs, leaves, [g.to(outputs[0].dtype) for g in (grad_z0, grad_mixed)])
        return *outputs, *gradients

    with on_backend("torch"):
        eager = run(uk.latent_norm_mix)
    with on_backend("triton"):
        fused = run(uk.latent_norm_mix)
    assert_twice_as_good(fused, eager, run(mix_truth, torch.Tensor.double))


def loss_truth(pred, z1, t, weight, bias, weighting=True, floor=0.05, eps=1e-5):
    """The flow loss from its equation, in float64."""
    pred, z1, t, weight, bias = (x.double() for x in (pred, z1, t, weight, bias))
    centred = pred - pred.mean(-1, keepdim=True)
    normalised = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias
    divisor = (1 - t).clamp(min=floor) if weighting else torch.ones_like(t)
    error = (z1 - normalised) / divisor[..., None, None]
    return error.square().flatten(-3).mean(-1).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("draws, shape", [(None, (3, 5, 7)), (3, (2, 33, 32)), (2, (1, 1, 1)), (2, (2, 3, 100))])
@pytest.mark.parametrize("weighting", [True, False])
def test_latent_norm_flow_loss_kernel(dtype, draws, shape, weighting):
    leading = () if draws is None else (draws,)
    (pred,) = tensors((*leading, *shape), dtype=dtype)
    z1, weight, bias = tensors(shape, shape[2:], shape[2:], seed=1)
    t = torch.linspace(0, 1, shape[0] * (draws or 1), device=DEVICE).view(*leading, shape[0])  # both sides of the floor

    def run(function, cast=lambda x: x):
        p, c, w, b = leaves = [cast(x).detach().requires_grad_() for x in (pred, z1, weight, bias)]
        loss = function(p, c, t, w, b, weighting=weighting)
        return loss, *torch.autograd.grad(3 * loss, leaves)

    with on_backend("torch"):
        eager = run(uk.latent_norm_flow_loss)
    with on_backend("triton"):
        fused = run(uk.latent_norm_flow_loss)
        with torch.no_grad():
            assert torch.equal(uk.latent_norm_flow_loss(pred, z1, t, weight, bias, weighting=weighting), fused[0])
    assert_twice_as_good(fused, eager, run(loss_truth, torch.Tensor.double))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("eps, floor", [({}, {}), ({"eps": 0.7}, {"floor": 0.3})], ids=["defaults", "others"])
def test_eps_and_the_floor_count(backend, eps, floor):
    """Of rows whose variance is not far from the default eps, at times on both sides of either floor."""
    pred, z1, noise, weight, bias = tensors((2, 3, 5, 8), (3, 5, 8), (3, 5, 8), (8,), (8,))
    t, mask = torch.linspace(0.5, 1, 6, device=DEVICE).view(2, 3), torch.tensor([True, False, True], device=DEVICE)
    small = 1e-3 * pred

    def run(mix, loss, cast=lambda x: x):
        leaves = [cast(x).detach().requires_grad_() for x in (small, weight, bias)]
        x, *affine = leaves
        outputs = [*mix(x[0], *affine, mask=mask, t=t[0], noise=noise, **eps), loss(x, z1, t, *affine, **eps, **floor)]
        return *outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves)

    with on_backend(backend):
        found = run(uk.latent_norm_mix, uk.latent_norm_flow_loss)
    truth = run(mix_truth, loss_truth, torch.Tensor.double)
    for ours, true in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5 * true.abs().max().item())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("chosen", [0, 1, 3, 4])
def test_the_loss_has_a_gradient_for_each_tensor_alone(backend, chosen):
    given = tensors((3, 2, 5, 8), (2, 5, 8), (3, 2), (8,), (8,))
    given[2] = given[2].sigmoid()
    found = []
    for function, cast in ((uk.latent_norm_flow_loss, lambda x: x), (loss_truth, torch.Tensor.double)):
        inputs = [cast(x).clone() for x in given]
        leaf = inputs[chosen].requires_grad_()
        with on_backend(backend):
            found.append(torch.autograd.grad(function(*inputs), leaf)[0].double())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_draws_take_no_gradient(backend):
    z, z1, noise, weight, bias = (x.requires_grad_() for x in tensors((2, 5, 8), (2, 5, 8), (2, 5, 8), (8,), (8,)))
    t, mask = torch.rand(2, device=DEVICE).requires_grad_(), torch.tensor([True, False], device=DEVICE)
    with on_backend(backend):
        _, mixed = uk.latent_norm_mix(z, weight, bias, mask=mask, t=t, noise=noise)
        (mixed.sum() + uk.latent_norm_flow_loss(z, z1, t, weight, bias)).backward()
    assert z.grad.any() and z1.grad.any() and t.grad is None and noise.grad is None


def test_draws_are_summed_and_z1_may_be_constant():
    pred, z1, weight, bias = tensors((3, 2, 5, 8), (2, 5, 8), (8,), (8,))
    t = torch.rand(3, 2, device=DEVICE)
    for backend in ("torch", "triton"):
        with on_backend(backend):
            together = uk.latent_norm_flow_loss(pred, z1, t, weight, bias)
            alone = [uk.latent_norm_flow_loss(pred[s], z1, t[s], weight, bias) for s in range(3)]
            torch.testing.assert_close(together, sum(alone))
            pred.requires_grad_()
            uk.latent_norm_flow_loss(pred, z1, t, weight, bias).backward()
            assert pred.grad is not None and z1.grad is None
            pred = pred.detach()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(bad):
    z, noise, weight, bias = tensors((2, 5, 8), (2, 5, 8), (8,), (8,))
    z[0, 2, 3] = bad
    t, mask = torch.tensor([0.5, 0.8], device=DEVICE), torch.tensor([True, False], device=DEVICE)
    late = torch.tensor([bad], device=DEVICE)
    results = {}
    for backend in ("torch", "triton"):
        leaf = z.clone().requires_grad_()
        with on_backend(backend):
            outputs = [
                *uk.latent_norm_mix(leaf, weight, bias, mask=mask, t=t, noise=noise),
                *uk.flow_noise(leaf, 2, 0, 0),
                uk.latent_norm_flow_loss(leaf[:1], z[1:], t[:1], weight, bias),
                uk.latent_norm_flow_loss(leaf[1:], z[1:], t[1:], weight, bias),
                uk.latent_norm_flow_loss(leaf[1:], z[1:], late, weight, bias),
            ]
            outputs.append(torch.autograd.grad(sum(o.sum() for o in outputs if o.requires_grad), leaf)[0])
        results[backend] = outputs
    torch.testing.assert_close(results["triton"], results["torch"], equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_empty_input(shape):
    z, noise, weight, bias = tensors(shape, shape, (8,), (8,))
    t, mask = torch.zeros(shape[0], device=DEVICE), torch.zeros(shape[0], dtype=torch.bool, device=DEVICE)
    results = {}
    for backend in ("torch", "triton"):
        leaves = [x.clone().requires_grad_() for x in (z, weight, bias)]
        with on_backend(backend):
            z_t, times = uk.flow_noise(leaves[0], 2, 0, 0)
            loss = uk.latent_norm_flow_loss(z_t, z, times, *leaves[1:])
            outputs = [z_t, times, *uk.latent_norm_mix(*leaves, mask=mask, t=t, noise=noise), loss]
            outputs += torch.autograd.grad([outputs[2], outputs[3]], leaves, [z, z])
            outputs += [uk.flow_noise(z, 0, 0, 0)[0], uk.philox_normal((0, 3), 0, 0, 0, device=DEVICE)]
        results[backend] = outputs
    torch.testing.assert_close(results["triton"], results["torch"], equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_draws_cost_nothing(backend):
    leaves = [x.requires_grad_() for x in tensors((0, 2, 5, 8), (2, 5, 8), (8,), (8,))]
    pred, z1, weight, bias = leaves
    with on_backend(backend):
        loss = uk.latent_norm_flow_loss(pred, z1, torch.zeros(0, 2, device=DEVICE), weight, bias)
        gradients = torch.autograd.grad(loss, leaves)
    assert loss == 0 and not any(gradient.any() for gradient in gradients)


def test_operators_pass_opcheck():
    z, noise, weight, bias = tensors((2, 5, 8), (2, 5, 8), (8,), (8,))
    leaves = [x.requires_grad_() for x in (z, weight, bias)]
    t, mask = torch.rand(2, device=DEVICE), torch.tensor([True, False], device=DEVICE)
    step = torch.tensor(3, device=DEVICE)
    times = torch.rand(3, 2, device=DEVICE)
    (pred,) = tensors((3, 2, 5, 8), seed=1)
    for operator, arguments in (
        (_philox, (step, 1, 2, 3, 2, 10, True)),
        (_flow_noise, (z, step, 3, 1, 2, True, 0.5, 0)),
        (_flow_noise_backward, (pred, times)),
        (_mix, (*leaves, mask, t, noise, 1e-5)),
        (_mix_backward, (noise, noise, z.detach(), weight.detach(), mask, t, 1e-5)),
        (_flow_loss, (pred.clone().requires_grad_(), z, times, weight, bias, 0.05, True, 1e-5, True)),
    ):
        torch.library.opcheck(operator.registered, arguments)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiled_values(backend):
    z, noise, weight, bias = tensors((2, 5, 8), (2, 5, 8), (8,), (8,))
    mask, step = torch.tensor([True, False], device=DEVICE), torch.tensor(3, device=DEVICE)

    def losses(z, weight, bias):
        z0, mixed = uk.latent_norm_mix(z, weight, bias, mask=mask, t=torch.ones(2, device=DEVICE) * 0.8, noise=noise)
        z_t, t = uk.flow_noise(z0, 3, 1, step, stream=2)
        drop = uk.philox_uniform((2,), 1, step, 5, draws=3, device=DEVICE)
        return uk.latent_norm_flow_loss(z_t, z0, t, weight, bias) + (mixed * drop[0, :, None, None]).square().sum()

    def run(function):
        leaves = [x.clone().requires_grad_() for x in (z, weight, bias)]
        loss = function(*leaves)
        return loss, *torch.autograd.grad(loss, leaves)

    with on_backend(backend):
        compiled = torch.compile(losses, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
        torch.testing.assert_close(run(compiled), run(losses), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_step_that_counts_compiles_nothing_again(backend):
    z, compiled = normal(2, 5, 8), []

    def compiler(graph, inputs):
        compiled.append(graph)
        return graph

    def noised(z, step):
        return uk.flow_noise(z, 3, 1, step)

    torch._dynamo.reset()
    with on_backend(backend):
        function = torch.compile(noised, fullgraph=True, backend=compiler)
        for step in range(2, 9):
            assert all(map(torch.equal, function(z, step), noised(z, step)))
    assert len(compiled) == 2  # for a constant, and for any number


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_a_replayed_graph_draws_anew_without_waiting():
    z, weight, bias = tensors((2, 5, 8), (8,), (8,))
    step = torch.tensor(3, device=DEVICE)

    def draw():
        z_t, t = uk.flow_noise(z, 3, 1, step, stream=2)
        noise = uk.philox_normal(z.shape, 1, step, 4, device=DEVICE)
        return z_t, t, noise, uk.latent_norm_flow_loss(z_t, z, t, weight, bias)

    draw()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # refuses whatever waits for the device
        captured = draw()
    for value in (3, 4):
        step.fill_(value)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, draw(), strict=True))


def test_autocast_leaves_the_sums_in_float32():
    pred, z1, weight, bias = tensors((2, 5, 8), (2, 5, 8), (8,), (8,))
    t = torch.rand(2, device=DEVICE)
    for backend in ("torch", "triton"):
        with on_backend(backend):
            plain = uk.latent_norm_flow_loss(pred, z1, t, weight, bias)
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                assert torch.equal(uk.latent_norm_flow_loss(pred, z1, t, weight, bias), plain)


def test_wrong_input_is_refused():
    z, noise, weight, bias = tensors((2, 5, 8), (2, 5, 8), (8,), (8,))
    t, mask = torch.rand(2, device=DEVICE), torch.tensor([True, False], device=DEVICE)
    transposed = z.transpose(1, 2).contiguous().transpose(1, 2)

    def mix(z=z, weight=weight, mask=mask, t=t, noise=noise):
        return uk.latent_norm_mix(z, weight, bias, mask=mask, t=t, noise=noise)

    def loss(pred=z, z1=noise, t=t, bias=bias, **options):
        return uk.latent_norm_flow_loss(pred, z1, t, weight, bias, **options)

    for call, error, message in (
        (lambda: uk.flow_noise(z[0], 1, 0, 0), ValueError, r"\[B, K, D\]"),
        (lambda: uk.flow_noise(z.double(), 1, 0, 0), TypeError, "float64"),
        (lambda: uk.flow_noise(transposed, 1, 0, 0), ValueError, "contiguous"),
        (lambda: uk.flow_noise(z, 1, 0, 0, law="cosine"), ValueError, "logit_normal, uniform"),
        (lambda: uk.flow_noise(z, 1, 0, 0, shift=0.0), ValueError, "shift is 0.0"),
        (lambda: uk.flow_noise(z, -1, 0, 0), ValueError, "draws is -1"),
        (lambda: uk.flow_noise(z, 1, -1, 0), ValueError, "seed is -1"),
        (lambda: uk.flow_noise(z, 1, 0, -1), ValueError, "step is -1"),
        (lambda: uk.flow_noise(z, 1, 0, torch.tensor(0.0)), ValueError, "0-dim int64"),
        (lambda: uk.flow_noise(z, 1, 0, torch.zeros(1, dtype=torch.int64)), ValueError, "0-dim int64"),
        (lambda: uk.flow_noise(z, 1, 0, torch.tensor(0, device="meta")), ValueError, "0-dim int64 on"),
        (lambda: uk.flow_noise(z, 1, 2**63, 0), ValueError, "seed is 9223372036854775808; it must lie in"),
        (lambda: uk.flow_noise(z, 1, 0, 0, stream=2**31), ValueError, "stream is 2147483648"),
        (lambda: uk.flow_noise(z, 1, 0, 0, first_draw=2**31), ValueError, "first_draw is 2147483648"),
        (lambda: uk.philox_normal((2,), 0, 0, 0, first_draw=-1), ValueError, "first_draw is -1"),
        (lambda: uk.flow_noise(z, 1, 0, 2**63), ValueError, r"step is 9223372036854775808; it must lie in"),
        (lambda: uk.flow_noise(z, 1, 0, 1.5), TypeError, "step is 1.5; it must be an integer"),
        (lambda: uk.flow_noise(z, 2.0, 0, 0), TypeError, "draws is 2.0; it must be an integer"),
        (lambda: uk.philox_uniform((-2,), 0, 0, 0), ValueError, "negative"),
        (lambda: uk.philox_uniform((-2, -3), 0, 0, 0), ValueError, "negative"),
        (lambda: uk.philox_uniform((2,), 0, 0, 0, dtype=torch.int32), TypeError, "dtype is torch.int32; it must"),
        (lambda: mix(z=z[0]), ValueError, r"\[B, K, D\]"),
        (lambda: mix(weight=weight[:4]), ValueError, r"weight has shape \(4,\); it must be \(8,\)"),
        (lambda: mix(mask=t), TypeError, "mask is torch.float32; it must be bool"),
        (lambda: mix(t=t[:1]), ValueError, "t has shape"),
        (lambda: mix(noise=noise.int()), TypeError, "noise is torch.int32"),
        (lambda: mix(z=transposed), ValueError, "contiguous"),
        (lambda: mix(z=z > 0), TypeError, "z is torch.bool; it must be float32, float16 or bfloat16"),
        (lambda: mix(t=mask), TypeError, "t is torch.bool"),
        (lambda: loss(z1=noise > 0), TypeError, "z1 is torch.bool"),
        (lambda: loss(pred=z[0]), ValueError, r"\[S, B, K, D\]"),
        (lambda: loss(z1=noise[:1]), ValueError, "z1 has shape"),
        (lambda: loss(t=t[:, None]), ValueError, "t has shape"),
        (lambda: loss(bias=bias.to("meta")), ValueError, "bias is on meta"),
        (lambda: loss(floor=0.0), ValueError, "floor is 0.0"),
    ):
        with pytest.raises(error, match=message):
            call()

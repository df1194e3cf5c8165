"""The moving average of many tensors and batched Newton–Schulz."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_testing import DEVICE, normal, on_backend
from torch.optim import Muon

import unite_kernels as uk
from unite_kernels.dispatch import aligned
from unite_kernels.optim import _ema_update_, _newton_schulz

ROUNDING = 2.0**-8 if DEVICE == "cuda" else 2.0**-23  # of the dtype that newton_schulz computes in


@pytest.fixture(params=["auto", "torch"])
def backend(request):
    """On a CPU "auto" takes cpu.c where that serves."""
    with on_backend(request.param):
        yield


def test_ema_is_its_equation():
    shapes = [(3,), (5, 7), (), (2, 3, 4), (0,)]
    ema = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    params = [normal(*shape, seed=9 + i).requires_grad_() for i, shape in enumerate(shapes)]
    expected = [(0.9978 * e.double() + 0.0022 * p.double()).float() for e, p in zip(ema, params)]
    addresses = [e.data_ptr() for e in ema]
    uk.ema_update_(ema, params, 0.9978)
    for average, value in zip(ema, expected):
        torch.testing.assert_close(average, value, rtol=3e-7, atol=3e-7)
    assert addresses == [e.data_ptr() for e in ema]
    assert not any(e.requires_grad for e in ema)


def test_ema_at_its_ends():
    ema, params = [normal(5)], [normal(5, seed=1)]
    before = ema[0].clone()
    uk.ema_update_(ema, params, 1.0)
    assert torch.equal(ema[0], before)
    uk.ema_update_(ema, params, 0.0)
    assert torch.equal(ema[0], params[0])
    uk.ema_update_([], [], 0.5)


@pytest.mark.parametrize("shape", [(3, 24, 40), (2, 40, 24), (1, 16, 16), (2, 1, 5), (2, 24, 96), (1, 80, 40)])
def test_newton_schulz_is_its_equation(shape, backend):
    g = normal(*shape)
    expected = []
    for matrix in g.double():
        x = matrix / max(matrix.norm().item(), 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        expected.append(x)
    # Five quintics amplify rounding: the slope at zero, 3.44, to the fifth is 485; measured errors stay below 40.
    torch.testing.assert_close(uk.newton_schulz(g).double(), torch.stack(expected), rtol=0, atol=100 * ROUNDING)


@pytest.mark.parametrize("options", [{}, {"eps": 0.25}])
def test_newton_schulz_divides_by_no_less_than_eps(options, backend):
    eps = options.get("eps", 1e-7)
    g = normal(3, 4, 6)
    g *= eps * torch.tensor([0.5, 1.0, 2.0], device=DEVICE)[:, None, None] / g.norm(dim=(1, 2), keepdim=True)
    norms = uk.newton_schulz(g, 0, **options).norm(dim=(1, 2))
    torch.testing.assert_close(norms, torch.tensor([0.5, 1.0, 1.0], device=DEVICE), rtol=4 * ROUNDING, atol=0)


def test_newton_schulz_brings_singular_values_near_one(backend):
    g = torch.linalg.qr(normal(2, 32, 32))[0] * torch.logspace(-2, 0, 32, device=DEVICE)
    values = torch.linalg.svdvals(uk.newton_schulz(g).float())
    # The published coefficients oscillate in 0.68 … 1.13 (Jordan et al. 2024); 0.003 of the norm is still lifted there.
    assert values.min() > 0.3 and values.max() < 1.2 + 2 * ROUNDING


@pytest.mark.parametrize("shape", [(48, 128), (128, 48)])
def test_newton_schulz_lifts_small_singular_values_of_long_matrices(shape, backend):
    left, right = (torch.linalg.qr(normal(side, 48, seed=side).double())[0] for side in shape)
    values = torch.logspace(-4, 0, 48, dtype=torch.float64, device=DEVICE)
    expected = values / values.norm()
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    expected = (left * expected) @ right.mT
    # Float32 rounds the Gram matrix by more than its smallest eigenvalue. That costs 1e-4, bfloat16 everywhere 1e-2.
    found = uk.newton_schulz(((left * values) @ right.mT).float()[None])[0].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=max(1e-3, 100 * ROUNDING))


@pytest.mark.parametrize("shape", [(32, 128), (128, 32)])
@pytest.mark.parametrize("steps", [5, 6, 7, 12])
def test_newton_schulz_of_long_matrices_without_full_rank_stays_bounded(steps, shape, backend):
    rows, columns = shape
    values = torch.linalg.svdvals(uk.newton_schulz(normal(4, rows, 1) @ normal(4, 1, columns, seed=1), steps).float())
    assert values.max() < 1.2 + 2 * ROUNDING


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_newton_schulz_is_the_step_of_torch_muon(shape, backend):
    weight = torch.nn.Parameter(torch.zeros(shape, device=DEVICE))
    weight.grad = normal(*shape)
    Muon([weight], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    update = -weight.detach() / (0.2 * math.sqrt(max(shape)))
    # Theirs runs in bfloat16 everywhere: 2**-8 a rounding, some of five steps.
    torch.testing.assert_close(uk.newton_schulz(weight.grad[None])[0], update, rtol=0, atol=0.03)


def test_newton_schulz_of_nothing_and_of_zeros(backend):
    assert uk.newton_schulz(normal(0, 3, 4)).shape == (0, 3, 4)
    assert uk.newton_schulz(normal(2, 0, 4)).shape == (2, 0, 4)
    assert torch.equal(uk.newton_schulz(torch.zeros(2, 3, 4, device=DEVICE)), torch.zeros(2, 3, 4, device=DEVICE))
    g = normal(2, 3, 4)
    g[0, 0, 0] = math.nan
    out = uk.newton_schulz(g)
    assert out[0].isnan().all() and out[1].isfinite().all()  # matrices do not touch one another


def test_newton_schulz_keeps_dtype_and_ignores_autocast():
    g = normal(2, 3, 4)
    plain = uk.newton_schulz(g)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(uk.newton_schulz(g), plain)
    assert uk.newton_schulz(g.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(5, 5), (4, 12), (12, 4)])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_newton_schulz_scales_its_result(shape, steps, backend):
    g = normal(3, *shape)
    found, plain = (uk.newton_schulz(g, steps, scale=scale) for scale in (2.5, 1.0))
    torch.testing.assert_close(found, 2.5 * plain, rtol=0, atol=10 * ROUNDING)
    assert found.is_contiguous()


@pytest.mark.parametrize("shape", [(6, 21), (21, 6), (20, 33)])
def test_newton_schulz_fills_up_rows_on_cuda(shape, monkeypatch):
    """In bfloat16, whose rows tensor cores could not load: the result is that of the matrices as they are."""
    g, widths, bmm = normal(2, *shape), set(), torch.bmm
    truth = uk.newton_schulz(g)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(torch, "bmm", lambda a, b: widths.add(max(a.stride())) or bmm(a, b))
    with on_backend("torch"):
        found = _newton_schulz.compute(g, 5, 1e-7)
    assert found.shape == g.shape and found.dtype == g.dtype and found.is_contiguous()
    # Singular values end in a band of 0.7 to 1.2; bfloat16 moves single entries by up to 0.03 within it.
    assert float((found - truth).abs().max()) < 0.1
    rows, columns = shape
    assert widths == {rows * aligned(columns)}


def test_operators_pass_opcheck():
    torch.library.opcheck(_newton_schulz.registered, (normal(2, 3, 4), 2, 1e-7))
    torch.library.opcheck(_newton_schulz.registered, (normal(2, 4, 3), 0, 1e-7))
    torch.library.opcheck(_ema_update_, ([normal(3), normal(2, 2)], [normal(3, seed=1), normal(2, 2, seed=1)], 0.9))


def test_compiled_values():
    def step(average, weight, g):
        uk.ema_update_([average], [weight], 0.9)
        return uk.newton_schulz(g, 2)

    weight, g = normal(3, 4), normal(2, 3, 4)
    eager, compiled = normal(3, 4, seed=1), normal(3, 4, seed=1)
    expected = step(eager, weight, g)
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    result = torch.compile(step, fullgraph=True, backend=backend)(compiled, weight, g)
    assert torch.equal(result, expected) and torch.equal(compiled, eager)


def test_wrong_input_is_refused():
    a, b = normal(3), normal(4)
    for call, error, message in (
        (lambda: uk.ema_update_([a], [], 0.9), ValueError, "ema has 1 tensors and params 0"),
        (lambda: uk.ema_update_([a], [b], 0.9), ValueError, "tensor 0 has shape"),
        (lambda: uk.ema_update_([a], [a.double()], 0.9), ValueError, "tensor 0 has dtype"),
        (lambda: uk.ema_update_([a], [a.to("meta")], 0.9), ValueError, "tensor 0 has device"),
        (lambda: uk.ema_update_([a], [a], 1.1), ValueError, "decay is 1.1"),
        (lambda: uk.newton_schulz(normal(3, 4)), ValueError, r"\[n, rows, columns\]"),
        (lambda: uk.newton_schulz(normal(1, 3, 4), -1), ValueError, "steps is -1"),
        (lambda: uk.newton_schulz(normal(1, 3, 4), 5.0), TypeError, "steps is 5.0; it must be an integer"),
        (lambda: uk.newton_schulz(torch.ones(1, 3, 4, dtype=torch.int32)), TypeError, "int32"),
    ):
        with pytest.raises(error, match=message):
            call()

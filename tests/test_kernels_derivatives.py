"""Second derivatives and torch.func: right where plain PyTorch serves, refused where a backward pass is compiled."""

from __future__ import annotations

import pytest
import test_attention
import torch
import torch.nn.functional as F
from kernel_testing import normal, on_backend

import unite_kernels as uk
from unite_fast.model.attention import attend
from unite_kernels import cpu
from unite_kernels.rms import unit_rms

BATCH, TOKENS, WIDTH, HEADS, HEAD = 2, 3, 8, 2, 4
SHIFT, SCALE, GATE = (normal(BATCH, WIDTH, seed=seed) for seed in range(3))
WEIGHT, BIAS, CLOSING = (normal(WIDTH, seed=seed) for seed in range(3, 6))
BRANCH, TIMES = normal(BATCH, TOKENS, WIDTH, seed=6), torch.linspace(0.1, 0.9, BATCH).to(BIAS.device)
Q_WEIGHT, K_WEIGHT = normal(HEAD, seed=7), normal(HEAD, seed=8)
COS, SIN = normal(TOKENS, HEAD // 2, seed=9), normal(TOKENS, HEAD // 2, seed=10)
REFUSALS = ["no derivative; set_backend", "no autograd formula"]
if cpu.LIBRARY is None:  # then PyTorch's own attention serves
    REFUSALS.append("_cpu_backward is not implemented")


def rms(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def modulated(unit):
    return unit * (1 + SCALE[:, None].to(unit)) + SHIFT[:, None].to(unit)


def residual(x):
    return x + GATE[:, None].to(x) * BRANCH.to(x)


def rotated(qkv):
    q, k, v = qkv.unbind(2)
    heads = []
    for x, weight in ((q, Q_WEIGHT), (k, K_WEIGHT)):
        a, b = (rms(x) * weight.to(x)).unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = COS[:, None].to(x), SIN[:, None].to(x)
        heads.append(torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2))
    return torch.stack([*heads, v], dim=2)


def flow_loss(x):
    error = BRANCH.to(x) - F.layer_norm(x, (WIDTH,), WEIGHT.to(x), BIAS.to(x), 1e-5)
    return (error / (1 - TIMES.to(x))[:, None, None]).square().mean()


X, QKV = normal(BATCH, TOKENS, WIDTH, seed=11), normal(BATCH, TOKENS, 3, HEADS, HEAD, seed=12)
# Operators of one tensor, each with its equation.
OPERATORS = {
    "rms_norm_modulate": (
        X,
        lambda x: uk.rms_norm_modulate(x, WEIGHT, SHIFT, SCALE),
        lambda x: modulated(rms(x) * WEIGHT.to(x)),
    ),
    "layer_norm_modulate": (
        X,
        lambda x: uk.layer_norm_modulate(x, WEIGHT, BIAS, SHIFT, SCALE),
        lambda x: modulated(F.layer_norm(x, (WIDTH,), WEIGHT.to(x), BIAS.to(x), 1e-6)),
    ),
    "gated_residual_rms_norm_modulate": (
        X,
        lambda x: sum(uk.gated_residual_rms_norm_modulate(x, BRANCH, GATE, WEIGHT, SHIFT, SCALE)),
        lambda x: residual(x) + modulated(rms(residual(x)) * WEIGHT.to(x)),
    ),
    "block_boundary": (
        X,
        lambda x: sum(uk.block_boundary(x, BRANCH, GATE, CLOSING, WEIGHT, SHIFT, SCALE)),
        lambda x: (
            rms(residual(x)) * CLOSING.to(x) + modulated(rms(rms(residual(x)) * CLOSING.to(x)) * WEIGHT.to(x))
        ),
    ),
    "layer_norm": (
        X, lambda x: uk.layer_norm(x, WEIGHT, BIAS), lambda x: F.layer_norm(x, (WIDTH,), WEIGHT.to(x), BIAS.to(x), 1e-6)
    ),
    "residual_layer_norm": (
        X,
        lambda x: sum(uk.residual_layer_norm(x, BRANCH, WEIGHT, BIAS)),
        lambda x: (x + BRANCH.to(x)) + F.layer_norm(x + BRANCH.to(x), (WIDTH,), WEIGHT.to(x), BIAS.to(x), 1e-6),
    ),
    "qk_norm_rope_apart": (
        QKV, lambda x: torch.stack(uk.qk_norm_rope_apart(x, Q_WEIGHT, K_WEIGHT, COS, SIN, 0), dim=2), rotated
    ),
    "qk_norm_rope": (QKV, lambda x: uk.qk_norm_rope(x, Q_WEIGHT, K_WEIGHT, COS, SIN, 0), rotated),
    "bias_swiglu": (
        X,
        lambda x: uk.swiglu(x, BIAS),
        lambda x: F.silu((x + BIAS.to(x))[..., : WIDTH // 2]) * (x + BIAS.to(x))[..., WIDTH // 2 :],
    ),
    "swiglu": (X, uk.swiglu, lambda x: F.silu(x[..., : WIDTH // 2]) * x[..., WIDTH // 2 :]),
    "latent_norm_flow_loss": (X, lambda x: uk.latent_norm_flow_loss(x, BRANCH, TIMES, WEIGHT, BIAS), flow_loss),
}
each_operator = pytest.mark.parametrize("name", OPERATORS)


def penalty_gradient(function, x):
    """Gradient of the squared gradient of a sum of squares, which takes second derivatives."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)[0]


def test_derivatives_of_the_unit_rms():
    x = normal(2, 3, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(unit_rms, (x, 1e-3))
    assert torch.autograd.gradgradcheck(unit_rms, (x, 1e-3))


@each_operator
def test_second_derivatives_in_plain_pytorch(name):
    x, operator, equation = OPERATORS[name]
    with on_backend("torch"):
        found = penalty_gradient(operator, x)
    torch.testing.assert_close(found.double(), penalty_gradient(equation, x.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@each_operator
def test_second_derivatives_are_right_or_refused(name, backend):
    x, operator, equation = OPERATORS[name]
    with on_backend(backend):
        # Behind a plain sum the incoming gradient is constant, and so nothing but the input needs a second derivative.
        for reduce in (lambda y: y.square().sum(), lambda y: y.sum()):
            leaf = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(reduce(operator(leaf)), leaf, create_graph=True)
            true = x.detach().double().requires_grad_()
            (expected,) = torch.autograd.grad(reduce(equation(true)), true, create_graph=True)
            torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-4)
            try:
                (grad.square() + leaf.square()).sum().backward()
            except RuntimeError as refusal:
                assert any(words in str(refusal) for words in REFUSALS)
            else:
                (expected.square() + true.square()).sum().backward()
                torch.testing.assert_close(leaf.grad.double(), true.grad, rtol=1e-4, atol=1e-4)


ATTENTION = (normal(BATCH, TOKENS, 3, HEADS, 16, seed=14), attend, test_attention.equation)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name", [*OPERATORS, "attention"])
def test_second_derivatives_of_chosen_tensors_are_right_or_refused(name, backend):
    """A gradient penalty beside a loss: autograd walks to the chosen tensors alone, and the loss leads there anyway."""
    x, operator, equation = OPERATORS.get(name, ATTENTION)
    with on_backend(backend):
        # By way of the input itself, and of a gradient that comes from later layers, which is linear in these.
        for reduce in (lambda y, later: y.sum(), lambda y, later: (later * y).sum()):
            leaf, later = x.detach().requires_grad_(), torch.ones((), device=x.device).requires_grad_()
            loss = reduce(operator(leaf), later)
            (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
            for chosen in (leaf, later):
                total = grad.square().sum() + 2 * leaf.sum() + 3 * later
                try:
                    (found,) = torch.autograd.grad(total, chosen, retain_graph=True)
                except RuntimeError as refusal:
                    assert any(words in str(refusal) for words in REFUSALS)
                    continue
                true, last = x.detach().double().requires_grad_(), torch.ones((), device=x.device).double()
                last.requires_grad_()
                (expected,) = torch.autograd.grad(reduce(equation(true), last), true, create_graph=True)
                wanted = true if chosen is leaf else last
                (expected,) = torch.autograd.grad(expected.square().sum() + 2 * true.sum() + 3 * last, wanted)
                torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(cpu.LIBRARY is None or X.is_cuda, reason=cpu.STATE)
@pytest.mark.parametrize("name", ["rms_norm_modulate", "block_boundary", "qk_norm_rope", "swiglu"])
def test_gradients_without_an_address_are_refused(name):
    """The backward pass alone under vmap or forward mode, behind a forward pass that saw neither."""
    x, operator, _ = OPERATORS[name]
    leaf = x.detach().requires_grad_()
    out = operator(leaf)
    rows = torch.stack([torch.ones_like(out), torch.ones_like(out)])
    with pytest.raises(RuntimeError, match="no part in vmap and forward-mode differentiation; set_backend"):
        torch.autograd.grad(out, leaf, rows, is_grads_batched=True, retain_graph=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(*rows)
        with pytest.raises(RuntimeError, match="no part in vmap and forward-mode differentiation; set_backend"):
            torch.autograd.grad(out, leaf, dual)


@each_operator
def test_tangents_of_gradients_are_right_or_refused(name):
    """The backward pass alone in forward mode: what is registered with PyTorch would drop them."""
    x, operator, _ = OPERATORS[name]
    leaf = x.detach().requires_grad_()
    with on_backend("triton"):
        out = operator(leaf)

        def backward(grad):
            return torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]

        grad, tangent = torch.ones_like(out), normal(*out.shape, seed=15)
        try:
            found = torch.func.jvp(backward, (grad,), (tangent,))[1]
        except RuntimeError as refusal:
            assert "no part in forward-mode differentiation; set_backend" in str(refusal)
        else:
            torch.testing.assert_close(found, backward(tangent))  # linear in its gradient
        with torch.autograd.forward_ad.dual_level():
            backward(grad)  # none is there to be dropped


@each_operator
def test_transforms_of_torch_func(name):
    x, operator, equation = OPERATORS[name]
    rows = torch.stack([x, 2 * x])

    def energy(function, x):
        return function(x).square().sum()

    for transform in (torch.func.grad, torch.func.jacrev):
        found = transform(lambda x: energy(operator, x))(x)
        true = transform(lambda x: energy(equation, x))(x.double())
        torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-4)
    found = torch.func.vmap(torch.func.grad(lambda x: energy(operator, x)))(rows)
    for ours, row in zip(found, rows, strict=True):
        torch.testing.assert_close(ours, torch.func.grad(lambda x: energy(operator, x))(row), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.vmap(operator)(rows)[0], operator(x), rtol=1e-4, atol=1e-5)
    with on_backend("triton"), pytest.raises(RuntimeError, match="no part in torch.func and forward-mode"):
        torch.func.vmap(operator)(rows)


@each_operator
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_forward_mode_is_right_or_refused(name, backend):
    x, operator, equation = OPERATORS[name]
    direction = normal(*x.shape, seed=13)
    expected = torch.func.jvp(equation, (x.double(),), (direction.double(),))[1]
    with on_backend(backend), torch.autograd.forward_ad.dual_level():
        try:
            found = torch.autograd.forward_ad.unpack_dual(operator(torch.autograd.forward_ad.make_dual(x, direction)))
        except RuntimeError as refusal:
            assert "forward mode" in str(refusal) or "forward-mode" in str(refusal)
        else:
            torch.testing.assert_close(found.tangent.double(), expected, rtol=1e-4, atol=1e-4)

"""Products by oneDNN in place of MKL: the same Linear, wherever it may serve."""

import pytest
import torch
import torch.nn.functional as F
from kernel_testing import on_backend
from torch.utils.flop_counter import FlopCounterMode

from unite_fast.model import linear as subject
from unite_fast.model.linear import Linear
from unite_fast.model.unite import Unite
from unite_kernels import cpu

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no oneDNN"
)


@pytest.fixture(params=["cpu.c", "oneDNN alone"])
def served(monkeypatch, request):
    """On any CPU as on the one that prefers it, with a C compiler and without; counts the products."""
    calls = []
    monkeypatch.setattr(subject, "prefers_onednn", lambda: True)
    for name in ("_onednn_linear", "matmul"):
        monkeypatch.setattr(subject, name, lambda *pair, own=getattr(subject, name): (calls.append(1), own(*pair))[1])
    if request.param == "oneDNN alone":
        monkeypatch.setattr(cpu, "LIBRARY", None)
    return calls


def layer(inputs: int = 12, outputs: int = 20, bias: bool = True) -> Linear:
    torch.manual_seed(0)
    return Linear(inputs, outputs, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (1, 12), (7, 12), (2, 5, 12), (0, 12), "turned", "cut"])
def test_it_is_the_linear_with_its_gradients(served, shape, bias):
    made = layer(bias=bias)
    x = {"turned": torch.randn(12, 7).t(), "cut": torch.randn(2, 9, 30)[:, 2:, 5:17]}.get(shape)
    x = (torch.randn(shape) if x is None else x).requires_grad_()
    grad = torch.randn(*x.shape[:-1], 20)
    inputs = [x, *made.parameters()]
    found, truth = made(x), F.linear(x, made.weight, made.bias)
    assert torch.allclose(found, truth, atol=1e-6) and found.stride() == truth.stride()
    for ours, theirs in zip(*(torch.autograd.grad(y, inputs, grad) for y in (found, truth)), strict=True):
        assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)
    assert len(served) == (3 if x.numel() else 0)


def test_what_takes_no_gradient_has_no_product_for_it(served):
    made = layer()
    made(torch.randn(3, 12)).sum().backward()
    assert len(served) == 2 and made.weight.grad is not None
    made.requires_grad_(False)
    made(torch.randn(3, 12, requires_grad=True)).sum().backward()
    assert len(served) == 4


def test_second_derivatives_and_batches_of_gradients_are_plain_pytorchs(served):
    made = layer()
    x = torch.randn(3, 12, requires_grad=True)

    def penalty(product):
        (grad,) = torch.autograd.grad(product(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), made.weight)[0]

    assert torch.allclose(penalty(made), penalty(lambda x: F.linear(x, made.weight, made.bias)), rtol=1e-4)
    (batch,) = torch.autograd.grad(made(x), x, torch.eye(60).view(60, 3, 20), is_grads_batched=True)
    assert torch.allclose(batch.view(3, 20, 3, 12)[1, :, 1], made.weight, atol=1e-6)


def test_where_others_look_on_it_is_plain_pytorch(served):
    made, x = layer(), torch.randn(3, 12)
    with FlopCounterMode(display=False) as counted:
        made(x)
    assert counted.get_total_flops() == 2 * 3 * 12 * 20
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made(x).dtype == torch.bfloat16
    torch.func.vmap(made)(x), torch.func.jvp(made, (x,), (x,))
    torch.compile(made, backend="eager", fullgraph=True)(x)
    made.double()(x.double())
    with on_backend("torch"):
        made.float()(x)
    assert not served


def test_only_amds_cpus_with_wide_vectors_prefer_it(monkeypatch, tmp_path):
    information, prefers = tmp_path / "cpuinfo", subject.prefers_onednn.__wrapped__
    monkeypatch.setattr(cpu, "Path", lambda path: information)
    for vendor, vectors, expected in (
        ("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False),
        (None, "AVX512", False),
    ):  # fmt: skip
        information.unlink(missing_ok=True)
        if vendor is not None:
            information.write_text(f"processor : 0\nvendor_id : {vendor}\n")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda vectors=vectors: vectors)
        assert prefers() is expected


def test_every_linear_of_a_model_is_of_this_kind():
    from test_model import tiny

    linears = [module for module in tiny().modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) > 10 and all(type(module) is Linear for module in linears)
    assert isinstance(tiny(), Unite)

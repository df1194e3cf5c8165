"""Operators called past PyTorch's dispatcher: the same numbers, and not where somebody looks on."""

from __future__ import annotations

import pydoc

import numpy as np
import pytest
import torch
from kernel_testing import normal, on_backend, outputs_and_gradients
from test_kernels_derivatives import BRANCH, TIMES, WIDTH, X, each_operator
from test_kernels_derivatives import OPERATORS as OF_ONE_TENSOR
from torch.library import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode

import unite_kernels as uk
from unite_kernels import dispatch, flow

MAPS = normal(2, 4, 6, 6, seed=20).contiguous(memory_format=torch.channels_last)
IMAGES = normal(2, 3, 8, 8, seed=21)
STEP = torch.zeros((), dtype=torch.int64, device=X.device)
MASK = torch.tensor([True, False], device=X.device)
OPERATORS = {name: (x, function) for name, (x, function, _) in OF_ONE_TENSOR.items()} | {
    "flow_noise": (X, lambda x: uk.flow_noise(x, draws=2, seed=1, step=STEP)[0]),
    "latent_norm_mix": (X, lambda x: uk.latent_norm_mix(
        x, BRANCH[0, 0], BRANCH[0, 1], mask=MASK, t=TIMES, noise=BRANCH
    )),
    "patch_l1": (normal(2, 4, 48, seed=22), lambda x: uk.patch_l1(x, IMAGES, 4)),
    "lpips_distance": (MAPS, lambda x: uk.lpips_distance(MAPS.flip(0).contiguous(memory_format=torch.channels_last), x,
                                                        normal(4, seed=23))),
    "bias_relu": (MAPS, lambda x: uk.bias_relu(x, normal(4, seed=24))),
    "bias_relu_max_pool": (MAPS, lambda x: uk.bias_relu_max_pool(x, normal(4, seed=24))),
}  # fmt: skip
SHORT = {name: name for name in OPERATORS} | {
    name: "adaln" for name in OPERATORS if name.split("_")[-1] in ("modulate", "boundary", "norm")
} | {"bias_swiglu": "swiglu"}  # fmt: skip


class Seen(TorchDispatchMode):
    """Names of the operators that pass PyTorch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def refused(self, *args):
    raise AssertionError("called through the dispatcher")


@pytest.mark.parametrize("name", OPERATORS)
def test_past_the_dispatcher_the_numbers_are_the_same(name, monkeypatch):
    x, function = OPERATORS[name]
    with on_backend("triton"):
        with monkeypatch.context() as forbidden:
            forbidden.setattr(CustomOpDef, "__call__", refused)
            direct = outputs_and_gradients(function, [x])
            with torch.no_grad():
                quiet = function(x)
        monkeypatch.setattr(dispatch, "_looked_on", lambda: True)
        for ours, theirs in zip(direct, outputs_and_gradients(function, [x]), strict=True):
            assert torch.equal(ours, theirs)
        quiet = (quiet,) if isinstance(quiet, torch.Tensor) else quiet
        assert all(torch.equal(a, b) for a, b in zip(quiet, direct, strict=False))


@pytest.mark.parametrize("name", OPERATORS)
def test_a_mode_sees_every_operator(name):
    x, function = OPERATORS[name]
    with on_backend("triton"), Seen() as seen:
        outputs_and_gradients(function, [x])
    names = [seen.split("::")[1].split(".")[0] for seen in seen.names if seen.startswith(dispatch.NAMESPACE)]
    assert SHORT[name] in names
    # The flow loss makes its gradients with its value.
    assert any(n.endswith("_backward") for n in names) == (name != "latent_norm_flow_loss")


def test_a_subclass_of_tensor_sees_the_operator():
    class Logged(torch.Tensor):
        names = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.names.append(getattr(function, "__name__", str(function)))
            return super().__torch_function__(function, types, args, kwargs or {})

    with on_backend("triton"):
        found = uk.swiglu(X.as_subclass(Logged))
        assert torch.equal(found.as_subclass(torch.Tensor), uk.swiglu(X))
    assert any("swiglu" in name for name in Logged.names)


def test_numbers_of_numpy_reach_no_launcher(monkeypatch):
    """Triton's refuses them; its interpreter does not."""
    given, launch = [], flow._flow_noise.compute
    monkeypatch.setattr(flow._flow_noise, "compute", lambda *args: given.extend(args) or launch(*args))
    with on_backend("triton"):
        expected = uk.flow_noise(X, 2, 3, STEP, shift=0.5)
        assert given
        given.clear()
        found = uk.flow_noise(X, np.int64(2), np.int64(3), STEP, shift=np.float32(0.5))
    assert not given and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace. is deprecated", "ignore:Converting a tensor")
def test_a_trace_holds_the_operator():
    with on_backend("triton"):
        traced = torch.jit.trace(uk.swiglu, (X,))
        other = normal(1, 2, WIDTH, seed=25)
        assert torch.equal(traced(other), uk.swiglu(other))
    assert f"{dispatch.NAMESPACE}::swiglu" in str(traced.graph)


@each_operator
def test_batched_gradients_reach_no_kernel(name):
    """A kernel would take the address of the first of them."""
    x, function, _ = OF_ONE_TENSOR[name]
    leaf = x.detach().requires_grad_()
    with on_backend("triton"):
        out = function(leaf)
        rows = torch.stack([torch.ones_like(out), 2 * torch.ones_like(out)])
        try:
            (found,) = torch.autograd.grad(out, leaf, rows, is_grads_batched=True, retain_graph=True)
        except RuntimeError:
            return
        for index, row in enumerate(rows):
            torch.testing.assert_close(found[index], torch.autograd.grad(out, leaf, row, retain_graph=True)[0])


@pytest.mark.parametrize("a, b", [(0, 3), (1, 3), (3, 3), (4, 3), (2**40 + 1, 2)])
def test_cdiv(a, b):
    assert dispatch.cdiv(a, b) == a // b + (a % b > 0)


def test_next_power_of_2():
    assert [dispatch.next_power_of_2(n) for n in (1, 2, 3, 4, 5, 1025)] == [1, 2, 4, 4, 8, 2048]


def test_help_shows_the_public_functions_and_nothing_else():
    shown = pydoc.render_doc(uk, renderer=pydoc.plaintext)
    assert all(f"    {name}(" in shown for name in ("block_boundary", "fp8_linear", "set_backend", "swiglu"))
    public = [name for name, found in vars(uk).items() if callable(found) and name[0] != "_"]
    assert uk.__all__ == sorted(public) and all(getattr(uk, name).__doc__ for name in public)

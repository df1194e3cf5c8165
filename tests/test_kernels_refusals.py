"""What is no tensor, given to the operators: refused by name on every backend, before anything reads its address."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_testing import normal, on_backend

import unite_kernels as uk
from unite_kernels import cpu
from unite_kernels.fp8 import MIN_CAPABILITY

X, VECTOR, TERM = normal(2, 3, 8), normal(8), normal(2, 8)
LEVEL = normal(16, 16)
TIMES = torch.zeros(2, device=X.device)
FEATURES = normal(2, 8, 3, 4).contiguous(memory_format=torch.channels_last)
NORM = {"weight": VECTOR, "shift": TERM, "scale": TERM}
ROTARY = {
    "qkv": normal(2, 3, 3, 2, 8), "q_weight": VECTOR, "k_weight": VECTOR, "cos": normal(3, 4), "sin": normal(3, 4)
}  # fmt: skip
# Arguments that are tensors, those that may be None, and the others.
CALLS = [
    (uk.rms_norm_modulate, {"x": X, **NORM}, {"weight", "shift"}, {}),
    (uk.layer_norm_modulate, {"x": X, "bias": VECTOR, **NORM}, {"weight", "bias", "shift"}, {}),
    (
        uk.gated_residual_rms_norm_modulate,
        {"x": X, "branch": X, "gate": TERM, **NORM},
        {"weight", "shift"},
        {},
    ),
    (
        uk.gated_residual_layer_norm_modulate,
        {"x": X, "branch": X, "gate": TERM, "bias": VECTOR, **NORM},
        {"weight", "bias", "shift"},
        {},
    ),
    (
        uk.block_boundary,
        {"x": X, "branch": X, "gate": TERM, "closing_weight": VECTOR, **NORM},
        {"weight", "shift"},
        {},
    ),
    (uk.layer_norm, {"x": X, "weight": VECTOR, "bias": VECTOR}, set(), {}),
    (uk.residual_layer_norm, {"x": X, "branch": X, "weight": VECTOR, "bias": VECTOR}, set(), {}),
    (uk.qk_norm_rope, ROTARY, set(), {"unrotated": 0}),
    (uk.qk_norm_rope_apart, ROTARY, set(), {"unrotated": 0}),
    (uk.swiglu, {"x": X, "bias": VECTOR}, {"bias"}, {}),
    (uk.flow_noise, {"z": X}, set(), {"draws": 2, "seed": 0, "step": 0}),
    (
        uk.latent_norm_mix,
        {"z": X, "weight": VECTOR, "bias": VECTOR, "mask": TIMES > 0, "t": TIMES, "noise": X},
        set(),
        {},
    ),
    (uk.latent_norm_flow_loss, {"pred": X, "z1": X, "t": TIMES, "weight": VECTOR, "bias": VECTOR}, set(), {}),
    (uk.patch_l1, {"tokens": normal(2, 4, 12), "images": normal(2, 3, 4, 4)}, set(), {"patch_size": 2}),
    (uk.lpips_distance, {"features_a": FEATURES, "features_b": FEATURES, "weight": VECTOR}, set(), {}),
    (uk.bias_relu, {"x": FEATURES, "bias": VECTOR}, {"bias"}, {}),
    (uk.bias_relu_max_pool, {"x": FEATURES, "bias": VECTOR}, {"bias"}, {}),
    (
        uk.centre_crop,
        {"pixels": torch.zeros(27, dtype=torch.uint8, device=X.device)},
        set(),
        {"sizes": [(3, 3)], "side": 2},
    ),
]
if not X.is_cuda or torch.cuda.get_device_capability() >= MIN_CAPABILITY:
    CALLS += [
        (uk.fp8_linear, {"x": LEVEL, "weight": LEVEL, "bias": LEVEL[0]}, {"bias"}, {}),
        (uk.fp8_quantize, {"x": LEVEL}, set(), {"dtype": torch.float8_e5m2}),
    ]


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0].__name__)
def test_what_is_no_tensor_is_refused(call, backend):
    function, tensors, optional, others = call
    with on_backend(backend):
        function(**tensors, **others)
        for name in tensors:
            for wrong, found in ((None, "None"), (np.zeros(3, np.float32), "a numpy.ndarray"), (1.0, "a float")):
                given = {**tensors, name: wrong}
                if wrong is None and name in optional:
                    function(**given, **others)
                    continue
                with pytest.raises(TypeError, match=f"^{function.__name__}: {name} is {found}; it must be a tensor$"):
                    function(**given, **others)


@pytest.mark.skipif(X.is_cuda, reason="offsets on a GPU are not read")
@pytest.mark.parametrize("library", [cpu.LIBRARY, None], ids=["compiled", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_spans_outside_of_the_tokens_are_refused(monkeypatch, backend, dtype, library):
    monkeypatch.setattr(cpu, "LIBRARY", library)
    x, term = normal(1, 10, 8).to(dtype), normal(2, 8)
    with on_backend(backend):
        uk.rms_norm_modulate(x, None, None, term, spans=uk.Spans(torch.tensor([0, 4, 10], dtype=torch.int32), 6))
        # Too long for the longest, short of the tokens, beyond them, falling, and a gap before the first.
        for offsets, longest in (([0, 4, 10], 5), ([0, 5, 9], 5), ([0, 5, 11], 6), ([0, 12, 10], 10), ([1, 5, 11], 6)):
            spans = uk.Spans(torch.tensor(offsets, dtype=torch.int32), longest)
            with pytest.raises(ValueError, match="^rms_norm_modulate: the offsets of the spans must rise from 0 to 10"):
                uk.rms_norm_modulate(x, None, None, term, spans=spans)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("call", [call for call in CALLS if "norm" in call[0].__name__ or call[0] is uk.block_boundary],
                         ids=lambda call: call[0].__name__)  # fmt: skip
def test_an_eps_that_is_negative_or_no_number_is_refused(call, backend):
    function, tensors, _, others = call
    with on_backend(backend):
        function(**tensors, **others, eps=0)
        for eps in (-1e-6, float("nan")):
            with pytest.raises(ValueError, match=f"^{function.__name__}: eps is {eps}; it must not be negative$"):
                function(**tensors, **others, eps=eps)
        for eps in (None, "1e-6"):
            with pytest.raises(TypeError, match=f"^{function.__name__}: eps is {eps!r}; it must be a number$"):
                function(**tensors, **others, eps=eps)


def test_spans_of_another_form_are_refused():
    x, term, offsets = normal(1, 10, 8), normal(2, 8), torch.tensor([0, 4, 10], dtype=torch.int32, device=X.device)
    for spans, found in ((offsets, "a Tensor"), ([0, 4, 10], "a list")):
        with pytest.raises(TypeError, match=f"^rms_norm_modulate: spans is {found}; it must be Spans"):
            uk.rms_norm_modulate(x, None, None, term, spans=spans)
    with pytest.raises(TypeError, match="^rms_norm_modulate: offsets is a list; it must be a tensor"):
        uk.rms_norm_modulate(x, None, None, term, spans=uk.Spans([0, 4, 10], 6))


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_counts_that_are_no_integers_are_refused(backend):
    x, term, offsets = normal(1, 10, 8), normal(2, 8), torch.tensor([0, 4, 10], dtype=torch.int32, device=X.device)
    with on_backend(backend):
        with pytest.raises(TypeError, match=r"^rms_norm_modulate: the longest span is 6\.0; it must be an integer$"):
            uk.rms_norm_modulate(x, None, None, term, spans=uk.Spans(offsets, 6.0))
        for unrotated in (1.0, None, "1"):
            with pytest.raises(TypeError, match=f"^qk_norm_rope: unrotated is {unrotated!r}; it must be an integer$"):
                uk.qk_norm_rope(**ROTARY, unrotated=unrotated)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("longest", [0, 1])
def test_spans_of_no_tokens(backend, longest):
    offsets = torch.zeros(3, dtype=torch.int32, device=X.device)
    x, scale = normal(1, 0, 8).requires_grad_(), normal(2, 8).requires_grad_()
    with on_backend(backend):
        out = uk.rms_norm_modulate(x, None, None, scale, spans=uk.Spans(offsets, longest))
        out.sum().backward()
    assert out.shape == x.grad.shape == (1, 0, 8) and not scale.grad.any()


def test_a_weight_without_gradient_is_refused():
    weight, mean = normal(3, 4), normal(12)
    with pytest.raises(TypeError, match=r"^muon_momentum_: gradients\[1\] is None; it must be a tensor$"):
        uk.muon_momentum_([weight, weight], [weight, None], [mean, mean], 0.9)
    with pytest.raises(TypeError, match=r"^ema_update_: params\[1\] is None; it must be a tensor$"):
        uk.ema_update_([weight, weight], [weight, None], 0.9)
    with pytest.raises(TypeError, match="^newton_schulz: g is None; it must be a tensor$"):
        uk.newton_schulz(None)
    with pytest.raises(ValueError, match="^newton_schulz: eps is -1.0; it must not be negative$"):
        uk.newton_schulz(normal(1, 3, 4), eps=-1.0)
    with pytest.raises(TypeError, match="^muon_momentum_: coefficient is a float; it must be a tensor$"):
        uk.muon_momentum_([weight], [weight], [mean], 0.9, 1.0)


def test_an_average_of_integers_is_refused():
    steps = torch.ones(3, dtype=torch.int64, device=X.device)
    with pytest.raises(TypeError, match=r"^ema_update_: ema\[0\] is torch.int64; it must be a floating dtype$"):
        uk.ema_update_([steps], [steps], 0.9)

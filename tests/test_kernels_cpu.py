"""The operators that are compiled for CPUs: values and gradients, every set of instructions, and when they serve."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import sys
import types
import zlib
from pathlib import Path

import pytest
import test_attention
import test_kernels_adaln as adaln
import test_kernels_qk_rope as rope
import test_kernels_swiglu as swiglu
import torch
from kernel_testing import assert_twice_as_good, normal, outputs_and_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import unite_kernels as uk
from unite_fast.model.attention import attend
from unite_kernels import cpu, optim

KERNELS = Path(__file__).parents[1] / "kernels"
pytestmark = pytest.mark.skipif(cpu.LIBRARY is None, reason=cpu.STATE)
RMS = [form for form in adaln.FORMS if "layer" not in form]
# What setup.py compiles with, and what a library believes of a CPU that lacks sets of instructions.
FLAGS = ["-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
BELIEVES = {"AVX2": "(name)[3] != '5'", "baseline": "0"}  # of avx512f and its kin none, of all none


@pytest.fixture(scope="module", params=["of this CPU", *BELIEVES])
def compiled(request, tmp_path_factory):
    """The installed library, which takes the widest instructions there are, and those that believe in narrower ones."""
    if request.param == "of this CPU":
        return cpu.LIBRARY
    if request.param == "AVX2" and not cpu.LIBRARY.unite_multiplies():
        pytest.skip("a CPU without AVX2")
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None:
        pytest.skip("no C compiler")
    made = tmp_path_factory.mktemp("narrower") / "narrower.so"
    believes = f"-D__builtin_cpu_supports(name)=({BELIEVES[request.param]})"
    options = [*FLAGS, "-Wall", "-Wextra", "-Werror", believes, "-DUNITE_SOURCES=0", "-fPIC", "-shared"]
    subprocess.run([compiler, *options, "-nostartfiles", KERNELS / "cpu.c", "-lm", "-o", made], check=True)
    found = ctypes.CDLL(str(made))
    cpu.declare(found)
    return found


@pytest.fixture
def library(compiled, monkeypatch):
    """One of them in the place of the installed."""
    monkeypatch.setattr(cpu, "LIBRARY", compiled)
    return compiled


@pytest.fixture
def served(monkeypatch):
    """Counts what the compiled operators are given."""
    calls = []
    for name in ("swiglu", "adaln", "qk_norm_rope", "attention", "newton_schulz"):
        original = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, o=original, n=name: (calls.append(n), o(*a))[1])
    return calls


@pytest.mark.parametrize("shape", [*adaln.SHAPES, (2, 3, 2048), (3, 4, 1)])
@pytest.mark.parametrize("form", RMS)
def test_adaptive_norms_against_the_equation(library, served, form, shape):
    function, names = adaln.FORMS[form]
    inputs = adaln.inputs_of(names, shape, torch.float32)
    truth = outputs_and_gradients(adaln.EQUATIONS[function], inputs, lambda x: torch.float64)
    naive = outputs_and_gradients(adaln.EQUATIONS[function], inputs)
    assert_twice_as_good(adaln.run("auto", function, inputs), naive, truth)
    assert served == ["adaln"]


@pytest.mark.parametrize("eps", [1e-6, 0.7])
def test_eps_is_added_to_the_mean_square(library, served, eps, monkeypatch):
    monkeypatch.setattr(adaln, "EPS", eps)
    monkeypatch.setattr(rope, "EPS", eps)
    options = {"eps": eps}
    for form in RMS:
        function, names = adaln.FORMS[form]
        inputs = adaln.faint(names)
        truth = outputs_and_gradients(adaln.EQUATIONS[function], inputs, lambda x: torch.float64)
        naive = outputs_and_gradients(adaln.EQUATIONS[function], inputs)
        assert_twice_as_good(adaln.run("auto", lambda *given: function(*given, **options), inputs), naive, truth)
    qkv, *weights = rope.inputs_of((2, 5, 3, 16), torch.float32)
    inputs, rotary = [1e-3 * qkv, *weights], (*rope.tables(5, 16), 1)
    truth = outputs_and_gradients(rope.equation(*rotary), inputs, lambda x: torch.float64)
    naive = outputs_and_gradients(rope.equation(*rotary), inputs)
    found = outputs_and_gradients(lambda *given: uk.qk_norm_rope(*given, *rotary, **options), inputs)
    assert_twice_as_good(found, naive, truth)
    assert served == ["adaln"] * len(RMS) + ["qk_norm_rope"]


@pytest.mark.parametrize("lengths", [(5, 1, 70, 3), (2, 0, 4), (1,)])
@pytest.mark.parametrize("form", ["rms", "gated rms", "boundary"])
def test_spans_are_the_samples_one_by_one(library, form, lengths):
    function, names = adaln.FORMS[form]
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    terms = adaln.inputs_of(names, (len(lengths), 1, 24), torch.float32)
    inputs = [
        normal(1, sum(lengths), 24, seed=i) if x is not None and x.ndim == 3 else x for i, x in enumerate(terms)
    ]
    spans = uk.Spans(offsets, max(lengths))
    found, plain = (
        adaln.run(backend, lambda *given: function(*given, spans=spans), inputs) for backend in ("auto", "torch")
    )
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # sums of 79 rows


@pytest.mark.parametrize("shape, unrotated", rope.SHAPES)
def test_rotary_embedding_against_the_equation(library, served, shape, unrotated):
    inputs = rope.inputs_of(shape, torch.float32)
    rotary = (*rope.tables(shape[1] + 3, shape[3]), unrotated)
    truth = outputs_and_gradients(rope.equation(*rotary), inputs, lambda x: torch.float64)
    naive = outputs_and_gradients(rope.equation(*rotary), inputs)
    assert_twice_as_good(rope.run("auto", inputs, *rotary), naive, truth)
    assert served == ["qk_norm_rope"]


def test_a_gradient_in_any_order_of_memory(library):
    inputs = [x.requires_grad_() for x in rope.inputs_of((3, 5, 2, 16), torch.float32)]
    out = uk.qk_norm_rope(*inputs, *rope.tables(5, 16), 1)
    grad = normal(*out.shape, seed=5)
    orders = [grad, grad.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4), grad.mT.contiguous().mT]
    first, *others = (torch.autograd.grad(out, inputs, order, retain_graph=True) for order in orders)
    for other in others:
        assert all(map(torch.equal, first, other))
    qkv = inputs[0]
    out = attend(qkv)
    grad = normal(*out.shape, seed=6)
    orders = [grad, grad.mT.contiguous().mT, grad.transpose(0, 1).contiguous().transpose(0, 1)]
    first, *others = (torch.autograd.grad(out, qkv, order, retain_graph=True)[0] for order in orders)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("shape", [(3, 8, 2, 16), (2, 28, 4, 32), (1, 1, 3, 48), (2, 64, 1, 256), (0, 5, 2, 16)])
def test_attention_against_the_equation(library, served, shape):
    batch, tokens, heads, width = shape
    qkv = 2 * normal(batch, tokens, 3, heads, width)
    truth = outputs_and_gradients(test_attention.equation, [qkv], lambda x: torch.float64)
    naive = outputs_and_gradients(test_attention.equation, [qkv])
    assert_twice_as_good(outputs_and_gradients(attend, [qkv]), naive, truth)
    heads_first = qkv.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)
    strided = qkv.mT.contiguous().mT
    for other in (heads_first, strided):
        assert all(map(torch.equal, outputs_and_gradients(attend, [other]), outputs_and_gradients(attend, [qkv])))
    assert served == ["attention"] * 5


def test_attention_with_scores_that_the_exponential_does_not_hold(library):
    qkv = 30 * normal(2, 12, 3, 2, 16)
    truth = outputs_and_gradients(test_attention.equation, [qkv], lambda x: torch.float64)
    naive = outputs_and_gradients(test_attention.equation, [qkv])
    assert_twice_as_good(outputs_and_gradients(attend, [qkv]), naive, truth)


@pytest.mark.parametrize("lengths", [(5, 1, 64, 3), (2, 0, 29), (1,)])
def test_attention_within_spans(library, served, lengths):
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    qkv = normal(1, sum(lengths), 3, 2, 32)
    found = outputs_and_gradients(lambda x: attend(x, uk.Spans(offsets, max(lengths))), [qkv])

    def one_by_one(x):
        return torch.cat([test_attention.equation(part) for part in x.split(lengths, dim=1)], dim=1)

    for ours, theirs in zip(found, outputs_and_gradients(one_by_one, [qkv]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    assert served == ["attention"]


@pytest.mark.parametrize(
    ("offsets", "longest"), [([0, 5, 9], 4), ([0, 5, 11], 6), ([0, 6, 4, 10], 6), ([1, 5, 10], 6), ([0, 70, 10], 10)]
)
def test_spans_outside_of_the_tokens_are_refused(offsets, longest):
    spans = uk.Spans(torch.tensor(offsets, dtype=torch.int32), longest)
    with pytest.raises(ValueError, match="rise from 0 to 10, the tokens, with no sample longer than"):
        attend(normal(1, 10, 3, 1, 16), spans)
    with pytest.raises(ValueError, match="rise from 0 to 10"):
        uk.rms_norm_modulate(normal(1, 10, 8), None, None, normal(len(offsets) - 1, 8), spans=spans)


def test_attention_to_what_is_not_finite(library):
    qkv = normal(2, 12, 3, 2, 16)
    qkv[0, 3, 0, 1, 5], qkv[1, 2, 1, 0, 0], qkv[1, 7, 2, 1, 3] = math.nan, math.inf, math.nan
    assert torch.equal(attend(qkv).isfinite(), test_attention.equation(qkv).isfinite())


@pytest.mark.parametrize(
    "rows, depth, columns", [(1, 1, 1), (9, 256, 33), (70, 257, 64), (130, 700, 7), (3, 0, 4), (0, 3, 4)]
)
def test_products_of_matrices_in_any_order(library, rows, depth, columns):
    """All heights and widths of tiles, several depths, panels that are filled and that are not."""
    for a in (normal(rows, depth), normal(depth, rows).t(), normal(rows, 2 * depth)[:, ::2]):
        for b in (normal(depth, columns), normal(columns, depth).t()):
            assert_twice_as_good([cpu.matmul(a, b)], [a @ b], [a.double() @ b.double()])


def test_negative_views_are_left_to_pytorch(library):
    """Their memory has the other sign."""
    x, product = normal(1, 3, 8), torch.complex(normal(4, 5), normal(4, 5, seed=1))
    assert torch.equal(uk.swiglu(torch._neg_view(x.clone())), uk.swiglu(-x))
    assert cpu.serves(product.imag) and not cpu.serves(product.conj().imag)


def newton_schulz(g: torch.Tensor, steps: int) -> torch.Tensor:
    """The compiled one, on the Gram matrix where the operator takes that, whether it serves this CPU or not."""
    short, long = sorted(g.shape[1:])
    return cpu.newton_schulz(g, steps, 1e-7, 0.5, (optim.A, optim.B, optim.C), optim.in_gram(short, long, steps))


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("shape", [(3, 24, 40), (2, 40, 24), (2, 33, 33), (1, 1, 7), (2, 35, 300), (1, 301, 70)])
def test_newton_schulz_against_the_equation(library, shape, steps):
    """All heights and widths of tiles, sums of several depths, the last panel filled and not."""
    g = normal(*shape)

    def iterated(x):
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(steps):
            gram = x @ x.mT
            x = optim.A * x + (optim.B * gram + optim.C * gram @ gram) @ x
        return 0.5 * x

    with adaln.on_backend("torch"):
        naive = uk.newton_schulz(g, steps, scale=0.5)
    assert_twice_as_good([newton_schulz(g, steps)], [naive], [iterated(g.double())])


def test_newton_schulz_of_a_matrix_does_not_depend_on_the_others(library):
    for shape in ((5, 20, 33), (5, 70, 20)):
        g = normal(*shape)
        g[3, 1, 2] = math.nan
        together = newton_schulz(g, 5)
        assert together[3].isnan().all()
        for index in (0, 1, 2, 4):
            assert torch.equal(together[index], newton_schulz(g[index : index + 1], 5)[0])


def test_newton_schulz_is_pytorchs_without_wide_vectors(served, monkeypatch):
    wide = types.SimpleNamespace(unite_multiplies=lambda: 1, unite_newton_schulz=lambda arguments: None)
    for library, expected in ((wide, ["newton_schulz"]), (types.SimpleNamespace(unite_multiplies=lambda: 0), [])):
        served.clear()
        monkeypatch.setattr(cpu, "LIBRARY", library)
        uk.newton_schulz(normal(2, 3, 4))
        assert served == expected


@pytest.mark.parametrize("shape", swiglu.SHAPES)
def test_swiglu_against_the_equation(library, served, shape):
    x = normal(*shape) * 3
    truth = outputs_and_gradients(swiglu.equation, [x], lambda x: torch.float64)
    naive = outputs_and_gradients(swiglu.equation, [x])
    assert_twice_as_good(swiglu.run("auto", x), naive, truth)
    assert served == ["swiglu"]


def test_the_exponential_over_all_its_range(library):
    """silu(g) · 1 within 4 units in the last place of its size, from underflow to overflow."""
    gate = torch.linspace(-110, 110, 400_001)
    found = uk.swiglu(torch.stack([gate, torch.ones_like(gate)], dim=-1).contiguous())[:, 0]
    exact = gate.double() * torch.sigmoid(gate.double())
    assert ((found - exact).abs() <= 4 * 2**-23 * exact.abs() + 1e-35).all()


def test_what_is_not_finite_comes_out_as_in_pytorch(library):
    gate = [math.nan, math.inf, -math.inf, 100.0, -100.0, 0.0, -0.0, 1e38]
    x = torch.tensor(gate + [2.0] * len(gate))[None]
    torch.testing.assert_close(swiglu.run("auto", x)[0], swiglu.run("torch", x)[0], equal_nan=True)
    for form in ("rms", "gated rms", "boundary"):
        function, names = adaln.FORMS[form]
        for bad in (math.nan, math.inf, -math.inf):
            inputs = adaln.inputs_of(names, (2, 3, 20), torch.float32)
            inputs[0][1, 1, 7] = bad
            found, plain = (adaln.run(backend, function, inputs) for backend in ("auto", "torch"))
            assert all((a.isfinite() == b.isfinite()).all() for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("form", ["gated rms", "boundary"])
def test_gradient_of_one_output_alone(library, form, used):
    function, names = adaln.FORMS[form]
    inputs = adaln.inputs_of(names, (2, 3, 20), torch.float32)
    found = []
    for backend in ("auto", "torch"):
        with adaln.on_backend(backend):
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = function(*leaves)[used]
            found.append(torch.autograd.grad(out, leaves, normal(*out.shape), allow_unused=True))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (0, 0, 8)])
def test_empty(library, shape):
    for form in ("rms", "boundary"):
        function, names = adaln.FORMS[form]
        inputs = adaln.inputs_of(names, shape, torch.float32)
        for ours, theirs in zip(*(adaln.run(backend, function, inputs) for backend in ("auto", "torch")), strict=True):
            assert torch.equal(ours, theirs)
    assert uk.swiglu(torch.empty(*shape)).shape == (*shape[:2], 4)
    heads = torch.empty(*shape[:2], 3, 2, 8, requires_grad=True)
    uk.qk_norm_rope(heads, torch.ones(8), torch.ones(8), *rope.tables(5, 8), 0).sum().backward()
    assert heads.grad.shape == heads.shape


def test_results_do_not_depend_on_the_threads():
    function, names = adaln.FORMS["boundary"]
    inputs = adaln.inputs_of(names, (7, 40, 384), torch.float32)
    heads = rope.inputs_of((7, 40, 6, 64), torch.float32)
    rotary = (*rope.tables(40, 64), 0)
    x = normal(300, 700)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(
                [*adaln.run("auto", function, inputs), *rope.run("auto", heads, *rotary), *swiglu.run("auto", x),
                 *outputs_and_gradients(attend, heads[:1]), newton_schulz(normal(5, 24, 70), 5),
                 cpu.matmul(x.t(), x[:, :40])]
            )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[0], found[2]))


def test_other_tensors_are_left_to_pytorch(served):
    x = normal(2, 3, 8)
    uk.swiglu(x.bfloat16())
    with adaln.on_backend("torch"):
        uk.swiglu(x)
    with FakeTensorMode() as mode:
        uk.swiglu(mode.from_tensor(x))
    torch.compile(uk.swiglu, backend="aot_eager", fullgraph=True)(x)
    uk.layer_norm_modulate(x, None, None, None, normal(2, 8))
    attend(normal(1, 65, 3, 1, 16))
    attend(normal(1, 5, 3, 1, 8))
    attend(normal(1, 5, 3, 1, 272))
    uk.newton_schulz(x.bfloat16())
    with adaln.on_backend("torch"):
        uk.newton_schulz(x)
    assert served == []


def installed(folder: Path, monkeypatch) -> tuple[Path, list[Path]]:
    """A copy of what is installed, from which `cpu.load` loads: (library, sources)."""
    folder.mkdir()
    for file in [Path(cpu.STATE), *cpu.SOURCES]:
        shutil.copy(file, folder)
    sources = [folder / source.name for source in cpu.SOURCES]
    monkeypatch.setattr(cpu, "HERE", folder)
    monkeypatch.setattr(cpu, "SOURCES", sources)
    return folder / Path(cpu.STATE).name, sources


def test_a_tracer_sees_all_that_is_computed(served):
    x = normal(2, 8)
    traced = make_fx(lambda x: uk.swiglu(x))(x)
    torch.testing.assert_close(traced(2 * x), uk.swiglu(2 * x))
    with FlopCounterMode(display=False):
        uk.swiglu(x)
    assert served == ["swiglu"]


def test_a_library_of_other_sources_is_not_used(monkeypatch, tmp_path):
    _, sources = installed(tmp_path / "copy", monkeypatch)
    assert cpu.load()[0] is not None
    assert cpu.fingerprint(sources) == zlib.crc32(b"".join(source.read_bytes() for source in sources))
    sources[1].write_text(sources[1].read_text() + "\n")
    found, state = cpu.load()
    assert found is None and "other sources" in state
    for source in sources:
        source.unlink()
    assert cpu.load()[0] is not None  # as in a wheel, which has none


def test_a_broken_or_missing_library_is_said_to_be_so(monkeypatch, tmp_path):
    made, _ = installed(tmp_path / "copy", monkeypatch)
    made.unlink()
    found, state = cpu.load()
    assert found is None and "not compiled" in state
    made.write_bytes(b"no library")
    found, state = cpu.load()
    assert found is None and "cannot be loaded" in state


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere cpu.c has no threads")
def test_a_thread_of_python_takes_as_many_threads_as_pytorch():
    program = (
        "import ctypes, threading, torch, unite_kernels as uk\n"
        "torch.set_num_threads(1)\n"
        "x = torch.ones(64, 1024, 8, requires_grad=True)\n"
        "def both(run): run(); print(ctypes.CDLL(None).omp_get_max_threads())\n"
        "def start(run): thread = threading.Thread(target=both, args=(run,)); thread.start(); thread.join()\n"
        "start(lambda: None)\n"
        "start(lambda: uk.swiglu(x))\n"
        "out = uk.swiglu(x); grad = torch.ones_like(out)\n"
        "start(lambda: out.backward(grad))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "4"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "1", "1"]


def test_without_it_the_package_works():
    program = (
        "import importlib.machinery; importlib.machinery.EXTENSION_SUFFIXES.clear()\n"
        "import torch, unite_kernels as uk; from unite_kernels import cpu\n"
        "assert cpu.LIBRARY is None\n"
        "print(uk.swiglu(torch.ones(2, 4)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "[2, 2]" in done.stdout, done.stderr

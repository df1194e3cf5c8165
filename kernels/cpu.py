"""The operators of cpu.c for float32 tensors on a CPU, with their backward passes.

setup.py compiles cpu.c where there is a C compiler; elsewhere, for other dtypes, under torch.compile, in torch.func
and where a dispatch mode looks on (make_fx, FlopCounterMode) the references in plain PyTorch serve. Shapes as in
adaln.py, qk_rope.py, swiglu.py and optim.py. `matmul` and `newton_schulz` have no backward pass.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import itertools
import zlib
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, c_float, c_int64, c_uint32, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from .dispatch import first_derivatives, get_backend, transformed

HERE = Path(__file__).parent
SOURCES = (HERE / "cpu.c", HERE / "cpu_rows.h", HERE / "cpu_products.h")
MAX_TOKENS, MAX_HEAD, WIDEST = 64, 256, 16  # of attention, as in cpu.c


def load() -> tuple[ctypes.CDLL | None, str]:
    """(the compiled library, where it is), or (None, what is wrong with it)."""
    names = [f"_cpu{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((HERE / name for name in names if (HERE / name).is_file()), None)
    if path is None:
        return None, "cpu.c was not compiled when unite_kernels was installed"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:  # for another machine, or without an OpenMP in this process
        return None, f"{path.name} cannot be loaded: {error}"
    library.unite_sources.restype = c_uint32
    if all(source.is_file() for source in SOURCES) and library.unite_sources() != fingerprint(SOURCES):
        return None, f"{path.name} was compiled from other sources than those beside it"
    declare(library)
    return library, str(path)


def fingerprint(sources: Sequence[Path]) -> int:
    """CRC-32 of the files, one behind the other."""
    return zlib.crc32(b"".join(source.read_bytes() for source in sources))


def serves(*tensors: Tensor | None) -> bool:
    """Whether cpu.c computes with these tensors: its library is there and they are plain, in float32 and on a CPU."""
    if LIBRARY is None or not sees_plainly(*tensors):
        return False
    share_threads()
    return True


def sees_plainly(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors in float32 on a CPU, nothing traces, counts or transforms, and no backend
    forbids operators of our own."""
    if get_backend() == "torch" or torch.compiler.is_compiling() or transformed():
        return False
    if torch._C._len_torch_dispatch_stack():  # a mode that traces or counts would see memory that nobody writes
        return False
    # The memory of a negative view, as the imaginary part of a conjugate is one, has the other sign.
    return all(
        x is None
        or (
            x.dtype == torch.float32
            and x.device.type == "cpu"
            and type(x) in (Tensor, torch.nn.Parameter)
            and not x.is_neg()
        )
        for x in tensors
    )


def cpuinfo(field: str) -> str | None:
    """What Linux says of the first core; None elsewhere."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith(field):
                return line.partition(":")[2].strip()
    return None


def share_threads() -> None:
    """Give the calling thread PyTorch's number of threads, which OpenMP keeps for each thread.

    In one that Python started PyTorch sets it when it first asks for it, and cpu.c would take all cores until then.
    """
    torch.get_num_threads()


def serves_attention(qkv: Tensor) -> bool:
    """Whether `attention` computes with qkv [.., d], up to MAX_TOKENS tokens: whole vectors, at most MAX_HEAD."""
    return qkv.shape[-1] % WIDEST == 0 and qkv.shape[-1] <= MAX_HEAD and serves(qkv)


class _Adaln(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "branch", "gate", "closing", "weight", "shift", "scale")),
        *((name, c_void_p) for name in ("residual", "normed", "offsets")),
        *((name, c_int64) for name in ("samples", "tokens", "width", "gate_stride", "shift_stride", "scale_stride")),
        ("eps", c_float),
    ]


class _AdalnBackward(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("grad_residual", "grad_normed", "x", "branch", "gate", "closing", "weight")),
        *((name, c_void_p) for name in ("scale", "grad_x", "grad_branch", "along", "grad_shift", "grad_gate")),
        *((name, c_void_p) for name in ("grad_closing", "offsets")),
        *((name, c_int64) for name in ("samples", "tokens", "width", "gate_stride", "scale_stride")),
        ("eps", c_float),
    ]


class _Rope(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("qkv", "q_weight", "k_weight", "cosine", "sine", "out")),
        *((name, c_int64) for name in ("samples", "tokens", "heads", "width", "unrotated")),
        ("eps", c_float),
    ]


class _RopeBackward(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("grad", "qkv", "q_weight", "k_weight", "cosine", "sine")),
        *((name, c_void_p) for name in ("grad_qkv", "grad_weights")),
        ("strides", c_int64 * 4),
        *((name, c_int64) for name in ("samples", "tokens", "heads", "width", "unrotated")),
        ("eps", c_float),
    ]


class _Attention(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("qkv", "grad", "out", "grad_qkv", "weights", "offsets")),
        ("strides", c_int64 * 4),
        *((name, c_int64) for name in ("samples", "tokens", "heads", "width")),
    ]


class _NewtonSchulz(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("g", "out", "work")),
        *((name, c_int64) for name in ("matrices", "rows", "columns", "steps", "in_gram", "workers", "size")),
        *((name, c_float) for name in ("eps", "scale", "linear", "cubic", "quintic")),
    ]


class _Matmul(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("a", "b", "out")),
        *((name, c_int64) for name in ("a_down", "a_across", "b_down", "b_across")),
        *((name, c_int64) for name in ("rows", "depth", "columns", "threads")),
    ]


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the functions of a compiled library take."""
    library.unite_swiglu.argtypes = [c_void_p, c_void_p, c_int64, c_int64]
    library.unite_swiglu_backward.argtypes = [c_void_p, c_void_p, c_void_p, c_int64, c_int64]
    library.unite_adaln.argtypes = [POINTER(_Adaln)]
    library.unite_adaln_backward.argtypes = [POINTER(_AdalnBackward)]
    library.unite_rope.argtypes = [POINTER(_Rope)]
    library.unite_rope_backward.argtypes = [POINTER(_RopeBackward)]
    library.unite_attention.argtypes = [POINTER(_Attention)]
    library.unite_attention_backward.argtypes = [POINTER(_Attention)]
    library.unite_offsets.argtypes = [c_void_p, c_int64, c_int64, c_int64]
    library.unite_newton_schulz.argtypes, library.unite_newton_schulz.restype = [POINTER(_NewtonSchulz)], None
    library.unite_matmul.argtypes, library.unite_matmul.restype = [POINTER(_Matmul)], None
    for name in ("swiglu", "adaln", "rope", "attention"):
        getattr(library, f"unite_{name}").restype = None
        getattr(library, f"unite_{name}_backward").restype = None


LIBRARY, STATE = load()


def check_offsets(operator: str, offsets: Tensor, tokens: int, longest: int) -> None:
    """Refuse samples that lie outside of the tokens, or outside of what the longest one is given: offsets on a CPU,
    since reading others would wait for their device."""
    if offsets.device.type != "cpu" or type(offsets) is not Tensor or torch.compiler.is_compiling() or transformed():
        return
    if LIBRARY is None:
        numbers = offsets.tolist()
        good = numbers[0] == 0 and numbers[-1] == tokens
        good = good and all(0 <= last - first <= longest for first, last in itertools.pairwise(numbers))
    else:
        good = LIBRARY.unite_offsets(offsets.data_ptr(), len(offsets) - 1, tokens, longest)
    if not good:
        raise ValueError(
            f"{operator}: the offsets of the spans must rise from 0 to {tokens}, the tokens, with no sample longer "
            f"than {longest}"
        )


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _backward_pass(operator: str) -> Callable[[Callable], Callable]:
    """`first_derivatives` of a pass that reads its gradients at their addresses, where vmap and forward-mode
    differentiation have nothing: the one would break off without a reason, the other make zeros."""

    def decorate(backward: Callable) -> Callable:
        @first_derivatives(operator)
        def seen(ctx, saved, *grads):
            if transformed() or not all(grad is None or torch._C._has_storage(grad) for grad in grads):
                raise RuntimeError(
                    f"{operator}: its backward pass has no part in vmap and forward-mode differentiation; "
                    "set_backend('torch') before the forward pass"
                )
            share_threads()
            return backward(ctx, saved, *grads)

        return seen

    return decorate


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        width = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], width)
        if out.numel():
            LIBRARY.unite_swiglu(x.data_ptr(), out.data_ptr(), out.numel() // width, width)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @_backward_pass("swiglu")
    def backward(ctx, saved, grad):
        (x,) = saved
        grad, grad_x, width = grad.contiguous(), torch.empty_like(x), x.shape[-1] // 2
        if grad.numel():
            LIBRARY.unite_swiglu_backward(
                grad.data_ptr(), x.data_ptr(), grad_x.data_ptr(), grad.numel() // width, width
            )
        return grad_x


class _AdaptiveNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, gate, closing, weight, shift, scale, offsets, eps):
        normed = torch.empty_like(x)
        residual = None if branch is None else torch.empty_like(x)
        LIBRARY.unite_adaln(
            _Adaln(
                *map(_at, (x, branch, gate, closing, weight, shift, scale, residual, normed, offsets)),
                scale.shape[0], x.shape[1], x.shape[2],
                0 if gate is None else gate.stride(0), 0 if shift is None else shift.stride(0), scale.stride(0), eps,
            )
        )  # fmt: skip
        stream = residual if branch is not None and closing is None else x
        ctx.save_for_backward(stream, branch, gate, closing, weight, scale, offsets)
        ctx.eps, ctx.shifts = eps, shift is not None
        ctx.set_materialize_grads(False)
        return residual, normed

    @staticmethod
    @_backward_pass("adaln")
    def backward(ctx, saved, grad_residual, grad_normed):
        x, branch, gate, closing, weight, scale, offsets = saved
        if grad_normed is None:
            if grad_residual is None:
                return (None,) * 9
            grad_normed = torch.zeros_like(x)
        grad_normed = grad_normed.contiguous()
        grad_residual = None if grad_residual is None else grad_residual.contiguous()
        grad_x, grad_branch = torch.empty_like(x), None if branch is None else torch.empty_like(branch)

        def sums(wanted: bool) -> Tensor | None:
            return x.new_zeros(scale.shape) if wanted else None

        along, grad_shift = sums(True), sums(ctx.shifts)
        grad_gate, grad_closing = sums(gate is not None), sums(closing is not None)
        pointers = (
            grad_residual, grad_normed, x, branch, gate, closing, weight, scale, grad_x, grad_branch, along, grad_shift,
            grad_gate, grad_closing, offsets,
        )  # fmt: skip
        LIBRARY.unite_adaln_backward(
            _AdalnBackward(
                *map(_at, pointers), scale.shape[0], x.shape[1], x.shape[2],
                0 if gate is None else gate.stride(0), scale.stride(0), ctx.eps,
            )
        )  # fmt: skip
        grad_weight = None if weight is None else torch.addcmul(along, along, scale).sum(0)
        grad_scale = along if weight is None else along * weight
        grad_closing = None if closing is None else grad_closing.sum(0)
        return grad_x, grad_branch, grad_gate, grad_closing, grad_weight, grad_shift, grad_scale, None, None


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, cos, sin, unrotated, eps):
        batch, tokens, _, heads, width = qkv.shape
        out = torch.empty_like(qkv)
        pointers = (qkv, q_weight, k_weight, cos, sin, out)
        LIBRARY.unite_rope(_Rope(*map(_at, pointers), batch, tokens, heads, width, unrotated, eps))
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
        ctx.unrotated, ctx.eps = unrotated, eps
        return out

    @staticmethod
    @_backward_pass("qk_norm_rope")
    def backward(ctx, saved, grad):
        qkv, q_weight, k_weight, cos, sin = saved
        batch, tokens, _, heads, width = qkv.shape
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        grad_qkv, sums = torch.empty_like(qkv), qkv.new_zeros(batch, 2, width)
        pointers = (grad, qkv, q_weight, k_weight, cos, sin, grad_qkv, sums)
        LIBRARY.unite_rope_backward(
            _RopeBackward(
                *map(_at, pointers), (c_int64 * 4)(*grad.stride()[:4]),
                batch, tokens, heads, width, ctx.unrotated, ctx.eps,
            )
        )  # fmt: skip
        return grad_qkv, *sums.sum(0).unbind(), None, None, None, None


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, offsets, longest):
        batch, tokens, _, heads, width = qkv.shape
        ctx.sizes = (batch, tokens) if offsets is None else (len(offsets) - 1, longest)
        out = qkv.new_empty(batch, tokens, heads * width)
        samples, longest = ctx.sizes
        weights = qkv.new_empty(samples, heads, longest, -(-longest // WIDEST) * WIDEST)
        pointers = map(_at, (qkv, None, out, None, weights, offsets))
        LIBRARY.unite_attention(_Attention(*pointers, (c_int64 * 4)(*qkv.stride()[:4]), *ctx.sizes, heads, width))
        ctx.save_for_backward(qkv, weights, offsets)
        return out

    @staticmethod
    @_backward_pass("attention")
    def backward(ctx, saved, grad):
        qkv, weights, offsets = saved
        grad, grad_qkv = grad.contiguous(), torch.empty(qkv.shape)
        pointers = map(_at, (qkv, grad, None, grad_qkv, weights, offsets))
        strides, (*_, heads, width) = (c_int64 * 4)(*qkv.stride()[:4]), qkv.shape
        LIBRARY.unite_attention_backward(_Attention(*pointers, strides, *ctx.sizes, heads, width))
        return grad_qkv, None, None


def swiglu(x: Tensor) -> Tensor:
    """`swiglu` of checked arguments that `serves` accepts."""
    return _SwiGlu.apply(x)


def adaln(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    closing: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    offsets: Tensor | None,
    eps: float,
) -> tuple[Tensor | None, Tensor]:
    """The RMSNorms of adaln.py, (residual or None, normed), of checked arguments that `serves` accepts."""
    return _AdaptiveNorm.apply(x, branch, gate, closing, weight, shift, scale, offsets, eps)


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, unrotated: int, eps: float
) -> Tensor:
    """`qk_norm_rope` of checked arguments that `serves` accepts."""
    return _QkNormRope.apply(qkv, q_weight, k_weight, cos, sin, unrotated, eps)


def attention(qkv: Tensor, offsets: Tensor | None = None, longest: int = 0) -> Tensor:
    """softmax(q kᵀ / √d) v within samples of at most MAX_TOKENS tokens, where PyTorch's pays for many small blocks.

    Args:
        qkv: [B, N, 3, H, d] that `serves_attention` accepts.
        offsets, longest: qkv is [1, T, 3, H, d], samples behind one another, as in `Spans`.

    Returns:
        [B, N, H·d].
    """
    if offsets is not None:
        check_offsets("attention", offsets, qkv.shape[1], longest)
    return _ShortAttention.apply(qkv if qkv.stride(-1) == 1 else qkv.contiguous(), offsets, longest)


def multiplies(*tensors: Tensor) -> bool:
    """Whether `matmul` and `newton_schulz` compute with these: on a CPU with wide vectors, without which PyTorch's
    libraries are faster."""
    return serves(*tensors) and bool(LIBRARY.unite_multiplies())


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b of matrices that `multiplies` accepts, with any strides; what a number is does not depend on the threads.

    Args:
        a: [n, K]. b: [K, m].
    """
    out = a.new_empty(a.shape[0], b.shape[1])
    if not a.shape[1]:
        return out.zero_()
    if out.numel():
        shape = (*a.stride(), *b.stride(), *a.shape, b.shape[1], torch.get_num_threads())
        LIBRARY.unite_matmul(_Matmul(_at(a), _at(b), _at(out), *shape))
    return out


def newton_schulz(
    g: Tensor, steps: int, eps: float, scale: float, coefficients: tuple[float, float, float], in_gram: bool
) -> Tensor:
    """The iteration of optim.py for g [n, r, c] that `multiplies` accepts.

    Of symmetric products half is computed. A matrix's result depends neither on the others nor on the threads.

    Args:
        coefficients: of X, X Xᵀ X and (X Xᵀ)² X.
        in_gram: iterate on the Gram matrix alone; for steps from 1 on.
    """
    g = g.contiguous()
    out, (short, long) = torch.empty_like(g), sorted(g.shape[1:])
    workers, size = min(len(g), torch.get_num_threads()), short * (4 * short if in_gram else 2 * short + long)
    work = g.new_empty(workers, size)
    if out.numel():
        shape = (*g.shape, steps, in_gram, workers, size)
        LIBRARY.unite_newton_schulz(_NewtonSchulz(*map(_at, (g, out, work)), *shape, eps, scale, *coefficients))
    return out

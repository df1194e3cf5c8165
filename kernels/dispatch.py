"""Which implementation serves a call, and the checks of arguments that all operators share."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .toolchain import AVAILABLE

# Prefix of the operators' names in torch.ops: what this package was imported as. A loader that gives each copy a name
# of its own, as Hugging Face's kernels does, so gets operators of its own, and two versions live in one process.
NAMESPACE = __package__.replace(".", "_")
BACKENDS = ("auto", "triton", "torch")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NUMBERS = frozenset((int, float, bool, type(None)))  # what Triton's launcher takes beside tensors
PLAIN = NUMBERS | {Tensor, Parameter}
# Read once: Triton itself reads the variable when a kernel is decorated, so a later change has no effect there either.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# CUDA C++ programming guide, technical specifications by compute capability; along x it is 2**31 - 1.
MAX_PROGRAMS_Y = 65535
PROGRAMS = 1024  # about two waves of an H100: 132 multiprocessors with 4 programs each

_backend = "auto"


def set_backend(name: str) -> None:
    """Choose who computes, for the whole process.

    Args:
        name: "auto" takes the Triton kernels for CUDA tensors, cpu.c for what it serves, and plain PyTorch elsewhere;
            "torch" takes plain PyTorch everywhere; "triton" takes the kernels everywhere, and on a CPU that needs
            Triton's interpreter (TRITON_INTERPRET=1 before the first import of triton).

    Raises:
        ValueError: any other name.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"set_backend: {name!r} is no backend; choose one of {', '.join(BACKENDS)}")
    _backend = name


def get_backend() -> str:
    """The name last given to `set_backend`, "auto" at first."""
    return _backend


def transformed() -> bool:
    """Inside a transform of torch.func or forward-mode differentiation, which see into plain PyTorch alone: of a Triton
    operator's tangents they would silently make zeros."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def use_triton(x: Tensor) -> bool:
    """Whether the Triton kernels serve this tensor.

    Raises:
        RuntimeError: backend "triton" without Triton, with a tensor that is not on CUDA and no interpreter, or inside a
            transform of torch.func or forward-mode differentiation.
    """
    if _backend == "torch" or (_backend == "auto" and not AVAILABLE):
        return False
    if not AVAILABLE:
        raise RuntimeError("unite_kernels: backend 'triton' needs Triton: pip install triton, or set_backend('auto')")
    if not torch.compiler.is_compiling() and transformed():
        if _backend == "auto":
            return False
        raise RuntimeError(
            "unite_kernels: backend 'triton' has no part in torch.func and forward-mode differentiation; choose "
            "set_backend('auto'), which leaves these to plain PyTorch"
        )
    if x.is_cuda:
        return True
    if _backend == "triton":
        if not INTERPRETED:
            raise RuntimeError(
                f"unite_kernels: backend 'triton' cannot serve a tensor on {x.device}; move it to CUDA, choose "
                "set_backend('auto'), or set TRITON_INTERPRET=1 before importing triton"
            )
        return True
    return False


class Operator:
    """An operator registered with PyTorch, and called past its dispatcher where nobody looks on.

    torch.compile, export, tracing, modes such as fake tensors, transforms and tensor subclasses need what is
    registered, and so do NumPy's numbers, which Triton's launcher refuses: the dispatcher makes them Python's. Through
    the dispatcher an eager call costs the host, without the launch itself, 20 µs where no gradient is taken and 47
    where one is; past it, nothing and 10; and 39 µs less backward. (SwiGLU on one core of a busy Xeon, PyTorch 2.11, a
    driver that launches nothing.)

    Attributes:
        name: without the package's.
        registered: what torch.library knows.
        compute: what launches the kernels.
    """

    def __init__(self, name: str, compute: Callable):
        self.name = name
        self.registered = torch.library.custom_op(f"{NAMESPACE}::{name}", compute, mutates_args=())
        self.register_fake = self.registered.register_fake
        self.compute = compute
        self._apply: Callable | None = None

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """As of `torch.library.CustomOpDef`."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        compute = self.compute

        def forward(ctx, *args):
            output = compute(*args)
            setup_context(ctx, args, output)
            return output

        functions = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function = type(compute.__name__.strip("_"), (torch.autograd.Function,), functions)
        # Past the frame that looks for functorch's transforms, in which the dispatcher serves.
        self._apply = super(torch.autograd.Function, function).apply

    def __call__(self, *args):
        if torch.compiler.is_compiling():
            return self.registered(*args)
        if _looked_on():
            self._refuse_tangents(args)
            return self.registered(*args)
        kinds = set(map(type, args))
        flat = args
        if list in kinds:
            flat = [x for argument in args for x in (argument if type(argument) is list else (argument,))]
            kinds = set(map(type, flat))
        if not kinds <= PLAIN:
            return self.registered(*args)
        if not (torch.is_grad_enabled() and any(type(x) not in NUMBERS and x.requires_grad for x in flat)):
            return self.compute(*args)
        # Without a derivative, as backward passes are, PyTorch says so when it is asked for one.
        return (self.registered if self._apply is None else self._apply)(*args)

    def _refuse_tangents(self, args: tuple) -> None:
        """What is registered would drop them without a word: a gradient's, behind a forward pass that saw none."""
        leaves = torch.utils._pytree.tree_leaves(args) if forward_ad._current_level >= 0 else ()
        for x in leaves:
            if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                raise RuntimeError(
                    f"{self.name}: has no part in forward-mode differentiation; set_backend('torch') before the "
                    "forward pass"
                )


def operator(name: str) -> Callable[[Callable], Operator]:
    """Decorates the launch of a kernel on tensors that it does not change: see `Operator`."""
    return functools.partial(Operator, name)


def _looked_on() -> bool:
    """Whether a mode or a transform of PyTorch's, or torch.jit.trace, wants to see each operator."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_tracing()
        or transformed()
    )


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. Triton's own, made for kernels too, takes the host 3 µs."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 from n on, for n ≥ 1; for speed as `cdiv`."""
    return 1 << (n - 1).bit_length()


def program_share(units: int, most: int, least: int) -> int:
    """Units of work that a program adds up before it writes their sums: `most`, halved while under 1024 programs are
    left, down to `least`.

    The choice depends on the shape alone, so that every device adds in the same order.
    """
    while most > least and units < PROGRAMS * most:
        most //= 2
    return most


def aligned(width: int) -> int:
    """The least multiple of 16 from a width on: rows of it can be loaded into tensor cores.

    In a 2-byte dtype that is whole 32-byte sectors of memory, and twice what TMA asks for (CUDA driver API,
    cuTensorMapEncodeTiled: strides are multiples of 16 bytes).
    """
    return cdiv(width, 16) * 16


class _Refused(torch.autograd.Function):
    """A gradient as it is, which hangs on `links` and whose own backward pass raises."""

    @staticmethod
    def forward(ctx, grad, sentence, *links):
        ctx.sentence = sentence
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(ctx.sentence)


def first_derivatives(
    operator: str, instead: str = "set_backend('torch') before the forward pass"
) -> Callable[[Callable], Callable]:
    """Decorates the backward pass of an operator whose gradients autograd cannot see into; `instead` is what has second
    derivatives.

    The pass is called with what was saved for it before the incoming gradients, and should have saved a tensor through
    which autograd finds the operator's inputs: one of them, or an output. Without one, as in `fp8_linear`, a second
    derivative is refused only where the incoming gradient has one itself.

    PyTorch's once_differentiable leaves such gradients out of a second backward pass without a word where the incoming
    one is constant, as it is behind a sum, and where that pass is asked for the gradients of chosen tensors alone.
    """

    sentence = f"{operator}: its backward pass has no derivative; {instead} for second derivatives"

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def once(ctx, *grads):
            saved = ctx.saved_tensors  # unpacked once, as a checkpoint's tensors must be
            with torch.no_grad():
                found = backward(ctx, saved, *grads)
            if not torch.is_grad_enabled():
                return found
            links = [x for x in (*saved, *grads) if x is not None and x.requires_grad]
            found = (found,) if isinstance(found, Tensor) else found
            return tuple(None if grad is None else _Refused.apply(grad, sentence, *links) for grad in found)

        return once

    return decorate


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes x's device current for a launch: Triton launches on the current device, whatever its pointers say."""
    # By its number, which costs the host 1.3 µs; by the device itself it is 2.5.
    return torch.cuda.device(x.get_device()) if x.is_cuda else contextlib.nullcontext()


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def check_programs(operator: str, name: str, count: int) -> None:
    """Refuse more programs than a launch takes along its second axis, with the size that asks for them."""
    if count > MAX_PROGRAMS_Y:
        raise ValueError(f"{operator}: {name} is {count}; the kernel takes at most {MAX_PROGRAMS_Y}, split the call")


def check_tensors(operator: str, **tensors: object) -> None:
    """Refuse what is no tensor, None included, by its argument's name."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            found = "None" if x is None else f"a {type(x).__module__}.{type(x).__name__}".replace("builtins.", "")
            raise TypeError(f"{operator}: {name} is {found}; it must be a tensor")


def check_floats(operator: str, name: str, x: Tensor) -> None:
    """Refuse a dtype the operators do not compute in."""
    if not isinstance(x, Tensor):
        check_tensors(operator, **{name: x})
    if x.dtype not in FLOATS:
        raise TypeError(f"{operator}: {name} is {x.dtype}; it must be float32, float16 or bfloat16")


def check_eps(operator: str, eps: float) -> None:
    """Refuse a negative eps, NaN included: under the root it gives NaN for small inputs alone. And None, which
    PyTorch's RMSNorm takes, and text, which YAML makes of 1e-6."""
    if eps is None or isinstance(eps, str):
        raise TypeError(f"{operator}: eps is {eps!r}; it must be a number")
    if not eps >= 0:
        raise ValueError(f"{operator}: eps is {eps}; it must not be negative")


def check_integer(operator: str, name: str, value: object) -> None:
    """Refuse a fractional number, also one that is whole, as kernels are compiled for integers; and what is none."""
    if value is None or isinstance(value, (float, str)):
        raise TypeError(f"{operator}: {name} is {value!r}; it must be an integer")


def check_contiguous(operator: str, name: str, x: Tensor) -> None:
    """Refuse strides that a kernel's 16-byte accesses cannot follow."""
    if not x.is_contiguous():
        raise ValueError(
            f"{operator}: {name} has strides {tuple(x.stride())}; it must be contiguous, call .contiguous()"
        )


def check_like(operator: str, name: str, x: Tensor, first_name: str, first: Tensor) -> None:
    """x must agree with the operator's first tensor in shape, dtype and device, and be contiguous."""
    if x.shape != first.shape:
        raise ValueError(
            f"{operator}: {name} has shape {tuple(x.shape)}; {first_name} has {tuple(first.shape)}, they must agree"
        )
    if x.dtype != first.dtype:
        raise TypeError(f"{operator}: {name} is {x.dtype} and {first_name} {first.dtype}; cast one of them")
    check_device(operator, name, x, first_name, first)
    check_contiguous(operator, name, x)


def check_parameter(
    operator: str, name: str, x: Tensor | None, shape: tuple[int, ...], first_name: str, first: Tensor
) -> None:
    """A weight, table or modulation (None passes): its shape, float32 or the first tensor's dtype, its device, and
    neighbours in memory along the last dimension."""
    if x is None:
        return
    if not isinstance(x, Tensor):
        check_tensors(operator, **{name: x})
    if x.shape != shape:
        raise ValueError(
            f"{operator}: {name} has shape {tuple(x.shape)}; it must be {tuple(shape)} for this {first_name}"
        )
    if x.dtype != torch.float32 and x.dtype != first.dtype:
        raise TypeError(
            f"{operator}: {name} is {x.dtype}; it must be float32 or {first_name}'s dtype, here {first.dtype}"
        )
    check_device(operator, name, x, first_name, first)
    if x.stride(-1) != 1 and shape[-1] > 1:
        raise ValueError(
            f"{operator}: {name} has strides {tuple(x.stride())}; its last dimension must be dense, call .contiguous()"
        )


def check_device(operator: str, name: str, x: Tensor, first_name: str, first: Tensor) -> None:
    """Refuse tensors on different devices."""
    if x.device != first.device:
        raise ValueError(f"{operator}: {name} is on {x.device} and {first_name} on {first.device}; move one of them")

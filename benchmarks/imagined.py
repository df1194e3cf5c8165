"""A step on a GPU that is not there: PyTorch's fake tensors on a made-up device, with the waits of the host and the
launches counted.

Fake tensors have shapes, dtypes and a device but no numbers, so a step of preset L takes seconds and no memory. They
go where CUDA tensors go: the operators' own launchers run (their Triton kernels do not), autocast casts as on CUDA,
attention is PyTorch's FlashAttention operator, and autograd runs the backward passes. What needs a number on the host
raises, as does an operator that mixes devices; a `Watch` counts the rest.

Not followed: Apex and the flash-attn packages, `torch.compile`, and whatever asks for `torch.cuda` itself (streams,
events, sizes of memory) but for the compute capability, which is Hopper's. That a host copy is pinned cannot be seen
either: each counts as a wait.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.library import Library, fallthrough_kernel
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import unite_kernels as uk
from unite_fast.analysis.launches import list_launches
from unite_kernels.specialisation import FAMILIES
from unite_kernels.toolchain import AVAILABLE

NAME = "gpu"
AUTOCAST = "AutocastPrivateUse1"
GRID = (2**31 - 1, 65535, 65535)  # most programs along x, y and z (CUDA C++ programming guide, compute capabilities)
# Autocast's rules on CUDA (PyTorch, "Automatic Mixed Precision", op reference), those operators that a model here may
# call. The made-up device has none of its own.
LOWER = (
    "_convolution", "addmm", "addmv", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "linear", "matmul", "mm", "mv",
    "scaled_dot_product_attention",
)  # fmt: skip
FLOAT32 = (
    "binary_cross_entropy_with_logits", "cosine_similarity", "exp", "expm1", "group_norm", "layer_norm", "log", "log1p",
    "mse_loss", "nll_loss", "norm", "pow", "reciprocal", "rsqrt", "smooth_l1_loss", "softplus",
)  # fmt: skip
FLOAT32_RESULT = ("cumprod", "cumsum", "linalg_vector_norm", "log_softmax", "prod", "softmax", "sum")
WIDEST = ("addcdiv", "addcmul", "cat", "stack")
WRITE_ONLY = ("means",)  # arguments of our operators that are written without being read
COPIES_INTO = ("aten::copy_", "aten::_foreach_copy_")  # PyTorch's, which write their first so
# Operators that launch nothing: they return their input, or memory that nobody has written.
SILENT = ("alias", "detach", "empty", "lift_fresh", "new_empty", "prim::", "resize", "set_", "_unsafe_view")


def missing() -> str | None:
    """Why this PyTorch cannot imagine a device, or None where it can."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        return f"torch {torch.__version__} has no device backend in Python"
    if not (AVAILABLE and uk.dispatch.INTERPRETED):
        return "needs Triton with TRITON_INTERPRET=1, which replaces its launcher"
    return None


@contextlib.contextmanager
def imagined() -> Iterator[torch.device]:
    """Inside it tensors are fake; the device is there for them. The operators take their Triton form.

    Raises:
        RuntimeError: see `missing`.
    """
    if (reason := missing()) is not None:
        raise RuntimeError(reason)
    device, backend = _device(), uk.get_backend()
    attend = F.scaled_dot_product_attention
    with (
        mock.patch.object(FakeTensor, "is_cuda", property(lambda tensor: tensor.device.type == NAME)),
        mock.patch.object(FakeTensor, "data_ptr", lambda tensor: 16, create=True),
        mock.patch.object(torch.cuda, "device", lambda _: contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "get_device_capability", lambda _: (9, 0)),
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch.object(torch, "clear_autocast_cache", _CASTS.clear),
        mock.patch.object(F, "scaled_dot_product_attention", functools.partial(_attention, attend)),
        mock.patch.object(torch._C, "_conv_determine_backend_memory_format", _convolution_format),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        uk.set_backend("triton")
        try:
            yield device
        finally:
            uk.set_backend(backend)


class Launch(NamedTuple):
    """What a launcher gives to Triton.

    Attributes:
        module, function: of the kernel.
        arguments: numbers and None as they are, of a tensor its dtype's name.
        constants: by name, launch options among them.
    """

    module: str
    function: str
    arguments: list[int | float | str | None]
    constants: dict[str, Any]

    def specialisation(self) -> tuple:
        """Equal for launches that Triton may serve by one compiled kernel."""
        classes = [
            (type(a).__name__, a == 1, a % 16 == 0, abs(a) >= 2**31) if type(a) is int else a for a in self.arguments
        ]
        return self.module, self.function, *(c if not isinstance(c, float) else "float" for c in classes), *(
            sorted(self.constants.items())
        )


class Watch(TorchDispatchMode):
    """What the code inside asks of the device. The host's own tensors are real here, so it may read them.

    Attributes:
        launches: how often each operator launches a kernel. Every operator of ATen that writes memory counts as one,
            though some launch two; those on lists of tensors count as PyTorch cuts them into launches, those of
            unite_kernels count the launches and the operators inside them.
        moved: bytes that each operator reads and writes, every tensor once; of unite_kernels those that launch a
            kernel, beside the operators inside them. What an operator of ATen passes over more than once, as cuDNN a
            convolution's bias, is not seen.
        waits: copies between host and device, by the line of this repository that asks for them.
        kernels: what Triton's launcher was given, once for each kernel that it would compile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.waits: list[str] = []
        self.kernels: dict[tuple, Launch] = {}

    @property
    def total(self) -> int:
        return self.launches.total()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator.namespace == "aten":
            with self:  # below autograd composite operators arrive whole
                parts = operator.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        target = kwargs.get("device")
        if not any(isinstance(tensor, FakeTensor) for tensor in given) and (target is None or target.type == "cpu"):
            with unset_fake_temporarily():
                return operator(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, _faked, (args, kwargs))
        own = _own_operators().get(operator.name())
        if own is not None:
            return self._inside(operator, own, args, kwargs)
        found = (_added if operator is torch.ops.aten.addmm.dtype_out else operator)(*args, **kwargs)
        tensors = given + [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if tensor.device.type == NAME]
        # A 0-dim tensor of the host goes along with the launch, as a Python number does.
        if here and any(tensor.device.type == "cpu" and (tensor.ndim or _copies(operator)) for tensor in tensors):
            self.waits.append(f"{operator.name()} at {_caller()}")
        if here and not _silent(operator):
            self.launches[operator.name()] += _launches(operator, args)
            self.moved[operator.name()] += _bytes(operator, args, kwargs, found)
        return found

    def _inside(self, operator, own: Callable, args, kwargs):
        """Run the operator's CUDA implementation, with launches in place of kernels, and check its shape function."""
        promised = operator(*args, **kwargs)

        def launch(kernel, *arguments, grid, warmup, **constants):
            sizes = tuple(grid)
            if any(size > most for size, most in zip(sizes, GRID)) or 0 in sizes:
                raise ValueError(f"{operator.name()}: a grid of {sizes}; the most is {GRID}, the least 1")
            for name, value in zip(kernel.arg_names, arguments, strict=False):
                # Words of a random number's address are cut to their bits; sizes and strides are multiplied.
                if type(value) is int and name not in ("seed", "stream") and not -(2**31) <= value < 2**31:
                    raise ValueError(f"{operator.name()}: {name} = {value} leaves int32")
            self.launches[operator.name()] += 1
            given = Launch(kernel.fn.__module__, kernel.fn.__name__, [_described(a) for a in arguments], constants)
            self.kernels.setdefault(given.specialisation(), given)

        from triton.runtime.interpreter import InterpretedFunction

        with mock.patch.object(InterpretedFunction, "run", launch), self:
            found = own(*args, **kwargs)
        if self.launches[operator.name()]:
            self.moved[operator.name()] += _bytes(operator, args, kwargs, found)
        for ours, theirs in zip(tree_leaves(found), tree_leaves(promised), strict=True):
            if theirs is None:  # it returns nothing
                continue
            kept, told = ((x.shape, x.dtype, x.stride(), x.device) for x in (ours, theirs))
            if kept != told:
                raise ValueError(f"{operator.name()} gives {kept}, its shape function {told}")
        return promised


def _added(total: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
    """aten::addmm.dtype_out in place, as CUDA takes it; torch 2.11 cannot fake it."""
    told = torch.ops.aten.mm.dtype(left, right, dtype)
    if not (total is out and (out.shape, out.dtype, out.device) == (told.shape, told.dtype, told.device)):
        raise ValueError(f"aten::addmm.dtype_out: {told.dtype} {list(told.shape)} cannot be added to {out}")
    return out


def _faked(tensor: Tensor) -> Tensor:
    """A real tensor of the host as the fake ones see it."""
    if isinstance(tensor, FakeTensor):
        return tensor
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE).from_tensor(tensor)


@functools.cache
def _device() -> torch.device:
    """Register the made-up device, once a process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    module = getattr(torch, NAME)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module._is_in_bad_fork, module.manual_seed_all = (lambda: False), (lambda seed: None)
    rest = Library("_", "IMPL", AUTOCAST)
    rest.fallback(fallthrough_kernel)
    rules = Library("aten", "IMPL", AUTOCAST)
    policies = {LOWER: _to_lower, FLOAT32: _to_float32, FLOAT32_RESULT: _float32_result, WIDEST: _widest}
    for names, cast in policies.items():
        for name in names:
            packet = getattr(torch.ops.aten, name)
            for overload in packet.overloads():
                if "out" not in overload and overload not in ("Dimname", "dimname", "DimnameList_dim", "names"):
                    rules.impl(f"{name}.{overload}".removesuffix(".default"), _rule(getattr(packet, overload), cast))
    _device.libraries = (rest, rules)  # a library that nobody holds takes its rules along
    return torch.device(NAME, 0)


def _rule(operator, cast: Callable) -> Callable:
    def cast_and_call(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, AUTOCAST))):
            args, kwargs = cast(operator, args, kwargs)
            return operator(*args, **kwargs)

    return cast_and_call


def _cast(tree: Any, dtype: torch.dtype, only: tuple[torch.dtype, ...]) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(dtype) if tree.device.type == NAME and tree.dtype in only and tree.dtype != dtype else tree
    if isinstance(tree, (tuple, list)):
        return type(tree)(_cast(leaf, dtype, only) for leaf in tree)
    return tree


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# id() of a weight -> it and its cast, which CUDA's autocast keeps until its outermost context ends.
_CASTS: dict[int, tuple[Tensor, Tensor]] = {}


def _to_lower(operator, args, kwargs):
    return tree_map_only(Tensor, _lower, (args, kwargs))


def _lower(tensor: Tensor) -> Tensor:
    weight = tensor.dtype == torch.float32 and tensor.is_leaf and tensor.requires_grad
    if not weight or not torch.is_autocast_cache_enabled():
        return _cast(tensor, torch.get_autocast_dtype(NAME), _FLOATS)
    if id(tensor) not in _CASTS:
        _CASTS[id(tensor)] = tensor, _cast(tensor, torch.get_autocast_dtype(NAME), _FLOATS)
    return _CASTS[id(tensor)][1]


def _to_float32(operator, args, kwargs):
    return _cast(args, torch.float32, _FLOATS), {n: _cast(v, torch.float32, _FLOATS) for n, v in kwargs.items()}


def _float32_result(operator, args, kwargs):
    takes = any(argument.name == "dtype" for argument in operator._schema.arguments)
    if takes and args[0].dtype in _FLOATS[1:] and kwargs.get("dtype") is None:
        return args, kwargs | {"dtype": torch.float32}
    return args, kwargs


def _widest(operator, args, kwargs):
    dtypes = {leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dtype in _FLOATS}
    if len(dtypes) < 2:
        return args, kwargs
    return _to_float32(operator, args, kwargs)


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, which swaps a fake parameter's contents and cannot, as the mode holds weak references to it."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and (moved := function(parameter.detach())) is not parameter:
                part._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = function(buffer)
    return module


def _attention(elsewhere: Callable, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """scaled_dot_product_attention as CUDA chooses it for low precision and no mask: FlashAttention."""
    if query.device.type != NAME or any(option is not None for option in options.values()):
        return elsewhere(query, key, value, **options)
    dtype = torch.get_autocast_dtype(NAME) if torch.is_autocast_enabled(NAME) else query.dtype
    return torch.ops.aten._scaled_dot_product_flash_attention(query.to(dtype), key.to(dtype), value.to(dtype))[0]


def _convolution_format(image: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    """As cuDNN: channels-last where either is."""
    last = torch.channels_last
    either = any(tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous() for tensor in (image, weight))
    return last if either else torch.contiguous_format


@functools.cache
def _own_operators() -> dict[str, Callable]:
    """The operators of unite_kernels by their name in torch.ops, with what launches their kernels."""
    modules = [importlib.import_module(f"{uk.__name__}.{name}") for name in (*FAMILIES, "adaln", "optim")]
    found = [value for module in modules for value in vars(module).values()]
    launchers = {value.registered: value.compute for value in found if isinstance(value, uk.dispatch.Operator)}
    launchers |= {value: value._init_fn for value in found if isinstance(value, CustomOpDef)}
    return {operator._qualname: launcher for operator, launcher in launchers.items()}


def _described(argument: Any) -> int | float | str | None:
    return str(argument.dtype).removeprefix("torch.") if isinstance(argument, Tensor) else argument


def _copies(operator) -> bool:
    return operator.name() in ("aten::_to_copy", "aten::copy_", "aten::copy")


def _silent(operator) -> bool:
    schema = operator._schema
    returned = [result.alias_info for result in schema.returns]
    view = any(alias is not None and not alias.is_write for alias in returned)
    name = operator.name().removeprefix("aten::")
    return view or name.startswith(SILENT)


def _bytes(operator, args: tuple, kwargs: dict, found: Any) -> int:
    given = _size((args, {name: value for name, value in kwargs.items() if name != "out"}))
    pairs = list(zip(operator._schema.arguments, args))
    written = [value for argument, value in pairs if argument.alias_info is not None and argument.alias_info.is_write]
    unread = [value for argument, value in pairs if argument.name in WRITE_ONLY]
    unread += args[:1] if operator.name() in COPIES_INTO else ()
    return given - _size(unread) + (_size(written) if written else _size(found))


def _size(tree: Any) -> int:
    return sum(leaf.numel() * leaf.itemsize for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _launches(operator, args: tuple) -> int:
    """Launches of an operator: one, or as many as lists of tensors are cut into."""
    name = operator.name().removeprefix("aten::")
    if not name.startswith(("_foreach_", "_fused_")):
        return 1
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor)]
    depth = len(lists) + (not name.rpartition(".")[0].endswith("_") and not name.endswith("_"))
    return list_launches([tensor.numel() for tensor in lists[0]], min(depth, 5))


def _caller() -> str:
    """The innermost line outside PyTorch and this file."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else "autograd"

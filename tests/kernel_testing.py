"""What the tests of the kernels share: the device, the dtypes, the backends and the rule for errors.

On a machine with a GPU the kernels run natively, elsewhere in Triton's interpreter (see conftest.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

import unite_kernels as uk
from unite_kernels.dispatch import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

ROUNDED = {
    tl.bfloat16: (torch.bfloat16, torch.int16, np.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, torch.int8, np.uint8),
    tl.float8e5: (torch.float8_e5m2, torch.int8, np.uint8),
}


def _mend_interpreter() -> None:
    """Two faults of Triton's interpreter.

    It cuts float32 off to make bfloat16 and FP8, where compiled code rounds to nearest. And before 3.9 a loop bound is
    a NumPy array of shape [1], which NumPy 2.4 does not turn into an integer.
    """
    from triton.runtime import interpreter

    convert, patch_tensor = interpreter._convert_float, interpreter._patch_lang_tensor

    def convert_float(data, source, target, rounding):
        if source == tl.float32 and target in ROUNDED:
            dtype, bits, kept = ROUNDED[target]
            return torch.from_numpy(np.array(data, np.float32)).to(dtype).view(bits).numpy().view(kept)
        return convert(data, source, target, rounding)

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._convert_float = convert_float
    interpreter._patch_lang_tensor = patch_lang_tensor


if INTERPRETED:
    _mend_interpreter()


@contextlib.contextmanager
def on_backend(name: str) -> Iterator[None]:
    """Run a block on one backend."""
    before = uk.get_backend()
    uk.set_backend(name)
    try:
        yield
    finally:
        uk.set_backend(before)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers on the device under test, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def outputs_and_gradients(
    function: Callable, inputs: Sequence[Tensor | None], dtypes: Callable[[Tensor], torch.dtype] = lambda x: x.dtype
) -> list[Tensor]:
    """The function's outputs, and the gradients of its inputs for one fixed random gradient of each output.

    Args:
        function: of the inputs, returns a tensor or several.
        inputs: tensors that all take gradients; None stays None.
        dtypes: the dtype in which an input is given to the function.
    """
    leaves = [None if x is None else x.to(dtypes(x)).detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    grads = [normal(*output.shape, seed=99 + index).to(output.dtype) for index, output in enumerate(outputs)]
    return outputs + list(torch.autograd.grad(outputs, [leaf for leaf in leaves if leaf is not None], grads))


def assert_twice_as_good(fused: Sequence[Tensor], eager: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """Every fused tensor errs at most twice as much as eager PyTorch in the same dtype, plus 1e-6.

    The error is the largest absolute one against the truth; for numbers above 1 the 1e-6 is relative to the largest,
    where it is 8 units in the last place of float32.
    """
    assert len(fused) == len(eager) == len(truth)
    for index, (ours, theirs, true) in enumerate(zip(fused, eager, truth, strict=True)):
        assert ours.shape == theirs.shape == true.shape, f"tensor {index}"
        assert ours.dtype == theirs.dtype, f"tensor {index}"
        if true.numel():
            true = true.double()
            error, allowed = ((x.double() - true).abs().max().item() for x in (ours, theirs))
            scale = max(1.0, true.abs().max().item())
            assert error <= 2 * allowed + 1e-6 * scale, f"tensor {index} errs by {error:.3g}, PyTorch by {allowed:.3g}"

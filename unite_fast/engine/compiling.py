"""torch.compile around the training passes: its requirements, and the compiled passes themselves."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from unite_fast.config import Config
from unite_fast.errors import UserError
from unite_fast.objective.two_pass import TwoPassObjective

BACKEND = "inductor"
MIN_TRITON_CAPABILITY = (7, 0)  # of Inductor's code generator


def missing_for_compile(device: torch.device) -> str | None:
    """What torch.compile lacks here and how to get it; None where it can work.

    On a CPU Inductor writes C++, on CUDA Triton; both build a Python extension with the system's compiler.
    """
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install triton"
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_TRITON_CAPABILITY:
            found, least = (".".join(map(str, version)) for version in (capability, MIN_TRITON_CAPABILITY))
            return f"this GPU has compute capability {found}, Triton needs {least}"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as Inductor chooses
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler}: apt install g++ (dnf install gcc-c++), or point CXX at one"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        return f"Python's headers are missing ({header}): apt install python3-dev (dnf install python3-devel)"
    return None


def check_compile(config: Config, device: torch.device) -> None:
    """Raise a UserError where `train.compile` is on and cannot work on this device."""
    if config.train.compile and (missing := missing_for_compile(device)):
        raise UserError(f"train.compile: {missing}; or set train.compile to false")


def compiled_passes(model: nn.Module, config: Config) -> Callable[..., Any]:
    """The model's `forward(phase, **inputs)` under torch.compile; the model itself stays as it is.

    Each phase is compiled at its first call, on images once more for a last chunk of fewer draws.
    """
    return compiled(model.forward, config)


def compile_perceptual(objective: TwoPassObjective) -> None:
    """LPIPS, of an objective that has it, under torch.compile as well, in place.

    Only once the micro-batch is known: every size that `auto` tries would be compiled.
    On a CPU it takes 0.90 of the time.
    """
    lpips = getattr(objective, "lpips", None)
    if lpips is not None:
        lpips.compile(backend=BACKEND, dynamic=False)


def compiled(function: Callable[..., Any], config: Config) -> Callable[..., Any]:
    """`function` under torch.compile. Packed molecules change their sizes from batch to batch: one graph serves all."""
    # A float that differs from call to call is not known here; as a symbol it would reach the operators as fp64, and
    # Dynamo of torch 2.13 fails on it inside of an autograd.Function.
    torch._dynamo.config.specialize_float = True
    # Sizes that are equal by chance in the first batch, such as molecules and heads, would be taken for one size.
    torch.fx.experimental._config.use_duck_shape = False
    return torch.compile(function, backend=BACKEND, dynamic=config.modality != "images")


@contextmanager
def watched(*pauses: Callable[[], AbstractContextManager[None]], say: Callable[[str], None]) -> Iterator[None]:
    """Context in which compilations run inside all `pauses`, which keep them out of rates; `say` announces the first.

    They happen in the middle of a step, at the first call and the first backward for each kind of input.
    """
    from torch._dynamo.callback import callback_handler

    open_pauses = ExitStack()
    told = False

    def start(_: Any) -> None:
        nonlocal told
        for pause in pauses:
            open_pauses.enter_context(pause())
        if not told:
            say("torch.compile is at work: the first step takes minutes, which rates and time left do not count")
            told = True

    def end(_: Any) -> None:
        open_pauses.close()

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)
    try:
        yield
    finally:
        open_pauses.close()
        callback_handler.remove_start_callback(start)
        callback_handler.remove_end_callback(end)

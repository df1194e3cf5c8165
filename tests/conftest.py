"""Settings of the whole suite, made before anything else is imported.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is first imported. One
thread: the tensors are small, and on shared cores waiting threads cost far more than they save.
"""

import functools
import inspect
import os

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure():
    if os.environ.get("TRITON_INTERPRET") == "1":
        _patch_the_language_once_a_launch()


def _patch_the_language_once_a_launch() -> None:
    """Triton's interpreter patches triton.language again for every device function that a kernel calls, to no effect
    but for the first of a module's: a third of its time."""
    try:
        from triton.runtime import interpreter

        patch, tl = interpreter._patch_lang, interpreter.tl
    except (ImportError, AttributeError):
        return
    patched: set[str] = set()  # during a launch

    @functools.cache
    def seen_by(function):
        return {name for name, module in (("tl", tl), ("core", tl.core)) if module in _modules(function)}

    def once(function):
        modules = seen_by(function)
        if modules and modules <= patched:
            return None  # of a device function, whose patches nobody takes back
        scope = patch(function)
        if scope is None:  # of a Triton that takes no patches back
            return None
        if not patched:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        patched.update(modules)
        return scope

    interpreter._patch_lang = once


def _modules(function):
    return [value for value in function.__globals__.values() if inspect.ismodule(value)]


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable():
    """A worker's report as UTF-8: pytest-xdist ends the whole run at a name that is none, even in a log that passed."""
    return _as_utf8((yield))


def _as_utf8(part):
    if isinstance(part, str):
        return part.encode(errors="backslashreplace").decode()
    if isinstance(part, dict):
        return {_as_utf8(key): _as_utf8(value) for key, value in part.items()}
    return type(part)(map(_as_utf8, part)) if isinstance(part, list | tuple) else part


@pytest.fixture()
def gpu_memory(monkeypatch):
    """What is kept for a backward is what a GPU keeps: the kernels' tensors, and no matrix of attention's scores; nor
    does a product lay its operands out anew."""
    import unite_kernels
    from unite_fast.model import attention, linear

    monkeypatch.setattr(attention, "SHORT", 0)
    monkeypatch.setattr(linear, "prefers_onednn", lambda: False)
    unite_kernels.set_backend("triton")
    yield
    unite_kernels.set_backend("auto")


@pytest.fixture()
def alone():
    """A process group of one rank, which the test may leave."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()

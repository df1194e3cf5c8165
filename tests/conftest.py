"""Settings of the whole suite, made before anything else is imported.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is first imported. One
thread: the tensors are small, and on shared cores waiting threads cost far more than they save.
"""

import os

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


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
    """What is kept for a backward is what a GPU keeps: the kernels' tensors, and no matrix of attention's scores."""
    import unite_kernels
    from unite_fast.model import attention

    monkeypatch.setattr(attention, "SHORT", 0)
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

"""Batch arithmetic, the automatic micro-batch, and where a process finds its rank."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from engine_toy import toy_config

from unite_fast.analysis.extent import Extent
from unite_fast.config import Config, TrainConfig
from unite_fast.engine import fitting
from unite_fast.engine.batch import Batch, bounded_on_cpu, find_micro_batch, micro_batch_candidates, resolve_batch
from unite_fast.engine.launch import launch_environment
from unite_fast.engine.world import init_world
from unite_fast.errors import UserError


@pytest.mark.parametrize(
    ("keys", "ranks", "expected"),
    [
        (dict(global_batch=96, micro_batch=8), 4, Batch(8, 3, 96)),
        (dict(global_batch=96, accumulation=3), 4, Batch(8, 3, 96)),
        (dict(micro_batch=8, accumulation=3), 4, Batch(8, 3, 96)),
        (dict(global_batch=96, micro_batch=8, accumulation=3), 4, Batch(8, 3, 96)),
    ],
)
def test_the_third_follows(keys, ranks, expected):
    assert resolve_batch(TrainConfig(steps=1, **keys), ranks) == expected


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(global_batch=100, micro_batch=8), "100 is not divisible by micro_batch 8 × 4 ranks = 32"),
        (dict(global_batch=100, accumulation=3), "100 is not divisible by accumulation 3 × 4 ranks = 12"),
        (dict(global_batch=100, micro_batch=8, accumulation=3), "= 96, but train.global_batch is 100"),
    ],
)
def test_what_does_not_divide_is_said_with_the_numbers(keys, words):
    with pytest.raises(UserError, match=words.replace("=", ".").replace("×", ".")):
        resolve_batch(TrainConfig(steps=1, **keys), 4)


def test_auto_takes_a_measured_micro_batch():
    train = TrainConfig(steps=1, global_batch=96, micro_batch="auto")
    assert micro_batch_candidates(train, 4) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert resolve_batch(train, 4, 6) == Batch(6, 4, 96)
    fixed = TrainConfig(steps=1, global_batch=96, micro_batch="auto", accumulation=2)
    assert micro_batch_candidates(fixed, 4) == [12]
    free = TrainConfig(steps=1, micro_batch="auto", accumulation=2)
    assert micro_batch_candidates(free, 4)[:4] == [1, 2, 4, 8] and resolve_batch(free, 4, 8) == Batch(8, 2, 64)
    with pytest.raises(UserError, match="97 is not divisible by 4 ranks"):
        micro_batch_candidates(TrainConfig(steps=1, global_batch=97, micro_batch="auto"), 4)


@pytest.mark.parametrize("capacity", range(1, 100, 7))
def test_auto_finds_the_largest_that_fits_in_few_trials(capacity):
    candidates = micro_batch_candidates(TrainConfig(steps=1, global_batch=5040, micro_batch="auto"), 1)
    tried = []

    def try_step(size: int) -> None:
        tried.append(size)
        if size > capacity:
            raise torch.OutOfMemoryError

    assert find_micro_batch(try_step, candidates) == max(size for size in candidates if size <= capacity)
    assert len(tried) == len(set(tried)) <= 12
    assert max(tried) <= 4 * capacity, "a trial far beyond what fits wastes time and fragments memory"


def test_auto_stops_where_another_rank_runs_out():
    def agree(fits: bool, limit: int = 6) -> bool:
        return fits and sizes[-1] <= limit

    sizes: list[int] = []
    assert find_micro_batch(sizes.append, [1, 2, 3, 4, 6, 8, 12], agree=agree) == 6


def test_auto_says_when_nothing_fits():
    def try_step(size: int) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(UserError, match="not even a micro-batch of 1 fits"):
        find_micro_batch(try_step, [1, 2])


@pytest.mark.parametrize(
    "message",
    [
        "Triton Error [CUDA]: out of memory",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_memory_that_ends_beside_the_allocator_is_known_too(message):
    def try_step(size: int) -> None:
        if size > 5:
            raise RuntimeError(message)

    assert find_micro_batch(try_step, [1, 2, 3, 4, 6, 8]) == 4


def test_a_cpu_without_the_memory_is_known_too():
    sizes = [1, 2, 2**58]  # 2^60 bytes exceed every address space
    assert find_micro_batch(torch.empty, sizes) == 2


def test_another_failure_of_a_step_is_not_taken_for_a_lack_of_memory():
    def try_step(size: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        find_micro_batch(try_step, [1, 2])


def test_a_cpu_is_not_driven_out_of_memory():
    used = [100]
    ran = []

    def try_step(size: int) -> None:
        ran.append(size)
        used[0] = max(used[0], 100 + 10 * size)

    bounded = bounded_on_cpu(try_step, available=lambda: 170, peak=lambda: used[0])
    assert find_micro_batch(bounded, [1, 2, 4, 8, 16]) == 8
    assert ran == [1, 2, 4, 8], "16 needs 160 of 85 bytes and must not be tried"
    used[0] = 100
    ran.clear()
    bounded = bounded_on_cpu(try_step, processes=2, available=lambda: 170, peak=lambda: used[0])
    assert find_micro_batch(bounded, [1, 2, 4, 8, 16]) == 4 and ran == [1, 2, 4], "the other process needs as much"


def test_ranks_try_sizes_together(monkeypatch):
    """Each with its share of the machine's free memory, and for all no more than fits on every one."""
    asked, tried = [], []
    monkeypatch.setattr(fitting, "bounded_on_cpu", lambda step, processes: asked.append(processes) or step)
    train = {"steps": 1, "global_batch": 8, "micro_batch": "auto", "device": "cpu"}
    config = Config.parse({"train": train, "data": {"path": "-"}, "objective": {"lpips": {"weight": 0}}})
    world = SimpleNamespace(device=torch.device("cpu"), size=2, local_size=2, all_true=lambda fits: tried[-1] < 4)
    batch, _ = fitting.fit(config, world, Extent, lambda run, size: tried.append(size))
    assert asked == [2] and tried == [1, 2, 4] and batch == Batch(2, 2, 8)


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}


def test_launchers_are_read():
    assert launch_environment({}) == {}
    assert launch_environment(TORCHRUN | {"HOME": "/"}) == TORCHRUN
    slurm = {
        "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_LAUNCH_NODE_IPADDR": "node0",
    }  # fmt: skip
    assert launch_environment(slurm) == TORCHRUN | {"MASTER_PORT": "29500"}
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    assert launch_environment(batch_script) == {}, "an sbatch shell is one process, whatever the job's task count"


def test_incomplete_launch_variables_are_refused():
    with pytest.raises(UserError, match="RANK and WORLD_SIZE"):
        launch_environment({"RANK": "0"})
    with pytest.raises(UserError, match="MASTER_ADDR is not set for a run of 8 processes"):
        launch_environment({key: value for key, value in TORCHRUN.items() if key != "MASTER_ADDR"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    config = toy_config()
    asked = config.model_copy(update={"train": config.train.model_copy(update={"device": "cuda"})})
    with pytest.raises(UserError, match="no CUDA device"):
        init_world(asked)
    world = init_world(config)
    assert (world.rank, world.size, world.device.type) == (0, 1, "cpu") and not torch.distributed.is_initialized()

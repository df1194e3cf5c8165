"""Leaving the process group: the interpreter must not end while gloo's threads still free tensors."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from unite_fast.engine import world
from unite_fast.engine.world import leave_world
from unite_fast.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads are looked at through /proc")


def test_a_busy_thread_of_gloo_is_waited_for(alone):
    started, freed, ended = threading.Event(), threading.Event(), threading.Event()

    def free() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(world.GLOO_THREADS)
        started.set()
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            sum(range(1000))
        freed.set()
        ended.wait()

    thread = threading.Thread(target=free)
    thread.start()
    started.wait()
    try:
        leave_world()
        assert freed.is_set() and thread.is_alive(), "an idle thread must not be waited for"
        assert not dist.is_initialized()
    finally:
        ended.set()
        thread.join()


def test_a_thread_that_never_rests_is_left(alone, monkeypatch):
    monkeypatch.setattr(world, "LAST_LOOK", 0.1)
    states = iter(range(10**6))
    monkeypatch.setattr(world, "_gloo_threads", lambda: {"1": ["R", str(next(states)), "0"]})
    leave_world()
    assert not dist.is_initialized()


def test_a_lone_process_has_nothing_to_leave():
    leave_world()
    assert not dist.is_initialized()


def test_an_error_of_one_rank_does_not_wait_for_the_others_in_nccl(alone, monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def fail():
        with pytest.raises(ValueError, match="of this rank alone"):
            try:
                raise ValueError("of this rank alone")
            finally:
                leave_world()

    fail()
    assert dist.is_initialized()
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)  # nobody to wait for
    fail()
    assert not dist.is_initialized()


def test_what_several_ranks_run_into_is_told_by_the_first_of_them(alone, monkeypatch):
    """One process stands for all ranks: with NCCL the group, whose store they share, stays after an error."""
    monkeypatch.setattr(world, "TOLD", 0.0)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def end_of_rank(problem: str) -> str | int:
        try:
            try:
                raise UserError(problem)
            finally:
                leave_world()
        except (UserError, SystemExit) as end:
            return end.code if isinstance(end, SystemExit) else str(end)

    assert [end_of_rank(problem) for problem in ("of all \udcff", "of all \udcff", "of one", "of all \udcff")] == [
        "of all \udcff", 2, "of one", 2
    ]  # fmt: skip


def test_a_rank_whose_store_has_ended_tells_its_mistake(alone, monkeypatch):
    def ended():
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", ended)
    with pytest.raises(UserError, match="of one"):
        try:
            raise UserError("of one")
        finally:
            leave_world()


def test_gloo_names_its_threads_as_we_look_for_them(alone):
    until = time.monotonic() + 20
    while not world._gloo_threads() and time.monotonic() < until:  # on a busy machine they name themselves later
        time.sleep(0.01)
    assert world._gloo_threads(), f"no thread named {world.GLOO_THREADS}: PyTorch calls them otherwise now"


@pytest.mark.parametrize(
    ("found", "tells"),
    [
        ([["a", "b"], ["a", "b"], ["a", "b"]], [True, False, False]),
        ([[], ["a"], ["a"]], [False, True, False]),
        ([["a"], ["a"], ["b"]], [True, False, True]),
    ],
)
def test_what_several_ranks_find_wrong_is_told_by_the_first_of_them_and_ends_all(found, tells, monkeypatch):
    monkeypatch.setattr(world, "TOLD", 0.0)
    monkeypatch.setattr(world.World, "collect", lambda self, own: found)
    for rank, tells_it in enumerate(tells):
        place = world.World(rank, len(found), rank, torch.device("cpu"))
        with pytest.raises(UserError if tells_it else SystemExit) as caught:
            place.require_none(found[rank], "missing")
        if tells_it:
            assert all(problem in str(caught.value) for problem in found[rank])
        else:
            assert caught.value.code == 2


def test_ranks_that_find_nothing_wrong_go_on(monkeypatch):
    monkeypatch.setattr(world.World, "collect", lambda self, own: [[], []])
    world.World(1, 2, 1, torch.device("cpu")).require_none([], "missing")

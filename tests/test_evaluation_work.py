"""Pieces of long work: joined in order, kept over a kill, made smaller where memory ends, dealt to ranks."""

from __future__ import annotations

import threading

import pytest
import torch
from cli_toy import CONFIG, toy_model
from ranks import ALONE

from unite_fast.engine.world import World
from unite_fast.errors import UserError
from unite_fast.evaluation.evaluator import Evaluation, Evaluator
from unite_fast.evaluation.generation import Pictures
from unite_fast.evaluation.plan import Plan
from unite_fast.evaluation.work import Patience, Work, digest, progress


class Maker:
    """Yields the numbers of images; fails where it is told to."""

    def __init__(self, *, dies_at=None, largest=None):
        self.dies_at, self.largest = dies_at, largest
        self.calls: list[tuple[int, int]] = []

    def __call__(self, first, stop):
        self.calls.append((first, stop))
        if self.dies_at is not None and first <= self.dies_at < stop:
            raise KeyboardInterrupt
        if self.largest is not None and stop - first > self.largest:
            raise torch.OutOfMemoryError("no memory")
        return {"number": torch.arange(first, stop), "square": torch.arange(first, stop).double() ** 2}


def test_pieces_are_joined_in_order(tmp_path):
    maker = Maker()
    found = Work(tmp_path, ALONE).gather("x", {"a": 1}, 10, 4, maker)
    assert maker.calls == [(0, 4), (4, 8), (8, 10)]
    assert torch.equal(found["number"], torch.arange(10)) and found["square"][-1] == 81


def test_a_killed_evaluation_goes_on_without_repeating(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Work(tmp_path, ALONE).gather("x", {"a": 1}, 10, 2, Maker(dies_at=5))
    again = Maker()
    found = Work(tmp_path, ALONE).gather("x", {"a": 1}, 10, 2, again)
    assert again.calls == [(4, 6), (6, 8), (8, 10)]
    assert torch.equal(found["number"], torch.arange(10))
    more = Maker()
    assert len(Work(tmp_path, ALONE).gather("x", {"a": 1}, 13, 2, more)["number"]) == 13
    assert more.calls == [(10, 12), (12, 13)]


def test_other_settings_share_nothing_and_a_finished_work_leaves_nothing(tmp_path):
    work = Work(tmp_path / "work", ALONE)
    work.gather("x", {"a": 1}, 4, 2, Maker())
    other = Maker()
    work.gather("x", {"a": 2}, 4, 2, other)
    assert len(other.calls) == 2 and digest({"a": 1}) != digest({"a": 2}) == digest(dict(a=2))
    missing = Maker()
    work.gather("x", {"a": 1}, 4, 2, missing, kept=lambda first, stop: first != 2)
    assert missing.calls == [(2, 4)]
    other = Work(tmp_path / "work", ALONE)
    other.gather("x", {"a": 3}, 2, 2, Maker())
    work.discard()
    assert [path.name for path in (tmp_path / "work").iterdir()] == [digest({"a": 3})], "another's pieces stay"
    other.discard()
    assert list(tmp_path.iterdir()) == []


def test_memory_that_ends_halves_what_is_made_and_goes_on(tmp_path, capsys):
    maker, work = Maker(largest=3), Work(tmp_path, ALONE)
    found = work.gather("x", {}, 16, 8, maker)
    assert torch.equal(found["number"], torch.arange(16))
    assert maker.calls == [(0, 8), (0, 4), *((first, first + 2) for first in range(0, 16, 2))]
    assert work.patience.limit == 2
    printed = capsys.readouterr().err
    assert "out of memory at 8 images, going on with 4" in printed and "going on with 2" in printed
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2, "the pieces stay as they were"
    with pytest.raises(UserError, match="out of memory even on images one at a time"):
        Patience().make(Maker(largest=0), 0, 4)


def test_ranks_deal_the_missing_pieces_out(tmp_path):
    """Two ranks as threads: each is told what rank 0 misses, whatever it sees itself, and rank 0 waits for both."""
    Work(tmp_path, ALONE).gather("x", {}, 2, 2, Maker())
    barrier, told = threading.Barrier(2), []

    class Rank(World):
        def share(self, value):
            if self.is_main:
                told.append(value)
            barrier.wait()
            return told[-1]

        def barrier(self):
            barrier.wait()

    makers, found = [Maker(), Maker()], {}

    def run(rank):
        work = Work(tmp_path, Rank(rank, 2, rank, torch.device("cpu")), shown=False)
        found[rank] = work.gather("x", {}, 9, 2, makers[rank], kept=lambda first, stop: rank == 0)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert makers[0].calls == [(2, 4), (6, 8)] and makers[1].calls == [(4, 6), (8, 9)]
    assert found[1] is None and torch.equal(found[0]["number"], torch.arange(9))


def test_all_ranks_hear_the_numbers_that_rank_0_computed():
    """A search goes on from them, on all ranks alike."""

    class Told(World):
        def share(self, value):
            return {"gfid": 3.0}, {"seed": 1}

    evaluator = Evaluator(Plan(()), CONFIG, Told(1, 2, 1, torch.device("cpu")), files=(None, None, None))
    assert evaluator.measure(toy_model(), {}, {}, None) == Evaluation({"gfid": 3.0}, {"seed": 1})


def test_pieces_of_other_nodes_are_waited_for(tmp_path, monkeypatch):
    """A network folder shows them late, and those of another folder never."""
    # Rank 0 of two, whose other rank writes somewhere else.
    monkeypatch.setattr(World, "share", lambda self, value: value)
    monkeypatch.setattr(World, "barrier", lambda self: None)
    waits = []
    monkeypatch.setattr("unite_fast.evaluation.work.time.sleep", waits.append)
    two = World(0, 2, 0, torch.device("cpu"))
    with pytest.raises(UserError, match="2 of 4 pieces did not appear.*must see the same folder"):
        Work(tmp_path, two).gather("x", {}, 8, 2, Maker())
    assert sum(waits) > 60

    def shown(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            Work(tmp_path, World(0, 1, 0, torch.device("cpu"))).gather("x", {}, 8, 2, Maker())

    waits.clear()
    monkeypatch.setattr("unite_fast.evaluation.work.time.sleep", shown)
    found = Work(tmp_path, two).gather("x", {}, 8, 2, Maker())
    assert torch.equal(found["number"], torch.arange(8)) and len(waits) == 3


def test_progress_is_told_in_lines_where_there_is_no_terminal(capsys, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("unite_fast.evaluation.work.time.monotonic", lambda: next(clock))
    with progress("generating", 100, 20, shown=True) as advance:
        for _ in range(4):
            advance(20)
    assert "generating: 60/100  2.0 images/s  left 0:20" in capsys.readouterr().err
    with progress("generating", 100, 20, shown=False) as advance:
        advance(20)
    assert capsys.readouterr().err == ""


def test_pictures_of_an_evaluation_begun_before_stay(tmp_path):
    def labels(first, stop):
        return torch.arange(first, stop) % 3

    pictures = Pictures(tmp_path / "png", labels)
    pictures.begin("one")
    pictures.save(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), first=3)
    pictures.begin("one")
    assert pictures.hold(3, 5) and not pictures.hold(3, 6)
    pictures.begin("another")
    assert not pictures.hold(3, 4)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        Pictures(tmp_path / "file", labels).begin("one")

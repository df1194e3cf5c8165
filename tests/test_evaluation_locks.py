"""Evaluations side by side in one run folder: nobody's pieces are deleted, nothing is made twice, nothing stays."""

from __future__ import annotations

import fcntl
import os
import shutil
import time

import pytest
import torch
from cli_toy import mistake, picture, run, save_toy
from evaluation_files import another_process
from ranks import ALONE

from unite_fast.errors import UserError
from unite_fast.evaluation import evaluator as evaluator_module
from unite_fast.evaluation.work import ABANDONED_DAYS, LOCK, Work, digest


def gather(work, key, **options):
    return work.gather("x", key, 4, 2, lambda first, stop: {"number": torch.arange(first, stop)}, **options)


def test_pieces_that_another_process_needs_stay_for_it(tmp_path):
    folder = tmp_path / digest({"a": 1})
    with another_process(folder):
        work = Work(tmp_path, ALONE)
        gather(work, {"a": 1})
        gather(work, {"a": 2})
        work.discard()
        assert len(list(folder.glob("*.safetensors"))) == 2 and list(tmp_path.iterdir()) == [folder]
    last = Work(tmp_path, ALONE)
    gather(last, {"a": 1})
    last.discard()
    assert not tmp_path.exists()


def test_what_another_process_makes_is_refused_unless_it_is_common(tmp_path):
    folder = tmp_path / digest({})
    with another_process(folder):
        with pytest.raises(UserError, match=f"another process is making the same images in {folder}: wait for its end"):
            gather(Work(tmp_path, ALONE, sole=True), {})
        assert not list(folder.glob("*.safetensors"))
        assert len(gather(Work(tmp_path, ALONE, sole=True), {}, common=True)["number"]) == 4
    work = Work(tmp_path, ALONE, sole=True)
    assert len(gather(work, {})["number"]) == len(gather(work, {})["number"]) == 4, "its own lock is in nobody's way"


def test_a_damaged_piece_is_named_and_made_again_once_it_is_deleted(tmp_path):
    work = Work(tmp_path, ALONE)
    whole = gather(work, {})["number"]
    piece = sorted((tmp_path / digest({})).glob("*.safetensors"))[1]
    piece.write_bytes(piece.read_bytes()[:-3])
    with pytest.raises(UserError, match=f"{piece} is not a whole .*; delete it, and the same command makes its images"):
        gather(work, {})
    piece.unlink()
    assert torch.equal(gather(work, {})["number"], whole)


def test_a_folder_that_is_deleted_while_it_is_awaited_is_made_again(tmp_path, monkeypatch):
    """Between opening the lock file and having the lock."""
    folder, lockf, deleted = tmp_path / digest({}), fcntl.lockf, []

    def late(file, operation):
        if not deleted:
            deleted.append([path.unlink() for path in folder.iterdir()])
            folder.rmdir()
        lockf(file, operation)

    monkeypatch.setattr("fcntl.lockf", late)
    work = Work(tmp_path, ALONE)
    gather(work, {})
    assert deleted and (folder / LOCK).exists()


def test_an_evaluation_that_begins_while_pieces_are_deleted_makes_its_own(tmp_path, monkeypatch):
    """Whichever file goes first."""
    first, later, rmtree = Work(tmp_path, ALONE), Work(tmp_path, ALONE), shutil.rmtree

    def slowly(folder, **options):
        (folder / LOCK).unlink()
        gather(later, {})
        rmtree(folder, **options)

    gather(first, {})
    with monkeypatch.context() as patch:
        patch.setattr("unite_fast.evaluation.work.shutil.rmtree", slowly)
        first.discard()
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.glob("*.safetensors"))) == 2 and (folder / LOCK).exists()
    later.discard()
    assert not tmp_path.exists()


def test_where_there_are_no_locks_pieces_are_kept_and_deleted_as_with_them(tmp_path, monkeypatch):
    def none(file, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", none)
    work = Work(tmp_path / "work", ALONE, sole=True)
    gather(work, {})
    work.discard()
    assert not (tmp_path / "work").exists()


def test_pieces_that_nobody_went_on_with_are_deleted_in_the_end(tmp_path):
    for name, days in (("old", ABANDONED_DAYS + 1), ("held", ABANDONED_DAYS + 1), ("young", ABANDONED_DAYS - 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / LOCK).touch()
        os.utime(tmp_path / name, times=(time.time() - days * 86400,) * 2)
    with another_process(tmp_path / "held"):
        Work(tmp_path, ALONE).discard()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held", "young"]


def test_two_evaluations_at_once(tmp_path, capsys, monkeypatch):
    """The second one of the same images is refused before it draws any."""
    save_toy(tmp_path / "model")
    picture(tmp_path / "val" / "0.png", seed=0)
    command = ["evaluate", tmp_path / "model", "--metrics", "psnr", "--data", tmp_path / "val", "--count", 3,
               "--save-images", tmp_path / "png"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(Work, "discard", lambda self: None)  # as where it is killed before the record
        assert run(*command) == 0
    work = tmp_path / "model" / "evaluations" / ".work"
    drawn = next(path.parent for path in work.glob("*/*.safetensors") if path.name == "00000000-00000003.safetensors")
    monkeypatch.setattr(evaluator_module, "draw", lambda *_, **__: pytest.fail("images were drawn"))
    with another_process(drawn):
        assert mistake(capsys, *command).startswith(f"another process is making the same images in {drawn}")
    assert run(*command) == 0 and not work.exists()

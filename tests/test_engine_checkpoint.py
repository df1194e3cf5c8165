"""Checkpoints: exact resume, atomic saves, refusal of what is not a whole checkpoint."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_toy import advance, assert_identical, engine_at, everything, toy_model
from runs import latest_step
from safetensors.torch import load_file, save_file

from unite_fast.engine import checkpoint
from unite_fast.engine.engine import Engine
from unite_fast.errors import UserError

FILES = ("model.safetensors", "ema.safetensors", "ema_0.5.safetensors", "optimizer.safetensors")


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_resume_is_exact_bit_for_bit(tmp_path, kind):
    schedule = dict(kind=kind, warmup_epochs=0.4, hold_until_epoch=0.6, cosine_until_epoch=1.5)
    whole = engine_at(10, **schedule)
    first = engine_at(5, **schedule)
    saved = checkpoint.save(first, tmp_path, {"images": 40})
    second = engine_at(0, **schedule)
    with torch.no_grad():
        for parameter in second.parameters.values():
            parameter.add_(1)
        second.model.frequencies.add_(1)
    assert checkpoint.load(second, saved) == {"images": 40}
    assert second.step_count == 5
    advance(second, 5)
    assert_identical(second, whole)
    assert second.last_lr == whole.last_lr != whole.peak_lr


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_step_moves_by_the_learning_rate_of_its_own(kind):
    """Updates are proportional to it, and the first step of a warm-up of four has a quarter of the peak."""
    changes = (0, {}), (1, {}), (1, {"warmup_epochs": 0.4})
    start, whole, warming = (engine_at(steps, kind=kind, weight_decay=0, **options) for steps, options in changes)
    assert warming.last_lr == pytest.approx(whole.last_lr / 4)
    for name, parameter in start.parameters.items():
        moved = (whole.parameters[name] - parameter) / 4
        torch.testing.assert_close(warming.parameters[name] - parameter, moved, rtol=1e-3, atol=1e-7)


def test_steps_of_another_batch_count_by_their_share(tmp_path):
    engine = engine_at(3, warmup_epochs=1)
    checkpoint.load(engine, checkpoint.save(engine, tmp_path, {"images": 20}))
    assert engine.progress == 2.5  # steps of today's 8, of ten an epoch
    advance(engine, 1)
    assert engine.last_lr == pytest.approx(engine.peak_lr * 3.5 / 10) and engine.samples_seen == 28


def test_an_average_goes_on_by_its_decay_whichever_is_the_main_one(tmp_path):
    engine = engine_at(4, ema_decay=0.8, ema_decays=[0.5])
    saved = checkpoint.save(engine, tmp_path, {})
    for main, extra in ((0.5, [0.8]), (0.5, [])):
        other = engine_at(0, ema_decay=main, ema_decays=extra)
        checkpoint.load(other, saved)
        for decay in (main, *extra):
            before = dict(engine.ema_state(decay))
            assert all(torch.equal(tensor, before[name]) for name, tensor in other.ema_state(decay))
    new = engine_at(0, ema_decay=0.7)  # was kept by nobody: the main one goes on by it
    checkpoint.load(new, saved)
    assert all(torch.equal(tensor, dict(engine.ema_state())[name]) for name, tensor in new.ema_state())


def test_several_averages_are_kept_at_once(tmp_path):
    engine, alone = engine_at(4, ema_decays=[0.5, 0.99]), engine_at(4, ema_decay=0.5, ema_decays=[])
    saved = checkpoint.save(engine, tmp_path, {})
    assert checkpoint.ema_decays(checkpoint.read_state(saved)) == [0.8, 0.5, 0.99]
    kept = load_file(saved / "ema_0.5.safetensors")
    for name, tensor in alone.ema_state():
        assert torch.equal(kept[name], tensor), name
    assert not torch.equal(kept["first.weight"], load_file(saved / "ema_0.99.safetensors")["first.weight"])
    fewer = engine_at(0, ema_decays=[])
    checkpoint.load(fewer, saved)
    advance(fewer, 1)
    with pytest.raises(UserError, match="no EMA of decay 0.9, which optimizer.ema_decays asks for"):
        checkpoint.load(engine_at(0, ema_decays=[0.9]), saved)
    (saved / "ema_0.99.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"ema_0.99.safetensors is truncated"):
        checkpoint.load(fewer, saved)


def test_a_save_changes_nothing(tmp_path):
    saving, silent = engine_at(3), engine_at(3)
    checkpoint.save(saving, tmp_path, {})
    assert_identical(saving, silent)


def test_files_are_plain_tensors_under_their_own_names(tmp_path):
    engine = engine_at(2)
    saved = checkpoint.save(engine, tmp_path, {})
    assert saved == tmp_path / "checkpoints" / "step_00000002"
    assert sorted(path.name for path in saved.iterdir()) == sorted([*FILES, "state.json"])
    weights = load_file(saved / "model.safetensors")
    assert set(weights) == set(engine.model.state_dict())
    toy_model().load_state_dict(load_file(saved / "ema.safetensors"))
    moments = load_file(saved / "optimizer.safetensors")
    assert moments["momentum_buffer/second.weight"].shape == (11, 11) and "exp_avg/second.bias" in moments
    state = json.loads((saved / "state.json").read_text())
    assert state["step"] == 2 and state["config"]["optimizer"]["lr"] == 0.02 and state["versions"]["torch"]
    assert state["parameters"]["second.weight"] == [11, 11]


def test_the_newest_are_kept(tmp_path):
    assert checkpoint.latest(tmp_path) is None and latest_step(tmp_path) is None
    engine = engine_at(0, keep=2)
    for _ in range(4):
        advance(engine, 1)
        checkpoint.save(engine, tmp_path, {})
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000003", "step_00000004"]
    assert latest_step(tmp_path) == 4


def test_an_old_checkpoint_that_is_still_read_on_nfs_does_not_stop_the_run(tmp_path, monkeypatch):
    def held(*_, **__):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))  # of the name that NFS gave what is open

    engine = engine_at(0, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", held)
        for _ in range(3):
            advance(engine, 1)
            checkpoint.save(engine, tmp_path, {})
        assert latest_step(tmp_path) == 3 and len(os.listdir(tmp_path / "checkpoints")) == 3
    advance(engine, 1)
    checkpoint.save(engine, tmp_path, {})
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000004"]


@pytest.mark.parametrize("number, refused", [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_flushes_no_folders_takes_checkpoints(tmp_path, monkeypatch, number, refused):
    flush = os.fsync

    def files_alone(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    with pytest.raises(UserError, match="Input/output error") if refused else contextlib.nullcontext():
        checkpoint.load(engine_at(0), checkpoint.save(engine_at(1), tmp_path, {}))


def test_the_same_step_can_be_saved_again(tmp_path):
    engine = engine_at(1)
    checkpoint.save(engine, tmp_path, {"try": 1})
    saved = checkpoint.save(engine, tmp_path, {"try": 2})
    assert os.listdir(tmp_path / "checkpoints") == [saved.name]
    assert checkpoint.load(engine, saved) == {"try": 2}


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("again", [False, True], ids=["next-step", "same-step"])
def test_a_kill_in_mid_save_leaves_a_whole_checkpoint(tmp_path, again):
    """kill -9 at each flush to disk and each rename of a save, in a forked process."""
    first, second = engine_at(1), engine_at(1 if again else 2)
    for point in itertools.count():
        folder = tmp_path / str(point)
        checkpoint.save(first, folder, {"saved": "before"})
        killed = killed_save(second, folder, point)
        restored = engine_at(0)
        kept = checkpoint.load(restored, checkpoint.latest(folder))
        assert_identical(restored, first if kept == {"saved": "before"} else second)
        # Once the new folder has its name it counts, whether or not the former one is still there.
        assert (kept == {"saved": "after"}) == (len(whole_folders(folder)) == 2 or not killed)
        saved = checkpoint.save(second, folder, {})
        assert checkpoint.latest(folder) == saved
        assert [name for name in os.listdir(folder / "checkpoints") if name.startswith(".") or "old" in name] == []
        if not killed:
            break
    assert point == len(FILES) + 4 + again  # flushes of the files, state.json and both folders, and the renames


def killed_save(engine: Engine, folder: Path, point: int) -> bool:
    """Save in a forked process that is killed at its flush or rename of this number; False where it has fewer."""
    child = os.fork()
    if child == 0:
        calls = itertools.count()

        def deadly(original):
            def call(*args, **kwargs):
                if next(calls) == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return call

        os.fsync, Path.replace = deadly(os.fsync), deadly(Path.replace)
        with contextlib.suppress(BaseException):
            checkpoint.save(engine, folder, {"saved": "after"})
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def whole_folders(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder / "checkpoints") if not name.startswith(".")]


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """The kernel refuses to let a file grow further, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 2200], ids=["first-file", "later-file"])
def test_a_full_disk_is_one_clear_error_and_the_last_checkpoint_stays(tmp_path, size):
    engine = engine_at(1)
    saved = checkpoint.save(engine, tmp_path, {})
    sizes = [(saved / name).stat().st_size for name in FILES]
    assert max(sizes) > size and (size == 100 or sizes[0] > size), "the limit must bite"
    advance(engine, 1)
    with files_limited_to(size), pytest.raises(UserError, match=f"cannot write .*step_00000002.*whole one is {saved}"):
        checkpoint.save(engine, tmp_path, {})
    assert os.listdir(tmp_path / "checkpoints") == [saved.name]
    checkpoint.load(engine_at(0), saved)


def test_an_unwritable_folder_is_one_clear_error(tmp_path):
    (tmp_path / "run").write_text("a file where the run folder should be")
    with pytest.raises(UserError, match="cannot write checkpoint .*the last whole one is none"):
        checkpoint.save(engine_at(1), tmp_path / "run", {})


@pytest.fixture
def two_saved(tmp_path) -> Path:
    """A run with checkpoints of steps 1 and 2; the test breaks the newer one."""
    engine = engine_at(1)
    checkpoint.save(engine, tmp_path, {})
    advance(engine, 1)
    return checkpoint.save(engine, tmp_path, {})


def forge(path: Path, content: bytes) -> None:
    """Replace a file and its recorded size: what a hostile writer would do."""
    path.write_bytes(content)
    state = path.parent / "state.json"
    recorded = json.loads(state.read_text())
    recorded["files"][path.name] = len(content)
    state.write_text(json.dumps(recorded))


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "missing", "pickle", "huge-header", "other-tensors"])
def test_damaged_tensors_are_refused_and_the_older_checkpoint_named(two_saved, monkeypatch, name, damage):
    monkeypatch.chdir(two_saved.parent)
    path = two_saved / name
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "missing":
        path.unlink()
    elif damage == "pickle":
        forge(path, pickle.dumps(Bomb()))
    elif damage == "huge-header":
        forge(path, (2**62).to_bytes(8, "little") + b"{}")
    else:
        save_file({"other": torch.zeros(2)}, path)
        forge(path, path.read_bytes())
    engine = engine_at(0)
    before = everything(engine)
    with pytest.raises(UserError, match=rf"{name}.*step_00000001 is whole"):
        checkpoint.load(engine, two_saved)
    after = everything(engine)
    assert all(torch.equal(before[key], after[key]) for key in before), "a refused load must change nothing"
    assert not (two_saved.parent / "exploded").exists()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"format": 99}', '{"format": 1}', "[" * 100_000, "\x00\xff", '{"format": 1, "step": "2"}'],
    ids=range(9),
)
def test_a_broken_state_file_is_refused(two_saved, content):
    (two_saved / "state.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"state.json.*step_00000001 is whole"):
        checkpoint.load(engine_at(0), two_saved)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="state.json cannot be read"):
        checkpoint.load(engine_at(0), tmp_path / "nowhere")


def test_a_checkpoint_of_another_model_names_what_differs(tmp_path):
    saved = checkpoint.save(engine_at(1), tmp_path, {})
    with pytest.raises(UserError, match="another model.*of another shape .*first.weight"):
        checkpoint.load(engine_at(0, width=13), saved)
    other = engine_at(0, width=13)
    model = other.config.model.model_copy(update={"width": 1024})
    other.config = other.config.model_copy(update={"model": model})
    with pytest.raises(UserError, match="model.width is 1024, there 768"):
        checkpoint.load(other, saved)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    saved = checkpoint.save(engine_at(1), tmp_path, {})
    with pytest.raises(UserError, match="optimizer.kind is 'adamw', there 'muon'"):
        checkpoint.load(engine_at(0, kind="adamw"), saved)


def test_leftovers_do_not_count_as_checkpoints(two_saved):
    shutil.copytree(two_saved, two_saved.with_name(".step_00000009.tmp"))
    (two_saved.parent / "step_final").mkdir()
    (two_saved.parent / "step_00000010").write_text("a file")
    assert checkpoint.latest(two_saved.parent.parent) == two_saved

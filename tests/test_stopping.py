"""Signals that stop a run: which count, what they break off, and that a resumed run makes up for it."""

import contextlib
import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from engine_toy import toy_config, toy_model, toy_step
from ranks import ALONE
from runs import config, image_tree, latest_step

from unite_fast.engine import checkpoint, stopping
from unite_fast.engine.engine import Engine
from unite_fast.engine.loop import train
from unite_fast.engine.report import Report
from unite_fast.engine.stopping import Interrupted, StopSignals
from unite_fast.engine.world import World
from unite_fast.records import METRICS, read_lines


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_what_a_launcher_repeats_is_no_impatience(monkeypatch):
    with StopSignals(ALONE) as stop:
        assert not stop.told()
        send(signal.SIGINT)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            send(number)
        assert stop.told() and stop.told_now() and stop.received == signal.SIGINT
        monkeypatch.setattr(stopping, "IMPATIENT_SECONDS", 0.0)
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_saved_is_left_at_once(number):
    before = signal.getsignal(number)
    with StopSignals(ALONE) as stop:
        with pytest.raises(Interrupted), stop.at_once():
            send(number)
            pytest.fail("nothing interrupted this")
        with pytest.raises(Interrupted), stop.at_once():
            pytest.fail("the signal came before")
        send(signal.SIGTERM)
    assert signal.getsignal(number) is before


def test_what_another_rank_was_told_counts():
    """Also right before an evaluation, which the others would begin without it."""
    flags = []
    with StopSignals(SimpleNamespace(size=2, device=ALONE.device, all_true=lambda flag: flags.append(flag))) as stop:
        assert stop.told() and stop.told_now() and stop.received is None
        with pytest.raises(Interrupted), stop.at_once():
            pytest.fail("another rank will not come here")
    assert flags == [True, True, True]


def test_votes_among_gpus_are_cast_beside_the_stream_of_the_step(monkeypatch):
    """On it they would make the next forward wait for every collective that was asked for before."""
    streams = ["of the step"]
    votes = []

    @contextlib.contextmanager
    def on(stream):
        streams.append(stream)
        yield
        streams.pop()

    def vote(tensor, op):
        votes.append((streams[-1], op))
        tensor.fill_(len(votes) > 1)  # another rank is told to stop before the second step

    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    for owner, name, value in (
        (torch.cuda, "stream", on), (torch.cuda, "Stream", lambda device: "beside"),
        (torch.cuda, "Event", lambda: event),
        (torch.Tensor, "pin_memory", torch.Tensor.clone), (torch.Tensor, "to", lambda x, *_, **__: x.clone()),
        (dist, "all_reduce", vote),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, value)
    stop = StopSignals(World(0, 2, 0, torch.device("cuda", 0)))
    assert [stop.told() for _ in range(3)] == [False, False, True], "each hears what was asked a step ago"
    assert votes == 3 * [("beside", dist.ReduceOp.MAX)]


@pytest.mark.parametrize("what", ["pictures", "measure"])
def test_a_stop_breaks_off_pictures_and_metrics_which_resuming_makes(tmp_path, monkeypatch, capsys, what):
    image_tree(tmp_path / "train")
    evaluation = {"every": 4, "sheet_columns": 2, "metrics_epochs": 4 * 5 / 24}
    settings = config(tmp_path, train={"steps": 8, "checkpoint_every": 100, "log_every": 100}, evaluation=evaluation)
    made = getattr(Report, what)

    def interrupted(self, step):
        send(signal.SIGTERM)
        return made(self, step)

    monkeypatch.setattr(Report, what, interrupted)
    run = train(settings)
    assert "stopped by SIGTERM at step 4 of 8, saved" in "".join(capsys.readouterr())
    assert latest_step(run) == 4 and not list(run.glob("evaluations/step_00000004-*"))
    assert (run / "samples_00000004.png").exists() == (what == "measure")
    drawn = (run / "samples_00000004.png").stat().st_mtime_ns if what == "measure" else None
    monkeypatch.setattr(Report, what, made)
    train(settings, resume=True)
    assert len(list(run.glob("evaluations/step_00000004-*.json"))) == 1
    assert drawn in (None, (run / "samples_00000004.png").stat().st_mtime_ns), "what is there is not drawn again"
    assert [record["step"] for record in read_lines(run / METRICS)] == [1, 4, 5, 8]


def test_an_error_within_an_evaluation_is_followed_by_nothing_collective(monkeypatch):
    """The other ranks are elsewhere: what all must call together would wait for them, and not end."""
    engine = Engine(toy_model(), toy_config(), ALONE, steps_per_epoch=10)
    toy_step(engine, 0)
    weights, published = dict(engine.model_state()), []
    monkeypatch.setattr(engine.backend, "publish", lambda: published.append(engine.model.training))
    with pytest.raises(Interrupted), engine.ema_weights():
        raise Interrupted
    assert published == [True] and engine.model.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in engine.model_state())
    with engine.ema_weights():
        pass
    assert len(published) == 3


def test_a_stop_behind_a_save_does_not_ask_the_folder_whether_to_save(tmp_path, monkeypatch):
    """Nodes of a network folder may see different checkpoints in it, and saving takes all ranks."""
    image_tree(tmp_path / "train")
    save, saved = checkpoint.save, []

    def signalled(engine, folder, extra):
        saved.append(engine.step_count)
        send(signal.SIGTERM)
        return save(engine, folder, extra)

    monkeypatch.setattr(checkpoint, "save", signalled)
    monkeypatch.setattr(checkpoint, "latest", lambda folder: None)
    train(config(tmp_path, train={"steps": 8, "checkpoint_every": 4}))
    assert saved == [4]


def test_another_batch_goes_on_at_the_same_epoch(tmp_path, capsys):
    """24 images: 2 epochs of steps of 4, and then of steps of 8, are 18 steps and not 12."""
    image_tree(tmp_path / "train")
    schedule = {"cosine_until_epoch": 4.0, "final_ratio": 0.0}
    settings = {"log_every": 1, "checkpoint_every": 1, "steps": None, "global_batch": None, "accumulation": 1}
    run = train(config(tmp_path, train=settings | {"epochs": 2, "micro_batch": 4}, optimizer=schedule))
    assert latest_step(run) == 12
    capsys.readouterr()
    train(config(tmp_path, train=settings | {"epochs": 4, "micro_batch": 8}, optimizer=schedule), resume=True)
    said = " ".join("".join(capsys.readouterr()).split())
    assert "continuing after step 12: 48 images, epoch 2.00" in said
    assert "changed since the checkpoint: train.epochs 4.0 (was 2.0), train.micro_batch 8 (was 4)" in said
    records = read_lines(run / METRICS)
    assert [record["images"] for record in records[10:14]] == [44, 48, 56, 64]
    assert [record["epoch"] for record in records[10:14]] == pytest.approx([11 / 6, 2, 7 / 3, 8 / 3])
    lrs = [record["lr"] for record in records]
    assert len(lrs) == 18 and lrs == sorted(lrs, reverse=True) and 0 < lrs[-1] < 0.1 * lrs[0]
    state = json.loads((kept := run / "checkpoints" / "step_00000018" / "state.json").read_text())
    del state["config"]["train"]["compile"]  # as from a version without it
    kept.write_text(json.dumps(state))
    resumed_again = train(config(tmp_path, train=settings | {"epochs": 4, "micro_batch": 4}), resume=True)
    assert "compile" not in "".join(capsys.readouterr())
    assert read_lines(resumed_again / METRICS)[-1]["images"] == 96


def test_resuming_what_never_began_says_so(tmp_path, capsys):
    image_tree(tmp_path / "train")
    train(config(tmp_path, train={"steps": 1}), resume=True)
    assert f"no checkpoint in {tmp_path}" in "".join(capsys.readouterr())

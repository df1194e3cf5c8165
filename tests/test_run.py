"""Whole runs on a handful of images: what they leave behind, exact resume, clean stops, clear failures."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from unittest.mock import MagicMock, Mock

import pytest
import torch
from kernel_testing import on_backend
from runs import config, config_file, image_tree, latest_step
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import unite_kernels
from unite_fast import load
from unite_fast.engine import checkpoint, report
from unite_fast.engine.loop import Run, train
from unite_fast.engine.monitor import Records
from unite_fast.engine.world import init_world
from unite_fast.errors import UserError
from unite_fast.evaluation.generation import draw
from unite_fast.objective.two_pass import StepLosses
from unite_fast.records import SESSIONS, open_run, read_lines

SCRIPT = Path(__file__).resolve().parents[1] / "unite_fast" / "train.py"


@pytest.fixture()
def folder(tmp_path):
    image_tree(tmp_path / "train")
    image_tree(tmp_path / "val", per_class=8)
    return tmp_path


def tensors(step_folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}:{key}": value
        for name in ("model", "ema", "optimizer")
        for key, value in load_file(step_folder / f"{name}.safetensors").items()
    }


def test_a_run_leaves_everything_behind(folder):
    run = train(config(folder, evaluation={"every": 10, "sheet_columns": 2}, data={"val_path": str(folder / "val")}))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 5, 10, 15, 20]
    assert records[-1]["epoch"] == pytest.approx(20 * 5 / 24) and records[-1]["images"] == 100
    for name in (
        "samples.png", "reconstructions.png", "curves.png", "samples_00000010.png", "reconstructions_00000010.png",
        "config.json", "export/model.safetensors", "export/model.json",
    ):  # fmt: skip
        assert (run / name).stat().st_size > 100, name
    summary = json.loads((run / "summary.json").read_text())
    assert summary["images_reconstructed"] == 16 and summary["steps"] == 20 and summary["psnr"] > 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss_flow")] == [1, 5, 10, 15, 20]
    ema = load_file(run / "checkpoints" / "step_00000020" / "ema.safetensors")
    for name, tensor in load(run).state_dict().items():
        assert torch.equal(tensor, ema[name]), name


def test_reconstructions_of_training_images_say_so(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(report, "reconstruction_sheet", sheet := Mock(wraps=report.reconstruction_sheet))
    run = train(config(folder, train={"steps": 2}))
    told, page = capsys.readouterr().out, (run / "report.html").read_text()
    assert "training images above their reconstructions: data.val_path names no" in told
    assert "held-out originals" not in told
    summary = json.loads((run / "summary.json").read_text())
    assert summary["reconstructed"] == "training images: data.val_path names no held-out ones"
    protocol = json.loads(next((run / "evaluations").glob("*.json")).read_text())["protocol"]
    assert protocol["held_out"]["training_images"] and protocol["warnings"][0].startswith("psnr, ssim, l1: on training")
    assert "Training images above their reconstructions" in page and "psnr, ssim, l1: on training images" in page
    assert "at the end of training" not in page and "held-out reconstructions" not in page

    own = train(config(folder, name="own", train={"steps": 2}, data={"val_path": str(folder / "val")}))
    assert "held-out originals above their reconstructions" in capsys.readouterr().out
    assert "reconstructed" not in json.loads((own / "summary.json").read_text())
    assert "raining images above" not in (own / "report.html").read_text()
    protocol = json.loads(next((own / "evaluations").glob("*.json")).read_text())["protocol"]
    assert "training_images" not in protocol["held_out"] and not protocol["warnings"]
    assert [call.kwargs["label"] for call in sheet.call_args_list] == ["training image", "original"]


def test_sheets_show_the_averaged_weights_under_the_configured_sampling(folder, monkeypatch):
    """The images of one seed, whatever the batch that draws them; on the way and at the end."""
    monkeypatch.setattr(report, "sample_sheet", sheet := Mock(wraps=report.sample_sheet))
    settings = config(
        folder, train={"steps": 6}, optimizer={"lr": 0.03}, objective={"time_shift": 0.9},
        evaluation={"every": 3, "batch": 3, "sheet_columns": 2},
    )  # fmt: skip
    run = train(settings)
    model, labels = load(run), torch.tensor([0, 0, 1, 1])
    sampling = settings.sampling.model_dump() | {"time_shift": 0.9}
    assert len(sheet.call_args_list) == 2
    for step, call in zip((3, 6), sheet.call_args_list):
        model.load_state_dict(load_file(run / "checkpoints" / f"step_{step:08d}" / "ema.safetensors"))
        expected = draw(model, labels, sampling, seed=0, first=0)
        torch.testing.assert_close(call.args[0], expected, rtol=0, atol=1e-5)
        assert min(torch.dist(a, b) for a, b in combinations(expected, 2)) > 1e-2


def test_bf16_autocast_keeps_float32_masters_and_trains(folder):
    run = train(config(folder, train={"steps": 3, "precision": "bf16"}))
    saved = tensors(checkpoint.latest(run))
    assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in saved.values())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert 0 < records[-1]["loss_l1"] < 1 and records[-1]["images_per_second"] > 0


def test_the_loss_falls(folder):
    run = train(config(folder, train={"steps": 120, "global_batch": 12}, optimizer={"lr": 3e-3}))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["loss_l1"] < 0.6 * records[0]["loss_l1"]


def test_every_micro_batch_of_a_run_has_draws_of_its_own(folder, monkeypatch):
    """Of each step, rank and seed; the losses on record are the means over them."""
    noises, lasts, one = [], [], torch.tensor(1.0)

    def step(engine, objective, data, labels, draws, *, shape, weight, last):
        noises.append(draws.tokenize(shape).noise)
        lasts.append(last)
        return StepLosses(one, {"l1": one}, one, torch.zeros(shape), None)

    monkeypatch.setattr("unite_fast.engine.loop.two_pass_step", step)
    for seed in (0, 1):
        settings = config(folder, name=f"seed{seed}", train={"global_batch": 6, "accumulation": 2, "seed": seed})
        run = Run(settings, init_world(settings), resume=False)
        for rank in (0, 1):
            run.world = replace(run.world, rank=rank)
            for run.engine.step_count in (0, 1):
                losses = run._micro_batches(MagicMock())
                assert (losses.total, losses.terms["l1"], losses.flow) == (1, 1, 1)
        run.stream.close()
    assert len(noises) == 2 * 2 * 2 * 2
    assert lasts == 2 * 2 * 2 * [False, True], "ranks communicate once a step"
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == len(noises)


def test_a_run_computes_with_the_kernels_that_it_names(folder):
    with on_backend("auto"):
        for name in ("torch", "auto"):
            settings = config(folder, name=name, train={"kernels": name})
            Run(settings, init_world(settings), resume=False).stream.close()
            assert unite_kernels.get_backend() == name


# 24 images and a batch of 5: step 10 lies in the middle of an epoch.
@pytest.mark.parametrize(
    "options", [{}, {"train": {"global_batch": 6, "accumulation": 2}}, {"optimizer": {"kind": "adamw"}}]
)
def test_resume_is_exact_to_the_bit(folder, options):
    def run(name, steps, resume=False):
        sections = {key: dict(value) for key, value in options.items()}
        sections["train"] = {**sections.get("train", {}), "steps": steps}
        return train(config(folder, **sections, name=name), resume=resume)

    through = run("through", 20) / "checkpoints" / "step_00000020"
    run("halves", 10)
    halves = run("halves", 20, resume=True) / "checkpoints" / "step_00000020"
    whole, resumed = tensors(through), tensors(halves)
    assert set(whole) == set(resumed)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    records = [json.loads(line) for line in (halves.parents[1] / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 5, 10, 11, 15, 20]
    sessions = read_lines(halves.parents[1] / SESSIONS)
    assert [session["first_step"] for session in sessions] == [0, 10]
    assert all(session["micro_batch"] * session["accumulation"] == session["global_batch"] for session in sessions)


def test_tensorboard_keeps_what_was_written_at_the_step_that_a_run_continues_from(folder):
    logs = {"evaluation": {"metrics_epochs": 0.01}, "train": {"steps": 3, "log_every": 1, "checkpoint_every": 2}}
    run = train(config(folder, **logs))
    (run / "checkpoints" / "step_00000003").rename(run / "checkpoints" / "gone")
    train(config(folder, **logs), resume=True)
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3]
    assert [event.step for event in board.Scalars("evaluation/psnr")] == [1, 2]


def test_a_run_that_is_further_than_its_configuration_is_not_said_to_be_at_its_end(folder, capsys):
    data = {"val_path": str(folder / "val")}
    run = train(config(folder, train={"steps": 6}, data=data))
    capsys.readouterr()
    train(config(folder, train={"steps": 2}, data=data), resume=True)
    assert "more than the 2 steps" in "".join(capsys.readouterr())
    assert json.loads((run / "summary.json").read_text())["steps"] == 6
    assert json.loads((run / "export" / "model.json").read_text())["made_by"]["step"] == 6
    assert latest_step(run) == 6 and not list(run.glob("evaluations/*00000002*"))


def test_an_existing_run_is_not_overwritten(folder):
    train(config(folder, train={"steps": 2}))
    with pytest.raises(UserError, match="already holds a run.*--resume"):
        train(config(folder, train={"steps": 2}))


HOLDER = """
import os, sys, time
from pathlib import Path
from unite_fast.engine.lock import sole_trainer
from unite_fast.engine.world import join_world
with sole_trainer(Path(sys.argv[1]), join_world("cpu")):
    worker = os.fork()  # as a data loader's, which outlives a trainer that was killed
    if worker:
        print(worker, flush=True)
    time.sleep(600)
"""


def test_two_trainers_do_not_share_a_run_folder(folder):
    run = train(config(folder, train={"steps": 10}))
    written = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    try:
        for resume in (True, False):
            with pytest.raises(UserError, match=rf"run is in use by a trainer, process {holder.pid} on .*: wait"):
                train(config(folder), resume=resume)
        assert all(path.stat().st_mtime_ns == at for path, at in written.items())
        holder.kill()
        holder.wait()
        train(config(folder), resume=True)
        assert latest_step(run) == 20
    finally:
        holder.kill()
        os.kill(worker, signal.SIGKILL)
        holder.communicate()


def test_a_run_that_never_began_leaves_no_folder(folder):
    with pytest.raises(UserError):
        train(config(folder, data={"path": str(folder / "nowhere")}))
    assert not (folder / "runs").exists()
    (folder / "runs").mkdir()
    with pytest.raises(UserError):
        train(config(folder, data={"path": str(folder / "nowhere")}))
    assert not list((folder / "runs").iterdir())


def test_a_file_system_without_locks_trains_all_the_same(folder, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", unsupported)
    assert latest_step(train(config(folder, train={"steps": 2}))) == 2


def test_a_disk_full_of_records_is_one_sentence(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.close", full)
    with pytest.raises(UserError, match="cannot write records into .*run: No space left on device.*--resume"):
        train(config(folder))


def test_records_that_cannot_be_written_anew_are_one_sentence(folder):
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / f".metrics.jsonl.{os.getpid()}.tmp").mkdir()
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl: Is a directory"):
        Records(folder, config(folder), first_step=1)


def test_resume_with_another_model_names_what_differs(folder):
    train(config(folder, train={"steps": 2}))
    with pytest.raises(UserError, match="model.depth"):
        train(config(folder, train={"steps": 4}, model={"depth": 3}), resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(folder, monkeypatch):
    run = Run(settings := config(folder, train={"checkpoint_every": 5}), init_world(settings), resume=False)
    healthy = run.engine.step

    def poisoned():
        norm = healthy()
        if run.engine.step_count == 7:
            with torch.no_grad():
                run.engine.model.decoder.pixels.bias.fill_(float("nan"))
        return norm

    monkeypatch.setattr(run.engine, "step", poisoned)
    with pytest.raises(UserError) as caught:
        run.go()
    message = str(caught.value)
    assert "loss_l1" in message and "step_00000005" in message and "loss_flow" not in message.split("became")[0]
    kept = checkpoint.latest(folder / "runs" / "run")
    assert kept.name == "step_00000005"
    assert all(torch.isfinite(tensor).all() for tensor in tensors(kept).values())


def test_a_step_whose_gradients_are_not_finite_is_not_saved(folder, monkeypatch):
    run = Run(settings := config(folder, train={"checkpoint_every": 5}), init_world(settings), resume=False)
    healthy = run.engine.step
    monkeypatch.setattr(run.engine, "step", lambda: healthy() + (math.inf if run.engine.step_count == 10 else 0))
    with pytest.raises(UserError, match="^grad_norm became NaN or infinite .* and 10; the last good .*step_00000005"):
        run.go()
    assert latest_step(folder / "runs" / "run") == 5


def test_a_learning_rate_that_explodes_is_reported_as_such(folder):
    with pytest.raises(UserError, match="became NaN or infinite.*no checkpoint had been saved yet.*optimizer.lr"):
        train(config(folder, optimizer={"lr": 1e30}))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_exit_cleanly(folder, number):
    path = config_file(folder, train={"steps": 100_000, "checkpoint_every": 100_000})
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--config", path],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics = folder / "runs" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(number)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 0, messages
    assert f"stopped by {number.name}" in messages and "Traceback" not in messages
    saved = checkpoint.latest(folder / "runs" / "run")
    assert saved is not None and checkpoint.step_of(saved) > 0
    assert open_run(folder / "runs" / "run").state() == "stopped"
    tensors(saved)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"path": "nowhere"}}, ["nowhere"]),
        ({"model": {"num_classes": 7}}, ["num_classes", "7", "2"]),
        ({"model": {"image_size": 24, "registers": 9}}, ["24", "16"]),
        ({"train": {"kernels": "triton"}}, ["train.kernels", "auto"]),
        ({"train": {"device": "cuda"}}, ["train.device"]),
        ({"train": {"global_batch": 5, "accumulation": 2}}, ["5", "2"]),
        ({"objective": {"lpips": {"weight": 1.0, "vgg": "none.pth"}}}, ["none.pth", "objective.lpips.weight = 0"]),
        ({"data": {"val_path": "missing_val"}}, ["data.val_path: there is no missing_val in /"]),
        ({"data": {"path": "/missing_data"}}, ["data.path: there is no /missing_data: "]),
    ],
)
def test_mistakes_end_in_one_sentence_before_the_first_step(folder, sections, words, monkeypatch):
    monkeypatch.setattr("unite_kernels.dispatch.INTERPRETED", False)
    if torch.cuda.is_available() and "train" in sections:
        pytest.skip("this machine has the device that the mistake is about")
    with pytest.raises(UserError) as caught:
        train(config(folder, **sections))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_run_folder_that_cannot_be_made(folder):
    with pytest.raises(UserError, match="cannot write .*000.png/run: "):
        train(config(folder, runs=str(folder / "train" / "class_0" / "000.png")))


def test_missing_data_are_said_before_memory_is_measured(folder, monkeypatch):
    monkeypatch.setattr("unite_fast.engine.loop.fit", Mock(side_effect=AssertionError("measured")))
    auto = {"steps": 2, "global_batch": 6, "accumulation": None, "micro_batch": "auto"}
    for key in ("path", "val_path"):
        with pytest.raises(UserError, match=f"data.{key}"):
            train(config(folder, train=auto, data={key: str(folder / "missing")}))


def test_a_damaged_checkpoint_is_said_before_memory_is_measured(folder, monkeypatch):
    settings = config(folder, train={"steps": 2})
    (checkpoint.latest(train(settings)) / "ema.safetensors").unlink()
    monkeypatch.setattr("unite_fast.engine.loop.fit", Mock(side_effect=AssertionError("measured")))
    with pytest.raises(UserError, match="ema.safetensors is missing"):
        train(settings, resume=True)


def test_micro_batch_auto_runs(folder):
    """And what was tried changes no number of the run."""
    auto = {"steps": 2, "global_batch": 6, "accumulation": None, "micro_batch": "auto"}
    run = train(config(folder, train=auto))
    assert latest_step(run) == 2
    found, given = tensors(checkpoint.latest(run)), train(config(folder, name="given", train=auto | {"micro_batch": 6}))
    expected = tensors(checkpoint.latest(given))
    assert all(torch.equal(found[name], expected[name]) for name in found | expected)


def test_seconds_of_training_are_those_of_all_sessions(folder):
    run = train(config(folder, train={"steps": 1}))
    file = checkpoint.latest(run) / "state.json"
    state = json.loads(file.read_text())
    assert 0 < state["extra"]["training_seconds"] < 1000
    state["extra"]["training_seconds"] = 5000.0
    file.write_text(json.dumps(state))
    train(config(folder, train={"steps": 2}), resume=True)
    summary = json.loads((run / "summary.json").read_text())["training_seconds"]
    kept = checkpoint.read_state(checkpoint.latest(run))["extra"]["training_seconds"]
    assert 5000 < kept < 6000 and summary == pytest.approx(kept, abs=0.1)


def test_memory_that_ends_while_training_is_one_message(folder, monkeypatch):
    def step(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total of")

    monkeypatch.setattr("unite_fast.engine.loop.two_pass_step", step)
    says = r"memory ran out \(CUDA out of memory. Tried to allocate 2.00 GiB.\): set train"
    with pytest.raises(UserError, match=says):
        train(config(folder))

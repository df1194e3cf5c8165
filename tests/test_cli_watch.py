"""`unite-fast watch`: what it shows of runs in every state, and that it follows a run until its end."""

import contextlib
import importlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
from cli_toy import mistake, run
from rich.console import Console

from unite_fast.cli.watch import BARS, RECENT, seconds_a_step, sparkline, warnings
from unite_fast.records import RunFolder, open_run

watch = importlib.import_module("unite_fast.cli.watch")  # unite_fast.cli names the command so
START = [sys.executable, "-c", "import sys; from unite_fast.cli import main; sys.exit(main())"]


def record(step, **values):
    return {
        "step": step, "epoch": step / 10, "images": step * 8, "loss": 3.0 / step, "loss_l1": 0.5 / step,
        "loss_flow": 0.0 if step == 1 else 1.0, "grad_norm": 2.0, "lr": 1e-3, "z0_std": 0.4, "z0_rank": 3.0,
        "images_per_second": 80.0, "data_wait": 0.01, "time": time.time() - 2 * (100 - step),
    } | values  # fmt: skip


def folder_of(path, records, train=None, tail=""):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"name": "toy [b]", "train": train or {"steps": 100}}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in records) + tail)
    return path


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def shown(capsys, folder):
    assert run("watch", folder, "--once") == 0
    return capsys.readouterr().out


def test_a_run_in_training(tmp_path, capsys):
    folder = folder_of(tmp_path / "run", [record(step) for step in range(1, 61)], tail='{"step": 61, "lo')
    text = shown(capsys, folder)
    assert "toy [b]" in text and "training" in text and "step 60 of 100, epoch 6.0" in text and "60 %" in text
    # 2 s a step and 40 steps to go, less the 80 s since the newest record.
    left = re.search(r"about (.+) left", text).group(1)
    assert left == "0 s"
    assert "images/s" in text and "80" in text and "1.0 %" in text
    row = next(line for line in text.splitlines() if " L1 " in line)
    bars = "".join(character for character in row if character in BARS)
    assert len(bars) == 40 and bars[0] == BARS[-1] and bars[-1] == BARS[0]
    assert "!" not in text


def test_time_left(tmp_path, capsys):
    now = time.time()
    records = [record(step, time=now - 10 * (60 - step)) for step in range(1, 61)]
    text = shown(capsys, folder_of(tmp_path / "run", records, train={"epochs": 20}))
    assert "step 60 of 200" in text and "30 %" in text  # an epoch is ten steps
    assert re.search(r"about 23 min \d+ s left", text)


def test_the_pace_is_that_of_the_newest_session(tmp_path):
    old = [record(step, time=step * 100.0) for step in range(1, 31)]
    new = [record(step, time=9000.0 + step * 2) for step in range(31, 36)]
    state = RunFolder(tmp_path, {"train": {"steps": 100}}, old + new, [{"first_step": 0}, {"first_step": 30}])
    assert seconds_a_step(state) == pytest.approx(2)
    assert seconds_a_step(RunFolder(tmp_path, {}, old[:1])) is None
    assert seconds_a_step(RunFolder(tmp_path, {}, [record(1, time=5.0), record(2, time=5.0)])) is None


def test_a_resumed_run_that_repeats_steps(tmp_path, capsys):
    records = [record(step) for step in (10, 20, 30, 20, 30, 40)]
    assert "step 40 of 100" in shown(capsys, folder_of(tmp_path / "run", records))


def test_losses_and_rates_of_another_modality(tmp_path, capsys):
    entries = [
        {"step": step, "loss": 2.0, "loss_element": 0.5, "molecules_per_second": 640.0, "time": time.time()}
        for step in (1, 2)
    ]
    text = shown(capsys, folder_of(tmp_path / "run", entries))
    assert "  element" in text and "molecules/s" in text and "640" in text and "images/s" not in text


def test_a_run_before_its_first_record(tmp_path, capsys):
    folder = folder_of(tmp_path / "run", [])
    (folder / "metrics.jsonl").unlink()
    text = shown(capsys, folder)
    assert "starting" in text and "no record yet" in text


def test_finished_and_stopped(tmp_path, capsys):
    folder = folder_of(tmp_path / "a", [record(step) for step in (1, 100)])
    (folder / "summary.json").write_text('{"steps": 100}')
    text = shown(capsys, folder)
    assert "finished" in text and "!" not in text
    old = [record(step, time=step * 10.0) for step in (1, 2, 3)]
    text = shown(capsys, folder_of(tmp_path / "b", old))
    assert "stopped" in text and "the run has ended early; --resume continues it" in text and " left" not in text


def test_a_run_whose_trainer_has_ended_is_stopped_at_once(tmp_path, capsys):
    folder = folder_of(tmp_path / "run", [record(step) for step in range(1, 61)])
    (folder / ".lock").write_text("process 1 on here\n")
    assert "training" in shown(capsys, folder)
    (folder / ".lock").write_text("")
    text = shown(capsys, folder)
    assert "stopped" in text and "the run has ended early" in text and " left" not in text


def test_after_the_last_step_a_run_evaluates_until_its_summary_is_there(tmp_path, capsys):
    folder = folder_of(tmp_path / "run", [record(50), record(100, time=time.time() - 7200)])
    (folder / ".lock").write_text("process 1 on here\n")
    text = shown(capsys, folder)
    assert "evaluating" in text and "the last step was taken 2 h ago" in text and "finished" not in text
    (folder / "summary.json").write_text('{"steps": 50}')  # of a run that ended, and was continued with more steps
    assert "evaluating" in shown(capsys, folder)
    (folder / ".lock").write_text("")
    assert "stopped" in shown(capsys, folder)
    (folder / ".lock").unlink()
    assert "stopped" in shown(capsys, folder)
    (folder / "summary.json").write_text('{"steps": 100}')
    assert "finished" in shown(capsys, folder)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"loss": float("nan")}, "loss not finite at step 400"),
        ({"z0_std": 0.001}, "latents collapse"),
        ({"data_wait": 0.4}, "40 % of the time goes into waiting for data"),
        ({"images_per_second": 30.0}, "slower than before: 30 images/s, 80"),
        ({}, ""),
    ],
)
def test_warnings(values, says, tmp_path):
    steps = range(5, 405, 5)
    records = [record(step, **(values if step > 400 - 5 * RECENT else {})) for step in steps]
    state = RunFolder(tmp_path, {"train": {"steps": 1000}}, records)
    found = warnings(state, "training", time.time())
    assert len(found) == bool(says) and says in "".join(found)


def test_the_speed_is_compared_with_that_before(tmp_path):
    """Not with a median that the slow records are in; and not before there are enough to compare with."""
    for count, says in ((3 * RECENT, 1), (3 * RECENT - 1, 0)):
        speeds = [80.0] * (RECENT + 1) + [30.0] * (count - RECENT - 1)
        records = [record(step, images_per_second=speed) for step, speed in enumerate(speeds, start=1)]
        state = RunFolder(tmp_path, {"train": {"steps": 1000}}, records)
        assert len(warnings(state, "training", time.time())) == says


def test_sparklines():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 40, log=False) == BARS
    assert sparkline([10.0**k for k in range(8)], 40, log=True) == BARS
    assert sparkline([5, 5, 5], 40, log=True) == BARS[3] * 3
    assert sparkline([0.0, 1.0, 100.0], 40, log=True) == BARS[0] + BARS[0] + BARS[-1]
    assert sparkline([0.0], 40, log=True) == BARS[0]
    assert len(sparkline(range(1000), 40, log=False)) == 40


def test_it_looks_as_often_as_asked(tmp_path, monkeypatch):
    folder, slept = folder_of(tmp_path / "run", [record(1), record(100)]), []

    def sleep(seconds):
        slept.append(seconds)
        (folder / "summary.json").write_text('{"steps": 100}')

    monkeypatch.setattr(watch, "out", lambda: Console(file=io.StringIO(), force_terminal=True))
    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert run("watch", folder, "--every", 7) == 0 and slept == [7]


def test_a_wait_without_end_is_one_sentence(tmp_path, capsys):
    """The longest that the system can sleep is less than infinity."""
    assert "--every" in mistake(capsys, "watch", folder_of(tmp_path / "run", [record(1)]), "--every", "inf")


def test_wrong_folders_are_one_sentence(tmp_path, capsys):
    assert mistake(capsys, "watch", tmp_path / "no", "--once") == f"no folder {tmp_path / 'no'}"
    assert "holds no run" in mistake(capsys, "watch", tmp_path)
    file = tmp_path / "config.json"
    for key, content, what in (("train", "3", "an object"), ("model", "[]", "an object"), ("modality", "[]", "text")):
        file.write_text(f'{{"{key}": {content}}}')
        assert mistake(capsys, "watch", tmp_path) == f"{file} is not a run's configuration: its {key} must be {what}"


def test_looking_does_not_wait_for_torch(tmp_path):
    folder_of(tmp_path / "run", [record(1)])
    code = (
        "import sys; from unite_fast.cli import main\n"
        f"assert main(['watch', {str(tmp_path / 'run')!r}, '--once']) == 0 and 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0


def _live(folder):
    """`watch` on a terminal of its own: the process and the terminal's other end."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*START, "watch", str(folder), "--every", "0.2"], stdin=theirs, stdout=theirs, stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(theirs)
    return process, ours


def _read_until(terminal, text, seconds=60):
    seen, deadline = "", time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < deadline, seen
        try:
            seen += os.read(terminal, 65536).decode(errors="replace")
        except OSError:  # the other end is closed
            break
    assert text in seen, seen
    return seen


def test_it_follows_a_run_to_its_end(tmp_path):
    folder = folder_of(tmp_path / "run", [record(1), record(50)])
    (folder / ".lock").write_text("process 1 on here\n")
    process, terminal = _live(folder)
    _read_until(terminal, "step 50 of 100")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record(75))[:40])
    time.sleep(0.3)
    assert process.poll() is None
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record(75))[40:] + "\n")
    _read_until(terminal, "step 75 of 100")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record(100)) + "\n")
    _read_until(terminal, "evaluating")
    assert process.poll() is None
    (folder / "summary.json").write_text('{"steps": 100}')
    _read_until(terminal, "finished")
    assert process.wait(60) == 0
    os.close(terminal)
    assert open_run(folder).step == 100


def test_ctrl_c_ends_it_quietly(tmp_path):
    process, terminal = _live(folder_of(tmp_path / "run", [record(1), record(50)]))
    _read_until(terminal, "step 50 of 100")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    rest = ""
    with contextlib.suppress(OSError):  # raised once everything is read and the other end is closed
        while piece := os.read(terminal, 65536):
            rest += piece.decode(errors="replace")
    assert "Traceback" not in rest and "error" not in rest
    os.close(terminal)

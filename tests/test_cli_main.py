"""The command line as such: help, mistakes in one line, interruption, training."""

import json
import os
import platform
import signal
import subprocess
import sys

import pytest
from cli_toy import mistake, run, save_toy
from data_trees import wait_until

from unite_fast import cli, importing

COMMANDS = {
    "train": ["--config", "--set", "--resume"],
    "sample": ["--run", "--classes", "--count", "--guidance", "--interval", "--solver", "--steps", "--seed", "--out"],
    "reconstruct": ["--run", "--out", "--seed"],
    "tokenize": ["--run", "--out"],
    "evaluate": ["--metrics", "--reference", "--inception", "--search", "--ema-decay", "--save-images"],
    "reference": ["--out", "--inception", "--crop"],
    "compare": ["--anyway"],
    "analyze": ["--run", "--out", "--data", "--count", "--train", "--times", "--weights", "--seed", "--batch"],
    "import": ["--out", "--heads", "--decoder-heads", "--weights", "--config", "--set"],
    "export": ["--out", "--weights", "--published", "--with-optimizer"],
    "report": ["--out", "--quick", "--held-out", "--seed"],
    "watch": ["--once", "--every"],
    "doctor": ["--json"],
    "plan": ["--preset", "--config", "--gpus", "--gpu", "--network", "--efficiency", "--out", "--json"],
    "profile": ["--config", "--set", "--micro-batch", "--steps", "--trace", "--json"],
}
START = [sys.executable, "-c", "import sys; from unite_fast.cli import main; sys.exit(main())"]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_and_gives_an_example(command, capsys):
    assert run(command, "--help") == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in COMMANDS[command])
    assert command == "doctor" or f"Example: unite-fast {command} " in printed


def test_help_lists_the_commands(capsys):
    assert run("--help") == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)
    registered = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert registered == set(COMMANDS)


def test_help_and_mistakes_do_not_wait_for_torch():
    code = (
        "import sys; from unite_fast.cli import main\n"
        "assert main(['--help']) == 0 and main(['train', '--config', 'absent.json']) == 2\n"
        "assert 'torch' not in sys.modules and 'unite_kernels' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "error: cannot read configuration absent.json: No such file or directory\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["smple"], "No such command 'smple'"),
        (["sample"], "Missing option '--run'"),
        (["sample", "--run", "x", "--solver", "rk4"], "'rk4' is not one of 'euler', 'heun', 'dopri5'"),
        (["sample", "--run", "x", "--steps", "1"], "--steps"),
        (["sample", "--run", "x", "--count", "0"], "--count"),
        (["sample", "--run", "x", "--count", "many"], "--count"),
        (["sample", "--run", "x", "--guidance", "-1"], "--guidance"),
        (["sample", "--run", "x", "--seed", "-1"], "--seed"),
        (["sample", "--run", "x", "--colour", "red"], "No such option: --colour"),
        (["evaluate", "--run", "x"], "evaluate takes the run without --run: unite-fast evaluate RUN (see"),
        (["compare", "--run", "x"], "compare takes the run without --run: unite-fast compare RUN"),
        (["plan", "--run", "x"], "No such option: --run"),
        (["tokenize", "--run", "x", "--out", "y.safetensors"], "Missing argument"),
        (["import", "x", "--out", "y", "--weights", "best"], "'best' is not one of 'ema', 'model'"),
        (["export", "x"], "nothing to write: give --out DIR, --published FILE, or both"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, says, capsys):
    assert says in mistake(capsys, *arguments)


def test_no_command_prints_the_help(capsys):
    run()
    assert "reconstruct" in capsys.readouterr().out


def test_mistakes_are_red_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert run("export", "x") == 2
    assert capsys.readouterr().err.startswith("\x1b[31merror: ")


def test_what_the_system_refuses_is_one_line(capsys, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "/secret")

    monkeypatch.setattr(importing, "open_trained", refuse)
    assert mistake(capsys, "export", "x", "--out", "y") == "/secret: Permission denied"


def test_ctrl_c_ends_quietly(tmp_path):
    save_toy(tmp_path / "model")
    images = tmp_path / "images"
    arguments = ["sample", "--run", tmp_path / "model", "--count", "100000", "--batch", "1", "--out", images]
    process = subprocess.Popen(
        [*START, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # A job that a script starts in the background ignores SIGINT, and its children with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        assert wait_until(lambda: process.poll() is not None or list(images.rglob("*.png")))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "")
    assert not images.exists()


def test_ctrl_c_before_a_command_begins(capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    assert run("doctor") == 130
    assert capsys.readouterr() == ("", "")


@pytest.fixture()
def configuration(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(
        json.dumps({"train": {"steps": 1, "global_batch": 4, "micro_batch": 4}, "data": {"path": "nowhere"}})
    )
    return path


@pytest.fixture()
def trained_with(monkeypatch):
    """What the training loop was called with, in place of hours of training."""
    from unite_fast.engine import loop

    calls = []
    monkeypatch.setattr(loop, "train", lambda config, *, resume: calls.append((config, resume)))
    return calls


def test_train_hands_overrides_to_the_loop(configuration, trained_with):
    assert run("train", "--set", "train.seed=5", "data.workers=0", "--config", configuration) == 0
    assert run("train", "--config", configuration, "--set", "name=a", "--set", "name=b", "train.lr=1") == 2
    assert run("train", "--config", configuration, "--resume", "--set", "name=a", "data.flip=false", "name=b") == 0
    (first, first_resume), (second, second_resume) = trained_with
    assert (first.train.seed, first.data.workers, first_resume) == (5, 0, False)
    assert (second.name, second.data.flip, second_resume) == ("b", False, True)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.lerning_rate=1", "train.lerning_rate"),
        ("model.heads=7", "width 768 is not divisible by 7 heads"),
        ("data.workers=many", "data.workers"),
        ("seed", "'seed' is not of the form key.path=value"),
    ],
)
def test_train_explains_a_wrong_configuration(override, says, configuration, trained_with, capsys):
    assert run("train", "--config", configuration, "--set", override) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and says in printed and "Traceback" not in printed
    assert trained_with == []


def test_train_says_where_the_data_is_missing(configuration, tmp_path, capsys):
    sizes = ["model.width=16", "model.heads=2", "model.image_size=16", "model.patch_size=4", "model.registers=16"]
    says = mistake(
        capsys, "train", "--config", configuration, "--set", f"runs={tmp_path}", "objective.lpips.weight=0", *sizes
    )
    assert says.startswith("data.path: there is no nowhere in ")


KEPT = """
import resource, sys
from unite_fast.train import prepare_process
if "prepared" in sys.argv:
    prepare_process()

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(b"x") * 20_000_000 for _ in range(3)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

step()
print(min(step() for _ in range(3)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
def test_a_process_that_trains_keeps_the_memory_that_a_step_frees():
    faults = {}
    for how in ("as it is", "prepared"):
        ran = subprocess.run([sys.executable, "-c", KEPT, how], capture_output=True, text=True, check=True, timeout=120)
        faults[how] = int(ran.stdout)
    assert faults["prepared"] < 10 and faults["as it is"] > 20  # of 60 MB, in pages of 2 MiB where Linux makes such

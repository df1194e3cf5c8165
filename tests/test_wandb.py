"""Weights & Biases as an option: what is sent, the same run after a resume, and one sentence where it cannot be."""

import json
import sys

import pytest
from runs import config, image_tree

from unite_fast.engine.loop import train
from unite_fast.errors import UserError

RECORDER = '''
import json, os

class Run:
    def __init__(self, file, id):
        self.file, self.id = file, id
    def _say(self, *what):
        with open(self.file, "a") as out:
            out.write(json.dumps(what) + "\\n")
    def define_metric(self, name, step_metric):
        self._say("define", name, step_metric)
    def log(self, values):
        self._say("log", values)
    def finish(self):
        self._say("finish")

def init(*, project, name, id, resume, dir, config):
    if project == "refused":
        raise RuntimeError("no such project\\nat all")
    run = Run(os.environ["WANDB_RECORD"], id or "id0001")
    run._say("init", project, name, id, resume, config["train"]["steps"])
    return run
'''


@pytest.fixture()
def folder(tmp_path):
    image_tree(tmp_path / "train")
    return tmp_path


@pytest.fixture()
def recorder(folder, monkeypatch):
    """A module named wandb that writes down its calls."""
    (folder / "modules").mkdir()
    (folder / "modules" / "wandb.py").write_text(RECORDER)
    monkeypatch.syspath_prepend(str(folder / "modules"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("WANDB_RECORD", str(folder / "calls"))
    yield folder / "calls"
    sys.modules.pop("wandb", None)


def _calls(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_records_go_to_the_same_run_after_a_resume(folder, recorder):
    run = train(config(folder, train={"steps": 10, "wandb": "unite"}))
    calls = _calls(recorder)
    assert calls[0] == ["init", "unite", "run", None, "allow", 10] and calls[1] == ["define", "*", "step"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [call[1] for call in calls if call[0] == "log"]
    assert [entry["step"] for entry in logged] == [1, 5, 10]
    assert logged == [{name: value for name, value in entry.items() if name != "time"} for entry in records]
    assert calls[-1] == ["finish"]
    train(config(folder, train={"steps": 15, "wandb": "unite"}), resume=True)
    again = _calls(recorder)[len(calls) :]
    assert again[0] == ["init", "unite", "run", "id0001", "allow", 15]
    assert [call[1]["step"] for call in again if call[0] == "log"] == [11, 15]


def test_nothing_is_sent_unless_asked(folder, recorder):
    train(config(folder, train={"steps": 1}))
    assert not recorder.exists() and "wandb" not in sys.modules


def test_a_missing_package_is_said_before_anything_else(folder, monkeypatch):
    monkeypatch.setattr("unite_fast.engine.monitor.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb, which is not installed: pip install 'unite_fast\[wandb\]'"):
        train(config(folder, data={"path": "nowhere"}, train={"wandb": "unite"}))
    assert not (folder / "runs").exists()


def test_what_wandb_refuses_is_one_sentence(folder, recorder):
    with pytest.raises(UserError, match=r"cannot start Weights & Biases \(no such project\): run `wandb login`"):
        train(config(folder, train={"wandb": "refused"}))

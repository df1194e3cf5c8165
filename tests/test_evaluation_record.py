"""Records and their comparison: equal protocols are ranked, others are not without saying so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_toy import mistake, run

from unite_fast.cli.compare import _groups
from unite_fast.engine.world import World
from unite_fast.evaluation.protocol import environment, git_state, weights_hash
from unite_fast.evaluation.record import about_model, default_name, ranking, read_records, write_record

PROTOCOL = {
    "model": {"origin": "a", "step": 7, "sha256": "11" * 32, "weights": "ema"},
    "generation": {"count": 50000, "guidance": 2.4, "interval": [0.1, 1.0], "solver": "heun", "seed": 0},
    "inception": {"file": "pt.pth", "sha256": "22" * 32, "published": True},
    "reference": {"file": "ref.npz", "sha256": "33" * 32},
    "held_out": {"path": "val", "count": 100, "names_sha256": "44" * 32},
    "definitions": {"psnr": "of each image"},
}


def record(folder, name, metrics, **sections):
    protocol = {key: PROTOCOL.get(key, {}) | sections.get(key, {}) for key in PROTOCOL | sections}
    write_record(folder / "evaluations" / f"{name}.json", metrics, protocol)


def line_of(metric, printed):
    return next(line for line in printed.splitlines() if line.startswith(f"│ {metric} "))


@pytest.fixture()
def runs(tmp_path):
    record(tmp_path / "one", "a", {"gfid": 2.5, "is": 200.0, "psnr": 25.0})
    # Another model, file names and places: the same protocol.
    record(tmp_path / "two", "b", {"gfid": 2.1, "is": 190.0, "psnr": 24.0}, model={"origin": "b", "sha256": "99" * 32},
           reference={"file": "renamed.npz"}, held_out={"path": "/elsewhere/val"})  # fmt: skip
    return tmp_path


def test_equal_protocols_are_ranked(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs / "one")
    rows = read_records(Path()) + read_records(runs / "two")
    assert [row.name for row in rows] == ["one/a", "two/b"]
    assert ranking(rows, "gfid") == ([1], []) and ranking(rows, "is") == ([0], [])
    assert ranking(rows, "psnr") == ([0], []) and ranking(rows + rows, "psnr") == ([0, 2], [])
    assert run("compare", runs / "one", runs / "two") == 0
    printed = capsys.readouterr().out
    assert "2.1 *" in printed and "200 *" in printed and "≠" not in printed
    assert "gfid ↓" in printed and "is ↑" in printed
    assert "[1] one/a" in printed and "[2] two/b" in printed
    head = next(line for line in printed.splitlines() if line.startswith("┃"))
    assert head.replace("┃", "").split() == ["metric", "[1]", "[2]"]
    assert line_of("gfid", printed).replace("│", "").split() == ["gfid", "↓", "2.5", "2.1", "*"]


@pytest.mark.parametrize(
    ("section", "change", "says", "touched", "untouched"),
    [
        ("generation", {"guidance": 1.5}, "generation.guidance: 2.4 / 1.5", "gfid", "psnr"),
        ("generation", {"count": 10000}, "generation.count: 50000 / 10000", "gfid", "psnr"),
        ("reference", {"sha256": "55" * 32}, "reference.sha256: 33333333… / 55555555…", "gfid", "is"),
        ("held_out", {"names_sha256": "66" * 32}, "held_out.names_sha256: 44444444… / 66666666…", "psnr", "gfid"),
        ("definitions", {"psnr": "pooled"}, "definitions.psnr: of each image / pooled", "psnr", "gfid"),
    ],
)
def test_other_protocols_are_shown_and_not_ranked(runs, capsys, section, change, says, touched, untouched):
    record(runs / "three", "c", {"gfid": 1.0, "is": 300.0, "psnr": 30.0}, **{section: change})
    assert run("compare", runs / "one", runs / "three") == 0
    printed = capsys.readouterr().out
    assert printed.count(says) == 1 and "not ranked, protocols differ" in printed, "once for all metrics it is true of"
    assert "*" not in line_of(touched, printed) and "≠" in line_of(touched, printed)
    one, two, three = (read_records(runs / name) for name in ("one", "two", "three"))
    assert ranking(one + three, untouched)[0] == [1]
    assert ranking(one + two + three, touched) == ([], [says]), "of three, two that are alike are not enough"
    assert run("compare", runs / "one", runs / "three", "--anyway") == 0
    printed = capsys.readouterr().out
    assert "ranked all the same, --anyway" in printed and says in printed and "*" in line_of(touched, printed)


def test_what_is_said_of_several_metrics_names_them_all(runs, capsys):
    record(runs / "three", "c", {"gfid": 1.0, "is": 300.0, "psnr": 30.0}, generation={"guidance": 1.5})
    assert run("compare", runs / "one", runs / "three") == 0
    assert "\n≠ gfid, is: not ranked, protocols differ in generation.guidance: 2.4 / 1.5\n" in capsys.readouterr().out


def test_differences_that_are_not_shown_are_counted(runs, capsys):
    other = {"count": 1, "guidance": 1.0, "interval": [0, 1], "solver": "euler", "seed": 1, "steps": 3}
    record(runs / "three", "c", {"gfid": 1.0}, generation=other)
    assert run("compare", runs / "one", runs / "three") == 0
    assert capsys.readouterr().out.strip().endswith("generation.seed: 0 / 1; and 2 more")


def test_precision_of_small_data_compares_by_its_own_sets(runs):
    for name, held_out in (("three", "77"), ("four", "88"), ("five", "88")):
        record(runs / name, "c", {"precision": 0.9}, small_data={"held_out": held_out * 32})
    three, four, five = (read_records(runs / name)[0] for name in ("three", "four", "five"))
    assert ranking([three, four], "precision")[1] == ["small_data.held_out: 77777777… / 88888888…"]
    assert ranking([four, five], "precision") == ([0, 1], [])


def test_no_value_is_cut_however_many_evaluations(runs, capsys):
    for number in range(12):
        record(runs / "many", f"{number:02d}", {"gfid": 12.34 + number, "recall": 0.012345, "psnr": 25.5})
    record(runs / "many", "12", {"gfid": 7.891})
    assert run("compare", runs / "many") == 0
    printed = capsys.readouterr().out
    assert all(f"{12.34 + number:.4g}" in printed for number in range(12)) and "7.891 *" in printed
    assert printed.count("0.01235 *") == 12 and printed.count("25.5 *") == 12
    assert max(map(len, printed.splitlines())) <= 80 and "…" not in printed


def test_a_table_is_filled_to_the_last_column():
    assert _groups([5, 5, 5], 10) == [[0, 1], [2]]
    assert _groups([5, 6, 20], 10) == [[0], [1], [2]]


def test_a_value_alone_is_not_the_best(runs, capsys):
    record(runs / "three", "c", {"rfid": 1.0})
    assert run("compare", runs / "one", runs / "three") == 0
    assert "*" not in capsys.readouterr().out


def test_what_is_no_record(runs, capsys):
    assert "does not exist" in mistake(capsys, "compare", runs / "none")
    (runs / "bare").mkdir()
    assert "has no evaluations yet" in mistake(capsys, "compare", runs / "bare")
    broken = runs / "one" / "evaluations" / "a.json"
    for text in ("{", "[]", '{"metrics": 3, "protocol": {}}', "{}"):
        broken.write_text(text)
        assert mistake(capsys, "compare", broken) == f"{broken} is not an evaluation record"
    write_record(broken, {"other": 1.0}, {})
    assert "hold none of gfid, is" in mistake(capsys, "compare", broken)


def test_numbers_that_are_none_are_named_and_left_out(tmp_path):
    figures = {"psnr": 20.0, "spread": float("nan"), "density": float("inf")}
    write_record(tmp_path / "r.json", figures, {"warnings": ["a"]})
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["metrics"] == {"psnr": 20.0}
    says = "spread, density: no finite number, what the model makes is degenerate"
    assert found["protocol"]["warnings"] == ["a", says]


def test_the_model_is_known_by_its_weights_and_which_they_are():
    state = {"a": torch.zeros(2)}
    found = about_model(state, "runs/a", {"run": "a", "step": 7, "weights": "model", "class_names": ["x"]})
    assert found == {
        "origin": "runs/a", "run": "a", "step": 7, "weights": "model", "sha256": weights_hash(state)
    }  # fmt: skip
    assert about_model(state, "a", {})["weights"] == "ema"


def test_names_tell_protocols_apart_and_not_dates():
    first = PROTOCOL | {"environment": {"date": "1"}}
    assert default_name(first).startswith("step_00000007-")
    assert default_name(first) == default_name(PROTOCOL | {"environment": {"date": "2"}})
    assert default_name(first) != default_name(first | {"generation": {"count": 1}})
    assert default_name(PROTOCOL | {"model": {}}).startswith("model-")
    model = PROTOCOL["model"]
    assert default_name(first) == default_name(first | {"model": model | {"origin": "/home/a"}})
    assert default_name(first) != default_name(first | {"model": model | {"sha256": "12" * 32}})


def test_weights_are_known_by_their_values():
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1)}
    assert weights_hash(state) == weights_hash(dict(reversed(state.items())))
    assert weights_hash(state) == weights_hash({**state, "a": state["a"].clone()})
    assert weights_hash(state) != weights_hash({**state, "a": state["a"].view(3, 2)})
    changed = state["a"].clone()
    changed[0, 0] = 1e-30
    assert weights_hash(state) != weights_hash({**state, "a": changed})


def test_the_environment_is_on_record():
    found = environment(World(0, 1, 0, torch.device("cpu")), 1.23)
    assert found["device"] == "cpu" and found["versions"]["torch"] and found["seconds"] == 1.2
    assert set(found) == {"date", "seconds", "device", "ranks", "versions", "git"}
    if git_state() is not None:
        assert len(git_state()["commit"]) == 40

"""`unite-fast evaluate` and `compare` on molecules: the run's own numbers again, records, pictures, mistakes."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_toy import mistake, run
from evaluation_files import another_process
from ranks import torchrun

pytest.importorskip("rdkit", reason="molecules need RDKit: pip install 'unite_fast[molecules]'")

from molecule_runs import config, small_set
from test_molecules_model import model

from unite_fast.data.molecules.molecule_set import write_npz
from unite_fast.data.molecules.reading import load_molecules
from unite_fast.engine.loop import train
from unite_fast.engine.world import World
from unite_fast.evaluation.molecules import MoleculeJudge
from unite_fast.evaluation.work import digest
from unite_fast.molecules import evaluation as evaluation_module
from unite_fast.molecules.evaluation import PICTURES, Drawing, MoleculeEvaluator, Plan
from unite_fast.molecules.sampling import draw_counts, generate
from unite_fast.molecules.stream import Parts


class Pieces:
    """Stands for `Work`: makes all pieces anew, and keeps the keys under which they would be found again."""

    def __init__(self):
        self.keys, self.made = [], []

    def gather(self, what, key, count, batch, make, **options):
        self.keys.append(digest(key))
        pieces = [make(first, min(first + batch, count)) for first in range(0, count, batch)]
        self.made.append({name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]})


DRAWING = Drawing({"steps": 3, "guidance": 1.5, "interval": (0.1, 1.0)}, [0, 0, 0, 1, 2, 3], ("low", "middle", "high"))


def pieces(*, drawing=DRAWING, sha256="a", t_max=0.01, held_out=None, **plan):
    """What an evaluation asks for: held-out molecules again, and generated ones."""
    network, molecules, found = model(num_classes=3), small_set(1), Pieces()
    network.tokenize_t_max = t_max
    held_out = molecules.select(range(9, 16)) if held_out is None else held_out
    parts = Parts(molecules.select(range(9)), held_out)
    plan = Plan(**{"samples": 7, "seed": 3, "batch": 7} | plan)
    evaluator = MoleculeEvaluator(plan, parts, World(1, 2, 0, torch.device("cpu")))
    evaluator.measure(network, {"sha256": sha256}, drawing, found)
    return found


def test_molecules_depend_on_their_numbers_and_not_on_the_pieces():
    whole, parts = pieces(), pieces(batch=4)
    for one, other in zip(whole.made, parts.made, strict=True):
        assert torch.equal(one["elements"], other["elements"])
        torch.testing.assert_close(one["positions"], other["positions"], rtol=1e-3, atol=1e-4)
    # From the seed behind the plan's, whose own numbers training draws; classes in turn.
    counts = torch.from_numpy(draw_counts(DRAWING.histogram, 7, seed=4))
    expected = generate(model(num_classes=3), counts, torch.arange(7) % 3, seed=4, **DRAWING.sampling)
    length = int(counts.max())
    torch.testing.assert_close(whole.made[1]["positions"][:, :length], expected.positions, rtol=1e-3, atol=1e-4)
    # A class with a histogram of its own has its atom counts.
    made = pieces(batch=4, drawing=replace(DRAWING, histogram=[[0, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 5]])).made[1]
    assert (made["elements"] > 0).sum(1).tolist() == [1, 2, 3, 1, 2, 3, 1]


def test_pieces_are_found_again_by_all_that_made_them():
    held_out = small_set(1).select(range(9, 16))
    other = {
        "both": [dict(seed=4), dict(batch=3), dict(sha256="b")],
        "held-out": [dict(t_max=0.5), dict(held_out=replace(held_out, positions=1.01 * held_out.positions))],
        "generated": [
            dict(drawing=replace(DRAWING, **change))
            for change in (
                {"sampling": DRAWING.sampling | {"guidance": 2.0}}, {"histogram": [0, 0, 1, 2]}, {"classes": ("all",)},
            )
        ],
    }  # fmt: skip
    base = pieces().keys
    assert pieces().keys == base
    for what, changes in other.items():
        for change in changes:
            differ = [a != b for a, b in zip(base, pieces(**change).keys, strict=True)]
            assert differ == [what != "generated", what != "held-out"], (what, change)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def finished(folder):
    """A run with a property, two averages and a seed of its own, whose batches divide neither part of the metrics."""
    return train(
        config(
            folder, model={"num_classes": 3}, optimizer={"ema_decays": [0.5]},
            data={"condition": "gap", "order": "canonical", "orientation": "aligned"},
            train={"seed": 11}, sampling={"guidance": 1.5}, evaluation={"samples": 10},
        )
    )  # fmt: skip


@pytest.fixture()
def again(finished, tmp_path):
    """A copy of the run, to be evaluated."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def records(run_folder):
    return {path.stem: json.loads(path.read_text()) for path in (run_folder / "evaluations").glob("*.json")}


def record(run_folder, *options, name="here", model=None):
    """Record of an evaluation that must succeed."""
    assert run("evaluate", model or run_folder, "--name", name, *options) == 0
    assert not (run_folder / "evaluations" / ".work").exists()
    return records(run_folder)[name]


def test_evaluating_the_last_checkpoint_reproduces_the_run_s_own_metrics(finished, again):
    own = records(finished)
    summary = json.loads((finished / "summary.json").read_text())
    assert len(own) == 1 and {"rdkit/valid", "edm/atom_stable", "reconstruction/rmsd"} <= set(summary)
    (name,) = own
    for source in (finished, again / "checkpoints" / "step_00000012"):
        found = record(again, name="last", model=source if source != finished else again)
        assert found["metrics"] == {key: summary[key] for key in found["metrics"]} == own[name]["metrics"]
        for section in ("generation", "reconstruction", "held_out", "training", "perception", "warnings"):
            assert found["protocol"][section] == own[name]["protocol"][section], section
        assert found["protocol"]["model"]["sha256"] == own[name]["protocol"]["model"]["sha256"]
    assert found["protocol"]["generation"]["guidance"] == 1.5 and found["protocol"]["generation"]["seed"] == 11
    # The run's own protocol under no name replaces the run's own record.
    before = (finished / "evaluations" / f"{name}.json").stat().st_mtime_ns
    assert run("evaluate", finished) == 0
    assert set(records(finished)) == {name}
    assert (finished / "evaluations" / f"{name}.json").stat().st_mtime_ns > before
    for picture, _ in PICTURES:
        assert (finished / "evaluations" / name / picture).stat().st_size > 100, picture
    samples = [load_molecules(place / "samples.xyz") for place in (finished, finished / "evaluations" / name)]
    assert (samples[0].positions == samples[1].positions).all() and len(samples[0]) == 10


def test_every_metric_stands_beside_that_of_real_molecules(again, capsys):
    found = record(again, "--samples", 7, "--data-count", 4)["metrics"]
    judged = [key for key in found if key.startswith(("edm/", "rdkit/", "distance/")) and not key.endswith("_real")]
    assert all(f"{key}_real" in found for key in judged if key != "rdkit/timeouts") and len(judged) == 15
    assert found["reconstruction/match_real"] == 1 and found["rdkit/valid_real"] == 1 and found["rdkit/novel_real"] < 1
    assert found["molecules"] == 7 and found["molecules_held_out"] == found["reconstruction/molecules"] == 4
    printed = capsys.readouterr().out
    assert "real molecules" in printed and "7 molecules; euler, 4 steps, guidance 1.5" in printed


def test_what_the_command_line_changes(again, capsys):
    base = record(again, name="base")
    options = ("--solver", "heun", "--steps", 3, "--guidance", 2, "--interval", "0.2,0.8", "--seed", 3, "--batch", 3)
    other = record(again, *options, name="other")["protocol"]
    generation = base["protocol"]["generation"] | {
        "solver": "heun", "steps": 3, "guidance": 2.0, "interval": [0.2, 0.8], "seed": 3,
    }  # fmt: skip
    assert other["generation"] == generation and other["reconstruction"]["seed"] == 3
    trained = record(again, "--weights", "model", name="trained")
    assert trained["protocol"]["model"]["weights"] == "model"
    averaged = record(again, "--ema-decay", 0.5, name="averaged")
    assert averaged["protocol"]["model"]["ema_decay"] == 0.5
    hashes = {found["protocol"]["model"]["sha256"] for found in (base, trained, averaged)}
    assert len(hashes) == 3
    capsys.readouterr()
    assert run("compare", *(again / "evaluations" / f"{name}.json" for name in ("base", "averaged"))) == 0
    printed = capsys.readouterr().out
    assert "reconstruction/rmsd ↓" in printed and " *" in printed and "≠" not in printed
    assert run("compare", *(again / "evaluations" / f"{name}.json" for name in ("base", "other"))) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("≠") and "rdkit/valid" in line]
    assert ": not ranked, protocols differ in generation.guidance: 1.5 / 2" in note


def test_an_exported_folder_is_told_its_data(finished, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the cache of molecules lies where one works
    export = Path(shutil.copytree(finished / "export", tmp_path / "export"))
    assert "give --data PATH" in mistake(capsys, "evaluate", export)
    found = record(export, "--data", folder / "set.npz", "--seed", 11, "--batch", 4, "--samples", 10)
    (own,) = records(finished).values()
    assert found["metrics"] == own["metrics"] and found["protocol"]["warnings"] == []
    write_npz(small_set(3).select(range(1, 40)), tmp_path / "other.npz")
    warned = record(export, "--data", tmp_path / "other.npz", "--samples", 5, name="other")
    assert "not what the model was trained on" in warned["protocol"]["warnings"][0]
    assert "not what the model was trained on" in capsys.readouterr().err


def test_an_interruption_loses_nothing_and_the_next_call_goes_on(again, capsys, monkeypatch):
    before = record(again, name="kept")
    evaluations = again / "evaluations"

    def state():
        return {path.name: path.read_bytes() for path in (evaluations / "kept").iterdir()}

    pictures = state()
    options = ("evaluate", again, "--name", "kept", "--guidance", 3)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for owner, name in ((MoleculeJudge, "generation"), (evaluation_module, "write_xyz")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupt)
            assert run(*options) == 130
        assert records(again)["kept"] == before and state() == pictures
        assert sorted(path.name for path in evaluations.iterdir() if path.name.startswith(".")) == [".work"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation_module, "generate", lambda *_, **__: pytest.fail("made again"))
        with contextlib.ExitStack() as others:
            for pieces in (evaluations / ".work").iterdir():
                others.enter_context(another_process(pieces))
            assert mistake(capsys, *options).startswith("another process is making the same molecules in")
        assert run(*options) == 0
    assert records(again)["kept"]["protocol"]["generation"]["guidance"] == 3 and state() != pictures
    assert not (evaluations / ".work").exists()


def test_two_ranks_make_the_same_numbers(finished, again):
    torchrun(["-m", "unite_fast", "evaluate", again, "--name", "ranks", "--device", "cpu"])
    ranks, (own,) = records(again)["ranks"], records(finished).values()
    assert ranks["protocol"]["environment"]["ranks"] == 2
    assert ranks["metrics"] == pytest.approx(own["metrics"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--metrics", "gfid", "--save-images", "out"), "--metrics, --save-images: not for molecules"),
        (("--search", "guidance"), "--search: not for molecules"),
        (("--reference", "a.npz", "--train", "b"), "--reference, --train: not for molecules"),
        (("--precision", "bf16"), "--precision: not for molecules"),
        (("--label-sampling", "random"), "--label-sampling: not for molecules"),
        (("--unnormalised",), "--unnormalised: not for molecules"),
        (("--solver", "dopri5"), "euler or heun"),
        (("--guidance", "inf"), "--guidance must be a finite number"),
        (("--interval", "1"), "--interval '1' must be two numbers"),
        (("--data", "nowhere"), "nowhere"),
        (("--name", "../x"), "--name '../x' must be a file name without"),
        (("--ema-decay", "0.7"), "holds no EMA of decay 0.7"),
        (("--samples", "0"), "samples"),
    ],
)
def test_mistakes_in_one_line(finished, capsys, arguments, words):
    own = records(finished)
    assert words in mistake(capsys, "evaluate", finished, *arguments)
    assert records(finished) == own and not (finished / "evaluations" / ".work").exists()

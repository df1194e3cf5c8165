"""Whole runs on two ranks against the same run on one: what they train on, record, keep, measure, and how they stop."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
from ranks import TESTS, torchrun
from run_worker import GLOBAL_BATCH, IMAGES, RANKS, SAVED, STAGES, STEPS, run_config
from runs import image_tree
from safetensors.torch import load_file

from unite_fast.engine.loop import train

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
RUNS = [*STAGES, "resumed"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of one rank and of two; one launch, since starting costs more than the steps."""
    folder = tmp_path_factory.mktemp("runs")
    image_tree(folder / "train", per_class=IMAGES // 2)
    image_tree(folder / "val", per_class=8)
    alone = train(run_config(folder, "alone", ranks=1))
    kept = f"checkpoints/step_{SAVED:08d}"
    shutil.copytree(alone / kept, folder / "runs" / "resumed" / kept)
    torchrun([TESTS / "run_worker.py", folder], ranks=RANKS, DS_ACCELERATOR="cpu")
    return folder


def lines(folder, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def metrics(folder, name: str) -> dict[str, dict]:
    files = (folder / "runs" / name / "evaluations").glob("*.json")
    return {path.name.split("-")[0]: json.loads(path.read_text())["metrics"] for path in files}


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_as_one_does(folder, name):
    """On the same images and draws, so that records, weights, averages and the optimizer's state are the same."""
    expected = [line for line in lines(folder, "alone") if name != "resumed" or line["step"] > SAVED]
    found = lines(folder, name)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for here, there in zip(found, expected, strict=True):
        for key in ("images", "epoch", "lr", "loss", "loss_l1", "loss_flow", "grad_norm"):
            assert here[key] == pytest.approx(there[key], rel=1e-4), (key, here["step"])
    for file in ("model", "ema", "ema_0.5", "optimizer"):
        where = f"checkpoints/step_{STEPS:08d}/{file}.safetensors"
        tensors, wanted = (load_file(folder / "runs" / run / where) for run in (name, "alone"))
        assert set(tensors) == set(wanted)
        for key, tensor in wanted.items():
            assert (tensors[key] - tensor).norm() <= 1e-3 * tensor.norm() + 1e-6, (file, key)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_leave_what_one_does(folder, name):
    def left(run: str) -> set[str]:
        found = (path.relative_to(folder / "runs" / run) for path in (folder / "runs" / run).rglob("*"))
        return {str(path).split("-")[0] for path in found if "tensorboard" not in path.parts}

    assert left(name) == left("alone")
    assert len(list((folder / "runs" / name / "tensorboard").iterdir())) == 1
    (session,) = map(json.loads, (folder / "runs" / name / "sessions.jsonl").read_text().splitlines())
    assert session["ranks"] == RANKS and session["global_batch"] == GLOBAL_BATCH


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_measure_what_one_does(folder, name):
    expected, found = metrics(folder, "alone"), metrics(folder, name)
    assert set(found) == set(expected) == {f"step_{SAVED:08d}", f"step_{STEPS:08d}"}
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-3), step


@pytest.fixture(scope="module")
def reports(folder) -> list[dict]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def test_ranks_know_their_place(reports):
    assert [report["place"] for report in reports] == [[rank, RANKS, RANKS] for rank in range(RANKS)]


def test_a_signal_stops_all_ranks_at_the_same_step(reports):
    """One to a single rank, and one to all while they measure, each at another place of it."""
    for report in reports:
        assert report["one"] == 2 and report["measuring"] == SAVED


def test_ranks_with_other_data_are_told_so(reports):
    for report in reports:
        assert "rank 0 has 40 images, rank 1 16" in report["other"]

"""A run that resumes on other training data than it began with says so once, and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import molecule_runs
import numpy as np
import pytest
from runs import config, image_tree

from unite_fast.data.check import check
from unite_fast.data.prepare import prepare
from unite_fast.data.source import open_source
from unite_fast.engine import checkpoint
from unite_fast.engine.batch import Batch
from unite_fast.engine.loop import train
from unite_fast.engine.world import init_world
from unite_fast.errors import UserError
from unite_fast.modality import modality_of

WARNING = "the training data changed"


@pytest.fixture()
def folder(tmp_path):
    image_tree(tmp_path / "train")
    train(config(tmp_path, train={"steps": 2}))
    return tmp_path


@pytest.fixture()
def resumed(folder, capfd):
    """Resume up to a number of steps; what was printed, as one line."""

    def resume(steps: int, **sections) -> str:
        capfd.readouterr()
        train(config(folder, train={"steps": steps}, **sections), resume=True)
        return " ".join("".join(capfd.readouterr()).split())

    return resume


def kept(folder: Path) -> dict:
    return checkpoint.read_state(checkpoint.latest(folder / "runs" / "run"))["extra"]["samples"]


def test_the_same_data_are_not_remarked(folder, resumed):
    text = resumed(3)
    assert "continuing after step 2" in text and WARNING not in text
    sessions = [json.loads(line) for line in (folder / "runs/run/sessions.jsonl").read_text().splitlines()]
    assert [session["samples"] for session in sessions] == [kept(folder)] * 2
    assert [session["draws_per_chunk"] for session in sessions] == [2, 2] and "2 flow draws in chunks of 2" in text


def test_a_removed_image_is_remarked_once_and_training_goes_on(folder, resumed):
    before = kept(folder)
    (folder / "train/class_0/003.png").unlink()
    text = resumed(3)
    assert text.count(WARNING) == 1 and "24 images when the checkpoint was saved, 23 now" in text
    assert kept(folder)["count"] == 23 and kept(folder)["digest"] != before["digest"]
    assert WARNING not in resumed(4)


def test_another_image_of_the_same_number_is_remarked(folder, resumed):
    (folder / "train/class_0/003.png").rename(folder / "train/class_0/103.png")
    assert "24 images as before, but not the same ones" in resumed(3)


def test_labels_that_stand_for_other_classes_are_remarked_once(folder, resumed):
    (folder / "train/class_1").rename(folder / "train/a_class")
    text = resumed(3)
    assert "the classes changed: what was 'class_0' is 'a_class', 'class_1' is 'class_0'" in text and "2 of 2" in text
    assert "of other images" in text
    assert "the classes changed" not in resumed(4)


def test_keys_that_change_what_the_same_weights_compute_are_refused(folder):
    for changed, says in (
        ({"context_start": 0}, "another model: model.context_start is 0, there 1"),
        ({"register_noise": False}, "another model: model.register_noise is False, there True"),
        ({"decoder": {"depth": 1, "width": 16, "heads": 4, "inner": 16}}, "model.decoder.heads is 4, there 2"),
    ):
        with pytest.raises(UserError, match=says):
            train(config(folder, model=changed, train={"steps": 3}), resume=True)
    train(config(folder, model={"checkpoint_activations": True}, train={"steps": 3}), resume=True)


def test_an_image_that_the_check_leaves_out_is_remarked(folder, resumed):
    (folder / "train/class_1/005.png").write_bytes(b"broken")
    source = open_source(folder / "train", None, skip=False)
    report = check(source, size=16)
    assert list(report.skip) == ["class_1/005.png"]
    report.save()
    assert "24 images when the checkpoint was saved, 23 now" in resumed(3)


def test_moving_to_shards_is_no_change(folder, resumed):
    prepare(open_source(folder / "train", None), folder / "shards", size=None)
    assert WARNING not in resumed(3, data={"path": str(folder / "shards")})


def test_a_checkpoint_of_an_earlier_version_resumes_in_silence(folder, resumed):
    path = checkpoint.latest(folder / "runs" / "run") / checkpoint.STATE
    state = json.loads(path.read_text())
    del state["extra"]["samples"]
    path.write_text(json.dumps(state))
    (folder / "train/class_0/003.png").unlink()
    assert WARNING not in resumed(3)
    assert kept(folder)["count"] == 23


def test_molecules_know_theirs(tmp_path):
    def samples(path: Path) -> dict:
        settings = molecule_runs.config(tmp_path, data={"path": str(path), "cache": str(tmp_path / "cache")})
        modality = modality_of(settings)
        stream = modality.stream(settings, Batch(5, 1, 5), init_world(settings), start_step=0)
        return modality.samples(stream)

    whole = molecule_runs.small_set()
    paths = {name: tmp_path / f"{name}.npz" for name in ("whole", "again", "fewer", "swapped")}
    molecule_runs.write_npz(whole, paths["whole"])
    molecule_runs.write_npz(whole, paths["again"])
    molecule_runs.write_npz(whole.select(np.arange(1, len(whole))), paths["fewer"])
    molecule_runs.write_npz(whole.select(np.arange(len(whole))[::-1]), paths["swapped"])
    found = {name: samples(path) for name, path in paths.items()}
    assert found["whole"] == found["again"]
    assert found["fewer"]["count"] < found["whole"]["count"] == found["swapped"]["count"]
    assert found["swapped"]["digest"] != found["whole"]["digest"]

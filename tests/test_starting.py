"""What a new run begins with: the weights of another one, whose classes may be others."""

import json
from unittest.mock import MagicMock

import pytest
import torch
from cli_toy import CONFIG, save_toy
from runs import config, image_tree

from unite_fast.cli import main
from unite_fast.config import Config
from unite_fast.engine import loop
from unite_fast.engine.loop import Run, train
from unite_fast.engine.world import init_world
from unite_fast.errors import UserError
from unite_fast.importing import Trained, open_trained
from unite_fast.model.unite import Unite
from unite_fast.starting import begin_from, starting_weights
from unite_fast.weights import read_tensors, write_json

STEPS = {"steps": 3, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained run of class_0 and class_1, and images of class_1, class_2 and class_3 in a folder of their own."""
    folder = tmp_path_factory.mktemp("starting")
    image_tree(folder / "train")
    image_tree(folder / "others", classes=4)
    for path in sorted((folder / "others" / "class_0").iterdir()):
        path.unlink()
    (folder / "others" / "class_0").rmdir()
    train(config(folder, name="first", train=STEPS))
    return folder


def others(folder, name, *, start="runs/first", **sections) -> Config:
    start = None if start is None else str(folder / start)
    sections = {"data": {"path": str(folder / "others")}, "train": {**STEPS, "start_from": start}} | sections
    return config(folder, name=name, **{"model": {"num_classes": 3}, **sections})


def begun(settings: Config) -> tuple[dict[str, torch.Tensor], list[str]]:
    run = Run(settings, init_world(settings), resume=False)
    run.stream.close()
    return {name: x.detach().clone() for name, x in run.engine.model.state_dict().items()}, run._notices


def test_a_run_begins_with_the_average_of_another_and_classes_by_their_names(folder):
    before = open_trained(folder / "runs" / "first").state
    assert not torch.equal(before["encoder.final.weight"], torch.zeros_like(before["encoder.final.weight"]))
    fresh, _ = begun(others(folder, "fresh", start=None))
    found, notices = begun(others(folder, "on"))
    label = "encoder.label.weight"
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items() if name != label)
    assert found[label].shape == (5, 16)
    # class_1 was label 1 and is label 0; two new classes; the null label and the unused row are the last.
    expected = torch.cat([before[label][1:2], fresh[label][1:3], before[label][2:]])
    assert torch.equal(found[label], expected)
    (notice,) = notices
    assert "begins with the weights of" in notice and "step 3; 2 of 3 classes are new" in notice


def test_averages_begin_there_too_and_a_resumed_run_goes_on_with_its_own(folder):
    settings = others(folder, "resumed", optimizer={"lr": 1e-12})
    run = train(settings)
    average = read_tensors(run / "checkpoints" / "step_00000003" / "ema.safetensors")
    before = open_trained(folder / "runs" / "first").state["encoder.final.weight"]
    assert torch.allclose(average["encoder.final.weight"], before, atol=1e-6)
    gone = json.loads(settings.to_json()) | {"train": {**settings.train.model_dump(), "steps": 4, "start_from": "gone"}}
    resumed = Run(Config.parse(gone), init_world(settings), resume=True)
    resumed.stream.close()
    assert resumed.first_step == 3 and not any("begins" in notice for notice in resumed._notices)


def test_names_that_are_not_on_record_leave_the_labels_in_their_order(folder):
    for count in (2, 3):
        imported = folder / f"imported_{count}"
        open_trained(folder / "runs" / "first").save(imported)
        described = json.loads((imported / "model.json").read_text())
        described["made_by"]["class_names"] = None
        write_json(described, imported / "model.json")
        model, data = {"num_classes": count}, {"path": str(folder / ("train" if count == 2 else "others"))}
        found, notices = begun(others(folder, f"by_number_{count}", start=imported.name, model=model, data=data))
        same = torch.equal(found["encoder.label.weight"][:2], open_trained(imported).state["encoder.label.weight"][:2])
        assert same == (count == 2)
        assert ("3 of 3 classes are new" in notices[0]) == (count == 3)


def test_both_encoders_keep_what_they_know_of_a_class():
    sizes = [CONFIG.model_copy(update={"num_classes": count, "shared": False}) for count in (2, 3)]
    before, model = (Unite(size) for size in sizes)
    start = Trained(sizes[0], before.state_dict(), {"class_names": ["cat", "dog"]}, "there")
    fresh = {name: x.clone() for name, x in model.state_dict().items()}
    assert begin_from(start, model, ["ape", "cat", "dog"]).endswith("; 1 of 3 classes is new, with random embeddings")
    for name, found in model.state_dict().items():
        there = before.state_dict()[name]
        new = torch.cat([fresh[name][:1], there]) if name.endswith(".label.weight") else there
        assert torch.equal(found, new), name


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"width": 32, "depth": 3}, "model.depth is 3, there 2; model.width is 32, there 16"),
        ({"image_size": 32}, "model.image_size is 32, there 16"),
    ],
)
def test_a_model_of_other_sizes_is_refused(folder, model, says):
    data = {"path": str(folder / "others")}
    with pytest.raises(UserError, match=says):
        begun(others(folder, "other", model=model | {"num_classes": 3}, data={**data, "crop": "adm"}))
    assert not (folder / "runs" / "other" / "config.json").exists()


def test_pictures_of_another_side_are_refused_where_no_shape_tells(tmp_path):
    """Registers that are not patches have queries in the decoder, and weights of the same shapes at every side."""
    save_toy(tmp_path / "start", config=CONFIG.model_copy(update={"registers": 6}))
    sizes = CONFIG.model_dump() | {"registers": 6, "image_size": 32}
    run = config(tmp_path, model=sizes, train={"start_from": str(tmp_path / "start")})
    with pytest.raises(UserError, match="model.image_size is 32, there 16"):
        starting_weights(run, init_world(run))


def test_molecules_begin_with_molecules(folder, tmp_path):
    pytest.importorskip("rdkit")
    import molecule_runs

    first = train(molecule_runs.config(tmp_path, train={"steps": 2}))
    start = {"start_from": str(first), "steps": 2}
    found, notices = begun(molecule_runs.config(tmp_path, name="on", train=start))
    before = open_trained(first).state
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    assert "begins with" in notices[0] and "new" not in notices[0]
    with pytest.raises(UserError, match="is a model of molecules, and this run is of images"):
        begun(others(folder, "mixed", train=start))


@pytest.mark.parametrize(
    ("start", "says"),
    [("nowhere", "there is no /"), ("others", "holds no model"), ("c.json", "c.json is a file; give a run")],
)
def test_what_holds_no_model_is_said_before_anything_is_measured(folder, capsys, monkeypatch, start, says):
    monkeypatch.setattr(loop, "fit", None)
    (folder / "c.json").write_text(others(folder, "nowhere", start=start).to_json())
    assert main(["train", "--config", str(folder / "c.json")]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("error: train.start_from: ") and says in error


def test_ranks_that_find_other_weights_are_refused(folder):
    settings = others(folder, "ranks")
    steps, alike = [3, 6], ["a", "a"]
    for hashes, refused in ((["a", "b"], True), (alike, False)):
        answers = iter([steps, hashes])
        world = MagicMock(size=2, collect=lambda mine: next(answers))
        if refused:
            with pytest.raises(UserError, match="rank 0 finds step 3, rank 1 step 6"):
                starting_weights(settings, world)
        else:
            assert starting_weights(settings, world).made_by["step"] == 3

"""Weights in and out of runs: finished, in training, gone on after their export, and damaged checkpoints."""

import json
import shutil

import pytest
import torch
from cli_toy import CLASSES, CONFIG, MADE_BY, mistake, picture, run, same_weights, save_toy, toy_model
from safetensors.torch import load_file, save_file

from unite_fast import Unite, UserError, load
from unite_fast.evaluation.generation import TOKENIZE_STREAM, encode, register_noise
from unite_fast.importing import open_trained
from unite_fast.model.io import read_model


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """A run of four steps with checkpoints after two and four, trained through the command line."""
    folder = tmp_path_factory.mktemp("training")
    for label, name in enumerate(CLASSES):
        for index in range(2):
            picture(folder / "images" / name / f"{index}.png", 10 * label + index)
    configuration = {
        "name": "toy", "runs": str(folder / "runs"), "model": CONFIG.model_dump(mode="json"),
        "objective": {"lpips": {"weight": 0}, "time_shift": 0.6, "tokenize_t_max": 0.5},
        "train": {"steps": 4, "global_batch": 4, "micro_batch": 4, "checkpoint_every": 2, "device": "cpu"},
        "data": {"path": str(folder / "images"), "workers": 0},
        "sampling": {"solver": "euler", "steps": 3},
        "evaluation": {"sheet_columns": 1},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(configuration))
    assert run("train", "--config", folder / "run.json", "--set", "train.log_every=2") == 0
    return folder / "runs" / "toy"


def _copy(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "toy")


def test_a_finished_run_gives_its_export(trained_run, tmp_path):
    source = open_trained(trained_run)
    assert (source.origin, source.made_by["step"], source.class_names) == (str(trained_run), 4, sorted(CLASSES))
    ema = load_file(trained_run / "checkpoints" / "step_00000004" / "ema.safetensors")
    assert all(torch.equal(source.state[name], tensor) for name, tensor in ema.items())
    assert run("export", trained_run, "--out", tmp_path / "model") == 0
    assert same_weights(load(tmp_path / "model"), load(trained_run))


def test_the_tokenization_time_is_half_the_configured_maximum_everywhere(trained_run, tmp_path):
    assert run("export", trained_run / "checkpoints" / "step_00000002", "--out", tmp_path / "model") == 0
    newest = open_trained(trained_run / "checkpoints" / "step_00000004").build()
    models = [load(trained_run), load(tmp_path / "model"), newest]
    assert [model.tokenize_time for model in models] == [0.25] * 3
    record = json.loads(next((trained_run / "evaluations").glob("*.json")).read_text())
    assert record["protocol"]["model"]["tokenize_t_max"] == 0.5
    model = toy_model()
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    noise = register_noise(model, 2, seed=0, stream=TOKENIZE_STREAM, first=0)
    for maximum in (model.tokenize_t_max, 0.5):
        model.tokenize_t_max = maximum
        expected = model.tokenize(pixels.float() / 255, noise=noise, t=torch.full((2,), maximum / 2))
        assert torch.equal(encode(model, pixels, seed=0, first=0), expected)
    assert Unite(CONFIG).tokenize_time == 0.005


def test_a_run_still_in_training_gives_its_newest_checkpoint(trained_run, tmp_path, capsys):
    folder = _copy(trained_run, tmp_path)
    shutil.rmtree(folder / "export")
    source = open_trained(folder)
    assert source.origin == str(folder / "checkpoints" / "step_00000004")
    assert (source.made_by["run"], source.made_by["weights"], source.made_by["step"]) == ("toy", "ema", 4)
    assert source.class_names == sorted(CLASSES)
    assert (source.sampling.solver, source.sampling.steps, source.time_shift) == ("euler", 3, 0.6)
    assert same_weights(source.build(), load(trained_run))
    assert run("sample", "--run", folder, "--count", 3) == 0
    assert f"ema weights of {source.origin}, step 4; euler, 3 steps" in capsys.readouterr().out


def test_a_run_that_went_on_after_its_export(trained_run, tmp_path):
    folder = _copy(trained_run, tmp_path)
    record = json.loads((folder / "export" / "model.json").read_text())
    record["made_by"]["step"] = 2
    (folder / "export" / "model.json").write_text(json.dumps(record))
    assert open_trained(folder).made_by["step"] == 4
    tensors = load_file(folder / "export" / "model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, folder / "export/model.safetensors")
    assert same_weights(load(folder), load(trained_run)), "Python and commands take the same weights"
    assert same_weights(load(folder / "checkpoints" / "step_00000004"), load(trained_run))
    record["made_by"]["step"] = 4
    (folder / "export" / "model.json").write_text(json.dumps(record))
    assert open_trained(folder).origin == str(folder)


@pytest.mark.parametrize(("weights", "file"), [("ema", "ema.safetensors"), ("model", "model.safetensors")])
def test_either_set_of_one_checkpoint(weights, file, trained_run, tmp_path):
    checkpoint = trained_run / "checkpoints" / "step_00000002"
    out = tmp_path / "model"
    assert run("export", checkpoint, "--out", out, "--weights", weights, "--published", tmp_path / "p.pt") == 0
    expected = load_file(checkpoint / file)
    state = load(out).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert read_model(out)[2]["weights"] == weights
    assert list(torch.load(tmp_path / "p.pt", weights_only=True)) == [weights, "step"]
    assert run("sample", "--run", checkpoint, "--count", 1) == 0
    assert (trained_run / "samples" / "samples.json").is_file() and not (checkpoint / "samples").exists()


def test_weights_as_trained_need_a_checkpoint(trained_run, tmp_path, capsys):
    assert open_trained(trained_run, weights="model").origin.endswith("step_00000004")
    save_toy(tmp_path / "model")
    says = mistake(capsys, "export", tmp_path / "model", "--out", tmp_path / "out", "--weights", "model")
    assert "holds EMA weights only: --weights model needs a checkpoint" in says
    save_toy(tmp_path / "imported", MADE_BY | {"weights": "model"})
    assert run("export", tmp_path / "imported", "--out", tmp_path / "out", "--weights", "model") == 0


def test_class_names_come_from_the_checkpoint_not_from_the_data_folder(trained_run, tmp_path):
    folder = _copy(trained_run, tmp_path)
    shutil.rmtree(folder / "export")
    for state_file in folder.glob("checkpoints/*/state.json"):
        state = json.loads(state_file.read_text())
        state["config"]["data"]["path"] = str(tmp_path / "gone")
        state_file.write_text(json.dumps(state))
    assert open_trained(folder).class_names == sorted(CLASSES)


def test_import_puts_the_context_where_it_is_told(tmp_path):
    save_toy(tmp_path / "toy")
    assert run("export", tmp_path / "toy", "--published", tmp_path / "p.pt") == 0
    options = ("import", tmp_path / "p.pt", "--decoder-heads", load(tmp_path / "toy").config.decoder.heads)
    assert run(*options, "--context-start", 1, "--out", tmp_path / "back") == 0
    assert same_weights(load(tmp_path / "back"), load(tmp_path / "toy"))
    assert load(tmp_path / "back").config.context_start == 1


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda c: (c / "ema.safetensors").write_bytes(b"x"), "ema.safetensors is truncated"),
        (lambda c: (c / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda c: (c / "state.json").write_text("["), "state.json is not JSON"),
        (lambda c: (c / "state.json").write_text("{}"), "is not of checkpoint format"),
    ],
)
def test_damaged_checkpoints(damage, says, trained_run, tmp_path, capsys):
    checkpoint = _copy(trained_run, tmp_path) / "checkpoints" / "step_00000004"
    damage(checkpoint)
    assert says in mistake(capsys, "export", checkpoint, "--out", tmp_path / "out")


@pytest.mark.parametrize("damage", ["truncated", "of the same size"])
def test_a_damaged_newest_checkpoint_names_the_whole_one_before_it(damage, trained_run, tmp_path, capsys):
    folder = _copy(trained_run, tmp_path)
    shutil.rmtree(folder / "export")
    older, newest = (folder / "checkpoints" / f"step_0000000{step}" for step in (2, 4))
    size = (newest / "ema.safetensors").stat().st_size
    (newest / "ema.safetensors").write_bytes(b"x" * (size if "same" in damage else 1))
    says = mistake(capsys, "sample", "--run", folder, "--count", 1)
    assert says.startswith(f"checkpoint {newest} cannot be used: {newest / 'ema.safetensors'} is ")
    advice = "commands take it in place of the run, --resume once step_00000004 is deleted"
    assert says.endswith(f"; {older} is whole: {advice}")
    assert run("sample", "--run", older, "--count", 1, "--out", tmp_path / "out") == 0
    shutil.rmtree(newest)
    assert run("sample", "--run", folder, "--count", 1, "--out", tmp_path / "out") == 0


def test_a_checkpoint_with_a_foreign_configuration(trained_run, tmp_path):
    checkpoint = _copy(trained_run, tmp_path) / "checkpoints" / "step_00000004"
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"]["model"]["width"] = 32
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="does not fit the model's sizes"):
        open_trained(checkpoint)
    state["config"]["model"]["lenght"] = 3
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"(?s)configuration in .*model\.lenght: unknown key"):
        open_trained(checkpoint)

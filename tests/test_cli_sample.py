"""sample: which images are drawn, how they are recorded, and every mistake it can meet."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_toy import CLASSES, MADE_BY, SAMPLING, SIDE, mistake, read, run, save_toy, small_disk, toy_model

from unite_fast import generate
from unite_fast.cli.sample import _classes, run_folder
from unite_fast.errors import UserError
from unite_fast.evaluation.generation import SAMPLE_STREAM
from unite_fast.flow import sampling
from unite_fast.replacing import replacing
from unite_kernels import philox_normal

RECORDED = SAMPLING.model_dump(mode="json") | {"time_shift": 0.7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_toy(path)
    return path


def _sample(folder, out, *options):
    """Record and images [N, H, W, 3] of a call that must succeed."""
    assert run("sample", "--run", folder, "--out", out, *options) == 0
    record = json.loads((out / "samples.json").read_text())
    return record, np.stack([read(out / entry["file"]) for entry in record["images"]])


def _drawn(labels, seed=0, **changes):
    """The same images through the library, with the noise of each image drawn alone."""
    model = toy_model()
    settings = RECORDED | {"interval": tuple(RECORDED["interval"])} | changes
    noise = torch.cat(
        [philox_normal((16, 4), seed, 0, SAMPLE_STREAM, draws=1, first_draw=index) for index in range(len(labels))]
    )
    images = generate(model, torch.tensor(labels), noise=noise, **settings)
    return images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()


def _apart(a, b):
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_defaults_are_the_models_own(folder, tmp_path):
    record, images = _sample(folder, tmp_path / "out", "--count", 7)
    assert record["sampling"] == RECORDED
    assert record["model"] == {"origin": str(folder), **MADE_BY}
    assert (record["seed"], record["count"]) == (0, 7)
    assert record["classes"] == [{"index": index, "name": name} for index, name in enumerate(CLASSES)]
    labels = [entry["class"] for entry in record["images"]]
    assert labels == [0, 1, 2, 0, 1, 2, 0]
    assert _apart(images, _drawn(labels)) <= 1
    assert images.shape == (7, SIDE, SIDE, 3) and images.std() > 5
    sheet = read(tmp_path / "out" / "sheet.png")
    assert sheet.shape[0] > 3 * SIDE and sheet.shape[1] > 3 * SIDE
    assert len(list((tmp_path / "out").iterdir())) == 7 + 2


def test_every_option_reaches_the_sampler(folder, tmp_path):
    options = ["--classes", "2", "--count", 3, "--seed", 9, "--batch", 2]
    base = _sample(folder, tmp_path / "base", *options)[1]
    assert _apart(base, _drawn([2, 2, 2], seed=9)) <= 1
    for name, arguments, changes in (
        ("guidance", ["--guidance", "4"], {"guidance": 4.0}),
        ("interval", ["--interval", "0.6,1", "--guidance", "4"], {"guidance": 4.0, "interval": (0.6, 1.0)}),
        ("euler", ["--solver", "euler"], {"solver": "euler"}),
        ("dopri5", ["--solver", "dopri5", "--batch", 3], {"solver": "dopri5"}),
        ("steps", ["--steps", "9"], {"steps": 9}),
        ("unguided", ["--guidance", "1"], {"guidance": 1.0}),
        ("unnormalised", ["--unnormalised", "--guidance", "1"], {"guidance": 1.0, "normalise": False}),
    ):
        record, images = _sample(folder, tmp_path / name, *options, *arguments)
        assert _apart(images, _drawn([2, 2, 2], seed=9, **changes)) <= 1, name
        assert _apart(images, base) > 1, name
        expected = RECORDED | {key: list(value) if key == "interval" else value for key, value in changes.items()}
        assert record["sampling"] == expected
    assert _apart(images, _drawn([2, 2, 2], seed=9, guidance=1.0)) > 1, "the latent norm was left out"


def test_images_depend_on_seed_and_number_alone(folder, tmp_path):
    whole = _sample(folder, tmp_path / "whole", "--count", 10, "--batch", 10)[1]
    for batch in (1, 3, 64):
        assert _apart(_sample(folder, tmp_path / f"by{batch}", "--count", 10, "--batch", batch)[1], whole) <= 1
    fewer = _sample(folder, tmp_path / "fewer", "--count", 4, "--batch", 3)[1]
    assert _apart(fewer, whole[:4]) <= 1
    other = _sample(folder, tmp_path / "other", "--count", 10, "--seed", 1)[1]
    assert all(_apart(a, b) > 1 for a in other for b in whole)


@pytest.mark.parametrize(
    ("wanted", "labels"),
    [
        ("dog", [1, 1, 1, 1]),
        ("2,0", [2, 0, 2, 0]),
        ("2nd cat, dog", [2, 1, 2, 1]),
        ("dog,1,dog", [1, 1, 1, 1]),
    ],
)
def test_classes_by_name_and_index(wanted, labels, folder, tmp_path):
    record, _ = _sample(folder, tmp_path / "out", "--classes", wanted, "--count", 4)
    assert [entry["class"] for entry in record["images"]] == labels


def test_a_name_comes_before_an_index(tmp_path):
    save_toy(tmp_path / "model", MADE_BY | {"class_names": ["2", "1", "0"]})
    record, _ = _sample(tmp_path / "model", tmp_path / "out", "--classes", "0", "--count", 1)
    assert record["classes"] == [{"index": 2, "name": "0"}]


def test_a_number_is_not_taken_for_a_misspelt_name():
    with pytest.raises(UserError, match="no class '12'; valid: indices 0 to 9, names such as '0'"):
        _classes("12", [str(digit) for digit in range(10)], 10)


def test_without_names_and_defaults_on_record(tmp_path):
    save_toy(tmp_path / "model", {})
    record, _ = _sample(tmp_path / "model", tmp_path / "out", "--count", 2, "--steps", 2)
    assert record["classes"][0] == {"index": 0, "name": None}
    assert record["sampling"]["solver"] == "dopri5"


def test_a_new_call_replaces_the_former_samples_only(folder, tmp_path):
    out = tmp_path / "out"
    _sample(folder, out, "--count", 5)
    for name in ("notes.txt", "mine.png", "000009_class0001.jpg"):
        (out / name).write_text("mine")
    _sample(folder, out, "--count", 2, "--seed", 1)
    assert {path.name for path in out.iterdir()} == {
        "000000_class0000.png", "000001_class0001.png", "samples.json", "sheet.png",
        "notes.txt", "mine.png", "000009_class0001.jpg",
    }  # fmt: skip


def test_former_samples_stay_where_drawing_fails(folder, tmp_path, capsys):
    out = tmp_path / "out"
    _sample(folder, out, "--count", 5)
    former = {path.name: path.read_bytes() for path in out.iterdir()}
    # Room for every image, but not for the sheet, which comes last.
    with small_disk(max(len(content) for name, content in former.items() if "_class" in name) + 100):
        says = mistake(capsys, "sample", "--run", folder, "--out", out, "--count", 6, "--seed", 1)
    assert says.startswith("cannot write picture") and "sheet.png" in says
    assert {path.name: path.read_bytes() for path in out.iterdir()} == former


def test_what_a_killed_call_left_goes_unless_another_still_runs(folder, tmp_path):
    out, left = tmp_path / "out", tmp_path / "out" / ".1.tmp"
    left.mkdir(parents=True)
    (left / "000000_class0000.png").touch()
    with replacing(out) as aside:
        assert not left.exists()
        (aside / "mine.txt").touch()
        # A call of another process, which has a name and a lock of its own.
        other = aside.rename(out / ".2.tmp")
        _sample(folder, out, "--count", 1)
        other.rename(aside)
    assert (out / "mine.txt").exists() and not list(out.glob(".*"))


def test_classes_that_get_no_image_are_not_counted(folder, tmp_path, capsys):
    _sample(folder, tmp_path / "out", "--count", 2)
    assert "2 images of 2 classes" in capsys.readouterr().out


def test_one_class_fills_several_rows_of_the_sheet(folder, tmp_path):
    heights, widths = [], []
    for count in (10, 23):
        _sample(folder, tmp_path / str(count), "--classes", "dog", "--count", count, "--solver", "euler", "--steps", 2)
        height, width, _ = read(tmp_path / str(count) / "sheet.png").shape
        heights.append(height)
        widths.append(width)
    assert widths[0] == widths[1]
    assert heights[1] - heights[0] >= 2 * SIDE


def test_samples_go_into_the_run_by_default(tmp_path):
    save_toy(tmp_path / "run" / "export")
    assert run("sample", "--run", tmp_path / "run", "--count", 1) == 0
    assert (tmp_path / "run" / "samples" / "000000_class0000.png").is_file()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--classes", "3"], "has no class '3'; valid: indices 0 to 2, names such as 'cat'"),
        (["--classes", "dgo"], "has no class 'dgo'; did you mean 'dog'?"),
        (["--classes", "dog,"], "has no class ''"),
        (["--classes", "-1"], "has no class '-1'"),
        (["--classes", "²"], "has no class '²'"),
        (["--interval", "0.1"], "must be two numbers separated by a comma"),
        (["--interval", "a,b"], "must be two numbers"),
        (["--interval", "0.9,0.1"], "must be two increasing numbers between 0 and 1"),
        (["--interval", "0,1.5"], "must be two increasing numbers between 0 and 1"),
        (["--interval", "nan,1"], "must be two increasing numbers between 0 and 1"),
        (["--guidance", "nan"], "--guidance"),
        (["--guidance", "inf"], "finite"),
        (["--unnormalised"], "without guidance, and guidance is 1.5: add --guidance 1"),
    ],
)
def test_wrong_options(options, says, folder, tmp_path, capsys):
    assert says in mistake(capsys, "sample", "--run", folder, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_cuda_asked_for_and_absent(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    says = mistake(capsys, "sample", "--run", folder, "--out", tmp_path / "out", "--device", "cuda")
    assert says.startswith("--device cuda: PyTorch sees no CUDA device")


def test_memory_that_runs_out_names_the_option(folder, tmp_path, capsys, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampling, "generate", exhausted)
    says = mistake(capsys, "sample", "--run", folder, "--out", tmp_path / "out", "--batch", 48)
    assert says == "the device ran out of memory at --batch 48: try --batch 24"


def test_missing_and_empty_runs(tmp_path, capsys):
    assert mistake(capsys, "sample", "--run", tmp_path / "absent") == f"no folder {tmp_path / 'absent'}"
    assert "holds no model" in mistake(capsys, "sample", "--run", tmp_path)
    (tmp_path / "file").touch()
    assert "is a file" in mistake(capsys, "sample", "--run", tmp_path / "file")


def _damage_truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _damage_pickle(folder):
    torch.save({"a": torch.zeros(1)}, folder / "model.safetensors")


def _damage_json(folder):
    (folder / "model.json").write_text("{")


def _damage_sizes(folder):
    record = json.loads((folder / "model.json").read_text())
    record["model"]["width"] = 32
    (folder / "model.json").write_text(json.dumps(record))


def _damage_weights(folder):
    (folder / "model.safetensors").unlink()


def _damage_made_by(folder, **changes):
    record = json.loads((folder / "model.json").read_text())
    record["made_by"] = record["made_by"] | changes
    (folder / "model.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_damage_truncated, "is not a whole safetensors file"),
        (_damage_pickle, "is not a whole safetensors file"),
        (_damage_json, "is not a model description"),
        (_damage_sizes, "does not fit the model's sizes"),
        (_damage_weights, "no file"),
        (lambda folder: _damage_made_by(folder, sampling=[1]), "made_by.sampling of"),
        (lambda folder: _damage_made_by(folder, sampling={"time_shift": -1}), "must be a positive number, found -1"),
        (lambda folder: _damage_made_by(folder, tokenize_t_max=2), "must be a number from 0 to 1, found 2"),
    ],
    ids=["truncated", "pickle", "json", "sizes", "no weights", "sampling", "time_shift", "tokenize_t_max"],
)
def test_damaged_models(damage, says, tmp_path, capsys):
    save_toy(tmp_path / "model")
    damage(tmp_path / "model")
    assert says in mistake(capsys, "sample", "--run", tmp_path / "model", "--out", tmp_path / "out")


def test_recorded_sampling_of_another_kind(tmp_path, capsys):
    save_toy(tmp_path / "model", MADE_BY | {"sampling": {"solver": "rk4"}})
    assert run("sample", "--run", tmp_path / "model", "--out", tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: made_by.sampling of") and "rk4" in printed and "Traceback" not in printed


def test_diverged_models_are_named_as_such(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    save_toy(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["decoder.token"][:] = float("nan")
    save_file(weights, path)
    assert "diverged" in mistake(capsys, "sample", "--run", tmp_path / "model", "--out", tmp_path / "out")


def test_a_problem_of_the_work_is_none_of_the_output(folder, tmp_path, capsys, monkeypatch):
    def draw(*_, **__):
        raise FileNotFoundError(2, "No such file or directory", "/no/compiler")

    monkeypatch.setattr("unite_fast.evaluation.generation.draw", draw)
    says = mistake(capsys, "sample", "--run", folder, "--out", tmp_path / "out")
    assert says == "/no/compiler: No such file or directory"
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    says = mistake(capsys, "sample", "--run", folder, "--out", tmp_path / "file")
    assert says == f"cannot write into {tmp_path / 'file'}: File exists"
    with small_disk(100):
        says = mistake(capsys, "sample", "--run", folder, "--out", tmp_path / "out", "--count", 1)
    assert says.startswith("cannot write picture") and "File too large" in says
    assert not (tmp_path / "out").exists()


def test_the_run_of_a_checkpoint_named_from_inside(tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    assert run_folder(checkpoint) == tmp_path and run_folder(tmp_path) == tmp_path
    monkeypatch.chdir(checkpoint.parent)
    assert run_folder(Path("step_00000004")) == tmp_path
    monkeypatch.chdir(checkpoint)
    assert run_folder(Path(".")) == tmp_path

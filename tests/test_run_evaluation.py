"""A run that measures itself: its records, `unite-fast evaluate` on it, searches, averages to choose from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_toy import mistake, read, run
from inception_toy import inception_weights
from runs import config, image_tree
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from unite_fast import load
from unite_fast.config import Config
from unite_fast.engine import checkpoint, loop
from unite_fast.engine.loop import train
from unite_fast.errors import UserError
from unite_fast.evaluation.generation import LABEL_STREAM
from unite_fast.evaluation.plan import plan_of
from unite_fast.evaluation.protocol import weights_hash
from unite_fast.evaluation.small_data import SmallDataJudge
from unite_kernels import philox_uniform

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that measures itself in the middle and at the end, and keeps two averages."""
    folder = tmp_path_factory.mktemp("trained")
    torch.save(inception_weights(), folder / "inception.pth")
    image_tree(folder / "train", per_class=20)
    image_tree(folder / "val", per_class=8)
    evaluation = {"samples_per_class": 5, "metrics": ["is"], "metrics_epochs": 1, "count": 10,
                  "inception": str(folder / "inception.pth"), "sheet_columns": 2}  # fmt: skip
    return train(config(folder, train={"steps": 11, "global_batch": 4}, data={"val_path": str(folder / "val")},
                        optimizer={"ema_decays": [0.5]}, evaluation=evaluation))  # fmt: skip


def records(run_folder):
    return {path.stem: json.loads(path.read_text()) for path in (run_folder / "evaluations").glob("*.json")}


def test_training_measures_itself_and_evaluate_reproduces_it(trained):
    """40 images and batches of 4: an epoch ends at step 10."""
    own = records(trained)
    assert sorted(name.split("-")[0] for name in own) == ["step_00000010", "step_00000011"]
    for name, record in own.items():
        averages = load_file(trained / "checkpoints" / name[:13] / "ema.safetensors")
        assert record["protocol"]["model"]["sha256"] == weights_hash(averages), name
    last = next(record for name, record in own.items() if "11" in name[:13])
    summary = json.loads((trained / "summary.json").read_text())
    assert {"is", "class_accuracy", "frechet_pca", "psnr", "ssim", "l1"} <= set(last["metrics"])
    assert {name: summary[name] for name in last["metrics"]} == last["metrics"]
    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("evaluation/is")] == [10]
    # The same command line as after any run: the same numbers, so that it replaces the run's own record.
    assert run("evaluate", trained) == 0
    again = records(trained)
    assert set(again) == set(own)
    assert again[next(name for name in own if "11" in name[:13])]["metrics"] == pytest.approx(last["metrics"], rel=1e-5)


def test_a_checkpoint_has_one_record_however_it_is_named(trained, monkeypatch):
    """By its run, whose export has the same weights, by its path, and from inside of checkpoints/."""
    assert run("evaluate", trained, "--metrics", "psnr") == 0
    before = records(trained)
    monkeypatch.chdir(trained / "checkpoints")
    for named in (trained / "checkpoints" / "step_00000011", "step_00000011", "../../run/checkpoints/step_00000011"):
        assert run("evaluate", named, "--metrics", "psnr") == 0
    assert set(records(trained)) == set(before)


def test_search_chooses_average_and_guidance_and_measures_with_them(trained, capsys):
    assert run("evaluate", trained, "--metrics", "small", "--search", "ema,guidance", "--search-count", 4,
               "--name", "searched") == 0  # fmt: skip
    record = records(trained)["searched"]
    averages, points = record["tables"]["ema"], record["tables"]["guidance"]
    assert [row["ema_decay"] for row in averages] == [0.9, 0.5]
    assert len({(row["guidance"], row["low"], row["high"]) for row in points}) == len(points) > 4
    best = min(points, key=lambda row: row["score"])
    protocol = record["protocol"]
    assert protocol["generation"]["guidance"] == best["guidance"] and protocol["generation"]["count"] == 10
    assert protocol["generation"]["interval"] == [best["low"], best["high"]]
    assert protocol["model"]["ema_decay"] == min(averages, key=lambda row: row["score"])["ema_decay"]
    assert protocol["search"] == {"by": "frechet_pca", "count": 4, "over": ["ema", "guidance"]}
    assert (trained / "evaluations" / "searched_guidance.png").stat().st_size > 1000
    assert "ema_decay 0.5  frechet_pca" in capsys.readouterr().out
    assert not (trained / "evaluations" / ".work").exists()


def test_small_metrics_judge_each_image_by_the_class_it_was_drawn_as(trained, monkeypatch):
    judged = []

    def judge(self, images, labels):
        judged.append(labels.tolist())
        return {"class_accuracy": 1.0}

    monkeypatch.setattr(SmallDataJudge, "judge", judge)
    options = ["--metrics", "small", "--count", 11, "--label-sampling", "random", "--name", "random"]
    assert run("evaluate", trained, *options) == 0
    assert judged == [[int(2 * philox_uniform((), 0, 0, LABEL_STREAM, first_draw=index)) for index in range(11)]]


def test_a_configuration_chooses_how_labels_are_drawn(tmp_path):
    def plan(**evaluation):
        return plan_of(config(tmp_path, evaluation=evaluation), torch.device("cpu"))

    assert plan().label_sampling == "balanced" and plan(label_sampling="random").label_sampling == "random"
    with pytest.raises(UserError, match="evaluation.label_sampling: Input should be 'balanced' or 'random'"):
        plan(label_sampling="uniform")


def pixels(folder):
    return {path.name: read(path).tobytes() for path in folder.glob("*.png")}


def test_kept_images_are_those_of_the_record_alone(trained, tmp_path):
    def measure(name, *options):
        assert run("evaluate", trained, "--metrics", "small", "--name", name, "--save-images", tmp_path / name,
                   *options) == 0  # fmt: skip
        return records(trained)[name]["protocol"]["generation"]

    # A search draws images of its own, of the same numbers.
    found = measure("swept", "--search", "guidance", "--search-count", 4, "--search-values", "3,1,2,0", "--count", 6)
    measure("plain", "--guidance", found["guidance"], "--count", 6)
    measure("last", "--guidance", 0, "--count", 6)
    assert pixels(tmp_path / "last") != pixels(tmp_path / "plain"), "the search must not end at its best point"
    assert len(pixels(tmp_path / "plain")) == 6 and pixels(tmp_path / "swept") == pixels(tmp_path / "plain")
    # Fewer images into the same folder leave none of the former ones, and what is not theirs stays.
    (tmp_path / "plain" / "own.png").write_bytes((tmp_path / "plain" / "000000_class0000.png").read_bytes())
    measure("plain", "--guidance", found["guidance"], "--seed", 1, "--count", 4)
    measure("fresh", "--guidance", found["guidance"], "--seed", 1, "--count", 4)
    left = pixels(tmp_path / "plain")
    assert left.pop("own.png") and left == pixels(tmp_path / "fresh") and len(left) == 4


def test_averages_can_be_exported_by_choice(trained, tmp_path, capsys):
    assert run("export", trained, "--out", tmp_path / "out", "--ema-decay", "0.5") == 0
    kept = load_file(checkpoint.latest(trained) / "ema_0.5.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in load(tmp_path / "out").state_dict().items())
    assert json.loads((tmp_path / "out" / "model.json").read_text())["made_by"]["ema_decay"] == 0.5
    assert "holds no EMA of decay 0.7: it holds 0.9, 0.5" in mistake(
        capsys, "export", trained, "--out", tmp_path / "x", "--ema-decay", 0.7
    )
    assert "choose one" in mistake(
        capsys, "export", trained, "--out", tmp_path / "x", "--ema-decay", 0.5, "--weights", "model"
    )


def test_a_run_that_lacks_files_of_its_metrics_says_so_at_once(tmp_path, monkeypatch):
    image_tree(tmp_path / "train")
    monkeypatch.setattr(loop, "fit", None)  # what fits into memory is measured for minutes
    with pytest.raises(UserError, match=r"no Inception-v3 weights at .*evaluation.metrics asks for it"):
        train(config(tmp_path, evaluation={"metrics": ["is"], "count": 10, "inception": str(tmp_path / "none.pth")}))


def test_all_that_a_run_lacks_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "fit", None)
    given = json.loads((CONFIGS / "l_h100.json").read_text())
    given["train"] |= {"start_from": "models/none", "device": "cpu", "zero_stage": 0}
    with pytest.raises(UserError) as caught:
        train(Config.parse(given))
    head, *lines = str(caught.value).splitlines()
    assert head == "l_h100 needs what is not there:"
    for line, *says in zip(
        lines,
        ("data.path", "data.val_path", "train.start_from", "objective.lpips.vgg", "objective.lpips.linear",
         "evaluation.inception", "evaluation.reference"),
        ("data/imagenet/train in", "data/imagenet/val in", "models/none in", "weights/vgg16-397923af.pth",
         "weights/lpips_vgg.pth", "weights/pt_inception-2015-12-05-6726825d.pth", "weights/imagenet256_train.npz"),
        ("put them there", "put them there", "an export", "set objective.lpips.weight = 0",
         "set objective.lpips.weight = 0", "evaluation.metrics=[]", "evaluation.metrics=[]"),
        strict=True,
    ):  # fmt: skip
        assert all(word in line for word in says), line
    assert not list(tmp_path.iterdir()), "a run that never began leaves nothing"
    # The metric needs the files of the loss: each is told once.
    with pytest.raises(UserError) as caught:
        image_tree(tmp_path / "train")
        train(config(tmp_path, objective={"lpips": {"weight": 1}}, evaluation={"metrics": ["lpips"]}))
    assert str(caught.value).count("is not set") == 2

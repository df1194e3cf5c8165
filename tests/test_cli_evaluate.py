"""evaluate and reference on a tiny model with randomly initialised Inception weights: numbers, records, mistakes."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics.functional.image
from cli_toy import SIDE, mistake, picture, read, run, toy_model
from evaluation_files import HELD_OUT, evaluation_files
from ranks import torchrun
from test_perceptual import weights as lpips_weights

from unite_fast.cli.evaluating import Session
from unite_fast.data.source import warn_once
from unite_fast.engine.world import World
from unite_fast.evaluation import evaluator as evaluator_module
from unite_fast.evaluation.features import inception_score, kernel_distance, precision_recall
from unite_fast.evaluation.frechet import gaussian_statistics
from unite_fast.evaluation.generation import LABEL_STREAM, SAMPLE_STREAM, TOKENIZE_STREAM, to_bytes
from unite_fast.evaluation.inception import Inception
from unite_fast.evaluation.plan import Plan
from unite_fast.flow.sampling import generate
from unite_fast.objective.perceptual import Lpips
from unite_fast.weights import file_hash
from unite_kernels import philox_normal, philox_uniform

ROOT = Path(__file__).resolve().parents[1]
COUNT = 12
SETTINGS = {"guidance": 1.5, "interval": (0.2, 0.9), "solver": "heun", "steps": 4, "time_shift": 0.7}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return evaluation_files(tmp_path_factory.mktemp("evaluate"))


def evaluate(files, *options, metrics="gfid,is", name="here", count=COUNT):
    """Record of an evaluation that must succeed."""
    arguments = ["evaluate", files / "model", "--metrics", metrics, "--count", count, "--name", name, "--batch", 5]
    arguments += ["--inception", files / "inception.pth", "--reference", files / "ref.npz", "--data", files / "val"]
    assert run(*arguments, *options) == 0
    record = json.loads((files / "model" / "evaluations" / f"{name}.json").read_text())
    assert not (files / "model" / "evaluations" / ".work").exists()
    return record


@pytest.fixture(scope="module")
def inception(files):
    return Inception.open(files / "inception.pth")


@pytest.fixture(scope="module")
def held_out(files):
    paths = sorted((files / "val").rglob("[0-9][0-9].png"), key=lambda path: path.as_posix())
    return torch.stack([torch.tensor(read(path)) for path in paths]).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def features(inception, held_out):
    """Of the held-out pictures and of the images drawn; the latter's logits."""
    return inception(held_out)[0], *inception(to_bytes(drawn()))


def drawn(count=COUNT, labels=None, seed=0, **changes):
    """The same images one by one, through the library alone."""
    model, images = toy_model(), []
    for index in range(count):
        noise = philox_normal((16, 4), seed, 0, SAMPLE_STREAM, draws=1, first_draw=index)
        label = index % 3 if labels is None else labels[index]
        images.append(generate(model, torch.tensor([label]), noise=noise, **SETTINGS | changes))
    return torch.cat(images)


def random_labels(count, seed):
    """One by one: of 3 classes."""
    return [int(3 * philox_uniform((), seed, 0, LABEL_STREAM, first_draw=index)) for index in range(count)]


def apart(a, b):
    return abs(a - b) / max(abs(b), 1e-12)


def distance(a, b):
    """Fréchet distance of few features [n, k] and [m, k]: tr((AB)^½) is the sum of the singular values of X Yᵀ."""
    x, y = ((f - f.mean(0)) / math.sqrt(len(f) - 1) for f in (a.double().numpy(), b.double().numpy()))
    offset = float(((a.double().mean(0) - b.double().mean(0)) ** 2).sum())
    return offset + (x**2).sum() + (y**2).sum() - 2 * np.linalg.svd(x @ y.T, compute_uv=False).sum()


def test_reference_is_the_pictures_mean_and_covariance(files, features):
    with np.load(files / "ref.npz") as found:
        mean, covariance = gaussian_statistics(features[0].numpy())
        np.testing.assert_allclose(found["mu"], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["sigma"], covariance, rtol=1e-2, atol=1e-4 * np.trace(covariance) / 2048)
        assert (found["count"], found["crop"], found["image_size"], found["skipped"]) == (HELD_OUT, "adm", SIDE, 1)
        assert found["inception"] == file_hash(files / "inception.pth")


def test_where_a_reference_goes_is_asked_before_pictures_are_read(files, capsys, tmp_path):
    def ask(out):
        return mistake(capsys, "reference", files / "val", "--out", out, "--inception", files / "none.pth")

    (tmp_path / "file").touch()
    (tmp_path / "folder.npz").mkdir()
    assert ask(tmp_path / "file" / "r.npz").startswith(f"cannot write the statistics into {tmp_path}/file: Not a d")
    assert ask(tmp_path / "folder.npz") == f"--out {tmp_path / 'folder.npz'} is a folder: give the name of a file in it"
    assert "no Inception-v3 weights" in ask(tmp_path / "new" / "r.npz")


def test_generation_metrics_and_their_protocol(files, features, capsys):
    record = evaluate(files)
    printed = capsys.readouterr()
    assert "12 images determine 11 of the 2048 directions" in printed.err
    assert "not the published weights" in printed.err and "12 images, 4 per class; heun, 4 steps" in printed.out
    assert apart(record["metrics"]["gfid"], distance(features[1], features[0])) < 1e-3
    assert record["metrics"]["is"] == pytest.approx(inception_score(features[2], seed=0)["is"], rel=1e-3)
    protocol = record["protocol"]
    assert protocol["generation"] == {
        "count": 12, "classes": 3, "per_class": 4, "seed": 0, "precision": "fp32", "normalised": True,
        "pixels": "uint8, rounded", "image_size": SIDE, **SETTINGS, "interval": [0.2, 0.9],
    }  # fmt: skip
    model, extractor, reference = (protocol[name] for name in ("model", "inception", "reference"))
    assert model["step"] == 5 and model["run"] == "toy" and len(model["sha256"]) == 64
    assert extractor["sha256"] == file_hash(files / "inception.pth") and not extractor["published"]
    assert reference["sha256"] == file_hash(files / "ref.npz") and reference["count"] == HELD_OUT
    assert protocol["environment"]["versions"]["torch"] == str(torch.__version__)
    assert set(protocol["definitions"]) == {"gfid", "is"}
    assert protocol["definitions"]["is"].startswith("Inception Score, 6 shuffled splits of at most 2 images, ")


def similarity_by_hand(a, b):
    """Mean SSIM of Wang et al. 2004 over all 11×11 windows inside the images [n, 3, H, H], in float64."""
    line = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2

    def mean(x):
        return (x.unfold(2, 11, 1).unfold(3, 11, 1) * window).sum((-2, -1))

    a, b = a.double(), b.double()
    ma, mb = mean(a), mean(b)
    va, vb, both = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    value = (2 * ma * mb + 0.01**2) * (2 * both + 0.03**2) / ((ma**2 + mb**2 + 0.01**2) * (va + vb + 0.03**2))
    return float(value.mean())


def test_held_out_metrics(files, inception, held_out, features, capsys, caplog, monkeypatch):
    warn_once.cache_clear()  # the reference has said what it skips
    similarity, tf32 = torchmetrics.functional.image.structural_similarity_index_measure, []

    def watched(*images, **options):
        tf32.append(torch.backends.cudnn.allow_tf32)
        return similarity(*images, **options)

    monkeypatch.setattr(torchmetrics.functional.image, "structural_similarity_index_measure", watched)
    record = evaluate(files, "--vgg", files / "vgg.pth", "--linear", files / "linear.pth", name="pairs",
                      metrics="rfid,psnr,ssim,lpips,l1,kid,precision,recall")  # fmt: skip
    found, model = record["metrics"], toy_model()
    # Numbered by path, the unreadable file included: 0/00, …, 0/10, 0/broken, 1/01, …
    numbers = [number for number in range(HELD_OUT + 1) if number != 6]
    rebuilt = []
    for number, pixels in zip(numbers, held_out, strict=True):
        noise = philox_normal((16, 4), 0, 0, TOKENIZE_STREAM, draws=1, first_draw=number)
        latents = model.tokenize(pixels[None].float() / 255, noise=noise, t=torch.tensor([0.005]))
        rebuilt.append(model.decode(latents).clamp(0, 1))
    rebuilt, exact = torch.cat(rebuilt), held_out.float() / 255
    errors = (rebuilt - exact).double()
    assert found["psnr"] == pytest.approx(float((-10 * errors.square().mean((1, 2, 3)).log10()).mean()), rel=1e-4)
    assert found["l1"] == pytest.approx(float(errors.abs().mean()), rel=1e-4)
    lpips = Lpips(rescale=True)
    lpips.load_vgg(lpips_weights()[0])
    lpips.load_linear(lpips_weights()[1])
    assert found["lpips"] == pytest.approx(float(lpips(exact, rebuilt)), rel=1e-3)
    assert apart(found["rfid"], distance(features[0], inception(to_bytes(rebuilt))[0])) < 1e-3
    assert tf32 and not any(tf32), "a GPU would round the pixels that SSIM takes differences of"
    assert found["ssim"] == pytest.approx(similarity_by_hand(exact, rebuilt), abs=1e-5)
    assert {name: found[name] for name in ("precision", "recall")} == precision_recall(*features[:2])
    assert found["kid"] == pytest.approx(kernel_distance(*features[:2], seed=0)["kid"], rel=1e-3)
    assert found["kid_subset_size"] == HELD_OUT
    section = record["protocol"]["held_out"]
    assert (section["count"], section["skipped"], section["crop"]) == (HELD_OUT, 1, "adm")
    assert f"held-out images: 1 of {HELD_OUT + 1} cannot be read, left out" in record["protocol"]["warnings"]
    reason = "not an image, or of no accepted format"
    assert f"skipped unusable image {files / 'val' / '0' / 'broken.png'}: {reason}" in caplog.messages
    assert record["protocol"]["lpips"]["vgg"] == file_hash(files / "vgg.pth")


def test_a_folder_that_is_written_in_two_ways_makes_one_record(files, monkeypatch):
    monkeypatch.chdir(files)
    folder = files / "model" / "evaluations"
    before = set(folder.glob("*.json"))
    for path in ("val", "val/", "./val", files / "val"):
        assert run("evaluate", "model", "--metrics", "psnr", "--data", path) == 0
    (made,) = set(folder.glob("*.json")) - before
    assert json.loads(made.read_text())["protocol"]["held_out"]["path"] == str((files / "val").resolve())


def test_batch_and_memory_change_nothing_but_time(files, capsys, monkeypatch):
    whole = evaluate(files, metrics="is", name="whole")
    draw, sizes = evaluator_module.draw, []

    def scarce(model, labels, *rest, **options):
        sizes.append(len(labels))
        if len(labels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(model, labels, *rest, **options)

    monkeypatch.setattr(evaluator_module, "draw", scarce)
    halved = evaluate(files, metrics="is", name="halved")
    assert sizes[:2] == [5, 2] and "going on with 2" in capsys.readouterr().err
    assert apart(halved["metrics"]["is"], whole["metrics"]["is"]) < 1e-3
    assert halved["protocol"]["generation"] == whole["protocol"]["generation"]


def test_images_are_kept_if_asked_for(files, tmp_path):
    evaluate(files, "--save-images", tmp_path / "png", "--guidance", 3, metrics="psnr", name="kept", count=6)
    pictures = sorted((tmp_path / "png").glob("*.png"))
    assert [path.name for path in pictures][:2] == ["000000_class0000.png", "000001_class0001.png"]
    kept = np.stack([read(path) for path in pictures])
    expected = to_bytes(drawn(6, guidance=3.0)).permute(0, 2, 3, 1).numpy()
    assert kept.shape == expected.shape and np.abs(kept.astype(int) - expected).max() <= 1


def test_labels_at_random_are_those_of_seed_and_number(files, tmp_path, capsys):
    """Any count serves then, and pieces of any size hold the same images."""
    record = evaluate(files, "--label-sampling", "random", "--seed", 1, "--save-images", tmp_path / "png", metrics="is",
                      name="random", count=13)  # fmt: skip
    assert "13 images, of classes drawn at random; heun" in capsys.readouterr().out
    generation, labels = record["protocol"]["generation"], random_labels(13, seed=1)
    assert generation["label_sampling"] == "random" and "per_class" not in generation
    pictures = sorted((tmp_path / "png").glob("*.png"))
    assert [path.name for path in pictures] == [f"{i:06d}_class{label:04d}.png" for i, label in enumerate(labels)]
    expected = to_bytes(drawn(13, labels, seed=1)).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.stack([read(path) for path in pictures]).astype(int) - expected).max() <= 1


def test_the_published_sampler_without_guidance(files, tmp_path, capsys):
    record = evaluate(files, "--unnormalised", "--guidance", 1, "--save-images", tmp_path / "png", metrics="is",
                      name="published")  # fmt: skip
    assert "fp32, un-normalised" in capsys.readouterr().out
    generation = record["protocol"]["generation"]
    assert generation["normalised"] is False and "normalise" not in generation
    kept = np.stack([read(path) for path in sorted((tmp_path / "png").glob("*.png"))]).astype(int)
    expected, other = (
        to_bytes(drawn(guidance=1.0, normalise=normalise)).permute(0, 2, 3, 1).numpy() for normalise in (False, True)
    )
    assert np.abs(kept - expected).max() <= 1 < np.abs(kept - other).max()


def test_images_are_drawn_again_for_a_folder_that_lacks_them(files, tmp_path):
    """An evaluation that was killed before its record, then begun again with another folder for its images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator_module.Work, "discard", lambda self: None)
        for name in ("first", "second"):
            assert run("evaluate", files / "model", "--metrics", "psnr", "--count", 6, "--name", "kept", "--data",
                       files / "val", "--save-images", tmp_path / name) == 0  # fmt: skip
            assert len(list((tmp_path / name).glob("*.png"))) == 6
    shutil.rmtree(files / "model" / "evaluations" / ".work")


def test_every_option_reaches_the_measurement(files, capsys, tmp_path):
    record = evaluate(files, "--precision", "bf16", "--data-count", 4, "--seed", 3, "--steps", 3, "--solver", "euler",
                      "--guidance", 2, "--interval", "0.3,0.8", metrics="psnr,is", name="options")  # fmt: skip
    generation, held_out = record["protocol"]["generation"], record["protocol"]["held_out"]
    given = {"precision": "bf16", "seed": 3, "steps": 3, "solver": "euler", "guidance": 2, "interval": [0.3, 0.8]}
    assert {name: generation[name] for name in given} == given
    assert held_out["count"] + held_out["skipped"] == 4 and (held_out["precision"], held_out["seed"]) == ("bf16", 3)
    small = ["evaluate", files / "model", "--metrics", "small", "--count", COUNT, "--data", files / "val"]
    assert str(tmp_path / "none") in mistake(capsys, *small, "--train", tmp_path / "none")
    assert "holds EMA weights only" in mistake(capsys, *small, "--weights", "model")


def test_every_option_reaches_the_search(files, monkeypatch):
    asked = []
    monkeypatch.setattr(Session, "go", lambda self, trained, *given: asked.append(given))
    assert run("evaluate", files / "model", "--search", "guidance") == 0
    options = ["--search", "guidance", "--search-count", 9, "--search-values", "1,2", "--name", "n"]
    assert run("evaluate", files / "model", *options) == run("evaluate", files / "model") == 0
    assert asked == [(["guidance"], 5000, None, None), (["guidance"], 9, [1, 2], "n"), ([], 5000, None, None)]


def test_without_metrics_those_are_measured_that_the_files_allow(tmp_path):
    def chosen(**files):
        session = Session(tmp_path, Plan((), **files), World(0, 1, 0, torch.device("cpu")), {}, "ema", None)
        return session._complete(None)

    assert chosen(data="val").metrics == ("psnr", "ssim", "l1")
    assert chosen(data="val", inception="pt").metrics == ("is", "psnr", "ssim", "l1", "rfid")
    assert chosen(reference="ref", inception="pt").metrics == ("gfid", "is")


def test_dopri5_names_its_batch(files):
    record = evaluate(files, "--solver", "dopri5", metrics="is", name="dopri5", count=12)
    assert record["protocol"]["generation"]["batch"] == 5 and record["protocol"]["generation"]["solver"] == "dopri5"


def test_a_killed_evaluation_goes_on_where_it_stopped(files):
    """SIGKILL between two pieces, then the same command: finished images are not drawn again."""
    command = [sys.executable, "-m", "unite_fast", "evaluate", files / "model", "--metrics", "is", "--count", "12",
               "--batch", "1", "--name", "killed", "--inception", files / "inception.pth"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT)
    work = files / "model" / "evaluations" / ".work"
    deadline = time.monotonic() + 120
    while len(pieces := sorted(work.glob("*/*.safetensors"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= len(pieces) < 12 and not (files / "model" / "evaluations" / "killed.json").exists()
    pieces = sorted(work.glob("*/0*.safetensors"))
    before = {path.name: path.stat().st_mtime_ns for path in pieces}
    finished: list[dict[str, int]] = []
    original = evaluator_module.Work.discard
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator_module.Work, "discard", lambda self: (
            finished.append({path.name: path.stat().st_mtime_ns for path in self.folder.glob("*/0*.safetensors")}),
            original(self),
        ))  # fmt: skip
        assert run(*command[3:]) == 0
    assert len(finished[0]) == 12 and all(finished[0][name] == at for name, at in before.items())
    assert (files / "model" / "evaluations" / "killed.json").exists()


def test_pieces_of_another_folder_with_the_same_names_are_not_taken(files, tmp_path):
    for index in range(6):
        picture(tmp_path / "other" / f"{index % 2}" / f"{index:02d}.png", seed=100 + index)
        picture(tmp_path / "val" / f"{index % 2}" / f"{index:02d}.png", seed=index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator_module.Work, "discard", lambda self: None)  # as where it is killed before the record
        arguments = ["evaluate", files / "model", "--metrics", "psnr", "--batch", "5", "--name", "after", "--data"]
        assert run(*arguments, tmp_path / "val") == run(*arguments, tmp_path / "other") == 0
    after = json.loads((files / "model" / "evaluations" / "after.json").read_text())["metrics"]
    shutil.rmtree(files / "model" / "evaluations" / ".work")
    assert after == evaluate(files, "--data", tmp_path / "other", metrics="psnr", name="alone")["metrics"]


def test_two_ranks_make_the_same_numbers(files):
    """Labels drawn at random among them."""
    alone = evaluate(files, "--label-sampling", "random", metrics="is,psnr", name="alone")
    torchrun(["-m", "unite_fast", "evaluate", files / "model", "--metrics", "is,psnr", "--count", str(COUNT),
              "--label-sampling", "random", "--batch", "5", "--inception", files / "inception.pth",
              "--data", files / "val", "--name", "ranks", "--device", "cpu"])  # fmt: skip
    ranks = json.loads((files / "model" / "evaluations" / "ranks.json").read_text())
    assert ranks["protocol"]["environment"]["ranks"] == 2
    assert ranks["metrics"] == pytest.approx(alone["metrics"], rel=1e-6)


def test_ranks_measure_the_checkpoint_that_the_first_one_found(files, monkeypatch):
    """While a run goes on the others may find a newer one."""
    other = shutil.copytree(files / "model", files / "other")
    monkeypatch.setattr(World, "share", lambda self, value: str(other) if isinstance(value, str) else value)
    assert run("evaluate", files / "model", "--metrics", "psnr", "--data", files / "val", "--name", "shared") == 0
    record = json.loads((other / "evaluations" / "shared.json").read_text())
    assert record["protocol"]["model"]["origin"] == str(other)

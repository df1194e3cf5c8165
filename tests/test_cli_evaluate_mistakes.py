"""What `unite-fast evaluate` and `reference` refuse: mistakes in options, models and images that cannot be measured."""

from __future__ import annotations

import numpy as np
import pytest
from cli_toy import mistake, picture, run, save_toy
from evaluation_files import evaluation_files
from safetensors.torch import load_file, save_file

from unite_fast.evaluation import evaluator as evaluator_module

COUNT = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return evaluation_files(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture()
def ask(files, capsys):
    """The mistake of an evaluation."""

    def said(*options, metrics="gfid", count=COUNT, model=None):
        named = {"--inception": files / "inception.pth", "--reference": files / "ref.npz", "--data": files / "val"}
        named |= dict(zip(options[::2], options[1::2], strict=True))
        given = [(option, value) for option, value in named.items() if value is not None]
        arguments = [part for pair in given for part in pair if part is not True]  # of an option without a value
        return mistake(capsys, "evaluate", model or files / "model", "--metrics", metrics, "--count", count, *arguments)

    return said


def test_all_missing_files_are_told_at_once(files, capsys):
    absent = "--inception", "no.pth", "--reference", "no.npz", "--data", "no", "--train", "none"
    assert run("evaluate", files / "model", "--metrics", "gfid,rfid,lpips,small", "--count", COUNT, *absent) == 2
    head, *lines = capsys.readouterr().err.splitlines()
    assert head == "error: what the metrics need is missing:"
    words = "no (--data,", "none (--train,", "no.pth", "no.npz", "lpips.vgg", "lpips.linear"
    for line, word in zip(lines, words, strict=True):
        assert all(part in line for part in word.split(" (")), line


def test_mistakes_are_told_before_anything_is_drawn(files, ask, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator_module, "draw", lambda *_, **__: pytest.fail("images were drawn"))
    assert ask(metrics="fid").startswith("unknown metric 'fid'; valid: gfid, is")
    assert ask(count=10) == "10 images cannot be balanced over 3 classes: take 9 or 12 (--count, evaluation.count)"
    assert ask(metrics="is", count=9).startswith("the Inception Score needs at least 10 images")
    few = "precision and recall need more than 3 real and generated images each, got "
    assert ask(metrics="recall", count=3).startswith(f"{few}12 and 3 (--data")
    assert ask("--data-count", 2, metrics="precision").startswith(f"{few}2 and 12 (--data")
    assert ask("--data-count", 1, metrics="kid").startswith("KID needs at least 2 real and 2 generated images, got 1 a")
    assert ask("--data-count", 1, metrics="rfid").startswith("rfid needs at least 2 held-out images, got 1 (--data")
    assert ask("--label-sampling", "random", count=1) == (
        "gfid needs at least 2 generated images, got 1 (--count, evaluation.count)"
    )
    assert ask("--inception", None).startswith("Inception features need the Inception-v3 weights: get pt_inception")
    assert "no Inception-v3 weights at" in ask("--inception", tmp_path / "none.pth")
    assert "gfid needs reference statistics" in ask("--reference", None)
    assert "no reference statistics at" in ask("--reference", tmp_path / "none.npz")
    assert ask("--data", None, metrics="psnr,kid").startswith("psnr, kid compare with held-out images: give --data")
    assert ask("--data", tmp_path, metrics="psnr").startswith(f"no image below {tmp_path}")
    assert "objective.lpips.vgg is not set; get https://download.pytorch.org" in ask(
        "--linear", files / "ref.npz", metrics="lpips"
    )
    assert ask("--search", "guidance", metrics="is").startswith("--search needs a score")
    assert ask("--search", "guidance", "--search-count", 10).endswith("classes: take 9 or 12 (--search-count)")
    assert "'w' is not one of guidance, ema" in ask("--search", "w")
    assert "non-negative numbers" in ask("--search", "guidance", "--search-values", "1,x")
    assert ask("--search-values", "1,2") == "--search-values needs --search guidance"
    assert ask("--search-count", 9).endswith("--search-count needs --search guidance or --search ema")
    for option in (("--ema-decay", 0.5), ("--weights", "model")):
        assert ask("--search", "ema", *option).startswith("--search ema chooses among the EMAs: leave out --ema")
    for search in ("guidance", "guidance,guidance"):
        assert ask("--search", search, "--guidance", 2) == "--search guidance finds w: leave out --guidance"
    assert ask("--unnormalised", True, metrics="is").endswith("guidance is 1.5: add --guidance 1")
    assert ask("--unnormalised", True, "--search", "guidance").endswith("leave out --search guidance")
    assert ask("--guidance", "inf") == "--guidance must be a finite number, found inf"
    assert "small has a precision of its own" in ask(metrics="small,precision")
    assert "give both, --train FOLDER and --data FOLDER" in ask(metrics="small")
    assert "holds no checkpoint" in ask("--ema-decay", 0.9)
    save_toy(tmp_path / "full")
    (tmp_path / "full" / "evaluations").touch()
    says = ask(model=tmp_path / "full")
    place = tmp_path / "full" / "evaluations"
    assert says.startswith(f"cannot write evaluations into {place}: Not a directory. Evaluate")
    assert f"unite-fast export {tmp_path / 'full'} --out DIR" in says
    cut = tmp_path / "cut.npz"
    cut.write_bytes((files / "ref.npz").read_bytes()[:1000])
    assert "is truncated or not an .npz" in ask("--reference", cut)
    np.savez(tmp_path / "small.npz", mu=np.zeros(64), sigma=np.eye(64))
    assert "is of another extractor: mu is [64]" in ask("--reference", tmp_path / "small.npz")
    with np.load(files / "ref.npz") as found:
        np.savez(tmp_path / "large.npz", **{**found, "image_size": 256})
    assert "made from images of 256×256 pixels, the model makes 16×16" in ask("--reference", tmp_path / "large.npz")


def test_models_and_images_that_cannot_be_measured(files, ask, tmp_path, capsys):
    save_toy(tmp_path / "diverged")
    weights = load_file(tmp_path / "diverged" / "model.safetensors")
    weights["decoder.token"][:] = float("nan")
    save_file(weights, tmp_path / "diverged" / "model.safetensors")
    assert ask(model=tmp_path / "diverged", metrics="is").startswith("12 of 12 generated images contain NaN")
    assert ask("--guidance", 1e38, metrics="is").endswith("; or guidance 1e+38 is too strong, lower it")
    assert "reconstructions contain NaN" in ask(model=tmp_path / "diverged", metrics="psnr")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
    assert ask("--data", tmp_path / "bad", metrics="psnr") == f"none of the 1 images of {tmp_path / 'bad'} is readable"
    for index in range(4):
        picture(tmp_path / "few" / f"{index}.png", seed=index)
    (tmp_path / "few" / "3.png").write_bytes(b"no picture")
    drawn = ["--data", tmp_path / "few", "--save-images", tmp_path / "drawn"]
    assert "got 3 and 12" in ask(*drawn, metrics="precision")
    assert not (tmp_path / "drawn").exists(), "it is said before images are drawn"
    (tmp_path / "empty").mkdir()
    bare = ["reference", tmp_path / "empty", "--out", tmp_path / "r.npz", "--inception", files / "inception.pth"]
    assert mistake(capsys, *bare).startswith(f"no image below {tmp_path / 'empty'}")
    picture(tmp_path / "one" / "a.png", seed=0)
    bare[1] = tmp_path / "one"
    assert "a covariance needs at least 2 images, got 1" in mistake(capsys, *bare)
    assert "must end in .npz" in mistake(capsys, "reference", tmp_path / "one", "--out", tmp_path / "r.json")
    assert not list(tmp_path.glob("r.*"))
    nothing = mistake(capsys, "evaluate", files / "model")
    assert nothing.startswith("no metrics are chosen for")

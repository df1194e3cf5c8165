"""reconstruct and tokenize: what they compute, how files come to fit, and files that cannot be read."""

import json
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from cli_toy import CONFIG, SIDE, mistake, picture, read, run, save_toy, small_disk
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from unite_fast import load
from unite_fast.data.crop import decode
from unite_fast.evaluation.generation import TOKENIZE_STREAM
from unite_kernels import philox_normal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_toy(path)
    return path


@pytest.fixture()
def pictures(tmp_path):
    """Three images of the right size, one of another, and one that is broken, in two folders."""
    for name, seed in (("a/1.png", 1), ("a/2.png", 2), ("b/1.png", 3)):
        picture(tmp_path / "in" / name, seed)
    picture(tmp_path / "in" / "b" / "2.jpg", 4, (50, 40))
    picture(tmp_path / "in" / "a" / ".hidden.png", 5)
    (tmp_path / "in" / "readme.txt").write_text("no image")
    (tmp_path / "in" / "b" / "0.png").write_bytes((tmp_path / "in" / "b" / "1.png").read_bytes()[:200])
    return tmp_path / "in"


READABLE = ["a/1.png", "a/2.png", "b/1.png", "b/2.jpg"]


def _latents(model, paths, seed):
    """z0 and pixels through the library, one image at a time."""
    pixels = torch.stack([torch.tensor(decode(path.read_bytes(), SIDE, "adm")).permute(2, 0, 1) for path in paths])
    latents, shape = [], (CONFIG.registers, CONFIG.latent_dim)
    for index, image in enumerate(pixels):
        noise = philox_normal(shape, seed, 0, TOKENIZE_STREAM, draws=1, first_draw=index)
        latents.append(model.tokenize(image[None].float() / 255, noise=noise, t=torch.tensor([0.005])))
    return torch.cat(latents), pixels


def _reconstruct(folder, out, *arguments):
    assert run("reconstruct", "--run", folder, "--out", out, *arguments) == 0
    return json.loads((out / "reconstructions.json").read_text())


def test_reconstruct_measures_and_draws(folder, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    record = _reconstruct(folder, out, pictures, "--seed", 3, "--batch", 3)
    printed = capsys.readouterr()
    model = load(folder)
    paths = [pictures / name for name in READABLE]
    z0, pixels = _latents(model, paths, seed=3)
    error = (model.decode(z0).clamp(0, 1) - pixels.float() / 255).flatten(1)
    expected = -10 * error.double().square().mean(1).log10()
    assert [entry["file"] for entry in record["images"]] == [str(path) for path in paths]
    assert [entry["psnr"] for entry in record["images"]] == pytest.approx(expected.tolist(), abs=1e-3)
    assert record["psnr"] == pytest.approx(float(expected.mean()), abs=1e-3)
    assert record["model"]["origin"] == str(folder) and record["seed"] == 3
    assert f"{record['psnr']:.2f}" in printed.out

    assert [entry["picture"] for entry in record["images"]] == [
        "00000_1.png", "00001_2.png", "00002_1.png", "00003_2.png"
    ]  # fmt: skip
    assert {path.name for path in out.iterdir()} == {e["picture"] for e in record["images"]} | {"reconstructions.json"}
    enlarged = np.kron(read(paths[0]), np.ones((2, 2, 1), np.uint8))
    drawn = read(out / "00000_1.png")
    windows = np.lib.stride_tricks.sliding_window_view(drawn, enlarged.shape)[:, :, 0, ::, ::]
    assert (windows[..., 0, 0, :] == enlarged[0, 0]).all(-1).any()


def test_files_that_do_not_fit_are_named(folder, pictures, tmp_path, capsys):
    record = _reconstruct(folder, tmp_path / "out", pictures)
    printed = capsys.readouterr()
    broken = str(pictures / "b" / "0.png")
    assert list(record["skipped"]) == [broken]
    assert f"warning: skipped {broken}: " in printed.err
    assert record["cropped"] == 1
    assert [entry["note"] for entry in record["images"]] == [
        "", "", "", "50×40, resized and centre-cropped to 16×16"
    ]  # fmt: skip
    assert "1 resized and centre-cropped" in " ".join(printed.out.split())


def test_seed_decides_and_batch_does_not(folder, pictures, tmp_path):
    latents = []
    for n, options in enumerate(([], ["--batch", 1], ["--seed", 1])):
        out = tmp_path / f"{n}.safetensors"
        assert run("tokenize", "--run", folder, pictures, "--out", out, *options) == 0
        latents.append(load_file(out)["latents"])
    # Another batch size moves these latents by 2e-6 (rounding), another seed by 3e-3.
    assert torch.allclose(latents[1], latents[0], rtol=0, atol=1e-4)
    assert not torch.allclose(latents[2], latents[0], rtol=0, atol=3e-4)
    records = [_reconstruct(folder, tmp_path / f"out{batch}", pictures, "--batch", batch) for batch in (1, 64)]
    values = [[entry["psnr"] for entry in record["images"]] for record in records]
    assert values[0] == pytest.approx(values[1], abs=1e-3)


def test_links_to_folders_are_searched(folder, pictures, tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("a", "b"):
        (tmp_path / "mine" / name).symlink_to(pictures / name)
    record = _reconstruct(folder, tmp_path / "out", tmp_path / "mine")
    assert [entry["file"] for entry in record["images"]] == [str(tmp_path / "mine" / name) for name in READABLE]


def test_former_pictures_are_no_input(folder, tmp_path):
    picture(tmp_path / "x.png", 1)
    out = tmp_path / "reconstructions"
    for _ in range(2):
        assert len(_reconstruct(folder, out, tmp_path)["images"]) == 1


def test_a_new_call_replaces_the_former_pictures_only(folder, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    _reconstruct(folder, out, pictures)
    (out / "00009_mine.png").write_bytes(b"mine")
    record = _reconstruct(folder, out, pictures / "b" / "1.png", pictures / "a" / "2.png")
    former = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(former) == {"00000_1.png", "00001_2.png", "00009_mine.png", "reconstructions.json"}
    record["images"] += [{"picture": f"../{out.name}/00009_mine.png"}]
    (out / "reconstructions.json").write_text(json.dumps(record))
    with small_disk(100):
        mistake(capsys, "reconstruct", "--run", folder, pictures / "a" / "1.png", "--out", out)
    assert {path.name for path in out.iterdir()} == set(former)
    _reconstruct(folder, out, pictures / "a" / "1.png")
    assert {path.name for path in out.iterdir()} == {"00000_1.png", "00009_mine.png", "reconstructions.json"}


def test_brackets_in_names_are_no_markup(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    model, images = tmp_path / "m[" / "red]model", tmp_path / "in["  # their paths hold a closing tag, "[/red]"
    save_toy(model)
    picture(images / "[bold]x].png", 1)
    (images / "y].png").touch()
    _reconstruct(model, tmp_path / "out[" / "x]", images)
    assert run("export", model, "--out", tmp_path / "copy[" / "x]") == 0
    printed = capsys.readouterr()
    assert all(name in printed.out for name in ("in[/[bold]x].png", "out[/x]", "m[/red]model", "copy[/x]"))
    assert "in[/y].png" in printed.err


def test_long_names_make_pictures(folder, tmp_path):
    picture(tmp_path / ("界" * 80 + ".png"), 1)
    assert len(_reconstruct(folder, tmp_path / "out", tmp_path)["images"]) == 1


def test_tokenize_writes_the_models_latents(folder, pictures, tmp_path, capsys):
    out = tmp_path / "new" / "latents.safetensors"
    assert run("tokenize", "--run", folder, pictures, "--out", out, "--seed", 3, "--batch", 3) == 0
    paths = [pictures / name for name in READABLE]
    expected, _ = _latents(load(folder), paths, seed=3)
    with safe_open(out, framework="pt") as file:
        assert list(file.keys()) == ["latents"]
        latents, metadata = file.get_tensor("latents"), file.metadata()
    assert (latents.dtype, list(latents.shape)) == (torch.float32, [4, CONFIG.registers, CONFIG.latent_dim])
    assert torch.allclose(latents, expected, atol=1e-4)
    assert json.loads(metadata["files"]) == [str(path) for path in paths]
    assert (metadata["seed"], metadata["model"]) == ("3", str(folder))
    printed = capsys.readouterr()
    assert "[4, 16, 4]" in printed.out and "1 skipped" in printed.out and "0.png" in printed.err


def test_tokenize_takes_files_in_the_order_given(folder, pictures, tmp_path):
    out = tmp_path / "latents.safetensors"
    given = [pictures / "b" / "1.png", pictures / "a" / "1.png"]
    assert run("tokenize", "--run", folder, *given, "--out", out) == 0
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["files"]) == [str(path) for path in given]
        assert torch.allclose(file.get_tensor("latents"), _latents(load(folder), given, seed=0)[0], atol=1e-4)


@pytest.mark.parametrize("command", ["reconstruct", "tokenize"])
def test_no_image_to_work_on(command, folder, tmp_path, capsys):
    base = [command, "--run", folder, "--out", tmp_path / "out.safetensors"]
    assert mistake(capsys, *base, tmp_path / "absent.png") == f"no image file or folder {tmp_path / 'absent.png'}"
    (tmp_path / "empty").mkdir()
    assert mistake(capsys, *base, tmp_path / "empty").startswith(f"no image below {tmp_path / 'empty'}: no file there")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.png").write_bytes(b"not an image")
    (tmp_path / "bad" / "2.png").write_bytes(b"")
    says = mistake(capsys, *base, tmp_path / "bad")
    assert says.startswith("none of 2 files is a readable image: ") and "1.png" in says
    assert not (tmp_path / "out.safetensors").exists()


def _bomb(path):
    Image.new("1", (20_000, 20_000)).save(path)


@pytest.mark.parametrize(
    "make",
    [_bomb, lambda path: path.symlink_to("nowhere"), lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")],
    ids=["bomb", "dangling link", "postscript"],
)
def test_hostile_images_cost_no_more_than_themselves(make, folder, tmp_path, capsys):
    picture(tmp_path / "in" / "good.png", 1)
    make(tmp_path / "in" / "zzz.png")
    record = _reconstruct(folder, tmp_path / "out", tmp_path / "in")
    assert len(record["images"]) == 1


def test_tokenize_wants_a_safetensors_name(folder, tmp_path, capsys):
    picture(tmp_path / "x.png", 1)
    says = mistake(capsys, "tokenize", "--run", folder, tmp_path / "x.png", "--out", tmp_path / "latents.npy")
    assert says.endswith("latents.npy: the name must end in .safetensors")


def test_output_that_cannot_be_written(folder, tmp_path, capsys):
    picture(tmp_path / "x.png", 1)
    (tmp_path / "file").touch()
    base = ["--run", folder, tmp_path / "x.png", "--out"]
    assert mistake(capsys, "reconstruct", *base, tmp_path / "file").startswith(f"cannot write into {tmp_path}/file")
    assert mistake(capsys, "tokenize", *base, tmp_path / "file" / "l.safetensors").startswith("cannot write")
    out = tmp_path / "latents.safetensors"
    with small_disk(100):
        assert mistake(capsys, "tokenize", *base, out).startswith(f"cannot write {out}: ")
        assert mistake(capsys, "reconstruct", *base, tmp_path / "out").startswith("cannot write picture")
    assert not out.exists() and list(tmp_path.glob("*.tmp")) == []


def test_tokenize_asks_for_its_folder_before_the_work(folder, tmp_path, capsys, monkeypatch):
    picture(tmp_path / "x.png", 1)
    (tmp_path / "file").touch()
    monkeypatch.setattr("unite_fast.evaluation.generation.encode", Mock(side_effect=AssertionError("encoded")))
    out = tmp_path / "file" / "l.safetensors"
    says = mistake(capsys, "tokenize", "--run", folder, tmp_path / "x.png", "--out", out)
    assert says.startswith("cannot write the latents into ") and "Give --out a file" in says


def test_a_diverged_model_is_named_as_such(tmp_path, capsys):
    from safetensors.torch import save_file

    save_toy(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["latent_norm.bias"][:] = float("nan")
    save_file(weights, path)
    picture(tmp_path / "x.png", 1)
    for command, out in (("tokenize", "l.safetensors"), ("reconstruct", "pictures")):
        says = mistake(capsys, command, "--run", tmp_path / "model", tmp_path / "x.png", "--out", tmp_path / out)
        assert "diverged" in says
        assert not (tmp_path / out).exists()


def test_memory_that_runs_out_names_the_option(folder, tmp_path, capsys, monkeypatch):
    from unite_fast.model.unite import Unite

    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Unite, "tokenize", exhausted)
    picture(tmp_path / "x.png", 1)
    says = mistake(capsys, "tokenize", "--run", folder, tmp_path / "x.png", "--out", tmp_path / "l.safetensors")
    assert says == "the device ran out of memory at --batch 64: try --batch 32"

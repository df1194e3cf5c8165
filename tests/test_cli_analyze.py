"""analyze: the record against the library's own passes, pictures, what is said where something is missing, mistakes."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_toy import CLASSES, CONFIG, MADE_BY, mistake, read, run, save_toy
from PIL import Image
from runs import config, image_tree

from unite_fast.analysis.activations import NOISE_STREAM
from unite_fast.analysis.probing import linear_probe
from unite_fast.analysis.similarity import cka
from unite_fast.analysis.trajectories import trajectory
from unite_fast.engine.loop import train
from unite_fast.evaluation.generation import SAMPLE_STREAM, encode, register_noise
from unite_fast.flow.sampling import generate
from unite_fast.model.io import save_model
from unite_fast.model.unite import Unite

PER_CLASS = 5
PICTURES = {"alignment.png", "alignment_matrix.png", "cosine.png", "entropy.png", "trajectories.png", "probing.png"}


def _tree(root, per_class, seed):
    """Noise, brighter in one colour a class, in a folder a class."""
    generator = np.random.default_rng(seed)
    for label, name in enumerate(sorted(CLASSES)):
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = generator.integers(0, 120, (16, 16, 3))
            pixels[..., label] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index:02d}.png")


def _model():
    """Every weight random, but by so little that latents differ much between images: alignment is of no rounding."""
    torch.manual_seed(0)
    model = Unite(CONFIG).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model whose classes are in the order of their folders, held-out and training images."""
    folder = tmp_path_factory.mktemp("analyze")
    save_model(_model().state_dict(), CONFIG, folder / "model", made_by=MADE_BY | {"class_names": sorted(CLASSES)})
    _tree(folder / "val", PER_CLASS, 0)
    _tree(folder / "train", 8, 1)
    return folder


def _analyze(files, out, *options, data="val"):
    """Record of a call that must succeed."""
    arguments = ["analyze", "--run", files / "model", "--data", files / data, "--out", out, "--times", "0,0.4,1"]
    assert run(*arguments, *options) == 0
    return json.loads((out / "analysis.json").read_text())


@pytest.fixture(scope="module")
def analysis(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("analysis") / "out"
    return _analyze(files, out, "--train", files / "train", "--seed", 3), out


def _held_out(files):
    return _images(files / "val")


def _images(root):
    """Pixels [n, 3, 16, 16] uint8 and labels of class folders."""
    paths = sorted(root.rglob("*.png"), key=lambda path: path.as_posix())
    labels = torch.tensor([sorted(CLASSES).index(path.parent.name) for path in paths])
    return torch.stack([torch.tensor(read(path)) for path in paths]).permute(0, 3, 1, 2), labels


def test_cosines_are_those_of_the_models_own_passes(files, analysis):
    record, _ = analysis
    model, (pixels, labels) = _model(), _held_out(files)
    z0 = encode(model, pixels, seed=3, first=0)
    noise = register_noise(model, len(z0), seed=3, stream=NOISE_STREAM, first=0)
    for place, t in enumerate(record["times"]):
        z_t, times = t * z0 + (1 - t) * noise, torch.full((len(z0),), t)
        for name, asked in (("unlabelled", torch.full_like(labels, 3)), ("labelled", labels)):
            clean = model.denoise(z_t, times, asked)
            expected = F.cosine_similarity(clean, z0, dim=-1).mean()
            assert record["cosine"][name][place] == pytest.approx(float(expected), abs=1e-5)
        expected = F.cosine_similarity(z_t, z0, dim=-1).mean()
        assert record["cosine"]["noised"][place] == pytest.approx(float(expected), abs=1e-5)
    assert record["cosine"]["noised"][-1] == pytest.approx(1)
    assert record["cosine"]["labelled"] != record["cosine"]["unlabelled"]
    mean = F.cosine_similarity(z0.mean(0).expand_as(z0), z0, dim=-1).mean()
    assert record["cosine"]["mean_latent"] == pytest.approx(float(mean), abs=1e-5)


def test_alignment_is_that_of_mean_register_tokens(files, analysis):
    record, _ = analysis
    model, (pixels, _) = _model(), _held_out(files)
    seen = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda _module, _arguments, outputs: seen.append(outputs[0]))
    z0 = encode(model, pixels, seed=3, first=0)
    noise = register_noise(model, len(z0), seed=3, stream=NOISE_STREAM, first=0)
    model.denoise(0.4 * z0 + 0.6 * noise, torch.full((len(z0),), 0.4), torch.full((len(z0),), 3))
    tokenizing, denoising = seen[:5], seen[5:]
    expected = cka(tokenizing[1][:, :16].mean(1), denoising[3][:, -16:].mean(1))
    found = record["alignment"]["cka"]
    assert found["matrix"][1][1][3] == pytest.approx(expected, abs=1e-4)
    for name in ("cka", "cknna"):
        matrices = np.array(record["alignment"][name]["matrix"])
        assert matrices.shape == (3, 5, 5) and np.abs(matrices).max() <= 1 + 1e-9
        assert np.diagonal(matrices, axis1=1, axis2=2).tolist() == record["alignment"][name]["same_block"]


def test_trajectories_end_in_the_sample_and_every_picture_is_drawn(files, analysis):
    record, out = analysis
    assert {path.name for path in out.iterdir()} == PICTURES | {"analysis.json"}
    assert all(read(out / name).std() > 5 for name in PICTURES)
    found = record["trajectories"]
    assert found["rows"] == sorted(CLASSES) and found["times"][0] == 0 and found["times"][-1] == 1
    assert found["cosine_with_sample"][-1] == pytest.approx(1)
    settings = record["protocol"]["sampling"] | {"interval": tuple(record["protocol"]["sampling"]["interval"])}
    model = _model()
    noise = register_noise(model, 3, seed=3, stream=SAMPLE_STREAM, first=0)
    images = generate(model, torch.arange(3), noise=noise, **settings).mul(255).round().permute(0, 2, 3, 1).numpy()
    side = 96  # 16×16 pixels are enlarged six times
    sheet = read(out / "trajectories.png")[:, -16 - side : -16]
    rows = sheet[sheet.shape[0] - 16 - 3 * side - 3 * 2 : sheet.shape[0] - 16]
    for row, image in enumerate(images):
        tile = rows[row * (side + 2) : row * (side + 2) + side]
        assert np.abs(tile[3::6, 3::6].astype(float) - image).max() <= 1


def test_probing_and_protocol(files, analysis):
    record, _ = analysis
    probing = record["probing"]
    assert probing["pixels"] == 1 and probing["chance"] == pytest.approx(1 / 3) and probing["train"] == 24
    assert len(probing["blocks"]) == 5 and all(0 <= value <= 1 for value in [*probing["blocks"], probing["latents"]])
    protocol = record["protocol"]
    assert (record["images"], record["times"]) == (15, [0, 0.4, 1]) and record["notes"] == {}
    assert (protocol["seed"], protocol["neighbours"], protocol["bins"], protocol["precision"]) == (3, 10, 64, "fp32")
    assert (protocol["batch"], protocol["tokenize_time"], len(protocol["penalties"])) == (64, 0.005, 9)
    assert protocol["model"]["step"] == MADE_BY["step"] and protocol["model"]["origin"] == str(files / "model")
    assert protocol["data"]["images"] == 15 and protocol["train"]["path"] == str(files / "train")
    assert len(record["entropy"]) == 10 * CONFIG.depth + 2
    assert all(0 < one["bits"] <= 6 for one in record["entropy"])


def _register_tokens(pixels):
    """[5, n, C] of the first pass."""
    model, seen = _model(), []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda _module, _arguments, outputs: seen.append(outputs[0]))
    z0 = encode(model, pixels, seed=3, first=0)
    before = [16] * 4 + [0]  # patches behind the registers, which the last block leaves out
    return z0, [x[:, x.shape[1] - n - 16 : x.shape[1] - n].mean(1) for x, n in zip(seen, before, strict=True)]


def test_probes_are_fitted_to_training_images_and_measured_on_held_out_ones(files, tmp_path):
    """Of 13 held-out images one stands in the folder of another class."""
    first, _, last = sorted(CLASSES)
    shutil.copytree(files / "val", tmp_path / "val")
    (tmp_path / "val" / last / "00.png").unlink()
    (tmp_path / "val" / last / "01.png").unlink()
    (tmp_path / "val" / last / "02.png").rename(tmp_path / "val" / first / "9.png")
    record = _analyze(files, tmp_path / "out", "--train", files / "train", "--seed", 3, data=tmp_path / "val")
    probing = record["probing"]
    assert probing["pixels"] == pytest.approx(12 / 13) and probing["chance"] == pytest.approx(6 / 13)
    (train, labels), (held_out, truth) = _images(files / "train"), _images(tmp_path / "val")
    (z0, blocks), (z0_held_out, blocks_held_out) = _register_tokens(train), _register_tokens(held_out)
    expected = [
        linear_probe(ours.flatten(1), labels, theirs.flatten(1), truth)
        for ours, theirs in zip([z0, *blocks], [z0_held_out, *blocks_held_out], strict=True)
    ]
    assert [probing["latents"], *probing["blocks"]] == pytest.approx([probe.accuracy for probe in expected])
    assert probing["penalties"][1:] == [probe.penalty for probe in expected]


def test_trajectories_are_of_classes_spread_over_all(files, tmp_path):
    config = CONFIG.model_copy(update={"num_classes": 12})
    model = save_toy(tmp_path / "model", {}, config)
    arguments = ["--data", files / "val", "--out", tmp_path / "out", "--times", "1", "--seed", 3]
    assert run("analyze", "--run", tmp_path / "model", *arguments) == 0
    record = json.loads((tmp_path / "out" / "analysis.json").read_text())
    found, chosen = record["trajectories"], [0, 2, 3, 5, 6, 8, 9, 11]
    assert found["rows"] == [str(label) for label in chosen]
    clean = trajectory(model, torch.tensor(chosen), record["protocol"]["sampling"], 3).clean
    expected = F.cosine_similarity(clean, clean[-1:], dim=-1).mean((1, 2))
    assert found["cosine_with_sample"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_batches_change_nothing(files, analysis, tmp_path):
    again = _analyze(files, tmp_path / "out", "--train", files / "train", "--seed", 3, "--batch", 4)
    for path in (("cosine", "unlabelled"), ("alignment", "cka", "same_block"), ("probing", "blocks")):
        ours, theirs = again, analysis[0]
        for key in path:
            ours, theirs = ours[key], theirs[key]
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_count_spreads_over_the_classes(files, tmp_path):
    record = _analyze(files, tmp_path / "out", "--train", files / "train", "--count", 12, "--train-count", 6)
    assert (record["images"], record["probing"]["train"]) == (12, 6)
    assert record["probing"]["chance"] == pytest.approx(1 / 3)


def test_without_classes_or_training_images_probing_is_left_out_and_said(files, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "probing.png").touch()  # of a former call
    (tmp_path / "flat").mkdir()
    for index, path in enumerate((files / "val").rglob("*.png")):
        shutil.copy(path, tmp_path / "flat" / f"{index}.png")
    for options, says in (
        (["--train", files / "train", "--data", tmp_path / "flat"], "flat"),
        (["--train", tmp_path / "flat"], "holds no class folders"),
        ([], "no training images are known to fit probes to: give --train DIR"),
        (["--train", files / "val"], "probes need other images than"),
    ):
        capsys.readouterr()
        record = _analyze(files, out, *options)
        assert record["probing"] is None and says in record["notes"]["probing"]
        assert f"warning: probing: {record['notes']['probing']}" in capsys.readouterr().err
        assert {path.name for path in out.iterdir()} == PICTURES - {"probing.png"} | {"analysis.json"}
        assert (record["cosine"]["labelled"] is None) == (says == "flat")


def test_unreadable_files_are_left_out_and_said(files, tmp_path):
    shutil.copytree(files / "val", tmp_path / "val")
    (tmp_path / "val" / sorted(CLASSES)[0] / "00a.png").write_bytes(b"no picture")  # labels behind it stay in place
    shutil.copytree(files / "train", tmp_path / "train")
    for name in ("02.png", "03.png"):
        (tmp_path / "train" / sorted(CLASSES)[1] / name).write_bytes(b"no picture")
    record = _analyze(files, tmp_path / "out", "--data", tmp_path / "val", "--train", tmp_path / "train")
    assert (record["images"], record["probing"]["train"], record["probing"]["pixels"]) == (15, 22, 1)
    broken = [tmp_path / "val" / sorted(CLASSES)[0] / "00a.png", tmp_path / "train" / sorted(CLASSES)[1] / "02.png"]
    assert record["notes"] == {
        what: f"{count} unreadable files were left out, the first {path}"
        for what, count, path in zip(("images", "training images"), (1, 2), broken, strict=True)
    }


def test_a_run_says_what_to_analyze(tmp_path, capsys):
    image_tree(tmp_path / "train")
    image_tree(tmp_path / "val", per_class=8)
    folder = train(config(tmp_path, data={"val_path": str(tmp_path / "val")}, train={"steps": 10}))
    assert run("analyze", "--run", folder, "--times", "0.5") == 0
    record = json.loads((folder / "analysis" / "analysis.json").read_text())
    protocol = record["protocol"]
    assert protocol["data"]["path"] == str(tmp_path / "val") and protocol["train"]["path"] == str(tmp_path / "train")
    assert (record["images"], record["probing"]["train"], protocol["model"]["weights"]) == (16, 24, "ema")
    assert protocol["data"]["crop"] == protocol["train"]["crop"] == "none"
    assert run("analyze", "--run", folder, "--times", "0.5", "--weights", "model") == 0
    as_trained = json.loads((folder / "analysis" / "analysis.json").read_text())
    assert as_trained["protocol"]["model"]["weights"] == "model"
    assert as_trained["entropy"] != record["entropy"]
    (tmp_path / "train").rename(tmp_path / "moved")
    assert run("analyze", "--run", folder, "--times", "0.5") == 0, "probes alone need them"
    record = json.loads((folder / "analysis" / "analysis.json").read_text())
    assert record["probing"] is None and f"no folder of images at {tmp_path / 'train'}" in record["notes"]["probing"]
    (tmp_path / "val").rename(tmp_path / "also moved")
    says = mistake(capsys, "analyze", "--run", folder)
    assert says == f"no folder of images at {tmp_path / 'val'}; --data DIR names other images"
    says = mistake(capsys, "analyze", "--run", folder, "--data", tmp_path / "moved", "--train", tmp_path / "val")
    assert says == f"no folder of images at {tmp_path / 'val'}"


def test_a_fresh_network_whose_outputs_are_all_alike(files, tmp_path):
    """Its last layer is zero, so every latent is: numbers that are not defined are null, and nothing fails."""
    save_model(Unite(CONFIG).state_dict(), CONFIG, tmp_path / "model", made_by={})
    arguments = ["--data", files / "val", "--out", tmp_path / "out", "--times", "1"]
    assert run("analyze", "--run", tmp_path / "model", *arguments) == 0
    record = json.loads((tmp_path / "out" / "analysis.json").read_text(), parse_constant=pytest.fail)
    assert record["alignment"]["cka"]["same_block"] == [[None] * 5]
    assert record["cosine"]["unlabelled"] == [0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--times", "0.5,0.2"], "--times '0.5,0.2' must be increasing numbers between 0 and 1"),
        (["--times", "0,2"], "must be increasing numbers between 0 and 1"),
        (["--times", "nan"], "must be increasing numbers between 0 and 1"),
        (["--times", ""], "must be increasing numbers between 0 and 1"),
        (["--data", "absent"], "no folder of images at absent"),
        ([], "does not name images to analyze it on"),
        (["--ema-decay", "0.5"], "holds no checkpoint"),
    ],
)
def test_mistakes(options, says, files, tmp_path, capsys):
    out = tmp_path / "out"
    assert says in mistake(capsys, "analyze", "--run", files / "model", "--out", out, *options)
    assert not out.exists()


def test_a_run_that_is_none_or_not_of_images(tmp_path, capsys):
    assert mistake(capsys, "analyze", "--run", tmp_path / "absent") == f"no folder {tmp_path / 'absent'}"
    from unite_fast.molecules.config import AtomDecoderConfig, MoleculeModelConfig
    from unite_fast.molecules.model import MoleculeUnite

    sizes = MoleculeModelConfig(depth=1, width=16, heads=2, latent_dim=4,
                                decoder=AtomDecoderConfig(depth=1, width=16, heads=2))  # fmt: skip
    save_model(MoleculeUnite(sizes).state_dict(), sizes, tmp_path / "molecules", made_by={})
    says = mistake(capsys, "analyze", "--run", tmp_path / "molecules")
    assert "is a model of molecules, and analyze supports image models only" in says


def test_too_few_images_and_diverged_weights(files, tmp_path, capsys):
    (tmp_path / "few").mkdir()
    for index in range(3):
        shutil.copy(files / "val" / "dog" / f"0{index}.png", tmp_path / "few")
    arguments = ["analyze", "--run", files / "model", "--out", tmp_path / "out"]
    says = mistake(capsys, *arguments, "--data", tmp_path / "few")
    assert says.startswith("CKNNA of 10 neighbours needs at least 11 readable images, got 3")
    state = _model().state_dict()
    state["encoder.blocks.0.norm3"][0] = float("nan")
    save_model(state, CONFIG, tmp_path / "nan", made_by={})
    arguments = ["analyze", "--run", tmp_path / "nan", "--out", tmp_path / "out", "--data", files / "val"]
    assert "encoder.blocks.0.norm3 holds NaN or infinite values" in mistake(capsys, *arguments)


def test_what_stops_it_leaves_the_former_analysis(files, tmp_path, capsys, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "analysis.json").write_text("former")
    monkeypatch.setattr("unite_fast.analysis.study.study", exhausted)
    arguments = ["analyze", "--run", files / "model", "--data", files / "val", "--out"]
    says = mistake(capsys, *arguments, tmp_path / "out", "--batch", 6)
    assert says == "the device ran out of memory at --batch 6: try --batch 3"
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["former"]
    says = mistake(capsys, *arguments, tmp_path / "out" / "analysis.json")  # is asked before the study begins
    assert says.startswith("cannot write the analysis into ") and says.endswith("Give --out a folder that takes files.")


def test_training_does_not_load_it():
    code = (
        "import sys, unite_fast.engine.loop, unite_fast.images, unite_fast.cli\n"
        "parts = ['study', 'activations', 'similarity', 'entropy', 'probing', 'study_pictures', 'trajectories']\n"
        "assert not [p for p in parts if f'unite_fast.analysis.{p}' in sys.modules]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

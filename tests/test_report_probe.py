"""What a report computes: classes, images and neighbours by hand; what it is asked for and what stops it."""

import math

import numpy as np
import pytest
import torch
from cli_toy import CONFIG, MADE_BY, mistake, picture, save_toy
from PIL import Image
from runs import config, config_file, image_tree

from unite_fast.errors import UserError
from unite_fast.evaluation.generation import SAMPLE_STREAM, encode, register_noise
from unite_fast.flow.sampling import generate
from unite_fast.importing import open_trained
from unite_fast.report import neighbours as neighbours_module
from unite_fast.report import probe as probe_module
from unite_fast.report import write_report
from unite_fast.report.neighbours import find_neighbours
from unite_fast.report.probe import Options, _statistics, probe, silent

NAMES = ["class_0", "class_1"]


def _search(settings, samples, held_out=None, classes=NAMES):
    return find_neighbours(samples, classes, settings, held_out, silent)


def test_a_near_copy_is_nearer_than_all_but_a_hundredth_of_held_out_images(tmp_path):
    """One black training image: distances are the levels themselves. Of 1 … 101 the hundredth part lies below 2."""
    for name in NAMES:
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "train" / name / "0.png")
    grey = torch.arange(1, 102, dtype=torch.uint8).view(101, 1, 1, 1).expand(101, 3, 16, 16)
    held_out = grey, torch.ones(101, dtype=torch.int64)
    levels = 1.5, 3.5, 200.0
    samples = torch.tensor(levels).view(3, 1, 1, 1).expand(3, 3, 16, 16) / 255
    found = _search(config(tmp_path), {1: samples}, held_out)
    assert found.median == pytest.approx(51 / 255, rel=1e-4) and found.near_copies == 1
    assert [match.share for match in found.matches] == pytest.approx([1 / 101, 3 / 101, 1])
    assert [match.distances for match in found.matches] == [[pytest.approx(v / 255, rel=1e-4)] for v in levels]
    assert (found.side, found.mirrored) == (16, True)


def test_large_images_are_compared_after_averaging(tmp_path):
    for label, name in enumerate(NAMES):
        image = picture(tmp_path / "train" / name / "0.png", label, size=(64, 64))
    settings = config(tmp_path, model={"image_size": 64}, data={"flip": False})
    sample = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = _search(settings, {1: sample})
    apart = sample[0].permute(1, 2, 0).numpy() - image / 255
    expected = math.sqrt((apart.reshape(32, 2, 32, 2, 3).mean((1, 3)) ** 2).mean())
    assert found.side == 32 and found.matches[0].distances == [pytest.approx(expected, rel=1e-4)]
    picture(tmp_path / "train" / "class_1" / "0.png", 1, size=(80, 64))
    with pytest.raises(UserError, match="80×64"):  # under crop "none", as in training
        _search(settings, {1: sample})
    assert _search(config(tmp_path, model={"image_size": 64}, data={"crop": "adm"}), {1: sample}).searched == 1


def test_what_was_searched_is_counted(tmp_path, monkeypatch):
    image_tree(tmp_path / "train")
    samples = dict.fromkeys((0, 1), torch.zeros(1, 3, 16, 16))
    for index in range(5):
        (tmp_path / "train" / "class_1" / f"{index:03d}.png").write_bytes(b"no picture")
    settings = config(tmp_path)
    found = _search(settings, samples)
    assert (found.searched, found.classes, found.whole) == (19, 2, True)
    for others in (["class_0", "other"], ["0", "1"]):
        with pytest.raises(UserError, match="class folders of .* differ from those of the training data"):
            _search(settings, samples, classes=others)
    assert _search(settings, samples, classes=None).searched == 19
    for index in range(5):
        (tmp_path / "train" / "class_1" / f"{index:03d}.png").unlink()
    monkeypatch.setattr(neighbours_module, "MOST_PER_CLASS", 9)
    found = _search(settings, samples)
    assert (found.searched, found.whole) == (16, False)
    for path in (tmp_path / "train" / "class_0").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="no training image of class class_0 can be read"):
        _search(settings, samples)


def _pixels(images):
    """[n, 3, H, H] in [0, 1] -> [n, H, H, 3] in 0 … 255."""
    return images.mul(255).permute(0, 2, 3, 1).numpy()


@pytest.fixture()
def eight(tmp_path):
    """A model of eight classes, the configuration of its run, 32 held-out images [32, 3, 16, 16] uint8."""
    names = [f"class_{label}" for label in range(8)]
    sizes = CONFIG.model_copy(update={"num_classes": 8})
    save_toy(tmp_path / "model", MADE_BY | {"class_names": names}, sizes)
    image_tree(tmp_path / "train", per_class=2, classes=2)
    for label, name in enumerate(names):
        for index in range(4):
            picture(tmp_path / "train" / name / f"{index}.png", 100 + 4 * label + index)
            picture(tmp_path / "val" / name / f"{index}.png", 4 * label + index)
    pixels = [picture(tmp_path / "again.png", seed) for seed in range(32)]
    data = {"val_path": str(tmp_path / "val")}
    settings = config(tmp_path, model={"num_classes": 8}, data=data, evaluation={"sheet_classes": 3})
    return open_trained(tmp_path / "model"), settings, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def _probe(eight, **options):
    trained, settings, _ = eight
    return probe(trained, trained.build(), settings, Options(**{"columns": 3, "seed": 3, "batch": 4} | options))


def test_rows_are_of_classes_spread_over_all(eight, monkeypatch):
    monkeypatch.setattr(probe_module, "TRAJECTORY_CLASSES", 2)
    monkeypatch.setattr(probe_module, "NEIGHBOUR_CLASSES", 2)
    result = _probe(eight)
    assert [row.name for row in result.samples] == ["class_0", "class_4", "class_7"]  # 3.5 rounds to the even one
    assert [row.name for row in result.trajectory] == ["class_0", "class_7"] and result.step == MADE_BY["step"]
    model, labels = eight[0].build(), torch.tensor([0, 0, 0, 4, 4, 4, 7, 7, 7])
    noise = register_noise(model, 9, seed=3, stream=SAMPLE_STREAM, first=0)
    with torch.no_grad():
        images = _pixels(generate(model, labels, noise=noise, **result.sampling))
        last = _pixels(generate(model, labels[[0, -1]], noise=noise[:2], **result.sampling))
    assert np.abs(np.concatenate([row.images for row in result.samples]) - images).max() < 1.5
    assert np.abs(np.stack([row.images[-1] for row in result.trajectory]) - last).max() < 1.5
    matches = result.neighbours.matches
    assert [match.name for match in matches] == ["class_0", "class_0", "class_7", "class_7"]
    for match, place in zip(matches, (0, 1, 6, 7), strict=True):
        assert np.abs(match.sample - images[place]).max() < 1.5


def test_reconstructions_are_spread_over_the_held_out_images(eight):
    result, pixels = _probe(eight, held_out=30), eight[2]
    taken = [4 * label + index for index in range(4) for label in range(8)][:30]  # a class after the other
    places = [round(place * 29 / 23) for place in range(24)]
    shown = pixels[taken][places].permute(0, 2, 3, 1)
    assert np.array_equal(result.originals, shown.numpy()) and result.latents.count == 30
    model = eight[0].build()
    z0 = encode(model, pixels[taken], seed=3, first=0)
    with torch.no_grad():
        rebuilt = model.decode(z0).clamp(0, 1)[places]
    assert np.abs(result.reconstructions - _pixels(rebuilt)).max() < 1.5
    assert result.latents.mean == pytest.approx(z0.mean((0, 1)).numpy(), abs=1e-4)
    one = _probe(eight, held_out=1)
    assert one.latents is None and "at least two" in one.notes["latents"] and len(one.psnr) == 1


def test_held_out_images_of_other_classes_are_said(eight, tmp_path):
    (tmp_path / "val" / "class_3").rename(tmp_path / "val" / "other")
    result = _probe(eight)
    assert result.originals is None and "other" in result.notes["reconstructions"]
    assert result.neighbours.near_copies is None


@pytest.fixture()
def folder(tmp_path):
    """As little of a run as a report with a model needs."""
    (tmp_path / "run").mkdir()
    config_file(tmp_path / "run", evaluation={"batch": 24, "sheet_columns": 5})
    save_toy(tmp_path / "run" / "export")
    return tmp_path / "run"


def test_the_run_says_what_the_caller_does_not(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(probe_module, "probe", lambda trained, model, config, options, progress: asked.append(options))
    write_report(folder)
    write_report(folder, held_out=7, seed=3, batch=5)
    assert asked == [Options(5, 256, 0, 24), Options(5, 7, 3, 5)]


def test_what_stops_the_model_is_one_sentence(folder, monkeypatch, capsys):
    def stopped(error):
        def probe(*_, **__):
            raise error

        monkeypatch.setattr(probe_module, "probe", probe)

    stopped(torch.OutOfMemoryError("CUDA out of memory"))
    assert mistake(capsys, "report", folder) == "the device ran out of memory at --batch 24: try --batch 12"
    assert mistake(capsys, "report", folder, "--batch", 6).endswith("at --batch 6: try --batch 3")
    stopped(ValueError("width 3"))
    assert mistake(capsys, "report", folder) == f"cannot run the model of {folder}: width 3"
    assert not (folder / "report.html").exists()
    (folder / "config.json").write_text('{"evaluation": 3}')
    assert mistake(capsys, "report", folder).endswith("is not a run's configuration: its evaluation must be an object")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A configuration over 12 training images a class, and those of class 1 as [12, 3, 16, 16] uint8."""
    folder = tmp_path_factory.mktemp("data")
    image_tree(folder / "train")
    images = [np.asarray(Image.open(path)) for path in sorted((folder / "train" / "class_1").iterdir())]
    return folder, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("flip", [False, True])
def test_copies_are_found(flip, data):
    folder, train = data
    names = ["class_0", "class_1"]
    copy, mirrored = train[3] / 255, train[5].flip(-1) / 255
    noise = torch.randint(-30, 30, train.shape, generator=torch.Generator().manual_seed(0))
    held_out = ((train + noise).clamp(0, 255).byte(), torch.tensor([1] * 9 + [0] * 3))  # three are of another class
    settings = config(folder, data={"flip": flip})
    found = find_neighbours({1: torch.stack([copy, mirrored])}, names, settings, held_out, silent)
    assert (found.searched, found.classes, found.held_out, found.whole) == (12, 1, 9, True)
    known = torch.cat([train, train.flip(-1)]) if flip else train
    apart = (held_out[0][:9, None].double() / 255 - known[None] / 255).square().mean((2, 3, 4)).sqrt().amin(1)
    assert found.median == pytest.approx(float(apart.quantile(0.5)), rel=1e-4)
    # cdist by matrix products loses half of float32's digits
    assert found.matches[0].distances[0] < 1e-3 and found.matches[0].share == 0
    assert np.array_equal(found.matches[0].nearest[0], train[3].permute(1, 2, 0).numpy())
    assert (found.matches[1].distances[0] < 1e-3) is flip and found.near_copies == 1 + flip
    flat, every = mirrored.flatten().double(), (train / 255).flatten(1).double()
    if not flip:
        expected = (every - flat).square().mean(1).sqrt().sort().values[:3].tolist()
        assert found.matches[1].distances == pytest.approx(expected, rel=1e-4)


def test_neighbours_without_held_out_images(data):
    folder, train = data
    found = find_neighbours({1: train[:1] / 255}, ["class_0", "class_1"], config(folder), None, silent)
    assert found.near_copies is None and found.median is None and found.matches[0].share is None


def test_statistics_of_latents():
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(400, 8, 6, generator=generator) * torch.tensor([1, 1, 1, 1, 0.0, 0.0]) + 0.5
    wide = _statistics(20 * z0)  # as without a latent norm
    assert wide.histogram.sum() * 2 * wide.range / len(wide.histogram) == pytest.approx(1, abs=0.01)
    latents = _statistics(z0)
    assert latents.range == pytest.approx(4, abs=0.3)
    assert latents.mean == pytest.approx(np.full(6, 0.5), abs=0.06)
    assert latents.std == pytest.approx([1, 1, 1, 1, 0, 0], abs=0.06)
    assert latents.rank == pytest.approx(4, abs=0.05)
    assert latents.spectrum == pytest.approx([0.25] * 4 + [0, 0], abs=0.02)
    assert latents.spectrum[0] == max(latents.spectrum)
    width = 2 * latents.range / len(latents.histogram)
    assert latents.histogram.sum() * width == pytest.approx(1, abs=0.01)
    assert latents.reference.sum() * width == pytest.approx(1, abs=0.01)

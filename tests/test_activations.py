"""What `analyze` takes from a folder and from both passes: images, labels, register tokens, and what is refused."""

import hashlib

import numpy as np
import pytest
import torch
from cli_toy import CONFIG, picture, toy_model

from unite_fast.analysis.activations import NOISE_STREAM, Images, denoise, tokenize
from unite_fast.config import DataConfig
from unite_fast.errors import UserError
from unite_fast.evaluation.generation import encode, register_noise

CLASSES = ["a", "b", "c"]


def _open(path, count=100, crop="none", classes=CLASSES, sizes=CONFIG):
    return Images.open(path, DataConfig(path="", crop=crop), sizes, classes, count)


def _tokenize(images, model=None, batch=4):
    return tokenize(model or toy_model(), images, seed=3, batch=batch, advance=lambda done: None)


@pytest.fixture()
def tree(tmp_path):
    """Nine pictures of three classes; pixels [9, 3, 16, 16] uint8 by sorted path."""
    pixels = [picture(tmp_path / name / f"{index}.png", 3 * label + index)
              for label, name in enumerate(CLASSES) for index in range(3)]  # fmt: skip
    return tmp_path, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def test_a_selection_is_spread_and_known_by_its_files(tree):
    path, pixels = tree
    (path / "b" / "2.png").write_bytes(b"no picture")
    found = _tokenize(images := _open(path, count=5), batch=2)
    kept = [0, 1, 3, 7]  # and 5, which is no picture
    assert found.labels.tolist() == [0, 0, 1, 2] and found.unreadable == [str(path / "b" / "2.png")]
    torch.testing.assert_close(found.pixels, pixels[kept].flatten(1) / 255)
    blank = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)  # noise is by place among those chosen, readable or not
    z0 = encode(toy_model(), torch.cat([pixels[[0, 1, 3]], blank, pixels[[7]]]), seed=3, first=0)
    torch.testing.assert_close(found.z0, z0[[0, 1, 2, 4]], rtol=1e-4, atol=1e-4)
    names = "\n".join(["a/0.png", "a/1.png", "b/0.png", "b/2.png", "c/1.png"])
    assert images.about == {
        "path": str(path), "images": 5, "crop": "none", "names_sha256": hashlib.sha256(names.encode()).hexdigest(),
    }  # fmt: skip


def test_probes_see_pixels_of_at_most_sixteen(tmp_path):
    sizes = CONFIG.model_copy(update={"image_size": 32})
    pixels = torch.from_numpy(picture(tmp_path / "a" / "0.png", 0, size=(32, 32)).astype(np.float32))
    found = _tokenize(_open(tmp_path, classes=None, sizes=sizes), toy_model(sizes))
    expected = pixels.view(16, 2, 16, 2, 3).mean((1, 3)).permute(2, 0, 1) / 255
    torch.testing.assert_close(found.pixels, expected.reshape(1, -1))


def test_images_of_another_size_are_cropped_as_in_training(tmp_path):
    for name in CLASSES:
        picture(tmp_path / name / "0.png", 0, size=(20, 24))
    with pytest.raises(UserError, match="20×24"):
        _tokenize(_open(tmp_path))
    cropped = _open(tmp_path, crop="adm")
    assert len(_tokenize(cropped).z0) == 3 and cropped.about["crop"] == "adm"


def test_folders_of_other_classes_have_no_labels(tree):
    images = _open(tree[0], classes=["a", "b", "d"])
    assert images.labels is None and len(images) == 9 and "d" in images.unlabelled
    assert _open(tree[0], classes=None).labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize(("shared", "context"), [(True, CONFIG.context_len), (False, CONFIG.context_len), (True, 0)])
def test_each_latent_is_denoised_under_its_own_label_by_the_second_pass(shared, context):
    model = toy_model(CONFIG.model_copy(update={"shared": shared, "context_len": context}))
    z0, labels = torch.randn(5, 16, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 0, 1, 1, 3])
    found = denoise(model, z0, 0.4, labels, seed=3, batch=2, advance=lambda done: None)
    raw = []
    for block in (model.encoder if shared else model.denoiser).blocks:
        block.register_forward_hook(lambda _module, _arguments, outputs: raw.append(outputs[0]))
    noise = register_noise(model, 5, seed=3, stream=NOISE_STREAM, first=0)
    expected = model.denoise(0.4 * z0 + 0.6 * noise, torch.full((5,), 0.4), labels)
    torch.testing.assert_close(found.clean, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.blocks, torch.stack([x[:, -16:].mean(1) for x in raw]), rtol=1e-4, atol=1e-4)


def test_latents_that_are_not_finite_and_files_that_are_no_pictures_are_refused(tree):
    path, _ = tree
    model = toy_model()
    model.encoder.register_in.weight[0] = float("inf")
    with pytest.raises(UserError, match="latents"):
        _tokenize(_open(path), model)
    for file in path.rglob("*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(UserError, match=f"none of 9 files of {path} is a readable image"):
        _tokenize(_open(path))

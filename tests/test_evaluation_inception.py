"""Inception-v3: its features against torch-fidelity's, the resize of TensorFlow 1, and files that are no weights."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from inception_toy import inception_weights

from unite_fast.errors import UserError
from unite_fast.evaluation.inception import Inception, resize_tf1
from unite_fast.weights import file_hash


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(inception_weights(), path)
    return path


@pytest.fixture()
def fidelity(monkeypatch):
    """torch-fidelity's extractor module; the package's own __init__ would import torchvision for other extractors."""
    folder = Path(sys.prefix) / "rivals" / "torch_fidelity"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: `make test` installs it there (pip install --no-deps --target …/rivals)")
    package = types.ModuleType("torch_fidelity")
    package.__path__ = [str(folder)]
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    yield importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    for name in [name for name in sys.modules if name.startswith("torch_fidelity.")]:
        del sys.modules[name]


def images(size, count=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *size), generator=generator, dtype=torch.uint8)


def test_features_and_logits_agree_with_torch_fidelity(fidelity, tmp_path):
    # Their loader is strict about batch norm's counters, which neither side uses.
    variances = [name for name in inception_weights() if name.endswith("running_var")]
    counters = {name.replace("running_var", "num_batches_tracked"): torch.tensor(0) for name in variances}
    torch.save(inception_weights() | counters, tmp_path / "counted.pth")
    theirs = fidelity.FeatureExtractorInceptionV3("toy", ["2048", "logits_unbiased"], str(tmp_path / "counted.pth"))
    ours = Inception.open(tmp_path / "counted.pth")
    for size in ((32, 32), (40, 61), (310, 299)):
        batch = images(size)
        features, logits = ours(batch)
        expected_features, expected_logits = theirs(batch)
        assert features.shape == (1, 2048) and logits.shape == (1, 1008)
        assert features.std() > 0.01, "the comparison needs features that carry something"
        # Folded batch norms round in another order: 94 layers of 6e-8 each.
        assert torch.dist(features, expected_features) < 1e-4 * expected_features.norm()
        assert torch.dist(logits, expected_logits) < 1e-4 * expected_logits.norm()


def test_the_architecture_is_the_published_one(weights):
    model = Inception.open(weights)
    assert len(list(model.convolutions())) == 94
    # 23,834,568 with the classifier of 1,000 classes (Szegedy et al.), batch norms counted by scale and shift.
    folded = sum(parameter.numel() for parameter in model.parameters())
    channels = sum(module.out_channels for _, module in model.convolutions())
    assert folded + channels - 8 * 2049 == 23_834_568
    assert model.sha256 == file_hash(weights) and not model.published


def test_images_are_independent_of_their_batch(weights):
    model = Inception.open(weights)
    batch = images((24, 24), count=2)
    together = model(batch)[0]
    assert torch.allclose(together[1], model(batch[1:])[0][0], rtol=1e-4, atol=1e-5)
    assert torch.dist(together[0], together[1]) > 1e-3 * together[0].norm()


def test_the_resize_is_tensorflows():
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    # Output i lies at i·4/8; the last one has no right neighbour and repeats it.
    expected = torch.tensor([0, 0.5, 1, 1.5, 2, 2.5, 3, 3])
    assert torch.equal(resize_tf1(ramp, 8)[0, 0, 5], expected)
    assert torch.equal(resize_tf1(ramp.mT, 8)[0, 0, :, 5], expected)
    assert torch.equal(resize_tf1(ramp, 2)[0, 0, 0], torch.tensor([0.0, 2.0]))
    assert torch.equal(resize_tf1(ramp, 4), ramp)


def _refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        Inception.open(path)
    message = str(caught.value)
    assert "pt_inception-2015-12-05-6726825d.pth from https://" in message and "--inception" in message
    return message


def test_files_that_are_not_the_weights(weights, tmp_path):
    assert "need the Inception-v3 weights" in _refusal(None)
    assert f"no Inception-v3 weights at {tmp_path / 'absent.pth'}" in _refusal(tmp_path / "absent.pth")
    named = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    named.write_bytes(weights.read_bytes())
    assert "begin with 6726825d, but it begins with " + file_hash(weights)[:8] in _refusal(named)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(weights.read_bytes()[:100_000])
    assert "truncated or not a PyTorch file" in _refusal(cut)
    other = tmp_path / "other.pth"
    torch.save({"layer.weight": torch.zeros(2)}, other)
    assert "'Conv2d_1a_3x3.conv.weight' is missing" in _refusal(other)
    torch.save(inception_weights() | {"fc.weight": torch.zeros(1000, 2048)}, other)
    assert "'fc.weight' has shape [1000, 2048], expected [1008, 2048]" in _refusal(other)
    name = "Mixed_6e.branch7x7_2"
    for part, value in (("conv.weight", float("nan")), ("bn.running_var", -1.0)):
        entry = inception_weights()[f"{name}.{part}"].clone()
        entry.view(-1)[0] = value
        torch.save(inception_weights() | {f"{name}.{part}": entry}, other)
        assert f"the weights of '{name}' hold NaN or infinite values" in _refusal(other)

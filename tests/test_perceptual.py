"""LPIPS against a straightforward reading of its definition, on random weights, and what it says of wrong files."""

import pytest
import torch
import torch.nn.functional as F
from kernel_testing import DEVICE, on_backend

from unite_fast.config import LpipsConfig, ObjectiveConfig
from unite_fast.errors import UserError
from unite_fast.objective.draws import SeededDraws
from unite_fast.objective.perceptual import CHANNELS, STAGES, Lpips
from unite_fast.objective.two_pass import Objective
from unite_fast.weights import write_tensors


def weights() -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(0)
    vgg, inputs = {}, 3
    for indices, channels in zip(STAGES, CHANNELS):
        for index in indices:
            scale = (2 / (9 * inputs)) ** 0.5
            vgg[f"features.{index}.weight"] = torch.randn(channels, inputs, 3, 3, generator=generator) * scale
            vgg[f"features.{index}.bias"] = torch.randn(channels, generator=generator) * 0.1
            inputs = channels
    vgg["classifier.0.weight"] = torch.zeros(1)  # the files carry more than LPIPS reads
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for i, c in enumerate(CHANNELS)}
    return vgg, linear


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    vgg, linear = weights()
    write_tensors(vgg, folder / "vgg.safetensors")
    torch.save(linear, folder / "linear.pth")
    return folder


def configured(files, **options) -> Lpips:
    return Lpips.from_config(
        LpipsConfig(vgg=str(files / "vgg.safetensors"), linear=str(files / "linear.pth"), **options)
    )


def straightforward(a, b) -> torch.Tensor:
    vgg, linear = weights()
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    x, y = (a - shift) / scale, (b - shift) / scale
    total = torch.zeros(len(a))
    for stage, indices in enumerate(STAGES):
        if stage:
            x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
        for index in indices:
            w, bias = vgg[f"features.{index}.weight"], vgg[f"features.{index}.bias"]
            x, y = F.relu(F.conv2d(x, w, bias, padding=1)), F.relu(F.conv2d(y, w, bias, padding=1))
        unit = [f / (f.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for f in (x, y)]
        total += F.conv2d((unit[0] - unit[1]) ** 2, linear[f"lin{stage}.model.1.weight"]).mean((1, 2, 3))
    return total.mean()


def typical_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Median over images of the gradients' relative error.

    Where rounding puts an activation on the other side of a ReLU, an image's gradient jumps by up to 2e-2, which on one
    kind of CPU or another happens to one image of 32x32 pixels in four.
    """
    return float(((found - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)).median())


@pytest.mark.parametrize("rescale", [False, True])
def test_distance_and_gradient(files, rescale):
    torch.manual_seed(0)
    model = configured(files, rescale=rescale)
    a, b = torch.rand(9, 3, 16, 16), torch.rand(9, 3, 16, 16, requires_grad=True)
    c = b.detach().clone().requires_grad_()
    found = model(a, b)
    expected = straightforward(2 * a - 1, 2 * c - 1) if rescale else straightforward(a, c)
    assert torch.allclose(found, expected, rtol=1e-4)
    found.backward()
    expected.backward()
    assert typical_error(b.grad, c.grad) < 1e-4
    assert all(parameter.grad is None for parameter in model.parameters())
    assert float(model(a, a)) == 0


def test_the_objective_weighs_it_and_moves_the_reconstruction(files):
    torch.manual_seed(0)
    lpips = LpipsConfig(vgg=str(files / "vgg.safetensors"), linear=str(files / "linear.pth"), weight=0.3)
    objective = Objective(ObjectiveConfig(lpips=lpips, l1_weight=2.0), null_label=3)
    images, image = torch.rand(9, 3, 16, 16), torch.rand(9, 3, 16, 16, requires_grad=True)

    def run(phase: str, noise: torch.Tensor, **_: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return noise, (image - images).abs().mean(), image

    draws = SeededDraws(objective.config, seed=0, step=0, stream=0, device=torch.device("cpu"))
    loss, terms, _ = objective.reconstruction(run, images, draws, torch.Size((9, 4, 4)))
    expected = 2 * (image - images).abs().mean() + 0.3 * straightforward(images, image)
    assert terms["lpips"] > 0.01 and torch.allclose(loss, expected, rtol=1e-4)
    (found,), (truth,) = torch.autograd.grad(loss, image), torch.autograd.grad(expected, image)
    assert typical_error(found, truth) < 1e-4


def test_fused_operators_compute_the_same_maps(files):
    """Bias, ReLU and pool behind a convolution that leaves them out, as on CUDA; in float32 but for rounding."""
    model = configured(files).to(DEVICE)
    images, found = torch.rand(1, 3, 34, 50, device=DEVICE), {}  # whose maps have odd sides from the second pool on
    for backend in ("torch", "triton"):
        x = images.clone().requires_grad_()
        with on_backend(backend):
            maps = model.features(x)
            sum((m * m).sum() / m.numel() for m in maps).backward()
        found[backend] = [*(m.detach() for m in maps), x.grad]
        assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
    for ours, theirs in zip(found["triton"], found["torch"], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_convolutions_of_another_order_of_memory_serve(files, monkeypatch):
    """PyTorch's own on CUDA, which take over where cuDNN is switched off, do not keep channels last."""
    model, image, convolve = configured(files).to(DEVICE), torch.rand(1, 3, 16, 16, device=DEVICE), F.conv2d
    with on_backend("triton"):
        expected = model.features(image)
        monkeypatch.setattr(F, "conv2d", lambda *given, **named: convolve(*given, **named).contiguous())
        found = model.features(image)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_convolutions_are_told_their_bias_where_it_costs_nothing(files, monkeypatch, backend):
    model, biases = configured(files).to(DEVICE), []
    convolve = F.conv2d

    def watched(x, weight, bias=None, *options, **named):
        biases.append(bias)
        return convolve(x, weight, bias, *options, **named)

    monkeypatch.setattr(F, "conv2d", watched)
    with on_backend(backend):
        model.features(torch.rand(1, 3, 16, 16, device=DEVICE))
    assert len(biases) == 13 and all((bias is None) == (backend == "triton") for bias in biases)


def test_bf16_autocast_changes_the_distance_by_rounding_only(files):
    model = configured(files)
    a, b = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(a, b)
    # Thirteen layers of 2^-9 each, unit-normalised: well under 5 %.
    assert abs(float(rounded / model(a, b)) - 1) < 0.05


def test_the_objective_holds_the_filters_in_the_dtype_of_autocast(files):
    """Bit for bit what autocast makes of float32 ones in every pass."""
    paths = LpipsConfig(vgg=str(files / "vgg.safetensors"), linear=str(files / "linear.pth"))
    objective = Objective(ObjectiveConfig(lpips=paths), 3, autocast=torch.bfloat16)
    for name, parameter in objective.lpips.named_parameters():
        filters = name.startswith("features.") and name.endswith(".weight")
        assert parameter.dtype == (torch.bfloat16 if filters else torch.float32) and not parameter.requires_grad
        assert not filters or parameter.is_contiguous(memory_format=torch.channels_last)
    target, image = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    found = []
    for network in (objective.lpips, configured(files)):
        leaf = image.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            distance = network(target, leaf)
        found.append((distance, *torch.autograd.grad(distance, leaf)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    assert Objective(ObjectiveConfig(lpips=paths), 3).lpips.features.convolutions[0][0].weight.dtype == torch.float32


def test_dropout_keeps_the_expectation(files):
    torch.manual_seed(0)
    plain, dropped = configured(files), configured(files, dropout=True)
    a, b = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    values = torch.stack([dropped(a, b) for _ in range(20)])
    assert values.std() > 0 and abs(float(values.mean() / plain(a, b)) - 1) < 0.05


def test_dropout_has_the_address_of_its_micro_batch(files):
    lpips = LpipsConfig(vgg=str(files / "vgg.safetensors"), linear=str(files / "linear.pth"), dropout=True)
    objective = Objective(ObjectiveConfig(lpips=lpips), null_label=3)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def run(phase: str, noise: torch.Tensor, **_: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return noise, torch.zeros(()), 1 - images

    def distance(**address: int) -> float:
        torch.rand(7)  # whatever else has drawn from PyTorch's generator
        draws = SeededDraws(objective.config, **address, device=torch.device("cpu"))
        return float(objective.reconstruction(run, images, draws, torch.Size((9, 4, 4)))[1]["lpips"])

    addresses = [dict(seed=seed, step=step, stream=stream) for seed in (0, 1) for step in (0, 1) for stream in (0, 1)]
    found = [distance(**address) for address in addresses]
    assert found == [distance(**address) for address in addresses]
    assert len(set(found)) == len(addresses)


def test_missing_weights_name_the_path_and_the_key_that_turns_the_term_off(files, tmp_path):
    good = dict(vgg=str(files / "vgg.safetensors"), linear=str(files / "linear.pth"))
    (tmp_path / "broken.pth").write_bytes(b"not a file of weights")
    holed = torch.load(files / "linear.pth")
    holed["lin2.model.1.weight"].view(-1)[5] = float("nan")
    torch.save(holed, tmp_path / "holed.pth")
    for change, words in (
        (dict(vgg=None), ["objective.lpips.vgg", "not set"]),
        (dict(linear=str(tmp_path / "none.pth")), ["objective.lpips.linear", "none.pth"]),
        (dict(vgg=good["linear"]), ["features.0.weight"]),
        (dict(linear=str(tmp_path / "broken.pth")), ["broken.pth"]),
        (dict(linear=str(tmp_path / "holed.pth")), ["'lin2.model.1.weight' holds NaN"]),
    ):
        with pytest.raises(UserError) as caught:
            Lpips.from_config(LpipsConfig(**{**good, **change}))
        assert all(word in str(caught.value) for word in [*words, "objective.lpips.weight = 0"])

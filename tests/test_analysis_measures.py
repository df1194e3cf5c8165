"""The measures of `analyze` against known values and against their formulas written out; trajectories."""

import math

import pytest
import torch
from cli_toy import CONFIG, toy_model

from unite_fast.analysis.activations import register_tokens
from unite_fast.analysis.entropy import BINS, GROUPS, KINDS, histogram_entropy, weight_entropies
from unite_fast.analysis.probing import PENALTIES, linear_probe
from unite_fast.analysis.similarity import alignment, cka, cka_kernel, cknna
from unite_fast.analysis.trajectories import trajectory
from unite_fast.errors import UserError
from unite_fast.evaluation.generation import SAMPLE_STREAM, register_noise
from unite_fast.flow.sampling import generate, integrate, shifted, velocity
from unite_fast.model.unite import Unite


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _hsic(x, y):
    """The unbiased estimator of Song et al. 2012, as it is printed there."""
    count = len(x)
    k, h = (part.double() @ part.double().T for part in (x, y))
    k.fill_diagonal_(0)
    h.fill_diagonal_(0)
    ones = torch.ones(count, dtype=torch.double)
    whole = (ones @ k @ ones) * (ones @ h @ ones) / ((count - 1) * (count - 2))
    return float((torch.trace(k @ h) + whole - 2 / (count - 2) * (ones @ k @ h @ ones)) / (count * (count - 3)))


def test_cka_is_one_whatever_turns_shifts_or_scales_features():
    x = _normal(40, 8)
    turn = torch.linalg.qr(_normal(8, 8, seed=1))[0]
    assert cka(x, x) == pytest.approx(1, abs=1e-12)
    assert cka(x, -3.5 * x @ turn + 7) == pytest.approx(1, abs=1e-5)
    assert cka(x, x * torch.arange(1, 9)) < 0.95  # one factor a feature is another kernel


@pytest.mark.parametrize("width", [4, 100, 1000])
def test_cka_of_independent_features_is_about_zero_however_wide(width):
    assert abs(cka(_normal(100, width), _normal(100, width, seed=1))) < 0.1


def test_cka_is_the_ratio_of_unbiased_hsics():
    x = _normal(20, 5)
    y = x[:, :3] @ _normal(3, 7, seed=1) + _normal(20, 7, seed=2) + 4
    expected = _hsic(x, y) / math.sqrt(_hsic(x, x) * _hsic(y, y))
    assert 0.2 < expected < 0.9
    assert cka(x, y) == pytest.approx(expected, rel=1e-9)


def _slow_cknna(x, y, neighbours):
    """The formula of Huh et al. 2024, pair by pair."""
    x, y = (
        [[value / math.hypot(*row) for value in row] for row in part.double().tolist()] for part in (x, y)
    )
    count = len(x)

    def dots(z):
        return [[sum(p * q for p, q in zip(z[i], z[j], strict=True)) for j in range(count)] for i in range(count)]

    def nearest(kernel, i):
        others = sorted((j for j in range(count) if j != i), key=lambda j: -kernel[i][j])
        return set(others[:neighbours])

    def align(a, b):
        total = 0.0
        for i in range(count):
            for j in nearest(a, i) & nearest(b, i):
                total += (a[i][j] - sum(a[i]) / count) * (b[i][j] - sum(b[i]) / count)
        return total

    a, b = dots(x), dots(y)
    return align(a, b) / math.sqrt(align(a, a) * align(b, b))


@pytest.mark.parametrize("neighbours", [1, 3, 11])
def test_cknna_is_its_formula(neighbours):
    x = _normal(12, 3)
    y = torch.cat([x[:, :2], _normal(12, 2, seed=1)], dim=1)
    expected = _slow_cknna(x, y, neighbours)
    assert 0 < expected < 1
    assert cknna(x, y, neighbours) == pytest.approx(expected, rel=1e-9)


def test_cknna_of_hand_made_examples():
    """Two pairs of equal images, k = 1: each has its twin for a neighbour, of cosine 1 over a row's mean of ½."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert cknna(x, x, 1) == pytest.approx(1)
    assert cknna(x, x[[0, 2, 1, 3]], 1) == 0  # other pairs: no neighbour in common
    half, near = 0.5, math.sqrt(3) / 2
    y = torch.tensor([[0.0, 1.0], [half, near], [1.0, 0.0], [1.0, 0.0]])  # the first pair 30° apart
    # Neighbour less the mean of each row: (1, ¾^½, 0, 0), (¾^½, 1, ½, ½), and twice (0, ½, 1, 1).
    above = near - (1 + near) / 4, near - (2 + near) / 4, 1 - 2.5 / 4, 1 - 2.5 / 4
    expected = sum(half * value for value in above) / math.sqrt(4 * half**2 * sum(value**2 for value in above))
    assert cknna(x, y, 1) == pytest.approx(expected, abs=1e-6)


def test_cknna_of_equal_and_of_independent_features():
    x = _normal(200, 16)
    assert cknna(x, 5 * x) == pytest.approx(1, abs=1e-6)
    assert cknna(x, _normal(200, 16, seed=1)) < 0.12  # chance is 10/199


def test_too_few_images_are_said():
    with pytest.raises(UserError, match="CKNNA of 10 neighbours needs at least 11 readable images, got 10"):
        cknna(_normal(10, 3), _normal(10, 3))
    with pytest.raises(UserError, match="CKA needs at least 4 readable images, got 3"):
        cka(_normal(3, 3), _normal(3, 3))


def test_features_without_variation_have_no_alignment():
    kernels = torch.stack([cka_kernel(torch.ones(6, 3)), cka_kernel(_normal(6, 3))])
    assert alignment(kernels, kernels).isnan().tolist() == [[True, True], [True, False]]


def test_entropy_of_known_histograms():
    assert histogram_entropy(torch.full((5, 7), 0.3)) == 0
    assert histogram_entropy(torch.tensor([3.0])) == 0
    assert histogram_entropy(torch.arange(10 * BINS).float()) == pytest.approx(math.log2(BINS))
    assert histogram_entropy(torch.tensor([0.0] * 6 + [1.0] * 2)) == pytest.approx(-0.75 * math.log2(0.75) + 0.25 * 2)
    weights = _normal(40, 50)
    assert histogram_entropy(3 * weights - 8) == pytest.approx(histogram_entropy(weights), abs=0.02)
    with pytest.raises(UserError, match="NaN or infinite"):
        histogram_entropy(torch.tensor([1.0, math.nan]))


@pytest.mark.parametrize("shared", [True, False])
def test_every_norm_and_matrix_of_the_encoder_has_its_place(shared):
    config = CONFIG.model_copy(update={"shared": shared})
    state = Unite(config).state_dict()
    state["encoder.blocks.1.next_norm"] = torch.arange(16.0)
    found = weight_entropies(state)
    encoders = ["encoder"] if shared else ["encoder", "denoiser"]
    assert [one.encoder for one in found] == [name for name in encoders for _ in range(10 * CONFIG.depth + 2)]
    assert all(one.size == state[one.name].numel() for one in found)
    placed = {(one.encoder, one.depth, one.kind): one for one in found}
    for encoder in encoders:
        for depth in range(CONFIG.depth):
            for kind in KINDS:
                assert placed[encoder, depth, kind].group == GROUPS[KINDS.index(kind) >= KINDS.index("qkv")]
        assert {kind for _, depth, kind in placed if depth == CONFIG.depth} == {"norm1", "modulation"}
    # What opens block 2 is block 1's weight.
    assert placed["encoder", 2, "norm1"].name == "encoder.blocks.1.next_norm"
    assert placed["encoder", 2, "norm1"].bits == pytest.approx(4) and placed["encoder", 1, "norm1"].bits == 0
    seen = {one.name.removesuffix(".weight") for one in found if one.encoder == "encoder"}
    left = {name for name in state if name.startswith("encoder.")} - {f"{name}{end}" for name in seen for end in
                                                                     ("", ".weight", ".bias")}  # fmt: skip
    assert {name.split(".")[1] for name in left} == {
        "register_in", "register_position", "time", "label", "context", "final"
    }  # fmt: skip


@pytest.mark.parametrize("context", [None, 0, 2, 4])
def test_register_tokens_are_those_of_both_passes(context):
    """Counted from the end, where registers stand before the patches; the hook counts from the front."""
    context_len, start = (0, 4) if context is None else (2, context)
    config = CONFIG.model_copy(update={"context_len": context_len, "context_start": start})
    model, batch = toy_model(config), 3
    raw = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda _module, _arguments, outputs: raw.append(outputs[0]))
    times, labels = torch.full((batch,), 0.4), torch.tensor([0, 1, 2])
    latents, images = _normal(batch, 16, 4), torch.rand(batch, 3, 16, 16)
    with torch.no_grad(), register_tokens(model.encoder) as found:
        for patches, run in ((16, lambda: model.tokenize(images, noise=latents, t=times)),
                             (0, lambda: model.denoise(latents, times, labels))):  # fmt: skip
            raw.clear()
            run()
            behind = [patches] * 4 + [0]
            expected = [x[:, x.shape[1] - n - 16 : x.shape[1] - n].mean(1) for x, n in zip(raw, behind, strict=True)]
            assert len(found) == CONFIG.depth
            torch.testing.assert_close(torch.stack(found), torch.stack(expected))
    model.denoise(latents, times, labels)
    assert len(raw) == 2 * CONFIG.depth and len(found) == CONFIG.depth, "the hooks are gone"


@torch.no_grad()
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_trajectory_shows_what_the_model_predicts_on_the_samplers_path(solver):
    """Without guidance x̂0 is the denoised z_t, also where 1 − t is below the floor of the velocity."""
    model, labels = toy_model(), torch.tensor([0, 2])
    settings = dict(guidance=1.0, interval=(0.0, 1.0), solver=solver, steps=4, time_shift=60.0)
    found = trajectory(model, labels, settings, seed=5)
    times = shifted(torch.linspace(0, 1, 4), 60.0)
    assert found.times == pytest.approx(times[[0, 1, 3]].tolist()) and 0.95 < found.times[1] < 1
    field = velocity(model, labels, guidance=1.0, interval=(0.0, 1.0))
    z = register_noise(model, 2, seed=5, stream=SAMPLE_STREAM, first=0)
    for place, upto in enumerate((1, 2)):
        z_t = integrate(field, z, times[:upto], solver)
        expected = model.denoise(z_t, times[upto - 1].expand(2), labels)
        torch.testing.assert_close(found.clean[place], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.images[place], model.decode(expected).clamp(0, 1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_trajectory_ends_in_the_guided_sample_at_nine_even_times():
    model, labels = toy_model(), torch.tensor([0, 2])
    settings = dict(guidance=3.0, interval=(0.25, 0.5), solver="heun", steps=41, time_shift=1.0)
    found = trajectory(model, labels, settings, seed=5)
    assert found.times == pytest.approx([k / 8 for k in range(9)]) and found.clean.shape == (9, 2, 16, 4)
    noise = register_noise(model, 2, seed=5, stream=SAMPLE_STREAM, first=0)
    torch.testing.assert_close(found.images[-1], generate(model, labels, noise=noise, **settings), rtol=0, atol=1e-3)
    always = generate(model, labels, noise=noise, **settings | {"interval": (0.0, 1.0)})
    assert (found.images[-1] - always).abs().max() > 0.02


def _classes(count, width, gap, seed=0):
    labels = torch.arange(count) % 3
    means = gap * torch.sin(torch.arange(3 * width) ** 2).view(3, width)  # any that differ in every feature
    return _normal(count, width, seed=seed) + means[labels], labels


@pytest.mark.parametrize("width", [4, 60])  # narrower and wider than images are many
def test_a_probe_reads_what_is_separable_and_nothing_else(width):
    train, labels = _classes(45, width, 20)
    held_out, truth = _classes(300, width, 20, seed=1)
    assert linear_probe(train, labels, held_out, truth).accuracy == 1
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert linear_probe(train, labels, held_out, truth[order]).accuracy == pytest.approx(1 / 3, abs=0.1)
    mixed = labels[torch.randperm(45, generator=torch.Generator().manual_seed(1))]
    assert linear_probe(train, mixed, held_out, truth).accuracy < 0.6


def test_a_probe_may_meet_labels_of_any_numbers_and_features_that_say_nothing():
    train, labels = _classes(30, 4, 20)
    train[:, 3] = 5
    names = torch.tensor([7, 2, 40])
    found = linear_probe(train, names[labels], train, names[labels])
    assert found.accuracy == 1
    often = torch.where(labels == 1, 1, 2)
    nothing = linear_probe(torch.ones(30, 4), often, torch.ones(9, 4), torch.tensor([2] * 4 + [1] * 5))
    assert nothing.accuracy == pytest.approx(4 / 9), "the most frequent class of training"
    one_class = labels == 1  # means and deviations are those of training
    assert linear_probe(train, labels, train[one_class], labels[one_class]).accuracy == 1


def _leave_one_out(x, labels, penalty):
    """Squared error of predictions for each image by a fit to the others; features are standardised already."""
    y = torch.eye(3, dtype=torch.double)[labels]
    error = 0.0
    for i in range(len(x)):
        rest = torch.arange(len(x)) != i
        a, b = x[rest], y[rest]
        centred = a - a.mean(0)
        weights = torch.linalg.solve(
            centred.T @ centred + penalty * len(x) * torch.eye(x.shape[1]), centred.T @ (b - b.mean(0))
        )
        error += float((y[i] - b.mean(0) - (x[i] - a.mean(0)) @ weights).square().sum())
    return error


@pytest.mark.parametrize(("count", "width"), [(24, 6), (15, 30)])
def test_the_penalty_is_that_of_the_smallest_leave_one_out_error(count, width):
    train, labels = _classes(count, width, 1.5)
    x = train.double()
    x = (x - x.mean(0)) / x.std(0)
    errors = {penalty: _leave_one_out(x, labels, penalty) for penalty in PENALTIES}
    best = min(errors, key=errors.get)
    assert PENALTIES[0] < best < PENALTIES[-1]
    assert linear_probe(train, labels, train, labels).penalty == best

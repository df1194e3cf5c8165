"""Sizes of the presets, free sizes, and the public methods' contracts."""

import numpy as np
import pytest
import torch

from unite_fast import ModelConfig, Unite, generate
from unite_fast.config import ENCODER_PRESETS
from unite_fast.model.conditioning import rotary_tables, sincos_1d, sincos_2d
from unite_fast.model.two_pass import LatentNorm

TINY = dict(
    image_size=16, patch_size=4, registers=16, latent_dim=4, depth=3, width=16, heads=2, num_classes=3,
    context_len=2, context_start=1, decoder=dict(depth=1, width=16, heads=2, inner=16),
)  # fmt: skip


def tiny(**sizes) -> Unite:
    torch.manual_seed(0)
    model = Unite(ModelConfig(**{**TINY, **sizes}))
    with torch.no_grad():  # the layers that start at zero would hide everything behind them
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("preset", "decoder", "parameters"),
    [
        ("B", "B", 217_643_616),
        ("M", "B", 318_821_456),
        ("L", "B", 545_528_384),
        ("L", "L", 763_177_536),
        ("XL", "B", 762_776_352),
    ],
)
def test_presets_have_the_published_parameter_counts(preset, decoder, parameters):
    with torch.device("meta"):
        model = Unite(ModelConfig(preset=preset, decoder=dict(preset=decoder)))
    assert sum(p.numel() for p in model.parameters()) == parameters
    if preset == "B":
        assert len(model.matrix_parameters()) == 115
        # The published encoder's count leaves the register positions out, the decoder's the first lift.
        encoder, decoder = (sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder))
        assert encoder - model.encoder.register_position.numel() == 130_593_056
        assert decoder - model.decoder.lift.weight.numel() - 768 == 86_237_952


def test_presets_are_the_documented_sizes():
    assert ENCODER_PRESETS["XL"] == dict(depth=28, width=1152, heads=16)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(),
        dict(registers=5),
        dict(context_len=0),
        dict(context_start=0),
        dict(context_start=2),
        dict(depth=1, context_start=0),
        dict(shared=False),
        dict(latent_norm="rms"),
        dict(latent_norm="none", register_noise=False),
        dict(image_size=12, patch_size=2, latent_dim=7, registers=36),
    ],
)
def test_free_sizes(sizes):
    model = tiny(**sizes)
    config = model.config
    images = torch.rand(2, 3, config.image_size, config.image_size)
    z0 = model.tokenize(images)
    assert z0.shape == (2, config.registers, config.latent_dim)
    assert model.denoise(z0, torch.rand(2), torch.tensor([0, 3])).shape == z0.shape
    assert model.decode(z0).shape == images.shape
    assert generate(model, torch.tensor([0, 2, 1]), solver="euler", steps=3, guidance=2.0).shape[0] == 3


@torch.no_grad()
def test_registers_begin_as_noise_or_at_zero():
    images, t = torch.rand(1, 3, 16, 16), torch.zeros(1)
    noise = torch.randn(2, 1, 16, 4)
    for begins, model in ((True, tiny()), (False, tiny(register_noise=False))):
        one, other = (model.tokenize(images, noise=numbers, t=t) for numbers in noise)
        at_zero = tiny().tokenize(images, noise=torch.zeros(1, 16, 4), t=t)
        assert torch.equal(one, other) is not begins and torch.equal(one, at_zero) is not begins
        assert not torch.allclose(one[:, 0], one[:, 1])  # learned positions tell the registers apart


@pytest.mark.parametrize("weighting", [True, False])
@pytest.mark.parametrize("kind", ["layer", "rms", "none"])
def test_latent_norms_and_what_is_fused_with_them(kind, weighting):
    norm = LatentNorm(6, kind)
    weight, bias = torch.rand(6) + 0.5, torch.rand(6)
    learned = {"layer": {"weight": weight, "bias": bias}, "rms": {"weight": weight}, "none": {}}[kind]
    norm.load_state_dict(learned)

    def expected(x: torch.Tensor) -> torch.Tensor:
        if kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        scale = 1.0 if kind == "none" else weight / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * scale + (bias if kind == "layer" else 0.0)

    latent, noise, t = torch.randn(3, 4, 6), torch.randn(3, 4, 6), torch.tensor([0.7, 0.8, 0.99])
    mask = torch.tensor([True, False, True])
    z0, mixed = norm.mix(latent, mask, t, noise)
    share = t[:, None, None]
    torch.testing.assert_close(norm(latent), expected(latent))
    torch.testing.assert_close(z0, expected(latent))
    torch.testing.assert_close(mixed[mask], (share * z0 + (1 - share) * noise)[mask])
    assert torch.equal(mixed[1], z0[1])
    predictions, times = torch.randn(2, 3, 4, 6), torch.stack([t, t / 2])
    loss = norm.flow_loss(predictions, latent, times, weighting=weighting, floor=0.05)
    error = latent - expected(predictions)
    if weighting:
        error = error / (1 - times).clamp(min=0.05)[..., None, None]
    torch.testing.assert_close(loss, error.square().mean((1, 2, 3)).sum())


def test_context_changes_denoising_and_tables_match_their_formula():
    model = tiny()
    z, t, labels = torch.randn(2, 16, 4), torch.rand(2), torch.tensor([0, 1])
    before = model.denoise(z, t, labels)
    with torch.no_grad():
        model.encoder.context += 1
    assert not torch.allclose(before, model.denoise(z, t, labels))
    cos, sin = rotary_tables(7, 6)
    assert torch.allclose(cos[3], torch.cos(3 * 10_000.0 ** (-torch.tensor([0.0, 2.0, 4.0]) / 6)))
    assert torch.allclose(cos**2 + sin**2, torch.ones_like(cos))


def test_times_stay_float32_under_autocast():
    time, t = tiny().encoder.time, torch.rand(5)
    with torch.autocast("cpu", torch.bfloat16):
        found = time(t)
    assert torch.equal(found, time(t))
    phase = 2 * torch.pi * t[:, None] * time.frequencies
    features = torch.cat([phase.sin(), phase.cos()], 1)
    assert torch.allclose(found, time.project(torch.nn.functional.silu(time.lift(features))), atol=1e-5)


def test_fixed_positions_follow_their_formulas():
    omega = 10_000.0 ** (-torch.tensor([0.0, 1.0, 2.0, 3.0]) / 4)
    angle = torch.arange(3.0)[:, None] * omega
    assert torch.allclose(sincos_1d(torch.arange(3), 8), torch.cat([angle.sin(), angle.cos()], 1), atol=1e-6)
    grid = sincos_2d(3, 16).view(3, 3, 16)
    line = sincos_1d(torch.arange(3), 8)
    assert torch.equal(grid[..., :8], line.expand(3, 3, 8))
    assert torch.equal(grid[..., 8:], line[:, None].expand(3, 3, 8))
    # The extra token of the decoder has none; registers that are no patches stand on a line before the grid.
    same, other = tiny().decoder.position[0], tiny(registers=5).decoder.position[0]
    assert not same[0].any() and torch.equal(same[1:], sincos_2d(4, 16))
    expected = torch.cat([torch.zeros(1, 16), sincos_1d(torch.arange(5), 16), sincos_2d(4, 16)])
    assert torch.equal(other, expected)


@torch.no_grad()
def test_weights_begin_as_published():
    torch.manual_seed(0)
    model = Unite(ModelConfig(**{**TINY, "width": 64, "num_classes": 30, "context_len": 16}))
    encoder = model.encoder
    zero = [encoder.final, encoder.final_modulation, *encoder.modulation]
    normal = [encoder.time.lift, encoder.time.project]
    for linear in (module for module in encoder.modules() if isinstance(module, torch.nn.Linear)):
        assert not linear.bias.any()
        if linear in zero:
            assert not linear.weight.any()
        elif linear not in normal:  # Xavier's uniform law
            bound = (6 / sum(linear.weight.shape)) ** 0.5
            assert 0.9 * bound < linear.weight.abs().max() <= bound
            assert float(linear.weight.std()) == pytest.approx(bound / 3**0.5, rel=0.15)
    for weight in (*(linear.weight for linear in normal), encoder.label.weight, encoder.context):
        assert float(weight.std()) == pytest.approx(0.02, rel=0.1) and abs(float(weight.mean())) < 0.002
    assert float(encoder.time.frequencies.std()) == pytest.approx(1, rel=0.2)
    assert torch.equal(encoder.register_position[0], sincos_1d(torch.arange(16), 64))
    assert not model.decoder.token.any()


def test_activation_checkpointing_changes_no_gradient():
    models = [tiny(), tiny(checkpoint_activations=True)]
    for model in models:
        model.denoise(torch.ones(1, 16, 4), torch.tensor([0.3]), torch.tensor([1])).square().sum().backward()
    for a, b in zip(*(model.encoder.parameters() for model in models)):
        assert a.grad is None and b.grad is None or torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("shape", [(2, 3, 8, 16), (2, 1, 16, 16), (3, 16, 16)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[B, 3, 16, 16\]"):
        tiny().tokenize(torch.rand(shape))


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 16, 16, dtype=torch.uint8), np.zeros((2, 3, 16, 16))])
def test_images_that_are_no_floating_point_tensor_are_refused(images):
    with pytest.raises(ValueError, match=r"in \[0, 1\], got .*(uint8|ndarray).*: divide uint8 images by 255"):
        tiny().tokenize(images)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.tokenize(torch.rand(2, 3, 16, 16), noise=torch.zeros(1, 16, 4)),
         r"noise must be a floating-point tensor \[2, 16, 4\], got torch.float32 of shape \[1, 16, 4\]"),
        (lambda m: m.tokenize(torch.rand(2, 3, 16, 16), t=0.005),
         r"t must be a floating-point tensor \[2\], got float"),
        (lambda m: m.decode(torch.zeros(2, 4, 16)),
         r"z0 must be .* \[B, 16, 4\], got torch.float32 of shape \[2, 4, 16\]"),
        (lambda m: m.decode(torch.zeros(16, 4)), r"z0 must be .* \[B, 16, 4\], got torch.float32 of shape \[16, 4\]"),
        (lambda m: m.decode(torch.zeros(2, 16, 4, dtype=torch.int64)),
         "z0 must be a floating-point .* got torch.int64"),
        (lambda m: m.denoise(torch.zeros(2, 16, 3), torch.zeros(2), torch.zeros(2, dtype=torch.int64)), "z_t must be"),
        (lambda m: m.denoise(torch.zeros(2, 16, 4), torch.zeros(()), torch.zeros(2, dtype=torch.int64)),
         r"t must be .* \[2\]"),
        (lambda m: m.denoise(torch.zeros(2, 16, 4), torch.zeros(2), torch.zeros(2)),
         "labels must be an int32 or int64"),
        (lambda m: m.denoise(torch.zeros(2, 16, 4), torch.zeros(2), torch.tensor([0, 4])),
         r"labels must lie in 0\.\.3, got 0\.\.4"),
        (lambda m: m.denoise(torch.zeros(2, 16, 4), torch.zeros(2), [0, 1]), r"labels must be .* \[2\], got list"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call(tiny())


def test_images_of_another_precision_are_taken():
    model, images, noise, t = tiny(), torch.rand(2, 3, 16, 16), torch.randn(2, 16, 4), torch.zeros(2)
    assert torch.equal(model.tokenize(images.double(), noise=noise, t=t), model.tokenize(images, noise=noise, t=t))


@torch.no_grad()
def test_times_that_are_not_given_are_drawn_up_to_the_maximum_of_the_training():
    model, images, noise = tiny(), torch.rand(2, 3, 16, 16), torch.randn(2, 16, 4)
    model.tokenize_t_max = 0.0
    assert torch.equal(model.tokenize(images, noise=noise), model.tokenize(images, noise=noise, t=torch.zeros(2)))
    model.tokenize_t_max = 0.5
    found = [model.tokenize(images, noise=noise) for _ in range(2)]
    assert not torch.allclose(*found)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32])
def test_labels_of_any_integer_type_are_taken(kind):
    options = dict(solver="euler", steps=2, guidance=2.0, noise=torch.zeros(2, 16, 4))
    labels = torch.tensor([1, 2])
    assert torch.equal(generate(tiny(), labels.to(kind), **options), generate(tiny(), labels, **options))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (dict(solver="rk99"), "euler, heun, dopri5"),
        (dict(steps=1), "at least 2"),
        (dict(guidance=float("nan")), "guidance must be a finite number of at least 0, got nan"),
        (dict(guidance=-1.0), "guidance must be"),
        (dict(interval=(0.9, 0.1)), "interval must not decrease"),
        (dict(time_shift=0.0), "time_shift must be a finite number above 0"),
        (dict(noise=torch.zeros(1, 2, 3)), r"\[1, 16, 4\]"),
        (dict(labels=torch.tensor([9])), r"0\.\.3"),
        (dict(labels=[1, 2]), r"integer tensor \[B\], got list"),
        (dict(labels=torch.tensor([1.0])), r"integer tensor \[B\], got torch.float32 of shape \[1\]"),
        (dict(labels=torch.tensor(1)), r"integer tensor \[B\], got torch.int64 of shape \[\]"),
    ],
)
def test_generate_refuses(options, word):
    with pytest.raises(ValueError, match=word):
        generate(tiny(), **{"labels": torch.tensor([0]), **options})


def euler(denoise, z, labels, null, *, guidance=1.0, interval=(0.1, 1.0), steps=9, time_shift=0.5):
    """Latents of Euler's method, one prediction after the other."""
    u = torch.linspace(0, 1, steps)
    times = time_shift * u / (1 + (time_shift - 1) * u)
    for t, following in zip(times[:-1], times[1:]):
        clean = denoise(z, t.expand(len(z)), labels)
        if interval[0] < t < interval[1]:
            of_none = denoise(z, t.expand(len(z)), torch.full_like(labels, null))
            clean = of_none + guidance * (clean - of_none)
        z = z + (following - t) * (clean - z) / max(1 - float(t), 0.05)
    return z


SAMPLING = [
    dict(),
    dict(steps=60),  # the last steps begin where 1 − t is below its floor
    dict(guidance=2.5),
    dict(guidance=0.0),
    dict(guidance=2.5, steps=5, time_shift=1.0, interval=(0.25, 0.75)),  # times on both ends, which lie outside
    dict(guidance=2.5, interval=(0.3, 0.6), time_shift=0.7),
    dict(time_shift=2.0),
]


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("options", SAMPLING)
@torch.no_grad()
def test_samples_are_those_of_the_equation(options, normalise):
    model, labels, noise = tiny(), torch.tensor([0, 1, 2]), torch.randn(3, 16, 4)
    options = {"steps": 9, **options}
    images, found = generate(
        model, labels, noise=noise, solver="euler", normalise=normalise, return_latents=True, **options
    )
    expected = euler(lambda *z: model.denoise(*z, normalise=normalise), noise, labels, model.null_label, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(images, model.decode(found).clamp(0, 1)) and images.min() == 0


def test_solvers_agree_on_a_smooth_field_and_guidance_one_is_the_class_prediction():
    model, labels, noise = tiny(), torch.tensor([0, 1]), torch.randn(2, 16, 4)
    truth = generate(model, labels, noise=noise, solver="dopri5", steps=20, return_latents=True)[1]
    heun = generate(model, labels, noise=noise, solver="heun", steps=200, return_latents=True)[1]
    euler = generate(model, labels, noise=noise, solver="euler", steps=200, return_latents=True)[1]
    error = lambda z: float((z - truth).norm() / truth.norm())  # noqa: E731
    assert error(heun) < 0.01 and error(heun) < error(euler) < 0.1
    guided = dict(guidance=3.0, interval=(0.4, 0.4))
    outside = generate(model, labels, noise=noise, solver="heun", steps=200, return_latents=True, **guided)[1]
    assert torch.equal(outside, heun)

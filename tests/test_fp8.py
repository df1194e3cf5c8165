"""train.fp8: the same training with the blocks' products in FP8, emulated on a CPU; it must notice a broken cast."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from compile_toy import compile_config, run_ranks
from engine_unite import unite_engine, unite_step
from ranks import ALONE

import unite_kernels as uk
from unite_fast.analysis.counts import repeats, step_parts
from unite_fast.config import Config, DecoderConfig, ModelConfig, ObjectiveConfig
from unite_fast.engine import checkpoint, compiling, fp8
from unite_fast.engine.engine import Engine
from unite_fast.engine.fitting import Trial
from unite_fast.engine.optim import parameter_groups
from unite_fast.errors import UserError
from unite_fast.modality import modality_of
from unite_fast.model import blocks
from unite_fast.model.linear import Linear
from unite_fast.model.unite import Unite
from unite_fast.objective.draws import SeededDraws
from unite_fast.objective.two_pass import Objective, two_pass_step
from unite_kernels import fp8 as kernels

STEPS, BATCH = 50, 16
# Emulated FP8 moved the final loss by 0.05 % and the blocks' gradients by 4.1 % on average (three bits of mantissa
# behind the leading one round by 2.6 % on average; a product sees two such operands).
LOSS_BAND, GRADIENT_BAND = 0.05, 0.055


def digits_config(width: int = 48, **train) -> Config:
    sizes = dict(depth=1, width=width, heads=width // 16)  # a SwiGLU of 128 at 48
    model = dict(
        image_size=16, patch_size=4, registers=16, latent_dim=8, num_classes=10, context_len=2, context_start=0
    )
    optimizer = dict(lr=0.01, lr_batch=None, warmup_epochs=1, cosine_until_epoch=5, final_ratio=0.05)
    return Config.parse(
        dict(
            model=model | sizes | dict(decoder=sizes | dict(inner=48)),
            objective=dict(flow_draws=2, draws_per_chunk=2, l1_weight=10.0, lpips=dict(weight=0.0)),
            optimizer=optimizer,
            train=dict(steps=STEPS, global_batch=BATCH, accumulation=1) | train,
            data=dict(path="unused"),
        )
    )


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images[:BATCH] / 16).float()[:, None].expand(-1, 3, -1, -1)
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3).contiguous()
    return images, torch.tensor(found.target[:BATCH])


def active_model(config: Config) -> Unite:
    """Gates and the final layer begin at zero, which would hide the encoder's blocks: here they do not."""
    torch.manual_seed(0)
    model = Unite(config.model)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ("modulation." in name or name == "encoder.final.weight"):
            nn.init.normal_(parameter, std=0.05)
    return model


def trained(steps: int, **settings) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss of the last ten steps, and the gradients of the first one."""
    config = digits_config(**settings)
    engine = Engine(active_model(config), config, ALONE, steps_per_epoch=10)
    objective, losses, gradients = Objective(config.objective, 10), [], {}
    images, labels = digits()
    for step in range(steps):
        draws = SeededDraws(config.objective, seed=0, step=step, stream=0, device=ALONE.device)
        losses.append(two_pass_step(engine, objective, images, labels, draws, shape=torch.Size((BATCH, 16, 8))).total)
        if step == 0:
            names = [name for name in engine.parameters if re.search(r"blocks.*(qkv|out|mlp_in)\.weight", name)]
            gradients = {name: engine.parameters[name].grad.clone() for name in names}
        engine.step()
    assert losses[-1] < 0.5 * losses[0] or steps == 1
    return torch.stack(losses[-10:]).mean().item(), gradients


@pytest.fixture(scope="module")
def plain() -> tuple[float, dict[str, torch.Tensor]]:
    return trained(STEPS)


def rescaled(factor: float | None):
    """Breaks the cast: every factor times `factor`, what it puts beyond the format cut off; or no scaling at all."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        right = kernels._quantize

        def wrong(x: torch.Tensor, dtype: torch.dtype, *, summed: bool) -> tuple[torch.Tensor | None, ...]:
            _, columns, scale, sums = right(x, dtype, summed=summed)
            lifts = 1.0 if factor is None else factor / scale
            most = kernels.LARGEST[dtype]
            rows = (x.float() * lifts).clamp(-most, most).to(dtype)
            columns[:, : len(rows)] = rows.t()
            return rows, columns, torch.as_tensor(1 / lifts), sums

        patch.setattr(kernels, "_quantize", wrong)

    return plant


def e5m2_everywhere(patch: pytest.MonkeyPatch) -> None:
    """Breaks the cast: inputs and weights with two bits of mantissa instead of three."""
    right = kernels._quantize
    patch.setattr(kernels, "_quantize", lambda x, _, *, summed: right(x, torch.float8_e5m2, summed=summed))
    patch.setattr(kernels, "_check_quantized", lambda *given: None)  # which would refuse such a weight


def gradient_error(plain, found) -> float:
    """Mean relative error of the weight gradients of the blocks."""
    return sum((found[n] - g).norm().item() / g.norm().item() for n, g in plain.items()) / len(plain)


def test_fp8_trains_to_the_same_loss(plain):
    loss, gradients = trained(STEPS, fp8=True)
    assert abs(loss / plain[0] - 1) < LOSS_BAND
    # Not equal: the products do go through eight bits.
    assert 0.02 < gradient_error(plain[1], gradients) < GRADIENT_BAND and len(gradients) == 8


def test_a_swiglu_of_another_width_is_padded(monkeypatch):
    """85 at C = 32, in FP8 like the others: padding changes no scale."""
    _, padded = trained(1, width=32, fp8=True)
    for module in (blocks, kernels):
        monkeypatch.setattr(module, "aligned", lambda width: width)
    _, expected = trained(1, width=32, fp8=True)
    _, plain = trained(1, width=32)
    for name, gradient in expected.items():
        # Sums in another order let a number here and there round the other way to eight bits.
        assert gradient_error({name: gradient}, padded) < 0.002, name
        assert 0.01 < gradient_error({name: plain[name]}, padded) < 2 * GRADIENT_BAND, name


def test_the_loss_notices_a_wrong_scale(plain, monkeypatch):
    rescaled(4.0)(monkeypatch)  # the largest quarter of the range saturates
    assert abs(trained(STEPS, fp8=True)[0] / plain[0] - 1) > 2 * LOSS_BAND


@pytest.mark.parametrize(
    "plant", [rescaled(None), rescaled(4.0), e5m2_everywhere], ids=["no scaling", "wrong scale", "e5m2 everywhere"]
)
def test_the_gradients_notice_a_broken_cast(plain, plant, monkeypatch):
    plant(monkeypatch)
    assert gradient_error(plain[1], trained(1, fp8=True)[1]) > 1.2 * GRADIENT_BAND


@pytest.mark.parametrize(
    ("width", "precision", "recomputed"),
    [(48, "fp32", False), (48, "fp32", True), (32, "fp32", False), (32, "bf16", True)],
    ids=["as wide", "recomputed", "padded", "padded in bf16"],
)
def test_weights_are_quantized_once_a_micro_batch(width, precision, recomputed, monkeypatch):
    """For all passes and what is recomputed of them; that changes no bit."""
    config = digits_config(width, fp8=True, precision=precision)
    model = config.model.model_copy(update={"checkpoint_activations": recomputed})
    objective = config.objective.model_copy(update={"draws_per_chunk": 1})
    config = config.model_copy(update={"model": model, "objective": objective})
    right, made, found = kernels.fp8_quantize, [], []
    monkeypatch.setattr(uk, "fp8_quantize", lambda x, dtype: made.append(x) or right(x, dtype))
    for once in (True, False):
        if not once:
            monkeypatch.setattr(fp8, "current_casts", lambda: None)
        engine = Engine(active_model(config), config, ALONE, steps_per_epoch=10)
        images, labels = digits()
        draws = SeededDraws(config.objective, seed=0, step=0, stream=0, device=ALONE.device)
        goal, shape = Objective(config.objective, 10), torch.Size((BATCH, 16, 8))
        total = two_pass_step(engine, goal, images, labels, draws, shape=shape).total
        found.append([total, *(p.grad for p in engine.parameters.values() if p.grad is not None)])
    assert len(made) == 8  # of the first: four Linears of the encoder's block and of the decoder's
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True)) and len(found[0]) > 20


@pytest.mark.parametrize("on", [True, False])
def test_what_fits_is_tried_as_it_will_be_computed(monkeypatch, on):
    """FP8 needs less memory."""
    config, right, casts = digits_config(fp8=on), kernels._quantize, []
    monkeypatch.setattr(kernels, "_quantize", lambda *given, **how: casts.append(given) or right(*given, **how))
    trial = Trial(config, ALONE, modality_of(config), Objective(config.objective, 10))
    trial(config, 2)
    assert bool(casts) == on


def test_weights_names_and_evaluation_are_those_of_the_model_without_it(tmp_path):
    with_it, without = digits_config(fp8=True), digits_config()
    model, twin = active_model(with_it), active_model(with_it)
    names, groups = list(model.state_dict()), {k: list(g) for k, g in parameter_groups(model, "muon").items()}
    parameters = dict(model.named_parameters())
    engine = Engine(model, with_it, ALONE, steps_per_epoch=10)
    converted = {name for name, module in model.named_modules() if isinstance(module, fp8.Fp8Linear)}
    blocks = ("encoder.blocks.0", "decoder.blocks.0")
    assert converted == {f"{block}.{linear}" for block in blocks for linear in fp8.LINEARS}
    assert list(model.state_dict()) == names
    assert {k: list(g) for k, g in parameter_groups(model, "muon").items()} == groups
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    images, noise, t = digits()[0], torch.randn(BATCH, 16, 8), torch.zeros(BATCH)
    with engine.ema_weights() as whole:  # no step yet: they are the first weights
        assert type(whole.encoder.blocks[0].qkv) is Linear
        assert torch.equal(whole.decode(whole.tokenize(images, noise=noise, t=t)),
                           twin.decode(twin.tokenize(images, noise=noise, t=t)))  # fmt: skip
    with torch.no_grad():
        assert not torch.equal(model.tokenize(images, noise=noise, t=t), twin.tokenize(images, noise=noise, t=t))
    assert all(tensor.dtype == torch.float32 and type(tensor) is torch.Tensor for _, tensor in engine.ema_state())
    # A checkpoint knows nothing of it: a run can turn it on or off.
    checkpoint.save(engine, tmp_path, {})
    other = Engine(twin, without, ALONE, steps_per_epoch=10)
    checkpoint.load(other, checkpoint.latest(tmp_path))
    assert list(dict(other.model_state())) == list(dict(engine.model_state()))


def test_it_works_under_torch_compile(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    norms = {}
    for name, train in {"eager": dict(compile=False), "compiled": {}}.items():
        engine = unite_engine(compile_config(draws=2, fp8=True, **train), ALONE)
        norms[name] = [unite_step(engine, step).item() for step in range(2)]
    assert norms["compiled"] == pytest.approx(norms["eager"], rel=1e-3)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_it_works_under_zero(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    alone = unite_engine(compile_config(draws=1, fp8=True, compile=False), ALONE)
    norms = [unite_step(alone, step).item() for step in range(3)]
    (report,) = run_ranks(tmp_path, "fp8", ranks=1, stages=["2"])
    # What rounds the other way to eight bits moved the third norm by 0.2 % on one kind of CPU; without FP8 they differ
    # by 3, 5 and 49 %.
    assert report["2"]["norms"] == pytest.approx(norms, rel=0.01)


def test_what_it_lacks_is_said(monkeypatch):
    config = digits_config(fp8=True)
    with pytest.raises(UserError, match="FP8 keeps a layer's whole weight.*set train.fp8 to false"):
        compile_config(stage=3, compile=False, fp8=True)
    fp8.check_fp8(config, ALONE.device)
    cuda = torch.device("cuda")
    for capability in ((8, 0), (8, 9), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        fp8.check_fp8(digits_config(), cuda)
        if capability > (8, 0):
            with pytest.raises(UserError, match="needs bfloat16 autocast: set train.precision to auto"):
                fp8.check_fp8(digits_config(fp8=True, precision="fp32"), cuda)
            fp8.check_fp8(config, cuda)
            continue
        with pytest.raises(UserError, match="compute capability 8.9 .*this one has 8.0: set train.fp8 to false"):
            fp8.check_fp8(config, cuda)


def share(preset: str) -> float:
    """Counted operations of a step's matrix products, attention and convolutions that FP8 takes, S = 3 with LPIPS."""
    model, objective = ModelConfig(preset=preset, decoder=DecoderConfig(preset="B")), ObjectiveConfig()
    with torch.device("meta"):
        linears = {n: m for n, m in Unite(model).named_modules() if isinstance(m, nn.Linear)}
    eligible = {side: {n.rpartition(".")[2] for n, m in linears.items() if n.startswith(side) and fp8.eligible(n, m)}
                for side in ("encoder", "decoder")}  # fmt: skip
    taken = total = 0
    for name, part in step_parts(model, objective).items():
        for op in part.ops:
            operations = (op.forward + op.backward) * repeats(name, objective)
            total += operations
            side = "decoder" if name == "decode" else "encoder"
            taken += operations * (op.name.replace(" ", "_") in eligible[side])
    return taken / total


def test_the_documented_shares_are_the_counted_ones():
    text = (Path(__file__).parents[1] / "docs" / "performance.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| (B|M|L|XL) \| (\d+) % \|", text, re.MULTILINE))
    assert documented == {preset: f"{100 * share(preset):.0f}" for preset in ("B", "M", "L", "XL")}

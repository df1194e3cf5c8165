"""Steps of the presets' widths on a GPU that is not there: the host waits for nothing, no tensor is on a wrong device.

test_imagined.py runs this file in a process of its own, as a made-up device stays for a process's life and PyTorch's
compiler asks it for more than it has: `pytest tests/imagined_steps.py`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import imagined
from launches import ImaginedRun, count, images_ahead, molecules, step_floor, table
from molecule_subjects import typical_counts
from runs import settings

import unite_kernels as uk
from unite_fast.analysis.counts import repeats, step_parts
from unite_fast.analysis.launches import step_launches
from unite_fast.analysis.update import update_part
from unite_fast.config import Config
from unite_fast.engine.batch import Batch
from unite_fast.engine.engine import Engine
from unite_fast.evaluation.generation import draw, encode
from unite_fast.evaluation.inception import Inception
from unite_fast.model.unite import Unite
from unite_fast.molecules import sampling as molecule_sampling
from unite_fast.molecules.model import MoleculeUnite

CONFIGS = Path(__file__).parents[1] / "configs"
OVERRIDES = ["train.zero_stage=0", "train.precision=bf16"]
# Of Muon's two sweeps, which `dispatch.upload` pins where there is CUDA: they go without waiting.
TABLES = 2 * ["dispatch.py"]


def image_run(config: Config, device: torch.device, batch: int = 8, accumulation: int = 1) -> ImaginedRun:
    numbers = Batch(batch, accumulation, batch * accumulation)
    return ImaginedRun(config, device, numbers, images_ahead(config, batch, device))


def preset(file: str, *overrides: str) -> Config:
    return Config.load(CONFIGS / file, [*OVERRIDES, *overrides])


def small(tmp_path: Path, **sections: dict) -> Config:
    return Config.parse(settings(tmp_path, train={"precision": "bf16"}, **sections))


@pytest.mark.parametrize(("name", "draws"), [("B", 3), ("L", 1)])
def test_a_step_of_a_preset_does_not_make_the_host_wait(name, draws):
    """With the presets' widths; depth only repeats."""
    model = f'model={{"preset": "{name}", "depth": 6, "decoder": {{"preset": "B", "depth": 2}}}}'
    config = preset(f"{name.lower()}_h100.json", f"objective.flow_draws={draws}", model)
    with imagined.imagined() as device:
        run = image_run(config, device)
        watch = run.watched()
        assert all(weights.device == device for weights in run.engine.ema.shadows)
    assert config.objective.lpips.weight and watch.launches["aten::convolution"] == 26
    attention = watch.launches["aten::_scaled_dot_product_flash_attention"]
    # Tokenization, the decoder, and all three draws in one pass of B's.
    assert attention == 2 * config.model.depth + config.model.decoder.depth
    assert places(watch) == TABLES


@pytest.mark.parametrize(
    "sections",
    [
        {"objective": {"decoder_noise": "additive", "stop_gradient": False}},
        {"objective": {"decoder_noise": "none", "time_law": "uniform", "weighting": "none", "draws_per_chunk": 2}},
        {"model": {"shared": False, "registers": 6, "context_start": 0}, "optimizer": {"ema_decays": [0.5]}},
        {"optimizer": {"kind": "adamw", "clip_norm": None}, "model": {"checkpoint_activations": True}},
        {"objective": {"lpips": {"weight": 1.0, "rescale": True, "dropout": True, "vgg": "-", "linear": "-"}},
         "model": {"image_size": 32}},
    ],
)  # fmt: skip
def test_nor_does_any_other_form_of_it(tmp_path, sections):
    config = small(tmp_path, **sections)
    with imagined.imagined() as device:
        watch = image_run(config, device, accumulation=2).watched()
    assert places(watch) == (TABLES if config.optimizer.kind == "muon" else [])


@pytest.mark.parametrize("file", ["molecules_quickstart.json", "qm9_s.json", "qm9_s_gap.json"])
def test_a_step_on_molecules_makes_it_wait_for_the_batch_alone(file):
    config = preset(file, "objective.flow_draws=2")
    with imagined.imagined() as device:
        run = ImaginedRun(config, device, Batch(64, 1, 64), molecules(config, 64))
        watch = run.watched()
    # Counts, elements, positions and labels: the stream pins them where there is CUDA, and they go without waiting.
    tables = TABLES if config.optimizer.kind == "muon" else []
    assert places(watch) == ["packing.py"] + 3 * ["modality.py"] + tables
    assert watch.launches["aten::_flash_attention_forward"] > 0


def test_the_update_moves_what_is_counted():
    """Clipping, momentum, averages: the two sweeps of Muon, beside products and tall matrices that are turned."""
    depth = 'model={"preset": "B", "depth": 6}'
    config = preset("b_h100.json", "objective.flow_draws=1", "optimizer.ema_decays=[0.9999]", depth)
    with imagined.imagined() as device:
        watch = image_run(config, device).watched_update()
    ops = {op.name: op.forward_bytes for op in update_part(config.model, config.optimizer).ops}
    names = {"muon_momentum_": "clip, momentum, Nesterov", "muon_update_": "Muon's step and EMA"}
    for name, counted in names.items():
        assert watch.launches[f"unite_kernels::{name}"] == 1
        assert watch.moved[f"unite_kernels::{name}"] == pytest.approx(ops[counted], rel=1e-6)  # and the coefficient
    beside = sum(moved for name, moved in watch.moved.items() if name not in ("aten::bmm", "aten::baddbmm"))
    counted = sum(moved for name, moved in ops.items() if name != "Newton-Schulz")
    assert beside == pytest.approx(counted, rel=0.01)


# Rows of the counted floor, and the operators that they stand for, whose backward is called alike.
NORMS = ("opening norm", "context norm", "gate, norm, modulate", "gate, norm, norm, modulate", "norm", "add, norm")
ROWS = {
    ("SwiGLU",): "unite_kernels::swiglu",
    ("q/k norm, rotary",): "unite_kernels::qk_norm_rope",
    ("attention",): "aten::_scaled_dot_product_flash_attention",
    NORMS: "unite_kernels::adaln",
    ("GELU",): "aten::gelu",
    ("unpatchify, L1",): "unite_kernels::patch_l1",
    ("ReLU", "pool"): "unite_kernels::bias_relu",
    ("distance",): "unite_kernels::lpips_distance",
    ("convolution",): "aten::convolution",
}


def test_the_passes_move_what_is_counted():
    """Within 1.5 %: a weight's first gradient reads no sum, the last norm no residual's gradient; both are counted."""
    config, images = shaped("b_h100.json", (5, 2), {}, 3, 3), 64
    with imagined.imagined() as device:
        moved = image_run(config, device, images).watched().moved
    counted, products = Counter(), 0
    for name, part in step_parts(config.model, config.objective).items():
        samples = images * repeats(name, config.objective)
        for op in part.ops:
            alone = replace(part, ops=(op,))
            counted[op.name, False] += alone.forward_bytes(samples)
            counted[op.name, True] += alone.backward_bytes(samples)
            if op.weights and op.trained:
                products += alone.forward_bytes(samples) + alone.backward_bytes(samples)
    for rows, operator in ROWS.items():
        for backward in (False, True):
            if operator == "aten::convolution" and backward:  # whose input is handed over and not read
                continue
            names = [name for name in moved if name.startswith(operator) and ("backward" in name) is backward]
            found = sum(moved[name] for name in names)
            assert found == pytest.approx(sum(counted[row, backward] for row in rows), rel=0.015), (operator, backward)
    found = sum(n for name, n in moved.items() if name.startswith(("aten::mm", "aten::addmm")))
    assert found == pytest.approx(products, rel=0.01)


def places(watch: imagined.Watch) -> list[str]:
    """The files that ask for copies between host and device."""
    return [wait.split(" at ")[1].split(":")[0] for wait in watch.waits]


def planted(function: Callable) -> Callable[[Engine], Tensor]:
    """Engine.step with something planted behind it."""
    step = Engine.step

    def altered(engine: Engine) -> Tensor:
        return function(step(engine))

    return altered


@pytest.mark.parametrize(
    "fault",
    [
        lambda norm: norm * float(norm),
        lambda norm: norm + 1 if norm > 1 else norm,
        lambda norm: norm[None][norm[None] > 0].sum(),
        lambda norm: norm[None].repeat_interleave(norm[None].long()).sum(),
        lambda norm: (norm + torch.ones(3)).sum(),
    ],
    ids=["item", "branch", "boolean index", "repeats", "host constant"],
)
def test_a_planted_read_or_a_tensor_of_the_host_stops_the_step(tmp_path, fault):
    with imagined.imagined() as device:
        run = image_run(small(tmp_path), device)
        with mock.patch.object(Engine, "step", planted(fault)), pytest.raises(RuntimeError):
            run.watched()


@pytest.mark.parametrize(
    "fault",
    [
        lambda norm: norm + torch.ones(()).to(norm.device),
        lambda norm: norm.clone().copy_(torch.ones(())),
        lambda norm: norm.cpu(),
        lambda norm: norm[None].expand(3)[torch.tensor([1])].sum(),
    ],
    ids=["to the device", "copied into", "to the host", "index of the host"],
)
def test_a_planted_copy_is_written_down(tmp_path, fault):
    with imagined.imagined() as device:
        run = image_run(small(tmp_path), device)
        # The meter would refuse a norm of the host, as CUDA would.
        with mock.patch.object(run.meter, "add", lambda losses, norm: None):
            with mock.patch.object(Engine, "step", planted(fault)):
                watch = run.watched()
    assert places(watch) == [*TABLES, "imagined_steps.py"]


def test_a_planted_constant_of_the_host_does_not_pass(tmp_path):
    """torch 2.11 copies it over, which is written down; 2.13 cannot make it on a device that is not there."""
    with imagined.imagined() as device:
        run = image_run(small(tmp_path), device)
        with mock.patch.object(Engine, "step", planted(lambda norm: norm * torch.tensor(2.0, device=norm.device))):
            try:
                found = places(run.watched())
            except NotImplementedError:
                return
    assert found == [*TABLES, "imagined_steps.py"]


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_sampling_waits_for_nothing_but_its_labels(solver):
    config = preset("l_h100.json", 'model={"preset": "L", "depth": 6}')
    settings = config.sampling.model_dump() | {"solver": solver, "steps": 4, "guidance": 2.0, "time_shift": 0.5}
    with imagined.imagined() as device:
        model = Unite(config.model).to(device).eval()
        with imagined.Watch() as watch, torch.autocast(device.type, dtype=torch.bfloat16):
            images = draw(model, torch.arange(4), settings, seed=0, first=0)
    assert images.shape == (4, 3, 256, 256) and images.device == device
    assert [wait.split(":")[2] for wait in watch.waits] == ["_to_copy at sampling.py"]


def test_so_does_encoding_and_the_features_of_an_evaluation():
    config = preset("b_h100.json", 'model={"preset": "B", "depth": 6}')
    with imagined.imagined() as device:
        model, inception = Unite(config.model).to(device).eval(), Inception().to(device)
        pixels = torch.zeros(4, 3, 256, 256, dtype=torch.uint8, device=device)
        with imagined.Watch() as watch:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                latents = encode(model, pixels, seed=0, first=0)
                model.decode(latents)
            features, logits = inception(pixels)
    assert watch.waits == [] and latents.dtype == torch.float32
    assert features.shape == (4, 2048) and features.dtype == logits.dtype == torch.float32


def test_molecules_wait_for_what_goes_in_and_comes_out():
    config = preset("qm9_s.json")
    counts = torch.from_numpy(typical_counts(16))
    with imagined.imagined() as device:
        model = MoleculeUnite(config.model).to(device).eval()
        with imagined.Watch() as watch, torch.autocast(device.type, dtype=torch.bfloat16):
            molecule_sampling.generate(model, counts, solver="heun", steps=4, guidance=2.0)
            elements, positions = torch.ones(16, 29, dtype=torch.uint8), torch.zeros(16, 29, 3)
            molecule_sampling.reconstruct(model, elements, positions, counts)
    where = places(watch)
    # Counts and labels in, elements and positions out; counts, elements and positions in, elements and positions out.
    assert where == ["packing.py"] + 3 * ["sampling.py"] + ["packing.py"] + 4 * ["sampling.py"]


def test_operators_refuse_what_a_launch_cannot_take():
    with imagined.imagined() as device, imagined.Watch() as watch:
        assert uk.philox_normal((4,), 0, 0, 0, draws=65535, device=device).shape == (65535, 4)
        assert watch.launches["unite_kernels::philox"] == 1
        many = torch.empty(65536, 3, 2, 2, device=device, dtype=torch.bfloat16)
        last = many.contiguous(memory_format=torch.channels_last)
        for call in (
            lambda: uk.philox_normal((4,), 0, 0, 0, draws=65536, device=device),
            lambda: uk.flow_noise(many.view(65536, 3, 4), 1, 0, 0),
            lambda: uk.patch_l1(many.view(65536, 1, 12), many, 2),
            lambda: uk.lpips_distance(last, last, torch.empty(3, device=device)),
        ):
            with pytest.raises(ValueError, match="65536; the kernel takes at most 65535"):
                call()
        with pytest.raises(ValueError, match=r"2147483648,\); a draw takes fewer than 2\*\*31 numbers"):
            uk.philox_uniform((2**31,), 0, 0, 0, device=device)


def test_launches_are_counted_by_what_they_depend_on(tmp_path):
    with imagined.imagined() as device:
        losses = {draws: {"flow_draws": draws, "draws_per_chunk": 1} for draws in (1, 2, 4)}
        found = {draws: count(small(tmp_path, objective=losses[draws]), 5, device) for draws in losses}
        together = count(small(tmp_path, objective={"flow_draws": 4, "draws_per_chunk": 4}), 5, device)
        one = imagined.Watch()
        x = torch.ones(8, 8, device=device)
        with one:
            y = (x @ x + x).view(64)[:3].t().to(torch.bfloat16)
            torch._foreach_mul_([x] * 200, 2.0)
            uk.swiglu(y.expand(2, 3).contiguous().repeat(1, 2))
            torch._foreach_copy_([torch.empty(8, 8, device=device, dtype=torch.bfloat16)], [x])
    # A product, a sum and a cast; no view. 200 lists of one tensor each in launches of 110. A clone, a repeat: two.
    assert one.launches["aten::mm"] == one.launches["aten::add.Tensor"] == one.launches["aten::_to_copy"] == 1
    assert one.launches["aten::_foreach_mul_.Scalar"] == 2 and one.launches["unite_kernels::swiglu"] == 1
    assert not {name for name in one.launches if "view" in name or "slice" in name or "expand" in name}
    assert one.moved["aten::mm"] == 3 * 64 * 4 and one.moved["aten::_to_copy"] == 3 * (4 + 2)
    assert one.moved["aten::_foreach_copy_"] == 64 * (4 + 2)  # what stood there is not read
    assert one.moved["unite_kernels::swiglu"] == 2 * (2 * 6 + 2 * 3)
    totals = {draws: each.total for draws, each in found.items()}
    assert totals[4] - totals[2] == 2 * (totals[2] - totals[1]) > 0, "every draw launches the same"
    assert together.total == totals[1], "and a chunk as much as one draw"
    first = found[1]
    assert first.moved > first.least > 0 and first.host()[1] > first.host()[0]
    limit = first.limited_below(first.floor(7))
    assert limit == 7 and first.floor(7) == step_floor(small(tmp_path, objective=losses[1]), 7)
    # All that the operators must move, and their biases' gradients, casts and sums beside it.
    assert 0 < first.needed < sum(first.bytes.values()) and found[2].needed > first.needed
    lines = table({"a": first, "b": found[2]})
    assert len(lines) == 14 and len({line.count("|") for line in lines[5:9]}) == 1


@pytest.mark.parametrize(
    ("file", "depths", "form", "draws", "chunk", "accumulation", "changes"),
    [
        ("b_h100.json", (5, 2), {}, 2, 1, 2, ("objective.lpips.dropout=true",)),
        ("b_h100.json", (5, 3), {"checkpoint_activations": True}, 7, 4, 1, ()),
        ("b_h100.json", (5, 3), {"checkpoint_activations": True}, 2, 2, 1, ("train.fp8=true",)),
        ("b_h100.json", (5, 1), {"shared": False}, 2, 2, 1, ()),
        ("b_h100.json", (5, 1), {"latent_norm": "rms"}, 2, 1, 1, ()),
        ("l_h100.json", (5, 1), {}, 3, 2, 1, ()),
        ("l_h100.json", (5, 1), {}, 2, 1, 1, ("train.fp8=true",)),
        ("qm9_s.json", (3, 2), {}, 4, 2, 1, ()),
        ("qm9_s.json", (2, 3), {}, 2, 2, 2, ("train.fp8=true",)),
        ("qm9_s.json", (2, 2), {"latent_norm": "rms"}, 3, 1, 1, ()),
        ("qm9_s.json", (2, 2), {"latent_norm": "none", "register_noise": False}, 3, 1, 1, ()),
    ],
)
def test_the_plans_launches_are_those_of_the_step(file, depths, form, draws, chunk, accumulation, changes):
    """Within 1 %: what is not exact is how the update's lists are cut."""
    config = shaped(file, depths, form, draws, chunk, *changes)
    with imagined.imagined() as device:
        made = images_ahead(config, 2, device) if config.modality == "images" else molecules(config, 2)
        watch = ImaginedRun(config, device, Batch(2, accumulation, 2 * accumulation), made).watched()
    assert step_launches(config, accumulation) == pytest.approx(watch.total, rel=0.01)


@pytest.mark.parametrize(
    ("file", "depths", "form", "draws", "chunk", "accumulation"),
    [
        ("b_h100.json", (5, 2), {}, 3, 1, 2),
        ("b_h100.json", (5, 3), {"shared": False}, 2, 2, 1),
        ("l_h100.json", (5, 1), {"checkpoint_activations": True}, 3, 2, 1),
        ("qm9_s.json", (3, 2), {}, 4, 2, 1),
        ("qm9_s.json", (2, 3), {"checkpoint_activations": True}, 2, 2, 2),
    ],
)
def test_so_are_those_under_zero_3(monkeypatch, file, depths, form, draws, chunk, accumulation):
    """By DeepSpeed's own Linear, without what gathers weights; within 1 %, though a fourth are its Linears'."""
    zero = pytest.importorskip("deepspeed.runtime.zero.linear", reason="DeepSpeed is not installed")
    config = shaped(file, depths, form, draws, chunk, "optimizer.kind=adamw")
    gathered = config.model_copy(update={"train": config.train.model_copy(update={"zero_stage": 3})})
    with imagined.imagined() as device:
        made = images_ahead(config, 2, device) if config.modality == "images" else molecules(config, 2)
        run = ImaginedRun(config, device, Batch(2, accumulation, 2 * accumulation), made)
        for parameter in run.engine.parameters.values():
            parameter.ds_id = 0  # by which it is known to be one of ZeRO 3's
        monkeypatch.setattr(zero, "is_zero_param", lambda parameter: False)  # it is there already
        monkeypatch.setattr(zero, "get_accelerator", lambda: mock.Mock(device_name=lambda: device.type))
        monkeypatch.setattr(torch.nn.functional, "linear", zero.zero3_linear_wrap)
        watch = run.watched()
    assert step_launches(gathered, accumulation) == pytest.approx(watch.total, rel=0.01)
    assert step_launches(config, accumulation) < 0.85 * watch.total


def shaped(file: str, depths: tuple[int, int], form: dict, draws: int, chunk: int, *overrides: str) -> Config:
    """A preset of these depths of encoder and decoder, altered in form."""
    encoder, decoder = depths
    sizes = Config.load(CONFIGS / file).model
    model = {"preset": sizes.preset, "depth": encoder, "decoder": {"preset": sizes.decoder.preset, "depth": decoder}}
    sections = [f"model={json.dumps(model | form)}", f"objective.flow_draws={draws}"]
    return preset(file, *sections, f"objective.draws_per_chunk={chunk}", *overrides)


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Triton brings ptxas on Linux x86_64 alone"
)
def test_triton_compiles_what_the_launchers_hand_it():
    """Numbers of 1 become constants, absent tensors disappear: what is compiled ahead of time is one case of many."""
    kernels = {}
    with imagined.imagined() as device:
        images = preset("b_h100.json", "objective.flow_draws=2", 'model={"preset": "B", "depth": 6}')
        kernels |= image_run(images, device).watched().kernels
        qm9 = preset("qm9_s.json", "objective.flow_draws=2")
        kernels |= ImaginedRun(qm9, device, Batch(64, 1, 64), molecules(qm9, 64)).watched().kernels
    assert {launch.function for launch in kernels.values()} >= {"_loss_kernel", "_sum_kernel", "_distance_kernel"}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("kernels_jit_worker.py"), "90"], env=environment, text=True,
        capture_output=True, input="".join(json.dumps(launch._asdict()) + "\n" for launch in kernels.values()),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == len(kernels)

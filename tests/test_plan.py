"""`unite-fast plan`: its memory against a real step, its formulas against the simulation, its words to a user."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from cli_toy import mistake, run
from engine_toy import toy_config
from PIL import Image

import unite_kernels as uk
from unite_fast.analysis.allocation import peak_allocated
from unite_fast.analysis.chunks import with_chunk
from unite_fast.analysis.counts import image_operations, step_parts
from unite_fast.analysis.devices import GPUS, Network, find_gpu, recognise, stated_peak
from unite_fast.analysis.extent import Extent
from unite_fast.analysis.memory import pass_activations, predict
from unite_fast.analysis.planning import (
    BROKEN,
    SCALE,
    breaking_point,
    collective_time,
    plan,
    scaling,
    step_time,
)
from unite_fast.analysis.simulation import simulate
from unite_fast.analysis.update import Collective, newton_schulz_operations, trained_weights, update_part
from unite_fast.cli.plan import STAGES, TOO_LARGE, _short
from unite_fast.config import Config, ModelConfig, ObjectiveConfig, OptimizerConfig
from unite_fast.engine.engine import Engine
from unite_fast.engine.world import World
from unite_fast.model.unite import Unite
from unite_fast.objective.draws import SeededDraws
from unite_fast.objective.two_pass import Objective, two_pass_step

CPU = torch.device("cpu")
H100 = find_gpu("h100-80")
NODES = Network(per_node=8, node_link=H100.link, link=50e9)


def published(preset: str = "L", *, draws: int = 14, **train) -> Config:
    return Config.parse(
        {
            "model": {"preset": preset, "decoder": {"preset": "B"}},
            "objective": {"flow_draws": draws},
            "train": {"epochs": 120, "global_batch": 1024, "micro_batch": "auto"} | train,
            "data": {"path": "unused"},
        }
    )


@pytest.mark.parametrize(
    ("kind", "width", "batch"), [("muon", 128, 2), ("adamw", 48, 16)], ids=["update", "activations"]
)
def test_predicted_memory_is_what_a_real_step_allocates(gpu_memory, kind, width, batch):
    """The real engine on this CPU, within 10 %; once the update is the peak, once the first pass's activations are."""
    values = toy_config(kind=kind).model_dump()
    values["model"] = dict(
        image_size=8, patch_size=4, registers=4, latent_dim=4, depth=2, width=width, heads=2, num_classes=3,
        context_len=2, context_start=1, decoder=dict(depth=1, width=width // 2, heads=2, inner=24),
    )  # fmt: skip
    values["objective"] = dict(flow_draws=1, draws_per_chunk=1, lpips=dict(weight=0.0))
    config = Config.parse(values)
    before = torch.zeros(0)
    engine = Engine(Unite(config.model), config, World(0, 1, 0, before.device), steps_per_epoch=10)
    objective = Objective(config.objective, 3)
    images, labels = torch.rand(batch, 3, 8, 8), torch.zeros(batch, dtype=torch.int64)

    def step() -> None:
        draws = SeededDraws(config.objective, seed=0, step=0, stream=0, device=CPU)
        two_pass_step(engine, objective, images, labels, draws, shape=torch.Size((batch, 4, 4)))
        engine.step()

    memory = predict(config, extent=Extent(batch), dtype="fp32", device="cpu", single=True)
    resting = memory.weights + memory.optimizer + memory.ema
    assert (memory.update > memory.activations) is (kind == "muon")
    assert resting + peak_allocated(step, CPU) == pytest.approx(memory.peak, rel=0.1)


def test_newton_schulz_is_counted_as_it_runs():
    from torch.utils.flop_counter import FlopCounterMode

    for shape in ((8, 24), (24, 8), (16, 16)):
        with FlopCounterMode(display=False) as counter:
            uk.optim._newton_schulz.compute(torch.randn(3, *shape), 5, 1e-6)
        assert counter.get_total_flops() == 3 * newton_schulz_operations(*shape, 5, "fp32")


def test_published_sizes_of_the_optimizer():
    weights = trained_weights(ModelConfig(preset="B"), "muon")
    assert (weights.total, len(weights.matrices), weights.without_gradient) == (217_643_616, 115, 768)
    optimizer = published("B").optimizer
    alone, shared = (update_part(ModelConfig(preset="B"), optimizer, stage=s, ranks=n) for s, n in ((0, 1), (1, 64)))
    assert shared.forward < alone.forward / 20  # each matrix on one rank only
    # An average is read and written in Muon's sweep; AdamW's reads the weight for it.
    more = update_part(ModelConfig(preset="B"), optimizer.model_copy(update={"ema_decays": (0.5, 0.9)}))
    assert more.forward_bytes(1) - alone.forward_bytes(1) == 2 * 4 * (2 * weights.muon + 3 * weights.adamw)
    # 115 matrices on 64 ranks: the largest alone is the least the busiest rank has to do.
    assert shared.forward >= max(newton_schulz_operations(*shape, 5) for shape in weights.matrices)


def test_checkpointing_keeps_block_inputs_alone():
    sizes = dict(preset="B")
    whole, recomputed = (
        step_parts(ModelConfig(**sizes, checkpoint_activations=flag), ObjectiveConfig())["denoise"]
        for flag in (False, True)
    )
    assert pass_activations(whole) == whole.saved
    assert pass_activations(recomputed) < 0.3 * whole.saved  # two of about twenty tensors a block, and one block
    assert recomputed.recomputed > 0.9 * recomputed.forward and whole.recomputed == 0


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("preset", ["B", "XL"])
def test_formulas_agree_with_the_simulation_up_to_1024_gpus(preset, stage):
    """Within 10 %; the simulation's hops and queues are not in the formulas."""
    config = published(preset, draws=3)
    plans = scaling(config, H100, NODES, stage=stage)
    assert tuple(p.ranks for p in plans) == SCALE
    for p in plans[::3] + plans[-1:]:
        played = simulate(config, p, H100.rates, NODES, efficiency=0.75)
        assert played == pytest.approx(p.seconds.total, rel=0.1)


def test_scaling_breaks_where_communication_does_not_shrink():
    plans = scaling(published("B", draws=3), H100, NODES, stage=1)
    broken, why = breaking_point(plans)
    each = {p.ranks: p.samples_per_second / p.ranks for p in plans}
    assert each[broken.ranks] < BROKEN * each[8] <= each[broken.ranks // 2]
    assert "of the lost time is" in why
    slow = breaking_point(scaling(published("B", draws=3), H100, NODES._replace(link=1.25e9), stage=1))
    assert slow[0].ranks < broken.ranks and "reducing the gradients" in slow[1]
    assert breaking_point(plans[:1]) is None
    # Measured from the first plan that fits; what does not fit breaks nothing.
    at = plans.index(broken)
    early = [replace(p, fits=index >= at) for index, p in enumerate(plans)]
    assert breaking_point(early) == breaking_point(plans[at:])
    assert breaking_point([replace(p, fits=False) for p in plans]) is None


def test_a_ring_and_a_tree_cost_what_they_must():
    flat = Network(per_node=4, node_link=1e9, link=1e9, node_latency=1e-6, latency=1e-6, share=1.0)
    whole = Collective("all_gather", "weights", 1_000_000, 1_000_000)
    assert collective_time(whole, 4, flat) == pytest.approx(3 * (1e-6 + 1e6 / 1e9))
    reduced = whole._replace(kind="all_reduce")
    assert collective_time(reduced, 4, flat) == pytest.approx(2 * collective_time(whole, 4, flat))
    tiny = Collective("all_reduce", "norm", 1, 1)
    assert collective_time(tiny, 4, flat) == pytest.approx(2 * 2 * 1e-6, rel=0.1)  # a tree has fewer hops
    assert collective_time(whole, 1, flat) == 0
    # Over two nodes a ring for each of four adapters side by side, and one hop in four leaves its node.
    nodes = flat._replace(link=1e8, latency=5e-6)
    assert collective_time(whole, 8, nodes) == pytest.approx(7 * (2e-6 + 4e6 / 8 / 4e8))
    assert collective_time(whole, 8, nodes._replace(link=1e9)) == pytest.approx(7 * (2e-6 + 4e6 / 8 / 1e9))


def test_more_hardware_is_never_slower():
    config = published("L")
    base = plan(config, H100, NODES, ranks=64, stage=1)
    assert plan(config, find_gpu("b200"), NODES, ranks=64, stage=1).seconds.total < base.seconds.total
    assert plan(config, H100, NODES, ranks=64, stage=1, efficiency=0.5).seconds.total > base.seconds.total
    assert base.micro_batch * base.accumulation * 64 == 1024 and base.fits
    assert base.memory.peak > plan(config, H100, NODES, ranks=64, stage=1).memory.state
    small = plan(config, find_gpu("rtx4090"), NODES, ranks=8, stage=0)
    assert small.accumulation > 1 and small.memory.peak < find_gpu("rtx4090").memory
    operations = image_operations(config.model, config.objective) * 1024 / 8
    assert small.mfu == pytest.approx(operations / small.seconds.total / find_gpu("rtx4090").matmul)
    huge = published("XL").model_copy(update={"model": ModelConfig(preset="XL", width=8192, heads=64)})
    assert not plan(huge, find_gpu("rtx4090"), NODES, ranks=8, stage=0).fits
    weak = published("L", global_batch=None, accumulation=2)
    grown = plan(weak, H100, NODES, ranks=64, stage=1)
    assert grown.global_batch == 128 * grown.micro_batch and grown.micro_batch in (32, 64)
    fixed = plan(published("L", micro_batch=4), H100, NODES, ranks=64, stage=1)
    assert (fixed.micro_batch, fixed.accumulation) == (4, 4)
    seconds = step_time(with_chunk(config, 1), H100.rates, NODES, 64, 0, Extent(16), 1, 0.75, 2e-5)
    assert seconds.exchange == seconds.weights == 0 < seconds.gradients


def test_devices_are_recognised_by_their_names():
    for name, expected in (
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100-80"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40-pcie"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA B200", "b200"),
    ):
        assert recognise(name).name == expected
    for other in (
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 5090 D", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA GB200", "NVIDIA GH200 480GB",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "Radeon",
    ):  # fmt: skip
        assert recognise(other) is None, other
    assert [gpu.name for gpu in GPUS if gpu.measured] == ["h200"]
    assert find_gpu("H200").rates[:2] == pytest.approx((790e12, 4.3e12))
    assert stated_peak(CPU, torch.bfloat16) is None  # a CPU states none: no MFU in the records


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_the_command_prints_tables_and_draws(tmp_path, capsys):
    picture = tmp_path / "plans" / "plan.png"
    assert run("plan", "--preset", "B", "--gpus", "16", "--set", "objective.flow_draws=3", "--out", picture) == 0
    printed = capsys.readouterr().out
    for words in (
        "ZeRO", "GPU-h", "3\u00a0adamw", "simul.", "Scaling breaks at", "it does among 8; ", "240 epochs",
        "0.75 of the floor that these rates set (assumed, ", "400 Gbit/s per GPU between nodes",
    ):  # fmt: skip
        assert words in printed
    with Image.open(picture) as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 20)) > 50


def test_the_numbers_come_as_json(capsys):
    arguments = ["--config", "configs/b_24gb.json", "--gpus", "1", "--gpu", "rtx4090", "--json"]
    assert run("plan", *arguments, "--efficiency", "0.4", "--images", "1000") == 0
    numbers = json.loads(capsys.readouterr().out)
    first = numbers["plans"][0]
    assert first["micro_batch"] * first["accumulation"] == 384 and first["communication_share"] == 0
    assert first["gpu_hours"] == pytest.approx(80 * 1000 / first["images_per_second"] / 3600)
    assert [row["gpus"] for row in numbers["scaling"]] == [8, 16, 32, 64, 128]  # what 384 images can be shared by


@pytest.mark.parametrize(
    ("length", "stage", "epochs", "called"),
    [
        ("train.epochs=null train.steps=1000", 0, 1000 * 1024 / 10_000, "1,000"), ("", 2, 120, "120"),
        ("optimizer.kind=adamw", 3, 120, "120"),
    ],
)  # fmt: skip
def test_tables_and_json_are_the_prediction_for_the_options(length, stage, epochs, called, capsys):
    options = {"gpus": 16, "gpu": "a100-80", "per-node": 4, "network": 100, "efficiency": 0.5, "launch-us": 30}
    overrides = ["objective.flow_draws=3", f"train.zero_stage={stage}", *length.split()]
    arguments = ["--preset", "L", "--images", 10_000, *(w for k, v in options.items() for w in (f"--{k}", v))]
    assert run("plan", *arguments, "--set", *overrides, "--json") == 0
    numbers = json.loads(capsys.readouterr().out)
    gpu = find_gpu("a100-80")
    links = Network(4, gpu.link, 12.5e9)
    kind = "adamw" if stage == 3 else "muon"
    made = published(draws=3).model_copy(update={"optimizer": OptimizerConfig(kind=kind)})
    options = {"efficiency": 0.5, "launch": 3e-5}
    plans = [plan(made, gpu, links, ranks=16, stage=stage, **options) for stage in STAGES]
    scaled = scaling(made, gpu, links, stage=min(stage, 2), **options)
    for row, p in zip(numbers["plans"] + numbers["scaling"], plans + scaled, strict=True):
        assert (row["zero_stage"], row["gpus"], row["fits"]) == (p.stage, p.ranks, p.fits)
        assert row["memory_bytes"]["peak"] == p.memory.peak
        assert row["step_seconds"]["total"] == pytest.approx(p.seconds.total)
        assert row["communication_share"] == pytest.approx(p.seconds.communication / p.seconds.total)
        assert row["gpu_hours"] == pytest.approx(epochs * p.epoch_hours(10_000) * p.ranks)
    played = [simulate(made, p, gpu.rates, links, efficiency=0.5) for p in scaled]
    assert [row["simulated_step_seconds"] for row in numbers["scaling"]] == pytest.approx(played)

    assert run("plan", *arguments, "--set", *overrides) == 0
    printed = capsys.readouterr().out
    assert "0.5 of the floor that these rates set (given)" in printed and "100 Gbit/s per GPU between nodes" in printed
    cells = [[cell for cell in line.split(" ") if cell] for line in printed.splitlines()]
    unit = "steps" if length.startswith("train.epochs") else "epochs"
    assert ["min", "GPU-h,", called, unit] in [row[-4:] for row in cells]
    for p in plans:
        hours = p.epoch_hours(10_000)
        assert [
            f"{p.stage}\u00a0{p.optimizer}", _short(p.memory.peak / 2**30), f"{p.micro_batch}×{p.accumulation}×16",
            _short(p.seconds.total * 1e3), f"{p.samples_per_second:.0f}", f"{p.mfu:.1%}",
            f"{p.seconds.communication / p.seconds.total:.1%}", _short(hours * 60), _short(hours * epochs * 16),
        ] in cells  # fmt: skip
    for p, simulated in zip(scaled, played, strict=True):
        parts = ("compute", "launching", "gradients", "exchange", "weights", "update")
        assert [
            str(p.ranks), f"{p.micro_batch}×{p.accumulation}", _short(p.seconds.total * 1e3), _short(simulated * 1e3),
            f"{p.samples_per_second / p.ranks:.1f}", *(f"{getattr(p.seconds, x) / p.seconds.total:.0%}" for x in parts),
        ] in cells  # fmt: skip


def test_no_cell_is_cut_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("plan", "--config", "configs/qm9_s.json", "--molecules", "1") == 0
    tables = capsys.readouterr().out.partition("·")[0]
    assert "…" not in tables and "<0.01" in tables and tables.count("molecules") == 2


def test_what_does_not_fit_has_no_times(tmp_path, capsys):
    picture = tmp_path / "plan.png"
    arguments = ["--preset", "XL", "--gpu", "rtx4090", "--out", picture]
    assert run("plan", *arguments, "--set", "train.micro_batch=64") == 0
    printed = capsys.readouterr().out
    assert printed.count(">") == len(STAGES)  # before the memory
    assert printed.count(TOO_LARGE) == len(STAGES) + 2  # 1024 images in 64s: 8 and 16 GPUs
    assert "None of these runs fits into a GPU's memory." in printed and "at least 80%" not in printed
    with Image.open(picture) as image:
        assert image.width < 1000  # memory alone, no scaling
    # Accumulation shrinks the micro-batch as GPUs are added: the larger runs fit.
    assert run("plan", *arguments, "--set", "train.accumulation=4", "train.micro_batch=null") == 0
    table, _, text = capsys.readouterr().out.partition("the same run on more GPUs")[2].partition("Up to 256 GPUs")
    rows = [line.split() for line in table.splitlines() if "×4" in line]
    missing = [row[0] for row in rows if "large" in row]
    assert 0 < len(missing) < len(rows) and f"among {rows[len(missing)][0]}." in text
    with Image.open(picture) as image:
        assert image.width > 1000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "L", "--gpu", "h100"], "unknown GPU 'h100': did you mean h100-80? known are b200, h200"),
        (["--preset", "Q"], "unknown preset 'Q': choose one of B, M, L, XL"),
        (["--preset", "L", "--gpus", "7"], "train.global_batch 1024 is not divisible by 7 ranks"),
        (["--gpus", "8"], "give one of --preset"),
        (["--preset", "L", "--config", "x.json"], "give one of --preset"),
        (["--preset", "L", "--gpus", "0"], "--gpus"),
        (["--preset", "L", "--efficiency", "2"], "--efficiency"),
        (["--preset", "L", "--set", "model.dept=3"], "did you mean 'depth'?"),
        (["--preset", "L", "--out", "plan.pdf"], "--out plan.pdf: the name must end in .png"),
        (["--preset", "L", "--out", "/proc/plan.png"], "cannot write picture /proc/plan.png"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, says, capsys):
    if says.startswith("did you mean 'depth'"):
        assert run("plan", *arguments) == 2
        assert says in capsys.readouterr().err
    else:
        assert says in mistake(capsys, "plan", *arguments)

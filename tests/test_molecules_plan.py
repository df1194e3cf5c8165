"""`unite-fast plan` on molecules: kept activations, a step's memory, whom it plans for, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_toy import mistake, run
from PIL import Image
from test_counts import CPU, Plain, peak_saved

pytest.importorskip("rdkit", reason="molecules need RDKit: pip install 'unite_fast[molecules]'")

from molecule_runs import config, settings, small_set

from unite_fast import Config
from unite_fast.analysis.allocation import peak_allocated
from unite_fast.analysis.chunks import with_chunk
from unite_fast.analysis.devices import Network, find_gpu
from unite_fast.analysis.extent import Extent, Population
from unite_fast.analysis.memory import Memory, pass_activations, predict
from unite_fast.analysis.planning import plan, scaling
from unite_fast.analysis.profiling import _batch
from unite_fast.analysis.simulation import simulate
from unite_fast.data.molecules.molecule_set import split, write_npz
from unite_fast.data.molecules.sample import stored
from unite_fast.engine.engine import Engine
from unite_fast.engine.world import World
from unite_fast.modality import counted_operations, modality_of
from unite_fast.model.packing import Packed
from unite_fast.molecules.config import MoleculeModelConfig, MoleculeObjectiveConfig
from unite_fast.molecules.counts import packed_parts
from unite_fast.molecules.model import MoleculeUnite
from unite_fast.molecules.objective import MoleculeObjective, Molecules
from unite_fast.molecules.population import QM9_ATOMS
from unite_fast.objective.draws import SeededDraws
from unite_fast.objective.two_pass import two_pass_step

SIZES = dict(depth=2, width=48, heads=2, latent_dim=6, num_classes=2, decoder=dict(depth=1, width=32, heads=2))
H100 = find_gpu("h100-80")
NODES = Network(per_node=8, node_link=H100.link, link=50e9)
QM9_S = Path(__file__).parent.parent / "configs" / "qm9_s.json"


def passes(engine, goal, counts, latent_dim):
    """Both passes on molecules of these atom counts."""
    packed = Packed.of(torch.tensor(counts))
    elements = torch.ones(packed.total, dtype=torch.int64)
    data = Molecules(elements, torch.randn(packed.total, 3), packed)
    draws = SeededDraws(goal.config, seed=0, step=0, stream=0, device=CPU)
    shape = torch.Size((len(counts), packed.length, latent_dim))
    two_pass_step(engine, goal, data, torch.zeros(len(counts), dtype=torch.int64), draws, shape=shape)


def kept(parts, draws):
    """What waits for a backward in the larger pass, by the counts."""
    return max(
        sum(pass_activations(part) for name, part in parts.items() if name != "denoise"),
        draws * pass_activations(parts["denoise"]),
    )


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {"flow_draws": 1, "draws_per_chunk": 1}),
        (None, {"flow_draws": 4, "draws_per_chunk": 4}),
        (None, {"flow_draws": 1, "draws_per_chunk": 1, "decoder_noise": "additive", "position_loss": "mse"}),
    ],
    ids=["first pass in bf16", "second pass in fp32", "additive"],
)
def test_saved_activations_are_what_autograd_keeps(gpu_memory, dtype, options):
    """Within 1 %, of one molecule more; what a pass keeps whatever its batch, such as cast weights, drops out."""
    model = MoleculeUnite(MoleculeModelConfig(**SIZES))
    goal = MoleculeObjective(MoleculeObjectiveConfig(**options), model.null_label)
    for atoms in (1, 5):  # two sizes, since a molecule's condition and its atoms are counted apart
        two, one = (
            peak_saved(lambda: passes(Plain(model, dtype), goal, [atoms] * count, 6), model) for count in (2, 1)
        )
        extent = Extent(1, atoms, atoms**2)
        parts = packed_parts(
            model.config, goal.config, extent, dtype="fp32" if dtype is None else "bf16", device="cpu"
        )
        assert two - one == pytest.approx(kept(parts, goal.config.flow_draws), rel=0.01), atoms


def test_molecules_of_different_sizes_keep_their_own_atoms(gpu_memory):
    """On a CPU attention alone keeps padding beside them, on a GPU nothing does."""
    model = MoleculeUnite(MoleculeModelConfig(**SIZES))
    goal = MoleculeObjective(MoleculeObjectiveConfig(flow_draws=1, draws_per_chunk=1), model.null_label)
    counts = [1, 5, 2, 9]
    found = peak_saved(lambda: passes(Plain(model), goal, counts, 6), model)
    extent = Extent.of(torch.tensor(counts))
    parts = packed_parts(model.config, goal.config, extent, dtype="fp32", device="cpu")
    attention = sum(op.saved for name in ("tokenize", "decode") for op in parts[name].ops if op.name == "attention")
    padding = len(counts) * max(counts) / sum(counts) - 1
    assert found == pytest.approx(kept(parts, 1) + padding * attention, rel=0.01)
    packed = packed_parts(model.config, goal.config, extent, dtype="fp32", device="cuda")
    assert kept(packed, 1) < 0.75 * found
    several = [packed_parts(model.config, goal.config, Extent(1, n, n * n), dtype="fp32") for n in counts]
    assert kept(packed, 1) == sum(kept(alone, 1) for alone in several)


@pytest.mark.parametrize(
    ("kind", "width", "batch", "atoms"), [("muon", 96, 2, 2), ("adamw", 64, 6, 4)], ids=["update", "activations"]
)
def test_predicted_memory_is_what_a_real_step_allocates(gpu_memory, tmp_path, kind, width, batch, atoms):
    """The real engine on this CPU, within 10 %; once the update is the peak, once the activations are."""
    sizes = {"depth": 2, "width": width, "heads": 2, "latent_dim": 8}
    sizes["decoder"] = {"depth": 1, "width": width // 2, "heads": 2}
    draws = {"flow_draws": 4, "draws_per_chunk": 4}
    made = config(tmp_path, model=sizes, objective=draws, optimizer={"kind": kind})
    engine = Engine(MoleculeUnite(made.model), made, World(0, 1, 0, CPU), steps_per_epoch=10)
    goal = MoleculeObjective(made.objective, made.model.num_classes)

    def step() -> None:
        passes(engine, goal, [atoms] * batch, 8)
        engine.step()

    extent = Extent(batch, atoms * batch, atoms**2 * batch)
    memory = predict(made, extent=extent, dtype="fp32", device="cpu", single=True)
    resting = memory.weights + memory.optimizer + memory.ema
    assert (memory.update > memory.activations) is (kind == "muon") and memory.frozen == 0
    assert resting + peak_allocated(step, CPU) == pytest.approx(memory.peak, rel=0.1)


def test_the_busiest_micro_batch_is_about_the_largest_of_a_long_run():
    sizes = np.repeat(np.arange(len(QM9_ATOMS)), QM9_ATOMS)
    assert len(sizes) == 100_000 and sizes.max() == 29
    drawn = np.random.default_rng(0).choice(sizes, (50_000, 64))
    found = Population(QM9_ATOMS, 100_000, "")
    mean, busiest = found.mean(64), found.busiest(64)
    assert (mean.samples, mean.tokens) == (64, round(64 * sizes.mean())) and 18 < found.mean_length < 18.1
    assert mean.pairs == round(64 * (sizes.astype(float) ** 2).mean())
    assert drawn.sum(1).max() <= busiest.tokens < 1.03 * drawn.sum(1).max()
    assert (drawn**2).sum(1).max() <= busiest.pairs < 1.05 * (drawn**2).sum(1).max()
    assert found.busiest(1) == Extent(1, 29, 29**2)  # no molecule is larger
    alike = Population((1,), 7, "")
    assert alike.mean(5) == alike.busiest(5) == Extent(5)


def test_molecules_are_counted_where_they_are_there(tmp_path):
    made = config(tmp_path)
    counts = small_set().counts[split(len(small_set()), 0).train]
    found = modality_of(made).population(made)
    assert found.samples == len(counts) == 26 and found.mean_length == pytest.approx(counts.mean())
    assert found.mean(1).pairs == round((counts.astype(float) ** 2).mean())
    assert "26 molecules per epoch" in found.source and "counted: molecules of the tests" in found.source


def test_without_molecules_the_sizes_are_those_of_qm9(tmp_path):
    absent = config(tmp_path, data={"path": str(tmp_path / "absent")})
    found = modality_of(absent).population(absent)
    assert found.samples == 100_000 and found.histogram == QM9_ATOMS
    assert "18.0 atoms each, at most 29" in found.source and f"no data at {tmp_path / 'absent'}" in found.source
    sample = config(tmp_path, data={"path": None, "sample_count": 32})
    unmade = modality_of(sample).population(sample)
    assert unmade.samples == 26 and unmade.histogram == QM9_ATOMS and "has not been made yet" in unmade.source
    write_npz(small_set(), stored(32, cache=sample.data.cache))
    assert modality_of(sample).population(sample).mean_length < 10


def test_auto_takes_what_fits_of_the_largest_molecules(monkeypatch):
    sections = ["train.accumulation=null", "train.micro_batch=auto", "train.global_batch=65536", "train.zero_stage=0"]
    made = Config.load(QM9_S, sections)
    small = find_gpu("rtx4090")
    found = plan(made, small, NODES, ranks=1, stage=0)
    largest = modality_of(made).largest
    room = 0.92 * small.memory

    def predicted(size: int, chunk: int) -> Memory:
        return predict(with_chunk(made, chunk), extent=largest(made, size))

    assert predicted(found.micro_batch, found.draws_per_chunk).peak <= room
    assert predicted(2 * found.micro_batch, 1).peak > room
    assert found.fits and found.extent.tokens == round(18.03097 * found.micro_batch)
    # The memory of a plan is that of molecules as they come.
    assert found.memory.activations < 0.75 * predicted(found.micro_batch, found.draws_per_chunk).activations
    fixed = Config.load(QM9_S, ["train.accumulation=1", f"train.global_batch={4 * found.micro_batch}"])
    assert not plan(fixed, small, NODES, ranks=1, stage=0).fits
    # `profile` on a GPU takes the same.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (small.memory, small.memory))
    batch, run = _batch(made, World(0, 1, 0, torch.device("cuda")), None)
    assert (batch.micro_batch, run.objective.chunk) == (found.micro_batch, found.draws_per_chunk)
    probe = modality_of(made).probe(made, 3, CPU)
    assert Extent.of(probe.data.packed.counts) == probe.extent == largest(made, 3)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("stage", [0, 1])
def test_formulas_agree_with_the_simulation(kind, stage):
    made = Config.load(QM9_S, [f"optimizer.kind={kind}", f"train.zero_stage={stage}"])
    plans = scaling(made, H100, NODES, stage=stage)
    assert [p.ranks for p in plans] == [8, 16, 32, 64, 128, 256, 512]  # what 512 molecules can be shared by
    for p in plans[::3]:
        played = simulate(made, p, H100.rates, NODES, efficiency=0.75)
        assert played == pytest.approx(p.seconds.total, rel=0.1)
        operations = counted_operations(made, p.extent) * p.accumulation
        assert p.mfu == pytest.approx(operations / p.seconds.total / H100.matmul)


def test_the_command_prints_tables_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    picture = tmp_path / "plan.png"
    arguments = ["--config", QM9_S, "--set", f"data.path={tmp_path / 'absent'}", "--gpus", "8"]
    assert run("plan", *arguments, "--out", picture) == 0
    printed = capsys.readouterr().out
    for words in (
        "molecules", "/s", "64×1×8", "epoch", "GPU-h, 8,000 epochs", "3\u00a0adamw", "Scaling breaks at",
        "100,000 molecules per epoch, 18.0 atoms each, at most 29 (sizes as in QM9's training part: there are no data",
    ):  # fmt: skip
        assert words in printed
    assert "images" not in printed
    with Image.open(picture) as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 20)) > 50


def test_the_numbers_come_as_json(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(settings(tmp_path, train={"global_batch": 8, "epochs": 3, "steps": None})))
    assert run("plan", "--config", path, "--gpus", "2", "--efficiency", "0.5", "--json") == 0
    numbers = json.loads(capsys.readouterr().out)
    assert sum(numbers["population"]["histogram"]) == numbers["population"]["samples"] == 26
    first = numbers["plans"][0]
    assert (first["micro_batch"], first["accumulation"], first["global_batch"]) == (4, 1, 8)
    assert first["gpu_hours"] == pytest.approx(2 * 3 * 26 / first["molecules_per_second"] / 3600)
    assert run("plan", "--config", path, "--molecules", "260", "--gpus", "2", "--efficiency", "0.5", "--json") == 0
    given = json.loads(capsys.readouterr().out)
    assert given["plans"][0]["gpu_hours"] == pytest.approx(10 * first["gpu_hours"])
    assert given["plans"][0]["step_seconds"] == first["step_seconds"]


def test_a_mistake_is_one_sentence(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    says = mistake(capsys, "plan", "--config", QM9_S, "--set", f"data.path={tmp_path / 'empty'}")
    assert str(tmp_path / "empty") in says
    says = mistake(capsys, "plan", "--config", QM9_S, "--gpus", "7")
    assert "train.global_batch 512 is not divisible by" in says

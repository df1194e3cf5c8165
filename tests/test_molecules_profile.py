"""Counted operations of packed molecules against PyTorch's own counter, and `unite-fast profile` on a small run."""

from __future__ import annotations

import json

import pytest
import torch
from cli_toy import mistake, run
from kernel_testing import on_backend
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("rdkit", reason="molecules need RDKit: pip install 'unite_fast[molecules]'")

from molecule_runs import config, settings
from test_counts import CPU, Plain

from unite_fast.analysis.counts import repeats
from unite_fast.analysis.extent import Extent
from unite_fast.engine import loop
from unite_fast.engine.batch import Batch
from unite_fast.engine.world import World
from unite_fast.modality import counted_operations, modality_of
from unite_fast.model.packing import Packed
from unite_fast.molecules.config import MoleculeModelConfig, MoleculeObjectiveConfig
from unite_fast.molecules.counts import packed_parts
from unite_fast.molecules.model import MoleculeUnite
from unite_fast.molecules.objective import MoleculeObjective, Molecules
from unite_fast.molecules.report import MoleculeReport
from unite_fast.objective.draws import SeededDraws
from unite_fast.objective.two_pass import two_pass_step

COUNTS = [3, 9, 5, 29, 1]
SIZES = dict(depth=3, width=48, heads=2, latent_dim=6, num_classes=2, decoder=dict(depth=2, width=32, heads=2))


def extent(counts):
    return Extent.of(torch.tensor(counts))


def counted(model, goal, counts):
    """Operations by the configuration, with those that are repeated."""
    parts = packed_parts(model.config, goal.config, extent(counts), dtype="fp32", device="cpu")
    return sum((p.operations + p.recomputed) * repeats(name, goal.config) for name, p in parts.items())


def computed(model, goal, counts):
    """Operations by PyTorch's counter in a training step: those of attention, and all others."""
    packed = Packed.of(torch.tensor(counts))
    elements = torch.ones(packed.total, dtype=torch.int64)
    data = Molecules(elements, torch.randn(packed.total, 3), packed)
    draws = SeededDraws(goal.config, seed=0, step=0, stream=0, device=CPU)
    shape = torch.Size((len(counts), packed.length, model.config.latent_dim))
    labels = torch.zeros(len(counts), dtype=torch.int64)
    # Fused attention on a CPU, PyTorch's or ours, is not in the counter's list; the plain form is the same products.
    with on_backend("torch"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        two_pass_step(Plain(model), goal, data, labels, draws, shape=shape)
    operators = counter.get_flop_counts()["Global"]
    attention = sum(count for operator, count in operators.items() if "bmm" in str(operator))
    return attention, counter.get_total_flops() - attention


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {"draws_per_chunk": 1}),
        ({"shared": False}, {"flow_draws": 3, "draws_per_chunk": 2}),
        ({}, {"draws_per_chunk": 1, "stop_gradient": False, "position_loss": "mse"}),
        ({"checkpoint_activations": True}, {"draws_per_chunk": 3}),
    ],
    ids=["plain", "separate", "one graph", "recomputed"],
)
def test_operations_equal_pytorchs_counter(sizes, options):
    """A packed batch costs what its molecules cost one by one; only a CPU's attention pays for padding beside that."""
    model = MoleculeUnite(MoleculeModelConfig(**SIZES | sizes))
    goal = MoleculeObjective(MoleculeObjectiveConfig(**options), model.null_label)
    alone = [computed(model, goal, [count]) for count in COUNTS]
    assert sum(map(sum, alone)) == counted(model, goal, COUNTS)
    attention, others = computed(model, goal, COUNTS)
    assert others == sum(rest for _, rest in alone)
    assert attention * sum(n * n for n in COUNTS) == sum(own for own, _ in alone) * len(COUNTS) * max(COUNTS) ** 2


def test_bytes_grow_with_the_atoms_and_float32_doubles_them():
    model, goal = MoleculeModelConfig(**SIZES), MoleculeObjectiveConfig()
    once, twice = (
        packed_parts(model, goal, extent(counts), dtype="fp32", device="cpu") for counts in (COUNTS, COUNTS * 2)
    )
    narrow = packed_parts(model, goal, extent(COUNTS), dtype="bf16", device="cpu")
    for name, part in once.items():
        weights = sum(part.itemsize * op.weights for op in part.ops)
        assert twice[name].forward_bytes(1) - weights == 2 * (part.forward_bytes(1) - weights) > 0
        assert narrow[name].forward_bytes(1) <= part.forward_bytes(1) <= 2 * narrow[name].forward_bytes(1)
    assert narrow["denoise"].forward_bytes(1) < 0.6 * once["denoise"].forward_bytes(1)


def test_a_run_records_the_operations_of_its_own_molecules(tmp_path, monkeypatch):
    """Exact for every record, though its micro-batches differ in size; by a peak that a CPU does not state."""
    monkeypatch.setattr(MoleculeReport, "finish", lambda self, steps, seconds: None)
    monkeypatch.setattr(loop, "stated_peak", lambda device, dtype: 1e9)
    made = config(tmp_path, train={"steps": 8, "global_batch": 8, "accumulation": 2, "log_every": 3})
    folder = loop.train(made)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 3, 6, 8]
    model = MoleculeUnite(made.model)
    goal = MoleculeObjective(made.objective, model.null_label)
    stream = modality_of(made).stream(made, Batch(4, 2, 8), World(0, 1, 0, CPU), start_step=0)
    before, sums = 0, []
    for record in records:
        steps = record["step"] - before
        before = record["step"]
        expected = sum(counted(model, goal, next(stream).counts.tolist()) for _ in range(2 * steps))
        seconds = steps * 8 / record["molecules_per_second"]
        assert record["mfu"] * seconds * 1e9 == pytest.approx(expected, rel=1e-12)
        sums.append(expected / steps)
    assert len(set(sums)) == len(sums)  # no constant would do
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("mfu")] == [1, 3, 6, 8]


def test_counting_sums_is_summing_counts(tmp_path):
    """The meter adds extents up and counts once a record."""
    made = config(tmp_path)
    first, second = extent(COUNTS), extent([7, 7, 2])
    total = counted_operations(made, first + second)
    assert total == counted_operations(made, first) + counted_operations(made, second)


def written(folder, **sections):
    path = folder / "run.json"
    path.write_text(json.dumps(settings(folder, **sections)))
    return path


def test_profile_accounts_for_the_whole_step(tmp_path, capsys):
    sections = {"train": {"global_batch": 8, "accumulation": 2}, "objective": {"flow_draws": 5, "draws_per_chunk": 2}}
    trace = tmp_path / "trace.json"
    assert run("profile", "--config", written(tmp_path, **sections), "--steps", "2", "--trace", trace, "--json") == 0
    numbers = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in numbers["parts"]}
    assert [(name, row["calls"]) for name, row in rows.items()] == [
        ("tokenize", 2), ("decode", 2), ("loss", 2), ("denoise", 6), ("update", 1),
    ]  # fmt: skip
    parts = sum(row["forward"] + row["backward"] for row in rows.values())
    rest = numbers["other_seconds"] + numbers["waiting_seconds"] + numbers["communication_seconds"]
    assert parts + rest == pytest.approx(numbers["step_seconds"])
    assert numbers["molecules"] == 8 and numbers["molecules_per_second"] == pytest.approx(8 / numbers["step_seconds"])
    assert all(row["floor"] > 0 for row in rows.values()) and rows["denoise"]["memory"] > 0
    # The parts are counted on the run's first micro-batch, the step's rate on those that were timed: two steps after
    # two that do not count, and after the one that served the parts.
    made, world, batch = config(tmp_path, **sections), World(0, 1, 0, CPU), Batch(4, 2, 8)
    stream = modality_of(made).stream(made, batch, world, start_step=0)
    extents = [Extent.of(next(stream).counts) for _ in range(9)]
    expected = packed_parts(made.model, made.objective, extents[0], dtype="fp32", device="cpu")
    for name, part in expected.items():
        assert rows[name]["operations"] == 2 * part.operations * repeats(name, made.objective), name
    timed = sum(
        part.operations * repeats(name, made.objective)
        for found in extents[5:]
        for name, part in packed_parts(made.model, made.objective, found, dtype="fp32", device="cpu").items()
    )
    per_step = numbers["mfu"] * numbers["step_seconds"] * numbers["matmul_operations_per_second"]
    assert per_step == pytest.approx(timed / 2)
    assert not (tmp_path / "runs").exists()
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"step", "encoder", "decoder", "optimizer", "wait for data"} <= names


def test_profile_without_data_takes_the_largest_molecules(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = written(tmp_path, data={"path": str(tmp_path / "absent")})
    options = ["--steps", "1", "--micro-batch", "2", "--trace", tmp_path / "trace.json"]
    assert run("profile", "--config", path, *options) == 0
    printed = capsys.readouterr().out
    says = ("a step of 2 molecules", "there is no data, molecules are made up", "of floor", "perfetto")
    assert all(words in " ".join(printed.split()) for words in says), printed
    assert "…" not in printed.partition("·")[0]  # the table fits
    (tmp_path / "empty").mkdir()
    says = mistake(capsys, "profile", "--config", path, *options, "--set", f"data.path={tmp_path / 'empty'}")
    assert str(tmp_path / "empty") in says

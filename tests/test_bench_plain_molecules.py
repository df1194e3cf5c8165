"""The rival of the step on molecules does the work of ours: same loss, gradients and update on the same draws."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_bench_plain import CLOSE, CPU, error
from test_molecules_model import COUNTS, SIZES, molecules

import unite_kernels as uk
from unite_fast.engine.batch import Batch
from unite_fast.engine.engine import Engine
from unite_fast.engine.world import World
from unite_fast.molecules.config import MoleculeConfig
from unite_fast.molecules.modality import Molecular
from unite_fast.molecules.model import MoleculeUnite
from unite_fast.molecules.objective import ROTATION_STREAM
from unite_fast.molecules.stream import MoleculeBatch
from unite_fast.objective.draws import RecordedDraws, TokenizeDraws
from unite_fast.objective.two_pass import one_graph_loss, two_pass_step

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from molecule_subjects import ATOM_HISTOGRAM, typical_counts
from plain_molecules import Padded, PlainMoleculeTrainer
from plain_training import plain_name

WORLD = World(0, 1, 0, CPU)
WHOLE = Batch(len(COUNTS), 1, len(COUNTS))
# Centring takes this parameter out of every loss: its gradient is rounding, about 1e-8, which no two orders share.
CENTRED_AWAY, NOTHING = "decoder.positions.bias", 1e-6
LENGTHS = {"unlike": COUNTS, "alike": torch.full((4,), 7), "padding": COUNTS}


def settings(kind: str = "muon") -> MoleculeConfig:
    return MoleculeConfig.parse(
        {
            "modality": "molecules",
            "model": {**SIZES, "num_classes": 3},
            "objective": {"flow_draws": 4, "draws_per_chunk": 2, "element_weight": 2.0, "position_weight": 3.0},
            # A clip that binds, so that clipping is compared, too.
            "optimizer": {"kind": kind, "lr": 1e-3, "lr_batch": None, "clip_norm": 0.5},
            "train": {"steps": 2, "global_batch": len(COUNTS), "accumulation": 1},
            "data": {"condition": "gap"},
        }
    )


def network(config: MoleculeConfig) -> MoleculeUnite:
    torch.manual_seed(0)
    model = MoleculeUnite(config.model)
    with torch.no_grad():  # the layers that start at zero would hide everything behind them
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def host_batch(counts: torch.Tensor, *, extra: int = 0, step: int = 0) -> MoleculeBatch:
    elements, positions = molecules(counts, extra=extra)
    labels = torch.tensor([0, 2, 1, 3])  # the last is the null label
    return MoleculeBatch(elements, positions.nan_to_num(0.0), counts, labels, 1.0, step, 0)


def quaternions(config: MoleculeConfig, batch: MoleculeBatch) -> torch.Tensor:
    """Those that turn the molecules of our step."""
    return uk.philox_normal((len(batch.counts), 4), config.train.seed, batch.step, ROTATION_STREAM)


def both_draws(plain: PlainMoleculeTrainer, batch: MoleculeBatch):
    drawn = plain.draws(*batch.elements.shape)
    tokenize = TokenizeDraws(drawn.noise, drawn.t_tokenize, (drawn.mix_mask, drawn.mix_t, drawn.mix_noise), None)
    return drawn, RecordedDraws(tokenize, drawn.flow_noise, drawn.t, drawn.drop)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_loss_and_gradients_are_ours(lengths):
    config = settings()
    model = network(config)
    plain = PlainMoleculeTrainer(config, model, lr=1e-3)
    batch = host_batch(LENGTHS[lengths], extra=3 if lengths == "padding" else 0)
    drawn, recorded = both_draws(plain, batch)
    objective = Molecular().objective(config, CPU, None)
    inputs = Molecular().inputs(config, batch, WHOLE, WORLD)
    ours = one_graph_loss(model, objective, inputs.data, inputs.labels, recorded, shape=inputs.shape)
    theirs = plain.model(Padded.of(batch, quaternions(config, batch)), batch.labels, drawn)
    assert error(theirs, ours) < CLOSE
    ours.backward()
    theirs.backward()
    gradients = {name: p.grad for name, p in plain.model.named_parameters()}
    compared = set()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        other = plain_name(name, config.model.depth)
        if name == CENTRED_AWAY:
            assert max(float(g.norm()) for g in (gradients[other], parameter.grad)) < NOTHING
        else:
            assert error(gradients[other], parameter.grad) < CLOSE, name
        compared.add(other)
    assert compared == set(gradients)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_two_steps_move_the_weights_and_the_average_as_ours(kind):
    config = settings(kind)
    model = network(config)
    plain = PlainMoleculeTrainer(config, model, lr=config.optimizer.lr)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = Engine(model, config, WORLD, steps_per_epoch=1.0)
    objective = Molecular().objective(config, CPU, None)
    for step, counts in enumerate((COUNTS, COUNTS.flip(0) + 1)):
        batch = host_batch(counts, step=step)
        drawn, recorded = both_draws(plain, batch)
        inputs = Molecular().inputs(config, batch, WHOLE, WORLD)
        two_pass_step(engine, objective, inputs.data, inputs.labels, recorded, shape=inputs.shape, weight=inputs.weight)
        engine.step()
        plain.step(batch, drawn, quaternions(config, batch))
    theirs = dict(plain.model.named_parameters())
    averages = dict(zip(theirs, plain.ema, strict=True))
    for name, parameter in model.named_parameters():
        other = plain_name(name, config.model.depth)
        if other is None or name == CENTRED_AWAY:
            continue
        moved = parameter.detach() - start[name]
        assert float(moved.norm()) > 0, name
        # Of the way moved, as on images: AdamW magnifies the rounding of tiny gradients.
        assert error(theirs[other].detach() - start[name], moved) < 1e-2, name
        assert error(averages[other] - start[name], engine.ema.of(parameter) - start[name]) < 1e-2, name


@pytest.mark.parametrize("size", [32, 512])
def test_a_typical_batch_pads_as_random_ones_do(size):
    sizes = np.repeat(np.arange(len(ATOM_HISTOGRAM)), ATOM_HISTOGRAM)
    drawn = np.random.default_rng(0).choice(sizes, (200, size))
    usual = 1 - drawn.mean() / drawn.max(1).mean()
    typical = typical_counts(size)
    assert len(typical) == size and abs(typical.mean() - sizes.mean()) < 0.1
    # The largest is a whole number: one atom more or less than 26 is 3 % of a batch.
    assert abs(1 - typical.mean() / typical.max() - usual) < 0.03

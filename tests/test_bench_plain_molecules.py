"""The rival of the step on molecules does the work of ours: same loss, gradients and update on the same draws."""

import numpy as np
import pytest
import torch
from bench_rivals import CLOSE, assert_same_gradients, assert_same_update, error, recorded
from molecule_subjects import ATOM_HISTOGRAM, typical_counts  # found by bench_rivals
from one_graph import one_graph_loss
from plain_molecules import Padded, PlainMoleculeTrainer
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
from unite_fast.objective.two_pass import two_pass_step

CPU = torch.device("cpu")
WORLD = World(0, 1, 0, CPU)
WHOLE = Batch(len(COUNTS), 1, len(COUNTS))
# Centring takes this parameter out of every loss: its gradient is rounding, which no two orders share.
CENTRED_AWAY = "decoder.positions.bias"
LENGTHS = {"unlike": COUNTS, "alike": torch.full((4,), 7), "padding": COUNTS}


def settings(kind: str = "muon", orientation: str = "random") -> MoleculeConfig:
    return MoleculeConfig.parse(
        {
            "modality": "molecules",
            "model": {**SIZES, "num_classes": 3},
            "objective": {
                "flow_draws": 4, "draws_per_chunk": 2, "element_weight": 2.0, "position_weight": 3.0,
                "flow_weight": 0.7, "t_floor": 0.8,
            },
            # A clip that binds, so that clipping is compared, too.
            "optimizer": {"kind": kind, "lr": 1e-3, "lr_batch": None, "clip_norm": 0.5},
            "train": {"steps": 2, "global_batch": len(COUNTS), "accumulation": 1},
            "data": {"condition": "gap", "orientation": orientation},
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
    return drawn, recorded(drawn)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_loss_and_gradients_are_ours(lengths):
    config = settings()
    model = network(config)
    plain = PlainMoleculeTrainer(config, model, lr=1e-3)
    batch = host_batch(LENGTHS[lengths], extra=3 if lengths == "padding" else 0)
    drawn, given = both_draws(plain, batch)
    objective = Molecular().objective(config, CPU, None)
    inputs = Molecular().inputs(config, batch, WHOLE, WORLD)
    ours = one_graph_loss(model, objective, inputs.data, inputs.labels, given, shape=inputs.shape)
    theirs = plain.model(Padded.of(batch, CPU, quaternions(config, batch)), batch.labels, drawn)
    assert error(theirs, ours) < CLOSE
    ours.backward()
    theirs.backward()
    assert_same_gradients(model, plain, rounding=CENTRED_AWAY)


@pytest.mark.parametrize("kind, orientation", [("muon", "random"), ("adamw", "random"), ("muon", "aligned")])
def test_two_steps_move_the_weights_and_the_average_as_ours(kind, orientation):
    config = settings(kind, orientation)
    model = network(config)
    plain = PlainMoleculeTrainer(config, model, lr=config.optimizer.lr)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = Engine(model, config, WORLD, steps_per_epoch=1.0)
    objective = Molecular().objective(config, CPU, None)
    for step, counts in enumerate((COUNTS, COUNTS.flip(0) + 1)):
        batch = host_batch(counts, step=step)
        drawn, given = both_draws(plain, batch)
        inputs = Molecular().inputs(config, batch, WHOLE, WORLD)
        two_pass_step(engine, objective, inputs.data, inputs.labels, given, shape=inputs.shape, weight=inputs.weight)
        engine.step()
        plain.step(batch, drawn, quaternions(config, batch) if orientation == "random" else None)
    assert_same_update(model, engine, plain, start, rounding=CENTRED_AWAY)


@pytest.mark.parametrize("size", [32, 512])
def test_a_typical_batch_pads_as_random_ones_do(size):
    sizes = np.repeat(np.arange(len(ATOM_HISTOGRAM)), ATOM_HISTOGRAM)
    drawn = np.random.default_rng(0).choice(sizes, (200, size))
    usual = 1 - drawn.mean() / drawn.max(1).mean()
    typical = typical_counts(size)
    assert len(typical) == size and abs(typical.mean() - sizes.mean()) < 0.1
    # The largest is a whole number: one atom more or less than 26 is 3 % of a batch.
    assert abs(1 - typical.mean() / typical.max() - usual) < 0.03

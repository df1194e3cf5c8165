"""What grows and what does not: two ranks against one, micro-batches, flow draws; volumes equal to the theory."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from engine_unite import unite_config, unite_engine
from ranks import TESTS, torchrun
from scaling_worker import RUNS, STAGE_ELEMENTS, scaling_config

from unite_fast.analysis.allocation import peak_allocated
from unite_fast.analysis.extent import Extent
from unite_fast.analysis.memory import predict
from unite_fast.analysis.update import FP32, collectives, exchange_elements, exchanges, flat_slices, trained_weights
from unite_fast.engine import optim
from unite_fast.engine.world import World
from unite_fast.objective.draws import SeededDraws
from unite_fast.objective.two_pass import Objective, two_pass_step

CPU = torch.device("cpu")
MICRO_BATCHES = 2  # of a rank in the worker
KIND = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather_into_tensor",
    "reduce_scatter": "reduce_scatter_tensor",
    "all_to_all": "all_to_all_single",
}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


@pytest.fixture(autouse=True)
def in_stages(monkeypatch):
    """What is predicted is of as many stages as the worker's."""
    monkeypatch.setattr(optim, "STAGE_ELEMENTS", STAGE_ELEMENTS)
    for cached in (exchanges, exchange_elements):
        cached.cache_clear()
    yield
    for cached in (exchanges, exchange_elements):
        cached.cache_clear()


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict]:
    """What two ranks counted under every stage; one launch, since starting costs more than the steps."""
    folder = tmp_path_factory.mktemp("scaling")
    torchrun([TESTS / "scaling_worker.py", folder], timeout=500)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def theory(stage: int, kind: str) -> dict[str, int]:
    """Elements of both ranks' collectives by name: a whole tensor counts on each rank, a message where it is sent."""
    found: dict[str, int] = {}
    for item in collectives(scaling_config(stage, kind), ranks=2, accumulation=MICRO_BATCHES, device="cpu"):
        ranks = 1 if item.kind == "all_to_all" else 2
        found[KIND[item.kind]] = found.get(KIND[item.kind], 0) + ranks * item.elements
    return found


def counted(reports: list[dict], name: str) -> dict[str, int]:
    both = [report[name]["sent"] for report in reports]
    return {kind: sum(sent.get(kind, 0) for sent in both) for kind in both[0] | both[1]}


@needs_deepspeed
@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3.keeps nothing"])
def test_what_two_ranks_send_is_the_theory(reports, name):
    assert counted(reports, name) == theory(*RUNS[name[:5]])


@needs_deepspeed
@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_sharding_costs_one_reduce_scatter_and_one_all_gather(reports, name):
    """A rank of two sends Ψ/2 in each, where ZeRO 0's all-reduce alone is Ψ; beside them go norm and matrices."""
    config = scaling_config(*RUNS[name])
    psi = trained_weights(config.model, "muon").total
    sent = counted(reports, name)
    groups = len(flat_slices(trained_weights(config.model, "muon"), 2))
    assert groups > 2
    padding = groups * (2 * 2 - 1)  # each is padded to an even number of elements a rank
    for kind in ("reduce_scatter_tensor", "all_gather_into_tensor"):
        assert psi <= sent[kind] / 2 <= psi + padding
    assert sent["all_reduce"] == 2  # the norm
    assert counted(reports, "zero0")["all_reduce"] == 2 * psi


@needs_deepspeed
def test_zero3_sends_at_most_the_theory_where_layers_stay_gathered(reports):
    sent, most = counted(reports, "zero3"), theory(*RUNS["zero3"])
    total = trained_weights(scaling_config(3, "adamw").model, "adamw").total
    assert 2 * total <= sent["all_gather_into_tensor"] < most["all_gather_into_tensor"]
    assert {kind: sent[kind] for kind in sent if kind != "all_gather_into_tensor"} == {
        kind: most[kind] for kind in most if kind != "all_gather_into_tensor"
    }


@needs_deepspeed
@pytest.mark.parametrize("name", RUNS)
def test_what_a_rank_holds_is_predicted(reports, name):
    """When the update begins: within 5 %, tables of positions and DeepSpeed's own small tensors are not counted."""
    stage, kind = RUNS[name]
    config = scaling_config(stage, kind)
    memory = predict(config, extent=Extent(1), ranks=2, dtype="fp32", device="cpu")
    weights = trained_weights(config.model, kind)
    expected = memory.weights + memory.optimizer + memory.ema
    if stage in (0, 3):  # ZeRO 1 and 2 have dropped the whole gradients by then
        expected += memory.gradients
    if stage:
        expected += FP32 * sum(flat_slices(weights, 2))
    assert reports[0][name]["held"] == pytest.approx(expected, rel=0.05)


def test_one_rank_sends_nothing():
    assert collectives(scaling_config(0, "muon"), ranks=1) == []


def passes(*, draws: int, micro_batches: int, chunk: int = 1):
    """Forward and backward of micro-batches of two images on one rank, ready to run."""
    config = unite_config(stage=0, kind="muon", stop_gradient=True)
    options = {"flow_draws": draws, "draws_per_chunk": chunk}
    config = config.model_copy(update={"objective": config.objective.model_copy(update=options)})
    engine = unite_engine(config, World(0, 1, 0, CPU))
    objective = Objective(config.objective, config.model.num_classes)
    shape = torch.Size((2, config.model.registers, config.model.latent_dim))

    def run() -> None:
        for index in range(micro_batches):
            two_pass_step(
                engine, objective, torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64),
                SeededDraws(config.objective, seed=0, step=0, stream=index, device=CPU), shape=shape,
                weight=1 / micro_batches, last=index + 1 == micro_batches,
            )  # fmt: skip

    for parameter in engine.model.parameters():  # as from a step's second micro-batch on
        parameter.grad = torch.zeros_like(parameter)
    return run


def test_memory_is_flat_from_1_to_56_draws():
    one, many = (peak_allocated(passes(draws=draws, micro_batches=1), CPU) for draws in (1, 56))
    assert many <= 1.01 * one
    together = peak_allocated(passes(draws=14, micro_batches=1, chunk=14), CPU)
    assert together > 3 * one  # what chunks avoid, and proof that the meter sees it


def test_memory_is_flat_over_accumulated_micro_batches():
    two, six = (peak_allocated(passes(draws=1, micro_batches=count), CPU) for count in (2, 6))
    assert six <= 1.01 * two

"""`objective.draws_per_chunk` of auto: what it costs, what it changes, and what is chosen on which device."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_toy import toy_config
from ranks import torchrun
from test_counts import SMALL, Plain

from unite_fast.analysis.allocation import peak_allocated
from unite_fast.analysis.chunks import chunk_in_room, chunk_sizes, resolve_chunk, with_chunk
from unite_fast.analysis.devices import Network, find_gpu
from unite_fast.analysis.extent import Extent
from unite_fast.analysis.memory import predict
from unite_fast.analysis.planning import plan
from unite_fast.config import Config
from unite_fast.engine.fitting import Trial, fit
from unite_fast.errors import UserError
from unite_fast.modality import modality_of
from unite_fast.objective.draws import SeededDraws
from unite_fast.objective.two_pass import two_pass_step

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parent.parent / "configs"
MOLECULES = dict(depth=3, width=48, heads=2, latent_dim=6, num_classes=1, decoder=dict(depth=2, width=32, heads=2))
GIB = 2**30


def small(modality: str, *, model: dict | None = None, **objective) -> Config:
    sizes = SMALL if modality == "images" else MOLECULES
    losses = {"lpips": {"weight": 0.0}} if modality == "images" else {}
    values = {"modality": modality, "model": sizes | (model or {}), "objective": losses | objective}
    sections = {"train", "data"} if modality == "images" else {"train"}
    return Config.parse(toy_config().model_dump(include=sections) | values)


def passes(config: Config, size: int):
    """A model with gradients, and both passes on the largest micro-batch of a size, from the same draws every time."""
    modality = modality_of(config)
    torch.manual_seed(0)
    model = modality.network(config.model)
    objective = modality.objective(config, CPU, None)
    inputs = modality.probe(config, size, CPU)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # else the final layer, and the flow loss, are zero
        parameter.grad = torch.zeros_like(parameter)

    def run():
        draws = SeededDraws(config.objective, seed=0, step=0, stream=0, device=CPU)
        return two_pass_step(Plain(model), objective, inputs.data, inputs.labels, draws, shape=inputs.shape)

    return model, run


def neutral(config: Config, size: int) -> int:
    return resolve_chunk(config, modality_of(config).largest(config, size), device="cpu").objective.chunk


def test_sizes_are_even_shares():
    assert chunk_sizes(14) == [1, 2, 3, 4, 5, 7, 14] and chunk_sizes(3) == [1, 2, 3] and chunk_sizes(1) == [1]


RECOMPUTED = {"checkpoint_activations": True, "decoder": SMALL["decoder"] | {"depth": 5}}


@pytest.mark.parametrize(("modality", "model"), [("images", {}), ("images", RECOMPUTED), ("molecules", {})])
def test_the_neutral_chunk_costs_no_memory_and_the_next_one_does(gpu_memory, modality, model):
    """Peaks of whole steps as the allocator saw them, within 4 %: the draws' times and labels are not counted, and
    Triton's interpreter leaves tensors in reference cycles, up to 3 % of these peaks until Python collects them."""
    config = small(modality, model=model, flow_draws=3)
    chunk = neutral(config, 1)
    larger = next(size for size in chunk_sizes(3) if size > chunk)
    assert chunk > 1
    alone, together, more = (
        peak_allocated(passes(with_chunk(config, size), 1)[1], CPU) for size in (1, chunk, larger)
    )
    assert together <= 1.04 * alone and more > 1.1 * alone


@pytest.mark.parametrize("modality", ["images", "molecules"])
def test_losses_and_gradients_are_those_of_single_draws(modality):
    """Within rounding: the same float32 sums in another order."""
    config = small(modality, flow_draws=5)
    found = {}
    for chunk in (1, neutral(config, 3)):
        model, run = passes(with_chunk(config, chunk), 3)
        losses = run()
        found[chunk] = {"total": losses.total, "flow": losses.flow}
        found[chunk] |= {name: parameter.grad for name, parameter in model.named_parameters()}
    single, together = found.values()
    assert single["flow"] > 0.1
    for name, expected in single.items():
        assert (together[name] - expected).norm() <= 1e-4 * expected.norm() + 1e-7, name


def test_where_pass_one_waits_for_the_flow_every_draw_costs_memory():
    config = small("images", flow_draws=4, stop_gradient=False)
    assert neutral(config, 2) == 1 < neutral(small("images", flow_draws=4), 2)


def test_a_given_number_stays_and_is_at_most_all_draws():
    config = resolve_chunk(small("images", flow_draws=3, draws_per_chunk=8), Extent(2), device="cuda")
    assert config.objective.draws_per_chunk == 8 and config.objective.chunk == 3
    with pytest.raises(ValueError, match="draws_per_chunk is auto: resolve it first"):
        _ = small("images").objective.chunk


@pytest.mark.parametrize("value", ["atuo", 0, 1.5, None])
def test_another_value_is_one_error(value):
    with pytest.raises(UserError) as caught:
        small("images", draws_per_chunk=value)
    (line,) = str(caught.value).splitlines()[1:]
    assert line.startswith("  objective.draws_per_chunk: Input should be ") and line.endswith(f"(got {value!r})")
    assert "or 'auto'" in line


def large(**train) -> Config:
    """B with 14 draws, of which 3 share a chunk at no cost."""
    values = {"global_batch": 1024, "micro_batch": "auto", "accumulation": None} | train
    overrides = [f"train.{key}={'null' if value is None else value}" for key, value in values.items()]
    return Config.load(CONFIGS / "b_h100.json", overrides)


def fitted(config: Config, *, memory: float, ranks: int = 8, device: str = "cuda"):
    """What `fit` finds on a pretended device, and the (micro-batch, chunk) that it tried."""
    tried = []

    def try_step(run: Config, size: int) -> None:
        tried.append((size, run.objective.chunk))
        if predict(run, extent=Extent(size), ranks=ranks).peak > memory:
            raise torch.OutOfMemoryError

    world = SimpleNamespace(device=torch.device(device), size=ranks, local_size=ranks, all_true=lambda fits: fits)
    batch, run = fit(config, world, Extent, try_step)
    return batch.micro_batch, run.objective.chunk, tried


def test_what_the_micro_batch_leaves_goes_to_the_chunk():
    micro, chunk, tried = fitted(large(), memory=46 * GIB)
    assert (micro, chunk) == (128, 3), "no larger one fits, so the micro-batch is not paid for with"
    assert {c for size, c in tried if size > 2} == {3, 4}, "the search ran with the neutral chunk"
    assert fitted(large(), memory=70 * GIB)[:2] == (128, 5)
    assert fitted(large(micro_batch=16), memory=70 * GIB)[:2] == (16, 14)
    assert fitted(large(micro_batch=16), memory=1 * GIB)[:2] == (16, 3), "a given micro-batch stays"


def test_a_cpu_takes_the_neutral_chunk_without_trying():
    micro, chunk, tried = fitted(large(micro_batch=16), memory=70 * GIB, device="cpu")
    assert (micro, chunk, tried) == (16, 3, [])


def test_what_was_tried_leaves_nothing_behind(monkeypatch):
    """Its memory goes back to the driver after the model is gone, and the peak that a run records begins anew."""
    done = []
    trial = Trial(large(), SimpleNamespace(device=torch.device("cuda")), None, None)
    trial.__dict__["_probe"] = model = torch.nn.Linear(2, 2)
    kept = weakref.ref(model)
    del model
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append(kept()))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", done.append)
    trial.close()
    assert done == [None, torch.device("cuda")]
    trial.close()  # also where nothing had to be tried


def test_two_ranks_agree_on_what_fits_on_both(tmp_path):
    torchrun([Path(__file__).with_name("chunk_worker.py"), tmp_path])
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["16 7", "16 7"]


def test_a_plan_takes_larger_chunks_where_more_gpus_share_the_batch():
    h100 = find_gpu("h100-80")
    nodes = Network(per_node=8, node_link=h100.link, link=50e9)
    few, many = (plan(large(), h100, nodes, ranks=ranks, stage=1) for ranks in (8, 64))
    assert (few.micro_batch, few.draws_per_chunk) == (128, 5) and (many.micro_batch, many.draws_per_chunk) == (16, 14)
    single = plan(with_chunk(large(), 1), h100, nodes, ranks=64, stage=1)
    assert many.seconds.compute < single.seconds.compute and many.memory.peak > single.memory.peak
    assert few.fits and many.fits


def test_a_chunk_never_makes_the_room_too_small():
    config = Config.load(CONFIGS / "l_h100.json")
    for size in (1, 8, 64):
        for room in (20 * GIB, 50 * GIB, 130 * GIB):
            chosen, single = chunk_in_room(config, Extent(size), room), with_chunk(config, 1)
            peak, least = (predict(run, extent=Extent(size)).peak for run in (chosen, single))
            assert peak <= max(room, least)

"""Updated weights that come while the next forward runs, as bfloat16: never late, and not a bit otherwise."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
import torch.nn as nn
from gathering_worker import CASES, STAGE_ELEMENTS, configured
from ranks import TESTS, torchrun
from safetensors.torch import load_file
from test_chunks import passes, small
from thread_ranks import Ranks

from unite_fast.analysis import update
from unite_fast.analysis.overlap import arrivals
from unite_fast.config import Config
from unite_fast.engine import optim
from unite_fast.engine.deepspeed_backend import read_in_bf16
from unite_fast.engine.gathering import FlatGroup, WeightGather, readers
from unite_fast.engine.sharding import Layout, flat_fragments

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
BLOCKS = 4 + 1  # the encoder's and the decoder's


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two ranks left behind; one launch, since starting costs more than the steps."""
    folder = tmp_path_factory.mktemp("gathering")
    torchrun([TESTS / "gathering_worker.py", folder], timeout=500)
    return folder


@pytest.fixture(scope="module")
def reports(folder) -> list[dict]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture
def in_stages(monkeypatch):
    """As many flat groups as the worker has."""
    monkeypatch.setattr(optim, "STAGE_ELEMENTS", STAGE_ELEMENTS)
    update._gathered.cache_clear()
    yield
    update._gathered.cache_clear()


@needs_deepspeed
@pytest.mark.parametrize("name", CASES)
def test_steps_are_bit_for_bit_those_with_float32_weights_at_once(folder, reports, name):
    """Before they are waited for the weights are not numbers, and a module that did not wait would show it."""
    for report in reports:
        assert report[name]["norms"] == report[name]["expected"]
        assert min(report[name]["norms"]) > 0
    found, expected = (load_file(folder / f"{name}{end}.safetensors") for end in ("", ".expected"))
    assert all(torch.equal(found[key], expected[key]) for key in expected | found)


@needs_deepspeed
@pytest.mark.parametrize("name", CASES)
def test_the_forward_waits_for_what_it_reads_alone(reports, name):
    for report in reports:
        flying = report[name]["flying"]
        assert len(flying) == BLOCKS and flying == sorted(flying, reverse=True)
        if name == "adamw":  # one group, which the first product reads
            assert flying == [0] * BLOCKS
        else:
            assert flying[0] >= 2 and flying[0] > flying[3]
            assert (flying[-1] > 0) == (name == "two-encoders")  # pass one does not read the denoiser


@needs_deepspeed
@pytest.mark.parametrize("name", [name for name in CASES if name != "two-encoders"])
def test_what_is_read_first_is_sent_first(reports, name):
    """Collectives end in their order: another would make the first block wait for the decoder's weights.

    Of two encoders the decoder is read before the denoiser, whose gradients are the last backward's.
    """
    for report in reports:
        assert len(report[name]["waits"]) > 2 and report[name]["waits"] == sorted(report[name]["waits"])


@needs_deepspeed
@pytest.mark.parametrize("name", CASES)
def test_what_brings_the_weights_together_is_the_theory(in_stages, reports, name):
    config = configured(**CASES[name])
    carried = [gathered.collective for gathered in update.gathered_weights(config, ranks=2, device="cpu")]
    expected = sum(collective.itemsize * collective.elements for collective in carried)
    assert all(report[name]["sent"] == expected for report in reports)
    if name in ("fp32", "adamw"):
        assert {(collective.kind, collective.itemsize) for collective in carried} == {("all_gather", 4)}
    else:
        assert expected < 3 * update.trained_weights(config.model, config.optimizer.kind).total


@needs_deepspeed
@pytest.mark.parametrize("name", CASES)
def test_who_looks_at_the_weights_sees_float32(reports, name):
    assert all(report[name]["off"] == 0 for report in reports)


class Blocks(nn.Module):
    """Two blocks of two Linears, and a norm that nothing holds back."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2))
        self.norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(self.norm(x))
        return x


def test_three_ranks_read_what_their_slices_make_together(monkeypatch):
    """A block that reads two groups waits for both; who asks for float32 gets it; an update that no forward has read
    before the next one leaves nothing behind."""
    ranks = Ranks(3)
    ranks.patch(monkeypatch)
    groups = [
        ["norm.weight", "norm.bias", "blocks.0.0.bias", "blocks.0.2.bias", "blocks.1.2.bias"],
        ["blocks.0.0.weight"], ["blocks.0.2.weight"], ["blocks.1.0.weight", "blocks.1.0.bias"], ["blocks.1.2.weight"],
    ]  # fmt: skip
    rounded = {"blocks.1.2.weight", "blocks.1.0.weight", "blocks.0.0.weight"}

    def body(rank: int) -> None:
        generator = torch.Generator().manual_seed(0)
        model, x, flat = Blocks(), torch.randn(3, 4, generator=generator), []
        parameters = dict(model.named_parameters())
        for index, names in enumerate(groups):
            sizes = {name: parameters[name].shape for name in names}
            partition = -(-sum(shape.numel() for shape in sizes.values()) // 3)
            whole, at = torch.zeros(3 * partition), 0
            for name, shape in sizes.items():
                parameters[name].data = whole[at : at + shape.numel()].view(shape)
                at += shape.numel()
            flat.append(FlatGroup(whole, torch.zeros(partition), flat_fragments(sizes, index, partition, rank)))
        gather = WeightGather(model, flat, rounded=rounded, lazily=True, rank=rank, ranks=3)

        def update() -> dict[str, torch.Tensor]:
            values = {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}
            Layout([group.own for group in flat], sum((g.fragments for g in flat), []), sharded=True).scatter(
                values.__getitem__, lambda master: master
            )
            gather.begin()
            for group in flat:
                group.whole.fill_(torch.nan)
            return values

        for unread in (0, 1):
            for _ in range(1 + unread):
                values = update()
                assert max(len(module._forward_pre_hooks) for module in model.modules()) == 1
            read = {name: value.bfloat16().float() if name in rounded else value for name, value in values.items()}
            gather.before_forward()
            found = model(x)
            assert torch.equal(found, torch.func.functional_call(model, read, x))
            assert not any(module._forward_pre_hooks for module in model.modules())
            gather.publish()
            assert all(torch.equal(parameters[name], value) for name, value in values.items())

    ranks.run(body)


def in_bf16(network: torch.nn.Module) -> set[str]:
    groups = list(optim.parameter_groups(network, "muon").items())
    return read_in_bf16(network, groups, torch.bfloat16, fp8=False)


@pytest.mark.parametrize("modality", ["images", "molecules"])
def test_the_passes_read_these_matrices_as_bfloat16_alone(modality):
    """Rounding them changes nothing, rounding any other matrix of Muon's does."""
    config = small(modality, flow_draws=2, draws_per_chunk=1)
    network, run = passes(config, 2)
    parameters = dict(network.named_parameters())
    rounded = in_bf16(network)
    others = network.matrix_parameters() - rounded
    assert others == network.float32_matrices() & network.matrix_parameters() and len(rounded) > 3 * len(others) > 0

    network.forward = torch.autocast("cpu", dtype=torch.bfloat16)(network.forward)

    def result() -> list[torch.Tensor]:
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        return [run().total, *(parameter.grad for parameter in parameters.values())]

    before = result()
    for name in rounded:
        parameters[name].data = parameters[name].data.bfloat16().float()
    assert all(map(torch.equal, before, result()))
    for name in others:
        kept = parameters[name].data
        parameters[name].data = kept.bfloat16().float()
        assert not all(map(torch.equal, before, result())), name
        parameters[name].data = kept


@pytest.mark.parametrize("modality", ["images", "molecules"])
def test_hooks_hold_all_of_muons_matrices_back_and_no_part_of_a_block(modality):
    network, _ = passes(small(modality), 2)
    groups = optim.in_stages(list(optim.parameter_groups(network, "muon").items()))
    held, elsewhere = readers(network, [set(group) for _, group in groups])
    assert elsewhere == {index for index, (kind, _) in enumerate(groups) if kind == "adamw"}
    names = {module: name for name, module in network.named_modules()}
    inside = [name for name in map(names.get, held) if ".blocks." in f".{name}"]
    assert sorted(inside) == sorted(
        f"{part}.blocks.{index}"
        for part in ("encoder", "decoder")
        for index in range(len(getattr(network, part).blocks))
    )


def test_most_of_b_comes_while_the_next_forward_runs():
    config = Config.parse(
        {"train": {"steps": 1, "global_batch": 256, "micro_batch": 32}, "data": {"path": "-"}, "model": {"preset": "B"},
         "objective": {"lpips": {"weight": 0}}}
    )  # fmt: skip
    found = arrivals(config, ranks=8)
    elements = [gathered.collective.elements for gathered, *_ in found]
    needed = [(part == "decode") + before for _, part, before in found]
    assert needed == sorted(needed[:1]) + sorted(needed[1:])
    early = [size for size, at in zip(elements, needed, strict=True) if at < 0.05]
    assert 0.2 < sum(early) / sum(elements) < 0.35
    assert needed[-1] > 1  # the decoder's
    compiled = config.model_copy(update={"train": config.train.model_copy(update={"compile": True})})
    assert {(part, before) for _, part, before in arrivals(compiled, ranks=8)} == {("tokenize", 0.0)}
    float32 = config.model_copy(update={"train": config.train.model_copy(update={"precision": "fp32"})})
    assert {gathered.collective.itemsize for gathered, *_ in arrivals(float32, ranks=8)} == {4}

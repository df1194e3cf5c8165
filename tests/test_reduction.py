"""Gradients averaged while the last backward runs: what travels when, and that all of it arrives."""

from __future__ import annotations

import random
from itertools import groupby

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from engine_toy import toy_model
from test_chunks import RECOMPUTED, passes, small
from thread_ranks import Ranks

from unite_fast.analysis.overlap import departures
from unite_fast.config import ModelConfig
from unite_fast.engine import optim
from unite_fast.engine.reduction import GradientMean, group_windows, leaves, spans


def chain(depth: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(5, 5) for _ in range(depth)))


def mean_of(groups: list[list[nn.Parameter]], *, whole: bool, bucket: int) -> GradientMean:
    """Of groups that the backward reaches last to first, each from its last parameter to its first, on one rank."""
    finals = [[-place - 100 * number for place in range(len(group))] for number, group in enumerate(groups)]
    partitions = None if whole else [sum(p.numel() for p in group) + 1 for group in groups]  # an element of padding
    return GradientMean(groups, partitions, finals, ranks=1, bucket=bucket, like=torch.zeros(1))


class Journal:
    """What happened in a backward, in order: a parameter's gradient final, a window sent."""

    def __init__(self, monkeypatch, parameters: list[nn.Parameter]):
        self.events: list[str] = []
        for number, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(lambda _, n=number: self.events.append(f"final {n}"))
        for name in ("all_reduce", "reduce_scatter_tensor"):
            monkeypatch.setattr(dist, name, self._noted(getattr(dist, name)))

    def _noted(self, original):
        def call(*arguments, **options):
            self.events.append("sent")
            return original(*arguments, **options)

        return call


@pytest.mark.parametrize("whole", [True, False], ids=["all-reduce", "reduce-scatter"])
def test_windows_leave_while_the_backward_still_runs(alone, monkeypatch, whole):
    model = chain()
    parameters = list(model.parameters())
    mean = mean_of([parameters], whole=whole, bucket=30)  # a layer has 30
    journal = Journal(monkeypatch, parameters)
    loss = model(torch.randn(3, 5)).square().mean()
    mean.begin(loss)
    loss.backward()
    left = len(journal.events)
    expected = torch.cat([p.grad.flatten().clone() for p in parameters])
    means = mean.finish()
    assert journal.events.index("sent") < journal.events.index("final 0") < left
    assert journal.events[:left].count("sent") >= 5 and len(journal.events) - left <= 1
    if whole:
        assert means == []
        assert torch.equal(torch.cat([p.grad.flatten() for p in parameters]), expected)
    else:
        torch.testing.assert_close(means[0][:-1], expected, rtol=0, atol=0)
        assert means[0][-1] == 0


def test_what_the_last_backward_does_not_reach_leaves_at_once(alone, monkeypatch):
    model, other = chain(2), chain(2)
    other(torch.randn(3, 5)).sum().backward()
    groups = [list(model.parameters()), list(other.parameters())]
    mean = mean_of(groups, whole=False, bucket=61)
    journal = Journal(monkeypatch, groups[0])
    loss = model(torch.randn(3, 5)).sum()
    assert leaves(loss) == {id(p) for p in groups[0]}
    mean.begin(loss)
    assert journal.events == ["sent"]
    loss.backward()
    means = mean.finish()
    torch.testing.assert_close(means[1][:-1], torch.cat([p.grad.flatten() for p in groups[1]]))


def test_gradients_that_are_missing_count_as_zeros_and_hooks_go_away(alone):
    model = chain(3)
    parameters = list(model.parameters())
    mean = mean_of([parameters], whole=True, bucket=7)
    for used in (model[0], model[2]):
        loss = used(torch.randn(3, 5)).sum()
        mean.begin(loss)
        loss.backward()
        mean.finish()
    assert all(p.grad is not None for p in parameters) and not parameters[2].grad.any()
    mean.begin(loss.detach())  # nothing is reached: all leaves at once, and finish waits for it
    assert mean.finish() == []
    assert not any(p._post_accumulate_grad_hooks for p in parameters)


@pytest.mark.parametrize("whole", [True, False], ids=["all-reduce", "reduce-scatter"])
def test_three_ranks_have_the_mean_of_their_gradients(monkeypatch, whole):
    """In buffers that wait for what they carry, slices that end inside of parameters, and with gradients that a rank,
    or all ranks, have from an earlier backward alone or not at all."""
    group = Ranks(3)
    group.patch(monkeypatch)

    def body(rank: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        model, unreached, unused = chain(4), chain(2), chain(1)
        groups = [[*model.parameters()], [*unreached.parameters(), *unused.parameters()]]
        finals = [[-place for place in range(len(parameters))] for parameters in groups]
        partitions = None if whole else [-(-sum(p.numel() for p in parameters) // 3) for parameters in groups]
        mean = GradientMean(groups, partitions, finals, ranks=3, bucket=23, like=torch.zeros(1))
        generator = torch.Generator().manual_seed(rank)
        alone = []
        for _ in range(2):  # the second step begins from nothing, as after an update
            for parameter in sum(groups, []):
                parameter.grad = None
            first, second = torch.randn(2, 3, 5, generator=generator)
            if rank:
                unreached(first).sum().backward()
            (model(first).sum() + model(second).square().sum()).backward()
            alone = [[p.grad if p.grad is None else p.grad.clone() for p in parameters] for parameters in groups]
            for parameter in groups[0]:
                parameter.grad = None
            model(first).sum().backward()
            mean.begin(loss := model(second).square().sum())
            loss.backward()
            slices = mean.finish()
        alone = [
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(*pair, strict=True)])
            for pair in zip(alone, groups, strict=True)
        ]
        if whole:
            assert slices == []
            slices = [torch.cat([parameter.grad.flatten() for parameter in parameters]) for parameters in groups]
        return alone, slices

    found = group.run(body)
    for number in (0, 1):
        expected = sum(alone[number] for alone, _ in found) / 3
        slices = [mean[number] for _, mean in found]
        for flat in slices if whole else [torch.cat(slices)]:
            torch.testing.assert_close(flat[: len(expected)], expected)
            assert not flat[len(expected) :].any()


def test_windows_that_no_gradient_has_sent_leave_at_the_end(alone, monkeypatch):
    parameters = list(chain(2).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    mean = mean_of([parameters], whole=False, bucket=20)
    journal = Journal(monkeypatch, parameters)
    mean.begin(sum(parameter.sum() for parameter in parameters))
    assert journal.events == ["sent"], "padding, alone in its window"
    (flat,) = mean.finish()
    assert journal.events == 4 * ["sent"]
    torch.testing.assert_close(flat[:-1], torch.cat([p.grad.flatten() for p in parameters]))


def test_windows_cover_every_slice_once():
    generator = random.Random(0)
    for _ in range(50):
        sizes = [generator.randint(1, 40) for _ in range(generator.randint(1, 9))]
        parts, bucket = generator.randint(1, 5), generator.randint(1, 60)
        partition = -(-sum(sizes) // parts) + generator.randint(0, 2)
        padded = (*sizes, parts * partition - sum(sizes))
        flat = [(index, at) for index, size in enumerate(padded) for at in range(size)]
        found = {}
        for window in group_windows(0, sizes, partition, parts, bucket):
            assert window.length * parts <= max(bucket, parts)
            for rank, pieces in enumerate(window.parts):
                elements = [(index, start + k) for index, start, length in pieces for k in range(length)]
                assert len(elements) == window.length
                for k, element in enumerate(elements):
                    assert found.setdefault(rank * partition + window.offset + k, element) is element
        assert [found[place] for place in range(parts * partition)] == flat
    assert spans(10, 4, 8) == [(0, 2), (2, 2), (4, 2), (6, 2), (8, 2)]


def test_stages_go_from_the_last_parameter_to_the_first(monkeypatch):
    monkeypatch.setattr(optim, "STAGE_ELEMENTS", 10)
    assert optim.stages([5, 5, 5, 5, 5, 5, 5, 5]) == [[7, 6], [5, 4], [3, 2], [1, 0]]
    assert optim.stages([100, 1, 1]) == [[2, 1, 0]]
    assert optim.stages([4, 4]) == [[1, 0]]
    assert optim.stages([30, 30, 30]) == [[2], [1], [0]]
    groups = list(optim.parameter_groups(toy_model(), "muon").items())
    staged = optim.in_stages(groups)
    assert [kind for kind, _ in staged] == ["muon"] * (len(staged) - 1) + ["adamw"] and len(staged) > 2
    names = [name for kind, group in staged if kind == "muon" for name in group]
    assert names == list(reversed(groups[0][1]))


@pytest.mark.parametrize(
    ("modality", "model"), [("images", {}), ("images", RECOMPUTED), ("images", {"shared": False}), ("molecules", {})]
)
def test_a_step_ends_with_gradients_in_the_reverse_of_the_reading_order(modality, model):
    network, run = passes(small(modality, model=model, flow_draws=2, draws_per_chunk=1), 2)
    order = network.reading_order()
    assert sorted(order) == sorted(name for name, _ in network.named_parameters())
    finals = []
    for name, parameter in network.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: finals.append(name))
    run()
    last = {name: place for place, name in enumerate(finals)}

    def part(name):
        """A block, a Linear of the modulation, the norm between both, or all that stands before them."""
        _, kind, index, *_ = [*name.split("."), ""]
        if kind in ("blocks", "modulation"):
            return f"{kind} {index}"
        return kind if kind in ("opening_norm", "final_modulation", "final") else "front"

    encoder = "encoder" if network.config.shared else "denoiser"
    inside = [name for name in order if name.startswith(f"{encoder}.") and name in last]
    read = [key for key, _ in groupby(map(part, inside))]
    assert len(read) == len(set(read)) == 2 * network.config.depth + 4
    found = [key for key, _ in groupby(map(part, sorted(inside, key=last.__getitem__)))]
    assert found == read[::-1]


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("ranks", [8, 256])
def test_most_of_b_can_leave_before_its_last_backward_ends(stage, ranks):
    """Decoder at once, then block by block, each with its modulation."""
    leaving = departures(ModelConfig(preset="B"), "muon", ranks=ranks, stage=stage)
    whole = sum(window.elements for window in leaving)
    assert whole == pytest.approx(217_643_616, rel=1e-4)
    assert sum(window.elements for window in leaving if window.after == 0) > 0.2 * whole
    assert sum(window.elements for window in leaving if window.after < 0.95) > 0.6 * whole
    assert [window.after for window in leaving][-1] == 1
    # Where the flow sends its gradient into pass one, that comes last, and the decoder's gradients with it.
    last = departures(ModelConfig(preset="B"), "muon", ranks=ranks, stage=stage, phase="reconstruct")
    assert all(window.after > 0 for window in last)

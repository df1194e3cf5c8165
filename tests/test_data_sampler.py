"""The stateless order: complete, disjoint, the same for any number of ranks, and arithmetic to resume."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from unite_fast.data.sampler import Sampler, counter_hash, flips, permutation, substitute


def served(count, steps, *, global_batch, accumulation, world_size, start=0):
    """Image indices of each (step, rank): dict of lists."""
    micro_batch = global_batch // (accumulation * world_size)
    result = {}
    for rank in range(world_size):
        sampler = Sampler(count, 7, global_batch, micro_batch, accumulation, rank, world_size)
        draws = itertools.islice(sampler.draws(start), (steps - start) * accumulation)
        for draw in draws:
            result.setdefault((draw.step, rank), []).extend(zip(draw.epochs.tolist(), draw.indices.tolist()))
    return result


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_image_once_an_epoch(world_size, accumulation):
    count, global_batch = 53, 48  # 53 is prime: epochs end inside batches
    found = served(count, 53, global_batch=global_batch, accumulation=accumulation, world_size=world_size)
    everything = [item for items in found.values() for item in items]
    assert len(everything) == 53 * global_batch
    assert sorted(everything) == [(epoch, index) for epoch in range(global_batch) for index in range(count)]


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 1), (3, 2), (8, 3), (8, 1)])
def test_global_batches_do_not_depend_on_ranks(world_size, accumulation):
    alone = served(31, 6, global_batch=48, accumulation=1, world_size=1)
    found = served(31, 6, global_batch=48, accumulation=accumulation, world_size=world_size)
    for step in range(6):
        together = [item for rank in range(world_size) for item in found[step, rank]]
        assert sorted(together) == sorted(alone[step, 0])


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_micro_batches_of_all_ranks_do_not_depend_on_their_number(world_size):
    """What all ranks take at one micro-batch is one stretch of the stream, which one rank alone would take at once."""
    alone = Sampler(31, 7, 48, 24, 2)
    ranks = [Sampler(31, 7, 48, 24 // world_size, 2, rank, world_size) for rank in range(world_size)]
    for step, micro_batch in itertools.product(range(3), range(2)):
        together = np.concatenate([rank.draw(step, micro_batch).indices for rank in ranks])
        assert np.array_equal(together, alone.draw(step, micro_batch).indices)


def test_orders_of_past_epochs_are_not_kept():
    """ImageNet's would take 10 MB an epoch."""
    sampler = Sampler(10, 7, 5, 5, 1)
    for step in range(8):
        sampler.draw(step, 0)
        assert list(sampler._orders) == [step // 2]


@pytest.mark.parametrize("start", [1, 5, 11, 10**6])
def test_start_at_any_step(start):
    sampler = Sampler(53, 7, 24, 4, 2, 1, 3)
    wanted = [sampler.draw(start + i // 2, i % 2) for i in range(6)]
    found = itertools.islice(Sampler(53, 7, 24, 4, 2, 1, 3).draws(start), 6)
    for a, b in zip(wanted, found):
        assert (a.step, a.micro_batch) == (b.step, b.micro_batch)
        assert np.array_equal(a.indices, b.indices)
        assert np.array_equal(a.epochs, b.epochs)
    if start < 20:
        ran_through = list(itertools.islice(Sampler(53, 7, 24, 4, 2, 1, 3).draws(), 2 * start + 6))[2 * start :]
        assert all(np.array_equal(a.indices, b.indices) for a, b in zip(wanted, ran_through))


def test_change_of_world_size_in_mid_epoch():
    before = served(40, 3, global_batch=8, accumulation=1, world_size=2)
    after = served(40, 5, global_batch=8, accumulation=1, world_size=8, start=3)
    everything = [item for items in [*before.values(), *after.values()] for item in items]
    assert sorted(everything) == [(0, index) for index in range(40)]


def test_batch_of_several_epochs():
    draw = Sampler(3, 0, 10, 10, 1).draw(1, 0)
    assert draw.epochs.tolist() == [3, 3, 4, 4, 4, 5, 5, 5, 6, 6]
    assert sorted(draw.indices[2:5].tolist()) == sorted(draw.indices[5:8].tolist()) == [0, 1, 2]


def test_orders_differ_by_epoch_and_seed():
    orders = [permutation(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(1000))
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).sum() < 12  # 1 expected


def test_order_is_uniform():
    """Each of the 24 orders of four images: 5 standard deviations of a binomial around 1/24."""
    orders, counts = np.unique([permutation(4, 1, epoch) for epoch in range(6000)], axis=0, return_counts=True)
    assert len(orders) == 24
    assert np.abs(counts - 250).max() < 5 * np.sqrt(250 * 23 / 24)


def plain_hash(*words: int) -> int:
    """The hash in Python's integers."""
    mask, state = 2**64 - 1, 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state


def test_order_is_fixed_for_ever():
    """Another order would break the exact resumption of existing runs."""
    assert permutation(8, 0, 0).tolist() == [6, 7, 2, 4, 1, 5, 0, 3]
    for seed, epoch in ((0, 0), (5, 3), (2**31 - 1, 10**5)):
        assert permutation(50, seed, epoch).tolist() == sorted(range(50), key=lambda i: plain_hash(1, seed, epoch, i))
        assert flips(seed, epoch, range(50)).tolist() == [plain_hash(2, seed, epoch, i) >= 2**63 for i in range(50)]
        assert substitute(1000, seed, epoch, 9, 4) == plain_hash(3, seed, epoch, 9, 4) % 1000
    assert counter_hash(1, 2, 3).tolist() == [plain_hash(1, 2, 3)]


def test_flip_rate_and_independence():
    index = np.arange(20_000)
    first, again, epoch, seed = flips(0, 3, index), flips(0, 3, index), flips(0, 4, index), flips(1, 3, index)
    assert np.array_equal(first, again)
    bound = 5 * 0.5 / np.sqrt(len(index))
    for draw in (first, epoch, seed):
        assert abs(draw.mean() - 0.5) < bound
    assert abs((first == epoch).mean() - 0.5) < bound
    assert abs((first == seed).mean() - 0.5) < bound
    assert abs((first[1:] == first[:-1]).mean() - 0.5) < bound


def test_substitutes_reach_every_image():
    found = {substitute(10, 0, 0, 4, attempt) for attempt in range(100)}
    assert found == set(range(10))
    assert substitute(10**6, 0, 1, 2, 3) == substitute(10**6, 0, 1, 2, 3)
    assert len({substitute(10**6, 0, epoch, 4, 0) for epoch in range(50)}) == 50


@pytest.mark.parametrize("numbers", [(10, 3, 1, 0, 3), (12, 4, 1, 3, 3), (12, 4, 1, -1, 3)])
def test_impossible_numbers(numbers):
    with pytest.raises(ValueError, match="rank"):
        Sampler(10, 0, *numbers)


def test_large_order_is_exact():
    order = permutation(1_281_167, 0, 12)
    seen = np.zeros(1_281_167, bool)
    seen[order] = True
    assert seen.all()

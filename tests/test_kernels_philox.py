"""Random streams: the integers of the reference, their law, their address, and the edges of the words."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from kernel_testing import DEVICE, on_backend
from scipy import stats

import unite_kernels as uk
from unite_kernels import philox as module
from unite_kernels.philox import normal_pair, philox, uniform_of


def philox_by_hand(counter, key):
    """Philox 4x32-10 on Python integers, as Salmon et al. 2011 print it."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def test_philox_known_answers():
    # Random123's kat_vectors.
    assert philox_by_hand((0,) * 4, (0,) * 2) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox_by_hand((2**32 - 1,) * 4, (2**32 - 1,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox_by_hand(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)

    seed, step, stream = (0x299F31D0 << 32) | 0xA4093822, 0x13198A2E, 0x83707344
    words = philox(5, torch.tensor([0x85A308D3, 7]), seed, step, stream)
    for row, draw in enumerate((0x85A308D3, 7)):
        for counter in range(5):
            expected = philox_by_hand((counter, draw, step, stream), (seed & 0xFFFFFFFF, seed >> 32))
            assert tuple(int(word[row, counter]) for word in words) == expected


@pytest.mark.parametrize("law, numbers", [("norm", uk.philox_normal), ("uniform", uk.philox_uniform)])
def test_streams_have_their_law_and_no_correlation(law, numbers):
    count = 2**16
    x = numbers((count,), 1, 2, 3, draws=4).double()
    mean, deviation = (0.0, 1.0) if law == "norm" else (0.5, math.sqrt(1 / 12))
    kurtosis = 3.0 if law == "norm" else 1.8
    n = x.numel()
    # Each statistic within 5 of its standard errors.
    assert abs(x.mean() - mean) < 5 * deviation / math.sqrt(n)
    assert abs(x.var() / deviation**2 - 1) < 5 * math.sqrt((kurtosis - 1) / n)
    assert stats.kstest(x.flatten().numpy(), law).pvalue > 1e-4

    def correlated(a, b):
        return abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) > 5 / math.sqrt(a.numel())

    for lag in (1, 2, 3, 4, 8, 1024):
        assert not correlated(x[:, :-lag], x[:, lag:]), f"elements {lag} apart"
    assert not correlated(x[0], x[1]), "draws"
    for neighbour in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not correlated(x[0], numbers((count,), *neighbour).double()), f"(seed, step, stream) {neighbour}"
    if law == "norm":  # Box–Muller's two outputs share a radius: their squares must not correlate either
        assert not correlated(x[:, ::2].square(), x[:, 1::2].square())


@pytest.mark.parametrize("normal", [True, False])
def test_philox_kernel_makes_the_reference_numbers(normal):
    function = uk.philox_normal if normal else uk.philox_uniform
    arguments = (3, 683), 2**62 + 12345, 2**31 + 7, 2**31 - 1
    with on_backend("torch"):
        expected = function(*arguments, draws=2, first_draw=2**31 - 2, device=DEVICE)
    with on_backend("triton"):
        made = function(*arguments, draws=2, first_draw=2**31 - 2, device=DEVICE)
    # Uniforms are the integers themselves. Of a normal, angle and logarithm are rounded: 1e-6 at a radius of up to 6.8.
    torch.testing.assert_close(made, expected, rtol=0, atol=4e-6 if normal else 0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("numbers", [uk.philox_normal, uk.philox_uniform])
def test_of_a_step_the_low_32_bits_count(backend, numbers):
    with on_backend(backend):
        first, again, other = (numbers((5, 7), 1, step, 2, device=DEVICE) for step in (9, 9 + 5 * 2**32, 10))
    assert torch.equal(first, again) and not torch.isclose(first, other).any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("numbers", [uk.philox_normal, uk.philox_uniform])
def test_numbers_of_another_dtype_are_those_of_float32_rounded(numbers, dtype, backend):
    with on_backend(backend):
        found, plain = (numbers((5, 7), 1, 2, 3, draws=2, device=DEVICE, dtype=kind) for kind in (dtype, torch.float32))
    assert found.dtype == dtype and torch.equal(found, plain.to(dtype))


@triton.jit
def _numbers_kernel(words, first, second, uniform, COUNT: tl.constexpr):
    element = tl.arange(0, COUNT)
    radius, angle = tl.load(words + element).to(tl.uint32), tl.load(words + COUNT + element).to(tl.uint32)
    a, b = normal_pair(radius, angle)
    tl.store(first + element, a)
    tl.store(second + element, b)
    tl.store(uniform + element, uniform_of(radius))


# A word of 0 comes once in 2^32, every few hundred steps of a large model.
EDGES = [0, 1, 2**29 - 1, 2**29, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**29, 3 * 2**30, 2**32 - 2**29, 2**32 - 1]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_words_at_their_edges_make_finite_numbers(backend, monkeypatch):
    pairs = torch.cartesian_prod(torch.tensor(EDGES), torch.tensor([*EDGES, 5, 2**28, 7 * 2**29, 123456789])).T
    radius, angle = pairs.contiguous()
    if backend == "triton":
        padded = triton.next_power_of_2(len(radius))
        words = torch.nn.functional.pad(torch.stack((radius, angle)), (0, padded - len(radius))).to(DEVICE)
        made = [torch.empty(padded, device=DEVICE) for _ in range(3)]
        _numbers_kernel[(1,)](words, *made, COUNT=padded)
        first, second, uniform = (x[: len(radius)].double().cpu() for x in made)
    else:
        monkeypatch.setattr(module, "philox", lambda *address: tuple(x[None] for x in (radius, angle, radius, angle)))
        draws = torch.zeros(1, dtype=torch.int64)
        first, second, *_ = module.normals(4 * len(radius), draws, 0, 0, 0).double().view(-1, 4).unbind(1)
        uniform = module.uniforms(4 * len(radius), draws, 0, 0, 0).double().view(-1, 4)[:, 0]
    length = (-2 * ((radius.double() + 0.5) * 2.0**-32).log()).sqrt()
    turn = (angle.double() - 2**31) * (2 * math.pi * 2.0**-32)
    # Near 1 float32 holds no 2^-33: of the largest word the radius is 0, not 1.5e-5.
    torch.testing.assert_close(torch.stack((first, second)), length * torch.stack((turn.cos(), turn.sin())),
                               rtol=1e-6, atol=2e-5)  # fmt: skip
    assert torch.equal(uniform, (radius >> 8).double() * 2.0**-24) and uniform.max() < 1

"""Muon's two sweeps over lists of tensors: their equations, odd sizes, dtypes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from kernel_testing import DEVICE, assert_twice_as_good, normal, on_backend
from torch import Tensor

import unite_kernels as uk
from unite_kernels import muon
from unite_kernels.muon import CHUNK, TILE, _muon_momentum_, _muon_update_, _table

# Several tensors, of which some end within a tile, at its end, at a program's, or behind it; one element; none; one.
LISTS = {
    "odd": [(5, 7), (3,), (33, 31), (1,), (2, 3, 5)],
    "ends": [(TILE,), (CHUNK,), (CHUNK + 1,), (2 * CHUNK + TILE, 1), (CHUNK - 1,)],
    "empty among them": [(0, 4), (3, 4), (0,), (0,), (7,), (0,)],
    "nothing but empty": [(0,), (2, 0)],
    "flat slice": [(5 * CHUNK + 6,)],
}
LOW = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["torch", "triton"]
lists = pytest.mark.parametrize("shapes", LISTS.values(), ids=LISTS)
backends = pytest.mark.parametrize("backend", BACKENDS)


def tensors(shapes: list[tuple[int, ...]], seed: int) -> list[Tensor]:
    return [normal(*shape, seed=100 * seed + index) for index, shape in enumerate(shapes)]


def flat(results: list[Tensor]) -> Tensor:
    return torch.cat([result.flatten() for result in results])


def momentum_in(dtype: torch.dtype, shapes, coefficient: float | None, momentum: float) -> list[Tensor]:
    """The first sweep's equation in a dtype: (momenta, means), each flat."""
    factor = 1 if coefficient is None else torch.tensor(coefficient).item()
    gradients = [g.to(dtype) * factor for g in tensors(shapes, 1)]
    momenta = [m.to(dtype) + (1 - momentum) * (g - m.to(dtype)) for m, g in zip(tensors(shapes, 2), gradients)]
    return [flat(momenta), flat([g + momentum * (m - g) for m, g in zip(momenta, gradients)])]


@lists
@backends
@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("coefficient", [None, 1.0, 0.37])
def test_momentum_is_its_equation(shapes, backend, low, coefficient):
    momenta, gradients = tensors(shapes, 2), tensors(shapes, 1)
    before = [g.clone() for g in gradients]
    means = [torch.full((m.numel(),), torch.nan, device=DEVICE, dtype=low) for m in momenta]
    scale = None if coefficient is None else torch.tensor(coefficient, device=DEVICE)
    with on_backend(backend):
        uk.muon_momentum_(momenta, gradients, means, 0.95, scale)
    eager = momentum_in(torch.float32, shapes, coefficient, 0.95)
    truth = momentum_in(torch.float64, shapes, coefficient, 0.95)
    assert_twice_as_good([flat(momenta), flat(means)], [eager[0], eager[1].to(low)], truth)
    assert all(torch.equal(g, kept) for g, kept in zip(gradients, before))


@backends
def test_momentum_at_its_ends(backend):
    for momentum in (0.0, 1.0):
        momenta, gradients = tensors(LISTS["odd"], 2), tensors(LISTS["odd"], 1)
        kept, means = [m.clone() for m in momenta], [torch.empty_like(m) for m in momenta]
        with on_backend(backend):
            uk.muon_momentum_(momenta, gradients, means, momentum)
        for m, g, mean, before in zip(momenta, gradients, means, kept):
            assert torch.equal(m, before if momentum else g) and torch.equal(mean, m)


@backends
def test_a_gradient_that_is_not_finite_reaches_its_own_tensor_alone(backend):
    momenta, gradients = tensors([(4, 5), (6,)], 2), tensors([(4, 5), (6,)], 1)
    gradients[0][1, 2] = torch.nan
    means = [torch.empty_like(m) for m in momenta]
    with on_backend(backend):
        uk.muon_momentum_(momenta, gradients, means, 0.9, torch.tensor(0.5, device=DEVICE))
        assert momenta[0].isnan().sum() == means[0].isnan().sum() == 1 and means[1].isfinite().all()
        uk.muon_momentum_(momenta, gradients, means, 0.9, torch.tensor(torch.nan, device=DEVICE))
    assert flat(momenta).isnan().all() and flat(means).isnan().all()


def updated(dtype: torch.dtype, shapes, low: torch.dtype, lr: float, decay: float, decays: list[float]) -> list[Tensor]:
    """The second sweep's equation in a dtype: parameters and each list of averages, flat."""
    updates = [u.to(low).to(dtype) for u in tensors(shapes, 3)]
    params = [(1 - lr * decay) * p.to(dtype) - lr * u for p, u in zip(tensors(shapes, 4), updates)]
    averages = [
        flat([d * a.to(dtype) + (1 - d) * p for a, p in zip(tensors(shapes, 5 + number), params)])
        for number, d in enumerate(decays)
    ]
    return [flat(params), *averages]


@lists
@backends
@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("decays", [[], [0.9978], [0.5, 0.0, 0.9999]], ids=["no average", "one", "three"])
def test_update_is_its_equation(shapes, backend, low, decays):
    params = [p.requires_grad_() for p in tensors(shapes, 4)]
    updates = [u.flatten().to(low) for u in tensors(shapes, 3)]
    averages = [tensors(shapes, 5 + number) for number in range(len(decays))]
    addresses = [x.data_ptr() for x in params]
    with on_backend(backend):
        uk.muon_update_(params, updates, 0.03, 0.2, averages, decays)
    found = [flat(params).detach(), *map(flat, averages)]
    eager, truth = (updated(dtype, shapes, low, 0.03, 0.2, decays) for dtype in (torch.float32, torch.float64))
    assert_twice_as_good(found, eager, truth)
    assert addresses == [x.data_ptr() for x in params] and all(x.requires_grad for x in params)


@backends
def test_update_at_its_ends(backend):
    shapes = LISTS["odd"]
    params, averages = tensors(shapes, 4), [tensors(shapes, 5), tensors(shapes, 6)]
    kept = [p.clone() for p in params]
    with on_backend(backend):
        uk.muon_update_(params, tensors(shapes, 3), 0.0, 0.1, averages, [1.0, 0.0])
    assert all(torch.equal(p, before) for p, before in zip(params, kept))
    assert all(torch.equal(a, before) for a, before in zip(averages[0], tensors(shapes, 5)))
    assert all(torch.equal(a, p) for a, p in zip(averages[1], params))


@backends
def test_nothing_is_done_to_nothing(backend):
    with on_backend(backend):
        uk.muon_momentum_([], [], [], 0.9)
        uk.muon_update_([], [], 0.1, 0.0, [[]], [0.5])


def test_addresses_that_are_not_of_16_bytes_are_served_and_nothing_beside_them_is_written():
    """Slices of larger buffers, as batches of Newton–Schulz with odd matrices are."""
    shapes = [(CHUNK + 5,), (CHUNK - 1,), (3,)]
    results, rooms = [], []
    for apart in (False, True):
        columns = [tensors(shapes, seed) for seed in range(1, 7)]
        if apart:
            for number, column in enumerate(columns):
                for index, x in enumerate(column):
                    room = torch.full((x.numel() + 4,), 100.0 + number, device=DEVICE)
                    column[index] = room[1 + number % 3 :][: x.numel()].copy_(x)
                    rooms.append((room, 100.0 + number))
        momenta, gradients, means, params, updates, averages = columns
        assert _table([gradients, momenta, means])[2] is not apart
        with on_backend("triton"):
            uk.muon_momentum_(momenta, gradients, means, 0.9)
            uk.muon_update_(params, updates, 0.1, 0.0, [averages], [0.9])
        results.append(flat([*momenta, *means, *params, *averages]))
    assert torch.equal(*results)
    assert all((room == value).sum() == 4 for room, value in rooms)


def test_offsets_beyond_int32_are_computed_in_int64(monkeypatch):
    """Where a slice ends 2^31 elements behind its beginning: no tensor is that large here, so its row says so."""
    elements, tail = 2**31 + CHUNK, 2 * CHUNK
    room = [normal(tail, seed=seed) for seed in range(3)]
    expected = [x.clone() for x in room]
    muon.muon_momentum_reference([expected[1]], [expected[0]], [expected[2]], 0.9, None)
    first = (elements - tail) // CHUNK
    # The slice's last two programs are this launch's first two: the row's first program is negative by the others.
    rows = [[-first, elements, *(x.data_ptr() - 4 * (elements - tail) for x in room)]]
    table = torch.tensor(rows, dtype=torch.int64, device=DEVICE).flatten()
    monkeypatch.setattr(muon, "_table", lambda columns: (table, 2, True))
    with on_backend("triton"):
        uk.muon_momentum_([room[1]], [room[0]], [room[2]], 0.9)
    for found, wanted in zip(room, expected):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_operators_pass_opcheck():
    shapes = [(3, 5), (4,)]
    with on_backend("triton"):
        scale = torch.tensor(0.5, device=DEVICE)
        first = (tensors(shapes, 1), tensors(shapes, 2), tensors(shapes, 3), 0.9)
        torch.library.opcheck(_muon_momentum_, (*first, scale))
        torch.library.opcheck(_muon_momentum_, (*first, None))
        second = (tensors(shapes, 4), tensors(shapes, 5), 0.1, 0.2)
        torch.library.opcheck(_muon_update_, (*second, tensors(shapes, 6) + tensors(shapes, 7), [0.9, 0.5]))
        torch.library.opcheck(_muon_update_, (*second, [], []))


def test_compiled_values():
    shapes = [(4, 6), (4, 6), (5,)]

    def step(params, averages, momenta, gradients, means, lr):
        uk.muon_momentum_(momenta, gradients, means, 0.9)
        uk.muon_update_(params, means, lr, 0.1, [averages], [0.9])

    with on_backend("triton"):
        eager, compiled = ([tensors(shapes, seed) for seed in range(1, 6)] for _ in range(2))
        step(*eager, 0.1)
        backend = "inductor" if DEVICE == "cuda" else "aot_eager"
        torch.compile(step, fullgraph=True, backend=backend)(*compiled, 0.1)
    assert all(torch.equal(a, b) for ours, theirs in zip(compiled, eager) for a, b in zip(ours, theirs))


A, B = (5, 3), (4,)


def given(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.ones(shape, device=DEVICE, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: uk.muon_momentum_(given(A), [], given(A), 0.9), ValueError, "gradients has 0 tensors and momenta 1"),
        (lambda: uk.muon_momentum_(given(A), given(A), [], 0.9), ValueError, "means has 0 tensors"),
        (lambda: uk.muon_momentum_(given(A), given(B), given(A), 0.9), ValueError, r"gradients\[0\] has shape \(4,\)"),
        (lambda: uk.muon_momentum_(given(A), given(A), given(B), 0.9), ValueError, "must have 15 elements"),
        (lambda: uk.muon_momentum_(given(B), given(B), given(A), 0.9), ValueError, "must have 4 elements"),
        (
            lambda: uk.muon_momentum_(given(A), given(A), [given(A[::-1])[0].T], 0.9),
            ValueError, r"means\[0\] has strides",
        ),
        (lambda: uk.muon_momentum_(given(A), given(A), given(A), 1.5), ValueError, "momentum is 1.5"),
        (
            lambda: uk.muon_momentum_(given(A), given(A), given(A), 0.9, torch.ones((), device="meta")),
            ValueError, "coefficient is on meta",
        ),
        (lambda: uk.muon_momentum_(given(A), given(A, dtype=torch.bfloat16), given(A), 0.9), TypeError, "bfloat16"),
        (lambda: uk.muon_momentum_(given(A), given(A), given(A, dtype=torch.float64), 0.9), TypeError, "float64"),
        (
            lambda: uk.muon_momentum_(given(A, B), given(A, B), given(A) + given(B, dtype=torch.bfloat16), 0.9),
            TypeError, r"means\[1\] is torch.bfloat16 and means\[0\] torch.float32",
        ),
        (
            lambda: uk.muon_momentum_(given(A), [given(A[::-1])[0].T], given(A), 0.9),
            ValueError, r"gradients\[0\] has strides",
        ),
        (
            lambda: uk.muon_momentum_(given(A), given(A), given(A), 0.9, given(B)[0]),
            ValueError, "must be 0-dim float32",
        ),
        (
            lambda: uk.muon_momentum_(given(A), [torch.empty(A, device="meta")], given(A), 0.9),
            ValueError, "gradients.0. is on meta",
        ),
        (lambda: uk.muon_update_(given(A), [], 0.1), ValueError, "updates has 0 tensors and params 1"),
        (lambda: uk.muon_update_(given(A), given(B), 0.1), ValueError, "must have 15 elements"),
        (lambda: uk.muon_update_(given(A), given(A), 0.1, 0.0, [given(A)], []), ValueError, "averages are 1 lists"),
        (
            lambda: uk.muon_update_(given(A), given(A), 0.1, 0.0, [[]], [0.5]),
            ValueError, r"averages\[0\] has 0 tensors",
        ),
        (lambda: uk.muon_update_(given(A), given(A), 0.1, 0.0, [given(B)], [0.5]), ValueError, r"averages\[0\]\[0\]"),
        (lambda: uk.muon_update_(given(A), given(A), 0.1, 0.0, [given(A)], [1.5]), ValueError, r"decays\[0\] is 1.5"),
        (lambda: uk.muon_update_(given(A, dtype=torch.float16), given(A), 0.1), TypeError, r"params\[0\] is"),
        (lambda: uk.muon_update_([given(A[::-1])[0].T], given(A), 0.1), ValueError, "strides"),
    ],
)  # fmt: skip
@backends
def test_wrong_input_is_refused(call, error, message, backend):
    with on_backend(backend), pytest.raises(error, match=message):
        call()

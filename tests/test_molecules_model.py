"""Molecules through the network: padding, rotations, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from one_graph import one_graph_loss
from test_model import SAMPLING, euler

import unite_fast
from unite_fast.model.packing import Packed
from unite_fast.molecules.config import DECODER_PRESETS, MoleculeModelConfig, MoleculeObjectiveConfig
from unite_fast.molecules.model import MoleculeUnite
from unite_fast.molecules.objective import MoleculeObjective, Molecules, rotate, turned
from unite_fast.molecules.sampling import ENCODE_STREAM, NOISE_STREAM, draw_counts, encode, generate, noise, reconstruct
from unite_fast.objective.draws import SeededDraws
from unite_fast.objective.two_pass import two_pass_step

COUNTS = torch.tensor([5, 2, 9, 1])
SIZES = dict(depth=3, width=16, heads=2, latent_dim=4, decoder=dict(depth=2, width=12, heads=2))


def model(**sizes) -> MoleculeUnite:
    torch.manual_seed(0)
    made = MoleculeUnite(MoleculeModelConfig(**{**SIZES, **sizes})).eval()
    with torch.no_grad():  # the layers that start at zero would hide everything behind them
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def molecules(counts=COUNTS, *, extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements [B, N] uint8 and positions [B, N, 3] with `extra` columns of padding, NaN where it must not matter."""
    generator = torch.Generator().manual_seed(1)
    length = int(counts.max()) + extra
    elements = torch.zeros(len(counts), length, dtype=torch.uint8)
    positions = torch.full((len(counts), length, 3), math.nan)
    for row, count in enumerate(counts.tolist()):
        elements[row, :count] = torch.randint(1, 6, (count,), generator=generator)
        places = 2 * torch.randn(count, 3, generator=generator)
        positions[row, :count] = places - places.mean(0)
    return elements, positions


def batch(counts=COUNTS, extra: int = 0) -> Molecules:
    elements, positions = molecules(counts, extra=extra)
    packed = Packed.of(counts, length=elements.shape[1])
    return Molecules(packed.pack(elements).long(), packed.pack(positions), packed)


class Accumulating:
    """Runs passes on the model and adds gradients up."""

    def __init__(self, network):
        self.network = network

    def __call__(self, phase, **inputs):
        return self.network(phase, **inputs)

    def backward(self, loss, *, last):
        loss.backward()


def step_parts(network, data, **options):
    config = MoleculeObjectiveConfig(**{"draws_per_chunk": 1} | options)
    draws = SeededDraws(config, seed=1, step=5, stream=0, device=torch.device("cpu"))
    shape = torch.Size((len(data.packed.counts), data.packed.length, network.config.latent_dim))
    labels = torch.arange(len(data.packed.counts)) % (network.null_label + 1)
    return MoleculeObjective(config, network.null_label), data, labels, draws, shape


def test_packing_is_undone_by_padding():
    packed = Packed.of(COUNTS, length=12)
    padded = torch.randn(4, 12, 3) * packed.mask[..., None]
    flat = packed.pack(padded)
    assert flat.shape == (17, 3) and torch.equal(packed.pad(flat), padded)
    assert packed.position.tolist() == [0, 1, 2, 3, 4, 0, 1, *range(9), 0]
    assert packed.sequence.tolist() == [0] * 5 + [1] * 2 + [2] * 9 + [3]
    assert torch.allclose(packed.mean(flat)[5:7], flat[5:7].mean(0).expand(2, 3))
    order = packed.pairs.order.tolist()
    assert order[:10] == [*range(5), *range(17, 22)] and order[10:14] == [5, 6, 22, 23]
    assert packed.pairs.first.tolist()[5:7] == [10, 11]
    assert torch.equal(packed.repeat(2).pack(torch.cat([padded, 2 * padded])), torch.cat([flat, 2 * flat]))


def test_packing_asks_the_device_nothing_and_is_computed_once():
    """Tensors without numbers cannot be asked; what is made beside them would stand on the host."""
    packed = Packed(COUNTS.to("meta"), total=17, longest=9, length=12)
    pairs = packed.pairs
    made = (packed.sequence, packed.position, packed.mask, packed.spans.offsets, pairs.order, pairs.first)
    assert {tensor.device.type for tensor in (*made, pairs.spans.offsets)} == {"meta"}
    assert packed.pad(packed.pack(torch.empty(4, 12, 3, device="meta"))).shape == (4, 12, 3)
    assert packed.position is made[1] and packed.pairs is pairs


def test_padding_changes_no_bit():
    network = model()
    z = torch.randn(4, 9, 4)
    for extra in (3, 11):
        outputs = []
        for padding in (0, extra):
            elements, positions = molecules(extra=padding)
            packed = Packed.of(COUNTS, length=9 + padding)
            wide = torch.full((4, 9 + padding, 4), math.nan)
            wide[:, :9] = z
            latents = network.tokenize(elements.long(), positions, packed, noise=wide)
            denoised = network.denoise(wide, torch.full((4,), 0.4), torch.zeros(4, dtype=torch.int64), packed)
            found, places = network.decode(wide, packed)
            assert not latents[:, 9:].any() and not denoised[:, 9:].any() and not places[:, 9:].any()
            assert not found[~packed.mask].any() and found[packed.mask].all()
            outputs.append([x[:, :9] for x in (latents, denoised, found, places)])
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_a_molecule_does_not_depend_on_its_neighbours():
    network = model()
    elements, positions = molecules()
    together, _ = encode(network, elements, positions, COUNTS)
    for row in range(len(COUNTS)):
        count = COUNTS[row : row + 1]
        alone, _ = encode(network, elements[row : row + 1], positions[row : row + 1], count, first=row)
        torch.testing.assert_close(alone[0], together[row, : int(count)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("noisy", [True, False])
def test_registers_begin_as_noise_or_at_zero(noisy):
    network = model(register_noise=noisy)
    elements, positions = molecules()
    one, other = (encode(network, elements, positions, COUNTS, first=first)[0] for first in (0, 10))  # other noise
    assert torch.equal(one, other) is not noisy


def test_each_register_reads_its_own_atom_and_the_order_matters():
    """A permutation of the atoms is another input; nothing is claimed to be invariant."""
    network = model()
    elements, positions = molecules(torch.tensor([6]))
    known, _ = encode(network, elements, positions, torch.tensor([6]))
    order = torch.tensor([3, 1, 2, 0, 4, 5])
    other, _ = encode(network, elements[:, order], positions[:, order], torch.tensor([6]))
    assert not torch.allclose(other, known[:, order], atol=1e-3)


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("sizes", [
    dict(), dict(shared=False), dict(checkpoint_activations=True), dict(latent_norm="rms", register_noise=False),
])
def test_gradients_equal_those_of_one_graph(stop_gradient, sizes):
    network = model(**sizes)
    options = dict(flow_draws=3, draws_per_chunk=2, stop_gradient=stop_gradient)
    objective, data, labels, draws, shape = step_parts(network, batch(), **options)
    one = one_graph_loss(network, objective, data, labels, draws, shape=shape)
    one.backward()
    expected = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    losses = two_pass_step(Accumulating(network), objective, data, labels, draws, shape=shape, weight=0.5)
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert set(found) == set(expected) and len(found) > 40
    for name in expected:
        error = (2 * found[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-5)
        assert error < 1e-3, name
    assert torch.allclose(losses.total, one.detach(), rtol=1e-5)
    assert set(losses.terms) == {"element", "position"} and losses.mask.sum() == COUNTS.sum()


def test_tokenization_times_are_half_their_maximum():
    network = model()
    elements, positions = molecules()
    positions = positions.nan_to_num()
    for maximum in (0.01, 0.6):
        network.tokenize_t_max = maximum
        z0, packed = encode(network, elements, positions, COUNTS)
        known = noise(network, packed, seed=0, first=0, stream=ENCODE_STREAM)
        t = torch.full((len(COUNTS),), maximum / 2)
        assert torch.equal(z0, network.tokenize(elements.long(), positions, packed, noise=known, t=t))


def test_losses_are_means_over_real_atoms():
    """The mean of a batch is that of its molecules weighted by their atoms, and padding takes no part."""
    network = model()
    objective, data, labels, draws, shape = step_parts(network, batch(extra=4), decoder_noise="none", flow_draws=1)
    losses = two_pass_step(Accumulating(network), objective, data, labels, draws, shape=shape)
    noise_, t, *_ = draws.tokenize(shape)
    flow = draws.flow(losses.z0, 0, 1)
    total = {"element": 0.0, "position": 0.0, "flow": 0.0}
    for row, count in enumerate(COUNTS.tolist()):
        alone = batch().packed  # the rows of this molecule in the packed batch
        rows = alone.sequence == row
        packed = Packed.of(COUNTS[row : row + 1])
        _, element, position = network(
            "reconstruct", elements=data.elements[rows], positions=data.positions[rows], packed=packed,
            noise=noise_[row : row + 1, :count], t=t[row : row + 1], squared=False,
        )  # fmt: skip
        z_t = flow.z_t[:, row : row + 1, :count].contiguous()
        label = torch.where(flow.drop[:, row : row + 1], network.null_label, labels[None, row : row + 1])
        flowed = network(
            "flow", z_t=z_t, t=flow.t[:, row : row + 1], labels=label, z1=losses.z0[row : row + 1, :count],
            weighting=True, floor=0.05, packed=packed,
        )  # fmt: skip
        for name, value in (("element", element), ("position", position), ("flow", flowed)):
            total[name] += value.item() * count / int(COUNTS.sum())
    assert float(losses.terms["element"]) == pytest.approx(total["element"], rel=1e-4)
    assert float(losses.terms["position"]) == pytest.approx(total["position"], rel=1e-4)
    assert float(losses.flow) == pytest.approx(total["flow"], rel=1e-4)


@pytest.mark.parametrize("options", [dict(position_loss="mse"), dict(decoder_noise="additive", additive_sigma=0.3)])
def test_other_forms_of_the_objective(options):
    network = model()
    objective, data, labels, draws, shape = step_parts(network, batch(), flow_draws=1, **options)
    losses = two_pass_step(Accumulating(network), objective, data, labels, draws, shape=shape)
    noise_, t, mix, added = draws.tokenize(shape)
    atoms = data.elements, data.positions, data.packed
    with torch.no_grad():
        z0, read = network.latents(*atoms, noise_, t, mix)
        read = read if added is None else z0 + data.packed.pack(added)
        logits, found = network.decoder(read, data.packed)
    distance = found - data.positions
    position = (distance / 10).square().mean() if "position_loss" in options else distance.abs().mean()  # nm², or Å
    assert torch.allclose(losses.terms["position"], position, rtol=1e-4)
    element = torch.nn.functional.cross_entropy(logits, data.elements - 1)
    assert torch.allclose(losses.terms["element"], element, rtol=1e-4)


def test_rotations_are_uniform_and_one_a_molecule():
    counts = torch.full((4000,), 3)
    data = Molecules(
        torch.ones(12000, dtype=torch.int64),
        torch.eye(3).repeat(4000, 1) - 1 / 3,
        Packed.of(counts),
    )
    found = rotate(data, seed=0, step=3, stream=1)
    # The columns of the rotation are the images of the axes; centring subtracts their mean.
    images = found.positions.view(4000, 3, 3)
    distances = (images[:, 0] - images[:, 1]).norm(dim=1)
    assert torch.allclose(distances, torch.full_like(distances, math.sqrt(2)), atol=1e-5)
    quaternions = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    matrices = turned(torch.eye(3).repeat(4000, 1), quaternions.repeat_interleave(3, 0)).view(4000, 3, 3).mT
    identity = torch.eye(3).expand(4000, 3, 3)
    assert torch.allclose(matrices @ matrices.mT, identity, atol=1e-5) and torch.allclose(
        torch.linalg.det(matrices), torch.ones(4000), atol=1e-5
    )
    # Every entry of a uniform rotation has mean 0 and variance 1/3: 0.05 is 5 σ of the mean of 4,000. A rotation that
    # is not uniform (of Euler angles, say) has a trace of another mean, and E[trace²] = 1 only under the Haar measure.
    assert matrices.mean(0).abs().max() < 0.05 and images.mean(0).abs().max() < 0.05
    trace = matrices.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(float(trace.square().mean()) - 1) < 0.1
    assert len({tuple(row.round(decimals=3).tolist()) for row in images[:, 0]}) > 3900
    # Nor are they made of the numbers of another draw of their micro-batch.
    drawn = SeededDraws(MoleculeObjectiveConfig(), seed=0, step=3, stream=0, device=torch.device("cpu"))
    first, turns = drawn.tokenize(torch.Size((4000, 1, 4))), rotate(data, seed=0, step=3, stream=0).positions
    for other in (first.noise, first.mix[2]):
        same = turned(data.positions, other[:, 0][data.packed.sequence])
        assert (turns - same).abs().mean() > 0.1
    again = rotate(data, seed=0, step=3, stream=1)
    assert torch.equal(again.positions, found.positions)
    for other in (dict(seed=1, step=3, stream=1), dict(seed=0, step=4, stream=1), dict(seed=0, step=3, stream=2)):
        assert not torch.allclose(rotate(data, **other).positions, found.positions)


def test_a_quaternion_turns_by_its_angle_about_its_axis():
    half = math.pi / 6  # a turn of 60° about z takes x to (1/2, √3/2, 0), whatever the quaternion's length
    quaternion = 3 * torch.tensor([[math.cos(half), 0, 0, math.sin(half)]])
    found = turned(torch.tensor([[1.0, 0, 0], [0, 0, 2]]), quaternion.expand(2, 4))
    assert torch.allclose(found, torch.tensor([[0.5, math.sqrt(3) / 2, 0], [0, 0, 2]]), atol=1e-6)


def test_rotation_keeps_what_a_molecule_is():
    data = batch()
    found = rotate(data, seed=0, step=0, stream=0)
    for row in range(len(COUNTS)):
        rows = data.packed.sequence == row
        assert torch.allclose(torch.cdist(found.positions[rows], found.positions[rows]),
                              torch.cdist(data.positions[rows], data.positions[rows]), atol=1e-4)  # fmt: skip
        assert found.positions[rows].mean(0).abs().max() < 1e-5


def test_presets():
    assert set(DECODER_PRESETS) == {"mol_debug", "mol_tiny", "qm9_s"}
    with torch.device("meta"):
        network = MoleculeUnite(MoleculeModelConfig(preset="qm9_s"))
    # The paper's "about 33 M" is the size of the Generative Encoder.
    assert sum(p.numel() for p in network.encoder.parameters()) == 32_607_376
    assert sum(p.numel() for p in network.parameters()) == 54_062_648
    with torch.device("meta"):
        tiny = MoleculeUnite(MoleculeModelConfig(preset="mol_tiny"))
    assert tiny.config.decoder.depth == 4
    assert tiny.matrix_parameters().isdisjoint({"decoder.positions.weight", "decoder.elements.weight"})


def test_sampling_depends_on_seed_and_number_alone():
    network = model(num_classes=3)
    counts = torch.tensor([4, 9, 2])
    options = dict(solver="heun", steps=4, guidance=2.0, seed=5)
    together = generate(network, counts, torch.tensor([0, 1, 2]), **options)
    assert together.elements.shape == (3, 9) and (together.elements > 0).sum(1).tolist() == counts.tolist()
    alone = generate(network, counts[1:2], torch.tensor([1]), first=1, **options)
    torch.testing.assert_close(alone.positions[0], together.positions[1], rtol=1e-3, atol=1e-4)
    other = generate(network, counts, torch.tensor([2, 1, 0]), **options)
    assert not torch.allclose(other.positions, together.positions)
    assert not torch.allclose(generate(network, counts, **(options | {"seed": 6})).positions, together.positions)
    assert reconstruct(network, *molecules(), COUNTS).positions.shape == (4, 9, 3)
    for wrong in (dict(counts=torch.tensor([30])), dict(counts=torch.tensor([0])), dict(counts=counts, labels=counts)):
        with pytest.raises(ValueError, match="must lie in"):
            generate(network, **wrong)
    with pytest.raises(ValueError, match="this model makes molecules"):
        unite_fast.generate(network, torch.tensor([0]))
    assert noise(network, Packed.of(counts), seed=0, first=0, stream=0).shape == (3, 9, 4)


ZEROS = dict(elements=torch.ones(4, 9, dtype=torch.int64), positions=torch.zeros(4, 9, 3), noise=torch.zeros(4, 9, 4))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, p: m.tokenize(packed=p, **ZEROS | {"elements": torch.ones(4, 9)}),
         r"elements must be an int32 or int64"),
        (lambda m, p: m.tokenize(packed=p, **ZEROS | {"positions": torch.zeros(4, 8, 3)}),
         r"positions must be .* \[4, 9, 3\], got"),
        (lambda m, p: m.tokenize(packed=p, **ZEROS | {"noise": torch.zeros(4, 9, 5)}), r"noise must be .* \[4, 9, 4\]"),
        (lambda m, p: m.decode(torch.zeros(3, 9, 4), p),
         r"z0 must be .* \[4, 9, 4\], got torch.float32 of shape \[3, 9, 4\]"),
        (lambda m, p: m.denoise(torch.zeros(4, 9, 4), torch.zeros(3), torch.zeros(4).long(), p), r"t must be .* \[4\]"),
        (lambda m, p: m.denoise(torch.zeros(4, 9, 4), torch.zeros(4), torch.full((4,), 9), p),
         r"labels must lie in 0\.\."),
        (lambda m, p: generate(m, [5, 2]), r"atom counts must be an integer tensor \[B\], got list"),
        (lambda m, p: generate(m, torch.tensor([5.0])),
         r"atom counts must be an integer tensor \[B\], got torch.float32"),
        (lambda m, p: generate(m, torch.tensor([30])), r"atom counts must lie in 1\.\.29, got 30\.\.30"),
        (lambda m, p: generate(m, COUNTS[:0]), "atom counts must be of one molecule at least"),
        (lambda m, p: generate(m, COUNTS, [0, 0, 0, 0]), r"labels must be an integer tensor \[4\], got list"),
        (lambda m, p: generate(m, COUNTS, torch.zeros(3).long()),
         r"labels must be an integer tensor \[4\], got .* \[3\]"),
        (lambda m, p: generate(m, COUNTS, solver="dopri5"), "unknown solver 'dopri5'; valid: euler, heun"),
        (lambda m, p: generate(m, COUNTS, steps=1), "at least 2"),
        (lambda m, p: generate(m, COUNTS, guidance=-1.0), "guidance must be"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call(model(), Packed.of(COUNTS))


@pytest.mark.parametrize("options", SAMPLING)
@torch.no_grad()
def test_samples_are_those_of_the_equation(options):
    network, labels, packed = model(num_classes=3), torch.tensor([0, 1, 2, 3]), Packed.of(COUNTS)
    options = {"steps": 9, **options}
    start = noise(network, packed, seed=4, first=0, stream=NOISE_STREAM) * packed.mask[..., None]
    latents = euler(lambda *z: network.denoise(*z, packed), start, labels, network.null_label, **options)
    elements, positions = network.decode(latents, packed)
    found = generate(network, COUNTS, labels, seed=4, **options)
    assert torch.equal(found.elements, elements)
    torch.testing.assert_close(found.positions, positions, rtol=1e-3, atol=1e-3)


def test_coordinates_and_what_predicts_them_stay_float32_under_autocast():
    network, data = model(), batch()
    atoms = data.elements, data.positions, data.packed.position
    latents = torch.randn(17, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        patches, heads = network.patches(*atoms), network.decoder(latents, data.packed)
    assert torch.equal(patches, network.patches(*atoms))
    assert all(head.dtype == torch.float32 for head in heads)
    # A rounding to bfloat16 would leave 1e-3 of a mean.
    assert data.packed.mean(heads[1]).abs().max() < 1e-5


def test_gradients_of_shared_places_are_added_up_in_float32():
    """All molecules read the same rows. A sum in bfloat16, as CUDA's index_add would make it, loses what is small."""
    network = model()
    objective, data, _, draws, shape = step_parts(network, batch())
    with torch.autocast("cpu", torch.bfloat16):
        objective.reconstruction(network, data, draws, shape)[0].backward()
    shared = network.encoder.register_position.grad[0, :2]
    assert (shared != shared.bfloat16().float()).float().mean() > 0.5


def test_guidance_towards_no_class_costs_nothing(monkeypatch):
    network, latents = model(), []
    denoise = network.denoise
    monkeypatch.setattr(network, "denoise", lambda z, *a, **k: latents.append(len(z)) or denoise(z, *a, **k))
    generate(network, COUNTS, guidance=2.0, steps=3)
    assert latents == [4, 4]
    generate(network, COUNTS, torch.zeros(4, dtype=torch.uint8), guidance=2.0, steps=3)
    assert 8 in latents


def test_atom_counts_follow_the_histogram():
    histogram = [0, 0, 1, 0, 3]
    counts = draw_counts(histogram, 4000, seed=3)
    assert set(counts.tolist()) == {2, 4} and abs((counts == 4).mean() - 0.75) < 0.03
    assert (draw_counts(histogram, 10, seed=3, first=7) == counts[7:17]).all()
    assert draw_counts([[0, 1, 0], [0, 0, 2]], 2, seed=3).tolist() == [1, 2]  # for each its own


@pytest.mark.skipif(not torch.cuda.is_available(), reason="host synchronisation is a matter of CUDA")
def test_a_step_on_a_gpu_does_not_make_the_host_wait():
    network = model().cuda()
    elements, positions = molecules()
    packed = Packed.of(COUNTS, device="cuda")
    objective, *_ = step_parts(network, batch())
    shape = torch.Size((4, 9, 4))

    def step(number):
        data = Molecules(packed.pack(elements).long(), packed.pack(positions), packed)
        draws = SeededDraws(objective.config, seed=0, step=number, stream=0, device=torch.device("cuda"))
        data = rotate(data, seed=0, step=number, stream=0)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return two_pass_step(Accumulating(network), objective, data, labels, draws, shape=shape)

    elements, positions, labels = elements.cuda(), positions.cuda(), torch.zeros(4, dtype=torch.int64, device="cuda")
    step(0)  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(losses.total)

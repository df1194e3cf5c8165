"""UNITE on molecules: one register and one patch an atom; hidden states hold real atoms only.

Latents are padded, [B, N, D] with D = 16, because draws and metrics want them so and they are small; the hidden
states, C = 384, are packed: [T, C] for the T real atoms of a batch, so no work is done on padding and padding cannot
change a result. Atom order is part of the input: the model is not invariant under permutations.
Shapes: B molecules, N padded atoms, T real atoms in all, D latent channels, C width, S flow draws.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from unite_fast.model.arguments import check_labels, check_tensor
from unite_fast.model.conditioning import sincos_1d
from unite_fast.model.decoder import LAYER_NORM_EPS, DecoderBlock
from unite_fast.model.linear import Linear
from unite_fast.model.packing import Packed
from unite_fast.model.two_pass import TwoPassModel
from unite_fast.molecules.config import ELEMENTS, MoleculeModelConfig

ANGSTROM_PER_NM = 10.0


class AtomEmbedding(nn.Module):
    """Atoms to patch tokens: element embedding + MLP(position) + index encoding.

    The MLP's last bias is the patches' type vector, as the bias of the encoder's `register_in` is the registers'.
    """

    def __init__(self, config: MoleculeModelConfig):
        super().__init__()
        width = config.width
        self.element = nn.Embedding(ELEMENTS, width)
        self.lift = Linear(3, width)
        self.project = Linear(width, width)
        self.register_buffer("index", sincos_1d(torch.arange(config.registers), width), persistent=False)

    def forward(self, elements: Tensor, positions: Tensor, place: Tensor) -> Tensor:
        """elements [T] 1 … 5, positions [T, 3] in Å, place [T] in the molecule -> [T, C] float32."""
        # bfloat16 keeps 8 bits: at 5 Å a rounding of 0.02 Å, as much as perceiving a bond's order allows.
        with torch.autocast(positions.device.type, enabled=False):
            moved = self.project(F.silu(self.lift(positions.float())))
            return self.element(elements - 1) + moved + self.index.index_select(0, place)


class AtomDecoder(nn.Module):
    """Latents of atoms -> element logits and positions."""

    def __init__(self, config: MoleculeModelConfig):
        super().__init__()
        sizes = config.decoder
        self.lift = Linear(config.latent_dim, sizes.width)
        self.register_buffer("index", sincos_1d(torch.arange(config.registers), sizes.width), persistent=False)
        self.blocks = nn.ModuleList(DecoderBlock(sizes.width, sizes.heads) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.width, eps=LAYER_NORM_EPS)
        self.elements = Linear(sizes.width, ELEMENTS)
        self.positions = Linear(sizes.width, 3)

    def forward(self, latent: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
        """latent [T, D] -> logits [T, 5] and positions [T, 3] in Å, zero mean in every molecule; both float32."""
        x = self.lift(latent)
        x, branch = (x + self.index.index_select(0, packed.position).to(x.dtype))[None], None
        for block in self.blocks:
            x, branch = block(x, branch, packed.spans)
        with torch.autocast(x.device.type, enabled=False):
            x = self.norm((x + branch).squeeze(0).float())
            positions = self.positions(x)
            return self.elements(x), positions - packed.mean(positions)


class MoleculeUnite(TwoPassModel):
    """UNITE on molecules."""

    def make_patches(self, config: MoleculeModelConfig) -> AtomEmbedding:
        return AtomEmbedding(config)

    def make_decoder(self, config: MoleculeModelConfig) -> AtomDecoder:
        return AtomDecoder(config)

    def tokenize(
        self, elements: Tensor, positions: Tensor, packed: Packed, *, noise: Tensor, t: Tensor | None = None
    ) -> Tensor:
        """Molecules to latents.

        Args:
            elements: [B, N] int64, 0 = padding, 1 … 5 = H C N O F.
            positions: [B, N, 3] in Å, zero mean over a molecule's atoms.
            packed: of these molecules.
            noise: [B, N, D] register noise.
            t: [B] tokenization times; all `tokenize_time` if None.

        Returns:
            z0 [B, N, D] float32, zero at padding.

        Raises:
            ValueError: an argument of another type or shape.
        """
        batch, length = packed.counts.shape[0], packed.length
        check_tensor("elements", elements, batch, length, integer=True)
        check_tensor("positions", positions, batch, length, 3)
        self._check_latents("noise", noise, packed)
        if t is not None:
            check_tensor("t", t, batch)
        else:
            t = torch.full(elements.shape[:1], self.tokenize_time, device=elements.device)
        latent = self._encode(packed.pack(elements), packed.pack(positions), packed, noise, t)
        return packed.pad(self.latent_norm(latent))

    def denoise(self, z_t: Tensor, t: Tensor, labels: Tensor, packed: Packed, *, normalise: bool = True) -> Tensor:
        """Prediction of clean latents: z_t [B, N, D], t [B], labels [B] -> ẑ0 [B, N, D] float32, zero at padding.

        Raises:
            ValueError: an argument of another type or shape; on the CPU labels outside of 0 … num_classes.
        """
        self._check_latents("z_t", z_t, packed)
        check_tensor("t", t, z_t.shape[0])
        check_labels(labels, z_t.shape[0], self.null_label)
        encoder, norm = self._denoiser()
        latent = encoder(packed.pack(z_t), t, labels, packed=packed)
        return packed.pad(norm(latent) if normalise else latent.float())

    def decode(self, z0: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
        """Latents [B, N, D] -> elements [B, N] int64 with 0 = padding, and positions [B, N, 3] in Å.

        Raises:
            ValueError: latents that are no floating-point tensor of that shape.
        """
        self._check_latents("z0", z0, packed)
        logits, positions = self.decoder(packed.pack(z0), packed)
        return packed.pad(logits.argmax(-1) + 1), packed.pad(positions)

    def _check_latents(self, name: str, latents: Tensor, packed: Packed) -> None:
        check_tensor(name, latents, packed.counts.shape[0], packed.length, self.config.latent_dim)

    def _reconstruct(self, elements, positions, packed, noise, t, squared, mix=None, added_noise=None):
        """(z0 [B,N,D], cross-entropy, position error) of elements [T] and positions [T, 3], means over real atoms.

        `squared` makes the error a squared one in nm²; otherwise it is absolute in Å. `mix` is (mask, t, ε).
        """
        z0, decoder_input = self.latents(elements, positions, packed, noise, t, mix, added_noise)
        found = self.decoder(decoder_input, packed)
        return packed.pad(z0), *self.errors(*found, elements, positions, packed, squared)

    def latents(self, elements, positions, packed, noise, t, mix=None, added_noise=None):
        """(z0 [T, D], what the decoder reads of it [T, D]) of elements [T] and positions [T, 3], in training."""
        latent = self._encode(elements, positions, packed, noise, t)
        if mix is None:
            z0 = self.latent_norm(latent)
            return z0, z0 if added_noise is None else z0 + packed.pack(added_noise)
        mask, mix_t, mix_noise = mix
        # Each atom as a sample of one token: the operator then needs no mask.
        z0, decoder_input = self.latent_norm.mix(
            latent[:, None], mask[packed.sequence], mix_t[packed.sequence], packed.pack(mix_noise)[:, None]
        )
        return z0.squeeze(1), decoder_input.squeeze(1)

    @staticmethod
    def errors(logits, found, elements, positions, packed, squared):
        """(cross-entropy, position error) of logits [T, 5] and positions [T, 3], means over real atoms."""
        distance = found - (positions - packed.mean(positions))
        error = (distance / ANGSTROM_PER_NM).square().mean() if squared else distance.abs().mean()
        return F.cross_entropy(logits, elements - 1), error

    def _flow(self, z_t, t, labels, z1, weighting, floor, packed):
        """Flow loss of s draws: z_t [s,B,N,D], t [s,B], labels [s,B], z1 [B,N,D] -> scalar, summed over draws.

        A draw's mean runs over real atoms and channels: each atom is a sample of one token under its molecule's time.
        """
        encoder, norm = self._denoiser()
        draws, many = z_t.shape[0], packed.repeat(z_t.shape[0])
        latent = encoder(many.pack(z_t.flatten(0, 1)), t.flatten(), labels.flatten(), packed=many)
        clean = packed.pack(z1)[:, None]
        return norm.flow_loss(
            latent.view(draws, *clean.shape), clean, t[:, packed.sequence], weighting=weighting, floor=floor
        )

    def _encode(self, elements: Tensor, positions: Tensor, packed: Packed, noise: Tensor, t: Tensor) -> Tensor:
        null = torch.full_like(packed.counts, self.null_label)
        patches = self.patches(elements, positions, packed.position)
        return self.encoder(packed.pack(self._registers(noise)), t, null, patches, packed)

    def matrix_parameters(self) -> set[str]:
        """As in `TwoPassModel`, without the heads: an orthogonal update of 3 × C moves coordinates by a fixed length,
        however small their error has become."""
        return super().matrix_parameters() - {"decoder.elements.weight", "decoder.positions.weight"}

    def float32_matrices(self) -> set[str]:
        """As in `TwoPassModel`, with the Linears of positions and of the heads."""
        linears = ("patches.lift", "patches.project", "decoder.elements", "decoder.positions")
        return super().float32_matrices() | {f"{name}.weight" for name in linears}

"""Operations and bytes of a training step on one packed micro-batch of molecules, counted from its atom counts.

As `unite_fast.analysis.counts`, which has the rules, with one difference: an operator is counted for the whole
micro-batch (in the denoising pass: for one draw of it), since molecules differ. Attention counts the pairs of tokens
within molecules, which is all that FlashAttention computes; a CPU computes padded pairs beside them. Saved activations
are not counted.

Shapes: B molecules, T atoms in all, C width, D latent channels.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from unite_fast.analysis.counts import (
    DTYPE_BYTES,
    TIME_FEATURES,
    Dtype,
    Op,
    Part,
    attention_op,
    block_ops,
    linear_op,
    moves_op,
)
from unite_fast.analysis.extent import Extent
from unite_fast.model.blocks import swiglu_hidden
from unite_fast.molecules.config import ELEMENTS, MoleculeModelConfig, MoleculeObjectiveConfig

INDEX_BYTES = 8  # of an int64: elements, places, rows of the packing


class _Batch(NamedTuple):
    molecules: int  # B
    atoms: int  # T
    pairs: int  # Σ n² of the molecules' atoms
    width: int  # bytes of a number in the compute dtype
    norm_width: int  # bytes of a number in the decoder's LayerNorms


def packed_parts(
    model: MoleculeModelConfig,
    objective: MoleculeObjectiveConfig,
    extent: Extent,
    *,
    dtype: Dtype = "bf16",
    device: Literal["cuda", "cpu"] = "cuda",
) -> dict[str, Part]:
    """The parts of a training step by name: tokenize, decode, loss, denoise.

    Args:
        model, objective: sizes and losses.
        extent: of the micro-batch.
        dtype: what matrix products compute in; the atoms' embedding and the heads stay float32.
        device: whose autocast rules apply: on CUDA the decoder's LayerNorms read and write float32.
    """
    width = DTYPE_BYTES[dtype]
    batch = _Batch(extent.samples, extent.tokens, extent.pairs, width, 4 if device == "cuda" else width)
    latent = batch.atoms * model.latent_dim
    parts = {
        "tokenize": [
            *_encoder(batch, model, objective, tokenize=True),
            moves_op("latent norm, noise", latent, 4, forward=4, backward=4),
        ],
        "decode": _decoder(batch, model),
        "loss": _loss(batch),
        "denoise": [
            *_encoder(batch, model, objective, tokenize=False),
            moves_op("flow noise", latent, 4, forward=2, backward=0),
            moves_op("latent norm, loss", latent, 4, forward=4, backward=2),
        ],
    }
    return {
        name: Part(
            name, tuple(op._replace(saved=0) for op in ops),
            model.checkpoint_activations and name in ("tokenize", "denoise"), width,
        )
        for name, ops in parts.items()
    }  # fmt: skip


def _encoder(
    batch: _Batch, model: MoleculeModelConfig, objective: MoleculeObjectiveConfig, *, tokenize: bool
) -> list[Op]:
    """The Generative Encoder: a condition a molecule, a register an atom, in tokenization a patch an atom beside it."""
    channels, width, rows = model.width, batch.width, batch.molecules
    hidden, atoms = swiglu_hidden(channels), batch.atoms
    tokens, pairs = (2 * atoms, 4 * batch.pairs) if tokenize else (atoms, batch.pairs)
    ops = [
        linear_op("time lift", rows, TIME_FEATURES, channels, 4, input_grad=False),
        linear_op("time project", rows, channels, channels, 4),
        *(linear_op("modulation", rows, channels, 6 * channels, width) for _ in range(model.depth)),
        linear_op("modulation", rows, channels, 2 * channels, width),
    ]
    if tokenize:
        ops += [
            linear_op("atom lift", atoms, 3, channels, 4, input_grad=False),
            moves_op("SiLU", atoms * channels, 4, forward=2, backward=3),
            linear_op("atom project", atoms, channels, channels, 4),
            moves_op("element, index", atoms * channels, 4, forward=4, backward=2),
        ]
    reads_gradient = not tokenize and not objective.stop_gradient
    ops += [
        linear_op("registers", atoms, model.latent_dim, channels, width, input_grad=reads_gradient),
        moves_op("positions", atoms * channels, width, forward=3, backward=1),
    ]
    if tokenize:
        ops.append(moves_op("join patches", tokens * channels, width, forward=4, backward=4))
    ops.append(moves_op("opening norm", tokens * channels, width, forward=2, backward=3))
    for index in range(model.depth):
        kept = atoms if index + 1 == model.depth else tokens
        ops += block_ops(index, tokens, kept, channels, model.heads, hidden, width, pairs)
    return [*ops, linear_op("final", atoms, channels, model.latent_dim, width)]


def _decoder(batch: _Batch, model: MoleculeModelConfig) -> list[Op]:
    decoder, width, atoms = model.decoder, batch.width, batch.atoms
    channels = decoder.width
    size = atoms * channels
    norm = moves_op("norm", size, batch.norm_width, forward=2, backward=3)
    ops = [
        linear_op("lift", atoms, model.latent_dim, channels, width),
        moves_op("positions", size, width, forward=3, backward=1),
    ]
    for _ in range(decoder.depth):
        ops += [
            norm,
            linear_op("qkv", atoms, channels, 3 * channels, width),
            attention_op(atoms, channels, decoder.heads, width, pairs=batch.pairs),
            linear_op("attention out", atoms, channels, channels, width),
            moves_op("add", size, width, forward=3, backward=2),
            norm,
            linear_op("mlp in", atoms, channels, 4 * channels, width),
            moves_op("GELU", 4 * size, width, forward=2, backward=3),
            linear_op("mlp out", atoms, 4 * channels, channels, width),
            moves_op("add", size, width, forward=3, backward=2),
        ]
    return ops + [
        moves_op("norm", size, 4, forward=2, backward=3),
        linear_op("positions", atoms, channels, 3, 4),
        linear_op("elements", atoms, channels, ELEMENTS, 4),
        moves_op("centre", 3 * atoms, 4, forward=2, backward=2),
    ]


def _loss(batch: _Batch) -> list[Op]:
    """Logits and positions read, their gradients written; elements and true positions read."""
    atoms = batch.atoms
    return [
        Op(
            "cross-entropy", forward_bytes=atoms * (4 * ELEMENTS + INDEX_BYTES),
            backward_bytes=atoms * (8 * ELEMENTS + INDEX_BYTES),
        ),
        moves_op("position error", 3 * atoms, 4, forward=2, backward=3),
    ]  # fmt: skip

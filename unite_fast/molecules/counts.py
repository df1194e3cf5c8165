"""Operations, bytes and saved activations of a training step on one packed micro-batch of molecules.

As `unite_fast.analysis.counts`, which has the rules, with one difference: an operator is counted for the whole
micro-batch (in the denoising pass: for one draw of it), since molecules differ. Attention counts the pairs of tokens
within molecules, which is all that FlashAttention computes; a CPU computes padded pairs beside them, and keeps padded
copies, of which only the real tokens are counted here.

Shapes: B molecules, T atoms in all, C width, D latent channels.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from unite_fast.analysis.counts import TIME_FEATURES, added_layer_norm_ops, block_ops, layer_norm_ops
from unite_fast.analysis.extent import Extent
from unite_fast.analysis.parts import DTYPE_BYTES, Dtype, Op, Part, attention_op, linear_op, moves_op
from unite_fast.model.blocks import swiglu_hidden
from unite_fast.molecules.config import ELEMENTS, MoleculeModelConfig, MoleculeObjectiveConfig

INDEX_BYTES = 8  # of an int64: elements, places, rows of the packing


class _Batch(NamedTuple):
    molecules: int  # B
    atoms: int  # T
    pairs: int  # Σ n² of the molecules' atoms
    itemsize: int  # bytes of a number in the compute dtype
    fused: bool  # as on CUDA: the decoder's LayerNorms by unite_kernels, attention without padding


def packed_parts(
    model: MoleculeModelConfig,
    objective: MoleculeObjectiveConfig,
    extent: Extent,
    *,
    dtype: Dtype = "bf16",
    device: Literal["cuda", "cpu"] = "cuda",
    fp8: bool = False,
) -> dict[str, Part]:
    """The parts of a training step by name: tokenize, decode, loss, denoise.

    Args:
        model, objective: sizes and losses.
        extent: of the micro-batch.
        dtype: what matrix products compute in; the atoms' embedding and the heads stay float32.
        device: on CUDA unite_kernels computes the decoder's LayerNorms, and attention needs no padding.
        fp8: `train.fp8`.
    """
    itemsize = DTYPE_BYTES[dtype]
    batch = _Batch(extent.samples, extent.tokens, extent.pairs, itemsize, device == "cuda")
    latent = batch.atoms * model.latent_dim
    # A mask and a time an atom beside the latents, and the latents once more on their way to the padding.
    noised = 8 * latent + 5 * batch.atoms
    parts = {
        "tokenize": [
            *_encoder(batch, model, objective, tokenize=True),
            moves_op("latent norm, noise", latent, 4, forward=4, backward=4)._replace(saved=noised),
        ],
        "decode": _decoder(batch, model),
        "loss": _loss(batch),
        "denoise": [
            *_encoder(batch, model, objective, tokenize=False),
            moves_op("flow noise", latent, 4, forward=2, backward=0),
            moves_op("latent norm, loss", latent, 4, forward=4, backward=2, saved=2),
        ],
    }
    return {
        name: Part(
            name, tuple(ops), model.checkpoint_activations and name in ("tokenize", "denoise"), itemsize, fp8
        )
        for name, ops in parts.items()
    }  # fmt: skip


def _encoder(
    batch: _Batch, model: MoleculeModelConfig, objective: MoleculeObjectiveConfig, *, tokenize: bool
) -> list[Op]:
    """The Generative Encoder: a condition a molecule, a register an atom, in tokenization a patch an atom beside it."""
    channels, itemsize, rows = model.width, batch.itemsize, batch.molecules
    hidden, atoms = swiglu_hidden(channels), batch.atoms
    tokens, pairs = (2 * atoms, 4 * batch.pairs) if tokenize else (atoms, batch.pairs)
    # In float32 all modulations read the one condition that is kept, in bfloat16 each a copy of its own.
    copy = itemsize * channels if itemsize < 4 else 0

    def modulation(outputs: int) -> Op:
        made = linear_op("modulation", rows, channels, outputs, itemsize)
        return made._replace(saved=rows * (copy + itemsize * outputs))

    ops = [
        linear_op("time lift", rows, TIME_FEATURES, channels, 4, input_grad=False),
        linear_op("time project", rows, channels, channels, 4),
        moves_op("condition", rows * channels, 4, forward=5, backward=4, saved=2 if copy else 3),
        *(modulation(6 * channels) for _ in range(model.depth)),
        modulation(2 * channels),
    ]
    if tokenize:
        ops += [
            linear_op("atom lift", atoms, 3, channels, 4, input_grad=False),
            moves_op("SiLU", atoms * channels, 4, forward=2, backward=3, saved=1),
            linear_op("atom project", atoms, channels, channels, 4),
            _indexed(moves_op("element, index", atoms * channels, 4, forward=4, backward=2), atoms),
        ]
    reads_gradient = not tokenize and not objective.stop_gradient
    ops += [
        linear_op("registers", atoms, model.latent_dim, channels, itemsize, input_grad=reads_gradient),
        _indexed(moves_op("positions", atoms * channels, itemsize, forward=3, backward=1), atoms),
    ]
    if tokenize:
        ops.append(_indexed(moves_op("join patches", tokens * channels, itemsize, forward=4, backward=4), tokens))
    head = channels // model.heads
    ops += [
        moves_op("rotary tables", tokens * head, 4, forward=2, backward=0, saved=1),
        moves_op("opening norm", tokens * channels, itemsize, forward=2, backward=3, saved=1),
    ]
    for index in range(model.depth):
        kept = atoms if index + 1 == model.depth else tokens
        ops += block_ops(index, tokens, kept, channels, model.heads, hidden, itemsize, pairs)
        if not batch.fused:
            ops.append(_padding(tokens, channels, itemsize, index, unpacks=kept == tokens))
    return [*ops, linear_op("final", atoms, channels, model.latent_dim, itemsize)]


def _indexed(op: Op, rows: int) -> Op:
    """The same, keeping beside what it keeps the rows that it picked."""
    return op._replace(saved=op.saved + INDEX_BYTES * rows)


def _padding(tokens: int, channels: int, itemsize: int, block: int | None = None, *, unpacks: bool = True) -> Op:
    """What a CPU keeps for attention beside the packed qkv: it padded, the mask, and the output packed again."""
    kept = moves_op("padding", tokens * channels, itemsize, forward=0, backward=0, saved=3 + unpacks, block=block)
    return _indexed(kept._replace(saved=kept.saved + itemsize * tokens), tokens)


def _decoder(batch: _Batch, model: MoleculeModelConfig) -> list[Op]:
    decoder, itemsize, atoms = model.decoder, batch.itemsize, batch.atoms
    channels = decoder.width
    size = atoms * channels
    ops = [
        linear_op("lift", atoms, model.latent_dim, channels, itemsize),
        moves_op("positions", size, itemsize, forward=3, backward=1),
    ]
    for index in range(decoder.depth):
        opening = added_layer_norm_ops if index else layer_norm_ops
        ops += [
            *opening(atoms, channels, itemsize, batch.fused),
            linear_op("qkv", atoms, channels, 3 * channels, itemsize),
            attention_op(atoms, channels, decoder.heads, itemsize, pairs=batch.pairs),
            *([] if batch.fused else [_padding(atoms, channels, itemsize)]),
            linear_op("attention out", atoms, channels, channels, itemsize, saves=False),
            *added_layer_norm_ops(atoms, channels, itemsize, batch.fused),
            linear_op("mlp in", atoms, channels, 4 * channels, itemsize),
            moves_op("GELU", 4 * size, itemsize, forward=2, backward=3, saved=1),
            linear_op("mlp out", atoms, 4 * channels, channels, itemsize),
        ]
    return ops + [
        moves_op("add", size, itemsize, forward=3, backward=2),
        moves_op("norm", size, 4, forward=2, backward=3)._replace(saved=4 * size + 8 * atoms),
        linear_op("positions", atoms, channels, 3, 4),
        linear_op("elements", atoms, channels, ELEMENTS, 4, saves=False),
        _indexed(moves_op("centre", 3 * atoms, 4, forward=2, backward=2, saved=1), 2 * atoms),
    ]


def _loss(batch: _Batch) -> list[Op]:
    """Logits and positions read, their gradients written; elements and true positions read."""
    atoms = batch.atoms
    return [
        Op(
            "cross-entropy", forward_bytes=atoms * (4 * ELEMENTS + INDEX_BYTES),
            backward_bytes=atoms * (8 * ELEMENTS + INDEX_BYTES), saved=atoms * (4 * ELEMENTS + INDEX_BYTES),
        ),
        moves_op("position error", 3 * atoms, 4, forward=2, backward=3, saved=1),
    ]  # fmt: skip

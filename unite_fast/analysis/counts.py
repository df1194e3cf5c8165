"""Operations, bytes and saved activations of every part of a training step, counted from the configuration alone.

One operator is one row (`unite_fast.analysis.parts`): what it computes and moves for one image (in the denoising pass:
for one draw of one image). The latent norm is counted as the fused LayerNorm that it is by default: in plain PyTorch
another `model.latent_norm` moves some twenty times K·D numbers more, 0.2 % of what a pass of B moves.

Shapes: K registers, P patches, M context tokens, N tokens of a sequence, C width, H heads, S flow draws.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from unite_fast.analysis.parts import DTYPE_BYTES, Dtype, Op, Part, attention_op, linear_op, moves_op
from unite_fast.config import ModelConfig, ObjectiveConfig
from unite_fast.model.blocks import swiglu_hidden
from unite_fast.model.conditioning import TIME_FREQUENCIES
from unite_fast.objective.perceptual import CHANNELS, STAGES

TIME_FEATURES = 2 * TIME_FREQUENCIES  # sines and cosines


def step_parts(
    model: ModelConfig,
    objective: ObjectiveConfig,
    *,
    dtype: Dtype = "bf16",
    device: Literal["cuda", "cpu"] = "cuda",
    fp8: bool = False,
) -> dict[str, Part]:
    """The parts of a training step by name: tokenize, decode, lpips (where it has a weight), denoise.

    Args:
        model, objective: sizes and losses.
        dtype: what matrix products compute in.
        device: on CUDA unite_kernels computes the decoder's LayerNorms, with the sum before them, and LPIPS's bias,
            ReLU and pool, which keep no positions of the maxima.
        fp8: `train.fp8`.
    """
    itemsize = DTYPE_BYTES[dtype]
    sizes = _Sizes(model, itemsize, device == "cuda")
    parts = {
        "tokenize": [*_encoder(sizes, objective, tokenize=True), *_latent(sizes)],
        "decode": _decoder(sizes),
        "denoise": [*_encoder(sizes, objective, tokenize=False), *_flow_loss(sizes)],
    }
    if objective.lpips.weight:
        parts["lpips"] = _lpips(sizes, objective.lpips.dropout)
    order = [name for name in ("tokenize", "decode", "lpips", "denoise") if name in parts]
    return {
        name: Part(
            name, tuple(parts[name]), model.checkpoint_activations and name in ("tokenize", "denoise"), itemsize, fp8
        )
        for name in order
    }  # fmt: skip


def image_operations(model: ModelConfig, objective: ObjectiveConfig) -> int:
    """Operations of one image in one training step: tokenize, decode, LPIPS and S draws, forward and backward.

    The optimizer is not in it: its cost does not grow with the batch. Nor is what activation checkpointing repeats, as
    model FLOP/s utilisation (MFU) is defined.
    """
    return sum(part.operations * repeats(name, objective) for name, part in step_parts(model, objective).items())


def repeats(part: str, objective: ObjectiveConfig) -> int:
    """How often a part is computed for one image in one step."""
    return objective.flow_draws if part == "denoise" else 1


class _Sizes(NamedTuple):
    model: ModelConfig
    itemsize: int  # bytes of a number in the compute dtype
    fused: bool  # unite_kernels computes the decoder's LayerNorms and what stands between LPIPS's convolutions


def _encoder(sizes: _Sizes, objective: ObjectiveConfig, *, tokenize: bool) -> list[Op]:
    """The Generative Encoder (UNITE, arXiv 2603.22283), fused as unite_kernels computes it."""
    model, itemsize = sizes.model, sizes.itemsize
    channels, depth, hidden = model.width, model.depth, swiglu_hidden(model.width)
    tokens = model.registers + (model.patches if tokenize else 0)
    ops = [
        linear_op("time lift", 1, TIME_FEATURES, channels, 4, input_grad=False),
        linear_op("time project", 1, channels, channels, 4),
        *(
            linear_op("modulation", 1, channels, 6 * channels, itemsize)._replace(saved=7 * channels * itemsize)
            for _ in range(depth)
        ),
        linear_op("modulation", 1, channels, 2 * channels, itemsize)._replace(saved=3 * channels * itemsize),
    ]
    if tokenize:
        pixels = model.patch_size**2 * 3
        ops.append(linear_op("patches", model.patches, pixels, channels, itemsize, input_grad=False))
    reads_gradient = not tokenize and not objective.stop_gradient
    ops += [
        linear_op("registers", model.registers, model.latent_dim, channels, itemsize, input_grad=reads_gradient),
        moves_op("positions", model.registers * channels, itemsize, forward=2, backward=1),
    ]
    if tokenize:
        ops.append(moves_op("join patches", tokens * channels, itemsize, forward=2, backward=2))
    with_context = model.context_start if model.context_len else None
    if with_context == 0:
        tokens += model.context_len
        ops.append(moves_op("join context", tokens * channels, itemsize, forward=2, backward=2))
    ops.append(moves_op("opening norm", tokens * channels, itemsize, forward=2, backward=3, saved=1))
    for index in range(depth):
        kept = model.registers if index + 1 == depth else tokens
        ops += block_ops(index, tokens, kept, channels, model.heads, hidden, itemsize)
        if index + 1 == with_context:
            joined, context = (tokens + model.context_len) * channels, model.context_len * channels
            ops.append(moves_op("context norm", context, itemsize, forward=2, backward=3, saved=1, block=index))
            # x and h are both joined; what was h before is not kept, the joined h is what qkv reads.
            ops.append(moves_op("join context", joined, itemsize, forward=4, backward=4, block=index))
            tokens += model.context_len
    ops.append(linear_op("final", kept, channels, model.latent_dim, itemsize))
    return ops


def block_ops(
    index: int, tokens: int, kept: int, channels: int, heads: int, hidden: int, itemsize: int, pairs: int | None = None
) -> list[Op]:
    """An encoder block on `tokens`, of which the `kept` ones go on behind attention; `pairs` as in `attention_op`."""
    size, kept_size = tokens * channels, kept * channels
    ops = [
        linear_op("qkv", tokens, channels, 3 * channels, itemsize, block=index),
        moves_op("q/k norm, rotary", 3 * size, itemsize, forward=2, backward=3, saved=1, block=index),
        attention_op(tokens, channels, heads, itemsize, index, pairs),
    ]
    if kept != tokens:
        ops.append(moves_op("keep registers", kept_size, itemsize, forward=4, backward=4, saved=1, block=index))
    return ops + [
        linear_op("attention out", kept, channels, channels, itemsize, saves=False, block=index),
        moves_op("gate, norm, modulate", kept_size, itemsize, forward=4, backward=6, saved=2, block=index),
        linear_op("mlp in", kept, channels, 2 * hidden, itemsize, block=index),
        moves_op("SwiGLU", kept * hidden, itemsize, forward=3, backward=5, saved=2, block=index),
        linear_op("mlp out", kept, hidden, channels, itemsize, block=index),
        moves_op("gate, norm, norm, modulate", kept_size, itemsize, forward=4, backward=6, saved=1, block=index),
    ]


def _latent(sizes: _Sizes) -> list[Op]:
    """Latent norm and the decoder's noise, float32 numbers of K·D."""
    latent = sizes.model.registers * sizes.model.latent_dim
    return [moves_op("latent norm, noise", latent, 4, forward=4, backward=4, saved=1)]


def _flow_loss(sizes: _Sizes) -> list[Op]:
    """Noise, latent norm and the weighted error, whose gradients the forward pass makes (float32)."""
    latent = sizes.model.registers * sizes.model.latent_dim
    return [
        moves_op("flow noise", latent, 4, forward=2, backward=0),
        moves_op("latent norm, loss", latent, 4, forward=4, backward=2, saved=2),
    ]


def _decoder(sizes: _Sizes) -> list[Op]:
    model, itemsize = sizes.model, sizes.itemsize
    decoder = model.decoder
    channels = decoder.width
    queries = model.patches if model.registers != model.patches else 0
    tokens = 1 + model.registers + queries
    size = tokens * channels

    ops = [
        linear_op("lift", model.registers, model.latent_dim, decoder.inner, itemsize),
        linear_op("embed", model.registers, decoder.inner, channels, itemsize),
        moves_op("token, positions", size, itemsize, forward=4, backward=2),
    ]
    for index in range(decoder.depth):
        # With queries the last block goes on with the patches alone once attention has read the registers.
        last = index + 1 == decoder.depth
        kept = queries if queries and last else tokens
        kept_size = kept * channels
        opening = added_layer_norm_ops if index else layer_norm_ops
        ops += [
            *opening(tokens, channels, itemsize, sizes.fused),
            linear_op("qkv", tokens, channels, 3 * channels, itemsize),
            attention_op(tokens, channels, decoder.heads, itemsize),
            # A part of what attention has kept is a tensor of its own.
            linear_op("attention out", kept, channels, channels, itemsize, saves=kept != tokens),
            *added_layer_norm_ops(kept, channels, itemsize, sizes.fused),
            linear_op("mlp in", kept, channels, 4 * channels, itemsize),
            moves_op("GELU", 4 * kept_size, itemsize, forward=2, backward=3, saved=1),
            linear_op("mlp out", kept, 4 * channels, channels, itemsize),
        ]
    pixels = model.patch_size**2 * 3
    image = model.image_size**2 * 3
    return ops + [
        *added_layer_norm_ops(queries or tokens, channels, itemsize, sizes.fused),
        linear_op("pixels", model.patches, channels, pixels, itemsize),
        Op(
            "unpatchify, L1", forward_bytes=(2 * itemsize + 4) * image, backward_bytes=(3 * itemsize + 4) * image,
            saved=(itemsize + 4) * image,  # the reconstruction and the float32 target
        ),
    ]


def layer_norm_ops(rows: int, channels: int, itemsize: int, fused: bool) -> list[Op]:
    """Keeps its input, and PyTorch's two float32 a row, which the fused one makes again."""
    norm = moves_op("norm", rows * channels, itemsize, forward=2, backward=3, saved=1)
    return [norm if fused else norm._replace(saved=norm.saved + 8 * rows)]


def added_layer_norm_ops(rows: int, channels: int, itemsize: int, fused: bool) -> list[Op]:
    """x + branch and its LayerNorm."""
    size = rows * channels
    if fused:
        return [moves_op("add, norm", size, itemsize, forward=4, backward=4, saved=1)]
    return [moves_op("add", size, itemsize, forward=3, backward=2), *layer_norm_ops(rows, channels, itemsize, fused)]


def _lpips(sizes: _Sizes, dropout: bool) -> list[Op]:
    """VGG16 forward on target and reconstruction, backward to the reconstruction alone; weights are frozen."""
    itemsize, side = sizes.itemsize, sizes.model.image_size
    ops = []
    inputs = 3
    for stage, (convolutions, outputs) in enumerate(zip(STAGES, CHANNELS, strict=True)):
        if stage:  # a 2×2 pool
            pooled = (side // 2) ** 2 * inputs
            side //= 2
            # Fused, it writes a number twice and reads its gradient. Alone it reads four numbers and writes one with
            # its int64 position, twice and back once; then the reconstruction's keeps the positions, too.
            moved = itemsize if sizes.fused else 5 * itemsize + 8
            ops.append(
                Op(
                    "pool", forward_bytes=2 * moved * pooled, backward_bytes=moved * pooled,
                    saved=(itemsize if sizes.fused else itemsize + 8) * pooled,
                )
            )  # fmt: skip
        pixels = side * side
        for _ in convolutions:
            product = 2 * 9 * pixels * inputs * outputs
            ops.append(
                Op(
                    "convolution", forward=2 * product, backward=product,
                    forward_bytes=2 * itemsize * pixels * (inputs + outputs),
                    backward_bytes=itemsize * pixels * (inputs + outputs),
                    saved=0 if ops else itemsize * pixels * inputs,  # all but the first read what ReLU or pool has kept
                    weights=9 * inputs * outputs, trained=False,
                )
            )  # fmt: skip
            ops.append(
                Op(
                    "ReLU", forward_bytes=4 * itemsize * pixels * outputs,
                    backward_bytes=3 * itemsize * pixels * outputs, saved=itemsize * pixels * outputs,
                )
            )  # fmt: skip
            inputs = outputs
        product = 2 * pixels * inputs if dropout else 0  # the 1×1 layer as a product of its own behind the dropout
        distance = moves_op("distance", pixels * inputs, itemsize, forward=2, backward=3, saved=1)
        ops.append(distance._replace(forward=product, backward=product))
    return ops

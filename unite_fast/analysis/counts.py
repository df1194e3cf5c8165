"""Operations, bytes and saved activations of every part of a training step, counted from the configuration alone.

One operator is one row: what it computes and moves for one image (in the denoising pass: for one draw of one image).
A multiply-add counts as two operations, and only matrix products, attention and convolutions count; a backward pass
costs one more product for each gradient that is really taken (Linears that read data take none for their input).
Bytes are what an operator must move: every input read once, every output written once, at the width it is stored in.
Under `train.fp8` the products that it takes count at the FP8 rate, with the bytes of bfloat16: the casts to eight bits
(a pass over each operand for its scale, one that writes it) cost more than that, narrower operands less, and neither is
counted.

Shapes: K registers, P patches, M context tokens, N tokens of a sequence, C width, H heads, S flow draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from unite_fast.config import ModelConfig, ObjectiveConfig
from unite_fast.engine.fp8 import takes

TIME_FEATURES = 512  # sines and cosines of 256 frequencies (UNITE, condition c)
# VGG16 up to relu5_3 (Simonyan & Zisserman 2015): channels of each stage's convolutions, a 2×2 pool between stages.
VGG = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
DTYPE_BYTES = {"bf16": 2, "fp32": 4}
Dtype = Literal["bf16", "fp32"]


class Rates(NamedTuple):
    """What a device reaches: operations a second of large matrix products, bytes a second of a large copy."""

    matmul: float  # in bfloat16, or in float32 where that is what is computed in
    copy: float  # bytes read and bytes written, both counted
    fp8: float | None = None  # operations a second of products in FP8; None: `matmul` stands for them, too


class Op(NamedTuple):
    """One operator of a pass, for one image or draw.

    Attributes:
        forward, backward: operations.
        forward_bytes, backward_bytes: bytes of activations it must move.
        saved: bytes that autograd keeps for its backward, without what an earlier row has already kept.
        weights: elements it multiplies by, read once a pass for all images.
        trained: whether its backward adds a gradient of the weights.
        block: belongs to a transformer block of the encoder, which activation checkpointing recomputes.
        wide: computes in float32 whatever the compute dtype, so its weights are not cast.
        fp8: all its products are what `train.fp8` computes in FP8.
    """

    name: str
    forward: int = 0
    backward: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0
    saved: int = 0
    weights: int = 0
    trained: bool = True
    block: int | None = None
    wide: bool = False
    fp8: bool = False


@dataclass(frozen=True)
class Part:
    """A part of the step: its operators in the order they run, and how wide its numbers are.

    Attributes:
        name: "tokenize", "decode", "lpips" or "denoise".
        ops: operators; for one image, of "denoise" for one draw of one image.
        recomputes: the encoder's blocks run forward again inside the backward pass.
        width: bytes of a number in the compute dtype.
        fp8: `train.fp8` is on.
    """

    name: str
    ops: tuple[Op, ...]
    recomputes: bool
    width: int
    fp8: bool = False

    @property
    def forward(self) -> int:
        """Operations of the forward pass."""
        return sum(op.forward for op in self.ops)

    @property
    def backward(self) -> int:
        """Operations of the backward pass, without recomputation."""
        return sum(op.backward for op in self.ops)

    @property
    def recomputed(self) -> int:
        """Operations of forward passes that the backward pass repeats; they count for time, not for MFU."""
        return sum(op.forward for op in self.ops if op.block is not None) if self.recomputes else 0

    @property
    def operations(self) -> int:
        """Forward and backward, without recomputation."""
        return self.forward + self.backward

    @property
    def in_fp8(self) -> int:
        """Those of `operations` that run in FP8."""
        return sum(op.forward + op.backward for op in self.ops if op.fp8) if self.fp8 else 0

    @property
    def saved(self) -> int:
        """Bytes of activations that wait for the backward pass, where no activation is recomputed."""
        return sum(op.saved for op in self.ops)

    def forward_bytes(self, images: int) -> int:
        """Bytes that one forward pass on a number of images (draws) must move, weights included."""
        return sum(images * op.forward_bytes + self.width * op.weights for op in self.ops)

    def backward_bytes(self, images: int) -> int:
        """Bytes that one backward pass must move: a gradient of a weight is read and written in float32."""
        return sum(images * op.backward_bytes + self._weight_bytes(op) for op in self.ops)

    def floor(self, images: float, rates: Rates) -> tuple[float, float]:
        """Seconds that forward and backward take at least: every operator at the slower of its two limits.

        Args:
            images: of one pass (images times draws in "denoise"; of packed molecules 1 times draws).
            rates: of the device.
        """
        forward = backward = 0.0
        for op in self.ops:
            rate = rates.fp8 if self.fp8 and op.fp8 and rates.fp8 is not None else rates.matmul
            once = max(
                images * op.forward / rate,
                (images * op.forward_bytes + self.width * op.weights) / rates.copy,
            )
            forward += once
            backward += max(
                images * op.backward / rate,
                (images * op.backward_bytes + self._weight_bytes(op)) / rates.copy,
            )
            if self.recomputes and op.block is not None:
                backward += once
        return forward, backward

    def _weight_bytes(self, op: Op) -> int:
        return op.weights * (self.width + (8 if op.trained else 0))


def step_parts(
    model: ModelConfig,
    objective: ObjectiveConfig,
    *,
    dtype: Dtype = "bf16",
    device: Literal["cuda", "cpu"] = "cuda",
    fp8: bool = False,
    whole_last_block: bool = False,
) -> dict[str, Part]:
    """The parts of a training step by name: tokenize, decode, lpips (where it has a weight), denoise.

    Args:
        model, objective: sizes and losses.
        dtype: what matrix products compute in.
        device: whose autocast rules apply: on CUDA the decoder's LayerNorms read and write float32.
        fp8: `train.fp8`.
        whole_last_block: the encoder's last block carries all its tokens to the end, as the published code does and as
            the project's floors are counted, in place of the registers that are read.
    """
    width = DTYPE_BYTES[dtype]
    sizes = _Sizes(model, width, 4 if device == "cuda" else width, whole_last_block)
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
            name, tuple(parts[name]), model.checkpoint_activations and name in ("tokenize", "denoise"), width, fp8
        )
        for name in order
    }  # fmt: skip


def image_operations(
    model: ModelConfig,
    objective: ObjectiveConfig,
    *,
    whole_last_block: bool = False,
    recomputed: bool = False,
) -> int:
    """Operations of one image in one training step: tokenize, decode, LPIPS and S draws, forward and backward.

    The optimizer is not in it: its cost does not grow with the batch. `recomputed` adds what activation checkpointing
    repeats; model FLOP/s utilisation (MFU) is defined without it.
    """
    parts = step_parts(model, objective, whole_last_block=whole_last_block)
    return sum(
        (part.operations + (part.recomputed if recomputed else 0)) * repeats(name, objective)
        for name, part in parts.items()
    )


def repeats(part: str, objective: ObjectiveConfig) -> int:
    """How often a part is computed for one image in one step."""
    return objective.flow_draws if part == "denoise" else 1


class _Sizes(NamedTuple):
    model: ModelConfig
    width: int  # bytes of a number in the compute dtype
    norm_width: int  # bytes of a number in the decoder's LayerNorms
    whole_last_block: bool


def linear_op(
    name: str, rows: int, inputs: int, outputs: int, width: int, *, input_grad: bool = True, saves: bool = True,
    block: int | None = None,
) -> Op:  # fmt: skip
    """[rows, inputs] -> [rows, outputs]; `saves` where nobody before has kept the input.

    Its name is that of the Linear with a space for an underscore; outside the blocks none is called as one of theirs.
    """
    product = 2 * rows * inputs * outputs
    return Op(
        name,
        forward=product,
        backward=product * (1 + input_grad),
        forward_bytes=width * rows * (inputs + outputs),
        backward_bytes=width * rows * (outputs + inputs + input_grad * (outputs + inputs)),
        saved=width * rows * inputs if saves else 0,
        weights=inputs * outputs,
        block=block,
        wide=width == DTYPE_BYTES["fp32"],
        fp8=takes(name.replace(" ", "_"), inputs, outputs),
    )


def moves_op(
    name: str, elements: int, width: int, *, forward: float, backward: float, saved: float = 0, block: int | None = None
) -> Op:
    """An operator that only moves bytes: tensors of `elements` numbers read and written, and kept."""
    size = elements * width
    return Op(
        name, forward_bytes=round(forward * size), backward_bytes=round(backward * size), saved=round(saved * size),
        block=block,
    )  # fmt: skip


def attention_op(
    tokens: int, channels: int, heads: int, width: int, block: int | None = None, pairs: int | None = None
) -> Op:
    """q kᵀ and p v; fused: no [N, N] matrix in memory. Keeps packed q, k, v, the output, and a float32 a row.

    `pairs` of tokens attend to each other, all N² of them if None.
    """
    product = 4 * (tokens * tokens if pairs is None else pairs) * channels
    return Op(
        "attention",
        forward=product,
        backward=2 * product,
        forward_bytes=width * tokens * channels * 4,
        backward_bytes=width * tokens * channels * 8,
        saved=width * tokens * channels * 4 + 4 * heads * tokens,
        block=block,
    )


def _encoder(sizes: _Sizes, objective: ObjectiveConfig, *, tokenize: bool) -> list[Op]:
    """The Generative Encoder (UNITE, arXiv 2603.22283), fused as unite_kernels computes it."""
    model, width = sizes.model, sizes.width
    channels, depth = model.width, model.depth
    hidden = int(2 / 3 * 4 * channels)
    tokens = model.registers + (model.patches if tokenize else 0)
    ops = [
        linear_op("time lift", 1, TIME_FEATURES, channels, 4, input_grad=False),
        linear_op("time project", 1, channels, channels, 4),
        *(
            linear_op("modulation", 1, channels, 6 * channels, width)._replace(saved=7 * channels * width)
            for _ in range(depth)
        ),
        linear_op("modulation", 1, channels, 2 * channels, width)._replace(saved=3 * channels * width),
    ]
    if tokenize:
        pixels = model.patch_size**2 * 3
        ops.append(linear_op("patches", model.patches, pixels, channels, width, input_grad=False))
    reads_gradient = not tokenize and not objective.stop_gradient
    ops += [
        linear_op("registers", model.registers, model.latent_dim, channels, width, input_grad=reads_gradient),
        moves_op("positions", model.registers * channels, width, forward=2, backward=1),
    ]
    if tokenize:
        ops.append(moves_op("join patches", tokens * channels, width, forward=2, backward=2))
    with_context = model.context_start if model.context_len else None
    if with_context == 0:
        tokens += model.context_len
        ops.append(moves_op("join context", tokens * channels, width, forward=2, backward=2))
    ops.append(moves_op("opening norm", tokens * channels, width, forward=2, backward=3, saved=1))
    for index in range(depth):
        last = index + 1 == depth
        kept = model.registers if last and not sizes.whole_last_block else tokens
        ops += block_ops(index, tokens, kept, channels, model.heads, hidden, width)
        if index + 1 == with_context:
            joined, context = (tokens + model.context_len) * channels, model.context_len * channels
            ops.append(moves_op("context norm", context, width, forward=2, backward=3, saved=1, block=index))
            # x and h are both joined; what was h before is not kept, the joined h is what qkv reads.
            ops.append(moves_op("join context", joined, width, forward=4, backward=4, block=index))
            tokens += model.context_len
    ops.append(linear_op("final", kept, channels, model.latent_dim, width))
    return ops


def block_ops(
    index: int, tokens: int, kept: int, channels: int, heads: int, hidden: int, width: int, pairs: int | None = None
) -> list[Op]:
    """An encoder block on `tokens`, of which the `kept` ones go on behind attention; `pairs` as in `attention_op`."""
    size, kept_size = tokens * channels, kept * channels
    ops = [
        linear_op("qkv", tokens, channels, 3 * channels, width, block=index),
        moves_op("q/k norm, rotary", 3 * size, width, forward=2, backward=3, saved=1, block=index),
        attention_op(tokens, channels, heads, width, index, pairs),
    ]
    if kept != tokens:
        ops.append(moves_op("keep registers", kept_size, width, forward=4, backward=4, saved=1, block=index))
    return ops + [
        linear_op("attention out", kept, channels, channels, width, saves=False, block=index),
        moves_op("gate, norm, modulate", kept_size, width, forward=4, backward=6, saved=2, block=index),
        linear_op("mlp in", kept, channels, 2 * hidden, width, block=index),
        moves_op("SwiGLU", kept * hidden, width, forward=3, backward=5, saved=2, block=index),
        linear_op("mlp out", kept, hidden, channels, width, block=index),
        moves_op("gate, norm, norm, modulate", kept_size, width, forward=4, backward=6, saved=1, block=index),
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
    model, width = sizes.model, sizes.width
    decoder = model.decoder
    channels = decoder.width
    queries = model.patches if model.registers != model.patches else 0
    tokens = 1 + model.registers + queries
    size = tokens * channels

    def norm(rows: int, held_rows: int) -> Op:
        # Keeps its input as wide as it reads it, and two float32 a row.
        kept = held_rows * channels * sizes.norm_width + 8 * rows
        return moves_op("norm", rows * channels, width, forward=2, backward=3)._replace(saved=kept)

    ops = [
        linear_op("lift", model.registers, model.latent_dim, decoder.inner, width),
        linear_op("embed", model.registers, decoder.inner, channels, width),
        moves_op("token, positions", size, width, forward=4, backward=2),
    ]
    for index in range(decoder.depth):
        # With queries the last block goes on with the patches alone once attention has read the registers.
        last = index + 1 == decoder.depth
        kept = queries if queries and last else tokens
        kept_size = kept * channels
        ops += [
            norm(tokens, tokens),
            linear_op("qkv", tokens, channels, 3 * channels, width),
            attention_op(tokens, channels, decoder.heads, width),
            # A part of what attention has kept is a tensor of its own.
            linear_op("attention out", kept, channels, channels, width, saves=kept != tokens),
            moves_op("add", kept_size, width, forward=3, backward=2),
            norm(kept, kept),
            linear_op("mlp in", kept, channels, 4 * channels, width),
            moves_op("GELU", 4 * kept_size, width, forward=2, backward=3, saved=1),
            linear_op("mlp out", kept, 4 * channels, channels, width),
            moves_op("add", kept_size, width, forward=3, backward=2),
        ]
    pixels = model.patch_size**2 * 3
    image = model.image_size**2 * 3
    return ops + [
        # A float32 norm reads a copy of the patches' rows; others keep the whole sequence that the rows are a view of.
        norm(model.patches, model.patches if sizes.norm_width != width or queries else tokens),
        linear_op("pixels", model.patches, channels, pixels, width),
        Op(
            "unpatchify, L1", forward_bytes=(2 * width + 4) * image, backward_bytes=(3 * width + 4) * image,
            saved=(width + 4) * image,  # the reconstruction and the float32 target
        ),
    ]


def _lpips(sizes: _Sizes, dropout: bool) -> list[Op]:
    """VGG16 forward on target and reconstruction, backward to the reconstruction alone; weights are frozen."""
    width, side = sizes.width, sizes.model.image_size
    ops = []
    inputs = 3
    for stage, channels in enumerate(VGG):
        if stage:
            pooled = (side // 2) ** 2 * inputs
            side //= 2
            # Reads four numbers and writes one, twice; the reconstruction's keeps its output and int64 positions.
            ops.append(
                Op(
                    "pool", forward_bytes=2 * (5 * width + 8) * pooled, backward_bytes=(5 * width + 8) * pooled,
                    saved=(width + 8) * pooled,
                )
            )  # fmt: skip
        pixels = side * side
        for position, outputs in enumerate(channels):
            product = 2 * 9 * pixels * inputs * outputs
            first = not stage and not position
            ops.append(
                Op(
                    "convolution", forward=2 * product, backward=product,
                    forward_bytes=2 * width * pixels * (inputs + outputs),
                    backward_bytes=width * pixels * (inputs + outputs),
                    saved=width * pixels * inputs if first else 0,  # others read what ReLU or pool has kept
                    weights=9 * inputs * outputs, trained=False,
                )
            )  # fmt: skip
            ops.append(
                Op(
                    "ReLU", forward_bytes=4 * width * pixels * outputs, backward_bytes=3 * width * pixels * outputs,
                    saved=width * pixels * outputs,
                )
            )  # fmt: skip
            inputs = outputs
        product = 2 * pixels * inputs if dropout else 0  # the 1×1 layer as a product of its own behind the dropout
        distance = moves_op("distance", pixels * inputs, width, forward=2, backward=3, saved=1)
        ops.append(distance._replace(forward=product, backward=product))
    return ops

"""The rows that a training step is counted in: operators, and the parts that they make up.

A multiply-add counts as two operations, and only matrix products, attention and convolutions count; a backward pass
costs one more product for each gradient that is really taken (Linears that read data take none for their input).
Bytes are what an operator must move: every input read once, every output written once, at the width it is stored in.
Under `train.fp8` the products that it takes count at the FP8 rate and read eight bits, and before them an input or a
gradient is read twice and written twice, once along either of its sides (kernels/fp8.py). What a Linear keeps is in
eight bits. Casts of weights, made once a micro-batch (model/casts.py), belong to no pass and count in none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from unite_fast.engine.fp8 import takes

DTYPE_BYTES = {"bf16": 2, "fp32": 4}
Dtype = Literal["bf16", "fp32"]


class Rates(NamedTuple):
    """What a device reaches: operations a second of large matrix products, bytes a second of a large copy."""

    matmul: float  # in bfloat16, or in float32 where that is what is computed in
    copy: float  # bytes read and bytes written, both counted
    fp8: float | None = None  # operations a second of products in FP8; None: `matmul` stands for them, too


class Eight(NamedTuple):
    """What a Linear moves and keeps under `train.fp8` in place of its `Op`'s bytes, for one image.

    Attributes:
        forward, backward: by its products.
        forward_casts, backward_casts: by what makes their operands: its input, and the gradient of its output.
        saved: its input, whoever else keeps that in another dtype.
    """

    forward: int
    backward: int
    forward_casts: int
    backward_casts: int
    saved: int


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
        fp8: where `train.fp8` computes its products in FP8, what they move then.
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
    fp8: Eight | None = None


@dataclass(frozen=True)
class Part:
    """A part of the step: its operators in the order they run, and how wide its numbers are.

    Attributes:
        name: "tokenize", "decode", "lpips" or "denoise".
        ops: operators; for one image, of "denoise" for one draw of one image.
        recomputes: the encoder's blocks run forward again inside the backward pass.
        itemsize: bytes of a number in the compute dtype.
        fp8: `train.fp8` is on.
    """

    name: str
    ops: tuple[Op, ...]
    recomputes: bool
    itemsize: int
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
        return sum(self.kept(op) for op in self.ops)

    def kept(self, op: Op) -> int:
        """What one of them keeps, bytes."""
        return op.fp8.saved if self.fp8 and op.fp8 else op.saved

    def forward_bytes(self, images: int) -> int:
        """Bytes that one forward pass on a number of images (draws) must move, weights included."""
        return sum(products + casts for products, casts in (self._forward(op, images, self.fp8) for op in self.ops))

    def backward_bytes(self, images: int) -> int:
        """Bytes that one backward pass must move: a gradient of a weight is read and written in float32."""
        return sum(products + casts for products, casts in (self._backward(op, images, self.fp8) for op in self.ops))

    def floor(self, images: float, rates: Rates) -> tuple[float, float]:
        """Seconds that forward and backward take at least: every operator at the slower of its two limits.

        Args:
            images: of one pass (images times draws in "denoise"; of packed molecules 1 times draws).
            rates: of the device.
        """
        forward = backward = 0.0
        for op in self.ops:
            fp8 = self.fp8 and rates.fp8 is not None
            rate = rates.fp8 if fp8 and op.fp8 else rates.matmul
            moved, casts = self._forward(op, images, fp8)
            once = max(images * op.forward / rate, moved / rates.copy) + casts / rates.copy
            forward += once
            moved, casts = self._backward(op, images, fp8)
            backward += max(images * op.backward / rate, moved / rates.copy) + casts / rates.copy
            if self.recomputes and op.block is not None:
                backward += once
        return forward, backward

    def _forward(self, op: Op, images: float, fp8: bool) -> tuple[float, float]:
        """Bytes that an operator moves in one forward pass, and those of casts to eight bits before it."""
        if not (fp8 and op.fp8):
            return images * op.forward_bytes + self.itemsize * op.weights, 0.0
        return images * op.fp8.forward + op.weights, images * op.fp8.forward_casts

    def _backward(self, op: Op, images: float, fp8: bool) -> tuple[float, float]:
        """Those of its backward pass; a gradient of a weight is read and written in float32."""
        summed = 2 * DTYPE_BYTES["fp32"] * op.weights if op.trained else 0
        if not (fp8 and op.fp8):
            return images * op.backward_bytes + self.itemsize * op.weights + summed, 0.0
        return images * op.fp8.backward + op.weights + summed, images * op.fp8.backward_casts


def linear_op(
    name: str, rows: int, inputs: int, outputs: int, itemsize: int, *, input_grad: bool = True, saves: bool = True,
    block: int | None = None,
) -> Op:  # fmt: skip
    """[rows, inputs] -> [rows, outputs]; `saves` where nobody before has kept the input.

    Its name is that of the Linear with a space for an underscore; outside the blocks none is called as one of theirs.
    """
    product = 2 * rows * inputs * outputs
    casts = 2 * itemsize + 2  # a number read twice and written twice
    eight = Eight(
        forward=rows * (inputs + itemsize * outputs),
        backward=rows * (outputs + inputs + input_grad * (outputs + itemsize * inputs)),
        forward_casts=casts * rows * inputs,
        backward_casts=casts * rows * outputs,
        saved=rows * inputs,
    )
    return Op(
        name,
        forward=product,
        backward=product * (1 + input_grad),
        forward_bytes=itemsize * rows * (inputs + outputs),
        backward_bytes=itemsize * rows * (outputs + inputs + input_grad * (outputs + inputs)),
        saved=itemsize * rows * inputs if saves else 0,
        weights=inputs * outputs,
        block=block,
        wide=itemsize == DTYPE_BYTES["fp32"],
        fp8=eight if takes(name.replace(" ", "_"), inputs, outputs) else None,
    )


def moves_op(
    name: str, elements: int, itemsize: int, *, forward: float, backward: float, saved: float = 0,
    block: int | None = None,
) -> Op:  # fmt: skip
    """An operator that only moves bytes: tensors of `elements` numbers read and written, and kept."""
    size = elements * itemsize
    return Op(
        name, forward_bytes=round(forward * size), backward_bytes=round(backward * size), saved=round(saved * size),
        block=block,
    )  # fmt: skip


def attention_op(
    tokens: int, channels: int, heads: int, itemsize: int, block: int | None = None, pairs: int | None = None
) -> Op:
    """q kᵀ and p v; fused: no [N, N] matrix in memory. Keeps packed q, k, v, the output, and a float32 a row.

    `pairs` of tokens attend to each other, all N² of them if None.
    """
    product = 4 * (tokens * tokens if pairs is None else pairs) * channels
    return Op(
        "attention",
        forward=product,
        backward=2 * product,
        forward_bytes=itemsize * tokens * channels * 4,
        backward_bytes=itemsize * tokens * channels * 8,
        saved=itemsize * tokens * channels * 4 + 4 * heads * tokens,
        block=block,
    )

"""Memory of one rank in a training step, predicted from the configuration.

Activations are what autograd keeps of the larger of the two passes (tests hold this to what it really keeps, within
1 %); the rest follows from what the engine allocates under each ZeRO stage. All numbers are bytes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple

from unite_fast.analysis.extent import Extent
from unite_fast.analysis.parts import DTYPE_BYTES, Dtype, Part
from unite_fast.analysis.update import (
    FP32,
    Weights,
    flat_slices,
    gathered_weights,
    slice_elements,
    trained_weights,
    window_elements,
)
from unite_fast.config import Config
from unite_fast.engine.deepspeed_backend import BUCKET_ELEMENTS
from unite_fast.engine.optim import BATCH_ELEMENTS
from unite_fast.engine.reduction import IN_FLIGHT
from unite_fast.modality import modality_of

# Elements that DeepSpeed's ZeRO 3 keeps gathered at most, its default.
LIVE_ELEMENTS = 10**9
EIGHT_BIT_WEIGHT = 2  # bytes an element under train.fp8, which keeps a weight along its rows and along its columns
# Working tensors of the largest operators beside what autograd keeps, as a share of it. Traced: 0.2 to 2.4 % with the
# presets, 0.7 to 8 % with two to four blocks, the most where the draws are the peak. LPIPS's are counted where they are
# more, as on small images.
WORKING_SHARE = 0.03


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        weights: float32 parameters, the float32 slice of them that ZeRO's optimizer steps, and what ZeRO 3 gathers.
        gradients: float32, whole under every stage until the step's last backward reduces them.
        later: those of them that come after the passes' worst moment, see `predict`.
        optimizer: momentum and moments.
        ema: averaged weights.
        frozen: weights that are not trained, LPIPS's network.
        buffers: what gradients are reduced through and ZeRO's slice of the mean, alive from the last backward on.
        casts, activations: weights in the dtype of products, and what waits for the backward, at the passes' worst
            moment.
        last: casts and activations of the last backward of a step, with which the buffers are alive.
        update: working tensors of the optimizer, or what the updated weights come in behind it.
    """

    weights: int
    gradients: int
    later: int
    optimizer: int
    ema: int
    frozen: int
    buffers: int
    casts: int
    activations: int
    last: int
    update: int

    @property
    def state(self) -> int:
        """What is there whatever the micro-batch, gradients included."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.frozen

    @property
    def peak(self) -> int:
        """The most that is allocated at one moment: in a pass, in the last backward, or in the update."""
        return self.state + max(self.passes - self.later, self.last + self.buffers, self.update)

    @property
    def passes(self) -> int:
        """What a micro-batch needs beside the state at its worst moment."""
        return self.casts + self.activations


def predict(
    config: Config,
    *,
    extent: Extent,
    ranks: int = 1,
    stage: int | None = None,
    dtype: Dtype = "bf16",
    device: Literal["cuda", "cpu"] = "cuda",
    single: bool = False,
) -> Memory:
    """Memory of one rank with the fused operators (train.kernels = triton).

    The update drops the gradients, and the first backward that reaches a parameter makes its gradient. So the
    reconstruction of a step's first micro-batch has all activations and no gradients, that of a later one both.

    Args:
        config: the run, with a number of draws a chunk; its batch keys are not read.
        extent: of a micro-batch.
        ranks: that share sharded state.
        stage: ZeRO stage; the configuration's if None.
        dtype: what matrix products compute in.
        device: see `Modality.counted`.
        single: a step is one micro-batch; not so where the trainer tries what fits, after a try that left gradients.
    """
    stage = config.train.zero_stage if stage is None else stage
    weights = trained_weights(config.model, config.optimizer.kind)
    counted = modality_of(config).counted(config, extent, dtype=dtype, device=device)
    parts = {name: part for name, (part, _) in counted.items()}
    total, muon = weights.total, weights.muon
    sharded = stage > 0
    held = total
    if sharded:
        held = sum(flat_slices(weights, ranks))
        muon = held - slice_elements(weights.adamw, ranks)
    moments = muon + 2 * (held - muon)
    # Under ZeRO 3 DeepSpeed keeps a buffer of gradients from step to step.
    backward, last = _backward(config, counted, weights, fresh=single and stage < 3)
    # ZeRO 1 and 2: whole weights and a slice to step; ZeRO 3: its piece, the same to step, and what it has gathered.
    slices = {0: 0, 1: held, 2: held, 3: 2 * held}[stage]
    whole = total if stage < 3 else min(total, LIVE_ELEMENTS)
    arriving = _arriving(config, ranks, device) if stage in (1, 2) else 0
    return Memory(
        weights=FP32 * (whole + slices),
        gradients=FP32 * total,
        later=FP32 * total - backward.gradients,
        optimizer=FP32 * moments,
        ema=FP32 * held * (1 + len(config.optimizer.ema_decays)),
        frozen=sum(part.itemsize * op.weights for part in parts.values() for op in part.ops if not op.trained),
        buffers=FP32 * _buffers(weights, held, ranks, stage),
        casts=backward.casts,
        activations=round(backward.activations * (1 + WORKING_SHARE)),
        last=round((last.casts + last.activations) * (1 + WORKING_SHARE)),
        update=max(_update_bytes(weights, muon, dtype, sharded), arriving),
    )


class _Moment(NamedTuple):
    """What is alive at a moment of the passes, of gradients those that have come by then; bytes."""

    activations: int
    casts: int
    gradients: int


def _backward(
    config: Config, counted: dict[str, tuple[Part, int]], weights: Weights, *, fresh: bool
) -> tuple[_Moment, _Moment]:
    """(the worst moment of a micro-batch, the start of its last backward); `fresh` where no gradients are there before.

    Activations leave in a backward while gradients come, so the worst is where the backward of a part begins.
    """
    parts = {name: part for name, (part, _) in counted.items()}
    runs = {name: config.objective.chunk if name == "denoise" else 1 for name in parts}
    kept = {name: pass_activations(part) * times * runs[name] for name, (part, times) in counted.items()}
    casts = {name: _casts(part) for name, part in parts.items()}
    whole, decoder = FP32 * weights.total, FP32 * sum(op.weights for op in parts["decode"].ops)
    rest = sum(size for name, size in kept.items() if name not in ("tokenize", "denoise"))
    # A recomputed block comes back when the decoder's activations are gone.
    block = recomputed_activations(parts["tokenize"]) * counted["tokenize"][1]
    # Pass one's casts of trained weights stay for the flow (`unite_fast/model/casts.py`).
    read = sum(size for name, size in casts.items() if name != "denoise")
    own = 0 if config.model.shared else casts["denoise"]
    first = _Moment(kept["tokenize"] + rest - min(rest, block), read, 0)
    flow = _Moment(kept["denoise"], read + own, whole)
    both = _Moment(first.activations + flow.activations, first.casts + own, 0)
    if "lpips" in counted:  # which may need more than the share that stands for all operators' working tensors
        more = perceptual_working(*counted["lpips"]) - WORKING_SHARE * first.activations
        first = first._replace(activations=first.activations + round(max(0.0, more)))
    if config.objective.stop_gradient:
        encoder = _Moment(kept["tokenize"], read, decoder)
        recomputed = _Moment(block, read, FP32 * sum(weights.reconstruct))
        found, last = [first, encoder, recomputed, flow], flow
    else:  # the first pass's graph waits for the gradient that the second sends into it
        several = config.objective.chunk < config.objective.flow_draws
        found, last = [both._replace(gradients=FP32 * sum(weights.flow) if several else 0), first], first
    if not fresh:
        found = [moment._replace(gradients=whole) for moment in found]
    return max(found, key=sum), last


def _buffers(weights: Weights, held: int, ranks: int, stage: int) -> int:
    """Elements that gradients are reduced through, and of the slice that comes out, which is all that a rank holds."""
    if stage == 3:
        return min(BUCKET_ELEMENTS, weights.total) + held
    if stage == 0 and ranks == 1:
        return 0
    windows = window_elements(weights, ranks, stage)
    return min(IN_FLIGHT, len(windows)) * max(windows) + (held if stage else 0)


def pass_activations(part: Part) -> int:
    """Bytes that what a part counts keeps for its backward, under activation checkpointing if it is on.

    Then a block keeps its two inputs alone, and the largest block's activations come back one at a time.
    """
    if not part.recomputes:
        return part.saved
    outside = sum(op.saved for op in part.ops if op.block is None)
    # The row of qkv keeps h, [N, C]; the residual stream beside it has the same size.
    inputs = sum(2 * op.saved for op in part.ops if op.name == "qkv" and op.block is not None)
    return outside + inputs + recomputed_activations(part)


def perceptual_working(part: Part, images: int) -> int:
    """Bytes that LPIPS's backward uses beside what its operators keep, while the rest of pass one waits.

    The gradient of the largest map, and the largest convolution's weights, which oneDNN lays out anew from a few images
    on: 9.4 MB in float32.
    """
    return images * max(op.saved for op in part.ops) + part.itemsize * max(op.weights for op in part.ops)


def recomputed_activations(part: Part) -> int:
    """Bytes of them that come back in the backward pass alone: the largest block's, 0 without checkpointing.

    With `train.fp8` as many as without: where the most is alive, in SwiGLU's backward, its gradients stand in the place
    of what would be smaller (traced steps differ by 0.5 %).
    """
    if not part.recomputes:
        return 0
    blocks: dict[int, int] = {}
    for op in part.ops:
        if op.block is not None:
            blocks[op.block] = blocks.get(op.block, 0) + op.saved
    return max(blocks.values())


def _casts(part: Part) -> int:
    """Trained weights in bfloat16, and under `train.fp8` in eight bits along either side, kept for the micro-batch.

    Those of time embedding and atoms' heads stay float32.
    """
    eight = sum(EIGHT_BIT_WEIGHT * op.weights for op in part.ops if part.fp8 and op.fp8)
    if part.itemsize == DTYPE_BYTES["fp32"]:
        return eight
    rest = (op.weights for op in part.ops if op.trained and not (op.wide or part.fp8 and op.fp8))
    return eight + part.itemsize * sum(rest)


def _arriving(config: Config, ranks: int, device: Literal["cuda", "cpu"]) -> int:
    """What updated weights arrive in under ZeRO 1 and 2 that are not received in place, as float32 ones are."""
    carried = [gathered.collective for gathered in gathered_weights(config, ranks=ranks, device=device)]
    return sum(c.itemsize * c.elements for c in carried if c.kind == "all_reduce" or c.itemsize != FP32)


def _update_bytes(weights: Weights, muon: int, dtype: Dtype, sharded: bool) -> int:
    """A rank's matrices before Newton-Schulz, in whose place the results come, and inside it three tensors of a batch.

    A slice of ZeRO 1 and 2 is there besides, before and after. A batch is all matrices of one shape, BATCH_ELEMENTS at
    most.
    """
    if not weights.matrices:
        return 0
    together = max(min(rows * columns * count, max(BATCH_ELEMENTS, rows * columns))
                   for (rows, columns), count in Counter(weights.matrices).items())  # fmt: skip
    return ((3 if sharded else 1) * muon + 3 * min(muon, together)) * DTYPE_BYTES[dtype]

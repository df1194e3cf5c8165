"""Memory of one rank in a training step, predicted from the configuration.

Activations are what autograd keeps of the larger of the two passes (tests hold this to what it really keeps, within
1 %); the rest follows from what the engine allocates under each ZeRO stage. All numbers are bytes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from unite_fast.analysis.counts import DTYPE_BYTES, Dtype, Part
from unite_fast.analysis.extent import Extent
from unite_fast.analysis.update import FP32, Weights, flat_slices, slice_elements, trained_weights, window_elements
from unite_fast.config import Config
from unite_fast.engine.deepspeed_backend import BUCKET_ELEMENTS
from unite_fast.engine.optim import BATCH_ELEMENTS
from unite_fast.engine.reduction import IN_FLIGHT
from unite_fast.modality import modality_of

# Elements that DeepSpeed's ZeRO 3 keeps gathered at most, its default.
LIVE_ELEMENTS = 10**9
# Working tensors of the largest operators beside what autograd keeps, as a share of it.
WORKING_SHARE = 0.03


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        weights: float32 parameters, the float32 slice of them that ZeRO's optimizer steps, and what ZeRO 3 gathers.
        gradients: float32, whole under every stage until the step's last backward reduces them.
        optimizer: momentum and moments.
        ema: averaged weights.
        frozen: weights that are not trained, LPIPS's network.
        buffers: what gradients are reduced through and ZeRO's slice of the mean, alive from the last backward on.
        casts: weights in the compute dtype, alive during a pass.
        activations: of one micro-batch.
        last: casts and activations of the last backward of a step, with which the buffers are alive.
        update: working tensors of the optimizer.
    """

    weights: int
    gradients: int
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
        return self.state + max(self.passes, self.last + self.buffers, self.update)

    @property
    def passes(self) -> int:
        """What a micro-batch's larger pass needs beside the state."""
        return self.casts + self.activations


def predict(
    config: Config,
    *,
    extent: Extent,
    ranks: int = 1,
    stage: int | None = None,
    dtype: Dtype = "bf16",
    device: Literal["cuda", "cpu"] = "cuda",
) -> Memory:
    """Memory of one rank with the fused operators (train.kernels = triton).

    Args:
        config: the run, with a number of draws a chunk; its batch keys are not read.
        extent: of a micro-batch.
        ranks: that share sharded state.
        stage: ZeRO stage; the configuration's if None.
        dtype: what matrix products compute in.
        device: see `Modality.counted`.
    """
    stage = config.train.zero_stage if stage is None else stage
    weights = trained_weights(config.model, config.optimizer.kind)
    counted = modality_of(config).counted(config, extent, dtype=dtype, device=device)
    parts = {name: part for name, (part, _) in counted.items()}
    kept = {name: pass_activations(part) * times for name, (part, times) in counted.items()}
    total, muon = weights.total, weights.muon
    sharded = stage > 0
    held = total
    if sharded:
        held = sum(flat_slices(weights, ranks))
        muon = held - (slice_elements(weights.adamw, ranks) if weights.adamw else 0)
    moments = muon + 2 * (held - muon)
    casts = {name: _casts(part) for name, part in parts.items()} if dtype == "bf16" else dict.fromkeys(parts, 0)
    flow = kept["denoise"] * config.objective.chunk
    rest = sum(size for name, size in kept.items() if name not in ("tokenize", "denoise"))
    # A recomputed block comes back when the decoder's activations are gone.
    block = recomputed_activations(parts["tokenize"]) * counted["tokenize"][1]
    reconstruction = kept["tokenize"] + rest - min(rest, block)
    reconstruction_casts = sum(size for name, size in casts.items() if name != "denoise")
    if config.objective.stop_gradient:
        last = flow + casts["denoise"]
        activations, cast = max((reconstruction, reconstruction_casts), (flow, casts["denoise"]), key=sum)
    else:  # the first pass's graph waits for the gradient that the second sends into it
        activations, cast = reconstruction + flow, reconstruction_casts + casts["denoise"]
        last = reconstruction + reconstruction_casts
    # ZeRO 1 and 2: whole weights and a slice to step; ZeRO 3: its piece, the same to step, and what it has gathered.
    slices = {0: 0, 1: held, 2: held, 3: 2 * held}[stage]
    whole = total if stage < 3 else min(total, LIVE_ELEMENTS)
    return Memory(
        weights=FP32 * (whole + slices),
        gradients=FP32 * total,
        optimizer=FP32 * moments,
        ema=FP32 * held * (1 + len(config.optimizer.ema_decays)),
        frozen=FP32 * sum(op.weights for part in parts.values() for op in part.ops if not op.trained),
        buffers=FP32 * _buffers(weights, held, ranks, stage),
        casts=cast,
        activations=round(activations * (1 + WORKING_SHARE)),
        last=round(last * (1 + WORKING_SHARE)),
        update=_update_bytes(weights, muon, dtype, sharded),
    )


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


def recomputed_activations(part: Part) -> int:
    """Bytes of them that come back in the backward pass alone: the largest block's, 0 without checkpointing."""
    if not part.recomputes:
        return 0
    blocks: dict[int, int] = {}
    for op in part.ops:
        if op.block is not None:
            blocks[op.block] = blocks.get(op.block, 0) + op.saved
    return max(blocks.values())


def _casts(part: Part) -> int:
    """Weights in bfloat16, kept for the pass; those of the time embedding and of the atoms' heads stay float32."""
    return part.width * sum(op.weights for op in part.ops if not op.wide)


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

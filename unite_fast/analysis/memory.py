"""Memory of one rank in a training step, predicted from the configuration.

Activations are what autograd keeps of the larger of the two passes (tests hold this to what it really keeps, within
1 %); the rest follows from what the engine allocates under each ZeRO stage. All numbers are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unite_fast.analysis.counts import VGG_WEIGHTS, Dtype, Part, step_parts
from unite_fast.analysis.update import FP32, slice_elements, trained_weights
from unite_fast.config import Config
from unite_fast.engine.deepspeed_backend import BUCKET_ELEMENTS
from unite_fast.engine.optim import BATCH_ELEMENTS

# Working tensors of the largest operators beside what autograd keeps, as a share of it.
WORKING_SHARE = 0.03


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        weights: float32 parameters, and the float32 slice of them that ZeRO's optimizer steps.
        gradients: float32, whole under every stage until the step's last backward reduces them.
        optimizer: momentum and moments.
        ema: averaged weights.
        frozen: LPIPS's network.
        buffers: what reduces gradients under ZeRO.
        casts: weights in the compute dtype, alive during a pass.
        activations: of one micro-batch.
        update: working tensors of the optimizer, alive while no activation is.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    frozen: int
    buffers: int
    casts: int
    activations: int
    update: int

    @property
    def state(self) -> int:
        """What stays from step to step, gradients included."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.frozen + self.buffers

    @property
    def peak(self) -> int:
        """The most that is allocated at one moment of a step."""
        return self.state + max(self.casts + self.activations, self.update)


def predict(
    config: Config,
    *,
    micro_batch: int,
    ranks: int = 1,
    stage: int | None = None,
    dtype: Dtype = "bf16",
    device: Literal["cuda", "cpu"] = "cuda",
) -> Memory:
    """Memory of one rank with the fused operators (train.kernels = triton).

    Args:
        config: the run; its batch keys are not read.
        micro_batch: images a rank and backward.
        ranks: that share sharded state.
        stage: ZeRO stage; the configuration's if None.
        dtype: what matrix products compute in.
        device: see `step_parts`.
    """
    stage = config.train.zero_stage if stage is None else stage
    weights = trained_weights(config.model, config.optimizer.kind)
    parts = step_parts(config.model, config.objective, dtype=dtype, device=device)
    total, muon = weights.total, weights.muon
    sharded = stage > 0
    if sharded:
        muon = slice_elements(muon, ranks)
    held = muon + (slice_elements(weights.adamw, ranks) if sharded else weights.adamw)
    moments = muon + 2 * (held - muon)
    casts = {name: _casts(part) for name, part in parts.items()} if dtype == "bf16" else dict.fromkeys(parts, 0)
    chunk = min(config.objective.draws_per_chunk, config.objective.flow_draws)
    flow = pass_activations(parts["denoise"]) * micro_batch * chunk
    reconstruction = sum(pass_activations(part) for name, part in parts.items() if name != "denoise") * micro_batch
    reconstruction_casts = sum(size for name, size in casts.items() if name != "denoise")
    if config.objective.stop_gradient:
        activations, cast = max((reconstruction, reconstruction_casts), (flow, casts["denoise"]), key=sum)
    else:  # the first pass's graph waits for the gradient that the second sends into it
        activations, cast = reconstruction + flow, reconstruction_casts + casts["denoise"]
    return Memory(
        weights=FP32 * (total + (held if sharded else 0)) if stage < 3 else FP32 * 2 * held,
        gradients=FP32 * total,
        optimizer=FP32 * moments,
        ema=FP32 * held,
        frozen=FP32 * VGG_WEIGHTS if config.objective.lpips.weight else 0,
        buffers=FP32 * min(BUCKET_ELEMENTS, total) if sharded else 0,
        casts=cast,
        activations=round(activations * (1 + WORKING_SHARE)),
        update=_update_bytes(weights, muon, held, dtype),
    )


def pass_activations(part: Part) -> int:
    """Bytes that one image (draw) keeps for the backward of a part, under activation checkpointing if it is on.

    Then a block keeps its two inputs alone, and the largest block's activations come back one at a time.
    """
    if not part.recomputes:
        return part.saved
    outside = sum(op.saved for op in part.ops if op.block is None)
    blocks: dict[int, int] = {}
    inputs = 0
    for op in part.ops:
        if op.block is not None:
            blocks[op.block] = blocks.get(op.block, 0) + op.saved
            # The row of qkv keeps h, [N, C]; the residual stream beside it has the same size.
            inputs += 2 * op.saved if op.name == "qkv" else 0
    return outside + inputs + max(blocks.values())


def _casts(part: Part) -> int:
    """Weights in bfloat16, kept for the pass; the time embedding's stay float32."""
    return part.width * sum(op.weights for op in part.ops if not op.name.startswith("time"))


def _update_bytes(weights, muon: int, held: int, dtype: Dtype) -> int:
    """Muon's update of a rank's matrices, and about four tensors of a batch inside Newton-Schulz."""
    if not weights.matrices:
        return 0
    largest = max(rows * columns for rows, columns in weights.matrices)
    batch = min(muon, max(BATCH_ELEMENTS, largest))
    return FP32 * 2 * muon + 4 * batch * (2 if dtype == "bf16" else FP32)

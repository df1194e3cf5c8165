"""How many kernels an optimizer step launches, counted from the configuration, and what that takes the host.

The constants are those that `benchmarks/launches.py` counts of whole steps on an imagined GPU, in bfloat16 under
autocast: differences of steps that differ in one block, one chunk, one micro-batch. A forward and its backward belong
together. Sums of gradients follow from the parameters that each pass reads, and Muon's launches from its batches. The
number of samples changes nothing.

Not counted: what ZeRO and the collectives launch beside the update of one GPU, and the few launches by which other forms
of model and objective differ (without context tokens a step has 3 % fewer, with molecules left in the orientation they
have 4 %, others differ by 1 % at most). Under `train.compile` launches are fewer, and nobody has counted them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from unite_fast.analysis.update import flow_passes, network_of, reads, trained_weights
from unite_fast.config import Config, OptimizerConfig, Sizes
from unite_fast.engine.optim import matrix_batches
from unite_fast.modality import modality_of
from unite_fast.model.blocks import swiglu_hidden
from unite_kernels.dispatch import aligned

# Assumed: what a launch costs the host in eager PyTorch, with all that leads to it, from fast cores to slow ones. Steps
# of B, mol_tiny and qm9_s took a core of a shared Xeon 18 to 35 µs a launch with a driver that launches nothing; a real
# one takes 2 to 3 µs besides.
HOST_SECONDS = (10e-6, 30e-6)
LAUNCH_SECONDS = sum(HOST_SECONDS) / 2  # where one number is needed
RECOMPUTED = 16  # by the forward that activation checkpointing repeats of a block
# Casts of weight and bias: of a block's five Linears, its modulation among them (but of the bias that SwiGLU adds), and
# of three outside the blocks.
BLOCK_CASTS, OTHER_CASTS = 9, 6
# Where SwiGLU's rows are filled up (model/aligned.py): two copies of weights and one of a bias, each with its zeros, in
# every forward, and the bias's gradient cut out; autocast has two weights less to cast.
FILLED, FILLED_BACKWARD, FILLED_CASTS = 6, 1, -2
# Under train.fp8, whose products cast their operands themselves, in every forward: kernels more of an encoder's and a
# decoder's block and of a recomputed forward, casts less to keep; and the same where rows are filled up.
EIGHT, EIGHT_DECODER, EIGHT_RECOMPUTED, EIGHT_CASTS = 25, 24, 20, -7
EIGHT_FILLED, EIGHT_FILLED_CASTS = 4, 2
# multi_tensor_apply (ATen/native/cuda/MultiTensorApply.cuh): elements and tensors of one launch on lists of a weight,
# its gradient and two moments; shorter lists take more tensors.
LIST_ELEMENTS, LIST_TENSORS = 320 * 65536, 36
# By model.latent_norm: what plain PyTorch launches in place of the operators that know LayerNorm alone, in pass one and
# in a chunk of pass two.
LATENT_NORM = {"layer": (0, 0), "rms": (27, 22), "none": (7, 2)}
LPIPS, LPIPS_DROPOUT = 145, 190  # of images; what dropout inside the 1×1 layers launches besides


class PassLaunches(NamedTuple):
    """Kernels of one micro-batch: pass one, and one chunk of pass two; forward and backward, no sums of gradients.

    Attributes:
        reconstruct: with the casts of all weights that the pass reads.
        flow: without those that pass one has made.
        casts: of the weights that a chunk reads, made once for all passes; 0 where every chunk makes them.
    """

    reconstruct: int
    flow: int
    casts: int


def pass_launches(config: Config, *, block: int, decoder_block: int, reconstruct: int, flow: int) -> PassLaunches:
    """Of a network with an encoder and a decoder.

    Args:
        config: the run, whose model has `depth`, `width`, `latent_norm`, `checkpoint_activations`, `decoder.depth`.
        block, decoder_block: kernels of one block, its casts among them.
        reconstruct, flow: those of a pass outside its blocks: draws, embeddings, modulation, losses, casts.
    """
    model, recomputed, block_casts = config.model, RECOMPUTED, BLOCK_CASTS
    hidden = swiglu_hidden(model.width)
    if config.train.fp8:
        block += EIGHT
        decoder_block += EIGHT_DECODER
        recomputed += EIGHT_RECOMPUTED
        block_casts += EIGHT_CASTS
    if aligned(hidden) != hidden:
        block += FILLED + FILLED_BACKWARD + FILLED_CASTS
        recomputed += FILLED
        block_casts += FILLED_CASTS
        if config.train.fp8:
            block += EIGHT_FILLED
            block_casts += EIGHT_FILLED_CASTS
    reconstruct, flow = (sum(pair) for pair in zip((reconstruct, flow), LATENT_NORM[model.latent_norm], strict=True))
    encoder = model.depth * (block + (recomputed if model.checkpoint_activations else 0))
    # Recomputation makes autocast forget its casts, see `two_pass_step`.
    casts = 0 if model.checkpoint_activations else model.depth * block_casts + OTHER_CASTS
    return PassLaunches(reconstruct + encoder + model.decoder.depth * decoder_block, flow + encoder - casts, casts)


def image_launches(config: Config) -> PassLaunches:
    """Kernels of a micro-batch of images."""
    lpips = config.objective.lpips
    perceptual = (LPIPS + (LPIPS_DROPOUT if lpips.dropout else 0)) if lpips.weight else 0
    return pass_launches(config, block=62, decoder_block=49, reconstruct=185 + perceptual, flow=118)


def step_launches(config: Config, accumulation: int) -> int:
    """Kernels that an optimizer step of so many micro-batches launches on one GPU.

    Args:
        config: the run, with a number of draws a chunk.
        accumulation: micro-batches.
    """
    passes, chunks = modality_of(config).launches(config), flow_passes(config)
    # Published checkpoints carry a parameter that no pass reads.
    names = [name for name, _ in network_of(config.model).named_parameters() if not name.endswith("time.special")]
    read = {phase: {name for name in names if reads(config.model, phase, name)} for phase in ("reconstruct", "flow")}
    # The first gradient of a parameter becomes its sum, every other one is added.
    sums = accumulation * (len(read["reconstruct"]) + chunks * len(read["flow"])) - len(names)
    update = update_launches(config.model, config.optimizer)
    casts = 0 if config.model.shared else passes.casts  # pass one has made those of shared weights
    return accumulation * (passes.reconstruct + chunks * passes.flow + casts) + sums + update


def update_launches(model: Sizes, optimizer: OptimizerConfig) -> int:
    """Kernels of clipping, Muon, AdamW and EMA on one GPU without ZeRO, and of the meter's sums."""
    weights = trained_weights(model, optimizer.kind)
    tensors = sum(1 for _ in network_of(model).parameters())
    averages = 1 + len(optimizer.ema_decays)
    # The norm of the gradients and the coefficient of it; the meter adds the losses.
    found = 10 + _on_lists(tensors, weights.total)
    # Scaled gradients, AdamW, each average.
    found += 1 + (2 + averages) * _on_lists(tensors - len(weights.matrices), weights.adamw)
    batches = matrix_batches(weights.matrices)
    for batch in batches:
        rows, columns = weights.matrices[batch[0]]
        # Its norm, three products a step, rows filled up, and the copy that turns or cuts it.
        filled = aligned(columns) != columns
        found += 3 * optimizer.newton_schulz_steps + 3 + 2 * filled + (rows > columns or filled)
    return found + (4 if batches else 0)  # Muon's two sweeps, and a table for each


def _on_lists(tensors: int, elements: int) -> int:
    return max(math.ceil(tensors / LIST_TENSORS), math.ceil(elements / LIST_ELEMENTS))


def host_seconds(config: Config, accumulation: int, launch: float) -> float:
    """Seconds of the host for an optimizer step, of `launch` seconds a kernel; 0 under train.compile: not counted."""
    return 0.0 if config.train.compile else step_launches(config, accumulation) * launch

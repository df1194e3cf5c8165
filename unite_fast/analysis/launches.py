"""How many kernels an optimizer step launches, counted from the configuration, and what that takes the host.

The constants are those that `benchmarks/launches.py` counts of whole steps on an imagined GPU, in bfloat16 under
autocast: differences of steps that differ in one block, one chunk, one micro-batch. A forward and its backward belong
together. Sums of gradients follow from the parameters that each pass reads, and Muon's launches from its batches. The
number of samples changes nothing.

Not counted: what ZeRO and the collectives launch beside the update of one GPU, and the few launches by which other
forms of model and objective differ (without context tokens a step has 2 % fewer, others differ by 1 % at most). Under
`train.compile` launches are fewer, and nobody has counted them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from unite_fast.analysis.update import flow_passes, network_of, reads, trained_weights
from unite_fast.config import Config, OptimizerConfig, Sizes
from unite_fast.engine.fp8 import eligible
from unite_fast.engine.optim import matrix_batches
from unite_fast.modality import modality_of
from unite_fast.model.blocks import swiglu_hidden
from unite_fast.model.casts import CastLinear
from unite_kernels.dispatch import aligned

# Assumed: what a launch costs the host in eager PyTorch, with all that leads to it, from fast cores to slow ones. Steps
# of B, mol_tiny and qm9_s took a core of a shared Xeon 18 to 35 µs a launch with a driver that launches nothing, and
# since then one of a shared EPYC 9005 20 (B) and 21 (qm9_s); a real one takes 2 to 3 µs besides.
HOST_SECONDS = (10e-6, 30e-6)
LAUNCH_SECONDS = sum(HOST_SECONDS) / 2  # where one number is needed
RECOMPUTED = 9  # by the forward that activation checkpointing repeats of a block
# Casts of weights, made once a micro-batch (casts.py): of a block's modulation, of its other Linears, and of three
# Linears outside.
BLOCK_CASTS, OTHER_CASTS = 2, 3
# Where SwiGLU's rows are filled up (model/aligned.py): a bias copied with its zeros in every forward; its gradient and
# two weights' cut out; among the casts two weights and a bias that are not cast with others.
FILLED, FILLED_BACKWARD, FILLED_CASTS = 2, 3, 5
# Under train.fp8, whose products cast their inputs themselves, in every forward: kernels more of an encoder's and a
# decoder's block and of a recomputed forward, and among the casts three for each weight; where rows are filled up, two
# weights' copies.
EIGHT, EIGHT_DECODER, EIGHT_RECOMPUTED, EIGHT_CASTS, EIGHT_FILLED_CASTS = 38, 39, 15, 11, 4
# Under ZeRO 3, whose Linears are DeepSpeed's own: they cast a weight in every forward and in every backward, and its
# gradient, and add the bias by itself. Kernels more, net of the casts that serve elsewhere, of an encoder's and a
# decoder's block, of a recomputed forward, and of pass one and a chunk outside their blocks. Rows are not filled up.
GATHERED, GATHERED_DECODER, GATHERED_RECOMPUTED = 20, 15, 8
GATHERED_RECONSTRUCT, GATHERED_FLOW = 17, 12
# multi_tensor_apply (ATen/native/cuda/MultiTensorApply.cuh): elements of a block, blocks of a launch, and its tensors
# by the number of lists that go together.
BLOCK_ELEMENTS, LIST_BLOCKS, LIST_TENSORS = 65536, 320, {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
UNREAD = "time.special"  # a parameter of published checkpoints that no pass reads
# By model.latent_norm: what plain PyTorch launches in place of the operators that know LayerNorm alone, in pass one and
# in a chunk of pass two.
LATENT_NORM = {"layer": (0, 0), "rms": (27, 22), "none": (7, 2)}
LPIPS, LPIPS_DROPOUT = 119, 190  # of images; what dropout inside the 1×1 layers launches besides


class PassLaunches(NamedTuple):
    """Kernels of one micro-batch: pass one, and one chunk of pass two; forward and backward, no sums of gradients.

    Attributes:
        reconstruct: with the casts of all weights that the pass reads.
        flow: without those that pass one has made.
        casts: of the weights that a chunk reads, made once for all passes.
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
    model, recomputed, block_casts, other_casts = config.model, RECOMPUTED, BLOCK_CASTS, OTHER_CASTS
    gathered = config.train.zero_stage == 3
    filled = not gathered and aligned(swiglu_hidden(model.width)) != swiglu_hidden(model.width)
    if gathered:
        block += GATHERED
        decoder_block += GATHERED_DECODER
        recomputed += GATHERED_RECOMPUTED
        reconstruct += GATHERED_RECONSTRUCT
        flow += GATHERED_FLOW
        block_casts = other_casts = 0
    if config.train.fp8:
        block += EIGHT
        decoder_block += EIGHT_DECODER
        recomputed += EIGHT_RECOMPUTED
        block_casts += EIGHT_CASTS
    if filled:
        filled_casts = EIGHT_FILLED_CASTS if config.train.fp8 else FILLED_CASTS
        block += FILLED + FILLED_BACKWARD + filled_casts
        recomputed += FILLED
        block_casts += filled_casts
    reconstruct, flow = (sum(pair) for pair in zip((reconstruct, flow), LATENT_NORM[model.latent_norm], strict=True))
    encoder = model.depth * (block + (recomputed if model.checkpoint_activations else 0))
    casts = model.depth * block_casts + other_casts
    return PassLaunches(reconstruct + encoder + model.decoder.depth * decoder_block, flow + encoder - casts, casts)


def image_launches(config: Config) -> PassLaunches:
    """Kernels of a micro-batch of images."""
    lpips = config.objective.lpips
    perceptual = (LPIPS + (LPIPS_DROPOUT if lpips.dropout else 0)) if lpips.weight else 0
    return pass_launches(config, block=40, decoder_block=28, reconstruct=164 + perceptual, flow=105)


def step_launches(config: Config, accumulation: int) -> int:
    """Kernels that an optimizer step of so many micro-batches launches on one GPU.

    Args:
        config: the run, with a number of draws a chunk.
        accumulation: micro-batches.
    """
    passes, chunks = modality_of(config).launches(config), flow_passes(config)
    names = {name for name, _ in network_of(config.model).named_parameters() if not name.endswith(UNREAD)}
    names -= summed_in_products(config)
    read = {phase: {name for name in names if reads(config.model, phase, name)} for phase in ("reconstruct", "flow")}
    # The first gradient of a parameter becomes its sum, every other one is added.
    sums = accumulation * (len(read["reconstruct"]) + chunks * len(read["flow"])) - len(names)
    update = update_launches(config.model, config.optimizer)
    casts = 0 if config.model.shared else passes.casts  # pass one has made those of shared weights
    return accumulation * (passes.reconstruct + chunks * passes.flow + casts) + sums + update


def summed_in_products(config: Config) -> set[str]:
    """Names of the weights whose gradients' products add to the sum (`unite_fast/model/casts.py`); none by ZeRO 3."""
    if config.train.zero_stage == 3:
        return set()
    network = network_of(config.model)
    linears = {name for name, module in network.named_modules() if isinstance(module, CastLinear)}
    if config.train.fp8:
        linears = {name for name in linears if not eligible(name, network.get_submodule(name))}
    return {f"{name}.weight" for name in linears} - network.float32_matrices()


def update_launches(model: Sizes, optimizer: OptimizerConfig) -> int:
    """Kernels of clipping, Muon, AdamW and EMA on one GPU without ZeRO, and of the meter's sums."""
    network, matrices = network_of(model), trained_weights(model, optimizer.kind).matrices
    muon = network.matrix_parameters() if optimizer.kind == "muon" else set()
    sizes = {name: p.numel() for name, p in network.named_parameters() if not name.endswith(UNREAD)}
    rest = [size for name, size in sizes.items() if name not in muon]
    averages = 1 + len(optimizer.ema_decays)
    # The norm of the gradients and the coefficient of it; the meter adds the losses.
    found = 10 + list_launches(list(sizes.values()), 2)
    # Scaled gradients, AdamW with its counters, each average.
    found += 2 * list_launches(rest, 1) + list_launches(rest, 5) + averages * list_launches(rest, 2)
    batches = matrix_batches(matrices)
    for batch in batches:
        rows, columns = matrices[batch[0]]
        # Its norm, three products a step, rows filled up, and the copy that turns or cuts it.
        filled = aligned(columns) != columns
        found += 3 * optimizer.newton_schulz_steps + 3 + 2 * filled + (rows > columns or filled)
    return found + (4 if batches else 0)  # Muon's two sweeps, and a table for each


def list_launches(sizes: list[int], lists: int) -> int:
    """Launches that PyTorch cuts an operation on lists of tensors into.

    Args:
        sizes: elements of the tensors of a list.
        lists: that go together, 1 to 5: two are a list and its norms or averages, five all that AdamW takes.
    """
    blocks = sum(math.ceil(size / BLOCK_ELEMENTS) for size in sizes)
    return max(math.ceil(len(sizes) / LIST_TENSORS[lists]), math.ceil(blocks / LIST_BLOCKS))


def host_seconds(config: Config, accumulation: int, launch: float) -> float:
    """Seconds of the host for an optimizer step, of `launch` seconds a kernel; 0 under train.compile: not counted."""
    return 0.0 if config.train.compile else step_launches(config, accumulation) * launch

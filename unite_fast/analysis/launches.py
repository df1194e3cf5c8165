"""How many kernels an optimizer step launches, counted from the configuration, and what that takes the host.

The numbers are counted of whole steps on an imagined GPU (`benchmarks/launches.py`): differences of steps that differ
in one block, one chunk, one micro-batch or one setting; `tests/imagined_steps.py` holds the formula against such steps.
Sums of gradients follow from the parameters that each pass reads, and Muon's launches from its batches. The number of
samples changes nothing.

Not counted: what ZeRO and the collectives launch beside the update of one GPU, and the few launches by which other
forms of model and objective differ (without context tokens a step has 2 % fewer, others differ by 1 % at most). Under
`train.compile` launches are fewer, and nobody has counted them.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

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


@dataclass(frozen=True)
class Launches:
    """Kernels by what launches them, forward and backward together, without sums of gradients.

    Attributes:
        encoder_block: one block in one pass.
        recomputed_block: the forward of it that activation checkpointing repeats.
        decoder_block: casts of its weights among them.
        reconstruct, flow: pass one, and a chunk of pass two, outside the blocks.
        block_casts, other_casts: once a micro-batch (model/casts.py), casts of the weights of an encoder block, and of
            the encoder's other Linears that both passes read.
    """

    encoder_block: int = 0
    recomputed_block: int = 0
    decoder_block: int = 0
    reconstruct: int = 0
    flow: int = 0
    block_casts: int = 0
    other_casts: int = 0

    def __add__(self, other: Launches) -> Launches:
        return Launches(*map(sum, zip(astuple(self), astuple(other), strict=True)))


# In bfloat16 under autocast. The records after it hold what is launched more.
BF16 = Launches(
    encoder_block=38,  # 15 products of five Linears, attention's 2, 8 sums over rows, 10 of unite_kernels, 3 others
    recomputed_block=9,  # 4 products, attention, 4 of unite_kernels; modulation is not repeated
    decoder_block=28,  # 12 products of four Linears, attention's 2, 6 sums over rows, 4 of unite_kernels, 4 others
    block_casts=2,  # modulation's, and in one launch those of the four other Linears
    other_casts=3,  # register_in, final_modulation, final
)
# Under train.fp8, by which four Linears of a block quantize input, gradient of the output, and weight.
QUANTIZED = 3  # for a matrix: a zero, its largest number, the casts
FP8 = Launches(
    encoder_block=4 * 2 * QUANTIZED + 3,  # input and gradient; casts of three biases
    recomputed_block=4 * QUANTIZED + 3,
    decoder_block=4 * 3 * QUANTIZED + 4 - 1,  # all three; casts of four biases, without the one of all weights
    block_casts=4 * QUANTIZED - 1,
)
# Where SwiGLU's rows are padded (model/aligned.py): in every forward a bias and its zeros are copied; in a backward
# its gradient and two weights' are cut out; among the casts two weights and their zeros, and without FP8 the bias.
PADDED = Launches(encoder_block=2 + 3, recomputed_block=2, block_casts=2 * 2 + 1)
PADDED_FP8 = Launches(encoder_block=2 + 3, recomputed_block=2, block_casts=2 * 2)
# Under ZeRO 3, whose Linears are DeepSpeed's own: they cast a weight in every forward and in every backward, and its
# gradient, and add the bias by itself. No cast serves all passes, and rows are not padded.
ZERO_3 = Launches(
    encoder_block=22,  # 18 casts, 4 sums with a bias
    recomputed_block=8,  # 4 casts, 4 sums
    decoder_block=15,  # 12 casts in place of one, 4 sums
    reconstruct=20,
    flow=15,
    block_casts=-BF16.block_casts,
    other_casts=-BF16.other_casts,
)
# By model.latent_norm: what plain PyTorch launches in place of the operators that know LayerNorm alone.
LATENT_NORM = {"layer": Launches(), "rms": Launches(reconstruct=27, flow=22), "none": Launches(reconstruct=7, flow=2)}
LPIPS, LPIPS_DROPOUT = 119, 190  # of images; what dropout inside the 1×1 layers launches besides
# multi_tensor_apply (ATen/native/cuda/MultiTensorApply.cuh): elements of a block, blocks of a launch, and its tensors
# by the number of lists that go together.
BLOCK_ELEMENTS, LIST_BLOCKS, LIST_TENSORS = 65536, 320, {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
UNREAD = "time.special"  # a parameter of published checkpoints that no pass reads


def image_launches(config: Config) -> Launches:
    """Those that images need outside the blocks."""
    lpips = config.objective.lpips
    perceptual = (LPIPS + (LPIPS_DROPOUT if lpips.dropout else 0)) if lpips.weight else 0
    return Launches(reconstruct=161 + perceptual, flow=102)


def micro_batch_launches(config: Config) -> int:
    """Kernels of a micro-batch's passes and casts, without sums of gradients."""
    model, fp8 = config.model, config.train.fp8
    each = BF16 + LATENT_NORM[model.latent_norm] + modality_of(config).launches(config)
    if fp8:
        each += FP8
    if config.train.zero_stage == 3:
        each += ZERO_3
    elif aligned(swiglu_hidden(model.width)) != swiglu_hidden(model.width):
        each += PADDED_FP8 if fp8 else PADDED
    block = each.encoder_block + (each.recomputed_block if model.checkpoint_activations else 0)
    reconstruct = each.reconstruct + model.depth * block + model.decoder.depth * each.decoder_block
    flow = each.flow + model.depth * block
    casts = each.other_casts + model.depth * each.block_casts
    encoders = 1 if model.shared else 2  # with weights to cast
    return reconstruct + flow_passes(config) * flow + encoders * casts


def step_launches(config: Config, accumulation: int) -> int:
    """Kernels that an optimizer step of so many micro-batches launches on one GPU.

    Args:
        config: the run, with a number of draws a chunk.
        accumulation: micro-batches.
    """
    names = {name for name, _ in network_of(config.model).named_parameters() if not name.endswith(UNREAD)}
    names -= summed_in_products(config)
    read = {phase: {name for name in names if reads(config.model, phase, name)} for phase in ("reconstruct", "flow")}
    # The first gradient of a parameter becomes its sum, every other one is added.
    sums = accumulation * (len(read["reconstruct"]) + flow_passes(config) * len(read["flow"])) - len(names)
    return accumulation * micro_batch_launches(config) + sums + update_launches(config.model, config.optimizer)


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
    # The norm of the gradients and the coefficient of it; the meter adds the losses.
    clipping = 10 + list_launches(list(sizes.values()), 2)
    adamw = 2 * list_launches(rest, 1) + list_launches(rest, 5)  # scaled gradients, counters; the step itself
    averages = (1 + len(optimizer.ema_decays)) * list_launches(rest, 2)
    batches = matrix_batches(matrices)
    sweeps = 4 if batches else 0  # Muon's two, and a table for each
    products = 0
    for batch in batches:
        rows, columns = matrices[batch[0]]
        # Its norm, three products a step, rows padded, and the copy that turns or cuts it.
        padded = aligned(columns) != columns
        products += 3 + 3 * optimizer.newton_schulz_steps + 2 * padded + (rows > columns or padded)
    return clipping + adamw + averages + sweeps + products


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

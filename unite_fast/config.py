"""The whole configuration of a run: typed, frozen, validated; JSON in, JSON out.

Every key is checked while parsing: an unknown key is reported with its nearest valid neighbour, an impossible
size with the numbers that clash. `Config.load` reads a file and applies `key=value` overrides; the resolved
configuration is written into the run folder and into every checkpoint.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import re
from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from unite_fast.errors import UserError
from unite_fast.overrides import apply_overrides, parse_json
from unite_fast.section import Section

# The modalities: where the class of a run's configuration lives, and the class that `unite_fast.modality` describes.
MODALITIES = {
    "images": ("unite_fast.config:Config", "unite_fast.images:Images"),
    "molecules": ("unite_fast.molecules.config:MoleculeConfig", "unite_fast.molecules.modality:Molecular"),
}

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


def _rising(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    if low >= high:
        raise ValueError(f"[{low:g}, {high:g}] must increase, or guidance never acts; guidance = 1 turns it off")
    return interval


Interval = Annotated[tuple[Fraction, Fraction], AfterValidator(_rising)]


def _from_home(path: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        home = path.partition("/")[0]
        raise ValueError(f"{path}: no home folder {home} is known here; ./{path} names a folder called {home}")
    return expanded


LocalPath = Annotated[str, AfterValidator(_from_home)]  # ~ and ~user at its beginning stand for a home folder

_RUN_NAME = re.compile(r"\.*[A-Za-z0-9_-][A-Za-z0-9._-]*")


def _folder_name(name: str) -> str:
    if not _RUN_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a run name: use letters without accents, digits, '-', '_' and '.', no spaces")
    return name


# Published sizes (UNITE, arXiv 2603.22283): depth L, width C, heads H.
ENCODER_PRESETS = {
    "B": dict(depth=12, width=768, heads=12),
    "M": dict(depth=12, width=1024, heads=16),
    "L": dict(depth=24, width=1024, heads=16),
    "XL": dict(depth=28, width=1152, heads=16),
}
DECODER_PRESETS = {
    "S": dict(depth=12, width=384, heads=6),
    "B": dict(depth=12, width=768, heads=12),
    "L": dict(depth=24, width=1024, heads=16),
}


def fill_preset(values: Any, presets: dict[str, dict[str, int]]) -> Any:
    """Fill the sizes that a named preset stands for; a size given beside the preset wins."""
    if isinstance(values, dict) and isinstance(values.get("preset"), str) and values["preset"] in presets:
        filled = dict(presets[values["preset"]])
        filled.update({k: v for k, v in values.items() if v is not None})
        return filled
    return values


class DecoderConfig(Section):
    """Pixel decoder: a pre-norm vision transformer over the registers."""

    preset: Literal["S", "B", "L"] | None = Field(None, description="named size; fills depth, width and heads")
    depth: PositiveInt = Field(12, description="transformer blocks")
    width: PositiveInt = Field(768, description="hidden width, divisible by heads and by 4")
    heads: PositiveInt = Field(12, description="attention heads")
    inner: PositiveInt = Field(768, description="hidden width of the two Linears that map a latent to the decoder width")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return fill_preset(values, DECODER_PRESETS)

    @model_validator(mode="after")
    def _sizes(self):
        if self.width % self.heads:
            raise ValueError(f"decoder width {self.width} is not divisible by its {self.heads} heads")
        if self.width % 4:
            raise ValueError(f"decoder width {self.width} is not divisible by 4 (2-D sin-cos positions need it)")
        return self


LatentNormKind = Literal["layer", "rms", "none"]
LATENT_NORM = "norm of the latents and of every denoised prediction: LayerNorm, RMSNorm with a learned scale, or none; only layer has a fused operator"
REGISTER_NOISE = "tokenization registers start as N(0, 1) noise; false: they start at zero and differ only in their learned positions"


class Sizes(Section):
    """Base of a modality's network sizes."""

    modality: ClassVar[str]

    @abstractmethod
    def described(self) -> tuple[str, str]:
        """What the encoder reads and what its latents are, in words."""


class ModelConfig(Sizes):
    """Sizes of the Generative Encoder and the decoder."""

    modality = "images"

    preset: Literal["B", "M", "L", "XL"] | None = Field(None, description="named size; fills depth, width and heads")
    depth: PositiveInt = Field(12, description="encoder blocks L")
    width: PositiveInt = Field(768, description="encoder width C, divisible by heads, head width even")
    heads: PositiveInt = Field(12, description="encoder attention heads H")
    image_size: PositiveInt = Field(256, description="side of the square image in pixels, divisible by patch_size")
    patch_size: PositiveInt = Field(16, description="side of a square patch in pixels")
    registers: PositiveInt = Field(256, description="latent tokens K; if K is the number of patches, each register decodes into its patch, otherwise patch queries attend to the registers")
    latent_dim: PositiveInt = Field(32, description="channels D of a latent token")
    num_classes: PositiveInt = Field(1000, description="number of classes; the label table has one more row, the null label")
    context_len: Annotated[int, Field(ge=0)] = Field(32, description="context tokens; 0 turns them off")
    context_start: Annotated[int, Field(ge=0)] = Field(4, description="block before which the context is prepended")
    decoder: DecoderConfig = Field(DecoderConfig(), description="the pixel decoder")
    shared: bool = Field(True, description="one set of weights for tokenization and denoising; false trains two")
    register_noise: bool = Field(True, description=REGISTER_NOISE)
    latent_norm: LatentNormKind = Field("layer", description=LATENT_NORM)
    checkpoint_activations: bool = Field(False, description="recompute block activations in the backward pass")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return fill_preset(values, ENCODER_PRESETS)

    @model_validator(mode="after")
    def _sizes(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        if (self.width // self.heads) % 2:
            raise ValueError(f"head width {self.width // self.heads} is odd; rotary embedding rotates pairs")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        if self.context_len and self.context_start >= self.depth:
            raise ValueError(f"context_start {self.context_start} is not below depth {self.depth}")
        return self

    @property
    def patches(self) -> int:
        """P, patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    def described(self) -> tuple[str, str]:
        pixels = f"{self.image_size}×{self.image_size}, patches of {self.patch_size}"
        return pixels, f"{self.registers} × {self.latent_dim}"


class LpipsConfig(Section):
    """Perceptual term of the reconstruction loss (LPIPS with VGG16)."""

    weight: Annotated[float, Field(ge=0)] = Field(1.0, description="lambda_p; 0 turns the term off")
    vgg: LocalPath | None = Field(None, description="VGG16 weights: torchvision's state dict, .pth or .safetensors")
    linear: LocalPath | None = Field(None, description="LPIPS 1x1 weights (lin0..lin4), .pth or .safetensors")
    rescale: bool = Field(False, description="feed images in [-1, 1], which LPIPS was made for; false: in [0, 1], as published")
    dropout: bool = Field(False, description="dropout 1/2 inside the 1x1 layers, as in the published run")


class TwoPassConfig(Section):
    """Settings of the two-pass objective that all modalities share (UNITE, arXiv 2603.22283, tokenization pass and losses)."""

    flow_draws: PositiveInt = Field(3, description="S, flow draws per image and step; their losses are summed")
    draws_per_chunk: PositiveInt | Literal["auto"] = Field("auto", description="flow draws per forward and backward; memory grows with this, not with S. auto: the largest even share of S that needs no more memory than the reconstruction; then, on CUDA, the largest that fits beside the micro-batch, measured at the start")
    flow_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="weight of the flow loss")
    stop_gradient: bool = Field(True, description="detach z0 in the flow loss, so that its gradient does not reach the tokenization pass")
    tokenize_t_max: Fraction = Field(0.01, description="in training the tokenization time is drawn from U(0, this); evaluation and all commands use half of this")
    label_drop: Fraction = Field(0.1, description="share of labels replaced by the null label in the flow pass")
    time_law: Literal["logit_normal", "uniform"] = Field("logit_normal", description="distribution of flow times; uniform is the paper's form")
    time_shift: Annotated[float, Field(gt=0)] = Field(0.5, description="alpha of t = alpha u / (1 + (alpha-1) u); applies to logit_normal and to sampling")
    weighting: Literal["velocity", "none"] = Field("velocity", description="velocity: flow error divided by max(1-t, t_floor); none: the paper's unweighted form")
    t_floor: Annotated[float, Field(gt=0, le=1)] = Field(0.05, description="lower bound of 1-t where it divides the flow error; sampling always uses 0.05")
    decoder_noise: Literal["mix", "additive", "none"] = Field("mix", description="noise on z0 before decoding: the published mix, the paper's additive form, or none")
    mix_probability: Fraction = Field(0.5, description="mix: share of samples that get noise")
    mix_t_min: Fraction = Field(0.7, description="mix: t is drawn from U(this, 1)")
    additive_sigma: Annotated[float, Field(ge=0)] = Field(0.7, description="additive: standard deviation of the noise")

    @property
    def chunk(self) -> int:
        """Draws in one forward and backward, at most S.

        Raises:
            ValueError: draws_per_chunk is auto, which `unite_fast.analysis.chunks.resolve_chunk` turns into a number.
        """
        if not isinstance(self.draws_per_chunk, int):
            raise ValueError("objective.draws_per_chunk is auto: resolve it first")
        return min(self.draws_per_chunk, self.flow_draws)


class ObjectiveConfig(TwoPassConfig):
    """The two-pass objective on images (UNITE, arXiv 2603.22283, tokenization pass and losses)."""

    l1_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="weight of the pixel L1")
    lpips: LpipsConfig = Field(LpipsConfig(), description="perceptual term")


class OptimizerConfig(Section):
    """Optimizer and learning-rate schedule (UNITE, optimisation). Epochs are real passes over the data."""

    kind: Literal["muon", "adamw"] = Field("muon", description="muon: Muon on matrices, AdamW on the rest; adamw: AdamW on all")
    lr: Annotated[float, Field(gt=0)] = Field(1e-4, description="peak learning rate at lr_batch; scales with the global batch")
    lr_batch: PositiveInt | None = Field(384, description="global batch for which lr is stated; null: lr is not scaled")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW betas")
    eps: Annotated[float, Field(gt=0)] = Field(1e-6, description="AdamW epsilon")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="decoupled decay, AdamW and Muon alike")
    momentum: Fraction = Field(0.95, description="Muon momentum (Nesterov)")
    newton_schulz_steps: PositiveInt = Field(5, description="Muon orthogonalisation steps")
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(3.0, description="global gradient norm clip, before Muon; null turns it off")
    ema_decay: Fraction = Field(0.9978, description="decay of the weights' EMA per optimizer step")
    ema_decays: tuple[Fraction, ...] = Field((), description="decays of additional EMAs; evaluate --search ema chooses among them after the run")
    warmup_epochs: Annotated[float, Field(ge=0)] = Field(0.0, description="linear warm-up from 0")
    hold_until_epoch: Annotated[float, Field(ge=0)] = Field(0.0, description="epoch until which the peak is held")
    cosine_until_epoch: Annotated[float, Field(ge=0)] = Field(0.0, description="epoch at which a cosine from the hold has reached final_ratio, constant after; 0 turns the decay off")
    final_ratio: Fraction = Field(0.5, description="learning rate after the cosine, as a share of the peak")

    @model_validator(mode="after")
    def _averages(self):
        decays = (self.ema_decay, *self.ema_decays)
        if len(set(decays)) < len(decays):
            raise ValueError(f"ema_decays {list(self.ema_decays)} must differ from each other and from ema_decay {self.ema_decay}")
        return self

    @model_validator(mode="after")
    def _order(self):
        if self.cosine_until_epoch and self.cosine_until_epoch < max(self.hold_until_epoch, self.warmup_epochs):
            raise ValueError(
                f"cosine_until_epoch {self.cosine_until_epoch} lies before the end of warm-up and hold "
                f"({max(self.hold_until_epoch, self.warmup_epochs)})"
            )
        return self


class TrainConfig(Section):
    """Length, batch, precision and bookkeeping of a run."""

    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="length in passes over the data; give this or steps")
    steps: PositiveInt | None = Field(None, description="length in optimizer steps; give this or epochs")
    global_batch: PositiveInt | None = Field(None, description="images per optimizer step over all ranks")
    micro_batch: PositiveInt | Literal["auto"] | None = Field(None, description="images per rank and backward; auto finds the largest that fits")
    accumulation: PositiveInt | None = Field(None, description="micro-batches per optimizer step; set two of the three batch keys, the third follows")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="seed of weights, data order and every random draw")
    start_from: LocalPath | None = Field(None, description="run, checkpoint, export or imported model whose EMA weights initialise a new run: of the same sizes, but num_classes may differ, and classes with other names get new embeddings; null: random weights")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 autocast with fp32 masters on GPUs of compute capability 8.0 or newer, fp32 elsewhere")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA if there is one")
    kernels: Literal["auto", "triton", "torch"] = Field("auto", description="backend of the fused operators; auto: Triton on CUDA, compiled C on a CPU, plain PyTorch elsewhere")
    log_every: PositiveInt = Field(10, description="optimizer steps between log records")
    checkpoint_every: PositiveInt = Field(1000, description="optimizer steps between checkpoints; the last step is saved as well, and every step after which sheets or metrics are made")
    keep_checkpoints: PositiveInt = Field(3, description="number of newest checkpoints to keep")
    wandb: str | None = Field(None, description="Weights & Biases project that records are also sent to (extra `wandb`); null: TensorBoard and metrics.jsonl only")
    compile: bool = Field(False, description="training passes under torch.compile: the first step takes minutes, later ones less time than without; needs a C++ compiler; not with ZeRO 3")
    fp8: bool = Field(False, description="matrix products of the blocks in FP8 (GPU of compute capability 8.9 or newer; emulated on a CPU); not with ZeRO 3")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(0, description="DeepSpeed ZeRO stage; Muon is exact under 0, 1 and 2")

    @model_validator(mode="after")
    def _lengths(self):
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps; set the other to null")
        if sum(v is not None for v in (self.global_batch, self.micro_batch, self.accumulation)) < 2:
            raise ValueError("give two of global_batch, micro_batch and accumulation; the third follows")
        return self


class DaliConfig(Section):
    """NVIDIA DALI's pipeline, used when data.loader selects it."""

    threads: PositiveInt = Field(4, description="threads per rank that read and decode; on a CPU they also crop")
    prefetch: PositiveInt = Field(2, description="micro-batches decoded ahead")
    hw_decoder_load: Fraction = Field(0.65, description="share of the images that a GPU's JPEG engine decodes, the rest is decoded on its cores; for data.decode fast")
    preallocate: tuple[PositiveInt, PositiveInt] | None = Field(None, description="width and height of a large image of the data set, for which a GPU decoder allocates its memory at the start instead of during the run")


class DataConfig(Section):
    """Images in class folders, one subfolder per class, sorted by name; or in shards made by `unite-fast data prepare`."""

    path: LocalPath = Field(..., description="training images: class folders or prepared shards")
    val_path: LocalPath | None = Field(None, description="held-out images of the same classes: class folders or prepared shards; null: reconstructions are of training images and labelled so")
    crop: Literal["adm", "none"] = Field("adm", description="adm: centre crop of the ADM protocol; none: images must have image_size")
    flip: bool = Field(True, description="horizontal flip with probability 1/2, from (seed, epoch, index)")
    loader: Literal["auto", "workers", "dali"] = Field("auto", description="workers: processes with Pillow; dali: NVIDIA DALI; auto: DALI on CUDA where it is installed, workers elsewhere and with cache")
    decode: Literal["exact", "fast"] = Field("exact", description="exact: JPEG decoded on the CPU, the same pixels with every loader; fast: on the GPU, whose rounding differs, or on a CPU with the fast transform; needs DALI")
    workers: Annotated[int, Field(ge=0)] = Field(8, description="loader processes per rank; 0 loads in the training process")
    prefetch: PositiveInt = Field(4, description="micro-batches each worker keeps ready")
    max_bad_share: Fraction = Field(0.01, description="share of unreadable images above which the run stops")
    cache: bool = Field(False, description="keep decoded images in memory (small data sets)")
    dali: DaliConfig = Field(DaliConfig(), description="DALI's pipeline")

    @model_validator(mode="after")
    def _loaders(self):
        if self.loader == "dali" and self.cache:
            raise ValueError("loader dali keeps no decoded images: set cache to false, or loader to workers")
        if self.decode == "fast" and (self.loader == "workers" or self.cache):
            raise ValueError("decode fast is DALI's: set loader to dali and cache to false, or decode to exact")
        return self


class SamplingConfig(Section):
    """How images are drawn (UNITE, sampling)."""

    solver: Literal["euler", "heun", "dopri5"] = Field("dopri5", description="ODE solver")
    steps: Annotated[int, Field(ge=2)] = Field(50, description="time points, shifted by objective.time_shift")
    guidance: Annotated[float, Field(ge=0)] = Field(1.0, description="guidance scale w in null + w (class - null)")
    interval: Interval = Field((0.1, 1.0), description="open interval of times t in which guidance acts")


class EvaluationConfig(Section):
    """What is measured at the end of a run and at intervals during it."""

    every: PositiveInt | None = Field(None, description="optimizer steps between sample and reconstruction sheets; null: only at the end")
    samples_per_class: Annotated[int, Field(ge=0)] = Field(0, description="generated images per class (with random labels: on average) for small-data metrics, measured whenever metrics are; 0 turns them off. Together with gfid, is, kid, precision or recall they use the images of count instead")
    reconstructions: PositiveInt = Field(1000, description="maximum number of held-out images for reconstruction metrics and rfid, kid, precision, recall")
    metrics: tuple[Literal["gfid", "is", "kid", "precision", "recall", "rfid", "lpips"], ...] = Field((), description="metrics measured at the end in addition to psnr, ssim and l1, as by unite-fast evaluate")
    metrics_epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="epochs between such measurements during training; null: only at the end")
    count: PositiveInt = Field(50_000, description="generated images for these metrics; with balanced labels a multiple of model.num_classes")
    label_sampling: Literal["balanced", "random"] = Field("balanced", description="labels of the images generated for metrics; balanced: the same number of each class; random: uniformly at random from the seed and the image's number")
    reference: LocalPath | None = Field(None, description=".npz with mu and sigma of the training images, for gfid; unite-fast reference makes one")
    inception: LocalPath | None = Field(None, description="Inception-v3 weights in the FID layout, pt_inception-2015-12-05-6726825d.pth")
    sheet_classes: PositiveInt = Field(10, description="classes (rows) on the sample sheet")
    sheet_columns: PositiveInt = Field(10, description="images per class on the sample sheet")
    batch: PositiveInt = Field(64, description="images per forward pass in evaluation")


class Config(Section):
    """A whole run on images; another modality replaces the sections that differ."""

    modality: Literal["images"] = Field("images", description="images, or molecules: see the sections under Molecules below")
    name: Annotated[str, AfterValidator(_folder_name)] = Field("run", description="name of the run and of its folder: letters without accents, digits, - _ .")
    runs: LocalPath = Field("runs", description="folder of the run folders, shared by all nodes")
    model: ModelConfig = Field(ModelConfig(), description="network sizes")
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="losses and draws")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="optimizer and schedule")
    train: TrainConfig = Field(..., description="length, batch, precision")
    data: DataConfig = Field(..., description="images")
    sampling: SamplingConfig = Field(SamplingConfig(), description="defaults of sampling")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="sheets and metrics")

    @model_validator(mode="after")
    def _optimizer_and_stage(self):
        if self.optimizer.kind == "muon" and self.train.zero_stage == 3:
            raise ValueError(
                "Muon needs whole matrices and ZeRO 3 shards them: "
                "set train.zero_stage to 2 or optimizer.kind to adamw"
            )
        return self

    @model_validator(mode="after")
    def _sharded_weights(self):
        if self.train.compile and self.train.zero_stage == 3:
            raise ValueError(
                "torch.compile cannot trace ZeRO 3, which fetches and empties every layer's weights around its forward: "
                "set train.compile to false or train.zero_stage to 2"
            )
        if self.train.fp8 and self.train.zero_stage == 3:
            raise ValueError(
                "FP8 keeps a layer's whole weight from its forward to its backward, which ZeRO 3 is there to avoid: "
                "set train.fp8 to false or train.zero_stage to 2"
            )
        return self

    @model_validator(mode="after")
    def _together(self):
        if self.evaluation.samples_per_class == 1:
            raise ValueError("evaluation.samples_per_class is 1, and small-data metrics need at least two images per class")
        if self.evaluation.samples_per_class and self.data.val_path is None:
            raise ValueError(
                "evaluation.samples_per_class judges against held-out images: set data.val_path, or set it to 0"
            )
        return self

    @classmethod
    def parse(cls, data: Any, *, source: str = "configuration") -> Config:
        """Validate a dictionary, as the configuration class of the modality that it names.

        Raises:
            UserError: every problem on a line of its own, with the key, the value and what is valid.
        """
        name = data.get("modality", "images") if isinstance(data, dict) else "images"
        if not isinstance(name, str) or name not in MODALITIES:
            near = difflib.get_close_matches(str(name), MODALITIES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(MODALITIES)}"
            raise UserError(f"{source} is not valid:\n  modality: {name!r} is unknown; {hint}")
        return super(Config, imported(MODALITIES[name][0])).parse(data, source=source)

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
        """Read a JSON file and apply `key.path=value` overrides (JSON values; anything else is a string).

        Raises:
            UserError: missing file, broken JSON (with its line), a key given twice, unknown key, wrong type, impossible
                sizes.
        """
        path = Path(path)
        try:
            # Editors of Windows put a byte order mark before the text.
            data = parse_json(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise UserError(f"cannot read configuration {path}: {error.strerror or error}") from None
        except UserError as error:
            raise UserError(f"configuration {path}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"configuration {path} is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise UserError(f"configuration {path} must be a JSON object, found {type(data).__name__}")
        known = MODALITIES.get(str(data.get("modality")), MODALITIES["images"])
        apply_overrides(data, overrides, imported(known[0]))
        return cls.parse(data, source=f"configuration {path}")

    def require_images(self, what: str) -> None:
        """Raise a UserError where the run is on another modality than images, which alone `what` serves."""
        if self.modality != "images":
            raise UserError(f"{what} serves runs on images; {self.name} is on {self.modality}")

    def to_json(self) -> str:
        """The resolved configuration, every key present."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


def imported(name: str) -> Any:
    """What `module:attribute` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)

"""The configuration of a run on molecules: the sections that differ from images."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from unite_fast.config import (
    LATENT_NORM,
    REGISTER_NOISE,
    Config,
    Interval,
    LatentNormKind,
    LocalPath,
    PositiveInt,
    Sizes,
    TwoPassConfig,
    fill_preset,
)
from unite_fast.section import Section

ELEMENTS = 5  # H C N O F
MAX_ATOMS = 29  # of `unite_fast.data.molecules`, whose import needs RDKit
# Depth, width and heads of encoder and decoder. qm9_s is the paper's S backbone, about 33 M parameters in the encoder.
ENCODER_PRESETS = {
    "mol_debug": dict(depth=2, width=64, heads=2),
    "mol_tiny": dict(depth=6, width=192, heads=3),
    "qm9_s": dict(depth=12, width=384, heads=6),
}
DECODER_PRESETS = {
    "mol_debug": dict(depth=2, width=64, heads=2),
    "mol_tiny": dict(depth=4, width=192, heads=3),
    "qm9_s": dict(depth=12, width=384, heads=6),
}
Preset = Literal["mol_debug", "mol_tiny", "qm9_s"]


class AtomDecoderConfig(Section):
    """Decoder of atoms: a pre-norm transformer over the registers."""

    preset: Preset | None = Field(None, description="named size; fills depth, width and heads")
    depth: PositiveInt = Field(4, description="transformer blocks")
    width: PositiveInt = Field(192, description="hidden width, even and divisible by heads")
    heads: PositiveInt = Field(3, description="attention heads")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return fill_preset(values, DECODER_PRESETS)

    @model_validator(mode="after")
    def _sizes(self):
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"decoder width {self.width} must be even and divisible by its {self.heads} heads")
        return self


class MoleculeModelConfig(Sizes):
    """Sizes of the Generative Encoder and the decoder of atoms; one register and one patch per atom."""

    modality = "molecules"
    # What the Generative Encoder reads and molecules do not choose: no context tokens, and no rotary positions for
    # patches, which share those of their registers.
    context_len: ClassVar[int] = 0
    context_start: ClassVar[int] = 0
    patches: ClassVar[int] = 0
    registers: ClassVar[int] = MAX_ATOMS

    preset: Preset | None = Field(None, description="named size of encoder and decoder; fills depth, width and heads")
    depth: PositiveInt = Field(6, description="encoder blocks L")
    width: PositiveInt = Field(192, description="encoder width C, divisible by heads, head width even")
    heads: PositiveInt = Field(3, description="encoder attention heads H")
    latent_dim: PositiveInt = Field(16, description="channels D of an atom's latent")
    num_classes: PositiveInt = Field(1, description="number of classes: bins of data.condition; the label table has one more row, the null label")
    decoder: AtomDecoderConfig = Field(AtomDecoderConfig(), description="the decoder of atoms")
    shared: bool = Field(True, description="one set of weights for tokenization and denoising; false trains two")
    register_noise: bool = Field(True, description=REGISTER_NOISE)
    latent_norm: LatentNormKind = Field("layer", description=LATENT_NORM)
    checkpoint_activations: bool = Field(False, description="recompute block activations in the backward pass")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        filled = fill_preset(values, ENCODER_PRESETS)
        if filled is not values and isinstance(decoder := filled.get("decoder", {}), dict):
            filled["decoder"] = {"preset": values["preset"]} | decoder
        return filled

    @model_validator(mode="after")
    def _sizes(self):
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} must be divisible by its {self.heads} heads, with an even head width")
        return self

    def described(self) -> tuple[str, str]:
        return f"at most {self.registers} atoms each", f"{self.latent_dim} channels per atom"


class MoleculeObjectiveConfig(TwoPassConfig):
    """The two-pass objective on molecules: losses and means run over real atoms only."""

    element_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="weight of the elements' cross-entropy")
    position_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="weight of the position error")
    position_loss: Literal["l1", "mse"] = Field("l1", description="l1: mean absolute error in Å; mse: mean squared error in nm²")


class MoleculeDataConfig(Section):
    """Molecules with coordinates: a data set on disk, or the built-in sample set."""

    path: LocalPath | None = Field(None, description="QM9's files or any set of molecules in a format of docs/molecules.md; null: the built-in sample set, which is not QM9")
    cache: LocalPath = Field("data/molecules", description="cache folder for data sets in binary form and for the SMILES perceived for training molecules")
    sample_count: PositiveInt = Field(10000, description="molecules of the built-in sample set")
    split_seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="seed of the split into training, validation and test molecules; 0 gives QM9's usual one")
    order: Literal["file", "canonical"] = Field("file", description="atom order: as in the file, or RDKit's canonical one; the model is not invariant under permutations")
    orientation: Literal["random", "aligned"] = Field("random", description="random: every molecule gets a new, uniformly drawn rotation in each step; aligned: it is rotated once, into the frame of its first heavy atoms, which is easier for the generator")
    strict: bool = Field(False, description="refuse molecules with unknown elements, too many atoms or two atoms in one place, and repetitions, instead of leaving them out")
    condition: Literal["gap"] | None = Field(None, description="property that labels a molecule, in model.num_classes bins of equal share; null: none")


class MoleculeSamplingConfig(Section):
    """How molecules are drawn: the atom count from the training histogram, then the flow."""

    solver: Literal["euler", "heun"] = Field("euler", description="ODE solver")
    steps: Annotated[int, Field(ge=2)] = Field(101, description="time points, shifted by objective.time_shift; one more than solver steps")
    guidance: Annotated[float, Field(ge=0)] = Field(1.0, description="guidance scale w in null + w (class - null)")
    interval: Interval = Field((0.1, 1.0), description="open interval of times t in which guidance acts")


class MoleculeEvaluationConfig(Section):
    """What is measured at the end of a run and at intervals during it."""

    every: PositiveInt | None = Field(None, description="optimizer steps between sheets of molecules; null: only at the end")
    samples: PositiveInt = Field(1000, description="generated molecules for the metrics at the end")
    reconstructions: PositiveInt = Field(1000, description="maximum number of held-out molecules for reconstruction metrics")
    sheet: PositiveInt = Field(24, description="molecules on a sheet")
    batch: PositiveInt = Field(256, description="molecules per forward pass in evaluation")
    workers: Annotated[int, Field(ge=0)] = Field(0, description="processes for bond perception; 0: one per core")


class MoleculeConfig(Config):
    """A whole run on molecules."""

    modality: Literal["molecules"] = Field("molecules", description="molecules")
    model: MoleculeModelConfig = Field(MoleculeModelConfig(), description="network sizes")
    objective: MoleculeObjectiveConfig = Field(MoleculeObjectiveConfig(), description="losses and draws")
    data: MoleculeDataConfig = Field(MoleculeDataConfig(), description="molecules")
    sampling: MoleculeSamplingConfig = Field(MoleculeSamplingConfig(), description="defaults of sampling")
    evaluation: MoleculeEvaluationConfig = Field(MoleculeEvaluationConfig(), description="sheets and metrics")

    @model_validator(mode="after")
    def _together(self):
        if self.data.condition is None and self.model.num_classes != 1:
            raise ValueError(
                f"model.num_classes {self.model.num_classes} classes need a property: set data.condition, or num_classes to 1"
            )
        if self.data.condition is not None and self.model.num_classes == 1:
            raise ValueError(
                f"data.condition {self.data.condition!r} has only one bin, which cannot tell molecules apart: set model.num_classes "
                f"to the number of bins, such as 100"
            )
        return self

"""Trained weights from a run, a checkpoint, an exported folder or a published file, and the published naming back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unite_fast.config import Config, ModelConfig, SamplingConfig, Sizes
from unite_fast.engine import checkpoint
from unite_fast.errors import UserError
from unite_fast.model.io import build_model, check_state, read_model, save_model
from unite_fast.model.published import check_positions, from_published, to_published
from unite_fast.model.two_pass import TOKENIZE_T_MAX, TwoPassModel
from unite_fast.replacing import replacing_file
from unite_fast.versions import versions
from unite_fast.weights import read_file, read_tensors, write_tensors

Which = Literal["ema", "model"]
PUBLISHED_CONTEXT_START = ModelConfig.model_fields["context_start"].default
PUBLISHED_TIME_SHIFT = 0.5  # α of the published sampler


@dataclass(frozen=True)
class Trained:
    """A model's weights with what is known about them.

    Attributes:
        config: sizes.
        state: name -> tensor, as `Unite.state_dict`.
        made_by: run, step, weights ("ema" or "model"), sampling defaults, tokenize_t_max, class names, versions; any
            may be missing.
        origin: where it was read, for people.
    """

    config: Sizes
    state: dict[str, Tensor]
    made_by: dict[str, Any]
    origin: str

    def build(self, device: torch.device | str = "cpu") -> TwoPassModel:
        """The network, ready for inference; see `model.io.build_model`."""
        return build_model(self.config, self.state, self.made_by, source=self.origin, device=device)

    def save(self, folder: str | Path) -> None:
        """Write what `unite_fast.load` reads."""
        save_model(self.state, self.config, folder, made_by=self.made_by)

    @property
    def class_names(self) -> list[str] | None:
        """Name of every class by its index, None where they are not on record."""
        names = self.made_by.get("class_names")
        fits = isinstance(names, list) and len(names) == self.config.num_classes
        return names if fits and all(isinstance(name, str) for name in names) else None

    @property
    def sampling(self) -> SamplingConfig:
        """Recorded defaults of sampling, or the configuration's own.

        Raises:
            UserError: a record that is no sampling configuration.
        """
        return SamplingConfig.parse(
            {key: value for key, value in self._sampling_record().items() if key != "time_shift"},
            source=f"made_by.sampling of {self.origin}",
        )

    @property
    def time_shift(self) -> float:
        """α of the sampling times' shift.

        Raises:
            UserError: a record that is no positive number.
        """
        value = self._sampling_record().get("time_shift", PUBLISHED_TIME_SHIFT)
        if not _is_number(value) or value <= 0:
            raise UserError(f"made_by.sampling.time_shift of {self.origin} must be a positive number, found {value!r}")
        return float(value)

    def _sampling_record(self) -> dict[str, Any]:
        record = self.made_by.get("sampling", {})
        if not isinstance(record, dict):
            raise UserError(f"made_by.sampling of {self.origin} must be an object, found {record!r}")
        return record


def open_trained(path: str | Path, *, weights: Which = "ema", ema_decay: float | None = None) -> Trained:
    """Weights of a run, of a run still in training, of one checkpoint, or of an exported folder.

    A run's export is taken unless the run went on after it; then its newest checkpoint is.

    Args:
        path: the folder.
        weights: "ema", or "model" for the weights as trained, which only checkpoints hold.
        ema_decay: one of the run's `optimizer.ema_decays`, which only checkpoints hold; None takes the main one.

    Raises:
        UserError: no such folder, nothing to load in it, damaged files, weights of the other kind, no such average.
    """
    folder = Path(path)
    if folder.is_file():
        raise UserError(
            f"{folder} is a file; give a run, checkpoint or exported folder (`unite-fast import` reads files)"
        )
    if not folder.exists():
        raise UserError(f"no folder {folder}")
    if ema_decay is not None:
        if weights != "ema":
            raise UserError("an EMA decay was given together with the weights as trained: choose one")
        return _from_checkpoint(find_checkpoint(folder), weights, ema_decay)
    if (folder / checkpoint.STATE).is_file():
        return _from_checkpoint(folder, weights)
    newest = checkpoint.latest(folder)
    try:
        exported = Trained(*read_model(folder), origin=str(folder))
    except UserError:
        if newest is None:
            raise
        return _from_checkpoint(newest, weights)
    step = exported.made_by.get("step")
    gone_on = newest is not None and (not isinstance(step, int) or checkpoint.step_of(newest) > step)
    if gone_on or (newest is not None and weights != exported.made_by.get("weights", "ema")):
        return _from_checkpoint(newest, weights)
    if weights == "model" and exported.made_by.get("weights") != "model":
        raise UserError(
            f"{folder} holds EMA weights only: --weights model needs a checkpoint, one of RUN/checkpoints/step_…"
        )
    return exported


def load(path: str | Path, *, device: torch.device | str = "cpu") -> TwoPassModel:
    """A model ready for inference, with the EMA weights that every command takes from this path; see `open_trained`.

    Raises:
        UserError: nothing to load there, broken files, weights that do not fit the sizes.
    """
    return open_trained(path).build(device)


def read_published(
    path: str | Path,
    *,
    heads: int | None = None,
    decoder_heads: int | None = None,
    context_start: int = PUBLISHED_CONTEXT_START,
    weights: Which | None = None,
) -> Trained:
    """A published checkpoint, its sizes inferred from the shapes of its weights.

    Accepts a dict with `model` and `ema`, a plain state dict, and a safetensors file, also one that holds the weights
    under `weights.` beside other entries. `module.` and `_orig_mod.` wrappers and `lpips_loss.` entries are dropped.
    The weights come out in float32.

    Args:
        path: the file.
        heads: attention heads of the encoder, which must agree with the file; None infers them.
        decoder_heads: attention heads of the decoder, which no shape tells; None takes the preset of that width.
        context_start: block before which the context joins, which no shape tells either.
        weights: which set; None takes EMA weights where the file has them.

    Raises:
        UserError: a missing, truncated or hostile file, Python objects in it, no such set, another model's weights.
    """
    path = Path(path)
    content = read_explained(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint dictionary or a state dict")
    chosen, which = _choose(content, weights, path)
    config, state = translate(chosen, path, heads=heads, decoder_heads=decoder_heads, context_start=context_start)
    sampling = SamplingConfig().model_dump(mode="json") | {"time_shift": PUBLISHED_TIME_SHIFT}
    best = content.get("current_best_cfg_scale")
    if _is_number(best) and best >= 0:
        sampling["guidance"] = float(best)
    made_by = {
        "imported_from": path.name, "weights": which, "sampling": sampling, "versions": versions("python", "torch"),
    }  # fmt: skip
    if isinstance(content.get("step"), int):
        made_by["step"] = content["step"]
    return Trained(config, state, made_by, str(path))


def translate(
    weights: dict[Any, Any], path: Path, *, heads: int | None, decoder_heads: int | None, context_start: int
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Sizes and our state dict of one set of published weights, finite and in float32.

    Raises:
        UserError: as `read_published`, naming the file.
    """
    published = _plain_names(weights, path)
    if "patches.weight" in published and "encoder.opening_norm" in published:
        raise UserError(
            f"{path} is in unite_fast's own naming already: pass its folder to `unite-fast sample --run`, "
            f"or to `unite-fast export`"
        )
    try:
        config, state = from_published(
            published, heads=heads, decoder_heads=decoder_heads, context_start=context_start
        )
        check_positions(published, config)
    except UserError as error:
        raise UserError(f"cannot import {path}: {error}") from None
    except (ValueError, IndexError, ZeroDivisionError, AttributeError) as error:
        # Shapes that no model has: a vector where a matrix belongs, a width that its heads do not divide.
        reason = str(error.errors()[0]["msg"]) if hasattr(error, "errors") else str(error)
        # No shape tells where the context joins: what was given, or the published models' block, may be what is wrong.
        remedy = ": set --context-start, or model.context_start of --config" if "context_start" in reason else ""
        raise UserError(
            f"cannot import {path}: its shapes fit no model: {reason.removeprefix('Value error, ')}{remedy}"
        ) from None
    bad = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise UserError(f"cannot import {path}: {len(bad)} entries hold NaN or infinite values, first {bad[0]!r}")
    return config, state


def plain_name(key: str) -> str:
    """A published name without the prefixes that DistributedDataParallel and torch.compile add."""
    name = ".".join(part for part in key.split(".") if part != "_orig_mod")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def write_published(trained: Trained, path: str | Path) -> None:
    """Write the weights under the published names.

    `.pt` and `.pth` hold {"ema" or "model": state dict, "step": …}, `.safetensors` the state dict alone.

    Raises:
        UserError: another suffix, a model that the published naming cannot hold, full disk or unwritable folder.
    """
    path = Path(path)
    if trained.config.modality != "images":
        raise UserError(
            f"--published: the published naming is that of image models; this one is of {trained.config.modality}"
        )
    if path.suffix not in (".pt", ".pth", ".safetensors"):
        raise UserError(f"--published {path}: the name must end in .pt, .pth or .safetensors")
    weights = {name: tensor.contiguous() for name, tensor in to_published(trained.state, trained.config).items()}
    if path.suffix == ".safetensors":
        # Entries that share memory (equal tables) are refused by the format.
        write_tensors({name: tensor.clone() for name, tensor in weights.items()}, path, {"format": "pt"})
        return
    which = trained.made_by.get("weights", "ema")
    content: dict[str, Any] = {which if which in ("ema", "model") else "ema": weights}
    if isinstance(trained.made_by.get("step"), int):
        content["step"] = trained.made_by["step"]
    write_pickle(content, path)


def unpublished_settings(trained: Trained) -> list[tuple[str, float, float]]:
    """(key, value, what readers assume) of what a model is used with, the published form holds no place for, and
    published models have otherwise."""
    t_max = trained.made_by.get("tokenize_t_max", TOKENIZE_T_MAX)
    settings = [
        ("objective.tokenize_t_max", t_max, TOKENIZE_T_MAX),
        ("objective.time_shift", trained.time_shift, PUBLISHED_TIME_SHIFT),
    ]
    return [(key, own, assumed) for key, own, assumed in settings if own != assumed]


def write_pickle(content: dict[str, Any], path: Path) -> None:
    """Write tensors and plain containers as a PyTorch file, under a temporary name first.

    Raises:
        UserError: full disk or unwritable folder.
    """
    with replacing_file(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's zip writer turns a failed write into one
            raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from None


def find_checkpoint(folder: Path) -> Path:
    """The folder itself if it is a checkpoint, else the newest of the run.

    Raises:
        UserError: neither.
    """
    found = folder if (folder / checkpoint.STATE).is_file() else checkpoint.latest(folder)
    if found is None:
        raise UserError(f"{folder} holds no checkpoint: EMAs of several decays are in RUN/checkpoints/step_… only")
    return found


def _from_checkpoint(folder: Path, weights: Which, ema_decay: float | None = None) -> Trained:
    state = checkpoint.read_state(folder)
    config = Config.parse(state["config"], source=f"configuration in {folder / checkpoint.STATE}")
    name = checkpoint.EMA if weights == "ema" else checkpoint.WEIGHTS
    if ema_decay is not None and ema_decay != config.optimizer.ema_decay:
        name = checkpoint.ema_file(ema_decay)
        if name not in state["files"]:
            kept = ", ".join(map(str, checkpoint.ema_decays(state)))
            raise UserError(f"{folder} holds no EMA of decay {ema_decay}: it holds {kept} (optimizer.ema_decays)")
    file = folder / name
    try:
        tensors = read_tensors(file)
        check_state(tensors, config.model, source=str(file))
    except UserError as error:
        raise checkpoint.unusable(folder, str(error)) from None
    made_by = {
        "run": config.name,
        "step": state["step"],
        "weights": weights,
        **({"ema_decay": config.optimizer.ema_decay if ema_decay is None else ema_decay} if weights == "ema" else {}),
        "sampling": config.sampling.model_dump(mode="json") | {"time_shift": config.objective.time_shift},
        "tokenize_t_max": config.objective.tokenize_t_max,
        "class_names": state["extra"].get("class_names"),
        "data": state["extra"].get("data"),
        "versions": versions("python", "torch"),
    }
    return Trained(config.model, tensors, made_by, str(folder))


def read_explained(path: Path) -> Any:
    """Content of a PyTorch or safetensors file, read without running code from it.

    Raises:
        UserError: as `weights.read_file`; where Python objects stand in the way, which, and what to do.
    """
    try:
        return read_file(path)
    except UserError:
        objects = _python_objects(path)
        if not objects:
            raise
    more = ", …" if len(objects) > 3 else ""
    raise UserError(
        f"{path} holds Python objects beside its tensors ({', '.join(objects[:3])}{more}), and loading those can run "
        f"code, so they are refused. Ask its source for a file of tensors: its `model` and `ema` entries, saved alone."
    )


def _python_objects(path: Path) -> list[str]:
    """Names of the classes and functions that a full unpickling would call, read without calling any."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # whatever a scan of hostile bytes raises: the caller has a message of its own
        return []


def _choose(content: dict[str, Any], weights: Which | None, path: Path) -> tuple[dict[str, Any], str]:
    """The wanted set of weights and its name; a plain state dict has none and counts as "model"."""
    kept = [name for name in ("ema", "model") if name in content]
    if not kept:
        if weights is not None:
            raise UserError(f"{path} holds one plain set of weights and no `{weights}` entry: leave --weights out")
        prefix = "weights."
        inner = {name.removeprefix(prefix): value for name, value in content.items() if str(name).startswith(prefix)}
        return inner or content, "model"
    which = weights or kept[0]
    if which not in kept:
        raise UserError(f"{path} has no `{which}` weights: it holds {', '.join(map(repr, kept))}")
    if not isinstance(content[which], dict):
        raise UserError(f"{path}: its `{which}` entry is a {type(content[which]).__name__}, not a state dict")
    return content[which], which


def _plain_names(state: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    """float32 tensors by plain name."""
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: entry {key!r} is a {type(value).__name__}; a state dict holds named tensors only")
        name = plain_name(key)
        if name in plain:
            raise UserError(f"{path}: two entries are named {name!r} once wrapper prefixes are gone")
        if name.startswith("lpips_loss."):
            continue
        # Integers are quantised weights without their scale, and of complex ones float() would keep the real part.
        if not value.is_floating_point():
            raise UserError(f"{path}: entry {key!r} is of {value.dtype}; weights are floating-point numbers")
        # A stride of 0 lets a few bytes claim any shape, and float() would allocate it.
        if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{path}: entry {key!r} claims shape {list(value.shape)} and stores fewer numbers")
        plain[name] = value.float()
    return plain


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

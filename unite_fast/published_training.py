"""Continuing from a published training checkpoint, and writing one: weights, EMA, both optimizers, counters.

The published file is a dict of `step`, `epoch`, `model`, `ema`, `optimizer` (AdamW), `optimizer_muon` (Muon),
`scheduler`, `scheduler_muon` and `current_best_cfg_scale` (UNITE, published checkpoint files). An optimizer's state
dict names its parameters by position only. What is assumed of the positions, and checked by count and by shape:

- each optimizer has one parameter group, in the order of the module's `named_parameters()`, which is the order of the
  entries of `model` with the buffers left out;
- `optimizer_muon` holds the Muon parameters (`Unite.matrix_parameters`), `optimizer` all other trained ones;
- `encoder.t_embedder.special_time_emb` never gets a gradient, so it has no state, and it may be left out of the group.

The run keeps what our checkpoints have no place for (entry order, wrapper prefixes, fixed tables, LPIPS weights,
schedulers, counters) in published.pt, so that an export of the imported step is the imported file again, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unite_fast.config import Config, ModelConfig, OptimizerConfig
from unite_fast.engine import checkpoint
from unite_fast.engine.optim import ADAM_STATES, MUON_EPS, MUON_STATE, peak_lr
from unite_fast.errors import UserError
from unite_fast.importing import plain_name, read_explained, translate, write_pickle
from unite_fast.model.published import our_names, to_published
from unite_fast.model.unite import Unite
from unite_fast.records import METRICS, number, read_lines
from unite_fast.weights import read_file

KEPT = "published.pt"  # in the run folder: the file without the tensors that our checkpoints hold
SETS = {"model": checkpoint.WEIGHTS, "ema": checkpoint.EMA}
MOMENTS = {"optimizer": ADAM_STATES, "optimizer_muon": (MUON_STATE,)}
SCHEDULERS = ("scheduler", "scheduler_muon", "epoch")
UNUSED = "encoder.time.special"
# Sizes that a file's shapes tell; the rest of the model's section is a choice of the run.
NOT_SIZES = {"preset", "checkpoint_activations", "shared"}


@dataclass(frozen=True)
class Continued:
    """What `import_training` made.

    Attributes:
        folder: the run, ready for --resume.
        step: optimizer steps taken, as AdamW counted them.
        differences: settings of the file's optimizers that the configuration changes, each in a few words.
    """

    folder: Path
    step: int
    differences: list[str]


def import_training(path: str | Path, config: Config) -> Continued:
    """Make the run folder of a configuration from a published training checkpoint.

    Raises:
        UserError: the run has checkpoints already; the file is damaged, hostile, of other sizes, without optimizer
            state, or with one that does not fit the model. Nothing is written then.
    """
    path, folder = Path(path), Path(config.runs) / config.name
    if checkpoint.latest(folder) is not None:
        raise UserError(f"{folder} already holds a run: choose another name (--set name=…)")
    if config.optimizer.kind != "muon":
        raise UserError("a published checkpoint continues under optimizer.kind muon, which it was trained with")
    if config.optimizer.ema_decays:
        raise UserError("a published checkpoint holds one EMA: remove optimizer.ema_decays to continue from it")
    content = read_explained(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a training checkpoint")
    missing = [key for key in (*SETS, *MOMENTS) if not isinstance(content.get(key), dict)]
    if missing:
        raise UserError(
            f"{path} cannot be continued from: it holds no {' and no '.join(f'`{key}`' for key in missing)}; "
            f"`unite-fast import FILE --out DIR` takes weights alone"
        )
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, file in SETS.items():
        sizes, tensors[file] = translate(
            content[key], path, heads=None, decoder_heads=config.model.decoder.heads,
            context_start=config.model.context_start,
        )  # fmt: skip
        _check_sizes(sizes, config.model, path)
    moments: dict[str, Tensor] = {}
    steps: set[float] = set()
    for key, names in parameter_order(content["model"], config.model).items():
        shapes = {name: tuple(tensors[checkpoint.WEIGHTS][name].shape) for name in names}
        found, counted = _read_moments(content[key], key, shapes, path)
        moments |= found
        if key == "optimizer":
            steps = counted
    if len(steps) != 1 or not float(max(steps)).is_integer() or max(steps) < 1:
        raise UserError(f"{path}: the parameters in its `optimizer` have no common step count: {sorted(steps)[:3]}")
    step = int(max(steps))
    tensors[checkpoint.OPTIMIZER] = moments
    batch = _global_batch(config)
    extra = {"images": step * batch if batch else 0, "training_seconds": 0.0, "imported_from": path.name}
    differences = _differences(content, config)
    # After this the big tensors live in `tensors` alone: L holds 6.6 GB of them.
    write_pickle({"step": step, "content": _without_tensors(content, config.model)}, folder / KEPT)
    try:
        checkpoint.write(folder, config, step, tensors, extra)
    except UserError:
        (folder / KEPT).unlink()  # it would speak of another run if this folder were trained in from the start
        raise
    return Continued(folder, step, differences)


def export_training(source: str | Path, path: str | Path) -> list[str]:
    """Write a run's newest checkpoint, or the given one, as a published training checkpoint.

    Of the step that was imported it is the imported file again. Of any other the file has no schedulers, whose form
    only the published trainer knows.

    Returns:
        Keys of the published form that were left out.

    Raises:
        UserError: no checkpoint, a damaged one, a model or optimizer that the published form cannot hold, another
            suffix than .pt or .pth, or a path that cannot be written.
    """
    source, path = Path(source), Path(path)
    if path.suffix not in (".pt", ".pth"):
        raise UserError(f"--published {path}: with --with-optimizer the name must end in .pt or .pth")
    directory = source if (source / checkpoint.STATE).is_file() else checkpoint.latest(source)
    if directory is None:
        raise UserError(f"{source} holds no checkpoint, and only checkpoints have optimizer states")
    state, tensors = checkpoint.read(directory)
    config = Config.parse(state["config"], source=f"configuration in {directory / checkpoint.STATE}")
    if config.optimizer.kind != "muon":
        kind = config.optimizer.kind
        raise UserError(f"{directory} was trained with optimizer.kind {kind}; the published form has Muon")
    run = directory.parents[1]
    kept = read_file(run / KEPT) if (run / KEPT).is_file() else None
    if kept is None:
        content = _template(config, state["step"], tensors)
    else:
        content = kept["content"]
        if kept["step"] != state["step"]:
            content = {key: value for key, value in content.items() if key not in SCHEDULERS} | {"step": state["step"]}
    same = kept is not None and kept["step"] == state["step"]
    lr = _last_lr(run, state, config.optimizer)
    for key, names in parameter_order(content["model"], config.model).items():
        entries, group = content[key]["state"], content[key]["param_groups"][0]
        if not same:
            group["lr"] = lr
        for index, name in _indexed(group["params"], names):
            entry = entries.get(index)
            if entry is None:
                continue
            for moment in MOMENTS[key]:
                entry[moment] = tensors[checkpoint.OPTIMIZER][f"{moment}/{name}"]
            if not same and "step" in entry:
                entry["step"] = torch.tensor(float(state["step"]))
    for key, file in SETS.items():
        names = our_names(map(plain_name, content[key]), config.model)
        for entry in content[key]:
            if content[key][entry] is None:
                content[key][entry] = tensors[file][names[plain_name(entry)]]
    write_pickle(content, path)
    return [key for key in SCHEDULERS if key not in content]


def parameter_order(model: Iterable[str], config: ModelConfig) -> dict[str, list[str]]:
    """Our names of the parameters of each published optimizer, in its order.

    Args:
        model: names of the published `model` entry, in the file's order.
    """
    with torch.device("meta"):
        module = Unite(config)
    trained, matrices = dict(module.named_parameters()), module.matrix_parameters()
    ordered = [name for name in our_names(map(plain_name, model), config).values() if name in trained]
    return {
        "optimizer": [name for name in ordered if name not in matrices],
        "optimizer_muon": [name for name in ordered if name in matrices],
    }


def _indexed(positions: list[int], names: list[str]) -> list[tuple[int, str]]:
    """Positions with the names of their parameters; the unused one may have none."""
    if len(positions) == len(names) - 1:
        names = [name for name in names if name != UNUSED]
    return list(zip(positions, names, strict=True))


def _read_moments(
    optimizer: dict[str, Any], key: str, shapes: dict[str, tuple[int, ...]], path: Path
) -> tuple[dict[str, Tensor], set[float]]:
    """Moments by our checkpoints' names, and the steps that their entries count."""
    groups, entries = optimizer.get("param_groups"), optimizer.get("state")
    if not isinstance(entries, dict) or not isinstance(groups, list) or len(groups) != 1:
        count = len(groups) if isinstance(groups, list) else "no"
        raise UserError(f"{path}: `{key}` is not an optimizer state of one parameter group: it has {count} groups")
    positions = groups[0].get("params") if isinstance(groups[0], dict) else None
    if not isinstance(positions, list) or len(set(map(str, positions))) != len(positions):
        raise UserError(f"{path}: the parameter group of `{key}` does not list its parameters")
    if len(positions) not in (len(shapes), len(shapes) - (UNUSED in shapes)):
        raise UserError(f"{path}: `{key}` holds {len(positions)} parameters, this model has {len(shapes)} for it")
    moments: dict[str, Tensor] = {}
    steps: set[float] = set()
    indexed = _indexed(positions, list(shapes))
    for moment in MOMENTS[key]:
        if UNUSED in shapes:
            moments[f"{moment}/{UNUSED}"] = torch.zeros(shapes[UNUSED])
    for index, name in indexed:
        entry = entries.get(index)
        if entry is None and name == UNUSED:
            continue
        if not isinstance(entry, dict):
            raise UserError(f"{path}: `{key}` holds no state for parameter {index}, {name}")
        unknown = sorted(map(str, set(entry) - {"step", *MOMENTS[key]}))
        if unknown:
            known = ", ".join(MOMENTS[key])
            raise UserError(f"{path}: `{key}` keeps {', '.join(unknown)} for {name}; {known} is known")
        for moment in MOMENTS[key]:
            moments[f"{moment}/{name}"] = _tensor(entry.get(moment), f"`{key}` {moment} of {name}", shapes[name], path)
        count = entry.get("step")
        count = float(count) if isinstance(count, Tensor) and count.numel() == 1 else number(count)
        steps |= set() if count is None else {count}
    return moments, steps


def _tensor(value: Any, what: str, shape: tuple[int, ...], path: Path) -> Tensor:
    if not isinstance(value, Tensor):
        raise UserError(f"{path}: {what} is missing")
    if tuple(value.shape) != shape:
        raise UserError(
            f"{path}: {what} has shape {list(value.shape)} where the parameter has {list(shape)}: "
            f"its optimizers list their parameters in a different order than its weights"
        )
    # A stride of 0 lets a few bytes claim any shape.
    if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UserError(f"{path}: {what} stores fewer numbers than its shape claims")
    if not bool(torch.isfinite(value).all()):
        raise UserError(f"{path}: {what} holds NaN or infinite values")
    return value.float()


def _check_sizes(found: ModelConfig, wanted: ModelConfig, path: Path) -> None:
    if not wanted.shared:
        raise UserError("a published checkpoint has one encoder: set model.shared to true")
    differ = [
        f"{prefix}{name} is {getattr(mine, name)}, there {getattr(theirs, name)}"
        for prefix, mine, theirs in (("model.", wanted, found), ("model.decoder.", wanted.decoder, found.decoder))
        for name in type(mine).model_fields
        if name not in NOT_SIZES | {"decoder"} and getattr(mine, name) != getattr(theirs, name)
    ]
    if differ:
        raise UserError(f"{path} is of another size than the configuration: {'; '.join(differ)}")


def _without_tensors(content: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The file with None where our checkpoint holds the tensor."""
    rest: dict[str, Any] = {key: value for key, value in content.items() if key not in (*SETS, *MOMENTS)}
    rest = {key: rest.get(key) for key in content}  # in the file's order
    for key in SETS:
        ours = our_names(map(plain_name, content[key]), config)
        rest[key] = {name: None if plain_name(name) in ours else value for name, value in content[key].items()}
    for key in MOMENTS:
        rest[key] = {**content[key], "state": {
            index: {name: None if name in MOMENTS[key] else value for name, value in entry.items()}
            for index, entry in content[key]["state"].items()
        }}  # fmt: skip
    return rest


def _template(config: Config, step: int, tensors: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """A published file with None for weights and moments, of a run that was not imported."""
    order = {name: tensors[checkpoint.WEIGHTS][name] for name in Unite.state_shapes(config.model)}
    names = to_published(order, config.model)
    known = our_names(names, config.model)
    weights = {name: None if name in known else tensor for name, tensor in names.items()}
    options = config.optimizer
    content: dict[str, Any] = {"step": step, "model": weights, "ema": copy.copy(weights)}
    for key, members in parameter_order(weights, config.model).items():
        parameter = torch.nn.Parameter(torch.empty(1, 1))
        # A real optimizer's group has every key that its load_state_dict wants.
        if key == "optimizer":
            made = torch.optim.AdamW(
                [parameter], betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
            )
        else:
            made = torch.optim.Muon(
                [parameter], momentum=options.momentum, weight_decay=options.weight_decay, nesterov=True,
                ns_steps=options.newton_schulz_steps, eps=MUON_EPS, adjust_lr_fn="match_rms_adamw",
            )  # fmt: skip
        group = made.state_dict()["param_groups"][0] | {"params": list(range(len(members)))}
        empty = dict.fromkeys(MOMENTS[key])
        entries = {
            index: ({"step": None} if key == "optimizer" else {}) | empty
            for index, name in enumerate(members)
            if name != UNUSED
        }
        content[key] = {"state": entries, "param_groups": [group]}
    return content


def _last_lr(run: Path, state: dict[str, Any], options: OptimizerConfig) -> float:
    """Learning rate of the checkpoint's step: the record's, else the peak."""
    if (run / METRICS).is_file():
        for record in read_lines(run / METRICS):
            if record.get("step") == state["step"] and number(record.get("lr")) is not None:
                return float(record["lr"])
    images, step = state["extra"].get("images"), state["step"]
    return peak_lr(options, images // step if isinstance(images, int) and step else options.lr_batch or 1)


def _differences(content: dict[str, Any], config: Config) -> list[str]:
    """What the configuration does otherwise than the file's optimizers."""
    options, batch = config.optimizer, _global_batch(config)
    found = []
    for key, pairs in (
        ("optimizer", {"betas": options.betas, "eps": options.eps, "weight_decay": options.weight_decay}),
        ("optimizer_muon", {"momentum": options.momentum, "weight_decay": options.weight_decay}),
    ):
        group = content[key]["param_groups"][0]
        for name, mine in pairs.items():
            theirs = group.get(name)
            theirs = tuple(theirs) if isinstance(theirs, list | tuple) else theirs
            if theirs is not None and theirs != mine:
                found.append(f"{name} of `{key}` was {theirs}, is {mine}")
        lr, peak = number(group.get("lr")), peak_lr(options, batch) if batch else None
        if lr is not None and peak is not None and lr > peak * (1 + 1e-6):
            found.append(f"learning rate of `{key}` was {lr:.3g}, above this configuration's peak {peak:.3g}")
    return found


def _global_batch(config: Config) -> int | None:
    train = config.train
    if train.global_batch is None and isinstance(train.micro_batch, int) and train.accumulation:
        return train.micro_batch * train.accumulation
    return train.global_batch

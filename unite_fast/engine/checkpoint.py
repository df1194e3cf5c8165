"""Checkpoints, independent of the number of ranks and the ZeRO stage, and without pickles.

`run/checkpoints/step_00001000/` holds model.safetensors (float32 weights and buffers), ema.safetensors (and
ema_0.9999.safetensors … for each of optimizer.ema_decays), optimizer.safetensors ("exp_avg/<parameter>",
"exp_avg_sq/<parameter>", "momentum_buffer/<parameter>") and state.json (step, configuration, versions, shapes, and the
size of each file, so that a truncated one is noticed before it is used). The folder is written under a hidden name,
flushed, and renamed: it exists whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unite_fast.config import Config
from unite_fast.engine.engine import Engine
from unite_fast.engine.optim import ADAM_STATES, MUON_STATE
from unite_fast.errors import UserError
from unite_fast.versions import versions
from unite_fast.weights import read_tensors, save_tensors

FORMAT = 1
PACKAGES = ("unite_fast", "torch", "safetensors", "deepspeed", "triton")  # whose versions a checkpoint carries
WEIGHTS, EMA, OPTIMIZER, STATE = "model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"
# What of the model's section may change between sessions; any other key that no shape tells, such as the decoder's
# heads, makes another function of the same weights. The picture's side may where registers are not patches.
FREE = {"model.preset", "model.decoder.preset", "model.checkpoint_activations", "model.image_size"}
UNFLUSHED = (errno.EBADF, errno.EINVAL)  # of file systems that flush files and no folders, some network ones
_NAME = re.compile(r"step_(\d{8,})(\.old)?")  # .old: the step is being saved again, see _finish


def checkpoints_dir(run_dir: str | Path) -> Path:
    """Folder of a run's checkpoints."""
    return Path(run_dir) / "checkpoints"


def save(engine: Engine, run_dir: str | Path, extra: Mapping[str, Any]) -> Path:
    """Write a checkpoint of the engine as it stands and delete all but the newest `train.keep_checkpoints`.

    Collective: every rank calls it, rank 0 writes.

    Args:
        extra: JSON values of the loop's own (images seen, recipe of evaluation …), returned by `load`.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: full disk or unwritable folder, on every rank; older checkpoints stay as they were.
    """
    folder = checkpoints_dir(run_dir)
    final = folder / f"step_{engine.step_count:08d}"
    temporary = folder / f".{final.name}.tmp"
    problem: str | None = None
    if engine.world.is_main:
        problem = _attempt(lambda: _prepare(folder, temporary))
    for name, tensors in (
        (WEIGHTS, engine.model_state),
        (EMA, engine.ema_state),
        *((ema_file(decay), lambda decay=decay: engine.ema_state(decay)) for decay in engine.ema.extra),
        (OPTIMIZER, lambda: _optimizer_state(engine)),
    ):
        # Gathering is collective, so every rank walks through it, whatever has gone wrong on rank 0.
        held = {}
        for key, tensor in tensors():
            if engine.world.is_main and problem is None:
                held[key] = tensor.cpu()
        if engine.world.is_main and problem is None:
            problem = _attempt(lambda: save_tensors(held, temporary / name))
    if engine.world.is_main and problem is None:
        state = {
            "format": FORMAT,
            "step": engine.step_count,
            "extra": dict(extra),
            "config": engine.config.model_dump(mode="json"),
            "versions": versions(*PACKAGES),
            "parameters": engine.backend.layout.shapes,
        }
        problem = _attempt(lambda: _finish(state, temporary, final))
    if not engine.world.all_true(problem is None):
        if engine.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write checkpoint {final}: {problem or 'rank 0 failed'}; "
            f"the last whole one is {latest(run_dir) or 'none'}"
        )
    if engine.world.is_main:
        prune(run_dir, engine.config.train.keep_checkpoints)
    return final


def write(
    run_dir: str | Path, config: Config, step: int, tensors: Mapping[str, dict[str, Tensor]], extra: Mapping[str, Any]
) -> Path:
    """Write a checkpoint from whole tensors, without an engine: what a run that began elsewhere continues from.

    Args:
        config: the run's.
        step: optimizer steps taken.
        tensors: by file name (WEIGHTS, EMA, OPTIMIZER), as the head of this module describes them.
        extra: as in `save`.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: full disk or unwritable folder; nothing is left then.
    """
    final = checkpoints_dir(run_dir) / f"step_{step:08d}"
    temporary = final.with_name(f".{final.name}.tmp")
    moments = {key.partition("/")[2] for key in tensors[OPTIMIZER]}
    state = {
        "format": FORMAT,
        "step": step,
        "extra": dict(extra),
        "config": config.model_dump(mode="json"),
        "versions": versions(*PACKAGES),
        "parameters": {name: list(tensor.shape) for name, tensor in tensors[WEIGHTS].items() if name in moments},
    }
    problem = _attempt(lambda: _prepare(final.parent, temporary))
    for name in (WEIGHTS, EMA, OPTIMIZER):
        problem = problem or _attempt(lambda name=name: save_tensors(tensors[name], temporary / name))
    problem = problem or _attempt(lambda: _finish(state, temporary, final))
    if problem:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot write checkpoint {final}: {problem}")
    return final


def read(directory: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """state.json and the tensors by file name of a whole checkpoint, as `write` takes them.

    Raises:
        UserError: as `read_state`, and for a file that is no safetensors file.
    """
    state = read_state(directory)
    return state, {name: read_tensors(directory / name) for name in (WEIGHTS, EMA, OPTIMIZER)}


def load(engine: Engine, directory: str | Path) -> dict[str, Any]:
    """Continue from a checkpoint, whatever number of ranks and ZeRO stage wrote it. Every rank calls it and reads.

    Returns:
        The `extra` that `save` was given.

    Raises:
        UserError: truncated, hostile or foreign files (naming the newest other checkpoint that is whole), or the
            checkpoint of another model, naming what differs. The engine is unchanged then.
    """
    directory = Path(directory)
    state = read_state(directory)
    layout = engine.backend.layout
    kind_of = {id(master): kind for kind, masters in engine.backend.masters.items() for master in masters}
    kinds = {fragment.name: kind_of[id(layout.masters[fragment.master])] for fragment in layout.fragments}
    _check_same_model(engine, state, directory)
    buffers = engine.buffers()
    shapes = layout.shapes
    weights = shapes | {name: tuple(tensor.shape) for name, tensor in buffers.items()}
    moments = {
        f"{key}/{name}": shapes[name]
        for name, kind in kinds.items()
        for key in ((MUON_STATE,) if kind == "muon" else ADAM_STATES)
    }
    main, *others = ema_decays(state)
    held = {main: EMA} | {decay: ema_file(decay) for decay in others}
    held.setdefault(engine.ema.decay, EMA)  # a decay that is new goes on from the main average
    for decay in engine.ema.extra:
        if decay not in held:
            raise UserError(
                f"checkpoint {directory} holds no EMA of decay {decay}, which optimizer.ema_decays asks for: an EMA "
                f"starts with the run, so remove this decay"
            )
    with contextlib.ExitStack() as stack:
        # All files are checked against the model before the first value is copied.
        model, optimizer = (
            stack.enter_context(_open(directory, name, expected))
            for name, expected in ((WEIGHTS, weights), (OPTIMIZER, moments))
        )
        averages = {decay: stack.enter_context(_open(directory, held[decay], weights)) for decay in engine.ema.decays}
        with torch.no_grad():
            layout.scatter(model, lambda master: master)
            for decay, average in averages.items():
                layout.scatter(average, lambda master, decay=decay: engine.ema.of(master, decay))
            for key in (MUON_STATE, *ADAM_STATES):
                layout.scatter(
                    lambda name, key=key: optimizer(f"{key}/{name}"),
                    lambda master, key=key: engine.optimizer.state[master].get(key),
                )
            for name, buffer in buffers.items():
                buffer.copy_(model(name))
    engine.backend.publish()
    engine.step_count, engine.samples_seen = state["step"], samples_seen(state, engine.global_batch)
    engine.optimizer.set_adam_step(state["step"])
    return state["extra"]


def samples_seen(state: Mapping[str, Any], global_batch: int) -> int:
    """Images or molecules behind a checkpoint of this `read_state`.

    Args:
        global_batch: the batch size to assume where the checkpoint does not record it, as some imported ones do not.
    """
    images = state["extra"].get("images")
    return images if isinstance(images, int) and images > 0 else state["step"] * global_batch


def changes(here: Any, there: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys that both JSON objects have with different values, each with both values."""
    if isinstance(here, dict) and isinstance(there, dict):
        for name in [name for name in here if name in there]:  # one alone has what another version added
            yield from changes(here[name], there[name], f"{key}.{name}" if key else name)
    elif here != there:
        yield key, here, there


def changed_keys(state: Mapping[str, Any], config: Config) -> list[str]:
    """The keys whose values differ between the configuration and a checkpoint's `read_state`, each with both values."""
    now = config.model_dump(mode="json")
    return [f"{key} {here!r} (was {there!r})" for key, here, there in changes(now, state["config"])]


def ema_file(decay: float) -> str:
    """Name of the file of one of `optimizer.ema_decays`."""
    return f"ema_{decay}.safetensors"


def ema_decays(state: Mapping[str, Any]) -> list[float]:
    """Decays of the averages that a checkpoint of this `read_state` holds, the main one, of file EMA, first."""
    optimizer = state["config"].get("optimizer", {})
    extra = [decay for decay in optimizer.get("ema_decays", ()) if ema_file(decay) in state["files"]]
    return [optimizer.get("ema_decay"), *extra]


def latest(run_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return next(reversed(_listed(run_dir)), None)


def step_of(path: Path) -> int:
    """Optimizer steps of a checkpoint, from its name."""
    return int(_NAME.fullmatch(path.name).group(1))


def prune(run_dir: str | Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints. For rank 0.

    Raises:
        UserError: the folder cannot be written.
    """
    for path in _listed(run_dir)[:-keep]:
        hidden = path.with_name(f".{path.name}.pruned")
        shutil.rmtree(hidden, ignore_errors=True)
        try:
            # Renamed first: a kill in mid-deletion must not leave a half checkpoint under a valid name.
            path.replace(hidden)
        except OSError as error:
            raise UserError(f"cannot delete old checkpoint {path}: {error.strerror or error}") from None
        # On NFS what another process reads, as an evaluation of it does, stays until then: later saves try again.
        shutil.rmtree(hidden, ignore_errors=True)


def read_state(directory: Path) -> dict[str, Any]:
    """state.json of a checkpoint whose files have their recorded sizes.

    Raises:
        UserError: missing, truncated or foreign, naming the file and the newest other checkpoint that is whole.
    """
    path = directory / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unusable(directory, f"{path} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError):
        raise unusable(directory, f"{path} is not JSON") from None
    typed = {"step": int, "extra": dict, "config": dict, "parameters": dict, "files": dict}
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise unusable(directory, f"{path} is not of checkpoint format {FORMAT}")
    for key, kind in typed.items():
        if not isinstance(state.get(key), kind):
            raise unusable(directory, f"{path} has no valid {key!r}")
    for name in {WEIGHTS: None, EMA: None, OPTIMIZER: None} | state["files"]:
        file = directory / name
        if not file.is_file():
            raise unusable(directory, f"{file} is missing")
        if file.stat().st_size != state["files"].get(name):
            raise unusable(
                directory, f"{file} is truncated: {file.stat().st_size} bytes of {state['files'].get(name)}"
            )
    return state


def _listed(run_dir: str | Path) -> list[Path]:
    """Checkpoint folders, oldest step first; leftovers of killed saves have other names."""
    folder = checkpoints_dir(run_dir)
    if not folder.is_dir():
        return []
    found = {path: _NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()}
    order = {path: (int(match.group(1)), match.group(2) is None) for path, match in found.items() if match}
    return sorted(order, key=order.__getitem__)


def _prepare(folder: Path, temporary: Path) -> None:
    """Clear what killed saves and deletions left, and make room for the new checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)  # see `prune`; of the new one's own name `mkdir` complains
    for old in folder.glob("step_*.old"):
        if old.with_suffix("").exists():
            shutil.rmtree(old)
    temporary.mkdir()


def _finish(state: dict[str, Any], temporary: Path, final: Path) -> None:
    state["files"] = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
    path = temporary / STATE
    with open(path, "w", encoding="utf-8") as file:
        json.dump(state, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(temporary)
    old = final.with_name(f"{final.name}.old")
    if final.exists():
        # A folder cannot replace a full one in a single step, so the former keeps a name that `latest` knows.
        final.replace(old)
    temporary.replace(final)
    _sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNFLUSHED:
            raise
    finally:
        os.close(descriptor)


def _attempt(action: Callable[[], None]) -> str | None:
    """None, or the file system's error; returned because the caller must still take part in the ranks' collectives."""
    try:
        action()
    except (OSError, SafetensorError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def _optimizer_state(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    for key in (MUON_STATE, *ADAM_STATES):
        for name, tensor in engine.backend.layout.gather(lambda master: engine.optimizer.state[master].get(key)):
            yield f"{key}/{name}", tensor


@contextlib.contextmanager
def _open(directory: Path, name: str, expected: Mapping[str, tuple[int, ...]]) -> Iterator[Callable[[str], Tensor]]:
    """Reader of a safetensors file that holds exactly the expected names and shapes."""
    path = directory / name
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise unusable(directory, f"{path} is not a whole safetensors file ({error})") from None
    with file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        if found != expected:
            raise unusable(directory, f"{path} does not fit this model: {_difference(expected, found)}")
        yield file.get_tensor


def _check_same_model(engine: Engine, state: dict[str, Any], directory: Path) -> None:
    mine = {name: list(shape) for name, shape in engine.backend.layout.shapes.items()}
    same_shapes = mine == state["parameters"]
    changed = [
        f"{key} is {here!r}, there {there!r}"
        for key, here, there in changes(
            engine.config.model.model_dump(mode="json"), state["config"].get("model"), "model"
        )
        if not same_shapes or key not in FREE
    ]
    if changed or not same_shapes:
        detail = "; ".join(changed) or _difference(mine, state["parameters"])
        raise UserError(f"checkpoint {directory} is of another model: {detail}")
    kind, saved = engine.config.optimizer.kind, state["config"].get("optimizer", {})
    there = saved.get("kind") if isinstance(saved, dict) else None
    if there != kind:
        raise UserError(f"checkpoint {directory} is of another optimizer: optimizer.kind is {kind!r}, there {there!r}")


def _difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    changed = [name for name in expected if name in found and found[name] != expected[name]]
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", changed))
        if names
    ]
    return "; ".join(parts)


def unusable(directory: Path, problem: str) -> UserError:
    """The error of a checkpoint with a problem; names the newest other one of the run that is whole."""
    other = next(
        (path for path in reversed(_listed(directory.parent.parent)) if path != directory and _looks_whole(path)), None
    )
    advice = f"; {other} is whole: commands take it in place of the run, --resume once {directory.name} is deleted"
    return UserError(f"checkpoint {directory} cannot be used: {problem}{advice if other else ''}")


def _looks_whole(path: Path) -> bool:
    try:
        files = json.loads((path / STATE).read_text(encoding="utf-8"))["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False

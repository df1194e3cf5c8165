"""What a run runs on: one line of sessions.jsonl for each time it is started or resumed."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

from unite_fast.config import Config
from unite_fast.engine.batch import Batch
from unite_fast.engine.world import World
from unite_fast.errors import UserError
from unite_fast.records import SESSIONS


def record_session(folder: Path, config: Config, world: World, batch: Batch, *, first_step: int) -> None:
    """Append what this start or resumption of the run runs on to sessions.jsonl.

    Raises:
        UserError: the file cannot be written.
    """
    versions = {"python": platform.python_version()}
    for package in ("unite_fast", "torch", "triton", "deepspeed", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    on_gpu = world.device.type == "cuda"
    session = {
        "started": time.time(),
        "first_step": first_step,
        "device": torch.cuda.get_device_name(world.device) if on_gpu else platform.processor() or platform.machine(),
        "ranks": world.size,
        "micro_batch": batch.micro_batch,
        "accumulation": batch.accumulation,
        "global_batch": batch.global_batch,
        "zero_stage": config.train.zero_stage,
        "cuda": torch.version.cuda if on_gpu else None,
        "versions": versions,
        "commit": source_commit(),
    }
    try:
        with open(folder / SESSIONS, "a", encoding="utf-8") as file:
            file.write(json.dumps(session) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {folder / SESSIONS}: {error.strerror}") from None


def source_commit() -> str | None:
    """Git commit of the source tree that runs, with a + where files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        # An installed copy may lie inside another project's checkout (its .venv), whose commit would say nothing.
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()

"""unite_fast: one-stage training of image tokenizer and latent generator (UNITE, arXiv 2603.22283)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unite_fast.config import Config, ModelConfig
    from unite_fast.errors import UserError
    from unite_fast.flow.sampling import generate
    from unite_fast.importing import load
    from unite_fast.model.unite import Unite

_HOME = {
    "Config": "unite_fast.config",
    "ModelConfig": "unite_fast.config",
    "Unite": "unite_fast.model.unite",
    "UserError": "unite_fast.errors",
    "generate": "unite_fast.flow.sampling",
    "load": "unite_fast.importing",
}
__all__ = ["Config", "ModelConfig", "Unite", "UserError", "generate", "load"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; `unite-fast --help` and a bad configuration should not wait for it.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

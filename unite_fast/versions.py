"""Which software a result was made with."""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata


def versions(*names: str) -> dict[str, str]:
    """Name -> version: of `python`, and of those packages that are installed."""
    found = {}
    for name in names:
        if name == "python":
            found[name] = platform.python_version()
        elif name == "torch":
            import torch  # its metadata on PyPI lack the build, such as +cu130

            found[name] = str(torch.__version__)
        else:
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(name)
    return found

"""Which packages a result was made with."""

from __future__ import annotations

import contextlib
import sys
from importlib import metadata


def package_versions(*packages: str) -> dict[str, str]:
    """Name -> version of those packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    if "torch" in found and "torch" in sys.modules:
        # With its build, such as +cu130, which the metadata of PyPI's lack.
        found["torch"] = str(sys.modules["torch"].__version__)
    return found

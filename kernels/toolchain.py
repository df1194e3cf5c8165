"""Triton where it is installed; where it is not (it is made for Linux), enough to import the package.

Without Triton the plain PyTorch implementations serve every tensor; kernels can be neither launched nor compiled.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:
    AVAILABLE = False
    tl = None

    class _WithoutTriton:
        """Stands for the module: `jit` leaves a kernel's function as it is, to be named but never run."""

        @staticmethod
        def jit(function=None, **options):
            return function or (lambda decorated: decorated)

    triton = _WithoutTriton()

__all__ = ["AVAILABLE", "tl", "triton"]

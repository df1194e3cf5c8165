"""Molecules in: QM9's files, general formats, and a built-in sample set, as padded arrays."""

from unite_fast.errors import UserError

try:
    import rdkit  # noqa: F401
except ImportError:
    raise UserError("molecules need RDKit, which is not installed: pip install 'unite_fast[molecules]'") from None

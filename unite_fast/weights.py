"""Reading and writing tensors without ever executing code from a file."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import stat
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unite_fast.errors import UserError
from unite_fast.replacing import replacing_file

# How PyTorch's hubs name what they publish: the name ends in the first hexadecimal digits of the file's SHA-256.
_NAMED_HASH = re.compile(r"-([0-9a-f]{8})\.[a-z]+$")

# NumPy's numbers, which a training loop easily leaves in a checkpoint. Their pickles name what makes them, in NumPy 1
# under another name; none of it runs code.
_SCALAR = np.float64().__reduce__()[0]
_NUMBERS = [
    (_SCALAR, "numpy._core.multiarray.scalar"), (_SCALAR, "numpy.core.multiarray.scalar"), np.dtype,
    np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType, np.dtypes.Int32DType,
]  # fmt: skip


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal.

    Raises:
        UserError: a file that cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def check_named_hash(path: str | Path) -> str:
    """SHA-256 of a file; where its name carries the first eight digits (`vgg16-397923af.pth`), they must be these.

    Raises:
        UserError: a file that cannot be read, or that is not what its name says.
    """
    found, named = file_hash(path), _NAMED_HASH.search(Path(path).name)
    if named and not found.startswith(named[1]):
        raise UserError(
            f"{path} is damaged: by its name its SHA-256 should begin with {named[1]}, but it begins with "
            f"{found[:8]} ({Path(path).stat().st_size} bytes); download it again"
        )
    return found


def read_file(path: str | Path) -> Any:
    """Content of a `.safetensors` file (a dict of tensors) or of a PyTorch file loaded with weights only.

    NumPy's numbers become Python's.

    Raises:
        UserError: missing, truncated, or holding anything but tensors, numbers and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # PyTorch warns of every pickle protocol but its own, whether it reads the file or not.
        with torch.serialization.safe_globals(_NUMBERS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return _with_plain_numbers(torch.load(path, map_location="cpu", weights_only=True, mmap=False))
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None
    except (pickle.UnpicklingError, LookupError, TypeError, AttributeError):
        # The latter from any other file's bytes, taken for a pickle's instructions; their words would help nobody.
        raise UserError(
            f"{path} is not a PyTorch weights file as torch.save writes it by default, or it holds objects other than "
            f"tensors and plain containers, which are refused because loading them can run code"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (RuntimeError, EOFError, ValueError, struct.error) as error:
        reason = (str(error) or "it is empty").splitlines()[0]
        raise UserError(f"{path} is truncated or not a PyTorch file: {reason}") from None


def _with_plain_numbers(content: Any) -> Any:
    """The same, with NumPy's numbers replaced in it."""
    if isinstance(content, np.generic):
        return content.item()
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            if isinstance(value, np.generic | dict | list):
                content[key] = _with_plain_numbers(value)
    return content


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Flat name -> tensor dictionary of a weights file.

    Raises:
        UserError: as `read_file`, and for a file that holds something else.
    """
    content = read_file(path)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} does not hold a flat dictionary of tensors")
    return content


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write safetensors and flush them to disk, with the permissions of any other new file.

    Raises:
        OSError, SafetensorError: full disk or unwritable folder.
    """
    # safetensors 0.8 makes a private file of its own and renames it over this one, whose permissions are the umask's.
    # To ask for the umask itself is to change it, for all threads of the process.
    with open(path, "wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    path.chmod(mode)
    with open(path, "rb+") as file:  # Windows flushes none that is open for reading alone
        os.fsync(file.fileno())


def write_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write safetensors under a temporary name and rename it.

    Raises:
        UserError: full disk or unwritable folder; an existing file stays as it was.
    """
    path = Path(path)
    with replacing_file(path) as temporary:
        try:
            save_tensors({name: tensor.detach().cpu() for name, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise UserError(f"cannot write {path}: {error}") from None


def write_text(text: str, path: str | Path) -> None:
    """Write a text file under a temporary name and rename it.

    What is no UTF-8, as names of folders and files need not be, is written as \\udcff.

    Raises:
        UserError: full disk or unwritable folder.
    """
    with replacing_file(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_arrays(arrays: dict[str, np.ndarray], path: str | Path) -> None:
    """Write an uncompressed `.npz` under a temporary name and rename it.

    Raises:
        UserError: full disk or unwritable folder.
    """
    with replacing_file(Path(path)) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def write_json(value: Any, path: str | Path) -> None:
    """Write indented JSON atomically; see `write_text`."""
    write_text(json.dumps(value, indent=2) + "\n", path)

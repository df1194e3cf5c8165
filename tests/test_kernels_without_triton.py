"""unite_kernels and the model on a machine without Triton: macOS, Windows, Linux on Arm; without file locks, too."""

import subprocess
import sys

from cli_toy import save_toy

SCRIPT = """
import sys
sys.modules["triton"] = None  # the import system's own mark of an absent module
import torch, unite_kernels as uk
x = torch.randn(2, 3, 8)
assert uk.rms_norm_modulate(x, None, None, torch.zeros(2, 8)).shape == x.shape
assert uk.philox_normal((4,), 0, 0, 0).shape == (4,)
uk.set_backend("triton")
for call in (lambda: uk.swiglu(x), uk.specialisation.specialisations):
    try:
        call()
    except RuntimeError as error:
        assert "pip install triton" in str(error)
        print("refused")
"""


def test_the_package_imports_and_computes():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused", "refused"]


WITHOUT_LOCKS = """
import sys
sys.modules["triton"] = sys.modules["fcntl"] = None
from unite_fast import load
from unite_fast.importing import open_trained
import unite_fast.molecules.modality
open_trained(sys.argv[1]).save(sys.argv[2])
load(sys.argv[2])
"""


def test_models_are_loaded_and_saved_where_there_are_no_file_locks(tmp_path):
    """As on Windows."""
    save_toy(tmp_path / "model")
    command = [sys.executable, "-c", WITHOUT_LOCKS, tmp_path / "model", tmp_path / "copy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

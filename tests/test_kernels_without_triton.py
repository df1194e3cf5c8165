"""unite_kernels and the model on a machine without Triton: macOS, Windows, Linux on Arm."""

import subprocess
import sys

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

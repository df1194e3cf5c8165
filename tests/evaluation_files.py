"""What `unite-fast evaluate` needs of files: a tiny model, held-out pictures, random weights of its networks.

And another process that is at work on the same pieces.
"""

import contextlib
import subprocess
import sys

import torch
from cli_toy import SIDE, picture, run, save_toy
from inception_toy import inception_weights
from test_perceptual import weights as lpips_weights

from unite_fast.evaluation.work import LOCK

HELD_OUT = 11
HOLD = (
    "import fcntl, os, sys; file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); fcntl.lockf(file, fcntl.LOCK_SH); "
    "print('held', flush=True); sys.stdin.read()"
)


@contextlib.contextmanager
def another_process(folder):
    """It shares the lock on a folder of pieces, as an evaluation does that needs them."""
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder / LOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield
    finally:
        process.communicate()


def evaluation_files(folder):
    """A model, held-out pictures, weights of Inception and LPIPS, a reference made of the pictures: the folder."""
    save_toy(folder / "model")
    for index in range(HELD_OUT):
        picture(folder / "val" / f"{index % 2}" / f"{index:02d}.png", seed=index)
    (folder / "val" / "0" / "broken.png").write_bytes(b"no picture")
    torch.save(inception_weights(), folder / "inception.pth")
    vgg, linear = lpips_weights()
    torch.save(vgg, folder / "vgg.pth")
    torch.save(linear, folder / "linear.pth")
    assert run("reference", folder / "val", "--out", folder / "ref.npz", "--inception", folder / "inception.pth",
               "--size", SIDE, "--batch", 4) == 0  # fmt: skip
    return folder

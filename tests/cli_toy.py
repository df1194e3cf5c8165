"""A model of a few thousand weights on disk, pictures for it, and the command line in this process."""

import contextlib
import resource

import numpy as np
import torch
from PIL import Image

from unite_fast import ModelConfig, Unite
from unite_fast.cli import main
from unite_fast.config import SamplingConfig
from unite_fast.model.io import save_model

SIDE = 16
CONFIG = ModelConfig(
    image_size=SIDE, patch_size=4, registers=16, latent_dim=4, depth=5, width=16, heads=2, num_classes=3,
    context_len=2, decoder=dict(depth=1, width=16, heads=2, inner=16),
)  # fmt: skip
CLASSES = ["cat", "dog", "2nd cat"]
SAMPLING = SamplingConfig(solver="heun", steps=4, guidance=1.5, interval=(0.2, 0.9))
MADE_BY = {
    "run": "toy", "step": 5, "weights": "ema", "class_names": CLASSES,
    "sampling": SAMPLING.model_dump(mode="json") | {"time_shift": 0.7},
}  # fmt: skip


def toy_model(config=CONFIG, seed=0):
    """Every weight random: a fresh network's last layers are zero and would hide what goes into it."""
    torch.manual_seed(seed)
    model = Unite(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def save_toy(folder, made_by=MADE_BY, config=CONFIG, seed=0):
    """Write the model into the folder and return it."""
    model = toy_model(config, seed)
    save_model(model.state_dict(), config, folder, made_by=made_by)
    return model


def picture(path, seed, size=(SIDE, SIDE)):
    """Write noise of (width, height) pixels; the pixels [height, width, 3] uint8 that a lossless file keeps."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def read(path):
    """[H, W, 3] uint8 of a picture."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def run(*arguments):
    """Exit code of the command line."""
    return main([str(argument) for argument in arguments])


def mistake(capsys, *arguments):
    """The one line that a command, which must fail with exit code 2, prints on stderr behind `error: `."""
    capsys.readouterr()
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), printed.err
    assert printed.out == ""
    return lines[0].removeprefix("error: ")


@contextlib.contextmanager
def small_disk(limit):
    """Let no file grow beyond `limit` bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))  # Python ignores SIGXFSZ, so writes fail instead
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def same_weights(model, other):
    state, expected = model.state_dict(), other.state_dict()
    return set(state) == set(expected) and all(torch.equal(state[name], expected[name]) for name in expected)

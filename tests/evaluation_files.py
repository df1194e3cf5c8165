"""What `unite-fast evaluate` needs of files: a tiny model, held-out pictures, random weights of its networks."""

import torch
from cli_toy import SIDE, picture, run, save_toy
from inception_toy import inception_weights
from test_perceptual import weights as lpips_weights

HELD_OUT = 11


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

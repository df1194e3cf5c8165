"""Activations of both passes of a trained image model: tokenization of images, denoising of their noised latents.

What is compared of a block is the mean of its register tokens, which both passes have (the patches, which only
tokenization has, and the context tokens are left out): one vector of C numbers an image, of the residual stream behind
the block's closing norm. Everything comes in batches; what belongs to an image depends on (seed, number) alone.
Shapes: n images, K registers, D latent channels, L blocks, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unite_fast.config import DataConfig, ModelConfig
from unite_fast.data.reader import FileReader
from unite_fast.data.source import open_images, open_source
from unite_fast.errors import UserError
from unite_fast.evaluation.generation import encode, register_noise
from unite_fast.evaluation.held_out import evenly_chosen, read_images
from unite_fast.evaluation.protocol import names_hash
from unite_fast.evaluation.reconstruction import require_finite
from unite_fast.evaluation.small_data import FEATURE_SIDE
from unite_fast.model.generative_encoder import GenerativeEncoder
from unite_fast.model.unite import Unite

NOISE_STREAM = 2  # of the counter-based generator, beside those of evaluation.generation


class Tokenized(NamedTuple):
    """The first pass over the n readable images of a selection.

    Attributes:
        z0: [n, K, D] float32.
        blocks: [L, n, C] float32, mean register token behind each block.
        pixels: [n, 3·side²] float32 in [0, 1], the images averaged to at most 16×16.
        labels: [n] int64, None where the selection has none.
        unreadable: files that were left out.
    """

    z0: Tensor
    blocks: Tensor
    pixels: Tensor
    labels: Tensor | None
    unreadable: list[str]


class Denoised(NamedTuple):
    """The second pass over n noised latents.

    Attributes:
        clean: [n, K, D] float32, the prediction ẑ0.
        blocks: [L, n, C] float32, mean register token behind each block.
    """

    clean: Tensor
    blocks: Tensor


@dataclass
class Images:
    """A selection of a folder's images, evenly spread over its sorted paths.

    Attributes:
        reader: of the folder.
        chosen: indices of the selection.
        labels: [n] int64, None where the images stand in no class folders.
        unlabelled: why there are none.
    """

    reader: FileReader
    chosen: list[int]
    labels: Tensor | None
    unlabelled: str | None = None

    @classmethod
    def open(
        cls, path: str | Path, config: DataConfig, sizes: ModelConfig, classes: list[str] | None, count: int
    ) -> Images:
        """Class folders or prepared shards as in training; without fitting classes every image below the folder.

        Args:
            config: its `crop`.
            classes: names that class folders must have, None where they are not on record.
            count: images at most.

        Raises:
            UserError: no folder, or no image in it.
        """
        unlabelled, labels = None, None
        try:
            folder = open_source(path, sizes.num_classes, image_size=sizes.image_size, expected=classes)
        except UserError as error:
            folder, unlabelled = open_images(path, image_size=sizes.image_size), str(error)
        chosen = evenly_chosen(len(folder), count)
        if unlabelled is None:
            labels = torch.from_numpy(folder.labels[chosen])
        return cls(FileReader(folder, sizes.image_size, config.crop), chosen, labels, unlabelled)

    def __len__(self) -> int:
        return len(self.chosen)

    def path(self, place: int) -> str:
        """Of one of the selection."""
        return self.reader.folder.path(self.chosen[place])

    @property
    def about(self) -> dict[str, Any]:
        """What identifies the selection."""
        names = [self.reader.folder.name(index) for index in self.chosen]
        return {
            "path": str(self.reader.folder.root), "images": len(self), "names_sha256": names_hash(names),
            "crop": self.reader.crop,
        }  # fmt: skip

    def batches(self, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(number of the first image, pixels [b, 3, H, H] uint8, which of them are readable [b] bool).

        Raises:
            UserError: an image of another size under crop "none".
        """
        for first in range(0, len(self), size):
            yield first, *read_images(self.reader, self.chosen[first : first + size])


@contextmanager
def register_tokens(encoder: GenerativeEncoder) -> Iterator[list[Tensor]]:
    """Within, each forward of the encoder puts the mean register token [B, C] float32 of every block into the list.

    The list is the forward's, L long: take what is in it before the next one, which begins it anew.
    """
    found: list[Tensor] = []
    last = len(encoder.blocks) - 1
    context = encoder.context.shape[1] if encoder.context_start is not None else 0

    def keep(index: int) -> Callable[..., None]:
        # Context joins in front behind the block before `context_start`, and the last block leaves registers alone.
        first = context if context and encoder.context_start <= index + 1 and index < last else 0

        def hook(_module, _arguments, outputs) -> None:
            if index == 0:
                found.clear()
            found.append(outputs[0][:, first : first + encoder.registers].float().mean(1))

        return hook

    handles = [block.register_forward_hook(keep(index)) for index, block in enumerate(encoder.blocks)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def tokenize(model: Unite, images: Images, *, seed: int, batch: int, advance: Callable[[int], None]) -> Tokenized:
    """The first pass: register noise by number, the tokenization time of evaluation, no label.

    Raises:
        UserError: no readable image, latents with NaN.
    """
    side = min(FEATURE_SIDE, model.config.image_size)
    latents, blocks, small, kept = [], [], [], []
    with register_tokens(model.encoder) as found:
        for first, pixels, readable in images.batches(batch):
            latents.append(encode(model, pixels, seed=seed, first=first).cpu()[readable])
            blocks.append(torch.stack(found).cpu()[:, readable])
            small.append(F.adaptive_avg_pool2d(pixels[readable].float() / 255, side).flatten(1))
            kept.append(readable)
            advance(len(pixels))
    readable = torch.cat(kept)
    unreadable = [images.path(place) for place in (~readable).nonzero().flatten().tolist()]
    if len(unreadable) == len(images):
        raise UserError(f"none of {len(images)} files of {images.reader.folder.root} is a readable image")
    z0 = torch.cat(latents)
    require_finite(z0, "latents")
    labels = None if images.labels is None else images.labels[readable]
    return Tokenized(z0, torch.cat(blocks, dim=1), torch.cat(small), labels, unreadable)


@torch.no_grad()
def denoise(
    model: Unite, z0: Tensor, t: float, labels: Tensor, *, seed: int, batch: int, advance: Callable[[int], None]
) -> Denoised:
    """The second pass on z_t = t z0 + (1 − t) ε; ε of image i depends on (seed, i) alone and is the same at every t.

    Args:
        z0: [n, K, D].
        labels: [n]; `model.null_label` stands for no class.
    """
    latents, blocks = [], []
    encoder = model.encoder if model.config.shared else model.denoiser
    with register_tokens(encoder) as found:
        for first in range(0, len(z0), batch):
            clean = z0[first : first + batch].to(model.device)
            z_t = noised(model, clean, t, seed=seed, first=first)
            times = z_t.new_full((len(clean),), t)
            latents.append(model.denoise(z_t, times, labels[first : first + batch].to(z_t.device)).cpu())
            blocks.append(torch.stack(found).cpu())
            advance(len(clean))
    return Denoised(torch.cat(latents), torch.cat(blocks, dim=1))


def noised(model: Unite, clean: Tensor, t: float, *, seed: int, first: int) -> Tensor:
    """z_t [b, K, D] of the latents of images number `first` …, on the model's device."""
    noise = register_noise(model, len(clean), seed=seed, stream=NOISE_STREAM, first=first)
    return t * clean.to(noise.device) + (1 - t) * noise

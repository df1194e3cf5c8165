"""Held-out images: their features, their reconstructions, and how close those are."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from unite_fast.data.reader import FileReader, Problem
from unite_fast.data.source import warn_once
from unite_fast.evaluation.generation import encode, to_bytes
from unite_fast.evaluation.inception import FEATURES, Inception
from unite_fast.evaluation.protocol import names_hash
from unite_fast.evaluation.reconstruction import l1, psnr, require_finite
from unite_fast.evaluation.work import Work
from unite_fast.model.unite import Unite
from unite_fast.objective.perceptual import Lpips

READ_THREADS = 8  # Pillow's decoders release the GIL
SSIM_WINDOW = 11  # pixels (Wang et al. 2004), who count only places where it lies inside the image


def evenly_chosen(total: int, limit: int | None) -> list[int]:
    """Indices of at most `limit` of so many, evenly spread from the first on; None takes all."""
    count = min(total, limit or total)
    return [place * total // count for place in range(count)]


class HeldOut:
    """A fixed selection of a folder's images and what is measured on them.

    Args:
        reader: of a folder, as `open_images` gives it.
        limit: how many images, evenly spread over the sorted paths; None takes all.
        batch: images of one piece of work.
        inception: for features, where they are asked for.
        lpips: for lpips.

    Attributes:
        chosen: indices of the selection.
        about: what identifies it: a hash of the chosen paths, and the crop.
    """

    def __init__(
        self, reader: FileReader, limit: int | None, batch: int, inception: Inception | None, lpips: Lpips | None
    ):
        self._reader, self._batch, self._inception, self._lpips = reader, batch, inception, lpips
        self.chosen = evenly_chosen(len(reader.folder), limit)
        names = [reader.folder.name(index) for index in self.chosen]
        self.about: dict[str, Any] = {"names_sha256": names_hash(names), "crop": reader.crop}

    def measure(
        self,
        model: Unite,
        device: torch.device,
        work: Work,
        key: dict[str, Any],
        *,
        pairs: frozenset[str],
        with_real: bool,
        seed: int,
        autocast: Callable[[torch.device], AbstractContextManager],
    ) -> dict[str, Tensor] | None:
        """Read, reconstruct and compare. Collective.

        Args:
            key: what determines reconstructions beside this selection.
            pairs: which of psnr, l1, ssim, lpips and rfid are wanted of originals and reconstructions.
            with_real: whether features of the originals are.
            seed: of the register noise.
            autocast: surrounds the network.

        Returns:
            On rank 0 number [n] of each readable image; psnr, l1, ssim, lpips [n]; real, rebuilt [n, 2048].

        Raises:
            UserError: reconstructions with NaN.
        """

        def make(first: int, stop: int) -> dict[str, Tensor]:
            pixels, readable = read_images(self._reader, self.chosen[first:stop])
            made = {"number": torch.arange(first, stop)[readable]}
            if not readable.any():
                return made | _nothing(pairs, with_real)
            originals = pixels[readable].to(device)
            if pairs:
                # All of them, with blanks for unreadable files: the noise belongs to an image's number.
                with autocast(device), torch.no_grad():
                    rebuilt = model.decode(encode(model, pixels, seed=seed, first=first))
                rebuilt = rebuilt.float()[readable.to(device)]
                require_finite(rebuilt, "reconstructions")
                made |= self._compare(originals, rebuilt.clamp(0, 1), pairs)
                if "rfid" in pairs:
                    made["rebuilt"] = self._inception(to_bytes(rebuilt))[0]
            if with_real:
                made["real"] = self._inception(originals)[0]
            return made

        key = key | self.about | {
            "real": with_real, "pairs": sorted(pairs), "inception": self._inception.sha256 if with_real else None,
            "lpips": self._lpips.sha256 if "lpips" in pairs else None,
            "tokenize_time": model.tokenize_time if pairs else None,
        }  # fmt: skip
        what, count = "reconstructing" if pairs else "reading", len(self.chosen)
        return work.gather(what, key, count, self._batch, make, common=True)

    @torch.no_grad()
    def _compare(self, originals: Tensor, rebuilt: Tensor, pairs: frozenset[str]) -> dict[str, Tensor]:
        made = {"psnr": psnr(originals, rebuilt), "l1": l1(originals, rebuilt)}
        exact = originals.float() / 255
        # SSIM's variances are differences E[x²] − E[x]² of convolutions. TF32 keeps 10 bits of the pixels: an error of
        # 5e-4 beside the constant of 9e-4 that decides in flat regions.
        with torch.backends.cudnn.flags(True, allow_tf32=False):
            if "ssim" in pairs:
                from torchmetrics.functional.image import structural_similarity_index_measure

                # Of torchmetrics the map alone: its mean counts windows over the edge, filled up by reflection.
                _, values = structural_similarity_index_measure(
                    rebuilt, exact, data_range=1.0, reduction="none", return_full_image=True
                )
                edge = SSIM_WINDOW // 2
                made["ssim"] = values[..., edge:-edge, edge:-edge].double().mean((1, 2, 3))
            if "lpips" in pairs:
                made["lpips"] = self._lpips.distances(exact, rebuilt)
        return made


def read_images(reader: FileReader, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Pixels of images, side by side in threads; names unusable ones in the log.

    Returns:
        [n, 3, H, H] uint8, zero where a file is unreadable; [n] bool, true where it is not.

    Raises:
        WrongSizeError: crop "none" and an image of another size.
    """
    with ThreadPoolExecutor(min(READ_THREADS, os.cpu_count() or 1)) as pool:
        found = list(pool.map(reader.pixels, indices))
    side = reader.image_size
    pixels = torch.zeros(len(indices), side, side, 3, dtype=torch.uint8)
    readable = torch.tensor([not isinstance(image, Problem) for image in found], dtype=torch.bool)
    for place, image in enumerate(found):
        if isinstance(image, Problem):
            warn_once(f"skipped unusable image {reader.folder.path(image.index)}: {image.reason}")
        else:
            pixels[place] = torch.tensor(image)
    return pixels.permute(0, 3, 1, 2).contiguous(), readable


def _nothing(pairs: frozenset[str], with_real: bool) -> dict[str, Tensor]:
    """The tensors of a piece without a readable image."""
    numbers = {"psnr", "l1"} | (pairs & {"ssim", "lpips"}) if pairs else set()
    vectors = ({"real"} if with_real else set()) | ({"rebuilt"} if "rfid" in pairs else set())
    return {name: torch.empty(0) for name in numbers} | {name: torch.empty(0, FEATURES) for name in vectors}

"""Micro-batches through NVIDIA DALI: JPEG decoded by its threads or on a GPU, cropped by our own resampler.

The order, the flips and the substitutes are those of the worker loader, and in decode mode "exact" so is every bit.
DALI gets plain JPEG files and nothing else, see jpeg.py. All other files take the worker loader's own way through
Pillow, and so do those that DALI refuses or whose last pixel is the grey that libjpeg puts where data are missing.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from torch import Tensor

from unite_fast.config import DaliConfig, DataConfig
from unite_fast.data.crop import centre_crop, ends_grey
from unite_fast.data.jpeg import Jpeg, JpegReader
from unite_fast.data.loader import FolderStream, MicroBatch
from unite_fast.data.reader import Served, piece_of, serve
from unite_fast.data.resample import TALL_FIRST
from unite_fast.data.sampler import Draw, flips
from unite_fast.errors import UserError
from unite_kernels import centre_crop as centre_crop_on_device

INSTALL = "pip install nvidia-dali-cuda130 (or the package of your CUDA version)"


def dali_version() -> str | None:
    """Version of the DALI that is installed, or None."""
    try:
        import nvidia.dali
    except ImportError:
        return None
    return nvidia.dali.__version__


class DecoderError(Exception):
    """DALI could not decode some images of a micro-batch.

    Attributes:
        places: which of them, as far as DALI says; None where it does not.
    """

    def __init__(self, message: str, places: list[int] | None):
        super().__init__(message)
        self.places = places


class JpegDecoder:
    """DALI's pipeline: encoded bytes in, RGB images and their last pixels out, some micro-batches ahead."""

    def __init__(self, config: DaliConfig, batch: int, fast: bool, device: torch.device):
        self._config, self._batch, self._fast, self._device = config, batch, fast, device
        self.restart()

    def restart(self) -> None:
        """A new pipeline: after an error DALI's is of no more use, and takes what was fed to it along."""
        from nvidia.dali import fn, pipeline_def, types

        config, cuda = self._config, self._device.type == "cuda"

        @pipeline_def(
            batch_size=self._batch, num_threads=config.threads, device_id=self._device.index or 0 if cuda else None,
            # With a depth of n DALI's first run wants n inputs at once; `submit` may be ahead of `take` all the same.
            exec_dynamic=True, prefetch_queue_depth=1,
        )  # fmt: skip
        def pipeline():
            encoded = fn.external_source(name="encoded")
            options = {"output_type": types.RGB, "adjust_orientation": False}
            if self._fast and cuda:
                options |= {"device": "mixed", "hw_decoder_load": config.hw_decoder_load}
                if config.preallocate:
                    width, height = config.preallocate
                    options |= {"preallocate_width_hint": width, "preallocate_height_hint": height}
            else:
                options |= {"device": "cpu", "use_fast_idct": self._fast}
            images = fn.decoders.image(encoded, **options)
            corners = fn.crop(images, crop_h=1, crop_w=1, crop_pos_x=1.0, crop_pos_y=1.0)
            return (images.gpu() if cuda else images), corners.cpu()

        self._pipeline = pipeline()
        self._pipeline.build()

    def close(self) -> None:
        """Let the pipeline and its memory go."""
        self._pipeline = None

    def submit(self, jpegs: Sequence[Jpeg]) -> None:
        """Begin to decode.

        Raises:
            DecoderError: as `take`, about images submitted before.
        """
        with _image_errors():
            self._pipeline.feed_input("encoded", [jpeg.data for jpeg in jpegs])
            self._pipeline.schedule_run()

    def take(self) -> tuple[Any, NDArray[np.bool_]]:
        """The oldest decoded images, a DALI tensor list [h, w, 3] each until `release`; and which `ends_grey`: [b].

        Raises:
            DecoderError: some cannot be decoded, or some of those submitted after them; see `restart`.
        """
        with _image_errors():
            # Without a stream given, DALI has finished on return; this thread is the only one that waits.
            images, corners = self._pipeline.share_outputs()
            grey = ends_grey(np.asarray(corners.as_array()).reshape(len(corners), 3))
        return images, grey

    def release(self) -> None:
        """Give the memory of the images last taken back."""
        self._pipeline.release_outputs()


@contextmanager
def _image_errors() -> Iterator[None]:
    """DALI's errors about images as DecoderError; anything else, such as a lack of memory, passes."""
    try:
        yield
    except RuntimeError as error:
        places = [int(number) for number in re.findall(r"decode sample #(\d+)", str(error))]
        # nvImageCodec's codes 3 and 4 are a bad and an unsupported code stream; it does not say whose.
        if places or re.search(r"nvImageCodec failure: '#[34]'", str(error)):
            raise DecoderError(str(error), places or None) from error
        raise


class _Batch(NamedTuple):
    draw: Draw
    places: list[Served]

    def jpegs(self) -> list[Jpeg]:
        return [place.found for place in self.places if isinstance(place.found, Jpeg)]

    def jpeg_places(self) -> list[int]:
        return [number for number, place in enumerate(self.places) if isinstance(place.found, Jpeg)]


class DaliStream(FolderStream):
    """The stream through DALI; images lie on the device.

    It works where it is called from: `stream.Ahead` runs it beside the training step.
    """

    def __init__(self, config: DataConfig, *, device: torch.device = torch.device("cpu"), **numbers: Any):
        """Open the data and build the pipeline.

        Args:
            config, numbers: as `FolderStream`.
            device: where the images shall lie.

        Raises:
            UserError: also where DALI is not installed.
        """
        version = dali_version()
        if version is None:
            raise UserError(f"data.loader dali needs NVIDIA DALI, which is not installed: {INSTALL}")
        super().__init__(config, **numbers)
        self.mode = {
            "loader": "dali", "decode": config.decode, "crop": config.crop,
            "decoded_on": device.type if config.decode == "fast" else "cpu",  # exact: the CPU's decoder, bit for bit
            "pillow": PIL.__version__, "dali": version,
        }  # fmt: skip
        self._device = device
        self._reader = JpegReader(self._files)
        self._draws = self._sampler.draws(self._start_step)
        self._decoder = JpegDecoder(config.dali, self._sampler.micro_batch, config.decode == "fast", device)
        self._pool = ThreadPoolExecutor(config.dali.threads, thread_name_prefix="data")
        self._reading: deque[tuple[Draw, list[Future[Served]]]] = deque()
        self._decoding: deque[_Batch] = deque()

    def __next__(self) -> MicroBatch:
        """The next micro-batch.

        Raises:
            UserError: too many unusable images, a wrong size under crop "none".
        """
        self._require_open()
        try:
            while len(self._decoding) < self._config.dali.prefetch:
                self._begin_one()
            images, batch = self._finish_one()
            return self._accept(piece_of(batch.draw, batch.places, images, self._folder.labels))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the threads; calling it again does nothing."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()

    def _begin_one(self) -> None:
        """Hand one micro-batch to DALI, and see that files are read for as many more as DALI decodes ahead."""
        while len(self._reading) <= self._config.dali.prefetch:
            draw = next(self._draws)
            tasks = zip(draw.epochs.tolist(), draw.indices.tolist())
            self._reading.append((draw, [self._pool.submit(serve, self._reader, self._seed, *task) for task in tasks]))
        draw, futures = self._reading.popleft()
        batch = _Batch(draw, [future.result() for future in futures])
        self._decoding.append(batch)
        try:
            self._submit(batch)
        except DecoderError:
            self._recover()

    def _submit(self, batch: _Batch) -> None:
        jpegs = batch.jpegs()
        if jpegs:
            self._decoder.submit(jpegs)

    def _finish_one(self) -> tuple[Tensor, _Batch]:
        """Pixels [b, 3, H, H] of the oldest micro-batch on the device, and what they were made of."""
        batch = self._decoding[0]
        decoded, numbers = None, batch.jpeg_places()
        while numbers and decoded is None:
            try:
                decoded, grey = self._decoder.take()
            except DecoderError:
                self._recover()
                numbers = batch.jpeg_places()
        if decoded is not None:
            self._serve_by_pillow(batch, [number for number, is_grey in zip(numbers, grey) if is_grey])
        self._decoding.popleft()
        if any(place.fatal for place in batch.places):
            return torch.empty(0), batch
        indices = np.array([place.index for place in batch.places])
        mirrored = flips(self._seed, batch.draw.epochs, indices) & self._config.flip
        gather = self._gather_on_device if self._device.type == "cuda" else self._gather_on_host
        images = gather(batch, decoded, numbers, mirrored)
        if decoded is not None:
            self._decoder.release()
        return images, batch

    def _gather_on_host(self, batch: _Batch, decoded: Any, numbers: list[int], mirrored: NDArray[np.bool_]) -> Tensor:
        size = self._files.image_size
        images = np.empty((len(batch.places), 3, size, size), np.uint8)
        where = {number: place for place, number in enumerate(numbers)}

        def fill(number: int) -> None:
            pixels = batch.places[number].found
            if isinstance(pixels, Jpeg):
                pixels = np.asarray(decoded.at(where[number]))
                pixels = pixels if self._config.crop == "none" else centre_crop(pixels, size)
            images[number] = (pixels[:, ::-1] if mirrored[number] else pixels).transpose(2, 0, 1)

        list(self._pool.map(fill, range(len(batch.places))))
        return torch.from_numpy(images)

    def _gather_on_device(self, batch: _Batch, decoded: Any, numbers: list[int], mirrored: NDArray[np.bool_]) -> Tensor:
        shapes = [tuple(shape) for shape in decoded.shape()] if decoded is not None else []
        flat = torch.empty(sum(map(math.prod, shapes)), dtype=torch.uint8, device=self._device)
        if shapes:
            stream = torch.cuda.current_stream(self._device).cuda_stream
            # Waits for the copy, after which DALI may have its memory back.
            decoded.copy_to_external(ctypes.c_void_p(flat.data_ptr()), ctypes.c_void_p(stream))
        sizes = [(height, width) for height, width, _ in shapes]
        return gather(
            flat, sizes, numbers, [place.found for place in batch.places], mirrored, self._files.image_size,
            self._config.crop,
        )  # fmt: skip

    def _serve_by_pillow(self, batch: _Batch, numbers: list[int]) -> None:
        """Read places again, without DALI."""
        places = [(int(batch.draw.epochs[number]), int(batch.draw.indices[number])) for number in numbers]
        self._reader.refused.update(batch.places[number].index for number in numbers)
        served = self._pool.map(lambda place: serve(self._files, self._seed, *place), places)
        for number, place in zip(numbers, served):
            batch.places[number] = place

    def _recover(self) -> None:
        """Find what DALI cannot decode, let Pillow judge it, and hand in everything else again.

        Each micro-batch is tried alone, because DALI's error may come with one that was fed to it earlier.
        """
        for batch in self._decoding:
            while batch.jpegs():
                self._decoder.restart()
                try:
                    self._submit(batch)
                    self._decoder.take()
                    break
                except DecoderError as error:
                    numbers = batch.jpeg_places()
                    self._serve_by_pillow(batch, [numbers[place] for place in error.places or range(len(numbers))])
        self._decoder.restart()
        for batch in self._decoding:
            self._submit(batch)


def gather(
    flat: Tensor,
    sizes: Sequence[tuple[int, int]],
    numbers: Sequence[int],
    found: Sequence[Any],
    mirrored: NDArray[np.bool_],
    size: int,
    crop: Literal["adm", "none"],
) -> Tensor:
    """A micro-batch on the device from decoded images of any size and from pixels that Pillow made.

    Args:
        flat: the decoded images, one behind the other, uint8 on the device.
        sizes: their (h, w).
        numbers: the places in the micro-batch that they were decoded for.
        found: what stands at every place [b]: pixels [H, H, 3] on the host, or a `Jpeg` for one of the decoded.
        mirrored: [b], which places are flipped.
        size: side H.
        crop: "none" where all decoded images have that size already.

    Returns:
        [b, 3, H, H] uint8.
    """
    device = flat.device

    def upload(x: Tensor) -> Tensor:
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x

    if crop == "none":
        pixels = flat.view(len(sizes), size, size, 3)
    else:
        pixels = centre_crop_on_device(flat, sizes, size, tall_first=TALL_FIRST)
    order = dict(zip(numbers, range(len(numbers))))
    by_pillow = [number for number, what in enumerate(found) if not isinstance(what, Jpeg)]
    order |= dict(zip(by_pillow, range(len(numbers), len(numbers) + len(by_pillow))))
    if by_pillow:
        host = np.stack([found[number] for number in by_pillow])
        pixels = torch.cat([pixels, upload(torch.from_numpy(host))])
    images = pixels[upload(torch.tensor([order[number] for number in range(len(found))]))].permute(0, 3, 1, 2)
    flip = upload(torch.from_numpy(mirrored)).view(-1, 1, 1, 1)
    return torch.where(flip, images.flip(3), images).contiguous()

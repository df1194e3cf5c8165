"""The DALI loader against the worker loader: the same images, the same files skipped, counted and named."""

from __future__ import annotations

import ctypes
import gc
import shutil
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_trees import picture
from test_data_hostile import CONVERTED, SKIPPED
from test_data_hostile import jpeg as encoded

from unite_fast.config import DataConfig
from unite_fast.data import dali as dali_module
from unite_fast.data.dali import DaliStream, JpegDecoder
from unite_fast.data.loader import ImageStream
from unite_fast.data.prepare import prepare
from unite_fast.data.sampler import Sampler
from unite_fast.data.source import open_source
from unite_fast.data.stream import open_stream
from unite_fast.errors import UserError

Pipeline = pytest.importorskip("nvidia.dali", reason="pip install nvidia-dali-cuda130").Pipeline
CPU = torch.device("cpu")
SIZE = 32
PLAIN = dict(image_size=SIZE, num_classes=3, seed=0, global_batch=4, micro_batch=4, accumulation=1)
KINDS = [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Three classes of JPEG files of many sizes and kinds, one of them grey."""
    root = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for number in range(21):
        folder = root / f"c{number % 3}"
        folder.mkdir(exist_ok=True)
        image = picture(*(int(side) for side in generator.integers(20, 160, 2)), seed=number)
        image = image.convert("L") if number == 4 else image
        (folder / f"{number:02d}.jpg").write_bytes(encoded(image, **KINDS[number % 4]))
    return root


@pytest.fixture
def copy(photographs, tmp_path) -> Path:
    return Path(shutil.copytree(photographs, tmp_path / "copy"))


def open_both(root, *, threads=2, prefetch=2, crop="adm", share=0.9, decode="exact", flip=True, **numbers):
    numbers = dict(image_size=SIZE, num_classes=3, seed=5, global_batch=8, micro_batch=4, accumulation=2) | numbers
    config = {"path": str(root), "workers": 0, "crop": crop, "max_bad_share": share, "flip": flip}
    workers = ImageStream(DataConfig(**config, loader="workers"), **numbers)
    dali = {"threads": threads, "prefetch": prefetch}
    config = DataConfig(**config, loader="dali", decode=decode, dali=dali)
    return workers, open_stream(config, device=CPU, **numbers)


def assert_alike(root, count: int, **options) -> dict[str, str]:
    """Both loaders give the same micro-batches, and name the same files; returns those."""
    workers, dali = open_both(root, **options)
    with workers, dali:
        for _ in range(count):
            ours, theirs = next(dali), next(workers)
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)
            assert torch.equal(ours.indices, theirs.indices)
            assert ours[3:] == theirs[3:]
        found = workers.bad_files
        # The thread may be ahead, and have met more of them; by now it has met all of these.
        assert found.items() <= dali.bad_files.items()
    return found


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (2, 2), (3, 5)])
def test_bit_for_bit_the_worker_loader(photographs, threads, prefetch):
    assert assert_alike(photographs, 20, threads=threads, prefetch=prefetch) == {}


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks(photographs, world_size):
    numbers = dict(global_batch=24, micro_batch=24 // world_size, accumulation=1, world_size=world_size)
    for rank in {0, world_size - 1}:
        assert_alike(photographs, 3, rank=rank, **numbers)


@pytest.mark.parametrize("start_step", [3, 10**6])
def test_resume(photographs, start_step):
    assert_alike(photographs, 4, start_step=start_step)


def test_without_flips(photographs):
    assert_alike(photographs, 6, flip=False)


def test_order_is_the_samplers(photographs):
    _, dali = open_both(photographs)
    sampler = Sampler(21, 5, 8, 4, 2)
    with dali:
        for number in range(12):
            batch, draw = next(dali), sampler.draw(*divmod(number, 2))
            assert batch.indices.tolist() == draw.indices.tolist()
            assert (batch.step, batch.micro_batch) == (draw.step, draw.micro_batch)


def test_from_shards(photographs, tmp_path):
    prepare(open_source(photographs, 3), tmp_path / "shards", size=None, shard_images=5)
    assert_alike(tmp_path / "shards", 6)


def test_images_of_the_size_already(tmp_path):
    for number in range(6):
        path = tmp_path / "d" / f"c{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(SIZE, SIZE, seed=number)))
    assert_alike(tmp_path / "d", 6, crop="none")
    (tmp_path / "d" / "c1" / "4.jpg").write_bytes(encoded(picture(SIZE, SIZE + 1)))
    messages = []
    for images in open_both(tmp_path / "d", crop="none"):
        with images, pytest.raises(UserError, match=rf"4.jpg is {SIZE}×{SIZE + 1} pixels") as error:
            for _ in range(6):
                next(images)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def add_odd_and_hostile_files(copy) -> None:
    for name, (content, *_) in (SKIPPED | CONVERTED).items():
        for label in (0, 2):
            (copy / f"c{label}" / name).write_bytes(content)


def test_odd_and_hostile_files(copy):
    """All of them in one set, twice over, so that a micro-batch may hold several."""
    add_odd_and_hostile_files(copy)
    found = assert_alike(copy, 40)
    assert {Path(path).name for path in found} == set(SKIPPED)


def test_no_jpeg_at_all(tmp_path):
    for number in range(6):
        path = tmp_path / "d" / f"c{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(40, 50, seed=number).save(path)
    assert_alike(tmp_path / "d", 6)


@pytest.mark.parametrize("seed", range(4))
def test_overwritten_bytes(photographs, tmp_path, seed):
    """Damage anywhere in a JPEG: both decoders make the same of it, or the file is skipped by both."""
    generator = np.random.default_rng(seed)
    sources = [path.read_bytes() for path in sorted(photographs.rglob("*.jpg"))]
    for number in range(30):
        data = bytearray(sources[number % len(sources)])
        for place in generator.integers(2, len(data), generator.integers(1, 12)):
            data[place] = generator.integers(0, 256)
        if number % 3 == 0:  # a piece missing in the middle
            start = int(generator.integers(300, len(data) - 100))
            del data[start : start + int(generator.integers(1, 60))]
        path = tmp_path / "d" / f"c{number % 3}" / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert_alike(tmp_path / "d", 15)


def test_too_many_bad_files_stop_the_run(copy):
    for path in list(copy.rglob("*.jpg"))[:12]:
        path.write_bytes(path.read_bytes()[:200])
    messages = []
    for images in open_both(copy, share=0.1):
        with images, pytest.raises(UserError, match="max_bad_share") as error:
            for _ in range(20):
                next(images)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_nothing_readable(copy):
    for path in copy.rglob("*.jpg"):
        path.write_bytes(b"")
    for images in open_both(copy, share=1.0):
        with images, pytest.raises(UserError, match="no readable image among 101 tries"):
            next(images)


def test_fast_decode_is_close(photographs):
    """Another rounding of the transform, nothing else."""
    workers, dali = open_both(photographs, decode="fast")
    with workers, dali:
        assert dali.mode["decode"] == "fast"
        different = 0
        for _ in range(10):
            ours, theirs = next(dali), next(workers)
            assert torch.equal(ours.indices, theirs.indices)
            gap = (ours.images.int() - theirs.images.int()).abs()
            assert gap.float().mean() < 2
            different += int((gap > 0).sum())
        assert different


class OnDevice:
    """Decoded images, copied from as those on a GPU are."""

    def __init__(self, images):
        self.images, self.shape = images, images.shape

    def copy_to_external(self, target, stream):
        assert stream.value == 7
        flat = np.concatenate([np.asarray(self.images.at(place)).ravel() for place in range(len(self.images))])
        ctypes.memmove(target, flat.ctypes.data, flat.nbytes)


def test_the_way_of_a_gpu(copy, monkeypatch):
    """From the decoder to the micro-batch by what a GPU's images pass through, on the CPU."""
    add_odd_and_hostile_files(copy)
    take = JpegDecoder.take

    def on_device(self):
        images, grey = take(self)
        return OnDevice(images), grey

    monkeypatch.setattr(JpegDecoder, "take", on_device)
    monkeypatch.setattr(DaliStream, "_gather_on_host", DaliStream._gather_on_device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    assert_alike(copy, 20)


@pytest.mark.parametrize(("decode", "where"), [("exact", "cpu"), ("fast", "cuda")])
def test_the_record_says_where_a_gpu_run_decodes(photographs, monkeypatch, decode, where):
    monkeypatch.setattr(dali_module, "JpegDecoder", lambda *_: SimpleNamespace(close=lambda: None))
    config = DataConfig(path=str(photographs), loader="dali", decode=decode)
    with DaliStream(config, device=torch.device("cuda", 0), **PLAIN) as dali:
        assert (dali.mode["decode"], dali.mode["decoded_on"]) == (decode, where)


def test_errors_that_come_while_others_are_handed_in(photographs, monkeypatch):
    """DALI may then say what it could not decode of those before; nothing is lost."""
    schedule, calls = Pipeline.schedule_run, []

    def failing(self):
        calls.append(self)
        if len(calls) in (2, 8):
            raise RuntimeError("Failed to decode sample #0")
        schedule(self)

    monkeypatch.setattr(Pipeline, "schedule_run", failing)
    assert_alike(photographs, 8)
    assert len(calls) > 8


def test_a_pipeline_that_failed_is_not_used_again(photographs, monkeypatch):
    schedule, share, calls, failed = Pipeline.schedule_run, Pipeline.share_outputs, [], []

    def scheduling(self):
        assert self not in failed
        schedule(self)

    def failing(self):
        calls.append(self)
        if len(calls) in (2, 3):  # in its turn, and where it is tried alone
            failed.append(self)
            raise RuntimeError("Failed to decode sample #0")
        return share(self)

    monkeypatch.setattr(Pipeline, "schedule_run", scheduling)
    monkeypatch.setattr(Pipeline, "share_outputs", failing)
    assert_alike(photographs, 6, prefetch=1, micro_batch=1, accumulation=8)
    assert len(failed) == 2


def test_what_dali_fails_at_it_is_not_given_again(copy, monkeypatch):
    """Of a file that DALI refuses each time would cost a new pipeline."""
    content = encoded(picture(60, 60))[:-300] + b"\xff\xd9"
    (copy / "c0" / "00.jpg").write_bytes(content)
    submit, given = JpegDecoder.submit, []

    def submitting(self, jpegs):
        given.extend(jpeg for jpeg in jpegs if jpeg.data.tobytes() == content)
        submit(self, jpegs)

    monkeypatch.setattr(JpegDecoder, "submit", submitting)
    _, dali = open_both(copy, prefetch=1, global_batch=7, micro_batch=7, accumulation=1)
    with dali:
        for _ in range(30):  # ten epochs, of which the second may have been read before
            next(dali)
    assert 1 <= len(given) <= 2


def test_images_are_released_after_their_last_use(photographs, monkeypatch):
    share, release, taken = Pipeline.share_outputs, Pipeline.release_outputs, []

    def sharing(self):
        assert not taken  # those before were released
        taken.append(share(self))
        return taken[0]

    def releasing(self):
        images, _ = taken.pop()
        for place in range(len(images)):
            image = np.asarray(images[place])  # DALI's own memory
            ctypes.memset(image.ctypes.data, 255, image.nbytes)
        release(self)

    monkeypatch.setattr(Pipeline, "share_outputs", sharing)
    monkeypatch.setattr(Pipeline, "release_outputs", releasing)
    assert_alike(photographs, 8)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_how_far_it_reads_ahead(photographs, monkeypatch, prefetch):
    served, submitted = [], []
    serve, submit = dali_module.serve, JpegDecoder.submit
    monkeypatch.setattr(dali_module, "serve", lambda *place: served.append(place) or serve(*place))
    monkeypatch.setattr(JpegDecoder, "submit", lambda self, jpegs: submitted.append(jpegs) or submit(self, jpegs))
    config = DataConfig(path=str(photographs), dali={"threads": 1, "prefetch": prefetch})
    with DaliStream(config, **PLAIN) as dali:
        for taken in range(3):
            next(dali)
            dali._pool.submit(int).result()  # the one thread has done all that was asked for before
            assert len(submitted) == taken + prefetch
            assert len(served) == 4 * (taken + 2 * prefetch)


def test_closed_stream(photographs):
    _, ahead = open_both(photographs)
    next(ahead)
    ahead.close()
    ahead.close()
    with pytest.raises(ValueError, match="closed"):
        next(ahead)
    dali = DaliStream(DataConfig(path=str(photographs)), **PLAIN)
    next(dali)
    pipeline = weakref.ref(dali._decoder._pipeline)
    dali.close()
    with pytest.raises(ValueError, match="closed"):
        next(dali)
    gc.collect()
    assert pipeline() is None  # with its memory
    for thread in threading.enumerate():
        if thread.name.startswith("data_"):
            thread.join(20)
            assert not thread.is_alive()


def test_an_error_closes_the_stream(copy):
    for path in copy.rglob("*.jpg"):
        path.write_bytes(b"")
    dali = DaliStream(DataConfig(path=str(copy), max_bad_share=1.0), **PLAIN)
    with pytest.raises(UserError, match="no readable image"):
        next(dali)
    with pytest.raises(ValueError, match="closed"):
        next(dali)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_on_a_gpu(copy, decode):
    for name, (content, *_) in (SKIPPED | CONVERTED).items():
        (copy / "c1" / name).write_bytes(content)
    numbers = dict(image_size=SIZE, num_classes=3, seed=5, global_batch=8, micro_batch=8, accumulation=1)
    config = dict(path=str(copy), workers=0, max_bad_share=0.9)
    device = torch.device("cuda", 0)
    preallocated = {"preallocate": [160, 160], "hw_decoder_load": 0.5}
    settings = DataConfig(**config, loader="dali", decode=decode, dali=preallocated)
    with (
        ImageStream(DataConfig(**config, loader="workers"), **numbers) as workers,
        open_stream(settings, device=device, **numbers) as dali,
    ):
        for _ in range(20):
            ours, theirs = next(dali), next(workers)
            assert ours.images.device == ours.labels.device == device
            assert torch.equal(ours.indices, theirs.indices)
            gap = (ours.images.cpu().int() - theirs.images.int()).abs().float().mean()
            assert gap == 0 if decode == "exact" else gap < 4

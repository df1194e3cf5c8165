"""The DALI loader against the worker loader: the same images, the same files skipped, counted and named."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_trees import picture
from PIL import Image
from test_data_hostile import CONVERTED, SKIPPED

from unite_fast.config import DataConfig
from unite_fast.data.dali import DaliStream, DecoderError, JpegDecoder, _image_errors, gather
from unite_fast.data.jpeg import Jpeg, JpegReader
from unite_fast.data.loader import ImageStream
from unite_fast.data.prepare import prepare
from unite_fast.data.reader import FileReader
from unite_fast.data.resample import resample_crop
from unite_fast.data.sampler import Sampler
from unite_fast.data.source import open_source
from unite_fast.data.stream import open_stream
from unite_fast.errors import UserError

pytest.importorskip("nvidia.dali", reason="pip install nvidia-dali-cuda130")
CPU = torch.device("cpu")
SIZE = 32
KINDS = [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}]


def encoded(image: Image.Image, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", **({"quality": 90} | options))
    return data.getvalue()


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


def open_both(root, *, threads=2, prefetch=2, crop="adm", share=0.9, decode="exact", **numbers):
    numbers = dict(image_size=SIZE, num_classes=3, seed=5, global_batch=8, micro_batch=4, accumulation=2) | numbers
    config = {"path": str(root), "workers": 0, "crop": crop, "max_bad_share": share}
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


def test_odd_and_hostile_files(copy):
    """All of them in one set, twice over, so that a micro-batch may hold several."""
    for name, (content, *_) in (SKIPPED | CONVERTED).items():
        for label in (0, 2):
            (copy / f"c{label}" / name).write_bytes(content)
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


@pytest.mark.parametrize("crop", ["adm", "none"])
def test_gathering_on_a_device(crop):
    """What runs on a GPU after the decoder, on the CPU's tensors: crop, Pillow's pixels among DALI's, flips."""
    generator = np.random.default_rng(0)
    shapes = [(SIZE, SIZE)] * 3 if crop == "none" else [(40, 70), (33, 32), (150, 91)]
    decoded = [generator.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    by_pillow = generator.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    jpeg = Jpeg(np.empty(0, np.uint8), 1, 1)
    flat = torch.from_numpy(np.concatenate([image.ravel() for image in decoded]))
    mirrored = np.array([False, True, False, True])
    # The second of the decoded was replaced by Pillow's afterwards; the first place was Pillow's from the start.
    found = [by_pillow, jpeg, by_pillow[::-1], jpeg]
    images = gather(flat, shapes, [1, 2, 3], found, mirrored, SIZE, crop)
    assert images.shape == (4, 3, SIZE, SIZE) and images.is_contiguous()
    expected = [by_pillow, resample_crop(decoded[0], SIZE), by_pillow[::-1], resample_crop(decoded[2], SIZE)]
    for image, pixels, flip in zip(images.numpy(), expected, mirrored):
        assert np.array_equal(image, (pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1))
    alone = gather(flat[:0], [], [], [by_pillow], mirrored[:1], SIZE, crop)
    assert np.array_equal(alone[0].numpy(), by_pillow.transpose(2, 0, 1))


def test_which_files_dali_gets(tmp_path):
    photo = picture(60, 50)
    exif = Image.Exif()
    exif[0x0112] = 6
    given = {
        "plain.jpg": encoded(photo), "grey.jpg": encoded(photo.convert("L")), "turned.jpg": encoded(photo, exif=exif),
        "progressive.jpg": encoded(photo, progressive=True),
    }  # fmt: skip
    kept = {
        "cmyk.jpg": encoded(photo.convert("CMYK")), "rgb.jpg": encoded(photo, keep_rgb=True), "png.jpg": b"\x89PNG",
        "cut.jpg": encoded(photo)[:1000], "empty.jpg": b"", "strip.jpg": encoded(Image.new("L", (60_000, 1))),
    }  # fmt: skip
    for name, content in (given | kept).items():
        for label in "ab":
            (tmp_path / label).mkdir(exist_ok=True)
            (tmp_path / label / name).write_bytes(content)
    source = open_source(tmp_path, 2)
    reader = JpegReader(FileReader(source, 256, "adm"))
    for index in range(len(source)):
        found = reader.pixels(index)
        name = Path(source.path(index)).name
        assert isinstance(found, Jpeg) == (name in given), name
        if name in given:
            assert (found.height, found.width) == (50, 60)


def test_decoder_says_which_images_it_cannot_decode():
    def files(*contents):
        return [Jpeg(np.frombuffer(content, np.uint8), 1, 1) for content in contents]

    good = encoded(picture(40, 40))
    decoder = JpegDecoder(DataConfig(path="").dali, 4, False, CPU)
    decoder.submit(files(good, good[:-300], good))
    with pytest.raises(DecoderError) as error:
        decoder.take()
    assert error.value.places == [1]
    decoder.restart()
    decoder.submit(files(good))
    images, grey = decoder.take()
    assert np.array_equal(images.at(0), np.asarray(Image.open(io.BytesIO(good))))
    assert grey.tolist() == [False]


def test_other_errors_of_dali_are_not_taken_for_bad_files():
    with pytest.raises(RuntimeError, match="out of memory"), _image_errors():
        raise RuntimeError("CUDA allocation failed: out of memory. Current pipeline object is no longer valid.")
    decoder = JpegDecoder(DataConfig(path="").dali, 4, False, CPU)
    decoder.submit([Jpeg(np.arange(100, dtype=np.uint8), 1, 1)])
    with pytest.raises(DecoderError) as error:
        decoder.take()
    assert error.value.places is None  # DALI does not say, so all of them are suspect


def test_closed_stream(photographs):
    _, ahead = open_both(photographs)
    next(ahead)
    ahead.close()
    ahead.close()
    with pytest.raises(ValueError, match="closed"):
        next(ahead)
    dali = DaliStream(
        DataConfig(path=str(photographs)), image_size=SIZE, num_classes=3, seed=0, global_batch=4, micro_batch=4,
        accumulation=1,
    )  # fmt: skip
    dali.close()
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

"""What the DALI loader does around the decoder: files, options, errors, and the gathering on a device."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_trees import picture
from PIL import Image
from test_data_hostile import jpeg as encoded

from unite_fast.config import DaliConfig, DataConfig
from unite_fast.data.dali import DecoderError, JpegDecoder, _image_errors, gather
from unite_fast.data.jpeg import Jpeg, JpegReader
from unite_fast.data.reader import FileReader
from unite_fast.data.resample import resample_crop
from unite_fast.data.source import open_source

pytest.importorskip("nvidia.dali", reason="pip install nvidia-dali-cuda130")
CPU = torch.device("cpu")
SIZE = 32


@pytest.mark.parametrize("crop", ["adm", "none"])
def test_gathering_on_a_device(crop):
    """What runs on a GPU after the decoder, on the CPU's tensors: crop, Pillow's pixels among DALI's, flips."""
    generator = np.random.default_rng(0)
    # The last of them is so high that the order of the passes shows.
    shapes = [(SIZE, SIZE)] * 3 if crop == "none" else [(40, 70), (33, 32), (150, 40)]
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


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("fast", [True, False])
def test_what_dali_is_asked_for(monkeypatch, cuda, fast):
    """The decoder's options on a GPU and on a CPU, without a GPU."""
    import nvidia.dali

    asked = {}

    def pipeline_def(**options):
        asked.update(options)
        return lambda graph: lambda: asked.update(outputs=graph()) or SimpleNamespace(build=lambda: None)

    def image(data, **options):
        asked.update(decoder=options)
        return SimpleNamespace(gpu=lambda: "on the GPU", name="decoded")

    fn = SimpleNamespace(
        external_source=lambda name: name,
        decoders=SimpleNamespace(image=image),
        crop=lambda images, **place: SimpleNamespace(cpu=lambda: "corners"),
    )
    monkeypatch.setattr(nvidia.dali, "fn", fn)
    monkeypatch.setattr(nvidia.dali, "pipeline_def", pipeline_def)
    config = DaliConfig(threads=3, preallocate=(640, 480), hw_decoder_load=0.5)
    JpegDecoder(config, 4, fast, torch.device("cuda", 1) if cuda else CPU)
    assert (asked["batch_size"], asked["num_threads"], asked["device_id"]) == (4, 3, 1 if cuda else None)
    expected = {"output_type": nvidia.dali.types.RGB, "adjust_orientation": False}
    if cuda and fast:
        expected |= {"device": "mixed", "hw_decoder_load": 0.5}
        expected |= {"preallocate_width_hint": 640, "preallocate_height_hint": 480}
    else:
        expected |= {"device": "cpu", "use_fast_idct": fast}
    assert asked["decoder"] == expected
    images, corners = asked["outputs"]
    assert corners == "corners" and (images == "on the GPU" if cuda else images.name == "decoded")


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
    # nvImageCodec's own lack of memory, too.
    with pytest.raises(RuntimeError, match="failure: '#5'"), _image_errors():
        raise RuntimeError("Error in CPU operator `nvidia.dali.fn.decoders.image`: nvImageCodec failure: '#5'")
    for code in (3, 4):
        with pytest.raises(DecoderError), _image_errors():
            raise RuntimeError(f"nvImageCodec failure: '#{code}'")
    decoder = JpegDecoder(DataConfig(path="").dali, 4, False, CPU)
    decoder.submit([Jpeg(np.arange(100, dtype=np.uint8), 1, 1)])
    with pytest.raises(DecoderError) as error:
        decoder.take()
    assert error.value.places is None  # DALI does not say, so all of them are suspect

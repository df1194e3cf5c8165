"""Prepared shards: what is written, from which sources, after interruptions, and how training reads it."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from data_trees import files, photographs, picture, running, tree, wait_until
from PIL import Image
from runs import config, image_tree

from unite_fast.cli import main
from unite_fast.config import DataConfig
from unite_fast.data.crop import decode
from unite_fast.data.loader import ImageStream, load_images
from unite_fast.data.packed import PackedImages
from unite_fast.data.prepare import prepare
from unite_fast.data.sampler import Sampler
from unite_fast.data.shards import DTYPES, INDEX, ShardFolder
from unite_fast.data.source import open_source
from unite_fast.engine.loop import train
from unite_fast.errors import UserError

COUNT = 15  # of tree()'s default


def packed(source: Path, destination: Path, *, size=None, shard_images=4, jobs=1) -> ShardFolder:
    prepare(open_source(source, None), destination, size=size, shard_images=shard_images, jobs=jobs)
    return open_source(destination, None)


def stream(root, *, workers=0, flip=True, crop="none", size=8, cache=False, **numbers):
    config = DataConfig(path=str(root), crop=crop, flip=flip, workers=workers, prefetch=1, cache=cache)
    numbers = dict(num_classes=3, seed=7, global_batch=4, micro_batch=4, accumulation=1) | numbers
    return ImageStream(config, image_size=size, **numbers)


def take(images: ImageStream, count: int) -> list:
    with images:
        return [next(images) for _ in range(count)]


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) and torch.equal(x.indices, y.indices)
        for x, y in zip(a, b)
    )


def test_shards_hold_the_folder(tmp_path):
    source = open_source(tree(tmp_path / "d"), 3)
    shards = packed(source.root, tmp_path / "s")
    assert sorted(files(tmp_path / "s")) == [f"{shard:06d}.tar" for shard in range(4)] + [INDEX]
    assert (shards.classes, len(shards), shards.prepared_size) == (source.classes, COUNT, None)
    assert np.array_equal(shards.labels, source.labels)
    for image in range(COUNT):
        assert shards.read(image) == source.read(image)
        assert shards.name(image) == source.name(image)
        assert shards.name(image) in shards.path(image)


def test_shards_are_webdataset_tar_files(tmp_path):
    """As Python's tarfile sees them: pairs of image and label under one key, the suffix after the content."""
    root = tree(tmp_path / "d")
    picture(9, 9).save(root / "c1" / "001.png", "JPEG")
    source, shards = open_source(root, 3), packed(root, tmp_path / "s")
    seen = {}
    for shard in shards.shards:
        with tarfile.open(shard, "r:") as tar:
            members = tar.getmembers()
            for image, label in zip(members[::2], members[1::2], strict=True):
                key, suffix = image.name.split(".")
                assert label.name == f"{key}.cls"
                assert suffix == ("jpg" if key == "000000006" else "png")
                assert tar.extractfile(image).read() == source.read(int(key))
                seen[int(key)] = int(tar.extractfile(label).read())
    assert seen == dict(enumerate(source.labels.tolist()))
    assert list(seen) != sorted(seen)  # shuffled, for readers that stream


def test_webdataset_reads_them(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="pip install webdataset")
    shards = packed(tree(tmp_path / "d"), tmp_path / "s")
    samples = webdataset.WebDataset(list(shards.shards), shardshuffle=False).decode("rgb8").to_tuple("png", "cls")
    assert {int(pixels[0, 0, 1]): label for pixels, label in samples} == dict(enumerate(shards.labels.tolist()))


@pytest.mark.parametrize("size", [None, 8])
def test_output_depends_on_the_images_alone(tmp_path, size):
    root = photographs(tmp_path / "d")
    packed(root, tmp_path / "one", size=size, shard_images=2)
    shutil.copytree(root, tmp_path / "moved")
    packed(tmp_path / "moved", tmp_path / "two", size=size, shard_images=2, jobs=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_cropped_shards_hold_the_crop(tmp_path):
    source = open_source(photographs(tmp_path / "d"), 3)
    shards = packed(source.root, tmp_path / "s", size=16)
    assert shards.prepared_size == 16
    for image in range(6):
        expected = decode(source.read(image), 16, "adm")
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(shards.read(image)))), expected)
        for crop in ("adm", "none"):
            assert np.array_equal(decode(shards.read(image), 16, crop), expected)


def test_cropped_shards_serve_one_size_only(tmp_path):
    packed(photographs(tmp_path / "d"), tmp_path / "s", size=16)
    with pytest.raises(UserError, match=r"--size 16 but model.image_size is 8.*prepare it"):
        stream(tmp_path / "s", crop="adm", size=8)
    with pytest.raises(UserError, match="original images"):
        packed(tmp_path / "s", tmp_path / "t", size=8)
    assert main(["data", "prepare", str(tmp_path / "s"), str(tmp_path / "t"), "--shard-images", "2"]) == 0
    repacked = open_source(tmp_path / "t", 3)
    assert repacked.prepared_size == 16
    assert repacked.read(3) == open_source(tmp_path / "s", 3).read(3)


@pytest.mark.parametrize("kind", [{}, dict(workers=1), dict(cache=True)], ids=str)
def test_training_reads_shards_as_it_reads_the_folder(tmp_path, kind):
    root = photographs(tmp_path / "d")
    packed(root, tmp_path / "s", shard_images=2)
    packed(root, tmp_path / "cropped", size=16, shard_images=2)
    expected = take(stream(root, crop="adm", size=16), 9)
    assert same(take(stream(tmp_path / "s", crop="adm", size=16, **kind), 9), expected)
    assert same(take(stream(tmp_path / "cropped", crop="none", size=16, **kind), 9), expected)


def test_a_run_on_shards_is_the_run_on_folders(tmp_path):
    """Losses, evaluation and export to the bit, over a resume that moves to the shards."""
    for split, count in (("train", 12), ("val", 8)):
        packed(image_tree(tmp_path / split, per_class=count), tmp_path / f"{split}_shards", shard_images=5)
    workers = {"cache": False, "workers": 0}
    folders = workers | {"path": str(tmp_path / "train"), "val_path": str(tmp_path / "val")}
    shards = workers | {"path": str(tmp_path / "train_shards"), "val_path": str(tmp_path / "val_shards")}
    through = train(config(tmp_path, name="folders", data=folders))
    train(config(tmp_path, name="moved", data=folders, train={"steps": 10}))
    moved = train(config(tmp_path, name="moved", data=shards, train={"steps": 20}), resume=True)
    for name in ("loss_flow", "loss_l1", "z0_std"):
        assert last_record(moved)[name] == last_record(through)[name]
    psnr = [json.loads((run / "summary.json").read_text())["psnr"] for run in (through, moved)]
    assert psnr[0] == psnr[1]
    weights = [(run / "export" / "model.safetensors").read_bytes() for run in (through, moved)]
    assert weights[0] == weights[1]


def last_record(run: Path) -> dict:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_resume_moves_from_folder_to_shards(tmp_path):
    root = tree(tmp_path / "d")
    packed(root, tmp_path / "s")
    assert same(take(stream(root), 20)[13:], take(stream(tmp_path / "s", start_step=13), 7))


def test_evaluation_reads_shards(tmp_path):
    root = tree(tmp_path / "d")
    packed(root, tmp_path / "s")
    config = DataConfig(path="unused", crop="none", workers=2)
    numbers = dict(image_size=8, num_classes=3, limit=7)
    for a, b in zip(load_images(root, config, **numbers), load_images(tmp_path / "s", config, **numbers), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match="they lack x and have c2, which training lacks; both must have the same"):
        load_images(tmp_path / "s", config, classes=("c0", "c1", "x"), **numbers)


SLOW_PREPARE = """
import os, signal, sys, time
from pathlib import Path
from unite_fast.data import prepare, source

class Slow(source.ImageFolder):
    def read(self, index):
        Path(sys.argv[3], str(os.getpid())).touch()
        while len(os.listdir(sys.argv[3])) < 2:  # the other process may begin only after this one has written it all
            time.sleep(0.01)
        time.sleep(0.05)
        return super().read(index)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    prepare.prepare(Slow(sys.argv[1], None), Path(sys.argv[2]), size=8, shard_images=4, jobs=2)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_preparation_continues_to_the_same_result(tmp_path, how):
    root = tree(tmp_path / "d", (20, 20, 20))
    packed(root, tmp_path / "through", size=8)
    (tmp_path / "pids").mkdir()
    script = tmp_path / "script.py"
    script.write_text(SLOW_PREPARE)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    process = subprocess.Popen(
        [sys.executable, script, root, tmp_path / "s", tmp_path / "pids"], env=environment, stderr=subprocess.DEVNULL
    )
    assert wait_until(lambda: len(list((tmp_path / "s").glob("*.tar"))) >= 3)
    process.send_signal(how)
    process.wait()
    workers = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    assert len(workers) == 2
    assert wait_until(lambda: not any(map(running, workers)))
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*.tar")}
    assert 3 <= len(written) < 15
    assert not (tmp_path / "s" / INDEX).exists()
    with pytest.raises(UserError, match="is not finished.*prepare"):
        open_source(tmp_path / "s", 3)
    assert main(["data", "prepare", str(tmp_path / "s"), str(tmp_path / "t")]) == 2  # no class tars either
    (tmp_path / "s" / ".000009.tar.1.tmp").write_bytes(b"left behind")
    source = open_source(root, None)
    done = prepare(source, tmp_path / "s", size=8, shard_images=4)
    assert 0 < done.found <= len(written)
    assert files(tmp_path / "s") == files(tmp_path / "through")
    kept = sum((tmp_path / "s" / name).stat().st_mtime_ns == time_ for name, time_ in written.items())
    assert kept == done.found
    assert prepare(source, tmp_path / "s", size=8, shard_images=4).found == 15


def test_other_content_is_never_mixed_in(tmp_path):
    root = tree(tmp_path / "d")
    packed(root, tmp_path / "s")
    before = files(tmp_path / "s")
    for change in (dict(size=8), dict(shard_images=5)):
        with pytest.raises(UserError, match="other images or made with other options"):
            packed(root, tmp_path / "s", **change)
    (root / "c0" / "more.png").write_bytes(b"")
    with pytest.raises(UserError, match="other images"):
        packed(root, tmp_path / "s")
    assert files(tmp_path / "s") == before
    with pytest.raises(UserError, match="not empty"):
        packed(root, root)


def test_shards_do_not_go_into_their_source(tmp_path):
    root = tree(tmp_path / "d")
    (tmp_path / "link").symlink_to(root)
    before = sorted(root.rglob("*"))
    for destination in (root / "s", tmp_path / "link" / "deep" / "s"):
        with pytest.raises(UserError, match="lies in .* choose a folder beside it"):
            packed(root, destination)
    assert sorted(root.rglob("*")) == before


def test_unwritable_destination(tmp_path, capsys):
    root = tree(tmp_path / "d")
    (tmp_path / "file").write_text("")
    assert main(["data", "prepare", str(root), str(tmp_path / "file" / "s")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_full_disk_loses_nothing(tmp_path):
    """As a limit on the size of files, which the second shard breaks."""
    root = tree(tmp_path / "d")
    (root / "c0" / "000.png").write_bytes(np.random.default_rng(0).bytes(100_000))
    packed(root, tmp_path / "through")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*: File too large; the same command continues"):
            packed(root, tmp_path / "s")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "s").glob(".*.tmp"))
    packed(root, tmp_path / "s")
    assert files(tmp_path / "s") == files(tmp_path / "through")


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])  # as a mount point is without what was mounted
def test_a_source_that_goes_away_is_not_taken_for_unreadable_images(tmp_path, monkeypatch, left):
    root, aside = tree(tmp_path / "d"), tmp_path / "aside"
    packed(root, tmp_path / "through")
    images = open_source(root, None)
    read = images.read

    def vanish(image: int) -> bytes:
        data = read(image)
        root.rename(aside)
        if left == "an empty folder":
            root.mkdir()
        return data

    monkeypatch.setattr(images, "read", vanish)
    with pytest.raises(UserError, match="d is no longer there, or empty: the same command continues"):
        prepare(images, tmp_path / "s", size=None, shard_images=4)
    if root.exists():
        root.rmdir()
    aside.rename(root)
    packed(root, tmp_path / "s")
    assert files(tmp_path / "s") == files(tmp_path / "through")


def test_nothing_readable_to_prepare(tmp_path):
    root = tree(tmp_path / "d")
    for path in root.glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of 15 images.*not an image"):
        packed(root, tmp_path / "s", size=8)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\xff"), "damaged"),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), "cannot read"),
    ],
    ids=["cut", "empty", "flipped", "gone"],
)
def test_damaged_index(tmp_path, damage, words):
    packed(tree(tmp_path / "d"), tmp_path / "s")
    damage(tmp_path / "s" / INDEX)
    with pytest.raises(UserError, match=words) as error:
        open_source(tmp_path / "s", 3)
    assert str(tmp_path / "s" / INDEX) in str(error.value)


def test_damage_to_any_table_of_the_index_is_seen(tmp_path):
    packed(tree(tmp_path / "d"), tmp_path / "s")
    index = tmp_path / "s" / INDEX
    whole = index.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    tables = {name: entry["data_offsets"] for name, entry in json.loads(whole[8:begin]).items() if name in DTYPES}
    assert tables.keys() == DTYPES.keys()
    for first, _ in tables.values():
        index.write_bytes(whole[: begin + first] + bytes([whole[begin + first] ^ 1]) + whole[begin + first + 1 :])
        with pytest.raises(UserError, match="is damaged"):
            open_source(tmp_path / "s", 3)
    index.write_bytes(whole)
    open_source(tmp_path / "s", 3)


def test_class_count_is_checked(tmp_path):
    packed(tree(tmp_path / "d"), tmp_path / "s")
    with pytest.raises(UserError, match="has 3 classes but model.num_classes is 4"):
        open_source(tmp_path / "s", 4)


def test_a_file_system_may_deliver_less_at_a_time(tmp_path, monkeypatch):
    shards, pread = packed(tree(tmp_path / "d"), tmp_path / "s"), os.pread
    expected = [shards.read(image) for image in range(COUNT)]
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 7), offset))
    assert [shards.read(image) for image in range(COUNT)] == expected


def test_copies_and_threads_have_descriptors_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("unite_fast.data.packed.MAX_OPEN", 2)  # of four shards: both ways of reading
    source, shards = open_source(tree(tmp_path / "d"), 3), packed(tmp_path / "d", tmp_path / "s")
    expected = [source.read(image) for image in range(COUNT)]
    failures = []

    def read_all(images: PackedImages) -> None:
        for _ in range(50):
            if [images.read(image) for image in range(COUNT)] != expected:
                failures.append(images)

    threads = [threading.Thread(target=read_all, args=(shards,)) for _ in range(4)]
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(shards._descriptors) <= 2
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    copy = pickle.loads(pickle.dumps(shards))
    assert copy._descriptors == {}
    del shards
    read_all(copy)
    assert not failures


def test_killed_worker_is_reported_with_its_member(tmp_path):
    shards = packed(tree(tmp_path / "d"), tmp_path / "s")
    order = Sampler(COUNT, 7, 4, 4, 1)
    index = int(order.draw(0, 0).indices[0])
    shard = Path(shards.shards[shards._container[index]])
    shard.unlink()
    os.mkfifo(shard)  # whoever opens it waits, as on a dead file server
    images = stream(tmp_path / "s", workers=1)
    with images:
        waiting = threading.Thread(target=_kill_when_holding, args=(images, index))
        waiting.start()
        with pytest.raises(UserError) as error:
            next(images)
        waiting.join()
    assert all(word in str(error.value) for word in ("worker died", f"reading {shard}", shards.name(index)))


def _kill_when_holding(images: ImageStream, index: int) -> None:
    board = images._dataset._workers
    assert wait_until(lambda: board[0, 1] == index)
    os.kill(int(board[0, 0]), signal.SIGKILL)

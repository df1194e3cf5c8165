"""Prepared shards: what is written, from which sources, after interruptions, and how training reads it."""

from __future__ import annotations

import io
import os
import pickle
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
from data_trees import picture, running, tree, wait_until
from PIL import Image

from unite_fast.cli import main
from unite_fast.config import DataConfig
from unite_fast.data.crop import decode
from unite_fast.data.loader import ImageStream, load_images
from unite_fast.data.packed import PackedImages
from unite_fast.data.prepare import prepare
from unite_fast.data.sampler import Sampler
from unite_fast.data.shards import INDEX, ShardFolder
from unite_fast.data.source import open_source
from unite_fast.errors import UserError

COUNT = 15  # of tree()'s default


def photographs(root: Path) -> Path:
    """Six JPEG pictures of different sizes in three classes."""
    for number in range(6):
        folder = root / f"c{number // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        picture(40 + 9 * number, 90 - 7 * number, number).save(folder / f"{number}.JPEG", quality=90)
    return root


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    repacked = packed(tmp_path / "s", tmp_path / "t", shard_images=2)
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
    with pytest.raises(UserError, match="c2 stands where x is expected"):
        load_images(tmp_path / "s", config, classes=("c0", "c1", "x"), **numbers)


def class_tar(folder: Path, file) -> None:
    with tarfile.open(fileobj=file, mode="w") as tar:
        for path in sorted(folder.iterdir(), reverse=True):
            tar.add(path, path.name)
        tar.addfile(tarfile.TarInfo("notes.txt"))


@pytest.mark.parametrize("kind", ["tar of tars", "folder of tars"])
def test_training_archives_give_the_folders_shards(tmp_path, kind):
    root = photographs(tmp_path / "d")
    (tmp_path / "tars").mkdir()
    for folder in root.iterdir():
        with open(tmp_path / "tars" / f"{folder.name}.tar", "wb") as file:
            class_tar(folder, file)
    source = tmp_path / "tars"
    if kind == "tar of tars":
        source = tmp_path / "ILSVRC2012_img_train.tar"
        with tarfile.open(source, "w") as tar:
            for path in sorted((tmp_path / "tars").iterdir(), reverse=True):
                tar.add(path, path.name)
    packed(root, tmp_path / "expected", shard_images=2)
    arguments = ["data", "prepare", str(source), str(tmp_path / "s"), "--shard-images", "2", "--jobs", "2"]
    assert main(arguments) == 0
    assert files(tmp_path / "s") == files(tmp_path / "expected")


def devkit(path: Path, numbers: list[int], synsets: dict[int, str]) -> None:
    from scipy.io import savemat

    table = np.array(list(synsets.items()), dtype=[("ILSVRC2012_ID", "f8"), ("WNID", "O")])
    mat = io.BytesIO()
    savemat(mat, {"synsets": table})
    truth = "".join(f"{number}\n" for number in numbers).encode()
    with tarfile.open(path, "w:gz") as tar:
        for name, data in (("meta.mat", mat.getvalue()), ("ILSVRC2012_validation_ground_truth.txt", truth)):
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_validation_archive_takes_its_classes_from_the_devkit(tmp_path, capsys):
    root = photographs(tmp_path / "d")
    archive = tmp_path / "ILSVRC2012_img_val.tar"
    with tarfile.open(archive, "w") as tar:
        for path in sorted(root.glob("*/*.JPEG"), reverse=True):
            tar.add(path, path.name)
    arguments = ["data", "prepare", str(archive), str(tmp_path / "s")]
    assert main(arguments) == 2
    assert "--devkit" in capsys.readouterr().err
    devkit(tmp_path / "kit.tar.gz", [2, 2, 1, 1, 3, 3], {1: "c1", 2: "c0", 3: "c2"})
    assert main([*arguments, "--devkit", str(tmp_path / "kit.tar.gz")]) == 0
    shards, folder = open_source(tmp_path / "s", 3), open_source(root, 3)
    assert [shards.name(image) for image in range(6)] == [folder.name(image) for image in range(6)]
    assert [shards.read(image) for image in range(6)] == [folder.read(image) for image in range(6)]
    devkit(tmp_path / "short.tar.gz", [2, 2, 1], {1: "c1", 2: "c0"})
    assert main([*arguments, "--devkit", str(tmp_path / "short.tar.gz")]) == 2
    assert "3 images, the archive holds 6" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["text", "cut", "compressed", "empty class"])
def test_bad_archives_are_refused(tmp_path, capsys, damage):
    archive = tmp_path / "train.tar"
    with tarfile.open(archive, "w:gz" if damage == "compressed" else "w") as tar:
        for label in ("c0", "c1"):
            inner = io.BytesIO()
            folder = tree(tmp_path / label, (3,)) / "c0"
            if damage == "empty class":
                shutil.rmtree(folder)
                folder.mkdir()
            class_tar(folder, inner)
            info = tarfile.TarInfo(f"{label}.tar")
            info.size = len(inner.getvalue())
            inner.seek(0)
            tar.addfile(info, inner)
    if damage == "text":
        archive.write_text("no tar" * 1000)
    elif damage == "cut":
        archive.write_bytes(archive.read_bytes()[:9000])
    assert main(["data", "prepare", str(archive), str(tmp_path / "s")]) == 2
    message = capsys.readouterr().err
    assert ("holds no image" if damage == "empty class" else "is not a whole, uncompressed tar file") in message
    assert "Traceback" not in message


SLOW_PREPARE = """
import os, sys, time
from pathlib import Path
from unite_fast.data import prepare, source

class Slow(source.ImageFolder):
    def read(self, index):
        Path(sys.argv[3], str(os.getpid())).touch()
        time.sleep(0.05)
        return super().read(index)

if __name__ == "__main__":
    prepare.prepare(Slow(sys.argv[1], None), Path(sys.argv[2]), size=8, shard_images=4, jobs=2)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_preparation_continues_to_the_same_result(tmp_path, how):
    root = tree(tmp_path / "d", (20, 20, 20))
    packed(root, tmp_path / "through", size=8)
    (tmp_path / "pids").mkdir()
    script = tmp_path / "script.py"
    script.write_text(SLOW_PREPARE)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
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


def test_unwritable_destination(tmp_path, capsys):
    root = tree(tmp_path / "d")
    (tmp_path / "file").write_text("")
    assert main(["data", "prepare", str(root), str(tmp_path / "file" / "s")]) == 2
    assert "cannot write" in capsys.readouterr().err


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


def test_class_count_is_checked(tmp_path):
    packed(tree(tmp_path / "d"), tmp_path / "s")
    with pytest.raises(UserError, match="has 3 classes but model.num_classes is 4"):
        open_source(tmp_path / "s", 4)


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

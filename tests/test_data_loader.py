"""The stream of micro-batches: order, flips, broken files, worker processes."""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_trees import picture, running, tree, wait_until
from PIL import Image
from runs import config, image_tree

from unite_fast.config import DataConfig
from unite_fast.data.loader import ImageStream, load_images
from unite_fast.data.sampler import Sampler, flips
from unite_fast.engine.batch import Batch
from unite_fast.engine.world import World
from unite_fast.errors import UserError
from unite_fast.images import Images

COUNT = 15  # of tree()'s default


def stream(root, *, workers=0, cache=False, flip=False, crop="none", share=0.5, prefetch=1, size=8, batch=4, **numbers):
    config = DataConfig(
        path=str(root), crop=crop, flip=flip, workers=workers, prefetch=prefetch, max_bad_share=share, cache=cache
    )
    numbers = dict(num_classes=3, seed=7, global_batch=batch, micro_batch=batch, accumulation=1) | numbers
    return ImageStream(config, image_size=size, **numbers)


def take(images: ImageStream, count: int) -> list:
    with images:
        return [next(images) for _ in range(count)]


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) and x[3:] == y[3:] for x, y in zip(a, b)
    )


def test_micro_batches(tmp_path):
    root = tree(tmp_path / "d")
    images = stream(root, global_batch=8, micro_batch=2, accumulation=2, rank=1, world_size=2)
    assert images.classes == ("c0", "c1", "c2")
    assert images.steps_per_epoch == COUNT / 8
    sampler = Sampler(COUNT, 7, 8, 2, 2, 1, 2)
    labels = np.repeat([0, 1, 2], [5, 4, 6])
    for number, batch in enumerate(take(images, 10)):
        assert (batch.step, batch.micro_batch) == divmod(number, 2)
        expected = sampler.draw(*divmod(number, 2)).indices
        assert batch.images.shape == (2, 3, 8, 8)
        assert (batch.images.dtype, batch.labels.dtype) == (torch.uint8, torch.int64)
        assert batch.images.is_contiguous()
        assert batch.indices.tolist() == expected.tolist()
        assert batch.labels.tolist() == labels[expected].tolist()
        assert batch.images[:, 1, 0, 0].tolist() == expected.tolist()
        assert batch.images[0, 0].tolist() == [list(range(8))] * 8


def test_order_does_not_depend_on_workers_or_cache(tmp_path):
    root = tree(tmp_path / "d")
    (root / "c1" / "001.png").write_bytes(b"")
    kinds = [{}, dict(workers=1), dict(workers=2, prefetch=3), dict(cache=True), dict(cache=True, workers=2)]
    alone, *others = (take(stream(root, flip=True, **kind), 20) for kind in kinds)
    assert all(same(alone, other) for other in others)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_continues_in_mid_epoch(tmp_path, workers):
    root = tree(tmp_path / "d")
    numbers = dict(flip=True, global_batch=8, micro_batch=4, accumulation=2)
    through = take(stream(root, **numbers), 20)
    assert same(through[2 * 7 :], take(stream(root, start_step=7, workers=workers, **numbers), 6))


def test_ranks_share_each_global_batch(tmp_path):
    root = tree(tmp_path / "d")
    alone = take(stream(root, batch=8), 6)
    for world_size in (2, 8):
        parts = [
            take(stream(root, global_batch=8, micro_batch=8 // world_size, rank=rank, world_size=world_size), 6)
            for rank in range(world_size)
        ]
        for step in range(6):
            together = sorted(index for part in parts for index in part[step].indices.tolist())
            assert together == sorted(alone[step].indices.tolist())


def test_batch_numbers_must_multiply(tmp_path):
    with pytest.raises(ValueError, match="global batch 8"):
        stream(tree(tmp_path / "d"), global_batch=8, micro_batch=3)


def test_flips_are_the_samplers(tmp_path):
    root = tree(tmp_path / "d")
    flipped = total = 0
    for batch in take(stream(root, flip=True, batch=COUNT), 40):
        expected = flips(7, batch.step, batch.indices.numpy())
        assert ((batch.images[:, 0, 0, 0] == 7).numpy() == expected).all()
        flipped, total = flipped + int(expected.sum()), total + COUNT
    assert abs(flipped / total - 0.5) < 0.1  # five standard deviations at 600 draws
    assert all((batch.images[:, 0, 0, 0] == 0).all() for batch in take(stream(root, batch=COUNT), 5))


def test_global_random_numbers_are_left_alone(tmp_path):
    root = tree(tmp_path / "d")
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    take(stream(root), 2)
    assert torch.equal(torch.rand(3), expected)


def truncated_jpeg() -> bytes:
    data = io.BytesIO()
    picture(8, 8).save(data, "JPEG")
    return data.getvalue()[:-40]


BROKEN = {
    "zero": (lambda path: path.write_bytes(b""), "not an image"),
    "truncated": (lambda path: path.write_bytes(truncated_jpeg()), "truncated"),
    "text": (lambda path: path.write_text("no image"), "not an image"),
    "gone": (lambda path: path.unlink(), "gone"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "directory"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_file_is_replaced_and_named_once(tmp_path, caplog, kind):
    root = tree(tmp_path / "d")
    path = root / "c0" / "002.png"
    damage, reason = BROKEN[kind]
    images = stream(root, share=0.1, flip=True)  # scanned while it was whole
    damage(path)
    with caplog.at_level(logging.WARNING, "unite_fast.data"):
        batches = take(images, 4 * COUNT)
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 1
    assert str(path) in named[0]
    assert reason in named[0].lower()
    assert list(images.bad_files) == [str(path)]
    indices = torch.cat([batch.indices for batch in batches])
    assert 2 not in indices
    assert torch.equal(torch.cat([batch.images[:, 1, 0, 0] for batch in batches]).long(), indices)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), (indices > 4).long() + (indices > 8))
    mirrored = torch.cat([batch.images[:, 0, 0, 0] == 7 for batch in batches])
    assert mirrored.tolist() == flips(7, np.arange(len(indices)) // COUNT, indices.numpy()).tolist()
    # Every other image is still served in each epoch, and the place is taken by changing substitutes.
    epochs = indices.view(-1, COUNT).tolist()
    extra = {next(index for index in epoch if epoch.count(index) == 2) for epoch in epochs}
    assert all(len(set(epoch)) == COUNT - 1 for epoch in epochs)
    assert len(extra) > 3


def test_odd_images_are_converted(tmp_path):
    root = tree(tmp_path / "d", (1, 1, 1))
    for name, image in {
        "cmyk.jpg": Image.new("CMYK", (8, 8), (0, 255, 0, 0)),
        "deep.png": Image.fromarray(np.full((9, 12), 40_000, np.uint16)),
        "palette.gif": picture(30, 20).quantize(8),
        "alpha.webp": Image.new("RGBA", (8, 8), (1, 200, 3, 0)),
        "thin.png": Image.new("L", (1, 30), 77),
        "png-named.JPEG": picture(11, 8),
    }.items():
        image.save(root / "c0" / name, "PNG" if "named" in name else None)
    images = stream(root, crop="adm", share=0.0, batch=9)
    (batch,) = take(images, 1)
    assert sorted(batch.indices.tolist()) == list(range(9))
    assert images.bad_files == {}


def test_too_many_broken_files_stop_the_run(tmp_path):
    root = tree(tmp_path / "d", (40, 40, 40))
    for number in range(7):
        (root / "c1" / f"{number:03d}.png").write_bytes(b"")
    with pytest.raises(UserError) as error:
        take(stream(root, share=0.05), 60)
    message = str(error.value)
    assert "7 unusable images" in message
    assert "of 120" in message
    assert "data.max_bad_share 0.05" in message
    assert message.count("c1/00") == 5
    assert len(take(stream(root, share=7 / 120), 60)) == 60
    with pytest.raises(UserError, match="^7 unusable images among the first 120 read of 120"):
        stream(root, share=0.05, cache=True)  # before the first step
    assert len(stream(root, share=7 / 120, cache=True).bad_files) == 7


def test_bad_share_is_seen_long_before_the_end_of_an_epoch(tmp_path):
    """Half of the files are broken and 30 % would be tolerated: no need to read 30 % of the data set first."""
    root = tree(tmp_path / "d", (1000, 1000, 1000), size=1)
    for path in sorted(root.glob("*/*.png"))[::2]:
        path.write_bytes(b"")
    images = stream(root, share=0.3, size=1)
    with pytest.raises(UserError, match="unusable"):
        take(images, 1000)
    assert len(images.bad_files) < 200


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("share", [0.01, 1.0])
def test_nothing_readable(tmp_path, share, cache):
    root = tree(tmp_path / "d")
    for path in root.glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="unusable images|no readable image.*not an image"):
        take(stream(root, share=share, cache=cache), 1)


def test_nothing_readable_with_workers(tmp_path):
    root = tree(tmp_path / "d")
    for path in root.glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no readable image"):
        take(stream(root, share=1.0, workers=2), 1)


@pytest.mark.parametrize("kind", [dict(workers=0), dict(workers=1), dict(cache=True)], ids=str)
def test_wrong_size_stops_the_run(tmp_path, kind):
    root = tree(tmp_path / "d")
    picture(9, 8).save(root / "c1" / "000.png")
    with pytest.raises(UserError) as error:
        take(stream(root, share=1.0, **kind), COUNT)
    assert all(word in str(error.value) for word in (f"{root}/c1/000.png", "9×8", "8×8", "data.crop"))
    assert "Traceback" not in str(error.value)


def test_cache_survives_the_files(tmp_path):
    root = tree(tmp_path / "d")
    expected = take(stream(root, flip=True), 10)
    images = stream(root, flip=True, cache=True)
    for path in root.glob("*/*.png"):
        path.unlink()
    assert same(take(images, 10), expected)


def test_cache_larger_than_memory(tmp_path):
    with pytest.raises(UserError, match=r"data.cache needs .* GiB"):
        stream(tree(tmp_path / "d"), cache=True, crop="adm", size=10**7)


def test_every_process_of_a_machine_has_a_cache_of_its_own(tmp_path, monkeypatch):
    image_tree(tmp_path / "train")  # 24 images
    settings, batch = config(tmp_path), Batch(2, 1, 6)
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 2 * 24 * 3 * 16**2)

    def opened(local_size):
        return Images().stream(settings, batch, World(0, 3, 0, torch.device("cpu"), local_size), start_step=0)

    opened(2).close()
    with pytest.raises(UserError, match="24 images of .* in each of 3 processes, this machine has"):
        opened(3)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="this system has no /dev/shm")
def test_too_little_shared_memory(tmp_path):
    with pytest.raises(UserError, match=r"data.prefetch.*--shm-size"):
        stream(tree(tmp_path / "d"), workers=2, prefetch=10**12)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="this system has no /dev/shm")
def test_shared_memory_is_asked_for_what_all_workers_keep_ready(tmp_path, monkeypatch):
    root, need = tree(tmp_path / "d"), 2 * 3 * 4 * (3 * 8 * 8)  # workers, prefetch, micro-batch, bytes of an image
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=need - 1, f_frsize=1))
    with pytest.raises(UserError, match=r"--shm-size"):
        stream(root, workers=2, prefetch=3)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=need, f_frsize=1))
    stream(root, workers=2, prefetch=3).close()
    with pytest.raises(UserError, match=r"--shm-size"):
        stream(root, workers=2, prefetch=3, local_size=2)


def test_closed_stream(tmp_path):
    images = stream(tree(tmp_path / "d"))
    take(images, 1)
    images.close()
    with pytest.raises(ValueError, match="closed"):
        next(images)


def worker_processes(images: ImageStream) -> list[int]:
    return images._dataset._workers[:, 0].tolist()


def test_killed_worker_is_reported_with_its_file(tmp_path):
    root = tree(tmp_path / "d")
    images = stream(root, workers=1)
    index = int(Sampler(COUNT, 7, 4, 4, 1).draw(2, 0).indices[0])
    held = Path(images._folder.path(index))
    held.unlink()
    os.mkfifo(held)  # whoever opens it waits, as on a dead file server
    with images:
        next(images)
        next(images)
        assert wait_until(lambda: images._dataset._workers[0, 1] == index)
        os.kill(worker_processes(images)[0], signal.SIGKILL)
        with pytest.raises(UserError) as error:
            next(images)
    assert all(word in str(error.value) for word in ("worker died", f"reading {held}", "data.workers"))


def test_workers_leave_signals_to_the_training_process(tmp_path):
    root = tree(tmp_path / "d")
    expected = take(stream(root), 30)
    images = stream(root, workers=2)
    batches = [next(images) for _ in range(3)]
    workers = worker_processes(images)
    for pid in workers:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    batches += take(images, 27)
    assert same(batches, expected)
    assert wait_until(lambda: not any(map(running, workers)))


SCRIPT = """
import sys, time
from unite_fast.config import DataConfig
from unite_fast.data.loader import ImageStream

if __name__ == "__main__":
    images = ImageStream(DataConfig(path=sys.argv[1], crop="none", workers=2), image_size=8, num_classes=3, seed=0,
                         global_batch=4, micro_batch=4, accumulation=1)
    next(images)
    next(images)
    next(images)
    print(*images._dataset._workers[:, 0].tolist(), flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_workers_end_with_the_training_process(tmp_path, how):
    """Killed without a chance to tidy up, or leaving without close()."""
    root = tree(tmp_path / "d")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, script, root, "600" if how == "kill" else "0"],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    try:
        workers = [int(word) for word in process.stdout.readline().split()]
        assert len(workers) == 2
        if how == "kill":
            assert all(map(running, workers))
            process.kill()
        assert process.wait(timeout=120) == (-signal.SIGKILL if how == "kill" else 0)
    finally:
        process.kill()
        process.stdout.close()
    assert wait_until(lambda: not any(map(running, workers)))


def held_out(root, *, limit=None, classes=None, crop="none", share=0.5):
    config = DataConfig(path="unused", crop=crop, flip=True, workers=2, max_bad_share=share)
    return load_images(root, config, image_size=8, num_classes=3, limit=limit, classes=classes)


def test_load_images_takes_classes_in_turn(tmp_path):
    root = tree(tmp_path / "d", (2, 3, 1))
    images, labels = held_out(root)
    assert images.shape == (6, 3, 8, 8)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert images[:, 1, 0, 0].tolist() == [0, 2, 5, 1, 3, 4]
    assert labels.tolist() == [0, 1, 2, 0, 1, 1]
    assert images[3, 0].tolist() == [list(range(8))] * 8
    few, few_labels = held_out(root, limit=4)
    assert torch.equal(few, images[:4])
    assert torch.equal(few_labels, labels[:4])


def test_load_images_skips_broken_files(tmp_path, caplog):
    root = tree(tmp_path / "d", (2, 3, 1))
    (root / "c1" / "000.png").write_bytes(b"")
    images, labels = held_out(root, limit=4)
    assert images[:, 1, 0, 0].tolist() == [0, 5, 1, 3]
    assert "c1/000.png" in caplog.text
    with pytest.raises(UserError, match="max_bad_share"):
        held_out(root, share=0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: shutil.rmtree(root / "c1"), "they lack c1;"),
        (lambda root: [shutil.rmtree(root / name) for name in ("c0", "c1")], "they lack c0, c1;"),
        (lambda root: (root / "__MACOSX").mkdir(), "they have __MACOSX, which training lacks;"),
        (
            lambda root: [(root / f"c{i}").rename(root / name) for i, name in enumerate(("test", "train", "val"))],
            "they lack c0, c1, c2 and have test, train, val, which training lacks; both must have the same; test, ",
        ),
    ],
    ids=["missing", "one", "strange", "splits"],
)
def test_classes_are_compared_before_they_are_counted(tmp_path, change, words):
    root = tree(tmp_path / "d", (2, 3, 1))
    change(root)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        held_out(root, classes=("c0", "c1", "c2"))
    assert str(root) in str(error.value) and "num_classes" not in str(error.value)


def test_load_images_errors(tmp_path):
    root = tree(tmp_path / "d", (1, 1, 1))
    with pytest.raises(UserError, match="they lack x and have c2, which training lacks; both must have the same"):
        held_out(root, classes=("c0", "c1", "x"))
    held_out(root, classes=("c0", "c1", "c2"))
    picture(9, 9).save(root / "c0" / "000.png")
    with pytest.raises(UserError, match="9×9"):
        held_out(root)
    for path in root.glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no readable image"):
        held_out(root, share=1.0)

"""`unite-fast data check`: what it finds, the list it leaves, and that training keeps to the list."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data_trees import picture, tree, unprivileged  # noqa: F401, a fixture
from PIL import Image

from unite_fast.cli import main
from unite_fast.config import DataConfig
from unite_fast.data.check import DIGEST, _same_bytes, check, conversions
from unite_fast.data.crop import decode, decode_whole
from unite_fast.data.loader import ImageStream, load_images
from unite_fast.data.prepare import prepare
from unite_fast.data.processes import spread
from unite_fast.data.skip_list import CHECK_RECORD
from unite_fast.data.source import open_images, open_source, warn_once
from unite_fast.errors import UserError

BAD = {"c0/002.png": "not an image", "c2/000.png": "truncated"}


def damaged_tree(root):
    tree(root)
    (root / "c0" / "002.png").write_bytes(b"")
    (root / "c2" / "000.png").write_bytes(_bytes(picture(30, 30), "PNG")[:900])
    return root


def _bytes(image: Image.Image, format_: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, format_, **options)
    return data.getvalue()


def command(*arguments: object) -> int:
    return main(["data", *map(str, arguments)])


def test_the_list_is_written_and_training_keeps_to_it(tmp_path, capsys, caplog):
    root = damaged_tree(tmp_path / "d")
    assert command("check", root, "--jobs", 2) == 1
    printed = capsys.readouterr().out
    assert "2 of 15 images are unusable" in printed
    record = json.loads((root / CHECK_RECORD).read_text())
    assert list(record["skip"]) == list(BAD)
    for name, words in BAD.items():
        assert words in record["skip"][name]
        assert f"{name}: {record['skip'][name]}" in printed
    config = DataConfig(path=str(root), crop="none", flip=False, workers=0, max_bad_share=0.0)
    with caplog.at_level(logging.WARNING, "unite_fast.data"):
        images = ImageStream(
            config, image_size=8, num_classes=3, seed=1, global_batch=13, micro_batch=13, accumulation=1
        )
    assert len(caplog.records) == 1
    assert all(word in caplog.text for word in ("left out 2 of 15", *BAD, *record["skip"].values()))
    with images:
        assert images.steps_per_epoch == 1
        assert images.left_out == record["skip"]
        batches = [next(images) for _ in range(3)]
        assert images.bad_files == {}
    for batch in batches:
        numbers = sorted(batch.images[:, 1, 0, 0].tolist())  # which of tree()'s pictures
        assert numbers == [number for number in range(15) if number not in (2, 9)]
        assert sorted(batch.labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 5
    held_out, _ = load_images(root, config, image_size=8, num_classes=3)
    assert len(held_out) == 13


def test_what_is_left_out_is_left_out_of_measurements_too(tmp_path):
    root = damaged_tree(tmp_path / "d")
    assert command("check", root) == 1
    record = json.loads((root / CHECK_RECORD).read_text())
    images, labelled = open_images(root, image_size=8), open_source(root, 3)
    assert images.skipped == record["skip"]
    assert images.names == [labelled.name(index) for index in range(len(labelled))]


@pytest.mark.parametrize("form", ["folder", "shards"])
def test_what_is_left_out_is_said_once_by_one_rank(tmp_path, caplog, form):
    path = tree(tmp_path / "d")
    if form == "shards":
        prepare(open_source(path, 3), tmp_path / "s", size=None, shard_images=8)
        path = tmp_path / "s"
        (path / "000001.tar").unlink()
    (path / CHECK_RECORD).write_text(json.dumps({"skip": {"c0/000.png": "grey"}}))
    said = {}
    for rank in range(2):
        caplog.clear()
        warn_once.cache_clear()
        config = DataConfig(path=str(path), crop="none", workers=0)
        numbers = dict(image_size=8, num_classes=3, seed=1, global_batch=2, micro_batch=1, accumulation=1)
        with ImageStream(config, **numbers, rank=rank, world_size=2) as images:
            assert images.left_out == {"c0/000.png": "grey"}
        open_images(path, image_size=8, remark=rank == 0)
        said[rank] = len(caplog.records)
    assert said == {0: 2 if form == "shards" else 1, 1: 0}


def test_skip_list_holds_for_shards_made_before_and_after(tmp_path):
    root = damaged_tree(tmp_path / "d")
    prepare(open_source(root, 3), tmp_path / "before", size=None)
    for path in (root, tmp_path / "before"):
        assert command("check", path) == 1
    prepare(open_source(root, 3), tmp_path / "after", size=None)
    folder, before, after = (open_source(tmp_path / name, 3) for name in ("d", "before", "after"))
    assert before.skipped == folder.skipped
    assert after.skipped == {}
    for images in (before, after):
        assert len(images) == 13
        assert np.array_equal(images.labels, folder.labels)
        assert [images.name(i) for i in range(13)] == [folder.name(i) for i in range(13)]
        assert [images.read(i) for i in range(13)] == [folder.read(i) for i in range(13)]
    assert "000000009" not in "".join(before.path(i) for i in range(13))  # numbers of the members, not of the rest
    assert before.path(12).endswith(":000000014 (c2/005.png)")
    assert command("check", tmp_path / "after") == 0


def test_a_repaired_file_comes_back(tmp_path):
    root = damaged_tree(tmp_path / "d")
    assert command("check", root) == 1
    picture(8, 8).save(root / "c0" / "002.png")
    (root / "c2" / "000.png").unlink()
    assert len(open_source(root, 3)) == 13
    assert command("check", root) == 0
    assert len(open_source(root, 3)) == 14


def test_findings_do_not_depend_on_the_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("unite_fast.data.check.CHUNK", 2)
    root = damaged_tree(tmp_path / "d")
    prepare(open_source(root, 3), tmp_path / "s", size=None, shard_images=4)
    for path in (root, tmp_path / "s"):
        counts = []
        reports = [
            check(open_source(path, 3), size=8, jobs=jobs, advance=counts.append) for jobs in (1, 2)
        ]  # fmt: skip
        assert vars(reports[0]) == vars(reports[1])
        assert max(counts) == 15
        assert list(reports[0].skip) == list(BAD)


def test_processes_that_check_or_pack_do_not_wait_for_torch(tmp_path):
    """They import and do their work without it: two seconds and 200 MB a machine."""
    code = """
import sys
import numpy as np
from pathlib import Path
from unite_fast.data.check import _examine_all
from unite_fast.data.prepare import Job, _write_shard
from unite_fast.data.processes import spread
from unite_fast.data.source import open_source
source = open_source(sys.argv[1], None)
images = list(range(len(source)))
findings, digests, _ = _examine_all(source, 256, (None, images), print)
assert not findings and digests.any(1).all(), findings
Path(sys.argv[2]).mkdir()
_write_shard(Job(source, Path(sys.argv[2]), None, [np.array(images)]), 0, print)
loaded = {"torch", "unite_kernels", "scipy"} & set(sys.modules)
assert not loaded, loaded
"""
    root = tree(tmp_path / "tree")
    done = subprocess.run(
        [sys.executable, "-c", code, str(root), str(tmp_path / "shards")], capture_output=True, text=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "shards" / "000000.tar").exists()


def test_what_cannot_be_cropped_is_unusable_to_the_check(tmp_path):
    """The check does not crop, and refuses all the same what the crop refuses: long and thin at this size alone."""
    data = _bytes(picture(3_000, 2), "PNG")
    assert decode_whole(data, 8, "adm").shape == (2, 3_000, 3)
    for function in (decode, decode_whole):
        with pytest.raises(ValueError, match="too long and thin"):
            function(data, 256, "adm")


def test_same_picture_in_two_classes(tmp_path):
    root = tree(tmp_path / "d")
    twin = (root / "c0" / "001.png").read_bytes()
    (root / "c2" / "003.png").write_bytes(twin)
    (root / "c0" / "004.png").write_bytes(twin)
    (root / "c1" / "000.png").write_bytes((root / "c1" / "001.png").read_bytes())  # within a class: no doubt
    for name in ("c0/000.png", "c2/000.png"):
        (root / name).write_bytes(b"")  # unusable ones are the same as well
    report = check(open_source(root, 3), size=8)
    assert report.mislabelled == {
        "c0/001.png": ["same bytes as c2/003.png"],
        "c0/004.png": ["same bytes as c2/003.png"],
        "c2/003.png": ["same bytes as c0/001.png"],
    }
    assert list(report.skip) == ["c0/000.png", "c2/000.png"]


def test_a_placeholder_that_lies_everywhere():
    """100,000 copies in one class are compared once, not each with all others."""
    count = 100_000
    source = SimpleNamespace(labels=np.zeros(count, np.int64), name=lambda image: f"n{image}")
    digests = np.ones((count, DIGEST), np.uint8)
    assert _same_bytes(source, digests) == []
    source.labels[-2:] = 1, 2
    found = _same_bytes(source, digests)
    assert len(found) == count and {finding.text for finding in found[:-2]} == {"same bytes as n99998"}
    assert [finding.text for finding in found[-2:]] == ["same bytes as n0"] * 2


def test_table_of_findings(tmp_path, capsys):
    root = damaged_tree(tmp_path / "d")
    picture(9, 9).convert("L").save(root / "c1" / "grey.png")
    picture(9, 9).convert("CMYK").save(root / "c1" / "[red]cmyk.jpg")
    picture(9, 9).save(root / "c1" / "named.png", "JPEG")
    assert command("check", root) == 1
    printed = capsys.readouterr().out
    for row in ("unusable │ not an image", "converted │ CMYK │ 1 │ c1/[red]cmyk.jpg", "suspicious │ content is JPEG"):
        assert any(row in " ".join(line.split()) for line in printed.splitlines()), row


def test_names_that_are_not_utf8(tmp_path, capsys):
    root = tree(tmp_path / "d", (2, 2))
    for name in (b"c0/\xff\xe9.png", b"c1/\xfe.png"):
        with open(os.path.join(os.fsencode(root), name), "wb") as file:
            file.write(b"no image" if b"c0" in name else (root / "c1" / "000.png").read_bytes())
    assert command("check", root) == 1
    assert command("prepare", root, tmp_path / "left out") == 0
    assert r"c0/\udcff\udce9.png: not an image" in capsys.readouterr().out
    folder, shards = open_source(root, 2), open_source(tmp_path / "left out", 2)
    assert list(folder.skipped) == ["c0/\udcff\udce9.png"]
    assert [shards.name(i) for i in range(5)] == [folder.name(i) for i in range(5)]
    (root / CHECK_RECORD).unlink()
    assert command("prepare", root, tmp_path / "all", "--size", 8) == 0
    assert command("check", tmp_path / "all") == 1
    assert capsys.readouterr().out.count(r"c0/\udcff\udce9.png: not an image") == 2


@pytest.mark.parametrize(
    ("image", "format_", "expected"),
    [
        (Image.new("I;16", (4, 4)), "TIFF", ["16-bit", "greyscale"]),
        (Image.new("I;16", (4, 4)), "PNG", ["16-bit", "greyscale"]),
        (Image.new("RGB", (4, 4)), "TIFF", []),
        (Image.new("RGB", (4, 4)), "PPM", []),
        (Image.new("LA", (4, 4)), "PNG", ["greyscale", "transparency dropped"]),
    ],
)
def test_conversions(image, format_, expected):
    assert conversions(_bytes(image, format_)) == expected


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"skip": ["a"]}', '{"skip": {"a": 1}}', "\udcff"])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_damaged_record(tmp_path, kind, content):
    root = tree(tmp_path / "d")
    if kind == "shards":
        prepare(open_source(root, 3), tmp_path / "s", size=None)
        root = tmp_path / "s"
    (root / CHECK_RECORD).write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match="is damaged.*data check"):
        open_source(root, 3)
    assert command("check", root) == 0
    assert len(open_source(root, 3)) == 15


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_class_left_without_images(tmp_path, kind):
    root = tree(tmp_path / "d", (1, 1, 1))
    (root / "c1" / "000.png").write_bytes(b"")
    if kind == "shards":
        prepare(open_source(root, 3), tmp_path / "s", size=None)
        root = tmp_path / "s"
    assert command("check", root) == 1
    with pytest.raises(UserError, match=f"1 of 3 .*{CHECK_RECORD}.* c1"):
        open_source(root, 3)


def test_a_folder_that_takes_no_record_is_refused_first(unprivileged, capsys):  # noqa: F811
    user = os.geteuid()
    if user == 65534:
        os.seteuid(0)
    root = tree(unprivileged / "d")
    root.chmod(0o555)
    if user == 65534:
        os.seteuid(65534)
    assert command("check", root) == 2
    assert "ln -s" in capsys.readouterr().err


def _die_at_seven(task, holding):
    for image in task:
        holding(image)
        if image == 7:
            os.kill(os.getpid(), signal.SIGKILL)
    return len(task)


def test_a_process_that_dies_is_reported_with_its_file():
    with pytest.raises(UserError, match="in hand were .*image-7.*--jobs"):
        list(
            spread(
                _die_at_seven, [[1, 2, 3], [4, 5, 6, 7]], jobs=2, advance=lambda done: None, path="image-{}".format
            )
        )


def test_missing_data(tmp_path, capsys):
    assert command("check", tmp_path / "nothing") == 2
    assert "does not exist" in capsys.readouterr().err

"""ImageNet's own archives: packed without unpacking, into the shards that the unpacked folder gives."""

from __future__ import annotations

import io
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_trees import files, photographs, tree

from unite_fast.cli import main
from unite_fast.data.archives import open_archives
from unite_fast.data.prepare import prepare
from unite_fast.data.source import open_source
from unite_fast.errors import UserError


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
    prepare(open_source(root, 3), tmp_path / "expected", size=None, shard_images=2)
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


@pytest.mark.parametrize("damage", ["text", "cut", "unpacking"])
def test_what_is_no_devkit_is_refused_in_one_line(tmp_path, capsys, monkeypatch, damage):
    archive, kit = tmp_path / "ILSVRC2012_img_val.tar", tmp_path / "kit.tar.gz"
    with open(archive, "wb") as file:
        class_tar(tree(tmp_path / "d", (3,)) / "c0", file)
    devkit(kit, [1, 1, 2], {1: "c0", 2: "c1"})
    if damage == "unpacking":  # which bits make zlib fail depends on its version
        monkeypatch.setattr("tarfile.ExFileObject.read", lambda file: zlib.decompress(b"damaged"))
    else:
        kit.write_bytes(b"1\n2\n" * 500 if damage == "text" else kit.read_bytes()[:-50])
    assert main(["data", "prepare", str(archive), str(tmp_path / "s"), "--devkit", str(kit)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{kit} is not a whole tar file" in line and "ILSVRC2012_devkit_t12.tar.gz" in line


@pytest.mark.parametrize("damage", ["header", "within a header", "before a header"])
def test_an_archive_that_ends_too_early_is_refused(tmp_path, damage):
    """tarfile takes such an end for that of the archive: images would be missing, and nobody told."""
    (tmp_path / "tars").mkdir()
    for label in ("c0", "c1"):
        with open(tmp_path / "tars" / f"{label}.tar", "wb") as file:
            class_tar(tree(tmp_path / label, (3,)) / "c0", file)
    assert len(open_archives(tmp_path / "tars")) == 6
    with tarfile.open(tmp_path / "tars" / "c1.tar") as tar:
        at = list(tar)[2].offset
    whole = (tmp_path / "tars" / "c1.tar").read_bytes()
    parts = {"header": (b"damaged".ljust(512), whole[at + 512 :]), "within a header": (whole[at : at + 99],)}
    (tmp_path / "tars" / "c1.tar").write_bytes(b"".join([whole[:at], *parts.get(damage, ())]))
    with pytest.raises(UserError, match=f"c1.tar is not a whole, .* damaged at byte {at}"):
        open_archives(tmp_path / "tars")


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

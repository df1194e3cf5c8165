"""Class-folder scan: what is found, in what order, and what is refused."""

from __future__ import annotations

import os

import numpy as np
import pytest
from data_trees import tree, unprivileged  # noqa: F401, a fixture

from unite_fast.cli import main
from unite_fast.config import DataConfig
from unite_fast.data.crop import MAX_FILE_BYTES
from unite_fast.data.folder import AllImages, ImageFolder
from unite_fast.data.loader import load_images
from unite_fast.errors import UserError


def names(folder: ImageFolder) -> list[str]:
    return [os.path.relpath(folder.path(i), folder.root) for i in range(len(folder))]


def test_sorted_classes_and_files(tmp_path):
    for name in ("b/2.png", "b/10.PNG", "a/x.JPEG", "a/sub/deep/y.webp", "10/z.tif", "2/q.Jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    folder = ImageFolder(tmp_path, 4)
    assert folder.classes == ("10", "2", "a", "b")
    assert names(folder) == ["10/z.tif", "2/q.Jpg", "a/sub/deep/y.webp", "a/x.JPEG", "b/10.PNG", "b/2.png"]
    assert folder.labels.tolist() == [0, 1, 2, 2, 3, 3]
    assert folder.labels.dtype == np.int64
    assert [folder.read(i) for i in range(6)] == [name.encode() for name in names(folder)]


def test_hidden_and_other_files_are_ignored(tmp_path):
    root = tree(tmp_path / "d", (1, 1))
    for name in ("c0/.hidden.png", "c0/.cache/x.png", ".git/x.png", "c0/notes.txt", "readme.md", "stray.png", "c1/png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    assert names(ImageFolder(root, 2)) == ["c0/000.png", "c1/000.png"]


def test_symbolic_links(tmp_path):
    root = tree(tmp_path / "d", (1, 1))
    elsewhere = tree(tmp_path / "other", (2, 1))
    (root / "c0" / "link.png").symlink_to(elsewhere / "c0" / "000.png")
    (root / "c0" / "round").symlink_to(root / "c0")
    (root / "c0" / "itself.png").symlink_to("itself.png")
    (root / "c2").symlink_to(elsewhere / "c0")
    assert names(ImageFolder(root, 3)) == ["c0/000.png", "c0/link.png", "c1/000.png", "c2/000.png", "c2/001.png"]


def test_a_dangling_link_is_an_image_that_cannot_be_read(tmp_path, capsys):
    root = tree(tmp_path / "d", (1, 1))
    (root / "c0" / "broken.png").symlink_to(tmp_path / "unmounted" / "000.png")
    (root / "c0" / "broken.txt").symlink_to(tmp_path / "unmounted" / "000.txt")
    assert names(ImageFolder(root, 2)) == ["c0/000.png", "c0/broken.png", "c1/000.png"]
    assert AllImages(root).names == names(ImageFolder(root, 2))
    said = "c0/broken.png: a symbolic link to nothing: is its disk mounted?"
    assert main(["data", "prepare", str(root), str(tmp_path / "shards")]) == 0
    assert said in capsys.readouterr().out
    assert main(["data", "check", str(root)]) == 1
    assert said in capsys.readouterr().out
    assert names(ImageFolder(root, 2)) == ["c0/000.png", "c1/000.png"]


def test_a_run_on_dangling_links_alone_says_so(tmp_path):
    """A disk of images that is not mounted: the data set must not look empty."""
    root = tree(tmp_path / "d", (1, 1))
    for path in root.glob("*/*.png"):
        path.unlink()
        path.symlink_to(tmp_path / "unmounted" / path.name)
    with pytest.raises(UserError, match="c[01]/000.png .a symbolic link to nothing: is its disk mounted"):
        load_images(root, DataConfig(path=str(root)), image_size=8, num_classes=2)
    assert main(["data", "check", str(root)]) == 1
    with pytest.raises(UserError, match=f"list as unusable; if they are mended, run `unite-fast data check {root}` ag"):
        ImageFolder(root, 2)


def test_a_dangling_link_to_a_class_is_refused(tmp_path):
    """Without it the following classes would get other labels."""
    root = tree(tmp_path / "d", (1, 1))
    (root / "b").symlink_to(tmp_path / "unmounted" / "b")
    for classes in (2, 3, None):
        with pytest.raises(UserError, match="d holds 1 symbolic link to nothing: b; mount the disk that holds the"):
            ImageFolder(root, classes)


def test_names_that_are_not_utf8(tmp_path):
    root = tree(tmp_path / "d", (1, 1))
    with open(os.path.join(os.fsencode(root), b"c0", b"\xff\xe9.png"), "wb") as file:
        file.write(b"bytes")
    folder = ImageFolder(root, 2)
    assert folder.read(1) == b"bytes"


def test_special_files_are_no_images(tmp_path):
    root = tree(tmp_path / "d", (1, 1))
    os.mkfifo(root / "c0" / "pipe.png")
    (root / "c0" / "folder.png").mkdir()
    assert len(ImageFolder(root, 2)) == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: None, ["does not exist", "give a folder of class folders"]),
        (lambda root: root.write_text("x"), ["is a file"]),
        (lambda root: root.mkdir(), ["is empty"]),
        (lambda root: (root.mkdir(), (root / "a.png").write_bytes(b"")), ["no class folders", "a.png", "subfolder"]),
        (lambda root: tree(root, (3,)), ["one class only", "c0"]),
        (lambda root: [(root / name).mkdir(parents=True) for name in "abc"], ["no readable image", ".png"]),
        (lambda root: (tree(root, (1, 1)), (root / "empty").mkdir()), ["1 of 3", "no image", "empty"]),
        (lambda root: tree(root, (1, 1)), ["has 2 classes", "model.num_classes is 3", "set model.num_classes to 2"]),
        (lambda root: tree(root, (1, 1, 1, 1)), ["has 4 classes", "model.num_classes is 3"]),
        (lambda root: [tree(root / name, (1, 1)) for name in ("train", "val")], ["did you mean", "/train?"]),
    ],
    ids=["missing", "file", "empty", "files", "one", "no-image", "empty-class", "fewer", "more", "splits"],
)
def test_refused(tmp_path, make, words):
    root = tmp_path / "data"
    make(root)
    with pytest.raises(UserError) as error:
        ImageFolder(root, 3)
    message = str(error.value)
    assert all(word in message for word in [*words, str(root)])
    assert "\n" not in message


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "validation"), ("test", "train", "val")])
def test_splits_of_as_many_as_classes_are_no_classes(tmp_path, names):
    for name in names:
        tree(tmp_path / name, (1,) * len(names))
    with pytest.raises(UserError, match=f"{', '.join(names)} look like the splits of a data set: did you mean"):
        ImageFolder(tmp_path, len(names))
    assert len(ImageFolder(tmp_path / names[0], len(names)).classes) == len(names)
    (tmp_path / names[-1]).rename(tmp_path / "ship")  # pictures of trains and ships
    assert "ship" in ImageFolder(tmp_path, len(names)).classes


@pytest.mark.parametrize("arguments", [("check", "{root}"), ("prepare", "{root}", "{root}-shards")])
def test_splits_are_no_classes_to_the_commands(tmp_path, capsys, arguments):
    root = tmp_path / "data"
    for name in ("train", "Val"):
        tree(root / name, (1, 1))
    assert main(["data", *(word.format(root=root) for word in arguments)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"no class folders; Val, train look like the splits of a data set: did you mean {root}/Val?" in error
    assert error.endswith("If they are classes, rename one of them.")
    assert sorted(path.name for path in root.iterdir()) == ["Val", "train"]
    (root / "train").rename(tmp_path / "aside")
    assert main(["data", *(word.format(root=root) for word in arguments)]) == 2
    assert "; Val looks like a split of a data set: did you mean" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "aside").rename(root / "train")
    (root / "Val").rename(root / "val of a river")
    assert main(["data", *(word.format(root=root) for word in arguments)]) == 0


@pytest.mark.parametrize("denied", ["..", ".", "c1"])
def test_unreadable_folder(unprivileged, denied):  # noqa: F811
    user = os.geteuid()
    if user == 65534:
        os.seteuid(0)
    root = tree(unprivileged / "d", (1, 1))
    (root / denied).chmod(0)
    if user == 65534:
        os.seteuid(65534)
    with pytest.raises(UserError, match="check its permissions"):
        ImageFolder(root, 2)


def test_oversized_file_is_not_read(tmp_path):
    root = tree(tmp_path / "d", (1, 1))
    with open(root / "c0" / "000.png", "r+b") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse: takes no space
    folder = ImageFolder(root, 2)
    with pytest.raises(ValueError, match="bytes"):
        folder.read(0)

"""The digits tree: content, split, and what happens when it cannot be written."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unite_fast.data import digits
from unite_fast.data.digits import main, write_digits
from unite_fast.data.folder import ImageFolder
from unite_fast.errors import UserError

sklearn_datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits") / "deep" / "digits")


def test_content(written):
    source = sklearn_datasets.load_digits()
    found = {}
    for split in ("train", "val"):
        folder = ImageFolder(written / split, 10)
        assert folder.classes == tuple("0123456789")
        for index, label in enumerate(folder.labels):
            path = Path(folder.path(index))
            number = int(path.stem)
            assert source.target[number] == label
            found.setdefault(number, []).append((split, path))
    assert sorted(found) == list(range(1797))
    assert all(len(places) == 1 for places in found.values())
    for number in range(0, 1797, 37):
        image = Image.open(found[number][0][1])
        assert (image.size, image.mode, image.format) == ((32, 32), "L", "PNG")
        small = np.asarray(image.resize((8, 8), Image.Resampling.BOX)).astype(float)
        original = source.images[number] * 255 / 16
        assert np.corrcoef(small.ravel(), original.ravel())[0, 1] > 0.97
        assert abs(small.mean() - original.mean()) < 8


def test_a_fifth_of_every_class_is_held_out(written):
    train, val = (np.bincount(ImageFolder(written / split, 10).labels) for split in ("train", "val"))
    assert (np.abs(val - (train + val) / 5) <= 0.5).all()


def test_split_is_the_same_everywhere(written):
    """Results are compared across machines, so the held-out files are pinned."""
    names = sorted(path.name for path in (written / "val" / "0").glob("*.png"))
    assert names[:6] == ["0049.png", "0130.png", "0304.png", "0305.png", "0328.png", "0357.png"]


def test_again_changes_nothing(written):
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    assert write_digits(written) == written
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


def test_only_the_tree_is_left(written):
    assert os.listdir(written.parent) == ["digits"]
    assert sorted(os.listdir(written)) == ["train", "val"]


def test_incomplete_or_foreign_folder(tmp_path, capsys):
    target = tmp_path / "d"
    (target / "train" / "0").mkdir(parents=True)
    (target / "train" / "0" / "0000.png").write_bytes(b"")
    with pytest.raises(UserError, match="not a complete digits tree"):
        write_digits(target)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a complete digits tree"):
        write_digits(tmp_path / "file")
    assert main([str(target)]) != 0
    assert "error: " in capsys.readouterr().err
    assert os.listdir(target) == ["train"]


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    target = tmp_path / "d"
    save, calls = Image.Image.save, []

    def full_disk(self, *arguments, **options):
        calls.append(1)
        if len(calls) > 100:
            raise OSError(28, "No space left on device")
        save(self, *arguments, **options)

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(UserError, match="cannot write the digits to .*No space left"):
        write_digits(target)
    assert os.listdir(tmp_path) == []
    with pytest.raises(UserError, match="cannot write"):
        write_digits("/dev/null/digits")


def test_second_process_finds_the_firsts_tree(written, tmp_path, monkeypatch):
    target = tmp_path / "d"

    def overtaken(root):
        (root / "train").mkdir()
        os.symlink(written / "train", target / "train")
        os.symlink(written / "val", target / "val")

    target.mkdir()
    monkeypatch.setattr(digits, "_write", overtaken)
    assert write_digits(target) == target
    assert os.listdir(tmp_path) == ["d"]


def test_missing_scikit_learn(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        write_digits(tmp_path / "d")
    assert os.listdir(tmp_path) == []


def test_command_line(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-m", "unite_fast.data.digits", "digits"], cwd=tmp_path, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert "1797 digits" in result.stdout
    assert len(list((tmp_path / "digits").glob("*/*/*.png"))) == 1797

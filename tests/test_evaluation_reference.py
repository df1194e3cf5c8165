"""Reference statistics: accumulated exactly, written and read back, refused where they do not fit."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_toy import picture, run
from inception_toy import inception_weights

from unite_fast.engine.world import World
from unite_fast.errors import UserError
from unite_fast.evaluation import reference as reference_module
from unite_fast.evaluation.frechet import gaussian_statistics
from unite_fast.evaluation.reference import Moments, folder_statistics, read_reference, write_reference


def rows(count=50, features=5, seed=0):
    return np.random.default_rng(seed).normal(100, 1e-3, (count, features))


def moments(features=5, **options):
    found = Moments(features)
    found.add(rows(features=features, **options))
    return found


def read(path, **changes):
    return read_reference(path, **({"image_size": 32, "inception": "ab" * 32, "features": 5} | changes))


def test_moments_in_pieces_are_those_of_the_whole():
    """Features of 100 ± 1e-3: sums of squares would lose every digit of the covariance."""
    mean, covariance = gaussian_statistics(rows())
    left, right = Moments(5), Moments(5)
    for piece in (rows()[:7], rows()[7:7], rows()[7:20]):
        left.add(piece)
    right.add(rows()[20:])
    left.merge(right)
    left.merge(Moments(5))
    assert left.count == 50
    np.testing.assert_allclose(left.statistics()[0], mean, rtol=1e-14)
    np.testing.assert_allclose(left.statistics()[1], covariance, rtol=1e-7, atol=1e-14)
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        moments(count=1).statistics()


def test_a_file_says_how_it_was_made(tmp_path):
    path = tmp_path / "deep" / "reference.npz"
    write_reference(moments(), path, {"crop": "adm", "image_size": 32, "inception": "ab" * 32})
    with np.load(path) as file:
        assert set(file.files) == {"mu", "sigma", "count", "crop", "image_size", "inception"}
    found = read(path)
    np.testing.assert_array_equal(found.mu, moments().statistics()[0])
    np.testing.assert_array_equal(found.sigma, moments().statistics()[1])
    assert found.about["count"] == 50 and found.about["crop"] == "adm" and len(found.about["sha256"]) == 64
    assert list(path.parent.iterdir()) == [path]


def test_ranks_share_the_folder(tmp_path):
    """Two ranks as threads: each reads its own pictures, both end with the moments of all."""
    for index in range(5):
        picture(tmp_path / "images" / f"{index}.png", seed=index, size=(40, 32))
    (tmp_path / "images" / "5.png").write_bytes(b"no picture")
    torch.save(inception_weights(), tmp_path / "inception.pth")
    barrier, said, found = threading.Barrier(2), {}, {}

    class Rank(World):
        def collect(self, value):
            said[self.rank] = value
            barrier.wait(60)
            return [said[rank] for rank in range(2)]

    def run(world):
        options = dict(image_size=16, crop="adm", batch=2, world=world)
        found[world.size, world.rank] = folder_statistics(tmp_path / "images", tmp_path / "inception.pth", **options)

    threads = [threading.Thread(target=run, args=(Rank(rank, 2, rank, torch.device("cpu")),)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    run(World(0, 1, 0, torch.device("cpu")))
    (alone, about), (shared, about_shared) = found[1, 0], found[2, 0]
    assert about == about_shared and about["skipped"] == 1 and alone.count == shared.count == 5
    assert said[0][0].count == 3 and said[1][0].count == 2
    np.testing.assert_allclose(shared.mean, alone.mean, rtol=1e-5)
    np.testing.assert_allclose(shared.scatter, alone.scatter, rtol=1e-3, atol=1e-4 * np.abs(alone.scatter).max())


def test_the_common_form_is_enough(tmp_path):
    np.savez(tmp_path / "r.npz", mu=np.zeros(5, np.float32), sigma=np.eye(5), arr_0=np.zeros(3, np.uint8))
    found = read(tmp_path / "r.npz")
    assert found.mu.dtype == np.float64 and set(found.about) == {"file", "sha256"}
    np.savez(tmp_path / "r.npz", mu=np.zeros(5), sigma=np.eye(5), count=np.arange(3))  # somebody's own, of each class
    assert set(read(tmp_path / "r.npz").about) == {"file", "sha256"}


def test_files_that_do_not_fit(tmp_path):
    path = tmp_path / "reference.npz"

    def refusal(**changes) -> str:
        with pytest.raises(UserError) as caught:
            read(path, **changes)
        return str(caught.value)

    assert "`unite-fast reference IMAGES --out" in refusal()
    write_reference(moments(), path, {"crop": "adm", "image_size": 32, "inception": "ab" * 32})
    assert "made from images of 32×32 pixels, the model makes 64×64" in refusal(image_size=64)
    assert "other Inception weights (sha256 abababab…, here cdcdcdcd…)" in refusal(inception="cd" * 32)
    assert "mu is [5] and sigma [5, 5], the features here need [7] and [7, 7]" in refusal(features=7)
    whole = path.read_bytes()
    for cut in (0, 10, 300, len(whole) - 40):
        path.write_bytes(whole[:cut])
        assert "is truncated or not an .npz" in refusal()
    np.savez(path, mean=np.zeros(5))
    assert "must hold mu and sigma, it holds mean" in refusal()
    np.savez(path, mu=np.full(5, np.nan), sigma=np.eye(5))
    assert "holds NaN or infinite values" in refusal()
    np.savez(path, mu=np.array([object()] * 5), sigma=np.eye(5))
    assert "not an .npz of plain arrays" in refusal()
    path.write_text('{"mu": 0}')
    assert refusal().endswith("its first bytes are those of another format")
    with open(path, "wb") as file:
        np.save(file, np.zeros(5))
    assert "it is one bare array" in refusal()
    np.savez_compressed(path, mu=np.zeros(5), sigma=np.eye(5))
    whole = bytearray(path.read_bytes())
    begin = whole.index(b"mu.npy") + len("mu.npy") + int.from_bytes(whole[28:30], "little")
    whole[begin] ^= 0xFF  # the first byte of the compressed stream
    path.write_bytes(whole)
    assert "is truncated or not an .npz" in refusal()
    for sigma in (-np.eye(5), np.eye(5) + np.triu(np.ones((5, 5)))):
        np.savez(path, mu=np.zeros(5), sigma=sigma)
        assert "sigma is not a covariance" in refusal()
    with pytest.raises(UserError, match="must end in .npz"):
        write_reference(moments(), Path("x.npy"), {})


def test_every_option_reaches_the_statistics(tmp_path, capsys, monkeypatch):
    asked = []

    def statistics(images, inception, *, world, **options):
        asked.append((images, inception, options))
        return moments(), {"skipped": 2 * len(asked) - 2}

    monkeypatch.setattr(reference_module, "folder_statistics", statistics)
    monkeypatch.setattr(reference_module, "write_reference", lambda *given: None)
    arguments = ["reference", tmp_path, "--out", tmp_path / "r.npz"]
    assert run(*arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == f"mu and sigma of 50 images of 256×256 (crop adm) in {tmp_path / 'r.npz'}\n"
    assert printed.err.startswith("warning: 50 images determine 49 of the 2048 directions")
    assert run(*arguments, "--inception", "pt.pth", "--size", 32, "--crop", "none", "--batch", 5) == 0
    assert "of 32×32 (crop none), 2 unreadable ones skipped in" in capsys.readouterr().out
    assert asked == [
        (tmp_path, None, {"image_size": 256, "crop": "adm", "batch": 64}),
        (tmp_path, Path("pt.pth"), {"image_size": 32, "crop": "none", "batch": 5}),
    ]

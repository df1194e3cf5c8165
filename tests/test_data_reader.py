"""What takes the place of an image that cannot be read, and how many of them are too many."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_trees import tree

from unite_fast.data.folder import ImageFolder
from unite_fast.data.reader import BadFiles, FileReader, Problem, serve
from unite_fast.data.sampler import substitute
from unite_fast.errors import UserError

COUNT = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ImageFolder(tree(tmp_path_factory.mktemp("data") / "d", (100, 100, 100), size=1), 3)


def broken(*indices: int) -> list[Problem]:
    return [Problem(index, "broken") for index in indices]


def test_substitutes_are_the_samplers(tmp_path):
    """Resumed runs and all loaders must come to the same images, also where a substitute cannot be read itself."""
    few = ImageFolder(tree(tmp_path / "d"), 3)
    for index in set(range(len(few))) - {4}:
        Path(few.path(index)).write_bytes(b"")
    found = serve(FileReader(few, 8, "none"), 7, 2, 9)
    tried = [9, *(substitute(len(few), 7, 2, 9, attempt) for attempt in range(100))]
    tried = tried[: tried.index(4)]
    assert (found.index, found.fatal) == (4, None) and len(tried) > 2
    assert [problem.index for problem in found.problems] == tried


def test_a_few_bad_files_are_chance_even_where_they_come_first(folder):
    bad = BadFiles(folder, 0.02)  # 6 of 300
    bad.add(0, broken(1, 2, 3, 4, 5))
    bad.add(COUNT, broken(6))
    assert list(bad.reasons) == [folder.path(index) for index in range(1, 7)]
    with pytest.raises(UserError, match="^7 unusable images among the first 300 read of 300 in .*max_bad_share 0.02"):
        bad.add(1, broken(7))


def test_later_epochs_read_no_more_files_than_there_are(folder):
    bad = BadFiles(folder, 0.0)
    bad.add(5 * COUNT, [])
    with pytest.raises(UserError, match="^1 unusable image among the first 300 read of 300"):
        bad.add(1, broken(8))

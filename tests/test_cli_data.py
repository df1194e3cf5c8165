"""`unite-fast data`: options reach the work, and what is printed of it."""

import pytest
from cli_toy import mistake, run
from data_trees import picture, tree
from PIL import Image

from unite_fast.data import check as check_module
from unite_fast.data import prepare as prepare_module
from unite_fast.data.source import open_source
from unite_fast.errors import UserError
from unite_fast.workers import available_cores

JOBS = min(available_cores(), 2) % 2 + 1  # few, and not as many as the default


def _printed(capsys, *arguments, code=0):
    """What a call prints, each run of blanks as one."""
    capsys.readouterr()
    assert run("data", *arguments) == code
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture()
def asked(monkeypatch):
    """Options of every call of the library's `prepare` and `check`, which do their work."""
    calls = []

    def listen(module, name):
        work = getattr(module, name)

        def listening(*arguments, **options):
            calls.append({key: value for key, value in options.items() if key != "advance"})
            return work(*arguments, **options)

        monkeypatch.setattr(module, name, listening)

    listen(prepare_module, "prepare")
    listen(check_module, "check")
    return calls


def test_what_was_packed_is_said(tmp_path, capsys, asked):
    root, shards = tree(tmp_path / "d"), tmp_path / "s"
    for name in ("c0/002.png", "c2/000.png"):
        (root / name).write_bytes(b"no picture")
    arguments = ["prepare", root, shards, "--size", 8, "--shard-images", 4, "--jobs", JOBS]
    packed, unreadable, *named = _printed(capsys, *arguments)
    assert packed.startswith("15 images of 3 classes in 4 shards of ") and packed.endswith(f" in {shards}")
    assert unreadable.startswith("2 could not be read") and f"remove {shards} and prepare it again" in unreadable
    assert [line.partition(":")[0] for line in named] == ["c0/002.png", "c2/000.png"]
    assert len(list(shards.glob("*.tar"))) == 4 and open_source(shards, 3).prepared_size == 8
    assert ", 4 of them from before in " in _printed(capsys, *arguments)[0]
    (line,) = _printed(capsys, "prepare", tree(tmp_path / "whole"), tmp_path / "one")
    assert line.startswith("15 images of 3 classes in 1 shard of ") and "from before" not in line
    given = {"size": 8, "shard_images": 4, "jobs": JOBS}
    assert asked == [given, given, {"size": None, "shard_images": 8192, "jobs": available_cores()}]
    says = mistake(capsys, "data", "prepare", root, tmp_path / "t", "--devkit", tmp_path / "kit.tar.gz")
    assert says == f"--devkit belongs to the validation archive, and {root} is a folder"


def test_what_is_checked_and_of_what_size(tmp_path, capsys, asked):
    root = tree(tmp_path / "d")
    assert _printed(capsys, "check", root)[0].startswith("0 of 15 images are unusable")
    _printed(capsys, "check", root, "--size", 32, "--jobs", JOBS)
    assert asked == [{"size": 256, "jobs": available_cores()}, {"size": 32, "jobs": JOBS}]


def test_what_was_found_is_shown_where_its_record_cannot_be_written(tmp_path, capsys, monkeypatch):
    root = tree(tmp_path / "d")
    (root / "c0" / "bad.png").write_bytes(b"no picture")

    def full(report):
        raise UserError(f"cannot write {report.root}: disk full")

    monkeypatch.setattr(check_module.Report, "save", full)
    assert any(line.startswith("c0/bad.png: not an image") for line in _printed(capsys, "check", root, code=2))


def test_damaged_shards_are_no_clean_set(tmp_path, capsys):
    """A byte behind the images: all of them are usable."""
    root, shards = tree(tmp_path / "d"), tmp_path / "s"
    assert run("data", "prepare", root, shards) == 0
    with open(shards / "000000.tar", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    printed = _printed(capsys, "check", shards, code=1)
    assert any(line.startswith("│ damaged shard │ ") and "│ 1 │ 000000.tar" in line for line in printed), printed
    assert printed[-1].startswith("0 of 15 images are unusable")


def test_findings_of_one_kind_are_one_row_the_frequent_ones_first(tmp_path, capsys):
    root = tree(tmp_path / "d")
    for name, width in (("c0/a.png", 3000), ("c0/b.png", 4000), ("c1/c.png", 5000)):
        Image.new("RGB", (width, 1)).save(root / name)  # too long and thin, each of another size
    Image.new("F", (4, 4)).save(root / "c0" / "0.tif")
    for name in ("c0/000.png", "c0/001.png"):
        twin = root / "c1" / f"twin{name[-5]}.png"
        twin.write_bytes((root / name).read_bytes())
    picture(9, 9).save(root / "c2" / "named.png", "JPEG")
    printed = _printed(capsys, "check", root, "--size", 256, code=1)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed if line.startswith("│")]
    found = [(verdict, int(images)) for verdict, _, images, _ in rows if images]
    assert found == [("unusable", 3), ("unusable", 1), ("suspicious", 4), ("suspicious", 1)]
    assert " ".join(finding for _, finding, *_ in rows) == (
        "too long and thin: …×… pixels with the short side at … pixel mode F has no defined range in 8 bits "
        "same bytes in another class content is JPEG"
    )


def test_twenty_files_are_named_and_the_others_counted(tmp_path, capsys):
    root = tree(tmp_path / "d", (30, 1))
    for index in range(23):
        (root / "c0" / f"{index:03d}.png").write_bytes(b"no picture")
    printed = _printed(capsys, "check", root, code=1)
    assert sum(line.startswith("c0/") and ": not an image" in line for line in printed) == 20
    assert "… and 3 more" in printed and "unusable:" in printed


def test_molecules_are_read_as_a_run_reads_them(tmp_path, capsys):
    """A file, a folder of files, and what no run can read."""
    pytest.importorskip("rdkit")
    (tmp_path / "a.xyz").write_text("2\ngap=5\nH 0 0 0\nF 0 0 0.92\n2\n\nH 0 0 0\nCl 0 0 1.27\n1\ngap=8\nH 0 0 0\n")
    for path in (tmp_path, tmp_path / "a.xyz"):
        assert run("data", "check", path) == 0
        printed, warned = capsys.readouterr()
        assert printed == f"2 molecules of {path} can be used: 1 to 2 atoms, 1.5 in the mean; gap of 2: 5 to 8 eV\n"
        assert "left out: 1 × an element other than H C N O F" in warned
        assert "need no preparation" in mistake(capsys, "data", "prepare", path, tmp_path / "out")
    (tmp_path / "a.xyz").write_text("2\n\nH 0 0 0\n")
    assert "a.xyz, line 3: cut off" in mistake(capsys, "data", "check", tmp_path / "a.xyz")

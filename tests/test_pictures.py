"""Pictures: what stands where on a sheet, curves from damaged metrics files, writes that leave nothing half done."""

import json
import math
import resource
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import Image

from unite_fast import pictures
from unite_fast.errors import UserError

SIZE = 32
SCALE = 3  # 32 -> 96


def _flat(levels):
    """One flat grey image [3, 32, 32] for each level in 0..255."""
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE)


def _read(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def _tiles(picture):
    """Levels of the flat squares on a sheet, rows top to bottom, found by their size alone."""
    found = []
    for y in range(picture.shape[0] - SCALE * SIZE + 1):
        row = []
        for x in range(picture.shape[1] - SCALE * SIZE + 1):
            corners = picture[[y, y, y + SCALE * SIZE - 1, y + SCALE * SIZE - 1], [x, x + SCALE * SIZE - 1] * 2, 0]
            if corners.max() == corners.min() < 200:
                tile = picture[y : y + SCALE * SIZE, x : x + SCALE * SIZE]
                if tile.min() == tile.max():
                    row.append(int(tile[0, 0, 0]))
        if row:
            found.append(row)
    return found


def test_save_png_keeps_every_pixel(tmp_path):
    image = torch.randint(0, 256, (3, 20, 31), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name, written in (("bytes", image), ("floats", image.float() / 255)):
        path = tmp_path / "new" / "folder" / f"{name}.png"
        pictures.save_png(written, path)
        np.testing.assert_array_equal(_read(path), image.permute(1, 2, 0).numpy())


def test_reconstruction_sheet_puts_originals_above(tmp_path):
    path = tmp_path / "sheet.png"
    pictures.reconstruction_sheet(_flat([10, 20, 30, 40, 50]), _flat([11, 21, 31, 41, 51]), path, columns=3)
    picture = _read(path)
    assert _tiles(picture) == [[10, 20, 30], [11, 21, 31], [40, 50], [41, 51]]
    narrow, wide = pictures.GAP, 6 * pictures.GAP  # within a pair of rows, and between pairs
    assert picture.shape[0] == 2 * pictures.MARGIN + 4 * SCALE * SIZE + 2 * narrow + wide
    pictures.reconstruction_sheet(_flat([10]), _flat([11]), path, label="training image with a long name")
    assert _tiles(_read(path)) == [[10], [11]] and _read(path).shape[1] > picture.shape[1] - 2 * SCALE * SIZE


def test_sample_sheet_goes_class_by_class(tmp_path):
    path = tmp_path / "sheet.png"
    names = ["zero", "one", "a class whose name is far too long for a sheet", "three\nof \udcff them"]
    pictures.sample_sheet(_flat([10, 20, 30, 40, 50, 60]), [3, 0, 2], names, 2, path)
    assert _tiles(_read(path)) == [[10, 20], [30, 40], [50, 60]]
    pictures.sample_sheet(_flat([10, 20]), [7], None, 2, path)
    picture = _read(path)
    assert _tiles(picture) == [[10, 20]]
    label = picture[:, : pictures.MARGIN + 8]
    assert label.min() < 128, "the row carries no label"


def test_trajectory_sheet_goes_image_by_image_under_its_times(tmp_path):
    path = tmp_path / "sheet.png"
    images = torch.stack([_flat([10, 20]), _flat([30, 40]), _flat([50, 60])])  # three times of two images
    pictures.trajectory_sheet(images, ["zero", "one"], [0.0, 0.5, 1.0], path)
    picture = _read(path)
    assert _tiles(picture) == [[10, 30, 50], [20, 40, 60]]
    caption = picture[pictures.MARGIN : pictures.MARGIN + pictures.FONT_SIZE]
    for edge in (3, 2, 1):  # a time above every column
        right = picture.shape[1] - pictures.MARGIN - (edge - 1) * (SCALE * SIZE + pictures.GAP)
        assert caption[:, right - SCALE * SIZE : right].min() < 128


def test_tiny_images_are_enlarged_without_smoothing_and_large_ones_left_alone(tmp_path):
    path = tmp_path / "sheet.png"
    board = (torch.arange(8).view(1, 8, 1) + torch.arange(8).view(1, 1, 8)) % 2
    board = board.expand(3, 8, 8).float()
    pictures.comparison(board, 1 - board, path)
    picture = _read(path)
    bottom = picture[-pictures.MARGIN - 12, :, 0]  # the lowest row of board squares, 12 pixels a square
    assert set(np.unique(bottom)) == {0, 255}
    assert (bottom == 0).sum() == 8 * 12

    large = torch.rand(3, 128, 160, generator=torch.Generator().manual_seed(0))
    pictures.reconstruction_sheet(large[None], large[None], path)
    expected = large.mul(255).round().byte().permute(1, 2, 0).numpy()
    margin = pictures.MARGIN
    np.testing.assert_array_equal(_read(path)[margin : margin + 128, -margin - 160 : -margin], expected)


def test_comparison_shows_original_left(tmp_path):
    path = tmp_path / "pair.png"
    pictures.comparison(_flat([10])[0], _flat([20])[0], path)
    assert _tiles(_read(path)) == [[10, 20]]


def test_bad_pictures(tmp_path):
    path = tmp_path / "sheet.png"
    with pytest.raises(UserError, match="needs 20 images, got 6"):
        pictures.sample_sheet(_flat([1] * 6), range(10), None, 2, path)
    with pytest.raises(UserError, match="class 5 has no name: the data set names 2 classes"):
        pictures.sample_sheet(_flat([1, 2]), [0, 5], ["a", "b"], 1, path)
    with pytest.raises(UserError, match="one shape"):
        pictures.reconstruction_sheet(_flat([1, 2]), _flat([1]), path)
    with pytest.raises(UserError, match="1 of 2 reconstructions contain NaN"):
        bad = torch.zeros(2, 3, SIZE, SIZE)
        bad[1, 0, 0, 0] = math.nan
        pictures.reconstruction_sheet(torch.zeros_like(bad), bad, path)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_path_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write picture .*file/sheet.png"):
        pictures.save_png(_flat([1])[0], tmp_path / "file" / "sheet.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="cannot write picture .*folder.png"):
        pictures.save_png(_flat([1])[0], tmp_path / "folder.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_picture_is_replaced_and_not_written_over(tmp_path):
    path, open_elsewhere = tmp_path / "picture.png", tmp_path / "link.png"
    pictures.save_png(_flat([77])[0], path)
    open_elsewhere.hardlink_to(path)
    pictures.save_png(_flat([78])[0], path)
    assert (_read(path) == 78).all()
    assert (_read(open_elsewhere) == 77).all()


def test_failed_write_leaves_the_old_picture_whole(tmp_path):
    path = tmp_path / "picture.png"
    pictures.save_png(_flat([77])[0], path)
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the picture needs 12 kB
    try:
        with pytest.raises(UserError, match="cannot write picture"):
            pictures.save_png(noise, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (_read(path) == 77).all()
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def _record(step, **values):
    return json.dumps({"step": step, "epoch": step / 22, "loss": 2 / step, "grad_norm": 1.0, "lr": 1e-3, **values})


def test_read_metrics_survives_cuts_and_resumes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [_record(10), _record(20, loss=9.0), _record(30), '{"step": 4', _record(15), _record(20, loss=0.5), "7"]
    path.write_text("\n".join([*lines, '{"loss": 1}', _record(40)[:25]]))
    records = pictures.read_metrics(path)
    assert [record["step"] for record in records] == [10, 15, 20, 30]
    assert records[2]["loss"] == 0.5


def test_metrics_without_records_are_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(UserError, match="cannot read metrics"):
        pictures.read_metrics(path)
    path.write_text('{"st')
    with pytest.raises(UserError, match="no record yet"):
        pictures.loss_curves(path, tmp_path / "curves.png")
    path.write_text('{"step": 1, "time": 2}')
    with pytest.raises(UserError, match="none of the keys"):
        pictures.loss_curves(path, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_a_loss_of_ones_own_is_drawn_like_the_others(tmp_path, monkeypatch):
    path, drawn = tmp_path / "metrics.jsonl", []
    path.write_text(_record(1, loss=9, loss_l1=2, loss_lpips=1, loss_mine=3, loss_flow=2))
    monkeypatch.setattr(pictures, "_draw", lambda axes, title, scale, curves: drawn.extend([c[:2] for c in curves]))
    pictures.loss_curves(path, tmp_path / "curves.png")
    assert drawn[:5] == [
        ("loss", "total"), ("loss_l1", "L1"), ("loss_lpips", "LPIPS"), ("loss_mine", "mine"), ("loss_flow", "flow")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "values", "panels"),
    [
        (1, {}, 3),
        (3, {"loss_l1": 2, "loss_lpips": 0.1, "loss_flow": 1, "z0_std": 1, "z0_rank": 9, "images_per_second": 8}, 6),
        (200, {"z0_std": None, "z0_rank": math.nan, "grad_norm": 0.0, "images_per_second": 8.0}, 4),
    ],
)
def test_loss_curves_draw_a_panel_for_what_is_there(tmp_path, steps, values, panels):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(_record(step, **values) for step in range(1, steps + 1)) + '\n{"step": 9, "lo')
    out = tmp_path / "curves.png"
    pictures.loss_curves(path, out)
    picture = _read(out)
    columns = min(3, panels)
    assert picture.shape[:2] == (352 * math.ceil(panels / columns), 550 * columns)
    for panel in range(columns * math.ceil(panels / columns)):
        row, column = divmod(panel, columns)
        area = picture[352 * row : 352 * (row + 1), 550 * column : 550 * (column + 1)].astype(int)
        drawn = (area.max(-1) < 160).sum() > 200
        assert drawn == (panel < panels), f"panel {panel}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_a_loss_of_0_in_the_first_step_leaves_the_axis_logarithmic(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: drawn.append(figure.axes[0].get_yscale()))
    for zeros in (1, 2):
        records = (_record(step, loss_flow=float(step > zeros)) for step in range(1, 11))
        (tmp_path / "metrics.jsonl").write_text("\n".join(records))
        pictures.loss_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert drawn == ["log", "linear"]


def test_names_of_classes_are_more_than_english():
    missing = pictures.label_font().getmask("\uffff")
    assert len({bytes(mask) for mask in (missing, *map(pictures.label_font().getmask, "ÄЖΩ"))}) == 4


def test_letters_that_the_font_lacks_are_those_of_another_and_without_one_the_class_number(tmp_path, monkeypatch):
    """A private letter of one of Matplotlib's fonts for formulas stands for a Chinese one."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    own, other = (FT2Font(str(fonts / name)).get_charmap() for name in ("DejaVuSans.ttf", "STIXNonUni.ttf"))
    name = chr(min(other.keys() - own.keys()))
    images = torch.zeros(2, 3, 96, 96)

    def drawn(names, *installed):
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(path) for path in installed])
        pictures._font_with.cache_clear()
        pictures.sample_sheet(images, [0, 1], names, 1, tmp_path / "sheet.png")
        return (tmp_path / "sheet.png").read_bytes()

    (tmp_path / "broken.ttf").write_bytes(b"no font")
    numbers = drawn(None)
    assert drawn([name, name]) == drawn([name, name], tmp_path / "broken.ttf") == numbers
    found = drawn([name, name], tmp_path / "broken.ttf", fonts / "STIXNonUni.ttf")
    assert found != numbers and pictures._font_with(frozenset(name)).getname()[0] == "STIXNonUnicode"
    assert drawn(["a", "b"], fonts / "STIXNonUni.ttf") == drawn(["a", "b"]) != numbers
    pictures._font_with.cache_clear()

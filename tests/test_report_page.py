"""The page of a report and its charts: every picture, number and mark in its place, from values made by hand."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from report_run import EVALUATION
from test_report import Page

from unite_fast.data import crop
from unite_fast.records import RunFolder
from unite_fast.report import tiles as tiles_module
from unite_fast.report.charts import Curve, bar_chart, line_chart
from unite_fast.report.metrics import headline, result_tables
from unite_fast.report.neighbours import Match, Neighbours
from unite_fast.report.page import build
from unite_fast.report.probe import Latents, Probe, Row
from unite_fast.report.tiles import Tiles, encode, sheet


def _grey(*levels):
    """[n, 8, 8, 3] uint8 of one level each."""
    return np.array(levels, np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)


def _picture(address):
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def _page(tmp_path, run=None, probe=None):
    run = run or RunFolder(tmp_path, {"name": "a"})
    (tmp_path / "page.html").write_text(build(run, probe, why_no_probe="not run", now=0.0))
    return Page(tmp_path / "page.html")


def _charts(page):
    """(data, SVG) of every chart."""
    found = re.findall(r'<svg class="chart".*?</svg>', page.source, re.DOTALL)
    return [(_data(chart), chart) for chart in found]


def _data(chart):
    return json.loads(re.search(r'data-chart="([^"]*)"', chart)[1].replace("&#34;", '"'))


def _numbers(pattern, chart):
    """[n, groups] of an attribute pattern."""
    return np.array(re.findall(pattern, chart), float)


@pytest.fixture()
def probe():
    """Every picture of a level of its own, every number another."""
    latents = Latents(
        count=9, mean=np.array([1.0, -2.0, 0.5]), std=np.array([0.5, 1.0, 0.05]), deviation=0.25, rank=2.5,
        spectrum=np.array([0.7, 0.2, 0.1]), histogram=np.array([0.1, 0.4, 0.3, 0.2]),
        reference=np.array([0.05, 0.45, 0.35, 0.15]), range=4.0,
    )  # fmt: skip
    matches = [
        Match("cat", _grey(100)[0], _grey(101, 102, 103), [0.125, 0.25, 0.375], 0.0),
        Match("dog", _grey(110)[0], _grey(111, 112, 113), [0.5, 0.625, 0.75], 0.42),
    ]
    return Probe(
        "runs/a", 1234, {"solver": "heun", "steps": 40, "guidance": 1.5, "interval": (0.25, 0.75)},
        samples=[Row("cat", _grey(1, 2)), Row("dog", _grey(3, 4))],
        times=[0.0, 0.25, 1.0], trajectory=[Row("cat", _grey(11, 12, 13)), Row("dog", _grey(14, 15, 16))],
        originals=_grey(21, 22), reconstructions=_grey(31, 32), psnr=[20.04, 30.5],
        neighbours=Neighbours(matches, 1024, 2, True, 77, 0.333, 1, False, 16), latents=latents,
    )  # fmt: skip


def test_every_picture_and_number_stands_in_its_place(tmp_path, probe):
    page = _page(tmp_path, probe=probe)
    levels = {}
    for section, address in page.pictures:
        levels.setdefault(section, []).append(_picture(address).getpixel((0, 0))[0])
    assert levels == {
        "samples": [1, 2, 3, 4], "reconstructions": [21, 31, 22, 32], "trajectory": [11, 12, 13, 14, 15, 16],
        "neighbours": [100, 101, 102, 103, 110, 111, 112, 113],
    }  # fmt: skip
    sampler = "Solver heun, 40 time points, guidance 1.5 between 0.25 and 0.75; EMA weights of runs/a, step 1,234."
    assert sampler in page.says("samples") and "20.0 dB 30.5 dB" in page.says("reconstructions")
    assert "0.00 0.25 1.00 cat dog" in page.says("trajectory")
    neighbours = page.says("neighbours")
    assert "at 16 × 16, 0 the same" in neighbours and "mirror" not in neighbours
    assert "Searched: all training images of 2 classes, 1,024 in number. Held-out images of these classes lie 0.333 " \
        "from their nearest (median of 77). 1 of 2 lie closer to a training image than 99 %" in neighbours  # fmt: skip
    assert "0.125 0.250 0.375 cat · 0 % of held-out images lie closer" in neighbours
    assert "0.500 0.625 0.750 dog · 42 % of held-out images lie closer" in neighbours
    found = page.says("latents")
    assert "z 0 of 9 held-out" in found or "z0 of 9 held-out" in found
    assert "effective rank 2.5 of 3" in found and "deviation across images 0.250" in found
    assert "channels that hardly vary 1 of 3" in found
    probe.neighbours.whole, probe.neighbours.mirrored = False, True
    again = _page(tmp_path, probe=probe).says("neighbours")
    assert "black against white, mirror images included" in again and "a sample of the training images" in again


def test_charts_of_latents(tmp_path, probe):
    (channels, spans), (values, bars), (directions, shares) = _charts(_page(tmp_path, probe=probe))
    (found,) = channels["curves"]
    assert (found["x"], found["y"], found["note"]) == ([0, 1, 2], [1, -2, 0.5], ["± 0.5", "± 1", "± 0.05"])
    centres = _numbers(r'<circle [^>]*cy="([^"]*)"', spans)
    for (top, height), centre in zip(_numbers(r'<rect [^>]*y="([^"]*)" height="([^"]*)"', spans), centres, strict=True):
        assert top + height / 2 == pytest.approx(centre, abs=0.02)
    assert directions["curves"][0]["y"] == [0.7, 0.2, 0.1]
    for data, chart in ((channels, spans), (directions, shares), (values, bars)):
        low, high, start, end, _ = data["xAxis"]  # by which a pointer finds a bar
        places = start + (np.array(data["curves"][0]["x"]) - low) / (high - low) * (end - start)
        rects = _numbers(r'<rect [^>]*x="([^"]*)" width="([^"]*)"', chart)
        assert rects[:, 0] + rects[:, 1] / 2 == pytest.approx(places, abs=0.3)
    (found,) = values["curves"]
    assert (found["x"], found["y"]) == ([-3, -1, 1, 3], [0.1, 0.4, 0.3, 0.2]), "middles of four bins from -4 to 4"
    line = np.array([pair.split(",") for pair in re.search(r'"line c2" points="([^"]*)"', bars)[1].split()], float)
    rects = _numbers(r'<rect [^>]*x="([^"]*)" width="([^"]*)" y="([^"]*)" height="([^"]*)"', bars)
    assert line[:, 0] == pytest.approx(rects[:, 0] + rects[:, 1] / 2, abs=0.3)
    foot = rects[0, 2] + rects[0, 3]
    unit = rects[0, 3] / 0.1
    assert rects[:, 3] / unit == pytest.approx(probe.latents.histogram, abs=0.002)
    assert (foot - line[:, 1]) / unit == pytest.approx(probe.latents.reference, abs=0.002)


def test_bars_grow_from_zero_both_ways():
    (up, height), (down, depth) = _numbers(r'<rect [^>]*y="([^"]*)" height="([^"]*)"', bar_chart([2, -1], name="n"))
    assert height == pytest.approx(2 * depth, abs=0.03) and up + height == pytest.approx(down, abs=0.03)


def _line(chart, kind="line c0"):
    points = re.search(rf'<polyline class="{kind}" points="([^"]*)"', chart)[1]
    return np.array([pair.split(",") for pair in points.split()], float)


def test_an_axis_begins_at_zero_unless_that_flattens_its_curve():
    def lowest(*values):
        return _data(line_chart([Curve("", np.arange(3.0), np.array(values))], log=False, x_name="step"))["yAxis"][0]

    assert lowest(1.0, 5.0, 9.0) == 0 and lowest(10.0, 10.5, 11.0) == 10 and lowest(-3.0, 0.0, 3.0) == -3


def test_ticks_and_marks_stand_at_their_values():
    x = np.arange(0.0, 11)
    chart = line_chart([Curve("", x, 10 - x)], log=False, x_name="step", marks=[3.0])
    line = _line(chart)
    ticks = re.findall(r'<text class="tick" x="([^"]*)" y="([^"]*)" text-anchor="(\w+)">(\w+)</text>', chart)
    assert {float(text) for *_, anchor, text in ticks if anchor == "end"} >= {0, 5, 10}
    for at_x, at_y, anchor, text in ticks:
        if anchor == "middle":
            assert float(at_x) == pytest.approx(line[int(text), 0], abs=0.1)
        elif 0 <= float(text) <= 10:
            assert float(at_y) - 3.5 == pytest.approx(line[10 - int(text), 1], abs=0.1)
    assert re.search(r'class="mark" x1="([^"]*)"', chart)[1] == f"{line[3, 0]:.1f}"
    assert _data(chart)["curves"] == [{"label": "", "x": x.tolist(), "y": (10 - x).tolist()}]


def test_a_noisy_curve_lies_under_its_running_mean_and_keeps_its_peaks():
    x = np.arange(4000.0)
    y = np.where(x % 2, 6.0, 4.0)
    y[1234] = 50
    chart = line_chart([Curve("", x, y, noisy=True)], log=False, x_name="step")
    (curve,) = _data(chart)["curves"]  # of windows of a hundred
    assert (curve["x"][0], curve["x"][-1]) == (49.5, 3949.5) and len(curve["x"]) == 360
    assert (min(curve["y"]), max(curve["y"])) == (5, pytest.approx(5 + 46 / 100))
    faint = _line(chart, "line c0 faint")
    assert len(faint) == 720
    assert (faint[:, 1] == faint[:, 1].max()).sum() > 300 and (faint[:, 1] < faint[:, 1].max() - 100).sum() == 1


def test_values_that_are_not_positive_leave_a_logarithmic_axis_only_where_they_are_many():
    few, many = np.array([0.0] + [1.0] * 99), np.array([0.0] * 50 + [1.0] * 50)
    for curves, log in (((few, few), True), ((few, many), False)):
        drawn = [Curve(str(place), np.arange(100.0), y) for place, y in enumerate(curves)]
        assert _data(line_chart(drawn, log=True, x_name="step"))["yAxis"][-1] is log


def test_a_search_is_a_line_for_each_setting_between(tmp_path):
    search = EVALUATION["tables"]["guidance_search"]
    rows = [*reversed(search), {"guidance": 4.0, "low": 0.0, "high": 1.0, "score": 7.5}]
    lonely = [{"guidance": 1.0, "low": 0.1 * low, "high": 1.0, "score": 1.0} for low in range(3, 9)]
    gaps = [{"count": 50_000, "b": 2.0}, {"b": 3.0, "whole": True}]
    tables = {"search": rows + lonely, "damaged": [[1, 2.5], {"b": 1}], "empty": [], "gaps": gaps}
    content = {"metrics": {}, "protocol": {}, "tables": tables}
    (found,) = result_tables(RunFolder(tmp_path, {}, evaluations={"a": content}))
    grid, gaps = found.grids
    assert (gaps.columns, gaps.rows) == (["count", "b", "whole"], [["50,000", "2", ""], ["", "3", "yes"]])
    curves = _data(grid.chart)["curves"]
    assert len(grid.legend) == 5 and grid.legend[:2] == ["low 0, high 1", "low 0.2, high 1"]
    assert [(curve["x"], curve["y"]) for curve in curves[:2]] == [
        ([1, 2, 3, 4], [19, 18, 17, 7.5]), ([1, 2, 3], [19.2, 18.2, 17.2])
    ]  # fmt: skip
    content["tables"] = [1]
    assert result_tables(RunFolder(tmp_path, {}, evaluations={"a": content}))[0].grids == []


def test_results_of_earlier_weights_are_folded(tmp_path):
    evaluations = {f"at_{step}": {"metrics": {"is": 2.0}, "protocol": {"model": {"step": step}}} for step in (10, 20)}
    page = _page(tmp_path, RunFolder(tmp_path, {}, evaluations=evaluations))
    assert re.findall(r'class="card"><(summary|h3)>(at_\d+)', page.source) == [("h3", "at_20"), ("summary", "at_10")]


def test_the_first_numbers_are_of_the_end_of_training_unless_a_later_step_was_evaluated():
    def first(*evaluated):
        made = [{"metrics": {"psnr": float(step)}, "protocol": {"model": {"step": step}}} for step in evaluated]
        evaluations = dict(zip("ab", made))
        return headline(RunFolder(None, {}, summary={"steps": 20, "psnr": 20.5}, evaluations=evaluations))

    assert first(10) == first() == [("PSNR", "20.5 dB", "higher")]
    assert first(10, 20)[0][1] == "20 dB" and first(30, 10)[0][1] == "30 dB"
    many = RunFolder(None, {}, summary={"ssim": 0.5, "psnr": 20.0, "rfid": 2.0, "coverage": 0.25, "gfid": 3.0})
    assert [title for title, *_ in headline(many)] == ["gFID", "rFID", "PSNR", "coverage"]


def test_what_training_images_score_stands_beside_its_metric(tmp_path):
    metrics = {"frechet_pca": 0.5, "frechet_pca_train": 0.25, "images_train": 7}
    (found,) = result_tables(RunFolder(tmp_path, {}, evaluations={"a": {"metrics": metrics, "protocol": {}}}))
    assert [(entry.title, entry.value, entry.real) for entry in found.entries] == [
        ("Fréchet distance, PCA", "0.5", "0.25"), ("images train", "7", "")
    ]  # fmt: skip


def test_small_pictures_are_exact_and_large_ones_no_wider_than_the_page_shows():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    tiles = Tiles([noise])
    assert tiles.exact and np.array_equal(np.asarray(_picture(tiles(noise))), noise)
    assert not Tiles([np.zeros((65, 65, 3), np.uint8)]).exact
    assert _picture(encode(np.zeros((40, 200, 3), np.uint8), 50, exact=False)).size == (50, 10)
    assert _picture(encode(np.zeros((200, 40, 3), np.uint8), 50, exact=True)).size == (40, 200)


def test_a_sheet_that_is_no_picture_or_too_large_is_left_out(tmp_path, monkeypatch):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    assert _picture(sheet(tmp_path / "a.png", 15)).size == (15, 10)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    assert sheet(tmp_path / "cut.png", 15) is None and sheet(tmp_path / "none.png", 15) is None
    monkeypatch.setattr(tiles_module, "MAX_PIXELS", 599)
    assert crop.MAX_PIXELS > 599 and sheet(tmp_path / "a.png", 15) is None


def _sheets(tmp_path, **levels):
    for name, level in levels.items():
        Image.new("RGB", (30, 20), (level,) * 3).save(tmp_path / f"{name}.png")


def _levels(page, section):
    return [round(_picture(address).getpixel((0, 0))[0], -1) for place, address in page.pictures if place == section]


def test_sheets_of_the_run_from_the_first_to_the_last(tmp_path):
    _sheets(tmp_path, **{f"samples_{10 * k:08d}": 10 * k for k in range(1, 9)})
    run = RunFolder(tmp_path, {}, [{"step": 99}])
    page = _page(tmp_path, run)
    assert _levels(page, "samples") == [10, 20, 40, 50, 70, 80]
    assert "step 10 step 20 step 40 step 50 step 70 step 80" in page.says("samples")
    _sheets(tmp_path, samples=200, reconstructions=250)
    assert _levels(_page(tmp_path, run), "samples") == [200, 10, 20, 40, 50, 70, 80], "samples.png of a trial"
    ended = RunFolder(tmp_path, {}, [{"step": 99}], summary={"steps": 90, "reconstructed": "training"})
    page = _page(tmp_path, ended)
    assert _levels(page, "samples") == [200, 10, 30, 40, 60, 70, 200] and "step 90" in page.says("samples")
    extended = RunFolder(tmp_path, {}, [{"step": 99}], summary={"steps": 35})
    assert "step 30 step 35 step 50" in _page(tmp_path, extended).says("samples")
    assert _levels(page, "reconstructions") == [250]
    assert "Training images above their reconstructions" in page.says("reconstructions")


def test_the_first_line_and_the_sessions(tmp_path):
    model = {"image_size": 32, "num_classes": 7, "registers": 64, "latent_dim": 8}
    config = {"name": "a", "model": model, "train": {"steps": 4000}}
    started = {"started": 86400.0, "device": "H100"}
    sessions = [started, {"started": 2 * 86400.0, "first_step": 1500, "device": "H200"}]
    summary = {"parameters": 2_340_000, "training_seconds": 12_000, "made_by": {"versions": {"torch": "2.9"}}}
    metrics = [{"step": 3000, "images": 96_000, "time": 1.0}]
    top = _page(tmp_path, RunFolder(tmp_path, config, metrics, sessions, summary))
    assert "2.3 M parameters 32 × 32 images of 7 classes 64 × 8 latents step 3,000 of 4,000 96,000 images seen " \
        "3 h 20 min of training" in top.says("top")  # fmt: skip
    environment = top.says("environment")
    assert "resumed after step 1,500 started 1970-01-03 00:00 UTC" in environment
    assert environment.index("H200") < environment.index("from the start started 1970-01-02 00:00 UTC device H100")
    assert "2.9" not in environment
    old = _page(tmp_path, RunFolder(tmp_path, config, metrics, [], summary | {"parameters": 99_000}))
    assert "at the end of training versions torch 2.9" in old.says("environment")
    assert "99,000 parameters" in old.says("top")


def test_curves_are_noisy_logarithmic_and_marked_as_their_panel_says(tmp_path):
    metrics = [{"step": step, "loss_l1": 1.0 + step % 2, "loss_flow": 2.0, "lr": 1e-3} for step in range(1, 401)]
    page = _page(tmp_path, RunFolder(tmp_path, {}, metrics, [{"first_step": 100}]))
    (losses, drawn), (lr, flat) = _charts(page)
    assert [curve["label"] for curve in losses["curves"]] == ["L1", "flow"]
    assert "Losses L1 flow" in page.says("training")
    own = _page(tmp_path, RunFolder(tmp_path, {}, [record | {"loss_mine": 3.0} for record in metrics], []))
    assert "Losses L1 flow mine" in own.says("training")
    assert losses["yAxis"][-1] is True and lr["yAxis"][-1] is False
    assert "faint" in drawn and "faint" not in flat and set(losses["curves"][0]["y"]) == {1.5}
    low, high, start, end, _ = losses["xAxis"]
    (place,) = _numbers(r'class="mark" x1="([^"]*)"', drawn)
    assert place == pytest.approx(start + (100 - low) / (high - low) * (end - start), abs=0.1)


def test_every_curve_has_a_colour_of_the_page_and_its_legend_the_same(tmp_path):
    """However many losses there are: without one a line cannot be seen."""
    record = {"loss": 2.0} | {f"loss_{number}": 1.0 + number for number in range(7)}
    page = _page(tmp_path, RunFolder(tmp_path, {}, [{"step": step} | record for step in range(1, 401)]))
    ((_, drawn),) = _charts(page)
    lines = re.findall(r'class="line (c\d+)"', drawn)
    assert len(lines) == 8 and lines == re.findall(r'class="key (c\d+)"', page.source)
    assert all(f".{part}.{colour} {{" in page.source for colour in lines for part in ("line", "dot", "key"))


def test_keys_that_differ_from_their_default_are_marked(tmp_path):
    config = {
        "name": "other", "train": {"seed": 0}, "data": {"prefetch": 4, "workers": 3},
        "model": {"decoder": {"depth": 1}}, "sampling": {"interval": [0.1, 1.0], "guidance": 1.0, "steps": 51},
        "unknown": {"key": 1},
    }  # fmt: skip
    page = _page(tmp_path, RunFolder(tmp_path, config))
    changed = re.findall(r'<div class="changed"><dt>([^<]*)</dt>', page.source)
    assert changed == ["name", "workers", "decoder.depth", "steps", "key"]
    kept = re.findall(r"<div><dt>([^<]*)</dt>", page.source)
    assert kept == ["seed", "prefetch", "interval", "guidance"]
    assert "sampling 1 of 3 set" in page.says("configuration")

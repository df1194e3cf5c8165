"""The pictures and the table of `analyze`: every line, cell, mark and label is that of the study."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from unite_fast.analysis import study_pictures
from unite_fast.analysis.entropy import GROUPS, TensorEntropy
from unite_fast.analysis.study import Alignment, Cosine, Options, Probing, Study
from unite_fast.analysis.trajectories import Trajectory
from unite_fast.cli.analyze import _show

TIMES = (0.0, 0.2, 0.5, 0.6, 1.0)
BLOCKS = 3


def _entropy(encoder, depth, kind, bits):
    return TensorEntropy("name", encoder, depth, GROUPS[kind in ("qkv", "mlp_in")], kind, 1, bits)


def _study():
    """Numbers that are all different, so that none can stand in another's place."""
    numbers = np.random.default_rng(0).permutation(2 * len(TIMES) * BLOCKS**2).reshape(2, -1, BLOCKS, BLOCKS)
    cka, cknna = numbers / numbers.size
    entropy = [
        _entropy("encoder", 0, "norm1", 1.0), _entropy("encoder", 1, "norm1", 2.0),
        _entropy("encoder", 2, "norm1", 2.5), _entropy("encoder", 0, "qkv", 3.0), _entropy("encoder", 1, "qkv", 4.0),
        _entropy("denoiser", 0, "qkv", 5.0), _entropy("denoiser", 1, "qkv", 5.5),
        _entropy("encoder", 0, "mlp_in", 3.5), _entropy("encoder", 1, "mlp_in", 4.5),
    ]  # fmt: skip
    cosine = Cosine([0.1, 0.2, 0.3, 0.4, 0.5], [0.6, 0.7, 0.8, 0.9, 1.0], [0.05, 0.15, 0.25, 0.35, 0.45], 0.55)
    path = Trajectory([0.0, 1.0], torch.zeros(2, 2, 4, 4), torch.rand(2, 2, 3, 8, 8))
    probing = Probing(0.25, 0.75, [0.3, 0.4, 0.5], 0.125, 9, [1.0] * 5)
    alignment = Alignment(cka, cknna)
    return Study(Options(TIMES, 0, 4), 12, alignment, cosine, entropy, path, ["a", "b"], [0.5, 1.0], probing)


@pytest.fixture()
def drawn(monkeypatch, tmp_path):
    """Name of each picture -> its axes, once drawn."""
    figures, sheets = {}, {}
    monkeypatch.setattr(study_pictures, "save_figure", lambda figure, path: figures.update({path.name: figure.axes}))
    monkeypatch.setattr(study_pictures, "trajectory_sheet", lambda *given: sheets.update({given[-1].name: given[:-1]}))

    def draw(result):
        figures.clear()
        study_pictures.draw_all(result, tmp_path)
        return figures | sheets

    return draw


def _lines(axes):
    """Label -> (x, y) of its lines."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def _ticks(axes):
    return {int(at): text.get_text() for at, text in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)}


def test_alignment_by_block_and_by_pair_of_blocks(drawn):
    result = _study()
    pictures = drawn(result)
    for axes, name in zip(pictures["alignment.png"], ("cka", "cknna"), strict=False):
        matrices = getattr(result.alignment, name)
        assert axes.get_title("left").startswith(f"{name.upper()} of") and len(axes.lines) == len(TIMES)
        for line, matrix in zip(axes.lines, matrices, strict=True):
            assert list(line.get_xdata()) == [0, 1, 2]
            assert list(line.get_ydata()) == [matrix[block, block] for block in range(BLOCKS)]
        shades = [sum(to_rgb(line.get_color())) for line in axes.lines]
        assert shades == sorted(shades, reverse=True), "from light, the noise, to dark"
        assert axes.get_ylim()[0] == 0 and _ticks(axes) == {0: "0", 1: "1", 2: "2"}
    *cells, _bar = pictures["alignment_matrix.png"]
    for row, name in enumerate(("cka", "cknna")):
        for axes, t in zip(cells[4 * row : 4 * row + 4], (0, 0.2, 0.6, 1), strict=True):
            matrix = getattr(result.alignment, name)[TIMES.index(t)]
            assert axes.get_title("left") == f"{name.upper()}, t = {t:g}"
            (image,) = axes.images
            assert np.array_equal(image.get_array(), matrix) and image.get_clim() == (0, 1)
            assert axes.get_xlabel() == "denoising block" and axes.get_ylim()[0] < axes.get_ylim()[1]
            for text in axes.texts:  # entry (i, j): i upwards, of tokenization, j to the right
                column, line = text.get_position()
                assert text.get_text() == f"{matrix[line, column]:.2f}"
            assert len(axes.texts) == BLOCKS**2
        assert cells[4 * row].get_ylabel() == "tokenization block"


def test_alignment_below_zero_is_within_the_picture(drawn):
    result = _study()
    result.alignment.cknna[1, 2, 2] = -0.5
    result.alignment.cknna[0] = np.nan
    cka, cknna, _ = drawn(result)["alignment.png"]
    assert cknna.get_ylim()[0] < -0.5 and cka.get_ylim()[0] == 0


def test_cosines_and_probes_are_under_their_names(drawn):
    result = _study()
    pictures = drawn(result)
    (axes,) = pictures["cosine.png"]
    cosine, times = result.cosine, list(TIMES)
    assert _lines(axes) == {
        "prediction ẑ0, under the class": (times, cosine.labelled),
        "prediction ẑ0, without a label": (times, cosine.unlabelled),
        "z_t, from which it is predicted": (times, cosine.noised),
        "mean latent of all images": ([0, 1], [0.55, 0.55]),
    }
    (axes,) = pictures["probing.png"]
    assert {label: y for label, (_, y) in _lines(axes).items()} == {
        "mean register token of a block": [0.3, 0.4, 0.5], "latents z0: 75.0%": [0.75, 0.75],
        "pixels: 25.0%": [0.25, 0.25], "chance: 12.5%": [0.125, 0.125],
    }  # fmt: skip
    images, names, shown = pictures["trajectories.png"]
    assert images is result.trajectory.images and (names, shown) == (["a", "b"], [0.0, 1.0])
    result.cosine.labelled, result.probing = None, None
    again = drawn(result)
    assert "probing.png" not in again and len(again["cosine.png"][0].lines) == 3


def test_entropy_stands_at_the_depth_of_its_block(drawn):
    norms, matrices = drawn(_study())["entropy.png"]
    assert _lines(norms) == {"norm1": ([0, 1, 2], [1.0, 2.0, 2.5])} and norms.get_title("left").endswith(GROUPS[0])
    assert _lines(matrices) == {
        "qkv": ([0, 1], [3.0, 4.0]), "qkv, denoiser": ([0, 1], [5.0, 5.5]), "mlp_in": ([0, 1], [3.5, 4.5])
    }  # fmt: skip
    assert norms.get_ylim()[0] == 0 and norms.get_ylim()[1] >= 6 and _ticks(norms) == {0: "0", 1: "1", 2: "final"}
    qkv, denoiser, _ = matrices.lines
    assert (qkv.get_color(), qkv.get_fillstyle(), denoiser.get_fillstyle()) == (denoiser.get_color(), "full", "none")


@pytest.mark.parametrize(("count", "last", "ticks"), [
    (24, None, {0: "0", 3: "3", 6: "6", 9: "9", 12: "12", 15: "15", 18: "18", 21: "21"}),
    (25, "final", {0: "0", 3: "3", 6: "6", 9: "9", 12: "12", 15: "15", 18: "18", 21: "21", 24: "final"}),
    (2, "final", {0: "0", 1: "final"}),
])  # fmt: skip
def test_ticks_of_many_blocks(count, last, ticks):
    axes = study_pictures._figure(4, 3).add_subplot()
    study_pictures._blocks(axes, count, last=last)
    assert _ticks(axes) == ticks and len(axes.get_xticks()) == len(ticks)


def test_numbers_on_a_matrix_of_few_blocks_alone():
    axes = study_pictures._figure(4, 3).add_subplot()
    study_pictures._values(axes, np.zeros((7, 7)))
    assert not axes.texts
    study_pictures._values(axes, np.array([[1.0, -0.001], [0.1, np.nan]]))
    assert [text.get_text() for text in axes.texts] == ["1.00", "0.00", "0.10", "nan"]


def test_the_table_is_of_the_first_and_the_last_block(capsys):
    result = _study()
    result.probing.blocks = [0.3, 0.5, 0.4]
    _show(result, SimpleNamespace(origin="runs/a", made_by={"step": 7}), Path("out"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "runs/a, step 7, 12 images" in printed
    measures = result.alignment.cka, result.alignment.cknna
    for place, t in enumerate(TIMES):
        cells = [f"{measure[place, block, block]:.3f}" for measure in measures for block in (0, -1)]
        assert f"│ {t:g} │ {' │ '.join(cells)} │ {result.cosine.unlabelled[place]:.3f} │" in printed
    assert "latents 75.0%, block 1 50.0% (the best), pixels 25.0%, chance 12.5%" in printed
    assert "out/analysis.json" in printed

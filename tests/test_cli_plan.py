"""What `unite-fast plan` prints of a plan: its JSON, its units, and the lines below its tables."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from cli_toy import run

from unite_fast.analysis import plan_picture
from unite_fast.analysis.counts import image_operations
from unite_fast.analysis.devices import Network, find_gpu
from unite_fast.analysis.planning import breaking_point, plan, scaling
from unite_fast.cli.plan import _print_break, _short
from unite_fast.config import Config

H100 = find_gpu("h100-80")
NODES = Network(per_node=8, node_link=H100.link, link=50e9)
IMAGENET = 1_281_167
PUBLISHED = {"objective": {"flow_draws": 14}, "data": {"path": "unused"}}


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def numbers(capsys, *arguments) -> dict:
    assert run("plan", "--json", *arguments) == 0
    return json.loads(capsys.readouterr().out)


def printed(capsys, *arguments) -> str:
    assert run("plan", *arguments) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("preset", "epochs"), [("B", 240), ("M", 240), ("XL", 120)])
def test_a_preset_is_the_published_run_on_eight_h100(preset, epochs, capsys):
    found = numbers(capsys, "--preset", preset)
    train = {"epochs": epochs, "global_batch": 1024, "micro_batch": "auto", "zero_stage": 1}
    made = Config.parse(PUBLISHED | {"model": {"preset": preset, "decoder": {"preset": "B"}}, "train": train})
    operations = image_operations(made.model, made.objective)
    scaled = scaling(made, H100, NODES, stage=1)
    plans = [plan(made, H100, NODES, ranks=8, stage=stage) for stage in range(4)]
    assert (found["gpu"]["name"], found["gpu"]["memory"]) == ("h100-80", 80 * 2**30)
    for row, p in zip(found["plans"] + found["scaling"], plans + scaled, strict=True):
        assert (row["zero_stage"], row["optimizer"], row["gpus"]) == (p.stage, p.optimizer, p.ranks)
        assert (row["micro_batch"], row["draws_per_chunk"]) == (p.micro_batch, p.draws_per_chunk)
        assert row["micro_batch"] * row["accumulation"] * row["gpus"] == row["global_batch"] == 1024
        seconds = row["step_seconds"]
        assert seconds["total"] == pytest.approx(p.seconds.total) and seconds["launching"] == p.seconds.launching
        assert row["images_per_second"] == pytest.approx(1024 / seconds["total"])
        assert row["mfu"] == pytest.approx(operations * 1024 / row["gpus"] / seconds["total"] / H100.matmul)
        assert row["epoch_hours"] == pytest.approx(IMAGENET / row["images_per_second"] / 3600)
        assert row["gpu_hours"] == pytest.approx(epochs * row["gpus"] * row["epoch_hours"])
    broken = breaking_point(scaled)
    assert found["breaks"] == (broken and {"gpus": broken[0].ranks, "why": broken[1]})


@pytest.mark.parametrize(
    ("images", "unit", "in_an_hour"), [(IMAGENET, "h", 1), (100_000, "min", 60), (1000, "s", 3600)]
)
def test_an_epoch_is_in_the_largest_unit_that_leaves_a_tenth(images, unit, in_an_hour, capsys):
    options = ["--preset", "B", "--images", images]
    rows = [[cell for cell in line.split(" ") if cell] for line in printed(capsys, *options).splitlines()]
    assert [unit, "GPU-h,", "240"] in [row[-4:-1] for row in rows]
    hours = [row["epoch_hours"] for row in numbers(capsys, *options)["plans"]]
    assert min(hours) * in_an_hour >= 0.1 and (unit == "h" or min(hours) * in_an_hour / 60 < 0.1)
    cells = [row[-2] for row in rows if row and re.match(r"\d\xa0", row[0])]
    assert cells == [_short(value * in_an_hour) for value in hours]


def test_steps_are_of_each_plans_own_batch(capsys):
    """A run without a global batch: more GPUs see more images in as many steps."""
    length = ["train.epochs=null", "train.steps=1000", "train.global_batch=null", "train.accumulation=1"]
    for row in numbers(capsys, "--preset", "B", "--set", *length)["scaling"]:
        assert row["global_batch"] == row["micro_batch"] * row["gpus"]
        assert row["gpu_hours"] == pytest.approx(1000 * row["step_seconds"]["total"] * row["gpus"] / 3600)


def test_numbers_have_three_digits_or_all():
    values = {0: "0", 0.0099: "<0.01", 0.01: "0.01", 0.12345: "0.123", 99.94: "99.9", 99.96: "100", 1234.6: "1,235"}
    assert {value: _short(value) for value in values} == values


def test_lines_name_what_is_assumed(capsys):
    options = ["--preset", "B", "--set", "objective.flow_draws=3"]
    text = printed(capsys, *options, "--gpu", "rtx4090", "--per-node", 4, "--network", 100)
    assert "B, S = 3, on 8 × rtx4090" in text and "the same run on more GPUs, ZeRO 1" in text
    assert f"· data: ImageNet's {IMAGENET:,} images per epoch" in text
    assert "rates: 132 of 165 TFLOP/s in bf16 and 0.90 of 1.01 TB/s (the shares of the datasheet's peak" in text
    assert "32 GB/s per GPU inside a node of 4, 100 Gbit/s per GPU between nodes" in text
    assert "80% of that is reached, 2 and 6 µs per hop" in text and "at most 92 % of the device" in text
    assert "train.fp8" not in text
    measured = printed(capsys, *options, "--gpu", "h200")
    assert "rates: 790 of 989 TFLOP/s in bf16 and 4.30 of 4.80 TB/s (measured)" in measured
    assert "900 GB/s" not in measured and "450 GB/s per GPU inside a node of 8" in measured


def test_draws_a_chunk_are_listed_by_stage_and_by_gpus(capsys):
    options = ["--preset", "L", "--gpus", "16", "--gpu", "rtx4090"]
    (line,) = (line for line in printed(capsys, *options).splitlines() if "flow draws per chunk" in line)
    found = numbers(capsys, *options)
    stages, _, gpus = line.partition("; by GPUs: ")
    for text, rows, name in ((stages, found["plans"], "zero_stage"), (gpus, found["scaling"], "gpus")):
        groups = {int(chunk): members for chunk, members in re.findall(r"(\d+) \(([^)]*)\)", text)}
        assert len(groups) > 1, text
        listed = [(int(number), chunk) for chunk, members in groups.items() for number in re.findall(r"\d+", members)]
        assert sorted(listed) == sorted((row[name], row["draws_per_chunk"]) for row in rows)


def test_launches_are_those_of_the_steps(capsys):
    """From the fewest to the most of all rows, each at the seconds of a launch; who waits for them is named."""
    options = ["--preset", "B", "--gpus", "1024", "--launch-us", "25"]
    (line,) = (line for line in printed(capsys, *options).splitlines() if "launches per step" in line)
    found = numbers(capsys, *options)
    rows = found["plans"] + found["scaling"]
    launches = [round(row["step_seconds"]["host"] / 25e-6) for row in rows]
    assert len(set(launches)) > 2
    assert f"host: {min(launches):,} to {max(launches):,} launches per step at 25 µs each (given; " in line
    stages = [f"ZeRO\xa0{row['zero_stage']}" for row in found["plans"] if row["step_seconds"]["launching"]]
    gpus = [str(row["gpus"]) for row in found["scaling"] if row["step_seconds"]["launching"]]
    waiting = [", ".join(stages)] * bool(stages) + [f"{', '.join(gpus)} GPUs"] * bool(gpus)
    assert len(stages + gpus) < len(rows) and line.endswith(f"it limits {' and '.join(waiting)}")
    quick = printed(capsys, *options[:-1], "0.1")
    assert "it limits none of these steps" in quick


def test_what_does_not_fit_is_no_measure_of_scaling(capsys):
    train = {"epochs": 1, "global_batch": 1024, "micro_batch": 4}
    made = Config.parse(PUBLISHED | {"model": {"preset": "B"}, "train": train})
    some = plan(made, H100, NODES, ranks=8, stage=1)
    plans = [replace(some, ranks=ranks, fits=ranks in (16, 32)) for ranks in (8, 16, 32, 64)]
    _print_break(plans, None)
    assert "Up to 32 GPUs each does at least 80% of the work it does among 16." in capsys.readouterr().out
    _print_break(plans, (plans[2], "the reason"))
    says = "Scaling breaks at 32 GPUs: each does less than 80% of the work it does among 16; the reason."
    assert says in capsys.readouterr().out


def test_a_picture_may_be_called_png_in_capitals(tmp_path, capsys):
    assert f"picture in {tmp_path / 'plan.PNG'}" in printed(capsys, "--preset", "B", "--out", tmp_path / "plan.PNG")


@pytest.mark.parametrize("micro_batch", [1, 32])
def test_a_picture_shows_the_numbers(micro_batch, monkeypatch, capsys):
    """Bars of memory end at the peak, which is an update's where one sample is a micro-batch; times fill a step."""
    figures = []
    monkeypatch.setattr(plan_picture, "save_figure", lambda figure, path: figures.append((figure, path)))
    changed = ["--set", "objective.flow_draws=3", f"train.micro_batch={micro_batch}"]
    options = ["--preset", "B", "--gpu", "a100-40", *changed]
    printed(capsys, *options, "--out", "plan.png")
    found = numbers(capsys, *options)
    ((figure, path),) = figures
    assert figure.get_suptitle() == "B, S = 3, a100-40" and str(path) == "plan.png"
    memory, time, throughput = figure.axes
    bars = {bar.get_label(): [patch.get_height() for patch in bar] for bar in memory.containers}
    stored = [row["memory_bytes"] for row in found["plans"]]
    assert [sum(heights) * 2**30 for heights in zip(*bars.values(), strict=True)] == pytest.approx(
        [row["peak"] for row in stored], rel=0.005
    )
    assert ("behind the passes" in bars) is (micro_batch == 1)
    for name, key in (("weights", "weights"), ("EMA", "ema"), ("activations", "activations")):
        assert [height * 2**30 for height in bars[name]] == pytest.approx([row[key] for row in stored])
    assert [label.get_text() for label in memory.get_xticklabels()] == [
        f"ZeRO {stage}\n{micro_batch} images" for stage in range(4)
    ]

    shares = {bar.get_label(): [patch.get_height() for patch in bar] for bar in time.containers}
    assert [sum(step) for step in zip(*shares.values(), strict=True)] == pytest.approx([100] * len(found["scaling"]))
    keys = {"wait for the host": "launching", "reduce gradients": "gradients", "exchange for Muon": "exchange",
            "gather weights": "weights", "compute": "compute", "update": "update"}  # fmt: skip
    for label, key in keys.items():
        assert shares[label] == pytest.approx([
            100 * row["step_seconds"][key] / row["step_seconds"]["total"] for row in found["scaling"]
        ])  # fmt: skip

    lines = {line.get_label(): line.get_xydata().tolist() for line in throughput.lines}
    gpus, speeds = ([row[key] for row in found["scaling"]] for key in ("gpus", "images_per_second"))
    assert lines["predicted"] == [list(pair) for pair in zip(gpus, speeds, strict=True)]
    played = [row["global_batch"] / row["simulated_step_seconds"] for row in found["scaling"]]
    assert [y for _, y in lines["simulated"]] == pytest.approx(played)
    assert [y for _, y in lines["linear"]] == pytest.approx([speeds[0] * n / gpus[0] for n in gpus])
    broken = [x for line in throughput.lines if line.get_linestyle() == "--" for x in line.get_xdata()]
    assert set(broken) == ({found["breaks"]["gpus"]} if found["breaks"] else set())
    assert throughput.get_title(loc="left") == "Images per second"


def test_zero_3_scales_as_zero_2(capsys):
    options = ["--preset", "B", "--set", "train.zero_stage=3", "optimizer.kind=adamw"]
    assert "the same run on more GPUs, ZeRO 2" in printed(capsys, *options)


@pytest.mark.parametrize("option", ["--network", "--images", "--per-node", "--launch-us", "--efficiency"])
def test_nothing_of_them_is_no_number(option, capsys):
    assert run("plan", "--preset", "B", option, "0") == 2
    assert option in capsys.readouterr().err

"""The kernels of a step by formula, and what plan makes of the host that launches them.

imagined_steps.py holds the formula against the launches of whole steps; here it meets the committed counts.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cli_toy import run

from unite_fast.analysis.chunks import with_chunk
from unite_fast.analysis.devices import Network, find_gpu
from unite_fast.analysis.launches import HOST_SECONDS, LAUNCH_SECONDS, host_seconds, step_launches
from unite_fast.analysis.planning import StepTime, breaking_point, plan, scaling
from unite_fast.analysis.simulation import simulate
from unite_fast.config import Config

ROOT = Path(__file__).parents[1]
H100 = find_gpu("h100-80")
NODES = Network(8, H100.link, 50e9)
FILES = {"B": "b_h100", "L": "l_h100", "qm9_s": "qm9_s"}


def config(name: str, *overrides: str) -> Config:
    return Config.load(ROOT / "configs" / f"{FILES[name]}.json", overrides)


def committed() -> list[tuple[str, int, int, int]]:
    """(preset, draws, draws a chunk, launches) of the table in benchmarks/README.md."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) S=(\d+), (\d+) a chunk \| (\d+) \|", text, re.MULTILINE)
    return [(name, *map(int, numbers)) for name, *numbers in rows]


def test_full_presets_launch_what_was_counted():
    rows = committed()
    assert {name for name, *_ in rows} == set(FILES) and len(rows) == 9
    for name, draws, chunk, launches in rows:
        found = step_launches(config(name, f"objective.flow_draws={draws}", f"objective.draws_per_chunk={chunk}"), 1)
        assert found == pytest.approx(launches, rel=0.005), (name, draws, chunk)


def test_what_they_depend_on():
    one = with_chunk(config("B"), 14)
    step, two = step_launches(one, 1), step_launches(one, 2)
    assert step_launches(one, 3) - two == two - step > 0.9 * step  # every micro-batch more adds to what is there
    draws = {chunk: step_launches(with_chunk(one, chunk), 1) for chunk in (14, 7, 5)}
    assert draws[5] - draws[7] == draws[7] - draws[14] > 0  # and so does every chunk
    assert step_launches(with_chunk(config("B", "objective.lpips.weight=0"), 14), 1) < step
    assert step_launches(with_chunk(config("B", "objective.lpips.dropout=true"), 14), 1) > step
    assert step_launches(with_chunk(config("B", "optimizer.kind=adamw"), 14), 1) < step
    recomputing = config("B", 'model={"preset": "B", "checkpoint_activations": true}')
    assert step_launches(with_chunk(recomputing, 14), 1) > step
    assert HOST_SECONDS[0] < LAUNCH_SECONDS < HOST_SECONDS[1]
    assert host_seconds(one, 1, 2e-5) == step * 2e-5
    assert host_seconds(with_chunk(config("B", "train.compile=true"), 14), 1, 2e-5) == 0  # not counted


def test_zero_3_is_planned_with_the_linears_that_it_brings():
    """Whatever stage the configuration names: none of its Linears keeps casts."""
    run = config("B", "train.micro_batch=16")
    hosts = [plan(run, H100, NODES, ranks=64, stage=stage).seconds.host for stage in range(4)]
    assert hosts[0] == hosts[1] == hosts[2] and hosts[3] > 1.25 * hosts[0]
    compiled = config("B", "train.micro_batch=16", "train.compile=true")  # which it refuses
    assert plan(compiled, H100, NODES, ranks=64, stage=3).seconds.host == hosts[3]
    named = config("B", "train.micro_batch=16", "train.zero_stage=3", "optimizer.kind=adamw")
    assert plan(named, H100, NODES, ranks=64, stage=3).seconds.host == hosts[3]
    assert plan(named, H100, NODES, ranks=64, stage=2).seconds.host < hosts[0]  # with AdamW in place of Muon


def test_a_step_takes_the_longer_of_host_and_device():
    device = StepTime(compute=3.0, gradients=0.5, exchange=0.25, weights=0.25, update=1.0, host=2.0)
    assert device.launching == 0 and device.total == 5
    host = StepTime(compute=3.0, gradients=0.5, exchange=0.25, weights=0.25, update=1.0, host=6.0)
    assert host.launching == 1 and host.total == host.host and host.communication == device.communication


@pytest.mark.parametrize(("name", "ranks", "limited"), [("B", 8, False), ("L", 64, False), ("qm9_s", 8, True)])
def test_where_the_host_limits(name, ranks, limited):
    found = plan(config(name), H100, NODES, ranks=ranks, stage=0)
    assert (found.seconds.launching > 0) is limited
    compiled = plan(config(name, "train.compile=true"), H100, NODES, ranks=ranks, stage=0)
    assert (compiled.seconds.total < found.seconds.total) is limited
    if limited:
        assert found.seconds.total == pytest.approx(found.seconds.host)


def test_accumulated_micro_batches_are_launched_each():
    small = plan(config("B", "train.micro_batch=1"), H100, NODES, ranks=8, stage=0)
    assert small.accumulation == 128 and small.seconds.launching > 0
    assert small.seconds.host > 100 * plan(config("B"), H100, NODES, ranks=8, stage=0).seconds.host / 3


@pytest.mark.parametrize("stage", [0, 1])
def test_the_simulation_waits_for_the_host_too(stage):
    for p in scaling(config("qm9_s"), H100, NODES, stage=stage)[::3]:
        assert p.seconds.launching > 0
        played = simulate(config("qm9_s"), p, H100.rates, NODES, efficiency=0.75)
        assert played == pytest.approx(p.seconds.total, rel=0.02)


def test_scaling_that_launching_breaks_is_called_so():
    broken, why = breaking_point(scaling(config("qm9_s"), H100, NODES, stage=0))
    assert broken.ranks == 16 and "launching kernels" in why


def test_the_command_says_where_the_host_limits(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    options = ["plan", "--preset", "B", "--set", "objective.flow_draws=3"]
    assert run(*options) == 0
    printed = capsys.readouterr().out
    assert "launches per step at 20 µs each (assumed, 10 to 30" in printed
    assert "it limits 128, 256, 512, 1024 GPUs" in printed and "not counted" not in printed
    assert run("plan", "--config", "configs/qm9_s.json", "--gpus", "8") == 0
    assert "it limits all of these steps" in capsys.readouterr().out
    assert run(*options, "--set", "train.compile=true") == 0
    printed = capsys.readouterr().out
    assert "under train.compile launches are fewer and not counted" in printed
    assert re.search(r"ZeRO.3 refuses that and is planned without: [\d,]+ launches per .*it limits no step of", printed)

    def planned(*more):
        assert run("plan", "--config", "configs/qm9_s.json", "--gpus", "8", "--json", *more) == 0
        found = json.loads(capsys.readouterr().out)
        return found["plans"][0]["step_seconds"], found["scaling"][0]["step_seconds"]

    seconds, scaled = planned()
    assert seconds["total"] == pytest.approx(seconds["host"]) and 0 < seconds["launching"] < seconds["host"]
    slower = planned("--launch-us", "40")
    assert [one["host"] for one in slower] == pytest.approx([2 * seconds["host"], 2 * scaled["host"]])
    assert run(*options, "--launch-us", "12.5") == 0
    assert "launches per step at 12.5 µs each (given; without those" in capsys.readouterr().out

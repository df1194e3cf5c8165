"""What a run says of itself while it trains: the progress line, latent statistics, the watch for collapsed latents."""

import math
import time

import pytest
import torch
from runs import config, image_tree

from unite_fast.engine.loop import train
from unite_fast.engine.meter import latent_statistics
from unite_fast.engine.monitor import COLLAPSE_GRACE_STEPS, CollapseWatch, ProgressLine
from unite_fast.records import read_lines


def test_a_minute_that_is_left_is_not_sixty_seconds(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    line = ProgressLine(2, 0, enabled=True)
    now[0] = 119.7
    line.advance(1, {"images_per_second": 8.0})
    assert "left 2:00" in capsys.readouterr().err
    resumed = ProgressLine(20, 10, enabled=True)
    now[0] += 30.0
    resumed.advance(11, {"images_per_second": 8.0})
    assert "left 4:30" in capsys.readouterr().err  # nine steps of 30 seconds, however long the ten before took


def test_the_progress_line_tells_every_loss(capsys):
    record = {"images_per_second": 8.0, "loss": 3.0, "loss_l1": 0.5, "loss_mine": 0.25, "loss_flow": 0.125}
    ProgressLine(1, 0, enabled=True).advance(1, record)
    assert "8 images/s  L1 0.5000  mine 0.2500  flow 0.1250  left" in " ".join(capsys.readouterr().err.split("\n"))


@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e30])  # the square of the last is beyond float32
def test_latent_statistics_leave_what_is_not_finite_to_the_losses(broken):
    latents = torch.randn(64, 8, 4)
    latents[0, 0, 0] = broken
    deviation, rank = latent_statistics(latents).tolist()
    assert not math.isfinite(deviation)
    assert 1 <= rank <= 4


def test_latent_statistics_and_the_collapse_watch():
    healthy = torch.randn(64, 8, 4)
    deviation, rank = latent_statistics(healthy).tolist()
    assert deviation == pytest.approx(1, abs=0.1) and rank == pytest.approx(4, abs=0.2)
    flat = torch.randn(1, 8, 4).expand(64, 8, 4) + torch.randn(64, 8, 1) * torch.tensor([0.01, 0, 0, 0])
    deviation, rank = latent_statistics(flat).tolist()
    assert deviation < 0.01 and rank == pytest.approx(1, abs=0.01)
    watch = CollapseWatch()
    assert watch.check(10, deviation) is None  # the final layer starts at zero
    message = watch.check(COLLAPSE_GRACE_STEPS, deviation)
    assert "collapse" in message and "objective.l1_weight" in message and "objective.position_weight" in message
    assert watch.check(COLLAPSE_GRACE_STEPS + 1, deviation) is None
    assert watch.check(COLLAPSE_GRACE_STEPS + 2, 0.9) is None
    assert watch.check(COLLAPSE_GRACE_STEPS + 3, deviation) is not None


def test_latents_of_one_sample_are_not_taken_for_collapsed_ones(tmp_path, monkeypatch, capsys):
    image_tree(tmp_path / "train")
    monkeypatch.setattr("unite_fast.engine.monitor.COLLAPSE_GRACE_STEPS", 1)
    alone = {"steps": 2, "global_batch": 2, "accumulation": 2}
    run = train(config(tmp_path, name="one_by_one", train=alone | {"log_every": 1}))
    assert not {"z0_std", "z0_rank"} & set(read_lines(run / "metrics.jsonl")[-1])
    assert "collapse" not in capsys.readouterr().err

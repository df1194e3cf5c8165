"""Ranks that find different checkpoints or data are told so, and those of a network folder that lags are waited for."""

import re
import shutil
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from engine_toy import toy_config, toy_model, toy_step
from ranks import ALONE
from runs import config, image_tree

from unite_fast.engine import agreement, checkpoint, loop
from unite_fast.engine.agreement import (
    check_precision,
    check_same_rounding,
    newest_checkpoint,
    require_same_config,
    require_same_data,
    rounds_as,
)
from unite_fast.engine.backend import autocast_dtype
from unite_fast.engine.engine import Engine
from unite_fast.engine.lock import sole_trainer
from unite_fast.engine.report import Report
from unite_fast.errors import UserError


def test_a_node_with_a_run_folder_of_its_own_is_said(tmp_path, monkeypatch):
    """And one that has the others' checkpoint a moment later, as network folders have, goes on."""
    waits = []
    monkeypatch.setattr(agreement.time, "sleep", waits.append)
    world = MagicMock(collect=lambda found: [found, "no checkpoint"])
    assert newest_checkpoint(tmp_path, world) is None and not waits
    newest = tmp_path / "checkpoints" / "step_00000004"
    newest.mkdir(parents=True)
    with pytest.raises(UserError, match="rank 0 finds step_00000004 in it, rank 1 no checkpoint"):
        newest_checkpoint(tmp_path, world)
    assert sum(waits) > 60
    late = MagicMock(collect=lambda found: [found, found if len(waits) > 75 else "no checkpoint"])
    assert newest_checkpoint(tmp_path, late) == newest


@pytest.mark.parametrize("count, words", [(23, "24 images, rank 2 23[.]"), (24, "rank 2 other images of")])
def test_a_node_with_other_data_is_said(count, words):
    samples, other = {"count": 24, "digest": "a"}, {"count": count, "digest": "b"}
    with pytest.raises(UserError, match=words):
        require_same_data(samples, MagicMock(collect=lambda mine: [mine, mine, other]), "images")


def test_other_ranks_write_and_delete_no_checkpoint(tmp_path):
    settings = toy_config()
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"keep_checkpoints": 1})})
    engine = Engine(toy_model(), settings, ALONE, steps_per_epoch=10)
    kept = checkpoint.save(engine, tmp_path, {})
    toy_step(engine, 0)
    engine.world = replace(engine.world, rank=1)
    checkpoint.save(engine, tmp_path, {})
    assert list(kept.parent.iterdir()) == [kept]
    shutil.copytree(kept, kept.with_name("step_00000002"))
    checkpoint.save(engine, tmp_path, {})
    assert len(list(kept.parent.iterdir())) == 2, "which of them go is the main rank's to say"


@pytest.mark.parametrize(
    "asked",
    ["require_same_config", "check_same_rounding", "check_precision", "newest_checkpoint", "require_same_data"],
)
def test_a_run_asks_before_it_trains(tmp_path, monkeypatch, asked):
    image_tree(tmp_path / "train")
    monkeypatch.setattr(loop, asked, MagicMock(side_effect=UserError(f"{asked} was asked")))
    with pytest.raises(UserError, match=f"{asked} was asked"):
        loop.train(config(tmp_path))


def test_a_folder_that_the_main_rank_cannot_hold_is_refused_on_all():
    with pytest.raises(UserError, match="is being trained in"):
        with sole_trainer(None, MagicMock(is_main=False, share=lambda mine: "it is being trained in")):
            pytest.fail("the main rank is gone")


def test_what_is_left_to_evaluate_is_what_the_main_rank_sees(tmp_path):
    """Pictures and metrics are made by all ranks or by none."""
    (tmp_path / "samples_00000003.png").touch()
    for told in ({"pictures"}, {"metrics"}):
        world = MagicMock(share=lambda mine: told if mine == {"pictures"} else None)
        assert Report.made(MagicMock(folder=tmp_path, world=world), 3) == told


def test_a_node_with_a_configuration_of_its_own_is_said():
    """But its data may lie elsewhere."""
    settings = toy_config()

    def others(**changed):
        return MagicMock(collect=lambda mine: [mine, {**mine, **changed}])

    require_same_config(settings, others(data=settings.data.model_dump() | {"path": "/local/images"}))
    optimizer = settings.optimizer.model_dump() | {"lr": 0.5}
    with pytest.raises(UserError, match="optimizer.lr is 0.02 for rank 0, 0.5 for rank 1[.]"):
        require_same_config(settings, others(optimizer=optimizer))


def with_another(mine: str) -> list[str]:
    return [mine, mine, "a GPU of another kind"]


@pytest.mark.parametrize("stage, kind", [(0, "muon"), (0, "adamw"), (1, "muon"), (2, "muon"), (3, "adamw")])
def test_ranks_that_round_otherwise_are_said_where_their_weights_part(stage, kind):
    world = MagicMock(device=torch.device("cpu"), collect=with_another)
    words = f"rank 0 is {re.escape(rounds_as(world.device))}, rank 2 a GPU of another kind. Set train.zero_stage to 1"
    words += ", or start all ranks on devices of one kind with one version of torch$"
    settings = toy_config(stage=stage, kind=kind)
    if (stage, kind) == (0, "muon"):
        with pytest.raises(UserError, match=words):
            check_same_rounding(settings, world)
    elif stage == 0:
        assert re.search(words, check_same_rounding(settings, world))
    else:
        assert check_same_rounding(settings, world) is None
    assert check_same_rounding(settings, MagicMock(device=world.device, collect=lambda mine: [mine, mine])) is None


def test_what_a_rank_rounds_as(monkeypatch):
    assert torch.__version__ in rounds_as(torch.device("cpu"))
    before = rounds_as(torch.device("cpu"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other vectors")
    assert rounds_as(torch.device("cpu")) != before
    gpu = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    expected = f"NVIDIA H100 of compute capability 9.0, torch {torch.__version__}"
    assert rounds_as(torch.device("cuda", 0)) == expected


def test_a_run_with_adamw_says_it_once_and_goes_on(tmp_path, monkeypatch, capsys):
    image_tree(tmp_path / "train")
    monkeypatch.setattr(agreement, "_first_other", lambda found: (1, "a GPU of another kind"))
    monkeypatch.setattr(loop, "require_same_config", lambda *_: None)
    monkeypatch.setattr(loop, "newest_checkpoint", lambda *_: None)
    monkeypatch.setattr(loop, "require_same_data", lambda *_: None)
    loop.train(config(tmp_path, optimizer={"kind": "adamw"}, train={"steps": 1}))
    assert "".join(capsys.readouterr()).count("rank 1 a GPU of another kind") == 1


def test_a_gpu_without_bfloat16_trains_in_float32_unless_others_have_it(monkeypatch):
    old = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device == old else (8, 0))
    lacking = r"bfloat16 needs a GPU of compute capability 8\.0 .* which rank 0 does not have"

    def checked(precision: str, device: torch.device, *others: bool) -> str | None:
        settings = toy_config()
        settings = settings.model_copy(update={"train": settings.train.model_copy(update={"precision": precision})})
        dtype = autocast_dtype(settings, device)
        assert (dtype is None) == (precision == "fp32" or (precision == "auto" and device != new))
        return check_precision(settings, MagicMock(device=device, collect=lambda mine: [mine, *others]))

    new, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert re.search(f"{lacking}: training in float32", checked("auto", old, False))
    for precision, others in {"auto": (False, True), "bf16": (False,)}.items():
        with pytest.raises(UserError, match=f"{lacking}: set train.precision to fp32"):
            checked(precision, old, *others)
    assert [checked("fp32", old), checked("auto", new, True), checked("bf16", new), checked("auto", cpu)] == [None] * 4

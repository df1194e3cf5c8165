"""Which loader a run gets, what its record says of it, and the thread that works ahead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from data_trees import tree
from runs import config
from safetensors.torch import load_file

from unite_fast.config import DataConfig
from unite_fast.data import stream as stream_module
from unite_fast.data.dali import dali_version
from unite_fast.data.loader import ImageStream, MicroBatch
from unite_fast.data.photographs import write_photographs
from unite_fast.data.stream import READY, Ahead, open_stream
from unite_fast.engine import meter as meter_module
from unite_fast.engine.batch import Batch
from unite_fast.engine.loop import train
from unite_fast.engine.meter import Meter
from unite_fast.engine.world import init_world
from unite_fast.errors import UserError
from unite_fast.importing import open_trained
from unite_fast.objective.two_pass import StepLosses

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NUMBERS = dict(image_size=8, num_classes=3, seed=0, global_batch=4, micro_batch=4, accumulation=1)
needs_dali = pytest.mark.skipif(dali_version() is None, reason="pip install nvidia-dali-cuda130")


@pytest.mark.parametrize(
    ("sentence", "options"),
    [
        ("loader dali keeps no decoded images", dict(loader="dali", cache=True)),
        ("decode fast is DALI's", dict(loader="workers", decode="fast")),
        ("decode fast is DALI's", dict(cache=True, decode="fast")),
        ("hw_decoder_load", dict(dali={"hw_decoder_load": 2})),
        ("preallocate", dict(dali={"preallocate": [0, 1]})),
    ],
)
def test_options_that_clash(sentence, options):
    with pytest.raises(UserError, match=sentence):
        DataConfig.parse({"path": "x", **options})


class Opened(Exception):
    pass


@pytest.mark.parametrize(
    ("installed", "device", "options", "expected"),
    [
        ("2.4.0", CUDA, {}, "DaliStream"),
        ("2.4.0", CUDA, {"cache": True}, "ImageStream"),
        ("2.4.0", CUDA, {"loader": "workers"}, "ImageStream"),
        (None, CUDA, {}, "ImageStream"),
        ("2.4.0", CPU, {}, "ImageStream"),
        ("2.4.0", CPU, {"decode": "fast"}, "DaliStream"),
        ("2.4.0", CPU, {"loader": "dali"}, "DaliStream"),
    ],
)
def test_which_loader(monkeypatch, installed, device, options, expected):
    def opens(name):
        def constructor(config, **numbers):
            raise Opened(name)

        return constructor

    for name in ("DaliStream", "ImageStream"):
        monkeypatch.setattr(stream_module, name, opens(name))
    monkeypatch.setattr(stream_module, "dali_version", lambda: installed)
    with pytest.raises(Opened, match=expected):
        open_stream(DataConfig(path="x", **options), device=device)


@pytest.mark.parametrize("options", [{"loader": "dali"}, {"decode": "fast"}])
def test_without_dali(monkeypatch, tmp_path, options):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # the import system's own mark of an absent module
    with pytest.raises(UserError, match="DALI, which is not installed: pip install nvidia-dali"):
        open_stream(DataConfig(path=str(tree(tmp_path / "d")), workers=0, **options), device=CPU, **NUMBERS)


@pytest.fixture
def folder(tmp_path):
    write_photographs(tmp_path / "train", 10)
    return tmp_path


@needs_dali
def test_a_run_with_dali_is_the_run_with_workers(folder):
    """The same images give the same weights, also when the other loader continues; and the record names each."""
    data = dict(crop="adm", cache=False, max_bad_share=0.0)
    train_ = dict(steps=4, checkpoint_every=2, log_every=2)
    weights = {}
    for name, loaders in (
        ("dali", ("dali", "dali")),
        ("workers", ("workers", "workers")),
        ("both", ("workers", "dali")),
    ):
        for steps, loader in zip((2, 4), loaders):
            run = train(
                config(folder, name=name, train=train_ | {"steps": steps}, data=data | {"loader": loader}),
                resume=steps == 4,
            )
        weights[name] = load_file(run / "checkpoints" / "step_00000004" / "model.safetensors")
        mode = json.loads((run / "summary.json").read_text())["made_by"]["data"]
        assert mode["loader"] == loaders[1]
        assert (mode["decode"], mode["crop"], mode["decoded_on"]) == ("exact", "adm", "cpu")
        assert mode.get("dali") == (dali_version() if loaders[1] == "dali" else None)
        assert open_trained(run / "checkpoints" / "step_00000004").made_by["data"] == mode
    for name in ("workers", "both"):
        assert all(torch.equal(weights["dali"][key], tensor) for key, tensor in weights[name].items())


class Numbers:
    """A stream of numbered micro-batches that ends with an error."""

    classes, steps_per_epoch, mode = ("a", "b"), 2.0, {"loader": "numbers"}
    bad_files, left_out = {"x.jpg": "empty"}, {"y.jpg": "listed"}

    def __init__(self, count: int):
        self.count, self.given, self.closed = count, 0, 0

    def __next__(self) -> MicroBatch:
        if self.given == self.count:
            raise UserError("no more numbers")
        self.given += 1
        number = torch.full((1,), self.given)
        return MicroBatch(number, number, number, self.given, 0)

    def close(self) -> None:
        self.closed += 1


def test_ahead_keeps_order_and_passes_errors_on():
    numbers = Numbers(5)
    ahead = Ahead(numbers, CPU)
    assert (ahead.classes, ahead.steps_per_epoch, ahead.mode) == (("a", "b"), 2.0, {"loader": "numbers"})
    assert (ahead.bad_files, ahead.left_out) == ({"x.jpg": "empty"}, {"y.jpg": "listed"})
    assert numbers.given == 0  # nothing before the first next
    assert [next(ahead).step for _ in range(5)] == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="no more numbers"):
        next(ahead)
    assert numbers.closed
    with pytest.raises(ValueError, match="closed"):
        next(ahead)


def test_ahead_stops_where_it_is():
    numbers = Numbers(10**9)
    with Ahead(numbers, CPU) as ahead:
        assert next(ahead).step == 1
    given = numbers.given
    assert given <= 1 + READY + 2  # one taken, READY waiting, one in hand before and one after the queue was emptied
    assert numbers.closed == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "data ahead"]
    ahead.close()


SCRIPT = """
import sys, torch
from unite_fast.config import DataConfig
from unite_fast.data.stream import open_stream
images = open_stream(DataConfig(path=sys.argv[1], loader="dali"), device=torch.device("cpu"), image_size=64,
                     num_classes=2, seed=0, global_batch=4, micro_batch=4, accumulation=1)
print(next(images).images.shape[0])
if len(sys.argv) > 2:
    raise SystemExit("an error of the run")
"""


@needs_dali
@pytest.mark.parametrize("how", [(), ("error",)])
def test_process_ends_without_close(folder, how):
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder / "train", *how],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.stdout == "4\n"
    assert done.returncode == (1 if how else 0), done.stderr
    assert "Traceback" not in done.stderr


def losses(device: str | torch.device = "cpu") -> StepLosses:
    one = torch.ones((), device=device)
    return StepLosses(one, {"l1": one}, one, torch.randn(2, 3, 4, device=device), None)


def test_data_wait_is_the_share_of_the_time_waited(tmp_path, monkeypatch):
    world = init_world(config(tmp_path))
    clock = [100.0]
    monkeypatch.setattr(meter_module.time, "monotonic", lambda: clock[0])
    meter = Meter(world, Batch(4, 2, 8), 10.0)
    for _ in range(3):
        meter.begin()
        for _ in range(2):
            with meter.waiting():
                clock[0] += 0.5
            clock[0] += 1.5
        meter.add(losses(), torch.tensor(1.0))
    with meter.paused():
        clock[0] += 60
    record = meter.read(3, 24, 0.1)
    assert record["data_wait"] == pytest.approx(0.25)
    assert record["images_per_second"] == pytest.approx(24 / 12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ahead_and_data_wait_on_a_gpu(tmp_path):
    """The device has the images before they are used, and waits for data only where it has nothing else to do."""
    root = tree(tmp_path / "d")
    options = DataConfig(path=str(root), crop="none", workers=0, loader="workers", flip=False)
    world = init_world(config(tmp_path, train={"device": "cuda", "steps": 1, "global_batch": 4, "accumulation": 1}))
    meter = Meter(world, Batch(4, 1, 4), 4.0)
    work = torch.randn(4096, 4096, device=CUDA)
    with ImageStream(options, **NUMBERS) as plain, open_stream(options, device=CUDA, **NUMBERS) as ahead:
        next(ahead), next(plain)
        meter.begin()
        for _ in range(20):
            for _ in range(20):
                work @ work  # keeps the device busy while the host runs ahead
            with meter.waiting():
                batch = next(ahead)
            assert batch.images.device == CUDA
            assert torch.equal(batch.images.cpu(), next(plain).images)
            meter.add(losses(CUDA), work.new_ones(()))
    assert 0 <= meter.read(20, 80, 0.1)["data_wait"] < 1

"""Every loader on the same photographs beside a plain Pillow loop, and what a training step waits for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import measure
import pytest
from input_worker import SIZE

from unite_fast.config import Config
from unite_fast.data.dali import dali_version
from unite_fast.data.photographs import write_photographs
from unite_fast.data.prepare import prepare
from unite_fast.data.source import open_source
from unite_fast.engine.loop import train

COUNT, BATCH = 128, 32
CORES = min(4, len(os.sched_getaffinity(0)))
# Loader, decode mode, form of the data. A core's work is the same with one worker process as with many.
LOADERS = {
    "workers, folder": ("workers", "exact", "folder"),
    "workers, shards": ("workers", "exact", "shards"),
    "DALI exact, folder": ("dali", "exact", "folder"),
    "DALI exact, shards": ("dali", "exact", "shards"),
    "DALI fast, folder": ("dali", "fast", "folder"),
}
needs_dali = pytest.mark.skipif(dali_version() is None, reason="pip install nvidia-dali-cuda130")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("input")
    folder = write_photographs(root / "folder", COUNT)
    prepare(open_source(folder, 2), root / "shards", size=None)
    return {"folder": folder, "shards": root / "shards"}


def marked(names):
    return [pytest.param(name, marks=needs_dali if name.startswith("DALI") else ()) for name in names]


@pytest.mark.parametrize("name", marked(LOADERS))
def test_images_a_second(name, data, inputs):
    loader, decode, form = LOADERS[name]
    options = {
        "path": str(data[form]), "files": str(data["folder"]), "loader": loader, "decode": decode, "classes": 2,
        "cores": CORES, "batch": BATCH,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("input_worker.py"), json.dumps(options)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    times = result.pop("seconds_an_image")
    ours = measure.spread(times["loader"])
    inputs.append(
        result
        | {
            "loader": name,
            "size": SIZE,
            "cores": CORES,
            "seconds_an_image": {kind: measure.spread(values) for kind, values in times.items()},
            "images_per_second_a_core": 1 / ours["median"],
            "spread": (ours["high"] - ours["low"]) / 2 / ours["median"],
            "pillow_images_per_second_a_core": 1 / measure.spread(times["pillow"])["median"],
            "images_per_second": 1 / measure.spread(times["loader_wall"])["median"],
            "peak_mib": result["peak_bytes"] / 2**20,
        }
    )


def step_config(folder: Path, path: Path, loader: str, decode: str) -> Config:
    """Training steps without pictures: preset B on a GPU, a small model at the same image size on a CPU."""
    small = {"depth": 2, "width": 64, "heads": 2, "context_len": 0, "decoder": {"depth": 1, "width": 64, "heads": 2}}
    model = {"preset": "B"} if measure.DEVICE == "cuda" else small
    batch = 64 if measure.DEVICE == "cuda" else 4
    return Config.parse(
        {
            "runs": str(folder),
            "model": model | {"num_classes": 2, "image_size": SIZE},
            "objective": {"flow_draws": 3, "lpips": {"weight": 0.0}},
            "optimizer": {"kind": "adamw"},
            "train": {"steps": 30, "global_batch": batch, "accumulation": 1, "log_every": 10, "checkpoint_every": 30},
            "data": {
                "path": str(path), "loader": loader, "decode": decode, "workers": CORES, "dali": {"threads": CORES},
            },
            "sampling": {"solver": "euler", "steps": 2},
            "evaluation": {"reconstructions": 4, "sheet_classes": 1, "sheet_columns": 1},
        }
    )  # fmt: skip


@pytest.mark.parametrize("name", marked(["workers, folder", "DALI exact, folder", "DALI fast, folder"]))
def test_data_wait_of_a_step(name, data, inputs, tmp_path):
    """Share of a training step that the device waits for data, over the steps after the first ten."""
    loader, decode, form = LOADERS[name]
    run = train(step_config(tmp_path, data[form], loader, decode))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    share = measure.spread([record["data_wait"] for record in records if record["step"] > 10])["median"]
    entry = next((entry for entry in inputs if entry["loader"] == name), None)
    if entry is None:
        pytest.skip("the row of this loader was not measured in this run")
    entry["data_wait"] = share

"""A small trained run for the tests of what is made from a run's folder, with everything a report can show."""

from __future__ import annotations

import json
from pathlib import Path

from runs import config, image_tree

from unite_fast.engine.loop import train
from unite_fast.report import write_report

LONG = "a class whose name is much longer than a row of its pictures has any room for"
HOSTILE = "<script>alert('x')</script> & \"co\""
EVALUATION = {
    "metrics": {"gfid": 12.345678, "is": 101.5, "precision": 0.75, "of_its_own_kind": 3, "kid": float("nan")},
    "protocol": {
        "model": {"step": 20, "weights": "ema"},
        "warnings": ["few images for `gfid`"],
        "solver": "heun", "steps": 50, "guidance": 2.4, "interval": [0.1, 1.0], "seed": 0,
        "checkpoint": {"sha256": "a" * 64, "step": 20},
        "note": HOSTILE,
    },
    "tables": {
        "odd": [{"guidance": 1.0, "gfid": 20.5}, {"guidance": 1.2, "gfid": 18.25, "is": 90}],
        "guidance_search": [
            {"guidance": w, "low": low, "high": 1.0, "score": 20 - w + low}
            for low in (0.0, 0.2)
            for w in (1.0, 2.0, 3.0)
        ],
    },
}  # fmt: skip


def trained_run(folder: Path) -> Path:
    """Train 20 steps on 16×16 images of two classes, add evaluations and a second session, report on all of it."""
    image_tree(folder / "train")
    image_tree(folder / "val", per_class=8)
    for split in ("train", "val"):
        (folder / split / "class_0").rename(folder / split / LONG)
        (folder / split / "class_1").rename(folder / split / "marked & sold\udcff")  # no UTF-8
    settings = config(
        folder,
        data={"val_path": str(folder / "val"), "flip": True},
        evaluation={"every": 10, "sheet_columns": 8},
        train={"steps": 20, "log_every": 1},
        sampling={"solver": "euler", "steps": 8, "guidance": 1.5},
    )
    run = train(settings)
    (run / "evaluations").mkdir(exist_ok=True)
    (run / "evaluations" / "guided & swept.json").write_text(json.dumps(EVALUATION))
    for step, gfid in ((5, 80.0), (10, 40.0)):
        earlier = EVALUATION["protocol"] | {"model": {"step": step, "weights": "ema"}}
        record = {"metrics": EVALUATION["metrics"] | {"gfid": gfid}, "protocol": earlier}
        (run / "evaluations" / f"step_{step:08d}.json").write_text(json.dumps(record))
    session = json.loads((run / "sessions.jsonl").read_text())
    with open(run / "sessions.jsonl", "a") as file:
        file.write(json.dumps(session | {"first_step": 10, "device": HOSTILE}) + "\n" + '{"started": 17')
    write_report(run)
    return run

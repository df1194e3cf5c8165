"""One loader in a process of its own, beside a plain Pillow loop over the same files; prints one JSON object.

`python benchmarks/input_worker.py '{"path": …, "loader": "dali", "decode": "exact", "cores": 2, …}'`. A process of its
own, because memory is that of a process, and so that a loader's start counts everything that it imports and starts.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

SIZE = 256
ROUNDS = 5
AHEAD = 8  # micro-batches, more than any loader keeps ready at the settings below and on up to 4 cores
FAR = 10**6  # a step at which no state could have been kept


def cpu_seconds(children: list[int]) -> float:
    """Of this process and of the given ones, all their threads together."""
    ticks = 0
    for pid in children:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime, proc(5)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def peak_bytes(children: list[int]) -> int:
    """Memory that belongs to this process and to the given ones alone; shared pages count once, here."""
    private = 0
    for pid in children:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean", "Private_Dirty")):
                private += int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + private


def pillow_loop(files: list[Path]) -> None:
    """What a script without this project would do: ADM's crop in Pillow's functions, [3, H, H] at the end."""
    import numpy as np
    from PIL import Image

    for path in files:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        while min(image.size) >= 2 * SIZE:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = SIZE / min(image.size)
        image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
        left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
        np.ascontiguousarray(np.asarray(image.crop((left, top, left + SIZE, top + SIZE))).transpose(2, 0, 1))


def main(options: dict) -> dict:
    began = time.perf_counter()
    import torch

    from unite_fast.config import DataConfig
    from unite_fast.data.stream import open_stream

    torch.set_num_threads(1)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    imported = time.perf_counter() - began
    config = DataConfig(
        path=options["path"], loader=options["loader"], decode=options["decode"], workers=options["cores"], prefetch=1,
        dali={"threads": options["cores"]},
    )  # fmt: skip
    batch = options["batch"]
    numbers = dict(
        image_size=SIZE, num_classes=options["classes"], seed=0, global_batch=batch, micro_batch=batch, accumulation=1
    )

    def first_batch(step: int):
        began = time.perf_counter()
        stream = open_stream(config, device=device, start_step=step, **numbers)
        next(stream)
        return stream, time.perf_counter() - began

    stream, start = first_batch(0)
    stream.close()
    stream, resume = first_batch(FAR)
    children = []
    if options["loader"] == "workers":
        children = getattr(stream, "_stream", stream)._dataset._workers[:, 0].tolist()
    files = sorted(path for path in Path(options["files"]).rglob("*.jpg"))
    count = len(files) // batch
    rounds = {"pillow": [], "loader": [], "loader_wall": []}
    for _ in range(ROUNDS):
        began = time.process_time()
        pillow_loop(files)
        rounds["pillow"].append((time.process_time() - began) / len(files))
        # The processes have read ahead while Pillow was at work: what lies ready is not counted, nor what it cost.
        for _ in range(AHEAD):
            next(stream)
        wall, used = time.perf_counter(), cpu_seconds(children)
        for _ in range(count):
            next(stream)
        if device.type == "cuda":
            torch.cuda.synchronize()
        rounds["loader"].append((cpu_seconds(children) - used) / (count * batch))
        rounds["loader_wall"].append((time.perf_counter() - wall) / (count * batch))
    result = {
        "import_seconds": imported, "start_seconds": start, "resume_seconds": resume,
        "peak_bytes": peak_bytes(children), "seconds_an_image": rounds,
    }  # fmt: skip
    stream.close()
    return result


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))

"""The profile of a step, part by part, as tables in benchmarks/README.md.

    python benchmarks/profile_table.py benchmarks/records/NAME.json   # rewrites the section between the markers

Operations, bytes and floors are counted (unite_fast/analysis); times are those of the record.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Literal

import gate
from subjects import CONFIGS

from unite_fast.analysis.chunks import chunk_in_room
from unite_fast.analysis.counts import repeats, step_parts
from unite_fast.analysis.devices import find_gpu
from unite_fast.analysis.parts import Dtype, Part, Rates
from unite_fast.analysis.planning import USABLE_MEMORY
from unite_fast.analysis.update import flow_passes, update_part
from unite_fast.config import Config
from unite_fast.errors import UserError
from unite_fast.modality import modality_of

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- profile: written by profile_table.py -->\n", "<!-- end of profile -->\n"
# Limits of one H200 that a first look at it measured: bf16 matrix products, and copies with read and written bytes.
H200 = Rates(matmul=790e12, copy=4.3e12)
# What the tables of a GPU are counted for until a record of one exists: preset, draws, images of a step.
COUNTED = (("B", "b_h100.json", 3, 64), ("L", "l_h100.json", 3, 32))


def measured_table(record: dict) -> list[str]:
    """The parts that a record measured, with the share of the floor that they reach."""
    parts = [result for result in record["results"] if "part" in result]
    if not parts:
        raise ValueError("the record holds no parts: run pytest benchmarks/ --record without -k")
    kind = "wall clock between device events" if record["cuda"] else "processor time, one thread"
    lines = [
        f"**{record['device']}** ({record['device_class']}, torch {record['torch']}, {record['date'][:10]}): "
        f"{kind}, medians. `calls` is how often a step runs the part.",
        "",
        "| part | direction | calls | Gop | MB | floor, ms | measured, ms | of floor | plain PyTorch |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for subject in dict.fromkeys(result["subject"] for result in parts):
        mine = [result for result in parts if result["subject"] == subject]
        lines.append(f"| *{subject}, {mine[0]['shape']}* | | | | | | | | |")
        for r in mine:
            lines.append(
                f"| {r['part']} | {r['direction']} | {r['per_step']:g} | {r['operations'] / 1e9:.3g} | "
                f"{r['bytes'] / 1e6:.3g} | {r['floor_seconds'] * 1e3:.3g} | {r['seconds']['ours']['median'] * 1e3:.3g} "
                f"| {r['share_of_floor']:.0%} | {r['times_faster_than']['plain']:.2f} × ours |"
            )
        step = next((r for r in record["results"] if r.get("operator") == f"step {subject}"), None)
        if step is not None and len(mine) > 1:
            seconds = sum(r["per_step"] * r["seconds"]["ours"]["median"] for r in mine)
            least = sum(r["per_step"] * r["floor_seconds"] for r in mine)
            lines.append(
                f"| **all parts** | | | | | {least * 1e3:.3g} | {seconds * 1e3:.3g} | {least / seconds:.0%} | "
                f"whole step: {step['times_faster_than']['plain']:.2f} × ours |"
            )
    return lines


def on_h200(config: Config, samples: int) -> Config:
    """The run with the draws a chunk that `auto` takes beside so many samples on one H200, predicted."""
    room = find_gpu("h200").memory * USABLE_MEMORY
    return chunk_in_room(config, modality_of(config).largest(config, samples), room)


def step_bytes(config: Config, images: int, *, dtype: Dtype = "bf16", device: Literal["cuda", "cpu"] = "cuda") -> int:
    """Bytes that a step on so many images must move: each operator's inputs read once, its outputs written once."""
    moved = update_part(config.model, config.optimizer, dtype=dtype).forward_bytes(1)
    for name, part in step_parts(config.model, config.objective, dtype=dtype, device=device).items():
        passes = flow_passes(config) if name == "denoise" else 1
        samples = images * repeats(name, config.objective) / passes  # in the mean: the last chunk may be smaller
        moved += passes * (part.forward_bytes(samples) + part.backward_bytes(samples))
    return round(moved)


def counted_table(preset: str, file: str, draws: int, images: int) -> list[str]:
    """A step of a preset as it must be on an H200, with no time measured yet."""
    config = on_h200(Config.load(CONFIGS / file, [f"objective.flow_draws={draws}"]), images)
    parts: dict[str, Part] = step_parts(config.model, config.objective)
    lines = [
        f"**{preset}, S = {draws} in chunks of {config.objective.chunk}, {images} images, one H200** "
        f"({H200.matmul / 1e12:.0f} TFLOP/s in bf16 products, {H200.copy / 1e12:.1f} TB/s copied):",
        "",
        "| part | calls | Top forward | backward | GB forward | backward | floor, ms | measured |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    total = 0.0
    for name, part in parts.items():
        calls = flow_passes(config) if name == "denoise" else 1
        samples = images * repeats(name, config.objective) / calls  # of a call in the mean, as the last may have fewer
        floor = calls * sum(part.floor(samples, H200))
        total += floor
        lines.append(
            f"| {name} | {calls} | {samples * part.forward / 1e12:.3g} | {samples * part.backward / 1e12:.3g} | "
            f"{part.forward_bytes(samples) / 1e9:.3g} | {part.backward_bytes(samples) / 1e9:.3g} | {floor * 1e3:.3g} | "
            f"not measured yet |"
        )
    update = update_part(config.model, config.optimizer)
    floor = sum(update.floor(1, H200))
    total += floor
    lines.append(
        f"| update and EMA | 1 | {update.forward / 1e12:.3g} | | {update.forward_bytes(1) / 1e9:.3g} | | "
        f"{floor * 1e3:.3g} | not measured yet |"
    )
    lines.append(
        f"| **step** | | | | | | {total * 1e3:.3g} ({images / total:.0f} images/s) | not measured yet |"
    )
    return lines


def rewrite(record: dict, readme: Path = README) -> None:
    """Put the tables between the markers of the README.

    Raises:
        ValueError: no markers, or a record without parts.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} does not hold the lines {BEGIN.strip()!r} and {END.strip()!r}")
    tables = [measured_table(record)] + ([] if record["cuda"] else [counted_table(*case) for case in COUNTED])
    section = "\n\n".join("\n".join(lines) for lines in tables)
    partial = readme.with_suffix(".partial")
    partial.write_text(f"{before}{begin}\n{section}\n\n{end}{after}", encoding="utf-8")
    os.replace(partial, readme)


def main() -> int:
    parser = argparse.ArgumentParser(prog="profile_table.py", description="Write a record's profile into the README.")
    parser.add_argument("record", type=Path)
    try:
        rewrite(gate.read_record(parser.parse_args().record))
    except (OSError, UserError, ValueError) as error:
        print(f"profile_table.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

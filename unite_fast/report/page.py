"""The page of a report: what the run folder and the probe tell, as text, tables, charts and pictures."""

from __future__ import annotations

import re
import time
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from unite_fast.config import MODALITIES, imported
from unite_fast.pictures import SMOOTH, curve_panels, spread
from unite_fast.records import RunFolder, duration, number
from unite_fast.report.charts import COLOURS, Curve, bar_chart, line_chart
from unite_fast.report.metrics import headline, result_tables, text_of, trends
from unite_fast.report.probe import Probe
from unite_fast.report.tiles import Tiles, sheet
from unite_fast.section import Section, section_of

SHEET_WIDTH = 1400  # pixels of a sheet taken from disk
HISTORY_WIDTH, HISTORY_SHEETS = 560, 6
STATES = {
    "finished": "finished", "evaluating": "in its last evaluation", "training": "in training", "stopped": "stopped",
    "starting": "starting",
}  # fmt: skip


def build(run: RunFolder, probe: Probe | None, *, why_no_probe: str | None, now: float) -> str:
    """The whole page as HTML.

    Args:
        run: what the folder holds.
        probe: what the model was asked for, None where it was not.
        why_no_probe: a sentence that says why, in that case; None where no probe is made of such runs.
        now: time of writing, seconds since 1970.
    """
    tiles = Tiles(_tile_images(probe))
    environment = Environment(
        loader=PackageLoader("unite_fast.report", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["code"] = _code
    environment.globals |= {"tile": tiles, "grouped": lambda value: f"{value:,}", "colours": COLOURS}
    return environment.get_template("page.html.j2").render(
        run=run,
        state=STATES[run.state(now)],
        css=Markup(_text("page.css")),
        script=Markup(_text("page.js")),
        written=time.strftime("%-d %B %Y, %H:%M UTC", time.gmtime(now)),
        subject=run.config.get("modality", "images"),
        summary_line=_summary_line(run),
        facts=headline(run),
        results=result_tables(run),
        trends=[(title, line_chart([curve], log=False, x_name="step")) for title, curve in trends(run)],
        probe=probe,
        notes=_notes(run, probe, why_no_probe),
        fallback={name: sheet(run.path / f"{name}.png", SHEET_WIDTH) for name in ("samples", "reconstructions")}
        if probe is None or probe.originals is None
        else {},
        of_training="reconstructed" in (run.summary or {}),
        history=_history(run),
        curves=_curves(run),
        latents=_latents(probe),
        configuration=_configuration(run.config),
        environment=_environment(run),
    )


def _code(text: str) -> Markup:
    """Escaped text whose `quoted` words are set as code."""
    pieces = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if index % 2 else escape(piece) for index, piece in enumerate(pieces)
    )


def _text(name: str) -> str:
    return resources.files("unite_fast.report").joinpath(name).read_text(encoding="utf-8")


def _tile_images(probe: Probe | None) -> list[np.ndarray]:
    if probe is None:
        return []
    images = [image for row in (*probe.samples, *probe.trajectory) for image in row.images]
    if probe.originals is not None:
        images += [*probe.originals, *probe.reconstructions]
    if probe.neighbours:
        images += [image for match in probe.neighbours.matches for image in match.nearest]
    return images


def _summary_line(run: RunFolder) -> list[str]:
    """What the run is, in a few pieces."""
    model, parts = run.config.get("model", {}), []
    parameters = (run.summary or {}).get("parameters")
    if isinstance(parameters, int):
        parts.append(f"{parameters / 1e6:.1f} M parameters" if parameters >= 1e5 else f"{parameters:,} parameters")
    if isinstance(model.get("image_size"), int):
        parts.append(f"{model['image_size']} × {model['image_size']} images of {model.get('num_classes')} classes")
    if isinstance(model.get("registers"), int):
        parts.append(f"{model['registers']} × {model.get('latent_dim')} latents")
    if run.step:
        parts.append(f"step {run.step:,}" + (f" of {run.total:,}" if run.total else ""))
        subject = run.config.get("modality", "images")
        seen = run.metrics[-1].get(subject)
        parts.append(f"{seen:,} {subject} seen" if isinstance(seen, int) else "")
    seconds = number((run.summary or {}).get("training_seconds"))
    if seconds:
        parts.append(f"{duration(seconds)} of training")
    return [part for part in parts if part]


def _notes(run: RunFolder, probe: Probe | None, why_no_probe: str | None) -> dict[str, str]:
    """Why a section has less than it could."""
    notes = dict(probe.notes) if probe else {}
    if probe is None and why_no_probe:
        for part in ("samples", "reconstructions", "trajectory", "neighbours", "latents"):
            notes.setdefault(part, why_no_probe)
    elif probe is None:
        for part in ("samples", "reconstructions"):
            if not (run.path / f"{part}.png").is_file():
                notes[part] = "The run has drawn none yet."
        if (run.path / "molecules.html").is_file():
            notes["samples"] = "`molecules.html` in the run's folder shows them in 3-D, to rotate."
    if not run.metrics:
        notes["curves"] = "The run has logged no step yet (train.log_every)."
    if not run.evaluations:
        stored = "" if run.summary else "The run has not ended, so summary.json is missing. "
        notes["results"] = f"{stored}No evaluation is stored: `unite-fast evaluate {run.path}` makes one."
    if not run.sessions:
        notes["environment"] = "The run keeps no record of its sessions (sessions.jsonl)."
    return notes


def _curves(run: RunFolder) -> list[tuple[str, list[str], Markup]]:
    """(title, legend, chart) of every panel with data."""
    charts = []
    starts = sorted({step for entry in run.sessions if (step := number(entry.get("first_step")))})
    # The panels of curves.png, and what a training that waits for its data shows.
    waiting = ("Share of the time waiting for data", "linear", {"data_wait": ""})
    for title, scale, keys in (*curve_panels(run.metrics), waiting):
        curves = []
        for key, label in keys.items():
            points = [(r["step"], value) for r in run.metrics if (value := number(r.get(key))) is not None]
            if points:
                steps, values = np.array(points, float).T
                curves.append(Curve(label, steps, values, key not in SMOOTH))
        if curves:
            legend = [curve.label for curve in curves] if len(curves) > 1 else []
            charts.append((title, legend, line_chart(curves, log=scale == "log", x_name="step", marks=starts)))
    return charts


def _latents(probe: Probe | None) -> dict[str, Any] | None:
    if probe is None or probe.latents is None:
        return None
    latents = probe.latents
    spans = list(zip(latents.mean - latents.std, latents.mean + latents.std))
    edges = (-latents.range, latents.range)
    return {
        "count": latents.count,
        "deviation": f"{latents.deviation:.3f}",
        "rank": f"{latents.rank:.1f}",
        "channels": len(latents.mean),
        "quiet": int((latents.std < 0.1).sum()),
        "charts": [
            ("Each channel: mean ± standard deviation", bar_chart(latents.mean, name="channel", spans=spans)),
            ("All values, and N(0, 1) as a line",
             bar_chart(latents.histogram, name="value", line=latents.reference, edges=edges)),
            ("Directions: share of the variance", bar_chart(latents.spectrum, name="direction")),
        ],
    }  # fmt: skip


def _history(run: RunFolder) -> list[tuple[int, str]]:
    """(step, data URI) of sample sheets made on the way, evenly chosen."""
    found = [
        (int(match[1]), path) for path in run.path.glob("samples_*.png")
        if (match := re.fullmatch(r"samples_(\d{8,})\.png", path.name))
    ]  # fmt: skip
    if (run.path / "samples.png").is_file() and run.summary:
        steps = run.summary.get("steps")
        found.append((steps if isinstance(steps, int) else run.step, run.path / "samples.png"))
    if len(found) < 2:
        return []
    found.sort()  # a run that was extended has sheets of later steps than samples.png
    encoded = [(found[k][0], sheet(found[k][1], HISTORY_WIDTH)) for k in spread(len(found), HISTORY_SHEETS)]
    return [(step, uri) for step, uri in encoded if uri]


def _configuration(config: dict[str, Any]) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """Sections of (key, value, whether it differs from the default)."""
    whole = imported(MODALITIES.get(str(config.get("modality")), MODALITIES["images"])[0])
    sections: dict[str, list[tuple[str, str, bool]]] = {"run": []}
    for key, value in config.items():
        if isinstance(value, dict):
            sections[key] = list(_entries(value, f"{key}.", whole))
        else:
            sections["run"] += list(_entries({key: value}, "", whole))
    return [(name, entries) for name, entries in sections.items() if entries]


def _entries(values: dict[str, Any], prefix: str, whole: type[Section]) -> list[tuple[str, str, bool]]:
    found: list[tuple[str, str, bool]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _entries(value, f"{prefix}{key}.", whole)
        else:
            name = f"{prefix}{key}"
            found.append((name.partition(".")[2] or name, text_of(value), _default(name, whole) != value))
    return found


def _default(name: str, whole: type[Section]) -> Any:
    """Default of a dotted key of a configuration; a value that nothing equals where the key is required or unknown."""
    section: Any = whole
    *parents, last = name.split(".")
    for parent in parents:
        field = section.model_fields.get(parent)
        section = section_of(field.annotation) if field else None
        if section is None:
            return object()
    field = section.model_fields.get(last)
    if field is None or field.is_required():
        return object()
    default = field.get_default(call_default_factory=True)
    return list(default) if isinstance(default, tuple) else default


def _environment(run: RunFolder) -> list[tuple[str, list[tuple[str, str]]]]:
    """(title, rows) of each session, the latest first: what the run ran on."""
    sessions = []
    for entry in reversed(run.sessions):
        rows = []
        for key, value in entry.items():
            if key == "started" and number(value):
                value = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(value))
            rows.append((key.replace("_", " "), text_of(value)))
        step = number(entry.get("first_step"))
        sessions.append((f"resumed after step {step:,.0f}" if step else "from the start", rows))
    versions = ((run.summary or {}).get("made_by") or {}).get("versions")
    if not sessions and isinstance(versions, dict):
        sessions.append(("at the end of training", [("versions", text_of(versions))]))
    return sessions


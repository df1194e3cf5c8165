"""The regression gate: ratios of a run against a committed baseline of the same class of device.

    pytest benchmarks/ --gate                                      # measures and judges
    python benchmarks/gate.py compare OLD.json NEW.json            # judges two records; exit code 1 on a regression
    python benchmarks/gate.py baseline                             # writes that of the newest record's class

Absolute times never count, only how many times faster ours is than its rival of the same run. All distances are of
logarithms, so that a fifth slower and a fifth faster are equally far.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from contest import Ratio

from unite_fast.errors import UserError

BASELINES, RECORDS = (Path(__file__).with_name(name) for name in ("baselines", "records"))
# The noise band of an entry is the largest of: BAND_SIGMAS times the error that a run of the baseline typically has,
# known from the scatter of its rounds; the largest distance of those runs from their centre and half as much again,
# which also sees what differs from process to process; and BAND_LEAST.
BAND_SIGMAS, BAND_LARGEST, BAND_LEAST = 4.0, 1.5, 0.04
# A fifth more time is ln 1.2 = 0.18 away. An entry whose runs scatter more than this cannot tell that from noise, so
# that being within its band says nothing; beyond its band it is judged like any other.
BAND_MOST = 0.12
# A run's own error, from the scatter of its rounds, that is still judged.
ERROR_SIGMAS = 3.0
KEY_FIELDS = ("operator", "direction", "shape", "dtype")
# What is read of a record, and its kinds; a commit and changes that git did not know are None.
RECORD_FIELDS = {
    "device_class": str,
    "date": str,
    "commit": str | None,
    "uncommitted_changes": bool | None,
    "results": list,
}
# Of the entries judged, the share faster than the baseline that is no change of the code but of the machine: of runs of
# unchanged code, each judged by the four others of its baseline, at most 1 of 56 was.
FASTER_MOST = 0.25
BASELINE_RUNS = 5  # fewer say nothing about scatter
# What is slower fails only if it is so in this many processes more. Ratios differ from process to process, most of all
# those of operators (a standard deviation of 0.03, where a fifth is 0.18), more than the rounds of one can show: of 11
# runs of unchanged code, each judged by the others of its baseline, 8 of 350 entries were slower, in 4 runs. Drawn at
# random like these, an entry is slower in three processes in 1 run of 40 at most; one a fifth slower in 98 %.
REPEATS = 2

SLOWER, WITHIN, FASTER, NOISY, NEW = "SLOWER", "within", "faster", "too noisy", "not in it"
MISSING, NOT_RUN = "MISSING", "not run"  # entries of the baseline without a ratio, in a whole run and in a part of one


class Entry(NamedTuple):
    """What a baseline knows of one ratio.

    Attributes:
        ratio: how many times faster ours is than the rival.
        band: distance of logarithms that is noise.
    """

    ratio: float
    band: float


class Verdict(NamedTuple):
    """One ratio of a run, or the lack of it, judged."""

    key: str
    ratio: float | None
    expected: float | None
    band: float | None
    word: str


def key(result: dict, rival: str) -> str:
    """What identifies a ratio from run to run."""
    return " ".join((*(result[name] for name in KEY_FIELDS), "vs", rival))


def measured(results: list[dict]) -> dict[str, Ratio]:
    """The ratios of steps, parts and operators in a run's results; an error that is not stated counts as 0."""
    return {
        key(result, rival): Ratio(value, result.get("ratio_error", {}).get(rival, 0.0))
        for result in results
        if "operator" in result
        for rival, value in result.get("times_faster_than", {}).items()
    }


def entry_of(runs: list[Ratio]) -> Entry:
    """One entry from its ratios in repeated runs of unchanged code."""
    logs = [math.log(run.value) for run in runs]
    centre, error = statistics.median(logs), statistics.median(run.error for run in runs)
    largest = max(abs(x - centre) for x in logs)
    return Entry(math.exp(centre), max(BAND_SIGMAS * error, BAND_LARGEST * largest, BAND_LEAST))


def baseline_of(runs: list[dict[str, Ratio]]) -> dict[str, Entry]:
    """The baseline of repeated runs, which have the same entries."""
    return {name: entry_of([run[name] for run in runs]) for name in runs[0]}


def judge(run: dict[str, Ratio], baseline: dict[str, Entry], part: bool = False) -> list[Verdict]:
    """Every ratio of a run against the baseline, and every entry of the baseline that the run lacks.

    Args:
        run: the ratios.
        baseline: what they should be.
        part: the run left out benchmarks on purpose, or was interrupted: what it lacks is no loss.
    """
    verdicts = []
    for name, found in run.items():
        entry = baseline.get(name)
        if entry is None:
            verdicts.append(Verdict(name, found.value, None, None, NEW))
            continue
        distance = math.log(found.value / entry.ratio)
        allowed = max(entry.band, ERROR_SIGMAS * found.error)
        if abs(distance) > allowed:
            word = SLOWER if distance < 0 else FASTER
        else:
            word = WITHIN if allowed <= BAND_MOST else NOISY
        verdicts.append(Verdict(name, found.value, entry.ratio, allowed, word))
    lacking = NOT_RUN if part else MISSING
    return verdicts + [Verdict(name, None, *entry, lacking) for name, entry in baseline.items() if name not in run]


def judge_again(
    run: dict[str, Ratio],
    baseline: dict[str, Entry],
    repeat: Callable[[set[str]], dict[str, Ratio]],
    part: bool = False,
) -> list[Verdict]:
    """As `judge`, but entries that are slower are measured anew, up to REPEATS times, until they are not.

    A process that is too noisy to judge a steady entry says nothing of it: it stays slower. One that scatters anyway is
    no longer slower where it is within its band.

    Args:
        run, baseline, part: as for `judge`.
        repeat: ratios from another process, of these entries as far as it could measure them, and maybe of others.
    """
    for _ in range(REPEATS):
        slower = {verdict.key for verdict in judge(run, baseline, part) if verdict.word == SLOWER}
        if not slower:
            break
        found = repeat(slower)
        verdicts = judge(found, baseline, part=True)
        noisy = {v.key for v in verdicts if v.word == NOISY and baseline[v.key].band <= BAND_MOST}
        run = run | {name: found[name] for name in slower & found.keys() - noisy}
    return judge(run, baseline, part)


def passes(verdicts: list[Verdict]) -> bool:
    """Whether nothing became slower or went missing, and something could be judged at all."""
    words = {verdict.word for verdict in verdicts}
    return not words & {SLOWER, MISSING} and bool(words & {WITHIN, FASTER})


def table(verdicts: list[Verdict]) -> list[str]:
    """The verdicts as lines of text; what a part of a run leaves out has none."""
    verdicts = [verdict for verdict in verdicts if verdict.word != NOT_RUN]
    width = max((len(verdict.key) for verdict in verdicts), default=0)
    lines = [f"{'times faster than the rival':{width}} {'now':>8} {'before':>8} {'change':>8} {'noise':>7}"]
    for name, ratio, expected, band, word in verdicts:
        if expected is None:
            lines.append(f"{name:{width}} {ratio:8.3f} {'-':>8} {'-':>8} {'-':>7}  {word}")
            continue
        noise = math.expm1(band)
        if ratio is None:
            lines.append(f"{name:{width}} {'-':>8} {expected:8.3f} {'-':>8} {noise:7.1%}  {word}")
            continue
        lines.append(f"{name:{width}} {ratio:8.3f} {expected:8.3f} {ratio / expected - 1:8.1%} {noise:7.1%}  {word}")
    return lines


def conclusion(verdicts: list[Verdict], interrupted: str | None = None) -> str:
    """One line: what the gate says, and of how many entries.

    Args:
        verdicts: all of them.
        interrupted: how far a run came that did not end by itself.
    """
    count = Counter(verdict.word for verdict in verdicts)
    judged = count[SLOWER] + count[WITHIN] + count[FASTER]
    rest = f"{judged} judged, {count[NOISY]} too noisy to tell a fifth, {count[NEW]} not in the baseline"
    if count[NOT_RUN]:
        rest += f", {count[NOT_RUN]} of the baseline not run"
    faults = []
    if count[SLOWER]:
        faults.append(f"{count[SLOWER]} slower than before")
    if count[MISSING]:
        faults.append(f"{count[MISSING]} of the baseline missing")
    if not judged:
        faults.append("nothing could be judged")
    if interrupted:
        faults.append(f"interrupted: {interrupted}")
    line = f"gate: {', '.join(['FAILED', *faults]) if faults else 'passed'} ({rest})"
    if count[FASTER] > max(1, FASTER_MOST * judged):  # one alone is no state of the machine
        line += (
            f"; {count[FASTER]} are faster together, so the machine's state seems to differ from the baseline's. Under "
            f"load rivals slow down more than ours, which may hide a regression: repeat on a quiet machine"
        )
    return line


def baseline_path(device_class: str) -> Path:
    return BASELINES / f"{device_class}.json"


def read_baseline(device_class: str) -> dict[str, Entry]:
    """The committed baseline of a class.

    Raises:
        UserError: there is none, and how to make one; or the file is no baseline.
    """
    path = baseline_path(device_class)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in BASELINES.glob("*.json"))) or "none"
        raise UserError(
            f"no baseline for devices of class {device_class} (there are: {known}); record {BASELINE_RUNS} runs or "
            f"more with pytest benchmarks/ --record, then python benchmarks/gate.py baseline"
        )
    entries = _read_object(path).get("entries")
    whole = isinstance(entries, dict) and all(
        isinstance(entry, dict) and entry.keys() == set(Entry._fields) and all(map(_positive, entry.values()))
        for entry in entries.values()
    )
    if not whole or not entries:
        raise UserError(f"{path} is not a baseline: it needs entries, each of a ratio and a band above 0")
    return {name: Entry(**entry) for name, entry in entries.items()}


def write_baseline(records: list[dict]) -> Path:
    """The baseline of the newest record of a whole run and those of its class and commit, written; the file.

    Raises:
        UserError: too few of them, or not all with the same entries.
    """
    # Records from before `complete` do not say it: their entries tell.
    records = [record for record in records if record.get("complete", True)]
    newest = max(records, key=lambda record: record["date"], default=None)
    if newest is None:
        raise UserError(
            f"there are no records of whole runs; a baseline takes {BASELINE_RUNS}: pytest benchmarks/ --record"
        )
    if newest["commit"] is None or newest["uncommitted_changes"] is None:
        raise UserError("the commit of the newest record is not known: record in a clone, where git is installed")
    if newest["uncommitted_changes"]:
        raise UserError("the newest record is of changes that are not committed: commit them, and record again")
    same = ("device_class", "commit", "uncommitted_changes")
    records = [record for record in records if all(record[name] == newest[name] for name in same)]
    if len(records) < BASELINE_RUNS:
        raise UserError(
            f"a baseline takes {BASELINE_RUNS} records or more of whole runs of one class and commit; of "
            f"{newest['device_class']} at {str(newest['commit'])[:7]}, as the newest, there are {len(records)}: "
            f"pytest benchmarks/ --record"
        )
    runs = [measured(record["results"]) for record in records]
    names = set().union(*runs)
    for record, run in zip(records, runs, strict=True):
        if run.keys() != names:
            raise UserError(
                f"the record of {record['date']} lacks {len(names - run.keys())} of the {len(names)} entries of the "
                f"others, such as {min(names - run.keys())}: remove the records of partial runs, or record again"
            )
    if not names:
        raise UserError(f"the records at {str(newest['commit'])[:7]} have no ratios: pytest benchmarks/ --record")
    entries = baseline_of(runs)
    kept = {name: newest[name] for name in ("device", "device_class", "date", "commit", "torch") if name in newest}
    content = kept | {
        "runs": len(records),
        "entries": {name: {k: round(v, 4) for k, v in entry._asdict().items()} for name, entry in entries.items()},
    }
    path = baseline_path(newest["device_class"])
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def compare(old: dict, new: dict) -> list[Verdict]:
    """Two records: the noise is that of the old one's class where a baseline is committed, else of their own rounds.

    A band is of a run about what many made; two single runs differ by √2 as much.

    Raises:
        UserError: records of different classes.
    """
    device_class = old["device_class"]
    if device_class != new["device_class"]:
        raise UserError(f"the records are of different classes: {device_class} and {new['device_class']}")
    before = measured(old["results"])
    baseline = read_baseline(device_class) if baseline_path(device_class).is_file() else {}
    bands = {name: entry.band for name, entry in baseline.items()}
    two = math.sqrt(2)
    least = {name: max(two * bands.get(name, BAND_LEAST), ERROR_SIGMAS * ratio.error) for name, ratio in before.items()}
    return judge(measured(new["results"]), {name: Entry(before[name].value, least[name]) for name in before})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gate.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    comparing = commands.add_parser("compare", help="judge a record against an older one")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    commands.add_parser("baseline", help="write the baseline of repeated runs of unchanged code, the newest ones")
    options = parser.parse_args(arguments)
    try:
        if options.command == "baseline":
            path = write_baseline([read_record(path) for path in sorted(RECORDS.glob("*.json"))])
            entries = json.loads(path.read_text())["entries"].values()
            gated = sum(entry["band"] <= BAND_MOST for entry in entries)
            print(f"{path}: {len(entries)} entries, {gated} steady enough to judge a fifth")
            return 0
        verdicts = compare(read_record(options.old), read_record(options.new))
    except (OSError, UserError) as error:
        print(f"gate.py: {error}", file=sys.stderr)
        return 2
    print("\n".join([*table(verdicts), conclusion(verdicts)]))
    return 0 if passes(verdicts) else 1


def read_record(path: Path) -> dict:
    """A record that `pytest benchmarks/ --record` wrote.

    Raises:
        UserError: not JSON, or something else than a record.
    """
    record = _read_object(path)
    for name, kinds in RECORD_FIELDS.items():
        if not isinstance(record.get(name, ...), kinds):
            raise UserError(f"{path} is not a record of pytest benchmarks/ --record: {name} is missing or malformed")
    for number, result in enumerate(record["results"]):
        if not _is_result(result):
            raise UserError(f"{path}: result {number} lacks a field, or has a ratio that is not a number above 0")
    return record


def _read_object(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return found


def _is_result(result: object) -> bool:
    if not isinstance(result, dict):
        return False
    if "operator" not in result:
        return True
    ratios, errors = result.get("times_faster_than", {}), result.get("ratio_error", {})
    return (
        all(isinstance(result.get(name), str) for name in KEY_FIELDS)
        and (isinstance(ratios, dict) and isinstance(errors, dict))
        and all(map(_positive, ratios.values()))
        and all(error == 0 or _positive(error) for error in errors.values())
    )


def _positive(number: object) -> bool:
    """Whether this is a number whose logarithm is one."""
    return isinstance(number, int | float) and math.isfinite(number) and number > 0


if __name__ == "__main__":
    sys.exit(main())

"""The regression gate on simulated clocks: it sees a step that takes a fifth longer, and nothing where nothing changed.

The clocks are those of a busy shared machine: a slow drift that all contenders feel, noise on every call, and now and
then a call that is interrupted and takes several times as long. Everything else is the code of the benchmarks.
"""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import contest
import gate
import history
import measure

from unite_fast.errors import UserError

BENCHMARKS = Path(gate.__file__).parent
ROUNDS, BASELINE_RUNS, LATER_RUNS = 11, 5, 10
TRUE_SECONDS = {"step one": 0.4, "step two": 1.5, "denoise of one": 0.1}
TRUE_RATIO = 1.25


class Machine:
    """A simulated machine whose calls take what a shared one makes of them.

    At the usual noise a round's ratio scatters by 3 %: steps on a CPU shared with five others were measured at 2.4 %.
    What is in one process for all of its rounds scatters by `process`: 0.03 is an operator's.
    """

    def __init__(self, seed: int, noise: float = 0.015, process: float = 0.0):
        self.random, self.noise, self.process, self.load = random.Random(seed), noise, process, 0.0

    def call(self, seconds: float):
        def timed() -> float:
            self.load = 0.9 * self.load + self.random.gauss(0, 0.02)
            interrupted = 3.0 if self.random.random() < 0.08 else 1.0
            return seconds * math.exp(self.load + self.random.gauss(0, self.noise)) * interrupted

        return timed

    def run(self, slowdown: float = 1.0, only: str | None = None) -> list[dict]:
        """The results of one run, ours slower by a factor."""
        results = []
        for name, seconds in TRUE_SECONDS.items():
            ours = seconds * (slowdown if only in (None, name) else 1.0) * math.exp(self.random.gauss(0, self.process))
            turns = {"ours": self.call(ours), "plain": self.call(TRUE_RATIO * seconds)}
            times = {"ours": [], "plain": []}
            for _ in range(ROUNDS):
                contest.play(turns, times)
            ratio = contest.ratios(times)["plain"]
            results.append(
                {
                    "operator": name, "direction": "step", "shape": "4 images", "dtype": "float32",
                    "times_faster_than": {"plain": ratio.value}, "ratio_error": {"plain": ratio.error},
                }
            )  # fmt: skip
        return results


def baseline(machine: Machine) -> dict[str, gate.Entry]:
    return gate.baseline_of([gate.measured(machine.run()) for _ in range(BASELINE_RUNS)])


def words(verdicts) -> dict[str, str]:
    return {verdict.key.split(" step")[0]: verdict.word for verdict in verdicts}


@pytest.mark.parametrize("seed", range(8))
def test_ten_runs_of_unchanged_code_pass(seed):
    machine = Machine(seed)
    expected = baseline(machine)
    for _ in range(LATER_RUNS):
        verdicts = gate.judge(gate.measured(machine.run()), expected)
        assert gate.passes(verdicts), "\n".join(gate.table(verdicts))


@pytest.mark.parametrize("seed", range(8))
def test_a_step_that_takes_a_fifth_longer_is_caught(seed):
    machine = Machine(seed)
    expected = baseline(machine)
    for _ in range(LATER_RUNS):
        verdicts = gate.judge(gate.measured(machine.run(slowdown=1.2)), expected)
        assert not gate.passes(verdicts), "\n".join(gate.table(verdicts))
        found = words(gate.judge(gate.measured(machine.run(slowdown=1.2, only="step two")), expected))
        assert found["step two"] == gate.SLOWER and gate.SLOWER not in (found["step one"], found["denoise of one"])


@pytest.mark.parametrize("slowdown, least, most", [(1.0, 0.0, 0.01), (1.2, 0.95, 1.0)])
def test_processes_that_differ_raise_no_alarm_and_hide_none(slowdown, least, most):
    """Of 160 machines with three entries each: one process alone calls some unchanged entries slower."""
    alone = again = judged = 0
    for seed in range(160):
        machine = Machine(seed, process=0.03)
        expected = {name: entry for name, entry in baseline(machine).items() if entry.band <= gate.BAND_MOST}
        run = gate.measured(machine.run(slowdown))
        run = {name: run[name] for name in expected}
        verdicts = gate.judge_again(run, expected, lambda names: gate.measured(machine.run(slowdown)))
        alone += sum(verdict.word == gate.SLOWER for verdict in gate.judge(run, expected))
        again += sum(verdict.word == gate.SLOWER for verdict in verdicts)
        judged += len(verdicts)
    assert judged > 400 and again < alone and least <= again / judged <= most


def test_only_what_is_slower_is_measured_again_and_until_it_is_not():
    expected = {name: gate.Entry(1.25, 0.05) for name in ("one", "two", "three")}
    slow, fine = contest.Ratio(1.0, 0.01), contest.Ratio(1.24, 0.01)
    # The second process cannot measure two, and has another ratio for three, which nobody asked for.
    answers = [{"one": fine, "three": slow}, {"two": slow}]
    asked = []

    def repeat(names: set[str]) -> dict[str, contest.Ratio]:
        asked.append(names)
        return answers[len(asked) - 1]

    verdicts = gate.judge_again({"one": slow, "two": slow, "three": fine}, expected, repeat)
    assert asked == [{"one", "two"}, {"two"}]
    assert [verdict.word for verdict in verdicts] == [gate.WITHIN, gate.SLOWER, gate.WITHIN]
    assert len(gate.judge_again({"one": fine}, expected, repeat, part=True)) == 3 and len(asked) == 2


def test_what_is_too_noisy_the_second_time_stays_slower():
    expected, noisy = {"one": gate.Entry(1.25, 0.05)}, {"one": contest.Ratio(1.0, 0.2)}
    assert [verdict.word for verdict in gate.judge(noisy, expected)] == [gate.NOISY]
    (verdict,) = gate.judge_again({"one": contest.Ratio(1.0, 0.01)}, expected, lambda names: noisy)
    assert verdict.word == gate.SLOWER


@pytest.mark.parametrize("second, word", [(1.0, gate.NOISY), (0.8, gate.SLOWER)])
def test_an_entry_that_scatters_anyway_must_be_slower_each_time(second, word):
    expected = {"one": gate.Entry(1.25, 0.3)}  # 0.93 is at its edge
    (verdict,) = gate.judge_again(
        {"one": contest.Ratio(0.8, 0.01)}, expected, lambda names: {"one": contest.Ratio(second, 0.01)}
    )
    assert verdict.word == word and verdict.ratio == second


def test_a_faster_step_passes_and_is_named():
    machine = Machine(2)
    verdicts = gate.judge(gate.measured(machine.run(slowdown=1 / 1.3)), baseline(machine))
    assert gate.passes(verdicts) and set(words(verdicts).values()) == {gate.FASTER}


def test_what_scatters_more_than_a_fifth_is_not_judged_and_nothing_judged_fails():
    machine = Machine(1, noise=0.5)
    verdicts = gate.judge(gate.measured(machine.run()), baseline(machine))
    assert set(words(verdicts).values()) == {gate.NOISY}
    assert not gate.passes(verdicts) and "nothing could be judged" in gate.conclusion(verdicts)


def test_a_run_that_was_disturbed_is_not_judged():
    expected = {"a step s f vs plain": gate.Entry(1.25, 0.05)}
    for ratio, error, word in ((1.0, 0.01, gate.SLOWER), (1.1, 0.06, gate.NOISY), (1.24, 0.01, gate.WITHIN)):
        assert gate.judge({"a step s f vs plain": contest.Ratio(ratio, error)}, expected)[0].word == word
    assert gate.judge({"new": contest.Ratio(1.0, 0.0)}, expected)[0].word == gate.NEW


@pytest.mark.parametrize("ratio, word", [(0.125, gate.SLOWER), (1.0, gate.NOISY), (12.5, gate.FASTER)])
def test_noise_does_not_excuse_what_lies_beyond_it(ratio, word):
    expected = {"noisy": gate.Entry(1.25, 0.36), "steady": gate.Entry(1.25, 0.05)}
    verdicts = gate.judge({"noisy": contest.Ratio(ratio, 0.01), "steady": contest.Ratio(1.25, 0.01)}, expected)
    assert [verdict.word for verdict in verdicts] == [word, gate.WITHIN]
    assert gate.passes(verdicts) == (word != gate.SLOWER)


@pytest.mark.parametrize("entries, faster, told", [(8, 2, False), (8, 3, True), (2, 1, False)])
def test_many_faster_together_are_told_to_be_the_machine(entries, faster, told):
    expected = {f"{number}": gate.Entry(1.25, 0.05) for number in range(entries)}
    run = {name: contest.Ratio(1.5 if int(name) < faster else 1.25, 0.01) for name in expected}
    verdicts = gate.judge(run, expected)
    assert gate.passes(verdicts) and ("repeat on a quiet machine" in gate.conclusion(verdicts)) == told


def test_rounds_alternate_and_ratios_are_paired():
    order = []
    turns = {"ours": lambda: order.append("ours") or 2.0, "plain": lambda: order.append("plain") or 3.0}
    found = {"ours": [], "plain": []}
    for _ in range(3):
        contest.play(turns, found)
    assert order == ["ours", "plain", "plain", "ours", "ours", "plain"]
    assert found == {"ours": [2.0] * 3, "plain": [3.0] * 3}
    # Both grow tenfold in mid-run: the ratio of every round is 1.5 all the same, and certain.
    ratio = contest.paired([3.0, 3.0, 3.0, 30.0, 30.0], [2.0, 2.0, 2.0, 20.0, 20.0])
    assert ratio.value == pytest.approx(1.5) and ratio.error == pytest.approx(0.0, abs=1e-12)
    assert contest.paired([3.0], [2.0]).error > gate.BAND_MOST  # one round never disagrees with itself


@pytest.mark.parametrize("noise, least, most", [(0.0, 5, 10), (0.06, 20, 200)])
def test_rounds_go_on_until_the_ratio_is_known(noise, least, most):
    machine = Machine(3, noise)
    turns = {"ours": machine.call(1.0), "plain": machine.call(TRUE_RATIO)}
    times = {"ours": [], "plain": []}
    for _ in range(contest.FEWEST_ROUNDS):
        contest.play(turns, times)
    contest.settle(turns, times, lambda: contest.ratios(times), seconds=60)
    ratio = contest.ratios(times)["plain"]
    assert ratio.error <= contest.ENOUGH and ratio.value == pytest.approx(TRUE_RATIO, rel=4 * contest.ENOUGH)
    assert least <= len(times["ours"]) == len(times["plain"]) <= most


def test_a_ratio_that_cannot_be_known_ends_in_time(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(contest.time, "monotonic", lambda: clock[0])

    def turn() -> float:
        clock[0] += 1.0
        return 1.0 + clock[0] % 7

    times = {"ours": [turn()], "plain": [turn()]}
    contest.settle({"ours": turn, "plain": turn}, times, lambda: contest.ratios(times), seconds=90)
    assert contest.ratios(times)["plain"].error > contest.ENOUGH
    assert len(times["ours"]) == 1 + 90 / 2


def record(results: list[dict], day: int, device_class: str = "cpu-test", commit: str = "c") -> dict:
    return {
        "device": "simulated", "device_class": device_class, "date": f"2026-01-{day:02d}T00:00:00+00:00",
        "commit": commit, "uncommitted_changes": False, "torch": "t", "results": results,
    }  # fmt: skip


def run_gate(*arguments):
    command = [sys.executable, str(BENCHMARKS / "gate.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_compare_exits_with_one_on_a_regression(tmp_path):
    machine = Machine(2)
    paths = {}
    for day, (name, slowdown) in enumerate({"old": 1.0, "same": 1.0, "slow": 1.2}.items(), 1):
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(record(machine.run(slowdown), day)))
    same, slow = (run_gate("compare", paths["old"], paths[name]) for name in ("same", "slow"))
    assert same.returncode == 0 and "passed" in same.stdout, same.stdout + same.stderr
    assert slow.returncode == 1 and "SLOWER" in slow.stdout, slow.stdout + slow.stderr
    less = tmp_path / "less.json"
    less.write_text(json.dumps(record(machine.run()[1:], 4)))
    lost = run_gate("compare", paths["old"], less)
    assert lost.returncode == 1 and "1 of the baseline missing" in lost.stdout, lost.stdout + lost.stderr
    other = tmp_path / "other.json"
    other.write_text(json.dumps(record(machine.run(), 4, "gpu")))
    wrong = run_gate("compare", paths["old"], other)
    assert wrong.returncode == 2 and "different classes" in wrong.stderr and "Traceback" not in wrong.stderr
    (tmp_path / "broken.json").write_text("{")
    broken = run_gate("compare", paths["old"], tmp_path / "broken.json")
    assert broken.returncode == 2 and "not JSON" in broken.stderr


def test_a_baseline_takes_runs_of_one_class_and_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "BASELINES", tmp_path)
    machine = Machine(3)
    runs = [record(machine.run(), day) for day in range(1, BASELINE_RUNS + 1)]
    with pytest.raises(UserError, match="gate.py baseline"):
        gate.read_baseline("cpu-test")
    with pytest.raises(UserError, match="there are no records"):
        gate.write_baseline([])
    for other in (record(machine.run(), 9, "gpu"), record(machine.run(), 9, commit="d")):
        with pytest.raises(UserError, match="5 records or more of whole runs of one class and commit.* there are 1"):
            gate.write_baseline([*runs, other])
    with pytest.raises(UserError, match="not committed"):
        gate.write_baseline([*runs, record(machine.run(), 9) | {"uncommitted_changes": True}])
    slow = [record(machine.run(2.0), 0, "gpu"), record(machine.run(2.0), 0, commit="b")]
    assert gate.write_baseline([*slow, *runs]) == tmp_path / "cpu-test.json"
    assert json.loads((tmp_path / "cpu-test.json").read_text())["runs"] == BASELINE_RUNS
    verdicts = gate.judge(gate.measured(machine.run()), gate.read_baseline("cpu-test"))
    assert len(verdicts) == len(TRUE_SECONDS) and gate.passes(verdicts)


@pytest.mark.parametrize("lacking", ["repository", "git"])
def test_a_record_of_an_unknown_commit_is_no_record_for_a_baseline(tmp_path, monkeypatch, lacking):
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "measure.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    if lacking == "git":
        monkeypatch.setenv("PATH", str(tmp_path))
    assert measure.source() == {"commit": None, "uncommitted_changes": None}
    unknown = [record(Machine(3).run(), day) | measure.source() for day in range(1, BASELINE_RUNS + 1)]
    for newest in (unknown[-1], unknown[-1] | {"commit": "c"}):
        with pytest.raises(UserError, match="commit of the newest record is not known"):
            gate.write_baseline([*unknown[:-1], newest])


ROW = {"operator": "a", "direction": "step", "shape": "s", "dtype": "f", "times_faster_than": {"plain": 1.25}}


@pytest.mark.parametrize(
    "band, old, new, word",
    [
        (None, 0.0, 0.0, gate.SLOWER), (None, 0.03, 0.0, gate.WITHIN), (None, 0.0, 0.03, gate.WITHIN),
        (0.06, 0.0, 0.0, gate.WITHIN), (0.055, 0.0, 0.0, gate.SLOWER), (0.05, 0.03, 0.0, gate.WITHIN),
    ],
)  # fmt: skip
def test_records_are_compared_by_the_noise_of_their_class_and_by_their_own(tmp_path, monkeypatch, band, old, new, word):
    """Of 8 % fewer: ln(1.25 / 1.15) = 0.083; an error counts three times, a band √2 times."""
    monkeypatch.setattr(gate, "BASELINES", tmp_path)
    if band is not None:
        entries = {"a step s f vs plain": {"ratio": 9.0, "band": band}}  # its ratio does not count
        (tmp_path / "cpu-test.json").write_text(json.dumps({"entries": entries}))
    before, after = (
        record([ROW | {"times_faster_than": {"plain": ratio}, "ratio_error": {"plain": error}}], 1)
        for ratio, error in ((1.25, old), (1.15, new))
    )
    assert [verdict.word for verdict in gate.compare(before, after)] == [word]


@pytest.mark.parametrize(
    "change",
    [
        {"uncommitted_changes": ...}, {"date": ...}, {"results": None}, {"results": [None]},
        {"results": [{"operator": "a"}]}, {"results": [ROW | {"direction": None}]},
        {"results": [ROW | {"times_faster_than": {"plain": 0}}]},
        {"results": [ROW | {"times_faster_than": {"plain": math.nan}}]},
        {"results": [ROW | {"times_faster_than": {"plain": math.inf}}]},
        {"results": [ROW | {"ratio_error": {"plain": -0.1}}]},
    ],
)  # fmt: skip
def test_a_malformed_record_is_refused_by_name(tmp_path, change):
    path = tmp_path / "this.json"
    whole = record([ROW], 1)
    path.write_text(json.dumps(whole))
    assert gate.read_record(path) == whole
    path.write_text(json.dumps({name: value for name, value in (whole | change).items() if value is not ...}))
    with pytest.raises(UserError, match=r"this\.json"):
        gate.read_record(path)


def test_partial_records_never_enter_a_baseline(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "BASELINES", tmp_path)
    machine = Machine(3)
    runs = [record(machine.run(), day) for day in range(1, BASELINE_RUNS + 1)]
    part = record(machine.run()[:1], 9)
    whole = json.loads(gate.write_baseline([*runs, part | {"complete": False}]).read_text())
    assert whole["runs"] == BASELINE_RUNS and len(whole["entries"]) == len(TRUE_SECONDS)
    with pytest.raises(UserError, match="2026-01-09.* lacks 2 of the 3 entries .*such as denoise of one step"):
        gate.write_baseline([*runs, part])
    with pytest.raises(UserError, match="no ratios"):
        gate.write_baseline([run | {"results": []} for run in runs])
    with pytest.raises(UserError, match="there are no records of whole runs"):
        gate.write_baseline([part | {"complete": False}])


@pytest.mark.parametrize("device_class", [path.stem for path in sorted(gate.BASELINES.glob("*.json"))])
def test_the_records_of_a_committed_baseline_write_it_again(device_class, tmp_path, monkeypatch):
    committed = json.loads(gate.baseline_path(device_class).read_bytes())
    monkeypatch.setattr(gate, "BASELINES", tmp_path)
    records = [gate.read_record(path) for path in sorted(gate.RECORDS.glob("*.json"))]
    same = [r for r in records if all(r[name] == committed[name] for name in ("device_class", "commit"))]
    written = json.loads(gate.write_baseline(same).read_bytes())
    # It may lack what is no longer measured: an entry that no run has is MISSING.
    written["entries"] = {name: written["entries"][name] for name in committed["entries"]}
    assert written == committed


def test_the_committed_baselines_judge_the_steps():
    files = sorted(gate.BASELINES.glob("*.json"))
    assert files
    for file in files:
        steps = {name: e for name, e in gate.read_baseline(file.stem).items() if name.startswith("step ")}
        assert steps and all(entry.band <= gate.BAND_MOST for entry in steps.values()), file


def test_the_history_says_which_record_is_broken_in_one_line(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"broken\.json is not JSON"):
        history.draw(tmp_path)


def test_the_history_is_drawn(tmp_path):
    machine = Machine(4)
    for day in range(1, 4):
        (tmp_path / f"{day}.json").write_text(json.dumps(record(machine.run(), day)))
    path = history.draw(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and not list(tmp_path.glob("*.partial"))

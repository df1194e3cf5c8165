"""`pytest benchmarks/` with --gate and --record: the benchmarks' own conftest over three made-up ones."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import gate
import measure

BENCHMARKS = Path(gate.__file__).parent
pytest_plugins = ("pytester",)
FAKES = """
import pytest

@pytest.mark.parametrize("name", {names})
def test_fake(name, results, benchmark):
    result = {{
        "operator": name, "direction": "step", "shape": "4 images", "dtype": "float32", "seconds":
        {{"ours": {{"low": 1.0, "median": 1.0, "high": 1.0}}}}, "times_faster_than": {{"plain": {ratio}}},
    }}
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(result)
    results.append(result)
"""


@pytest.fixture
def bench(pytester, monkeypatch):
    """Runs pytest with the benchmarks' own conftest over three made-up ones in two files, whose baseline is met."""
    for name in ("BASELINES", "RECORDS"):
        monkeypatch.setattr(gate, name, pytester.path / name.lower())
    monkeypatch.setattr(measure, "RECORDS", gate.RECORDS)
    # For the processes that measure again. As one of xdist's, which the suite's may be, they would write nothing.
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS), prepend=os.pathsep)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    folder = pytester.mkdir("benchmarks")
    shutil.copy(BENCHMARKS / "conftest.py", folder)
    (folder / "test_steps.py").write_text(fakes("step one", "step two"))
    (folder / "test_parts.py").write_text(fakes("part of one"))
    write_expected("step one", "step two", "part of one")

    def run(*arguments: str) -> SimpleNamespace:
        ran = pytester.runpytest_inprocess("-p", "no:cacheprovider", *arguments, no_reraise_ctrlc=True)
        said = [line for line in ran.outlines if "gate:" in line]
        return SimpleNamespace(ret=ran.ret, last=said[-1] if said else "", text=ran.stdout.str() + ran.stderr.str())

    return run


def fakes(*names: str, ratio: str = "1.25") -> str:
    """A file of benchmarks with these names, which find this ratio."""
    return FAKES.format(names=names, ratio=ratio)


def write_expected(*names: str) -> None:
    """A baseline of this machine's class with these entries."""
    gate.BASELINES.mkdir(exist_ok=True)
    entries = {f"{name} step 4 images float32 vs plain": {"ratio": 1.25, "band": 0.05} for name in names}
    gate.baseline_path(measure.device_class()).write_text(json.dumps({"entries": entries}))


def test_what_a_run_lacks_of_the_baseline_fails_unless_it_was_left_out_on_purpose(bench):
    whole = bench("benchmarks", "--gate")
    assert whole.ret == 0 and "gate: passed (3 judged" in whole.last
    for chosen in (["benchmarks", "-k", "one"], ["benchmarks/test_steps.py"], ["benchmarks/test_steps.py::test_fake"]):
        part = bench(*chosen, "--gate")
        assert part.ret == 0 and "gate: passed" in part.last and "1 of the baseline not run" in part.last
        assert "MISSING" not in part.text
    write_expected("step one", "step two", "part of one", "step three")
    lost = bench("benchmarks", "--gate")
    assert lost.ret == 1 and "gate: FAILED, 1 of the baseline missing (3 judged" in lost.last
    assert "step three step 4 images float32 vs plain" in lost.text and "MISSING" in lost.text


@pytest.mark.parametrize("option", ["--gate", "--record"])
def test_benchmarks_that_compete_are_neither_judged_nor_recorded(bench, option):
    pytest.importorskip("xdist")
    run = bench("benchmarks", option, "-n", "2")
    assert run.ret == pytest.ExitCode.USAGE_ERROR and "one benchmark at a time" in run.text
    assert not gate.RECORDS.exists()


def test_a_gate_without_ratios_fails(bench):
    (gate.BASELINES.parent / "benchmarks" / "test_parts.py").write_text("def test_of_no_ratio():\n    pass\n")
    run = bench("benchmarks", "-k", "no_ratio", "--gate")
    assert run.ret == 1 and "gate: FAILED, nothing could be judged (0 judged" in run.last


def test_a_record_of_a_part_of_a_run_is_no_record_for_a_baseline(bench):
    whole = bench("benchmarks", "--record")
    files = set(gate.RECORDS.glob("*.json"))
    assert whole.ret == 0 and [gate.read_record(path)["complete"] for path in files] == [True]
    for path in files:  # records are named by second
        path.rename(path.with_name("whole.json"))
    part = bench("benchmarks", "-k", "one", "--record")
    assert part.ret == 0 and "which no baseline takes" in part.text
    (path,) = set(gate.RECORDS.glob("*.json")) - {gate.RECORDS / "whole.json"}
    assert gate.read_record(path)["complete"] is False


def test_the_commit_of_a_record_is_that_of_the_beginning(bench, monkeypatch):
    head = gate.RECORDS.with_name("head")
    head.write_text("measured")
    monkeypatch.setattr(measure, "source", lambda: {"commit": head.read_text(), "uncommitted_changes": False})
    commits = f"\ndef test_commit(results):\n    open({str(head)!r}, 'w').write('later')\n"
    (head.parent / "benchmarks" / "test_parts.py").write_text(fakes("part of one") + commits)
    bench("benchmarks", "--record")
    (path,) = gate.RECORDS.glob("*.json")
    assert head.read_text() == "later" and gate.read_record(path)["commit"] == "measured"


@pytest.mark.parametrize(
    "content",
    ["{", "{}", "[]", '{"entries": {"a": 1}}', '{"entries": {"a": {"ratio": NaN, "band": 0.1}}}', '{"entries": {}}'],
)
def test_a_malformed_baseline_is_refused_by_name(bench, content):
    path = gate.baseline_path(measure.device_class())
    path.write_text(content)
    run = bench("benchmarks", "--gate")
    assert run.ret == pytest.ExitCode.USAGE_ERROR and str(path) in run.text and "INTERNALERROR" not in run.text


def test_the_verdict_is_told_where_the_history_cannot_be_drawn(bench):
    gate.RECORDS.mkdir()
    (gate.RECORDS / "broken.json").write_text("{")
    run = bench("benchmarks", "--gate", "--record")
    assert run.ret == 0 and "gate: passed" in run.last
    assert "history not drawn" in run.text and "broken.json is not JSON" in run.text and "INTERNALERROR" not in run.text


TERMINATED = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"  # as by the time limit of a command


@pytest.mark.parametrize(
    "stop", ["pytest.exit('enough')", "pytest.exit('enough', returncode=0)", "assert False", TERMINATED]
)
def test_an_interrupted_gate_says_how_far_it_came(bench, stop):
    (gate.BASELINES.parent / "benchmarks" / "test_parts.py").write_text(
        f"import pytest\n\ndef test_broken():\n    {stop}\n\ndef test_later():\n    pass\n"
    )
    run = bench("benchmarks/test_steps.py", "benchmarks/test_parts.py", "-x", "--gate", "--record")
    came = 2 + (stop == "assert False")
    assert run.ret != 0 and f"gate: FAILED, interrupted: {came} of 4 ran (2 judged" in run.last
    assert "MISSING" not in run.text and "which no baseline takes" in run.text


# Half as fast but where a file of the benchmark's name says otherwise, which it writes.
SLOW_ONCE = "0.6 if not __import__('pathlib').Path(name).exists() and not open(name, 'w').close() else 1.25"


def test_what_is_slower_is_measured_again_in_a_process_of_its_own(bench, monkeypatch):
    monkeypatch.setattr(gate, "REPEATS", 1)  # a process takes seconds to begin
    folder = gate.BASELINES.parent / "benchmarks"
    (folder / "test_steps.py").write_text(fakes("step one", "step two", ratio="0.6 if name == 'step two' else 1.25"))
    (folder / "test_parts.py").write_text(fakes("part of one", ratio=SLOW_ONCE))
    run = bench("benchmarks", "--gate", "--record")
    assert run.ret == 1 and "gate: FAILED, 1 slower than before (3 judged" in run.last
    nodes = "benchmarks/test_parts.py::test_fake[part of one], benchmarks/test_steps.py::test_fake[step two]"
    assert f"gate: 2 slower, measured again in another process: {nodes}" in run.text
    (path,) = gate.RECORDS.glob("*.json")
    kept = gate.measured(gate.read_record(path)["results"]).values()
    assert sorted(ratio.value for ratio in kept) == [0.6, 0.6, 1.25]  # a baseline's bands are of single processes


@pytest.mark.parametrize(
    "there, told",
    [
        ("1 / 0", "ZeroDivisionError"),
        ("os.kill(os.getppid(), 15)", "gate: FAILED, 1 slower than before, interrupted: what is slower was not"),
    ],
)
def test_a_benchmark_that_cannot_be_measured_again_stays_slower(bench, monkeypatch, there, told):
    monkeypatch.setattr(gate, "REPEATS", 1)
    ratio = f"0.6 if os.getpid() == {os.getpid()} else {there}"
    file = gate.BASELINES.parent / "benchmarks" / "test_parts.py"
    file.write_text("import os\n" + fakes("part of one", ratio=ratio))
    run = bench("benchmarks/test_parts.py", "--gate")
    assert run.ret == 1 and "gate: FAILED, 1 slower than before" in run.last and told in run.text

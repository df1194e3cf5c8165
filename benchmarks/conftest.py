"""`pytest benchmarks/`: the measured limits, the tables at the end, the record, and the gate."""

from __future__ import annotations

import functools
import gc
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import gate
import history
import measure
import pytest
import torch
from subjects import random_perceptual_weights

from unite_fast.errors import UserError
from unite_fast.train import keep_pages

RESULTS = pytest.StashKey[list]()
INPUTS = pytest.StashKey[list]()
BANDWIDTH = pytest.StashKey[float]()
BASELINE = pytest.StashKey[dict]()
VERDICTS = pytest.StashKey[list]()
DESELECTED = pytest.StashKey[int]()
INTERRUPTED = pytest.StashKey[str]()
COMPLETE = pytest.StashKey[bool]()
SOURCE = pytest.StashKey[dict]()
RAN = pytest.StashKey[int]()
NODES = pytest.StashKey[dict]()
FILES = frozenset(Path(__file__).resolve().parent.glob("test_*.py"))


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write the results to benchmarks/records/")
    parser.addoption("--gate", action="store_true", help="compare ratios with the baseline of this class of device")
    parser.addoption("--compile", action="store_true", help="torch.compile as a rival of the step on a CPU, too")


def pytest_configure(config):
    config.stash[RESULTS] = []
    config.stash[INPUTS] = []
    config.stash[NODES] = {}
    # A command's time limit ends it by SIGTERM. As after Ctrl-C, what was measured by then is told and recorded.
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    config.add_cleanup(functools.partial(signal.signal, signal.SIGTERM, former))
    # Now, before the code is imported: files may change and commits be made while it is measured.
    config.stash[SOURCE] = measure.source()
    config.stash[DESELECTED] = config.stash[RAN] = 0
    keep_pages()  # as training does, for the rivals, too
    if measure.DEVICE == "cpu":
        # Ratios on one core: with more, what others do on a shared machine decides how long threads wait.
        torch.set_num_threads(1)
    # What xdist's -n sets, too; without it there is no such option.
    if (config.getoption("gate") or config.getoption("record")) and config.getoption("dist", "no") != "no":
        raise pytest.UsageError("--gate and --record time one benchmark at a time, in one process: run them without -n")
    if config.getoption("gate"):
        try:
            config.stash[BASELINE] = gate.read_baseline(measure.device_class())
        except UserError as error:
            raise pytest.UsageError(str(error)) from None


def pytest_deselected(items):
    if items:
        items[0].config.stash[DESELECTED] += len(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    stash = item.config.stash
    before = len(stash[RESULTS])
    done = yield
    stash[RAN] += 1
    stash[NODES].update(dict.fromkeys(gate.measured(stash[RESULTS][before:]), item.nodeid))
    return done


def _filtered(session) -> bool:
    """Whether benchmarks were left out on purpose: by -k, -m and their like, or since nodes or files were chosen."""
    chosen = any("::" in argument for argument in session.config.args)
    files = {item.path.resolve() for item in session.items}
    return chosen or session.config.stash[DESELECTED] > 0 or not files >= FILES


@pytest.fixture(scope="session")
def bandwidth(request):
    """Copy bandwidth of the device, bytes a second."""
    request.config.stash[BANDWIDTH] = measured = measure.copy_bandwidth()
    return measured


@pytest.fixture(scope="session")
def matmul_rate():
    """Operations a second of a large matrix product."""
    return measure.matmul_rate()


@pytest.fixture(scope="session")
def perceptual_weights(tmp_path_factory):
    """Paths of random weights for LPIPS, by configuration key."""
    return random_perceptual_weights(tmp_path_factory.mktemp("lpips"))


@pytest.fixture
def results(request):
    """The list that every benchmark appends its result to."""
    return request.config.stash[RESULTS]


@pytest.fixture
def inputs(request):
    """The same for the benchmarks of the input."""
    return request.config.stash[INPUTS]


def _optional(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


def pytest_terminal_summary(terminalreporter, config):
    found, inputs = config.stash[RESULTS], config.stash[INPUTS]
    bandwidth = config.stash.get(BANDWIDTH, None)
    write = terminalreporter.write_line
    if found:
        _write_operators(write, found, bandwidth)
    if inputs:
        _write_inputs(write, inputs)
    try:
        if (found or inputs) and config.getoption("record"):
            _write_record(write, config)
    finally:  # the verdict is told whatever becomes of the files
        if config.getoption("gate"):
            _write_verdicts(write, config)


def _write_record(write, config):
    complete, bandwidth = config.stash[COMPLETE], config.stash.get(BANDWIDTH, None)
    rows = config.stash[RESULTS], config.stash[INPUTS]
    path = measure.write_record(config.stash[SOURCE], bandwidth, *rows, complete)
    write(f"recorded in {path}" + ("" if complete else ", which no baseline takes: not all benchmarks ran well"))
    try:
        write(f"history drawn in {history.draw(path.parent)}")
    except UserError as error:
        write(f"history not drawn: {error}")


def _write_verdicts(write, config):
    verdicts = config.stash[VERDICTS]
    write("")
    for line in [*gate.table(verdicts), gate.conclusion(verdicts, config.stash.get(INTERRUPTED, None))]:
        write(line)


def _write_inputs(write, inputs):
    write("")
    # In some processes Pillow is two to three times as slow as in others, for their whole life: the best one counts.
    rival = max(entry["pillow_images_per_second_a_core"] for entry in inputs)
    write(
        f"{measure.environment()['device']}, {inputs[0]['cores']} cores: photographs of about 500×375, ADM's crop to "
        f"{inputs[0]['size']}; a plain Pillow loop: {rival:.0f} images/s per core (the best of {len(inputs)} processes)"
    )
    write(
        f"{'':20} {'images/s per core':>17} {'± %':>5} {'over Pillow':>12} {'images/s':>9} {'start s':>8} "
        f"{'resume s':>9} {'MiB':>6} {'data_wait':>10}"
    )
    for entry in inputs:
        rate = entry["images_per_second_a_core"]
        write(
            f"{entry['loader']:20} {rate:17.0f} {entry['spread']:5.0%} {rate / rival:11.2f}x "
            f"{entry['images_per_second']:9.0f} {entry['start_seconds']:8.2f} {entry['resume_seconds']:9.2f} "
            f"{entry['peak_mib']:6.0f} {_optional(entry.get('data_wait'), '10.1%'):>10}"
        )


def _write_operators(write, found, bandwidth):
    where = measure.environment()
    write("")
    copies = "" if bandwidth is None else f": copies {bandwidth / 1e9:.0f} GB/s"
    write(f"{where['device']}, torch {where['torch']}{copies}")
    operators = [result for result in found if "operator" in result]
    rivals = list(dict.fromkeys(rival for result in operators for rival in result["times_faster_than"]))
    if operators:
        write(f"{'':62} {'µs':>9} {'±':>8} {'GB/s':>7} {'floor':>6} " + " ".join(f"{rival:>8}" for rival in rivals))
    for result in operators:
        ours = result.get("processor_seconds", result["seconds"])["ours"]  # the clock of the columns beside it
        label = f"{result['operator']} {result['direction']} {result['shape']} {result['dtype']}"
        ratios = (result["times_faster_than"].get(rival) for rival in rivals)
        write(
            f"{label:62} {ours['median'] * 1e6:9.1f} {(ours['high'] - ours['low']) / 2e-6:8.1f} "
            f"{_optional(result.get('gb_per_second'), '7.0f'):>7} {_optional(result.get('share_of_floor'), '6.0%'):>6} "
            + " ".join(f"{_optional(ratio, '7.2f')}x" if ratio else f"{'-':>8}" for ratio in ratios)
        )
    work = [result for result in found if "work" in result]
    if work:
        write(f"{'':62} {'s':>9} {'±':>8} {'images/s':>10}  times faster than")
    for result in work:
        ours = result["seconds"]["ours"]
        rivals = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in result["times_faster_than"].items())
        write(
            f"{result['work']:62} {ours['median']:9.3f} {(ours['high'] - ours['low']) / 2:8.3f} "
            f"{result['images_per_second']:10.1f}  {rivals}"
        )
    for result in operators:
        if "mfu" in result:
            write(
                f"{result['operator']}: {result['images_per_second']['ours']:.1f} images/s, "
                f"MFU {result['mfu']:.1%} of {result['mfu_peak']}, p95/median {result['p95_over_median']['ours']:.2f}"
            )
        elif "padding_share" in result:
            peaks = ", ".join(f"{who} {peak / 2**20:.0f} MiB" for who, peak in result["peak_bytes"].items())
            write(
                f"{result['operator']}: {result['molecules_per_second']['ours']:.1f} molecules/s, padding is "
                f"{result['padding_share']:.0%} of the rival's batch, peak {peaks}, "
                f"p95/median {result['p95_over_median']['ours']:.2f}"
            )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    config = session.config
    ran, collected = config.stash[RAN], len(session.items)
    if ran < collected or session.exitstatus == pytest.ExitCode.INTERRUPTED:
        config.stash[INTERRUPTED] = f"{ran} of {collected} ran"
    part = _filtered(session) or INTERRUPTED in config.stash
    config.stash[COMPLETE] = not part and session.exitstatus == pytest.ExitCode.OK
    if config.getoption("gate"):
        config.stash[VERDICTS] = verdicts = _verdicts(config, part)
        failed = not gate.passes(verdicts) or INTERRUPTED in config.stash
        if failed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _verdicts(config, part: bool) -> list[gate.Verdict]:
    found, baseline = gate.measured(config.stash[RESULTS]), config.stash[BASELINE]
    if INTERRUPTED not in config.stash:
        try:
            return gate.judge_again(found, baseline, functools.partial(_measured_again, config), part)
        except KeyboardInterrupt:
            config.stash[INTERRUPTED] = "what is slower was not measured again"
    return gate.judge(found, baseline, part)


def _measured_again(config, slower: set[str]) -> dict[str, gate.Ratio]:
    """The ratios of the benchmarks behind these entries, from a process of their own."""
    nodes = config.stash[NODES]
    chosen = list(dict.fromkeys(node for name, node in nodes.items() if name in slower))
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    # Behind the progress line, which has no end yet.
    terminal.write_line(f"\ngate: {len(slower)} slower, measured again in another process: {', '.join(chosen)}")
    if measure.DEVICE == "cuda":  # the other process needs the memory
        gc.collect()
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "pytest", *chosen, "-p", "no:cacheprovider", f"--benchmark-json={path}"]
        command += ["--compile"] if config.getoption("compile") else []
        ran = subprocess.run(command, cwd=config.rootpath, capture_output=True, text=True)
        written = path.read_text(encoding="utf-8") if path.is_file() else ""
    if ran.returncode:
        terminal.write_line(f"gate: that process failed:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    return gate.measured([entry["extra_info"] for entry in json.loads(written)["benchmarks"]]) if written else {}

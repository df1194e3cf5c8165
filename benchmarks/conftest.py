"""`pytest benchmarks/`: the measured floor, the table at the end, and the record."""

from __future__ import annotations

import measure
import pytest

RESULTS = pytest.StashKey[list]()
INPUTS = pytest.StashKey[list]()
BANDWIDTH = pytest.StashKey[float]()


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write the results to benchmarks/records/")


def pytest_configure(config):
    config.stash[RESULTS] = []
    config.stash[INPUTS] = []


@pytest.fixture(scope="session")
def bandwidth(request):
    """Copy bandwidth of the device, bytes a second."""
    request.config.stash[BANDWIDTH] = measured = measure.copy_bandwidth()
    return measured


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
    if (found or inputs) and config.getoption("--record"):
        write(f"recorded in {measure.write_record(bandwidth, found, inputs)}")


def _write_inputs(write, inputs):
    write("")
    # In some processes Pillow is two to three times as slow as in others, for their whole life: the best one counts.
    rival = max(entry["pillow_images_per_second_a_core"] for entry in inputs)
    write(
        f"{measure.environment()['device']}, {inputs[0]['cores']} cores: photographs of about 500×375, ADM's crop to "
        f"{inputs[0]['size']}; a plain Pillow loop: {rival:.0f} images/s a core (the best of {len(inputs)} processes)"
    )
    write(
        f"{'':20} {'images/s a core':>16} {'± %':>5} {'over Pillow':>12} {'images/s':>9} {'start s':>8} "
        f"{'resume s':>9} {'MiB':>6} {'data_wait':>10}"
    )
    for entry in inputs:
        rate = entry["images_per_second_a_core"]
        write(
            f"{entry['loader']:20} {rate:16.0f} {entry['spread']:5.0%} {rate / rival:11.2f}x "
            f"{entry['images_per_second']:9.0f} {entry['start_seconds']:8.2f} {entry['resume_seconds']:9.2f} "
            f"{entry['peak_mib']:6.0f} {_optional(entry.get('data_wait'), '10.1%'):>10}"
        )


def _write_operators(write, found, bandwidth):
    where = measure.environment()
    write("")
    copies = "" if bandwidth is None else f": copies {bandwidth / 1e9:.0f} GB/s"
    write(f"{where['device']}, torch {where['torch']}{copies}")
    operators = [result for result in found if "operator" in result]
    if operators:
        write(f"{'':62} {'µs':>9} {'±':>8} {'GB/s':>7} {'floor':>6} {'eager':>7} {'compile':>7}")
    for result in operators:
        ours = result["seconds"]["ours"]
        label = f"{result['operator']} {result['direction']} {result['shape']} {result['dtype']}"
        write(
            f"{label:62} {ours['median'] * 1e6:9.1f} {(ours['high'] - ours['low']) / 2e-6:8.1f} "
            f"{_optional(result['gb_per_second'], '7.0f'):>7} {_optional(result['share_of_floor'], '6.0%'):>6} "
            f"{result['times_faster_than']['eager']:6.2f}x "
            f"{_optional(result['times_faster_than'].get('compile'), '6.2f'):>6}{'x' if where['cuda'] else ' '}"
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

"""`unite-fast profile` on small runs, and the live numbers of a training run."""

from __future__ import annotations

import gc
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from cli_toy import mistake, run
from kernel_testing import on_backend
from runs import config, config_file, image_tree

import unite_kernels
from unite_fast import doctor
from unite_fast.analysis import profiling
from unite_fast.analysis.allocation import peak_allocated
from unite_fast.analysis.counts import image_operations
from unite_fast.analysis.extent import Extent
from unite_fast.analysis.parts import Op, Part, Rates
from unite_fast.analysis.profiled_step import ProfiledStep, StepMemory, seconds_of_collectives_alone
from unite_fast.analysis.profiling import Measured, Row, measure_rates, times
from unite_fast.cli.profile import _print, _share
from unite_fast.config import Config
from unite_fast.engine.batch import Batch
from unite_fast.engine.meter import Meter
from unite_fast.engine.monitor import ProgressLine
from unite_fast.engine.world import World
from unite_fast.errors import UserError
from unite_fast.modality import modality_of
from unite_fast.model.unite import Unite
from unite_fast.objective.two_pass import StepLosses

CPU = torch.device("cpu")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A wide terminal, and rates of less: what they are does not matter here."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(profiling, "COPY_BYTES", {"cpu": 2**24})
    monkeypatch.setattr(profiling, "REPEATS", 3)


def test_profile_accounts_for_the_whole_step(tmp_path, capsys):
    image_tree(tmp_path / "train")
    path = config_file(tmp_path, train={"global_batch": 4, "accumulation": 2})
    trace = tmp_path / "traces" / "trace.json"
    assert run("profile", "--config", path, "--steps", "2", "--trace", trace, "--json") == 0
    numbers = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in numbers["parts"]}
    assert list(rows) == ["tokenize", "decode", "denoise", "update"]
    # Two micro-batches of two draws each, which auto takes in one pass.
    assert [rows[name]["calls"] for name in rows] == [2, 2, 2, 1]
    parts = sum(row["forward"] + row["backward"] for row in rows.values())
    rest = numbers["other_seconds"] + numbers["waiting_seconds"] + numbers["communication_seconds"]
    assert parts + rest == pytest.approx(numbers["step_seconds"])
    made = config(tmp_path)
    passes = sum(rows[name]["operations"] for name in ("tokenize", "decode", "denoise"))
    assert passes == 4 * image_operations(made.model, made.objective)
    assert numbers["mfu"] * numbers["step_seconds"] * numbers["matmul_operations_per_second"] == pytest.approx(passes)
    assert all(row["floor"] > 0 for row in rows.values()) and rows["decode"]["memory"] > 0
    memory = numbers["memory_bytes"]
    model = Unite(made.model)
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert (memory["weights"], memory["gradients"]) == (held, trained)
    assert memory["ema"] == trained < memory["optimizer"] < 2 * trained  # Muon keeps one momentum, AdamW two moments
    assert sum(memory.values()) - memory["peak"] < memory["peak"] and rows["update"]["memory"] > 0
    assert not (tmp_path / "runs").exists()
    events = json.loads(trace.read_text())["traceEvents"]
    assert {"step", "encoder", "decoder", "optimizer", "wait for data"} <= {event.get("name") for event in events}
    assert list(trace.parent.iterdir()) == [trace]


def test_profile_without_data_says_what_is_not_measured(tmp_path, capsys, monkeypatch):
    """And a step of one sample tells what a launch takes: not on a CPU, which computes meanwhile."""
    seen: list[ProfiledStep] = []
    traced = ProfiledStep.traced
    monkeypatch.setattr(ProfiledStep, "traced", lambda self, file: seen.append(self) or traced(self, file))
    path = config_file(tmp_path, train={"global_batch": 4, "accumulation": 2})
    trace = tmp_path / "trace.json"
    assert run("profile", "--config", path, "--steps", "1", "--micro-batch", "2", "--trace", trace) == 0
    printed = capsys.readouterr().out
    says = ("a step of 4 images", "waiting for data was not measured", "of floor", "plan --efficiency", "perfetto",
            "MiB of gradients", "MiB of averages", "code and libraries included")  # fmt: skip
    assert all(words in printed for words in says) and "launch takes" not in printed
    (step,) = seen
    before, weights = step.engine.step_count, [weight.clone() for _, weight in step.engine.model_state()]
    monkeypatch.setattr(profiling, "times", lambda call, device: [call() or 3e-3, call() or 2e-3, 9e-3])
    monkeypatch.setattr(profiling, "step_launches", lambda config, accumulation: 100 * accumulation)
    launch = profiling.launch_seconds(step, modality_of(step.config))
    assert launch == 3e-5 and step.engine.step_count == before + 2
    assert any(not torch.equal(a, b) for a, (_, b) in zip(weights, step.engine.model_state(), strict=True))
    none = StepMemory(0, 0, 0, 0, 0)
    made = Measured(Rates(1, 1), [], step=2.0, waiting=0.5, communication=0.25, memory=none, images=1, mfu=0.1)
    _print(replace(made, launch=launch), "toy", "cuda")
    assert "a kernel's launch takes the host 30.0 µs at most" in capsys.readouterr().out


def test_a_trace_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profiling, "measure_rates", None)
    options = ["profile", "--config", config_file(tmp_path), "--trace"]
    for file in ("/proc/trace.json", "/proc/absent/trace.json"):
        says = mistake(capsys, *options, file)
        assert says.startswith("cannot write the trace into /proc") and "--trace FILE" in says
    assert "is a directory" in mistake(capsys, *options, tmp_path)


def test_profile_explains_mistakes(tmp_path, capsys):
    path = config_file(tmp_path)
    options = ["--steps", "1", "--micro-batch", "1"]
    says = mistake(capsys, "profile", "--config", path, *options, "--set", "objective.lpips.weight=1",
                   "--set", f"objective.lpips.vgg={path}")  # fmt: skip
    assert "objective.lpips.linear is not set" in says
    assert "No such file" in mistake(capsys, "profile", "--config", tmp_path / "absent.json")


def test_a_profile_computes_with_the_kernels_that_the_run_names(tmp_path, monkeypatch):
    def rates(*_, **__):
        raise UserError(unite_kernels.get_backend())

    monkeypatch.setattr(profiling, "measure_rates", rates)
    for name in ("torch", "auto"):
        with on_backend("auto"), pytest.raises(UserError, match=f"^{name}$"):
            profiling.measure(config(tmp_path, train={"kernels": name}), World(0, 1, 0, CPU), steps=1)


def test_rates_are_of_random_numbers(monkeypatch):
    """Equal ones let a GPU clock higher than any network does."""
    seen = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append(a))
    monkeypatch.setattr(torch, "_scaled_mm", lambda a, b, *_, **__: seen.append(a.float()))
    measure_rates(CPU, torch.float32)
    profiling.fp8_rate(CPU)
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: seen.append(a))
    doctor._matmul_rate(torch.float32, cuda=False)
    assert len({id(a) for a in seen}) >= 3 and all(0.5 < a[:64, :64].std() < 1.5 for a in seen)


def test_rates_count_what_was_done(monkeypatch):
    """A multiply-add is two operations, and a copy reads its bytes and writes them."""
    monkeypatch.setattr(profiling, "times", lambda run, device: [4.0, 2.0, 3.0])
    rates = measure_rates(CPU, torch.float32)
    assert rates.matmul == 2 * profiling.MATMUL_SIDE["cpu"] ** 3 / 2
    assert rates.copy == 2 * profiling.COPY_BYTES["cpu"] / 2 and rates.fp8 is None
    assert profiling.fp8_rate(CPU) == rates.matmul


def test_memory_that_the_rates_were_measured_with_is_room_for_the_batch(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("let go"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append("free") or (2**36, 2**36))
    profiling._batch(config(tmp_path), World(0, 1, 0, torch.device("cuda")), None)
    assert asked == ["let go", "free"]


def test_what_is_measured():
    rates = measure_rates(CPU, torch.float32)
    assert rates.matmul > 1e8 and rates.copy > 1e7
    assert min(times(lambda: time.sleep(0.01), CPU)) >= 0.01
    held = []

    def run_twice() -> None:
        held.append(torch.empty(1000, 1000))
        temporary = torch.empty(500, 1000)
        del temporary
        held.append(torch.empty(100, 1000))

    assert peak_allocated(run_twice, CPU) == pytest.approx(6e6, rel=0.01)


def test_on_cuda_it_is_the_allocators_peak_above_what_was_there(monkeypatch):
    """A made-up allocator with 130 bytes in use, 30 of them garbage in a cycle, and an old peak of 900.

    Python may free garbage at any time: were it freed in the run, it would be taken off what the run holds.
    """
    now = {"held": 130, "peak": 900, "done": False}

    class Garbage:
        def __init__(self):
            self.itself = self

        def __del__(self):
            now["held"] -= 30

    def run_once() -> None:
        gc.collect()
        now.update(held=now["held"] + 20, peak=max(now["peak"], now["held"] + 50), done=False)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: now.update(done=True))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: now.update(peak=now["held"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: now["held"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: now["peak"] if now["done"] else 0)
    Garbage()
    assert peak_allocated(run_once, torch.device("cuda")) == 50


def test_what_no_part_explains_is_other():
    none = StepMemory(0, 0, 0, 0, 0)
    row = Row("decode", 2, 0.2, 0.4, 0.3, 10, 0)
    made = Measured(Rates(1, 1), [row], step=2.0, waiting=0.5, communication=0.25, memory=none, images=1, mfu=0.1)
    assert made.other == pytest.approx(0.65) and made.efficiency == pytest.approx(0.3 / 1.25)
    part = Part("update", (Op("EMA", forward_bytes=8),), False, 4)
    assert part.floor(1, Rates(1, 2)) == (4, 0)


def test_what_the_table_says(capsys):
    memory = StepMemory(weights=2**20, gradients=2 * 2**20, optimizer=3 * 2**20, ema=4 * 2**20, peak=50 * 2**20)
    row = Row("decode", 2, 0.2, 0.4, 0.3, 10**9, 7 * 2**20)
    _print(Measured(Rates(1, 1), [row], 2.0, 0.5, 0.25, memory, images=1, mfu=0.1), "toy", "cuda")
    printed = capsys.readouterr().out
    cells = [line.split() for line in printed.splitlines()]
    assert ["decode", "2", "200", "400", "30.0%", "300", "50%", "1", "7"] in cells
    held = "1 MiB of weights, 2 MiB of gradients, 3 MiB of optimizer state, 4 MiB of averages"
    assert held in printed and "peak 50 MiB, the step's" in printed


class Event:
    """Of a profiler."""

    def __init__(self, name, start, end, *, cuda=False, annotation=False):
        self.name, self.is_user_annotation = name, annotation
        self.time_range = SimpleNamespace(start=start * 1e6, end=end * 1e6)
        self.device_type = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU


def test_communication_counts_where_nothing_is_computed():
    reductions = [Event("gloo:all_reduce", 1, 4), Event("gloo:all_reduce", 3, 6), Event("gloo:all_gather", 10, 11)]
    computing = [Event("aten::mm", 0, 3), Event("aten::add", 2, 4.5)]
    others = [Event("step", 0, 20), Event("c10d::allreduce_", 5, 6)]
    assert seconds_of_collectives_alone(reductions) == pytest.approx(6)
    assert seconds_of_collectives_alone(reductions + computing + others) == pytest.approx(1.5 + 1)
    on_gpu = [
        Event("ncclDevKernel_ReduceScatter", 1, 4, cuda=True), Event("nccl:_reduce_scatter", 1, 9, cuda=True),
        Event("gemm", 0, 2, cuda=True), Event("Memcpy DtoD", 3, 5, cuda=True),
        Event("step", 0, 20, cuda=True, annotation=True),
    ]  # fmt: skip
    assert seconds_of_collectives_alone(on_gpu) == pytest.approx(1)
    # A range on the device's timeline counts nothing once more; a collective that outlasts the update counts in part.
    updates = [Event("optimizer", 2.5, 3.5, cuda=True, annotation=True), Event("optimizer", 3.5, 5.5)]
    assert seconds_of_collectives_alone(reductions + updates, "optimizer") == pytest.approx(2)
    assert seconds_of_collectives_alone(reductions + computing + updates, "optimizer") == pytest.approx(1)
    assert seconds_of_collectives_alone(reductions + updates) == pytest.approx(6)


def test_collectives_of_the_update_count_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ProfiledStep, "timed", lambda self: (20.0, 0.0, 6.0))
    monkeypatch.setattr(ProfiledStep, "traced", lambda self, path: (5.0, 4.0))
    path = config_file(tmp_path)
    assert run("profile", "--config", path, "--steps", "1", "--micro-batch", "1", "--json") == 0
    numbers = json.loads(capsys.readouterr().out)
    *parts, update = numbers["parts"]
    assert (update["forward"], numbers["communication_seconds"]) == (2, 5)
    passes = sum(row["forward"] + row["backward"] for row in parts)
    assert numbers["other_seconds"] == pytest.approx(20 - 2 - 5 - passes)


def losses() -> StepLosses:
    one = torch.tensor(1.0)
    return StepLosses(one, {"l1": one}, one, torch.randn(4, 2, 3), None)


def read(*, peak: float | None, ranks: int = 1) -> dict:
    def operations(extent):
        return 1000 * extent.samples + 10 * extent.tokens + extent.pairs

    meter = Meter(World(0, ranks, 0, CPU), Batch(4, 1, 4 * ranks), 10.0, operations=operations, peak=peak)
    meter.begin()
    for lengths in ([1, 2], [3, 4]):  # two micro-batches
        meter.count(Extent.of(torch.tensor(lengths)))
    meter.add(losses(), torch.tensor(1.0))
    time.sleep(0.01)
    return meter.read(1, 4 * ranks, 0.1)


def test_mfu_is_the_mean_over_ranks_that_compute_differently(monkeypatch):
    def all_reduce(values: torch.Tensor) -> None:
        values.mul_(2)  # another rank with the same numbers
        values[-1] += 1000  # but more operations

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    record = read(peak=1e9, ranks=2)
    assert record["mfu"] == pytest.approx(record["images_per_second"] / 8 * (4130 + 500) / 1e9)


def test_records_hold_mfu_where_the_peak_is_known_and_memory(capsys):
    record = read(peak=1e9)
    # Four samples, ten tokens, 1 + 4 + 9 + 16 pairs.
    assert record["mfu"] == pytest.approx(record["images_per_second"] / 4 * (4000 + 100 + 30) / 1e9)
    assert 0.01 < record["memory_gb"] < 1000  # this very process
    line = ProgressLine(1, 0, enabled=True, seconds=0.0)
    line.advance(1, record | {"mfu": 0.437, "data_wait": 0.02, "memory_gb": 61.24})
    printed = capsys.readouterr().err
    assert "MFU 43.7%" in printed and "wait 2%" in printed and "61.2 GB" in printed
    unknown = read(peak=None)
    assert "mfu" not in unknown
    line.advance(1, unknown)
    assert "MFU" not in capsys.readouterr().err


def test_a_record_is_of_its_own_steps_alone_and_pauses_are_not_in_it(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    meter = Meter(World(0, 1, 0, CPU), Batch(4, 2, 8), 10.0)

    def step(loss: float) -> None:
        """Two seconds, a quarter of them spent waiting for data."""
        value = torch.tensor(loss)
        meter.begin()
        with meter.waiting():
            clock[0] += 0.5
        with meter.paused():
            clock[0] += 100.0
        clock[0] += 1.5
        meter.add(StepLosses(value, {"l1": 2 * value}, 3 * value, torch.randn(4, 2, 3), None), 4 * value)

    with meter.paused():
        clock[0] += 50.0
    numbers = ("loss", "loss_l1", "loss_flow", "grad_norm", "epoch", "images", "images_per_second", "data_wait")
    step(1.0), step(3.0)
    record = meter.read(20, 160, 0.1)
    assert [record[name] for name in numbers] == pytest.approx([2, 4, 6, 8, 2, 160, 4, 0.25])
    step(5.0)
    record = meter.read(21, 168, 0.1)
    assert [record[name] for name in numbers] == pytest.approx([5, 10, 15, 20, 2.1, 168, 4, 0.25])
    assert meter.seconds == pytest.approx(6)


def test_a_share_keeps_to_six_characters():
    shares = [-1.018, -0.414, -0.002, 0.0, 0.922, 0.9994, 0.9996, 1.0, 12.34]
    assert [_share(share) for share in shares] == [
        "-102%", "-41.4%", "-0.2%", "0.0%", "92.2%", "99.9%", "100%", "100%", "1234%"
    ]  # fmt: skip


def test_ranks_profile_the_batch_that_the_fullest_device_has_room_for(monkeypatch):
    gpu = torch.device("cuda")
    settings = Config.load(CONFIGS / "b_h100.json")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def sizes(free: list[int]) -> set[tuple[int, int]]:
        monkeypatch.setattr(World, "collect", lambda self, value: free)
        found = set()
        for rank, here in enumerate(free):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, here=here: (here, 80 * 2**30))
            batch, resolved = profiling._batch(settings, World(rank, len(free), rank, gpu), None)
            found.add((batch.micro_batch, resolved.objective.chunk))
        return found

    (alike,), (smaller,) = sizes([78 * 2**30, 78 * 2**30]), sizes([78 * 2**30, 30 * 2**30])
    assert smaller < alike

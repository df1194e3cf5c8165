"""doctor: a row for every acceleration, whatever state its package is in."""

import importlib.abc
import json
import sys
from types import SimpleNamespace

import pytest
from cli_toy import run

from unite_fast import doctor
from unite_kernels import cpu

EXPECTED = {
    "PyTorch", "CUDA", "bfloat16", "Triton", "CPU operators", "C compiler", "FlashAttention", "DALI", "NVIDIA Apex",
    "DeepSpeed", "DeepSpeed ops", "torch.compile", "FP8",
}  # fmt: skip


def _findings(capsys):
    capsys.readouterr()
    assert run("doctor", "--json") == 0
    return {part["name"]: part for part in json.loads(capsys.readouterr().out)["parts"]}


def test_every_missing_part_has_a_cost_and_a_remedy(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    found = _findings(capsys)
    assert set(found) == EXPECTED
    assert found["PyTorch"]["active"]
    for part in found.values():
        assert part["detail"]
        assert part["active"] != bool(part["cost"] and part["remedy"])
    assert run("doctor") == 0
    table = capsys.readouterr().out
    assert all(name in table for name in EXPECTED)
    assert all((name in table.split("how to get it")[1]) for name, part in found.items() if not part["active"])


@pytest.mark.parametrize("wide", [0, 1])
def test_newton_schulz_is_named_where_it_is_compiled(monkeypatch, wide):
    monkeypatch.setattr(cpu, "LIBRARY", SimpleNamespace(unite_multiplies=lambda: wide))
    found = doctor._examine(next(part for part in doctor.PARTS if part.name == "CPU operators"))
    assert found.active and ("Newton-Schulz" in found.detail) == bool(wide)


def test_the_rate_of_products_is_that_of_the_models_library(monkeypatch):
    from unite_fast.model import linear

    calls, product = [], linear.linear_product
    monkeypatch.setattr(linear, "linear_product", lambda a, b: (calls.append(a.dtype), product(a, b))[1])
    doctor._examine(next(part for part in doctor.PARTS if part.name == "bfloat16"))
    assert {str(dtype) for dtype in calls} == {"torch.float32", "torch.bfloat16"}


class Refuse(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes packages look installed and raise when they are imported."""

    def __init__(self, error, *names):
        self.error, self.names = error, names

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def exec_module(self, module):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [ImportError("undefined symbol: _ZN3c10"), OSError("libcudart.so.12: cannot open"), RuntimeError("no driver"),
     SystemExit(1), SyntaxError("old Python 2 code")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_broken_packages_are_rows_not_crashes(error, capsys, monkeypatch):
    names = ("triton", "nvidia", "apex", "amp_C", "deepspeed", "flash_attn", "flash_attn_interface")
    for module in [name for name in sys.modules if name.split(".")[0] in names]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Refuse(error, *names), *sys.meta_path])
    found = _findings(capsys)
    for name in ("Triton", "DALI", "DeepSpeed", "DeepSpeed ops"):
        assert not found[name]["active"]
        assert found[name]["detail"].startswith(f"broken: {type(error).__name__}")
        assert found[name]["remedy"]


def test_absent_packages_are_missing(capsys, monkeypatch):
    for name in ("triton", "deepspeed", "nvidia", "nvidia.dali", "apex"):
        monkeypatch.setitem(sys.modules, name, None)
    found = _findings(capsys)
    for name in ("Triton", "DALI", "NVIDIA Apex", "DeepSpeed"):
        assert (found[name]["active"], found[name]["detail"]) == (False, "not installed")


def test_the_other_apex_is_told_apart(capsys, monkeypatch, tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise AssertionError('never imported')")
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    apex = _findings(capsys)["NVIDIA Apex"]
    assert not apex["active"]
    assert "not NVIDIA's" in apex["detail"]
    assert "github.com/NVIDIA/apex" in apex["remedy"]


def test_built_deepspeed_ops_are_found(monkeypatch, tmp_path):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    before = doctor._examine(next(part for part in doctor.PARTS if part.name == "DeepSpeed ops"))
    for name in ("deepspeed_shm_comm", "someone_elses"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.so").touch()
    after = doctor._examine(next(part for part in doctor.PARTS if part.name == "DeepSpeed ops"))
    assert "deepspeed_shm_comm" not in before.detail
    assert after.active and "deepspeed_shm_comm (cached)" in after.detail and "someone_elses" not in after.detail


def test_old_torch_is_not_enough(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "__version__", "2.4.1+cu121")
    finding = doctor._examine(next(part for part in doctor.PARTS if part.name == "PyTorch"))
    assert not finding.active and "2.4.1+cu121 is older than 2.11" in finding.detail


def test_whether_torch_compile_can_work_is_told(monkeypatch):
    part = next(part for part in doctor.PARTS if part.name == "torch.compile")
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(doctor.Path(__file__).parent)})
    assert "Python's headers are missing" in doctor._examine(part).detail
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding = doctor._examine(part)
    assert not finding.active and "no C++ compiler no-such-compiler" in finding.detail and "g++" in finding.remedy


def test_compiler_follows_the_environment(monkeypatch, tmp_path):
    part = next(part for part in doctor.PARTS if part.name == "C compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert not doctor._examine(part).active
    compiler = tmp_path / "mycc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", "mycc")
    assert doctor._examine(part).detail == str(compiler)

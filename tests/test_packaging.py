"""The source distribution holds all that wheel and C library are built from; the command beside the kernels alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ("CMakeLists.txt", "MANIFEST.in", "Makefile", "README.md", "build.toml", "pyproject.toml", "setup.py")
FOLDERS = ("benchmarks", "configs", "docs", "examples", "kernels", "tests", "torch-ext", "unite_fast")


def test_the_source_distribution_is_the_repository(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        made = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", ".*")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=made)
    (copy / "kernels" / "_cpu.so").touch()
    # The folder kernels is not the package of that name, which setuptools calls where it is installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "-d", tmp_path]
    command += ["build_py", "--build-lib", tmp_path / "wheel"]
    subprocess.run([str(part) for part in command], cwd=copy, env=environment, check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as packed:
        found = {name.partition("/")[2] for name in packed.getnames()}
    wanted = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()} - {"kernels/_cpu.so"}
    assert not wanted - found
    assert not [name for name in found if name.endswith(".so")]
    # Without it type checkers leave an installed package's annotations aside.
    assert (tmp_path / "wheel" / "unite_kernels" / "py.typed").is_file()


def test_the_command_says_what_an_installation_of_the_kernels_lacks():
    code = "import runpy, sys; sys.modules['typer'] = None; runpy.run_module('unite_fast', run_name='__main__')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: the package typer is not installed; unite-fast needs what comes with pip ")
    assert found.stderr.count("\n") == 1
    # The same function is the command that setup.py installs.
    assert "unite-fast=unite_fast.__main__:main" in (ROOT / "setup.py").read_text()

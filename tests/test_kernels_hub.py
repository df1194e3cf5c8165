"""unite_kernels as Hugging Face's kernels library takes it: build.toml, and loading by path under another name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
STAGE = ROOT / "kernels" / "aot" / "stage_hub.py"

pytest.importorskip("huggingface_hub", reason="Hugging Face's kernels is not installed")

# The repository's own folder kernels/ would shadow the library, so each runs elsewhere and with neither the current
# folder nor PYTHONPATH's on the path. With unite_kernels out of reach, an absolute import inside the package fails.
LOAD = """
import json, sys
from pathlib import Path
sys.modules["unite_kernels"] = None
import torch
from kernels import get_local_kernel
from kernels._rust import Build
build = Build.open(sys.argv[1])
loaded = [get_local_kernel(Path(path), backend="cpu") for path in sys.argv[2:]]
x = torch.randn(3, 8, requires_grad=True)
for module in loaded:
    torch.testing.assert_close(module.swiglu(x), torch.nn.functional.silu(x[:, :4]) * x[:, 4:])
    module.rms_norm_modulate(x[None], torch.ones(8), torch.zeros(1, 8), torch.zeros(1, 8)).sum().backward()
print(json.dumps({
    "backends": [str(b).lower() for b in build.general.backends],
    "names": [module.__name__ for module in loaded],
    "operators": [hasattr(getattr(torch.ops, module.__name__), "swiglu") for module in loaded],
}))
"""


def _run(*arguments, folder):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_loads_two_versions_side_by_side(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        _run(STAGE, "--output", folder, folder=tmp_path)
    for variant in (second / "build").iterdir():  # as another version of the source would be staged
        metadata = json.loads((variant / "metadata.json").read_text())
        (variant / "metadata.json").write_text(json.dumps(metadata | {"id": metadata["id"] + "_next", "version": 2}))
    found = json.loads(_run("-c", LOAD, ROOT, first, second, folder=tmp_path).splitlines()[-1])
    assert found["backends"] == ["cpu", "cuda"] and found["operators"] == [True, True]
    assert len(set(found["names"])) == 2 and all(name.startswith("_unite_kernels_cpu_") for name in found["names"])


def test_staging_again_replaces_what_was_there(tmp_path):
    _run(STAGE, "--output", tmp_path / "out", folder=tmp_path)
    stray = tmp_path / "out" / "build" / "torch-cpu" / "stray.py"
    stray.touch()
    _run(STAGE, "--output", tmp_path / "out", folder=tmp_path)
    assert not stray.exists() and [path.name for path in (tmp_path / "out").iterdir()] == ["build"]
    expected = {path.name for path in (ROOT / "kernels").glob("*.py")} | {"metadata.json"}
    for backend in ("cpu", "cuda"):
        assert {path.name for path in (tmp_path / "out" / "build" / f"torch-{backend}").iterdir()} == expected


def test_the_id_tells_sources_and_backends_apart(tmp_path, monkeypatch):
    stage_hub = load_script(STAGE)
    monkeypatch.setattr(stage_hub, "ROOT", tmp_path)
    modules = tmp_path / "torch-ext" / "a_kernel"
    modules.mkdir(parents=True)
    general = 'name = "a-kernel"\nversion = 3\nlicense = "other"\nbackends = ["cpu", "cuda"]\n'
    (tmp_path / "build.toml").write_text(f"[general]\n{general}")
    ids = []
    for text in ("1", "1", "2"):
        (modules / "__init__.py").write_text(text)
        stage_hub.stage(tmp_path / "out")
        for backend in ("cpu", "cuda"):
            metadata = json.loads((tmp_path / "out" / "build" / f"torch-{backend}" / "metadata.json").read_text())
            assert metadata["backend"] == {"type": backend} and metadata["version"] == 3
            assert metadata["id"].startswith(f"_a_kernel_{backend}_")
            ids.append(metadata["id"])
    assert ids[:2] == ids[2:4] and len(set(ids)) == 4

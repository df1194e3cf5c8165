"""Lay unite_kernels out as Hugging Face's kernels library loads it, from build.toml and torch-ext/.

`python kernels/aot/stage_hub.py --output DIR` writes DIR/build/torch-<backend>/ for every backend of build.toml: the
package's modules and metadata.json. `kernels.get_local_kernel(DIR)` then loads it, and DIR is what a kernel
repository on the Hub holds. The package is pure Python, so nothing is compiled.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def stage(output: Path) -> None:
    """Write the layout; what an earlier call left in `output`/build is replaced."""
    general = tomllib.loads((ROOT / "build.toml").read_text(encoding="utf-8"))["general"]
    name = general["name"].replace("-", "_")
    modules = {path.name: path.read_bytes() for path in sorted((ROOT / "torch-ext" / name).glob("*.py"))}
    # Two versions live in one process if their ids differ, and two builds of one source should not.
    digest = hashlib.sha256(b"".join(part for item in modules.items() for part in (item[0].encode(), item[1])))
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as temporary:
        unfinished = Path(temporary) / "build"
        for backend in general["backends"]:
            variant = unfinished / f"torch-{backend}"
            variant.mkdir(parents=True)
            for file, content in modules.items():
                (variant / file).write_bytes(content)
            metadata = {
                "name": general["name"],
                "id": f"_{name}_{backend}_{digest.hexdigest()[:8]}",
                "version": general["version"],
                "license": general["license"],
                "python-depends": [],
                "backend": {"type": backend},
            }
            (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        if (output / "build").exists():
            os.replace(output / "build", Path(temporary) / "former")
        os.replace(unfinished, output / "build")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder that gets build/")
    stage(parser.parse_args().output)


if __name__ == "__main__":
    main()

"""Packages: `unite_fast` (the trainer) and `unite_kernels` (the folder kernels/, usable on its own)."""

import sys
import zlib
from pathlib import Path

from setuptools import Extension, find_packages, setup

# The kernels need torch and Triton and nothing else; everything the trainer needs is an extra.
KERNELS = [
    "torch>=2.11,<=2.13.0",
    "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'",
]
TRAIN = [
    "numpy>=1.26",
    "pillow>=10.3",
    "pydantic>=2.7",
    "typer>=0.12",
    "rich>=13",
    "safetensors>=0.4.3",
    "tensorboard>=2.16",
    "torchdiffeq>=0.2.4",
    "torchmetrics>=1.4",
    "matplotlib>=3.8",
    "scikit-learn>=1.4",
    "scipy>=1.11",
    "jinja2>=3.1",
]
DEEPSPEED = ["deepspeed>=0.19,<0.20", "ninja"]
DALI = ["nvidia-dali-cuda130>=2.4; platform_system == 'Linux' and platform_machine == 'x86_64'"]
MOLECULES = ["rdkit>=2025.3", "pebble>=5.1"]
PARQUET = ["pyarrow>=17"]
TEST = [
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-benchmark>=4",
    "pytest-xdist>=3.8",
    "webdataset>=0.2.90",
    "selenium>=4.20",
    "kernels>=0.17,<0.18; platform_system == 'Linux'",  # Hugging Face's loader, which tests load unite_kernels with
]

# Plain C behind ctypes, no module: what it has of OpenMP is left to the runtime that torch has loaded (kernels/cpu.c).
# Without a C compiler it is left out, and plain PyTorch serves.
CPU = ["kernels/cpu.c", "kernels/cpu_rows.h", "kernels/cpu_products.h"]
SOURCES = zlib.crc32(b"".join((Path(__file__).parent / file).read_bytes() for file in CPU))
OPENMP = "-fopenmp" if sys.platform == "linux" else "-fopenmp-simd"
cpu = Extension(
    "unite_kernels._cpu",
    sources=CPU[:1],
    depends=CPU[1:],
    define_macros=[("UNITE_SOURCES", f"{SOURCES}u")],
    extra_compile_args=["-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", OPENMP],
    optional=True,
)

setup(
    name="unite_fast",
    version="0.1.0",
    description="One-stage training of image tokenizer and latent generator (UNITE), built for speed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=[*find_packages(include=["unite_fast", "unite_fast.*"]), "unite_kernels"],
    package_dir={"unite_kernels": "kernels"},
    ext_modules=[cpu],
    package_data={
        "unite_kernels": ["py.typed"],  # type checkers read the kernels' annotations
        "unite_fast.report": ["page.*"],
        "unite_fast.pictures_molecules": ["page.html"],
    },
    install_requires=KERNELS,
    extras_require={
        "train": TRAIN,
        "deepspeed": [*TRAIN, *DEEPSPEED],
        "dali": [*TRAIN, *DALI],
        "flash": ["flash-attn>=2.6"],
        "molecules": [*TRAIN, *MOLECULES],
        "parquet": PARQUET,
        "wandb": ["wandb>=0.19"],
        "test": [*TRAIN, *DEEPSPEED, *DALI, *MOLECULES, *PARQUET, *TEST],
    },
    entry_points={"console_scripts": ["unite-fast=unite_fast.__main__:main"]},
)

"""Known GPUs and links: what their makers state, and what was measured.

Operations are dense with float32 sums, bfloat16 unless FP8 is said; bandwidths are bytes a second, those of links in
one direction.
"""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

import torch

from unite_fast.analysis.parts import Rates
from unite_fast.errors import UserError

GIB = 2**30
# One device has been measured, an NVIDIA H200 (SXM): large bfloat16 products reach 790 of the stated 989 TFLOP/s, a
# large copy 4.3 of 4.8 TB/s. Others are assumed to reach the same shares of what their datasheets state, and so are
# products in FP8, which have been measured nowhere.
MATMUL_SHARE, COPY_SHARE = 790 / 989, 4.3 / 4.8


class Gpu(NamedTuple):
    """One GPU.

    Attributes:
        name: on the command line.
        torch_name: what torch.cuda.get_device_name holds for it, as whole words.
        memory: bytes.
        matmul, memory_bandwidth: stated peaks.
        fp8: stated peak of products in FP8; None where it has none.
        link: to its neighbours in the node, a direction: NVLink, or PCIe where there is none.
        measured: whether `rates` come from a measurement of this very device.
    """

    name: str
    torch_name: str
    memory: int
    matmul: float
    fp8: float | None
    memory_bandwidth: float
    link: float
    measured: bool = False

    @property
    def rates(self) -> Rates:
        """What large products and copies reach: measured on the H200, the same shares of the peak elsewhere."""
        fp8 = None if self.fp8 is None else self.fp8 * MATMUL_SHARE
        return Rates(self.matmul * MATMUL_SHARE, self.memory_bandwidth * COPY_SHARE, fp8)


# From NVIDIA's datasheets of each product. More specific torch names stand first: the first match counts.
GPUS = tuple(
    Gpu(
        name, torch_name, memory * GIB, matmul * 1e12, None if fp8 is None else fp8 * 1e12, bandwidth * 1e9, link * 1e9,
        name == "h200",
    )  # fmt: skip
    for name, torch_name, memory, matmul, fp8, bandwidth, link in (
        ("b200", "B200", 180, 2250, 4500, 8000, 900),
        ("h200", "H200", 141, 989, 1979, 4800, 450),
        ("h100-pcie", "H100 PCIe", 80, 756, 1513, 2000, 64),
        ("h100-80", "H100", 80, 989, 1979, 3350, 450),
        ("a100-40", "A100-SXM4-40GB", 40, 312, None, 1555, 300),
        ("a100-40-pcie", "A100-PCIE-40GB", 40, 312, None, 1555, 32),
        ("a100-80", "A100", 80, 312, None, 2039, 300),
        ("l40s", "L40S", 48, 362, 733, 864, 32),
        ("rtx5090", "RTX 5090", 32, 209.5, 419, 1792, 64),
        ("rtx4090", "RTX 4090", 24, 165.2, 330.3, 1008, 32),
        ("rtx3090", "RTX 3090", 24, 71, None, 936, 32),
    )
)
# Beside a known name they make it another product, of another peak; MIG is a slice of one. GB200 and GH200 are words of
# their own.
OTHER_PRODUCT = re.compile(r"\b(Laptop|Ti|D|NVL|MIG)\b")


def find_gpu(name: str) -> Gpu:
    """The GPU of this name.

    Raises:
        UserError: none is called so; names the nearest.
    """
    names = [gpu.name for gpu in GPUS]
    if name.lower() in names:
        return GPUS[names.index(name.lower())]
    near = [known for known in reversed(names) if known.startswith(name.lower())]
    near = near or difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"unknown GPU {name!r}: {hint}known are {', '.join(names)}")


def recognise(device_name: str) -> Gpu | None:
    """The GPU behind a torch.cuda.get_device_name, or None where it is none of the list."""
    if OTHER_PRODUCT.search(device_name):
        return None
    return next((gpu for gpu in GPUS if re.search(rf"\b{gpu.torch_name}\b", device_name)), None)


def stated_peak(device: torch.device, dtype: torch.dtype | None) -> float | None:
    """Operations a second that the maker states for this device in bfloat16; None for CPUs, unknown GPUs and other
    dtypes (None stands for float32), which MFU is then not given for.

    MFU is relative to it under `train.fp8` as well: a run's MFU with FP8 and without then compare as its speeds do. A
    peak mixed of both rates would make MFU fall where FP8 makes the step faster.
    """
    if device.type != "cuda" or dtype is not torch.bfloat16:
        return None
    gpu = recognise(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.matmul


class Network(NamedTuple):
    """Links between GPUs. Latencies and the share of the stated bandwidth are assumptions, of the size that public
    NCCL measurements show; measure with nccl-tests and give your own.

    Attributes:
        per_node: GPUs of a node.
        node_link: bytes a second of a GPU to its node's others, one direction, stated.
        link: bytes a second of a GPU's network adapter, one direction, stated.
        node_latency, latency: seconds of one hop inside a node and between nodes.
        share: of the stated bandwidths that large messages reach.
    """

    per_node: int
    node_link: float
    link: float
    node_latency: float = 2e-6
    latency: float = 6e-6
    share: float = 0.8

    @property
    def between_nodes(self) -> float:
        """Bytes a second that a ring gets between two nodes: NCCL runs one ring for each adapter, side by side."""
        return min(self.node_link, self.per_node * self.link) * self.share

    def bandwidth(self, ranks: int) -> float:
        """Bytes a second of the slowest link of the rings over all ranks."""
        return self.node_link * self.share if ranks <= self.per_node else self.between_nodes

    def hop(self, ranks: int) -> float:
        """Seconds of a hop of a ring over all ranks, in the mean: one of a node's hops leaves it."""
        if ranks <= self.per_node:
            return self.node_latency
        return ((self.per_node - 1) * self.node_latency + self.latency) / self.per_node

"""The rules by which the C library computes grids and arguments (kernels/aot/launches.py) against Python's launches."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from scripts import load_script

from unite_kernels import adaln_kernels, flow, latent, philox, pixels, qk_rope, rectify
from unite_kernels.specialisation import specialisations

RULES = Path(__file__).resolve().parents[1] / "kernels" / "aot" / "launches.py"
# The package calls its function by the same name.
swiglu = importlib.import_module("unite_kernels.swiglu")


class Recorder:
    """Stands for a kernel and keeps the grid and the arguments of its launch."""

    def __init__(self, kernel):
        self.names, self.grid, self.arguments = kernel.arg_names, None, None

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, **constants):
            self.grid = (*grid, 1)[:2]
            self.arguments = dict(zip(self.names, arguments, strict=False)) | constants

        return launch


LAUNCHES = {
    "adaln": lambda: adaln_kernels.forward(
        x_BNC, x_BNC, row_BC, weight_C, weight_C, None, row_BC, row_BC, None, 0, 1e-6, False
    ),
    "adaln backward": lambda: adaln_kernels.backward(
        x_BNC, x_BNC, x_BNC, x_BNC, row_BC, weight_C, weight_C, None, row_BC, row_BC, None, 0, 1e-6, False
    ),
    "adaln backward of odd width": lambda: adaln_kernels.backward(
        *[x_BNC[..., :720]] * 4, row_BC[:, :720], *[weight_C[:720]] * 2, None, *[row_BC[:, :720]] * 2, None, 0, 1e-6,
        False,
    ),  # fmt: skip
    "adaln packed": lambda: adaln_kernels.forward(
        packed, packed, row_BC, weight_C, weight_C, None, row_BC, row_BC, offsets, 70, 1e-6, False
    ),
    "adaln packed backward": lambda: adaln_kernels.backward(
        packed, packed, packed, packed, row_BC, weight_C, weight_C, None, row_BC, row_BC, offsets, 70, 1e-6, False
    ),
    "layer norm": lambda: adaln_kernels.forward(
        x_BNC, x_BNC, None, None, weight_C, weight_C, None, None, None, 0, 1e-6, True
    ),
    "layer norm backward": lambda: adaln_kernels.backward(
        x_BNC, x_BNC, x_BNC, None, None, None, weight_C, weight_C, None, None, None, 0, 1e-6, True
    ),
    "rope": lambda: qk_rope._qk_norm_rope(qkv, head, head, table, table, 0, 1e-6),
    "rope backward": lambda: qk_rope._qk_norm_rope_backward([qkv], qkv, head, head, table, table, 0, 1e-6),
    "rope apart": lambda: qk_rope._qk_norm_rope_apart(qkv, head, head, table, table, 0, 1e-6),
    "rope apart backward": lambda: qk_rope._qk_norm_rope_backward(
        list(qkv.unbind(2)), qkv, head, head, table, table, 0, 1e-6
    ),
    "swiglu": lambda: swiglu._swiglu(torch.zeros(3, 70, 2 * 2736), None),
    "swiglu backward": lambda: swiglu._swiglu_backward(torch.zeros(3, 70, 2736), torch.zeros(3, 70, 2 * 2736), None),
    "bias swiglu": lambda: swiglu._swiglu(torch.zeros(3, 70, 2 * 2736), torch.zeros(2 * 2736)),
    "bias swiglu backward": lambda: swiglu._swiglu_backward(
        torch.zeros(3, 70, 2736), torch.zeros(3, 70, 2 * 2736), torch.zeros(2 * 2736)
    ),
    "flow": lambda: flow._flow_noise(z, torch.zeros((), dtype=torch.int64), 2, 1, 0, True, 0.5, 0),
    "flow backward": lambda: flow._flow_noise_backward(torch.zeros(2, *z.shape), torch.zeros(2, 3)),
    "mix": lambda: latent._mix(z, affine, affine, times > 0, times, z, 1e-5),
    "mix backward": lambda: latent._mix_backward(z, z, z, affine, times > 0, times, 1e-5),
    "flow loss": lambda: latent._flow_loss(
        torch.zeros(2, *z.shape), z, torch.zeros(2, 3), affine, affine, 0.05, True, 1e-5, True
    ),
    "philox": lambda: philox._philox(torch.zeros((), dtype=torch.int64), 1, 0, 0, 3, 5000, True),
    "patch L1": lambda: pixels._patch_l1(torch.zeros(3, 6, 16 * 16 * 3), images, 16),
    "patch L1 backward": lambda: pixels._patch_l1_backward(torch.zeros(()), images, images, images, 16),
    "lpips": lambda: pixels._distance(features, features, torch.zeros(64)),
    "lpips backward": lambda: pixels._distance_backward(times, features, features, torch.zeros(64), False, True),
    "bias relu": lambda: rectify._bias_relu(features, torch.zeros(64)),
    "bias relu backward": lambda: rectify._bias_relu_backward(features, features),
    "bias relu of wide maps": lambda: rectify._bias_relu(wide, None),
    "pool": lambda: rectify._bias_relu_max_pool(features, torch.zeros(64)),
    "pool backward": lambda: rectify._bias_relu_max_pool_backward(features, features[..., :3, :5], features),
    "pool of wide maps": lambda: rectify._bias_relu_max_pool(wide, None),
    "pool of long rows": lambda: rectify._bias_relu_max_pool(long, None),
    "pool backward of long rows": lambda: rectify._bias_relu_max_pool_backward(long, long[..., :3, :150], long),
}
# 3 samples of 70 tokens, 30 latent channels, 32×48 pixels and 7×11 features, which no tile divides.
x_BNC, row_BC, weight_C = torch.zeros(3, 70, 768), torch.zeros(3, 768), torch.zeros(768)
packed, offsets = torch.zeros(1, 110, 768), torch.tensor([0, 70, 71, 110], dtype=torch.int32)
qkv, head, table = torch.zeros(3, 70, 3, 12, 64), torch.zeros(64), torch.zeros(70, 32)
z, affine, times = torch.zeros(3, 70, 30), torch.zeros(30), torch.zeros(3)
images = torch.zeros(3, 3, 32, 48)
features, wide, long = (
    torch.zeros(3, *shape).contiguous(memory_format=torch.channels_last)
    for shape in ((64, 7, 11), (1030, 7, 11), (64, 7, 301))
)
MODULES = {
    module.__name__.split(".")[-1]: module
    for module in (adaln_kernels, flow, latent, philox, pixels, qk_rope, rectify, swiglu)
}


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES.keys())
def test_rules_are_the_launches_of_python(monkeypatch, launch):
    """C computes the grids and arguments that Python does."""
    rules, recorders = load_script(RULES).RULES, {}
    for name in rules:
        module, kernel = name.split(".")
        recorders[name] = Recorder(getattr(MODULES[module], kernel))
        monkeypatch.setattr(MODULES[module], kernel, recorders[name])
    launch()
    launched = {name: recorder for name, recorder in recorders.items() if recorder.grid}
    adds_up = "adaln_kernels._sum_kernel" in launched
    assert len(launched) == 1 + adds_up
    for name, recorder in launched.items():
        rule = rules[name]
        values = recorder.arguments | {"cdiv": lambda a, b: -(-a // b), "batch": 3, "draws": 3}
        if name == "adaln_kernels._sum_kernel":
            values |= {"tokens": 70, "AHEAD_CHUNK": launched["adaln_kernels._backward_kernel"].arguments["CHUNK"]}
        derived = {argument: eval(expression, values) for argument, expression in rule.derived.items()}
        assert derived == {argument: recorder.arguments[argument] for argument in derived}
        assert tuple(eval(expression, values) for expression in rule.grid) == recorder.grid


def test_the_header_names_every_address():
    """Gradients by what they are of; a backward pass's by what its forward pass says of it."""
    launches = load_script(RULES)
    about = {}
    for name, rule in launches.RULES.items():
        about[name.split(".")[0]] = about.get(name.split(".")[0], "") + rule.about
    # The functions themselves: Triton's interpreter takes the place of what they are wrapped in.
    entries = [(entry, launches.rule_name(entry.kernel.fn)) for entry in specialisations()]
    assert {name for _, name in entries} >= set(launches.RULES)
    for entry, rule in entries:
        for name, kind in entry.arguments.items() if rule in launches.RULES else ():
            if kind.startswith("*"):
                said = re.search(rf"\b(grad_)?{name.removeprefix('grad_')}\b", about[rule.split(".")[0]])
                assert said, f"{name} of {entry.name}"

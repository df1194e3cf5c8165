"""A DiT block before and after unite_kernels: the same weights, the same results, two calls instead of three lines.

    python examples/dit_block.py

The block is DiT's (Peebles and Xie 2022, "Scalable diffusion models with transformers", figure 3, adaLN-Zero). `After`
inherits everything from `Before` but forward, so a checkpoint of one is a checkpoint of the other. The program checks
that outputs and gradients agree, then times both.

Shapes: B images, N tokens, C width.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import quantiles

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unite_kernels import gated_residual_layer_norm_modulate, layer_norm_modulate


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class Before(nn.Module):
    """x [B, N, C], condition [B, C] → [B, N, C], in plain PyTorch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        nn.init.zeros_(self.modulation[1].weight)
        nn.init.zeros_(self.modulation[1].bias)

    def attention(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        h = modulate(self.norm1(x), shift1, scale1)
        x = x + gate1[:, None] * self.attention(h)
        h = modulate(self.norm2(x), shift2, scale2)
        return x + gate2[:, None] * self.mlp(h)


class After(Before):
    """The same block: norm and modulation are one call, and so are gated residual, norm and modulation."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        h = layer_norm_modulate(x, None, None, shift1, scale1)
        x, h = gated_residual_layer_norm_modulate(x, self.attention(h), gate1, None, None, shift2, scale2)
        return x + gate2[:, None] * self.mlp(h)


def make_blocks(width: int, heads: int, dtype: torch.dtype, device: str) -> tuple[Before, After]:
    """Both blocks with the same weights."""
    torch.manual_seed(0)
    before, after = Before(width, heads), After(width, heads)
    # A new block's gates are zero and would hide the branches from the comparison; a trained block's are not.
    nn.init.normal_(before.modulation[1].weight, std=0.02)
    after.load_state_dict(before.state_dict())
    return before.to(device, dtype), after.to(device, dtype)


def outputs_and_gradients(block: Before, x: Tensor, condition: Tensor) -> dict[str, Tensor]:
    """The block's output, and the gradients of Σ output² / 2 by input, condition and weights."""
    leaves = {"x": x, "condition": condition} | dict(block.named_parameters())
    leaves["x"], leaves["condition"] = x.detach().requires_grad_(), condition.detach().requires_grad_()
    out = block(leaves["x"], leaves["condition"])
    return {"output": out} | dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), out), strict=True))


def largest_error(before: Before, after: After, x: Tensor, condition: Tensor) -> float:
    """How much `After` errs, relative to how much plain PyTorch in the same dtype may; agreement is ≤ 1.

    The errors are the largest absolute ones against the block in float64. Allowed is twice that of `Before`, plus 1e-6
    of the largest number, 8 units in the last place of float32.
    """
    truth = outputs_and_gradients(copy.deepcopy(before).double(), x.double(), condition.double())
    plain, fused = outputs_and_gradients(before, x, condition), outputs_and_gradients(after, x, condition)
    worst = 0.0
    for name, true in truth.items():
        allowed = 2 * (plain[name] - true).abs().max() + 1e-6 * true.abs().max().clamp(min=1)
        share = ((fused[name] - true).abs().max() / allowed).item()
        # Not a number is no agreement, and `max` would drop it.
        worst = max(worst, share if share == share else float("inf"))
    return worst


def seconds(run: Callable[[], object], device: str) -> float:
    """Seconds of one call, launches included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare_speed(before: Before, after: After, x: Tensor, condition: Tensor, rounds: int) -> dict[str, list[float]]:
    """Quartiles of the seconds that forward and backward take, one block after the other in every round."""
    blocks, times = {"before": before, "after": after}, {"before": [], "after": []}
    for number in range(rounds + 3):
        # Who goes first alternates, so that neither always finds the other's caches.
        for name in sorted(blocks, reverse=number % 2 == 0):
            elapsed = seconds(lambda: outputs_and_gradients(blocks[name], x, condition), x.device.type)
            if number >= 3:  # the first rounds compile kernels and fill the allocator
                times[name].append(elapsed)
    return {name: quantiles(samples, n=4, method="inclusive") for name, samples in times.items()}


def main() -> None:
    """Check, time, print."""
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    # DiT-XL's width with 64 images of 256 tokens; on a CPU what takes milliseconds.
    batch, tokens, width, heads, rounds = (64, 256, 1152, 16, 100) if on_gpu else (2, 64, 256, 4, 30)
    before, after = make_blocks(width, heads, dtype, device)
    x = torch.randn(batch, tokens, width, device=device, dtype=dtype)
    condition = torch.randn(batch, width, device=device, dtype=dtype)

    few = slice(0, 2)
    error = largest_error(before, after, x[few], condition[few])
    if error > 1:
        raise SystemExit(f"outputs or gradients differ: {error:.2f} times the error that is allowed")
    print(f"outputs and gradients agree: at most {error:.2f} of the error that is allowed (twice plain PyTorch's)")

    times = compare_speed(before, after, x, condition, rounds)
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"forward and backward of [{batch}, {tokens}, {width}] in {str(dtype).removeprefix('torch.')} on {where},")
    print(f"median of {rounds} (quartiles), the two blocks in turn:")
    for name, (low, median, high) in times.items():
        print(f"  {name:6} {median * 1e3:8.3f} ms ({low * 1e3:.3f} to {high * 1e3:.3f})")
    print(f"  after is {times['before'][1] / times['after'][1]:.2f} times as fast as before")
    if not on_gpu:
        print("No kernel runs on a CPU: `after` is plain PyTorch there too, so this ratio says nothing about a GPU.")


if __name__ == "__main__":
    main()

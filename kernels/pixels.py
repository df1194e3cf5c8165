"""Losses on pixels and on feature maps: unpatchify with L1, and LPIPS's distance of one map.

Shapes: B batch, P patches of p×p pixels, H×W image, C channels of a feature map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import (
    cdiv,
    check_contiguous,
    check_device,
    check_floats,
    check_parameter,
    check_programs,
    check_tensors,
    device_of,
    next_power_of_2,
    operator,
    use_triton,
)
from .specialisation import Specialisation
from .toolchain import tl, triton

UNIT_EPS = 1e-10  # LPIPS's own (Zhang et al. 2018, reference code): added to the channel norm
PATCH_BLOCK = 2048  # elements of a program, 16 a thread
FEATURE_TILE = 2048  # elements of a tile, 16 a thread: the backward pass keeps four tiles in registers
WARPS = 4


def patch_l1_reference(tokens, images, patch_size):
    """`patch_l1` in plain PyTorch."""
    batch, colours, height, width = images.shape
    p = patch_size
    patches = tokens.view(batch, height // p, width // p, p, p, colours)
    image = patches.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, colours).permute(0, 3, 1, 2)
    return (image.float() - images.float()).abs().mean(), image


@triton.jit
def _patch_offsets(element, W: tl.constexpr, H: tl.constexpr, P: tl.constexpr):
    """Of elements of a channels-last image: their offsets in its tokens and in its planes.

    Both memories hold runs of P pixels, 3P numbers. Written with the run's own remainder, so that the compiler sees
    the runs and moves 16 bytes at once.
    """
    RUN: tl.constexpr = 3 * P
    GRID: tl.constexpr = W // P
    run, within = element // RUN, element % RUN
    y, column = run // GRID, run % GRID
    token = ((y // P) * GRID + column) * (P * RUN) + (y % P) * RUN + within
    plane = (within % 3) * (H * W) + y * W + column * P + within // 3
    return token, plane


@triton.jit
def _patch_l1_kernel(
    tokens, images, image_out, loss,
    W: tl.constexpr, H: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1)
    base = sample.to(tl.int64) * (3 * H * W)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < 3 * H * W
    token, plane = _patch_offsets(element, W, H, P)
    value = tl.load(tokens + base + token, mask=inside, other=0.0)
    tl.store(image_out + base + element, value, mask=inside)
    target = tl.load(images + base + plane, mask=inside, other=0.0).to(tl.float32)
    partial = tl.sum(tl.abs(value.to(tl.float32) - target), axis=0)
    tl.store(loss + sample * tl.num_programs(0) + tl.program_id(0), partial)


@triton.jit
def _patch_l1_backward_kernel(
    grad_loss, grad_image, image, images, grad_tokens, scale,
    W: tl.constexpr, H: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    base = tl.program_id(1).to(tl.int64) * (3 * H * W)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < 3 * H * W
    token, plane = _patch_offsets(element, W, H, P)
    value = tl.load(image + base + element, mask=inside, other=0.0).to(tl.float32)
    difference = value - tl.load(images + base + plane, mask=inside, other=0.0).to(tl.float32)
    sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))  # 0 at NaN, like torch.sign
    grad = tl.load(grad_image + base + element, mask=inside, other=0.0).to(tl.float32)
    grad += tl.load(grad_loss) * scale * sign
    tl.store(grad_tokens + base + token, grad, mask=inside)


@operator("patch_l1")
def _patch_l1(tokens: Tensor, images: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    batch, _, height, width = images.shape
    image = _channels_last_like(images, tokens.dtype)
    chunks = cdiv(3 * height * width, PATCH_BLOCK)
    partial = tokens.new_empty(batch, chunks, dtype=torch.float32)
    if image.numel():
        with device_of(tokens):
            _patch_l1_kernel[(chunks, batch)](
                tokens, images, image, partial, W=width, H=height, P=patch_size, BLOCK=PATCH_BLOCK, num_warps=WARPS
            )
    return partial.sum() / image.numel(), image


@_patch_l1.register_fake
def _(tokens, images, patch_size):
    return tokens.new_empty((), dtype=torch.float32), _channels_last_like(images, tokens.dtype)


@operator("patch_l1_backward")
def _patch_l1_backward(
    grad_loss: Tensor, grad_image: Tensor, image: Tensor, images: Tensor, patch_size: int
) -> Tensor:
    batch, _, height, width = images.shape
    grad_tokens = image.new_empty(_token_shape(images, patch_size))
    if image.numel():
        with device_of(image):
            _patch_l1_backward_kernel[(cdiv(3 * height * width, PATCH_BLOCK), batch)](
                grad_loss, grad_image.contiguous(memory_format=torch.channels_last), image, images, grad_tokens,
                1.0 / image.numel(), W=width, H=height, P=patch_size, BLOCK=PATCH_BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return grad_tokens


@_patch_l1_backward.register_fake
def _(grad_loss, grad_image, image, images, patch_size):
    return image.new_empty(_token_shape(images, patch_size))


def _save_patches(ctx, inputs, output):
    _, images, ctx.patch_size = inputs
    ctx.save_for_backward(output[1], images)


def _backward_patches(ctx, grad_loss, grad_image):
    image, images = ctx.saved_tensors
    return _patch_l1_backward(grad_loss, grad_image, image, images, ctx.patch_size), None, None


_patch_l1.register_autograd(_backward_patches, setup_context=_save_patches)


def _channels_last_like(images: Tensor, dtype: torch.dtype) -> Tensor:
    batch, colours, height, width = images.shape
    return images.new_empty(batch, height, width, colours, dtype=dtype).permute(0, 3, 1, 2)


def _token_shape(images: Tensor, patch_size: int) -> tuple[int, int, int]:
    batch, colours, height, width = images.shape
    return batch, (height // patch_size) * (width // patch_size), patch_size * patch_size * colours


def patch_l1(tokens: Tensor, images: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Unpatchify and compare: (mean |x − x̂|, x̂).

    UNITE, arXiv 2603.22283, reconstruction loss. Gradients flow into tokens through both outputs.

    Args:
        tokens: [B, P, p·p·3], the channels of a patch ordered (row, column, colour), patches row by row.
        images: [B, 3, H, W] x.
        patch_size: p, dividing H and W.

    Returns:
        The loss, 0-dim float32, and x̂ [B, 3, H, W] in tokens' dtype and channels-last memory: patches are cut along
        rows of (column, colour), so this layout is a copy of whole runs, and convolutions want it.

    Raises:
        ValueError: shapes that do not fit together, tensors on different devices, or strides.
        TypeError: another dtype than float32, float16 and bfloat16.
    """
    check_tensors("patch_l1", tokens=tokens, images=images)
    if tokens.dim() != 3 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(
            f"patch_l1: tokens have shape {tuple(tokens.shape)} and images {tuple(images.shape)}; "
            "they must be [B, P, p*p*3] and [B, 3, H, W]"
        )
    batch, _, height, width = images.shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"patch_l1: images of {height}x{width} are not divisible by patch_size {patch_size}")
    expected = (batch, (height // patch_size) * (width // patch_size), patch_size * patch_size * 3)
    if tokens.shape != expected:
        raise ValueError(
            f"patch_l1: tokens have shape {tuple(tokens.shape)}; images {tuple(images.shape)} and patch_size "
            f"{patch_size} ask for {expected}"
        )
    for name, x in (("tokens", tokens), ("images", images)):
        check_floats("patch_l1", name, x)
        check_device("patch_l1", name, x, "tokens", tokens)
        check_contiguous("patch_l1", name, x)
    images = images.detach()
    if use_triton(tokens):
        check_programs("patch_l1", "B", batch)
        return _patch_l1(tokens, images, patch_size)
    return patch_l1_reference(tokens, images, patch_size)


def lpips_distance_reference(features_a, features_b, weight):
    """`lpips_distance` in plain PyTorch."""

    def unit(features):
        # vector_norm, not the root of a sum: its gradient at an all-zero pixel is 0, that of the root NaN.
        features = features.float()
        return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + UNIT_EPS)

    difference = (unit(features_a) - unit(features_b)).square()
    return (difference * weight.float().view(1, -1, 1, 1)).sum(dim=1).mean(dim=(1, 2))


@triton.jit
def _unit(x, EPS: tl.constexpr):
    """Rows over their norm, and the norm."""
    norm = tl.sqrt(tl.sum(x * x, axis=1))
    return x / (norm + EPS)[:, None], norm


@triton.jit
def _unit_backward(grad, x, norm, EPS: tl.constexpr):
    """Gradient of rows from that of their unit rows."""
    inverse = 1.0 / (norm + EPS)
    # Where the row is zero the sum is too: any divisor but 0 makes the norm's gradient 0.
    along = tl.sum(grad * x, axis=1) * inverse * inverse / tl.where(norm == 0.0, 1.0, norm)
    return grad * inverse[:, None] - x * along[:, None]


@triton.jit
def _distance_kernel(
    a, b, weight, partials, pixels,
    C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    inside = (row < pixels)[:, None] & (channel < C)[None, :]
    offset = (sample.to(tl.int64) * pixels + row)[:, None] * C + channel[None, :]
    unit_a, _ = _unit(tl.load(a + offset, mask=inside, other=0.0).to(tl.float32), EPS)
    unit_b, _ = _unit(tl.load(b + offset, mask=inside, other=0.0).to(tl.float32), EPS)
    w = tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    difference = unit_a - unit_b
    distance = tl.sum(tl.sum(tl.where(inside, w * difference * difference, 0.0), axis=1), axis=0)
    tl.store(partials + sample * tl.num_programs(0) + tl.program_id(0), distance)


@triton.jit
def _distance_backward_kernel(
    grad, a, b, weight, grad_a, grad_b, pixels,
    FOR_A: tl.constexpr, FOR_B: tl.constexpr,
    C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    inside = (row < pixels)[:, None] & (channel < C)[None, :]
    offset = (sample.to(tl.int64) * pixels + row)[:, None] * C + channel[None, :]
    x = tl.load(a + offset, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(b + offset, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    unit_x, norm_x = _unit(x, EPS)
    unit_y, norm_y = _unit(y, EPS)
    grad_unit = 2.0 * tl.load(grad + sample) / pixels * w * (unit_x - unit_y)
    if FOR_A:
        tl.store(grad_a + offset, _unit_backward(grad_unit, x, norm_x, EPS), mask=inside)
    if FOR_B:
        tl.store(grad_b + offset, _unit_backward(-grad_unit, y, norm_y, EPS), mask=inside)


def _tiles(features: Tensor) -> tuple[int, int, int]:
    """(programs an image, WIDTH, ROWS) of tiles of pixels by channels."""
    _, channels, height, width = features.shape
    padded = max(1, next_power_of_2(channels))
    rows = max(1, FEATURE_TILE // padded)
    return cdiv(height * width, rows), padded, rows


@operator("lpips_distance")
def _distance(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    batch, channels, height, width = a.shape
    programs, padded, rows = _tiles(a)
    partials = a.new_empty(batch, programs, dtype=torch.float32)
    if a.numel():
        with device_of(a):
            _distance_kernel[(programs, batch)](
                a, b, weight, partials, height * width, C=channels, WIDTH=padded, ROWS=rows, EPS=UNIT_EPS,
                num_warps=WARPS,
            )  # fmt: skip
    return partials.sum(1) / (height * width)


@_distance.register_fake
def _(a, b, weight):
    return a.new_empty(a.shape[0], dtype=torch.float32)


@operator("lpips_distance_backward")
def _distance_backward(
    grad: Tensor, a: Tensor, b: Tensor, weight: Tensor, for_a: bool, for_b: bool
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = a.shape
    programs, padded, rows = _tiles(a)
    grad_a, grad_b = (torch.empty_like(x) if wanted else x.new_empty(0) for x, wanted in ((a, for_a), (b, for_b)))
    if a.numel():
        with device_of(a):
            _distance_backward_kernel[(programs, batch)](
                grad.contiguous(), a, b, weight, grad_a, grad_b, height * width,
                FOR_A=for_a, FOR_B=for_b, C=channels, WIDTH=padded, ROWS=rows, EPS=UNIT_EPS, num_warps=WARPS,
            )  # fmt: skip
    return grad_a, grad_b


@_distance_backward.register_fake
def _(grad, a, b, weight, for_a, for_b):
    return tuple(torch.empty_like(x) if wanted else x.new_empty(0) for x, wanted in ((a, for_a), (b, for_b)))


def _save_features(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_features(ctx, grad):
    for_a, for_b, _ = ctx.needs_input_grad
    grad_a, grad_b = _distance_backward(grad, *ctx.saved_tensors, for_a, for_b)
    return grad_a if for_a else None, grad_b if for_b else None, None


_distance.register_autograd(_backward_features, setup_context=_save_features)


def aot_specialisations() -> list[Specialisation]:
    """Images of 256×256 in patches of 16, and VGG's maps, bfloat16."""
    image = {"W": 256, "H": 256, "P": 16, "BLOCK": PATCH_BLOCK}
    types = {"tokens": "*bf16", "images": "*fp32", "image_out": "*bf16", "loss": "*fp32"}
    shape = {"num_warps": WARPS, "max_registers": 48}
    found = [Specialisation("patch_l1_forward_bf16", _patch_l1_kernel, types, image, aligned=tuple(types), **shape)]
    types = {"grad_loss": "*fp32", "grad_image": "*bf16", "image": "*bf16", "images": "*fp32", "grad_tokens": "*bf16"}
    found.append(
        Specialisation(
            "patch_l1_backward_bf16", _patch_l1_backward_kernel, types | {"scale": "fp32"}, image,
            aligned=tuple(types), **shape,
        )
    )  # fmt: skip
    for channels in (64, 128, 256, 512):
        shape = {"C": channels, "WIDTH": channels, "ROWS": FEATURE_TILE // channels, "EPS": UNIT_EPS}
        types = {"a": "*bf16", "b": "*bf16", "weight": "*fp32", "partials": "*fp32", "pixels": "i32"}
        found.append(
            Specialisation(
                f"lpips_distance_forward_bf16_{channels}", _distance_kernel, types, shape,
                num_warps=WARPS, aligned=tuple(types), max_registers=56, store_bytes=4,  # one sum a program
            )
        )  # fmt: skip
        types = {"grad": "*fp32", "a": "*bf16", "b": "*bf16", "weight": "*fp32", "grad_a": "*bf16", "grad_b": "*bf16"}
        found.append(
            Specialisation(
                f"lpips_distance_backward_bf16_{channels}", _distance_backward_kernel, types | {"pixels": "i32"},
                {"FOR_A": False, "FOR_B": True} | shape,
                num_warps=WARPS, aligned=(*types, "pixels"), max_registers=64,
            )
        )  # fmt: skip
    return found


def lpips_distance(features_a: Tensor, features_b: Tensor, weight: Tensor) -> Tensor:
    """LPIPS's distance of one feature map (Zhang et al. 2018, eq. 1): mean over pixels of Σ_c w_c (â_c − b̂_c)².

    â = a / (‖a‖ + 1e-10), the norm over channels. Gradients flow into both maps, not into the weight.

    Args:
        features_a, features_b: [B, C, H, W] of one dtype, in channels-last memory, which convolutions write.
        weight: [C].

    Returns:
        [B] float32.

    Raises:
        ValueError: shapes or dtypes that differ, tensors on different devices, or other strides.
        TypeError: another dtype than float32, float16 and bfloat16.
    """
    operator = "lpips_distance"
    check_tensors(operator, features_a=features_a, features_b=features_b, weight=weight)
    if features_a.dim() != 4:
        raise ValueError(f"{operator}: features_a has shape {tuple(features_a.shape)}; it must be [B, C, H, W]")
    if features_b.shape != features_a.shape or features_b.dtype != features_a.dtype:
        raise ValueError(
            f"{operator}: features_a is {features_a.dtype} {tuple(features_a.shape)} and features_b {features_b.dtype} "
            f"{tuple(features_b.shape)}; they must agree"
        )
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        check_floats(operator, name, features)
        check_device(operator, name, features, "features_a", features_a)
        if not features.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"{operator}: {name} has strides {tuple(features.stride())}; it must be channels-last, call "
                ".contiguous(memory_format=torch.channels_last)"
            )
    check_parameter(operator, "weight", weight, (features_a.shape[1],), "features_a", features_a)
    weight = weight.detach()
    if use_triton(features_a):
        check_programs(operator, "B", len(features_a))
        return _distance(features_a, features_b, weight)
    return lpips_distance_reference(features_a, features_b, weight)

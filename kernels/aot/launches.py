"""How C launches each kernel: its grid, and arguments that follow from others.

The expressions are C and Python at once, in the kernel's run-time arguments, its constants, the rule's own parameters
and `cdiv`; the tests evaluate them against the launches that the Python operators make.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rule:
    """Attributes:
    grid: expressions of the programs along x and y.
    about: what the function computes, for the header; `{…}` are constants of the kernel.
    sizes: int32 parameters of the C function that the kernel does not take.
    derived: kernel arguments that the C function computes, with their expressions.
    """

    grid: tuple[str, str]
    about: str
    sizes: tuple[str, ...] = ()
    derived: dict[str, str] = field(default_factory=dict)


_ADALN = (
    "x, branch and the residual are [batch, tokens, {C}]; weight, bias and closing_weight are [{C}]; gate, shift and "
    "scale are [batch, {C}] with rows *_stride elements apart. With offsets [batch + 1], [batch, tokens, {C}] is [all "
    "tokens, {C}], samples of different lengths behind one another: sample b is tokens offsets[b] ... offsets[b + 1] "
    "without the last, and tokens are those of the longest. "
)

_LATENT = "z, z0, z1, noise and their gradients are [batch, tokens, {D}]; weight and bias [{D}]. "

# By module and function of the kernel.
RULES = {
    "adaln_kernels._forward_kernel": Rule(
        grid=("batch * chunks", "1"),
        sizes=("batch",),
        derived={"chunks": "cdiv(tokens, CHUNK)"},
        about=_ADALN + "With a branch, residual = x + gate * branch (x + branch without a gate); with a "
        "closing_weight, residual = RMSNorm(x + gate * branch) * closing_weight; without either, residual is x and not "
        "written. normed = (norm(residual) * weight + bias) * (1 + scale) + shift.",
    ),
    "adaln_kernels._backward_kernel": Rule(
        grid=("batch * chunks", "1"),
        sizes=("batch",),
        derived={"chunks": "cdiv(tokens, CHUNK)"},
        about=_ADALN + "x is what was normed: the residual where there is one, but the stream before it where there "
        "is a closing_weight. The gradient of a branch without a gate is grad_x. partials is float32 scratch [batch * "
        "ceil(tokens / {CHUNK}), {PARTS}, {C}], which the form's sum function adds up; of a form without shift and "
        "scale its sums over the first dimension are the gradients of weight and bias.",
    ),
    "adaln_kernels._sum_kernel": Rule(
        grid=("batch * cdiv(width, COLUMNS)", "1"),
        sizes=("batch", "tokens"),
        derived={"chunks": "cdiv(tokens, AHEAD_CHUNK)"},
        about="Second half of the backward pass, also of the form's packed one, with the same tokens, from the "
        "partials of the first: gradients of gate, shift and scale [batch, width], and per_sample [batch, 2, width] "
        "float32, whose sums over the batch are the gradients of weight and (in the second row, written where the form "
        "has one) of closing_weight.",
    ),
    "flow._forward_kernel": Rule(
        grid=("cdiv(WIDTH, 4 * COUNTERS)", "batch"),
        about="z [batch, {WIDTH}]; z_t [draws, batch, {WIDTH}] = t z + (1 - t) noise; t_out [draws, batch]; "
        "step_pointer is the device address of one int64, stream a number such as the rank. u = sigmoid(normal), "
        "t = shift u / (1 + (shift - 1) u), from Philox at (seed, step, stream, draw).",
    ),
    "flow._backward_kernel": Rule(
        grid=("cdiv(WIDTH, BLOCK)", "batch"),
        about="grad_z [batch, {WIDTH}] = sum over draws of t * grad_z_t.",
    ),
    "latent._mix_forward_kernel": Rule(
        grid=("cdiv(rows, ROWS)", "1"),
        sizes=("batch",),
        derived={"rows": "batch * tokens"},
        about=_LATENT + "mask [batch] of bytes; t [batch]. z0_out = LayerNorm(z) * weight + bias; mixed_out = t z0 + "
        "(1 - t) noise where mask is not 0, else z0.",
    ),
    "latent._mix_backward_kernel": Rule(
        grid=("cdiv(rows, ROWS)", "1"),
        sizes=("batch",),
        derived={"rows": "batch * tokens"},
        about=_LATENT + "grad_z from grad_z0 and grad_mixed, those of both outputs, and grad_affine [ceil(batch * "
        "tokens / {ROWS}), 2, {D}], whose sums over the first dimension are the gradients of weight and bias.",
    ),
    "latent._loss_kernel": Rule(
        grid=("cdiv(rows, ROWS)", "1"),
        sizes=("batch",),
        derived={"rows": "batch * tokens"},
        about=_LATENT + "pred and grad_pred [draws, batch, tokens, {D}], t [draws, batch]. The loss, ((z1 - LayerNorm("
        "pred) * weight - bias) / max(1 - t, floor))^2 summed over draws, is the sum of loss [ceil(batch * tokens / "
        "{ROWS})] over batch * tokens * {D}; the gradients are those of the sum alone, and grad_affine is as in "
        "unite_latent_norm_mix_backward.",
    ),
    "philox._philox_kernel": Rule(
        grid=("cdiv(count, 4 * COUNTERS)", "draws"),
        sizes=("draws",),
        about="out [draws, count]: numbers of draws first_draw ... at (seed, step, stream). step_pointer is the device "
        "address of one int64; stream is twice the stream that Python takes.",
    ),
    "pixels._patch_l1_kernel": Rule(
        grid=("cdiv(3 * H * W, BLOCK)", "batch"),
        sizes=("batch",),
        about="tokens [batch, patches, {P} * {P} * 3], row by row, become image_out [batch, {H}, {W}, 3]; images are "
        "[batch, 3, {H}, {W}]. The mean of |image - images| is the sum of loss [batch, ceil({H} * {W} * 3 / {BLOCK})] "
        "over batch * {H} * {W} * 3.",
    ),
    "pixels._patch_l1_backward_kernel": Rule(
        grid=("cdiv(3 * H * W, BLOCK)", "batch"),
        sizes=("batch",),
        about="grad_tokens from grad_image [batch, {H}, {W}, 3] and grad_loss, one number on the device; image is the "
        "image_out of the forward pass, scale 1 / (batch * {H} * {W} * 3).",
    ),
    "pixels._distance_kernel": Rule(
        grid=("cdiv(pixels, ROWS)", "batch"),
        sizes=("batch",),
        about="LPIPS's distance of maps a and b [batch, pixels, {C}] under weight [{C}] is, for each sample, the sum "
        "of its row of partials [batch, ceil(pixels / {ROWS})] over pixels.",
    ),
    "pixels._distance_backward_kernel": Rule(
        grid=("cdiv(pixels, ROWS)", "batch"),
        sizes=("batch",),
        about="grad_b [batch, pixels, {C}] from grad [batch]. grad_a is an address that is not written: the target "
        "takes no gradient.",
    ),
    "qk_rope._forward_kernel": Rule(
        grid=("cdiv(rows, ROWS)", "1"),
        sizes=("batch",),
        derived={"rows": "batch * tokens * H"},
        about="qkv and out are [batch, tokens, 3, {H}, {D}]: RMSNorm of every head of q and k (q_weight and k_weight "
        "[{D}]), then rotation of its pairs (2i, 2i + 1); v is copied. With k_out and v_out, each of the three is "
        "[batch, tokens, {H}, {D}] and out is q's. cos and sin are [at least tokens - unrotated, {D} / 2]; the first "
        "`unrotated` tokens are normed but not rotated.",
    ),
    "qk_rope._backward_kernel": Rule(
        grid=("cdiv(rows, ROWS * STEPS)", "1"),
        sizes=("batch",),
        derived={"rows": "batch * tokens * H"},
        about="Gradient grad_qkv [batch, tokens, 3, {H}, {D}] from grad, which is as it, or from q's, k's and v's, "
        "grad, grad_k and grad_v, each [batch, tokens, {H}, {D}]. partials are [ceil(batch * tokens * {H} / ({ROWS} * "
        "{STEPS})), 2, {D}] float32, whose sums over the first dimension are the gradients of q_weight and k_weight.",
    ),
    "rectify._forward_kernel": Rule(
        grid=("cdiv(rows, ROWS) * cdiv(C, BLOCK_C)", "1"),
        about="out = max(x + bias, 0), x and out [rows, {C}], a row for each pixel of each image, and bias [{C}].",
    ),
    "rectify._backward_kernel": Rule(
        grid=("cdiv(rows, ROWS) * cdiv(C, BLOCK_C)", "1"),
        about="grad_x [rows, {C}], which is grad where the out of the forward pass is above 0.",
    ),
    "rectify._pool_forward_kernel": Rule(
        grid=("batch * cdiv(height, 2) * cdiv(width, 2 * ROWS) * cdiv(C, BLOCK_C)", "1"),
        sizes=("batch",),
        about="out = max(x + bias, 0), x and out [batch, height, width, {C}] and bias [{C}], and pooled [batch, "
        "height / 2, width / 2, {C}], rounded down, its maximum in windows of 2x2 pixels.",
    ),
    "rectify._pool_backward_kernel": Rule(
        grid=("batch * cdiv(height, 2) * cdiv(width, 2 * ROWS) * cdiv(C, BLOCK_C)", "1"),
        sizes=("batch",),
        about="grad_x [batch, height, width, {C}] from grad, the gradient of out, and from grad_pooled [batch, "
        "height / 2, width / 2, {C}], which goes to the first maximum of each window.",
    ),
    "swiglu._forward_kernel": Rule(
        grid=("cdiv(rows, ROWS * STEPS)", "cdiv(F, BLOCK_F)"),
        about="out [rows, {F}] = silu(first half) * second half of x [rows, 2 * {F}], plus the bias [2 * {F}] where "
        "the function has one.",
    ),
    "swiglu._backward_kernel": Rule(
        grid=("cdiv(rows, ROWS * STEPS)", "cdiv(F, BLOCK_F)"),
        about="grad_x [rows, 2 * {F}], from grad [rows, {F}] and the x of the forward pass. With a bias, partials "
        "[ceil(rows / ({ROWS} * {STEPS})), 2 * {F}] float32, whose sum over the first dimension is its gradient.",
    ),
}


def rule_name(kernel) -> str:
    """The key of a kernel in RULES: module and function, without the package."""
    return f"{kernel.__module__.removeprefix('unite_kernels.')}.{kernel.__name__}"

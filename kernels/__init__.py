"""Fused operators for diffusion transformers: Triton on CUDA, plain PyTorch elsewhere."""

from unite_kernels.adaln import (
    block_boundary,
    gated_residual_layer_norm_modulate,
    gated_residual_rms_norm_modulate,
    layer_norm_modulate,
    rms_norm_modulate,
)
from unite_kernels.dispatch import get_backend, set_backend
from unite_kernels.flow import flow_noise
from unite_kernels.latent import latent_norm_flow_loss, latent_norm_mix
from unite_kernels.optim import ema_update_, newton_schulz
from unite_kernels.philox import philox_normal, philox_uniform
from unite_kernels.pixels import lpips_distance, patch_l1
from unite_kernels.qk_rope import qk_norm_rope
from unite_kernels.resample import centre_crop
from unite_kernels.swiglu import swiglu

"""Fused operators for diffusion transformers: Triton on CUDA, compiled C on CPUs, plain PyTorch elsewhere."""

from .adaln import (
    Spans,
    block_boundary,
    gated_residual_layer_norm_modulate,
    gated_residual_rms_norm_modulate,
    layer_norm,
    layer_norm_modulate,
    residual_layer_norm,
    rms_norm_modulate,
)
from .dispatch import get_backend, set_backend
from .flow import flow_noise
from .fp8 import Quantized, fp8_linear, fp8_quantize
from .latent import latent_norm_flow_loss, latent_norm_mix
from .muon import muon_momentum_, muon_update_
from .optim import ema_update_, newton_schulz, newton_schulz_dtype
from .philox import philox_normal, philox_uniform
from .pixels import lpips_distance, patch_l1
from .qk_rope import qk_norm_rope, qk_norm_rope_apart
from .rectify import bias_relu, bias_relu_max_pool
from .resample import centre_crop
from .swiglu import swiglu

# Written out, for what reads names without running anything: editors and type checkers.
__all__ = [
    "Quantized",
    "Spans",
    "bias_relu",
    "bias_relu_max_pool",
    "block_boundary",
    "centre_crop",
    "ema_update_",
    "flow_noise",
    "fp8_linear",
    "fp8_quantize",
    "gated_residual_layer_norm_modulate",
    "gated_residual_rms_norm_modulate",
    "get_backend",
    "latent_norm_flow_loss",
    "latent_norm_mix",
    "layer_norm",
    "layer_norm_modulate",
    "lpips_distance",
    "muon_momentum_",
    "muon_update_",
    "newton_schulz",
    "newton_schulz_dtype",
    "patch_l1",
    "philox_normal",
    "philox_uniform",
    "qk_norm_rope",
    "qk_norm_rope_apart",
    "residual_layer_norm",
    "rms_norm_modulate",
    "set_backend",
    "swiglu",
]

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

# Without the list `help(unite_kernels)` shows modules alone.
__all__ = sorted(name for name, found in globals().items() if callable(found) and name[0] != "_")

"""Weight names of the published checkpoints and ours, both ways.

Our blocks are split at the boundaries of the fused operators (see blocks.py): the norm that opens block k+1 belongs to
block k, the one that opens block 0 to the encoder, the final layer's to the last block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from unite_fast.config import DECODER_PRESETS, DecoderConfig, ModelConfig
from unite_fast.errors import UserError
from unite_fast.model.conditioning import rotary_tables, sincos_2d
from unite_fast.model.unite import Unite

_FIXED = {
    "latent_tokens": "encoder.register_position",
    "patch_embed.patch_embeddings.projection": "patches",
    "encoder_layer_norm": "latent_norm",
    "up_sample_decoder": "decoder.lift",
    "encoder.up_sample": "encoder.register_in",
    "encoder.t_embedder.W": "encoder.time.frequencies",
    "encoder.t_embedder.special_time_emb": "encoder.time.special",
    "encoder.t_embedder.mlp.0": "encoder.time.lift",
    "encoder.t_embedder.mlp.2": "encoder.time.project",
    "encoder.y_embedder.embedding_table": "encoder.label",
    "encoder.in_context_posemb": "encoder.context",
    "encoder.final_layer.adaLN_modulation.1": "encoder.final_modulation",
    "encoder.final_layer.linear": "encoder.final",
    "decoder.decoder_embed": "decoder.embed",
    "decoder.trainable_cls_token": "decoder.token",
    "decoder.decoder_norm": "decoder.norm",
    "decoder.decoder_pred": "decoder.pixels",
}
_ENCODER_BLOCK = {
    "attn.qkv": "qkv",
    "attn.q_norm.weight": "q_norm",
    "attn.k_norm.weight": "k_norm",
    "attn.proj": "attention_out",
    "norm2.weight": "norm2",
    "mlp.w12": "mlp_in",
    "mlp.w3": "mlp_out",
    "norm3.weight": "norm3",
}
_DECODER_BLOCK = {
    "layernorm_before": "norm1",
    "qkv": "qkv",
    "attn_proj": "attention_out",
    "layernorm_after": "norm2",
    "ffn_up": "mlp_in",
    "ffn_down": "mlp_out",
}
_IGNORED = ("encoder.feat_rope", "lpips_loss.")
_UNUSED = ("encoder.pos_embed",)
_ADDED = ("patch_embed.position_embeddings", "decoder.decoder_pos_embed")  # fixed positions that tokens get
POSITION_ROUNDING = 1e-2  # sines and cosines stored in bfloat16 are up to 2e-3 off


def published_names(config: ModelConfig) -> dict[str, str]:
    """Prefix of a published name -> prefix of ours, for a model of this depth."""
    names = dict(_FIXED)
    for k in range(config.depth):
        block = f"encoder.blocks.{k}"
        names |= {f"{block}.{theirs}": f"{block}.{ours}" for theirs, ours in _ENCODER_BLOCK.items()}
        names[f"{block}.adaLN_modulation.1"] = f"encoder.modulation.{k}"
        opened_by = "encoder.opening_norm" if k == 0 else f"encoder.blocks.{k - 1}.next_norm"
        names[f"{block}.norm1.weight"] = opened_by
    names["encoder.final_layer.norm_final.weight"] = f"encoder.blocks.{config.depth - 1}.next_norm"
    for k in range(config.decoder.depth):
        names |= {
            f"decoder.decoder_layers.{k}.{theirs}": f"decoder.blocks.{k}.{ours}"
            for theirs, ours in _DECODER_BLOCK.items()
        }
    return names


def our_names(published: Iterable[str], config: ModelConfig) -> dict[str, str]:
    """Published name -> ours, in the order given; entries that our state dict does not hold are left out."""
    names = published_names(config)
    return {name: ours for name in published if (ours := _renamed(name, names)) is not None}


def _renamed(name: str, names: dict[str, str]) -> str | None:
    if name in names:
        return names[name]
    stem, _, leaf = name.rpartition(".")
    return f"{names[stem]}.{leaf}" if stem in names else None


def from_published(
    weights: dict[str, Tensor],
    *,
    heads: int | None = None,
    decoder_heads: int | None = None,
    context_start: int = 4,
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Sizes and our state dict of a published weight dictionary.

    Args:
        weights: published name -> tensor; `decoder._orig_mod.` prefixes of compiled decoders are accepted.
        heads: encoder heads, not recorded in any shape beyond the q norm's width; None infers them from it.
        decoder_heads: decoder heads; None takes the preset of that width, else the encoder's head width.
        context_start: block before which the context joins, recorded in no shape; 4 in the published models.

    Raises:
        UserError: names that are missing or unknown, shapes that contradict each other.
    """
    weights = {name.replace("decoder._orig_mod.", "decoder."): tensor for name, tensor in weights.items()}
    config = _infer_sizes(weights, heads, decoder_heads, context_start)
    names = published_names(config)
    ours: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in weights.items():
        target = _renamed(name, names)
        if target is not None:
            ours[target] = tensor
        elif not name.startswith((*_IGNORED, *_UNUSED, *_ADDED)):
            unknown.append(name)
    expected = Unite.state_shapes(config)
    missing = sorted(set(expected) - set(ours))
    if unknown or missing:
        raise UserError(
            "these are not the weights of a UNITE model: "
            + "; ".join(
                f"{what} {len(found)} entries, first {found[0]!r}"
                for what, found in (("unknown", unknown), ("missing", missing))
                if found
            )
        )
    wrong = [name for name in expected if tuple(ours[name].shape) != expected[name]]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{name} has shape {list(ours[name].shape)}, sizes inferred from the other weights need "
            f"{list(expected[name])}"
        )
    return config, ours


def to_published(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict under the published names.

    The entries we do not need (fixed positions, rotary tables, zeros) are recomputed.

    Raises:
        UserError: a model that is not of the published form (separate weights, registers other than patches or without
            noise, another latent norm).
    """
    if not config.shared:
        raise UserError("the published naming holds one encoder; this model was trained with model.shared = false")
    if not config.register_noise or config.latent_norm != "layer":
        raise UserError(
            f"a published model starts its registers from noise and ends in a LayerNorm; this one was trained with "
            f"model.register_noise = {str(config.register_noise).lower()} and model.latent_norm = {config.latent_norm}"
        )
    if config.registers != config.patches:
        raise UserError(
            f"the published naming needs one register per patch; this model has {config.registers} registers and "
            f"{config.patches} patches"
        )
    back = {ours: theirs for theirs, ours in published_names(config).items()}
    published = {}
    for name, tensor in state.items():
        published[_renamed(name, back) or name] = tensor
    return published | _fixed_tables(config)


def check_positions(weights: dict[str, Tensor], config: ModelConfig) -> None:
    """Refuse published weights whose fixed positions are not those that our network computes in their place.

    Args:
        weights: published name -> tensor, whose sizes `from_published` gave.

    Raises:
        UserError: positions of patches that are not zero, or of the decoder that are no sines and cosines of the grid.
    """
    tables = _fixed_tables(config)
    for name in _ADDED:
        found, table = weights.get(name), tables[name]
        if found is not None and (
            found.shape != table.shape or not torch.allclose(found.float(), table, rtol=0, atol=POSITION_ROUNDING)
        ):
            form = "sines and cosines of the grid" if table.any() else "zeros"
            raise UserError(f"{name} holds other positions than the published models', which are {form}")


def _fixed_tables(config: ModelConfig) -> dict[str, Tensor]:
    """Published name -> the buffers that follow from the sizes: positions, and rotary tables."""
    width, head = config.width, config.width // config.heads
    side, decoder_width = math.isqrt(config.patches), config.decoder.width
    cos, sin = (table.repeat_interleave(2, dim=-1) for table in rotary_tables(config.registers + config.patches, head))
    tables = {
        "encoder.pos_embed": sincos_2d(side, width)[None],
        "patch_embed.position_embeddings": torch.zeros(1, config.patches + 1, width),
        "decoder.decoder_pos_embed": torch.cat([torch.zeros(1, decoder_width), sincos_2d(side, decoder_width)])[None],
        "encoder.feat_rope.freqs_cos": cos,
        "encoder.feat_rope.freqs_sin": sin,
    }
    if config.context_len:
        ones = torch.ones(config.context_len, head)
        tables["encoder.feat_rope_incontext.freqs_cos"] = torch.cat([ones, cos])
        tables["encoder.feat_rope_incontext.freqs_sin"] = torch.cat([torch.zeros_like(ones), sin])
    return tables


def _infer_sizes(
    weights: dict[str, Tensor], heads: int | None, decoder_heads: int | None, context_start: int
) -> ModelConfig:
    def shape(name: str) -> tuple[int, ...]:
        if name not in weights:
            raise UserError(f"these are not the weights of a UNITE model: {name!r} is missing")
        return tuple(weights[name].shape)

    def count(pattern: str) -> int:
        return len({match[1] for name in weights if (match := re.match(pattern, name))})

    width, latent_dim = shape("encoder.up_sample.weight")
    patch = shape("patch_embed.patch_embeddings.projection.weight")[-1]
    patches = shape("decoder.decoder_pos_embed")[1] - 1
    side = int(patches**0.5 + 0.5) * patch
    decoder_width, inner = shape("decoder.decoder_embed.weight")
    context = weights.get("encoder.in_context_posemb")
    from_norm = width // shape("encoder.blocks.0.attn.q_norm.weight")[0]
    if heads is not None and heads != from_norm:
        raise UserError(f"--heads {heads} contradicts the q norm's width, which implies {from_norm} heads")
    known = {sizes["width"]: sizes["heads"] for sizes in DECODER_PRESETS.values()}
    return ModelConfig(
        depth=count(r"encoder\.blocks\.(\d+)\."),
        width=width,
        heads=from_norm,
        image_size=side,
        patch_size=patch,
        registers=shape("latent_tokens")[1],
        latent_dim=latent_dim,
        num_classes=shape("encoder.y_embedder.embedding_table.weight")[0] - 2,
        context_len=0 if context is None else context.shape[1],
        context_start=context_start,
        decoder=DecoderConfig(
            depth=count(r"decoder\.decoder_layers\.(\d+)\."),
            width=decoder_width,
            heads=decoder_heads or known.get(decoder_width, max(1, decoder_width * from_norm // width)),
            inner=inner,
        ),
    )

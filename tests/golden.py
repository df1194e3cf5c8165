"""The golden tensors of the published model: where they lie, the model they belong to, their recorded draws."""

from pathlib import Path

import pytest
import torch
from one_graph import RecordedDraws
from safetensors.torch import load_file

from unite_fast.model.published import from_published, published_names
from unite_fast.model.unite import Unite
from unite_fast.objective.draws import TokenizeDraws

FILE = Path(__file__).resolve().parents[2] / "shared" / "golden" / "unite_golden.safetensors"
FLOW_DRAWS = 3

needs_golden = pytest.mark.skipif(not FILE.is_file(), reason="the golden tensors are not beside this checkout")


def golden() -> dict[str, torch.Tensor]:
    return load_file(FILE)


def published_weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")}


def golden_model(tensors: dict[str, torch.Tensor]) -> Unite:
    config, state = from_published(published_weights(tensors))
    model = Unite(config)
    model.load_state_dict(state)
    return model


def recorded_draws(g: dict[str, torch.Tensor]) -> RecordedDraws:
    batch, registers, latent_dim = g["in.register_noise"].shape
    mix = (g["in.mix_mask"], g["in.mix_t"], g["in.mix_noise"])
    return RecordedDraws(
        TokenizeDraws(g["in.register_noise"], g["in.tokenize_t"], mix, None),
        noise=g["in.flow_noise"].view(FLOW_DRAWS, batch, registers, latent_dim),
        t=g["in.flow_t"].view(FLOW_DRAWS, batch),
        drop=g["in.flow_drop"].view(FLOW_DRAWS, batch),
    )


def our_name(published: str, model: Unite) -> str | None:
    """Our parameter behind a published parameter name."""
    names = published_names(model.config)
    if published in names:
        return names[published]
    stem, _, leaf = published.rpartition(".")
    return f"{names[stem]}.{leaf}" if stem in names else None


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))

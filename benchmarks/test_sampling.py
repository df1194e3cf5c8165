"""Images a second of sampling: Heun with 50 time points and dopri5, with and without guidance.

Guidance doubles the network's work; as one batched call it fills a device better than two calls, the rival here. On a
GPU the model is preset B in bfloat16, elsewhere the quickstart's in float32.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import measure
import pytest
import torch
from torch import Tensor

from unite_fast import ModelConfig, Unite
from unite_fast.flow import sampling

ON_GPU = measure.DEVICE == "cuda"
BATCH = 64 if ON_GPU else 8
ROUNDS = 10 if ON_GPU else 3
STEPS = 50
QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.json"


@pytest.fixture(scope="module")
def model() -> Unite:
    torch.manual_seed(0)
    sizes = {"preset": "B", "decoder": {"preset": "B"}} if ON_GPU else json.loads(QUICKSTART.read_text())["model"]
    built = Unite(ModelConfig.model_validate(sizes)).to(measure.DEVICE).eval().requires_grad_(False)
    # The last layers start at zero, and dopri5 would take a field of zero in a few large steps.
    for parameter in built.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return built


class TwoCalls:
    """The model with each guided pair as a call for the class and one for none."""

    def __init__(self, model: Unite):
        self._model = model

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def denoise(self, z: Tensor, t: Tensor, labels: Tensor, **options) -> Tensor:
        if len(z) == BATCH:
            return self._model.denoise(z, t, labels, **options)
        halves = zip(z.chunk(2), t.chunk(2), labels.chunk(2))
        return torch.cat([self._model.denoise(*half, **options) for half in halves])


@pytest.mark.parametrize("guidance", [1.0, 2.4], ids=["plain", "guided"])
@pytest.mark.parametrize("solver", ["heun", "dopri5"])
@pytest.mark.benchmark(timer=measure.CLOCK)
def test_sampling(model, solver, guidance, benchmark, results):
    labels = torch.arange(BATCH, device=measure.DEVICE) % model.config.num_classes
    noise = model.latent_noise(BATCH, generator=torch.Generator(measure.DEVICE).manual_seed(0))
    contenders = {"ours": model} | ({"two calls": TwoCalls(model)} if guidance != 1.0 else {})
    options = dict(guidance=guidance, solver=solver, steps=STEPS, noise=noise)

    def call(name: str):
        with torch.autocast("cuda", torch.bfloat16) if ON_GPU else contextlib.nullcontext():
            sampling.generate(contenders[name], labels, **options)

    calls = 0
    counted = model.denoise
    with pytest.MonkeyPatch.context() as patch:

        def counting(*arguments, **keywords):
            nonlocal calls
            calls += 1
            return counted(*arguments, **keywords)

        patch.setattr(model, "denoise", counting)
        call("ours")
    times: dict[str, list[float]] = {name: [] for name in contenders}

    def one_round():
        for name in contenders:
            time = measure.CLOCK.advance if name == "ours" else measure.CLOCK.seconds
            times[name].append(time(lambda name=name: call(name)))

    one_round()
    times = {name: [] for name in contenders}
    benchmark.pedantic(one_round, rounds=ROUNDS)
    seconds = {name: measure.spread(samples) for name, samples in times.items()}
    median = seconds["ours"]["median"]
    result = {
        "work": f"sample {solver}, {STEPS} time points, {'w = 2.4' if guidance != 1 else 'no guidance'}",
        "images": BATCH,
        "network_calls": calls,
        "rounds": ROUNDS,
        "seconds": seconds,
        "images_per_second": BATCH / median,
        "times_faster_than": {name: found["median"] / median for name, found in seconds.items() if name != "ours"},
    }
    benchmark.extra_info.update(result)
    results.append(result)

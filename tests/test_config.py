"""The configuration refuses what cannot run, in words that help, before anything heavy is imported."""

import json
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

from unite_fast.config import Config, ModelConfig, TwoPassConfig
from unite_fast.engine.optim import lr_factor, peak_lr
from unite_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
MINIMAL = {"train": {"steps": 10, "global_batch": 4, "accumulation": 1}, "data": {"path": "images"}}


def merged(**sections):
    return {name: {**MINIMAL.get(name, {}), **sections.get(name, {})} for name in {*MINIMAL, *sections}}


def refusal(data) -> str:
    with pytest.raises(UserError) as caught:
        Config.parse(data)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path):
    config = Config.load(path)
    assert Config.parse(json.loads(config.to_json())) == config


PUBLISHED = {  # UNITE, arXiv 2603.22283
    "model": dict(image_size=256, patch_size=16, registers=256, latent_dim=32, num_classes=1000, context_len=32,
                  context_start=4, shared=True),
    "objective": dict(l1_weight=1, flow_weight=1, stop_gradient=True, tokenize_t_max=0.01, label_drop=0.1,
                      time_law="logit_normal", time_shift=0.5, weighting="velocity", t_floor=0.05, decoder_noise="mix",
                      mix_probability=0.5, mix_t_min=0.7, additive_sigma=0.7),
    "optimizer": dict(kind="muon", lr=1e-4, lr_batch=384, momentum=0.95, newton_schulz_steps=5, betas=(0.9, 0.999),
                      eps=1e-6, weight_decay=0, clip_norm=3, ema_decay=0.9978, final_ratio=0.5),
}  # fmt: skip


# Encoder, epochs, flow draws, global batch, end of warm-up, hold and cosine in epochs. The published code counts
# micro-batches: its 20, 30 and 50 are twice as many epochs where two make a step, as they did at 1024 images.
RECIPES = {
    **dict.fromkeys(("b_h100", "b_a100"), ("B", 240, 14, 1024, (40, 60, 100))),
    **dict.fromkeys(("l_h100", "l_a100"), ("L", 120, 14, 1024, (40, 60, 100))),
    **dict.fromkeys(("xl_h100", "xl_a100"), ("XL", 120, 14, 1024, (40, 60, 100))),
    "b_24gb": ("B", 80, 3, 384, (20, 30, 50)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_not_given_is_the_published_recipe(name):
    """The configurations of its sizes give sizes, S, the batch, the schedule and paths alone."""
    preset, epochs, draws, batch, schedule = RECIPES[name]
    config = Config.load(ROOT / "configs" / f"{name}.json")
    for section, values in PUBLISHED.items():
        found = getattr(config, section).model_dump()
        assert {key: found[key] for key in values} == values
    lpips, model, optimizer, train = config.objective.lpips, config.model, config.optimizer, config.train
    assert (lpips.weight, lpips.rescale, lpips.dropout, model.decoder.inner) == (1, False, False, 768)
    assert (model.preset, model.decoder.preset) == (preset, "B")
    assert (train.epochs, train.global_batch, train.precision) == (epochs, batch, "auto")
    assert config.objective.flow_draws == draws
    assert (optimizer.warmup_epochs, optimizer.hold_until_epoch, optimizer.cosine_until_epoch) == schedule
    assert lr_factor(epochs - 1, 1, optimizer) == 0.5  # the schedule ends within the run
    assert peak_lr(optimizer, batch) == pytest.approx(1e-4 * batch / 384)
    assert (config.data.crop, config.data.flip) == ("adm", True)
    sampling = config.sampling
    assert (sampling.steps, sampling.interval, sampling.guidance) == (50, (0.1, 1.0), 2.4)
    assert TwoPassConfig().flow_draws == 3


def test_qm9_is_trained_by_the_papers_recipe():
    """Appendix C: S backbone, 16 latent channels, batch 512, AdamW 1e-4 as it is, 8,000 epochs."""
    config = Config.load(ROOT / "configs" / "qm9_s.json")
    model, optimizer, train = config.model, config.optimizer, config.train
    assert (model.preset, model.decoder.preset, model.latent_dim, model.num_classes) == ("qm9_s", "qm9_s", 16, 1)
    assert (optimizer.kind, peak_lr(optimizer, 512), lr_factor(9e6, 195, optimizer)) == ("adamw", 1e-4, 1)
    assert (train.global_batch, train.epochs, config.data.orientation) == (512, 8000, "random")
    assert (config.sampling.solver, config.sampling.steps) == ("euler", 101)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (merged(model={"widht": 64}), ["model.widht", "unknown key", "'width'"]),
        (merged(zzz={"a": 1}), ["zzz", "unknown key", "valid keys"]),
        (merged(model={"width": 100, "heads": 3}), ["width 100", "3 heads"]),
        (merged(model={"width": 96, "heads": 32}), ["head width 3", "odd"]),
        (merged(model={"image_size": 100, "patch_size": 16}), ["image_size 100", "patch_size 16"]),
        (merged(model={"depth": 3, "context_start": 4}), ["context_start 4", "depth 3"]),
        (merged(model={"decoder": {"width": 100, "heads": 3}}), ["model.decoder", "100", "3 heads"]),
        (merged(model={"decoder": {"width": 18, "heads": 2}}), ["model.decoder", "18", "divisible by 4"]),
        (merged(model={"depth": "many"}), ["model.depth", "'many'"]),
        (merged(model={"preset": ["L"]}), ["model.preset", "['L']"]),
        (merged(train={"steps": 0}), ["train.steps", "0"]),
        (merged(train={"steps": True}), ["train.steps: true is not a number"]),
        (merged(train={"micro_batch": True}), ["train.micro_batch: true is not a number"]),
        (merged(optimizer={"clip_norm": False}), ["optimizer.clip_norm: false is not a number"]),
        (merged(optimizer={"betas": [0.9, True]}), ["optimizer.betas: true is not a number"]),
        (merged(train={"epochs": 1.0}), ["exactly one of epochs and steps", "null"]),
        (merged(train={"accumulation": None}), ["two of global_batch, micro_batch and accumulation"]),
        (merged(train={"zero_stage": 3}), ["Muon", "ZeRO 3", "adamw"]),
        (merged(optimizer={"hold_until_epoch": 5, "cosine_until_epoch": 2}), ["cosine_until_epoch 2"]),
        (merged(optimizer={"warmup_epochs": 5, "cosine_until_epoch": 2}), ["cosine_until_epoch 2", "(5"]),
        (merged(optimizer={"lr": float("nan")}), ["optimizer.lr"]),
        (merged(optimizer={"ema_decays": [0.9, 0.9978]}), ["ema_decays [0.9, 0.9978]", "ema_decay 0.9978"]),
        (merged(optimizer={"betas": [0.9, 1.0]}), ["optimizer.betas.1", "less than 1"]),
        (merged(optimizer={"betas": [0.9]}), ["optimizer.betas: number 2 of the list is missing"]),
        (merged(evaluation={"metrics": ["fid"]}), ["evaluation.metrics", "'gfid'"]),
        (merged(evaluation={"samples_per_class": 1}, data={"val_path": "v"}), ["samples_per_class is 1", "two images"]),
        (merged(evaluation={"samples_per_class": 2}), ["samples_per_class", "held-out images: set data.val_path"]),
        (merged(evaluation={"metrics": "[gfid]"}), ["JSON list", "in quotes: 'evaluation.metrics=[…]' (got '[gfid]')"]),
        ({"train": MINIMAL["train"]}, ["data", "required"]),
        ({**MINIMAL, "name": "../escape"}, ["name"]),
        ({**MINIMAL, "name": ".."}, ["name", "'..'"]),
        ({**MINIMAL, "name": "my run"}, ["name: 'my run' is not a run name", "no spaces"]),
        (merged(sampling={"interval": [1, 0.1]}), ["sampling.interval: [1, 0.1] must increase"]),
        ({**MINIMAL, "runs": "~nobodyx/rr"}, ["runs: ~nobodyx/rr", "no home folder ~nobodyx", "./~nobodyx/rr"]),
        (merged(data={"val_path": "~nobodyx"}), ["data.val_path: ~nobodyx: no home folder"]),
        ({"modality": "molecules", "train": MINIMAL["train"], "sampling": {"interval": [1, 0]}}, ["sampling.interval"]),
    ],
)
def test_refusals_name_key_value_and_remedy(data, words):
    message = refusal(data)
    for word in words:
        assert word in message


def test_every_problem_is_reported_at_once():
    message = refusal(merged(model={"widht": 1}, optimizer={"lr": -1}))
    assert "model.widht" in message and "optimizer.lr" in message


def test_overrides(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(MINIMAL))
    config = Config.load(
        path, ["data.path=/a=b", "train.global_batch=256", "model.decoder.depth=2", "train.micro_batch=auto"]
    )
    assert (config.data.path, config.train.global_batch, config.model.decoder.depth) == ("/a=b", 256, 2)
    assert config.train.micro_batch == "auto"
    for override, word in (
        ("train.global_batch", "key.path=value"),
        ("data.path.x=1", "not a section"),
        ('model={"depth": 2, "depth": 3}', "'depth' is given more than once"),
        ("train.steps=" + "[" * 100_000, "train.steps"),
        ("train.steps=" + "9" * 5_000, "train.steps"),
    ):
        with pytest.raises(UserError, match=word):
            Config.load(path, [override])


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "JSON object"),
        (None, "cannot read"),
        ('{"train": {"steps": 20, "seed": 0, "steps": 3}}', "c.json: 'steps' is given more than once"),
    ],
    ids=["cut", "deep", "array", "absent", "twice"],
)
def test_files_that_are_no_configuration(tmp_path, text, word):
    path = tmp_path / "c.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=word):
        Config.load(path)


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(MINIMAL), encoding="utf-8-sig")
    assert Config.load(path) == Config.parse(MINIMAL)


def test_preset_fills_sizes_and_explicit_sizes_win():
    model = ModelConfig(preset="L", depth=3, context_start=1)
    assert (model.depth, model.width, model.heads) == (3, 1024, 16)


def test_paths_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/one")
    keys = (
        "runs", "data.path", "data.val_path", "objective.lpips.vgg", "objective.lpips.linear", "train.start_from",
    )  # fmt: skip
    keys_of = {
        "images": (*keys, "evaluation.inception", "evaluation.reference"),
        "molecules": ("runs", "data.path", "data.cache", "train.start_from"),
    }
    for modality, paths in keys_of.items():
        path = tmp_path / "c.json"
        path.write_text(json.dumps({"modality": modality, "train": MINIMAL["train"]}))
        config = Config.load(path, [f"{key}=~/{key}" for key in paths])
        assert [attrgetter(key)(config) for key in paths] == [f"/home/one/{key}" for key in paths]
    assert Config.parse(merged(data={"path": "./~/x~"})).data.path == "./~/x~"


@pytest.mark.parametrize(
    ("file", "changes", "overrides", "encoder", "decoder"),
    [
        ("b_h100", {}, ["preset=L"], (24, 1024, 16), (12, 768, 12)),
        ("b_h100", {}, ["decoder.preset=S"], (12, 768, 12), (12, 384, 6)),
        ("b_h100", {}, ["depth=6", "preset=L"], (6, 1024, 16), (12, 768, 12)),
        ("b_h100", {"depth": 5}, ["preset=L"], (5, 1024, 16), (12, 768, 12)),
        ("b_h100", {"preset": None, "decoder": {}}, ["preset=L", "decoder.preset=L"], (24, 1024, 16), (24, 1024, 16)),
        ("l_h100", {}, ["preset=null"], (24, 1024, 16), (12, 768, 12)),
        ("qm9_s", {}, ["preset=mol_tiny"], (6, 192, 3), (4, 192, 3)),
        ("qm9_s", {"decoder": {"depth": 2}}, ["preset=mol_debug"], (2, 64, 2), (2, 64, 2)),
        ("qm9_s", {"decoder": {"depth": 2}}, [], (12, 384, 6), (2, 384, 6)),
        ("qm9_s", {"decoder": {"depth": 2}}, ["preset=mol_tiny"], (6, 192, 3), (2, 192, 3)),
        ("qm9_s", {"decoder": {"preset": "mol_tiny", "heads": 6}}, ["preset=mol_debug"], (2, 64, 2), (4, 192, 6)),
        ("b_h100", {"decoder": {"preset": "S", "width": 768}}, ["preset=L"], (24, 1024, 16), (12, 768, 6)),
    ],
)
def test_another_preset_takes_the_sizes_of_the_former_one_along(tmp_path, file, changes, overrides, encoder, decoder):
    data = json.loads((ROOT / "configs" / f"{file}.json").read_text())
    data["model"] |= changes
    path = tmp_path / "config.json"
    path.write_text(Config.parse(data).to_json())
    model = Config.load(path, [f"model.{override}" for override in overrides]).model
    assert (model.depth, model.width, model.heads) == encoder
    assert (model.decoder.depth, model.decoder.width, model.decoder.heads) == decoder


def test_bad_configuration_fails_as_one_line_without_traceback(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(merged(model={"widht": 64})))
    script = ROOT / "unite_fast" / "train.py"
    done = subprocess.run([sys.executable, script, "--config", path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "model.widht" in done.stderr and "Traceback" not in done.stderr

"""Weights in and out of published files, damaged and hostile ones among them, and the published naming back."""

import argparse
import zipfile

import numpy as np
import pytest
import torch
from cli_toy import CONFIG, MADE_BY, mistake, run, same_weights, save_toy, small_disk, toy_model
from golden import FILE, golden, needs_golden, published_weights, relative_error
from safetensors.torch import load_file, save_file

from unite_fast import ModelConfig, load
from unite_fast.importing import read_published
from unite_fast.model.io import read_model
from unite_fast.model.published import to_published
from unite_fast.weights import read_file

EMA, MODEL = toy_model(seed=1), toy_model(seed=2)
PATCH_POSITIONS = "patch_embed.position_embeddings"


def _published(model):
    return to_published(model.state_dict(), model.config)


def _checkpoint_file(path, **changes):
    """A published training checkpoint: two sets of weights, optimizer states, bookkeeping."""
    content = {
        "step": 120, "epoch": 3, "model": _published(MODEL), "ema": _published(EMA),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "scheduler": {"last_epoch": 3}, "optimizer_muon": {}, "scheduler_muon": {}, "current_best_cfg_scale": 2.4,
    }  # fmt: skip
    torch.save(content | changes, path)
    return path


@needs_golden
def test_golden_file_imports_and_tokenises_as_recorded(tmp_path, capsys):
    assert run("import", FILE, "--out", tmp_path / "model", "--heads", 3) == 0
    tensors = golden()
    model = load(tmp_path / "model")
    assert model.config == ModelConfig(
        depth=6, width=96, heads=3, latent_dim=16, num_classes=10, context_len=8, context_start=4,
        decoder=dict(depth=2, width=64, heads=2, inner=model.config.decoder.inner),
    )  # fmt: skip
    with torch.no_grad():
        z0 = model.tokenize(tensors["in.images"], noise=tensors["in.register_noise"], t=tensors["in.tokenize_t"])
        images = model.decode(tensors["out.decoder_input"])
    assert relative_error(z0, tensors["out.z0"]) < 1e-4
    assert relative_error(images, tensors["out.recon"]) < 1e-4
    printed = " ".join(capsys.readouterr().out.split())
    assert "6 blocks, width 96, 3 heads" in printed and "--decoder-heads" in printed


@needs_golden
def test_golden_weights_come_back_under_their_names(tmp_path):
    assert run("import", FILE, "--out", tmp_path / "model") == 0
    out = tmp_path / "back.safetensors"
    assert run("export", tmp_path / "model", "--published", out) == 0
    back, weights = load_file(out), published_weights(golden())
    assert set(back) == set(weights)
    trained = [name for name in weights if not any(part in name for part in ("rope", "pos_embed"))]
    assert len(trained) > 100
    assert all(torch.equal(back[name], weights[name]) for name in trained)


@pytest.mark.parametrize(("option", "model"), [([], EMA), (["--weights", "ema"], EMA), (["--weights", "model"], MODEL)])
def test_either_set_of_a_training_checkpoint(option, model, tmp_path):
    path = _checkpoint_file(tmp_path / "checkpoint.pt")
    assert run("import", path, "--out", tmp_path / "model", *option) == 0
    assert same_weights(load(tmp_path / "model"), model)
    config, _, made_by = read_model(tmp_path / "model")
    assert config == CONFIG
    assert made_by["imported_from"] == "checkpoint.pt" and made_by["step"] == 120
    assert made_by["weights"] == (option or ["", "ema"])[1]
    assert made_by["sampling"]["guidance"] == 2.4 and made_by["sampling"]["solver"] == "dopri5"
    assert run("sample", "--run", tmp_path / "model", "--count", 1, "--solver", "euler", "--steps", 2) == 0


@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_numbers_of_numpy_in_a_checkpoint(module, tmp_path):
    path = _checkpoint_file(tmp_path / "numbers.pt")
    content = torch.load(path, weights_only=True)
    content |= {"current_best_cfg_scale": np.float64(2.4), "step": np.int64(120)}
    content["scheduler"]["rates"] = [np.float32(0.5)]
    torch.save(content, path)
    # As NumPy 2 and 1 name what makes a number.
    rewrite_pickle(path, b"numpy._core.multiarray", module.encode())
    read = read_published(path)
    assert read.made_by["step"] == 120 and type(read.made_by["step"]) is int
    assert type(read.made_by["sampling"]["guidance"]) is float and read.made_by["sampling"]["guidance"] == 2.4
    assert read_file(path)["scheduler"]["rates"] == [0.5]


def rewrite_pickle(path, old, new):
    """Put other words into the pickle of a PyTorch archive, as text opcodes, whose length is free."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    assert b"c" + old + b"\n" in members[name]
    members[name] = members[name].replace(b"c" + old + b"\n", b"c" + new + b"\n")
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)


def _wrapped(name):
    return "module._orig_mod." + name.replace("decoder.decoder_layers", "decoder._orig_mod.decoder_layers")


@pytest.mark.parametrize(
    "rename", [lambda n: n, _wrapped, lambda n: f"module.{n}", lambda n: f"_orig_mod.module.{n}"],
    ids=["plain", "compiled", "module", "both"],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_wrapped_state_dicts(rename, suffix, tmp_path):
    state = {rename(name): tensor.clone() for name, tensor in _published(EMA).items()}
    state[rename("lpips_loss.net.lin0.weight")] = torch.ones(4)
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pt" else save_file)(state, path)
    assert same_weights(read_published(path).build(), EMA)


def test_weights_beside_other_entries(tmp_path):
    entries = {f"weights.{name}": tensor.clone() for name, tensor in _published(EMA).items()}
    save_file(entries | {"in.images": torch.zeros(2), "grad.latent_tokens": torch.zeros(3)}, tmp_path / "w.safetensors")
    assert same_weights(read_published(tmp_path / "w.safetensors").build(), EMA)


def test_half_precision_weights_become_float32(tmp_path):
    torch.save({name: tensor.bfloat16() for name, tensor in _published(EMA).items()}, tmp_path / "half.pt")
    state = read_published(tmp_path / "half.pt").state
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert relative_error(state["encoder.label.weight"], EMA.encoder.label.weight) < 0.01


def test_heads_as_given(tmp_path, capsys):
    path = _checkpoint_file(tmp_path / "c.pt")
    assert read_published(path, heads=2, decoder_heads=4).config.decoder.heads == 4
    base = ["import", path, "--out", tmp_path / "out"]
    assert "--heads 4 contradicts the q norm's width, which implies 2 heads" in mistake(capsys, *base, "--heads", 4)
    assert "decoder width 16 is not divisible by its 3 heads" in mistake(capsys, *base, "--decoder-heads", 3)
    says = mistake(capsys, *base, "--context-start", 9)
    assert "context_start 9 is not below depth" in says and "set --context-start, or model.context_start of" in says
    assert not (tmp_path / "out").exists()


class Surprise:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_python_objects_are_refused_and_explained(tmp_path, capsys):
    base = ["--out", tmp_path / "out"]
    path = _checkpoint_file(tmp_path / "args.pt", args=argparse.Namespace(lr=1))
    says = mistake(capsys, "import", path, *base)
    assert "holds Python objects beside its tensors (argparse.Namespace)" in says and "refused" in says
    path = _checkpoint_file(tmp_path / "surprise.pt", config=Surprise(tmp_path / "was_run"))
    assert "open" in mistake(capsys, "import", path, *base)
    assert not (tmp_path / "was_run").exists() and not (tmp_path / "out").exists()


def _plain(**changes):
    state = _published(EMA) | changes
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.zeros(2)], "holds a list, not a checkpoint dictionary"),
        ({"model": [1, 2]}, "its `model` entry is a list, not a state dict"),
        ({"model": _plain(), "ema": None}, "its `ema` entry is a NoneType"),
        ({}, "'encoder.up_sample.weight' is missing"),
        ({"state": {"a": torch.zeros(1)}}, "entry 'state' is a dict; a state dict holds named tensors only"),
        (_plain(**{"encoder.up_sample.bias": 3}), "entry 'encoder.up_sample.bias' is a int"),
        (_plain(**{"encoder.up_sample.bias": None}), "missing 1 entries, first 'encoder.register_in.bias'"),
        (_plain(extra=torch.zeros(1)), "unknown 1 entries, first 'extra'"),
        (_plain(**{"encoder.up_sample.weight": torch.zeros(16)}), "its shapes fit no model"),
        (_plain(**{"encoder.up_sample.weight": torch.zeros(17, 4)}), "cannot import"),
        (_plain(**{"latent_tokens": torch.zeros(16)}), "its shapes fit no model"),
        (_plain(**{"encoder.blocks.0.attn.q_norm.weight": torch.zeros(0)}), "its shapes fit no model"),
        (_plain(**{"encoder.y_embedder.embedding_table.weight": torch.zeros(1, 16)}), "its shapes fit no model"),
        (_plain(**{"encoder.blocks.3.mlp.w3.weight": torch.zeros(3, 3)}), "has shape [3, 3], sizes inferred"),
        (_plain(**{"encoder_layer_norm.bias": torch.full((4,), torch.nan)}), "1 entries hold NaN or infinite values"),
        (_plain(**{"latent_tokens": torch.zeros(1).expand(1, 10**9, 10**9)}), "and stores fewer numbers"),
        (_plain(**{"latent_tokens": torch.zeros(1, 16, 16, dtype=torch.int8)}), "is of torch.int8; weights are"),
        (_plain(**{"latent_tokens": torch.zeros(1, 16, 16, dtype=torch.complex64)}), "is of torch.complex64; weights"),
        (_plain(**{"module.latent_tokens": torch.zeros(1)}), "two entries are named 'latent_tokens'"),
        (_plain(**{PATCH_POSITIONS: torch.full((1, 17, 16), 0.1)}), f"{PATCH_POSITIONS} holds other positions than"),
        (_plain(**{"decoder.decoder_pos_embed": torch.zeros(1, 17, 16)}), "which are sines and cosines of the grid"),
        (EMA.state_dict(), "is in unite_fast's own naming already"),
    ],
)
def test_files_of_something_else(content, says, tmp_path, capsys):
    torch.save(content, tmp_path / "file.pt")
    assert says in mistake(capsys, "import", tmp_path / "file.pt", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sets_that_are_not_there(tmp_path, capsys):
    torch.save({"model": _plain(), "step": 3}, tmp_path / "one.pt")
    assert read_published(tmp_path / "one.pt").made_by["weights"] == "model"
    says = mistake(capsys, "import", tmp_path / "one.pt", "--out", tmp_path / "out", "--weights", "ema")
    assert says.endswith("has no `ema` weights: it holds 'model'")
    torch.save(_plain(), tmp_path / "plain.pt")
    says = mistake(capsys, "import", tmp_path / "plain.pt", "--out", tmp_path / "out", "--weights", "ema")
    assert says.endswith("holds one plain set of weights and no `ema` entry: leave --weights out")


@pytest.mark.parametrize("name", ["c.pt", "c.safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_truncated_files(name, keep, tmp_path, capsys):
    path = tmp_path / name
    _checkpoint_file(path) if name == "c.pt" else save_file(_plain(), path)
    path.write_bytes(path.read_bytes()[:keep])
    says = mistake(capsys, "import", path, "--out", tmp_path / "out")
    assert str(path) in says and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"hello", b".gitignore", b"a list of things to do\n", b"<!DOCTYPE html>"])
def test_files_that_hold_no_weights(content, tmp_path, capsys):
    path = tmp_path / "c.pt"
    path.write_bytes(content)
    says = mistake(capsys, "import", path, "--out", tmp_path / "out")
    assert says.startswith(f"{path} is not a PyTorch weights file") and not (tmp_path / "out").exists()


def test_files_that_are_not_there(tmp_path, capsys):
    assert mistake(capsys, "import", tmp_path / "no.pt", "--out", tmp_path) == f"no file {tmp_path / 'no.pt'}"
    assert mistake(capsys, "import", tmp_path, "--out", tmp_path / "out") == f"no file {tmp_path}"


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_published_naming_round_trip(suffix, tmp_path, capsys):
    save_toy(tmp_path / "model")
    path = tmp_path / "new" / f"published{suffix}"
    assert run("export", tmp_path / "model", "--published", path) == 0
    assert "does not record the heads (2 and 2 in the decoder)" in " ".join(capsys.readouterr().out.split())
    again = read_published(path)
    assert same_weights(again.build(), load(tmp_path / "model"))
    if suffix != ".safetensors":
        assert (again.made_by["weights"], again.made_by["step"]) == ("ema", 5)


def test_fixed_tables_of_a_published_file():
    published, rope = _published(EMA), "encoder.feat_rope"
    angle = torch.arange(32.0)[:, None] * 10_000.0 ** (-torch.arange(0, 8, 2) / 8)  # 16 registers and 16 patches
    angle = angle.repeat_interleave(2, dim=1)
    for name, table, still in (("cos", angle.cos(), 1.0), ("sin", angle.sin(), 0.0)):
        assert torch.allclose(published[f"{rope}.freqs_{name}"], table, atol=1e-5)
        with_context = published[f"{rope}_incontext.freqs_{name}"]
        assert (with_context[:2] == still).all() and torch.allclose(with_context[2:], table, atol=1e-5)
    assert published["patch_embed.position_embeddings"].shape == (1, 17, 16)
    assert not published["patch_embed.position_embeddings"].any()
    assert torch.equal(published["decoder.decoder_pos_embed"], EMA.decoder.position)


def test_what_the_published_naming_cannot_hold(tmp_path, capsys):
    save_toy(tmp_path / "model", config=CONFIG.model_copy(update={"registers": 8}))
    base = ["export", tmp_path / "model", "--published"]
    assert "needs one register per patch" in mistake(capsys, *base, tmp_path / "p.pt")
    for changed in ({"register_noise": False}, {"latent_norm": "rms"}):
        save_toy(tmp_path / "other", config=CONFIG.model_copy(update=changed))
        says = mistake(capsys, "export", tmp_path / "other", "--published", tmp_path / "p.pt")
        assert "a published model starts its registers from noise and ends in a LayerNorm" in says
    assert "must end in .pt, .pth or .safetensors" in mistake(capsys, *base, tmp_path / "p.bin")
    assert not list(tmp_path.glob("p.*"))


def test_settings_that_the_published_naming_has_no_place_for_are_said(tmp_path, capsys):
    out = tmp_path / "p.pt"
    save_toy(tmp_path / "model", made_by=MADE_BY | {"tokenize_t_max": 0.2})
    assert run("export", tmp_path / "model", "--published", out) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {out} does not record {key} {own} either: whoever reads it takes {assumed}"
        for key, own, assumed in (("objective.tokenize_t_max", 0.2, 0.01), ("objective.time_shift", 0.7, 0.5))
    ]
    save_toy(tmp_path / "model", made_by={})
    assert run("export", tmp_path / "model", "--published", out) == 0 and not capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--out", "new"], ["--published", "p.pt"], ["--published", "p.safetensors"]])
def test_full_disk_and_unwritable_folder(arguments, tmp_path, capsys):
    save_toy(tmp_path / "model")
    option, name = arguments
    (tmp_path / "file").touch()
    says = mistake(capsys, "export", tmp_path / "model", option, tmp_path / "file" / name)
    assert says.startswith("cannot write ")
    with small_disk(2000):
        says = mistake(capsys, "export", tmp_path / "model", option, tmp_path / name)
    assert says.startswith("cannot write ")
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != tmp_path / "model"]
    assert left == [tmp_path / "file"]

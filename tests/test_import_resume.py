"""Training on from a published training checkpoint, and the way back: optimizer states, EMA, order, mistakes."""

import copy
import json
import shutil

import pytest
import torch
from cli_toy import mistake, run, small_disk
from golden import golden, needs_golden, published_weights
from runs import config, config_file, image_tree, latest_step, settings
from safetensors.torch import load_file

from unite_fast.config import Config, ModelConfig
from unite_fast.engine import checkpoint
from unite_fast.engine.loop import train
from unite_fast.engine.optim import matrix_shape
from unite_fast.errors import UserError
from unite_fast.importing import read_published
from unite_fast.model.published import from_published, our_names, to_published
from unite_fast.model.unite import Unite
from unite_fast.published_training import KEPT, UNUSED, import_training, parameter_order

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    image_tree(folder / "train")
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """A run of six steps."""
    return train(config(folder, name="first", train={"steps": STEPS, "checkpoint_every": STEPS}))


@pytest.fixture(scope="module")
def file(trained, folder):
    """The same as a published file, dressed as the authors': schedulers, wrappers, counters of another kind, LPIPS."""
    path = folder / "exported.pt"
    assert run("export", trained, "--published", path, "--with-optimizer") == 0
    content = torch.load(path, weights_only=True)

    def wrapped(name):
        return name.replace("decoder.decoder_layers", "decoder._orig_mod.decoder_layers")

    for key in ("model", "ema"):
        content[key] = {wrapped(name): tensor for name, tensor in content[key].items()}
        content[key]["lpips_loss.lin0.weight"] = torch.rand(4)
        content[key]["encoder.pos_embed"] = content[key]["encoder.pos_embed"] + 1e-7  # tables are theirs, not ours
    content["optimizer"]["param_groups"][0]["betas"] = (0.9, 0.999)
    content |= {
        "step": 2 * STEPS, "epoch": 1, "current_best_cfg_scale": 2.4,
        "scheduler": {"last_epoch": 2 * STEPS, "base_lrs": [1e-3], "_last_lr": [0.001], "lr_lambdas": [None]},
        "scheduler_muon": {"last_epoch": 2 * STEPS, "milestones": (1, 2)},
    }  # fmt: skip
    path = folder / "published.pt"
    torch.save(content, path)
    return path


def _equal(one, other):
    """The same containers, keys in the same order, tensors of the same bits."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            _equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            _equal(a, b)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one.view(torch.uint8) if one.ndim else one, other.view(torch.uint8) if other.ndim else other)
    else:
        assert one == other


def _tensors(directory):
    return {
        f"{name}:{key}": value
        for name in ("model", "ema", "optimizer")
        for key, value in load_file(directory / f"{name}.safetensors").items()
    }


def _import(folder, file, name, *overrides):
    configuration = config_file(folder, train={"steps": STEPS + 4, "checkpoint_every": 2})
    return run("import", file, "--config", configuration, "--set", f"name={name}", *overrides)


def test_training_goes_on_as_if_it_had_never_left(folder, trained, file, capsys):
    assert _import(folder, file, "imported") == 0
    printed = capsys.readouterr()
    imported = folder / "runs" / "imported"
    assert f"is step {STEPS} of {imported}" in printed.out and "--set name=imported --resume" in printed.out
    assert printed.err == ""
    before = _tensors(checkpoint.latest(trained))
    after = _tensors(checkpoint.latest(imported))
    assert set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)
    longer = {"steps": STEPS + 4, "checkpoint_every": 2}
    straight = shutil.copytree(trained, folder / "runs" / "straight")
    for name in ("imported", "straight"):
        train(config(folder, name=name, train=longer), resume=True)
    expected, found = _tensors(checkpoint.latest(straight)), _tensors(checkpoint.latest(imported))
    assert latest_step(imported) == STEPS + 4
    assert set(expected) == set(found) and all(torch.equal(expected[key], found[key]) for key in expected)


def test_nothing_left_to_train_is_said_before_anything_is_written(folder, file):
    assert _import(folder, file, "ended", f"train.steps={STEPS}") == 0
    before = sorted(path.name for path in (folder / "runs" / "ended").iterdir())
    with pytest.raises(UserError, match=f"is at step {STEPS} and the run ends at step {STEPS}: nothing is left"):
        train(config(folder, name="ended", train={"steps": STEPS}), resume=True)
    assert sorted(path.name for path in (folder / "runs" / "ended").iterdir() if path.name != ".lock") == before


def test_a_round_trip_changes_no_bit(folder, file):
    assert _import(folder, file, "round") == 0
    back = folder / "back.pt"
    assert run("export", folder / "runs" / "round", "--published", back, "--with-optimizer") == 0
    _equal(torch.load(file, weights_only=True), torch.load(back, weights_only=True))


def test_what_is_exported_after_more_steps(folder, file, capsys):
    assert _import(folder, file, "more") == 0
    rates = {"lr": 5e-4, "warmup_epochs": 100}
    longer = config(folder, name="more", train={"steps": STEPS + 2, "checkpoint_every": 2}, optimizer=rates)
    run_folder = train(longer, resume=True)
    capsys.readouterr()
    out = folder / "more.pt"
    assert run("export", run_folder, "--published", out, "--with-optimizer") == 0
    assert "without scheduler, scheduler_muon, epoch" in capsys.readouterr().out
    before, after = torch.load(file, weights_only=True), torch.load(out, weights_only=True)
    assert set(before) - set(after) == {"scheduler", "scheduler_muon", "epoch"} and after["step"] == STEPS + 2
    assert list(after["model"]) == list(before["model"])  # wrappers, tables and LPIPS weights as they were
    assert {float(entry["step"]) for entry in after["optimizer"]["state"].values()} == {STEPS + 2}
    last = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])
    rates = {after[key]["param_groups"][0]["lr"] for key in ("optimizer", "optimizer_muon")}
    assert last["step"] == STEPS + 2 and rates == {last["lr"]} and 0 < last["lr"] < 1e-4
    assert not torch.equal(after["ema"]["latent_tokens"], before["ema"]["latent_tokens"])
    assert torch.equal(after["ema"]["encoder.pos_embed"], before["ema"]["encoder.pos_embed"])
    assert read_published(out, context_start=1).config == read_published(file, context_start=1).config


def test_the_form_is_that_of_torchs_own_optimizers(trained, file):
    """torch.optim.AdamW and Muon on the published parameters load the states and step with them."""
    content = torch.load(file, weights_only=True)
    model = Config.load(trained / "config.json").model
    ours = our_names((name.replace("._orig_mod", "") for name in content["model"]), model)
    plain = {name.replace("._orig_mod", ""): tensor for name, tensor in content["model"].items()}
    tensors = {ours[name]: tensor for name, tensor in plain.items() if name in ours}
    saved = load_file(checkpoint.latest(trained) / "model.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in saved.items())
    averages = load_file(checkpoint.latest(trained) / "ema.safetensors")
    assert torch.equal(content["ema"]["latent_tokens"], averages["encoder.register_position"])
    assert not torch.equal(content["ema"]["latent_tokens"], content["model"]["latent_tokens"])
    for key, kind in (("optimizer", torch.optim.AdamW), ("optimizer_muon", torch.optim.Muon)):
        names = parameter_order(content["model"], model)[key]
        parameters = [torch.nn.Parameter(tensors[name].clone()) for name in names]
        optimizer = kind(parameters)
        optimizer.load_state_dict(copy.deepcopy(content[key]))
        assert [name for name, p in zip(names, parameters) if p not in optimizer.state] == (
            [UNUSED] if key == "optimizer" else []
        )
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert all(not torch.equal(a, b) for a, b in zip(before, parameters))
        moments = load_file(checkpoint.latest(trained) / "optimizer.safetensors")
        for name, parameter in zip(names, parameters):
            if name != UNUSED and key == "optimizer_muon":
                expected = torch.lerp(moments[f"momentum_buffer/{name}"], torch.ones_like(parameter), 0.05)
                assert torch.allclose(optimizer.state[parameter]["momentum_buffer"], expected)


def test_exported_groups_have_what_the_run_trained_with(trained, tmp_path):
    other = shutil.copytree(trained, tmp_path / "other")
    path = checkpoint.latest(other) / "state.json"
    state = json.loads(path.read_text())
    state["config"]["optimizer"] |= {
        "betas": [0.8, 0.95], "eps": 1e-7, "weight_decay": 0.1, "momentum": 0.9, "newton_schulz_steps": 4
    }  # fmt: skip
    path.write_text(json.dumps(state))
    assert run("export", other, "--published", tmp_path / "p.pt", "--with-optimizer") == 0
    content = torch.load(tmp_path / "p.pt", weights_only=True)
    adamw, muon = (content[key]["param_groups"][0] for key in ("optimizer", "optimizer_muon"))
    assert (tuple(adamw["betas"]), adamw["eps"], adamw["weight_decay"]) == ((0.8, 0.95), 1e-7, 0.1)
    assert (muon["momentum"], muon["weight_decay"], muon["ns_steps"], muon["nesterov"]) == (0.9, 0.1, 4, True)
    assert adamw["lr"] == muon["lr"] == 1e-3


def test_an_imported_run_is_a_run(folder, file):
    assert _import(folder, file, "used") == 0
    imported = folder / "runs" / "used"
    assert run("sample", "--run", imported, "--count", 2) == 0
    assert run("export", imported, "--out", folder / "model", "--weights", "model") == 0
    state = json.loads((checkpoint.latest(imported) / "state.json").read_text())
    assert state["extra"] == {"images": 5 * STEPS, "training_seconds": 0.0, "imported_from": "published.pt"}


def test_weights_and_run_at_once(folder, file):
    assert _import(folder, file, "both", "--context-start", 1, "--out", folder / "weights") == 0
    assert (folder / "weights" / "model.safetensors").is_file() and (folder / "runs" / "both" / KEPT).is_file()


def test_other_hyperparameters_are_told(folder, file, capsys):
    overrides = ["optimizer.eps=1e-8", "optimizer.momentum=0.9", "optimizer.lr=0.0001"]
    assert _import(folder, file, "told", *overrides) == 0
    warned = capsys.readouterr().err
    assert "eps of `optimizer` was 1e-06, is 1e-08" in warned
    assert "momentum of `optimizer_muon` was 0.95, is 0.9" in warned
    assert "learning rate of `optimizer` was 0.001, above this configuration's peak 0.0001" in warned


def _changed(file, path, change):
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def _positions(content, key):
    return content[key]["param_groups"][0]["params"]


def _first(content, key):
    return next(iter(content[key]["state"].values()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("optimizer_muon"), "it holds no `optimizer_muon`; `unite-fast import FILE --out DIR` takes"),
        (lambda c: (c.pop("ema"), c.pop("optimizer")), "it holds no `ema` and no `optimizer`"),
        (lambda c: c.update(optimizer={}), "not an optimizer state of one parameter group: it has no groups"),
        (lambda c: c["optimizer"]["param_groups"].append({"params": []}), "it has 2 groups"),
        (lambda c: c["optimizer"]["param_groups"][0].pop("params"), "does not list its parameters"),
        (lambda c: _positions(c, "optimizer_muon").pop(), "`optimizer_muon` holds 20 parameters, this model has 21"),
        (lambda c: _positions(c, "optimizer").extend([97, 98]), "`optimizer` holds"),
        (lambda c: c["optimizer"]["state"].pop(3), "`optimizer` holds no state for parameter 3"),
        (lambda c: _first(c, "optimizer").update(max_exp_avg_sq=torch.zeros(1)), "keeps max_exp_avg_sq for"),
        (lambda c: _first(c, "optimizer_muon").pop("momentum_buffer"), "`optimizer_muon` momentum_buffer of"),
        (lambda c: _positions(c, "optimizer_muon").reverse(), "list their parameters in a different order"),
        (lambda c: _first(c, "optimizer").update(exp_avg=torch.zeros(2)), "has shape [2] where the parameter has"),
        (lambda c: _first(c, "optimizer")["exp_avg_sq"].fill_(float("nan")), "holds NaN or infinite values"),
        (lambda c: _first(c, "optimizer").update(step=torch.tensor(3.0)), "no common step count: [3.0, 6.0]"),
        (lambda c: [e.pop("step") for e in c["optimizer"]["state"].values()], "no common step count: []"),
        (lambda c: c["ema"].pop("latent_tokens"), "'latent_tokens' is missing"),
        (lambda c: c["model"].update({"encoder_layer_norm.bias": torch.full((4,), torch.nan)}), "1 entries hold NaN"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(change, says, folder, file, tmp_path, capsys):
    path = _changed(file, tmp_path / "changed.pt", change)
    configuration = config_file(tmp_path, name="x")
    assert says in mistake(capsys, "import", path, "--config", configuration)
    assert not (tmp_path / "runs").exists()


def test_an_optimizer_that_leaves_the_unused_parameter_out(folder, trained, file, tmp_path):
    model = Config.load(trained / "config.json").model

    def leave_out(content):
        at = parameter_order(content["model"], model)["optimizer"].index(UNUSED)
        assert at not in content["optimizer"]["state"]
        content["optimizer"]["param_groups"][0]["params"].pop()
        content["optimizer"]["state"] = {
            index - (index > at): entry for index, entry in content["optimizer"]["state"].items()
        }

    path = _changed(file, tmp_path / "shorter.pt", leave_out)
    made = import_training(path, config(tmp_path, name="x"))
    found, expected = _tensors(checkpoint.latest(made.folder)), _tensors(checkpoint.latest(trained))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"model": {"depth": 3}}, "model.depth is 3, there 2"),
        ({"model": {"decoder": {"depth": 2, "width": 16, "heads": 2, "inner": 16}}}, "model.decoder.depth is 2, there"),
        ({"model": {"num_classes": 5, "latent_dim": 8}}, "latent_dim is 8, there 4; model.num_classes is 5, there 2"),
        ({"model": {"shared": False}}, "set model.shared to true"),
        ({"model": {"register_noise": False}}, "model.register_noise is False, there True"),
        ({"model": {"latent_norm": "none"}}, "model.latent_norm is none, there layer"),
        ({"optimizer": {"kind": "adamw"}}, "continues under optimizer.kind muon"),
        ({"optimizer": {"ema_decays": [0.5]}}, "holds one EMA: remove optimizer.ema_decays"),
        ({"name": "first", "runs": None}, "already holds a run: choose another name"),
    ],
)
def test_configurations_that_do_not_fit(sections, says, folder, file, tmp_path, capsys):
    sections = {name: str(folder / "runs") if value is None else value for name, value in sections.items()}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings(tmp_path, **sections)))
    assert says in mistake(capsys, "import", file, "--config", path)
    assert not (tmp_path / "runs").exists()


def test_mistakes_of_the_command_line(folder, trained, file, tmp_path, capsys):
    assert mistake(capsys, "import", file).startswith("nothing to write: give --out DIR")
    says = mistake(capsys, "export", trained, "--out", tmp_path / "m", "--with-optimizer")
    assert says == "--with-optimizer needs --published FILE"
    base = ["export", trained, "--with-optimizer", "--published"]
    assert "must end in .pt or .pth" in mistake(capsys, *base, tmp_path / "a.safetensors")
    shutil.copytree(trained / "export", tmp_path / "model")
    says = mistake(capsys, "export", tmp_path / "model", "--with-optimizer", "--published", tmp_path / "a.pt")
    assert "holds no checkpoint" in says and not (tmp_path / "a.pt").exists()


def test_a_full_disk_leaves_nothing_to_resume(file, tmp_path, capsys):
    configuration = config_file(tmp_path, name="x")
    with small_disk(30_000):
        assert "cannot write" in mistake(capsys, "import", file, "--config", configuration)
    assert checkpoint.latest(tmp_path / "runs" / "x") is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path != configuration]


@needs_golden
def test_golden_names_and_shapes(tmp_path):
    """The authors' own names: every trained one gets moments of its shape, by real optimizers."""
    weights = published_weights(golden())
    sizes = read_published(_saved(tmp_path / "w.pt", weights)).config
    order = parameter_order(weights, sizes)
    trained = our_names(weights, sizes)
    state = {name: weights[published] for published, name in trained.items()}
    averages = {name: tensor + 0.01 if name in trained else tensor for name, tensor in weights.items()}
    content = {"step": 8, "epoch": 0, "model": weights, "ema": averages}
    for key, kind in (("optimizer", torch.optim.AdamW), ("optimizer_muon", torch.optim.Muon)):
        parameters = [torch.nn.Parameter(state[name].clone()) for name in order[key]]
        optimizer = kind(parameters, lr=1e-4)
        for _ in range(4):
            for name, parameter in zip(order[key], parameters):
                parameter.grad = None if name == UNUSED else torch.randn_like(parameter)
            optimizer.step()
        content[key] = optimizer.state_dict()
    run_config = config(tmp_path, model=sizes.model_dump(mode="json"), train={"global_batch": 8})
    made = import_training(_saved(tmp_path / "golden.pt", content), run_config)
    assert made.step == 4
    assert run("export", made.folder, "--published", tmp_path / "back.pt", "--with-optimizer") == 0
    _equal(content, torch.load(tmp_path / "back.pt", weights_only=True))


def _saved(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("preset", "trained_parameters", "matrices"), [("B", 217_643_616, 115), ("L", 545_528_384, 175)]
)
def test_published_sizes_without_their_weights(preset, trained_parameters, matrices):
    """B, and L with its Base decoder, compiled: names, shapes and optimizer positions, on the meta device."""
    sizes = ModelConfig(preset=preset, decoder={"preset": "B"})
    with torch.device("meta"):
        model = Unite(sizes)
        state = {name: torch.empty(shape) for name, shape in Unite.state_shapes(sizes).items()}
    published = {
        name.replace("decoder.", "decoder._orig_mod.", 1) if name.startswith("decoder.") else name: tensor
        for name, tensor in to_published(state, sizes).items()
    }
    found, back = from_published(published)
    ignored = {"preset", "decoder"}
    assert found.model_dump(exclude=ignored) == sizes.model_dump(exclude=ignored)
    assert found.decoder.model_dump(exclude={"preset"}) == sizes.decoder.model_dump(exclude={"preset"})
    assert {name: tuple(tensor.shape) for name, tensor in back.items()} == Unite.state_shapes(sizes)
    order = parameter_order(published, sizes)
    parameters = dict(model.named_parameters())
    assert sum(parameters[name].numel() for names in order.values() for name in names) == trained_parameters
    assert set(order["optimizer_muon"]) == model.matrix_parameters()
    assert len(order["optimizer_muon"]) == matrices
    assert all(len(matrix_shape(parameters[name].shape)) == 2 for name in order["optimizer_muon"])

"""train.compile: the compiled passes are the eager ones, on one process and under ZeRO, and are compiled once.

Most tests stop before Inductor ("aot_eager": traced, cut into forward and backward, run by PyTorch), which takes
minutes for its C++; one goes all the way.
"""

import json
import sys
from contextlib import contextmanager

import pytest
import torch
from compile_toy import compile_config, run_ranks
from engine_toy import toy_config, toy_model, toy_step
from engine_unite import unite_engine, unite_step
from ranks import ALONE
from runs import config, config_file, image_tree
from safetensors.torch import load_file
from test_two_pass import Accumulating

import unite_kernels as uk
from unite_fast.config import Config
from unite_fast.engine import compiling
from unite_fast.engine.engine import Engine
from unite_fast.engine.loop import train
from unite_fast.errors import UserError
from unite_fast.model.unite import Unite
from unite_fast.objective.draws import SeededDraws
from unite_fast.objective.perceptual import Lpips
from unite_fast.objective.two_pass import Objective, two_pass_step

SHALLOW = {"depth": 1, "context_len": 0}
COUNTERS = torch._dynamo.utils.counters
LACKING = compiling.missing_for_compile(ALONE.device)


@pytest.fixture
def traced(monkeypatch):
    """Compiles without Inductor, from nothing, and counts."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    COUNTERS.clear()


def steps(engine, count: int) -> list[float]:
    """Gradient norms of optimizer steps, with an evaluation of the EMA behind the first."""
    norms = []
    for step in range(count):
        norms.append(unite_step(engine, step).item())
        if step == 0:
            with engine.ema_weights() as model:
                model.tokenize(torch.zeros(1, 3, 8, 8))
    return norms


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_compiled_steps_are_the_eager_ones_and_are_compiled_once(traced, recomputed):
    values = compile_config(draws=1 if recomputed else 3).model_dump()
    values["model"]["checkpoint_activations"] = recomputed
    compiled = unite_engine(Config.parse(values), ALONE)
    values["train"]["compile"] = False
    eager = unite_engine(Config.parse(values), ALONE)
    found = steps(compiled, 3)
    # Attention and rotary have a path of their own in eager mode; three steps grow rounding to 1.3e-5, in weights 1e-5.
    assert found == pytest.approx(steps(eager, 3), rel=2e-4)
    # Reconstruct, two draws, one draw; later steps, evaluation and EMA add none, and nothing falls back to Python.
    assert COUNTERS["stats"]["unique_graphs"] == (2 if recomputed else 3) and not COUNTERS["graph_break"]
    here, there = dict(compiled.model_state()), dict(eager.model_state())
    assert list(here) == list(there) and set(here) == set(Unite.state_shapes(compiled.config.model))
    for name, weight in there.items():
        assert (here[name] - weight).abs().max() <= 1e-4, name


@pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
def test_inductor_takes_the_eager_steps(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_DEBUG_COMPILE", "1")  # unoptimised C++: half of the time
    torch._dynamo.reset()
    COUNTERS.clear()
    values = toy_config().model_dump()
    engines = []
    for on in (True, False):
        values["train"]["compile"] = on
        engines.append(Engine(toy_model(), Config.parse(values), ALONE, steps_per_epoch=10))
    norms = [[toy_step(engine, step).item() for step in range(3)] for engine in engines]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert COUNTERS["stats"]["unique_graphs"] == 2 and COUNTERS["inductor"]
    found, expected = (dict(engine.model_state()) for engine in engines)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.skipif(not uk.dispatch.INTERPRETED, reason="the kernels are compiled here: TRITON_INTERPRET is not 1")
def test_the_kernels_are_single_operators_to_the_compiler(monkeypatch):
    graphs = []
    torch._dynamo.reset()
    config = compile_config()
    model = Unite(config.model)
    monkeypatch.setattr(compiling, "BACKEND", lambda graph, inputs: graphs.append(graph) or graph.forward)
    uk.set_backend("triton")
    try:
        COUNTERS.clear()
        inputs = {"t": torch.full((1, 1), 0.5), "labels": torch.zeros(1, 1, dtype=torch.int64)}
        inputs |= {"z_t": torch.randn(1, 1, 4, 6), "z1": torch.randn(1, 4, 6), "weighting": True, "floor": 0.05}
        loss = compiling.compiled_passes(model, config)("flow", **inputs)
        loss.backward()
        (graph,) = graphs
        ours = {str(node.target).split(".")[1] for node in graph.graph.nodes if "unite_kernels" in str(node.target)}
        assert {"adaln", "qk_norm_rope", "swiglu", "latent_norm_flow_loss"} <= ours and not COUNTERS["graph_break"]
        gradient = model.encoder.final.weight.grad.clone()
        model.zero_grad()
        expected = model("flow", **inputs)
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, model.encoder.final.weight.grad)
    finally:
        uk.set_backend("auto")


def test_two_ranks_under_zero_take_the_eager_steps(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    reports = run_ranks(tmp_path, "compile", ranks=2, stages=["0", "1", "2"])
    eager = unite_engine(compile_config(draws=1, compile=False), ALONE)
    norms = [unite_step(eager, step).item() for step in range(2)]
    with eager.ema_weights() as model:
        expected = model.tokenize(torch.zeros(1, 3, 8, 8), noise=torch.ones(1, 4, 6), t=torch.zeros(1))
    norms.append(unite_step(eager, 2).item())
    for stage in ("0", "1", "2"):
        state = load_file(tmp_path / f"zero{stage}.safetensors")
        torch.testing.assert_close(state.pop("evaluated"), expected, rtol=1e-3, atol=1e-4)
        weights = dict(eager.model_state())
        assert set(state) == set(weights)
        for name, weight in weights.items():
            assert torch.dist(state[name], weight) <= 1e-3 * weight.norm() + 1e-6, name
        for rank in range(2):
            report = reports[rank][stage]
            assert report["norms"] == pytest.approx(norms, rel=1e-3)
            assert report["graphs"] == (2 if stage == "0" else 0) and not report["breaks"]  # the stages share them


def test_zero_3_is_refused():
    with pytest.raises(UserError, match="torch.compile cannot trace ZeRO 3.*set train.compile to false"):
        compile_config(stage=3)


def test_a_resumed_compiled_run_is_the_eager_run(traced, tmp_path, capsys):
    image_tree(tmp_path / "train")
    settings = {"steps": 4, "checkpoint_every": 2, "log_every": 1}
    small = {"model": SHALLOW, "evaluation": {"sheet_classes": 1, "sheet_columns": 1, "reconstructions": 1}}
    train(config(tmp_path, name="eager", train=settings, **small))
    capsys.readouterr()
    train(config(tmp_path, train=settings | {"compile": True, "steps": 2}, **small))
    train(config(tmp_path, train=settings | {"compile": True}, **small), resume=True)
    assert "torch.compile is at work: the first step takes minutes" in capsys.readouterr().err
    runs = [tmp_path / "runs" / name for name in ("eager", "run")]
    expected, found = (load_file(run / "checkpoints" / "step_00000004" / "model.safetensors") for run in runs)
    assert list(found) == list(expected)
    for name, weight in expected.items():
        assert torch.dist(found[name], weight) <= 1e-3 * weight.norm() + 1e-6, name


def test_compiling_pauses_the_clocks_and_is_announced_once(traced):
    events = []

    @contextmanager
    def pause():
        events.append("stop")
        yield
        events.append("go")

    double = torch.compile(lambda x: 2 * x, backend="aot_eager", dynamic=False)
    x = torch.ones(3, requires_grad=True)
    with compiling.watched(pause, pause, say=events.append):
        double(x).sum().backward()
        forward_and_backward = list(events)
        double(x).sum().backward()
        assert events == forward_and_backward
    said = [event for event in events if event not in ("stop", "go")]
    assert len(said) == 1 and events.count("stop") == events.count("go") == 4
    double(torch.ones(4, requires_grad=True))
    assert events == forward_and_backward


def test_what_is_missing_is_said_before_anything_is_read(monkeypatch, tmp_path):
    broken = config(tmp_path, train={"compile": True})  # its data do not exist
    monkeypatch.setenv("CXX", "no-such-compiler")
    says = r"train.compile: there is no C\+\+ compiler no-such-compiler: apt install g\+\+"
    with pytest.raises(UserError, match=says):
        train(broken)
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(UserError, match="Python's headers are missing .*python3-dev"):
        train(broken)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install triton" in compiling.missing_for_compile(torch.device("cuda"))


def test_lpips_is_compiled_where_it_is_trained_with(traced):
    made = compile_config()
    objective = Objective(made.objective, made.model.num_classes)
    compiling.compile_perceptual(objective)  # without the term there is nothing to do
    torch.manual_seed(0)
    objective.lpips = Lpips()
    names, images = list(objective.lpips.state_dict()), torch.rand(2, 1, 3, 16, 16)
    found = []
    for on in (False, True):
        if on:
            compiling.compile_perceptual(objective)
        image = images[1].clone().requires_grad_()
        objective.lpips(images[0], image).backward()
        found.append(image.grad)
    torch.testing.assert_close(found[0], found[1])
    assert COUNTERS["stats"]["unique_graphs"] == 1 and not COUNTERS["graph_break"]
    assert list(objective.lpips.state_dict()) == names


def test_a_profile_compiles_the_parts(traced, tmp_path, capsys):
    from cli_toy import run

    path = config_file(tmp_path, model=SHALLOW, train={"compile": True})
    trace = tmp_path / "trace.json"
    assert run("profile", "--config", path, "--steps", "1", "--micro-batch", "2", "--trace", trace, "--json") == 0
    parts = json.loads(capsys.readouterr().out)["parts"]
    assert [part["name"] for part in parts] == ["tokenize", "decode", "denoise", "update"]
    assert COUNTERS["stats"]["unique_graphs"] == 5 and not COUNTERS["graph_break"]  # three parts, two passes
    assert trace.is_file()


def test_molecules_of_all_sizes_share_a_graph(traced):
    pytest.importorskip("rdkit", reason="RDKit is not installed")
    from unite_fast.engine.backend import AutocastForward
    from unite_fast.modality import modality_of

    sizes = dict(depth=1, width=32, heads=2, latent_dim=8, decoder=dict(depth=1, width=32, heads=2))
    values = dict(modality="molecules", model=sizes, objective=dict(flow_draws=2, draws_per_chunk=2))
    made = Config.parse(values | dict(train=dict(steps=1, global_batch=4, accumulation=1, compile=True)))
    modality = modality_of(made)
    torch.manual_seed(0)
    model = modality.network(made.model)
    objective = modality.objective(made, ALONE.device, None)
    compiled = Accumulating(AutocastForward(model, None, compiling.compiled_passes(model, made)))
    for counts in ([3, 9, 5, 29], [4, 4, 2, 7], [18, 20, 11, 2, 8]):
        losses = []
        for engine in (compiled, Accumulating(model)):
            inputs = molecules(made, counts)
            draws = SeededDraws(made.objective, seed=0, step=0, stream=0, device=ALONE.device)
            losses.append(two_pass_step(engine, objective, inputs.data, inputs.labels, draws, shape=inputs.shape))
        torch.testing.assert_close(losses[0].total, losses[1].total)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert gradient.isfinite().all()
    assert COUNTERS["stats"]["unique_graphs"] == 2 and not COUNTERS["graph_break"]


def molecules(made: Config, counts: list[int]):
    """A batch of molecules of so many atoms each, as the loop makes it of what the stream gives."""
    from unite_fast.engine.batch import Batch
    from unite_fast.molecules.modality import Molecular
    from unite_fast.molecules.stream import MoleculeBatch

    generator = torch.Generator().manual_seed(len(counts))
    real = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    elements = torch.randint(1, 6, real.shape, generator=generator).mul(real).to(torch.uint8)
    positions = torch.randn(*real.shape, 3, generator=generator) * real[..., None]
    labels = torch.full((len(counts),), made.model.num_classes)
    batch = MoleculeBatch(elements, positions, torch.tensor(counts), labels, weight=1.0, step=0, micro_batch=0)
    return Molecular().inputs(made, batch, Batch(len(counts), 1, len(counts)), ALONE)

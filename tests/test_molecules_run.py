"""Whole runs on molecules, and the commands on what they leave: the image trainer's own guarantees hold."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from unittest import mock

import numpy as np
import pytest
import torch
from cli_toy import mistake, run
from numpy.testing import assert_allclose, assert_array_equal
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

pytest.importorskip("rdkit", reason="molecules need RDKit: pip install 'unite_fast[molecules]'")

from molecule_runs import config, settings, small_set

from unite_fast import Config, UserError, load
from unite_fast.data.molecules.molecule_set import Molecule, assemble, split, write_npz
from unite_fast.data.molecules.reading import load_molecules
from unite_fast.data.molecules.writing import write_sdf, write_xyz
from unite_fast.engine.batch import Batch
from unite_fast.engine.loop import train
from unite_fast.engine.meter import latent_statistics
from unite_fast.engine.world import World
from unite_fast.importing import open_trained
from unite_fast.molecules.modality import Molecular
from unite_fast.molecules.report import MoleculeReport
from unite_fast.molecules.stream import MoleculeStream, PropertyBins, load_for_all, load_parts

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with a property, to its end."""
    folder = tmp_path_factory.mktemp("finished")
    sections = {"model": {"num_classes": 3}, "data": {"condition": "gap"}, "evaluation": {"every": 6}}
    return train(config(folder, **sections))


@pytest.fixture()
def unjudged(monkeypatch):
    """Runs end without their report, which starts processes and is not what the test is about."""
    monkeypatch.setattr(MoleculeReport, "finish", lambda self, steps, seconds: None)


def tensors(step_folder):
    return {
        f"{name}:{key}": value
        for name in ("model", "ema", "optimizer")
        for key, value in load_file(step_folder / f"{name}.safetensors").items()
    }


def test_a_run_leaves_everything_behind(finished):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 4, 6, 8, 12]
    assert records[-1]["molecules"] == 60 and records[-1]["molecules_per_second"] > 0
    assert {"loss_element", "loss_position", "loss_flow", "z0_std"} <= set(records[-1])
    for name in (
        "samples.png", "samples_00000006.png", "reconstructions.png", "histograms.png", "curves.png", "molecules.html",
        "samples.sdf", "samples.xyz", "export/model.safetensors",
    ):  # fmt: skip
        assert (finished / name).stat().st_size > 100, name
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("rdkit/valid", "rdkit/connected", "rdkit/novel", "edm/atom_stable"):
        assert 0 <= summary[name] <= 1 and 0 <= summary[f"{name}_real"] <= 1
    assert summary["reconstruction/molecules"] == 6 and summary["data"] == "molecules of the tests"
    assert len(load_molecules(finished / "samples.xyz")) == 6
    model = load(finished)
    ema = load_file(finished / "checkpoints" / "step_00000012" / "ema.safetensors")
    assert all(torch.equal(tensor, ema[name]) for name, tensor in model.state_dict().items())


def test_the_loss_falls(tmp_path, unjudged):
    folder = train(config(tmp_path, train={"steps": 120, "global_batch": 13, "log_every": 10}))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, last = records[0], records[-1]
    assert last["loss_element"] < 0.6 * first["loss_element"] and last["loss_position"] < 0.8 * first["loss_position"]


# 26 training molecules and batches of 5 or 6: step 6 lies within an epoch.
@pytest.mark.parametrize("options", [{}, {"train": {"global_batch": 6, "accumulation": 2}}])
def test_resume_is_exact_to_the_bit(tmp_path, options, unjudged):
    def go(name, steps, resume=False):
        sections = {"train": {**options.get("train", {}), "steps": steps}}
        return train(config(tmp_path, **sections, name=name), resume=resume)

    through = go("through", 12) / "checkpoints" / "step_00000012"
    go("halves", 6)
    halves = go("halves", 12, resume=True) / "checkpoints" / "step_00000012"
    whole, resumed = tensors(through), tensors(halves)
    assert set(whole) == set(resumed) and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_bf16_and_a_measured_micro_batch(tmp_path, unjudged):
    sections = {"precision": "bf16", "steps": 3, "global_batch": 6, "accumulation": None, "micro_batch": "auto"}
    folder = train(config(tmp_path, train=sections))
    saved = tensors(folder / "checkpoints" / "step_00000003")
    assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in saved.values())


def stream(folder, *, batch, rank=0, ranks=1, start=0, condition=None):
    parts, world = load_parts(config(folder).data), World(rank, ranks, 0, CPU)
    return MoleculeStream(
        parts, condition=condition, num_classes=3, seed=7, batch=batch, world=world, start_step=start
    )


def test_the_stream_is_one_order_for_every_number_of_ranks(tmp_path):
    whole = stream(tmp_path, batch=Batch(12, 1, 12))
    parts = [stream(tmp_path, batch=Batch(3, 2, 12), rank=rank, ranks=2) for rank in (0, 1)]
    for _ in range(4):
        expected = next(whole)
        pieces = [next(part) for _ in range(2) for part in parts]
        assert torch.equal(torch.cat([piece.counts for piece in pieces]), expected.counts)
        assert expected.weight == 1 and expected.labels.tolist() == [3] * 12
        # The mean over two ranks of the weighted sums is the mean over all atoms.
        assert sum(piece.weight for piece in pieces) / 2 == pytest.approx(1)
        for piece in pieces:
            assert piece.weight / 2 == pytest.approx(int(piece.counts.sum()) / int(expected.counts.sum()))
            assert piece.elements.shape[1] == int(piece.counts.max())
    assert whole.steps_per_epoch == parts[0].steps_per_epoch == 26 / 12
    later = stream(tmp_path, batch=Batch(12, 1, 12), start=4)
    assert torch.equal(next(whole).positions, next(later).positions)


def test_the_seed_of_the_split_decides_who_is_held_out(tmp_path):
    whole = small_set()
    for seed in (0, 1):
        parts, expected = load_parts(config(tmp_path, data={"split_seed": seed}).data), split(len(whole), seed)
        assert parts.train.names == whole.select(expected.train).names
        assert parts.held_out.names == whole.select(expected.validation).names


def test_a_resumed_run_can_tell_other_training_molecules(tmp_path):
    made = stream(tmp_path, batch=Batch(12, 1, 12))
    train, known = made.parts.train, Molecular().samples(made)
    assert known["count"] == 26 and Molecular().samples(made) == known
    for other in (replace(train, names=train.names[::-1]), replace(train, elements=train.elements[::-1])):
        made.parts = made.parts._replace(train=other)
        assert Molecular().samples(made)["digest"] != known["digest"]


def test_every_micro_batch_of_every_rank_has_rotations_of_its_own(tmp_path):
    batch = Batch(4, 2, 16)
    given = next(stream(tmp_path, batch=batch, ranks=2))._replace(weight=0.75)

    def inputs(orientation="random", rank=0, **place):
        settled = config(tmp_path, data={"orientation": orientation})
        return Molecular().inputs(settled, given._replace(**place), batch, World(rank, 2, 0, CPU))

    places = [dict(rank=r, step=s, micro_batch=m) for r in (0, 1) for s in (0, 1) for m in (0, 1)]
    found = [inputs(**place).data.positions for place in places]
    for a, b in combinations(found, 2):
        assert (a - b).abs().mean() > 0.1
    assert torch.equal(inputs(**places[-1]).data.positions, found[-1])
    still = inputs("aligned")
    assert torch.equal(still.data.packed.pad(still.data.positions), given.positions)
    assert still.weight == 0.75 and torch.equal(still.labels, given.labels)


def test_a_property_labels_molecules_by_bins_of_equal_share(tmp_path):
    made = stream(tmp_path, batch=Batch(26, 1, 26), condition="gap")
    gaps = made.parts.train.gap
    bins = PropertyBins.of(made.parts.train, "gap", 3)
    assert np.bincount(bins.labels(gaps)).min() >= len(gaps) // 3 - 1
    assert bins.labels(np.array([-1e9, 1e9])).tolist() == [0, 2]
    again = PropertyBins.from_names(bins.names)
    assert np.allclose(again.edges, bins.edges, atol=1e-4) and made.classes == bins.names
    assert sorted(next(made).labels.tolist()) == sorted(bins.labels(gaps).tolist())
    counts, whole = made.parts.train.counts, stream(tmp_path, batch=Batch(26, 1, 26)).mode["atom_histogram"]
    by_bin = made.mode["atom_histogram"]
    assert by_bin == [np.bincount(counts[bins.labels(gaps) == row], minlength=30).tolist() for row in range(3)]
    assert whole == np.sum(by_bin, 0).tolist() == np.bincount(counts, minlength=30).tolist()
    negative = PropertyBins("gap", np.array([-2.5, -1.0, 0.5]))
    assert np.allclose(PropertyBins.from_names(negative.names).edges, negative.edges)
    without = replace(small_set(), gap=None)
    with pytest.raises(UserError, match="data.condition is 'gap'"):
        PropertyBins.of(without, "gap", 3)
    unknown = gaps.copy()
    unknown[[2, 5]] = np.nan
    some = replace(made.parts.train, gap=unknown)
    with pytest.raises(UserError, match=f"none for 2 of the {len(gaps)} training molecules, '{some.names[2]}' first"):
        PropertyBins.of(some, "gap", 3)
    with pytest.raises(UserError, match="lower model.num_classes"):
        PropertyBins.of(replace(without, gap=np.ones(len(without), np.float32)), "gap", 3)
    with pytest.raises(UserError, match="of 26 training molecules does not divide into 27 bins"):
        PropertyBins.of(made.parts.train, "gap", 27)  # all different, so that the bins' edges rise


def test_latent_statistics_look_at_real_atoms_only():
    z0 = torch.randn(64, 8, 4, generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones(64, 8, dtype=torch.bool)
    assert torch.allclose(latent_statistics(z0, everywhere), latent_statistics(z0), rtol=1e-4)
    mask = everywhere.clone()
    mask[:, 5:] = False
    mask[32:, 3:] = False
    spoiled = torch.where(mask[..., None], z0, 100.0)
    assert torch.allclose(latent_statistics(spoiled, mask), latent_statistics(z0 * mask[..., None], mask))
    assert latent_statistics(z0, mask)[0] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"modality": [7]}, ["modality", "valid: images, molecules"]),
        ({"modality": "molecule"}, ["modality", "did you mean 'molecules'"]),
        ({"data": {"flip": True}}, ["data.flip: unknown key"]),
        ({"model": {"num_classes": 4}}, ["num_classes 4", "data.condition"]),
        ({"data": {"condition": "gap"}}, ["'gap' has only one bin", "model.num_classes"]),
        ({"model": {"heads": 5}}, ["width 32", "5 heads"]),
        ({"sampling": {"solver": "dopri5"}}, ["sampling.solver"]),
        ({"optimizer": {"kind": "muon"}, "train": {"zero_stage": 3}}, ["Muon", "ZeRO 3"]),
    ],
)
def test_mistakes_in_a_configuration(tmp_path, sections, words):
    with pytest.raises(UserError) as caught:
        config(tmp_path, **sections)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_data_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        train(config(tmp_path, data={"path": str(tmp_path / "nowhere")}))
    write_npz(small_set(1).select([0, 1]), tmp_path / "two.npz")
    with pytest.raises(UserError, match="at least 5"):
        train(config(tmp_path, data={"path": str(tmp_path / "two.npz")}))


def test_what_is_left_out_is_said_in_every_session(tmp_path, caplog):
    frames = [f"2\n\nH 0 0 0\nH 0 0 0.7{step}\n" for step in range(6)] + ["2\n\nH 0 0 0\nCl 0 0 1.27\n"]
    (tmp_path / "a.xyz").write_text("".join(frames))
    data = config(tmp_path, data={"path": str(tmp_path / "a.xyz"), "cache": str(tmp_path / "cache")}).data
    for _ in range(2):  # the second reads the cache
        caplog.clear()
        load_parts(data)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "a.xyz: 6 molecules; left out: 1 × an element other than H C N O F" in caplog.text
    caplog.clear()
    with mock.patch.object(World, "all_true", lambda world, flag: flag):
        for rank in range(2):
            assert len(load_for_all(data, World(rank, 2, rank, CPU)).held_out) == 1
    assert len(caplog.records) == 1, "by one rank"


def test_what_looks_like_a_mistake_is_said(tmp_path, caplog):
    bohr = "".join(f"2\n\nH 0 0 0\nH 0 0 1.4{step}\n" for step in range(6))
    (tmp_path / "a.xyz").write_text(bohr)
    load_parts(config(tmp_path, data={"path": str(tmp_path / "a.xyz")}).data)
    assert "a.xyz: the nearest atom is 1.42 Å away in the median" in caplog.text


def test_commands_for_images_alone_say_so(finished, tmp_path, capsys):
    assert "serves runs on images; " in mistake(
        capsys, "import", tmp_path / "published.pt", "--config", finished / "config.json"
    )


def test_sample_writes_what_was_asked_for(finished, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("sample", "--run", finished, "--count", 5, "--atoms", 4, "--property", 5.5, "--guidance", 1.5,
               "--solver", "heun", "--steps", 3, "--out", out) == 0  # fmt: skip
    record = json.loads((out / "samples.json").read_text())
    assert [molecule["atoms"] for molecule in record["molecules"]] == [4] * 5
    low, high = record["property"].removeprefix("gap ").split("–")
    assert float(low) <= 5.5 <= float(high) and record["sampling"]["guidance"] == 1.5
    assert "warning" not in capsys.readouterr().err
    for name in ("samples.sdf", "samples.xyz"):
        assert load_molecules(out / name).counts.tolist() == [4] * 5
    assert (out / "sheet.png").exists() and (out / "samples.html").exists()
    step = finished / "checkpoints" / "step_00000006"
    assert run("sample", "--run", step, "--count", 7, "--atoms", "5-6", "--batch", 3, "--steps", 3, "--out", out) == 0
    assert set(load_molecules(out / "samples.xyz").counts.tolist()) <= {5, 6}
    # A checkpoint too knows the histogram of atom counts.
    assert run("sample", "--run", step, "--count", 2, "--steps", 3, "--property", 0.2, "--out", out) == 0
    said = capsys.readouterr()
    assert "in one piece" in said.out and "--property 0.2 lies outside the 4" in said.err


def test_a_molecule_under_a_property_has_as_many_atoms_as_others_with_about_that_property(finished, tmp_path):
    """Recorded sizes of its bin; of an older record, or without a property, those of all training molecules."""
    trained = open_trained(finished)
    rows = [[0] * 30 for _ in range(3)]
    rows[0][2], rows[1][3], rows[2][4] = 5, 5, 5
    whole, asked = np.sum(rows, 0).tolist(), ("--property", 7.5)
    for histogram, asked, expected in ((rows, asked, {3}), (rows, (), {2, 3, 4}), (whole, asked, {2, 3, 4})):
        trained.made_by["data"]["atom_histogram"] = histogram
        trained.save(tmp_path / "model")
        assert run("sample", "--run", tmp_path / "model", "--count", 20, "--steps", 2, *asked, "--out", tmp_path) == 0
        assert set(load_molecules(tmp_path / "samples.xyz").counts.tolist()) == expected


def test_reconstruct_and_tokenize_take_sdf_and_xyz(finished, tmp_path, capsys):
    molecules = small_set(1).select([3, 9, 12])
    write_sdf(molecules, tmp_path / "some.sdf")
    write_xyz(molecules, tmp_path / "some.xyz")
    for name in ("some.sdf", "some.xyz"):
        assert run("reconstruct", "--run", finished, tmp_path / name, "--out", tmp_path / "re") == 0
        record = json.loads((tmp_path / "re" / "reconstructions.json").read_text())
        assert [row["name"] for row in record["molecules"]] == list(molecules.names)
        assert record["reconstruction/rmsd"] > 0 and (tmp_path / "re" / "reconstructions.sdf").exists()
    both = [tmp_path / "some.sdf", tmp_path / "some.xyz"]
    assert run("tokenize", "--run", finished, *both, "--out", tmp_path / "l.safetensors", "--batch", 2) == 0
    with safe_open(tmp_path / "l.safetensors", "pt") as file:
        latents, counts = file.get_tensor("latents"), file.get_tensor("counts")
        names = json.loads(file.metadata()["molecules"])
    # Molecules of both files that are the same but for their names' repetition are told apart or taken once.
    assert latents.shape == (len(names), 29, 8) and len(names) >= 3
    assert not latents[0, counts[0] :].any() and latents[0, : counts[0]].abs().min() > 0
    for name in "ab":
        (tmp_path / f"{name}.xyz").write_text(f"2\nname=h{name}\nH 0 0 0\nH 0 0 0.74\n2\n\nH 0 0 0\nCl 0 0 1.27\n")
    files = [tmp_path / "a.xyz", tmp_path / "b.xyz"]
    for given, count in ((files[:1], 1), (files, 2)):
        capsys.readouterr()
        assert run("reconstruct", "--run", finished, *given, "--out", tmp_path / "re") == 0
        assert f"warning: left out: {count} × an element other than H C N O F" in capsys.readouterr().err
        record = json.loads((tmp_path / "re" / "reconstructions.json").read_text())
        assert record["skipped"] == {"an element other than H C N O F": count}


def test_export_writes_a_folder_that_commands_read_and_describes_it(finished, tmp_path, capsys):
    assert run("export", finished, "--out", tmp_path / "model") == 0
    described = capsys.readouterr().out
    assert all(words in described for words in ("at most 29 atoms each", "8 channels per atom")), described
    assert run("sample", "--run", tmp_path / "model", "--count", 2, "--out", tmp_path / "samples") == 0


def test_models_of_aligned_molecules_take_any_order_and_pose(tmp_path, capsys):
    """The model reads what it was trained on; what is written is in the order and pose of the file."""
    trained = train(config(tmp_path, data={"order": "canonical", "orientation": "aligned"}))
    cyanide, water = small_set(1).select([6]), small_set(1).select([1])
    given = {"as made": (cyanide, water)}
    turn = np.float32([[0, 0, 1], [1, 0, 0], [0, 1, 0]])
    codes, points = cyanide.atoms(0)
    given["other"] = (
        assemble([Molecule("m0_6", codes[::-1], points[::-1] @ turn)], "reversed and turned"),
        replace(water, positions=water.positions @ turn),
    )
    found = {}
    for name, (first, second) in given.items():
        folder = tmp_path / name
        folder.mkdir()
        write_sdf(first, folder / "cyanide.sdf")
        write_sdf(second, folder / "water.sdf")
        files = folder / "cyanide.sdf", folder / "water.sdf"
        assert run("tokenize", "--run", trained, *files, "--out", folder / "l.safetensors") == 0
        assert run("reconstruct", "--run", trained, *files, "--out", folder) == 0
        with safe_open(folder / "l.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        found[name] = tensors, load_molecules(folder / "reconstructions.sdf")
    (tensors, rebuilt), (again, turned) = found["as made"], found["other"]
    assert_close(tensors["latents"], again["latents"], atol=1e-3, rtol=0)  # SDF keeps four decimals
    assert (again["order"][0, :3] == 2 - tensors["order"][0, :3]).all()
    assert_array_equal(rebuilt.elements[0, :3], turned.elements[0, 2::-1])
    assert_allclose(rebuilt.positions[0, :3] @ turn, turned.positions[0, 2::-1], atol=2e-3)
    assert_allclose(rebuilt.positions[1] @ turn, turned.positions[1], atol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sample", "--atoms", "0"), "--atoms '0' must be"),
        (("sample", "--atoms", "30"), "within 1 and 29"),
        (("sample", "--atoms", "many"), "--atoms 'many'"),
        (("sample", "--classes", "1"), "--classes is for images"),
        (("sample", "--unnormalised"), "--unnormalised is for image models only"),
        (("sample", "--property", "nan"), "--property must be a finite number"),
        (("sample", "--solver", "dopri5"), "euler or heun"),
        (("reconstruct", "missing.sdf"), "missing.sdf"),
        (("tokenize", "missing.xyz"), "missing.xyz"),
    ],
)
def test_mistakes_on_the_command_line(finished, tmp_path, capsys, arguments, words):
    command, *rest = arguments
    out = tmp_path / ("l.safetensors" if command == "tokenize" else "out")
    assert words in mistake(capsys, command, "--run", finished, *rest, "--out", out)


def test_a_place_that_takes_no_files_is_refused_before_the_work(finished, tmp_path, capsys):
    (tmp_path / "file").touch()
    for command in (("sample", "--count", 10**6), ("reconstruct", finished / "samples.sdf")):
        says = mistake(capsys, *command, "--run", finished, "--out", tmp_path / "file")
        assert says.startswith(f"cannot write molecules into {tmp_path / 'file'}: ")


def test_what_belongs_to_the_other_modality_is_refused(finished, tmp_path, capsys):
    assert "naming is that of image models" in mistake(capsys, "export", finished, "--published", tmp_path / "x.pt")
    trained = open_trained(finished)
    trained.made_by.pop("class_names")
    trained.save(tmp_path / "plain")
    assert "without one" in mistake(capsys, "sample", "--run", tmp_path / "plain", "--property", "1")
    described = json.loads((tmp_path / "plain" / "model.json").read_text())
    (tmp_path / "plain" / "model.json").write_text(json.dumps(described | {"modality": "music"}))
    assert "unknown modality 'music'" in mistake(capsys, "sample", "--run", tmp_path / "plain")
    assert settings(tmp_path)["modality"] == Config.parse(settings(tmp_path)).modality == "molecules"

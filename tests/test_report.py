"""The report: what the page holds and says is missing, hostile and broken runs, the numbers behind its pictures."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from cli_toy import mistake, run, save_toy
from PIL import Image
from report_run import HOSTILE, LONG, trained_run
from runs import config

from unite_fast import report
from unite_fast.engine import checkpoint
from unite_fast.evaluation.generation import SAMPLE_STREAM, TOKENIZE_STREAM, register_noise
from unite_fast.flow.sampling import generate
from unite_fast.importing import open_trained
from unite_fast.molecules.config import MoleculeConfig
from unite_fast.records import RunFolder, duration, open_run
from unite_fast.report import write_report
from unite_fast.report.metrics import headline, result_tables, trends
from unite_fast.report.probe import Options, probe

VOID = {"meta", "img", "br", "link", "line", "circle", "rect", "polyline"}


class Page(HTMLParser):
    """Text of each section, addresses of pictures; fails on tags that do not close."""

    def __init__(self, path):
        super().__init__()
        self.text, self.pictures, self.open, self.section = {}, [], [], "top"
        self.source = path.read_text()
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "section":
            self.section = attributes["id"]
        if tag == "img" and attributes.get("src"):
            self.pictures.append((self.section, attributes["src"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            between = "" if self.open and self.open[-1] in ("code", "sub") else " "  # cells have no space between
            self.text[self.section] = self.text.get(self.section, "") + between + data

    def says(self, section):
        return " ".join(self.text[section].split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("report"))


@pytest.fixture()
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_training_ends_with_a_page_that_fetches_nothing(finished):
    page = Page(finished / "report.html")
    assert (finished / "report.html").stat().st_size < 5e6
    sections = {"samples", "reconstructions", "trajectory", "neighbours"}
    assert {section for section, _ in page.pictures} == sections
    for _, address in page.pictures:
        assert address.startswith("data:image/")
        with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as picture:
            picture.load()
    outside = re.findall(r'(?:src|href|action|data|poster)\s*=\s*"(?!data:|#)([^"]*)"', page.source)
    assert outside == [] and "@import" not in page.source and "url(" not in page.source
    assert "default-src 'none'" in page.source


def test_results_stand_with_their_protocol(finished):
    results = Page(finished / "report.html").says("results")
    for part in ("gFID ↓ 12.35", "Inception score ↑ 101.5", "of its own kind 3", "KID ↓ not finite", "a" * 64, "PSNR"):
        assert part in results, part
    assert "interval 0.1, 1" in results and "checkpoint: step 20" in results
    assert "guidance search" in results and "18.25" in results and "score over guidance low 0, high 1" in results
    assert "few images for gfid" in results and "guided & swept step 20, ema weights" in results
    assert "gFID over training" in results
    summary = json.loads((finished / "summary.json").read_text())
    assert f"{summary['psnr']:.4g} dB" in results and "No evaluation is stored" not in results


def test_numbers_that_an_evaluation_holds_are_not_shown_twice(folder):
    summary = json.loads((folder / "summary.json").read_text())
    metrics = {key: summary[key] for key in ("psnr", "psnr_std", "psnr_worst", "l1")}
    record = {"metrics": metrics | {"images_reconstructed": 16}, "protocol": {"model": {"step": 20}}}
    (folder / "evaluations" / "at_the_end.json").write_text(json.dumps(record))
    results = Page(write_report(folder, quick=True)).says("results")
    assert "at the end of training" not in results and "at_the_end" in results


def test_names_and_values_are_never_markup(finished):
    page = Page(finished / "report.html")
    assert page.says("results").count(HOSTILE) == 3 and HOSTILE in page.says("environment")
    assert page.source.count("<script>") == 1 and LONG in page.says("samples")
    assert r"marked & sold\udcff" in page.says("trajectory")


def test_sessions_configuration_and_curves(finished):
    page = Page(finished / "report.html")
    environment = page.says("environment")
    assert "resumed after step 10" in environment and "from the start" in environment and "torch" in environment
    configuration = page.says("configuration")
    assert "latent_dim 4" in configuration and "lpips.weight 0" in configuration
    assert page.source.count('class="mark"') == 7  # the resumption, in each panel
    training = page.says("training")
    assert all(title in training for title in ("Losses", "Learning rate", "Images per second", "waiting for data"))


def test_the_same_run_gives_the_same_pictures(finished, folder):
    assert run("report", folder, "--out", folder / "again.html") == 0
    first, again = Page(finished / "report.html"), Page(folder / "again.html")
    assert again.pictures == first.pictures


def test_a_run_still_in_training(folder):
    for name in ("summary.json", "samples.png", "sessions.jsonl"):
        (folder / name).unlink()
    shutil.rmtree(folder / "evaluations")
    shutil.rmtree(folder / "export")
    shutil.rmtree(folder / "checkpoints" / "step_00000020")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:12]) + lines[12][:30])
    (folder / ".lock").write_text("another process")  # empty after a trainer that ended
    page = Page(write_report(folder))
    assert "in training" in page.says("top") and "step 12 of 20" in page.says("top")
    assert "step 10." in page.says("samples") and any(section == "samples" for section, _ in page.pictures)
    assert "unite-fast evaluate" in page.says("results") and "has not ended" in page.says("results")
    assert "no record of its sessions" in page.says("environment")


def test_a_run_without_a_checkpoint_or_a_record(folder):
    for name in ("checkpoints", "export", "evaluations"):
        shutil.rmtree(folder / name)
    for name in ("metrics.jsonl", "summary.json", "samples.png", "reconstructions.png"):
        (folder / name).unlink()
    page = Page(write_report(folder))
    assert "starting" in page.says("top")
    assert "saved no checkpoint yet" in page.says("samples") and "logged no step yet" in page.says("training")
    assert page.source.count("saved no checkpoint yet") == 5


def test_a_run_whose_data_is_gone(folder):
    settings = json.loads((folder / "config.json").read_text())
    settings["data"] |= {"path": str(folder / "gone"), "val_path": str(folder / "gone too")}
    (folder / "config.json").write_text(json.dumps(settings))
    page = Page(write_report(folder))
    assert "gone too does not exist" in page.says("reconstructions")
    assert "gone too does not exist" in page.says("latents") and "gone does not exist" in page.says("neighbours")
    shown = [section for section, _ in page.pictures]
    assert shown.count("reconstructions") == 1 and shown.count("samples") > 10 and "trajectory" in shown


def test_quick_takes_the_sheets_on_disk(folder, monkeypatch):
    monkeypatch.setattr("unite_fast.importing.open_trained", None)  # would be called in vain
    assert run("report", folder, "--quick", "--out", folder / "quick.html") == 0
    page = Page(folder / "quick.html")
    assert "was not run for this report" in page.says("trajectory")
    assert {section for section, _ in page.pictures} == {"samples", "reconstructions"}


def test_every_option_reaches_the_page(folder, monkeypatch):
    asked = {}
    monkeypatch.setattr(report, "write_report", lambda run, **given: asked.update(given) or folder / "config.json")
    assert run("report", folder, "--held-out", 7, "--seed", 3, "--batch", 5, "--device", "cpu") == 0
    del asked["progress"]
    assert asked == {"out": None, "device": "cpu", "quick": False, "held_out": 7, "seed": 3, "batch": 5}


def test_a_run_on_something_else_than_images(folder):
    settings = json.loads((folder / "config.json").read_text()) | {"modality": "molecules"}
    (folder / "config.json").write_text(json.dumps(settings))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r | {"molecules": 7}) + "\n" for r in records))
    figures = {"rdkit/valid": 0.25, "rdkit/valid_real": 0.97, "molecules": 31, "molecules_train": 613}
    (folder / "evaluations/molecules.json").write_text(json.dumps({"metrics": figures, "protocol": {}}))
    page = Page(write_report(folder))
    assert "7 molecules seen" in page.says("top") and "Losses" in page.says("training")
    assert "gFID" in page.says("results")
    results = page.says("results")
    meaning = "molecules whose bonds RDKit perceives and accepts, maybe in pieces"
    assert f"metric value real molecules rdkit/valid ↑ 0.25 0.97 {meaning} molecules 31 molecules train 613" in results
    assert {section for section, _ in page.pictures} == {"samples", "reconstructions"}
    # What only a model of images is asked for has no place, and keys are marked by the defaults of such runs.
    parts = ["samples", "results", "reconstructions", "training", "configuration", "environment"]
    assert re.findall(r'<a href="#(\w+)"', page.source) == re.findall(r'<section id="(\w+)"', page.source) == parts
    assert "none yet" not in page.source and "molecules.html" not in page.source
    (folder / "samples.png").unlink()
    assert "The run has drawn none yet." in Page(write_report(folder)).says("samples")
    (folder / "molecules.html").touch()
    length = {"steps": 9, "micro_batch": 1, "global_batch": 2}
    (folder / "config.json").write_text(MoleculeConfig(name="m", train=length).to_json())
    page = Page(write_report(folder))
    assert "molecules.html in the run's folder shows them in 3-D" in page.says("samples")
    changed = re.findall(r'<div class="changed"><dt>([^<]*)</dt>', page.source)
    assert changed == ["name", "steps", "global_batch", "micro_batch"]


@pytest.mark.parametrize("name", ["summary.json", "evaluations/broken.json", "evaluations/list.json"])
def test_broken_files_are_named_and_the_rest_is_shown(name, folder):
    (folder / name).write_text("[1]" if "list" in name else '{"metrics": 3}' if "evaluations" in name else '{"psnr": ')
    page = Page(write_report(folder, quick=True))
    assert str(folder / name) in page.says("environment") and "gFID" in page.says("results")


def test_wrong_folders_are_one_sentence(folder, tmp_path, capsys):
    assert mistake(capsys, "report", tmp_path / "no") == f"no folder {tmp_path / 'no'}"
    save_toy(tmp_path / "model")
    assert "holds no run: give the run's folder" in mistake(capsys, "report", tmp_path / "model")
    says = mistake(capsys, "report", checkpoint.latest(folder))
    assert "holds one checkpoint: give the run's folder" in says
    (folder / "config.json").write_text("{")
    assert mistake(capsys, "report", folder) == f"{folder / 'config.json'} is not JSON"


def test_an_unwritable_page(folder, capsys):
    (folder / "file").touch()
    before = (folder / "report.html").read_bytes()
    says = mistake(capsys, "report", folder, "--quick", "--out", folder / "file" / "page.html")
    assert says.startswith("cannot write ")
    assert (folder / "report.html").read_bytes() == before


@pytest.mark.parametrize("damaged", ["checkpoint", "export"])
def test_damaged_weights_are_named_and_the_rest_is_shown(damaged, folder, caplog):
    newest = checkpoint.latest(folder)
    if damaged == "checkpoint":
        shutil.rmtree(folder / "export")
        (newest / "ema.safetensors").write_bytes(b"x")
        told = f"checkpoint {newest} cannot be used: {newest / 'ema.safetensors'} is truncated"
    else:
        (folder / "export" / "model.safetensors").write_bytes(b"x")
        shutil.rmtree(folder / "checkpoints")
        told = f"{folder / 'export' / 'model.safetensors'} is not a whole safetensors file"
    assert run("report", folder) == 0
    page = Page(folder / "report.html")
    for section in ("samples", "trajectory", "neighbours", "latents"):
        assert f"The model cannot be read, so it was not run: {told}" in page.says(section)
    assert {section for section, _ in page.pictures} == {"samples", "reconstructions"}
    assert "gFID" in page.says("results") and told in caplog.text


def test_the_first_numbers_are_of_the_latest_step_and_its_most_images():
    def made(step, gfid, date="2026", **counts):
        sections = {name: {"count": count} for name, count in counts.items()}
        protocol = {"model": {"step": step}, "environment": {"date": date}, **sections}
        return {"metrics": {"gfid": gfid}, "protocol": protocol}

    def first(*evaluations):
        return headline(RunFolder(None, {}, evaluations=dict(zip("abcd", evaluations))))[0][1]

    whole, trial = made(20, 2.5, generation=50_000), made(20, 90.0, date="2027", generation=20)
    assert first(whole, trial) == first(trial, whole) == "2.5"
    assert first(made(10, 3.5, generation=50_000), trial) == "90"
    again = made(20, 2.25, date="2026-02", generation=50_000)
    assert first(whole, again, trial) == first(again, whole, {"metrics": {}, "protocol": {"generation": 3}}) == "2.25"


def test_the_first_numbers_count_the_images_that_each_is_measured_on():
    def made(psnr, **counts):
        protocol = {"model": {"step": 20}, **{name: {"count": count} for name, count in counts.items()}}
        return {"metrics": {"psnr": psnr}, "protocol": protocol}

    evaluations = {"a": made(25.0, held_out=50_000), "b": made(21.0, held_out=10, generation=50_000)}
    assert headline(RunFolder(None, {}, evaluations=evaluations)) == [("PSNR", "25 dB", "higher")]


def test_a_trend_joins_evaluations_of_one_protocol_at_several_steps():
    def made(step, gfid, weights="ema", decay=0.9, guidance=1.5):
        model = {"step": step, "weights": weights, "ema_decay": decay, "sha256": f"{step}"}
        apart = {"environment": {"date": step}, "warnings": [f"{step}"]}
        return {"metrics": {"gfid": gfid}, "protocol": {"model": model, "generation": {"guidance": guidance}} | apart}

    alike = [made(30, 3.0), made(10, 9.0), made(20, 5.0)]
    others = [made(40, 50.0, decay=0.5), made(50, 60.0, weights="model"), made(60, 70.0, guidance=2.0)]
    run = RunFolder(None, {}, evaluations=dict(zip("abcdef", alike + others)))
    ((title, curve),) = trends(run)
    assert (title, curve.x.tolist(), curve.y.tolist()) == ("gFID", [10, 20, 30], [9, 5, 3])
    assert trends(RunFolder(None, {}, evaluations=dict(zip("abcd", [*others, alike[0]])))) == []
    assert [(result.name, result.older) for result in result_tables(run)] == [
        ("f", False), *((name, True) for name in "edacb"),
    ]  # fmt: skip


def test_length_and_state_of_a_run(tmp_path):
    def made(**train):
        records = [{"step": 10, "epoch": 0.4, "time": 1000.0}, {"step": 50, "epoch": 2.0, "time": 1100.0}]
        return RunFolder(tmp_path, {"name": "a", "train": train}, records)

    assert made(steps=60).total == 60 and made(epochs=4).total == 100 and made(epochs=1.99).total == 50
    ended = replace(made(epochs=2), summary={"steps": 50})
    assert ended.state(now=9e9) == "finished" and made(steps=60).state(now=1200.0) == "training"
    assert made(steps=60).state(now=1900.0) == "training"  # ten times as long as between two records: 1,000 seconds
    assert made(steps=60).state(now=3000.0) == "stopped"
    assert RunFolder(None, {"train": {"epochs": 3}}).total is None
    # 70 · 10 / 0.35 is 2000.0000000000002.
    assert RunFolder(None, {"train": {"epochs": 10}}, [{"step": 70, "epoch": 0.35}]).total == 2000


def test_a_duration_has_two_units_at_most():
    seconds = {48: "48 s", 300: "5 min", 312: "5 min 12 s", 12_000: "3 h 20 min", 187_200: "2 d 4 h"}
    assert {number: duration(number) for number in seconds} == seconds


def test_a_trajectory_ends_in_the_sample(finished):
    """Its last image is what `generate` makes of the same noise, and sample sheets hold `generate`'s images."""
    trained, settings = open_trained(finished), open_run(finished).config
    model = trained.build()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # twenty steps leave a network that ignores what it is given
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    result = probe(trained, model, config(finished.parents[1], **{
        name: settings[name] for name in ("data", "evaluation", "sampling")
    }), Options(columns=2, held_out=8, batch=3))  # fmt: skip
    assert result.times[0] == 0 and result.times[-1] == 1 and result.times == sorted(result.times)
    options, first = result.sampling, dict(seed=0, stream=SAMPLE_STREAM, first=0)
    with torch.no_grad():
        expected = generate(model, torch.tensor([0, 1]), noise=register_noise(model, 2, **first), **options)
        samples = generate(model, torch.tensor([0, 0, 1, 1]), noise=register_noise(model, 4, **first), **options)
    assert len({row.images.tobytes() for row in result.trajectory}) == 2
    for row, image in zip(result.trajectory, expected):
        last = torch.from_numpy(row.images[-1]).permute(2, 0, 1) / 255
        assert (last - image).abs().max() < 1.5 / 255
    shown = np.concatenate([row.images for row in result.samples])
    assert np.abs(shown - samples.mul(255).permute(0, 2, 3, 1).numpy()).max() < 1.5
    assert result.latents.count == 8 and len(result.psnr) == len(result.originals) == 8
    originals = torch.from_numpy(result.originals).permute(0, 3, 1, 2) / 255
    noise, t = register_noise(model, 8, seed=0, stream=TOKENIZE_STREAM, first=0), torch.full((8,), model.tokenize_time)
    with torch.no_grad():
        latents = model.tokenize(originals, noise=noise, t=t)
        rebuilt = model.decode(latents).clamp(0, 1)
    assert np.abs(result.reconstructions - rebuilt.mul(255).permute(0, 2, 3, 1).numpy()).max() < 1.5
    expected = -10 * (rebuilt - originals).double().square().mean((1, 2, 3)).log10()
    assert result.psnr == pytest.approx(expected.tolist(), rel=1e-3)
    assert result.latents.mean == pytest.approx(latents.mean((0, 1)).numpy(), abs=1e-4)

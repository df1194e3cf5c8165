"""What determines a piece of work is in its key: one setting changed, and no finished piece is taken for another's."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cli_toy import CONFIG, picture, toy_model
from ranks import ALONE

from unite_fast.data.reader import FileReader
from unite_fast.data.source import open_images
from unite_fast.errors import UserError
from unite_fast.evaluation.evaluator import Evaluator
from unite_fast.evaluation.generation import labels_of
from unite_fast.evaluation.held_out import HeldOut
from unite_fast.evaluation.plan import Plan, check_count
from unite_fast.evaluation.work import digest

SETTINGS = {"guidance": 1.5, "interval": (0.2, 0.9), "solver": "heun", "steps": 4, "time_shift": 0.7}
MODEL = {"sha256": "m"}


class Seen(Exception):
    """In place of any work: what it is known by."""


class Keys:
    def gather(self, what, key, count, batch, make, **options):
        raise Seen(digest(key))


def extractor(sha256="i"):
    network = torch.nn.Module()
    network.sha256 = sha256
    return network


def of_generated(plan=Plan(metrics=("is",), count=12), about=MODEL, sampling=SETTINGS, inception="i", sizes=CONFIG):
    evaluator = Evaluator(plan, sizes, ALONE, files=(extractor(inception), None, None))
    with pytest.raises(Seen) as seen:
        evaluator.measure(toy_model(), about, sampling, Keys())
    return str(seen.value)


def test_generated_images_are_known_by_all_that_makes_them():
    plan = Plan(metrics=("is",), count=12)
    assert of_generated() == of_generated(replace(plan, count=15)), "more images go on from fewer"
    changed = [
        of_generated(replace(plan, seed=1)), of_generated(replace(plan, batch=5)),
        of_generated(replace(plan, label_sampling="random")),
        of_generated(replace(plan, precision="bf16")), of_generated(about={"sha256": "other"}),
        of_generated(inception="other"), of_generated(sizes=CONFIG.model_copy(update={"image_size": 32})),
        *(
            of_generated(sampling=SETTINGS | change)
            for change in ({"guidance": 2.0}, {"interval": (0.1, 0.9)}, {"solver": "euler"}, {"steps": 5},
                           {"time_shift": 0.6})
        ),
    ]  # fmt: skip
    assert len({of_generated(), *changed}) == 1 + len(changed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    for index in range(7):
        picture(folder / f"{index}.png", seed=index)
    return folder


def held_out(folder, *, limit=None, crop="adm", inception="i", lpips="l"):
    reader = FileReader(open_images(folder, image_size=16, remark=False), 16, crop)
    return HeldOut(reader, limit, 4, extractor(inception), SimpleNamespace(sha256={"vgg": lpips}))


def test_held_out_images_are_known_by_all_that_is_measured_on_them(folder):
    def key(pairs=frozenset({"psnr", "lpips"}), time=0.005, with_real=True, **options):
        with pytest.raises(Seen) as seen:
            held_out(folder, **options).measure(
                SimpleNamespace(tokenize_time=time), torch.device("cpu"), Keys(), {}, pairs=pairs,
                with_real=with_real, seed=0, autocast=contextlib.nullcontext,
            )  # fmt: skip
        return str(seen.value)

    changed = [
        key(limit=3), key(crop="none"), key(inception="other"), key(lpips="other"), key(time=0.5),
        key(pairs=frozenset({"lpips"})), key(with_real=False),
    ]  # fmt: skip
    assert len({key(), *changed}) == 1 + len(changed)
    plain = frozenset({"psnr"})
    assert key(plain) == key(plain, lpips="other"), "weights that are not used change nothing"


def test_few_held_out_images_are_spread_over_all(folder):
    """They lie class by class: the first ones would be of one class."""
    assert held_out(folder).chosen == held_out(folder, limit=9).chosen == list(range(7))
    assert held_out(folder, limit=3).chosen == [0, 2, 4] and held_out(folder, limit=1).chosen == [0]
    assert held_out(folder, limit=6).chosen == [0, 1, 2, 3, 4, 5]


def test_counts_that_do_not_serve_the_metrics_are_refused():
    def refusal(count, metrics, label_sampling="balanced"):
        with pytest.raises(UserError) as error:
            check_count(Plan(metrics, label_sampling=label_sampling), count, 3, metrics)
        return str(error.value)

    assert refusal(10, ("is",)).startswith("10 images cannot be balanced over 3 classes: take 9 or 12 (--count")
    check_count(Plan(("is",), label_sampling="random"), 10, 3, ("is",))
    once = "small-data metrics need at least 2 generated images per class, and 3 images give class 0 only 1: take more"
    assert refusal(3, ("small",)) == f"{once} (--count, evaluation.samples_per_class)"
    assert refusal(3, ("small", "gfid")) == f"{once} (--count, evaluation.count)"
    counts = torch.bincount(labels_of(0, 5, 3, sampling="random", seed=0), minlength=3)
    assert f"5 images give class {int(counts.argmin())} only {int(counts.min())}" in refusal(5, ("small",), "random")


def test_labels_at_random_depend_on_seed_and_number_and_reach_every_class_alike():
    whole = labels_of(0, 30_000, 10, sampling="random", seed=3)
    pieces = [labels_of(first, first + 7, 10, sampling="random", seed=3) for first in (0, 7, 14)]
    assert torch.equal(torch.cat(pieces), whole[:21])
    assert not torch.equal(labels_of(0, 30_000, 10, sampling="random", seed=4), whole)
    counts = torch.bincount(whole, minlength=10)
    assert len(counts) == 10 and 5 * 52 > (counts - 3000).abs().max() > 0, "five standard deviations of 52"

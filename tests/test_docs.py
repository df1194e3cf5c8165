"""The documentation is what the code says."""

import json
import re
from pathlib import Path

import pytest

from unite_fast.config import Config
from unite_fast.config_reference import ABLATIONS, reference
from unite_fast.section import section_of

ROOT = Path(__file__).resolve().parents[1]


def test_the_configuration_reference_is_current():
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == reference(), "run: python -m unite_fast.config_reference docs/configuration.md"


def test_the_reference_states_every_bound():
    rows = {line.split(" | ")[0]: line.split(" | ")[1] for line in reference().splitlines() if line.startswith("| `")}
    assert rows["| `clip_norm`"] == "number > 0 or null"
    assert rows["| `betas`"] == "[number ≥ 0 and < 1, number ≥ 0 and < 1]"
    assert rows["| `seed`"] == "integer, ≥ 0, < 2,147,483,648"


def test_the_ablations_name_keys_that_exist():
    named = re.findall(r"`((?:model|objective|sampling)\.\w+)`", ABLATIONS)
    assert len(named) > 10
    for key in named:
        section, name = key.split(".")
        assert name in section_of(Config.model_fields[section].annotation).model_fields, key


def test_every_key_of_the_shipped_configurations_is_documented():
    page = reference()
    for path in (ROOT / "configs").glob("*.json"):
        keys = re.findall(r'"(\w+)":', json.dumps(json.loads(path.read_text())))
        sections = {"model", "decoder", "objective", "lpips", "optimizer", "train", "data", "sampling", "evaluation"}
        assert all(f"| `{key}` |" in page for key in set(keys) - sections), path


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", page.read_text(encoding="utf-8")):
        place = page.parent / target if target else page
        assert place.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{target}#{anchor}"


def test_the_configurations_of_the_readme_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"`(\w+)`(?:, `\w+`)? \| (?:B|L|XL|2 M)", readme):
        assert (ROOT / "configs" / f"{name}.json").exists(), name

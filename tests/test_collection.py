"""The tests themselves: each is collected."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [*ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_function_hides_an_earlier_one_of_its_name(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    assert [name for name, count in Counter(functions).items() if count > 1] == []

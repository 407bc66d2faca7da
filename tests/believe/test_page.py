"""docs/believe.md names the test that guards each of its claims: the tests exist, and so does every linked file."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "believe.md"
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)")


def text():
    return PAGE.read_text(encoding="utf-8")


@cache
def functions(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize(("path", "name"), sorted(set(TEST.findall(text()))))
def test_the_test_that_guards_a_claim_exists(path, name):
    assert (ROOT / path).is_file()
    assert name.startswith("test_")
    assert name in functions(path)


@pytest.mark.parametrize("target", sorted(set(LINK.findall(text()))))
def test_what_is_linked_exists(target):
    assert target.startswith("https://") or (PAGE.parent / target).exists()


def test_every_fault_has_a_test_that_guards_against_it():
    rows = [line for line in text().splitlines() if line.startswith("| ") and not set(line) <= set("|- ")]
    faults = [line for line in rows if line.count("|") == 4 and not line.startswith("| fault")]
    assert len(faults) >= 20
    assert [line for line in faults if not TEST.search(line.split("|")[3])] == []


def test_no_test_is_named_in_another_form():
    assert len(re.findall(r"test_\w+`", text())) == len(TEST.findall(text()))


def test_the_readme_leads_to_it():
    assert "](docs/believe.md)" in (ROOT / "README.md").read_text(encoding="utf-8")

"""The house rules that can be checked by reading the source: which way imports point, and how large things are."""

import ast
import statistics
from pathlib import Path

import pytest

import steep
from steep.method import PACKAGES

ROOT = Path(steep.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
OUTER = {"evidence", "tasks", "adapters", "cli", "__main__", "__init__", "testing"}
FOUNDATIONS = {"per_example", "linalg"}


def place(path):
    """The room, foundation or outer part a file belongs to; ``kernel`` for the modules of the package itself."""
    first = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if first in PACKAGES or first in OUTER or first in FOUNDATIONS:
        return first
    return "kernel"


def imports(path):
    """Parts of steep that a file imports at run time (imports for type checkers do not count)."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("steep."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "steep":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("steep."))


def allowed(importer, imported):
    if importer in OUTER:
        return True
    if imported in OUTER:
        return False
    if imported in PACKAGES:
        return importer == imported or importer == "systems"
    return True


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_dependencies_point_one_way(path):
    importer = place(path)
    wrong = [i for i in imports(path) if not allowed(importer, i)]
    assert not wrong, f"{importer} must not import {wrong}"


def test_methods_have_a_test_file_of_their_name():
    tests = Path(__file__).parent
    missing = [
        f"{package}/{path.stem}"
        for package in PACKAGES
        for path in (ROOT / package).glob("[!_]*.py")
        if not (tests / package / f"test_{path.stem}.py").exists()
    ]
    assert not missing


def lengths(kinds):
    return [
        node.end_lineno - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kinds)
    ]


def test_files_and_functions_stay_short():
    files = [len(path.read_text().splitlines()) for path in FILES]
    functions = lengths((ast.FunctionDef, ast.AsyncFunctionDef))
    assert max(files) <= 600
    assert statistics.median(files) <= 150
    assert statistics.median(functions) <= 8
    assert len((ROOT / "fit.py").read_text().splitlines()) <= 150


def test_tests_are_at_least_as_long_as_the_package():
    tests = Path(__file__).parent.rglob("*.py")
    assert sum(len(p.read_text().splitlines()) for p in tests) >= sum(len(p.read_text().splitlines()) for p in FILES)


def test_no_method_draws_from_numpys_or_pythons_global_generators():
    for path in FILES:
        text = path.read_text()
        assert "np.random.seed" not in text
        assert "import random\n" not in text

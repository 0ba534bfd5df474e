"""The house rules that can be checked by reading the source: which way imports point, and how large things are."""

import ast
import statistics
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import steep
from steep.method import PACKAGES

ROOT = Path(steep.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MODULES = {
    ".".join(("steep", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path for path in FILES
}
OUTER = {"evidence", "tasks", "adapters", "cli", "__main__", "__init__", "testing"}
HEAVY = {"matplotlib", "plotly", "optuna", "sklearn", "pandas", "transformers", "datasets", "lightning", "PIL", "scipy"}


def part(name):
    """The package, foundation or outer part of a module of steep; its own name for modules at the root."""
    return "__init__" if name == "steep" else name.split(".")[1]


def imports(path, *, when_called=True, for_types=False):
    """Names of the modules that a file imports.

    Args:
        when_called: also those imported in functions.
        for_types: also those under ``if TYPE_CHECKING``.
    """
    waiting, found = [ast.parse(path.read_text())], []
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING" and not for_types:
            continue
        if isinstance(node, ast.FunctionDef) and not when_called:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name if name in MODULES else node.module for name in full]
        waiting += ast.iter_child_nodes(node)
    return found


def allowed(importer, imported):
    if importer in OUTER:
        return True
    if imported in OUTER:
        return False
    return imported not in PACKAGES or importer in (imported, "systems")


@pytest.mark.parametrize("name", MODULES)
def test_dependencies_point_one_way(name):
    own = [i for i in imports(MODULES[name]) if i in MODULES]
    wrong = [i for i in own if not allowed(part(name), part(i))]
    assert not wrong, f"{name} must not import {wrong}"


@pytest.mark.parametrize("for_types", [False, True])
def test_no_import_circles(for_types):
    """Neither when modules are imported, nor with what only type checkers read. The package itself is left out: its
    `compare` is for type checkers alone."""
    graph = {
        name: {i for i in imports(path, when_called=False, for_types=for_types) if i in MODULES and i != name}
        for name, path in MODULES.items()
        if name != "steep"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_nothing_in_the_package_imports_the_package_itself():
    """``import steep`` inside steep makes every module depend on every other: the version is in `steep.version`."""
    outside = ("steep.cli", "steep.__main__")
    assert not [name for name, path in MODULES.items() if not name.startswith(outside) and "steep" in imports(path)]


def test_methods_import_heavy_libraries_only_where_they_are_used():
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            tops = {name.split(".")[0] for name in imports(path, when_called=False)}
            assert not tops & HEAVY, f"{path.relative_to(ROOT)} imports {sorted(tops & HEAVY)} at its top"


def test_methods_have_a_test_file_of_their_name():
    tests = Path(__file__).parent
    methods = [p.relative_to(ROOT) for package in PACKAGES for p in (ROOT / package).rglob("[!_]*.py")]
    assert not [path for path in methods if not (tests / path.with_name(f"test_{path.name}")).exists()]


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
        if path == ROOT / "utils" / "randomness.py":  # makes them streams of the run
            continue
        text = path.read_text()
        assert "np.random.seed" not in text
        assert "import random\n" not in text

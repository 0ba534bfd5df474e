"""The gallery runs, and what the documents say and show is true of the code."""

import json
import math
import re
import runpy
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

import steep
from steep.apply import BY_COMPONENT, FACTS

ROOT = Path(__file__).parent.parent


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_the_python_blocks_of_a_document_run_in_order(path):
    text, names = path.read_text(), {}
    for block in re.finditer(r"^( *)```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        lines_before = "\n" * text[: block.start(2)].count("\n")  # so that errors name the document's line
        exec(compile(lines_before + textwrap.dedent(block[2]), str(path), "exec"), names)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "examples").glob("plot_*.py")), ids=lambda p: p.stem)
def test_gallery_examples_run(path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib", reason="the gallery draws with matplotlib")
    matplotlib.use("Agg")
    runpy.run_path(str(path))


def test_the_readme_is_one_screen_and_names_real_methods_and_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 110
    named = {m for line in re.findall(r"--methods ([a-z -]+)", text) for m in line.split() if not m.startswith("-")}
    assert named <= {*steep.methods(), "all"}
    targets = re.findall(r"^make (\w+)", text, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= set(targets)
    assert all(f"\n{target}:" in makefile for target in targets)


def test_contributing_names_every_way_into_a_recipe_and_every_fact_of_a_run():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert re.findall(r"^\| `(\w+)` \| `make\(", text, re.MULTILINE) == list(BY_COMPONENT)
    assert set(re.findall(r"`(\w+)`", text.split("filled in by name:")[1].split("The other four")[0])) == set(FACTS)


def test_dry_runs_of_the_makefile_name_existing_recipes():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    plan = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for recipe in re.findall(r"steep compare (\S+)", plan):
        steep.task(recipe)


@pytest.fixture
def measured():
    return runpy.run_path(str(ROOT / "docs" / "measured.py"))


def test_the_page_of_measurements_shows_what_was_recorded(measured, tmp_path):
    arm = {"equal time": {"estimate": math.log(4), "low": -math.inf, "high": math.log(5), "verdict": "no evidence"}}
    problem = {budget: {"levenberg-marquardt": arm} for budget in ("T/9", "T/3", "T")}
    (tmp_path / "second_order.json").write_text(json.dumps({"steps of Adam at T": 7, "p float32": problem}))
    (tmp_path / "fit.json").write_text(json.dumps({"ratio": 1.25, "a": {"x": 2, "versions": {}}, "b": {"x": 3000}}))
    page = measured["page"](tmp_path)
    assert "| p float32 | levenberg-marquardt |" + 3 * " 0.25 [0.2, inf] no evidence |" in page
    assert "| p float32 | lbfgs | – | – | – |" in page
    assert "| ratio | 1.25 |" in page
    assert "| figure | a | b |" in page
    assert "| x | 2 | 3,000 |" in page
    assert "Statistics" not in page


def test_every_recorded_benchmark_of_the_page_can_be_shown(measured):
    recorded = [name for name in measured["TITLES"] if (ROOT / "benchmarks" / "results" / f"{name}.json").exists()]
    page = measured["page"]()
    assert {"validity", "sven", "second_order"} <= set(recorded)
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == [
        measured["TITLES"][n] for n in recorded
    ]
    rates = [float(low) for low in re.findall(r"\| (\d+\.\d)(?: to \d+\.\d)? %", page)]
    assert len(rates) > 50
    assert all(0 <= rate <= 100 for rate in rates)

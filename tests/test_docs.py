"""The gallery runs, and the documents name what exists."""

import re
import runpy
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

import steep

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
    assert named <= {*steep.cards(), "all"}
    targets = re.findall(r"^make (\w+)", text, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= set(targets)
    assert all(f"\n{target}:" in makefile for target in targets)


def test_dry_runs_of_the_makefile_name_existing_recipes():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    plan = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for recipe in re.findall(r"steep compare (\S+)", plan):
        steep.task(recipe)

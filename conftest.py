"""Every Python block of README, CONTRIBUTING and the written docs is a test."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

collect_ignore = ["docs/conf.py", "docs/examples", "docs/_build", "docs/gallery", "docs/methods"]
pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()], patterns=["README.md", "CONTRIBUTING.md", "usage.md", "design.md"]
).pytest()


def pytest_collection_modifyitems(items):
    """The blocks of one document share their names, so they run in one process, in order."""
    for item in items:
        if item.path.suffix == ".md":
            item.add_marker(pytest.mark.xdist_group(item.path.name))

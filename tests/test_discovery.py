"""What a package of methods exports of a file that has an ``__all__``."""

import sys

import pytest


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A file that re-exports a function of a private one, and defines a class that it does not list."""
    files = {
        "__init__.py": "from steep._discovery import exports\n__getattr__, __dir__ = exports(__name__)\n",
        "_parts.py": "def helper(): pass\ndef other(): pass\n",
        "listed.py": "from listing._parts import helper, other\n"
        "__all__ = ['LIMIT', 'helper', 'own']\nLIMIT = 3\ndef own(): pass\nclass Unlisted: pass\n",
        "plain.py": "from listing._parts import other\nclass Plain: pass\n",
    }
    (tmp_path / "listing").mkdir()
    for name, text in files.items():
        (tmp_path / "listing" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import listing

    yield listing
    for name in [name for name in sys.modules if name.partition(".")[0] == "listing"]:
        del sys.modules[name]


def test_a_file_with_all_exports_just_that(package):
    assert dir(package) == ["LIMIT", "Plain", "helper", "own"]
    assert package.helper.__module__ == "listing._parts"
    assert package.LIMIT == 3
    for name in ("Unlisted", "other"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(package, name)

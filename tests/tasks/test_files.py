"""The cache of larger data: where it is, how it is filled, and what is said when it cannot be."""

import gzip
import os
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

from steep.tasks import _files
from steep.tasks._files import cached, data_directory, download

ROWS = np.arange(6.0).reshape(2, 3)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("STEEP_DATA", str(tmp_path))
    return tmp_path


def offline():
    raise URLError("no route to host")


def test_the_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("STEEP_DATA", str(tmp_path / "here"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_directory() == tmp_path / "here"
    monkeypatch.delenv("STEEP_DATA")
    assert data_directory() == tmp_path / "cache" / "steep"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_directory() == tmp_path / ".cache" / "steep"


def test_what_is_there_is_not_fetched(home):
    np.savez(home / "a.npz", data=ROWS)
    assert np.array_equal(cached("a.npz", offline, "")["data"], ROWS)


def test_what_is_missing_is_fetched_once_and_kept(home):
    calls = []

    def fetch():
        calls.append(1)
        return {"data": ROWS}

    for _ in range(2):
        assert np.array_equal(cached("some/folder/a.npz", fetch, "")["data"], ROWS)
    assert calls == [1]
    assert [p.name for p in (home / "some/folder").iterdir()] == ["a.npz"]


def test_without_a_network_the_message_says_what_to_put_where(home):
    with pytest.raises(FileNotFoundError) as caught:
        cached("tabular/a.npz", offline, "an array `data` (rows, columns)")
    message = str(caught.value)
    for part in (home / "tabular/a.npz", "no route to host", "an array `data` (rows, columns)", "set STEEP_DATA"):
        assert str(part) in message
    assert not list(home.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(home):
    home.chmod(0o500)
    with pytest.raises(FileNotFoundError, match="Permission denied"):
        cached("a.npz", lambda: {"data": ROWS}, "")


def test_a_folder_that_is_a_file_is_named(home, monkeypatch):
    (home / "file").write_text("")
    monkeypatch.setenv("STEEP_DATA", str(home / "file"))
    with pytest.raises(FileNotFoundError, match="file/a.npz is missing"):
        cached("a.npz", lambda: {"data": ROWS}, "")


def test_a_fetcher_that_is_wrong_is_not_taken_for_a_missing_network(home):
    def broken():
        raise ValueError("a table of another shape")

    with pytest.raises(ValueError, match="another shape"):
        cached("a.npz", broken, "")


def test_download_unpacks_gzip(tmp_path, monkeypatch):
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"1,2"))
    (tmp_path / "t.csv").write_bytes(b"3,4")
    root = Path(tmp_path).as_uri()
    assert download(f"{root}/t.csv.gz") == b"1,2"
    assert download(f"{root}/t.csv") == b"3,4"
    with pytest.raises(OSError, match="missing"):
        download(f"{root}/missing.csv")


def test_download_gives_up_after_a_while(monkeypatch):
    seen = {}

    def hanging(url, timeout):
        seen["timeout"] = timeout
        raise TimeoutError("timed out")

    monkeypatch.setattr(_files, "urlopen", hanging)
    with pytest.raises(OSError, match="timed out"):
        download("https://example.org/x")
    assert 5 <= seen["timeout"] <= 60

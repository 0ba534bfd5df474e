"""Data sets too large to be bundled: kept as .npz files in a cache, downloaded when missing."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import numpy as np

from steep.utils.files import write_atomic

Arrays = dict[str, np.ndarray]


def data_directory() -> Path:
    """``STEEP_DATA``, or ``steep`` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("STEEP_DATA") or Path(cache) / "steep")


def download(url: str) -> bytes:
    """The content of `url`, unpacked if it is compressed by gzip.

    Raises:
        OSError: no network, or no such file.
    """
    with urlopen(url, timeout=30) as response:
        content: bytes = response.read()
    return gzip.decompress(content) if url.endswith(".gz") else content


def cached(name: str, fetch: Callable[[], Arrays], layout: str) -> Arrays:
    """The arrays of ``data_directory() / name``; what `fetch` returns is kept there when the file is missing.

    Args:
        name: path in the cache, ending in .npz.
        fetch: downloads the data.
        layout: names and shapes of the arrays, for the message.

    Raises:
        FileNotFoundError: the file is missing and cannot be made; says what to put where.
    """
    path = data_directory() / name
    if not path.exists():
        try:
            file = io.BytesIO()
            np.savez_compressed(file, **fetch())  # type: ignore[arg-type]
            write_atomic(path, file.getvalue())
        except OSError as error:
            raise FileNotFoundError(
                f"{path} is missing and could not be downloaded ({error}). Put a .npz file with {layout} there, "
                f"or set STEEP_DATA to the folder that holds {name}"
            ) from error
    with np.load(path) as stored:
        return dict(stored)

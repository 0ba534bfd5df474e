"""One run at a time in a process: the default random generators, and modes of torch, belong to all its threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_running = threading.RLock()  # a run inside another one, in the same thread, is fine


@contextmanager
def alone() -> Iterator[None]:
    """Refuse to run beside another thread that is inside.

    Raises:
        RuntimeError: there is one.
    """
    if not _running.acquire(blocking=False):
        raise RuntimeError(
            "steep.fit is running in another thread of this process, and both would draw from the same random "
            "generators: use processes instead, e.g. concurrent.futures.ProcessPoolExecutor or `steep compare`"
        )
    try:
        yield
    finally:
        _running.release()

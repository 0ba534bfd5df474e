"""What a run costs: seconds of training (wall and CPU), peak memory, and the bytes that autograd saves."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_PROC = Path("/proc/self")


class Stopwatch:
    """Wall and CPU seconds while it runs; `pause` leaves out what is not training."""

    def __init__(self, seconds: float = 0.0, cpu_seconds: float = 0.0):
        self.paused = 0.0  # CPU seconds
        self._spent = (seconds, cpu_seconds)
        self._since: tuple[float, float] | None = None

    def start(self) -> None:
        self._since = (time.perf_counter(), time.process_time())

    def read(self) -> tuple[float, float]:
        """Wall and CPU seconds so far."""
        wall, cpu = self._spent
        if self._since is not None:
            wall, cpu = wall + time.perf_counter() - self._since[0], cpu + time.process_time() - self._since[1]
        return wall, cpu

    @contextmanager
    def pause(self) -> Iterator[None]:
        self._spent, self._since, began = self.read(), None, time.process_time()
        try:
            yield
        finally:
            self.paused += time.process_time() - began
            self.start()


class PeakMemory:
    """Largest memory in use since construction, in bytes above what was in use then.

    On CUDA it is torch's own count. On Linux it is the process's resident set, so runs that share a
    process must run one after the other. Elsewhere it is `None`.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            _return_free_memory()
            self._reset_high_water_mark()
            self.before = self._status("VmRSS") or 0

    @staticmethod
    def _reset_high_water_mark() -> None:
        with suppress(OSError):  # the mark then covers the life of the process: an upper bound
            (_PROC / "clear_refs").write_text("5")

    @staticmethod
    def _status(key: str) -> int | None:
        try:
            lines = (_PROC / "status").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)

    def read(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        peak = self._status("VmHWM")
        return max(0, peak - self.before) if peak is not None else None


def _return_free_memory() -> None:
    """Have glibc give freed memory back: what an earlier training left would hide what this one needs."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def saved_bytes(forward: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of what `forward` computes, beside parameters and buffers.

    Memory is counted once, however many operations keep it, and whole where a view of it is kept.

    Example:
        >>> model, x = nn.Linear(64, 8), torch.randn(100, 64)
        >>> saved_bytes(lambda: model(x), model) == 100 * 64 * 4
        True
    """
    own = {t.untyped_storage().data_ptr() for t in chain(model.parameters(), model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage)  # held, so that its address is not given to another
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)

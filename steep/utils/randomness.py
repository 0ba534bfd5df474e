"""Independent random number streams, so that what one part draws never shifts what another gets.

Data order, augmentation, initialisation and dropout all draw from the default generators of torch, NumPy and Python.
Were they to share them, a method that draws one number more would train on other batches than its baseline, and a
paired comparison would be paired no longer.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def stream_seed(seed: int, name: str) -> int:
    """A seed for the stream `name` of the run `seed`; different names give unrelated streams."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")  # torch takes seeds below 2^63


def generator(seed: int, name: str) -> torch.Generator:
    """A generator at the start of stream `name` of the run `seed`."""
    return torch.Generator().manual_seed(stream_seed(seed, name))


class Stream:
    """A stream that takes the place of the default generators of torch (CPU), NumPy and Python, while active.

    Example:
        >>> order = Stream(0, "order")
        >>> with order.active():
        ...     first = torch.rand(()), np.random.rand(), random.random()
    """

    def __init__(self, seed: int, name: str):
        number = stream_seed(seed, name)
        self._torch = torch.Generator().manual_seed(number).get_state()
        self._numpy: np.random.BitGenerator = np.random.MT19937(number)
        self._python = random.Random(number).getstate()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Give all three generators this stream's state, and keep what it is at the end."""
        outside = torch.get_rng_state(), _numpy_generator(), random.getstate()
        _use(self._torch, self._numpy, self._python)
        try:
            yield
        finally:
            self._torch, self._python = torch.get_rng_state(), random.getstate()
            _use(*outside)

    @contextmanager
    def active_in_torch(self) -> Iterator[None]:
        """Give torch's generator alone this stream's state, where no other can be drawn from: a seventh of the time."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self._torch)
        try:
            yield
        finally:
            self._torch = torch.get_rng_state()
            torch.set_rng_state(outside)

    @property
    def state(self) -> dict[str, Any]:
        """Tensors and plain numbers, for checkpoints."""
        return {"torch": self._torch, "numpy": _plain(self._numpy), "python": self._python}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._torch, self._python = state["torch"], _as_tuple(state["python"])
        self._numpy.state = _numpy_state(state["numpy"])


@contextmanager
def isolated(seed: int, name: str) -> Iterator[None]:
    """The stream `name` of the run `seed` on every device; the caller's generators are left as they were."""
    # a bit generator that is put back has lost the second of two normal numbers, which NumPy draws in pairs
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    try:
        with torch.random.fork_rng(), Stream(seed, name).active():
            if torch.cuda.is_available():
                torch.cuda.manual_seed_all(stream_seed(seed, name))
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002


def current_state() -> dict[str, Any]:
    """State of the default generators, CUDA's too, as tensors and plain numbers."""
    return {
        "torch": torch.get_rng_state(),
        "numpy": _plain(_numpy_generator()),
        "python": random.getstate(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_current_state(state: dict[str, Any]) -> None:
    """Go on from what `current_state` gave."""
    _numpy_generator().state = _numpy_state(state["numpy"])
    random.setstate(_as_tuple(state["python"]))
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    torch.set_rng_state(state["torch"])


def _use(torch_state: Tensor, numpy_generator: np.random.BitGenerator, python_state: Any) -> None:
    torch.set_rng_state(torch_state)
    # exchanged, not copied: NumPy takes 30 us to give its state
    np.random.set_bit_generator(numpy_generator)  # type: ignore[attr-defined]
    random.setstate(python_state)


def _numpy_generator() -> Any:
    return np.random.get_bit_generator()  # type: ignore[attr-defined]


def _plain(numpy_generator: Any) -> dict[str, Any]:
    state = numpy_generator.state
    return {"key": torch.from_numpy(state["state"]["key"].astype(np.int64)), "pos": int(state["state"]["pos"])}


def _numpy_state(plain: dict[str, Any]) -> dict[str, Any]:
    inner = {"key": plain["key"].numpy().astype(np.uint32), "pos": plain["pos"]}
    return {"bit_generator": "MT19937", "state": inner}


def _as_tuple(python_state: Any) -> Any:
    version, numbers, gauss = python_state
    return version, tuple(numbers), gauss

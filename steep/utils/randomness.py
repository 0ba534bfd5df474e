"""Independent random number streams, so that what one part draws never shifts what another gets.

Torch has one default generator; data order, initialisation and dropout all draw from it. Were they to share it,
a method that draws one number more would train on other batches than its baseline, and a paired comparison
would be paired no longer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def stream_seed(seed: int, name: str) -> int:
    """A seed for the stream `name` of the run `seed`; different names give unrelated streams."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")  # torch takes seeds below 2^63


def generator(seed: int, name: str) -> torch.Generator:
    """A generator at the start of stream `name` of the run `seed`."""
    return torch.Generator().manual_seed(stream_seed(seed, name))


class Stream:
    """A stream that takes the place of torch's default (CPU) generator inside ``with stream.active():``."""

    def __init__(self, seed: int, name: str):
        self.state: Tensor = generator(seed, name).get_state()

    @contextmanager
    def active(self) -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            yield
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(outside)

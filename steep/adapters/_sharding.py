"""Whether a method works where parameters are sharded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from steep.recipe import Mean
from steep.requires import UnmetRequirement


def check_sharding(params: Iterable[Tensor], *parts: Any) -> None:
    """Refuse methods that work on whole parameters where these are sharded (FSDP2, tensor parallelism).

    A method whose step treats every element by itself says ``sharding = "any"`` on its class. Torch's own optimizers
    and the mean gradient are assumed to work.

    Raises:
        UnmetRequirement: naming the method and the way out.
    """
    if not any(hasattr(p, "to_local") for p in params):
        return
    for part in parts:
        kind = type(part) if not isinstance(part, type) else part
        elementwise = issubclass(kind, Mean) or kind.__module__.startswith("torch.")
        if not elementwise and getattr(part, "sharding", "whole") != "any":
            raise UnmetRequirement(
                f"{kind.__name__} needs whole parameters, but fully_shard has divided them among processes: use "
                "DistributedDataParallel, which keeps them whole, or a method whose class says sharding = 'any'"
            )

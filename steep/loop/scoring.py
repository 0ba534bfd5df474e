"""Held-out scores: the recipe's own loss and metric, never a method's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from steep.batches import Batch, Loader
from steep.recipe import Metric


def score(
    model: nn.Module, loader: Loader, loss: Callable[[Any, Any], Tensor], metric: Metric | None, device: torch.device
) -> dict[str, float]:
    """Mean loss and metric over the examples of a loader; call it inside `steep.loop.modes.evaluating`.

    Raises:
        ValueError: the loader yields nothing.
    """
    functions = {"loss": loss} | ({metric.name: metric.function} if metric else {})
    sums, count = dict.fromkeys(functions, 0.0), 0
    for item in loader:
        batch = Batch(*item)
        output, target = model(send_to_device(batch.x, device)), send_to_device(batch.y, device)
        for name, function in functions.items():
            values = function(output, target)
            if name != "loss" and values.shape[:1] != (batch.size,):
                raise ValueError(
                    f"the metric {name!r} must return one number per example, shape ({batch.size},), but returned "
                    f"{tuple(values.shape)}: a mean over batches would depend on how they are cut"
                )
            sums[name] += float(values.double().mean()) * batch.size
        count += batch.size
    if not count:
        raise ValueError("the data to score on are empty: give the recipe's Data a val loader with examples")
    return {name: total / count if math.isfinite(total) else math.nan for name, total in sums.items()}

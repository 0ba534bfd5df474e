"""Held-out scores: the recipe's own loss and metric, never a method's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from steep.batches import as_batch, forward
from steep.loop.checks import explained
from steep.recipe import Metric
from steep.requires import weighted
from steep.splits import Loader


def score(
    model: nn.Module, loader: Loader, loss: Callable[[Any, Any], Tensor], metric: Metric | None, device: torch.device
) -> dict[str, float]:
    """Mean loss and metric over the examples of a loader, weighted where its batches are.

    Call it inside `steep.loop.modes.evaluating`.

    Raises:
        ValueError: the loader yields nothing.
    """
    functions = {"loss": loss} | ({metric.name: metric.function} if metric else {})
    sums, total = dict.fromkeys(functions, 0.0), 0.0
    for item in loader:
        batch = as_batch(item)
        batch = batch if device.type == "cpu" else send_to_device(batch, device)
        size = batch.size
        try:
            output = forward(model, batch.x)
        except Exception as error:
            raise explained(error, "model", batch.x)  # noqa: B904  (the same error)
        weight = size if batch.weights is None else float(batch.weights.double().sum())
        for name, function in functions.items():
            try:
                values = function(output, batch.y)
            except Exception as error:
                raise explained(error, name if name == "loss" else f"metric {name!r}", output, batch.y)  # noqa: B904
            if name != "loss" and (not isinstance(values, Tensor) or values.shape[:1] != (size,)):
                raise ValueError(
                    f"the metric {name!r} must return one number per example, shape ({size},), but returned "
                    f"{tuple(values.shape) if isinstance(values, Tensor) else repr(values)}: a mean over batches would "
                    "depend on how they are cut"
                )
            if batch.weights is not None:
                sums[name] += float(weighted(values, batch.weights).double().sum())
            else:
                sums[name] += float(values.double().mean()) * size
        total += weight
    if not total:
        raise ValueError("the data to score on are empty: give the recipe's Data a val loader with examples")
    return {name: value / total if math.isfinite(value) else math.nan for name, value in sums.items()}

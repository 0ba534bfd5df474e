"""Losses, metric, optimizer and splits that the tasks' recipes share."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from steep.recipe import Metric
from steep.splits import Data, Loader, tensor_loader

Part = tuple[Tensor, Tensor]


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of logits (B, C) or (B, T, C); positions are averaged; shape (B,)."""
    losses = F.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="none")
    return losses.view(len(target), -1).mean(1)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error, averaged over an example's outputs; shape (B,)."""
    return (output - target).square().flatten(1).mean(1)


def _absolute_error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().flatten(1).mean(1)


absolute_error = Metric("absolute error", _absolute_error, higher_is_better=False)


def adamw(lr: float, *, weight_decay: float = 0.01) -> dict[str, Any]:
    """Optimizer and scheduler of a recipe: fused AdamW, its learning rate falling to 0 along a cosine."""
    return {
        "optimizer": partial(AdamW, lr=lr, weight_decay=weight_decay, fused=True),
        "scheduler": CosineAnnealingLR,
    }


def loaders(train: Part, val: Part, test: Part | None = None, *, batch_size: int) -> Data:
    """Loaders of inputs and targets; evaluation uses batches of up to 1024."""

    def held_out(part: Part) -> Loader:
        return tensor_loader(*part, min(1024, len(part[0])))

    loader = tensor_loader(*train, min(batch_size, len(train[0])), shuffle=True)
    return Data(loader, held_out(val), held_out(test) if test is not None else None)


def standardise(value: Tensor, train: Tensor) -> Tensor:
    """`value` scaled by the training data's mean and standard deviation per column; constant columns become 0."""
    train = train.double()
    mean, std = train.mean(0), train.std(0, correction=0)
    constant = std <= 1e-9 * train.abs().amax(0)
    return torch.where(constant, 0.0, (value - mean) / std).float()


def standardised(parts: list[Part]) -> list[Part]:
    """Inputs, and targets unless they are classes, standardised by the statistics of the first part (training)."""
    x0, y0 = parts[0]
    return [(standardise(x, x0), standardise(y, y0) if y.is_floating_point() else y) for x, y in parts]


def split(x: Tensor, y: Tensor, generator: torch.Generator) -> list[Part]:
    """A random 60 % for training, 20 % for validation and 20 % for testing."""
    held_out = round(0.2 * len(x))
    order = torch.randperm(len(x), generator=generator)
    return [(x[i], y[i]) for i in order.split([len(x) - 2 * held_out, held_out, held_out])]

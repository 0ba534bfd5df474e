"""A label and two bits. The first bit agrees with the label in three of four cases in every domain; the second agrees
more often in training and hardly ever in the test. It is ColoredMNIST (arXiv 1907.02893) without the images: the first
bit stands for the digit, the second for the colour.

    y fair;    x_1 = y with probability 0.75;    x_2 = y with probability 1 - e
    training: domains of e = 0.2 and e = 0.1;    validation: e = 0.5;    test: e = 0.9

Each domain has 80 examples in exactly the proportions of these probabilities, so there is no sampling noise. A
classifier that uses x_2, the better bit in training, is right on 10 % of the test; one that uses x_1 alone is right on
75 % everywhere.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor

from steep.recipe import Budget, Recipe, accuracy
from steep.splits import Data, tensor_loader
from steep.tasks import Task
from steep.tasks._parts import Part, adamw, cross_entropy
from steep.tasks.networks import MLP

SIZE = 80  # of a domain: the least for which all counts are whole
FLIPS = {"train": (0.2, 0.1), "val": (0.5,), "test": (0.9,)}


def _domain(flip: float) -> Part:
    """All examples of the domain e = `flip`: bits -1 and 1, (80, 2), and labels 0 and 1, (80,)."""
    cases = torch.tensor(list(product((0, 1), repeat=3)))  # the label, whether x_1 is wrong, whether x_2 is
    shares = [(0.25 if wrong else 0.75) * (flip if other else 1 - flip) / 2 for _, wrong, other in cases.tolist()]
    counts = torch.tensor([round(SIZE * share) for share in shares])
    y, *flipped = cases.repeat_interleave(counts, 0).unbind(1)
    return torch.stack([2.0 * (y ^ bit) - 1 for bit in flipped], 1), y


def _part(name: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels and domains in random order."""
    parts = [_domain(flip) for flip in FLIPS[name]]
    x, y = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    order = torch.randperm(len(x), generator=generator)
    return x[order], y[order], torch.arange(len(parts)).repeat_interleave(SIZE)[order]


def _data(generator: torch.Generator) -> Data:
    (x, y, domains), val, test = (_part(name, generator) for name in FLIPS)
    return Data(
        tensor_loader(x, y, len(x), shuffle=True),
        tensor_loader(*val[:2], SIZE),
        tensor_loader(*test[:2], SIZE),
        domains=domains,
    )


def _two_bit(*, steps: int = 1000) -> Recipe:
    return Recipe(
        data=_data,
        model=partial(MLP, 2, 32, 32, 2),
        loss=cross_entropy,
        **adamw(3e-3),
        metric=accuracy,
        budget=Budget(steps=steps),
        name="two-bit",
    )


TWO_BIT = Task(
    "two-bit",
    "A label and two bits, one right in 3 of 4 cases, one only in the training domains; MLP 2-32-32-2; accuracy.",
    _two_bit,
)

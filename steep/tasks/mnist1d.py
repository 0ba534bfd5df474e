"""MNIST-1D (arXiv 2011.14439): ten short signals, one per digit, disguised by random transformations.

A signal of 12 points is followed by 36 to 60 zeros, stretched to 72 points, scaled and rotated to a random
position. What is not signal becomes noise smoothed by a Gaussian; white noise and a random slope are added to all;
the result is sampled at 40 points. The numbers are the authors' defaults. Published accuracies: logistic regression
32 %, MLP 68 %, CNN 94 %.

Differs from the published data set in its random draws, which come from torch's generator. There are 4000 examples for
training, as published, and 1000 each for validation and testing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from steep.recipe import Budget, Recipe, accuracy
from steep.splits import Data
from steep.tasks import Task
from steep.tasks._parts import adamw, cross_entropy, loaders
from steep.tasks.networks import MLP, SmallCNN

POINTS, LENGTH, SAMPLES = 12, 72, 40  # of a signal, of the stretched signal, of an example

_SIGNALS = torch.tensor(  # the digits 0-9 as heights of a pen, from the paper's code
    [
        [5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5],
        [5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5],
        [5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5],
        [5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5],
        [5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5],
        [5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5],
        [5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5],
        [5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5],
    ]
)


def _signals() -> Tensor:
    """The ten signals, (10, 12): each of variance 1/36, beginning and ending at 0."""
    scaled = _SIGNALS / (6 * _SIGNALS.std(1, keepdim=True, correction=0))
    return scaled - scaled[:, :1]


def _interpolate(values: Tensor, at: Tensor) -> Tensor:
    """Rows of `values` (N, n), read linearly between neighbours at the positions `at` (N, m); 0 beyond the end."""
    padded = torch.cat([values, values.new_zeros(len(values), 2)], dim=1)
    left = at.floor().clamp(max=values.shape[1]).long()
    fraction = (at - left).clamp(max=1)
    return padded.gather(1, left).lerp(padded.gather(1, left + 1), fraction)


@cache
def _smoothing() -> Tensor:
    """Matrix of the Gaussian filter of standard deviation 2 over 72 points, mirrored at the ends."""
    from scipy.ndimage import gaussian_filter1d

    return torch.from_numpy(gaussian_filter1d(np.eye(LENGTH), 2, axis=0)).float()


def _disguise(
    signal: Tensor, padding: Tensor, gain: Tensor, shift: Tensor, slope: Tensor, noise: Tensor, white: Tensor
) -> Tensor:
    """The transformation, given all its random numbers.

    Args:
        signal: (N, 12).
        padding: zeros appended, 36 to 60, (N, 1).
        gain: factor, (N, 1).
        shift: points to rotate by, 0 to 47, (N, 1).
        slope: subtracted from the whole, per 72 points, (N, 1).
        noise: smoothed, it replaces what is not signal, (N, 72).
        white: added everywhere, (N, 72).

    Returns:
        (N, 40).
    """
    time = torch.arange(LENGTH)
    source = (time - shift) % LENGTH * (POINTS + padding - 1) / (LENGTH - 1)
    stretched = gain * _interpolate(signal, source)
    whole = torch.where(source < POINTS, stretched, noise @ _smoothing().T) + white
    whole = whole - slope * torch.linspace(-0.5, 0.5, LENGTH)
    return _interpolate(whole, torch.linspace(0, LENGTH - 1, SAMPLES).expand(len(whole), -1))


def _examples(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` examples (count, 40), of mean 0 and variance 1 over all, and their digits, in random order."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count, 1).uniform_(low, high, generator=generator)

    def normal(std: float) -> Tensor:
        return std * torch.randn(count, LENGTH, generator=generator)

    digit = (torch.arange(count) % 10)[torch.randperm(count, generator=generator)]
    padding, shift = uniform(36, 61).floor(), uniform(0, 48).floor()
    x = _disguise(
        _signals()[digit], padding, uniform(0.8, 1.2), shift, uniform(-0.375, 0.375), normal(0.25), normal(0.02)
    )
    return (x - x.mean()) / x.std(correction=0), digit


def _data(generator: torch.Generator, model: str, batch_size: int) -> Data:
    x, y = _examples(6000, generator)
    x = x.unsqueeze(1) if model == "cnn" else x
    sizes = [4000, 1000, 1000]
    return loaders(*zip(x.split(sizes), y.split(sizes), strict=True), batch_size=batch_size)


_MODELS: dict[str, Callable[[], nn.Module]] = {
    "cnn": partial(SmallCNN, 1, 10, (16, 32, 64), dimensions=1),
    "mlp": partial(MLP, SAMPLES, 100, 100, 10),
}


def _mnist1d(model: str = "cnn", *, batch_size: int = 100, epochs: int = 20) -> Recipe:
    return Recipe(
        data=partial(_data, model=model, batch_size=batch_size),
        model=_MODELS[model],
        loss=cross_entropy,
        **adamw(1e-2),
        metric=accuracy,
        budget=Budget(epochs=epochs),
        name=f"mnist1d:{model}",
    )


MNIST1D = Task(
    "mnist1d",
    "4000 one-dimensional signals of ten digits; CNN (or MLP 40-100-100-10); accuracy.",
    _mnist1d,
    variants=tuple(_MODELS),
    data="Computed by the procedure of Greydanus and Kobak (arXiv 2011.14439), whose code is under Apache-2.0.",
)

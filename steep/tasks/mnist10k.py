"""The 10 000 test images of MNIST, 28 x 28 pixels: 8000 for training, 500 for validation, 1500 for testing."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from steep.recipe import Budget, Recipe, accuracy
from steep.splits import Data, split_loaders
from steep.tasks import Task
from steep.tasks._files import Arrays, cached, download
from steep.tasks._parts import adamw, cross_entropy
from steep.tasks.networks import SmallCNN

SOURCE = "https://raw.githubusercontent.com/fgnt/mnist/ae608a02b796c9ee908c082585a5f006fe05258e"


def _fetch() -> Arrays:
    images, labels = (download(f"{SOURCE}/t10k-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
    return {
        "images": np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
        "labels": np.frombuffer(labels, np.uint8, offset=8),
    }


def _data(generator: torch.Generator, batch_size: int) -> Data:
    layout = "arrays `images` (10000, 28, 28) and `labels` (10000,), both uint8"
    stored = cached("image/mnist10k.npz", _fetch, layout)
    images = torch.from_numpy(stored["images"]).float().div(255).unsqueeze(1)
    labels = torch.from_numpy(stored["labels"]).long()
    return split_loaders(images, labels, generator, batch_size=batch_size, val=0.05, test=0.15)


def _mnist10k(*, batch_size: int = 64, epochs: int = 3) -> Recipe:
    return Recipe(
        data=partial(_data, batch_size=batch_size),
        model=partial(SmallCNN, 1, 10, (8, 16, 32, 64)),
        loss=cross_entropy,
        **adamw(1e-2),
        metric=accuracy,
        budget=Budget(epochs=epochs),
        name="mnist10k",
    )


ORIGIN = "Test images of MNIST (LeCun, Cortes, Burges), CC BY-SA 3.0 as commonly given; STEEP_DATA, or downloaded."
MNIST10K = Task(
    "mnist10k", "10 000 images of MNIST, 28 x 28 pixels; CNN with GroupNorm; accuracy.", _mnist10k, data=ORIGIN
)

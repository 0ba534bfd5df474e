"""scikit-learn's 1797 handwritten digits, 8 x 8 pixels, bundled with it (UCI optical recognition of digits)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from steep.recipe import Budget, Recipe, Run, accuracy
from steep.splits import Data, dirichlet_clients
from steep.tasks import Task
from steep.tasks._parts import Part, absolute_error, adamw, cross_entropy, loaders, split, squared_error
from steep.tasks.networks import MLP, SmallCNN


def _parts(generator: torch.Generator, shape: tuple[int, ...]) -> list[Part]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = torch.from_numpy(x).float().div(16).view(-1, *shape)
    return split(images, torch.from_numpy(y).long(), generator)


def _data(generator: torch.Generator, shape: tuple[int, ...], batch_size: int) -> Data:
    return loaders(*_parts(generator, shape), batch_size=batch_size)


def _digits(*, batch_size: int = 64, epochs: int = 40) -> Recipe:
    return Recipe(
        data=partial(_data, shape=(64,), batch_size=batch_size),
        model=partial(MLP, 64, 128, 128, 10),
        loss=cross_entropy,
        **adamw(1e-2),
        metric=accuracy,
        budget=Budget(epochs=epochs),
        name="digits",
    )


def _digits_image(*, batch_size: int = 64, epochs: int = 20) -> Recipe:
    return Recipe(
        data=partial(_data, shape=(1, 8, 8), batch_size=batch_size),
        model=partial(SmallCNN, 1, 10, (16, 32, 64)),
        loss=cross_entropy,
        **adamw(3e-3),
        metric=accuracy,
        budget=Budget(epochs=epochs),
        name="digits-image",
    )


def _itself(generator: torch.Generator, batch_size: int) -> Data:
    return loaders(*((x, x) for x, _ in _parts(generator, (64,))), batch_size=batch_size)


def _digits_autoencoder(*, batch_size: int = 64, epochs: int = 40) -> Recipe:
    return Recipe(
        data=partial(_itself, batch_size=batch_size),
        model=partial(MLP, 64, 32, 8, 32, 64, activation=nn.GELU),
        loss=squared_error,
        **adamw(1e-2),
        metric=absolute_error,
        budget=Budget(epochs=epochs),
        name="digits-autoencoder",
    )


def _clients(generator: torch.Generator, clients: int, alpha: float, batch_size: int) -> Data:
    parts = _parts(generator, (64,))
    shares = dirichlet_clients(*parts[0], generator, clients=clients, alpha=alpha, batch_size=batch_size)
    return replace(loaders(*parts, batch_size=batch_size), clients=shares)


def _fedavg(
    model: nn.Module, run: Run, local_step: Callable[[nn.Module, Any], Tensor], **hyper: Any
) -> Iterator[Tensor]:
    from steep.rounds.fedavg import FedAvg  # here, so that listing the tasks imports no method

    return FedAvg(model, run.data.clients, local_step, generator=run.generator, **hyper)


def _digits_federated(
    *, clients: int = 20, alpha: float = 0.1, fraction: float = 0.25, local_steps: int = 20, rounds: int = 60
) -> Recipe:
    lr = 0.1
    return Recipe(
        data=partial(_clients, clients=clients, alpha=alpha, batch_size=20),
        model=partial(MLP, 64, 32, 10),
        loss=cross_entropy,
        optimizer=partial(SGD, lr=lr),
        rounds=partial(_fedavg, fraction=fraction, local_steps=local_steps, lr=lr),
        metric=accuracy,
        budget=Budget(steps=rounds),
        name="digits-federated",
    )


ORIGIN = "Optical Recognition of Handwritten Digits, UCI repository, CC BY 4.0; comes with scikit-learn."
DIGITS = Task("digits", "1797 handwritten digits of 8 x 8 pixels; MLP 64-128-128-10; accuracy.", _digits, data=ORIGIN)
IMAGE = Task(
    "digits-image",
    "The same digits as images; CNN with GroupNorm that takes any size; accuracy.",
    _digits_image,
    data=ORIGIN,
)
AUTOENCODER = Task(
    "digits-autoencoder",
    "The same digits, encoded in 8 numbers and decoded; MLP 64-32-8-32-64; squared error.",
    _digits_autoencoder,
    data=ORIGIN,
)
FEDERATED = Task(
    "digits-federated",
    "The same digits divided among 20 clients, most with one or two classes; FedAvg; MLP 64-32-10; accuracy.",
    _digits_federated,
    data=ORIGIN,
)

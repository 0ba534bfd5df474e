"""The small tables bundled with scikit-learn: two for classification, one for regression."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from steep.recipe import Budget, Recipe, accuracy
from steep.splits import Data
from steep.tasks import Task
from steep.tasks._parts import absolute_error, adamw, cross_entropy, loaders, split, squared_error, standardised
from steep.tasks.networks import MLP


def _table(name: str) -> tuple[Tensor, Tensor]:
    """Inputs (N, columns), and classes (N,) or real targets (N, 1)."""
    import sklearn.datasets

    x, y = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    target = torch.from_numpy(y)
    return torch.from_numpy(x).float(), target.float().unsqueeze(1) if target.is_floating_point() else target.long()


def _data(generator: torch.Generator, name: str, batch_size: int) -> Data:
    return loaders(*standardised(split(*_table(name), generator)), batch_size=batch_size)


def _breast_cancer(*, batch_size: int = 32, epochs: int = 20) -> Recipe:
    return Recipe(
        data=partial(_data, name="breast_cancer", batch_size=batch_size),
        model=partial(MLP, 30, 32, 32, 2),
        loss=cross_entropy,
        **adamw(1e-3),
        metric=accuracy,
        budget=Budget(epochs=epochs),
        name="breast-cancer",
    )


def _wine(*, batch_size: int = 16, epochs: int = 40) -> Recipe:
    return Recipe(
        data=partial(_data, name="wine", batch_size=batch_size),
        model=partial(MLP, 13, 32, 32, 3),
        loss=cross_entropy,
        **adamw(5e-3),
        metric=accuracy,
        budget=Budget(epochs=epochs),
        name="wine",
    )


def _diabetes(*, batch_size: int = 32, epochs: int = 20) -> Recipe:
    return Recipe(
        data=partial(_data, name="diabetes", batch_size=batch_size),
        model=partial(MLP, 10, 32, 32, 1),
        loss=squared_error,
        **adamw(1e-3),
        metric=absolute_error,
        budget=Budget(epochs=epochs),
        name="diabetes",
    )


WDBC = "Breast Cancer Wisconsin (Diagnostic), UCI repository, CC BY 4.0; comes with scikit-learn."
WINES = "Wine, UCI repository, CC BY 4.0; comes with scikit-learn."
PATIENTS = "Efron, Hastie, Johnstone and Tibshirani (2004), published without a licence; comes with scikit-learn."
BREAST_CANCER = Task(
    "breast-cancer", "569 tumours, 30 measurements each; MLP 30-32-32-2; accuracy.", _breast_cancer, data=WDBC
)
WINE = Task("wine", "178 wines of 3 growers, 13 measurements each; MLP 13-32-32-3; accuracy.", _wine, data=WINES)
DIABETES = Task(
    "diabetes",
    "Progression of diabetes in 442 patients, standardised; MLP 10-32-32-1; squared error.",
    _diabetes,
    data=PATIENTS,
)

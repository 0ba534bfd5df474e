"""A photograph as a function (x, y) -> (red, green, blue): regression on real data whose result is a picture.

The photograph (scikit-learn's china.jpg or flower.jpg) is reduced by area averaging. A random 80 % of the pixels
are for training, 10 % for validation, 10 % for testing. The network sees Fourier features of the coordinates
(arXiv 2006.10739).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steep.recipe import Budget, Recipe
from steep.splits import Data, split_loaders
from steep.tasks import Task
from steep.tasks._parts import absolute_error, adamw, squared_error
from steep.tasks.networks import MLP, FourierFeatures


def _image(name: str, height: int) -> Tensor:
    """The photograph, (height, W, 3) in [0, 1], with its proportions kept."""
    from sklearn.datasets import load_sample_image

    full = torch.from_numpy(load_sample_image(f"{name}.jpg").copy()).float().div(255).permute(2, 0, 1)
    width = round(height * full.shape[2] / full.shape[1])
    return F.interpolate(full[None], (height, width), mode="area")[0].permute(1, 2, 0).contiguous()


def _coordinates(height: int, width: int) -> Tensor:
    """Centres of the pixels, (height * width, 2), row by row; the image is 1 high."""
    rows, columns = (torch.arange(n).add(0.5).div(height) for n in (height, width))
    return torch.cartesian_prod(rows, columns)


def _data(generator: torch.Generator, name: str, height: int, batch_size: int) -> Data:
    image = _image(name, height)
    x, y = _coordinates(*image.shape[:2]), image.flatten(0, 1)
    return split_loaders(x, y, generator, batch_size=batch_size, val=0.1, test=0.1)


def _model() -> nn.Module:
    return nn.Sequential(FourierFeatures(2, 64, scale=5.0), MLP(128, 96, 96, 3, activation=nn.GELU))


def _picture(model: nn.Module | None, name: str, height: int) -> Tensor:
    image = _image(name, height)
    if model is None:
        return image
    device = next(model.parameters()).device
    with torch.no_grad():
        return model(_coordinates(*image.shape[:2]).to(device)).view(image.shape).clamp(0, 1).cpu()


def _photo(name: str = "china", *, height: int = 96, batch_size: int = 256, epochs: int = 20) -> Recipe:
    return Recipe(
        data=partial(_data, name=name, height=height, batch_size=batch_size),
        model=_model,
        loss=squared_error,
        **adamw(1e-2),
        metric=absolute_error,
        budget=Budget(epochs=epochs),
        picture=partial(_picture, name=name, height=height),
        name=f"photo:{name}",
    )


PHOTO = Task(
    "photo",
    "A photograph of 96 x 144 pixels as a function of position; MLP on Fourier features; squared error.",
    _photo,
    variants=("china", "flower"),
    data="Sample photographs, CC BY (authors in scikit-learn's datasets/images/README.txt); come with scikit-learn.",
)

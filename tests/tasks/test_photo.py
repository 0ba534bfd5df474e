"""`photo`: the picture and its pixels belong together, and the network draws it."""

import numpy as np
import pytest
import torch
from torch import nn

import steep
from steep.tasks import photo, task


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(data):
    parts = [loader.dataset[:] for loader in (data.train, data.val, data.test)]
    return [torch.cat([part[i] for part in parts]) for i in (0, 1)]


@pytest.mark.parametrize("name", ["china", "flower"])
def test_the_target_is_the_photograph_averaged_over_areas(name):
    from sklearn.datasets import load_sample_image

    full = load_sample_image(f"{name}.jpg") / 255
    target = task(f"photo:{name}").picture(None)
    assert target.shape == (96, 144, 3)
    for row, column in ((0, 0), (17, 99), (50, 3), (95, 143)):
        top, bottom = row * 427 // 96, -(-(row + 1) * 427 // 96)
        left, right = column * 640 // 144, -(-(column + 1) * 640 // 144)
        expected = full[top:bottom, left:right].mean((0, 1))
        np.testing.assert_allclose(target[row, column], expected, atol=1e-5)


def test_the_default_is_the_pagoda():
    assert torch.equal(task("photo").picture(None), task("photo:china").picture(None))
    assert not torch.equal(task("photo").picture(None), task("photo:flower").picture(None))


def test_every_pixel_is_an_example_of_its_own_colour():
    recipe = task("photo", height=24)
    x, y = pixels(recipe.data(generator()))
    target = recipe.picture(None)
    row, column = (x * 24 - 0.5).round().long().T
    assert len(set(zip(row.tolist(), column.tolist(), strict=True))) == len(x) == 24 * 36
    assert torch.equal(target[row, column], y)


def test_a_perfect_model_draws_the_target():
    recipe = task("photo", height=24)
    target = recipe.picture(None)

    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            row, column = (x * 24 - 0.5).round().long().T
            return target[row, column]

    assert torch.equal(recipe.picture(Lookup()), target)


def test_pictures_are_colours_even_of_a_wild_model():
    recipe = task("photo", height=24)
    model = recipe.model()
    with torch.no_grad():
        model[1].layers[-1].weight.mul_(100)
    drawn = recipe.picture(model)
    assert drawn.shape == (24, 36, 3)
    assert (drawn.min(), drawn.max()) == (0, 1)
    assert not drawn.requires_grad


def test_the_split_is_eight_to_one_to_one():
    data = task("photo").data(generator())
    assert [len(d.dataset) for d in (data.train, data.val, data.test)] == [11060, 1382, 1382]


def test_height_keeps_the_proportions():
    assert photo._image("flower", 40).shape == (40, 60, 3)


def test_fourier_features_draw_what_coordinates_alone_do_not():
    """250 steps: the picture's variance is explained better than by the same network on bare coordinates."""
    recipe = task("photo:flower").replace(budget=steep.Budget(steps=250))
    plain = recipe.replace(model=lambda: nn.Sequential(nn.Linear(2, 128), photo._model()[1]))
    ours, theirs = (steep.fit(r, progress=False, evaluate_every=999).test["loss"] for r in (recipe, plain))
    variance = recipe.picture(None).var((0, 1)).mean().item()
    assert ours < 0.1 * variance
    assert ours < 0.4 * theirs

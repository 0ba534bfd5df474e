"""Random images, and each pair of the augmentation's operations carried out alone."""

import itertools

import torch

from steep.data._images import warp


def images(n=3, channels=2, side=28, seed=0, dtype=torch.float64):
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def warped(x, degrees=0.0, shear=(0.0, 0.0), shift=(0.0, 0.0)):
    n = len(x)
    return warp(x, *(torch.tensor([v] * n, dtype=x.dtype) for v in (degrees, shear, shift)))


def pairs_of_operations(x, magnitude):
    """The image (1, C, H, H) after each of the 21 pairs of operations in each of 4 pairs of directions."""
    limits = [30.0, 0.3, 0.3, 0.45, 0.45, 0.9, 0.9]
    for pair in itertools.combinations(range(7), 2):
        for signs in itertools.product((-1, 1), repeat=2):
            amount = [0.0] * 7
            for kind, sign in zip(pair, signs, strict=True):
                amount[kind] = sign * limits[kind] * magnitude / 10
            moved = warped(x, amount[0], amount[1:3], amount[3:5])
            centred = moved - moved.mean()
            yield moved.mean() + (1 + amount[5]) * centred + amount[6] * centred.square().mean().sqrt()

"""Soft signs for training with binary numbers: what stands in for the sign's derivative, and how it sharpens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from steep.utils.validation import check_ranges, require


@runtime_checkable
class Estimator(Protocol):
    """A soft sign whose slope stands in for the sign's; one number, its sharpness, may change over the training run."""

    def at(self, progress: float) -> float:
        """Sharpness when `progress`, from 0 to 1, of the training run is done."""

    def soft(self, z: Tensor, sharpness: Tensor) -> Tensor:
        """The soft sign f(z)."""

    def slope(self, z: Tensor, sharpness: Tensor) -> Tensor:
        """What is used in the place of the sign's derivative."""


@dataclass(frozen=True)
class ReSTE:
    """Power function; sharpness is the exponent's o, from 1 to `o_end`."""

    o_end: float = 3.0
    t: float = 1.5
    m: float = 0.1

    def __post_init__(self) -> None:
        check_ranges(vars(self), {"o_end": "[1, inf)", "t": "(0, inf)", "m": "(0, inf)"})
        require("m", self.m, self.m < self.t, f"less than t={self.t}")

    def at(self, progress: float) -> float:
        return 1 + (1 - math.cos(progress * math.pi / 2)) * (self.o_end - 1)

    def soft(self, z: Tensor, sharpness: Tensor) -> Tensor:
        return sign(z) * z.abs() ** (1 / sharpness)

    def slope(self, z: Tensor, sharpness: Tensor) -> Tensor:
        size = z.abs()
        # clamped, as the power diverges at 0; within m it is the slope of the secant from 0 to m
        secant = size.clamp(min=self.m) ** (1 / sharpness - 1)
        return torch.where(size <= self.m, secant, secant / sharpness) * (size <= self.t)


@dataclass(frozen=True)
class STE:
    """The identity where ``|z| <= t``, else flat: clipped straight-through estimator."""

    t: float = 1.0

    def __post_init__(self) -> None:
        check_ranges(vars(self), {"t": "(0, inf)"})

    def at(self, progress: float) -> float:
        return 1.0

    def soft(self, z: Tensor, sharpness: Tensor) -> Tensor:
        return z.clamp(-self.t, self.t)

    def slope(self, z: Tensor, sharpness: Tensor) -> Tensor:
        return (z.abs() <= self.t).to(z.dtype)


@dataclass(frozen=True)
class ApproxSign:
    """Two parabolas, ``z (2 - |z|)`` where ``|z| < 1``: Bi-Real net's polynomial."""

    def at(self, progress: float) -> float:
        return 1.0

    def soft(self, z: Tensor, sharpness: Tensor) -> Tensor:
        inside = z.clamp(-1, 1)
        return inside * (2 - inside.abs())

    def slope(self, z: Tensor, sharpness: Tensor) -> Tensor:
        return 2 * (1 - z.abs()).clamp(min=0)


@dataclass(frozen=True)
class EDE:
    """max(1, 1/s) tanh(s z): IR-Net's error decay estimator; sharpness s grows geometrically."""

    start: float = 0.1
    end: float = 10.0

    def __post_init__(self) -> None:
        check_ranges(vars(self), {"start": "(0, inf)", "end": "(0, inf)"})

    def at(self, progress: float) -> float:
        return self.start * (self.end / self.start) ** progress

    def soft(self, z: Tensor, sharpness: Tensor) -> Tensor:
        return (1 / sharpness).clamp(min=1) * torch.tanh(sharpness * z)

    def slope(self, z: Tensor, sharpness: Tensor) -> Tensor:
        return sharpness.clamp(min=1) * (1 - torch.tanh(sharpness * z) ** 2)


@dataclass(frozen=True)
class FDA:
    """The first n + 1 waves of a square wave's Fourier series, flat where ``|z| > 1``; sharpness is n."""

    start: int = 9
    end: int = 18
    frequency: float = 0.1

    def __post_init__(self) -> None:
        check_ranges(vars(self), {"start": "[0, inf)", "end": "[0, inf)", "frequency": f"(0, {math.pi / 2})"})

    def at(self, progress: float) -> float:
        # whole waves only
        return float(int(self.start + progress * (self.end - self.start)))

    def soft(self, z: Tensor, sharpness: Tensor) -> Tensor:
        angle = self.frequency * z.clamp(-1, 1)
        odd = range(1, 2 * int(sharpness) + 2, 2)
        return 4 / math.pi * sum(((k * angle).sin() / k for k in odd), torch.zeros_like(z))

    def slope(self, z: Tensor, sharpness: Tensor) -> Tensor:
        waves, turns = sharpness + 1, self.frequency * z.clamp(-1, 1) / math.pi
        total = waves * torch.sinc(2 * waves * turns) / torch.sinc(turns)  # the sum of cos((2i + 1) pi turns)
        return 4 * self.frequency / math.pi * total * (z.abs() <= 1)


def sign(z: Tensor) -> Tensor:
    """+1 or -1, and +1 at zero; NaN stays NaN."""
    # not torch.sign, which is 0 at zero: a weight of 0 would make the layer ternary
    return torch.where(z >= 0, 1.0, torch.where(z < 0, -1.0, z))


class EstimatedSign(torch.autograd.Function):
    """The sign, with an estimator's slope as its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, sharpness: Tensor, estimator: Estimator) -> Tensor:
        return sign(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Estimator], output: Tensor) -> None:
        z, sharpness, ctx.estimator = inputs
        ctx.save_for_backward(z, sharpness)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.estimator.slope(*ctx.saved_tensors), None, None

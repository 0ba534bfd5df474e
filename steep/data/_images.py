"""Operations on batches of images (B, C, H, H): two ways to make them smaller, and a small RandAugment."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from steep.requires import REQUIREMENTS

# At magnitude 10: degrees, shear, shear, fractions of the side (as in RandAugment), relative contrast, and brightness
# in standard deviations of the image.
LIMITS = torch.tensor([30.0, 0.3, 0.3, 0.45, 0.45, 0.9, 0.9])


def side(x: Any) -> int:
    """The side H of square floating-point images (B, C, H, H).

    Raises:
        ValueError: x is anything else.
    """
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[-1] != x.shape[-2] or not x.is_floating_point():
        found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"expected {REQUIREMENTS['images'].what}, got {found}")
    return x.shape[-1]


def even_size(ratio: float, full_size: int) -> int:
    """`ratio` of the side as an even number of pixels; the side itself at ratio 1."""
    return full_size if ratio == 1 else min(full_size, max(2, 2 * round(ratio * full_size / 2)))


def low_frequency_crop(x: Tensor, size: int) -> Tensor:
    """Images (B, C, H, H) with their low frequencies only, on `size` x `size` points (an even number).

    The mean is kept, and so is every wave of less than ``size / 2`` periods; faster ones vanish.

    Raises:
        ValueError: no square floating-point images, or a `size` that is odd or not in [2, H].
    """
    full = _check_size(x, size)
    if size == full:
        return x
    if size % 2:
        raise ValueError(f"size={size} must be even, so that as many frequencies are kept on either side of zero")
    # in float32 at least: there is no FFT of bfloat16
    half, spectrum = size // 2, torch.fft.fft2(x.detach().to(torch.promote_types(x.dtype, torch.float32)))
    for dim in (-2, -1):
        # the low frequencies are in the four corners: 0, 1, ... at the front, ..., -2, -1 at the back
        spectrum = torch.cat([spectrum.narrow(dim, 0, half), spectrum.narrow(dim, -half, half)], dim)
    # the factor keeps the mean: the inverse divides by the smaller number of points
    return torch.fft.ifft2(spectrum * (size / full) ** 2).real.to(x.dtype)


def lanczos(x: Tensor, size: int) -> Tensor:
    """Images (B, C, H, H) scaled down to `size` x `size` with a Lanczos window of three lobes.

    Raises:
        ValueError: no square floating-point images, or a `size` that is not in [2, H].
    """
    full = _check_size(x, size)
    if size == full:
        return x
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) * full / size - 0.5
    distance = (torch.arange(full) - centres[:, None]) * size / full  # in pixels of the small image
    weights = torch.sinc(distance) * torch.sinc(distance / 3) * (distance.abs() < 3)
    weights = (weights / weights.sum(1, keepdim=True)).to(x)
    return weights @ x.detach() @ weights.T


def augment(x: Tensor, magnitude: float, generator: torch.Generator) -> Tensor:
    """Images (B, C, H, H), each changed by two of seven operations, each in a random direction.

    They are rotation, shears, shifts, contrast and brightness, at ``magnitude / 10`` of `LIMITS`. What enters at the
    border is 0, the mean colour of normalised images. Magnitude 0 changes nothing, and draws the same numbers.
    """
    shape = len(x), len(LIMITS)
    chosen = torch.rand(shape, generator=generator).argsort(1) < 2
    directions = 2 * torch.randint(2, shape, generator=generator) - 1
    if magnitude == 0:  # only now, so that the next batch's draws do not depend on the magnitude
        return x
    angle, shear_x, shear_y, shift_x, shift_y, contrast, brightness = (
        (magnitude / 10 * LIMITS * chosen * directions).T[..., None, None, None].to(x)
    )
    x = warp(x, angle.flatten(), torch.cat([shear_x, shear_y], 1), torch.cat([shift_x, shift_y], 1))
    spread, mean = torch.std_mean(x, (1, 2, 3), correction=0, keepdim=True)
    return mean + (1 + contrast) * (x - mean) + brightness * spread


def warp(x: Tensor, degrees: Tensor, shear: Tensor, shift: Tensor) -> Tensor:
    """Images (B, C, H, H) with linear interpolation, each rotated counter-clockwise, sheared and shifted.

    Args:
        degrees: (B,).
        shear: along x and y, (B, 2).
        shift: to the left and up, in sides of the image, (B, 2).
    """
    angle, ones = degrees.deg2rad(), torch.ones_like(degrees)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    slant = torch.stack([ones, shear[:, 0].flatten(), shear[:, 1].flatten(), ones], 1).view(-1, 2, 2)
    theta = torch.cat([turn @ slant, 2 * shift.view(-1, 2, 1)], 2)  # the side of an image is 2 long to grid_sample
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


def _check_size(x: Tensor, size: int) -> int:
    full = side(x)
    if not 2 <= size <= full:
        raise ValueError(f"size={size} must lie in [2, {full}], the side of the images")
    return full

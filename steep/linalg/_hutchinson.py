"""Trace and diagonal of a matrix from its products with random signs (Hutchinson, 1990; Bekas et al., 2007).

    tr A ≈ mean of zᵀ A z            diag A ≈ mean of z ∘ A z            z uniform in {-1, +1}ⁿ

Both are unbiased. With signs, the diagonal of A adds no variance: a diagonal matrix is found exactly by one sample,
where normal numbers would still scatter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from steep.linalg._vectors import MatVec
from steep.utils.validation import check_ranges


class Estimate(NamedTuple):
    """A mean over samples, and its standard error (NaN for a single sample); float64.

    Args:
        value, error: 0-d for a trace, (n,) for a diagonal.
    """

    value: Tensor
    error: Tensor


def rademacher(n: int, generator: torch.Generator, *, dtype: torch.dtype | None = None) -> Tensor:
    """Random signs, (n,), on the generator's device."""
    signs = torch.randint(2, (n,), generator=generator, device=generator.device)
    return (2 * signs - 1).to(dtype or torch.get_default_dtype())


def hutchinson_trace(
    matvec: MatVec, n: int, samples: int, generator: torch.Generator, *, dtype: torch.dtype | None = None
) -> Estimate:
    """The trace of an n x n matrix.

    Args:
        matvec: product with the matrix.
        samples: products to spend, >= 1. The error falls with their square root.
        dtype: of the vectors; torch's default.

    Example:
        >>> import torch
        >>> d = torch.tensor([1.0, 2.0, 3.0])
        >>> hutchinson_trace(lambda v: d * v, 3, 1, torch.Generator()).value.item()
        6.0
    """
    return _mean(lambda z, az: z @ az, matvec, n, samples, generator, dtype)


def hutchinson_diagonal(
    matvec: MatVec, n: int, samples: int, generator: torch.Generator, *, dtype: torch.dtype | None = None
) -> Estimate:
    """The diagonal of an n x n matrix, (n,); arguments as of `hutchinson_trace`."""
    return _mean(lambda z, az: z * az, matvec, n, samples, generator, dtype)


def _mean(
    contract: Callable[[Tensor, Tensor], Tensor],
    matvec: MatVec,
    n: int,
    samples: int,
    generator: torch.Generator,
    dtype: torch.dtype | None,
) -> Estimate:
    """Mean and standard error by Welford's recurrence: n numbers are held, not samples x n."""
    check_ranges({"samples": samples, "n": n}, {"samples": "[1, inf)", "n": "[1, inf)"})
    mean = spread = torch.zeros((), dtype=torch.float64)
    for k in range(1, samples + 1):
        # float64, since the spread is a sum of differences between nearly equal numbers
        z = rademacher(n, generator, dtype=dtype)
        found = contract(z.double(), matvec(z).double())
        before, mean = mean, mean + (found - mean) / k
        spread = spread + (found - before) * (found - mean)
    error = (spread / (samples - 1) / samples).sqrt() if samples > 1 else torch.full_like(mean, torch.nan)
    return Estimate(mean, error)

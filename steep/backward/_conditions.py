"""Losses as conditions r = 0, one or several per example: what rules that solve for all of them have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from steep.requires import REQUIREMENTS


def conditions(v: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    """Conditions ``r = sign(v) |v|^(kappa/2)`` from residuals or losses `v`, and ``dr/dv``; in its shape."""
    slopes = kappa / 2 * v.abs() ** (kappa / 2 - 1)
    slopes.nan_to_num_(nan=torch.nan, posinf=0.0)  # kappa < 2: a condition that is met exactly is left alone
    return v.sign() * v.abs() ** (kappa / 2), slopes


def damped_solve(gram: Tensor, r: Tensor, damping: float) -> Tensor:
    """Weights ``w = (G + λ I)^-1 r`` with ``λ = damping * mean(diag G)``; (B,). 0 where G is zero."""
    shift = damping * gram.diagonal().mean().item()
    return torch.zeros_like(r) if shift == 0 else shifted_solve(gram, r, shift)


def shifted_solve(gram: Tensor, r: Tensor, shift: float) -> Tensor:
    """Weights ``w = (G + shift I)^-1 r``; NaN where G is not finite, as from an ordinary backward."""
    # cholesky_ex, as cholesky would raise on a matrix that is not finite
    factor, failed = torch.linalg.cholesky_ex(gram + shift * torch.eye(len(r), dtype=gram.dtype, device=gram.device))
    return r * torch.nan if failed else torch.cholesky_solve(r[:, None], factor)[:, 0]


def check_vector(rule: str, losses: Tensor, *, outputs: bool = False) -> None:
    """Refuse a loss that was reduced too early, or not enough: (B, R) is for rules that tell the `outputs` apart."""
    if losses.ndim == 0:
        raise ValueError(f"{rule} needs one loss per example, but got a scalar: {REQUIREMENTS['losses'].remedy}")
    if losses.ndim > 1 + outputs:
        shapes = "(B,) or (B, R)" if outputs else "(B,)"
        raise ValueError(f"{rule} needs losses of shape {shapes}, got {tuple(losses.shape)}")

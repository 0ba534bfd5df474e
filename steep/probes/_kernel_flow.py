"""Training by squared errors with a kernel that does not change: a linear equation, and its solution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steep.utils.validation import check_ranges, require, require_tensors

_ROUNDING = 1e-14
"""Eigenvalues below this share of the largest, times their number, are rounding errors of a float64 kernel."""


@dataclass(frozen=True)
class KernelFlow:
    """Training by squared errors with a fixed kernel, solved; made by `kernel_flow`.

    Args:
        kernel: Θ of the training inputs, (n, n) or (n, n, C, C).
        rates: eigenvalues of K, ascending: errors along `modes` decay as ``exp(-rate t)``.
        modes: eigenvectors of K, as columns.
        targets, start: y and f_0 of the training inputs, (n,) or (n, C).
    """

    kernel: Tensor
    rates: Tensor
    modes: Tensor
    targets: Tensor
    start: Tensor

    @property
    def largest_lr(self) -> float:
        """Gradient descent diverges from this learning rate on: two over the largest rate."""
        return 2 / float(self.rates[-1])

    def at(self, time: float, cross: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """Outputs after gradient flow for a time (>= 0; `math.inf` interpolates as far as the kernel can).

        Args:
            time: in learning rate times steps.
            cross: Θ between other inputs and the training inputs, (m, n) or (m, n, C, C), to predict there.
            start: f_0 of those inputs; zero by default.
        """
        require("time", time, time >= 0, "at least 0")
        return self._outputs(-torch.expm1(-time * self.rates), time, cross, start)

    def after(self, steps: int, lr: float, cross: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """Outputs after steps of gradient descent; `cross` and `start` as in `at`."""
        check_ranges({"steps": steps, "lr": lr}, {"steps": "[0, inf)", "lr": "(0, inf)"})
        z = lr * self.rates
        # log1p is exact for the slow modes; above lr λ = 1 an error changes sign at each step, and has no logarithm
        learnt = torch.where(z < 0.5, -torch.expm1(steps * torch.log1p(-z)), 1 - (1 - z) ** steps)
        return self._outputs(learnt, steps * lr, cross, start)

    def _outputs(self, learnt: Tensor, time: float, cross: Tensor | None, start: Tensor | None) -> Tensor:
        """``start - cross α``; `learnt` is the share of the error along each mode that is gone."""
        moves = self.rates > _ROUNDING * len(self.rates) * self.rates[-1]
        # lim q_t(λ) for λ -> 0 is t; an infinite time must not become inf * 0 there
        still = 0.0 if math.isinf(time) else time
        q = torch.where(moves, learnt / torch.where(moves, self.rates, 1.0), still)
        error = (self.start - self.targets).reshape(len(self.modes), -1)
        alpha = self.modes @ (q[:, None] * (self.modes.T @ error)) / len(self.targets)
        start = self.start if cross is None else start
        moved = (_matrix(self.kernel if cross is None else cross) @ alpha).reshape(-1, *self.targets.shape[1:])
        return -moved if start is None else start.double() - moved


def kernel_flow(kernel: Tensor, targets: Tensor, start: Tensor | None = None) -> KernelFlow:
    """Solve the training of ``1/(2N) sum |f(x_i) - y_i|²`` with a fixed kernel.

    For the loss ``mean((f - y)²)`` over N examples and C outputs, multiply learning rates by 2 / C.

    Args:
        kernel: Θ(X, X), (n, n), the same for every output, or (n, n, C, C); symmetric.
        targets: y, (n,) or (n, C).
        start: f_0(X), shaped as the targets; zero by default.

    Raises:
        ValueError: shapes that do not fit, or numbers that are not finite.

    Example:
        >>> flow = kernel_flow(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), targets=torch.ones(2))
        >>> flow.after(1, lr=0.5), flow.at(math.inf)
        (tensor([0.5000, 1.0000], dtype=torch.float64), tensor([1., 1.], dtype=torch.float64))
    """
    require_tensors(kernel=kernel, targets=targets, start=start)
    start = torch.zeros_like(targets) if start is None else start
    _check_flow(kernel, targets, start)
    matrix = _matrix(kernel)
    # symmetric up to rounding only, and eigh reads one triangle
    rates, modes = torch.linalg.eigh((matrix + matrix.T) / 2 / len(targets))
    return KernelFlow(kernel.double(), rates.clamp(min=0), modes, targets.double(), start.double())


def _matrix(kernel: Tensor) -> Tensor:
    """(n, m, C, C) as (n C, m C)."""
    k = kernel.double()
    return k if k.ndim == 2 else k.transpose(1, 2).reshape(k.shape[0] * k.shape[2], -1)


def _check_flow(kernel: Tensor, targets: Tensor, start: Tensor) -> None:
    n, outputs = len(targets), math.prod(targets.shape[1:])
    if kernel.shape not in ((n, n), (n, n, outputs, outputs)) or targets.ndim > 2 or n == 0:
        raise ValueError(
            f"kernel must be (n, n) or (n, n, C, C) for targets (n,) or (n, C) with n > 0, got {tuple(kernel.shape)} "
            f"and {tuple(targets.shape)}"
        )
    if start.shape != targets.shape:
        raise ValueError(f"start must have the shape of targets, got {tuple(start.shape)} and {tuple(targets.shape)}")
    for name, value in (("kernel", kernel), ("targets", targets), ("start", start)):
        if not value.isfinite().all():
            raise ValueError(f"{name} must be finite")

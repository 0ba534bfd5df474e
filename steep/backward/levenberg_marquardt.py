"""Levenberg-Marquardt on a mini-batch: the damped Gauss-Newton step of B conditions, solved in B dimensions, with a
damping that follows how well the steps keep what they promise.

With r the conditions (as in Sven: ``r = sign(v) |v|^(kappa/2)`` of the given vector v) and ``J = dr/dθ`` (B x P), the
gradient minimises the linearised least squares with a penalty on its length, so that SGD makes the step:

    min_d |J d - r|² + λ |d|²:     w = (J Jᵀ + λ I)^-1 r  (B, float64)        .grad += Jᵀ w
    λ = damping * mean(diag(J Jᵀ)), so that the units of losses and parameters do not matter
    gain = (|r|² - |r_new|²) / (|r|² - |r + J Δθ|²): what the step Δθ took off its own batch, over what it promised
    damping *= adapt if gain < 1/4,  /= adapt if gain > 3/4,  kept in [1e-6, 1e3]

Δθ is what the optimizer really did, whatever the optimizer and its schedule.

Papers: Marquardt (1963), doi 10.1137/0111030; on mini-batches through the B x B system, with these thresholds, Ren and
Goldfarb, arXiv 1906.02353. Theirs: λ absolute, and factors near 1. Steep's, from one-seed trials on small regressions:
λ relative to the diagonal, damping 1 at the start, adapt 2, lr 0.3, and the lower end 1e-6.

The adaptive damping is what makes second-order steps safe on small batches: with a fixed damping the rule is no better
than Adam on the regressions.

A recipe's loss is one number per example, so `fit` does not use (B, R) residuals. Measured on the digits autoencoder
(64 outputs, two seeds, 4 CPU seconds), B x 64 conditions end at a validation error of 0.026 at best, B conditions at
0.023, and AdamW at 0.015: a batch of few examples and many outputs is fitted at once and says little about the other
examples, and a step costs as much as thirty of AdamW's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steep.backward._conditions import check_vector, conditions, damped_solve
from steep.method import Method, Paper, log_uniform
from steep.per_example import PerExample
from steep.per_example.rows import Rows
from steep.utils.validation import Ranges, check_ranges

RANGES: Ranges = {"damping": "(0, inf)", "kappa": "(0, inf)", "adapt": "[1, inf)"}
POOR, GOOD = 0.25, 0.75
# below this share of the diagonal, the Gram matrix of a float32 backward holds rounding only: without the bound, the
# damping of a solved problem falls until the step is noise
LEAST, MOST = 1e-6, 1e3


class LevenbergMarquardt:
    """Damped Gauss-Newton step of all per-example conditions of a batch at once, with self-adjusting damping.

    A backward rule: give it the vector of residuals instead of calling ``loss.mean().backward()``. It adds the step to
    ``.grad``; `torch.optim.SGD` with lr <= 1 then makes it, and `step` judges it.

    Args:
        model: the model that the losses come from; hooks on its layers live as long as this object.
        damping: λ as a share of the mean squared length of a condition's gradient, > 0; where it starts. Default 1.
        kappa: conditions are the given numbers to the power kappa/2, > 0. Default 2: the given numbers are
            residuals. 1 for losses that are squares.
        adapt: factor by which a step's gain moves the damping, >= 1. Default 2; 1 keeps it, and needs neither closure
            nor `step`.

    Attributes:
        damping: as it is now.
        gain: of the last step judged, or `None`.

    Raises:
        ValueError: arguments out of range; losses of another shape; `adapt` > 1 without a closure.
        RuntimeError: the step before was never judged.

    Papers: doi 10.1137/0111030, arXiv 1906.02353.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> backward, optimizer = LevenbergMarquardt(model), torch.optim.SGD(model.parameters(), lr=1.0)
        >>> x, y = torch.randn(4, 3), torch.randn(4)
        >>> residuals = lambda: model(x).squeeze(-1) - y
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     backward(residuals(), closure=residuals)
        ...     optimizer.step()
        ...     backward.step()
        >>> bool(residuals().abs().max() < 1e-3)
        True
    """

    requires = frozenset({"losses", "model", "independent_examples", "closure"})

    def __init__(self, model: nn.Module, damping: float = 1.0, kappa: float = 2.0, adapt: float = 2.0):
        check_ranges({"damping": damping, "kappa": kappa, "adapt": adapt}, RANGES)
        self.damping, self.kappa, self.adapt = damping, kappa, adapt
        self.requires = self.requires if adapt > 1 else self.requires - {"closure"}
        self.engine = PerExample(model)
        self.gain: float | None = None
        self._pending: _Step | None = None

    def __call__(self, losses: Tensor, *, scale: float = 1.0, closure: Callable[[], Tensor] | None = None) -> None:
        """Add the step to ``.grad``.

        Args:
            losses: residuals or losses of the examples, shape (B,); or (B, R), R conditions for each of them.
            scale: multiplies the gradient.
            closure: computes `losses` again, at the parameters of that time.
        """
        check_vector("LevenbergMarquardt", losses, outputs=True)
        if self._pending is not None and self._pending.made():
            raise RuntimeError("the step before was not judged: call rule.step() after optimizer.step(), or adapt=1")
        rows = self.engine.rows(losses)
        rows = rows.lasting() if self.adapt > 1 else rows  # `step` asks for J Δθ once the parameters have moved
        r, slopes = conditions(losses.detach().double().flatten(), self.kappa)
        w = damped_solve(rows.gram() * slopes * slopes[:, None], r, self.damping)
        rows.backward(w * slopes * scale)
        self._pending = _Step(rows, r, slopes, self._again(closure)) if self.adapt > 1 else None

    def _again(self, closure: Callable[[], Tensor] | None) -> Callable[[], Tensor]:
        if closure is None:
            raise ValueError(
                f"adapt={self.adapt} needs the losses again: rule(losses, closure=lambda: ...), or adapt=1"
            )
        return lambda: conditions(closure().double().flatten(), self.kappa)[0]

    def step(self) -> None:
        """Move the damping by how well the optimizer's step did; call it after the optimizer."""
        if self._pending is None:
            return
        self.gain, self._pending = self._pending.gain(), None
        # "not >=": a gain of NaN raises the damping too
        factor = self.adapt if not self.gain >= POOR else 1 / self.adapt if self.gain > GOOD else 1.0
        self.damping = min(max(self.damping * factor, LEAST), MOST)

    def state_dict(self) -> dict[str, Any]:
        """The damping, and the parameters known to need the slow way."""
        return {"damping": self.damping, "left_to_autograd": sorted(self.engine.left_to_autograd)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.damping = state["damping"]
        self.engine.left_to_autograd = set(state["left_to_autograd"])

    def __repr__(self) -> str:
        return f"LevenbergMarquardt(damping={self.damping:g}, kappa={self.kappa}, adapt={self.adapt})"


class _Step:
    """What is needed to judge a step: the linearisation where it started."""

    def __init__(self, rows: Rows, r: Tensor, slopes: Tensor, again: Callable[[], Tensor]):
        self.rows, self.r, self.slopes, self.again = rows, r, slopes, again
        # what the optimizer really does is seen from the parameters alone, so that any optimizer may follow
        self.start = [p.detach().clone() for p in rows.params]

    def made(self) -> bool:
        """Whether the parameters have moved."""
        return any(not torch.equal(p, old) for p, old in zip(self.rows.params, self.start, strict=True))

    @torch.no_grad()
    def gain(self) -> float:
        """What the step took off |r|² over what it promised; -inf where it did not even promise anything."""
        moved = [p - old for p, old in zip(self.rows.params, self.start, strict=True)]
        promised = self.r + self.slopes * self.rows.jvp(moved)
        before, now, linear = (t.square().sum() for t in (self.r, self.again(), promised))
        return ((before - now) / (before - linear)).item() if linear < before else -torch.inf


method = Method(
    id="levenberg-marquardt",
    paper=Paper(
        "Efficient Subsampled Gauss-Newton and Natural Gradient Methods for Training Neural Networks",
        arxiv="1906.02353",
        year=2019,
    ),
    changes="backward",
    good_for={"equations", "faster"},
    make=LevenbergMarquardt,
    sgd_lr=0.3,  # the share of each step that is made
    preset={"kappa": 1.0},  # a recipe's losses are usually squares
    search_space={"lr": log_uniform(0.03, 1.0)},
    formula="grad = J' (J J' + damping mean(diag J J') I)^-1 r;  damping follows (|r|^2 - |r_new|^2) / (promised)",
)

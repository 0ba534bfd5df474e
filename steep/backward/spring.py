"""SPRING: the damped solve of a batch's conditions, started from the last direction, which the batch corrects only as
far as it must. Directions that earlier batches asked for are kept, as in Kaczmarz's method for linear equations.

With r the conditions (as in Sven: ``r = sign(v) |v|^(kappa/2)`` of the given vector v), ``J = dr/dθ`` (B x P) and φ the
direction of the step before (0 at first), the gradient is the new φ, so that SGD makes the step:

    min_φ' |J φ' - r|² / B + λ |φ' - μ φ|²:     w = (J Jᵀ / B + λ I)^-1 (r - μ J φ) / B  (B, float64)
    φ' = Jᵀ w + μ φ                            .grad += φ' * min(1, √constraint / |φ'|)

Goldshlager, Abrahamsen and Lin: A Kaczmarz-inspired approach to accelerate the optimization of neural network
wavefunctions (arXiv 2401.10190). λ = 1e-3 and μ = 0.99 are its defaults; J and r carry the 1/√B of its averages. The
paper's conditions are centred (local energies); here they are what is given.

What differs: the paper bounds the learning rate times |φ'| by the root of its norm constraint, 1e-3. A rule does not
know the learning rate, so `constraint` bounds |φ'| itself, and the step by lr times it; it is off by default.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from steep.backward._conditions import check_vector, conditions, shifted_solve
from steep.method import Method, Paper, log_uniform, uniform
from steep.per_example import PerExample
from steep.utils.validation import Ranges, check_ranges

RANGES: Ranges = {"damping": "(0, inf)", "momentum": "[0, 1)", "kappa": "(0, inf)"}


class Spring:
    """Damped Gauss-Newton step of a batch's conditions that keeps of the last one what the batch does not contradict.

    A backward rule: give it the vector of residuals instead of calling ``loss.mean().backward()``; plain
    `torch.optim.SGD` then makes the step.

    Args:
        model: the model that the losses come from; hooks on its layers live as long as this object.
        damping: λ, > 0, absolute, as in the paper. Default 1e-3.
        momentum: μ, share of the last direction that is kept, in [0, 1). Default 0.99; 0 is the damped solve alone.
        kappa: conditions are the given numbers to the power kappa/2, > 0. Default 2: the given numbers are
            residuals. 1 for losses that are squares.
        constraint: largest squared length of the direction, > 0; `None` for no bound.

    Raises:
        ValueError: arguments out of range; losses of another shape.

    Paper: arXiv 2401.10190.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> backward, optimizer = Spring(model), torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(4, 3), torch.randn(4)
        >>> backward(model(x).squeeze(-1) - y)
        >>> optimizer.step()
    """

    requires = frozenset({"losses", "model", "independent_examples"})

    def __init__(
        self,
        model: nn.Module,
        damping: float = 1e-3,
        momentum: float = 0.99,
        kappa: float = 2.0,
        constraint: float | None = None,
    ):
        check_ranges({"damping": damping, "momentum": momentum, "kappa": kappa}, RANGES)
        if constraint is not None:
            check_ranges({"constraint": constraint}, {"constraint": "(0, inf)"})
        self.damping, self.momentum, self.kappa, self.constraint = damping, momentum, kappa, constraint
        self.engine = PerExample(model)
        self.direction: dict[str, Tensor] = {}

    def __call__(self, losses: Tensor, *, scale: float = 1.0) -> None:
        """Add the direction to ``.grad``.

        Args:
            losses: residuals or losses of the examples, shape (B,); or (B, R), R conditions for each of them.
            scale: multiplies the gradient.
        """
        check_vector("Spring", losses, outputs=True)
        rows, size = self.engine.rows(losses), losses.numel()
        r, slopes = conditions(losses.detach().double().flatten(), self.kappa)
        # a parameter that the rows have for the first time has no last direction
        kept = [self.momentum * self.direction.get(name, torch.zeros_like(p)) for p, name in rows.names.items()]
        gram = rows.gram() * slopes * slopes[:, None] / size
        w = shifted_solve(gram, r - slopes * rows.jvp(kept), self.damping) / size
        new = [k if g is None else g + k for g, k in zip(rows.vjp(w * slopes), kept, strict=True)]
        # kept unbounded and unscaled: the bound and `scale` belong to the step, not to the recursion
        self.direction = dict(zip(rows.names.values(), new, strict=True))
        factor = scale * self._bound(new)
        rows.fill(lambda: [factor * d for d in new])

    def _bound(self, direction: list[Tensor]) -> float:
        if self.constraint is None:
            return 1.0
        norm = torch.stack([d.double().square().sum() for d in direction]).sum().sqrt().item()
        return min(1.0, self.constraint**0.5 / norm) if norm else 1.0

    def state_dict(self) -> dict[str, Any]:
        """The last direction, and the parameters known to need the slow way."""
        return {"direction": dict(self.direction), "left_to_autograd": sorted(self.engine.left_to_autograd)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        devices = {name: p.device for name, p in self.engine.model.named_parameters()}
        self.direction = {name: d.to(devices[name]) for name, d in state["direction"].items()}
        self.engine.left_to_autograd = set(state["left_to_autograd"])

    def __repr__(self) -> str:
        return (
            f"Spring(damping={self.damping}, momentum={self.momentum}, kappa={self.kappa}, "
            f"constraint={self.constraint})"
        )


method = Method(
    id="spring",
    paper=Paper(
        "A Kaczmarz-inspired approach to accelerate the optimization of neural network wavefunctions",
        arxiv="2401.10190",
        year=2024,
    ),
    changes="backward",
    good_for={"equations"},
    make=Spring,
    sgd_lr=0.1,  # what the paper's schedule starts from (unsure)
    preset={"kappa": 1.0},  # a recipe's losses are usually squares
    search_space={"lr": log_uniform(0.001, 1.0), "momentum": uniform(0.5, 0.99), "damping": log_uniform(1e-4, 1e-1)},
    test_values={"constraint": 1e-4},
    formula="phi = J' (J J'/B + lambda I)^-1 (r - mu J phi_old)/B + mu phi_old;  grad = phi",
)

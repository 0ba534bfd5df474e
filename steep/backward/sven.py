"""Sven: a loss of B examples is B conditions, and the step is the smallest one that meets all of them at once.

With `v` the vector that is given (residuals, or losses >= 0), the conditions are ``r = sign(v) |v|^(kappa/2)``
and ``M = dr/dθ`` (B x P). The gradient is the truncated pseudoinverse applied to r, so that SGD makes the paper's step:

    G = M Mᵀ = U S² Uᵀ  (B x B, float64)     keep the `rank` largest S, and of those S > rtol · S_max
    w = U S^-(1+power) Uᵀ r  (B)             .grad += Mᵀ w = V S^-power Uᵀ r   (power = 1: M⁺ r)

Paper: arXiv 2604.01279. `rtol` 1e-3 and `kappa` 2 are the defaults of the authors' code, whose README advises
rank B//2 and a learning rate in 0.05 .. 0.5; there is no default rank in it. Here it is B (`None`), the best on two of
the four tasks of the authors' later tables (B/2 on the others), as rtol cuts what is too small.

Differs from the paper: it cuts S <= 1e-10 besides; here S <= 1e-7 · S_max is cut (float64 squared: below that, G
holds only rounding), so that the units of the loss do not matter. Signs are kept: for residuals e, ``kappa=2`` is
the paper's kappa = 1 for the loss e², without the infinite derivative at e = 0. A zero G gives a zero gradient where
the code raises. Parameter fraction: the paper draws single parameters or whole blocks; here rows (output neurons
with their biases), which the authors' README recommends since. Not here: `variable_k` and the RMSprop variants.

Partial solvers are subspace iterations on G, where the code's work on M. Measured at rank 32, MLPs of width 16 and 128,
one thread: steps are 1.2 to 1.3 times as fast for B = 256, and 1.7 to 2.1 times for B = 512; nothing is gained at rank
B/2. Where singular values fall slowly, "randomized" differs from the full step by about its length; "warm", on a
batch that stays the same, by less than 1 % up to rank 64.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from steep.backward._conditions import check_vector, conditions
from steep.method import Method, Paper, log_uniform
from steep.per_example import PerExample
from steep.utils.validation import Ranges, check_ranges, require, require_whole

RANGES: Ranges = {"rtol": "[0, 1)", "kappa": "(0, inf)", "param_fraction": "(0, 1]", "power": "[-1, 1]"}

ROUNDING = 1e-7
"""Singular values below this share of the largest are rounding errors of a float64 Gram matrix."""

SOLVERS = ("full", "randomized", "warm")
OVERSAMPLE, PASSES = 10, 2
"""Dimensions of the partial solvers beyond `rank`, and their multiplications with G."""


class Sven:
    """Minimum-norm step towards the zeros of all per-example losses at once (singular value descent).

    A backward rule: give it the vector of residuals or losses instead of calling ``loss.mean().backward()``. It
    adds the pseudoinverse step to ``.grad``; plain `torch.optim.SGD` then makes the paper's update.

    Args:
        model: the model that the losses come from; hooks on its layers live as long as this object.
        rank: singular values kept at most, of B / micro_batch; `None` keeps all that `rtol` leaves.
        rtol: singular values at or below this share of the largest are cut, in [0, 1). Default 1e-3 (the code's).
        kappa: conditions are the given numbers to the power kappa/2, > 0. Default 2 (the code's): the numbers
            themselves. 1 turns losses that are squares into residuals.
        micro_batch: consecutive examples averaged into one condition; must divide B. Default 1.
        param_fraction: share of each layer's rows that take part in a step, drawn anew each time, in (0, 1].
        power: singular values are divided out to this power: 1 is Sven, 1/2 half-inverse gradients
            (arXiv 2203.10131), -1 the gradient of ``sum(r²)/2``.
        solver: of the eigenvalue problem: "full"; "randomized", subspace iteration from a random start; or "warm", from
            the subspace of the last step, for batches that stay the same. The partial ones are exact if G has at most
            `rank` + 10 eigenvalues above rounding, and replaced by "full" where that is more than half of the
            conditions. Default "full".
        seed: for the draws of `param_fraction` and of the partial solvers.

    Attributes:
        kept_rank: singular values kept at the last step. 0: the given numbers do not depend on the parameters.

    Raises:
        ValueError: arguments out of range; losses of another shape, or not divisible by `micro_batch`.

    Paper: arXiv 2604.01279.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> backward, optimizer = Sven(model), torch.optim.SGD(model.parameters(), lr=1.0)
        >>> x, y = torch.eye(3), torch.tensor([1.0, 2.0, 3.0])
        >>> backward(model(x).squeeze(-1) - y)  # three conditions, four parameters
        >>> optimizer.step()
        >>> bool((model(x).squeeze(-1) - y).abs().max() < 1e-3)
        True
    """

    requires = frozenset({"losses", "model", "independent_examples"})
    global_batch = True

    def __init__(
        self,
        model: nn.Module,
        rank: int | None = None,
        rtol: float = 1e-3,
        kappa: float = 2.0,
        micro_batch: int = 1,
        param_fraction: float = 1.0,
        power: float = 1.0,
        solver: str = "full",
        seed: int = 0,
    ):
        if rank is not None:
            require_whole("rank", rank, 1)
        _check_solver(solver, rank)
        require_whole("micro_batch", micro_batch, 1)
        check_ranges({"rtol": rtol, "kappa": kappa, "param_fraction": param_fraction, "power": power}, RANGES)
        self.rank, self.rtol, self.kappa, self.micro_batch = rank, rtol, kappa, micro_batch
        self.param_fraction, self.power, self.solver = param_fraction, power, solver
        self.subspace: Tensor | None = None
        self.engine = PerExample(model)
        self.generator = torch.Generator().manual_seed(seed)
        self.kept_rank: int | None = None

    def __call__(self, losses: Tensor, *, scale: float = 1.0) -> None:
        """Add the step to ``.grad``.

        Args:
            losses: residuals or losses of the examples, shape (B,); or (B, R), R conditions for each of them.
            scale: multiplies the gradient.
        """
        _check_divides(self.micro_batch, losses)
        rows = self.engine.rows(losses)
        if self.param_fraction < 1:
            rows = rows.restrict(self.param_fraction, self.generator)
        means = self._grouped(losses.detach().double()) / self.micro_batch
        residuals, slopes = conditions(means, self.kappa)
        weights = self._spread(slopes) / self.micro_batch
        gram = rows.gram() * weights * weights[:, None]
        for _ in range(2):  # grouping sums over the first dimension: the rows, then, transposed, the columns
            gram = self._grouped(gram.reshape(*losses.shape, -1)).flatten(0, -2).T
        w = self._spread(self.solve(gram, residuals.flatten()).view_as(residuals)) * weights
        rows.backward(w * scale)

    def _spread(self, t: Tensor) -> Tensor:
        """What belongs to groups, for each of the engine's rows."""
        return t.repeat_interleave(self.micro_batch, 0).flatten()

    def _grouped(self, t: Tensor) -> Tensor:
        """Sums over groups of `micro_batch` consecutive entries of the first dimension."""
        return t if self.micro_batch == 1 else t.unflatten(0, (-1, self.micro_batch)).sum(1)

    def solve(self, gram: Tensor, residuals: Tensor) -> Tensor:
        """Weights ``w = U S^-(1+power) Uᵀ r`` over what is kept; NaN where the Gram matrix is not finite."""
        if not gram.isfinite().all():  # NaN, as from an ordinary backward; some eigen-solvers would raise
            self.kept_rank = 0
            return residuals * torch.nan
        squares, u = self._eigen(gram)
        s = squares.clamp(min=0).sqrt()
        keep = s > max(self.rtol, ROUNDING) * s[-1]
        if self.rank is not None:
            keep[: -self.rank] = False
        self.kept_rank = int(keep.sum())
        return u @ torch.where(keep, s ** -(1 + self.power) * (u.T @ residuals), 0.0)

    def _eigen(self, gram: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues, ascending, and eigenvectors in columns: all of them, or the largest `rank` + 10."""
        size = len(gram) if self.rank is None else self.rank + OVERSAMPLE
        if self.solver == "full" or 2 * size > len(gram):  # beyond half of them, the full solver is as fast
            return torch.linalg.eigh(gram)
        u = self._start(gram, size)
        for _ in range(PASSES):
            u = torch.linalg.qr(gram @ u)[0]
        # Rayleigh-Ritz: the eigenvectors of G within the subspace
        squares, turn = torch.linalg.eigh(u.T @ (gram @ u))
        u = u @ turn
        self.subspace = u if self.solver == "warm" else None
        return squares, u

    def _start(self, gram: Tensor, size: int) -> Tensor:
        # a last batch of another size has a subspace of another shape
        if self.subspace is not None and self.subspace.shape == (len(gram), size):
            return self.subspace.to(gram)
        return torch.randn(len(gram), size, dtype=gram.dtype, generator=self.generator).to(gram.device)

    def state_dict(self) -> dict[str, Any]:
        """The generator, the subspace of the last step, and the parameters known to need the slow way."""
        return {
            "generator": self.generator.get_state(),
            "subspace": self.subspace,
            "left_to_autograd": sorted(self.engine.left_to_autograd),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.subspace = state.get("subspace")  # states of earlier versions have none
        self.engine.left_to_autograd = set(state["left_to_autograd"])

    def __repr__(self) -> str:
        return (
            f"Sven(rank={self.rank}, rtol={self.rtol}, kappa={self.kappa}, micro_batch={self.micro_batch}, "
            f"param_fraction={self.param_fraction}, power={self.power}, solver={self.solver!r})"
        )


def _check_solver(solver: str, rank: int | None) -> None:
    require("solver", solver, solver in SOLVERS, f"one of {', '.join(SOLVERS)}")
    if solver != "full" and rank is None:
        warnings.warn(
            f"solver={solver!r} finds the largest singular values only, but rank=None keeps them all, so that the full "
            "solver is used: set rank",
            stacklevel=3,
        )


def _check_divides(micro_batch: int, losses: Tensor) -> None:
    check_vector("Sven", losses, outputs=True)
    if len(losses) % micro_batch:
        raise ValueError(f"micro_batch={micro_batch} must divide the number of examples, {len(losses)}")


method = Method(
    id="sven",
    paper=Paper(
        "Sven: Singular Value Descent as a Computationally Efficient Natural Gradient Method",
        arxiv="2604.01279",
        year=2026,
    ),
    changes="backward",
    good_for={"equations", "faster"},
    make=Sven,
    sgd_lr=0.1,  # the authors' README advises 0.05 .. 0.5
    search_space={"lr": log_uniform(0.01, 1.0), "rtol": log_uniform(1e-4, 1e-1)},
    test_values={"rank": 2, "rtol": 0.3, "solver": "randomized"},
    performance_flags={"seed", "solver"},  # without param_fraction below 1, or a rank, nothing is drawn
    formula="G = M M' = U S^2 U';  grad = M' U_k S_k^-2 U_k' r,  r = sign(v)|v|^(kappa/2), M = dr/dtheta",
)

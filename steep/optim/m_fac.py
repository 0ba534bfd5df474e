"""M-FAC preconditions the gradient with the inverse of the damped empirical Fisher matrix of the last m gradients,
which is never formed. Dynamic: the optimizer `MFAC`, a sliding window. Static: `EmpiricalFisherInverse`, products with
the inverse for a fixed set of gradients, and its diagonal.

    F = λ I + GᵀG / m            G: m x d, its rows the gradients, zeros at the start; λ: damping

Dynamic, at step t = 1, 2, ... with g = gradient + weight_decay p, the whole model's as one vector:

    row j = (t - 1) mod m of G becomes g;  row and column j of K = G Gᵀ become G g      O(d m)
    z = (m λ I + K)^-1 e_j                                                              O(m^3), float64
    u = F^-1 g = m Gᵀ z                                                                 O(d m)
    v = momentum v + (1 - momentum) u;  p = p - lr v

Static, the Woodbury recursion over i = 1 ... m (O(d m^2) once, then O(d m) per product, O(m) per entry):

    v_i = g_i / λ - sum_{j<i} w_j (w_j·g_i);  w_i = v_i / sqrt(m + g_i·v_i)
    F^-1 x = x / λ - sum_i w_i (w_i·x);  diag F^-1 = 1 / λ - sum_i w_i^2

With a block size both sums run within blocks of the parameters alone: F is then taken as block-diagonal.

Frantar, Kurtic, Alistarh: M-FAC: Efficient Matrix-Free Approximations of Second-Order Information (arXiv 2107.03356).
lr = 1e-3 and damping = 1e-5 are the defaults of the authors' code, as are no momentum and no weight decay (their
example has 3e-3).

What differs, and why:
- The paper gets F^-1 x, for any x, from an LU factorization of K / λ + m I and a triangular matrix of coefficients.
  Here x is the newest gradient, and the product shrinks to the one above: the same, without a difference of two
  vectors of size |g| / λ. A test holds the two against each other.
- K is summed in float64: rounding of float32 sums, over m λ, would drown the answer for small λ.
- ngrads = 128. The authors' 1024 (512 in their example) needs 4 KiB of memory per parameter.
- A parameter without gradient stays where it is, and counts as zeros in that row of G.
- The authors' mode for sparse models and their pruner, which is built on the static algorithm, are left out.
- Unsure: the paper's settings beyond those in the authors' code.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from steep.method import Method, Paper, log_uniform
from steep.optim._base import BaseOptimizer
from steep.optim._foreach import check_kind, working_dtype
from steep.utils.validation import Ranges, check_ranges, require

_PIECE = 2**17  # numbers of G taken to float64 at a time: as many as stay in the cache until they are used
_LARGE = 2**33  # bytes of G above which a warning is due


def _dots(rows: Tensor, g: Tensor) -> Tensor:
    """rows g in float64: (m, n) by (n,) is (m,)."""
    columns = max(1, (_PIECE if rows.is_cpu else 2**24) // len(rows))
    pieces = zip(rows.split(columns, 1), g.split(columns), strict=True)
    return torch.stack([a.double() @ b.double() for a, b in pieces]).sum(0)


def _coefficients(gram: Tensor, newest: int, damping: float) -> Tensor:
    """z (m,), with which F^-1 g = m Gᵀ z for g the newest row of G; NaN if K (m, m) is not finite."""
    m = len(gram)
    factor, failed = torch.linalg.cholesky_ex(gram + m * damping * torch.eye(m, dtype=gram.dtype, device=gram.device))
    unit = gram.new_zeros(m, 1)
    unit[newest] = 1
    return torch.where(failed == 0, torch.cholesky_solve(unit, factor).squeeze(1), torch.nan)


def _descent(group: dict[str, Any], p: Tensor, grad: Tensor) -> Tensor:
    """The gradient to be preconditioned, flat and at least float32."""
    g = grad.to(working_dtype(p.dtype))
    g = -g if group["maximize"] else g
    return (g + group["weight_decay"] * p if group["weight_decay"] else g).reshape(-1)


def _announce(size: int) -> None:
    if size > _LARGE:  # said at the start: the window fills up step by step, so memory would run out much later
        warnings.warn(f"MFAC keeps {size / 2**30:.0f} GiB of gradients: lower ngrads if that is too much", stacklevel=8)


class MFAC(BaseOptimizer):
    """Natural gradient of the last `ngrads` gradients: each step is multiplied by the inverse of their damped empirical
    Fisher matrix over all parameters, exactly, without forming it.

    The first steps are long, about ``lr ngrads / |g|``, where the gradient is large against the damping, since missing
    gradients count as zeros; begin with a small lr. lr and damping belong together: while gradients are small a step is
    lr / damping times the gradient. The defaults are for long training runs; small networks learn faster with both at
    1e-2 to 1e-1. The memory is `ngrads` gradients, in float32 for half-precision parameters.

    A non-finite gradient is not absorbed: it makes all parameters non-finite, unless the step is skipped (as
    `torch.amp.GradScaler` does).

    Args:
        params: parameters or groups of them, of any shape; real, with dense gradients.
        lr: learning rate, at least 0; a number or 0-d tensor. 1e-3 is the authors'.
        ngrads: gradients in the window (the paper's m), an integer of at least 1, one for all groups. 1024 is the
            authors'.
        damping: the paper's λ, above 0, one for all groups. 1e-5 is the authors'.
        momentum: decay rate of the mean of the preconditioned gradients, in [0, 1).
        weight_decay: at least 0; added to the gradient before it is stored.
        maximize: go uphill.

    Raises:
        ValueError: a hyper-parameter out of its range, here or in a group, or groups with unlike `ngrads` or `damping`.
        RuntimeError: at a step, for sparse gradients, complex or sharded parameters.

    Paper: arXiv 2107.03356.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = MFAC(model.parameters(), lr=1e-2, ngrads=16, damping=1e-2)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(8, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> optimizer.state[model.bias]["grads"].shape
        torch.Size([16, 1])
    """

    _ranges: ClassVar[Ranges] = {
        "lr": "[0, inf)",
        "ngrads": "[1, inf)",
        "damping": "(0, inf)",
        "momentum": "[0, 1)",
        "weight_decay": "[0, inf)",
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        ngrads: int = 128,
        damping: float = 1e-5,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ):
        numbers = {"lr": lr, "ngrads": ngrads, "damping": damping, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**numbers, "maximize": maximize})

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        require("ngrads", group["ngrads"], isinstance(group["ngrads"], int), "an integer")
        for name in ("ngrads", "damping"):  # one Fisher matrix couples all groups
            for first in self.param_groups[:1]:
                require(name, group[name], group[name] == first[name], f"{first[name]!r}, as in the other groups")

    def load_state_dict(self, state_dict: StateDict) -> None:
        super().load_state_dict(state_dict)
        saved = state_dict["state"].get(state_dict["param_groups"][0]["params"][0], {})
        if "gram" in saved:  # torch casts state to the parameter's dtype, in which K would be too coarse
            shared, device = self._shared(), self.param_groups[0]["params"][0].device
            shared["gram"] = saved["gram"].to(device, torch.float64, copy=True)

    def _shared(self) -> dict[str, Tensor]:
        """The steps taken, and K: kept with the first parameter, because `state_dict` has state of parameters only."""
        first, m = self.param_groups[0]["params"][0], self.param_groups[0]["ngrads"]
        shared: dict[str, Tensor] = self.state[first]
        if "gram" not in shared:
            _announce(
                m * sum(p.numel() * working_dtype(p.dtype).itemsize for g in self.param_groups for p in g["params"])
            )
            shared["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            shared["gram"] = torch.zeros(m, m, dtype=torch.float64, device=first.device)
        return shared

    def _step(self) -> None:
        all_of_them = [(group, p) for group in self.param_groups for p in group["params"]]
        moving = [(group, p, p.grad) for group, p in all_of_them if p.grad is not None]
        for _, p, grad in moving:
            check_kind(self, type(p), grad.layout, p.dtype)
        if moving:
            z = self._take([(p, _descent(group, p, grad)) for group, p, grad in moving])
            for group, p, _ in moving:
                self._move(group, p, z)

    def _take(self, grads: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Put gradients in the place of the oldest, and solve for the newest."""
        shared = self._shared()
        group, gram = self.param_groups[0], shared["gram"]
        newest = int(shared["step"]) % group["ngrads"]
        for state in self.state.values():  # a parameter without gradient counts as zeros, not as m steps ago
            if "grads" in state:
                state["grads"][newest] = 0
        products = torch.zeros_like(gram[0])
        for p, g in grads:
            rows = self._rows(p, g)
            rows[newest] = g
            products += _dots(rows, g).to(gram.device)
        gram[newest] = gram[:, newest] = products
        shared["step"] += 1
        return _coefficients(gram, newest, float(group["damping"]))

    def _rows(self, p: Tensor, g: Tensor) -> Tensor:
        """A parameter's columns of G, (m, n)."""
        state = self.state[p]
        if "grads" not in state:
            state["grads"] = g.new_zeros(self.param_groups[0]["ngrads"], g.numel())
        rows: Tensor = state["grads"]
        return rows

    def _move(self, group: dict[str, Any], p: Tensor, z: Tensor) -> None:
        state = self.state[p]
        rows = state["grads"]
        u = len(rows) * z.to(rows.device, rows.dtype) @ rows
        if group["momentum"]:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(u)
            u = state["momentum_buffer"].lerp_(u, 1 - group["momentum"])
        p.sub_(u.view(p.shape), alpha=float(group["lr"]))


class EmpiricalFisherInverse:
    """Products with the inverse of F = damping I + GᵀG / m, and its diagonal, for given gradients; in float64, of
    which it keeps m d numbers.

    Args:
        grads: G, (m, d), a gradient per row.
        damping: the paper's λ, above 0.
        block_size: parameters in a block, at least 1 (the last block may be smaller); `None` for all in one. Entries of
            F outside the blocks on its diagonal count as zero.

    Raises:
        ValueError: arguments out of range or not finite, or gradients that are no matrix.

    Paper: arXiv 2107.03356.

    Example:
        >>> inverse = EmpiricalFisherInverse(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), damping=1.0)
        >>> inverse.mul(torch.tensor([1.0, 1.0]))
        tensor([0.5000, 1.0000], dtype=torch.float64)
        >>> inverse.diag()
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """

    def __init__(self, grads: Tensor, damping: float = 1e-5, block_size: int | None = None):
        if grads.ndim != 2 or 0 in grads.shape:
            raise ValueError(f"grads must be a matrix (gradients, parameters), got shape {tuple(grads.shape)}")
        if not grads.isfinite().all():
            raise ValueError("grads must be finite: leave out gradients of steps that overflowed")
        self.size = grads.shape[1]
        self.block_size = self.size if block_size is None else block_size
        own = {"damping": damping, "block_size": self.block_size}
        check_ranges(own, {"damping": "(0, inf)", "block_size": "[1, inf)"})
        require("block_size", self.block_size, isinstance(self.block_size, int), "an integer")
        self.damping = float(damping)
        self.w = self._recursion(self._blocked(grads.detach()))

    def _blocked(self, x: Tensor) -> Tensor:
        """(k, d) as (k, blocks, block size), zeros at the end of the last."""
        missing = -self.size % self.block_size
        return torch.nn.functional.pad(x.double(), (0, missing)).unflatten(1, (-1, self.block_size))

    def _recursion(self, grads: Tensor) -> Tensor:
        w = torch.empty_like(grads)
        for i, g in enumerate(grads):
            v = g / self.damping - _project(w[:i], g)
            w[i] = v / (len(grads) + (g * v).sum(-1, keepdim=True)).sqrt()
        return w

    def mul(self, x: Tensor) -> Tensor:
        """F^-1 x for x of shape (d,)."""
        if x.shape != (self.size,):
            raise ValueError(f"x must have shape ({self.size},), got {tuple(x.shape)}")
        blocks = self._blocked(x.unsqueeze(0)).squeeze(0)
        return (blocks / self.damping - _project(self.w, blocks)).flatten()[: self.size]

    def diag(self) -> Tensor:
        """The diagonal of F^-1, (d,)."""
        return (1 / self.damping - torch.einsum("ibk,ibk->bk", self.w, self.w)).flatten()[: self.size]


def _project(w: Tensor, x: Tensor) -> Tensor:
    """sum_i w_i (w_i·x) within each block: w (i, blocks, size), x (blocks, size)."""
    return torch.einsum("ibk,ib->bk", w, torch.einsum("ibk,bk->ib", w, x))


method = Method(
    id="m-fac",
    paper=Paper(
        "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information", arxiv="2107.03356", year=2021
    ),
    changes="optim",
    good_for={"faster"},
    make=MFAC,
    search_space={"lr": log_uniform(1e-4, 1.0), "damping": log_uniform(1e-6, 1.0)},
    formula="F = damping I + G'G / m;  p -= lr F^-1 g = lr m G' (m damping I + G G')^-1 e_newest",
)

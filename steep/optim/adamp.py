"""AdamP and SGDP are Adam and momentum SGD that take no step along a weight whose length does not matter, as before a
normalization layer. Momentum would make such weights longer at every step, and their effective steps shorter.

For a parameter w of at least two dimensions, seen as rows (one per output channel) of n columns, with g its gradient:

    AdamP: u = m_hat / (sqrt(v_hat) + eps), Adam's m and v        (nesterov: beta1 m + (1 - beta1) g instead of m)
    SGDP:  u = b,  b = momentum b + (1 - dampening) g             (nesterov: g + momentum b)

    near(rows)  = max over rows of |<g, w>| / (|g| |w|) < delta / sqrt(n)
    near(layer) = the same with the whole of w as its only row
    u = u - <u, w> / (|w| + eps)^2 w     per row if near(rows), else of the layer if near(layer), else not at all
    w = w - lr u - lr weight_decay w * (wd_ratio if projected else 1)       (SGDP: weight_decay / (1 - momentum))

Heo, Chun, Oh, Han, Yun, Kim, Uh, Ha: AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant
Weights (arXiv 2006.08217). delta = 0.1 and wd_ratio = 0.1 are the paper's. lr, betas and weight_decay of AdamP (1e-3,
(0.9, 0.999), 1e-2) and SGDP (0.1, momentum 0.9 with nesterov, 1e-5) are those of the authors' example.

What differs: without Nesterov momentum the authors' SGDP code projects the momentum buffer itself, as it changes the
buffer in place; here, as in the formula above and in its own Nesterov branch, only the step is projected.

Whether w is scale-invariant is told from the raw gradient, which is then orthogonal to it. A wide layer without
normalization can look so by chance; parameters of fewer than two dimensions are never projected. In code the step is
w = f w - lr u with one factor f per row, which holds the decay and the part of u along w.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.optim.optimizer import ParamsT

from steep.method import Method, Paper, log_uniform
from steep.optim._base import NOT_NEGATIVE, BaseOptimizer
from steep.optim._foreach import Number, RowRule, descend_, ema_, sweep, sweep_rows
from steep.utils.validation import Ranges

_RANGES: Ranges = {**NOT_NEGATIVE, "delta": "[0, inf)", "wd_ratio": "[0, 1]"}


def _plain(direction: Callable[..., None], w: Tensor, g: Tensor, *state: Tensor, **scalars: Any) -> None:
    """The step of parameters that are never projected."""
    u = torch.empty_like(w)
    direction(u, -g if scalars["maximize"] else g, *state, **scalars)
    descend_(w.mul_(1 - scalars["decay"]), scalars["step_size"], u)


def _measure(direction: Callable[..., None], w: Tensor, g: Tensor, *rest: Tensor, **scalars: Any) -> Tensor:
    """Fill u, last of `rest`; return <g, w>, <u, w>, |g| and |w| of each row, (k, rows, 4)."""
    *state, u = rest
    direction(u, -g if scalars["maximize"] else g, *state, **scalars)
    return torch.stack([(g * w).sum(-1), (u * w).sum(-1), vector_norm(g, dim=-1), vector_norm(w, dim=-1)], -1)


def _decide(
    rows: Tensor,
    w: Tensor,
    projected: Tensor,
    *,
    decay: Number,
    step_size: Number,
    delta: Number,
    wd_ratio: Number,
    eps: Number,
    **_: Any,
) -> Tensor:
    """The factor f of each row of w, (k, rows, 1), with which w = f w - step_size u is decay, projection and step."""
    layer = torch.cat([rows[..., :2].sum(1, keepdim=True), vector_norm(rows[..., 2:], dim=1, keepdim=True)], -1)
    gw, uw, g_norm, w_norm = torch.cat([rows, layer], 1).unbind(-1)  # the layer is one more row
    cosine = gw.abs() / (g_norm.clamp(min=eps) * w_norm.clamp(min=eps))
    near_rows = cosine[:, :-1].amax(1, keepdim=True) < delta / w.shape[2] ** 0.5
    near_layer = cosine[:, -1:] < delta / (w.shape[1] * w.shape[2]) ** 0.5
    near = (near_rows | near_layer).to(w.dtype)
    projected.copy_(near.squeeze(1))
    if not torch.compiler.is_compiling() and w.is_cpu and not near.any():  # nothing to project, known for free
        return torch.ones_like(rows[..., :1]) * (1 - decay)
    along = uw / (w_norm + eps).square()
    along = torch.where(near_rows, along[:, :-1], torch.where(near_layer, along[:, -1:], 0.0))
    return (1 - decay * (1 - near * (1 - wd_ratio)) + step_size * along).unsqueeze(-1)


def _apply(w: Tensor, u: Tensor, factor: Tensor, *, step_size: Number, **_: Any) -> None:
    descend_(w.mul_(factor), step_size, u)


@cache  # compiled kernels are kept per function, so a direction must always have the same ones
def _rules(direction: Callable[..., None]) -> tuple[RowRule, Callable[..., None]]:
    """How to step parameters that may be projected, and those that never are."""
    return RowRule(partial(_measure, direction), _decide, _apply), partial(_plain, direction)


class _ProjectedOptimizer(BaseOptimizer):
    """What AdamP and SGDP share: all but the direction u, its state and its scalars."""

    _state_names: ClassVar[tuple[str, ...]]

    @staticmethod
    def _scalars(group: Mapping[str, Any], t: int) -> dict[str, Any]:
        raise NotImplementedError

    @staticmethod
    def _direction(u: Tensor, g: Tensor, *state: Any, **scalars: Any) -> None:
        """Take g into the state and fill u."""
        raise NotImplementedError

    def _step(self) -> None:
        rule, plain = _rules(self._direction)
        for group in self.param_groups:
            scalars = partial(self._scalars, group)
            wide = [p for p in group["params"] if p.ndim > 1]
            sweep_rows(self, group, rule, self._state_names, scalars, wide, ("projected",))
            sweep(self, group, plain, self._state_names, scalars, [p for p in group["params"] if p.ndim <= 1])

    def projected_fraction(self) -> float:
        """How many of the parameters of at least two dimensions their last step projected, in [0, 1]."""
        flags = [s["projected"] for s in self.state.values() if "projected" in s]
        return torch.stack(flags).mean().item() if flags else 0.0


class AdamP(_ProjectedOptimizer):
    """AdamW that takes no step along weights whose length does not matter (those before a normalization layer), which
    keeps momentum from making them longer and their effective steps shorter.

    Use it with a decaying learning rate. A non-finite gradient is not absorbed: as in `torch.optim` it makes the
    parameter non-finite, unless the step is skipped (as `torch.amp.GradScaler` does). The state of half-precision
    parameters is float32, also after `load_state_dict`.

    Args:
        params: parameters or groups of them; real, with dense gradients. Those of at least two dimensions may be
            projected; their first dimension counts output channels.
        lr: learning rate, at least 0; a number or 0-d tensor. 1e-3 is the authors'.
        betas: decay rates of the moments per step, in [0, 1). (0.9, 0.999) is the authors'.
        eps: added to the root of the second moment and to norms, at least 0. 1e-8 is the authors'.
        weight_decay: decoupled, at least 0, in units of 1/lr. 1e-2 is the authors' example.
        delta: threshold of the cosine between gradient and weight, times the root of the row's length, at least 0;
            0 is AdamW. 0.1 is the paper's.
        wd_ratio: weight decay of projected parameters over that of others, in [0, 1]. 0.1 is the paper's.
        nesterov: use Nesterov momentum.
        maximize: go uphill.
        foreach: share calls among tensors; None is True. False is tensor by tensor, slower and the same.
        compile: run the update as compiled kernels; takes some seconds at the first step.

    Raises:
        ValueError: a hyper-parameter out of its range, here or in a group.
        RuntimeError: at a step, for sparse gradients, complex parameters, or `compile` without a compiler.

    Paper: arXiv 2006.08217.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8))
        >>> optimizer = AdamP(model.parameters(), lr=1e-3)
        >>> model(torch.randn(16, 4)).pow(3).mean().backward()
        >>> optimizer.step()
        >>> optimizer.projected_fraction()
        1.0
    """

    _ranges: ClassVar[Ranges] = {**_RANGES, "betas": ("[0, 1)", "[0, 1)")}
    _state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
    ):
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "delta": delta}
        options = {"nesterov": nesterov, "maximize": maximize, "foreach": foreach, "compile": compile}
        super().__init__(params, {**numbers, "wd_ratio": wd_ratio, **options})

    @staticmethod
    def _scalars(group: Mapping[str, Any], t: int) -> dict[str, Any]:
        beta1, beta2 = map(float, group["betas"])
        root = math.sqrt(1 - beta2**t)  # multiplies numerator and denominator of u, so that v needs no correction
        lr, same = float(group["lr"]), ("eps", "delta", "wd_ratio", "nesterov", "maximize")
        own = {"beta1": beta1, "beta2": beta2, "damping": group["eps"] * root, "step_size": lr * root / (1 - beta1**t)}
        return {**own, "decay": lr * group["weight_decay"], **{name: group[name] for name in same}}

    @staticmethod
    def _direction(
        u: Tensor,
        g: Tensor,
        m: Tensor,
        v: Tensor,
        *,
        beta1: Number,
        beta2: Number,
        damping: Number,
        nesterov: bool,
        **_: Any,
    ) -> None:
        """Take g into Adam's moments and fill u, up to its factor in t."""
        ema_(m, g, beta1)
        ema_(v, g.square(), beta2)
        torch.div(beta1 * m + (1 - beta1) * g if nesterov else m, v.sqrt().add_(damping), out=u)


class SGDP(_ProjectedOptimizer):
    """Momentum SGD that takes no step along weights whose length does not matter (those before a normalization
    layer), which keeps momentum from making them longer and their effective steps shorter.

    Use it with a decaying learning rate. Non-finite gradients and half precision are treated as by `AdamP`.

    Args:
        params: parameters or groups of them, as for `AdamP`.
        lr: learning rate, at least 0; a number or 0-d tensor. 0.1 is the authors'.
        momentum: decay rate of the momentum per step, in [0, 1). 0.9 is the authors' example.
        dampening: of the gradient's entry into the momentum, in [0, 1). Unlike torch's SGD from the first step on.
        weight_decay: decoupled, at least 0, in units of (1 - momentum) / lr. 1e-5 is the authors' example.
        nesterov: use Nesterov momentum, as the authors' example does.
        delta: threshold of the cosine between gradient and weight, times the root of the row's length, at least 0;
            0 is SGD. 0.1 is the paper's.
        wd_ratio: weight decay of projected parameters over that of others, in [0, 1]. 0.1 is the paper's.
        eps: added to norms, at least 0. 1e-8 is the authors'.
        maximize: go uphill.
        foreach: share calls among tensors; None is True. False is tensor by tensor, slower and the same.
        compile: run the update as compiled kernels; takes some seconds at the first step.

    Raises:
        ValueError: a hyper-parameter out of its range, here or in a group.
        RuntimeError: at a step, for sparse gradients, complex parameters, or `compile` without a compiler.

    Paper: arXiv 2006.08217.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8))
        >>> optimizer = SGDP(model.parameters(), lr=0.1)
        >>> model(torch.randn(16, 4)).pow(3).mean().backward()
        >>> optimizer.step()
        >>> optimizer.projected_fraction()
        1.0
    """

    _ranges: ClassVar[Ranges] = {**_RANGES, "momentum": "[0, 1)", "dampening": "[0, 1)"}
    _state_names = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 1e-5,
        nesterov: bool = True,
        *,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        eps: float = 1e-8,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
    ):
        numbers = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        projection = {"delta": delta, "wd_ratio": wd_ratio, "eps": eps}
        options = {"nesterov": nesterov, "maximize": maximize, "foreach": foreach, "compile": compile}
        super().__init__(params, {**numbers, **projection, **options})

    @staticmethod
    def _scalars(group: Mapping[str, Any], t: int) -> dict[str, Any]:
        lr, same = float(group["lr"]), ("momentum", "dampening", "eps", "delta", "wd_ratio", "nesterov", "maximize")
        decay = lr * group["weight_decay"] / (1 - group["momentum"])
        return {"step_size": lr, "decay": decay, **{name: group[name] for name in same}}

    @staticmethod
    def _direction(
        u: Tensor, g: Tensor, b: Tensor, *, momentum: Number, dampening: Number, nesterov: bool, **_: Any
    ) -> None:
        """Take g into the momentum and fill u."""
        b.mul_(momentum).add_(g * (1 - dampening))
        u.copy_(g + momentum * b if nesterov else b)


_paper = Paper(
    "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights", arxiv="2006.08217", year=2020
)

method = Method(
    id="adamp",
    paper=_paper,
    changes="optim",
    good_for={"better"},
    make=AdamP,
    search_space={"lr": log_uniform(1e-4, 1e-1), "weight_decay": log_uniform(1e-6, 1e-1)},
    performance_flags={"foreach", "compile"},
    formula="u = m_hat / (sqrt(v_hat) + eps);  u -= w <u, w> / |w|^2 where |cos(g, w)| < delta / sqrt(n);  w -= lr u",
)

sgdp_method = Method(
    id="sgdp",
    paper=_paper,
    changes="optim",
    good_for={"better"},
    make=SGDP,
    search_space={"lr": log_uniform(1e-3, 1.0), "weight_decay": log_uniform(1e-7, 1e-2)},
    performance_flags={"foreach", "compile"},
    test_values={"delta": 10.0},
    formula="u = momentum of g;  u -= w <u, w> / |w|^2 where |cos(g, w)| < delta / sqrt(n);  w -= lr u",
)

"""AdaBelief is Adam with another second moment: the squared deviation of the gradient from its running mean, instead
of the squared gradient. A gradient near its prediction makes the step long, a surprise makes it short.

For every element, with g the gradient at step t = 1, 2, ...:

    m = beta1 m + (1 - beta1) g
    s = beta2 s + (1 - beta2) (g - m)^2 + eps               (the m just updated; eps accumulates in the state)
    p = p - lr * m / (1 - beta1^t) / (sqrt(s / (1 - beta2^t)) + eps)

Zhuang et al.: AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients (arXiv 2010.07468). lr and
betas are the paper's. The other defaults are from the authors' package and table of recipes: eps = 1e-16 for
one-layer LSTMs, Transformers and in the package since 0.1 (1e-12 for GANs and deeper LSTMs, 1e-8 for convolutional
networks: about the square of Adam's); weight_decay = 1e-2, decoupled, for ImageNet (0 in the package). The paper's
results are without amsgrad and rectification; the table of recipes rectifies for Transformers. The package changed
its defaults from version 0.0.5 (eps 1e-8, coupled decay, no rectification) to 0.1 (1e-16, decoupled, rectified).

What differs, and why:
- Unsure: which of these settings the paper's appendix states itself.
- amsgrad together with rectify uses the maximum of s, which the authors' package ignores in that case.
- beta1 = 0 is refused: m would equal g and s would hold nothing but eps.
- The package's options fixed_decay and degenerated_to_sgd=False are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from steep.method import Method, Paper, log_uniform
from steep.optim._base import NOT_NEGATIVE, Elementwise
from steep.optim._foreach import Number, descend_, ema_
from steep.utils.validation import Ranges


class AdaBelief(Elementwise):
    """Adam whose second moment is the squared deviation of the gradient from its running mean: it takes long steps
    where gradients agree with their prediction and short ones where they surprise.

    A non-finite gradient is not absorbed: as in `torch.optim` it makes the parameter non-finite, unless the step is
    skipped (as `torch.amp.GradScaler` does). Clip gradients by norm, not by value, which makes g equal m and the step
    very long. The state of half-precision parameters is float32, also after `load_state_dict`.

    Args:
        params: parameters or groups of them, of any shape; real, with dense gradients.
        lr: learning rate, at least 0; a number or 0-d tensor. 1e-3 is the paper's.
        betas: decay rates of m and s per step, in (0, 1) and [0, 1). (0.9, 0.999) is the paper's.
        eps: added to s at every step and to its root, at least 0. 1e-16 is the authors' for recurrent networks and
            Transformers; use 1e-8 for convolutional networks. With 0 an element whose gradient is always 0 becomes NaN.
        weight_decay: at least 0, in units of 1/lr when decoupled. 1e-2 is the paper's on ImageNet.
        decoupled: shrink the parameters as AdamW does; otherwise add the L2 penalty to the gradient, as Adam does.
        rectify: correct for the variance of s in the first steps as RAdam does (plain momentum until it is finite).
        amsgrad: divide by the largest s so far.
        maximize: go uphill.
        foreach: share calls among tensors; None is True. False is tensor by tensor, slower and the same.
        compile: run the update as one compiled kernel; takes some seconds at the first step.

    Raises:
        ValueError: a hyper-parameter out of its range, here or in a group.
        RuntimeError: at a step, for sparse gradients, complex parameters, or `compile` without a compiler.

    Paper: arXiv 2010.07468.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = AdaBelief(model.parameters(), lr=1e-3, eps=1e-8)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(8, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_var', 'step']
    """

    _ranges: ClassVar[Ranges] = {**NOT_NEGATIVE, "betas": ("(0, 1)", "[0, 1)")}
    _state_names = ("exp_avg", "exp_avg_var", "max_exp_avg_var")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 1e-2,
        *,
        decoupled: bool = True,
        rectify: bool = False,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
    ):
        options = {"decoupled": decoupled, "rectify": rectify, "amsgrad": amsgrad, "maximize": maximize}
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**numbers, **options, "foreach": foreach, "compile": compile})

    def _names_in(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return self._state_names if group["amsgrad"] else self._state_names[:2]

    @staticmethod
    def _scalars(group: Mapping[str, Any], t: int) -> dict[str, Any]:
        beta1, beta2 = map(float, group["betas"])
        root = math.sqrt(1 - beta2**t)  # multiplies numerator and denominator, so that s needs no correction of its own
        r = _rectification(t, beta2) if group["rectify"] else 1.0
        return {
            "lr": float(group["lr"]),
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "weight_decay": group["weight_decay"] or None,
            "step_size": float(group["lr"]) / (1 - beta1**t) * (r * root if r else 1.0),
            "damping": group["eps"] * (1.0 if group["rectify"] else root),  # the authors' code does not correct r's
            "adaptive": r is not None,
            "decoupled": group["decoupled"],
            "maximize": group["maximize"],
        }

    @staticmethod
    def _update(
        p: Tensor,
        g: Tensor,
        m: Tensor,
        s: Tensor,
        s_max: Tensor | None = None,
        *,
        lr: Number,
        beta1: Number,
        beta2: Number,
        eps: Number,
        weight_decay: Number | None,
        step_size: Number,
        damping: Number,
        adaptive: bool,
        decoupled: bool,
        maximize: bool,
    ) -> None:
        """One step on tensors of one shape, in place; `step_size` is lr and `damping` eps, corrected for t."""
        if maximize:
            g = -g
        if weight_decay is not None and decoupled:
            p.mul_(1 - lr * weight_decay)
        elif weight_decay is not None:
            g = g + weight_decay * p
        ema_(m, g, beta1)
        ema_(s, (g - m).square_(), beta2).add_(eps)
        if s_max is not None:
            s = s_max.copy_(torch.maximum(s_max, s))
        descend_(p, step_size, m, s.sqrt().add_(damping) if adaptive else None)


def _rectification(t: int, beta2: float) -> float | None:
    """RAdam's factor of the step at step t, or None while the variance of the second moment is intractable."""
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    if rho < 5:
        return None
    return math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))


method = Method(
    id="adabelief",
    paper=Paper(
        "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients", arxiv="2010.07468", year=2020
    ),
    changes="optim",
    good_for={"better", "faster"},
    make=AdaBelief,
    search_space={"lr": log_uniform(1e-4, 1e-1), "weight_decay": log_uniform(1e-6, 1e-1)},
    performance_flags={"foreach", "compile"},
    formula="m = b1 m + (1 - b1) g;  s = b2 s + (1 - b2) (g - m)^2 + eps;  p -= lr m_hat / (sqrt(s_hat) + eps)",
)

"""diffGrad is Adam whose step is multiplied, element by element, by a friction between 1/2 and 1: near 1/2 where the
gradient hardly changed since the last step (flat ground, a minimum nearby), near 1 where it changed much.

For every element, with g the gradient at step t = 1, 2, ... and g' the one before (0 at first):

    m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
    xi = 1 / (1 + exp(-|g' - g|))                                                        in [1/2, 1)
    p = p - lr sqrt(1 - beta2^t) / (1 - beta1^t) * xi * m / (sqrt(v) + eps)

Dubey et al.: diffGrad: An Optimization Method for Convolutional Neural Networks (arXiv 1909.11015); all
defaults are the authors'. Weight decay is coupled (an L2 penalty), as in the authors' code, and counts in g and g'.

What differs, and why:
- g' is a copy. The authors' first code kept the gradient tensor itself, which the next backward pass overwrites, so
  that xi was always 1/2 (Adam at half the learning rate); the arXiv version has the results of the corrected code.
- eps is added to sqrt(v) before the correction of its bias, as in the authors' code (Adam adds it after).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from steep.method import Method, Paper, choice, log_uniform
from steep.optim._base import NOT_NEGATIVE, Elementwise
from steep.optim._foreach import Number, descend_, ema_
from steep.utils.validation import Ranges


class DiffGrad(Elementwise):
    """Adam with a friction: each element's step is scaled by the sigmoid of how much its gradient has just changed,
    which halves it on flat ground and near a minimum and leaves it nearly whole where the gradient changes fast.

    A non-finite gradient is not absorbed: as in `torch.optim` it makes the parameter non-finite, unless the step is
    skipped (as `torch.amp.GradScaler` does). The friction depends on the gradient's scale: for gradients far below 1
    it stays near 1/2. The state of half-precision parameters is float32, also after `load_state_dict`.

    Args:
        params: parameters or groups of them, of any shape; real, with dense gradients.
        lr: learning rate, at least 0; a number or 0-d tensor. 1e-3 is the paper's.
        betas: decay rates of m and v per step, in [0, 1). (0.9, 0.999) is the paper's.
        eps: added to the root of v, at least 0. 1e-8 is the paper's.
        weight_decay: factor of the L2 penalty, at least 0. 0 is the authors'.
        maximize: go uphill.
        foreach: share calls among tensors; None is True. False is tensor by tensor, slower and the same.
        compile: run the update as one compiled kernel; takes some seconds at the first step.

    Raises:
        ValueError: a hyper-parameter out of its range, here or in a group.
        RuntimeError: at a step, for sparse gradients, complex parameters, or `compile` without a compiler.

    Paper: arXiv 1909.11015.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = DiffGrad(model.parameters(), lr=1e-3)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(8, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'previous_grad', 'step']
    """

    _ranges: ClassVar[Ranges] = {**NOT_NEGATIVE, "betas": ("[0, 1)", "[0, 1)")}
    _state_names = ("exp_avg", "exp_avg_sq", "previous_grad")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        compile: bool = False,
    ):
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**numbers, "maximize": maximize, "foreach": foreach, "compile": compile})

    @staticmethod
    def _scalars(group: Mapping[str, Any], t: int) -> dict[str, Any]:
        beta1, beta2 = map(float, group["betas"])
        return {
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "weight_decay": group["weight_decay"] or None,
            "step_size": float(group["lr"]) * math.sqrt(1 - beta2**t) / (1 - beta1**t),
            "maximize": group["maximize"],
        }

    @staticmethod
    def _update(
        p: Tensor,
        g: Tensor,
        m: Tensor,
        v: Tensor,
        previous: Tensor,
        *,
        beta1: Number,
        beta2: Number,
        eps: Number,
        weight_decay: Number | None,
        step_size: Number,
        maximize: bool,
    ) -> None:
        """One step on tensors of one shape, in place; `step_size` is lr with the corrections of both biases."""
        if maximize:
            g = -g
        if weight_decay is not None:
            g = g + weight_decay * p
        ema_(m, g, beta1)
        ema_(v, g.square(), beta2)
        friction = (previous - g).abs_().sigmoid_()
        previous.copy_(g)
        descend_(p, step_size, friction.mul_(m), v.sqrt().add_(eps))


method = Method(
    id="diffgrad",
    paper=Paper("diffGrad: An Optimization Method for Convolutional Neural Networks", arxiv="1909.11015", year=2019),
    changes="optim",
    good_for={"faster"},
    make=DiffGrad,
    search_space={"lr": log_uniform(1e-4, 1e-1), "weight_decay": choice(0.0, 1e-4, 1e-2)},
    performance_flags={"foreach", "compile"},
    formula="p -= lr xi m_hat / sqrt(v_hat)  (Adam's m, v),  xi = sigmoid(|g_previous - g|) in [1/2, 1)",
)

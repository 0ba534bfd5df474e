"""AdaGrad on batches that grow: a test tells from the per-example gradients when the mean is too noisy for the batch
size, and the next batches are made large enough. AdaGrad adapts the step at the same time.

With g_i the gradients of the b examples of a batch (rows of J, b x P), g their mean, Var of the sample (1/(b-1)):

    norm             b_new = sum_j Var_j(g_i) / (eta^2 |g|^2)
    inner-product    b_new = Var(<g_i, g>) / (eta^2 |g|^4)
    augmented        the larger of that and  sum_j Var_j(g_i - <g_i, g> g / |g|^2) / (nu^2 |g|^2)
    coordinate-wise  b_new = max_j Var_j(g_i) / (eta^2 g_j^2)               coordinates with g_j = 0 ask for nothing
    b = min(max(b, ceil(b_new)), maximum)                                   it never shrinks; no tests at the maximum

    AdaGrad-Norm     s += |g|^2 (over all parameters, or row by row);  p -= lr g / sqrt(s)                 s_0 > 0

All of it comes from the rows' norms and products with vectors; J itself is never made. A batch that is backpropagated
in parts counts as one: the parts' deviations are joined by the law of total variance, exactly.

Lau, Liu and Kolar: AdAdaGrad (arXiv 2402.11215). Default eta and lr are those of the authors' runs of ResNet-18 on
CIFAR-10 (0.5, 0.05; they start with 8 or 16 examples), nu that of the augmented test with eta 0.5 (1); on MNIST they
took 0.1 and 8e-3. AdaGrad-Norm: Ward, Wu and Bottou (arXiv 1806.01811); lr 1 and s_0 1e-2 are of the authors' file.

What differs from the authors' code, and why:
- inner products are of whole gradients; theirs are summed tensor by tensor, which drops the terms between tensors.
- AdaGrad-Norm has one s, as in the paper. Theirs has one per row of a weight; that is `row_wise`, except that biases go
  by coordinate here, where theirs also add the mean of the layer's weight.
- joining is exact for parts of unequal size; theirs averages them, which is too small by the share of the parts.
- batches shorter than b, at the end of an epoch, are not tested.
- Time is counted in examples: budget and learning rate schedule last as many examples as with the batches
  of the size that the loader came with (theirs count examples too).
- the first test comes after `interval` steps; theirs at once, which is the same by default.
Unsure: whether the experiments of the paper ever used the coordinate-wise test of its theory; the code has none. One
coordinate near zero is enough for it to ask for everything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Adagrad, Optimizer
from torch.optim.optimizer import ParamsT

from steep.method import Method, Paper, choice, log_uniform
from steep.optim._base import BaseOptimizer
from steep.optim._foreach import check_kind, working_dtype
from steep.optim._growing import GrowingBatches
from steep.per_example import PerExample, Rows
from steep.per_example.parts import height
from steep.recipe import Mean, Recipe, Run, deferred
from steep.splits import Data, Loader
from steep.utils.validation import Ranges, check_ranges, require, require_whole

_TESTS = ("norm", "inner-product", "augmented", "coordinate-wise")
_ADAPT = ("coordinate", "row", "norm")


@dataclass
class _Moments:
    """Of the gradients of n examples: their mean, and their squared deviations from it, summed, in float64.

    Args:
        mean: a tensor per parameter.
        spread: the sum over examples: of every coordinate, a tensor per parameter; or of all, one number.
        along: the same of the inner products with the mean.
    """

    n: int
    mean: list[Tensor]
    spread: list[Tensor]
    along: float = 0.0

    def joined(self, other: _Moments) -> _Moments:
        """Those of both together: deviations within each and, of their means, between them."""
        n = self.n + other.n
        moved = [b - a for a, b in zip(self.mean, other.mean, strict=True)]
        between = [(self.n * other.n / n) * d.double().square() for d in moved]
        if len(self.spread) == 1 and self.spread[0].ndim == 0:
            between = [sum(d.sum() for d in between)]  # type: ignore[list-item]
        spread = [a + b + d for a, b, d in zip(self.spread, other.spread, between, strict=True)]
        return _Moments(n, [a + d * (other.n / n) for a, d in zip(self.mean, moved, strict=True)], spread)

    def demand(self, test: str, eta: float, nu: float) -> float:
        """The batch size that the test asks for, a real number; 0 where the mean is zero."""
        square = _square(self.mean)
        if square == 0:
            return 0.0
        noise, parallel = (float(s) / (self.n - 1) for s in (sum(s.sum() for s in self.spread), self.along))
        if test == "norm":
            return noise / (eta**2 * square)
        if test == "coordinate-wise":
            return self._largest_ratio() / (eta**2 * (self.n - 1))
        aligned = parallel / (eta * square) ** 2
        return aligned if test == "inner-product" else max(aligned, (noise - parallel / square) / (nu**2 * square))

    def _largest_ratio(self) -> float:
        found = [s / g.double().square() for s, g in zip(self.spread, self.mean, strict=True)]
        return max(float(torch.where(g != 0, r, 0).max()) for r, g in zip(found, self.mean, strict=True) if r.numel())


def _square(tensors: list[Tensor]) -> float:
    return float(sum(t.double().square().sum() for t in tensors))


def _moments(rows: Rows, test: str) -> tuple[_Moments, tuple[Tensor | None, ...]]:
    """What a test needs to know of the rows; and their mean, `None` for unused parameters."""
    n, mean = len(rows), rows.mean()
    known = [torch.zeros_like(p) if g is None else g for p, g in zip(rows.params, mean, strict=True)]
    if test == "coordinate-wise":
        columns = zip(rows.params, rows.columnwise(_deviations), strict=True)
        return _Moments(n, known, [p.new_zeros(p.shape).double() if s is None else s for p, s in columns]), mean
    spread = (rows.norms().square().sum() - n * _square(known)).clamp(min=0)  # rounding may make it negative
    along = 0.0 if test == "norm" else float(_deviations(rows.jvp(known)[:, None]))
    return _Moments(n, known, [spread], along), mean


def _deviations(columns: Tensor) -> Tensor:
    """Squared deviations from their mean, summed over each of the columns: (B, n) to (n,), float64."""
    columns = columns.double()
    return (columns - columns.mean(0)).square().sum(0)


class AdaptiveBatchSize:
    """The mean gradient, and a test of its noise that lets the batches grow.

    A backward rule: give it the losses of the examples instead of calling ``loss.mean().backward()``, and call `step`
    after the optimizer's. Any optimizer follows. Tested steps cost about one more backward pass; once the batches have
    their maximum, the rule is the plain mean.

    Args:
        model: the model that the losses come from; hooks on its layers live as long as this object.
        batches: what to grow: has `batch_size`, `maximum` and `grow`.
        test: "norm", "inner-product", "augmented" (by orthogonality) or "coordinate-wise"; see the module. The second
            and third need a batch whole, the others take it in parts too.
        eta: tolerated noise of the mean over its length, > 0 (the papers' θ in the inner-product tests). Default 0.5.
        nu: the same orthogonal to the mean, > 0, in the augmented test. Default 1.
        interval: steps from one test to the next, at least 1. Default 1.

    Attributes:
        demand: the batch size that the last test asked for, a real number.

    Raises:
        ValueError: arguments out of range; losses that are no vector.
        RuntimeError: `step` was not called, or a test met a batch in parts that it needs whole.

    Paper: arXiv 2402.11215.

    Example:
        >>> import steep
        >>> model, data = torch.nn.Linear(3, 1), (torch.randn(64, 3), torch.randn(64))
        >>> optimizer = torch.optim.Adagrad(model.parameters())
        >>> batches = GrowingBatches(steep.tensor_loader(*data, batch_size=4, shuffle=True))
        >>> backward = AdaptiveBatchSize(model, batches)
        >>> for x, y, index in batches:
        ...     optimizer.zero_grad()
        ...     backward((model(x).squeeze(1) - y).square())
        ...     optimizer.step()
        ...     backward.step()
        >>> batches.batch_size > 4
        True
    """

    requires = frozenset({"losses", "model", "independent_examples"})

    def __init__(
        self, model: nn.Module, batches: Any, test: str = "norm", eta: float = 0.5, nu: float = 1.0, interval: int = 1
    ):
        require("test", test, test in _TESTS, f"one of {', '.join(_TESTS)}")
        check_ranges({"eta": eta, "nu": nu}, {"eta": "(0, inf)", "nu": "(0, inf)"})
        require_whole("interval", interval, 1)
        self.batches, self.test, self.eta, self.nu, self.interval = batches, test, eta, nu, interval
        self.engine, self.steps, self.demand = PerExample(model), 0, 0.0
        self._found: _Moments | None = None
        self._seen = 0

    def __call__(self, losses: Tensor, *, scale: float = 1.0) -> None:
        """Add the mean gradient to ``.grad``.

        Args:
            losses: of the examples, shape (B,). Where a batch is given in parts, all up to `step` are one batch.
            scale: multiplies the gradient.
        """
        if (self.steps + 1) % self.interval or self.batches.batch_size >= self.batches.maximum:
            return Mean()(losses, scale=scale)
        rows = self.engine.rows(losses)
        found, mean = _moments(rows, self.test)
        self._found = found if self._found is None else self._join(self._found, found)
        self._seen = self._version()
        rows.fill(lambda: [None if g is None else g * scale for g in mean])

    def _join(self, first: _Moments, second: _Moments) -> _Moments:
        if self._seen != self._version():
            raise RuntimeError("the batch before was not tested: call rule.step() after optimizer.step()")
        if self.test not in ("norm", "coordinate-wise"):
            raise RuntimeError(f"test={self.test!r} needs batches whole: accumulate=1, or test='norm'")
        return first.joined(second)

    def _version(self) -> int:
        """Changes when the parameters do, by which a new batch is told from another part of this one."""
        return sum(p._version for p in self.engine.model.parameters())

    def step(self) -> None:
        """Test the batch, if it had its full size, and let the next ones grow; call it after the optimizer."""
        self.steps += 1
        found, self._found = self._found, None
        if found is not None and found.n >= self.batches.batch_size:  # not the short batch at the end of an epoch
            self.demand = found.demand(self.test, self.eta, self.nu)
            self.batches.grow(self.demand)

    def state_dict(self) -> dict[str, Any]:
        """Steps, the last demand, and the parameters known to need the slow way; the batches have their own."""
        return {"steps": self.steps, "demand": self.demand, "left_to_autograd": sorted(self.engine.left_to_autograd)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.demand, self._found = state["steps"], state["demand"], None
        self.engine.left_to_autograd = set(state["left_to_autograd"])

    def __repr__(self) -> str:
        return f"AdaptiveBatchSize(test={self.test!r}, eta={self.eta}, nu={self.nu}, interval={self.interval})"


class AdaGradNorm(BaseOptimizer):
    """AdaGrad with one step length for all parameters: lr over the root of all squared gradient norms so far.

    A non-finite gradient is not absorbed: it makes its parameter non-finite, unless the step is skipped (as
    `torch.amp.GradScaler` does). The state of half-precision parameters is float32.

    Args:
        params: parameters or groups of them, of any shape; real, with dense gradients.
        lr: learning rate, at least 0: the longest step. A number or 0-d tensor. 1 is that of the authors' file.
        initial_accumulator_value: what the sums start with, above 0. 1e-2 is that of the authors' file.
        row_wise: a sum for each row of a weight (output neuron or channel) and element of a bias.
        weight_decay: at least 0; adds the L2 penalty to the gradient, as in torch's Adagrad.

    Raises:
        ValueError: a hyper-parameter out of its range, here or in a group.
        RuntimeError: at a step, for sparse gradients, complex or sharded parameters.

    Papers: arXiv 1806.01811, arXiv 2402.11215.

    Example:
        >>> p = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> optimizer = AdaGradNorm([p], lr=1.0, initial_accumulator_value=1e-9)
        >>> p.square().sum().div(2).backward()
        >>> optimizer.step()
        >>> p
        tensor([2.4000, 3.2000], requires_grad=True)
    """

    _ranges: ClassVar[Ranges] = {"lr": "[0, inf)", "initial_accumulator_value": "(0, inf)", "weight_decay": "[0, inf)"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        initial_accumulator_value: float = 1e-2,
        row_wise: bool = False,
        weight_decay: float = 0.0,
    ):
        numbers = {"lr": lr, "initial_accumulator_value": initial_accumulator_value, "weight_decay": weight_decay}
        super().__init__(params, {**numbers, "row_wise": row_wise})

    def _step(self) -> None:
        # every sum is brought up to date first, because AdaGrad-Norm divides by the total over all parameters
        moving = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        descents = [self._accumulate(group, p) for group, p in moving]
        whole = [p for group in self.param_groups if not group["row_wise"] for p in group["params"]]
        sums = [self.state[p]["sum"] for p in whole if p in self.state]
        for (group, p), g in zip(moving, descents, strict=True):
            own = self.state[p]["sum"].view(p.shape[:1] + (1,) * (p.ndim - 1)) if group["row_wise"] else None
            total = sum(s.to(p.device) for s in sums) if own is None else own
            p.sub_(g * (group["lr"] / (total + group["initial_accumulator_value"]).sqrt()))

    def _accumulate(self, group: dict[str, Any], p: Tensor) -> Tensor:
        """Add a gradient's squares to the parameter's sums; the gradient with the penalty's."""
        assert p.grad is not None
        check_kind(self, type(p), p.grad.layout, p.dtype)
        g = p.grad.to(working_dtype(p.dtype))
        g = g + group["weight_decay"] * p if group["weight_decay"] else g
        rows = g.reshape(height(p), -1).square().sum(1) if group["row_wise"] else g.square().sum()
        self.state[p]["sum"] = self.state[p].get("sum", 0) + rows
        return g


def adadagrad(
    model: nn.Module,
    loader: Loader,
    *,
    lr: float = 0.05,
    adapt: str = "coordinate",
    test: str = "norm",
    eta: float = 0.5,
    nu: float = 1.0,
    interval: int = 1,
    initial: int | None = None,
    maximum: int | None = None,
) -> tuple[GrowingBatches, AdaptiveBatchSize, Optimizer]:
    """AdaGrad on batches that grow when their mean gradient is too noisy: the loader, backward rule and optimizer.

    Args:
        model: what is trained.
        loader: of the training data, a `DataLoader`.
        lr: learning rate, at least 0. 0.05 is the authors' on CIFAR-10.
        adapt: step length of each "coordinate" (torch's Adagrad), of each "row" of a weight or, by the "norm" of the
            whole gradient, of all parameters (`AdaGradNorm`).
        test, eta, nu, interval: as in `AdaptiveBatchSize`.
        initial, maximum: as in `GrowingBatches`.

    Paper: arXiv 2402.11215.

    Example:
        >>> import steep
        >>> model, data = torch.nn.Linear(3, 1), (torch.randn(64, 3), torch.randn(64))
        >>> loader = steep.tensor_loader(*data, batch_size=4, shuffle=True)
        >>> batches, backward, optimizer = adadagrad(model, loader, lr=0.1)
        >>> for x, y, index in batches:
        ...     optimizer.zero_grad()
        ...     backward((model(x).squeeze(1) - y).square())
        ...     optimizer.step()
        ...     backward.step()
    """
    batches = GrowingBatches(loader, initial=initial, maximum=maximum)
    rule = AdaptiveBatchSize(model, batches, test, eta, nu, interval)
    return batches, rule, _optimizer([p for p in model.parameters() if p.requires_grad], lr, adapt)


def _optimizer(params: Any, lr: float = 0.05, adapt: str = "coordinate") -> Optimizer:
    require("adapt", adapt, adapt in _ADAPT, f"one of {', '.join(_ADAPT)}")
    check_ranges({"lr": lr}, {"lr": "[0, inf)"})
    return Adagrad(params, lr=lr) if adapt == "coordinate" else AdaGradNorm(params, lr=lr, row_wise=adapt == "row")


def _apply(recipe: Recipe, **hyper: Any) -> Recipe:
    if recipe.backward is not Mean:
        raise ValueError("adadagrad takes the place of the plain mean: it cannot stand beside another backward rule")
    sizes = {name: hyper.pop(name) for name in ("initial", "maximum") if name in hyper}
    step: dict[str, Any] = {name: hyper.pop(name) for name in ("lr", "adapt") if name in hyper}

    def data(generator: torch.Generator) -> Data:
        plain = recipe.data(generator)
        total_steps = recipe.budget.total_steps(len(plain.train))
        return dataclasses.replace(plain, train=GrowingBatches(plain.train, total_steps=total_steps, **sizes))

    def backward(run: Run) -> Callable[[nn.Module], AdaptiveBatchSize]:
        return partial(AdaptiveBatchSize, batches=run.data.train, **hyper)

    return recipe.replace(data=data, backward=deferred(backward), optimizer=partial(_optimizer, **step))


method = Method(
    id="adadagrad",
    paper=Paper("AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods", arxiv="2402.11215", year=2024),
    changes="optim",
    good_for={"faster"},
    make=adadagrad,
    apply=_apply,
    search_space={"lr": log_uniform(1e-3, 1.0), "eta": log_uniform(0.1, 2.0), "adapt": choice(*_ADAPT)},
    requires=AdaptiveBatchSize.requires,
    test_values={"initial": 4, "maximum": 16, "test": "inner-product", "eta": 2.0},
    performance_flags={"nu"},  # of the augmented test only
    formula="b = max(b, ceil(sum_j Var_j(g_i) / (eta^2 |g|^2)));  s_j += g_j^2;  p_j -= lr g_j / sqrt(s_j)",
)

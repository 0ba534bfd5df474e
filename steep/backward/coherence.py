"""Descent along what many examples agree on: where the mean follows any single example with a large gradient, robust
means follow directions that several support. m-coherence measures how much a model's examples agree.

With g_i the gradients of B examples (a row of ``J``, B x P, each), per coordinate j of the P parameters:

    winsorized     k = min(round(clip B), (B-1)//2);  sort g_1j .. g_Bj, set the k lowest to the next one and the k
                   highest likewise;  .grad_j += their mean           clip = 0: the plain mean, 1/2: the median
    median-of-3    .grad_j += median of the means of three equal parts of the batch
    rolling        .grad_j += median of the batch's mean and those of the two batches before (their mean at the second)

    m-coherence = |sum_i g_i|² / sum_i |g_i|²      m gradients: 1 if orthogonal, m if equal, < 1 if they oppose

Columns of J are made, sorted and forgotten some at a time, so that memory does not grow with B x P.

Winsorized descent: Chatterjee, Coherent Gradients (arXiv 2002.10657), with 0 to 8 % on MNIST; 8 % is the default.
Medians: Zielinski, Krishnan and Chatterjee, Weak and Strong Gradient Directions (arXiv 2003.07422). m-coherence:
Chatterjee and Zielinski, On the Generalization Mystery in Deep Learning (arXiv 2203.10036).

What differs: a coordinate that is not finite in any example is NaN, as in the plain mean, rather than clipped away.

Unsure: the exact levels of the paper, and whether its percentiles interpolate; here whole examples are counted.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steep.backward._conditions import check_vector
from steep.loop.modes import evaluating
from steep.method import Choice, Method, Paper, uniform
from steep.per_example import PerExample, Rows
from steep.utils.validation import check_ranges, require

AVERAGES = ("winsorized", "median-of-3", "rolling")

Gradients = dict[str, Tensor]


class CoherentGradient:
    """Robust mean of the per-example gradients, coordinate by coordinate, which attenuates what few examples support.

    A backward rule: give it the losses of the examples instead of calling ``loss.mean().backward()``. Any optimizer
    follows.

    Args:
        model: the model that the losses come from; hooks on its layers live as long as this object.
        average: "winsorized"; "median-of-3" parts of the batch, about as fast as the plain mean; or "rolling", the
            median of this batch's mean and the last two's.
        clip: share of the examples that is clipped at either end by "winsorized", in [0, 0.5]. Default 0.08.

    Raises:
        ValueError: arguments out of range; losses that are no vector.

    Papers: arXiv 2002.10657, arXiv 2003.07422.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> backward = CoherentGradient(model, clip=0.2)
        >>> backward(model(torch.tensor([[1.0], [2.0], [2.0], [3.0], [100.0]])).squeeze(1))
        >>> model.weight.grad
        tensor([[2.4000]])
    """

    requires = frozenset({"losses", "model", "independent_examples"})

    def __init__(self, model: nn.Module, average: str = "winsorized", clip: float = 0.08):
        require("average", average, average in AVERAGES, f"one of {', '.join(AVERAGES)}")
        check_ranges({"clip": clip}, {"clip": "[0, 0.5]"})
        self.average, self.clip = average, clip
        self.engine = PerExample(model)
        self.recent: list[Gradients] = []
        self._first = True

    def __call__(self, losses: Tensor, *, scale: float = 1.0) -> None:
        """Add the robust mean to ``.grad``.

        Args:
            losses: of the examples, shape (B,). Where a batch is given in pieces, each is a batch of its own.
            scale: multiplies the gradient.
        """
        check_vector("CoherentGradient", losses)
        self._warn(len(losses))
        rows = self.engine.rows(losses)
        found = {"winsorized": self._winsorized, "median-of-3": _median_of_3, "rolling": self._rolling}[self.average](
            rows, len(losses)
        )
        rows.fill(lambda: [scale * found[name] if name in found else None for name in rows.names.values()])

    def _winsorized(self, rows: Rows, size: int) -> Gradients:
        if _clipped(self.clip, size) == 0:
            return _mean(rows, range(size), size)
        return _named(rows, rows.columnwise(partial(_winsorized_mean, clip=self.clip)))

    def _rolling(self, rows: Rows, size: int) -> Gradients:
        # with two means only, at the second batch, the median is their mean
        self.recent = [*self.recent[-2:], _mean(rows, range(size), size)]
        return _median(self.recent)

    def _warn(self, size: int) -> None:
        if self._first and self.average == "winsorized" and self.clip > 0 and _clipped(self.clip, size) == 0:
            warnings.warn(
                f"clip={self.clip} clips none of {size} examples, so this is the plain mean: use clip >= "
                f"{min(0.5, 1 / size):.2g} or larger batches",
                stacklevel=3,
            )
        self._first = False

    def state_dict(self) -> dict[str, Any]:
        """The means of the last batches of "rolling", and the parameters known to need the slow way."""
        return {"recent": list(self.recent), "left_to_autograd": sorted(self.engine.left_to_autograd)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        devices = {name: p.device for name, p in self.engine.model.named_parameters()}
        self.recent = [{name: g.to(devices[name]) for name, g in old.items()} for old in state["recent"]]
        self.engine.left_to_autograd = set(state["left_to_autograd"])

    def __repr__(self) -> str:
        return f"CoherentGradient(average={self.average!r}, clip={self.clip})"


def _clipped(clip: float, size: int) -> int:
    """Examples clipped at either end of `size`; at least one or two are left between."""
    return min(round(clip * size), (size - 1) // 2)


def _winsorized_mean(j: Tensor, clip: float) -> Tensor:
    """Means of the columns of j, (B, n), with the share `clip` of them at either end clipped; (n,)."""
    size, k = len(j), _clipped(clip, len(j))
    ordered = _sorted(j.T.contiguous())
    # k values at either end count as the nearest one that is left
    ends = ordered[:, k] + ordered[:, size - 1 - k]
    return (ordered[:, k : size - k].sum(1) + k * ends) / size + 0 * (ordered[:, 0] + ordered[:, -1])  # NaN stays NaN


def _sorted(t: Tensor) -> Tensor:
    """Sorted along the last dimension; NumPy's sort of plain numbers is ten times as fast as torch's on a CPU."""
    if t.is_cpu and t.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.sort(t.numpy()))
    return t.sort().values


def _median(means: list[Gradients]) -> Gradients:
    """Medians of each coordinate of the last of `means` and of those others that have it."""
    newest = means[-1]
    alike = {name: [m[name] for m in means if name in m and m[name].shape == g.shape] for name, g in newest.items()}
    return {
        name: _winsorized_mean(torch.stack(found).flatten(1), 0.5).view_as(newest[name])
        for name, found in alike.items()
    }


def _median_of_3(rows: Rows, size: int) -> Gradients:
    """Medians of the means of three parts of the batch, as equal as possible."""
    bounds = [size * part // 3 for part in range(4)]
    parts = [range(start, stop) for start, stop in pairwise(bounds) if stop > start]
    return _median([_mean(rows, part, size) for part in parts])


def _mean(rows: Rows, examples: range, size: int) -> Gradients:
    """Mean gradient of some of the examples, by the parameters' names."""
    w = torch.zeros(size, dtype=torch.float64, device=rows.params[0].device)
    w[examples.start : examples.stop] = 1 / len(examples)
    return _named(rows, rows.vjp(w))


def _named(rows: Rows, gradients: Iterable[Tensor | None]) -> Gradients:
    return {name: g for name, g in zip(rows.names.values(), gradients, strict=True) if g is not None}


# ---- the metric


def m_coherence(
    model: nn.Module, losses: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]
) -> dict[str, float]:
    """How many examples an average example's gradient helps, of all m in `batches`: from 0 to m, 1 if none agree.

    An estimate c from a sample of m examples of the share α = |E g|² / E|g|² of the distribution, without its bias, is
    ``(c - 1) / (m - 1)``.

    Args:
        model: looked at in evaluation mode; it is not trained and does not change.
        losses: ``losses(model, batch)``, one per example.
        batches: of the examples; one's gradients are held at a time, in the engine's factored form.

    Returns:
        by layer (its name in the model), and "total"; NaN where all gradients are zero.

    Raises:
        ValueError: no batches; losses that are no vector.

    Example:
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> m_coherence(model, lambda m, x: m(x).squeeze(1), [torch.eye(3), torch.eye(3)])["total"]
        2.0
    """
    engine, sums, squares = PerExample(model), dict[str, Tensor](), defaultdict[str, float](float)
    with evaluating(model), torch.enable_grad():
        for batch in batches:
            each = losses(model, batch)
            check_vector("m_coherence", each)
            rows = engine.rows(each)
            found = _named(rows, rows.vjp(torch.ones_like(each)))
            sums |= {name: sums.get(name, 0) + g.double() for name, g in found.items()}
            for layer, share in rows.per_layer().items():
                squares[layer] += share.norms().square().sum().item()
    engine.remove()
    require("number of batches", len(squares), len(squares) > 0, "positive")
    together = defaultdict[str, float](float)
    for name, g in sums.items():
        together[_layer_of(name)] += g.square().sum().item()
    ratios = {layer: _ratio(together[layer], square) for layer, square in squares.items()}
    return ratios | {"total": _ratio(sum(together.values()), sum(squares.values()))}


def _layer_of(name: str) -> str:
    """Name of the module that a parameter belongs to."""
    return name.rpartition(".")[0]


def _ratio(together: float, squares: float) -> float:
    return together / squares if squares > torch.finfo(torch.float32).tiny else float("nan")


method = Method(
    id="coherence",
    paper=Paper("On the Generalization Mystery in Deep Learning", arxiv="2203.10036", year=2022),
    changes="backward",
    good_for={"noise"},
    make=CoherentGradient,
    search_space={"average": Choice(AVERAGES), "clip": uniform(0.02, 0.3)},
    test_values={"clip": 0.25},
    formula="grad_j = winsorized mean or median of g_1j .. g_Bj;  m-coherence = |sum g_i|^2 / sum |g_i|^2",
)

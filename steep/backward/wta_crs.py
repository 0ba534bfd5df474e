"""WTA-CRS estimates the weight gradients of linear layers from k rows of their inputs, so that no others need be kept:
the rows of the largest weights, and a random sample of the others, without bias. Everything else stays exact.

Of a layer z = h W^T + b with m rows (examples times positions), h (m, in) and z (m, out):

    exact     dW = sum_i dz_i^T h_i     w_i = |h_i| g_i,  p_i = w_i / sum(w)     g_i: |dz_i| at the example's last visit
    CRS       dW ~ 1/k sum_t dz_j^T h_j / p_j                       k rows j drawn with probability p_j
    WTA-CRS   dW ~ sum_(c in C) dz_c^T h_c  +  (1 - P)/(k - |C|) sum_t dz_j^T h_j / p_j
                                   C: the |C| largest p, P their sum; k - |C| rows drawn from the others, in proportion
    |C| in 0 .. k-1 minimises (1 - P)/(k - |C|);  k = max(min_k, floor(ratio m)), and all rows if that is m or more

Liu, Wang, Zhong et al., arXiv 2305.15265 (NeurIPS 2023), with ratio 0.3 and 0.1; 0.3 is the default. `min_k` is 10 in
the authors' code and 4 here, or layers fed with up to 10 rows would never be sampled.

What differs, and why:
- A norm g_i is raised to `floor` times the batch's mean where it is smaller, and is that mean where an example is seen
  for the first time. Otherwise a row whose gradient was zero once could never be drawn again, which is a bias, and an
  example that was learned and then forgotten would get an arbitrarily large factor 1/p_j. 0.3 is from trials on
  digits, where SGD did worse with smaller ones; 0 is the paper's, and right where many rows are padding.
- The authors' code drops the drawn rows where P > 0.999, skips the factor while it has no norms, and with
  `mix_replacement`, which its configuration sets, draws without replacement and without a factor. All three are
  biased. Here p is summed over the others alone, which needs no such care: drawing stops where nothing is left.
- Factors are multiplied into the kept rows of h, as in the paper, in the type of z.

Unsure: the criterion for |C| bounds the variance; (1 - P)^2/(k - |C|) is its first term and would choose larger C.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from steep._layers import Layers, choose_layers, find_layers
from steep.method import Method, Paper
from steep.recipe import Mean
from steep.utils.validation import check_ranges, require, require_whole

ESTIMATORS = ("wta", "crs", "top-k", "uniform")

UNSEEN = -1.0
HUGE = 1e200  # weight of a row that is not finite: it is kept, so that the gradient is not finite either


class WTACRS:
    """Weight gradients of linear layers from a share of the rows of their inputs, to save memory (WTA-CRS).

    A backward rule, ``rule(losses)`` instead of ``losses.mean().backward()``, and the handle of the layers it samples,
    which it changes in place; whatever else runs a backward pass gets sampled gradients too. Outputs, gradients of
    inputs and of biases are exact, and so is everything in evaluation mode, of frozen weights, and in copies of the
    model. Under `torch.utils.checkpoint` the rows are drawn when the layer is run again.

    Set ``rule.indices`` to the examples' positions in the training set before each forward pass (`steep.fit`, Lightning
    and the Trainer do), and rows are weighted by their gradient's norm at the last visit too; without, by the norms of
    the inputs alone, which is as unbiased. A layer's rows must be in the order of the examples, (B, ..., in). Norms
    are kept on the CPU in bfloat16, 2 bytes for each example, position and layer.

    Args:
        model: of the losses.
        ratio: share of the rows kept, k / m, in (0, 1]. Default 0.3 (the paper's; it also has 0.1).
        min_k: rows kept at least.
        estimator: "wta"; "crs", drawn rows alone; "uniform", the same with equal probabilities; or "top-k", the largest
            rows alone, which is biased.
        cache: remember gradient norms by `indices`.
        floor: smallest remembered norm that is believed, as a share of the batch's mean, in [0, 1]. With 0, a row whose
            gradient was zero at the last visit is not drawn.
        layers: which `nn.Linear`: a pattern such as "blocks.*.mlp.*" over names, or ``layers(name, module)``. Default:
            all but the last, the head. The paper's are attention output and feed-forward layers. Not those used
            through their weights only (the projections of `nn.MultiheadAttention`), nor parametrized ones.
        seed: for the draws.

    Raises:
        ValueError: a value out of range, no layer chosen, or indices that are none.
        RuntimeError: at a second derivative.

    Paper: "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model" (arXiv 2305.15265).

    Example:
        >>> import torch
        >>> from steep.loop.measure import saved_bytes
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1)), torch.randn(100, 64)
        >>> exact = saved_bytes(lambda: model[0](x), model)
        >>> rule = WTACRS(model, ratio=0.3)
        >>> saved_bytes(lambda: model[0](x), model) / exact < 0.31
        True
        >>> rule.indices = torch.arange(100)
        >>> rule(model(x).square().squeeze(1))
        >>> rule.remove()
    """

    requires = frozenset({"model", "indices"})

    def __init__(
        self,
        model: nn.Module,
        ratio: float = 0.3,
        min_k: int = 4,
        estimator: str = "wta",
        cache: bool = True,
        floor: float = 0.3,
        layers: Layers = None,
        seed: int = 0,
    ):
        check_ranges({"ratio": ratio, "floor": floor}, {"ratio": "(0, 1]", "floor": "[0, 1]"})
        require_whole("min_k", min_k, 1)
        require("estimator", estimator, estimator in ESTIMATORS, f"one of {', '.join(ESTIMATORS)}")
        self.ratio, self.min_k, self.estimator, self.cache, self.floor = ratio, min_k, estimator, cache, floor
        if not cache:
            self.requires = frozenset({"model"})
        self.generator = torch.Generator().manual_seed(seed)
        self.mean = Mean()
        self._indices: Tensor | None = None
        self.layers = _select(model, layers)
        for module in self.layers.values():
            # a new class, not a new module: the optimizer's parameters, their names and all hooks stay as they are
            module.__class__, module.site = _SampledLinear, _Site(self)

    def __call__(self, losses: Tensor, *, scale: float = 1.0) -> None:
        """Add the gradient of the mean loss, times `scale`, to ``.grad``; losses of shape (B,) or 0-d."""
        self.mean(losses, scale=scale)

    @property
    def indices(self) -> Tensor | None:
        """Positions in the training set of the examples that the model is given next, whole numbers of shape (B,)."""
        return self._indices

    @indices.setter
    def indices(self, value: Tensor | None) -> None:
        if value is not None:
            if value.ndim != 1 or value.is_floating_point() or (len(value) and value.min() < 0):
                raise ValueError(f"indices={value!r} must be whole numbers >= 0 of shape (B,)")
            value = value.to("cpu", torch.long)
        self._indices = value if self.cache else None

    def kept(self, rows: int) -> int:
        """k, of so many rows."""
        return min(rows, max(self.min_k, int(self.ratio * rows)))

    def remove(self) -> None:
        """Make the layers ordinary ones again."""
        for module in self.layers.values():
            del module.site
            module.__class__ = nn.Linear
        self.layers.clear()

    def state_dict(self) -> dict[str, Any]:
        """The generator, and the norms that each layer remembers."""
        norms = {name: module.site.norms for name, module in self.layers.items()}
        return {"generator": self.generator.get_state(), "norms": norms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state["norms"]) != set(self.layers):
            raise ValueError(f"the state is of layers {list(state['norms'])}, this rule samples {list(self.layers)}")
        self.generator.set_state(state["generator"])
        for name, module in self.layers.items():
            module.site.norms = state["norms"][name].clone()

    def __repr__(self) -> str:
        kind = f"{self.estimator}, ratio={self.ratio}, min_k={self.min_k}, cache={self.cache}, floor={self.floor}"
        return f"WTACRS({kind}, layers={list(self.layers)})"


def _select(model: nn.Module, layers: Layers) -> dict[str, Any]:
    """The layers to sample, by name."""
    found = find_layers(model, _is_plain)
    description = f"the Linear layers {list(found)}, by default all but the last"
    return choose_layers(layers, found, default=list(found)[:-1], description=description)


def _is_plain(module: nn.Module) -> bool:
    """Whether a Linear layer, or a copy of a sampled one; what derives from it has a forward of its own."""
    return type(module) is nn.Linear or (isinstance(module, _SampledLinear) and module.site is None)


# ---- the layer


class _SampledLinear(nn.Linear):
    """A linear layer that keeps some rows of its input for its weight's gradient; one without a `site` is exact."""

    site: _Site | None

    def forward(self, input: Tensor) -> Tensor:
        sampled = self.site is not None and self.training and torch.is_grad_enabled() and self.weight.requires_grad
        rows = input.numel() // self.in_features
        if not sampled or self.site.rule.kept(rows) == rows:  # type: ignore[union-attr]
            return super().forward(input)
        return _Sampled.apply(input, self.weight, self.bias, self.site)


class _Site:
    """A sampled layer's rule, and the norms of the gradients of its outputs: (N, positions), negative if unseen."""

    def __init__(self, rule: WTACRS):
        self.rule, self.norms = rule, torch.empty(0, 0, dtype=torch.bfloat16)

    def __reduce__(self) -> Any:
        return _nothing, ()  # copies and pickles of the layer are exact

    def choose(self, h: Tensor, examples: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows of h, (m, in), and their factors, both (k,)."""
        k, rule = self.rule.kept(len(h)), self.rule
        uniform = torch.rand(k, dtype=torch.float64, generator=rule.generator).to(h.device)
        if rule.estimator == "uniform":
            return _choose(torch.ones(len(h), dtype=torch.float64, device=h.device), uniform, "crs")
        seen = None if examples is None else self.recall(examples, len(h) // len(examples)).to(h.device)
        return _choose(_weights(h, seen, rule.floor), uniform, rule.estimator)

    def recall(self, examples: Tensor, positions: int) -> Tensor:
        """What is remembered of the rows of some examples, (B * positions,)."""
        self._grow(examples, positions)
        return self.norms[examples, :positions].flatten()

    def remember(self, examples: Tensor, grad: Tensor) -> None:
        """Keep the norms of gradients (m, out), which belong to the examples in order."""
        norms = _norms(grad).nan_to_num(UNSEEN, posinf=UNSEEN)
        found = norms.view(len(examples), -1).to("cpu", torch.bfloat16)
        self._grow(examples, found.shape[1])
        self.norms[examples, : found.shape[1]] = found

    def _grow(self, examples: Tensor, positions: int) -> None:
        """Enlarge the memory, doubled each time, as the size of the training set is not known."""
        rows, columns = self.norms.shape
        needed = int(examples.max()) + 1
        if needed > rows or positions > columns:
            rows, columns = rows if needed <= rows else max(2 * rows, needed), max(columns, positions)
            old, self.norms = self.norms, torch.full((rows, columns), UNSEEN, dtype=torch.bfloat16)
            self.norms[: old.shape[0], : old.shape[1]] = old


def _nothing() -> None:
    return None


class _Sampled(torch.autograd.Function):
    """h W^T + b, (..., in) to (..., out), whose weight gradient comes from chosen rows of h."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, site: _Site) -> Tensor:
        z, flat, examples = F.linear(h, weight, bias), h.reshape(-1, h.shape[-1]), site.rule.indices
        if examples is not None and (not len(examples) or len(flat) % len(examples)):
            examples = None  # not rows of these examples
        index, factor = site.choose(flat, examples)
        rows = (flat[index] * factor.unsqueeze(1).to(_wide(h))).to(z.dtype)
        # all that depends on the draw is saved by autograd, or a checkpoint's second run would be mixed with the first
        ctx.save_for_backward(rows, index.int(), weight if ctx.needs_input_grad[0] else None)
        ctx.site, ctx.examples, ctx.types = site, examples, (h.dtype, weight.dtype)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, index, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        if ctx.examples is not None:
            ctx.site.remember(ctx.examples, flat)
        of_h = (grad @ weight.to(grad.dtype)).to(ctx.types[0]) if weight is not None else None
        of_weight = (flat.index_select(0, index).T @ rows).to(ctx.types[1])
        of_bias = flat.sum(0).to(ctx.types[1]) if ctx.needs_input_grad[2] else None
        return of_h, of_weight, of_bias, None


# ---- the estimator


def _weights(h: Tensor, seen: Tensor | None, floor: float = 0.0) -> Tensor:
    """Weights w of rows to draw from, not negative and finite; (m,), float64.

    Args:
        h: inputs, (m, in).
        seen: the norms of their gradients at the last visit, (m,), negative where there was none.
        floor: least of them, as a share of their mean.
    """
    norms = _norms(h).double()
    if seen is not None:
        seen, known = seen.double(), seen >= 0
        mean = seen.clamp(min=0).sum() / known.sum().clamp(min=1)
        norms = norms * torch.where(mean > 0, torch.where(known, seen.clamp(min=floor * mean), mean), 1.0)
    return norms.nan_to_num(HUGE, posinf=HUGE)


def _norms(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dim=1, dtype=_wide(t))


def _wide(t: Tensor) -> torch.dtype:
    """float32 at least: half precision would overflow."""
    return torch.promote_types(t.dtype, torch.float32)


def _choose(w: Tensor, uniform: Tensor, estimator: str = "wta") -> tuple[Tensor, Tensor]:
    """Rows j and factors f such that ``sum_j f_j x_j`` estimates ``sum_i x_i``, without bias if x_i = 0 where w_i = 0.

    Args:
        w: weights of the rows, (m,); the variance is smallest if they are in proportion to \\|x_i\\|.
        uniform: k numbers drawn from [0, 1), k <= m.
        estimator: "wta", "crs" or "top-k" (biased).

    Returns:
        rows and factors, (k,) each: the |C| largest by their weight with factor 1, then those drawn.
    """
    top, slots = w.topk(len(uniform)), torch.arange(len(uniform), device=w.device)
    wins = slots < _winners(top.values, w.index_fill(0, top.indices, 0.0).sum(), estimator)
    # winners weigh nothing among those to draw from
    others = w.index_put((top.indices,), torch.where(wins, 0.0, top.values))
    sums = others.cumsum(0)
    # right: a row of weight 0 is never drawn, even by the number 0
    drawn = torch.searchsorted(sums, uniform * sums[-1], right=True).clamp(max=len(w) - 1)
    index = torch.where(wins, top.indices, drawn)
    return index, torch.where(wins, 1.0, sums[-1] / (w[index] * (len(slots) - wins.sum())))


def _winners(top: Tensor, rest: Tensor, estimator: str = "wta") -> Tensor:
    """|C|, 0-d; all k where nothing is left to draw, and the sum is exact.

    Args:
        top: the k largest weights, largest first.
        rest: the sum of the others, 0-d.
    """
    k = len(top)
    left = rest + top.flip(0).cumsum(0).flip(0)  # weight outside C, for |C| = 0 .. k-1
    if estimator == "top-k":
        return torch.full_like(rest, k, dtype=torch.long)
    if estimator == "crs":
        return torch.where(left[0] > 0, 0, k)
    return torch.where(rest > 0, (left / torch.arange(k, 0, -1, device=top.device)).argmin(), k)


method = Method(
    id="wta-crs",
    paper=Paper(
        "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model",
        arxiv="2305.15265",
        year=2023,
    ),
    changes="backward",
    good_for={"memory"},
    make=WTACRS,
    test_values={"ratio": 0.75, "estimator": "top-k", "floor": 1.0, "layers": "*"},  # the checks' layers have 8 rows
    formula="dW ~ sum_C dz_c^T h_c + (1 - P)/(k - |C|) sum_j dz_j^T h_j / p_j,  j ~ p outside C,  p_i ~ |h_i| |dz_i|",
)

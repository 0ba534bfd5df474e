"""How the gradients of a language model's attention matrices change with depth, for one kind of answer and another:
short or long answers, right or wrong ones, each example by itself and without training on it.

For each example with loss L, layer l and matrix W of the kinds q, k, v, o, with σ the singular values of G = ∂L/∂W:

    nuclear  s_l = sum σ          frobenius = |G|          largest = σ_1        ratio r_l = σ_1 / sum σ,  in [1/rank, 1]
    per_loss = s_l / L            mean, max, min of the entries of G
    layer difference  MAD = mean_l |s_{l+1} - s_l|        relative difference  RD = mean_l |s^A_l - s^B_l| / |s^A_l|

Curves s_l are means over the examples. L is the mean cross-entropy over the tokens of the response (`response_loss`).
G is a sum over positions, so that its rank is at most the number of positions that the loss reaches.

Li, Li and Zhou: What Happened in LLMs Layers when Trained for Fast vs. Slow Thinking: A Gradient Perspective
(arXiv 2410.23743). Its parts of the depth for 26, 28, 32 and 42 layers are in `stages`; others are equal thirds.

What differs, and why:
- Examples with a gradient that is not finite count in no curve, as in the paper; here `used` says how many are left.
- The prompt's end is found by character offsets in one encoding of the whole text (`response_start`). The authors
  encode the prompt once more by itself, which tokenizers may divide differently at its end.

Mind that the mean over tokens alone makes gradients of long responses smaller: compare `per_loss` too, and a response
of equal length that is easy to predict.

Unsure: how the paper's MAD of a part treats the step into it; `layer_difference` of a slice leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steep.loop.modes import evaluating
from steep.method import Method, Paper
from steep.probes._projections import Groups, Projection, attention_projections, matching
from steep.utils.validation import check_ranges, require

__all__ = [
    "LayerGradients",
    "Projection",
    "attention_projections",
    "layer_difference",
    "layer_gradients",
    "relative_difference",
    "response_loss",
    "response_start",
    "stages",
    "top_layers",
]

_STATISTICS = ("nuclear", "frobenius", "largest", "ratio", "per_loss", "mean", "max", "min")
_STAGES = {26: (7, 13, 6), 28: (7, 14, 7), 32: (10, 10, 12), 42: (12, 18, 12)}


@dataclass(frozen=True)
class LayerGradients:
    """Statistics of gradients by kind of matrix, example and layer.

    Args:
        values: statistic -> kind -> (examples, layers), float64.
        losses: of the examples, (examples,).
    """

    values: Mapping[str, Mapping[str, Tensor]]
    losses: Tensor

    @property
    def used(self) -> Tensor:
        """Which examples have finite gradients everywhere, (examples,)."""
        finite = [t.isfinite().all(1) for t in self.values["frobenius"].values()]
        return torch.stack([*finite, self.losses.isfinite()]).all(0)

    def curve(self, kind: str, statistic: str = "nuclear") -> Tensor:
        """Mean over the used examples, by layer, (layers,); ratios of zero gradients are left out.

        Args:
            kind: of matrix: "q", "k", "v", "o", or a name given in `groups`.
            statistic: nuclear, frobenius, largest, ratio, per_loss, mean, max or min.
        """
        require("statistic", statistic, statistic in _STATISTICS, f"one of {', '.join(_STATISTICS)}")
        require("kind", kind, kind in self.values[statistic], f"one of {', '.join(self.values[statistic])}")
        return self.values[statistic][kind][self.used].nanmean(0)


def layer_gradients(
    model: nn.Module,
    examples: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    *,
    groups: Mapping[str, str | Sequence[Projection]] | None = None,
) -> LayerGradients:
    """Statistics of each example's gradient, layer by layer; the model is not trained and does not change.

    Args:
        model: evaluated in evaluation mode.
        examples: anything that `loss` takes, one at a time.
        loss: ``loss(model, example)``, a number; `response_loss` for a language model.
        groups: by kind, a pattern of parameter names in the order of depth, such as ``{"q": "*.q_proj.weight"}``, or
            projections; `None` for those of `attention_projections`.

    Raises:
        ValueError: no examples, a loss that is no number, or groups that name no matrix.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        >>> found = layer_gradients(model, torch.ones(5, 3), lambda m, x: m(x).sum(), groups={"w": "*.weight"})
        >>> found.curve("w", "ratio").round(decimals=4)  # one position: rank 1
        tensor([1., 1.], dtype=torch.float64)
    """
    chosen = matching(model, groups)
    params = _params(model, chosen)
    rows, losses = [], []
    with evaluating(model), torch.enable_grad():
        for example in examples:
            value = _checked(loss(model, example))
            grads = dict(
                zip(params, torch.autograd.grad(value, list(params.values()), materialize_grads=True), strict=True)
            )
            losses.append(value.item())
            rows.append({kind: _table(found, grads, value.item()) for kind, found in chosen.items()})
    require("number of examples", len(rows), len(rows) > 0, "positive")
    tables = {kind: torch.stack([row[kind] for row in rows]) for kind in chosen}
    values = {name: {kind: t[..., i] for kind, t in tables.items()} for i, name in enumerate(_STATISTICS)}
    return LayerGradients(values, torch.tensor(losses, dtype=torch.float64))


def _params(model: nn.Module, groups: Groups) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    params: dict[str, Tensor] = {p.parameter: named[p.parameter] for found in groups.values() for p in found}
    frozen = [name for name, p in params.items() if not p.requires_grad]
    if frozen:
        raise ValueError(f"frozen parameters have no gradient, but {', '.join(frozen[:3])} are: requires_grad_() them")
    return params


def _checked(value: Tensor) -> Tensor:
    if value.ndim or not value.requires_grad:
        what = f"shape {tuple(value.shape)}" if value.ndim else "a number that depends on no parameter"
        raise ValueError(f"loss must return a number that the model computed, got {what}")
    return value


def _table(projections: Sequence[Projection], grads: Mapping[str, Tensor], loss: float) -> Tensor:
    """(layers, statistics)."""
    return torch.stack([_statistics(p.of(grads[p.parameter]), loss) for p in projections])


def _statistics(gradient: Tensor, loss: float) -> Tensor:
    """The numbers named in `_STATISTICS`, float64; NaN for a gradient that is not finite."""
    g = gradient.detach().flatten(1)
    if not g.isfinite().all():
        return torch.full((len(_STATISTICS),), torch.nan, dtype=torch.float64)
    # there is no SVD in half precision, and float32 is precise enough for sums of singular values
    s = torch.linalg.svdvals(g if g.dtype == torch.float64 else g.float()).double()
    g, nuclear = g.double(), s.sum()
    found = (nuclear, g.norm(), s[0], s[0] / nuclear, nuclear / loss, g.mean(), g.max(), g.min())
    return torch.stack([t.cpu() for t in found])


# ---- curves over the depth


def layer_difference(curve: Tensor) -> Tensor:
    """Mean absolute difference between neighbouring layers (MAD), 0-d.

    Raises:
        ValueError: fewer than two layers.

    Example:
        >>> layer_difference(torch.tensor([1.0, 2.0, 0.0]))
        tensor(1.5000)
    """
    require("number of layers", len(curve), len(curve) > 1, "at least 2")
    return curve.diff().abs().mean()


def relative_difference(a: Tensor, b: Tensor) -> Tensor:
    """How far curve b is from curve a, relative to a: mean of ``|a - b| / |a|`` (RD), 0-d."""
    return _relative(a, b).mean()


def top_layers(a: Tensor, b: Tensor, k: int = 5) -> list[int]:
    """The layers, from 0, in which the curves differ most relative to a; largest first."""
    check_ranges({"k": k}, {"k": "[1, inf)"})
    return _relative(a, b).argsort(descending=True)[:k].tolist()


def _relative(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"curves must have the same layers, got shapes {tuple(a.shape)} and {tuple(b.shape)}")
    return (a - b).abs() / a.abs()


def stages(layers: int) -> dict[str, slice]:
    """Early, middle and late layers of a model, to be cut out of a curve: ``layer_difference(curve[late])``.

    Example:
        >>> stages(32)["late"]
        slice(20, 32, None)
    """
    check_ranges({"layers": layers}, {"layers": "[3, inf)"})
    early, middle, _ = _STAGES.get(layers, (layers // 3, layers - 2 * (layers // 3), layers // 3))
    return {"early": slice(0, early), "middle": slice(early, early + middle), "late": slice(early + middle, layers)}


# ---- language models


def response_loss(model: nn.Module, example: tuple[Tensor, int]) -> Tensor:
    """Mean cross-entropy of a language model over the tokens of a response.

    Args:
        model: from tokens (1, T) to logits (1, T, V), or to an object with `logits`.
        example: tokens of prompt and response, (T,), and how many of them are the prompt (see `response_start`).

    Raises:
        ValueError: no prompt or no response.
    """
    tokens, start = example
    require(
        "start", start, 0 < start < len(tokens), f"in 1 .. {len(tokens) - 1}: prompt and response need a token each"
    )
    output = model(tokens[None])
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits[0, start - 1 : -1], tokens[start:])


def response_start(offsets: Sequence[tuple[int, int]], characters: int) -> int:
    """The number of tokens before the response: those that begin in the prompt, and special ones before it.

    A token that holds the prompt's last and the response's first characters counts to the prompt.

    Args:
        offsets: first character of each token and the one after its last (a tokenizer's `offset_mapping`); special
            tokens have none.
        characters: length of the prompt.

    Raises:
        ValueError: no token begins in the response.

    Example:
        >>> response_start([(0, 0), (0, 3), (3, 5), (5, 8), (0, 0)], characters=5)
        3
    """
    inside = (i for i, (begin, end) in enumerate(offsets) if begin >= characters and end > begin)
    start = next(inside, None)
    if start is None:
        raise ValueError(f"no token begins at or after character {characters}: the response is empty, or was cut off")
    return start


method = Method(
    id="layer-gradient",
    paper=Paper(
        "What Happened in LLMs Layers when Trained for Fast vs. Slow Thinking: A Gradient Perspective",
        arxiv="2410.23743",
        year=2024,
    ),
    changes="probes",
    good_for={"insight"},
    make=layer_gradients,
    formula="s_l = nuclear norm of dL/dW_l;  r_l = sigma_1 / s_l;  MAD = mean |s_{l+1} - s_l|;  RD = mean |s-s'| / |s|",
)

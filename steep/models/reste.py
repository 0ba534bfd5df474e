"""Binary weights and activations: signs forward, the slope of a soft sign backward, sharper with time (ReSTE).

The sign has no useful gradient, so an estimator's is used. A sharp estimator errs less but makes gradients diverge;
ReSTE trades the two by the exponent of a power function, which is the straight-through estimator at o = 1. Per layer,
with latent weights W (out, in, ...), inputs x (B, in, ...), and z either of them, elementwise:

    y = x^ * W^ + bias,    W^ = sign(W) mean|W|  (one scale per layer; gradients flow through both),    x^ = sign(x)
    dz = dz^ f'(z),        f(z) = sign(z) |z|^(1/o)
    f'(z) = (1/o) |z|^(1/o - 1)   m < |z| <= t;      m^(1/o - 1)   |z| <= m, the secant's;      0   |z| > t
    o(p)  = 1 + (1 - cos(p pi/2)) (o_end - 1),       p = steps taken / total_steps

    estimating error = sum over layers |f(W) - sign(W)|_2      gradient instability = sum over layers Var |dW|

Paper: Wu et al., arXiv 2308.06689; o_end = 3, t = 1.5 and m = 0.1 are those of the authors' code. Other estimators:
clipped STE (arXiv 1602.02830), ApproxSign (Bi-Real net, arXiv 1808.00278), EDE (IR-Net, arXiv 1909.10788), FDA (arXiv
2103.00841).

What differs, and why: sign(0) is +1, so that weights are binary (torch's sign, and so the authors' code, has 0). The
exponent moves once per step instead of once per epoch. The authors' indicator takes f at o_end throughout, here at the
present o. Activations are real by default, since most networks have a ReLU before their layers; the authors' have a
norm between. ApproxSign, made for activations, serves for weights too.

Unsure: EDE's range of temperatures is that of the paper as remembered (0.1 to 10); its code for CIFAR starts at 0.001.
FDA's authors published inference only; frequency 0.1, and n from 9 to 18, are those of two public ports that agree.
Its noise module is left out.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steep._layers import WEIGHTED, find_layers, is_called, matching
from steep.method import Method, Paper, uniform
from steep.models._handle import ParametrizedWeights
from steep.models._signs import EDE, FDA, STE, ApproxSign, EstimatedSign, Estimator, ReSTE, sign
from steep.utils.validation import nearest, require, require_whole

__all__ = ["EDE", "FDA", "STE", "ApproxSign", "Binarization", "Estimator", "ReSTE", "apply_reste"]

BITS = ("1W32A", "1W1A", "32W1A")


class _Sign(nn.Module):
    """The sign of a tensor; the estimator's place in its schedule is in buffers."""

    steps: Tensor
    sharpness: Tensor

    def __init__(self, estimator: Estimator, like: Tensor):
        super().__init__()
        self.estimator = estimator
        # float32 at least: in half precision the steps of a slow schedule would be rounded away
        precise = torch.promote_types(like.dtype, torch.float32)
        self.register_buffer("steps", torch.tensor(0, device=like.device))
        self.register_buffer("sharpness", torch.tensor(estimator.at(0.0), dtype=precise, device=like.device))

    def forward(self, z: Tensor) -> Tensor:
        return EstimatedSign.apply(z, self.sharpness, self.estimator)


class _ScaledSign(_Sign):
    """Parametrization of a weight: sign times mean magnitude."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) * z.abs().mean()


class _InputSign(_Sign):
    """Sign of a layer's inputs; checks the first batch, as inputs that are never negative all have the same sign."""

    def __init__(self, estimator: Estimator, like: Tensor, layer: str):
        super().__init__(estimator, like)
        self.layer, self.looked = layer, False

    def forward(self, z: Tensor) -> Tensor:
        # what depends on values would break a compiled graph
        if not self.looked and not torch.compiler.is_compiling():
            self.looked = True
            with contextlib.suppress(RuntimeError):  # under vmap, values cannot be asked for
                self._warn(bool((z < 0).any()))
        return super().forward(z)

    def _warn(self, negative: bool) -> None:
        if not negative:
            warnings.warn(
                f"layer {self.layer!r}: no input of its first batch is negative (does a ReLU come before it?), so all "
                "their signs are +1 and it sees nothing of the data: put a norm between them, or use bits='1W32A'",
                stacklevel=2,
            )


def _binarize_input(layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.input_sign(inputs[0]), *inputs[1:])


def _sign_of_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (sign(inputs[0]), *inputs[1:])


class Binarization(ParametrizedWeights):
    """Handle of a model's binary layers; made by `apply_reste`. Its state is in ``model.state_dict()``.

    `step` sharpens the estimator and clips the latent weights. `merge` writes the binary weights, each plus or minus
    one number per layer; where activations are binary, the layers go on taking the signs of their inputs, by a hook
    without state.
    """

    def __init__(
        self, layers: dict[str, nn.Module], bits: str, estimator: Estimator, total_steps: int, clip: float | None
    ):
        super().__init__(layers, None if bits.startswith("32W") else lambda weight: _ScaledSign(estimator, weight))
        self.estimator, self.total_steps, self.clip = estimator, total_steps, clip
        self.activations, self.hooks = bits.endswith("1A"), []
        if self.activations:
            for name, module in self.layers.items():
                module.input_sign = _InputSign(estimator, module.weight, name)
                self.hooks.append(module.register_forward_pre_hook(_binarize_input))

    def _scheduled(self) -> Iterator[_Sign]:
        yield from super()._scheduled()
        if self.activations:
            yield from (module.input_sign for module in self.layers.values())

    @property
    def sharpness(self) -> float:
        """The estimator's sharpness now: o for ReSTE."""
        return self._sharpness(max(0, self.steps))

    def _sharpness(self, steps: int) -> float:
        return self.estimator.at(min(1.0, steps / self.total_steps))

    def _enter(self, steps: int) -> None:
        super()._enter(steps)
        for part in self._scheduled():
            part.sharpness.fill_(self._sharpness(steps))
        if self.clip is not None:
            for weight in self._latent():
                weight.original.clamp_(-self.clip, self.clip)

    @torch.no_grad()
    def estimating_error(self) -> float:
        """Distance of the soft signs of the latent weights from their signs, summed over the layers.

        Raises:
            ValueError: no weights are binary.
        """
        distances = (self.estimator.soft(w.original, w[0].sharpness) - sign(w.original) for w in self._watched())
        return sum(float(distance.norm()) for distance in distances)

    def gradient_instability(self) -> float:
        """Variance of the magnitudes of each layer's weight gradient, summed over the layers; for after a backward.

        Raises:
            ValueError: no weights are binary, or there are no gradients.
        """
        grads = [w.original.grad for w in self._watched() if w.original.grad is not None]
        require("number of gradients", len(grads), bool(grads), "positive: call this between backward and zero_grad")
        return sum(float(grad.abs().var()) for grad in grads)

    def _watched(self) -> list[Any]:
        found = self._latent()
        require("number of binary weights", len(found), bool(found), "positive")
        return found

    def _leave(self, merged: bool) -> None:
        for hook in self.hooks:
            hook.remove()
        if self.activations:
            for module in self.layers.values():
                del module.input_sign
                if merged:  # the weights alone do not say that inputs are binary
                    module.register_forward_pre_hook(_sign_of_input)
        super()._leave(merged)

    def __repr__(self) -> str:
        bits = f"{1 if self.weights else 32}W{1 if self.activations else 32}A"
        return f"Binarization({bits}, {self.estimator}, steps={self.steps}, layers={list(self.layers)})"


def apply_reste(
    model: nn.Module,
    *,
    total_steps: int,
    bits: str = "1W32A",
    estimator: str | Estimator = "reste",
    o_end: float = 3.0,
    t: float = 1.5,
    m: float = 0.1,
    clip: float | None = None,
    skip: Sequence[str] = ("first", "last"),
) -> Binarization:
    """Train a model with binary weights, or activations, or both, in place; gradients by ReSTE or another estimator.

    Call ``handle.step()`` after each optimizer step. At the end ``handle.merge()`` leaves plain layers with binary
    weights, ``handle.remove()`` the latent ones. The paper's two indicators are ``handle.estimating_error()`` and
    ``handle.gradient_instability()``. The model stays loadable: the place in the schedule is in its `state_dict`.

    Args:
        model: its weights become latent weights; an optimizer made before or after works.
        total_steps: optimizer steps of the whole training run, over which the estimator sharpens.
        bits: "1W32A": binary weights; "1W1A": activations too, the inputs of the same layers; "32W1A": these only. The
            paper has the first two. Binary activations need a norm before the layer: behind a ReLU all signs are +1.
        estimator: "reste"; "ste", clipped at 1; "approxsign" (Bi-Real net); "ede" (IR-Net); "fda"; or an object like
            these, such as ``STE(t=1.5)``.
        o_end: of ReSTE, o at the end, at least 1; 1 is STE throughout. Default 3, as in the paper.
        t: of ReSTE, there is no gradient where magnitudes are larger. Default 1.5, as in the authors' code.
        m: of ReSTE, the slope is constant where magnitudes are smaller; less than t. Default 0.1, as in their code.
        clip: after each step latent weights are clipped to this magnitude; `None`, as published, clips nothing.
        skip: layers that stay real: "first", "last" (in the order of ``model.modules()``), names or patterns of names.
            Of the other Linear and convolution layers all become binary; embeddings and attention's own projections
            never do. As in the paper, all but the first and the last.

    Raises:
        ValueError: a value out of range, a pattern that matches no layer, no layer left, or one that is binary already.

    Paper: "Estimator Meets Equilibrium Perspective: A Rectified Straight Through Estimator for Binary Neural Networks
    Training" (arXiv 2308.06689).

    Latent weights beyond t get a gradient through the layer's scale only, and hardly ever come back: `clip` at or below
    t, or weight decay, prevents that. Weight decay in turn draws them to 0, where slopes are steepest and signs flip.
    Follow binary layers with a norm: the scale of their outputs is that of no usual initialisation.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> binary = apply_reste(model, bits="1W1A", total_steps=20)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(16, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     binary.step()
        >>> binary.sharpness
        3.0
        >>> binary.merge()
        >>> len(model[2].weight.unique())
        2
    """
    require_whole("total_steps", total_steps, 1)
    require("bits", bits, bits in BITS, f"one of {BITS}")
    require("clip", clip, clip is None or 0 < clip < math.inf, "positive and finite, or None")
    require("clip", clip, clip is None or bits != "32W1A", "None where weights stay real (32W1A)")
    require("skip", skip, not isinstance(skip, str), "a sequence of names or patterns")
    known = {"reste": ReSTE(o_end, t, m), "ste": STE(), "approxsign": ApproxSign(), "ede": EDE(), "fda": FDA()}
    chosen = known.get(estimator, estimator) if isinstance(estimator, str) else estimator
    if not isinstance(chosen, Estimator):
        raise ValueError(f"estimator={estimator!r} must be one of {tuple(known)}, or an object like these")
    return Binarization(_select(model, skip), bits, chosen, total_steps, clip)


def _select(model: nn.Module, skip: Sequence[str]) -> dict[str, nn.Module]:
    """The layers to make binary, by name."""
    found = find_layers(model, lambda module: isinstance(module, WEIGHTED) and is_called(module))
    names, skipped = list(found), set[str]()
    ends = {"first": names[:1], "last": names[-1:]}
    for pattern in skip:
        matched = ends[pattern] if pattern in ends else matching(pattern, found)
        if not matched:
            raise ValueError(f"skip: {pattern!r} matches no Linear layer or convolution{nearest(pattern, names)}")
        skipped.update(matched)
    chosen = {name: module for name, module in found.items() if name not in skipped}
    if not chosen:
        raise ValueError(f"skip={skip!r} leaves none of the layers {names} to be made binary")
    for name, module in chosen.items():
        if hasattr(module, "input_sign"):
            raise ValueError(f"layer {name!r}: its inputs are binary already; remove that first")
    return chosen


method = Method(
    id="reste",
    paper=Paper(
        "Estimator Meets Equilibrium Perspective: A Rectified Straight Through Estimator for Binary Neural Networks "
        "Training",
        arxiv="2308.06689",
        year=2023,
    ),
    changes="models",
    good_for={"smaller"},
    make=apply_reste,
    search_space={"o_end": uniform(1.0, 8.0)},
    test_values={"bits": "1W1A", "estimator": "ede", "t": 0.12, "clip": 0.05, "skip": ("first",)},
    wraps=True,
    formula="W^ = sign(W) mean|W|;  dW = dW^ f'(W), f(z) = sign(z) |z|^(1/o), o from 1 to o_end",
)

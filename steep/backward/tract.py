"""The first layer's weight is moved so that its outputs change as a gradient step on them would change them.

Ordinarily an input's influence on the first weights is proportional to its own values, so faint images change them less
than strong ones; an embedding layer, whose rows are its outputs, has no such effect. With x (b, n) the layer's inputs,
z = x Wᵀ + bias (b, m) its outputs, g = dL/dz (b, m) of a mean loss L, and C = xᵀx/b (n, n):

    W.grad = gᵀx (C + λI)⁻¹ = gᵀ (xxᵀ/b + λI)⁻¹ x            (m, n); the second form where b < n
           = W - argmin_V |z - b g - x Vᵀ|² + λb |V - W|²    (with z from W; the bias aside)

A convolution is the same map of patches: n = values of a patch, b = examples times output positions; with groups,
each has a C of its own. Positions of a sequence count as rows too. Outputs and the other gradients do not change.

Paper: Petersen, Borgelt and Ermon, "TrAct: Making First-layer Pre-Activations Trainable" (arXiv 2410.23970). λ, its
only hyper-parameter, is 0.1 in their code and its examples, for standardised inputs, with learning rates left as they
were.

What differs: the authors' code inverts the matrix, has two-dimensional convolutions only, and ignores dilation,
groups and padding modes; here they are treated as they should be, by Cholesky factors, in float32 at least.

Unsure: how far λ may be moved; it is tuned over 0.03 to 0.3. It is in units of the inputs' square.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steep._layers import find_layers
from steep.apply import handle
from steep.method import Method, Paper, log_uniform
from steep.per_example.convolution import pad
from steep.utils.validation import check_ranges, require

CHUNK = 2**22
"""Elements of patches that are unfolded at a time."""

FORWARDS = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class TrAct:
    """Gradient of the first layer's weight as if its outputs were trained: faint inputs count as much as strong ones.

    A handle on a model, which it changes in place: layer and parameters remain the same objects under the same names,
    and outputs the same numbers. Any loss, backward rule and optimizer follow; `remove()` takes it away.

    The gradient is as linear in the loss as the ordinary one: a summed loss gives b times that of a mean. What is
    accumulated from several batches, or averaged over the processes of DDP, is each made with its own batch's inputs.
    Weight decay counts differently against it, as the gradient's size is another. Not for `nn.DataParallel`.

    Args:
        model: holds the layer.
        lam: regularisation λ, in units of the inputs' square, in (0, inf). Default 0.1 (the paper's, for standardised
            inputs). Towards infinity, λ times the gradient is the ordinary one.
        layer: name of a Linear or convolution in the model ("" for the model itself). By default the first of them
            that a forward pass reaches, found when it does.

    Attributes:
        layers: what is changed, by name: one layer; before the first forward pass, all that may turn out to be it.

    Raises:
        ValueError: `lam` out of range; no layer of that name, or none at all.

    Warns:
        UserWarning: the layer's input requires a gradient, so it is learned and no data. Where an input does for
            another reason (a penalty on its gradient), derivatives through it are the ordinary ones.

    Paper: arXiv 2410.23970.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
        >>> tract = TrAct(model, lam=1.0)
        >>> model(torch.tensor([[1.0, 0.0], [0.0, 3.0]])).sum().backward()  # the ordinary gradient is (1, 3)
        >>> model[0].weight.grad
        tensor([[0.6667, 0.5455]])
        >>> tract.remove()
    """

    def __init__(self, model: nn.Module, lam: float = 0.1, layer: str | None = None):
        check_ranges({"lam": lam}, {"lam": "(0, inf)"})
        self.lam, self.layers = float(lam), _candidates(model, layer)
        for name, module in self.layers.items():
            vars(module)["forward"] = partial(self._forward, name)

    def _forward(self, name: str, input: Tensor) -> Tensor:
        """In the place of the layer's own."""
        layer = self.layers[name]
        if len(self.layers) > 1:  # the first layer that is reached is the one: the others become ordinary again
            _restore({other: v for other, v in self.layers.items() if other != name})
            self.layers = {name: layer}
        weight = layer.weight
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return _outputs(layer, input, weight)
        attached = input.requires_grad  # the input's gradient may be differentiated again: it must know the weight
        if attached:
            _warn(name)
        z = _outputs(layer, input, weight if attached else weight.detach())
        return _Taught.apply(z, weight, input, layer, self.lam, attached)

    def remove(self) -> None:
        """Give the layer its ordinary gradient back."""
        _restore(self.layers)
        self.layers = {}

    def __repr__(self) -> str:
        return f"TrAct(lam={self.lam}, layers={list(self.layers)})"


def _candidates(model: nn.Module, layer: str | None) -> dict[str, Any]:
    """The layers, by name, whose forward is torch's own; or the one that is asked for."""
    found = find_layers(model, lambda module: getattr(module.forward, "__func__", None) in FORWARDS)
    known = bool(found) if layer is None else layer in found
    names = ", ".join(map(repr, found)) or "there is none"
    require("layer", layer, known, f"a Linear or Conv1d, 2d or 3d layer of the model, with torch's forward: {names}")
    return found if layer is None else {layer: found[layer]}


def _restore(layers: Mapping[str, nn.Module]) -> None:
    for layer in layers.values():
        vars(layer).pop("forward", None)


def _warn(name: str) -> None:
    warnings.warn(
        f"TrAct is for a first layer, whose inputs are data, but the input of {name!r} requires a gradient: name the "
        "first layer in layer=...",
        stacklevel=2,
    )


def _outputs(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    return layer._conv_forward(x, weight, layer.bias)


class _Taught(torch.autograd.Function):
    """The outputs as they are, whose gradient goes to the weight by the formula.

    Where the outputs are attached to the weight, its ordinary gradient comes that way and is subtracted here.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, weight: Tensor, x: Tensor, layer: nn.Module, lam: float, attached: bool) -> Tensor:
        return z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, weight, x, ctx.layer, ctx.lam, ctx.attached = inputs
        ctx.mark_dirty(z)  # not a view of it, which could not be followed by an in-place activation
        ctx.save_for_backward(x)
        ctx.dtype = weight.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (g,), found = ctx.saved_tensors, grads, None
        if ctx.needs_input_grad[1]:
            with torch.autocast(g.device.type, enabled=False):
                precise = torch.promote_types(ctx.dtype, torch.float32)
                found = _weight_gradient(ctx.layer, x.to(precise), g.to(precise), ctx.lam, less=ctx.attached)
        return g, None if found is None else found.to(ctx.dtype), None, None, None, None


def _weight_gradient(layer: Any, x: Tensor, g: Tensor, lam: float, *, less: bool = False) -> Tensor:
    """The gradient of a Linear's or convolution's weight, in the shape of the weight.

    Args:
        layer: whose settings are used.
        x: its inputs.
        g: gradient of its outputs, in their shape.
        lam: λ > 0.
        less: subtract the ordinary gradient.
    """
    sample = 1 if isinstance(layer, nn.Linear) else 1 + len(layer.kernel_size)
    x, g = (t.reshape(-1, *t.shape[t.ndim - sample :]) for t in (x, g))
    positions, n = prod(g.shape[2:]), prod(layer.weight.shape[1:])
    rows = len(g) * positions
    if rows < n:  # the smaller of the two systems
        a, d = _rows(layer, x, g)
        return (_solved(a @ a.mT / rows, lam, d, less).mT @ a).reshape(layer.weight.shape)
    step = max(1, CHUNK // (n * positions * getattr(layer, "groups", 1)))
    squares: Any = 0
    products: Any = 0
    for some, theirs in zip(x.split(step), g.split(step), strict=True):
        a, d = _rows(layer, some, theirs)
        squares, products = squares + a.mT @ a, products + a.mT @ d
    return _solved(squares / rows, lam, products, less).mT.reshape(layer.weight.shape)


def _solved(gram: Tensor, lam: float, right: Tensor, less: bool) -> Tensor:
    """``(gram + λI)⁻¹ right``, perhaps less `right`; NaN if the matrix is not finite, or λ lost in its rounding."""
    shifted = gram + lam * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    found = torch.where(failed[..., None, None] == 0, torch.cholesky_solve(right, factor), torch.nan)
    return found - right if less else found


def _rows(layer: Any, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """What each output position sees (groups, rows, n), and its gradient (groups, rows, m)."""
    if isinstance(layer, nn.Linear):
        return x[None], g[None]
    d = g.flatten(2).unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    return _patches(layer, x), d


def _patches(layer: nn.modules.conv._ConvNd, x: Tensor) -> Tensor:
    """What each output position sees of x, (N, c, *extents): (groups, N * positions, c / groups * kernel).

    Rows are in the order of examples, then positions; columns in that of the weight's.
    """
    x, dims = pad(layer, x).unflatten(1, (layer.groups, -1)), len(layer.kernel_size)
    for i, (kernel, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(3 + i, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
    x = x.movedim(2, 2 + dims).flatten(2, 1 + dims).flatten(3)  # (N, groups, positions, n)
    return x.transpose(0, 1).flatten(1, 2)


method = Method(
    id="tract",
    paper=Paper("TrAct: Making First-layer Pre-Activations Trainable", arxiv="2410.23970", year=2024),
    changes="backward",
    good_for={"better", "faster"},
    make=TrAct,
    apply=partial(handle, make=TrAct),  # a handle of the model's layer
    search_space={"lam": log_uniform(0.03, 0.3)},
    test_values={"layer": "5"},  # a later layer of the checks' network
    wraps=True,
    formula="W.grad = g'x (x'x/b + lam I)^-1,  g = dL/dz of the first layer's outputs z = x W'",
)

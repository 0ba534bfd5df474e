"""The engine: watches a model's layers, and turns a vector of losses into the rows of its Jacobian."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steep.per_example._graph import trace
from steep.per_example._mixing import refuse_mixing
from steep.per_example._recording import Call, Entrance, Recorder, recorded_layers
from steep.per_example._uses import assemble
from steep.per_example.parts import Part
from steep.per_example.rows import Rows
from steep.requires import REQUIREMENTS, UnmetRequirement
from steep.utils.validation import require_tensors

_TOLERANCE = 1e-3
"""Largest relative difference from an ordinary backward that the check of the first batch accepts in float32."""
_NOTHING_TRAINS = "losses depend on no parameter that trains (all frozen, or the forward ran under no_grad)"


class PerExample:
    """Per-example gradients of any model, without the B x P matrix, for about the price of one more backward.

    Closed forms cover Linear, convolutions and transposed ones in 1 to 3 dimensions, the norms (Layer, RMS, Group,
    Instance, and Batch in evaluation mode), Embedding and EmbeddingBag, MultiheadAttention, and RNN, LSTM and GRU,
    tied and reused weights among them. Other layers are differentiated one example at a time, and parameters used
    outside layers cost one backward per example. The rows are exact: on the first batch (and when a layer's output
    fits the batch after it had not) a weighted sum of them is compared with an ordinary backward, and parameters that
    differ are left to autograd from then on.

    What belongs to a forward hangs on its graph, so any number of forwards may come before the rows of one, or of
    losses that depend on several. Segments checkpointed with ``use_reentrant=False`` are right, but the inputs of their
    layers are kept. A compiled model is compiled in pieces, between the layers; a part of it that had run before the
    engine was made is left to autograd.

    Args:
        model: the model. Hooks are put on its layers, and taken away by `remove()` or with this object.
        check: compare the first batch with an ordinary backward.
        independent: refuse losses that depend on other examples than their own (BatchNorm in training mode; softmax,
            mean or products over the batch). The check finds them where a first layer is called with (a view of) the
            model's own input; elsewhere it warns, and rows are exact. Statistics that are detached count as constants.
            ``False`` takes the vector of losses as it is, such as residuals of an equation on a grid: rows are exact,
            but what is mixed is left to autograd.

    Attributes:
        left_to_autograd: names of parameters whose layers' records proved wrong.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> engine = PerExample(model)
        >>> losses = model(torch.randn(5, 3)).square().squeeze(1)
        >>> rows = engine.rows(losses)
        >>> rows.gram().shape, rows.norms().shape
        (torch.Size([5, 5]), torch.Size([5]))
    """

    def __init__(self, model: nn.Module, *, check: bool = True, independent: bool = True):
        if not (check or independent):
            raise ValueError("independent=False needs check=True: the check finds which layers are mixed")
        _refuse_wrappers(model)
        self.model, self.independent = model, independent
        self.left_to_autograd: set[str] = set()
        self._check = self._unchecked = check
        self._unfit: set[str] = set()
        self._shared: set[str] = set()
        self._key = object()  # several engines may watch one model: each finds its own records on the graph
        entrance = Entrance()
        handles = [
            model.register_forward_pre_hook(entrance, with_kwargs=True),
            *(
                layer.register_forward_hook(Recorder(name, self._key, entrance), with_kwargs=True)
                for name, layer in recorded_layers(model)
            ),
            model.register_forward_hook(entrance, with_kwargs=True),  # after that of a model that is a layer itself
        ]
        self.remove = weakref.finalize(self, _remove_all, handles)

    def __reduce__(self) -> Any:
        return _remade, (self.model, self._check, self.independent, self.left_to_autograd)

    def rows(self, losses: Tensor, *, retain_graph: bool = False) -> Rows:
        """The rows of the Jacobian of `losses` with respect to the parameters that train, one per loss.

        Args:
            losses: from a forward pass of the model; each entry depends on its own example only. Shape (B,), or (B, R)
                for R losses, residuals or outputs of each example: then there are B R rows, and row b R + r is that of
                ``losses[b, r]``. What the R rows of an example share, such as the inputs of linear layers, is held
                once, and all R columns take one batched backward where their operations allow it.
            retain_graph: keep the graph for another call, as in `torch.autograd.grad`.

        Raises:
            ValueError: losses of another shape, or that depend on nothing that trains.
            UnmetRequirement: a BatchNorm layer in training mode, another operation that mixes examples, or a segment
                checkpointed with ``use_reentrant=True``.
            RuntimeError: inputs or parameters of a layer were changed since the forward.
        """
        _check_losses(losses)
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters() if p.requires_grad}
        found = trace(losses, self._key, lambda call: self._accepts(call, len(losses), names), names)
        self._expect({names[p] for value in found.broadcasts for p in value.params})
        outside = found.outside(names, self.left_to_autograd)
        # the check and what is left to autograd take backwards of their own after this one
        keep = retain_graph or self._unchecked or bool(outside)
        parts = found.collect(losses, keep=keep, last=not retain_graph)
        rows = assemble(parts, names, outside, losses)
        if not rows.parts:
            raise ValueError(_NOTHING_TRAINS)
        # None where gradients are not finite: nothing is known then, and the next batch is checked instead
        wrong = _differing(rows, losses, found.eps) if self._unchecked else None
        if wrong is None:
            return rows
        if self.independent and wrong | outside:
            refuse_mixing(losses, self._key)
        self._unchecked = False
        self.left_to_autograd |= {names[p] for p in wrong}
        _warn([name for p, name in names.items() if p in outside | wrong], found.lengths - {len(losses)}, len(losses))
        return assemble(parts, names, outside | wrong, losses) if wrong else rows

    def _expect(self, shared: set[str]) -> None:
        """Parameters of values that seem to be shared by the examples, perhaps for the first time: check again."""
        self._unchecked |= self._check and not shared <= self._shared
        self._shared |= shared

    def _accepts(self, call: Call, batch: int, names: dict[Tensor, str]) -> bool:
        """Whether a record is usable. Outputs that fit the batch after all may do so by accident: check again."""
        if call.couples and not self.independent:
            return False
        if call.couples:
            raise UnmetRequirement(
                "per-example gradients need examples that do not influence each other's outputs, but "
                f"{call.name} ({type(call.layer).__name__}) is in training mode: "
                f"{REQUIREMENTS['independent_examples'].remedy}"
            )
        trained = {names[p] for p in call.params if p in names}
        if trained & self.left_to_autograd:
            return False
        if not call.holds(batch):
            self._unfit |= trained
            return False
        self._unchecked |= self._check and bool(trained & self._unfit)
        self._unfit -= trained
        return True


def _remade(model: nn.Module, check: bool, independent: bool, left_to_autograd: set[str]) -> PerExample:
    """An engine of a copied or loaded model."""
    engine = PerExample(model, check=check, independent=independent)
    engine.left_to_autograd = left_to_autograd
    return engine


def _remove_all(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _refuse_wrappers(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"per-example gradients need the model itself, an nn.Module, got {model!r}")
    for module in model.modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise ValueError("DataParallel runs copies of the layers: use DistributedDataParallel, one process per GPU")


def _check_losses(losses: Tensor) -> None:
    require_tensors(losses=losses)
    if losses.ndim not in (1, 2) or losses.numel() == 0 or not losses.is_floating_point():
        raise ValueError(
            "losses must be a floating-point tensor of shape (B,) with one entry per example, or (B, R) with several, "
            f"got shape {tuple(losses.shape)} and {losses.dtype}: {REQUIREMENTS['losses'].remedy}"
        )
    if losses.grad_fn is None:
        raise ValueError(_NOTHING_TRAINS)


def _warn(slow: list[str], lengths: set[int], batch: int) -> None:
    """Args: lengths: of batches that the model was given, other than that of the losses."""
    if slow:
        odd = f" (the model was called with {min(lengths)} examples for {batch} losses)" if lengths else ""
        warnings.warn(
            f"each step takes one more backward per example for {', '.join(slow[:5])}{', ...' if slow[5:] else ''}: "
            "used outside layers, by layers that no rule describes, before the model was watched, or where examples "
            f"influence each other{odd}",
            stacklevel=3,
        )


def _differing(rows: Rows, losses: Tensor, eps: float) -> set[Tensor] | None:
    """Parameters for which a weighted sum of the rows is not what autograd finds; `None` if that is not finite.

    Args:
        eps: rounding of the types that were computed in.
    """
    # unequal weights, none near zero: rows in a wrong order do not pass, and no row is left out
    w = torch.linspace(0.5, 1.5, losses.numel(), dtype=losses.dtype, device=losses.device)
    gradients = torch.autograd.grad(losses, rows.params, w.view_as(losses), retain_graph=True, allow_unused=True)
    expected = {p: torch.zeros_like(p) if g is None else g for p, g in zip(rows.params, gradients, strict=True)}
    total = sum(g.double().square().sum().item() for g in expected.values()) ** 0.5
    if not total < float("inf"):
        return None
    found = {p: g for part in rows.parts for p, g in _weighted(part, w)}
    eps = max(eps, torch.finfo(losses.dtype).eps)
    # the absolute share is for parameters whose gradients cancel to nearly nothing
    relative, absolute = max(_TOLERANCE, eps**0.5), 10 * eps * total
    allowed = {p: relative * g.double().norm().item() + absolute for p, g in expected.items()}
    return {p for p, g in expected.items() if _distance(found.get(p), g) > allowed[p]}


def _weighted(part: Part, w: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
    try:
        return list(zip(part.params, part.vjp(w), strict=True))
    except Exception:  # whatever a layer without a rule raises under vmap; its parameters then differ
        return []


def _distance(found: Tensor | None, expected: Tensor) -> float:
    return (expected if found is None else found - expected).double().norm().item()

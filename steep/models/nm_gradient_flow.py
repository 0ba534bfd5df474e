"""N:M sparsity whose gradient flow to pruned weights fades over the training run (MdGf, SdGf).

In every group of M consecutive weights along the input dimension the N largest magnitudes are kept; the others count
with a factor that decays from 1 to 0 (mask decay), or the pattern tightens in stages (structure decay). Per layer,
with latent weights W of shape (out, in), their binary N:M mask ``M(W)`` of the same shape, and t the optimizer steps
since sparsification began:

    W~ = W * G,    G = M + D(t) (1 - M),    D(t) = exp(-rate t)  or  max(0, 1 - rate t)  or  0
    dW = dW~ * G  (flow="masked", the product's gradient)  or  dW~  (flow="ste"),    plus sr_decay (1 - M) W

Paper: Bambhaniya et al., arXiv 2402.04744 (first in arXiv 2209.07617); SR-STE: Zhou et al., arXiv 2102.04010. Defaults:
`dense_fraction` is that of the authors' ViT configuration (no dense phase); their fine-tuning phase is empty there and
10 % here, since the binary mask must have been trained with before it is used. Their decay rates (1e-4 to 8e-4 per
step) belong to the length of their training, so `rate` follows the horizon: D falls to 0.01 after 70 % of the
sparsification. SR-STE's `sr_decay` is 2e-4.

Unsure: the paper's text restricts the gradient (here "masked"), its released code passes it whole in every recipe
(here "ste"); which one made its tables is not known. The geometric sequence starts at 8N:8M as in the paper; the code
also knows one from 16N:16M. The code gives the stages of structure decay log2(M/N) equal times and leaves the last to
fine-tuning; here, as in the text, all log2(M/N) + 1 have equal times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steep._layers import WEIGHTED, Layers, choose_layers, find_layers
from steep.method import Method, Paper, choice, uniform
from steep.models._handle import ParametrizedWeights
from steep.utils.validation import require, require_whole

SCHEDULES = (
    "mask-decay-exponential",
    "mask-decay-linear",
    "structure-decay-stepwise",
    "structure-decay-geometric",
    "constant",
    "static",
    "dense",
)
FLOWS = ("masked", "ste")
FADED, FADED_AFTER = 0.01, 0.7  # by default D(t) is 0.01 after 70 % of the sparsification


class Phase(NamedTuple):
    """What is in force at a step: in each group of m, n weights count fully and the others by the factor `decay`."""

    n: int
    m: int
    decay: float


@dataclass(frozen=True)
class _Schedule:
    """The phase after t optimizer steps: dense before `start`, n:m with a binary mask from `end` on."""

    kind: str
    n: int
    m: int
    start: int
    end: int
    rate: float

    def __call__(self, t: int) -> Phase:
        if t < self.start or self.kind == "dense":
            return Phase(self.m, self.m, 0.0)
        if t >= self.end:
            return Phase(self.n, self.m, 0.0)
        stages = self.stages
        stage = (t - self.start) * len(stages) // (self.end - self.start)
        return Phase(*stages[stage], self.decay(t - self.start))

    @property
    def stages(self) -> list[tuple[int, int]]:
        """The patterns N:M, one after the other, each for the same time."""
        n, m = self.n, self.m
        if self.kind == "structure-decay-stepwise" and n < m:
            halvings = (m // n).bit_length() - 1
            return [(m - 1, m), *((m >> i, m) for i in range(1, halvings)), (n, m)]
        if self.kind == "structure-decay-geometric":
            return [(k * n, k * m) for k in (8, 4, 2, 1)]
        return [(n, m)]

    def decay(self, t: int) -> float:
        """D(t), t steps after the start."""
        if self.kind == "mask-decay-exponential":
            return math.exp(-self.rate * t)
        return max(0.0, 1.0 - self.rate * t) if self.kind == "mask-decay-linear" else 0.0


def _top_n(size: Tensor, n: int) -> Tensor:
    """Mask of the n largest of each row, the earlier one where two are equal.

    Args:
        size: magnitudes, shape (G, M).

    Returns:
        booleans, shape (G, M), exactly n per row.
    """
    if n == size.shape[1]:
        return torch.ones_like(size, dtype=torch.bool)
    keep = size >= _nth_largest(size, n)
    if int(keep.count_nonzero()) != n * len(size):  # equal magnitudes at the threshold of some rows
        tied = keep.sum(1) != n
        order = size[tied].sort(stable=True, dim=1, descending=True).indices[:, :n]
        keep[tied] = torch.zeros_like(keep[tied]).scatter_(1, order, True)
    return keep


def _nth_largest(size: Tensor, n: int) -> Tensor:
    """Shape (G, 1). By selection sort where that is short: one comparison over all rows at once beats topk 5 times."""
    m = size.shape[1]
    if n == 1:
        return size.amax(1, keepdim=True)
    if n > m - n + 1:
        return -_nth_largest(-size, m - n + 1)
    if n * m > 128:
        return size.topk(n, dim=1, sorted=False).values.amin(1, keepdim=True)
    column = list(size.t().contiguous())
    for i in range(n):
        for j in range(i + 1, m):
            column[i], column[j] = torch.maximum(column[i], column[j]), torch.minimum(column[i], column[j])
    return column[n - 1].unsqueeze(1)


class _Gated(torch.autograd.Function):
    """weight * gate, with the gradient of the chosen flow."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, gate: Tensor, masked: bool, sr_decay: float) -> Tensor:
        return weight * gate

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool, float], output: Tensor) -> None:
        weight, gate, ctx.masked, ctx.sr_decay = inputs
        ctx.save_for_backward(weight, gate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        weight, gate = ctx.saved_tensors
        gradient = grads[0] * gate if ctx.masked else grads[0]
        if ctx.sr_decay:  # also where the gradient is masked: it pulls pruned weights to zero
            mask = gate.floor()  # the gate is 1 where a weight is kept, less elsewhere
            gradient = gradient + ctx.sr_decay * (weight - mask * weight)
        return gradient, None, None, None


class _Gate(nn.Module):
    """Parametrization of one weight: multiplies it by G. The mask and the place in the schedule are buffers."""

    gate: Tensor
    steps: Tensor

    def __init__(self, weight: Tensor, flow: str, sr_decay: float):
        super().__init__()
        self.masked, self.sr_decay = flow == "masked", sr_decay
        self.register_buffer("gate", torch.ones_like(weight, requires_grad=False))
        # -1: at 0 a static mask that starts at once would count as drawn already
        self.register_buffer("steps", torch.tensor(-1, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return _Gated.apply(weight, self.gate, self.masked, self.sr_decay)

    def refresh(self, weight: Tensor, phase: Phase) -> None:
        """G for this phase from the latent weights, grouped over the last dimension of channels-last order."""
        size = weight.detach().abs().movedim(1, -1)
        keep = _top_n(size.reshape(-1, phase.m), phase.n).view(size.shape).movedim(-1, 1)
        # in place: a compiled model goes on with the same tensor
        self.gate.copy_(keep).clamp_(min=phase.decay)


class NMSparsity(ParametrizedWeights):
    """Handle of the N:M sparsity of a model; made by `apply_nm_gradient_flow`.

    Its state (masks, steps taken) is in ``model.state_dict()``.
    """

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module], schedule: _Schedule, flow: str, sr_decay: float):
        super().__init__(layers, lambda weight: _Gate(weight, flow, sr_decay))
        self.model, self.schedule = model, schedule
        self._enter(0)

    @property
    def phase(self) -> Phase:
        """What is in force now."""
        return self.schedule(self.steps)

    def _enter(self, steps: int) -> None:
        frozen = self.schedule.kind == "static" and self.steps >= self.schedule.start
        super()._enter(steps)
        if not frozen:
            for weight in self._latent():
                weight[0].refresh(weight.original, self.schedule(steps))

    def merge(self) -> None:
        """Write the weights of the final phase, strict zeros included, and leave ordinary layers."""
        self._enter(max(self.steps, self.schedule.end))  # before the end weights may be faded, but not zero
        super().merge()

    def sparsity_report(self) -> dict[str, float]:
        """Share of exact zeros in each sparse layer's weight; under "total", theirs in all the model's parameters."""
        zeros = {name: (module.weight == 0) for name, module in self.layers.items()}
        total = sum(parameter.numel() for parameter in self.model.parameters())
        shares = {name: float(zero.double().mean()) for name, zero in zeros.items()}
        return {**shares, "total": sum(int(zero.sum()) for zero in zeros.values()) / total}

    def __repr__(self) -> str:
        s = self.schedule
        return f"NMSparsity({s.n}:{s.m}, {s.kind}, steps={self.steps}, strict from {s.end}, layers={list(self.layers)})"


def apply_nm_gradient_flow(
    model: nn.Module,
    *,
    total_steps: int,
    n: int = 1,
    m: int = 8,
    schedule: str = "mask-decay-exponential",
    dense_fraction: float = 0.0,
    finetune_fraction: float = 0.1,
    rate: float | None = None,
    flow: str = "masked",
    sr_decay: float = 0.0,
    layers: Layers = None,
) -> NMSparsity:
    """Train a model to N:M sparsity while the gradient to pruned weights fades (MdGf, SdGf), in place.

    Only n of every m consecutive weights along the input dimension (of convolutions: in channels-last order, over the
    kernel's positions) are non-zero at the end; of equal magnitudes the earlier is kept. Call ``handle.step()`` after
    each optimizer step; at the end ``handle.merge()`` leaves plain layers with zeros, ``handle.remove()`` the dense
    latent weights. The model stays loadable: masks and place in the schedule are in its `state_dict`.

    The published baselines are settings: static mask, ``schedule="static"``; STE, ``schedule="constant", flow="ste"``;
    SR-STE, the same with ``sr_decay=2e-4``; dense training, ``schedule="dense"``.

    Args:
        model: its weights become latent weights; an optimizer made before or after works.
        total_steps: optimizer steps of the whole training run.
        n, m: the pattern; 1:8 is where the paper's gains begin.
        schedule: "mask-decay-exponential" (the paper's best), "mask-decay-linear", "structure-decay-stepwise"
            (M-1:M, M/2:M, ..., N:M; m must be n times a power of two), "structure-decay-geometric" (8N:8M, 4N:4M,
            2N:2M, N:M), "constant" (N:M throughout), "static" (the mask of the first sparse step), or "dense".
        dense_fraction: share of the steps trained densely first.
        finetune_fraction: share of the steps at the end with the strict pattern.
        rate: decay of the mask's factor D per step; by default such that D is 0.01 after 70 % of the steps between
            dense phase and fine-tuning.
        flow: gradient of the latent weights: "masked" (chain rule: that of pruned ones is multiplied by D) or "ste"
            (whole).
        sr_decay: this times the pruned latent weights is added to their gradient (SR-STE: 2e-4). As published it is
            added once per backward pass: k accumulated passes add it k times, and a loss scale does not scale it.
        layers: which layers: a pattern such as "blocks.*.ffn.*" over module names, or ``layers(name, module)``; by
            default every Linear and convolution that groups of m divide, except the last Linear (the head).
            Embeddings, norms, biases and the fused projection inside `nn.MultiheadAttention` always stay dense.

    Raises:
        ValueError: a value out of range, a chosen layer that the groups do not divide, or no layer at all.

    Paper: "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers" (arXiv 2402.04744).

    Weight decay reaches pruned latent weights too, and an optimizer's momentum moves them after their gradient is
    cut, so masks may change until the end (except "static").

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> sparsity = apply_nm_gradient_flow(model, n=1, m=8, total_steps=20)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(4, 16)).square().mean().backward()
        ...     optimizer.step()
        ...     sparsity.step()
        >>> sparsity.sparsity_report()["0"]
        0.875
        >>> sparsity.merge()
    """
    require("schedule", schedule, schedule in SCHEDULES, f"one of {SCHEDULES}")
    require("flow", flow, flow in FLOWS, f"one of {FLOWS}")
    require_whole("total_steps", total_steps, 1)
    require_whole("m", m, 1)
    require("n", n, isinstance(n, int) and 1 <= n <= m, f"a whole number between 1 and m={m}")
    halving = m % n == 0 and (m // n).bit_count() == 1
    require("m", m, halving or schedule != "structure-decay-stepwise", f"n={n} times a power of two for {schedule!r}")
    require("dense_fraction", dense_fraction, 0 <= dense_fraction < 1, "in [0, 1)")
    rest = 1 - dense_fraction
    require("finetune_fraction", finetune_fraction, 0 <= finetune_fraction <= rest, f"in [0, {rest:g}], what is left")
    require("rate", rate, rate is None or 0 < rate < math.inf, "positive and finite, or None")
    require("sr_decay", sr_decay, 0 <= sr_decay < math.inf, "finite and >= 0")
    start, end = round(dense_fraction * total_steps), total_steps - round(finetune_fraction * total_steps)
    plan = _Schedule(schedule, n, m, start, end, rate or _default_rate(schedule, end - start))
    chosen = _select(model, layers, max(size for _, size in plan.stages))
    return NMSparsity(model, chosen, plan, flow, sr_decay)


def _default_rate(schedule: str, steps: int) -> float:
    fall = 1 - FADED if schedule == "mask-decay-linear" else -math.log(FADED)
    return fall / max(1.0, FADED_AFTER * steps)


def _select(model: nn.Module, layers: Layers, group: int) -> dict[str, nn.Module]:
    """The layers to make sparse, by name; `group` is the largest group of weights on the way."""
    found = find_layers(model, lambda module: isinstance(module, WEIGHTED))
    sizes = {name: module.weight[0].numel() for name, module in found.items()}
    head = [name for name, module in found.items() if isinstance(module, nn.Linear)][-1:]
    divisible = [name for name in found if name not in head and sizes[name] % group == 0]
    description = (
        f"the Linear layers and convolutions (with their inputs per output) {sizes}, by default those that groups of "
        f"{group} divide, except the last Linear"
    )
    chosen = choose_layers(layers, found, default=divisible, description=description)
    for name in chosen:
        if sizes[name] % group:
            raise ValueError(f"layer {name!r}: its {sizes[name]} inputs per output are no multiple of {group}")
    return chosen


method = Method(
    id="nm-gradient-flow",
    paper=Paper(
        "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers", arxiv="2402.04744", year=2024
    ),
    changes="models",
    good_for={"smaller"},
    make=apply_nm_gradient_flow,
    search_space={
        "flow": choice("masked", "ste"),
        "dense_fraction": uniform(0.0, 0.3),
        "finetune_fraction": uniform(0.05, 0.3),
    },
    test_values={"schedule": "structure-decay-stepwise", "rate": 0.5, "layers": "7"},  # 7: the checks' last layer
    wraps=True,
    formula="W~ = W * (M + D(t) (1 - M)), M the n largest |W| of every m inputs, D(t) = exp(-rate t) -> 0",
)

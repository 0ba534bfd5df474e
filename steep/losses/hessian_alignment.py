"""Hessian alignment asks for features on which the classifier's head has the same gradient and the same curvature in
every domain (hospital, camera, year): features that help in only one domain lose their use, others stay.

With n domains of mean losses L_e, the head's p parameters θ, and L̄ the mean of the L_e:

    g_e = ∇_θ L_e                                                   (p,)    ḡ, H̄: gradient and Hessian of L̄
    h_e = H_e g_e = ∇_θ ½|g_e|²               h̄ = H̄ ḡ               (p,)    kind="hgp"
    h_e = 1/R Σ_r z_r ∘ (H_e z_r)             h̄ = mean_e h_e        (p,)    kind="hutchinson", z_r random signs
    h_e = diag H_e                            h̄ = mean_e h_e        (p,)    kind="exact"
    penalty = mean_e [alpha |h_e - sg(h̄)|² + beta |g_e - sg(ḡ)|²]           sg: no gradient through it, if `detach`
    loss = (L̄ + w penalty) / max(1, w)                                      w = 1 for anneal_steps, then `weight`

Hemati, Zhang, Estiri, Chen: Understanding Hessian Alignment for Domain Generalization (arXiv 2308.11778). alpha, beta
and the number of probes are those of the authors' DomainBed code, which detaches and does not anneal. Its ranges
of search are the entry's. Their ColoredMNIST scripts: alpha = beta = 1, detach=False, anneal_steps=190, weight 91257.19
(from IRM's code), and Adam at 4.9e-4 on full batches.

Only the head and the loss are differentiated more than once: features may have no second derivative.

What differs, and why:
- The authors estimate diag H̄ by R more probes of L̄; it is the mean of the domains' estimates, which exist already.
- They take H g from the gradient of |g| and add 1e-16 to it; that of ½|g|² needs no such guard where g = 0.
- Their ColoredMNIST scripts sum over the domains: set alpha = beta = n. They also add 1.1e-3 |all weights|² to L̄,
  before the division by w: add it to what this loss returns, divided by ``max(1, loss.penalty_weight)``.
- `detach` matters for "hgp" alone: deviations from their own mean sum to zero, and with them the gradient through it.
- "exact" is not the authors': it costs p products, and has none of the noise of the probes, which Hutchinson's penalty
  would like to see small too (its expectation holds their variance, the squares of H's other entries over R).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steep.linalg import rademacher
from steep.method import Method, Paper, choice, log_uniform
from steep.utils.validation import check_ranges, require, require_whole

KINDS = ("hgp", "hutchinson", "exact")
TWICE = "the head and the loss must be twice differentiable by the head's parameters"


class HessianAlignment(nn.Module):
    """Mean loss of the domains, plus how far the head's gradients and Hessians differ from one domain to another.

    A loss of the whole batch (0-d): `loss(model(x), y, domains=...)`. Where each domain has a loader of its own, add
    `penalty` of their mean losses instead. Call `step` once after each optimizer step. Without gradients it is the
    plain losses, one per example. Batches must hold two domains at least; those without one of the others align the
    rest. Tune on a domain that is not trained on: validation data from the training domains speak against any penalty.

    Args:
        head: layer(s) from features to outputs; its parameters are looked at, not owned.
        loss: ``loss(output, target) -> (B,)``, three times differentiable by the output.
        generator: draws the signs of "hutchinson"; its state is in the `state_dict`.
        kind: "hgp" (products of Hessian and gradient; the cheapest), "hutchinson" (estimated diagonals) or "exact"
            (diagonals by p products, for heads of some hundred parameters).
        alpha: weight of the curvatures, >= 0. Default 1e-4, the authors' for "hgp" (1e-3 for "hutchinson").
        beta: weight of the gradients, >= 0. Default 5e-3, the authors' for both.
        probes: R of "hutchinson", >= 1. Default 300, the authors' (150 on ColoredMNIST). All products are made at once,
            5 to 20 times as fast as one by one; memory grows with R times (p plus the size of the outputs) either way.
        detach: whether the mean is a constant for the gradient (DomainBed code), or not (ColoredMNIST code).
        weight: w of the penalty after `anneal_steps`, >= 0; above 1 the whole loss is divided by it.
        anneal_steps: steps at the start for which w is 1, >= 0.

    Raises:
        ValueError: an argument out of range, a head without trainable parameters or outside the loss's graph, fewer
            than two domains, shapes that are not (B,), or a head or loss without a second derivative.
        TypeError: no `domains` while gradients are on.

    Paper: arXiv 2308.11778.

    Example:
        >>> model, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.tensor([0, 1, 0, 1, 0, 1])
        >>> cross_entropy = nn.CrossEntropyLoss(reduction="none")
        >>> loss = HessianAlignment(model[-1], cross_entropy, torch.Generator(), alpha=1.0, beta=1.0)
        >>> domains = torch.tensor([0, 0, 0, 1, 1, 1])
        >>> loss(model(torch.randn(6, 3)), y, domains=domains).backward()  # then optimizer.step(), loss.step()
        >>> model[0].weight.grad.shape
        torch.Size([4, 3])
    """

    requires = frozenset({"domains", "model"})

    def __init__(
        self,
        head: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        generator: torch.Generator,
        *,
        kind: str = "hgp",
        alpha: float = 1e-4,
        beta: float = 5e-3,
        probes: int = 300,
        detach: bool = True,
        weight: float = 1.0,
        anneal_steps: int = 0,
    ):
        super().__init__()
        require("kind", kind, kind in KINDS, f"one of {', '.join(KINDS)}")
        weights = {"alpha": alpha, "beta": beta, "weight": weight}
        check_ranges(weights, dict.fromkeys(weights, "[0, inf)"))
        require_whole("probes", probes, 1)
        require_whole("anneal_steps", anneal_steps, 0)
        self.theta = tuple(p for p in head.parameters() if p.requires_grad)  # in a tuple: not of this module's own
        if not self.theta:
            raise ValueError(f"the head ({type(head).__name__}) has no parameter that trains")
        self.loss, self.generator, self.kind, self.probes, self.detach = loss, generator, kind, probes, detach
        self.alpha, self.beta, self.weight, self.anneal_steps, self.steps = alpha, beta, weight, anneal_steps, 0
        self._first = True

    @property
    def penalty_weight(self) -> float:
        """w, at the present step."""
        return self.weight if self.steps >= self.anneal_steps else 1.0

    def forward(self, output: Tensor, target: Tensor, *, domains: Tensor | None = None) -> Tensor:
        """The loss, 0-d, of outputs (B, ...), targets (B, ...) and the domain of each example, integers (B,)."""
        losses = self.loss(output, target)
        if not torch.is_grad_enabled():
            return losses
        if domains is None:
            raise TypeError("HessianAlignment needs loss(output, target, domains=...): the domain of each example")
        each, w = by_domain(losses, domains), self.penalty_weight
        return (torch.stack(each).mean() + w * self.penalty(each)) / max(1.0, w)

    def penalty(self, losses: Sequence[Tensor]) -> Tensor:
        """The penalty alone, 0-d, not weighted by w.

        Args:
            losses: mean loss of each domain, 0-d, with the head in their graphs.
        """
        if len(losses) < 2:
            raise ValueError(f"losses of {len(losses)} domain(s): there must be at least two to align")
        gradients = torch.stack([self._gradient(loss) for loss in losses])
        self._once(gradients)
        curvatures = torch.stack([self._curvature(g) for g in gradients])
        mean = gradients.mean(0)
        # the Hessian of the mean loss times its gradient is not the mean of the products
        mean_curvature = self._curvature(mean) if self.kind == "hgp" else curvatures.mean(0)
        return self.alpha * self._spread(curvatures, mean_curvature) + self.beta * self._spread(gradients, mean)

    def step(self) -> None:
        """Count an optimizer step."""
        self.steps += 1

    def _once(self, gradients: Tensor) -> None:
        """At the first call, refuse a graph cut by @once_differentiable, which autograd may take for flat."""
        if self._first and _ends_in_an_error(gradients):
            raise ValueError(f"{TWICE}: a function in them is marked with @once_differentiable")
        self._first = False

    def _spread(self, each: Tensor, mean: Tensor) -> Tensor:
        """Mean squared distance of the rows of (n, p) from (p,)."""
        return (each - (mean.detach() if self.detach else mean)).square().sum(1).mean()

    def _gradient(self, loss: Tensor) -> Tensor:
        if loss.ndim or not loss.requires_grad:
            raise ValueError(f"each domain's loss must be 0-d and depend on the head, got {loss!r}")
        parts = torch.autograd.grad(loss, self.theta, create_graph=True, allow_unused=True)
        return torch.cat([self._in_graph(part, p).flatten() for part, p in zip(parts, self.theta, strict=True)])

    def _in_graph(self, gradient: Tensor | None, parameter: Tensor) -> Tensor:
        if gradient is None:
            raise ValueError(
                f"the head's parameter of shape {tuple(parameter.shape)} is not in the graph of a domain's loss: give "
                "the head of the very model that made the outputs, and no parameter that it does not use"
            )
        return gradient

    def _curvature(self, gradient: Tensor) -> Tensor:
        """h of a domain, (p,), from its gradient."""
        if self.kind == "hgp":
            return self._times(gradient, gradient)
        p = len(gradient)
        if self.kind == "exact":
            z = torch.eye(p).to(gradient)
            return (z * self._times(gradient, z)).sum(0)
        z = rademacher(self.probes * p, self.generator).view(self.probes, p).to(gradient)
        return (z * self._times(gradient, z)).mean(0)

    def _times(self, gradient: Tensor, v: Tensor) -> Tensor:
        """H v for one vector (p,), or each row of (R, p)."""
        if not gradient.requires_grad:  # the loss is linear in the head, and the features do not train
            return torch.zeros_like(v)
        try:
            parts = torch.autograd.grad(
                gradient, self.theta, v, create_graph=True, allow_unused=True, is_grads_batched=v.ndim == 2
            )
        except RuntimeError as error:
            if "is not implemented" in str(error):
                raise ValueError(f"{TWICE}: {error}") from error
            raise
        rows = v.shape[:-1]
        found = zip(parts, self.theta, strict=True)  # None where the loss is linear
        return torch.cat([v.new_zeros(*rows, p.numel()) if h is None else h.reshape(*rows, -1) for h, p in found], -1)

    def get_extra_state(self) -> dict[str, Any]:
        return {"steps": self.steps, "generator": self.generator.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.generator.set_state(state["generator"])

    def extra_repr(self) -> str:
        schedule = f"weight={self.weight}, anneal_steps={self.anneal_steps}"
        return f"kind={self.kind!r}, alpha={self.alpha}, beta={self.beta}, {schedule}, parameters={len(self.theta)}"


def _ends_in_an_error(tensor: Tensor) -> bool:
    """Whether its graph is cut anywhere by a node that would raise if autograd came to it."""
    waiting, seen = [tensor.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            if node.name() == "torch::autograd::Error":
                return True
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return False


def by_domain(losses: Tensor, domains: Tensor) -> list[Tensor]:
    """Mean losses, 0-d, of each domain of a batch, in the order of their numbers.

    Args:
        losses: of the examples, (B,).
        domains: of the examples, integers, (B,).
    """
    if losses.ndim != 1 or domains.shape != losses.shape or domains.is_floating_point():
        raise ValueError(
            "losses and integer domains must both have shape (B,), "
            f"got {tuple(losses.shape)} and {domains.dtype} {tuple(domains.shape)}"
        )
    domains = domains.to(losses.device)
    present = domains.unique().tolist()
    if len(present) < 2:
        raise ValueError(
            f"the batch holds examples of domain(s) {present} only, two are needed: make it larger, or draw from each"
        )
    return [losses[domains == domain].mean() for domain in present]


method = Method(
    id="hessian-alignment",
    paper=Paper("Understanding Hessian Alignment for Domain Generalization", arxiv="2308.11778", year=2023),
    changes="losses",
    good_for={"domains"},
    make=HessianAlignment,
    search_space={
        "kind": choice("hgp", "hutchinson"),
        "alpha": log_uniform(1e-5, 1e4),
        "beta": log_uniform(1e-3, 1e6),
    },
    performance_flags={"probes", "anneal_steps"},  # without effect at the other defaults: kind "hgp", weight 1
    formula="L + mean_e [alpha |h_e - h|^2 + beta |g_e - g|^2],  h_e = H_e g_e or diag H_e of the head, of domain e",
)

"""The contract of backward rules: checks for every method that turns a vector of losses into ``.grad``.

A rule takes the vector of losses and fills ``.grad``: it adds to what is there, in proportion to `scale`, and leaves
the parameters to the optimizer. So clipping, accumulation and gradient scalers work with every rule.

``method.make(model, ...)`` returns the rule, which is called as ``rule(losses, scale=1.0)``. The settings that are
checked are the defaults and the method's `preset`; ``dataclasses.replace(method, preset=...)`` checks others.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor, nn

from steep.method import Method
from steep.requires import REQUIREMENTS

STEPS, EXAMPLES = 6, 24


class Network(nn.Module):
    """From (B, 6) to (B, 3); one bias is frozen, and one parameter has no part in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.spare = nn.Parameter(torch.ones(2))
        self.second.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


class Subject:
    """A network of its own and the method's rule for it; equal seeds make equal ones."""

    def __init__(self, method: Method, seed: int = 0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = Network().double()
        self.rule = method.make(self.model, **method.preset)
        self.requires = getattr(self.rule, "requires", method.requires)  # a setting may require less than the method

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and positions of the examples of a step."""
        numbers = torch.Generator().manual_seed(step)
        x, y = (torch.randn(EXAMPLES, size, generator=numbers).double() for size in (6, 3))
        return x, y, (torch.arange(EXAMPLES) + EXAMPLES * (step % 3))

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.model(x) - y).square().mean(1)

    def call(self, step: int = 0, x: Tensor | None = None, **options: Any) -> None:
        """Give the rule the losses of a step's batch, or those of other inputs."""
        inputs, y, indices = self.batch(step)
        x = inputs if x is None else x
        if "indices" in self.requires:
            self.rule.indices = indices
        if "closure" in self.requires:
            options["closure"] = lambda: self.losses(x, y)
        self.rule(self.losses(x, y), **options)

    def train(self, first: int, last: int) -> None:
        optimizer = torch.optim.SGD((p for p in self.model.parameters() if p.requires_grad), lr=0.01)
        for step in range(first, last):
            optimizer.zero_grad()
            self.call(step)
            optimizer.step()
            if hasattr(self.rule, "step"):
                self.rule.step()

    def gradients(self) -> list[Tensor]:
        """Of all parameters, those without one as zeros."""
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.model.parameters()]


def gradients(method: Method, step: int = 0, **options: Any) -> list[Tensor]:
    """The gradients that a new rule leaves in a new model."""
    subject = Subject(method)
    subject.call(step, **options)
    return subject.gradients()


def close(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.allclose(g, h, rtol=1e-9, atol=1e-12) for g, h in zip(a, b, strict=True))


def leaves_parameters_alone(method: Method) -> None:
    subject = Subject(method)
    before = [p.detach().clone() for p in subject.model.parameters()]
    subject.call()
    assert all(map(torch.equal, before, subject.model.parameters())), "moves the parameters itself"


def fills_gradients(method: Method) -> None:
    subject = Subject(method)
    subject.call()
    assert any(g.any() for g in subject.gradients()), "leaves every gradient empty"
    for name, p in subject.model.named_parameters():
        if name == "second.bias":
            assert p.grad is None, "gives a frozen parameter a gradient"
        elif name == "spare":
            assert p.grad is None or not p.grad.any(), "gives a parameter that has no part in the losses a gradient"
        else:
            assert p.grad is not None, f"leaves {name} without a gradient"
            assert p.grad.isfinite().all(), f"the gradient of {name} is not finite"
            assert p.grad.any(), f"the gradient of {name} is zero"


def adds_to_gradients(method: Method) -> None:
    subject = Subject(method)
    there = [torch.full_like(p, 0.5) for p in subject.model.parameters()]
    for p, g in zip(subject.model.parameters(), there, strict=True):
        p.grad = g.clone() if p.requires_grad else None
    subject.call()
    found = [p.grad - 0.5 for p in subject.model.parameters() if p.grad is not None]
    wanted = [g for g, p in zip(gradients(method), subject.model.parameters(), strict=True) if p.grad is not None]
    assert close(found, wanted), "does not add to the gradients that are there"


def is_linear_in_its_scale(method: Method) -> None:
    once = gradients(method)
    assert close(gradients(method, scale=0.25), [0.25 * g for g in once]), "scale=0.25 is not a quarter of the gradient"
    plain, scaled = Subject(method), Subject(method)
    for subject, scale in ((plain, 1.0), (scaled, 0.25)):
        subject.call(0, scale=scale)
        subject.model.zero_grad()
        subject.call(1)
    assert close(plain.gradients(), scaled.gradients()), "the scale of one call changes the gradient of the next"


def repeats_itself(method: Method) -> None:
    draw = torch.get_rng_state()
    first = gradients(method)
    assert torch.equal(torch.get_rng_state(), draw), "draws from the global generator"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert all(map(torch.equal, gradients(method), first)), "two new rules give different gradients"


def state_survives_saving(method: Method) -> None:
    whole, half, fresh = Subject(method), Subject(method), Subject(method, seed=1)
    whole.train(0, 2 * STEPS)
    half.train(0, STEPS)
    file = io.BytesIO()
    state = half.rule.state_dict() if hasattr(half.rule, "state_dict") else None
    torch.save({"model": half.model.state_dict(), "rule": state}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh.model.load_state_dict(saved["model"])
    if saved["rule"] is not None:
        fresh.rule.load_state_dict(saved["rule"])
    fresh.train(STEPS, 2 * STEPS)
    assert all(map(torch.equal, whole.model.parameters(), fresh.model.parameters())), (
        "goes on differently after saving and loading"
    )


def copies_go_with_their_copy_of_the_model(method: Method) -> None:
    original = Subject(method)
    original.train(0, 2)
    original.model.zero_grad()
    clone = copy.deepcopy(original)
    if type(original.rule).__repr__ is not object.__repr__:
        assert repr(clone.rule) == repr(original.rule), "its copy reads differently"
    clone.call(2)
    assert any(g.any() for g in clone.gradients()), "a copied rule gives its model no gradients"
    assert not any(g.any() for g in original.gradients()), "a copied rule gives the original's model gradients"
    original.call(2)
    if not hasattr(original.rule, "remove"):  # a copy of layers that are changed in place may be one of ordinary layers
        assert all(map(torch.equal, clone.gradients(), original.gradients())), "a copied rule gives other gradients"


def what_is_not_finite_is_never_silent(method: Method) -> None:
    for value in (torch.nan, torch.inf):
        subject = Subject(method)
        x, _, _ = subject.batch(0)
        x[1, 2] = value
        subject.call(x=x)
        assert not all(g.isfinite().all() for g in subject.gradients()), (
            f"gives finite gradients where an example's input is {value}"
        )


def evaluation_between_steps_changes_nothing(method: Method) -> None:
    plain, evaluated = Subject(method), Subject(method)
    plain.train(0, 3)
    for step in range(3):
        x, y, _ = evaluated.batch(100 + step)
        with torch.no_grad():
            evaluated.losses(x[:5], y[:5])
        evaluated.model.eval()
        evaluated.losses(x[:7], y[:7])
        evaluated.model.train()
        evaluated.train(step, step + 1)
    assert all(map(torch.equal, plain.model.parameters(), evaluated.model.parameters())), (
        "a forward pass for evaluation changes the steps that follow"
    )


def refuses_a_mean_where_it_requires_a_vector(method: Method) -> None:
    if "losses" not in method.requires:
        return
    subject = Subject(method)
    x, y, _ = subject.batch(0)
    scalar = subject.losses(x, y).mean()
    assert REQUIREMENTS["losses"].remedy in _refusal(subject, scalar), "does not say how to keep the losses apart"
    assert "shape" in _refusal(subject, subject.losses(x, y)[:, None, None]), "does not name the shape that it expects"


def _refusal(subject: Subject, losses: Tensor) -> str:
    closure = {"closure": lambda: losses} if "closure" in subject.requires else {}
    try:
        subject.rule(losses, **closure)
    except ValueError as error:
        return str(error)
    kind = "the mean loss" if losses.ndim == 0 else f"losses of shape {tuple(losses.shape)}"
    raise AssertionError(f"accepts {kind}, where it requires one loss per example")


CHECKS = (
    fills_gradients,
    adds_to_gradients,
    is_linear_in_its_scale,
    leaves_parameters_alone,
    repeats_itself,
    state_survives_saving,
    copies_go_with_their_copy_of_the_model,
    what_is_not_finite_is_never_silent,
    evaluation_between_steps_changes_nothing,
    refuses_a_mean_where_it_requires_a_vector,
)

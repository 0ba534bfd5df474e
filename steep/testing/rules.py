"""The contract of backward rules: checks for every rule, ours and anybody's.

A rule takes the vector of losses and fills ``.grad``: it adds to what is there, in proportion to `scale`, and leaves
the parameters to the optimizer. So clipping, accumulation and gradient scalers work with every rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from steep.method import Method

X = torch.linspace(-2, 2, 24).view(6, 4).sin()
Y = torch.tensor([0.3, -1.0, 0.8, 0.1, -0.4, 0.9])


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))


def losses(net: nn.Module) -> Tensor:
    return (net(X).squeeze(1) - Y).square()


def gradient(method: Method, scale: float = 1.0, already: float = 0.0) -> list[Tensor]:
    """What a new rule makes of a new model's losses, added to gradients that are `already` there."""
    net = model()
    rule = method.make(net, **method.preset)
    for p in net.parameters():
        p.grad = torch.full_like(p, already) if already else None
    call(rule, net, scale=scale)
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in net.parameters()]


def call(rule: Any, net: nn.Module, **options: Any) -> None:
    """Call a rule as `fit` does: with a closure where it asks for one."""
    if "closure" in getattr(rule, "requires", ()):
        options["closure"] = lambda: losses(net)
    rule(losses(net), **options)


def fills_gradients(method: Method) -> None:
    assert any(g.abs().sum() > 0 for g in gradient(method)), "leaves every gradient empty"


def adds_to_gradients(method: Method) -> None:
    for fresh, added in zip(gradient(method), gradient(method, already=3.0), strict=True):
        assert torch.allclose(added, fresh + 3.0, rtol=1e-4, atol=1e-5), "does not add to the gradients that are there"


def is_linear_in_its_scale(method: Method) -> None:
    for one, some in zip(gradient(method), gradient(method, scale=0.25), strict=True):
        assert torch.allclose(some, 0.25 * one, rtol=1e-4, atol=1e-7), "scale=0.25 is not a quarter of the gradient"


def leaves_parameters_alone(method: Method) -> None:
    net, plain = model(), model()
    call(method.make(net, **method.preset), net)
    assert all(map(torch.equal, net.parameters(), plain.parameters())), "moves the parameters itself"


def refuses_a_mean_where_it_requires_a_vector(method: Method) -> None:
    if "losses" not in method.requires:
        return
    net = model()
    rule = method.make(net, **method.preset)
    try:
        rule(losses(net).mean())
    except (ValueError, TypeError):
        return
    raise AssertionError("accepts the mean loss, where it requires one loss per example")


CHECKS = (
    fills_gradients,
    adds_to_gradients,
    is_linear_in_its_scale,
    leaves_parameters_alone,
    refuses_a_mean_where_it_requires_a_vector,
)

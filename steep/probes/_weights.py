"""A model's loss as a function of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

Direction = Mapping[str, Tensor]
Loss = Callable[[Any], Tensor]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters that train, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class _Evaluated(nn.Module):
    """A model's loss as a module, so that `functional_call` can put other weights in."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self) -> Tensor:
        value = self.loss(self.model)
        return value.mean() if value.ndim else value


def mean_loss(model: nn.Module, loss: Loss) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The mean loss as a function of parameters by name; the model's own are never written to."""
    whole = _Evaluated(model, loss)
    return lambda params: functional_call(whole, {f"model.{name}": p for name, p in params.items()}, ())

"""What every optimizer here has in common, so that a method's file holds only what is particular to the method.

An elementwise method derives from `Elementwise` and writes `__init__`, with its defaults, and what is marked below:
`_ranges`, `_state_names`, `_scalars` and `_update`. Any other derives from `BaseOptimizer` and writes `_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import StateDict

from steep.optim._foreach import sweep, working_dtype
from steep.utils.validation import Ranges, check_ranges

NOT_NEGATIVE: Ranges = {"lr": "[0, inf)", "eps": "[0, inf)", "weight_decay": "[0, inf)"}  # as most methods have them


class BaseOptimizer(Optimizer):
    """`torch.optim.Optimizer` with hyper-parameters checked in every group and state loaded in the dtype it was in."""

    _ranges: ClassVar[Ranges]

    def __init__(self, params: Any, defaults: dict[str, Any]):
        if isinstance(params, nn.Module):
            raise TypeError(
                f"{type(self).__name__} takes parameters, got a {type(params).__name__}: model.parameters()"
            )
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check(self, group: Mapping[str, Any]) -> None:
        """Raise `ValueError` for a value that a group must not have."""
        check_ranges(group, self._ranges)

    def load_state_dict(self, state_dict: StateDict) -> None:
        final: list[Mapping[str, Any]] = []  # what the user's own hooks made of state_dict
        hook = self.register_load_state_dict_pre_hook(lambda _, loaded: final.append(loaded))
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            hook.remove()
        ids = chain.from_iterable(group["params"] for group in final[0]["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for i, p in zip(ids, params, strict=True):
            dtype = working_dtype(p.dtype)
            for name, value in final[0]["state"].get(i, {}).items():
                if name != "step" and dtype != p.dtype:  # torch has just cast it to half precision
                    self.state[p][name] = value.to(p.device, dtype)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    def _step(self) -> None:
        """The update of all groups, without gradients."""
        raise NotImplementedError


class Elementwise(BaseOptimizer):
    """An optimizer that updates every element from its own gradient and state alone: see `sweep`."""

    sharding = "any"  # a shard of a parameter steps as it would in the whole

    _state_names: ClassVar[tuple[str, ...]]  # state of the parameter's shape, in the order in which `_update` takes it

    def _names_in(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """The state that a group's options call for."""
        return self._state_names

    @staticmethod
    def _scalars(group: Mapping[str, Any], t: int) -> dict[str, Any]:
        """The numbers and flags that `_update` takes at step t = 1, 2, ..."""
        raise NotImplementedError

    @staticmethod
    def _update(*tensors: Any, **scalars: Any) -> None:
        """``_update(param, grad, *state, **scalars)``, on tensors of one shape, in place; leaves the gradient alone."""
        raise NotImplementedError

    def _step(self) -> None:
        for group in self.param_groups:
            sweep(self, group, self._update, self._names_in(group), partial(self._scalars, group))

"""An optimizer over a recipe's parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from steep.roles import Role, group_parameters
from steep.utils.validation import check_ranges, nearest


def build_in_groups(
    factory: Callable[[Any], Optimizer],
    named: Mapping[str, nn.Parameter],
    roles: Mapping[str, Role],
    options: Mapping[str, Mapping[str, Any]],
) -> Optimizer:
    """``factory(groups)``, with the learning rate of each group scaled by its "lr_scale".

    Raises:
        ValueError: an option that the optimizer does not have, or a learning rate in place of a scale.
    """
    for key, given in options.items():
        if "lr" in given:  # it would stay where `compare` tunes the optimizer's rate
            raise ValueError(f"groups: {key!r} sets lr={given['lr']!r}: write lr_scale, a factor on the optimizer's lr")
        check_ranges({"lr_scale": 1, **given}, {"lr_scale": "(0, inf)"})
    optimizer = factory(group_parameters(named, roles, options))
    known = {*optimizer.defaults, *(["lr_scale"] if "lr" in optimizer.defaults else [])} - {"lr"}
    for name in (name for given in options.values() for name in given):
        if name not in known:
            raise ValueError(f"groups: {type(optimizer).__name__} has no option {name!r}{nearest(name, known)}")
    for group in optimizer.param_groups:
        if "lr_scale" in group:
            group["lr"] = group["lr"] * group["lr_scale"]  # not in place: groups may share a tensor
    return optimizer

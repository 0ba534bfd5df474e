"""Which parameter does what in a model: the split that methods for matrices (Muon, Shampoo) and weight decay need.

Roles follow from the type of the module that owns a parameter, not from what your model calls it:

| role | parameters |
|---|---|
| embedding | weights of `Embedding` and `EmbeddingBag` |
| head | weight of the last `Linear` |
| hidden | every other matrix of `Linear`, `MultiheadAttention`, recurrent layers and `Conv1D` of transformers |
| convolution | weights of convolutions |
| norm | everything in a normalisation layer, its bias too |
| bias | biases of the layers above |
| other | what no rule knows: parameters of your own modules, `PReLU`, `Bilinear`; name them in `overrides` |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from steep._layers import find_layers, is_called
from steep.loop.modes import evaluating
from steep.utils.validation import nearest

Role = Literal["embedding", "head", "convolution", "hidden", "norm", "bias", "other"]
ROLES: tuple[Role, ...] = get_args(Role)  # of a tied parameter's roles the first one counts

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
MATRICES = (nn.Linear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Roles(dict[str, Role]):
    """Parameter name to role; prints as a table."""

    def __init__(self, roles: Mapping[str, Role], notes: Mapping[str, str]):
        super().__init__(roles)
        self._notes = notes

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        rows = (f"{name:{width}}  {role:11}  {self._notes[name]}".rstrip() for name, role in self.items())
        return "\n".join(rows) or "no parameters"


def param_roles(model: nn.Module, *, example: Any = None, overrides: Mapping[str, Role] | None = None) -> Roles:
    """The role of every parameter, frozen ones included, in the order of ``model.named_parameters()``.

    A tied parameter appears once, under its first name. Its role is the first of embedding, head, convolution,
    hidden, norm, bias: a token embedding that is the head as well counts as an embedding, since its rows see as few
    tokens. Of a parametrized weight, the tensor that the weight is made from has the weight's role.

    Args:
        model: any module.
        example: an input to call the model with (a tuple holds several, a mapping holds keyword arguments). The head
            is then the last `Linear` called; without it, the last one defined.
        overrides: role by name or glob pattern, e.g. ``{"blocks.*.gate": "hidden"}``; later patterns win.

    Raises:
        ValueError: an override names no parameter or an unknown role.

    Example:
        >>> from torch import nn
        >>> print(param_roles(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))))
        0.weight  hidden       8 x 4
        0.bias    bias         8
        1.weight  norm         8
        1.bias    norm         8
        2.weight  head         2 x 8
        2.bias    bias         2
    """
    head = last_linear(model) if example is None else _last_called(model, example)
    uses: dict[int, list[tuple[str, Role]]] = {}
    for name, parameter, role in _owned(model, head):
        uses.setdefault(id(parameter), []).append((name, role))
    roles: dict[str, Role] = {}
    notes: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        used = uses[id(parameter)]
        # a tied parameter has a role for each of its uses
        roles[name] = min((role for _, role in used), key=ROLES.index)
        shared = [f"also {other}" for other, _ in used if other != name]
        notes[name] = "  ".join([" x ".join(map(str, parameter.shape)) or "scalar", *shared])
    return Roles(_override(roles, overrides or {}), notes)


def param_groups(
    model: nn.Module, options: Mapping[str, Mapping[str, Any]], *, roles: Mapping[str, Role] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer, by role or by name.

    A parameter gets the options of every key that fits it; later keys win. Frozen parameters are left out.

    Args:
        model: any module.
        options: by role ("norm", "bias", "embedding", ...; see `param_roles`) or glob pattern of names, options of the
            optimizer. A recipe's `groups` take "lr_scale" too, a factor on the optimizer's learning rate.
        roles: of the parameters, by name; `param_roles` of the model unless given.

    Raises:
        ValueError: a key that fits no parameter.
        TypeError: options that are no mapping.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> groups = param_groups(model, {"bias": {"weight_decay": 0}, "norm": {"weight_decay": 0}})
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(1, 0.1), (3, 0)]
    """
    roles = param_roles(model) if roles is None else roles
    return group_parameters(dict(model.named_parameters()), roles, options)


def group_parameters(
    named: Mapping[str, nn.Parameter], roles: Mapping[str, Role], options: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """See `param_groups`; the parameters by name, those without a role of their own are "other"."""
    chosen: dict[str, dict[str, Any]] = {name: {} for name in named}
    for key, given in options.items():
        if not isinstance(given, Mapping):
            raise TypeError(f"groups: {key!r} has {given!r}, which must be a dict of the optimizer's options")
        fitting = [n for n in named if (roles.get(n, "other") == key if key in ROLES else fnmatchcase(n, key))]
        if not fitting:
            there = sorted({roles.get(name, "other") for name in named})
            hint = f"; this model has {', '.join(there)}" if key in ROLES else nearest(key, [*named, *there])
            raise ValueError(f"groups: {key!r} fits no parameter{hint}")
        for name in fitting:
            chosen[name] |= given
    groups: list[dict[str, Any]] = []
    for name, given in chosen.items():
        if not named[name].requires_grad:
            continue
        same = next((group for group in groups if {k: v for k, v in group.items() if k != "params"} == given), None)
        if same is None:
            groups.append(same := {"params": [], **given})
        same["params"].append(named[name])
    return groups


def _owned(model: nn.Module, head: nn.Module | None) -> Iterator[tuple[str, nn.Parameter, Role]]:
    """Every parameter under every name it has, with the role its owner gives it there."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owner, tensor = module, name
            if isinstance(module, ParametrizationList):
                owner, tensor = _parametrized(model, prefix)
                if parameter.numel() < max(p.numel() for p in module.parameters(recurse=False)):
                    tensor = name  # a part beside the weight's own, such as weight_norm's magnitudes
            yield f"{prefix}.{name}".lstrip("."), parameter, _role(owner, tensor, head)


def _parametrized(model: nn.Module, prefix: str) -> tuple[nn.Module, str]:
    """The module and the name of its tensor that the parametrization list at `prefix` makes."""
    path, _, tensor = prefix.rpartition(".")
    return model.get_submodule(path.removesuffix("parametrizations").rstrip(".")), tensor


def _role(owner: nn.Module, tensor: str, head: nn.Module | None) -> Role:
    if isinstance(owner, EMBEDDINGS):
        return "embedding"
    if _is_norm(owner):
        return "norm"
    if not (isinstance(owner, _ConvNd) or _is_matrix(owner)) or not ("weight" in tensor or "bias" in tensor):
        return "other"
    if "bias" in tensor:
        return "bias"
    if isinstance(owner, _ConvNd):
        return "convolution"
    return "head" if owner is head else "hidden"


def _is_norm(module: nn.Module) -> bool:
    """Torch's normalisations, and others by the name of their class (LlamaRMSNorm) if they hold vectors only."""
    if isinstance(module, NORMS):
        return True
    vectors = all(p.ndim <= 1 for p in module.parameters())
    return type(module).__name__.endswith("Norm") and vectors


def _is_matrix(module: nn.Module) -> bool:
    """Torch's linear maps, and GPT-2's in transformers, which is called Conv1D but is a transposed `Linear`."""
    kind = type(module)
    return isinstance(module, MATRICES) or (kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."))


def _linears(model: nn.Module) -> list[nn.Module]:
    """Linear layers that can be a head: not attention's output projection, nor part of a parametrization."""
    return list(find_layers(model, lambda module: isinstance(module, nn.Linear) and is_called(module)).values())


def last_linear(model: nn.Module) -> nn.Module | None:
    """The last linear layer defined in a model, which is the head of most; `None` without any."""
    return next(reversed(_linears(model)), None)


def _last_called(model: nn.Module, example: Any) -> nn.Module | None:
    called: list[nn.Module] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        called.append(module)

    hooks = [module.register_forward_hook(note) for module in _linears(model)]
    try:
        with evaluating(model):
            _call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return called[-1] if called else None


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def _override(roles: dict[str, Role], overrides: Mapping[str, Role]) -> dict[str, Role]:
    for pattern, role in overrides.items():
        if role not in ROLES:
            raise ValueError(f"overrides[{pattern!r}]={role!r} is not a role; roles: {', '.join(ROLES)}")
        names = [name for name in roles if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(f"overrides: {pattern!r} matches no parameter{nearest(pattern, roles)}")
        roles |= dict.fromkeys(names, role)
    return roles

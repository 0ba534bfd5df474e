"""The attention matrices of a model, found by the usual names of their parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn


@dataclass(frozen=True)
class Projection:
    """One matrix: a parameter, or a part of one that holds several side by side.

    Args:
        parameter: its name in the model.
        part: which of the parts, from 0.
        parts: equal parts that the parameter holds along `dim`.
        dim: 0 for torch's Linear; 1 where the weight is stored transposed.
    """

    parameter: str
    part: int = 0
    parts: int = 1
    dim: int = 0

    def of(self, gradient: Tensor) -> Tensor:
        """This matrix' part of the parameter's gradient."""
        return gradient.chunk(self.parts, self.dim)[self.part]


Groups = Mapping[str, Sequence[Projection]]

_FUSED = (("*.in_proj_weight", 0), ("*.qkv.weight", 0), ("*.Wqkv.weight", 0), ("*.c_attn.weight", 1))
"""Queries, keys and values in one parameter (`nn.MultiheadAttention`, ViTs, ModernBERT, GPT-2), by the stacked dim."""
_SINGLE = {
    "q": ("*.q_proj.weight", "*.query.weight", "*.q_lin.weight"),
    "k": ("*.k_proj.weight", "*.key.weight", "*.k_lin.weight"),
    "v": ("*.v_proj.weight", "*.value.weight", "*.v_lin.weight"),
    "o": (
        *("*.o_proj.weight", "*.out_proj.weight", "*.out_lin.weight", "*.attention.output.dense.weight"),
        *("*.attn.c_proj.weight", "*.attn.proj.weight", "*.out.weight"),
    ),
}


def attention_projections(model: nn.Module) -> dict[str, list[Projection]]:
    """Query, key, value and output matrices by the usual names, in the order of the layers.

    Knows Llama, Qwen, Gemma, Mistral, OPT, BERT, DistilBERT, GPT-2, timm's ViTs, `nn.MultiheadAttention` and the tasks
    of steep. Where several query heads share keys and values, those matrices are smaller: compare within a kind.

    Raises:
        ValueError: no kind was found, or kinds with different numbers of layers.
    """
    groups: dict[str, list[Projection]] = {kind: [] for kind in "qkvo"}
    for name, parameter in model.named_parameters():
        dim = next((dim for pattern, dim in _FUSED if fnmatchcase("." + name, pattern)), None)
        # with fewer heads for keys and values than for queries, the three parts are not equal
        if dim is not None and parameter.shape[dim] == 3 * parameter.shape[1 - dim]:
            for part, kind in enumerate("qkv"):
                groups[kind].append(Projection(name, part, 3, dim))
        for kind, patterns in _SINGLE.items():
            if any(fnmatchcase("." + name, pattern) for pattern in patterns):
                groups[kind].append(Projection(name))
    depths = {kind: len(found) for kind, found in groups.items()}
    if len({*depths.values()}) > 1 or not depths["q"]:
        raise ValueError(f"found no regular attention, but {depths} matrices by the usual names: give `groups`")
    return groups


def matching(model: nn.Module, groups: Mapping[str, str | Sequence[Projection]] | None) -> Groups:
    """Groups with patterns looked up; a pattern's matches are in the order of the model's parameters."""
    if groups is None:
        return attention_projections(model)
    names = [name for name, _ in model.named_parameters()]
    found = {
        kind: [Projection(n) for n in names if fnmatchcase(n, given)] if isinstance(given, str) else list(given)
        for kind, given in groups.items()
    }
    for kind, given in groups.items():
        unknown = [p.parameter for p in found[kind] if p.parameter not in names]
        if unknown or not found[kind]:
            raise ValueError(f"groups[{kind!r}]={given!r} must name parameters of the model")
    return found

"""The rule of `nn.MultiheadAttention`: three linear maps of positions, their attention, and a fourth.

The module calls its maps as functions, so what reaches them is found again: the attention alone is run once more, with
projections that change nothing, and differentiated with respect to what was projected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steep.per_example._layers import affine, closed_form, rule_of, trains
from steep.per_example.parts import Dense, Part


def _covers(layer: nn.MultiheadAttention) -> bool:
    own = all(f"{name}_proj_weight" in layer._parameters for name in ("in", "q", "k", "v"))  # not computed by a hook
    return own and rule_of(layer.out_proj) is not None and layer.bias_k is None and not layer.add_zero_attn


@closed_form(
    nn.MultiheadAttention,
    sample_dims=lambda layer: 2,
    batch_dim=lambda layer: 0 if layer.batch_first else 1,
    covers=_covers,
    whole=True,
)
def attention(
    layer: nn.MultiheadAttention, inputs: dict[str, Any], grads: Sequence[Tensor | None], batch: int
) -> Iterator[Part]:
    given = [_time_first(layer, inputs[name]) for name in ("query", "key", "value")]
    weights, biases = _projections(layer)
    projected = [F.linear(x, w, b).requires_grad_() for x, w, b in zip(given, weights, biases, strict=True)]
    with torch.enable_grad():
        mixed, attended = _attend(layer, projected, inputs)
    grad = torch.zeros_like(mixed) if grads[0] is None else _time_first(layer, grads[0])
    outputs, cotangents = [mixed], [grad @ layer.out_proj.weight]
    if len(grads) > 1 and grads[1] is not None:
        outputs, cotangents = [mixed, attended], [*cotangents, grads[1]]
    found = torch.autograd.grad(outputs, projected, cotangents)

    def positions(t: Tensor) -> Tensor:
        return (t.transpose(0, 1) if t.ndim == 3 else t).reshape(batch, -1, t.shape[-1])

    yield from affine(layer.out_proj.weight, layer.out_proj.bias, positions(grad), positions(mixed.detach()))
    yield from _projection_parts(layer, [positions(d) for d in found], [positions(x) for x in given])


def _projections(layer: nn.MultiheadAttention) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """Weights and biases of queries, keys and values."""
    biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    if layer.in_proj_weight is None:
        return (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight), biases
    return layer.in_proj_weight.chunk(3), biases


def _attend(layer: nn.MultiheadAttention, projected: Sequence[Tensor], inputs: dict[str, Any]) -> Any:
    """What comes out before the output projection (time first), and the attention weights if they were asked for."""
    # queries, keys and values are projected already: the identity leaves them as they are
    same = torch.eye(layer.embed_dim, dtype=projected[0].dtype, device=projected[0].device)
    options = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
    forward: Any = F.multi_head_attention_forward
    return forward(
        *projected,
        layer.embed_dim,
        layer.num_heads,
        None,
        None,
        None,
        None,
        False,
        0.0,
        same,
        None,
        use_separate_proj_weight=True,
        q_proj_weight=same,
        k_proj_weight=same,
        v_proj_weight=same,
        **{name: inputs[name] for name in options},
    )


def _time_first(layer: nn.MultiheadAttention, t: Tensor) -> Tensor:
    return t.transpose(0, 1) if layer.batch_first and t.ndim == 3 else t


def _projection_parts(layer: nn.MultiheadAttention, d: Sequence[Tensor], a: Sequence[Tensor]) -> Iterator[Part]:
    if layer.in_proj_weight is not None:
        yield from affine(layer.in_proj_weight, layer.in_proj_bias, *_joined(d, a))
        return
    for weight, d_one, a_one in zip(_projections(layer)[0], d, a, strict=True):
        yield from affine(weight, None, d_one, a_one)
    if trains(layer.in_proj_bias):
        yield Dense((layer.in_proj_bias,), torch.cat([one.sum(1) for one in d], 1))


def _joined(d: Sequence[Tensor], a: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The three maps as one: of the same positions in self-attention, else each of positions of its own."""
    if all(one.shape == a[0].shape and torch.equal(one, a[0]) for one in a[1:]):
        return torch.cat(list(d), 2), a[0]
    width = d[0].shape[2]
    return torch.cat([F.pad(one, (k * width, (2 - k) * width)) for k, one in enumerate(d)], 1), torch.cat(list(a), 1)

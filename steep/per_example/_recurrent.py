"""The rule of `nn.RNN`, `nn.LSTM` and `nn.GRU`: each weight is a linear map whose positions are the steps of time.

What is needed are the gradients of the gates before their nonlinearities. The layer's own kernel gives them when it is
run once more on inputs that are projected already, ``z = W_ih x + b_ih``, with the identity as their projection: the
gradient of z is that of the gates. Only the candidate of a GRU sees its hidden projection through the reset gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _VariableFunctions

from steep.per_example._layers import affine, closed_form
from steep.per_example.parts import Part

KERNELS = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}


class Scan(NamedTuple):
    """One direction of one layer, in the order of its steps: time first.

    Args:
        names: of weight_ih, weight_hh and, where there are some, bias_ih and bias_hh.
        x: inputs, (T, N, i).
        z: projected inputs, (T, N, gates), whose gradients are wanted.
        before: hidden states before each step, (T, N, h).
    """

    names: Sequence[str]
    x: Tensor
    z: Tensor
    before: Tensor


def _covers(layer: nn.RNNBase) -> bool:
    return not layer.proj_size and all(name in layer._parameters for names in layer._all_weights for name in names)


@closed_form(
    nn.RNN,
    nn.LSTM,
    nn.GRU,
    sample_dims=lambda layer: 2,
    batch_dim=lambda layer: 0 if layer.batch_first else 1,
    covers=_covers,
    whole=True,
)
def recurrent(layer: nn.RNNBase, inputs: dict[str, Any], grads: Sequence[Tensor | None], batch: int) -> Iterator[Part]:
    x, hx = inputs["input"], inputs["hx"]
    with torch.enable_grad():
        scans, outputs = run(layer, x, hx)
    given = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    gates = torch.autograd.grad([out for out, _ in given], [scan.z for scan in scans], [grad for _, grad in given])

    def positions(t: Tensor) -> Tensor:
        return t.transpose(0, 1).reshape(batch, -1, t.shape[2])

    for scan, d in zip(scans, gates, strict=True):
        weight_ih, weight_hh, *biases = (getattr(layer, name) for name in scan.names)
        bias_ih, bias_hh = biases or (None, None)
        d_hidden = _through_reset(scan, d, weight_hh, bias_hh) if layer.mode == "GRU" else d
        yield from affine(weight_ih, bias_ih, positions(d), positions(scan.x.detach()))
        yield from affine(weight_hh, bias_hh, positions(d_hidden), positions(scan.before.detach()))


def run(layer: nn.RNNBase, x: Tensor, hx: Any) -> tuple[list[Scan], list[Tensor]]:
    """All scans, from the first layer up, and the layer's outputs: of every step, then the last states."""
    batched = x.ndim == 3
    x = x if batched else x.unsqueeze(int(layer.batch_first))
    x = x.transpose(0, 1) if layer.batch_first else x
    states = [_states(layer, x, hx, k) for k in range(len(layer._all_weights))]
    scans, ends = [], []
    directions = 2 if layer.bidirectional else 1
    for first in range(0, len(states), directions):
        sides = []
        for k in range(first, first + directions):
            scan, out, end = _scan(layer, layer._all_weights[k], x.flip(0) if k > first else x, states[k])
            scans.append(scan)
            ends.append(end)
            sides.append(out.flip(0) if k > first else out)
        x = torch.cat(sides, 2)
    last = [torch.cat(kind) for kind in zip(*ends, strict=True)]
    out = x.transpose(0, 1) if layer.batch_first else x
    if not batched:
        return scans, [out.squeeze(int(layer.batch_first)), *(t.squeeze(1) for t in last)]
    return scans, [out, *last]


def _states(layer: nn.RNNBase, x: Tensor, hx: Any, k: int) -> tuple[Tensor, ...]:
    """First hidden (and cell) state of a scan, (1, N, h) each."""
    kinds = 2 if layer.mode == "LSTM" else 1
    if hx is None:
        return (x.new_zeros(1, x.shape[1], layer.hidden_size),) * kinds
    given = hx if isinstance(hx, tuple | list) else (hx,)
    return tuple(t[k].reshape(1, x.shape[1], -1).contiguous() for t in given)


def _scan(
    layer: nn.RNNBase, names: Sequence[str], x: Tensor, states: tuple[Tensor, ...]
) -> tuple[Scan, Tensor, tuple[Tensor, ...]]:
    weight_ih, *others = (getattr(layer, name).detach() for name in names)
    bias_ih = others.pop(1) if layer.bias else None
    z = F.linear(x, weight_ih, bias_ih)
    # gradients of the gates are those of z; in the first layer nothing else makes it require one
    z = z if z.requires_grad else z.requires_grad_()
    same = torch.eye(z.shape[2], dtype=z.dtype, device=z.device)
    weights = [same, others[0], torch.zeros_like(others[1]), others[1]] if layer.bias else [same, others[0]]
    kernel = getattr(_VariableFunctions, KERNELS[layer.mode])
    state = states if layer.mode == "LSTM" else states[0]
    out, *end = kernel(z, state, weights, layer.bias, 1, 0.0, layer.training, False, False)
    return Scan(names, x, z, torch.cat([states[0], out[:-1]])), out, tuple(end)


def _through_reset(scan: Scan, d: Tensor, weight_hh: Tensor, bias_hh: Tensor | None) -> Tensor:
    """Gradients of a GRU's hidden projection: its candidate is multiplied by the reset gate."""
    size = weight_hh.shape[1]
    bias = None if bias_hh is None else bias_hh[:size]
    reset = torch.sigmoid(scan.z[..., :size] + F.linear(scan.before, weight_hh[:size], bias)).detach()
    return torch.cat([d[..., : 2 * size], d[..., 2 * size :] * reset], 2)

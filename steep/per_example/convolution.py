"""The rule of convolutions: a linear map of patches, unfolded only while they are used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from steep.per_example.layers import closed_form, trains
from steep.per_example.parts import CHUNK, Dense, Outer, Part, Sliced


class Geometry(NamedTuple):
    """A convolution of images; one of sequences is a convolution of images of height 1."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, layer: nn.Conv1d | nn.Conv2d) -> Geometry:
        kernel, stride, dilation = ((1, *t)[-2:] for t in (layer.kernel_size, layer.stride, layer.dilation))
        return cls(kernel, stride, dilation, layer.groups)


@dataclass
class Patches(Sliced):
    """A convolution's weight, kept as input and output gradient.

    Args:
        params: ``(weight,)``, (o, c / groups, *kernel).
        geometry: of the layer.
        x: padded input, (N, c, H, W), where N is B or a multiple of it.
        grad: gradient of the output, (N, o, h, w).
        batch: number of examples B.
    """

    params: tuple[Tensor, ...]
    geometry: Geometry
    x: Tensor
    grad: Tensor
    batch: int

    def unfold(self, samples: slice) -> Tensor:
        """Patches of these samples by group, (n, groups, c / groups * kernel, positions)."""
        kernel, stride, dilation, groups = self.geometry
        return F.unfold(self.x[samples], kernel, dilation, 0, stride).unflatten(1, (groups, -1))

    def outer(self) -> Outer:
        """The same as a linear map whose positions are the output's; for one group."""
        d, a = self.grad.flatten(2), self.unfold(slice(None)).squeeze(1)
        d, a = (t.unflatten(0, (self.batch, -1)).mT.flatten(1, 2) for t in (d, a))
        return Outer(self.params, d, a)

    def dense(self) -> Dense:
        """The gradients themselves, made a few samples at a time."""
        positions = self.grad[0, 0].numel()
        step = max(1, CHUNK // 2 // (self.x.shape[1] * self.geometry.kernel[0] * self.geometry.kernel[1] * positions))
        d = self.grad.reshape(len(self.grad), self.geometry.groups, -1, positions)
        pieces = [d[k : k + step] @ self.unfold(slice(k, k + step)).mT for k in range(0, len(d), step)]
        return Dense(self.params, torch.cat(pieces).reshape(self.batch, -1, *self.params[0].shape).sum(1))

    def rows(self, rows: slice) -> Tensor:
        return self.outer().rows(rows)

    def gram(self) -> Tensor:
        return self.outer().gram()

    def squares(self) -> Tensor:
        return self.outer().squares()

    def vjp(self, w: Tensor) -> tuple[Tensor, ...]:
        weights = w.to(self.grad).repeat_interleave(len(self.grad) // self.batch)
        kernel, stride, dilation, groups = self.geometry
        shape = (*self.params[0].shape[:2], *kernel)
        sums = conv2d_weight(self.x, shape, self.grad * weights[:, None, None, None], stride, 0, dilation, groups)
        return (sums.view(self.params[0].shape),)

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        kernel, stride, dilation, groups = self.geometry
        moved = F.conv2d(self.x, v[0].reshape(*v[0].shape[:2], *kernel), None, stride, 0, dilation, groups)
        return (moved * self.grad).reshape(self.batch, -1).sum(1).double()

    def masked(self, masks: Sequence[Tensor]) -> Patches:
        return replace(self, grad=self.grad * masks[0].to(self.grad)[:, None, None])


@closed_form(nn.Conv1d, nn.Conv2d, sample_dims=lambda layer: 1 + len(layer.kernel_size))
def convolution(layer: nn.Conv1d | nn.Conv2d, x: Tensor, grad: Tensor, batch: int) -> Iterator[Part]:
    dims = 1 + len(layer.kernel_size)
    x, grad = (t.reshape(-1, *t.shape[-dims:]) for t in (pad(layer, x), grad))
    if dims == 2:
        x, grad = x.unsqueeze(2), grad.unsqueeze(2)
    if trains(layer.weight):
        patches = Patches((layer.weight,), Geometry.of(layer), x, grad, batch)
        small = batch * layer.weight.numel() <= x.numel() + grad.numel()
        yield patches.dense() if small or layer.groups > 1 else patches
    if trains(layer.bias):
        yield Dense((layer.bias,), grad.sum((2, 3)).reshape(batch, -1, layer.out_channels).sum(1))


def pad(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """The input with the layer's padding around it."""
    extents = zip(layer.dilation, layer.kernel_size, strict=True)
    if isinstance(layer.padding, str):
        total = [d * (k - 1) if layer.padding == "same" else 0 for d, k in extents]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in layer.padding]
    flat = [p for side in reversed(sides) for p in side]
    return F.pad(x, flat, "constant" if layer.padding_mode == "zeros" else layer.padding_mode) if any(flat) else x

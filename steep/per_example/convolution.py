"""The rules of convolutions: a linear map of patches, unfolded only while they are used.

A transposed convolution is the gradient of a convolution: its weight sees the layer's input where a convolution's sees
the gradient of its output, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steep.per_example._layers import closed_form, trains
from steep.per_example._products import matmul, pairwise_is_cheaper
from steep.per_example.parts import CHUNK, Dense, Outer, Part, Sliced


class Geometry(NamedTuple):
    """A convolution without padding, in any number of dimensions."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, layer: nn.modules.conv._ConvNd) -> Geometry:
        return cls(layer.kernel_size, layer.stride, layer.dilation, layer.groups)

    def reach(self, positions: Sequence[int]) -> list[int]:
        """Extents of the input that so many positions of the output see."""
        along = zip(positions, self.kernel, self.stride, self.dilation, strict=True)
        return [(n - 1) * s + (k - 1) * d + 1 for n, k, s, d in along]


@dataclass
class Patches(Sliced):
    """A convolution's weight, kept as input and output gradient.

    Args:
        params: ``(weight,)``, ``(o, c / groups, *kernel)``.
        geometry: of the layer.
        x: padded input, ``(N, c, *extents)``, N being B or a multiple of it; or fewer, ``(N / R, c, *extents)``, where
            R consecutive rows share theirs.
        grad: gradient of the output, ``(N, o, *positions)``.
        batch: number of rows B.
    """

    params: tuple[Tensor, ...]
    geometry: Geometry
    x: Tensor
    grad: Tensor
    batch: int

    @property
    def positions(self) -> torch.Size:
        return self.grad.shape[2:]

    @property
    def share(self) -> int:
        """R, the number of rows that share their input."""
        return len(self.grad) // len(self.x)

    def unfold(self, samples: slice) -> Tensor:
        """Patches of these samples by group, (n, groups, c / groups * kernel, positions)."""
        kernel, stride, dilation, groups = self.geometry
        x = self.x[samples]
        n, c, *steps = x.stride()
        along = [
            *(s * d for s, d in zip(steps, dilation, strict=True)),
            *(s * k for s, k in zip(steps, stride, strict=True)),
        ]
        # overlapping patches as a view; `reshape` is what copies them
        view = x.as_strided((*x.shape[:2], *kernel, *self.positions), (n, c, *along))
        return view.reshape(len(x), groups, -1, prod(self.positions))

    def outer(self) -> Outer:
        """The same as a linear map whose positions are the output's; for one group."""
        d = self.grad.flatten(2).unflatten(0, (self.batch, -1))
        a = self.unfold(slice(None)).squeeze(1).unflatten(0, (self.batch // self.share, -1))
        return Outer(self.params, d.mT.flatten(1, 2), a.mT.flatten(1, 2))

    def rows(self, rows: slice) -> Tensor:
        """Made a few samples at a time; `rows` must be all of them where there are several groups."""
        grad, positions = self.grad[:, rows], prod(self.positions)
        step = max(1, CHUNK // (self.x.shape[1] * prod(self.geometry.kernel) * positions))
        examples, groups = self.batch // self.share, self.geometry.groups
        apart = grad.reshape(examples, self.share, -1, groups, grad.shape[1] // groups, positions)
        d = apart.permute(0, 2, 3, 1, 4, 5).reshape(len(self.x), groups, -1, positions)
        pieces = [d[k : k + step] @ self.unfold(slice(k, k + step)).mT for k in range(0, len(d), step)]
        found = torch.cat(pieces).reshape(examples, -1, groups, self.share, grad.shape[1] // groups, self.width)
        return found.sum(1).transpose(1, 2).reshape(self.batch, -1, self.width)

    def dense(self) -> Dense:
        """The gradients themselves."""
        return Dense(self.params, self.rows(slice(None)))

    def columns(self, batch: int | None = None) -> Iterator[Tensor]:
        """One offset within the kernel at a time: its inputs are a strided view, and no patch is ever made."""
        d = _by_example(self.grad, self.batch)
        step = max(1, CHUNK // ((batch or self.batch) * self.x.shape[1]))
        for offset in product(*map(range, self.geometry.kernel)):
            a = _by_example(self._seen_at(offset), self.batch // self.share).mT
            for k in range(0, d.shape[1], step):
                yield matmul(d[:, k : k + step], a).flatten(1)

    def _seen_at(self, offset: tuple[int, ...]) -> Tensor:
        _, stride, dilation, _ = self.geometry
        along = zip(offset, stride, dilation, self.positions, strict=True)
        seen: list[Any] = [slice(o * d, o * d + (n - 1) * s + 1, s) for o, s, d, n in along]
        return self.x[(..., *seen)]

    def gram(self) -> Tensor:
        return self.outer().gram() if self._pairwise_is_cheaper(self) else super().gram()

    def cross(self, other: Patches) -> Tensor:
        return self.outer().cross(other.outer()) if self._pairwise_is_cheaper(other) else super().cross(other)

    def _pairwise_is_cheaper(self, other: Patches) -> bool:
        positions = max(prod(part.positions) * len(part.grad) // part.batch for part in (self, other))
        batch, share = min(self.batch, other.batch), self.share * other.share
        return pairwise_is_cheaper(positions, self.height, self.width, batch, share)

    def vjp(self, w: Tensor) -> tuple[Tensor, ...]:
        weights = w.to(self.grad).repeat_interleave(len(self.grad) // self.batch)
        grad = self.grad * weights.view(-1, *[1] * (self.grad.ndim - 1))
        grad = grad if self.share == 1 else self._apart(grad).sum(1).flatten(0, 1)
        return (self._convolution_backward(grad).view(self.params[0].shape),)

    def _convolution_backward(self, grad: Tensor) -> Tensor:
        kernel, stride, dilation, groups = self.geometry
        none = [0] * len(kernel)
        weight = self.params[0].detach()  # only its shape matters
        return torch.ops.aten.convolution_backward(
            grad, self.x, weight, None, stride, none, dilation, False, none, groups, (False, True, False)
        )[1]

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        kernel, stride, dilation, groups = self.geometry
        none = [0] * len(kernel)
        moved = torch.convolution(self.x, v[0].to(self.x), None, stride, none, dilation, False, none, groups)
        moved = moved.unflatten(0, (self.batch // self.share, 1, -1))
        return (moved * self._apart(self.grad)).reshape(self.batch, -1).sum(1).double()

    def _apart(self, grad: Tensor) -> Tensor:
        """Samples of gradients as (examples, R, samples of an example, ...)."""
        return grad.unflatten(0, (self.batch // self.share, self.share, -1))

    def masked(self, masks: Sequence[Tensor]) -> Patches:
        return replace(self, grad=self.grad * masks[0].to(self.grad).view(-1, *[1] * len(self.positions)))


def _by_example(t: Tensor, batch: int) -> Tensor:
    """Samples (N, channels, *positions) as (B, channels, all positions of an example)."""
    flat = t.flatten(2)
    return flat if len(t) == batch else flat.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)


def _weight_part(params: tuple[Tensor, ...], geometry: Geometry, x: Tensor, grad: Tensor, batch: int) -> Part:
    """The part of a weight (o, c / groups, *kernel): its gradients, or what they are made of if that is smaller."""
    patches = Patches(params, geometry, x, grad, batch)
    # early layers have few weights and large images: their gradients take less memory than what they are made of
    small = batch * params[0].numel() <= x.numel() + grad.numel()
    return patches.dense() if small or geometry.groups > 1 else patches


@closed_form(nn.Conv1d, nn.Conv2d, nn.Conv3d, sample_dims=lambda layer: 1 + len(layer.kernel_size))
def _convolution(layer: nn.modules.conv._ConvNd, x: Tensor, grad: Tensor, batch: int) -> Iterator[Part]:
    dims = 1 + len(layer.kernel_size)
    x, grad = (t.reshape(-1, *t.shape[-dims:]) for t in (pad(layer, x), grad))
    geometry = Geometry.of(layer)
    if trains(layer.weight):
        yield _weight_part((layer.weight,), geometry, x, grad, batch)
    yield from _bias_part(layer, grad, batch)


@closed_form(
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, sample_dims=lambda layer: 1 + len(layer.kernel_size)
)
def _transposed_convolution(
    layer: nn.modules.conv._ConvTransposeNd, x: Tensor, grad: Tensor, batch: int
) -> Iterator[Part]:
    dims = 1 + len(layer.kernel_size)
    x, grad = (t.reshape(-1, *t.shape[-dims:]) for t in (x, grad))
    geometry = Geometry.of(layer)
    if trains(layer.weight):
        padding: Any = layer.padding
        sides = [p for p in reversed(padding) for _ in range(2)]
        seen: list[Any] = [slice(0, n) for n in geometry.reach(x.shape[2:])]  # less than all with an output padding
        yield _weight_part((layer.weight,), geometry, F.pad(grad, sides)[(..., *seen)].contiguous(), x, batch)
    yield from _bias_part(layer, grad, batch)


def _bias_part(layer: nn.modules.conv._ConvNd, grad: Tensor, batch: int) -> Iterator[Part]:
    if trains(layer.bias):
        yield Dense((layer.bias,), grad.flatten(2).sum(2).reshape(batch, -1, layer.out_channels).sum(1))


def pad(layer: nn.modules.conv._ConvNd, x: Tensor) -> Tensor:
    """The input with the layer's padding around it."""
    extents = zip(layer.dilation, layer.kernel_size, strict=True)
    if isinstance(layer.padding, str):
        total = [d * (k - 1) if layer.padding == "same" else 0 for d, k in extents]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in layer.padding]
    flat = [p for side in reversed(sides) for p in side]
    return F.pad(x, flat, "constant" if layer.padding_mode == "zeros" else layer.padding_mode) if any(flat) else x

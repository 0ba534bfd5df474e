"""The rule of embeddings: only equal tokens interact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steep.per_example._layers import closed_form, trains
from steep.per_example.parts import CHUNK, Part, Sliced


class Cells(NamedTuple):
    """The gradient of every pair of an example and a token that occurs: (n,), (n,) and vectors (n, e)."""

    examples: Tensor
    tokens: Tensor
    vectors: Tensor


@dataclass
class Lookup(Sliced):
    """An embedding table.

    Args:
        params: ``(table,)``, (V, e).
        tokens: (B, T).
        d: gradients of the looked-up vectors, (B, T, e).
    """

    params: tuple[Tensor, ...]
    tokens: Tensor
    d: Tensor
    vocabulary: int = 0

    def __post_init__(self) -> None:
        self.batch = len(self.tokens)
        self.vocabulary = self.vocabulary or len(self.params[0])

    @property
    def height(self) -> int:
        return self.vocabulary

    def rows(self, rows: slice) -> Tensor:
        count = rows.stop - rows.start
        example, position = ((self.tokens >= rows.start) & (self.tokens < rows.stop)).nonzero(as_tuple=True)
        cell = example * count + self.tokens[example, position] - rows.start
        flat = self.d.new_zeros(self.batch * count, self.d.shape[2]).index_add_(0, cell, self.d[example, position])
        return flat.view(self.batch, count, -1)

    def gram(self) -> Tensor:
        (compact,) = compacted(self)
        cells = compact._cells()
        # pairs of cells, most of which have different tokens, against whole rows of the tokens that occur
        sparse = len(cells.vectors) ** 2 < self.batch**2 * compact.vocabulary
        return compact._pairwise(cells, cells, self.batch) if sparse else Sliced.gram(compact)

    def cross(self, other: Lookup) -> Tensor:
        left, right = compacted(self, other)
        here, there = left._cells(), right._cells()
        sparse = len(here.vectors) * len(there.vectors) < self.batch * other.batch * left.vocabulary
        return left._pairwise(here, there, other.batch) if sparse else Sliced.cross(left, right)

    def _cells(self) -> Cells:
        examples = torch.arange(self.batch, device=self.tokens.device)[:, None]
        # a token that an example has twice is one cell: its vectors are summed before they are squared
        cells, cell = (examples * self.vocabulary + self.tokens).unique(return_inverse=True)
        vectors = self.d.new_zeros(len(cells), self.d.shape[2]).index_add_(0, cell.flatten(), self.d.flatten(0, 1))
        return Cells(cells // self.vocabulary, cells % self.vocabulary, vectors)

    def _pairwise(self, left: Cells, right: Cells, batch: int) -> Tensor:
        step = max(1, CHUNK // len(right.vectors))
        here = left.vectors.double()
        there = here if right is left else right.vectors.double()
        total = self._zeros(self.batch, batch)
        for k in range(0, len(here), step):
            products = (here[k : k + step] @ there.T) * (left.tokens[k : k + step, None] == right.tokens)
            by_column = products.new_zeros(len(products), batch).index_add_(1, right.examples, products)
            total.index_add_(0, left.examples[k : k + step], by_column)
        return total

    def squares(self) -> Tensor:
        cells = self._cells()
        return self._zeros(self.batch).index_add_(0, cells.examples, cells.vectors.double().square().sum(1))

    def vjp(self, w: Tensor) -> tuple[Tensor, ...]:
        weighted = (self.d * w.to(self.d)[:, None, None]).flatten(0, 1)
        return (self.d.new_zeros(self.params[0].shape).index_add_(0, self.tokens.flatten(), weighted),)

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        return (v[0][self.tokens] * self.d).sum((1, 2)).double()

    def masked(self, masks: Sequence[Tensor]) -> Lookup:
        return replace(self, d=self.d * masks[0].to(self.d)[self.tokens][..., None])


def compacted(*parts: Lookup) -> list[Lookup]:
    """Parts of one table as of one with the tokens that occur in any of them."""
    used, tokens = torch.cat([part.tokens.flatten() for part in parts]).unique(return_inverse=True)
    pieces = tokens.split([part.tokens.numel() for part in parts])
    return [
        replace(part, tokens=piece.view_as(part.tokens), vocabulary=len(used))
        for part, piece in zip(parts, pieces, strict=True)
    ]


@closed_form(nn.Embedding)
def embedding(layer: nn.Embedding, x: Tensor, grad: Tensor, batch: int) -> Iterator[Part]:
    if not trains(layer.weight):
        return
    tokens, d = x.reshape(batch, -1), grad.reshape(batch, -1, layer.embedding_dim)
    if layer.padding_idx is not None:
        d = d * (tokens != layer.padding_idx)[..., None]
    if layer.scale_grad_by_freq:
        d = d / tokens.flatten().bincount()[tokens][..., None]
    yield Lookup((layer.weight,), tokens, d)


@closed_form(nn.EmbeddingBag, covers=lambda layer: not layer.scale_grad_by_freq, whole=True)
def embedding_bag(
    layer: nn.EmbeddingBag, inputs: dict[str, Any], grads: Sequence[Tensor], batch: int
) -> Iterator[Part]:
    """Bags as sequences of equal length: what a bag lacks has no weight."""
    tokens, scale = inputs["input"], inputs["per_sample_weights"]
    scale = torch.ones_like(tokens, dtype=grads[0].dtype) if scale is None else scale
    if tokens.ndim == 1:
        tokens, scale = _padded(layer, tokens, scale, inputs["offsets"])
    if layer.padding_idx is not None:
        scale = scale * (tokens != layer.padding_idx)
    d = grads[0][:, None] * _shares(layer, tokens, scale)
    yield Lookup((layer.weight,), tokens.reshape(batch, -1), d.reshape(batch, -1, layer.embedding_dim))


def _padded(layer: nn.EmbeddingBag, tokens: Tensor, scale: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Bags that start at `offsets` of one long sequence, (bags, longest bag)."""
    ends = torch.cat([offsets[1:], offsets.new_tensor([len(tokens)])])
    starts, ends = (offsets[:-1], offsets[1:]) if layer.include_last_offset else (offsets, ends)
    length = int((ends - starts).max())
    position = starts[:, None] + torch.arange(length, device=tokens.device)
    inside = position < ends[:, None]
    position = position.clamp(max=len(tokens) - 1)
    return tokens[position], scale[position] * inside


def _shares(layer: nn.EmbeddingBag, tokens: Tensor, scale: Tensor) -> Tensor:
    """What each token's vector counts in its bag, (bags, T, e or 1)."""
    if layer.mode == "sum":
        return scale[..., None]
    if layer.mode == "mean":
        return (scale / scale.sum(1, keepdim=True).clamp(min=1))[..., None]
    vectors = layer.weight.detach()[tokens].masked_fill(scale[..., None] == 0, -torch.inf)
    largest = torch.zeros_like(vectors).scatter_(1, vectors.argmax(1, keepdim=True), 1)
    return largest * scale[..., None]

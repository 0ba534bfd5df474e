"""Closed forms over random shapes: each part's algebra against the gradients written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from steep.per_example import Blocks, Dense, Lookup, Outer, Patches, PerExample, parts
from steep.per_example._uses import Uses, combine

few = settings(max_examples=40, deadline=None, derandomize=True)
small = st.integers(1, 5)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def same_algebra(part, j):
    """`j`: per-example gradients (B, P) of all parameters of the part."""
    w = randn(len(j))
    v = [randn(*p.shape) for p in part.params]
    for found, expected in (
        (part.gram(), j @ j.T),
        (part.squares(), j.square().sum(1)),
        (torch.cat([g.flatten() for g in part.vjp(w)]), w @ j),
        (part.jvp(v), j @ torch.cat([t.flatten() for t in v])),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    if not isinstance(part, Blocks):
        pieces = part.split()
        assert [p for piece in pieces for p in piece.params] == list(part.params)
        torch.testing.assert_close(sum(piece.gram() for piece in pieces), j @ j.T, rtol=1e-10, atol=1e-10)


def masks_of(part):
    return [(torch.arange(p.shape[0]) % 2).double() for p in part.params]


def same_masked(part, j):
    masks = masks_of(part)
    pairs = zip(part.params, masks, strict=True)
    columns = torch.cat([m.view(-1, *[1] * (p.ndim - 1)).expand_as(p).flatten() for p, m in pairs])
    same_algebra(part.masked(masks), j * columns)


@few
@given(small, small, small, small, st.booleans(), st.integers(0, 99))
def test_linear(batch, positions, outputs, inputs, bias, seed):
    torch.manual_seed(seed)
    d, a = randn(batch, positions, outputs), randn(batch, positions, inputs)
    j = torch.einsum("bto,bti->boi", d, a).flatten(1)
    params = (randn(outputs, inputs), randn(outputs))[: 1 + bias]
    part = Outer(params, d, a)
    full = torch.cat([j, d.sum(1)], 1) if bias else j
    same_algebra(part, full)
    same_masked(part, full)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 50, 2**19])
def test_both_routes_to_a_linear_gram_agree(bias, chunk, monkeypatch):
    monkeypatch.setattr(parts, "CHUNK", chunk)
    torch.manual_seed(0)
    for positions, width in ((2, 12), (12, 2)):
        part = Outer(
            (randn(width, width + 1), randn(width))[: 1 + bias],
            randn(4, positions, width),
            randn(4, positions, width + 1),
        )
        explicit = sum(parts.Sliced.gram(piece) for piece in part.split())
        torch.testing.assert_close(part._pairwise(part), explicit)
        torch.testing.assert_close(part.gram(), explicit)


@few
@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (2, 4), (4, 2), (4, 4)]),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(0, 2), st.integers(0, 1)),
    st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_convolution(batch, channels, kernel, stride, dilation, padding, mode, grouped, bias, seed):
    torch.manual_seed(seed)
    groups = 2 if grouped and channels[0] > 1 else 1
    conv = nn.Conv2d(*channels, kernel, stride, padding, dilation, groups, bias, mode).double()
    x = randn(batch, channels[0], 6, 7)
    grad = randn(*conv(x).shape)
    by_example = []
    for k in range(batch):
        out = (conv(x[k : k + 1]) * grad[k : k + 1]).sum()
        by_example.append(torch.cat([g.flatten() for g in torch.autograd.grad(out, list(conv.parameters()))]))
    j = torch.stack(by_example)
    engine = PerExample(conv)
    rows = engine.rows((conv(x) * grad).flatten(1).sum(1))
    assert engine.left_to_autograd == set()
    assert {type(part) for part in rows.parts} <= {Dense, Patches}
    torch.testing.assert_close(rows.gram(), j @ j.T, rtol=1e-9, atol=1e-9)
    for part in rows.parts:
        start = 0 if part.params[0] is conv.weight else conv.weight.numel()
        share = j[:, start : start + part.params[0].numel()]
        same_algebra(part, share)
        same_masked(part, share)


@few
@given(small, small, st.integers(1, 4), st.integers(1, 30), st.integers(0, 99))
def test_embedding(batch, positions, width, vocabulary, seed):
    torch.manual_seed(seed)
    tokens, d = torch.randint(vocabulary, (batch, positions)), randn(batch, positions, width)
    j = torch.einsum("btv,bte->bve", F.one_hot(tokens, vocabulary).double(), d).flatten(1)
    part = Lookup((randn(vocabulary, width),), tokens, d)
    same_algebra(part, j)
    same_masked(part, j)


def test_both_routes_to_an_embedding_gram_agree():
    torch.manual_seed(0)
    for vocabulary in (2, 1000):
        tokens, d = torch.randint(vocabulary, (6, 7)), randn(6, 7, 3)
        part = Lookup((randn(vocabulary, 3),), tokens, d)
        cells = part._cells()
        torch.testing.assert_close(part._pairwise(cells, cells, 6), parts.Sliced.gram(part))


@few
@given(small, small, small, st.integers(0, 99))
def test_uses_of_one_parameter_are_summed_before_they_are_squared(batch, outputs, inputs, seed):
    torch.manual_seed(seed)
    table = randn(outputs, inputs)
    linear = [Outer((table,), randn(batch, t, outputs), randn(batch, t, inputs)) for t in (1, 3)]
    lookup = Lookup((table,), torch.randint(outputs, (batch, 2)), randn(batch, 2, inputs))
    dense = Dense((table,), randn(batch, outputs, inputs))

    def matrix(part):
        return part.rows(slice(0, outputs)).flatten(1)

    assert isinstance(combine(linear), Outer)
    same_algebra(combine(linear), sum(map(matrix, linear)))
    mixed = [*linear, lookup, dense]
    assert isinstance(combine(mixed), Uses)
    same_algebra(combine(mixed), sum(map(matrix, mixed)))
    same_masked(combine(mixed), sum(map(matrix, mixed)))


@few
@given(
    st.integers(1, 6),
    st.lists(st.sampled_from([(), (2,), (2, 3)]), min_size=1, max_size=3),
    st.sampled_from([1, 9, 1000]),
    st.booleans(),
    st.integers(0, 99),
)
def test_blocks(batch, shapes, chunk, with_pull, seed):
    torch.manual_seed(seed)
    params = tuple(randn(*shape) for shape in shapes)
    j = [randn(batch, *shape) for shape in shapes]
    pull = (lambda w: [torch.tensordot(w, t, 1) for t in j]) if with_pull else None
    part = Blocks(params, batch, lambda e: [t[e.start : e.stop] for t in j], pull)
    from steep.per_example import autodiff

    before, autodiff.CHUNK = autodiff.CHUNK, chunk
    try:
        full = torch.cat([t.reshape(batch, -1) for t in j], 1)
        same_algebra(part, full)
        masks = [torch.ones(1) if p.ndim == 0 else torch.arange(len(p)).double() for p in params]
        columns = torch.cat(
            [
                torch.ones(1) if p.ndim == 0 else m.view(-1, *[1] * (p.ndim - 1)).expand_as(p).flatten()
                for p, m in zip(params, masks, strict=True)
            ]
        )
        same_algebra(part.masked(masks), full * columns)
    finally:
        autodiff.CHUNK = before


def test_sums_are_accumulated_in_float64():
    """Rows that differ in the seventh digit: a float32 Gram matrix would be singular, or not even positive."""
    torch.manual_seed(0)
    a = torch.randn(1, 1, 400) + 3e-7 * torch.randn(3, 1, 400)
    for part in (
        Outer((torch.empty(50, 400),), torch.ones(3, 1, 50), a),
        Dense((torch.empty(400),), a.squeeze(1)),
        Outer((torch.empty(50, 400),), torch.randn(1, 40, 50).expand(3, 40, 50), a.repeat(1, 40, 1)),
        Lookup((torch.empty(9, 400),), torch.zeros(3, 1, dtype=torch.long), a),
    ):
        gram = part.gram()
        j = part.rows(slice(0, part.height)).double().flatten(1)
        smallest, exact = (torch.linalg.eigvalsh(g)[0] for g in (gram, j @ j.T))
        assert gram.dtype == torch.float64
        torch.testing.assert_close(smallest, exact, rtol=0.05, atol=0)

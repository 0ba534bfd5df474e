"""Closed forms of whole layers over random shapes and options: their rows against a loop over the examples."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from steep.per_example import PerExample
from steep.per_example._recording import _draws
from steep.per_example._recurrent import run

few = settings(max_examples=25, deadline=None, derandomize=True)
small = st.integers(1, 4)
seeds = st.integers(0, 99)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def losses_of(outputs):
    return sum((out.square() + 0.3 * out).flatten(1).sum(1) for out in outputs)


def jacobian(losses, model):
    params = [p for p in model.parameters() if p.requires_grad]

    def row(loss):
        found = torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    return torch.stack([row(loss) for loss in losses])


def same_rows(model, forward, parts=("Outer", "Dense", "Lookup")):
    """Without the check of the first batch, so that nothing but the closed form can be right."""
    engine = PerExample(model, check=False)
    losses = losses_of(forward(model))
    j = jacobian(losses, model)
    rows = engine.rows(losses)
    assert {type(part).__name__ for part in rows.parts} <= set(parts)
    w = randn(len(j))
    flat = torch.cat([g.flatten() for g in rows.vjp(w)])
    for found, expected in ((rows.gram(), j @ j.T), (rows.norms(), j.norm(dim=1)), (flat, w @ j)):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@few
@given(st.integers(1, 3), small, small, st.integers(2, 4), st.booleans(), st.booleans(), seeds)
def test_instance_norm(dims, batch, channels, extent, train, running, seed):
    torch.manual_seed(seed)
    norm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1]
    model = norm(channels, affine=True, track_running_stats=running).double().train(train)
    if running:
        model.running_var.uniform_(0.5, 2)
    x = randn(batch, channels, *[extent] * dims)
    same_rows(model, lambda m: [m(x)])


@few
@given(small, st.lists(small, min_size=1, max_size=3), st.integers(1, 2), st.sampled_from([None, 0.1]), seeds)
def test_rms_norm(batch, shape, trailing, eps, seed):
    torch.manual_seed(seed)
    model = nn.RMSNorm(shape[-trailing:], eps=eps).double()
    nn.init.normal_(model.weight)
    x = randn(batch, *shape)
    same_rows(model, lambda m: [m(x)])


@few
@given(st.sampled_from(["sum", "mean", "max"]), small, st.integers(1, 5), small, st.sampled_from([None, 0, 2]), seeds)
def test_bags_of_equal_length(mode, batch, length, width, padding, seed):
    torch.manual_seed(seed)
    model = nn.EmbeddingBag(6, width, mode=mode, padding_idx=padding).double()
    nn.init.normal_(model.weight)
    tokens, weights = torch.randint(6, (batch, length)), randn(batch, length)
    same_rows(model, lambda m: [m(tokens, per_sample_weights=weights if mode == "sum" else None)])


@few
@given(
    st.sampled_from(["sum", "mean", "max"]), st.lists(st.integers(0, 4), min_size=1, max_size=5), st.booleans(), seeds
)
def test_bags_in_one_long_sequence(mode, lengths, last, seed):
    torch.manual_seed(seed)
    model = nn.EmbeddingBag(6, 3, mode=mode, include_last_offset=last).double()
    tokens = torch.randint(6, (sum(lengths),))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    offsets = ends if last else ends[:-1]
    if len(tokens):
        same_rows(model, lambda m: [m(tokens, offsets)])


@few
@given(
    small,
    small,
    small,
    st.sampled_from([(2, 1), (4, 2), (6, 3)]),
    st.sampled_from(["self", "cross", "three widths"]),
    *[st.booleans()] * 6,
    seeds,
)
def test_attention(batch, queries, keys, size, kind, bias, batch_first, padding, mask, per_head, weights, seed):
    torch.manual_seed(seed)
    width, heads = size
    widths = {"kdim": 3, "vdim": 5} if kind == "three widths" else {}
    model = nn.MultiheadAttention(width, heads, bias=bias, batch_first=batch_first, **widths).double()
    q = randn(batch, queries, width)
    k = q if kind == "self" else randn(batch, keys, widths.get("kdim", width))
    v = randn(batch, keys, 5) if widths else k
    inputs = [t if batch_first else t.transpose(0, 1) for t in (q, k, v)]
    inputs = [inputs[0]] * 3 if kind == "self" else inputs
    absent = torch.rand(batch, k.shape[1]) < 0.5
    absent[:, 0] = False
    options = {
        "key_padding_mask": absent if padding else None,
        "attn_mask": randn(queries, k.shape[1]) if mask else None,
        "average_attn_weights": not per_head,
    }

    def forward(m):
        out, attended = m(*inputs, **options)
        out = out if batch_first else out.transpose(0, 1)
        return [out, attended] if weights else [out]

    same_rows(model, forward)


@few
@given(
    st.sampled_from([(nn.LSTM, {}), (nn.GRU, {}), (nn.RNN, {}), (nn.RNN, {"nonlinearity": "relu"})]),
    small,
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 2),
    *[st.booleans()] * 4,
    st.sampled_from(["steps", "states", "both"]),
    seeds,
)
def test_recurrent(kind, batch, steps, width, layers, bias, both_ways, batch_first, from_states, used, seed):
    torch.manual_seed(seed)
    rnn, options = kind
    model = rnn(2, width, layers, bias=bias, batch_first=batch_first, bidirectional=both_ways, **options).double()
    x = randn(batch, steps, 2)
    shape = (layers * (1 + both_ways), batch, width)
    states = (randn(*shape), randn(*shape)) if rnn is nn.LSTM else randn(*shape)

    def forward(m):
        out, last = m(x if batch_first else x.transpose(0, 1), *([states] if from_states else []))
        last = last if isinstance(last, tuple) else (last,)
        kept = {"steps": [out], "states": last, "both": [out, *last]}[used]
        return [t if t is out and batch_first else t.transpose(0, 1) for t in kept]

    same_rows(model, forward)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_layer_run_on_projected_inputs_gives_what_the_layer_gives(kind):
    torch.manual_seed(0)
    layer = kind(3, 4, 2, bidirectional=True)  # in float32 another kernel may be chosen
    x = torch.randn(5, 2, 3)
    out, last = layer(x)
    expected = [out, *(last if isinstance(last, tuple) else (last,))]
    torch.testing.assert_close(run(layer, x, None)[1], expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrence_in_float32(kind):
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": kind(3, 8, 2, batch_first=True), "head": nn.Linear(8, 2)})
    x = torch.randn(6, 5, 3)

    def losses(m, x):
        out, last = m["rnn"](x)
        return losses_of([m["head"](out[:, -1] + (last[0] if isinstance(last, tuple) else last)[0])])

    engine = PerExample(model)
    rows = engine.rows(losses(model, x))
    double = copy.deepcopy(model).double()
    j = jacobian(losses(double, x.double()), double)
    assert engine.left_to_autograd == set()
    assert {type(part).__name__ for part in rows.parts} == {"Outer"}
    assert (rows.gram() - j @ j.T).norm() < 1e-5 * (j @ j.T).norm()


class Mixture(nn.Module):
    """One of each kind."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(9, 8), nn.RMSNorm(8, eps=1e-5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.conv, self.instance = nn.Conv1d(8, 6, 2), nn.InstanceNorm1d(6, affine=True)
        self.head = nn.Linear(18, 2)

    def forward(self, tokens):
        x = self.norm(self.embed(tokens))
        x = self.rnn(self.attention(x, x, x, need_weights=False)[0])[0]
        return self.head(torch.tanh(self.instance(self.conv(x.mT))).flatten(1)).double()


def is_as_exact_as_autograd(model, forward):
    """Rows of a model that computes in low precision, against autograd's in the same and in double precision."""
    double = copy.deepcopy(model).double()
    engine = PerExample(model)
    rows = engine.rows(losses_of([forward(model)]))
    exact, low = (jacobian(losses_of([forward(m)]), m).double() for m in (double, model))
    error, unavoidable = ((gram - exact @ exact.T).norm() for gram in (rows.gram(), low @ low.T))
    assert engine.left_to_autograd == set()
    assert error < 1.5 * unavoidable
    assert unavoidable < 0.5 * (exact @ exact.T).norm()
    return rows.vjp(torch.ones(len(exact)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_autograd_in_it(dtype):
    torch.manual_seed(0)
    tokens = torch.randint(9, (5, 4))
    grads = is_as_exact_as_autograd(Mixture().to(dtype), lambda m: m(tokens))
    assert {g.dtype for g in grads} == {dtype}


def test_autocast_is_as_exact_as_autograd_under_it():
    torch.manual_seed(0)
    tokens = torch.randint(9, (5, 4))

    def forward(m):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=m.head.weight.dtype == torch.float32):
            return m(tokens)

    grads = is_as_exact_as_autograd(Mixture(), forward)
    assert {g.dtype for g in grads} == {torch.float32}


def test_only_numbers_are_taken_for_dropout_rates():
    class Priors(nn.GRU):
        def __init__(self):
            super().__init__(3, 4, batch_first=True)
            self.double()
            self.p = torch.rand(3, dtype=torch.float64)  # no rate at all

    same_rows(Priors(), lambda gru: [gru(randn(5, 2, 3))[0]], parts=("Outer", "Dense", "Lookup", "Tensors"))
    assert not _draws(Priors())
    assert _draws(nn.Dropout(0.1))
    assert _draws(nn.LSTM(2, 3, num_layers=2, dropout=0.2))
    assert not _draws(nn.Dropout(0.1).eval())


class TwiceCalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(self.layer(x).tanh())


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        return checkpoint(lambda x: self.layer(x).tanh(), x, use_reentrant=False)


class TiedWithPadding(nn.Module):
    """A token embedding with padding that is the head as well."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 3, padding_idx=0)

    def forward(self, x):
        ids = (x * 3).long().abs() % 6
        return self.embedding(ids).mean(1) @ self.embedding.weight.T


def pruned():
    return prune.l1_unstructured(nn.Linear(3, 4), "weight", amount=0.5)


def spectral():
    return parametrizations.spectral_norm(nn.Linear(3, 4)).eval()


@pytest.mark.parametrize("build", [TwiceCalled, Checkpointed, TiedWithPadding, pruned, spectral])
def test_rows_of_layers_that_are_used_in_unusual_ways(build):
    torch.manual_seed(0)
    model, x = build().double(), randn(5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of them are left to autograd
        found = PerExample(model).rows(losses_of([model(x)])).gram()
    j = torch.stack([jacobian(losses_of([model(one[None])]), model)[0] for one in x])
    torch.testing.assert_close(found, j @ j.T, rtol=1e-9, atol=1e-12)

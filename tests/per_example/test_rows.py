"""Rows of several passes: inner products with each other, one behind the other; means, variances, layers."""

from __future__ import annotations

import importlib.util
import itertools
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from steep.backward.sven import Sven
from steep.per_example import PerExample, Rows, parts
from steep.per_example._joined import Joined

SPEC = importlib.util.spec_from_file_location("zoo", Path(__file__).with_name("zoo.py"))
zoo = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(zoo)


pytestmark = pytest.mark.usefixtures("seeded_and_quiet")


def mlp(*widths, dtype=torch.float64):
    modules = [m for i, o in itertools.pairwise(widths) for m in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*modules[:-1]).to(dtype)


def another(x, examples):
    """Other values, of some of the examples."""

    def change(t):
        if not isinstance(t, torch.Tensor):
            return t
        return t[examples] * -1.3 + 0.2 if t.is_floating_point() else t[examples].flip(0)

    return tree_map(change, x)


@cache
def _passes(name, chunk):
    model, x = zoo.build(name)
    engine, params = PerExample(model), [p for p in model.parameters() if p.requires_grad]
    count, found = len(zoo.losses_of(model, x)), []
    for batch in (x, another(x, [k % count for k in (3, 1, 0)])):
        losses = zoo.losses_of(model, batch)
        j = zoo.jacobian(losses, params)
        found.append((engine.rows(losses), j))
    return found


def passes(name):
    """Rows and Jacobians of two unlike batches; made once for each size of a chunk, and never changed by a test."""
    return _passes(name, parts.CHUNK)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_inner_products_with_another_batch_equal_a_loop_over_examples(name, chunks):
    (one, j), (other, k) = passes(name)
    zoo.same(one.gram(other), j @ k.T)
    zoo.same(other.gram(one), k @ j.T)
    zoo.same(one.gram(one), j @ j.T)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_stacked_passes_are_one_batch(name, chunks):
    (one, j), (other, k) = passes(name)
    stack, both = Rows.stack([one, other]), torch.cat([j, k])
    zoo.check(stack, both)
    zoo.same(stack.gram(other), both @ k.T)
    zoo.same(other.gram(stack), k @ both.T)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_stack_can_be_stacked(name):
    (one, j), (other, k) = passes(name)
    zoo.check(Rows.stack([Rows.stack([one, other]), one]), torch.cat([j, k, j]))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_layers_and_parameters_add_up(name):
    (rows, j), _ = passes(name)
    widths = [p.numel() for p in rows.params]
    columns = dict(zip(rows.names.values(), j.split(widths, 1), strict=True))
    for shares, key in ((rows.per_parameter(), lambda n: n), (rows.per_layer(), lambda n: n.rpartition(".")[0])):
        for share, found in shares.items():
            own = torch.cat([c for n, c in columns.items() if key(n) == share], 1)
            zoo.check(found, own)
        zoo.same(sum(found.gram() for found in shares.values()), j @ j.T)


@pytest.mark.parametrize("name", ["mlp", "cnn_with_group_norm", "tied_embedding_and_head", "attention", "recurrent"])
def test_mean_and_variance_of_the_rows(name):
    (rows, j), _ = passes(name)
    zoo.same(zoo.flatten(rows.params, rows.mean()), j.mean(0))
    zoo.same(zoo.flatten(rows.params, rows.variance()), j.var(0))
    zoo.same(zoo.flatten(rows.params, rows.variance(unbiased=False)), j.var(0, correction=0))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_lasting_rows_do_not_follow_the_parameters(name):
    model, x = zoo.build(name)
    engine = PerExample(model)
    losses = zoo.losses_of(model, x)
    j = zoo.jacobian(losses, [p for p in model.parameters() if p.requires_grad])
    rows = engine.rows(losses)
    lasting, stacked = rows.lasting(), Rows.stack([rows, rows]).lasting()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    zoo.check(lasting, j)
    zoo.check(stacked, torch.cat([j, j]))


def losses_of(model, x):
    return model(x).square().flatten(1).sum(1)


def test_kinds_of_parts_may_differ_between_passes():
    """A layer with a rule, left to itself, and outside of any record; used in one pass only."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    params = list(model.parameters())
    plain, slow = PerExample(model), PerExample(model)
    slow.left_to_autograd = {"0.weight", "0.bias", "3.bias"}
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    found = []
    for engine, batch, forward in (
        (plain, x, model),
        (slow, y, model),
        (plain, y, lambda z: model[2](torch.tanh(model[0](z)))),
        (plain, y, lambda z: torch.tanh(z @ model[0].weight.T)),
    ):
        losses = forward(batch).square().sum(1)
        found.append((zoo.jacobian(losses, params), engine.rows(losses)))
    for (j, one), (k, other) in itertools.product(found, found):
        zoo.same(one.gram(other), j @ k.T)
        zoo.check(Rows.stack([one, other]), torch.cat([j, k]))
    zoo.check(Rows.stack([rows for _, rows in found]), torch.cat([j for j, _ in found]))
    kinds = {type(part).__name__ for _, rows in found for part in rows.parts}
    assert kinds == {"Outer", "Blocks"}


def test_nothing_in_common_is_orthogonal():
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    engine = PerExample(model)
    a, b = (engine.rows(model[k](x).square().sum(1)) for k in "ab")
    assert torch.equal(a.gram(b), torch.zeros(5, 5, dtype=torch.float64))
    stack = Rows.stack([a, b])
    torch.testing.assert_close(stack.gram(), torch.block_diag(a.gram(), b.gram()))
    assert all(g is not None for g in stack.vjp(torch.ones(10, dtype=torch.float64)))


def test_restricted_rows_of_several_passes():
    model, x = mlp(3, 6, 6, 2), torch.randn(5, 3, dtype=torch.float64)
    engine = PerExample(model)
    rows = [engine.rows(losses_of(model, part)) for part in x.split([2, 3])]
    whole = engine.rows(losses_of(model, x))
    for stacked, alone in ((Rows.stack(rows), whole), (Rows.stack(rows[:1]), rows[0])):
        found, expected = (r.restrict(0.5, torch.Generator().manual_seed(1)) for r in (stacked, alone))
        zoo.same(found.gram(), expected.gram())
        w = torch.randn(len(found), dtype=torch.float64)
        zoo.same(zoo.flatten(whole.params, found.vjp(w)), zoo.flatten(whole.params, expected.vjp(w)))


def test_sven_over_micro_batches_is_sven_over_the_batch():
    torch.manual_seed(1)
    model, x, y = mlp(4, 8, 1), torch.randn(12, 4).double(), torch.randn(12).double()
    rule = Sven(model, rtol=1e-6)
    rule(model(x).squeeze(1) - y)
    whole = zoo.flatten(list(model.parameters()), [p.grad for p in model.parameters()])
    model.zero_grad()
    pieces = [model(a).squeeze(1) - b for a, b in zip(x.split(5), y.split(5), strict=True)]
    rows = Rows.stack([rule.engine.rows(piece) for piece in pieces])
    rows.backward(rule.solve(rows.gram(), torch.cat(pieces).detach()))
    found = zoo.flatten(list(model.parameters()), [p.grad for p in model.parameters()])
    torch.testing.assert_close(found, whole, rtol=1e-7, atol=1e-9)


def test_a_batch_in_pieces_is_not_put_together():
    model = mlp(3, 6, 2)
    engine = PerExample(model)
    rows = [engine.rows(losses_of(model, torch.randn(4, 3).double())) for _ in range(3)]
    stack = Rows.stack(rows)
    assert all(isinstance(part, Joined) for part in stack.parts)
    held = {id(part) for one in rows for part in one.parts}
    assert {id(part) for joined in stack.parts for part in joined.parts} == held


def test_sequences_of_unlike_lengths_in_unlike_passes():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)).double()
    engine, params = PerExample(model), list(model.parameters())
    found = []
    for size, length in ((4, 2), (3, 7), (5, 1)):
        losses = losses_of(model, torch.randint(9, (size, length)))
        found.append((zoo.jacobian(losses, params), engine.rows(losses)))
    for (j, one), (k, other) in itertools.product(found, found):
        zoo.same(one.gram(other), j @ k.T)
    zoo.check(Rows.stack([rows for _, rows in found]), torch.cat([j for j, _ in found]))


def test_products_of_passes_are_accumulated_in_float64():
    torch.manual_seed(0)
    model = nn.Linear(400, 1, bias=False)
    base = torch.randn(1, 400)
    one, other = (base + 3e-7 * torch.randn(2, 400) for _ in range(2))
    engine = PerExample(model)
    stack = Rows.stack([engine.rows(model(x).squeeze(1)) for x in (one, other)]).gram()
    exact = torch.cat([one, other]).double()
    smallest, expected = (torch.linalg.eigvalsh(g)[0] for g in (stack, exact @ exact.T))
    torch.testing.assert_close(smallest, expected, rtol=0.05, atol=0)


def test_passes_over_other_parameters_are_refused_with_their_names():
    model, x = mlp(3, 4, 2), torch.randn(5, 3).double()
    rows = PerExample(model).rows(losses_of(model, x))
    strange = mlp(3, 4, 2)
    foreign = PerExample(strange).rows(losses_of(strange, x))
    with pytest.raises(ValueError, match=r"same parameters of one model, but only one of them has 0\.weight, 0\.bias"):
        rows.gram(foreign)
    model[2].weight.requires_grad_(False)
    frozen = PerExample(model).rows(losses_of(model, x))
    with pytest.raises(ValueError, match=r"only one of them has 2\.weight$"):
        Rows.stack([rows, frozen])
    with pytest.raises(ValueError, match="at least one pass"):
        Rows.stack([])
    model[2].weight.requires_grad_(True)
    turned = nn.ModuleDict({"b": model[2], "a": model[0]})
    with pytest.raises(ValueError, match="but their order differs"):
        rows.gram(PerExample(turned).rows(model[2](torch.tanh(turned["a"](x))).sum(1)))


def test_parameters_of_a_layer_that_proved_right_are_kept_where_another_proved_wrong():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.shift = nn.Parameter(torch.randn(3).double()), nn.Parameter(torch.randn(3).double())
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.weight * self.calls + self.shift  # a second call has another gradient of the weight

    model, x = nn.Sequential(nn.Linear(3, 3).double(), Odd()), torch.randn(5, 3).double()
    engine = PerExample(model)
    losses = losses_of(model, x)
    j = zoo.jacobian(losses, list(model.parameters()))
    zoo.check(engine.rows(losses), j)
    assert engine.left_to_autograd == {"1.weight"}

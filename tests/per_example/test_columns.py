"""Several losses per example: rows against a naive loop over all of them, and what is held only once."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from steep.per_example import Outer, Patches, PerExample, Rows, _layers, closed_form, parts
from steep.per_example._columns import Interleaved, shared

SPEC = importlib.util.spec_from_file_location("zoo", Path(__file__).with_name("zoo.py"))
zoo = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(zoo)


pytestmark = pytest.mark.usefixtures("seeded_and_quiet")


def columns_of(model, x, most=3):
    """A loss of every third output of an example, (B, 3)."""
    out = model(x)
    flat = torch.cat([o.flatten(1) for o in out], 1) if isinstance(out, tuple) else out.flatten(1)
    count = min(most, flat.shape[1])
    return torch.stack([(flat.square() + 0.3 * flat)[:, r::count].sum(1) for r in range(count)], 1)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", zoo.ZOO)
def test_rows_equal_a_loop_over_examples_and_outputs(name, chunks):
    model, x = zoo.build(name)
    engine = PerExample(model)
    for _ in range(1 if parts.CHUNK == 60 else 2):
        losses = columns_of(model, x)
        j = zoo.jacobian(losses, trained(model))
        zoo.check(engine.rows(losses), j)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_inner_products_with_another_pass_of_other_outputs(name):
    model, x = zoo.build(name)
    engine = PerExample(model)
    found = []
    for losses in (columns_of(model, x), zoo.losses_of(model, x), columns_of(model, x, 2)):
        found.append((zoo.jacobian(losses, trained(model)), engine.rows(losses)))
    for (j, one), (k, other) in itertools.product(found, found):
        zoo.same(one.gram(other), j @ k.T)
    zoo.check(Rows.stack([rows for _, rows in found]), torch.cat([j for j, _ in found]))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_restricted_rows_have_the_same_columns_as_those_of_one_output(name):
    model, x = zoo.build(name)
    engine = PerExample(model)
    losses = columns_of(model, x)
    alone = [engine.rows(column, retain_graph=True) for column in losses.unbind(1)]
    rows = engine.rows(losses)
    part, *pieces = (r.restrict(0.5, torch.Generator().manual_seed(2)) for r in (rows, *alone))
    zoo.same(part.norms().view_as(losses), torch.stack([piece.norms() for piece in pieces], 1))
    w = torch.randn_like(losses)
    expected = [zoo.flatten(rows.params, piece.vjp(w[:, r])) for r, piece in enumerate(pieces)]
    zoo.same(zoo.flatten(rows.params, part.vjp(w.flatten())), torch.stack(expected).sum(0))


@pytest.mark.parametrize("name", ["mlp", "attention", "recurrent", "parameters_outside_layers"])
def test_lasting_rows_do_not_follow_the_parameters(name):
    model, x = zoo.build(name)
    engine = PerExample(model)
    losses = columns_of(model, x)
    j = zoo.jacobian(losses, trained(model))
    rows = engine.rows(losses).lasting()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    zoo.check(rows, j)


def test_one_column_is_a_vector():
    model, x = zoo.build("cnn_with_group_norm")
    engine = PerExample(model)
    losses = zoo.losses_of(model, x)
    one = engine.rows(losses[:, None], retain_graph=True)
    torch.testing.assert_close(one.gram(), engine.rows(losses).gram())


HELD = {
    "mlp": (nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)), (5, 3), Outer, "a"),
    "positions": (nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2), nn.Flatten()), (5, 2, 3), Outer, "a"),
    "reused": (nn.Sequential(*2 * [nn.Linear(3, 3)]), (5, 3), Outer, "a"),
    "cnn": (
        nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 20, 2), nn.Flatten()),
        (5, 3, 3, 3),
        Patches,
        "x",
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_what_the_outputs_of_an_example_share_is_held_once(name):
    model, shape, kind, field = HELD[name]
    engine = PerExample(model.double(), check=False)
    losses = model(torch.randn(shape, dtype=torch.float64))
    rows = engine.rows(losses)
    held = [part for part in rows.parts if isinstance(part, kind)]
    assert held
    for part in held:
        assert part.batch == losses.numel()
        assert len(getattr(part, field)) == 5
        assert part.share == losses.shape[1]


def test_equal_tensors_are_shared_and_unequal_ones_are_not():
    a = torch.randn(4, 2)
    assert shared([a, a.clone(), a[:]], 4) is a
    assert torch.equal(shared([a, 2 * a], 4), torch.stack([a, 2 * a], 1).flatten(0, 1))


def test_a_third_partys_kind_of_part():
    class Rank1(parts.Sliced):
        def __init__(self, params, j):
            self.params, self.j, self.batch = params, j, len(j)

        def rows(self, rows):
            return self.j[:, rows, None]

        def masked(self, masks):
            return Rank1(self.params, self.j * masks[0])

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, dtype=torch.float64))

        def forward(self, x):
            return x * self.weight

    @closed_form(Scale)
    def scale(layer, x, grad, batch):
        yield Rank1((layer.weight,), x * grad)

    try:
        model, x = nn.Sequential(Scale(), nn.Linear(3, 4).double()), torch.randn(5, 3, dtype=torch.float64)
        engine = PerExample(model)
        losses = model(x).square()
        j = zoo.jacobian(losses, trained(model))
        rows = engine.rows(losses)
        assert {type(part) for part in rows.parts} == {Interleaved, Outer}
        zoo.check(rows, j)
        zoo.check(rows.restrict(1.0, torch.Generator()), j)
    finally:
        _layers.RULES.pop(Scale)


def test_a_column_that_does_not_reach_a_layer_has_zeros_there():
    model = nn.ModuleDict({"trunk": nn.Linear(3, 4), "a": nn.Linear(4, 1), "b": nn.Linear(4, 2)}).double()
    engine = PerExample(model)
    hidden = torch.tanh(model["trunk"](torch.randn(5, 3, dtype=torch.float64)))
    losses = torch.cat([model["a"](hidden), model["b"](hidden)], 1)
    j = zoo.jacobian(losses, trained(model))
    rows = engine.rows(losses)
    zoo.check(rows, j)
    norms = rows.per_layer()["a"].norms().view_as(losses)
    assert bool((norms[:, 0] > 0).all())
    assert not norms[:, 1:].any()


def test_the_graph_is_let_go_or_kept_as_asked():
    model, x = zoo.build("mlp")
    engine = PerExample(model, check=False)
    losses = columns_of(model, x)
    first = engine.rows(losses, retain_graph=True).gram()
    assert torch.equal(engine.rows(losses).gram(), first)
    with pytest.raises(RuntimeError, match="second time"):
        engine.rows(losses)


def test_the_first_batch_is_checked():
    class Odd(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return self.calls * super().forward(x)

    model, x = nn.Sequential(Odd(3, 3), nn.Linear(3, 2)).double(), torch.randn(5, 3, dtype=torch.float64)
    engine = PerExample(model)
    losses = model(x)
    j = zoo.jacobian(losses, trained(model))
    zoo.check(engine.rows(losses), j)
    assert engine.left_to_autograd == {"0.weight", "0.bias"}


def test_mixed_precision():
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), torch.randn(6, 8)
    engine = PerExample(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(x).float()
    rows = engine.rows(losses)
    assert engine.left_to_autograd == set()
    j = zoo.jacobian(model(x), trained(model)).double()
    assert (rows.gram() - j @ j.T).norm() < 0.03 * (j @ j.T).norm()
    assert {len(part.a) for part in rows.parts} == {6}

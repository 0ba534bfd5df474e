"""Coherence: against NumPy and an explicit loop over the examples, limits, exact values of the metric, bad input."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steep.backward.coherence import AVERAGES, CoherentGradient, _clipped, _winsorized_mean, m_coherence, method
from steep.per_example import autodiff, parts
from steep.testing import rules


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="each step takes")
        yield


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def grads(model, rule, losses):
    model.zero_grad()
    rule(losses)
    return flat(p.grad for p in model.parameters())


def jacobian(losses, params):
    """One ordinary backward per example."""
    found = [torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True) for loss in losses]
    return torch.stack([flat(one) for one in found])


def winsorized(j, k):
    """By the words of the paper, in NumPy: set what lies beyond the k-th of either end to it, and average."""
    ordered = np.sort(j.numpy(), axis=0)
    return torch.from_numpy(np.clip(j.numpy(), ordered[k], ordered[len(j) - 1 - k]).mean(0))


class Reused(nn.Module):
    """A map used twice, a parameter of no layer, and a layer without a rule."""

    def __init__(self):
        super().__init__()
        self.twice, self.shift, self.bend = nn.Linear(4, 4), nn.Parameter(torch.randn(4)), nn.PReLU(4)

    def forward(self, x):
        return self.bend(self.twice(self.twice(x).tanh()) + self.shift * x.mean(1, keepdim=True).sin())


def layers():
    images, tokens = torch.randn(7, 2, 6, 6), torch.randint(5, (7, 6))
    return {
        "linear": (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(7, 4)),
        "sequence": (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)), torch.randn(7, 5, 4)),
        "convolution": (nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 2, 3)), images),
        "wide": (nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 16, 3, groups=4)), images),
        "embedding": (nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), tokens),
        "reused": (Reused(), torch.randn(7, 4)),
    }


def case(name):
    model, x = layers()[name]
    model, x = model.double(), x.double() if x.is_floating_point() else x
    return model, lambda: model(x).flatten(1).square().sum(1)


# ---- winsorized descent


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", layers())
def test_equals_the_loop_over_examples(name, tiny, monkeypatch):
    if tiny:  # every part takes several turns
        monkeypatch.setattr(parts, "CHUNK", 60)
        monkeypatch.setattr(autodiff, "CHUNK", 60)
        monkeypatch.setattr(autodiff, "COLUMNS", 20)
    model, losses = case(name)
    j = jacobian(losses(), list(model.parameters()))
    for clip, k in ((0.15, 1), (0.3, 2), (0.5, 3)):
        rule = CoherentGradient(model, clip=clip)
        for _ in range(2):  # the first batch is checked, and may be treated anew
            found = grads(model, rule, losses())
            torch.testing.assert_close(found, winsorized(j, k), rtol=1e-9, atol=1e-11)


def test_three_steps_equal_numpy():
    """Least squares of a linear map, whose gradients are written down."""
    model = nn.Linear(3, 1).double()
    w, b = model.weight.detach().numpy()[0].copy(), model.bias.item()
    optimizer, rule = torch.optim.SGD(model.parameters(), lr=0.1), CoherentGradient(model, clip=0.25)
    for _ in range(3):
        x, y = torch.randn(8, 3).double(), torch.randn(8).double()
        optimizer.zero_grad()
        rule((model(x).squeeze(1) - y).square())
        optimizer.step()
        error = x.numpy() @ w + b - y.numpy()
        each = 2 * error[:, None] * np.concatenate([x.numpy(), np.ones((8, 1))], 1)
        each = np.sort(each, 0)
        each[:2], each[6:] = each[2], each[5]
        w, b = w - 0.1 * each.mean(0)[:3], b - 0.1 * each.mean(0)[3]
        np.testing.assert_allclose(model.weight.detach().numpy()[0], w, rtol=1e-10)
        assert model.bias.item() == pytest.approx(b, rel=1e-10)


@pytest.mark.parametrize("name", layers())
def test_without_clipping_it_is_the_mean(name):
    model, losses = case(name)
    found = grads(model, CoherentGradient(model, clip=0.0), losses())
    torch.testing.assert_close(found, grads(model, lambda v: v.mean().backward(), losses()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 9])
def test_half_is_the_median(size):
    j = torch.randn(size, 20).double()
    torch.testing.assert_close(_winsorized_mean(j, 0.5), torch.from_numpy(np.median(j.numpy(), 0)))


@pytest.mark.parametrize(("clip", "size", "k"), [(0.08, 50, 4), (0.08, 8, 1), (0.04, 8, 0), (0.5, 8, 3), (0.3, 1, 0)])
def test_examples_that_are_clipped(clip, size, k):
    assert _clipped(clip, size) == k


def test_stays_in_the_range_and_forgets_the_order():
    j = torch.randn(11, 30).double()
    for clip in (0.1, 0.3, 0.5):
        found = _winsorized_mean(j, clip)
        assert (found >= j.min(0).values).all()
        assert (found <= j.max(0).values).all()
        assert torch.equal(found, _winsorized_mean(j[torch.randperm(11)], clip))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_type_of_numbers_and_without_changing_them(dtype):
    j = torch.randn(9, 1).to(dtype)
    before = j.clone()
    found = _winsorized_mean(j, 0.2)
    assert torch.equal(j, before)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), winsorized(before.double(), 2), rtol=2e-2, atol=1e-2)


def test_one_example_cannot_move_it_far():
    j = torch.randn(10, 5).double()
    far = j.clone()
    far[3] = 1e9
    far[3, 2:] = -1e9
    assert (_winsorized_mean(far, 0.1) <= j.max(0).values).all()
    assert (_winsorized_mean(far, 0.1) >= j.min(0).values).all()
    assert far.mean(0).abs().min() > 1e7


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("average", AVERAGES)
def test_what_is_not_finite_is_not_clipped_away(average, value):
    model, x = nn.Linear(3, 1), torch.randn(9, 3)
    x[4, 1] = value
    rule = CoherentGradient(model, average, clip=0.3)
    rule(model(x).squeeze(1))
    assert not model.weight.grad[0, 1].isfinite()
    assert model.weight.grad[0, 0].isfinite()


def test_warns_where_nothing_is_clipped():
    model = nn.Linear(3, 1)
    with pytest.warns(UserWarning, match=r"clip=0.08 clips none of 5 examples.*use clip >= 0.2"):
        CoherentGradient(model)(model(torch.randn(5, 3)).squeeze(1))


# ---- medians


def test_median_of_3_is_that_of_the_parts_of_the_batch():
    model, losses = case("linear")
    j = jacobian(losses(), list(model.parameters())).numpy()
    expected = np.median([j[:2].mean(0), j[2:4].mean(0), j[4:].mean(0)], axis=0)
    found = grads(model, CoherentGradient(model, "median-of-3"), losses())
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-9, atol=1e-12)


def test_median_of_3_equal_parts_is_the_gradient():
    model, x = nn.Linear(4, 1).double(), torch.randn(3, 4).double().repeat(3, 1)
    plain = grads(model, lambda v: v.mean().backward(), model(x).squeeze(1).square())
    found = grads(model, CoherentGradient(model, "median-of-3"), model(x).squeeze(1).square())
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("size", [1, 2])
def test_median_of_3_of_fewer_examples_is_the_mean(size):
    model, x = nn.Linear(4, 1).double(), torch.randn(size, 4).double()
    plain = grads(model, lambda v: v.mean().backward(), model(x).squeeze(1).square())
    found = grads(model, CoherentGradient(model, "median-of-3"), model(x).squeeze(1).square())
    torch.testing.assert_close(found, plain)


def test_rolling_takes_the_last_three_batches():
    model = nn.Linear(4, 1).double()
    rule, means = CoherentGradient(model, "rolling"), []
    for _ in range(6):
        x = torch.randn(5, 4).double()
        means.append(grads(model, lambda v: v.mean().backward(), model(x).squeeze(1).square()).numpy())
        found = grads(model, rule, model(x).squeeze(1).square())
        torch.testing.assert_close(found, torch.from_numpy(np.median(means[-3:], axis=0)), rtol=1e-9, atol=1e-12)


# ---- a backward rule


@pytest.mark.parametrize("check", rules.CHECKS)
@pytest.mark.parametrize("settings", [{"average": "median-of-3"}, {"average": "rolling"}], ids=str)
def test_rule_keeps_the_contract_in_every_setting(settings, check):
    check(dataclasses.replace(method, preset={**method.preset, **settings}))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"clip": -0.1}, r"clip=-0.1 must lie in \[0, 0.5\]"),
        ({"clip": 0.6}, "clip=0.6 must lie"),
        ({"clip": "x"}, "clip='x' must be a number"),
        ({"average": "mode"}, "average='mode' must be one of winsorized, median-of-3, rolling"),
    ],
)
def test_options_out_of_range(option, message):
    with pytest.raises(ValueError, match=message):
        CoherentGradient(nn.Linear(1, 1), **option)


def test_losses_that_are_no_vector_are_refused():
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"CoherentGradient needs losses of shape \(B,\), got \(4, 1\)"):
        CoherentGradient(model)(model(torch.randn(4, 2)))
    with pytest.raises(ValueError, match=r"m_coherence needs losses of shape \(B,\), got \(4, 1\)"):
        m_coherence(model, lambda m, x: m(x), [torch.randn(4, 2)])


# ---- the metric


def linear_losses(model, x):
    """Their gradients are the examples."""
    return model(x).squeeze(1)


def coherence(*batches):
    return m_coherence(nn.Linear(batches[0].shape[1], 1, bias=False).double(), linear_losses, batches)["total"]


def test_exact_values_of_the_metric():
    g = torch.randn(1, 4).double()
    assert coherence(g.repeat(7, 1)) == pytest.approx(7)
    assert coherence(g.repeat(3, 1), g.repeat(4, 1)) == pytest.approx(7)
    assert coherence(torch.eye(5).double()) == pytest.approx(1)
    assert coherence(torch.cat([g, -g])) == pytest.approx(0)
    assert np.isnan(coherence(torch.zeros(3, 4).double()))


def test_units_and_turns_do_not_matter_and_copies_multiply():
    x = torch.randn(9, 5).double()
    turn = torch.linalg.qr(torch.randn(5, 5).double())[0]
    plain = coherence(x)
    assert coherence(1e-6 * x) == pytest.approx(plain)
    assert coherence(x @ turn) == pytest.approx(plain)
    assert coherence(x, x, x) == pytest.approx(3 * plain)


@pytest.mark.parametrize("name", layers())
def test_by_layer_it_equals_the_loop_over_examples(name):
    model, losses = case(name)
    found = m_coherence(model, lambda m, batch: losses(), [None])
    names, pieces = zip(*model.named_parameters(), strict=True)
    by_layer = {}
    for parameter, piece in zip(names, pieces, strict=True):
        by_layer.setdefault(parameter.rpartition(".")[0], []).append(piece)
    for layer, params in {**by_layer, "total": list(pieces)}.items():
        j = jacobian(losses(), params)
        expected = j.sum(0).square().sum() / j.square().sum()
        assert found.pop(layer) == pytest.approx(expected.item(), rel=1e-9)
    assert not found


def test_looks_in_evaluation_mode_and_leaves_no_trace():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    before, batch = [t.clone() for t in model.state_dict().values()], (torch.randn(8, 4), torch.randint(3, (8,)))

    def losses(m, b):
        return F.cross_entropy(m(b[0]), b[1], reduction="none")

    first, second = (m_coherence(model, losses, [batch]) for _ in range(2))
    assert first == second
    assert model.training
    assert all(map(torch.equal, before, model.state_dict().values()))
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model)


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="number of batches=0 must be positive"):
        m_coherence(nn.Linear(1, 1), linear_losses, [])

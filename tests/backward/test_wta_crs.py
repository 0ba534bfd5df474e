"""WTA-CRS: the estimator by enumeration and in NumPy, exactness of all else, the memory of norms, and what is saved."""

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.checkpoint import checkpoint

from steep.adapters._attached import Attached
from steep.backward.wta_crs import (
    ESTIMATORS,
    HUGE,
    UNSEEN,
    WTACRS,
    _choose,
    _SampledLinear,
    _Site,
    _weights,
    _winners,
    method,
)
from steep.batches import Batch
from steep.loop.measure import saved_bytes
from steep.testing import rules
from steep.testing.methods import Subject

UNBIASED = [e for e in ESTIMATORS if e != "top-k"]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniforms(k, seed=0):
    return torch.rand(k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def heavy(m, seed=0):
    """Positive weights, a few of them large."""
    return random(m, seed=seed).exp() ** 2


def mlp(seed=0, dtype=torch.float64, inputs=6, hidden=5, outputs=3):
    model = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).to(dtype)
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.copy_(random(*p.shape, seed=100 * seed + k, dtype=dtype))
    return model


def rows_and_gradients(m, seed=0):
    """h (m, 5) and dz (m, 3) whose products have norms of very different sizes."""
    size = heavy(m, seed).sqrt().unsqueeze(1)
    return random(m, 5, seed=seed + 1) * size, random(m, 3, seed=seed + 2) * size


def grads(model, x, rule=None, target=1.0):
    model.zero_grad()
    losses = (model(x) - target).square().flatten(1).mean(1)
    losses.mean().backward() if rule is None else rule(losses)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---- the estimator


def criterion(w, k):
    """|C| by the paper's words: try them all."""
    p = np.sort(w)[::-1] / w.sum()
    return min(range(k), key=lambda c: (1 - p[:c].sum()) / (k - c))


def reference(w, u, estimator):
    """Rows and factors in NumPy, drawn rows by inverting the distribution function of the others."""
    k, order = len(u), sorted(range(len(w)), key=lambda i: -w[i])
    c = {"wta": criterion(w, k), "crs": 0, "top-k": k}[estimator]
    rest = np.array([0.0 if i in order[:c] else w[i] for i in range(len(w))])
    p = w / w.sum()
    found = [(i, 1.0) for i in order[:c]]
    for t in range(c, k):
        j = next(i for i in range(len(w)) if rest[: i + 1].sum() > u[t] * rest.sum())
        found.append((j, (1 - p[order[:c]].sum()) / (k - c) / p[j]))
    return [i for i, _ in found], [f for _, f in found]


@pytest.mark.parametrize("estimator", ["wta", "crs", "top-k"])
@pytest.mark.parametrize("k", [1, 2, 7, 19])
def test_rows_and_factors_equal_numpy(k, estimator):
    for seed in range(5):
        w, u = heavy(20, seed), uniforms(k, seed)
        index, factor = _choose(w, u, estimator)
        rows, factors = reference(w.numpy(), u.numpy(), estimator)
        assert index.tolist() == rows
        np.testing.assert_allclose(factor, factors, rtol=1e-10)


def outcomes(w, k, estimator):
    """Probability and (rows, factors) of all that can be drawn when one row is, and k - 1 are not."""
    steps = w.clone()
    if estimator == "wta":
        assert criterion(w.numpy(), k) == k - 1
        steps[w.topk(k - 1).indices] = 0
    sums = steps.cumsum(0)
    for j in range(len(w)):
        middle = (sums[j] - steps[j] / 2) / sums[-1]
        if steps[j] > 0:
            yield steps[j] / sums[-1], _choose(w, torch.full((k,), float(middle), dtype=torch.float64), estimator)


@pytest.mark.parametrize(("k", "estimator"), [(1, "crs"), (1, "wta"), (4, "wta")])
def test_every_outcome_times_its_probability_is_the_product(k, estimator):
    h, dz = rows_and_gradients(12)
    w = heavy(12, 7)  # any weights will do
    w[:3] *= 1e3
    total = sum(p * dz[i].T @ (h[i] * f[:, None]) for p, (i, f) in outcomes(w, k, estimator))
    torch.testing.assert_close(total, dz.T @ h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("k", "estimator"), [(1, "crs"), (4, "wta")])
def test_variance_of_one_drawn_row_is_the_closed_form(k, estimator):
    """R^2 - |sum of the others|^2, with weights |h| |dz| and R their sum over the others."""
    h, dz = rows_and_gradients(12)
    h[:3] *= torch.tensor([[1e3], [1e3], [1e4]])
    w = h.norm(dim=1) * dz.norm(dim=1)
    exact = dz.T @ h
    variance = sum(
        p * (dz[i].T @ (h[i] * f[:, None]) - exact).square().sum() for p, (i, f) in outcomes(w, k, estimator)
    )
    others = torch.ones(12, dtype=torch.bool).index_fill(0, w.topk(k - 1).indices, False)
    closed = w[others].sum() ** 2 - (dz[others].T @ h[others]).square().sum()
    torch.testing.assert_close(variance, closed, rtol=1e-8, atol=0)


@pytest.mark.parametrize("estimator", ["wta", "crs"])
def test_factors_of_many_draws_have_mean_one(estimator):
    w, total, squares, draws = heavy(40, 3), torch.zeros(40).double(), torch.zeros(40).double(), 4000
    for seed in range(draws):
        index, factor = _choose(w, uniforms(8, seed), estimator)
        found = torch.zeros(40).double().index_add(0, index, factor)
        total, squares = total + found, squares + found.square()
    mean = total / draws
    error = ((squares / draws - mean.square()) / draws).sqrt()
    assert ((mean - 1).abs() <= 4.5 * error + 1e-12).all()


def test_count_of_winners_is_the_best_and_meets_the_papers_condition():
    counts = set()
    for seed in range(40):
        w, k = heavy(30, seed), 2 + seed % 20
        top = w.topk(k)
        c = int(_winners(top.values, w.sum() - top.values.sum()))
        assert c == criterion(w.numpy(), k)
        share = float(top.values[:c].sum() / w.sum())
        assert share > c / k or c == 0
        counts.add(c)
    assert len(counts) > 5


def test_equal_weights_have_no_winners_and_are_plain_crs():
    w, u = torch.ones(30).double(), uniforms(6)
    for found, expected in zip(_choose(w, u), _choose(w, u, "crs"), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(_choose(w, u)[1], torch.full((6,), 5.0).double())


@pytest.mark.parametrize("estimator", ["wta", "crs"])
def test_rows_of_no_weight_are_never_drawn(estimator):
    w = heavy(30)
    w[::2] = 0
    edges = torch.tensor([0.0, 1e-300, 0.5, 1 - 2**-53], dtype=torch.float64)
    for u in (edges, *(uniforms(4, seed) for seed in range(50))):
        assert (_choose(w, u, estimator)[0] % 2 == 1).all()


@pytest.mark.parametrize("estimator", ["wta", "crs"])
def test_a_sum_of_few_rows_is_exact_and_one_of_none_is_zero(estimator):
    w, x = torch.zeros(9).double(), random(9, 4)
    x[[0, 1, 3, 4, 6, 7, 8]] = 0
    index, factor = _choose(w, uniforms(3), estimator)
    assert factor.isfinite().all()
    w[2], w[5] = 1.0, 7.0
    index, factor = _choose(w, uniforms(3))
    torch.testing.assert_close((x[index] * factor[:, None]).sum(0), x.sum(0))


def test_fewer_errors_than_crs_and_no_bias_unlike_the_largest_alone():
    """256 rows with heavy tails, 64 kept."""
    h, dz = (random(256, 16, seed=s) * random(256, seed=9).exp().unsqueeze(1) for s in (1, 2))
    w, exact, draws = h.norm(dim=1) * dz.norm(dim=1), dz.T @ h, 300
    found = {}
    for estimator in ("wta", "crs", "top-k"):
        estimates = []
        for seed in range(draws):
            i, f = _choose(w, uniforms(64, seed), estimator)
            estimates.append(dz[i].T @ (h[i] * f[:, None]))
        each = torch.stack(estimates)
        variance = (each - each.mean(0)).square().sum((1, 2)).mean()
        found[estimator] = variance, (each.mean(0) - exact).square().sum()
    assert found["wta"][0] < 0.5 * found["crs"][0]
    for estimator in ("wta", "crs"):
        variance, bias = found[estimator]
        assert bias < 1.5 * variance / draws
    assert found["top-k"][0] < 1e-20
    assert found["top-k"][1] > 10 * found["wta"][0] / draws


# ---- weights


def test_weights_are_norms_times_remembered_norms():
    h = random(6, 4)
    seen = torch.tensor([UNSEEN, 2.0, 4.0, 0.0, UNSEEN, 1e-6])
    mean = 6.000001 / 4
    g = torch.tensor([mean, 2.0, 4.0, 0.1 * mean, mean, 0.1 * mean])
    torch.testing.assert_close(_weights(h, seen, 0.1), h.norm(dim=1) * g, rtol=1e-6, atol=0)
    assert _weights(h, seen)[3] == 0
    torch.testing.assert_close(_weights(h, None), h.norm(dim=1))


@pytest.mark.parametrize("seen", [UNSEEN, 0.0])
def test_norms_of_the_inputs_alone_where_nothing_is_known(seen):
    h = random(6, 4)
    torch.testing.assert_close(_weights(h, torch.full((6,), seen), 0.3), h.norm(dim=1))


def test_half_precision_does_not_overflow_and_rows_that_are_not_finite_are_kept():
    h = torch.full((5, 400), 6e4, dtype=torch.float16)
    torch.testing.assert_close(_weights(h, None), torch.full((5,), 1.2e6).double(), rtol=1e-3, atol=0)
    h[1, 3], h[2, 0] = math.nan, math.inf
    assert _weights(h, None).tolist()[1:3] == [HUGE, HUGE]
    index, factor = _choose(_weights(h, None), uniforms(3))
    assert set(index.tolist()) >= {1, 2}
    assert factor.isfinite().all()


# ---- the layers


def bfloat(a):
    return torch.from_numpy(np.asarray(a)).bfloat16().double().numpy()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_steps_equal_numpy_written_from_the_formula(estimator):
    """Two layers, batches of 8 of 12 examples, the norms of the last visit; 6 steps of SGD."""
    model = mlp()
    p = {name: v.detach().numpy().copy() for name, v in model.named_parameters()}
    rule = WTACRS(model, ratio=0.5, min_k=1, estimator=estimator, floor=0.1, layers="*", seed=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = random(12, 6, seed=50), random(12, 3, seed=51)
    numbers, memory = torch.Generator().manual_seed(5), {0: {}, 2: {}}

    def estimate(layer, h, ids):
        u = torch.rand(4, dtype=torch.float64, generator=numbers).numpy()
        seen = [memory[layer].get(i) for i in ids]
        known = [s for s in seen if s is not None]
        mean = sum(known) / len(known) if known else 1.0
        g = [mean if s is None else max(s, 0.1 * mean) for s in seen]
        w = np.ones(8) if estimator == "uniform" else np.linalg.norm(h, axis=1) * g
        rows, factors = reference(w, u, "crs" if estimator == "uniform" else estimator)

        def gradient(dz):
            memory[layer].update(zip(ids, bfloat(np.linalg.norm(dz, axis=1)), strict=True))
            return sum(f * np.outer(dz[j], h[j]) for j, f in zip(rows, factors, strict=True))

        return gradient

    for step in range(6):
        ids = torch.randperm(12, generator=torch.Generator().manual_seed(step))[:8]
        a, b = x[ids].numpy(), y[ids].numpy()
        first = estimate(0, a, ids.tolist())
        hidden = np.tanh(a @ p["0.weight"].T + p["0.bias"])
        second = estimate(2, hidden, ids.tolist())
        error = hidden @ p["2.weight"].T + p["2.bias"] - b
        dz2 = 2 * error / 24
        dz1 = dz2 @ p["2.weight"] * (1 - hidden**2)
        p["2.weight"] = p["2.weight"] - 0.1 * second(dz2)
        p["2.bias"] = p["2.bias"] - 0.1 * dz2.sum(0)
        p["0.weight"] = p["0.weight"] - 0.1 * first(dz1)
        p["0.bias"] = p["0.bias"] - 0.1 * dz1.sum(0)

        optimizer.zero_grad()
        rule.indices = ids
        rule((model(x[ids]) - y[ids]).square().mean(1))
        optimizer.step()
        for name, parameter in model.named_parameters():
            np.testing.assert_allclose(parameter.detach(), p[name], rtol=1e-9, atol=1e-12, err_msg=f"{step} {name}")


@pytest.mark.parametrize("shape", [(40, 6), (8, 5, 6), (2, 4, 5, 6)])
def test_outputs_and_gradients_of_inputs_and_biases_are_exact(shape):
    model, x = mlp(), random(*shape).requires_grad_()
    exact = grads(model, x)
    of_x, output = x.grad.clone(), model(x).detach()
    x.grad = None
    rule = WTACRS(model, ratio=0.2, layers="*")
    assert torch.equal(model(x), output)
    sampled = grads(model, x, rule)
    torch.testing.assert_close(x.grad, of_x)
    for name in exact:
        close = torch.allclose(exact[name], sampled[name], rtol=1e-10)
        assert close == name.endswith("bias")


def test_factors_too_large_for_half_precision(monkeypatch):
    """A row so small that its factor alone would overflow can be drawn."""
    monkeypatch.setattr(_Site, "choose", lambda *_: (torch.arange(6), torch.full((6,), 1e6, dtype=torch.float64)))
    WTACRS(model := mlp(dtype=torch.float16), layers="0")
    found = grads(model, torch.full((20, 6), 1e-3, dtype=torch.float16))
    assert all(g.isfinite().all() for g in found.values())
    assert found["0.weight"].abs().max() > 10


@pytest.mark.parametrize("estimator", UNBIASED)
@pytest.mark.parametrize("remembered", [False, True])
def test_the_mean_of_many_gradients_is_the_exact_one(estimator, remembered):
    """Also with norms that are wrong, zero or missing."""
    model, x = mlp(), random(30, 6) * heavy(30).sqrt().unsqueeze(1)
    exact = grads(model, x)["0.weight"]
    rule = WTACRS(model, ratio=0.3, estimator=estimator, layers="0")
    stale = heavy(30, 8).bfloat16().unsqueeze(1)
    stale[::4], stale[1::4] = UNSEEN, 0
    found = []
    for _ in range(800):
        if remembered:
            rule.indices, rule.layers["0"].site.norms = torch.arange(30), stale.clone()
        found.append(grads(model, x, rule)["0.weight"])
    found = torch.stack(found)
    off, noise = (found.mean(0) - exact).square().sum(), found.var(0).sum() / len(found)
    assert off < 6 * noise  # one direction may hold all of the noise
    rule.estimator = "top-k"
    assert (grads(model, x, rule)["0.weight"] - exact).square().sum() > 15 * noise


def test_all_rows_is_the_exact_gradient_bit_for_bit():
    model, x = mlp(), random(20, 6)
    exact = grads(model, x)
    same(grads(model, x, WTACRS(model, ratio=1.0, layers="*")), exact)
    same(grads(mlp(), x[:4], WTACRS(model := mlp(), ratio=0.1, layers="*")), grads(model, x[:4]))


def test_few_rows_are_all_kept():
    rule = WTACRS(mlp(), ratio=0.3, min_k=10)
    assert [rule.kept(rows) for rows in (0, 1, 10, 11, 33, 34, 100)] == [0, 1, 10, 10, 10, 10, 30]


def test_evaluation_frozen_weights_and_no_gradients_draw_nothing():
    model, x = mlp(), random(20, 6)
    exact = grads(model, x)
    rule = WTACRS(model, layers="*")
    before = rule.generator.get_state()
    same(grads(model.eval(), x, rule), exact)
    with torch.no_grad():
        model.train()(x)
    model.requires_grad_(False)
    model(x.requires_grad_()).sum().backward()
    assert torch.equal(rule.generator.get_state(), before)


def test_frozen_inputs_and_missing_biases():
    layer, x = nn.Linear(6, 3, bias=False).double(), random(20, 6)
    WTACRS(model := nn.Sequential(layer), layers="*")
    model(x).sum().backward()
    assert x.grad is None
    assert layer.weight.grad.isfinite().all()


def test_a_second_derivative_is_refused():
    model, x = mlp(), random(20, 6).requires_grad_()
    WTACRS(model, layers="*")
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_in_other_types(dtype):
    model, x = mlp(dtype=dtype), random(64, 6, dtype=torch.float32).to(dtype)
    rule = WTACRS(model, ratio=0.9, layers="*")
    exact = grads(copy.deepcopy(model), x)
    rule.indices = torch.arange(64, dtype=torch.int32)
    found = grads(model, x, rule)
    for name, g in found.items():
        assert g.dtype == dtype
        assert (g - exact[name]).float().norm() < 0.5 * exact[name].float().norm()


def test_under_autocast_rows_are_kept_in_its_type():
    model, x = mlp(dtype=torch.float32), random(64, 6, dtype=torch.float32)
    rule, exact = WTACRS(model, ratio=0.9, layers="*"), grads(copy.deepcopy(model), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        assert saved_bytes(lambda: model[0](x), model) == 57 * (6 * 2 + 4)
        losses = (model(x) - 1).square().mean(1)
    rule(losses)
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        assert (p.grad - exact[name]).norm() < 0.5 * exact[name].norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing_the_rows_are_those_of_the_second_run(reentrant):
    x, drawn = random(20, 6), {}
    for again in (False, True):
        model = mlp()
        rule = WTACRS(model, ratio=0.3, layers="0")
        rule.indices = torch.arange(20)
        if not again and not reentrant:
            torch.rand(6, dtype=torch.float64, generator=rule.generator)  # what the first run draws
        outer = x.clone().requires_grad_()
        out = checkpoint(model, outer, use_reentrant=reentrant) if again else model(outer)
        rule(out.square().mean(1))
        drawn[again] = {name: p.grad for name, p in model.named_parameters()}
        assert (rule.layers["0"].site.norms >= 0).sum() == 20
    same(drawn[True], drawn[False])


def test_weights_changed_between_forward_and_backward_are_noticed():
    model, x = mlp(), random(20, 6).requires_grad_()
    WTACRS(model, layers="*")
    losses = model(x).square().mean(1)
    with torch.no_grad():
        model[2].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.mean().backward()


@pytest.mark.parametrize("check", rules.CHECKS)
@pytest.mark.parametrize("settings", [{"layers": "*"}, {"layers": "*", "cache": False}], ids=str)
def test_rule_keeps_the_contract_in_every_setting(settings, check):
    check(dataclasses.replace(method, preset={**method.preset, **settings}))


# ---- what is kept


@pytest.mark.parametrize(("ratio", "share"), [(0.3, 0.31), (0.1, 0.11)])
def test_a_layer_keeps_that_share_of_its_input(ratio, share):
    layer, x = nn.Linear(64, 8), random(8, 32, 64, dtype=torch.float32).requires_grad_()
    model = nn.Sequential(layer)
    assert saved_bytes(lambda: model(x), model) == 8 * 32 * 64 * 4
    WTACRS(model, ratio=ratio, layers="0")
    k = int(ratio * 256)
    assert saved_bytes(lambda: model(x), model) == k * (64 * 4 + 4)
    assert k * (64 * 4 + 4) < share * 256 * 64 * 4


def test_saved_bytes_counts_memory_once_and_no_parameters():
    x, model = torch.ones(10, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert saved_bytes(lambda: model[0](x) + model[1](x), model) == 160
    assert saved_bytes(lambda: model[0](x[:2]), model) == 160
    assert saved_bytes(lambda: model(x), model) == 320
    with torch.no_grad():
        assert saved_bytes(lambda: model(x), model) == 0


# ---- the memory of norms


def norms(rule, layer="0"):
    return rule.layers[layer].site.norms


def test_norms_belong_to_examples_and_positions():
    model, x = mlp(), random(9, 4, 6)
    rule, expected = WTACRS(model, layers="0"), torch.zeros(9, 4)
    for ids in ([4, 8, 0], [1, 2, 3], [7, 6, 5]):
        rule.indices = torch.tensor(ids)
        z = (hidden := model[0](x[ids])).tanh()
        hidden.retain_grad()
        rule(model[2](z).square().flatten(1).mean(1))
        expected[ids] = hidden.grad.norm(dim=2).float()
    torch.testing.assert_close(norms(rule).float(), expected, rtol=2**-8, atol=0)
    recalled = rule.layers["0"].site.recall(torch.tensor([3, 8]), 2)
    torch.testing.assert_close(recalled, norms(rule)[[3, 8], :2].flatten())


def test_longer_and_shorter_sequences_and_new_examples():
    model = mlp()
    rule = WTACRS(model, min_k=1, layers="0")
    for ids, length in (([0, 1], 3), ([5, 1], 5), ([2, 0], 2)):
        rule.indices = torch.tensor(ids)
        grads(model, random(2, length, 6), rule)
    seen = norms(rule)[:6] >= 0
    assert seen.sum(1).tolist() == [3, 5, 2, 0, 0, 5]


def test_rows_of_other_examples_are_neither_weighted_nor_remembered():
    model = mlp()
    rule = WTACRS(model, min_k=1, layers="0")
    rule.indices = torch.arange(7)
    grads(model, random(20, 6), rule)
    assert norms(rule).numel() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_norms_that_are_not_finite_are_not_remembered(value):
    model, x = mlp(), random(20, 6)
    rule = WTACRS(model, layers="0")
    rule.indices, x[3] = torch.arange(20), value
    assert not grads(model, x, rule)["0.weight"].isfinite().any()
    assert norms(rule)[3] == UNSEEN
    x[3] = 1.0
    assert grads(model, x, rule)["0.weight"].isfinite().all()
    assert norms(rule)[3] > 0


def test_without_a_memory_indices_are_not_needed_nor_kept():
    model = mlp()
    rule = WTACRS(model, cache=False, layers="0")
    rule.indices = torch.arange(20)
    grads(model, random(20, 6), rule)
    assert norms(rule).numel() == 0
    assert rule.requires == {"model"}
    assert WTACRS(mlp()).requires == {"model", "indices"}


def test_fit_and_other_hosts_tell_the_indices():
    training = Subject(method).start()
    for _ in range(8):
        training.advance()
    (site,) = (module.site for module in training.rule.layers.values())
    assert (site.norms >= 0).sum() == 64
    rule = WTACRS(model := mlp())
    attached = Attached("a host", model, rule, (), {})
    for ids in (torch.arange(3), torch.arange(5)):
        attached.look_at(Batch(torch.ones(len(ids), 6), torch.zeros(len(ids)), ids))
        assert torch.equal(rule.indices, ids)


# ---- handle


def test_remove_leaves_the_model_as_it_was():
    model, x = mlp(), random(20, 6)
    before, exact = {**model.state_dict()}, grads(model, x)
    rule = WTACRS(model, layers="*")
    assert isinstance(model[0], _SampledLinear)
    same(model.state_dict(), before)
    rule.remove()
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert not any("site" in vars(m) for m in model)
    same(grads(model, x, rule), exact)
    WTACRS(model).remove()


def test_copies_and_pickles_of_the_model_are_exact():
    model, x = mlp(), random(20, 6)
    exact = grads(model, x)
    rule = WTACRS(model, layers="*")
    state = rule.generator.get_state()
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(grads(clone, x), exact)
        WTACRS(clone, layers="*")
        assert not torch.equal(grads(clone, x)["0.weight"], exact["0.weight"])
    assert torch.equal(rule.generator.get_state(), state)


def test_the_state_of_other_layers_is_refused():
    state = WTACRS(mlp(), layers="*").state_dict()
    with pytest.raises(ValueError, match=r"\['0', '2'\].*\['0'\]"):
        WTACRS(mlp(), layers="0").load_state_dict(state)


def test_which_layers():
    def chosen(model, **layers):
        rule = WTACRS(model, **layers)
        found = list(rule.layers)
        rule.remove()
        return found

    model = nn.ModuleDict({"a": nn.Linear(2, 2), "attention": nn.MultiheadAttention(4, 2), "b": nn.Linear(2, 2)})
    model["c"] = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert chosen(model) == ["a"]
    assert chosen(model, layers="*") == ["a", "b"]
    assert chosen(model, layers=lambda name, module: name == "b" and module.in_features == 2) == ["b"]
    for layers in ("c", "attention.out_proj", "nothing"):
        with pytest.raises(ValueError, match=r"layers='.*chooses no layer out of the Linear layers \['a', 'b'\]"):
            WTACRS(model, layers=layers)
    WTACRS(model, layers="*")
    with pytest.raises(ValueError, match="layers"):
        WTACRS(model)


@pytest.mark.parametrize(
    "bad",
    [{"ratio": 0.0}, {"ratio": 1.1}, {"min_k": 0}, {"min_k": 2.5}, {"floor": 1.5}, {"estimator": "topk"}],
    ids=str,
)
def test_refuses_arguments_out_of_range(bad):
    with pytest.raises(ValueError, match="{}={!r}".format(*next(iter(bad.items())))):
        WTACRS(mlp(), **bad)


@pytest.mark.parametrize("indices", [torch.ones(3), torch.tensor([0, -1]), torch.zeros(2, 2).long()])
def test_refuses_indices_that_are_none(indices):
    with pytest.raises(ValueError, match="indices="):
        WTACRS(mlp()).indices = indices


def test_seeds_and_repr():
    x = random(40, 6)
    first, other = (grads(model := mlp(), x, WTACRS(model, seed=seed)) for seed in (0, 1))
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert repr(WTACRS(mlp())) == "WTACRS(wta, ratio=0.3, min_k=4, cache=True, floor=0.3, layers=['0'])"


# ---- learning


def trained(seed, **hyper):
    """Training loss on digits after 16 epochs of SGD."""
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    x, y = x[:512].float() / 16, y[:512]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    rule = WTACRS(model, min_k=1, layers="*", seed=seed, **hyper)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    g = torch.Generator().manual_seed(seed)
    for _ in range(16):
        for ids in torch.randperm(512, generator=g).split(64):
            optimizer.zero_grad()
            rule.indices = ids
            rule(F.cross_entropy(model(x[ids]), y[ids], reduction="none"))
            optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


def test_learns_from_30_percent_of_the_rows_and_more_than_from_uniform_or_the_largest():
    wta, uniform, largest = ([trained(s, estimator=e) for s in range(4)] for e in ("wta", "uniform", "top-k"))
    assert sum(wta) < 0.9 * sum(uniform), (wta, uniform)
    assert all(ours < 0.3 * biased for ours, biased in zip(wta, largest, strict=True)), (wta, largest)
    assert max(wta) < 0.3

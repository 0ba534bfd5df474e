"""AdAdaGrad's tests against NumPy on explicit gradients, its batches in a training run, and AdaGrad-Norm."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import steep
from steep.method import Method, Paper
from steep.optim._growing import GrowingBatches
from steep.optim.adadagrad import _TESTS, AdaGradNorm, AdaptiveBatchSize, adadagrad, method
from steep.testing.optimizers import CHECKS


class Size:
    """Batches as far as the rule can see them."""

    def __init__(self, batch_size=2, maximum=10**9):
        self.batch_size, self.maximum, self.asked = batch_size, maximum, []

    def grow(self, size):
        self.asked.append(size)
        self.batch_size = min(max(self.batch_size, int(np.ceil(size))), self.maximum)


def network(seed=0, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = (nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(108, 5), nn.ReLU())
        return nn.Sequential(*body, nn.Linear(5, 3)).to(dtype)


def examples(n, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=g, dtype=torch.float64).to(dtype), torch.randint(3, (n,), generator=g)


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def gradients(model, batch):
    """Of every example, one after the other: (B, P)."""
    rows = [torch.autograd.grad(each, list(model.parameters()), retain_graph=True) for each in losses(model, batch)]
    return np.stack([np.concatenate([g.numpy().ravel() for g in row]) for row in rows])


def reference(g, test, eta, nu):
    """The formulas."""
    mean, b = g.mean(0), len(g)
    length = (mean**2).sum()
    products = g @ mean
    aligned = products.var(ddof=1) / (eta**2 * length**2)
    across = (g - np.outer(products, mean) / length).var(0, ddof=1).sum() / (nu**2 * length)
    moving = mean != 0
    return {
        "norm": sum((g[:, j] - mean[j]) @ (g[:, j] - mean[j]) / (b - 1) for j in range(g.shape[1])) / (eta**2 * length),
        "inner-product": aligned,
        "augmented": max(aligned, across),
        "coordinate-wise": (g.var(0, ddof=1)[moving] / (eta**2 * mean[moving] ** 2)).max(),
    }[test]


def after_a_batch(model, batch, parts=1, size=2, **options):
    """A rule after one batch, in so many parts of unequal sizes."""
    rule, n = AdaptiveBatchSize(model, Size(size), **options), len(batch[1])
    cuts = [n * k * k // parts**2 for k in range(1, parts)]
    for x, y in zip(*(t.tensor_split(cuts) for t in batch), strict=True):
        rule(losses(model, (x, y)), scale=len(y) / n)
    rule.step()
    return rule


# ---- the tests


@pytest.mark.parametrize("test", _TESTS)
@pytest.mark.parametrize(("eta", "nu"), [(0.5, 1.0), (0.3, 0.2)])
@pytest.mark.parametrize("n", [2, 3, 11])
def test_demands_are_the_formulas_on_explicit_gradients(test, eta, nu, n):
    model, batch = network(), examples(n)
    expected = reference(gradients(model, batch), test, eta, nu)
    rule = after_a_batch(model, batch, test=test, eta=eta, nu=nu)
    assert rule.demand == pytest.approx(expected, rel=1e-9)
    assert rule.batches.batch_size == max(2, np.ceil(expected))


def test_demands_in_single_precision():
    model, batch = network(dtype=torch.float32), examples(16, dtype=torch.float32)
    for test in ("norm", "inner-product", "augmented"):
        expected = reference(gradients(network(), examples(16)), test, 0.5, 1.0)
        assert after_a_batch(model, batch, test=test).demand == pytest.approx(expected, rel=1e-3)


def test_the_gradient_is_the_mean():
    model, clone, batch = network(), network(), examples(9)
    after_a_batch(model, batch)
    losses(clone, batch).mean().backward()
    for p, q in zip(model.parameters(), clone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("test", ["norm", "coordinate-wise"])
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_a_batch_in_parts_counts_as_one(test, parts):
    model, clone, batch = network(), network(), examples(17)
    whole, rule = after_a_batch(clone, batch, test=test), after_a_batch(model, batch, parts, test=test)
    assert rule.demand == pytest.approx(whole.demand, rel=1e-8)
    for p, q in zip(model.parameters(), clone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("test", ["inner-product", "augmented"])
def test_inner_products_need_the_batch_whole(test):
    with pytest.raises(RuntimeError, match=f"test='{test}' needs batches whole: accumulate=1, or test='norm'"):
        after_a_batch(network(), examples(8), 2, test=test)


class Point(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        return 0.5 * (self.w - x).square().sum(1)


def spread_points(n=40, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=g, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5]) + 1


@pytest.mark.filterwarnings("ignore:each step takes one more backward")
def test_on_squared_distances_the_noise_is_the_covariance_of_the_data():
    x, w = spread_points(), torch.tensor([4.0, 1.0, -2.0], dtype=torch.float64)
    covariance, g = np.cov(x.numpy().T), (w - x.mean(0)).numpy()
    expected = {
        "norm": np.trace(covariance) / (0.25 * g @ g),
        "inner-product": g @ covariance @ g / (0.25 * (g @ g) ** 2),
        "coordinate-wise": (np.diag(covariance) / (0.25 * g**2)).max(),
    }
    for test, value in expected.items():
        rule = AdaptiveBatchSize(Point(w.clone()), Size(), test=test)
        rule(rule.engine.model(x))
        rule.step()
        assert rule.demand == pytest.approx(value, rel=1e-10)


def test_noise_splits_into_what_is_along_the_mean_and_what_is_across():
    model, batch = network(), examples(12)
    along = after_a_batch(model, batch, test="inner-product", eta=1.0).demand
    across = after_a_batch(model, batch, test="augmented", eta=1e6, nu=1.0).demand
    assert after_a_batch(model, batch, test="norm", eta=1.0).demand == pytest.approx(along + across, rel=1e-9)


@pytest.mark.parametrize("test", _TESTS)
def test_equal_examples_never_ask_for_more(test):
    x, y = examples(1, dtype=torch.float32)
    rule = after_a_batch(network(dtype=torch.float32), (x.expand(8, -1, -1, -1), y.expand(8)), test=test, eta=1e-2)
    assert rule.demand < 1
    assert rule.batches.batch_size == 2


@pytest.mark.filterwarnings("ignore:each step takes one more backward")
@pytest.mark.parametrize("test", _TESTS)
def test_a_zero_mean_keeps_the_size(test):
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    rule = AdaptiveBatchSize(Point(torch.zeros(2)), Size(), test=test)
    rule(rule.engine.model(x))
    rule.step()
    assert (rule.demand, rule.batches.batch_size) == (0, 2)


def test_the_noise_is_estimated_without_bias():
    """Var with 1/(b-1): over batches of 4 from a normal distribution, numerators average to its variance, 1 + 1."""
    g, found = torch.Generator().manual_seed(0), []
    rule = AdaptiveBatchSize(nn.Linear(2, 1, bias=False).double(), Size())
    for _ in range(1500):
        x = 3 + torch.randn(4, 2, generator=g, dtype=torch.float64)
        rule(rule.engine.model(x).squeeze(1))  # the gradients are x
        rule.step()
        rule.batches.batch_size = 2
        found.append(rule.demand * 0.25 * float(x.mean(0).square().sum()))
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found) - 2) < 4 * error
    assert error < 0.05


def test_short_batches_are_not_tested():
    assert after_a_batch(network(), examples(7), size=8).batches.asked == []
    assert len(after_a_batch(network(), examples(8), size=8).batches.asked) == 1


def test_a_gradient_that_is_not_finite_leaves_the_size_alone():
    batches = GrowingBatches(steep.tensor_loader(*examples(20), batch_size=2))
    rule = AdaptiveBatchSize(network(), batches)
    rule(losses(rule.engine.model, examples(4)) * torch.tensor([1.0, np.nan, 1.0, 1.0]))
    rule.step()
    assert batches.batch_size == 2


def test_interval():
    model, batch = network(), examples(8)
    rule = AdaptiveBatchSize(model, Size(), eta=1e9, interval=3)
    for _ in range(7):
        rule(losses(model, batch))
        rule.step()
    assert len(rule.batches.asked) == 2  # after 3 steps and 6


def test_at_the_maximum_the_rule_is_the_plain_mean():
    model, clone, batch = network(), network(), examples(8)
    rule = AdaptiveBatchSize(model, Size(4, maximum=4))
    rule(losses(model, batch), scale=0.25)
    (losses(clone, batch).mean() * 0.25).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), clone.parameters(), strict=True))
    rule.step()
    assert rule.batches.asked == []


def test_forgetting_step_is_told():
    model, batch = network(), examples(8)
    rule, optimizer = AdaptiveBatchSize(model, Size()), torch.optim.SGD(model.parameters(), lr=0.1)
    rule(losses(model, batch))
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"call rule.step\(\) after optimizer.step\(\)"):
        rule(losses(model, batch))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"test": "luck"}, "test='luck' must be one of norm, inner-product, augmented, coordinate-wise"),
        ({"eta": 0.0}, r"eta=0.0 must lie in \(0, inf\)"),
        ({"nu": -1.0}, r"nu=-1.0 must lie in \(0, inf\)"),
        ({"interval": 0}, "interval=0 must be a whole number of at least 1"),
        ({"interval": 1.5}, "interval=1.5 must be a whole number"),
    ],
)
def test_arguments_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveBatchSize(network(), Size(), **wrong)


def test_batchnorm_is_refused_by_name():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with pytest.raises(steep.UnmetRequirement, match=r"2 \(BatchNorm1d\) is in training mode: use nn.GroupNorm"):
        AdaptiveBatchSize(model, Size())(losses(model, examples(4)))


def test_a_scalar_loss_is_refused():
    model = network()
    with pytest.raises(ValueError, match="one entry per example"):
        AdaptiveBatchSize(model, Size())(losses(model, examples(4)).mean())


def test_parameters_that_a_loss_does_not_use_get_no_gradient():
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    for test in _TESTS:
        rule = AdaptiveBatchSize(model, Size(), test=test)
        rule(model["used"](torch.randn(5, 2)).squeeze(1))
        rule.step()
        assert model["unused"].weight.grad is None
        assert model["used"].weight.grad is not None


# ---- in a training run


def recipe(**changes):
    """Digits, an MLP of 5000 weights, batches of 8."""
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    return steep.Recipe(
        data=lambda g: steep.split_loaders(x.float() / 16, y, g, batch_size=8),
        model=lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        loss=nn.CrossEntropyLoss(reduction="none"),
        optimizer=lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR,
        metric=steep.accuracy,
        budget=steep.Budget(epochs=1),
    ).replace(**changes)


def fit(recipe, **arguments):
    return steep.fit(recipe, progress=False, **arguments)


def test_a_tolerance_of_everything_is_plain_adagrad():
    plain, ours = fit(recipe()), fit(method(recipe(), eta=1e9))
    np.testing.assert_allclose(ours.history.losses, plain.history.losses, rtol=2e-4)
    assert ours.examples == plain.examples


@pytest.mark.parametrize("adapt", ["coordinate", "row", "norm"])
def test_a_plain_loop_is_the_training_of_the_recipe(adapt):
    x, y = examples(60, dtype=torch.float32)
    ours = recipe(
        data=lambda g: steep.Data(steep.tensor_loader(x, y, 4), steep.tensor_loader(x, y, 4)),
        model=lambda: network(dtype=torch.float32),
        scheduler=None,
        budget=steep.Budget(epochs=3),
    )
    expected = fit(method(ours, eta=1.0, lr=0.1, adapt=adapt)).history.losses
    model, found = network(dtype=torch.float32), []
    batches, backward, optimizer = adadagrad(model, steep.tensor_loader(x, y, 4), eta=1.0, lr=0.1, adapt=adapt)
    for _ in range(3):
        for x_, y_, _ in batches:
            optimizer.zero_grad()
            each = losses(model, (x_, y_))
            found.append(each.mean().item())
            backward(each)
            optimizer.step()
            backward.step()
    assert found == expected
    assert batches.batch_size > 4


def test_accumulation_takes_the_same_path():
    whole, parts = (fit(method(recipe(), eta=1.0), accumulate=k) for k in (1, 3))
    np.testing.assert_allclose(parts.history.losses, whole.history.losses, rtol=1e-3)
    assert len(parts.history.losses) < 50


def test_budget_is_examples_and_updates_are_few():
    plain, ours = fit(recipe()), fit(method(recipe()))
    assert ours.examples == plain.examples
    assert ours.steps == plain.steps
    assert len(ours.history.losses) < len(plain.history.losses) / 4


def test_composes_with_a_curriculum_of_images():
    x, y = examples(60, dtype=torch.float32)
    pooled = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    base = recipe(
        data=lambda g: steep.Data(steep.tensor_loader(x, y, 4), steep.tensor_loader(x, y, 4)),
        model=lambda: copy.deepcopy(pooled),
        budget=steep.Budget(epochs=5),
    )
    curriculum = steep.method("efficienttrain")
    for order in ([method, curriculum], [curriculum, method]):
        result = fit(steep.compose(base, [(c, {}) for c in order]))
        assert result.examples == 300
        assert len(result.history.losses) < 75


def test_another_backward_rule_is_refused():
    with pytest.raises(ValueError, match="beside another backward rule"):
        steep.compose(recipe(), [(steep.method("coherence"), {}), (method, {})])


@pytest.mark.parametrize("test", _TESTS)
def test_state_of_the_rule(test):
    rule = after_a_batch(network(), examples(8), test=test)
    other = AdaptiveBatchSize(network(), Size(), test=test)
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert (other.steps, other.demand) == (1, rule.demand)
    assert repr(other) == f"AdaptiveBatchSize(test={test!r}, eta=0.5, nu=1.0, interval=1)"
    for clone in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        clone(losses(clone.engine.model, examples(8)))
        clone.step()
        assert (clone.steps, rule.steps) == (2, 1)


@pytest.mark.parametrize(("adapt", "lr"), [("coordinate", 0.05), ("norm", 1.0)])
def test_an_update_on_growing_batches_is_worth_more_than_one_on_the_first_size(adapt, lr):
    """Three epochs of growing batches against as many updates of 8 examples, three paired seeds."""
    base, gains = recipe(budget=steep.Budget(epochs=3)), []
    for seed in range(3):
        ours = fit(method(base, lr=lr, adapt=adapt), seed=seed)
        brief = base.replace(budget=steep.Budget(steps=len(ours.history.losses)))
        small = fit(method(brief, eta=1e9, lr=lr, adapt=adapt), seed=seed)
        assert len(small.history.losses) == len(ours.history.losses) < 405 / 10
        gains.append(ours.test["accuracy"] - small.test["accuracy"])
    assert min(gains) > 0.05


# ---- AdaGrad-Norm


def follow(optimizer_of, shapes, steps, seed=0):
    """Parameters, and gradients of every step, as arrays, after so many steps with prescribed gradients."""
    g = torch.Generator().manual_seed(seed)
    start = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    params = [nn.Parameter(p.clone()) for p in start]
    grads = [[torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes] for _ in range(steps)]
    optimizer = optimizer_of(params)
    for step in grads:
        for p, grad in zip(params, step, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    return [p.detach().numpy() for p in params], [p.numpy() for p in start], [[t.numpy() for t in s] for s in grads]


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_steps_are_the_formula(steps, weight_decay):
    shapes, hyper = [(4, 3), (4,), (), (2, 3, 2)], {"lr": 0.2, "initial_accumulator_value": 0.5}
    found, x, grads = follow(lambda p: AdaGradNorm(p, **hyper, weight_decay=weight_decay), shapes, steps)
    s = 0.5
    for step in grads:
        step = [g + weight_decay * p for g, p in zip(step, x, strict=True)]
        s += sum((g**2).sum() for g in step)
        x = [p - 0.2 * g / np.sqrt(s) for p, g in zip(x, step, strict=True)]
    for p, q in zip(found, x, strict=True):
        np.testing.assert_allclose(p, q, rtol=1e-12)


def test_row_wise_steps_are_the_formula():
    shapes, hyper = [(4, 3), (4,), (), (2, 3, 2)], {"lr": 0.2, "initial_accumulator_value": 0.5, "row_wise": True}
    found, x, grads = follow(lambda p: AdaGradNorm(p, **hyper), shapes, 3)
    sums = [0.5 * np.ones(p.shape[:1] or (1,)) for p in x]
    for step in grads:
        for k, g in enumerate(step):
            sums[k] = sums[k] + (g**2).reshape(len(sums[k]), -1).sum(1)
            x[k] = x[k] - 0.2 * g / np.sqrt(sums[k]).reshape(g.shape[:1] + (1,) * (g.ndim - 1))
    for p, q in zip(found, x, strict=True):
        np.testing.assert_allclose(p, q, rtol=1e-12)


@pytest.mark.parametrize("row_wise", [False, True])
def test_single_numbers_are_torchs_adagrad(row_wise):
    shapes = [(5,)] if row_wise else [(1,)]
    ours = follow(lambda p: AdaGradNorm(p, 0.1, 0.2, row_wise), shapes, 5)[0]
    torchs = follow(lambda p: torch.optim.Adagrad(p, 0.1, initial_accumulator_value=0.2, eps=0), shapes, 5)[0]
    np.testing.assert_allclose(ours, torchs, rtol=1e-12)


def test_one_sum_serves_all_groups():
    def in_groups(p):
        return AdaGradNorm([{"params": p[:1]}, {"params": p[1:]}], lr=0.1)

    together, apart = (follow(make, [(3, 2), (4,)], 3)[0] for make in (lambda p: AdaGradNorm(p, lr=0.1), in_groups))
    for p, q in zip(together, apart, strict=True):
        np.testing.assert_allclose(p, q, rtol=1e-14)


@pytest.mark.parametrize("row_wise", [False, True])
def test_no_step_is_longer_than_lr(row_wise):
    p = nn.Parameter(torch.zeros(3, 2))
    optimizer = AdaGradNorm([p], lr=0.7, row_wise=row_wise)
    p.grad = torch.full((3, 2), 1e6)
    optimizer.step()
    length = p.detach().norm(dim=1).max() if row_wise else p.detach().norm()
    assert length.item() == pytest.approx(0.7, rel=1e-5)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"initial_accumulator_value": 0.0}, {"weight_decay": float("nan")}])
def test_optimizers_arguments_out_of_range(wrong):
    name = next(iter(wrong))
    for group in ({}, {"params": [torch.zeros(1)], **wrong}):
        with pytest.raises(ValueError, match=f"{name}="):
            AdaGradNorm([group] if group else [torch.zeros(1)], **({} if group else wrong))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("row_wise", [False, True])
def test_optimizer_contract(check, row_wise):
    class Made(AdaGradNorm):
        def __init__(self, params, row_wise=row_wise):
            super().__init__(params, row_wise=row_wise)

    check(Method(id="made", paper=Paper("AdaGrad-Norm"), changes="optim", make=Made))


@pytest.mark.parametrize(("wrong", "message"), [({"adapt": "tensor"}, "adapt='tensor' must be"), ({"lr": -1}, "lr=-1")])
def test_the_methods_own_arguments(wrong, message):
    loader = steep.tensor_loader(*examples(8), batch_size=2)
    with pytest.raises(ValueError, match=message):
        adadagrad(network(), loader, **wrong)

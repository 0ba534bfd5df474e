"""Sven: against NumPy and the SVD of the whole Jacobian, its exact properties, its options, bad input, learning."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steep.backward.sven import Sven, method
from steep.requires import UnmetRequirement
from steep.testing import rules

pytestmark = pytest.mark.filterwarnings("error:each step takes")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def net(*widths, dtype=torch.float64):
    layers = [m for k, i in enumerate(widths[:-1]) for m in (nn.Linear(i, widths[k + 1]), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def data(batch, inputs, dtype=torch.float64):
    return torch.randn(batch, inputs, dtype=dtype), torch.randn(batch, dtype=dtype)


def flat_grad(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def update(model, losses, **options):
    """The gradient that Sven leaves, flat. `losses` is called once the rule watches the model."""
    model.zero_grad()
    backward = Sven(model, **options)
    backward(losses())
    return flat_grad(model)


def jacobian(model, function):
    """Of ``function(call)``, where ``call(x)`` runs the model, in float64 and without hooks."""
    doubled = copy.deepcopy(model).double()
    params = {k: p.detach() for k, p in doubled.named_parameters()}
    found = torch.func.jacrev(lambda p: function(lambda x: torch.func.functional_call(doubled, p, x)))(params)
    return torch.cat([j.flatten(1) for j in found.values()], 1)


def truncated(j, r, rank=None, rtol=1e-3, power=1.0):
    """The formula with the SVD of the whole Jacobian: V_k S_k^-power U_k^T r."""
    u, s, vh = torch.linalg.svd(j, full_matrices=False)
    k = int((s > rtol * s[0]).sum())
    k = k if rank is None else min(k, rank)
    return vh[:k].T @ (s[:k] ** -power * (u[:, :k].T @ r)), k


# ---- the first steps, in NumPy


class Reference:
    """Tanh network of one hidden layer, its Jacobian by hand, and Sven's step by the SVD, all in NumPy."""

    def __init__(self, model):
        self.w, self.b, self.v, self.c = (p.detach().numpy().copy() for p in model.parameters())

    def step(self, x, y, lr, rank, rtol, kappa, micro_batch):
        hidden = np.tanh(x @ self.w.T + self.b)
        error = (hidden @ self.v.T + self.c)[:, 0] - y
        back = self.v * (1 - hidden**2)
        rows = np.concatenate(
            [(back[:, :, None] * x[:, None]).reshape(len(x), -1), back, hidden, np.ones((len(x), 1))], 1
        )
        losses, rows = error**2, 2 * error[:, None] * rows
        losses, rows = (t.reshape(-1, micro_batch, *t.shape[1:]).mean(1) for t in (losses, rows))
        residuals = losses ** (kappa / 2)
        rows = (kappa / 2 * losses ** (kappa / 2 - 1))[:, None] * rows
        u, s, vh = np.linalg.svd(rows, full_matrices=False)
        inverse = np.where(s > rtol * s[0], 1 / s, 0.0)
        inverse[len(s) if rank is None else rank :] = 0
        delta = lr * vh.T @ (inverse * (u.T @ residuals))
        for name, piece in zip(
            "wbvc", np.split(delta, np.cumsum([self.w.size, self.b.size, self.v.size])), strict=True
        ):
            setattr(self, name, getattr(self, name) - piece.reshape(getattr(self, name).shape))


@pytest.mark.parametrize("kappa", [1.0, 2.0, 3.0])
@pytest.mark.parametrize(("rank", "rtol", "micro_batch"), [(None, 1e-3, 1), (3, 1e-3, 1), (None, 0.1, 1), (2, 1e-2, 2)])
def test_three_steps_equal_numpy(kappa, rank, rtol, micro_batch):
    model = net(2, 5, 1)
    reference = Reference(model)
    backward = Sven(model, rank=rank, rtol=rtol, kappa=kappa, micro_batch=micro_batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        x, y = data(8, 2)
        optimizer.zero_grad()
        backward((model(x).squeeze(-1) - y).square())
        optimizer.step()
        reference.step(x.numpy(), y.numpy(), 0.1, rank, rtol, kappa, micro_batch)
    for p, expected in zip(model.parameters(), (reference.w, reference.b, reference.v, reference.c), strict=True):
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-9, atol=1e-10)


# ---- the truncated pseudoinverse of the whole Jacobian


@pytest.mark.parametrize("rtol", [0.0, 1e-4, 1e-3, 0.3])
@pytest.mark.parametrize("rank", [None, 1, 5, 100])
def test_equals_the_svd_in_float64(rank, rtol):
    model, (x, y) = net(3, 8, 8, 1), data(12, 3)
    expected, kept = truncated(
        jacobian(model, lambda f: f(x).squeeze(-1) - y), (model(x).squeeze(-1) - y).detach(), rank, rtol
    )
    backward = Sven(model, rank=rank, rtol=rtol)
    backward(model(x).squeeze(-1) - y)
    assert backward.kept_rank == kept
    assert (flat_grad(model) - expected).norm() < 1e-10 * expected.norm()


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1),
        nn.GroupNorm(2, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "shape"), [(lambda: net(64, 48, 48, 10, dtype=torch.float32), (24, 64)), (convolutional, (16, 3, 12, 12))]
)
def test_equals_the_svd_in_float32_with_nearly_equal_examples(build, shape):
    """Pairs of examples 1 % apart: singular values over three decades, a few below the cut."""
    model, x = build(), torch.randn(shape)
    x[1::2] = x[::2] + 0.01 * torch.randn_like(x[::2])
    y = torch.randint(10, (len(x) // 2,)).repeat_interleave(2)
    j = jacobian(model, lambda f: F.cross_entropy(f(x.double()), y, reduction="none"))

    def losses():
        return F.cross_entropy(model(x), y, reduction="none")

    s = torch.linalg.svdvals(j)
    assert s[0] / s[-1] > 300
    expected, kept = truncated(j, losses().detach().double())
    found = update(model, losses)
    assert kept > 0.6 * len(x)
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize(("power", "tolerance"), [(1.0, 1e-9), (0.5, 1e-9), (0.0, 1e-9)])
def test_powers_divide_singular_values_out(power, tolerance):
    model, (x, y) = net(3, 8, 1), data(10, 3)
    j, r = jacobian(model, lambda f: f(x).squeeze(-1) - y), (model(x).squeeze(-1) - y).detach()
    expected, _ = truncated(j, r, power=power)
    found = update(model, lambda: model(x).squeeze(-1) - y, power=power)
    assert (found - expected).norm() < tolerance * expected.norm()


# ---- known methods as limits


@pytest.mark.parametrize("examples", [4, 30])
def test_one_step_on_a_linear_model_is_the_minimum_norm_least_squares_solution(examples):
    model, (x, y) = nn.Linear(9, 1).double(), data(examples, 9)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    solution = np.linalg.lstsq(np.c_[x.numpy(), np.ones(examples)], y.numpy(), rcond=None)[0]
    backward = Sven(model, rtol=1e-9)
    backward(model(x).squeeze(-1) - y)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    found = np.r_[model.weight.detach().numpy()[0], model.bias.detach().numpy()]
    np.testing.assert_allclose(found, solution, rtol=1e-9, atol=1e-11)
    assert backward.kept_rank == min(examples, 10)


def test_one_group_of_all_examples_is_polyaks_step():
    model, (x, y) = net(3, 8, 1), data(6, 3)

    def loss():
        return (model(x).squeeze(-1) - y).square()

    found = update(model, loss, micro_batch=6)
    model.zero_grad()
    loss().mean().backward()
    g = flat_grad(model)
    torch.testing.assert_close(found, loss().mean().detach() * g / g.square().sum(), rtol=1e-12, atol=0)


def test_power_minus_one_is_the_gradient_of_half_the_squares():
    model, (x, y) = net(3, 8, 1), data(6, 3)
    found = update(model, lambda: model(x).squeeze(-1) - y, power=-1.0, rtol=0.0)
    model.zero_grad()
    ((model(x).squeeze(-1) - y).square().sum() / 2).backward()
    torch.testing.assert_close(found, flat_grad(model), rtol=1e-8, atol=1e-10)


# ---- exact properties


@pytest.mark.parametrize("kappa", [0.5, 1.0, 3.0])
def test_at_full_rank_kappa_only_scales_the_step(kappa):
    model, (x, y) = net(3, 16, 1), data(6, 3)

    def losses():
        return (model(x).squeeze(-1) - y).square()

    found, plain = update(model, losses, kappa=kappa, rtol=1e-7), update(model, losses, rtol=1e-7)
    torch.testing.assert_close(found, 2 / kappa * plain, rtol=1e-6, atol=1e-9)


def test_signs_of_residuals_do_not_matter():
    model, (x, y) = net(3, 8, 1), data(10, 3)
    signs = torch.tensor([1.0, -1.0] * 5, dtype=torch.float64)
    plain = update(model, lambda: model(x).squeeze(-1) - y, kappa=3.0, rtol=0.05)
    torch.testing.assert_close(update(model, lambda: signs * (model(x).squeeze(-1) - y), kappa=3.0, rtol=0.05), plain)


def test_residuals_are_square_roots_of_squared_losses():
    model, (x, y) = net(3, 8, 1), data(10, 3)
    residuals = update(model, lambda: model(x).squeeze(-1) - y, rtol=0.1)
    squares = update(model, lambda: (model(x).squeeze(-1) - y).square(), kappa=1.0, rtol=0.1)
    torch.testing.assert_close(residuals, squares)


@pytest.mark.parametrize(("rtol", "kept"), [(0.24, 3), (0.25, 2), (0.26, 2), (0.5, 1), (0.49, 2)])
def test_the_cut_is_strict(rtol, kept):
    model = nn.Linear(3, 1, bias=False).double()
    backward = Sven(model, rtol=rtol)
    backward(model(torch.diag(torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64))).squeeze(-1) - 1)
    assert backward.kept_rank == kept
    assert int((model.weight.grad != 0).sum()) == kept


def test_units_of_the_losses_do_not_matter():
    model, (x, y) = net(3, 8, 1), data(10, 3)
    plain = update(model, lambda: model(x).squeeze(-1) - y)
    torch.testing.assert_close(update(model, lambda: 1e-13 * (model(x).squeeze(-1) - y)), plain, rtol=1e-6, atol=1e-12)


def test_conditions_that_are_met_leave_the_parameters_alone():
    model, (x, _) = net(3, 8, 1), data(5, 3)
    for kappa in (1.0, 2.0, 3.0):
        assert not update(model, lambda: model(x).squeeze(-1) - model(x).squeeze(-1).detach(), kappa=kappa).any()


@pytest.mark.parametrize("kappa", [0.7, 1.0, 2.0, 3.0])
def test_one_condition_that_is_met_makes_nothing_infinite(kappa):
    model, (x, y) = net(3, 8, 1), data(5, 3)
    y[2] = model(x)[2].detach()
    found = update(model, lambda: model(x).squeeze(-1) - y, kappa=kappa)
    others = torch.tensor([0, 1, 3, 4])
    without = update(model, lambda: model(x[others]).squeeze(-1) - y[others], kappa=kappa)
    assert without.any()
    if kappa == 2:  # the only slope that is neither zero nor infinite: the condition has a say
        assert found.isfinite().all()
        assert (found - without).norm() > 1e-3 * without.norm()
    else:
        torch.testing.assert_close(found, without, rtol=1e-6, atol=1e-9)


def test_a_zero_jacobian_gives_a_zero_gradient():
    model = nn.Linear(3, 1, bias=False)
    backward = Sven(model)
    backward(model(torch.zeros(4, 3)).squeeze(-1) - 1)
    assert torch.equal(model.weight.grad, torch.zeros(1, 3))
    assert backward.kept_rank == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_losses_that_are_not_finite_give_gradients_that_are_not(value):
    model, (x, y) = net(3, 8, 1), data(5, 3)
    y[1] = value
    assert update(model, lambda: model(x).squeeze(-1) - y).isnan().all()


# ---- a backward rule


SETTINGS = (
    {"param_fraction": 0.5, "micro_batch": 2},
    {"rank": 2, "solver": "randomized"},
    {"rank": 2, "solver": "warm"},
)


@pytest.mark.parametrize("check", rules.CHECKS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_rule_keeps_the_contract_in_every_setting(settings, check):
    check(dataclasses.replace(method, preset={**method.preset, **settings}))


@pytest.mark.parametrize(
    ("kappa", "rank", "micro_batch"), [(2.0, None, 1), (2.0, 5, 1), (1.0, None, 1), (2.0, None, 3)]
)
def test_several_residuals_of_an_example_are_conditions_of_their_own(kappa, rank, micro_batch):
    model, x, y = net(3, 6, 4), torch.randn(6, 3).double(), torch.randn(6, 4).double()

    def conditions(call):
        means = (call(x) - y).square().unflatten(0, (-1, micro_batch)).mean(1).flatten()
        return means ** (kappa / 2)

    expected, kept = truncated(jacobian(model, conditions), conditions(model).detach(), rank=rank)
    rule = Sven(model, rank=rank, kappa=kappa, micro_batch=micro_batch)
    rule((model(x) - y).square())
    assert rule.kept_rank == kept
    torch.testing.assert_close(flat_grad(model), expected, rtol=1e-6, atol=1e-8)


def test_one_step_meets_all_outputs_of_all_examples_of_a_linear_model():
    model, x, y = nn.Linear(7, 3).double(), torch.randn(5, 7).double(), torch.randn(5, 3).double()
    update(model, lambda: model(x) - y)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    torch.testing.assert_close(model(x), y)


def test_momentum_and_weight_decay_follow_as_usual():
    model, (x, y) = net(3, 8, 1), data(5, 3)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    backward, steps = Sven(model), []
    for _ in range(2):
        optimizer.zero_grad()
        backward(model(x).squeeze(-1) - y)
        steps.append(flat_grad(model) + 0.01 * torch.cat([p.detach().flatten() for p in model.parameters()]))
        optimizer.step()
    end = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(end, start - 0.1 * (1.9 * steps[0] + steps[1]))


def test_class_losses_of_a_model_with_several_kinds_of_layers():
    model, x, y = convolutional().double(), torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randint(10, (6,))
    j = jacobian(model, lambda f: F.cross_entropy(f(x), y, reduction="none"))

    def losses():
        return F.cross_entropy(model(x), y, reduction="none")

    expected, _ = truncated(j, losses().detach())
    torch.testing.assert_close(update(model, losses), expected, rtol=1e-8, atol=1e-10)


# ---- parameter fraction


def test_parameter_fraction_is_the_pseudoinverse_of_the_columns_that_are_kept():
    model, (x, y) = net(3, 10, 1), data(5, 3)
    found = update(model, lambda: model(x).squeeze(-1) - y, param_fraction=0.3)
    kept = (found != 0).double()
    assert kept.view(-1)[: 10 * 3].view(10, 3).any(1).sum() == 3
    j = jacobian(model, lambda f: f(x).squeeze(-1) - y) * kept
    expected, _ = truncated(j, (model(x).squeeze(-1) - y).detach())
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_parameter_fraction_draws_anew_and_from_its_seed_only():
    model, (x, y) = net(3, 10, 1), data(5, 3)

    def kept(seed, steps=2):
        backward, found = Sven(model, param_fraction=0.5, seed=seed), []
        for _ in range(steps):
            torch.rand(1)  # the global generator plays no part
            model.zero_grad()
            backward(model(x).squeeze(-1) - y)
            found.append(flat_grad(model) != 0)
        return found

    first, second = kept(0)
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(kept(0), kept(0), strict=True))
    assert not torch.equal(kept(1)[0], first)


# ---- partial eigen-solvers


def covered():
    """Sixty conditions of rank 4 at most."""
    model, (x, y) = nn.Linear(3, 1).double(), data(60, 3)
    return model, lambda: model(x).squeeze(-1) - y


@pytest.mark.parametrize("solver", ["randomized", "warm"])
@pytest.mark.parametrize("rank", [2, 4, 10])
@pytest.mark.parametrize("option", [{}, {"power": 0.5}, {"micro_batch": 2, "kappa": 1.5}])
def test_partial_solvers_are_exact_where_the_rank_is_covered(solver, rank, option):
    if "micro_batch" in option:
        rank = min(rank, 4)
    model, losses = covered()
    full = update(model, losses, rank=rank, **option)
    for seed in range(3):
        found = update(model, losses, rank=rank, solver=solver, seed=seed, **option)
        assert not torch.equal(found, full)  # another way
        torch.testing.assert_close(found, full, rtol=1e-7, atol=1e-9)


def slow():
    """Sixty conditions whose singular values fall slowly: a random start has not found the largest after two passes."""
    model, (x, y) = net(20, 30, 1), data(60, 20)
    return model, lambda: model(x).squeeze(-1) - y


def test_a_warm_start_finds_the_truncated_step_on_a_batch_that_stays():
    model, losses = slow()
    full = update(model, losses, rank=4)
    errors = {}
    for solver in ("randomized", "warm"):
        rule = Sven(model, rank=4, solver=solver)
        for _ in range(40):
            model.zero_grad()
            rule(losses())
        errors[solver] = ((flat_grad(model) - full).norm() / full.norm()).item()
        assert rule.kept_rank == 4
    assert errors["randomized"] > 1e-3
    assert errors["warm"] < 1e-6


def test_another_number_of_conditions_starts_anew():
    model, (x, y) = nn.Linear(3, 1).double(), data(40, 3)
    rule = Sven(model, rank=4, solver="warm")
    for count in (30, 40, 30):
        model.zero_grad()
        rule(model(x[:count]).squeeze(-1) - y[:count])
        assert rule.subspace.shape == (count, 14)
        found = flat_grad(model)
        torch.testing.assert_close(found, update(model, lambda n=count: model(x[:n]).squeeze(-1) - y[:n], rank=4))


@pytest.mark.parametrize("solver", ["randomized", "warm"])
def test_few_conditions_are_solved_in_full(solver):
    model, (x, y) = net(20, 30, 1), data(27, 20)
    full = update(model, lambda: model(x).squeeze(-1) - y, rank=4)
    assert torch.equal(update(model, lambda: model(x).squeeze(-1) - y, rank=4, solver=solver), full)


@pytest.mark.parametrize("solver", ["randomized", "warm"])
def test_partial_solvers_of_nothing_and_of_what_is_not_finite(solver):
    model, x = nn.Linear(3, 1, bias=False), torch.zeros(24, 3)
    assert not update(model, lambda: model(x).squeeze(-1) - 1, rank=2, solver=solver).any()
    x[3, 1] = torch.inf
    assert update(model, lambda: model(x).squeeze(-1) - 1, rank=2, solver=solver).isnan().all()


def test_a_partial_solver_without_a_rank_says_that_it_is_not_used():
    with pytest.warns(UserWarning, match="solver='warm' finds the largest singular values only.*set rank"):
        Sven(nn.Linear(2, 1), solver="warm")


# ---- state, bad input


def test_the_state_knows_which_parameters_need_the_slow_way():
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.time_first = nn.Linear(3, 1)

        def forward(self, x):
            return self.time_first(x.transpose(0, 1)).sin().sum((0, 2))

    model = Outside()
    backward = Sven(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backward(model(torch.randn(5, 5, 3)))
    other = Sven(model)
    other.load_state_dict(backward.state_dict())
    assert other.engine.left_to_autograd == {"time_first.weight", "time_first.bias"}


def test_repr():
    assert repr(Sven(nn.Linear(2, 1), param_fraction=0.5)) == (
        "Sven(rank=None, rtol=0.001, kappa=2.0, micro_batch=1, param_fraction=0.5, power=1.0, solver='full')"
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"rank": 0}, "rank=0 must be a whole number of at least 1"),
        ({"rank": 1.5}, "rank=1.5 must be"),
        ({"rtol": -0.1}, r"rtol=-0.1 must lie in \[0, 1\)"),
        ({"rtol": 1.0}, "rtol=1.0 must lie"),
        ({"kappa": 0.0}, r"kappa=0.0 must lie in \(0, inf\)"),
        ({"micro_batch": 0}, "micro_batch=0 must be a whole number of at least 1"),
        ({"param_fraction": 0.0}, r"param_fraction=0.0 must lie in \(0, 1\]"),
        ({"param_fraction": 1.1}, "param_fraction=1.1 must lie"),
        ({"power": 1.5}, r"power=1.5 must lie in \[-1, 1\]"),
        ({"solver": "fast", "rank": 2}, "solver='fast' must be one of full, randomized, warm"),
        ({"kappa": "two"}, "kappa='two' must be a number"),
    ],
)
def test_options_out_of_range(option, message):
    with pytest.raises(ValueError, match=message):
        Sven(nn.Linear(2, 1), **option)


def test_bad_losses():
    model, (x, y) = net(3, 8, 1), data(5, 3)
    with pytest.raises(ValueError, match="micro_batch=2 must divide the number of examples, 5"):
        Sven(model, micro_batch=2)(model(x).squeeze(-1) - y)
    with pytest.raises(ValueError, match="no parameter that trains"):
        Sven(model)(y)


def test_batch_norm_is_refused_where_it_mixes_examples_only():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    x = torch.randn(6, 3)
    with pytest.raises(UnmetRequirement, match=r"1 \(BatchNorm1d\) is in training mode"):
        Sven(model)(model(x).squeeze(-1))
    model.eval()
    Sven(model)(model(x).squeeze(-1))
    assert model[1].weight.grad.any()


# ---- learning


def one_dimensional(seed):
    """The paper's function exp(-10 x²) sin(2x), standardised."""
    x = 2 * torch.rand(1000, 1, generator=torch.Generator().manual_seed(seed)) - 1
    points = torch.cat([x, torch.linspace(-1, 1, 500)[:, None]])
    values = (torch.exp(-10 * points**2) * torch.sin(2 * points)).squeeze(1)
    values = (values - values[:1000].mean()) / values[:1000].std()
    return points[:1000], values[:1000], points[1000:], values[1000:]


def fit(seed, make_optimizer, make_rule, steps=200):
    """Test error of an MLP of three hidden layers of 16 after 200 batches of 32."""
    x, y, test_x, test_y = one_dimensional(seed)
    torch.manual_seed(seed)
    widths = (1, 16, 16, 16)
    layers = [m for k in range(3) for m in (nn.Linear(widths[k], 16), nn.GELU())]
    model = nn.Sequential(*layers, nn.Linear(16, 1))
    optimizer, rule = make_optimizer(model.parameters()), make_rule(model)
    for chosen in torch.randint(1000, (steps, 32), generator=torch.Generator().manual_seed(seed + 100)):
        optimizer.zero_grad()
        rule(model(x[chosen]).squeeze(1) - y[chosen])
        optimizer.step()
    return (model(test_x).squeeze(1) - test_y).square().mean().log10().item()


def test_fits_the_papers_function_better_than_tuned_adam_in_as_many_steps():
    """Measured: test error 2e-5 (geometric mean) against Adam's 2e-4, and lower for each of the seeds."""

    def mean_square(model):
        return lambda residuals: residuals.square().mean().backward()

    def adam(lr):
        return [fit(seed, lambda p: torch.optim.Adam(p, lr=lr), mean_square) for seed in range(3)]

    best = min((adam(lr) for lr in (1e-2, 3e-2)), key=sum)
    sven = [fit(seed, lambda p: torch.optim.SGD(p, lr=0.05), lambda m: Sven(m, rtol=3e-4)) for seed in range(3)]
    assert all(a < b for a, b in zip(sven, best, strict=True))
    assert np.mean(best) - np.mean(sven) > np.log10(4)

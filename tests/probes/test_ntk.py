"""The tangent kernel against Jacobians written out, and its predictions of training against real training runs."""

import copy
import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.func import functional_call, jacrev, jvp

from steep.probes.ntk import (
    NTKMLP,
    empirical_ntk,
    infinite_ntk,
    kernel_drift,
    kernel_flow,
    kernel_product,
    linearised,
)
from steep.tasks.networks import SmallCNN, Transformer


def randoms(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(*widths, seed=0):
    torch.manual_seed(seed)
    layers = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def jacobian(model, x):
    """(n, C, P), by autograd, of the model in evaluation mode."""
    model = copy.deepcopy(model).eval()
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    found = jacrev(lambda p: functional_call(model, p, (x,)).reshape(len(x), -1))(params)
    return torch.cat([t.flatten(2) for t in found.values()], 2)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.a(torch.tanh(self.a(x)) * self.scale)


def zoo():
    torch.manual_seed(0)
    tokens = torch.randint(7, (3, 4))
    frozen = mlp(4, 5, 2)
    frozen[0].weight.requires_grad_(False)
    return {
        "mlp": (mlp(4, 6, 3), randoms(5, 4)),
        "one output": (nn.Sequential(mlp(4, 6, 1), nn.Flatten(0)), randoms(5, 4)),
        "cnn": (SmallCNN(1, 2, (4, 4), groups=2).double(), randoms(4, 1, 6, 6)),
        "batchnorm": (nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double(), randoms(5, 4)),
        "dropout": (nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 2)).double(), randoms(5, 4)),
        "tied": (Tied().double(), randoms(5, 4)),
        "frozen": (frozen, randoms(5, 4)),
        "transformer": (Transformer(7, 4, width=8, depth=1).double(), tokens),
        "ntk parametrisation": (NTKMLP([4, 6, 5, 2]).double(), randoms(5, 4)),
    }


ZOO = zoo()


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.filterwarnings("ignore:each step takes one more backward")
def test_kernel_is_the_product_of_jacobians_by_every_route(name):
    model, x = ZOO[name]
    a, b = jacobian(model, x), jacobian(model, x[:2].flip(0))
    full, cross = torch.einsum("ncp,mdp->nmcd", a, a), torch.einsum("ncp,mdp->nmcd", a, b)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(empirical_ntk(model, x), full, **close)
    torch.testing.assert_close(empirical_ntk(model, x, x[:2].flip(0)), cross, **close)
    trace = full.diagonal(dim1=2, dim2=3).mean(-1)
    torch.testing.assert_close(empirical_ntk(model, x, outputs="trace"), trace, **close)
    torch.testing.assert_close(
        empirical_ntk(model, x, x[:2].flip(0), outputs="trace"), cross.diagonal(dim1=2, dim2=3).mean(-1), **close
    )
    v = randoms(2, full.shape[2])
    expected = torch.einsum("nmcd,md->nc", cross, v)
    found = kernel_product(model, x, x[:2].flip(0))(v)
    torch.testing.assert_close(found.reshape(expected.shape), expected, **close)


def test_kernel_of_one_hidden_layer_written_out():
    model, x = mlp(3, 7, 1), randoms(5, 3)
    w1, b1, w2 = (model[0].weight.detach().numpy(), model[0].bias.detach().numpy(), model[2].weight.detach().numpy()[0])
    z = x.numpy()
    t = np.tanh(z @ w1.T + b1)
    slopes = (1 - t**2) * w2
    expected = t @ t.T + 1 + (slopes @ slopes.T) * (z @ z.T + 1)
    np.testing.assert_allclose(empirical_ntk(model, x)[..., 0, 0].numpy(), expected, rtol=1e-12)


def test_kernel_is_symmetric_and_positive():
    model, x = mlp(4, 8, 3), randoms(6, 4)
    kernel = empirical_ntk(model, x)
    torch.testing.assert_close(kernel, kernel.permute(1, 0, 3, 2))
    assert torch.linalg.eigvalsh(kernel.transpose(1, 2).reshape(18, 18)).min() > -1e-12


def test_float32_models_have_a_float64_kernel():
    model, x = mlp(4, 8, 1), randoms(6, 4)
    coarse = empirical_ntk(copy.deepcopy(model).float(), x.float(), outputs="trace")
    assert coarse.dtype == torch.float64
    torch.testing.assert_close(coarse, empirical_ntk(model, x, outputs="trace"), rtol=1e-5, atol=1e-5)


def test_kernel_of_a_linear_model_is_x_xt_and_stays_in_training():
    x, y = randoms(6, 3), randoms(6, 2, seed=1)
    model = nn.Linear(3, 2).double()
    before = empirical_ntk(model, x)
    torch.testing.assert_close(before, (x @ x.T + 1)[..., None, None] * torch.eye(2), check_dtype=False)
    descend(model, x, y, steps=20, lr=0.1)
    assert torch.equal(empirical_ntk(model, x), before)
    drift = kernel_drift(before, empirical_ntk(model, x))
    assert drift.distance == 0
    assert drift.alignment == pytest.approx(1, abs=1e-15)


def descend(model, x, y, steps, lr):
    """Really train, by gradient descent on the cost of the formulas."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(x) - y).square().sum() / (2 * len(x))).backward()
        optimizer.step()


@pytest.mark.parametrize("lr", [0.05, 0.6])
def test_prediction_is_exact_for_a_model_that_is_linear(lr):
    x, y, new = randoms(6, 4), randoms(6, 2, seed=1), randoms(3, 4, seed=2)
    model = nn.Linear(4, 2).double()
    line = linearised(model, x, y)
    assert lr < line.flow.largest_lr
    for steps in (0, 1, 2, 3, 50):
        trained = copy.deepcopy(model)
        descend(trained, x, y, steps, lr)
        for inputs in (x, new):
            torch.testing.assert_close(line.after(steps, lr, inputs), trained(inputs).detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(line.after(steps, lr), trained(x).detach(), rtol=0, atol=1e-12)


def test_largest_learning_rate_is_where_descent_starts_to_diverge():
    x, y = randoms(6, 4), randoms(6, 2, seed=1)
    model = nn.Linear(4, 2).double()
    flow = linearised(model, x, y).flow
    ends = []
    for factor in (0.97, 1.03):
        trained = copy.deepcopy(model)
        descend(trained, x, y, 400, factor * flow.largest_lr)
        ends.append(trained(x).norm().item())
        predicted = flow.after(400, factor * flow.largest_lr)
        torch.testing.assert_close(predicted, trained(x).detach(), rtol=1e-8, atol=1e-8)
    assert ends[0] < 10
    assert ends[1] > 1e6


def test_prediction_is_exact_for_the_tangent_of_a_network():
    x, y, new = randoms(5, 3), randoms(5, 2, seed=1), randoms(4, 3, seed=2)
    model = mlp(3, 6, 2)
    params = {k: p.detach() for k, p in model.named_parameters()}
    moved = {k: torch.zeros_like(p, requires_grad=True) for k, p in params.items()}

    def tangent(inputs):
        value, slope = jvp(lambda p: functional_call(model, p, (inputs,)), (params,), (moved,))
        return value + slope

    optimizer = torch.optim.SGD(moved.values(), lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        ((tangent(x) - y).square().sum() / (2 * len(x))).backward()
        optimizer.step()
    line = linearised(model, x, y)
    torch.testing.assert_close(line.after(40, 0.3), tangent(x).detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(line.after(40, 0.3, new), tangent(new).detach(), rtol=0, atol=1e-11)


def positive_kernel(n, c=1, seed=0, rank=None):
    rows = randoms(n * c, rank or n * c + 3, seed=seed)
    kernel = rows @ rows.T
    return kernel if c == 1 else kernel.view(n, c, n, c).transpose(1, 2)


def test_flow_is_the_matrix_exponential():
    kernel, y, start, cross = positive_kernel(5), randoms(5, 2, seed=1), randoms(5, 2, seed=2), randoms(3, 5, seed=3)
    flow, theta = kernel_flow(kernel, y, start), kernel.numpy()
    error = (start - y).numpy()
    for time in (0.01, 0.3, 4.0):
        left = scipy.linalg.expm(-time * theta / 5)
        np.testing.assert_allclose(flow.at(time).numpy(), y.numpy() + left @ error, rtol=1e-10, atol=1e-11)
        solved = np.linalg.solve(theta, error - left @ error)
        np.testing.assert_allclose(flow.at(time, cross).numpy(), -cross.numpy() @ solved, rtol=1e-9, atol=1e-11)
        at = randoms(3, 2, seed=4)
        torch.testing.assert_close(flow.at(time, cross, at), at + flow.at(time, cross))


def test_full_kernels_flow_as_one_matrix_and_equal_blocks_as_a_shared_one():
    kernel, y = positive_kernel(4, 3), randoms(4, 3, seed=1)
    matrix = kernel.transpose(1, 2).reshape(12, 12)
    left = scipy.linalg.expm(-0.5 * matrix.numpy() / 4)
    expected = y.numpy().ravel() - left @ y.numpy().ravel()
    np.testing.assert_allclose(kernel_flow(kernel, y).at(0.5).numpy().ravel(), expected, rtol=1e-10)
    shared = positive_kernel(4)
    blocks = shared[..., None, None] * torch.eye(3).double()
    torch.testing.assert_close(kernel_flow(blocks, y).at(0.5), kernel_flow(shared, y).at(0.5))
    cross = randoms(2, 4)
    wide = kernel_flow(blocks, y).at(0.5, cross[..., None, None] * torch.eye(3).double())
    torch.testing.assert_close(wide, kernel_flow(shared, y).at(0.5, cross))


def test_flow_starts_at_the_start_ends_at_the_targets_and_goes_on_where_it_was():
    kernel, y, start = positive_kernel(5), randoms(5, seed=1), randoms(5, seed=2)
    flow = kernel_flow(kernel, y, start)
    assert torch.equal(flow.at(0), start)
    assert torch.equal(flow.after(0, 0.1), start)
    torch.testing.assert_close(flow.at(math.inf), y)
    torch.testing.assert_close(kernel_flow(kernel, y, flow.at(0.7)).at(0.5), flow.at(1.2))
    torch.testing.assert_close(kernel_flow(kernel, y, flow.after(3, 0.1)).after(4, 0.1), flow.after(7, 0.1))


def test_descent_in_ever_smaller_steps_is_the_flow():
    flow = kernel_flow(positive_kernel(5), randoms(5, seed=1))
    gaps = [float((flow.after(n, 1.0 / n) - flow.at(1.0)).norm()) for n in (100, 1000, 10000)]
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.1)
    assert gaps[1] / gaps[2] == pytest.approx(10, rel=0.1)


def test_errors_along_an_eigenvector_decay_at_its_rate():
    kernel = positive_kernel(5)
    values, vectors = np.linalg.eigh(kernel.numpy() / 5)
    for value, vector in zip(values, vectors.T, strict=True):
        found = kernel_flow(kernel, torch.zeros(5), torch.from_numpy(vector)).at(0.4)
        np.testing.assert_allclose(found, np.exp(-0.4 * value) * vector, atol=1e-13)


@pytest.mark.parametrize("time", [1.0, 1e6, math.inf])
def test_what_a_singular_kernel_cannot_move_stays(time):
    kernel, y = positive_kernel(6, rank=2), randoms(6, seed=1)
    vectors = torch.linalg.eigh(kernel).eigenvectors
    still = vectors[:, :4]
    found = kernel_flow(kernel, y).at(time)
    assert found.isfinite().all()
    torch.testing.assert_close(still.T @ found, torch.zeros(4).double(), atol=1e-9, rtol=0)
    if time > 1:
        torch.testing.assert_close(vectors[:, 4:].T @ found, vectors[:, 4:].T @ y)


# ---- the limit of wide networks


def test_relu_without_biases_has_a_known_diagonal():
    x = randoms(4, 3)
    for depth in (1, 2, 3, 5):
        found = infinite_ntk(x, depth=depth, bias_std=0.0)
        first = x.square().mean(1)
        torch.testing.assert_close(found.nngp.diagonal(), first / 2 ** (depth - 1))
        torch.testing.assert_close(found.ntk.diagonal(), depth * first / 2 ** (depth - 1))


@pytest.mark.parametrize("bias_std", [0.0, 0.7])
def test_linear_networks_have_a_known_kernel(bias_std):
    x, z = randoms(4, 3), randoms(2, 3, seed=1)
    base, b = x @ z.T / 3, bias_std**2
    found = infinite_ntk(x, z, depth=3, activation=lambda u: u, bias_std=bias_std)
    torch.testing.assert_close(found.nngp, base + 3 * b)
    torch.testing.assert_close(found.ntk, 3 * base + 6 * b)


def test_closed_form_of_erf_is_what_quadrature_finds():
    x, z = randoms(4, 3), randoms(3, 3, seed=1)
    exact = infinite_ntk(x, z, depth=3, activation="erf", bias_std=0.3)
    found = infinite_ntk(x, z, depth=3, activation=torch.erf, bias_std=0.3)
    torch.testing.assert_close(found.nngp, exact.nngp, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.ntk, exact.ntk, rtol=1e-6, atol=1e-7)
    coarse = infinite_ntk(x, z, depth=3, activation=torch.erf, bias_std=0.3, nodes=4)
    assert (coarse.ntk - exact.ntk).abs().max() > 1e-5


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_expectations_are_those_of_normal_numbers(activation):
    x = randoms(3, 4)
    numbers = randoms(200_000, 5, seed=1)
    inputs = numbers[:, :4] @ x.T / 2 + 0.5 * numbers[:, 4:]  # covariance x xᵀ / 4 + 0.25
    u = (inputs.relu() if activation == "relu" else inputs.erf()).unsqueeze(2)
    samples = u * u.transpose(1, 2)
    error = samples.std(0) / len(samples) ** 0.5
    found = infinite_ntk(x, depth=2, activation=activation, bias_std=0.5).nngp - 0.25
    assert ((found - samples.mean(0)).abs() / error).max() < 4


@pytest.mark.parametrize(("activation", "function"), [("relu", torch.relu), ("erf", torch.erf)])
def test_one_hidden_layer_has_the_limit_on_average_at_any_width(activation, function):
    x, generator = randoms(3, 2), torch.Generator().manual_seed(1)
    kernels = torch.stack(
        [empirical_ntk(NTKMLP([2, 3, 1], function, 0.4, generator).double(), x, outputs="trace") for _ in range(300)]
    )
    error = kernels.std(0) / len(kernels) ** 0.5
    found = infinite_ntk(x, depth=2, activation=activation, bias_std=0.4).ntk
    assert ((kernels.mean(0) - found).abs() / error).max() < 4


def circle(n):
    angle = torch.linspace(0, 2 * math.pi, n + 1)[:-1]
    return torch.stack([angle.cos(), angle.sin()], 1)


def test_kernels_approach_the_limit_as_one_over_the_root_of_the_width():
    x, generator = circle(5), torch.Generator().manual_seed(0)
    limit = infinite_ntk(x, depth=3).ntk
    widths, distances = (32, 128, 512), []
    for width in widths:
        models = [NTKMLP([2, width, width, 1], generator=generator) for _ in range(16)]
        found = [kernel_drift(limit, empirical_ntk(m, x, outputs="trace")).distance for m in models]
        distances.append(np.mean(found))
    slope = np.polyfit(np.log(widths), np.log(distances), 1)[0]
    assert -0.65 < slope < -0.35, distances


def test_wide_networks_train_as_predicted_and_their_kernel_stays():
    x, new = circle(8), circle(16)[1::2]
    y = torch.sin(3 * torch.linspace(0, 2 * math.pi, 9)[:-1])[:, None]

    def drift_and_error(width, seed):
        model = NTKMLP([2, width, 1], torch.erf, 0.1, torch.Generator().manual_seed(seed))
        line, before, start = linearised(model, x, y), empirical_ntk(model, x), model(new).detach()
        descend(model, x, y, steps=100, lr=1.0)
        moved = model(new).detach() - start
        wrong = (line.after(100, 1.0, new) - start - moved).norm() / moved.norm()
        return kernel_drift(before, empirical_ntk(model, x)).distance, float(wrong)

    narrow, wide = (np.mean([drift_and_error(width, seed) for seed in range(4)], 0) for width in (16, 1024))
    assert (narrow > 4 * wide).all(), (narrow, wide)  # 8 times by the root of the width
    assert wide[1] < 0.02


def test_ntk_parametrisation_has_kernels_that_do_not_grow_with_the_width():
    x = circle(4)
    sizes = [
        empirical_ntk(NTKMLP([2, w, w, 1], generator=torch.Generator().manual_seed(0)), x, outputs="trace").norm()
        for w in (256, 1024)
    ]
    assert sizes[1] / sizes[0] == pytest.approx(1, abs=0.2)
    torch.manual_seed(0)
    plain = [
        empirical_ntk(nn.Sequential(nn.Linear(2, w), nn.ReLU(), nn.Linear(w, 1)), x, outputs="trace").norm()
        for w in (256, 1024)
    ]
    assert plain[1] / plain[0] > 2


def test_ntk_parametrisation_by_its_formula():
    model = NTKMLP([3, 4, 2], torch.tanh, 0.5, torch.Generator().manual_seed(0)).double()
    w, b = ([p.detach().numpy() for p in part] for part in (model.layers.parameters(), model.biases))
    x = randoms(5, 3).numpy()
    hidden = np.tanh(x @ w[0].T / np.sqrt(3) + 0.5 * b[0])
    expected = hidden @ w[1].T / np.sqrt(4) + 0.5 * b[1]
    np.testing.assert_allclose(model(torch.from_numpy(x)).detach(), expected, rtol=1e-12)


def test_ntk_parametrisation_is_drawn_from_its_generator_and_known_to_the_engine():
    before = torch.get_rng_state()
    a, b = (NTKMLP([3, 400, 400, 1], generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))
    weights = a.layers[1].weight.detach()
    assert abs(float(weights.mean())) < 4 / 400
    assert float(weights.std()) == pytest.approx(1, abs=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the engine would say that it takes a backward per example
        empirical_ntk(a, torch.zeros(3, 3))
    assert torch.equal(before, torch.get_rng_state())


# ---- manners


def footprint(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [module.training for module in model.modules()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    )


def test_nothing_is_left_behind():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2)).double()
    model[2].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    x, before, numbers = randoms(5, 4), footprint(model), torch.get_rng_state()
    with torch.no_grad():
        first = empirical_ntk(model, x)
        empirical_ntk(model, x, x, outputs="trace")
        kernel_product(model, x)(torch.ones(5, 2))
        linearised(model, x, randoms(5, 2)).at(1.0, x)
    after = footprint(model)
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert before[1] == after[1]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(before[2], after[2], strict=True))
    assert before[3] == after[3]
    assert torch.equal(numbers, torch.get_rng_state())
    assert torch.equal(first, empirical_ntk(model, x))


def test_hooks_go_also_when_the_model_fails():
    model = mlp(4, 5, 1)
    with pytest.raises(RuntimeError):
        empirical_ntk(model, randoms(3, 7))
    assert footprint(model)[3] == [0] * 4


def test_a_linearised_training_does_not_follow_the_model():
    x, y = randoms(5, 3), randoms(5, 1, seed=1)
    model = mlp(3, 4, 1)
    line = linearised(model, x, y)
    before = line.at(2.0, x[:2])
    descend(model, x, y, 3, 0.1)
    assert torch.equal(line.at(2.0, x[:2]), before)


def test_drift_tells_turning_from_growing():
    kernel = positive_kernel(4)
    grown = kernel_drift(kernel, 3 * kernel)
    assert grown.distance == pytest.approx(2)
    assert grown.alignment == pytest.approx(1)
    a, b = torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))
    turned = kernel_drift(a, b)
    assert turned.alignment == 0
    assert turned.distance == pytest.approx(2**0.5)
    assert kernel_drift(a, 0 * a).alignment == 0


X, K = torch.zeros(3, 2), torch.eye(3)


class Unsteady(nn.Linear):
    def forward(self, x):
        return super().forward(x).log()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: empirical_ntk(nn.Linear(2, 1), X, outputs="diagonal"), "outputs='diagonal' must be 'full' or 'trace'"),
        (lambda: empirical_ntk(nn.Linear(2, 1), X[:0]), "at least one input"),
        (lambda: empirical_ntk(nn.Linear(2, 1), X, X[:0]), "at least one input"),
        (lambda: empirical_ntk(nn.Linear(2, 1), X, torch.zeros(3, 4)), "of one shape, got (2,) and (4,)"),
        (lambda: empirical_ntk(Unsteady(2, 1), X * torch.inf), "not finite"),
        (lambda: empirical_ntk(nn.Linear(2, 1).requires_grad_(False), X), "depend on no parameter that trains"),
        (lambda: kernel_drift(K, torch.eye(2)), "one shape, got (3, 3) and (2, 2)"),
        (lambda: kernel_drift(0 * K, K), "norm of the first kernel=0.0 must be positive"),
        (lambda: kernel_flow(K, torch.zeros(2)), "(n, n) or (n, n, C, C) for targets (n,) or (n, C)"),
        (lambda: kernel_flow(K[:0, :0], torch.zeros(0)), "n > 0"),
        (lambda: kernel_flow(torch.zeros(3, 3, 2, 2), torch.zeros(3, 1)), "got (3, 3, 2, 2) and (3, 1)"),
        (lambda: kernel_flow(K, torch.zeros(3), torch.zeros(3, 1)), "start must have the shape of targets"),
        (lambda: kernel_flow(K * torch.nan, torch.zeros(3)), "kernel must be finite"),
        (lambda: kernel_flow(K, torch.tensor([0, 1, torch.inf])), "targets must be finite"),
        (lambda: kernel_flow(K, torch.zeros(3)).at(-1.0), "time=-1.0 must be at least 0"),
        (lambda: kernel_flow(K, torch.zeros(3)).after(3, lr=0.0), "lr=0.0 must lie in (0, inf)"),
        (lambda: kernel_flow(K, torch.zeros(3)).after(-1, lr=0.1), "steps=-1 must lie in [0, inf)"),
        (lambda: infinite_ntk(X, depth=0), "depth=0 must lie in [1, inf)"),
        (lambda: infinite_ntk(X, depth=2, activation="gelu"), "activation='gelu' must be 'relu', 'erf' or a function"),
        (lambda: infinite_ntk(X, depth=2, bias_std=-1.0), "bias_std=-1.0 must lie in [0, inf)"),
        (lambda: infinite_ntk(X, depth=2, nodes=1), "nodes=1 must lie in [2, inf)"),
        (lambda: infinite_ntk(X, torch.zeros(3, 5), depth=2), "got (3, 2) and (3, 5)"),
        (lambda: NTKMLP([3]), "at least 2"),
        (lambda: NTKMLP([3, 1], bias_std=-0.1), "bias_std=-0.1 must lie in [0, inf)"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_zero_inputs_have_finite_kernels():
    x = torch.stack([torch.zeros(2), torch.ones(2)])
    for activation in ("relu", "erf", torch.tanh):
        found = infinite_ntk(x, depth=3, activation=activation, bias_std=0.0)
        assert found.ntk.isfinite().all()
        assert found.ntk[0, 1] == found.nngp[0, 0] == 0

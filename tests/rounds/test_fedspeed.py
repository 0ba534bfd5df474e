"""FedSpeed: NumPy references of both published forms, its limit cases, its fixed point, resume, and learning."""

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from federated_problems import (
    advance,
    classes,
    generator,
    least_squares,
    linear,
    losses_of,
    network,
    residuals,
    resumed,
    trained,
    weights,
)
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import steep
from steep.rounds import _federated as fed
from steep.rounds import fedspeed
from steep.rounds.fedavg import FedAvg
from steep.rounds.fedspeed import FedSpeed
from steep.utils.randomness import Stream

PLAIN = {"lr_decay": 1.0, "weight_decay": 0.0, "clip_norm": math.inf}


# ---- references


def numpy_local(x, y, start, correction, seen, *, lr, prox, rho, alpha, normalize, decay, clip, steps):
    """Local steps with a correction added to the gradient; shared by both forms, whose duals differ."""
    v = start.copy()
    for _ in range(steps):
        error = x @ v - y
        seen.append(0.5 * error**2)
        g1 = x.T @ error / len(y)
        up = v + rho * g1 / (np.linalg.norm(g1) + 1e-7 if normalize else 1.0)
        g2 = x.T @ (x @ up - y) / len(y)
        g = (1 - alpha) * g1 + alpha * g2 + prox * (v - start) + correction
        g *= min(1.0, clip / (np.linalg.norm(g) + 1e-6))
        v = v - lr * (g + decay * v)
    return v


@pytest.mark.parametrize("fraction", [0.4, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dual_average", ["all", "active"])
def test_first_rounds_match_numpy(dual_average, normalize, fraction):
    """ "active" against the paper's dual vectors, "all" against the simulator's h vectors."""
    arrays, loaders = least_squares()
    model, prox, lr = linear(), 0.3, 0.05
    w = model.weight.detach().numpy().ravel().copy()
    hyper = {"prox": prox, "rho": 0.2, "alpha": 0.7, "normalize_ascent": normalize, "weight_decay": 0.1}
    rounds = FedSpeed(
        model, loaders, residuals, generator=generator(), fraction=fraction, local_steps=4, lr=lr, lr_decay=0.5,
        clip_norm=3.0, dual_average=dual_average, **hyper,
    )  # fmt: skip
    g, h = np.zeros((5, 3)), np.zeros((5, 3))
    for _ in range(3):
        chosen, ends, seen = rounds.sample(), [], []
        assert len(chosen) == 5 * fraction
        for i in chosen:
            correction = -g[i] if dual_average == "active" else prox * h[i]
            end = numpy_local(
                *arrays[i], w, correction, seen, lr=lr, prox=prox, rho=0.2, alpha=0.7, normalize=normalize, decay=0.1,
                clip=3.0, steps=4,
            )  # fmt: skip
            g[i] -= prox * (end - w)
            h[i] += end - w
            ends.append(end - g[i] / prox if dual_average == "active" else end)
        w, lr = np.mean(ends, axis=0) + (h.mean(0) if dual_average == "all" else 0), lr * 0.5
        np.testing.assert_allclose(next(rounds).numpy(), np.concatenate(seen), rtol=1e-8)
        np.testing.assert_allclose(model.weight.detach().numpy().ravel(), w, rtol=1e-8)
        for i, state in enumerate(rounds.states):
            dual = fed.take("dual", state).get("weight")
            np.testing.assert_allclose(dual.numpy().ravel() if dual is not None else np.zeros(3), g[i], rtol=1e-8)


def test_both_forms_agree_when_every_client_takes_part():
    torch.testing.assert_close(
        trained(FedSpeed, fraction=1.0, dual_average="all"),
        trained(FedSpeed, fraction=1.0, dual_average="active"),
        rtol=1e-4,
        atol=1e-5,
    )
    assert not torch.allclose(
        trained(FedSpeed, dual_average="all"), trained(FedSpeed, dual_average="active"), atol=1e-2
    )


def test_without_ascent_it_is_feddyn():
    """Against FedDyn's own formulas: linear term from last round's gradient, server vector over all clients."""
    arrays, loaders = least_squares()
    model, prox, lr = linear(), 0.5, 0.05
    rounds = FedSpeed(
        model, loaders, residuals, generator=generator(), fraction=0.4, local_steps=3, lr=lr, alpha=0.0, prox=prox,
        dual_average="all", **PLAIN,
    )  # fmt: skip
    theta, server = model.weight.detach().numpy().ravel().copy(), np.zeros(3)
    gradients = np.zeros((5, 3))
    for _ in range(4):
        chosen, ends = rounds.sample(), []
        for i in chosen:
            (x, y), v = arrays[i], theta.copy()
            for _ in range(3):
                v = v - lr * (x.T @ (x @ v - y) / len(y) - gradients[i] + prox * (v - theta))
            gradients[i] -= prox * (v - theta)
            ends.append(v)
        server -= prox / 5 * (np.array(ends) - theta).sum(0)
        theta = np.mean(ends, axis=0) - server / prox
        next(rounds)
        np.testing.assert_allclose(model.weight.detach().numpy().ravel(), theta, rtol=1e-8)


def test_without_duals_and_ascent_it_is_fedprox():
    arrays, loaders = least_squares()
    model = linear()
    rounds = FedSpeed(
        model, loaders, residuals, generator=generator(), fraction=1.0, local_steps=3, lr=0.05, prox=2.0, rho=0.0,
        dual_average="none", **PLAIN,
    )  # fmt: skip
    w = model.weight.detach().numpy().ravel().copy()
    for _ in range(3):
        ends = []
        for x, y in arrays:
            v = w.copy()
            for _ in range(3):
                v = v - 0.05 * (x.T @ (x @ v - y) / len(y) + 2.0 * (v - w))
            ends.append(v)
        w = np.mean(ends, axis=0)
        next(rounds)
        np.testing.assert_allclose(model.weight.detach().numpy().ravel(), w, rtol=1e-9)
    assert all(set(state) == {"examples"} for state in rounds.states)


# ---- limit cases, bit for bit


@pytest.mark.parametrize("dual_average", ["all", "active", "none"])
@pytest.mark.parametrize("off", [{"alpha": 0.0}, {"rho": 0.0}], ids=["alpha", "rho"])
def test_without_prox_and_ascent_it_is_fedavg(dual_average, off):
    shared = {"lr_decay": 0.9, "weight_decay": 0.01, "clip_norm": 0.5}
    plain = trained(FedAvg, weighted=False, **shared)
    assert torch.equal(trained(FedSpeed, prox=0.0, dual_average=dual_average, **off, **shared), plain)
    assert not torch.equal(trained(FedSpeed, prox=0.1, dual_average=dual_average, **off, **shared), plain)
    assert not torch.equal(trained(FedSpeed, prox=0.0, dual_average=dual_average, **shared), plain)


def test_without_length_the_share_of_the_ascent_does_not_matter_nor_the_reverse():
    assert torch.equal(trained(FedSpeed, rho=0.0, alpha=1.0), trained(FedSpeed, rho=0.0, alpha=0.3))
    assert torch.equal(trained(FedSpeed, rho=0.1, alpha=0.0), trained(FedSpeed, rho=0.7, alpha=0.0))
    assert torch.equal(trained(FedSpeed, rho=0.0), trained(FedSpeed, alpha=0.0))


# ---- the fixed point


class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(3, dtype=torch.float64))


def quadratics(count=4):
    """Clients f_i(x) = (x - c_i)' A_i (x - c_i) / 2 of unlike curvature and centre, and their joint minimiser."""
    rng = np.random.default_rng(1)
    factors = rng.normal(size=(count, 3, 3))
    a = torch.from_numpy(factors @ factors.transpose(0, 2, 1) / 3 + 0.3 * np.eye(3))
    c = torch.from_numpy(3 * rng.normal(size=(count, 3)))
    best = torch.linalg.solve(a.sum(0), (a @ c[..., None]).sum(0)).squeeze(1)
    return a, c, best, [steep.tensor_loader(a[i : i + 1], c[i : i + 1], 1) for i in range(count)]


def quadratic(model, batch):
    away = model.x - batch[1]
    return 0.5 * (away[:, None] @ batch[0] @ away[..., None]).flatten()


def solved(count=50, fraction=1.0, **hyper):
    a, c, best, loaders = quadratics()
    model = Point()
    hyper = {"local_steps": 5, "lr": 0.3, "prox": 1.0, "rho": 0.0} | PLAIN | hyper
    rounds = FedSpeed(model, loaders, quadratic, generator=generator(), fraction=fraction, **hyper)
    advance(rounds, count)
    gradients = (a @ (best - c)[..., None]).squeeze(2)
    return (model.x.detach() - best).norm().item(), gradients, [fed.take("dual", s).get("x") for s in rounds.states]


@pytest.mark.parametrize("dual_average", ["all", "active"])
def test_fixed_point_is_the_global_minimiser_and_duals_are_the_gradients_there(dual_average):
    gap, gradients, duals = solved(dual_average=dual_average)
    assert gap < 1e-6
    torch.testing.assert_close(torch.stack(duals), gradients, rtol=0, atol=1e-5)
    assert torch.stack(duals).sum(0).norm() < 1e-5
    assert gradients.norm(dim=1).min() > 0.5  # of unlike clients: each alone would go elsewhere


def test_fixed_point_of_fedprox_is_another():
    early, late = (solved(count, dual_average="none")[0] for count in (20, 40))
    assert early > 0.3
    assert early == pytest.approx(late, rel=1e-2)


def test_partial_participation_reaches_the_minimiser_with_duals_over_all_only():
    assert solved(70, fraction=0.5, dual_average="all")[0] < 1e-4
    assert solved(70, fraction=0.5, dual_average="active")[0] > 0.1


def test_clipping_does_not_move_the_fixed_point():
    assert solved(70, clip_norm=1.0)[0] < 1e-4


def test_clients_never_sampled_keep_a_dual_of_zero():
    model, loaders = network(), classes()
    rounds = FedSpeed(model, loaders, losses_of, generator=generator(), fraction=0.2, local_steps=2)
    sampled = set()
    for _ in range(3):
        sampled.update(rounds.sample())
        next(rounds)
    assert 0 < len(sampled) < 6
    for i, state in enumerate(rounds.states):
        assert bool(fed.take("dual", state)) == (i in sampled)


# ---- the ascent


def test_both_gradients_of_a_step_are_of_one_batch():
    seen, points = [], []

    def recording(model, batch):
        seen.append(batch[2].tolist())
        points.append(weights(model))
        return losses_of(model, batch)

    rounds = FedSpeed(network(), classes(), recording, generator=generator(), fraction=0.2, local_steps=5, rho=0.3)
    losses = next(rounds)
    assert len(seen) == 10
    assert seen[::2] == seen[1::2]
    assert len({tuple(s) for s in seen}) > 2
    for below, above in zip(points[::2], points[1::2], strict=True):
        assert (above - below).norm().item() == pytest.approx(0.3, rel=1e-3)
    assert len(losses) == sum(map(len, seen[::2]))


def test_batchnorm_sees_each_batch_once_and_is_averaged():
    model, before = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double(), []

    def recording(model, batch):
        before.append(model[0].running_mean.tolist())
        return residuals(model, batch)

    arrays, loaders = least_squares()
    next(FedSpeed(model, loaders, recording, generator=generator(), fraction=1.0, local_steps=2))
    expected = (0.1 + 0.09) * np.mean([x.mean(0) for x, _ in arrays], axis=0)
    np.testing.assert_allclose(model[0].running_mean.numpy(), expected, rtol=1e-9)
    assert model[0].num_batches_tracked == 2
    assert before[::2] == before[1::2]  # the ascended pass starts from the same statistics


# ---- the contract


@pytest.fixture(scope="module")
def default():
    return trained(FedSpeed)


def test_seeded_runs_are_equal(default):
    assert torch.equal(trained(FedSpeed), default)


@pytest.mark.parametrize(
    "change",
    [
        {"fraction": 1.0},
        {"local_steps": 4},
        {"lr": 0.2},
        {"lr_decay": 0.9},
        {"prox": 0.5},
        {"rho": 0.5},
        {"alpha": 0.5},
        {"dual_average": "active"},
        {"dual_average": "none"},
        {"normalize_ascent": False},
        {"weight_decay": 0.05},
        {"clip_norm": 0.1},
        {"seed": 5},
    ],
    ids=lambda change: "-".join(map(str, *change.items())),
)
def test_every_argument_has_an_effect(change, default):
    assert not torch.allclose(default, trained(FedSpeed, **change), atol=1e-5)


@pytest.mark.parametrize("dual_average", ["all", "active"])
def test_steps_do_not_change_what_they_are_given(dual_average):
    model, loader = network(), classes()[0]
    received = fed.snapshot(model) | {"lr": 0.1}
    dual = {name: torch.full_like(p, 0.01) for name, p in fed.take("parameter", received).items()}
    state = {"examples": 7} | fed.put("dual", dual)
    given = copy.deepcopy((received, state))
    hyper = {"prox": 0.1, "rho": 0.1, "alpha": 0.5, "normalize_ascent": True, "weight_decay": 0.1, "clip_norm": 1.0}
    batches = list(fed.local_batches(loader, 3, Stream(0, "")))
    oracle = fed.Oracle(model, losses_of)
    after, message = FedSpeed.client_step(state, received, batches, oracle=oracle, dual_average=dual_average, **hyper)
    sent = copy.deepcopy(message)
    server, broadcast = FedSpeed.server_step(
        received, [message, message], num_clients=4, prox=0.1, dual_average=dual_average, lr_decay=0.5
    )
    for now, then in ((received, given[0]), (state, given[1]), (message, sent)):
        assert now.keys() == then.keys()
        assert all(torch.equal(torch.as_tensor(now[k]), torch.as_tensor(then[k])) for k in now)
    assert after.keys() == state.keys()
    assert not torch.equal(after["dual.0.weight"], state["dual.0.weight"])
    assert broadcast["lr"] == server["lr"] == 0.05
    assert bool(fed.take("offset", server)) == (dual_average == "all")
    assert not fed.take("offset", broadcast)


@pytest.mark.parametrize("dual_average", ["all", "active"])
def test_the_order_of_messages_does_not_matter(dual_average):
    torch.manual_seed(0)
    messages = [{"parameter.w": torch.randn(40)} for _ in range(5)]
    state = {"parameter.w": torch.randn(40), "offset.w": torch.randn(40), "lr": 0.1}
    hyper = {"num_clients": 9, "prox": 0.1, "dual_average": dual_average, "lr_decay": 1.0}
    forth, back = (FedSpeed.server_step(state, m, **hyper)[0]["parameter.w"] for m in (messages, messages[::-1]))
    torch.testing.assert_close(forth, back, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(forth, FedSpeed.server_step(state, messages[1:], **hyper)[0]["parameter.w"])
    with pytest.raises(ValueError, match="messages is empty"):
        FedSpeed.server_step(state, [], **hyper)


@pytest.mark.parametrize("dual_average", ["all", "active"])
def test_resume_is_exact(dual_average):
    def make(seed):
        hyper = {"fraction": 0.5, "local_steps": 4, "dual_average": dual_average}
        return FedSpeed(network(seed), classes(), losses_of, generator=generator(seed), **hyper)

    straight, (second, found) = make(0), resumed(make, 3)
    assert all(map(torch.equal, found, advance(straight, 6)))
    assert torch.equal(weights(second.model), weights(straight.model))


def test_rounds_can_be_copied_and_pickled():
    rounds = FedSpeed(network(), classes(), losses_of, generator=generator())
    next(rounds)
    copies_ = [copy.deepcopy(rounds), pickle.loads(pickle.dumps(rounds))]
    expected = next(rounds)
    for clone in copies_:
        assert torch.equal(next(clone), expected)
        assert torch.equal(weights(clone.model), weights(rounds.model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rho": -0.1}, "rho=-0.1 must be at least 0"),
        ({"prox": -1.0}, "prox=-1.0 must be at least 0"),
        ({"alpha": 1.1}, r"alpha=1.1 must be in \[0, 1\]"),
        ({"dual_average": "some"}, "dual_average='some' must be 'all', 'active' or 'none'"),
        ({"fraction": 0.0}, r"fraction=0.0 must be in \(0, 1\]"),
        ({"fraction": 1.1}, r"fraction=1.1 must be in \(0, 1\]"),
        ({"local_steps": 0}, "local_steps=0 must be an integer >= 1"),
        ({"lr": float("nan")}, "lr=nan must be positive"),
        ({"lr_decay": 0.0}, r"lr_decay=0.0 must be in \(0, 1\]"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be at least 0"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0 must be positive"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        FedSpeed(network(), classes(), losses_of, generator=generator(), **change)


def test_no_clients_and_empty_clients():
    with pytest.raises(
        steep.UnmetRequirement, match=r"FedSpeed needs training data divided among clients: .*dirichlet"
    ):
        FedSpeed(network(), [], losses_of, generator=generator())
    with pytest.raises(ValueError, match=r"clients\[1\] has no data"):
        FedSpeed(network(), [classes()[0], []], losses_of, generator=generator())


def test_its_entry_puts_it_into_a_recipe():
    def data(g):
        x, y = torch.randn(60, 6, generator=g), torch.arange(60) % 3
        split = steep.split_loaders(x, y, g, batch_size=8)
        return steep.Data(split.train, split.val, clients=classes())

    recipe = steep.Recipe(
        data=data,
        model=network,
        loss=lambda output, target: cross_entropy(output, target, reduction="none"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        budget=steep.Budget(steps=2),
    )
    fit = {"seed": 3, "progress": False, "device": "cpu"}
    once, more = (steep.fit(fedspeed.method(recipe, rho=rho, local_steps=3), **fit) for rho in (0.0, 0.1))
    assert once.steps == more.steps == 2
    assert 2 * once.examples == more.examples  # both passes are paid for
    with pytest.raises(steep.UnmetRequirement, match="needs training data divided among clients"):
        steep.fit(fedspeed.method(recipe.replace(data=lambda g: dataclasses.replace(data(g), clients=()))), **fit)


# ---- learning


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x).float() / 16, torch.from_numpy(y)


def accuracy(digits, method, seed, **hyper):
    """Of an MLP on 450 held-out digits, after 10 rounds with 3 of 10 clients, most with one or two classes each."""
    (x, y), g = digits, generator(seed)
    held_out, rest = torch.randperm(len(x), generator=g).split([450, len(x) - 450])
    clients = steep.dirichlet_clients(x[rest], y[rest], g, clients=10, alpha=0.1, batch_size=20)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    advance(method(model, clients, losses_of, generator=g, fraction=0.3, **hyper), 10)
    return (model(x[held_out]).argmax(1) == y[held_out]).float().mean().item()


def test_learns_in_fewer_rounds_than_fedavg(digits):
    """After 10 rounds, and with one gradient per step as FedAvg (rho = 0), so that equal rounds are equal work too."""
    seeds = range(200, 203)
    fedavg = np.array([accuracy(digits, FedAvg, seed) for seed in seeds])
    equal_rounds = np.array([accuracy(digits, FedSpeed, seed) for seed in seeds]) - fedavg
    equal_gradients = np.array([accuracy(digits, FedSpeed, seed, rho=0.0) for seed in seeds]) - fedavg
    for gain in (equal_rounds, equal_gradients):
        assert gain.min() > 0.05
        assert gain.mean() > 0.12

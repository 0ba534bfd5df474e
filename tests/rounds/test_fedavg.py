"""FedAvg: NumPy reference, the cases where it is plain SGD, its drift, resume, messages."""

import copy
import math

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
from torch import nn

import steep
from steep.rounds import _federated as fed
from steep.rounds.fedavg import FedAvg
from steep.utils.randomness import Stream


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("clip_norm", [2.0, math.inf])
def test_first_rounds_match_numpy(weighted, clip_norm):
    arrays, loaders = least_squares(4)
    model = linear()
    w = model.weight.detach().numpy().ravel().copy()
    hyper = {"lr": 0.05, "lr_decay": 0.5, "weight_decay": 0.1, "clip_norm": clip_norm, "weighted": weighted}
    rounds = FedAvg(model, loaders, residuals, generator=generator(), fraction=0.5, local_steps=4, **hyper)
    lr, clipped = 0.05, 0
    for _ in range(3):
        chosen, ends, seen = rounds.sample(), [], []
        for i in chosen:
            (x, y), v = arrays[i], w.copy()
            for _ in range(4):
                error = x @ v - y
                seen.append(0.5 * error**2)
                g = x.T @ error / len(y)
                clipped += np.linalg.norm(g) > clip_norm
                g *= min(1.0, clip_norm / (np.linalg.norm(g) + 1e-6))
                v = v - lr * (g + 0.1 * v)
            ends.append(v)
        sizes = [len(arrays[i][1]) for i in chosen] if weighted else [1, 1]
        w, lr = np.average(ends, axis=0, weights=sizes), lr * 0.5
        losses = next(rounds)
        np.testing.assert_allclose(losses.numpy(), np.concatenate(seen), rtol=1e-9)
        np.testing.assert_allclose(model.weight.detach().numpy().ravel(), w, rtol=1e-9)
    assert (clipped > 0) == (clip_norm < math.inf)


def test_one_client_is_plain_sgd_bit_for_bit():
    loader = classes(clients=1)[0]
    model, plain = network(dropout=0.0), network(dropout=0.0)
    rounds = FedAvg(model, [loader], losses_of, generator=generator(), local_steps=9, lr=0.3, weight_decay=0.01)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3, weight_decay=0.01)
    for number in range(3):
        for batch in fed.local_batches(loader, 9, Stream(rounds.seed, f"order {number} 0")):
            optimizer.zero_grad()
            losses_of(plain, batch).mean().backward()
            optimizer.step()
        next(rounds)
    assert torch.equal(weights(model), weights(plain))


def test_one_local_step_on_all_data_is_gradient_descent_on_the_union():
    arrays, loaders = least_squares(4)
    model, plain = linear(), linear()
    rounds = FedAvg(model, loaders, residuals, generator=generator(), fraction=1.0, local_steps=1, lr=0.1)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    union = [torch.from_numpy(np.concatenate(part)) for part in zip(*arrays, strict=True)]
    for _ in range(5):
        next(rounds)
        optimizer.zero_grad()
        residuals(plain, union).mean().backward()
        optimizer.step()
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-9, atol=0)


def test_more_local_steps_leave_the_minimiser():
    """The drift that the later methods remove: exact with one local step, off with many."""
    arrays, loaders = least_squares(4)
    x, y = (np.concatenate(part) for part in zip(*arrays, strict=True))
    best = torch.from_numpy(np.linalg.lstsq(x, y, rcond=None)[0])
    gaps = []
    for local_steps, count in ((1, 250), (10, 50)):
        model = linear()
        rounds = FedAvg(model, loaders, residuals, generator=generator(), fraction=1.0, local_steps=local_steps)
        advance(rounds, count)
        gaps.append((weights(model) - best).norm().item())
    assert gaps[0] < 1e-6
    assert gaps[1] > 0.1


@pytest.fixture(scope="module")
def default():
    return trained(FedAvg)


def test_seeded_runs_are_equal(default):
    assert torch.equal(trained(FedAvg), default)


@pytest.mark.parametrize(
    "change",
    [
        {"fraction": 1.0},
        {"local_steps": 4},
        {"lr": 0.2},
        {"lr_decay": 0.9},
        {"weighted": False},
        {"weight_decay": 0.01},
        {"clip_norm": 0.1},
        {"seed": 5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_argument_has_an_effect(change, default):
    assert not torch.allclose(default, trained(FedAvg, **change), atol=1e-6)


def test_batchnorms_statistics_are_averaged_over_the_sampled_clients():
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=1.0), nn.Linear(3, 1)).double()
    arrays, loaders = least_squares(4)
    next(FedAvg(model, loaders, residuals, generator=generator(), fraction=1.0, local_steps=1))
    means = [x.mean(0) for x, _ in arrays]
    expected = np.average(means, axis=0, weights=[len(x) for x, _ in arrays])
    np.testing.assert_allclose(model[0].running_mean.numpy(), expected, rtol=1e-9)
    assert model[0].num_batches_tracked == 1


def test_steps_do_not_change_what_they_are_given():
    model, loader = network(), classes()[0]
    received = fed.snapshot(model) | {"lr": 0.1}
    state, before = {"examples": 7}, copy.deepcopy(received)
    batches = list(fed.local_batches(loader, 3, Stream(0, "")))
    hyper = {"oracle": fed.Oracle(model, losses_of), "weight_decay": 0.0, "clip_norm": math.inf}
    after, message = FedAvg.client_step(state, received, batches, **hyper)
    assert after == state == {"examples": 7}
    assert message["examples"] == 7
    assert all(torch.equal(received[k], v) for k, v in before.items() if k != "lr")
    sent = copy.deepcopy(message)
    server, broadcast = FedAvg.server_step(received, [message, message], weighted=True, lr_decay=0.5)
    assert broadcast["lr"] == 0.05
    assert received["lr"] == 0.1
    assert all(torch.equal(message[k], v) for k, v in sent.items() if isinstance(v, torch.Tensor))
    assert server.keys() == received.keys()


def test_resume_is_exact():
    def make(seed):
        return FedAvg(network(seed), classes(), losses_of, generator=generator(seed), fraction=0.5, lr_decay=0.9)

    straight, (second, found) = make(0), resumed(make, 3)
    assert all(map(torch.equal, found, advance(straight, 6)))
    assert torch.equal(weights(second.model), weights(straight.model))
    assert second.server["lr"] == straight.server["lr"] == pytest.approx(0.1 * 0.9**6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"lr_decay": 1.5}, r"lr_decay=1.5 must be in \(0, 1\]"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be at least 0"),
        ({"clip_norm": 0.0}, "clip_norm=0.0 must be positive"),
        ({"fraction": 2.0}, r"fraction=2.0 must be in \(0, 1\]"),
        ({"local_steps": 0}, "local_steps=0 must be an integer >= 1"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        FedAvg(network(), classes(), losses_of, generator=generator(), **change)


def test_no_clients():
    with pytest.raises(steep.UnmetRequirement, match="FedAvg needs training data divided among clients"):
        FedAvg(network(), [], losses_of, generator=generator())


def test_learns_what_no_client_could_alone():
    """Three pairs of classes, one per client: alone each knows two of six, together all six (paired seeds)."""
    gains = []
    for seed in range(4):
        torch.manual_seed(seed)
        centres, y = 2 * torch.randn(6, 8), torch.arange(240) % 6
        x = centres[y] + 0.7 * torch.randn(240, 8)
        train, test = slice(0, 180), slice(180, 240)
        clients = [
            steep.tensor_loader(x[train][y[train] // 2 == k], y[train][y[train] // 2 == k], 10, shuffle=True)
            for k in range(3)
        ]

        def scored(loaders, seed=seed, x=x[test], y=y[test]):
            torch.manual_seed(seed)
            model = nn.Linear(8, 6)
            rounds = FedAvg(model, loaders, losses_of, generator=generator(seed), fraction=1.0, local_steps=5)
            advance(rounds, 15)
            return (model(x).argmax(1) == y).float().mean().item()

        gains.append(scored(clients) - max(scored([client]) for client in clients))
    assert min(gains) > 0.4

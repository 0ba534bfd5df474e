"""FedAvg: NumPy reference, the cases where it is plain SGD, its drift, resume, messages."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import steep
from steep.rounds import _federated as fed
from steep.rounds.fedavg import FedAvg
from steep.utils.randomness import Stream

LEAST_SQUARES = [(5, 1.0), (12, -2.0), (8, 4.0), (20, 0.5)]  # examples and slope of each client


def residuals(model, batch):
    return 0.5 * (model(batch[0]).squeeze(1) - batch[1]).square()


def least_squares(seed=0):
    """Clients of unlike size and slope, each giving all its data as one batch; and the same as arrays."""
    rng = np.random.default_rng(seed)
    arrays = [(x := rng.normal(size=(n, 3)), slope * x.sum(1) + 0.1 * rng.normal(size=n)) for n, slope in LEAST_SQUARES]
    loaders = [steep.tensor_loader(torch.from_numpy(x), torch.from_numpy(y), len(x)) for x, y in arrays]
    return arrays, loaders


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 1, bias=False).double()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def classes(seed=0, clients=6, batch_size=4):
    torch.manual_seed(seed)
    y = torch.randint(3, (90,))
    x = torch.eye(3)[y].repeat(1, 2) + 0.5 * torch.randn(90, 6)
    return steep.dirichlet_clients(x, y, generator(seed), clients=clients, alpha=0.5, batch_size=batch_size)


def network(seed=0, dropout=0.2):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


def losses_of(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("clip_norm", [2.0, math.inf])
def test_first_rounds_match_numpy(weighted, clip_norm):
    arrays, loaders = least_squares()
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
    arrays, loaders = least_squares()
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
    arrays, loaders = least_squares()
    x, y = (np.concatenate(part) for part in zip(*arrays, strict=True))
    best = torch.from_numpy(np.linalg.lstsq(x, y, rcond=None)[0])
    gaps = []
    for local_steps, count in ((1, 250), (10, 50)):
        model = linear()
        rounds = FedAvg(model, loaders, residuals, generator=generator(), fraction=1.0, local_steps=local_steps)
        for _ in range(count):
            next(rounds)
        gaps.append((weights(model) - best).norm().item())
    assert gaps[0] < 1e-6
    assert gaps[1] > 0.1


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
        {"generator": generator(5)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_argument_has_an_effect(change):
    def trained(**hyper):
        model = network()
        hyper = {"generator": generator(), "fraction": 0.5, "local_steps": 3} | hyper
        rounds = FedAvg(model, classes(), losses_of, **hyper)
        for _ in range(3):
            next(rounds)
        return weights(model)

    assert torch.equal(trained(), trained())
    assert not torch.allclose(trained(), trained(**change), atol=1e-6)


def test_batchnorms_statistics_are_averaged_over_the_sampled_clients():
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=1.0), nn.Linear(3, 1)).double()
    arrays, loaders = least_squares()
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

    straight = make(0)
    for _ in range(6):
        expected = next(straight)
    first = make(0)
    for _ in range(3):
        next(first)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = make(1)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for _ in range(3):
        found = next(second)
    assert torch.equal(found, expected)
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
            for _ in range(15):
                next(rounds)
            return (model(x).argmax(1) == y).float().mean().item()

        gains.append(scored(clients) - max(scored([client]) for client in clients))
    assert min(gains) > 0.4

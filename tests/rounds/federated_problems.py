"""Two small federated problems that every method's tests train: least squares in float64, and classes with dropout."""

import io

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import steep

SLOPES = [(5, 1.0), (12, -2.0), (8, 4.0), (20, 0.5), (6, -1.0)]  # examples and slope of each client


def residuals(model, batch):
    return 0.5 * (model(batch[0]).squeeze(1) - batch[1]).square()


def least_squares(clients=5):
    """Clients of unlike size and slope, each giving all its data as one batch; and the same as arrays."""
    rng, chosen = np.random.default_rng(0), SLOPES[:clients]
    arrays = [(x := rng.normal(size=(n, 3)), slope * x.sum(1) + 0.1 * rng.normal(size=n)) for n, slope in chosen]
    loaders = [steep.tensor_loader(torch.from_numpy(x), torch.from_numpy(y), len(x)) for x, y in arrays]
    return arrays, loaders


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 1, bias=False).double()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def classes(clients=6):
    """90 noisy examples of three classes, divided unevenly among clients."""
    torch.manual_seed(0)
    y = torch.randint(3, (90,))
    x = torch.eye(3)[y].repeat(1, 2) + 0.5 * torch.randn(90, 6)
    return steep.dirichlet_clients(x, y, generator(), clients=clients, alpha=0.5, batch_size=4)


def network(seed=0, dropout=0.2):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


def losses_of(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def advance(rounds, count):
    """The losses of each of the next rounds."""
    return [next(rounds) for _ in range(count)]


def trained(method, *, count=3, seed=0, **hyper):
    """The small network's weights after some rounds."""
    model = network()
    hyper = {"fraction": 0.5, "local_steps": 3} | hyper
    advance(method(model, classes(), losses_of, generator=generator(seed), **hyper), count)
    return weights(model)


def resumed(make, count):
    """Rounds of `make(1)` that go on from a saved state of `make(0)`, and all losses before and after."""
    first = make(0)
    found = advance(first, count)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = make(1)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(weights(second.model), weights(first.model))
    return second, found + advance(second, count)

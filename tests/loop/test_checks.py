"""BatchNorm never meets one example: the run is refused before its first step."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import steep
from steep.optim._growing import GrowingBatches


def recipe(count, batch_size, *, model=None, wrap=lambda loader: loader, drop_last=False, clients=()):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 4, generator=g), torch.arange(count) % 3

    def data(generator):
        train = steep.tensor_loader(x, y, batch_size, shuffle=True, drop_last=drop_last)
        return steep.Data(wrap(train), steep.tensor_loader(x, y, count), clients=clients)

    return steep.Recipe(
        data=data,
        model=model or (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))),
        loss=lambda output, target: F.cross_entropy(output, target, reduction="none"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        budget=steep.Budget(epochs=2),
    )


def fit(recipe, **options):
    return steep.fit(recipe, progress=False, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "cause"),
    [
        ((17, 8), {}, "the last batch of an epoch has one example"),
        ((8, 1), {}, "the last batch of an epoch has one example"),
        ((16, 8), {"accumulate": 8}, "a batch of 8 in 8 parts leaves parts of one example"),
        ((16, 8), {"accumulate": 5}, "a batch of 8 in 5 parts leaves parts of one example"),
        ((19, 8), {"accumulate": 2}, "a batch of 3 in 2 parts leaves parts of one example"),
    ],
)
def test_a_single_example_is_refused_before_the_first_step(arguments, options, cause):
    touched = []

    def optimizer(parameters):
        sgd = torch.optim.SGD(parameters, lr=0.1)
        sgd.register_step_pre_hook(lambda *_: touched.append(1))
        return sgd

    with pytest.raises(ValueError, match=rf"{cause}, which 1 \(BatchNorm1d\) cannot normalise .*drop_last=True"):
        fit(recipe(*arguments).replace(optimizer=optimizer), **options)
    assert not touched


def test_growing_batches_and_clients_are_refused_too():
    with pytest.raises(ValueError, match="the last batch of an epoch has one example"):
        fit(recipe(17, 8, wrap=GrowingBatches))
    x, y = torch.randn(9, 4), torch.arange(9) % 3
    clients = [steep.tensor_loader(x[:n], y[:n], 4) for n in (8, 9)]
    with pytest.raises(ValueError, match="the last batch of an epoch has one example"):
        fit(steep.method("fedavg")(recipe(16, 8, clients=clients)))


def test_a_batch_whose_size_is_not_known_before_gets_the_same_remedy():
    def batches(generator):
        x, y = torch.randn(9, 4), torch.arange(9) % 3

        class Loader:
            def __len__(self):
                return 2

            def __iter__(self):
                return iter([(x[:8], y[:8]), (x[8:], y[8:])])

        return steep.Data(Loader(), [(x, y)])

    with pytest.raises(ValueError, match="a training batch has one example, which BatchNorm cannot.*drop_last=True"):
        fit(recipe(17, 8).replace(data=batches))


@pytest.mark.parametrize(
    ("arguments", "model", "options"),
    [
        ((17, 8), lambda: nn.Linear(4, 3), {}),  # nothing is normalised over the batch
        ((16, 8), None, {}),
        ((17, 8), None, {"drop_last": True}),
        # one example has four positions to normalise over
        ((17, 8), lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.BatchNorm1d(1), nn.Flatten(), nn.Linear(4, 3)), {}),
        ((17, 8), lambda: Frozen(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), {}),
    ],
)
def test_what_can_train_trains(arguments, model, options):
    assert fit(recipe(*arguments, model=model, **options)).steps > 2


class Frozen(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


def test_the_check_leaves_no_trace():
    """The same run, whether one example was tried before or not: buffers and random numbers stay as they were."""

    def model():
        return nn.Sequential(nn.Dropout(0.5), nn.Unflatten(1, (1, 4)), nn.BatchNorm1d(1), nn.Flatten(), nn.Linear(4, 3))

    checked, unknown = recipe(17, 8, model=model), recipe(17, 8, model=model, wrap=Opaque)
    ours, theirs = (fit(r).model.state_dict() for r in (checked, unknown))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Opaque:
    """A loader that says nothing of its batches."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return iter(self.loader)

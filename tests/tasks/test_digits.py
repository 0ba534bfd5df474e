"""`digits`, `digits-image` and `digits-federated`."""

import pytest
import torch

import steep
from steep.tasks import task


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensors(loader):
    x, y, _ = loader.dataset[:]
    return x, y


def test_the_images_are_scikit_learns():
    from sklearn.datasets import load_digits

    data = task("digits").data(generator())
    x, y = (torch.cat(parts) for parts in zip(*(tensors(d) for d in (data.train, data.val, data.test)), strict=True))
    images, labels = load_digits(return_X_y=True)
    assert x.shape == (1797, 64)
    assert sorted(map(tuple, torch.cat([x * 16, y.unsqueeze(1)], 1).tolist())) == sorted(
        (*map(float, image), float(label)) for image, label in zip(images, labels, strict=True)
    )


def test_both_forms_hold_the_same_split():
    flat, image = (tensors(task(name).data(generator(3)).train) for name in ("digits", "digits-image"))
    assert image[0].shape == (1079, 1, 8, 8)
    assert torch.equal(flat[0], image[0].flatten(1))
    assert torch.equal(flat[1], image[1])


def test_learning_digits():
    """A network of 26 000 parameters reads 95 % of the digits; the best linear classifier here is at about 96 %."""
    result = steep.fit(task("digits"), progress=False, evaluate_every=1000)
    assert result.test["accuracy"] > 0.95


def test_the_image_network_takes_smaller_images():
    recipe = task("digits-image")
    model, (x, _) = recipe.model(), tensors(recipe.data(generator()).val)
    for size in (4, 5, 6, 8):
        assert model(x[:2, :, :size, :size]).shape == (2, 10)


def test_clients_share_the_training_data_out():
    data = task("digits-federated").data(generator())
    assert len(data.clients) == 20
    parts = [tensors(client) for client in data.clients]
    assert min(len(x) for x, _ in parts) >= 2
    x, y = tensors(data.train)
    shared = sorted(map(tuple, torch.cat([torch.cat([a, b.unsqueeze(1)], 1) for a, b in parts]).tolist()))
    assert shared == sorted(map(tuple, torch.cat([x, y.unsqueeze(1)], 1).tolist()))


def test_alpha_skews_the_labels():
    def classes(alpha):
        clients = task("digits-federated", alpha=alpha).data(generator()).clients
        return sum(len(tensors(c)[1].unique()) for c in clients) / len(clients)

    assert classes(0.1) < 5 < 9 < classes(100.0)


def test_federated_options():
    recipe = task("digits-federated", clients=6, rounds=4, fraction=0.5, local_steps=3)
    assert len(recipe.data(generator()).clients) == 6
    result = steep.fit(recipe, progress=False)
    assert result.steps == 4
    # 3 of 6 clients, 3 batches of up to 20 each, in each of 4 rounds
    assert 4 * 3 * 3 * 10 < result.examples <= 4 * 3 * 3 * 20


def test_a_round_starts_from_the_average_and_learns():
    recipe = task("digits-federated", rounds=15)
    result = steep.fit(recipe, progress=False, evaluate_every=100)
    assert result.test["accuracy"] > 0.4, "chance is 0.1"


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"clients": 600}])
def test_impossible_divisions_are_refused(wrong):
    with pytest.raises(ValueError, match="alpha=0.0 must lie in|fewer clients"):
        task("digits-federated", **wrong).data(generator())

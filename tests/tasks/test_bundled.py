"""`breast-cancer`, `wine` and `diabetes`: shapes, scaling, and that the networks beat the obvious predictor."""

import pytest
import torch

import steep
from steep.tasks import task

TABLES = {"breast-cancer": (569, 30), "wine": (178, 13), "diabetes": (442, 10)}


def split(name, seed=0):
    data = task(name).data(torch.Generator().manual_seed(seed))
    return [loader.dataset[:][:2] for loader in (data.train, data.val, data.test)]


@pytest.mark.parametrize(("name", "shape"), TABLES.items())
def test_all_rows_are_used_once(name, shape):
    parts = split(name)
    assert (sum(len(x) for x, _ in parts), parts[0][0].shape[1]) == shape
    assert len(parts[1][0]) == len(parts[2][0]) == round(0.2 * shape[0])


@pytest.mark.parametrize("name", TABLES)
def test_inputs_are_standardised_by_training_statistics(name):
    (train, _), (val, _), _ = split(name)
    torch.testing.assert_close(train.mean(0), torch.zeros(train.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.std(0, correction=0), torch.ones(train.shape[1]))
    assert val.mean(0).abs().max() > 0.01
    assert val.abs().max() < 15


def test_targets():
    assert [split(name)[0][1].unique().tolist() for name in ("breast-cancer", "wine")] == [[0, 1], [0, 1, 2]]
    y = split("diabetes")[0][1]
    assert y.shape == (442 - 2 * 88, 1)
    assert y.std(correction=0) == pytest.approx(1, abs=1e-5)


def test_diabetes_is_scikit_learns_up_to_the_scale():
    """The targets' order statistics determine the scaling, so that a mix-up of rows or columns would show."""
    import numpy as np
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    parts = split("diabetes")
    ours = torch.cat([torch.cat([a, b], 1) for a, b in parts]).double().numpy()
    theirs = np.column_stack([x, y])
    correlation = np.corrcoef(np.sort(ours, 0).T, np.sort(theirs, 0).T)[:11, 11:]
    np.testing.assert_allclose(np.diag(correlation), 1, atol=1e-5)
    np.testing.assert_allclose(np.corrcoef(ours.T), np.corrcoef(theirs.T), atol=1e-5)


@pytest.mark.parametrize(("name", "least"), [("breast-cancer", 0.93), ("wine", 0.93)])
def test_classes_are_learned(name, least):
    scores = [steep.fit(task(name), seed=s, progress=False, evaluate_every=999).test["accuracy"] for s in range(3)]
    assert sum(scores) / 3 > least, "the largest class alone gives 0.63 and 0.40"


def test_diabetes_is_learned():
    scores = [steep.fit(task("diabetes"), seed=s, progress=False, evaluate_every=999).test["loss"] for s in range(3)]
    assert sum(scores) / 3 < 0.7, "the mean predicts with a loss of 1, least squares with 0.5"

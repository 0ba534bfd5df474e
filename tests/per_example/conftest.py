"""What the engine's tests have in common."""

import warnings

import pytest
import torch

from steep.per_example import _embedding, _layers, autodiff, convolution, parts


@pytest.fixture
def seeded_and_quiet():
    """For models of any kind, of which some warn that they are slow."""
    torch.default_generator.manual_seed(0)  # `torch.manual_seed` would format a stack for each kind of device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def tiny_chunks(monkeypatch):
    """Every loop over slices, positions, samples and blocks takes several turns."""
    for module in (parts, _layers, convolution, _embedding, autodiff):
        monkeypatch.setattr(module, "CHUNK", 60)
    monkeypatch.setattr(autodiff, "COLUMNS", 200)


@pytest.fixture(params=["usual chunks", "tiny chunks"])
def chunks(request):
    if request.param == "tiny chunks":
        request.getfixturevalue("tiny_chunks")

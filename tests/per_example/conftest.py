"""What the engine's tests have in common."""

import pytest

from steep.per_example import autodiff, convolution, embedding, layers, parts


@pytest.fixture
def tiny_chunks(monkeypatch):
    """Every loop over slices, positions, samples and blocks takes several turns."""
    for module in (parts, layers, convolution, embedding, autodiff):
        monkeypatch.setattr(module, "CHUNK", 60)
    monkeypatch.setattr(autodiff, "COLUMNS", 200)


@pytest.fixture(params=["usual chunks", "tiny chunks"])
def chunks(request):
    if request.param == "tiny chunks":
        request.getfixturevalue("tiny_chunks")

"""`mnist10k`: the format of the files it downloads, and the real images where they are."""

import struct

import numpy as np
import pytest
import torch

import steep
from steep.tasks import mnist10k, task
from steep.tasks._files import data_directory


@pytest.fixture
def idx(monkeypatch, tmp_path):
    """A cache to be filled from two files in MNIST's own format, 40 images of which pixel (0, label) is lit."""
    monkeypatch.setenv("STEEP_DATA", str(tmp_path))
    labels = np.arange(40, dtype=np.uint8) % 10
    images = np.zeros((40, 28, 28), np.uint8)
    images[np.arange(40), 0, labels] = 255
    files = {
        "images-idx3": struct.pack(">iiii", 2051, 40, 28, 28) + images.tobytes(),
        "labels-idx1": struct.pack(">ii", 2049, 40) + labels.tobytes(),
    }
    monkeypatch.setattr(mnist10k, "download", lambda url: next(v for k, v in files.items() if k in url))


def test_download_reads_mnists_format(idx):
    data = task("mnist10k", batch_size=8).data(torch.Generator().manual_seed(0))
    x, y, _ = data.train.dataset[:]
    assert x.shape == (32, 1, 28, 28)
    assert torch.equal(x[:, 0, 0].argmax(1), y), "images and labels must stay together"
    assert x.unique().tolist() == [0, 1]
    assert (len(data.val.dataset), len(data.test.dataset)) == (2, 6)


def test_the_message_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("STEEP_DATA", str(tmp_path))

    def offline(url):
        raise OSError("no network")

    monkeypatch.setattr(mnist10k, "download", offline)
    with pytest.raises(FileNotFoundError, match=r"image/mnist10k.npz is missing .*no network.*uint8"):
        task("mnist10k").data(torch.Generator())


def test_learning_on_the_real_images():
    if not (data_directory() / "image/mnist10k.npz").exists():
        pytest.skip("needs image/mnist10k.npz in STEEP_DATA")
    recipe = task("mnist10k").replace(budget=steep.Budget(steps=100))
    result = steep.fit(recipe, progress=False, evaluate_every=1000)
    assert result.test["accuracy"] > 0.4, "chance is 0.1"

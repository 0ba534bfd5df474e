"""`uci:<name>`: splits and scaling on a table made here, the download's format, and the real tables where they are."""

import numpy as np
import pytest
import torch

import steep
from steep.tasks import task, uci
from steep.tasks._files import data_directory


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A cache that holds a yacht table of 200 rows: y = 3 a - 2 b + 100, and a constant column."""
    random = np.random.default_rng(0)
    x = random.normal(5, 2, (200, 2))
    y = 3 * x[:, 0] - 2 * x[:, 1] + 100
    (tmp_path / "tabular").mkdir()
    np.savez(tmp_path / "tabular/yacht.npz", data=np.column_stack([x, np.full(200, 7.5), y]))
    monkeypatch.setenv("STEEP_DATA", str(tmp_path))


@pytest.mark.usefixtures("table")
def test_the_last_column_is_the_target_and_all_is_standardised_by_training_statistics():
    data = task("uci:yacht").data(generator())
    train_x, train_y, _ = data.train.dataset[:]
    assert (len(train_x), train_x.shape[1], train_y.shape) == (120, 3, (120, 1))
    torch.testing.assert_close(train_y.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(train_y.std(correction=0), torch.tensor(1.0))
    assert (train_x[:, 2] == 0).all()
    val_x, val_y, _ = data.val.dataset[:]
    assert len(val_x) == 40
    # undo the scaling with the linear law of the table: the same law must hold in validation
    design = np.column_stack([train_x[:, :2].numpy(), np.ones(120)])
    law = np.linalg.lstsq(design, train_y.numpy()[:, 0], rcond=None)[0]
    np.testing.assert_allclose(np.column_stack([val_x[:, :2], np.ones(40)]) @ law, val_y[:, 0], atol=1e-4)


@pytest.mark.usefixtures("table")
def test_the_network_fits_the_table():
    recipe = task("uci:yacht", steps=300)
    assert [tuple(p.shape) for p in recipe.model().parameters() if p.ndim == 2] == [(64, 3), (64, 64), (1, 64)]
    result = steep.fit(recipe, progress=False)
    assert result.test["loss"] < 0.02, "a linear table, where predicting the mean gives 1"
    assert result.test["absolute error"] < 0.12


def test_a_table_smaller_than_a_batch_is_one_batch(tmp_path, monkeypatch):
    (tmp_path / "tabular").mkdir()
    np.savez(tmp_path / "tabular/stock.npz", data=np.random.default_rng(0).normal(size=(30, 4)))
    monkeypatch.setenv("STEEP_DATA", str(tmp_path))
    assert len(task("uci:stock").data(generator()).train) == 1


def test_download_reads_both_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("STEEP_DATA", str(tmp_path))
    seen = []

    def download(url):
        seen.append(url)
        return b"1.5 2\n3 4e1\n" if url.endswith(".txt") else b"1.5,2\n3,4e1\n"

    monkeypatch.setattr(uci, "download", download)
    for name in ("concrete", "power"):
        assert uci._table(name).tolist() == [[1.5, 2], [3, 40]]
        assert (tmp_path / f"tabular/{name}.npz").exists()
    assert "treforevans/uci_datasets" in seen[0]
    assert "/concrete/" in seen[0]
    assert "power-plant" in seen[1]


def test_the_message_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("STEEP_DATA", str(tmp_path))

    def offline(url):
        raise OSError("no network")

    monkeypatch.setattr(uci, "download", offline)
    with pytest.raises(FileNotFoundError, match=r"tabular/bike.npz is missing .*no network.*the target last"):
        task("uci:bike").data(generator())


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [("yacht", 308, 7), ("concrete", 1030, 9), ("power", 9568, 5), ("kin40k", 40000, 9), ("protein", 45730, 10)],
)
def test_the_real_tables(name, rows, columns):
    if not (data_directory() / f"tabular/{name}.npz").exists():
        pytest.skip(f"needs tabular/{name}.npz in STEEP_DATA")
    table = uci._table(name)
    assert table.shape == (rows, columns)
    x, y, _ = task(f"uci:{name}").data(generator()).train.dataset[:]
    assert x.isfinite().all()
    assert y.std(correction=0) == pytest.approx(1, abs=1e-4)
    assert x.abs().max() < 1e4, "no column blown up by a tiny deviation"

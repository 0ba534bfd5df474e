"""What can be written is read back; what cannot is refused before it is written, by the name of its place."""

import collections
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import steep
from steep.loop import checkpoint


def roundtrip(path, state):
    checkpoint.save(path, state)
    return checkpoint.load(path)


def test_numpys_numbers_are_written_as_pythons(tmp_path):
    state = {
        "lr": np.float64(0.1),
        "n": [np.int32(3), np.bool_(True)],
        "pair": (np.float32(0.5), "x"),
        np.int64(4): None,
    }
    found = roundtrip(tmp_path / "a.pt", state)
    assert found == {"format": checkpoint.FORMAT, "lr": 0.1, "n": [3, True], "pair": (0.5, "x"), 4: None}
    assert [type(v) for v in (found["lr"], found["n"][0], found["n"][1], found["pair"])] == [float, int, bool, tuple]


def test_a_run_whose_learning_rate_is_numpys_is_resumed_exactly(regression, tmp_path):
    recipe = regression.replace(optimizer=lambda parameters: torch.optim.Adam(parameters, lr=np.float64(0.05)))
    half = recipe.replace(budget=steep.Budget(steps=20), scheduler=None)
    straight = steep.fit(half, progress=False)
    steep.fit(half.replace(budget=steep.Budget(steps=9)), checkpoint=tmp_path / "run.pt", progress=False)
    resumed = steep.fit(half, checkpoint=tmp_path / "run.pt", progress=False)
    assert resumed.history.losses == straight.history.losses


def test_states_of_torch_stay_the_objects_they_are():
    state = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict()
    assert checkpoint._plain({"model": state}, ())["model"] is state
    assert state._metadata["1"]["version"] == 2


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (
            {"parts": {"loss": {"memory": [1, np.zeros(3)]}}},
            r"cannot save parts\.loss\.memory\.1: a ndarray is neither",
        ),
        ({"path": Path("x")}, r"cannot save path: a PosixPath"),
        ({"f": {1: nn.Linear(1, 1)}}, r"cannot save f\.1: a Linear"),
        ({"s": collections.deque([1])}, r"cannot save s: a deque"),
    ],
)
def test_what_could_not_be_read_is_refused_before_it_is_written(tmp_path, state, says):
    checkpoint.save(tmp_path / "a.pt", {"good": 1})
    with pytest.raises(steep.CheckpointError, match=says):
        checkpoint.save(tmp_path / "a.pt", state)
    assert checkpoint.load(tmp_path / "a.pt")["good"] == 1


def test_a_state_that_cannot_be_saved_ends_the_run_at_its_first_save(regression, tmp_path):
    class Rule(steep.Mean):
        def state_dict(self):
            return {"seen": {1, 2}}

        def load_state_dict(self, state):
            pass

    with pytest.raises(steep.CheckpointError, match=r"cannot save parts\.rule\.seen: a set"):
        steep.fit(regression.replace(backward=Rule), checkpoint=tmp_path / "run.pt", evaluate_every=1, progress=False)
    assert not (tmp_path / "run.pt").exists()


def test_a_whole_file_is_never_called_truncated(tmp_path):
    path = tmp_path / "whole.pt"
    torch.save({"format": checkpoint.FORMAT, "x": np.float64(1)}, path)
    with pytest.raises(steep.CheckpointError, match="holds objects that are not read") as error:
        checkpoint.load(path)
    assert "truncated" not in str(error.value)
    assert "delete" not in str(error.value)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(steep.CheckpointError, match="truncated"):
        checkpoint.load(path)


def test_a_model_with_state_of_its_own_is_resumed(regression, tmp_path):
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += self.training
            return super().forward(x)

        def get_extra_state(self):
            return {"calls": self.calls}

        def set_extra_state(self, state):
            self.calls = state["calls"]

    recipe = regression.replace(model=lambda: Counting(3, 1), budget=steep.Budget(steps=4), scheduler=None)
    steep.fit(recipe, checkpoint=tmp_path / "run.pt", progress=False)
    longer = steep.fit(recipe.replace(budget=steep.Budget(steps=7)), checkpoint=tmp_path / "run.pt", progress=False)
    assert longer.model.calls == 7


def test_a_checkpoint_of_an_older_format_is_kept_and_said_to_be_old(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"format": checkpoint.FORMAT - 1}, path)
    with pytest.raises(steep.CheckpointError, match="was written by an older steep.*finish the run with that version"):
        checkpoint.load(path)
    assert path.exists()

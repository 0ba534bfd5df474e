"""A wrapped loader: what is handed on to the inner one, its state, copies."""

import copy
import pickle

import pytest
import torch

import steep
from steep.utils.loaders import LoaderWrapper


class Stateful(list):
    """A loader with a state and feedback of its own."""

    place, heard = 0, None

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]

    def report(self, what):
        self.heard = what


def test_everything_else_is_the_inner_loaders():
    inner = Stateful([1, 2, 3])
    wrapped = LoaderWrapper(inner)
    assert (len(wrapped), list(wrapped)) == (3, [1, 2, 3])
    wrapped.report("losses")
    assert inner.heard == "losses"
    with pytest.raises(AttributeError, match="missing"):
        wrapped.missing  # noqa: B018


def test_the_inner_state_is_saved_where_there_is_one():
    first, second = (LoaderWrapper(Stateful([1])) for _ in range(2))
    first.loader.place = 5
    second.load_inner_state(first.inner_state())
    assert second.loader.place == 5
    plain = LoaderWrapper(steep.tensor_loader(torch.zeros(4, 1), torch.zeros(4), 2))
    assert plain.inner_state() == {}
    plain.load_inner_state({})


def test_copies_and_pickles_hold_a_loader_of_their_own():
    wrapped = LoaderWrapper(Stateful([1, 2]))
    for clone in (copy.copy(wrapped), copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert list(clone) == [1, 2]
    assert copy.deepcopy(wrapped).loader is not wrapped.loader

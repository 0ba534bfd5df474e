"""The common checks find what they are there for: each fault here is planted in a sound rule, and must be found."""

import itertools

import pytest
import torch

import steep
from steep.recipe import Mean
from steep.testing import check_method, checks
from steep.utils.validation import check_ranges


class Sound(Mean):
    """The mean's gradient, multiplied.

    Args:
        model: of the losses.
        factor: multiplies the gradient, > 0.
    """

    def __init__(self, model, factor=2.0):
        check_ranges({"factor": factor}, {"factor": "(0, inf)"})
        self.factor = factor

    def __call__(self, losses, *, scale=1.0):
        super().__call__(losses, scale=scale * self.factor)


class Idle(Sound):
    __doc__ = Sound.__doc__

    def __init__(self, model, factor=1.0):
        super().__init__(model, factor)


class Leaking(Sound):
    __doc__ = Sound.__doc__

    def __call__(self, losses, *, scale=1.0):
        self.__dict__.setdefault("kept", []).append(losses.detach().clone())
        super().__call__(losses, scale=scale)


class Forgetful(Sound):
    __doc__ = Sound.__doc__
    calls = 0  # not in a state_dict

    def __call__(self, losses, *, scale=1.0):
        self.calls += 1
        super().__call__(losses, scale=scale / self.calls)


class Unseeded(Sound):
    __doc__ = Sound.__doc__
    numbers = itertools.count()

    def __call__(self, losses, *, scale=1.0):
        super().__call__(losses, scale=scale * (1 + next(self.numbers) % 97))


class DeadFlag(Sound):
    __doc__ = f"{Sound.__doc__}    unused: nothing."

    def __init__(self, model, factor=2.0, unused=1.0):
        check_ranges({"unused": unused}, {"unused": "(0, inf)"})
        super().__init__(model, factor)


class Undocumented(Sound):
    """The mean's gradient."""


class Careless(Sound):
    __doc__ = Sound.__doc__

    def __init__(self, model, factor=2.0):
        self.factor = factor if isinstance(factor, float) and factor > 0 else 2.0


class Overwriting(Sound):
    __doc__ = Sound.__doc__

    def __init__(self, model, factor=2.0):
        super().__init__(model, factor)
        self.model = model

    def __call__(self, losses, *, scale=1.0):
        self.model.zero_grad()
        super().__call__(losses, scale=scale)


class Unscaled(Sound):
    __doc__ = Sound.__doc__

    def __call__(self, losses, *, scale=1.0):
        super().__call__(losses)


class Stepping(Overwriting):
    __doc__ = Sound.__doc__

    def __call__(self, losses, *, scale=1.0):
        Sound.__call__(self, losses, scale=scale)
        torch.optim.SGD(self.model.parameters(), lr=0.1).step()


class Unassuming(Sound):
    """Says that it requires a vector, and takes a mean too.

    Args:
        model: of the losses.
        factor: multiplies the gradient, > 0.
    """

    requires = frozenset({"losses"})


class Empty(Sound):
    __doc__ = Sound.__doc__

    def __call__(self, losses, *, scale=1.0):
        pass


def entry(make):
    return steep.Method(id="faulty", paper=steep.Paper("none", url="https://none"), changes="backward", make=make)


def test_a_sound_method_passes():
    check_method(entry(Sound))


@pytest.mark.parametrize(
    ("make", "check", "says"),
    [
        (Idle, "learns_something_else", "does nothing"),
        (Leaking, "leaks_nothing", "live tensors grows"),
        (Forgetful, "resumes_exactly", "resumed at step 1 differs"),
        (Unseeded, "deterministic", "two seeded runs differ"),
        (DeadFlag, "every_flag_has_an_effect", r"changing \['unused'\] changes nothing"),
        (Undocumented, "documented", r"does not say what \['factor'\] are"),
        (Careless, "refuses_bad_values", "accepts what it cannot use"),
        (Overwriting, "adds_to_gradients", "does not add"),
        (Unscaled, "is_linear_in_its_scale", "not a quarter"),
        (Stepping, "leaves_parameters_alone", "moves the parameters"),
        (Unassuming, "refuses_a_mean_where_it_requires_a_vector", "accepts the mean loss"),
        (Empty, "fills_gradients", "leaves every gradient empty"),
    ],
)
def test_each_fault_is_found(make, check, says):
    found = dict(checks(entry(make)))
    with pytest.raises(AssertionError, match=says):
        found[check]()

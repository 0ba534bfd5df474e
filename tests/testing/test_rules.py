"""The contract of backward rules finds each fault that is planted in a sound one."""

import dataclasses

import pytest
import torch

import steep
from steep.backward._conditions import check_vector
from steep.backward.coherence import AVERAGES
from steep.testing import rules


@pytest.mark.parametrize(
    ("id", "settings"),
    [("sven", {}), ("levenberg-marquardt", {}), ("wta-crs", {}), *(("coherence", {"average": a}) for a in AVERAGES)],
)
def test_a_parameter_that_has_no_part_in_the_losses_gets_no_gradient(id, settings):
    """Not even zeros, which weight decay would add to; Spring's are zeros."""
    subject = rules.Subject(dataclasses.replace(steep.method(id), preset={**steep.method(id).preset, **settings}))
    subject.call()
    assert subject.model.spare.grad is None


class Sound:
    """The mean's gradient with momentum, which draws a sign for each step."""

    requires = frozenset({"losses", "model"})

    def __init__(self, model, seed=0):
        self.model, self.generator = model, torch.Generator().manual_seed(seed)
        self.memory = {}

    def __call__(self, losses, *, scale=1.0):
        check_vector("Sound", losses)
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        found = torch.autograd.grad(losses.mean(), [p for _, p in named], allow_unused=True)
        sign = 1.0 + torch.rand(1, generator=self.generator).item()
        for (name, p), g in zip(named, found, strict=True):
            if g is not None:
                self.memory[name] = 0.5 * self.memory.get(name, 0) + g
                self.add(p, scale * sign * self.memory[name])

    def add(self, p, g):
        p.grad = g if p.grad is None else p.grad + g

    def state_dict(self):
        return {"memory": dict(self.memory), "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.memory = dict(state["memory"])
        self.generator.set_state(state["generator"])

    def __repr__(self):
        return "Sound()"


class Stepping(Sound):
    """Moves the parameters itself."""

    def add(self, p, g):
        super().add(p, g)
        with torch.no_grad():
            p -= 0.1 * g


class Overwriting(Sound):
    """Replaces the gradients that are there."""

    def add(self, p, g):
        p.grad = g


class Unscaled(Sound):
    """Takes no notice of the scale."""

    def __call__(self, losses, *, scale=1.0):
        super().__call__(losses)


class Remembering(Sound):
    """Scales its memory as well as the gradient."""

    def __call__(self, losses, *, scale=1.0):
        super().__call__(losses * scale, scale=scale)


class Carrying(Sound):
    """Remembers gradients that are scaled."""

    def __call__(self, losses, *, scale=1.0):
        super().__call__(losses * scale)


class Thawing(Sound):
    """Gives frozen parameters gradients."""

    def __call__(self, losses, *, scale=1.0):
        super().__call__(losses, scale=scale)
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad


class Inventing(Sound):
    """Gives parameters that have no part in the losses gradients, such as weight decay."""

    def __call__(self, losses, *, scale=1.0):
        super().__call__(losses, scale=scale)
        self.model.spare.grad = 0.1 * self.model.spare.detach()


class Skipping(Sound):
    """Leaves vectors out."""

    def add(self, p, g):
        if g.ndim > 1:
            super().add(p, g)


class Global(Sound):
    """Draws from the global generator."""

    def __init__(self, model):
        super().__init__(model)
        self.generator = torch.default_generator

    def __deepcopy__(self, memo):
        raise AssertionError("is not copied in this test")


class Forgetful(Sound):
    """Its memory is not in its state."""

    def state_dict(self):
        return super().state_dict() | {"memory": {}}


class Redrawing(Sound):
    """Its generator is not in its state."""

    def load_state_dict(self, state):
        self.memory = dict(state["memory"])


class Stateless(Sound):
    """Has a memory, and no state."""

    state_dict = property()


class Attached(Sound):
    """Its copy belongs to the model of the original."""

    def __deepcopy__(self, memo):
        other = type(self)(self.model)
        other.load_state_dict(self.state_dict())
        return other


class Renewed(Sound):
    """Its copy starts anew."""

    def __deepcopy__(self, memo):
        return type(self)(memo[id(self.model)])


class Silent(Sound):
    """Hides what is not finite."""

    def add(self, p, g):
        super().add(p, g.nan_to_num(0.0, 0.0, 0.0))


class Watching(Sound):
    """Draws at every forward pass."""

    def __init__(self, model):
        super().__init__(model)
        model.head.register_forward_hook(self.draw)

    def draw(self, *_):
        torch.rand(1, generator=self.generator)


class Permissive(Sound):
    """Takes any losses."""

    def __call__(self, losses, *, scale=1.0):
        super().__call__(losses.flatten(), scale=scale)


class Terse(Sound):
    """Does not say what to do."""

    def __call__(self, losses, *, scale=1.0):
        if losses.ndim != 1:
            raise ValueError("wrong losses")
        super().__call__(losses, scale=scale)


FAULTS = {
    Stepping: {"leaves_parameters_alone"},
    Overwriting: {"adds_to_gradients"},
    Unscaled: {"is_linear_in_its_scale"},
    Carrying: {"is_linear_in_its_scale"},
    Remembering: {"is_linear_in_its_scale"},
    Thawing: {"fills_gradients"},
    Inventing: {"fills_gradients"},
    Skipping: {"fills_gradients"},
    Global: {"repeats_itself"},
    Forgetful: {"state_survives_saving"},
    Redrawing: {"state_survives_saving"},
    Stateless: {"state_survives_saving"},
    Attached: {"copies_go_with_their_copy_of_the_model"},
    Renewed: {"copies_go_with_their_copy_of_the_model"},
    Silent: {"what_is_not_finite_is_never_silent"},
    Watching: {"evaluation_between_steps_changes_nothing"},
    Permissive: {"refuses_a_mean_where_it_requires_a_vector"},
    Terse: {"refuses_a_mean_where_it_requires_a_vector"},
}


def entry(make):
    return steep.Method(
        id="planted", paper=steep.Paper("None", url="https://example.org"), changes="backward", make=make
    )


@pytest.mark.parametrize("check", rules.CHECKS)
def test_a_sound_rule_passes(check):
    check(entry(Sound))


@pytest.mark.parametrize(("faulty", "name"), [(faulty, name) for faulty, names in FAULTS.items() for name in names])
def test_planted_faults_are_found(faulty, name):
    with pytest.raises(AssertionError):
        getattr(rules, name)(entry(faulty))


def test_each_check_finds_a_fault():
    assert {name for names in FAULTS.values() for name in names} == {check.__name__ for check in rules.CHECKS}

"""The contract of handles finds each fault that is planted in a sound one."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import steep
from steep.models._handle import ParametrizedWeights
from steep.testing import handles


class Fading(nn.Module):
    """Multiplies a weight by a factor that falls from step to step, in place of a method's parametrization."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, weight):
        return weight * 0.9**self.steps


class Sound(ParametrizedWeights):
    def __init__(self, model):
        layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d))}
        if not layers:
            raise ValueError("no layer")
        super().__init__(layers, Fading)


class New(Sound):
    """Leaves new parameters behind."""

    def _leave(self, merged):
        layers = list(self.layers.values())
        super()._leave(merged)
        for layer in layers:
            layer.weight = nn.Parameter(layer.weight.detach().clone())


class Reordering(Sound):
    """Puts the weight behind the bias, as torch does."""

    def _leave(self, merged):
        for layer in self.layers.values():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=merged)
        self.layers.clear()


class Mixing(Sound):
    """Merges where it should remove."""

    def remove(self):
        self.merge()


class Lossy(Sound):
    """Removes where it should merge."""

    def merge(self):
        self.remove()


class Forgetful(Sound):
    """Has its place in the schedule in the handle alone."""

    count = 0

    def step(self):
        self.count += 1
        self._enter(self.count)


class Lingering(Sound):
    """Touches the layers after they were given back."""

    def __init__(self, model):
        super().__init__(model)
        self.model = model

    @torch.no_grad()
    def step(self):
        super().step()
        if not self.layers:
            next(self.model.parameters()).mul_(0.9)


class Shared(Sound):
    """Its copies are itself."""

    def __deepcopy__(self, memo):
        return self


class Remaking(Sound):
    """Makes new parameters, which an optimizer made before it does not know."""

    def __init__(self, model):
        for module in model.modules():
            if hasattr(module, "weight") and not parametrize.is_parametrized(module):
                module.weight = nn.Parameter(module.weight.detach().clone())
        super().__init__(model)


class Twice(Sound):
    """Wraps a layer again without a word."""

    def __init__(self, model):
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d))]
        if not layers:
            raise ValueError("no layer")
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", Fading(layer.weight))
        self.layers, self.weights = dict(enumerate(layers)), True


class Idle(Sound):
    """Has nothing against a model without layers."""

    def __init__(self, model):
        layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d))}
        ParametrizedWeights.__init__(self, layers, Fading)


class Decaying(Sound):
    """Changes the latent weights themselves at every step."""

    @torch.no_grad()
    def step(self):
        super().step()
        for weight in self._latent():
            weight.original.mul_(0.9)


class Thawing(Sound):
    """Trains what is frozen."""

    def __init__(self, model):
        super().__init__(model)
        for weight in self._latent():
            weight.original.requires_grad_(True)


class Selective(Sound):
    """Leaves layers with frozen weights out."""

    def __init__(self, model):
        layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d))}
        trained = {name: m for name, m in layers.items() if m.weight.requires_grad}
        ParametrizedWeights.__init__(self, trained, Opposite)


class Opposite(Fading):
    def forward(self, weight):
        return -super().forward(weight)


class Waking(Sound):
    """Puts the model into training mode."""

    def __init__(self, model):
        super().__init__(model.train())


class Widening(Sound):
    """Leaves float32 whatever the model was."""

    def merge(self):
        layers = list(self.layers.values())
        super().merge()
        for layer in layers:
            layer.weight.data = layer.weight.data.float()


class Pushing(Sound):
    """Adds to the gradient at every backward pass."""

    def __init__(self, model):
        super().__init__(model)
        for weight in self._latent():
            weight.original.register_hook(lambda g: g + 0.1)


class Baked(Sound):
    """Has its place in the schedule in Python, where a compiler takes it for a constant."""

    def __init__(self, model):
        layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d))}
        ParametrizedWeights.__init__(self, layers, Constant)

    def step(self):
        for part in self._scheduled():
            part.factor *= 0.9


class Constant(Fading):
    factor = 1.0

    def forward(self, weight):
        return weight * self.factor


def entry(make):
    return steep.Method(id="faulty", paper=steep.Paper("none", url="https://none"), changes="models", make=make)


@pytest.mark.parametrize("check", handles.CHECKS)
def test_a_sound_handle_passes(check):
    check(entry(Sound))


@pytest.mark.parametrize(
    ("make", "check", "says"),
    [
        (New, "remove_gives_the_dense_model_back", "other parameters"),
        (New, "merge_leaves_plain_modules_that_compute_the_same", "other parameters"),
        (Reordering, "remove_gives_the_dense_model_back", "undo|another order"),
        (Reordering, "merge_leaves_plain_modules_that_compute_the_same", "other modules"),
        (Mixing, "remove_gives_the_dense_model_back", "changes the weights"),
        (Lossy, "merge_leaves_plain_modules_that_compute_the_same", "changes the outputs"),
        (Forgetful, "state_survives_saving", "goes on differently"),
        (Lingering, "does_nothing_once_it_is_gone", r"after remove\(\)"),
        (Shared, "copies_are_independent", "changes the original"),
        (Remaking, "takes_optimizers_made_before_and_after", "made before"),
        (Twice, "refuses_a_second_handle", "applied twice"),
        (Idle, "refuses_models_without_an_eligible_layer", "no layer for it"),
        (Twice, "changes_all_layers_or_none", "some layers before"),
        (Decaying, "stepping_touches_neither_parameters_nor_optimizer", "changes a parameter"),
        (Thawing, "frozen_weights_stay", "changes frozen weights"),
        (Selective, "frozen_weights_stay", "leaves layers with frozen weights out"),
        (Remaking, "tied_weights_stay_tied", "no longer"),
        (Waking, "modes_are_the_users", "training mode"),
        (Widening, "keeps_the_models_dtype", "leaves other weights"),
        (Pushing, "accumulated_parts_are_the_whole_batch", "do not add up"),
        (Pushing, "per_example_gradients_average_to_the_batchs", "other gradients"),
        (Baked, "compiles_to_one_graph_for_the_whole_schedule", "compiled [2-9] times"),
    ],
)
def test_each_fault_is_found(make, check, says):
    found = {each.__name__: each for each in handles.CHECKS}
    with pytest.raises(AssertionError, match=says):
        found[check](entry(make))


def test_a_copy_that_breaks_when_the_original_is_given_back_is_found():
    """torch's own removal deletes the property of a class that both have."""
    with pytest.raises(AttributeError, match="has no attribute 'weight'"):
        handles.copies_are_independent(entry(Reordering))

"""Every module of a run is in training mode exactly when gradients are wanted, and held-out data change nothing."""

import pytest
import torch
from torch import nn

import steep
from steep.loop.modes import evaluating, start_training
from steep.recipe import Mean


def fit(recipe, **options):
    return steep.fit(recipe, progress=False, device="cpu", **options)


class CentredLoss(nn.Module):
    """Squared error, divided by its running mean in training mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, output, target):
        losses = (output.squeeze(-1) - target).square()
        if self.training:
            self.mean.lerp_(losses.detach().mean(), 0.1)
        return losses / self.mean


def test_weights_do_not_depend_on_how_often_held_out_data_are_scored(regression):
    recipe = regression.replace(loss=CentredLoss())
    often, seldom = fit(recipe, evaluate_every=1), fit(recipe, evaluate_every=100)
    assert often.history.losses == seldom.history.losses
    assert all(map(torch.equal, often.model.state_dict().values(), seldom.model.state_dict().values()))


def test_a_loss_with_dropout_is_reported_without_it(regression):
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, output, target):
            return self.dropout((output.squeeze(-1) - target).square())

    found = fit(regression.replace(loss=Dropped(), score=regression.loss)).test["loss"]
    assert fit(regression.replace(loss=Dropped())).test["loss"] == found


def test_each_module_is_in_training_mode_exactly_when_gradients_are_on(regression):
    seen = []

    class Probe(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def note(self):
            seen.append((self.name, self.training, torch.is_grad_enabled()))

    class Model(Probe):
        def __init__(self, part):
            super().__init__("model")
            self.layer, self.parts = nn.Linear(3, 1), [part]  # in a list: no submodule of the model

        def forward(self, x):
            self.note()
            self.parts[0].note()
            return self.layer(x)

    class Loss(Probe):
        def forward(self, output, target):
            self.note()
            return (output.squeeze(-1) - target).square()

    class Rule(Probe):
        def __init__(self, model):
            super().__init__("rule")

        def forward(self, losses, *, scale=1.0):
            self.note()
            Mean()(losses, scale=scale)

    recipe = regression.replace(
        model=steep.deferred(lambda run: Model(run.attach(Probe("part")))),
        loss=steep.deferred(lambda run: Loss("loss")),
        score=steep.deferred(lambda run: Loss("score")),
        backward=Rule,
        budget=steep.Budget(steps=4),
    )
    fit(recipe, evaluate_every=2)
    assert {name for name, _, _ in seen} == {"model", "part", "loss", "score", "rule"}
    assert all(training == gradients for _, training, gradients in seen)
    assert {training for name, training, _ in seen if name == "model"} == {True, False}


def test_a_model_that_arrives_in_evaluation_mode_is_trained_with_its_dropout(regression):
    pretrained = regression.replace(model=lambda: regression.model().eval())
    assert fit(pretrained).history.losses == fit(regression).history.losses


def test_a_users_train_that_keeps_a_layer_frozen_is_honoured(regression):
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()
            return self

    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
    result = fit(regression.replace(model=lambda: Frozen(*layers)))
    assert result.model[1].num_batches_tracked == 0
    assert result.model[0].training


def test_a_layer_kept_in_evaluation_mode_stays_there(regression):
    def model():
        built = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        built[1].eval()
        return built

    result = fit(regression.replace(model=model))
    assert result.model[1].num_batches_tracked == 0
    assert [module.training for module in result.model] == [True, False, True]


@pytest.mark.parametrize("arrives", ["training", "evaluation"])
def test_optimizers_with_modes_are_scored_in_theirs(regression, arrives):
    """One that trains at shifted weights: what is scored must be what it gives in evaluation mode."""

    class Shifted(torch.optim.SGD):
        mode = "evaluation"

        def _shift(self, by):
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.add_(by)

        def train(self):
            if self.mode == "evaluation":
                self.mode = "training"
                self._shift(1.0)

        def eval(self):
            if self.mode == "training":
                self.mode = "evaluation"
                self._shift(-1.0)

        def step(self, closure=None):
            assert self.mode == "training"
            return super().step(closure)

    made = []

    def optimizer(parameters):
        made.append(Shifted(parameters, lr=0.0))
        if arrives == "training":
            made[-1].train()
        return made[-1]

    recipe = regression.replace(budget=steep.Budget(steps=3), scheduler=None)
    still = fit(recipe.replace(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0)))
    found = fit(recipe.replace(optimizer=optimizer), evaluate_every=1)
    assert made[0].mode == "training"
    assert found.test["loss"] == pytest.approx(still.test["loss"], rel=1e-5)
    assert found.history.losses[0] != pytest.approx(still.history.losses[0], rel=1e-2)


def test_evaluating_restores_every_mode_even_after_an_error():
    model, loss = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval()), nn.Dropout()
    modes = []

    def failing():
        with evaluating(model, [loss, None, object()]):
            modes.extend(m.training for m in (*model.modules(), loss))
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        failing()
    assert modes == [False] * 4
    assert [m.training for m in (*model.modules(), loss)] == [True, True, False, True]


def test_training_starts_part_by_part():
    part = nn.Sequential(nn.Dropout()).eval()
    start_training([part, None, 3])
    assert all(module.training for module in part.modules())

"""A schedule gets the length of the run where it has a name for it, and never in the place of something else."""

from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler as schedules

import steep
from steep.loop.schedules import build_schedule
from steep.recipe import Run


def build(factory, horizon=20):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    return build_schedule(factory, optimizer, Run(None, 0, 5, horizon, torch.Generator()))


@pytest.mark.parametrize(
    ("factory", "attribute"),
    [
        (schedules.CosineAnnealingLR, "T_max"),
        (partial(schedules.CosineAnnealingLR, eta_min=1e-3), "T_max"),
        (partial(schedules.OneCycleLR, max_lr=0.1), "total_steps"),
        (schedules.PolynomialLR, "total_iters"),
        (partial(schedules.LinearLR, start_factor=0.5), "total_iters"),
        (schedules.CosineAnnealingWarmRestarts, "T_0"),
        (lambda optimizer, steps: schedules.CosineAnnealingLR(optimizer, steps), "T_max"),
    ],
)
def test_the_length_is_given_under_its_own_name(factory, attribute):
    assert getattr(build(factory), attribute) == 20


def test_what_is_fixed_stays_fixed_and_what_has_no_length_gets_none():
    assert build(partial(schedules.CosineAnnealingLR, T_max=7)).T_max == 7
    assert build(partial(schedules.ExponentialLR, gamma=0.9), horizon=None).gamma == 0.9
    assert build(partial(schedules.StepLR, step_size=3)).step_size == 3


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        (schedules.ExponentialLR, r"lacks gamma: write scheduler=functools.partial\(ExponentialLR, gamma=...\)"),
        (schedules.StepLR, "lacks step_size"),
        (schedules.OneCycleLR, "lacks max_lr"),
        (schedules.MultiStepLR, "lacks milestones"),
        (schedules.ReduceLROnPlateau, "follows a validation score"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_line_to_write(factory, says):
    with pytest.raises(TypeError, match=says):
        build(factory)


def test_a_length_without_a_horizon_is_refused():
    with pytest.raises(ValueError, match="a schedule needs a horizon"):
        build(schedules.CosineAnnealingLR, horizon=None)


@pytest.mark.parametrize(
    "factory",
    [
        partial(schedules.OneCycleLR, max_lr=0.1),
        partial(schedules.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=3),
        lambda optimizer, steps: schedules.SequentialLR(
            optimizer,
            [schedules.LinearLR(optimizer, 0.1, total_iters=5), schedules.CosineAnnealingLR(optimizer, steps - 5)],
            [5],
        ),
    ],
)
def test_runs_under_other_schedules_are_resumed_exactly(regression, tmp_path, factory):
    recipe = regression.replace(scheduler=factory, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
    losses, path = [], tmp_path / "run.pt"

    def stopping(output, target):
        losses.append(1)
        if len(losses) == 12:
            raise ZeroDivisionError
        return regression.loss(output, target)

    with pytest.raises(ZeroDivisionError):
        steep.fit(recipe.replace(loss=stopping), checkpoint=path, evaluate_every=4, progress=False)
    resumed = steep.fit(recipe, checkpoint=path, progress=False).history.losses
    assert resumed == steep.fit(recipe, progress=False).history.losses

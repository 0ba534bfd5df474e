"""Which arms cannot be run on a recipe, as far as one batch shows, without any training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from steep.batches import as_batch
from steep.evidence.arms import Arm
from steep.evidence.runs.jobs import arm_recipe
from steep.loop.training import Training, accelerator
from steep.method import Method
from steep.recipe import Recipe
from steep.requires import Facts, UnmetRequirement, check_losses, check_requirements
from steep.utils.randomness import isolated
from steep.utils.threads import alone


def misfits(recipe: Recipe, own: Mapping[str, Method], arms: Sequence[Arm]) -> dict[str, Exception]:
    """By the name of the arm, why it cannot be run. The recipe itself is built once, on the CPU.

    Raises:
        Exception: whatever the recipe's own parts raise on their first batch.
    """
    with alone(), isolated(0, "model"):
        training = Training(recipe, 0, 0, accelerator("cpu", "no"))
        training.check()
        batch = as_batch(next(iter(training.run.data.train)))
        losses = training.losses(training.model, batch)
        training.evaluate([batch])
        facts = Facts(training.model, training.run.data, batch)
        found = {arm.name: _misfit(arm, recipe, own, facts, losses) for arm in arms}
    return {name: error for name, error in found.items() if error is not None}


def _misfit(
    arm: Arm, recipe: Recipe, own: Mapping[str, Method], facts: Facts, losses: torch.Tensor
) -> Exception | None:
    try:
        if not any(id in own or ":" in id for id, _ in arm.methods):  # a user's function may take its time
            made = arm_recipe(recipe, own, arm.settings(arm.defaults())[0], 1.0, recipe.budget)
            if made.optimizer is not recipe.optimizer:
                made.optimizer(list(facts.model.parameters()))  # refuses values out of range
        for method in arm.entries if len(arm.entries) == 1 else ():  # of several, one may provide what another requires
            check_requirements(method.make.__name__, method.requires, facts)
            if "losses" in method.requires:
                check_losses(losses, facts.batch.size, required_by=method.make.__name__)
    except (UnmetRequirement, ValueError, TypeError) as error:
        return error
    return None

"""Levenberg-Marquardt: two regressions against tuned Adam, at equal time."""

from functools import partial

import torch

import steep
from steep.evidence.claims import Claim, Quantity, scores


def experiment(lab):
    adam = partial(torch.optim.Adam, lr=1e-2)
    recipes = {
        "1-D regression": steep.task("function-1d", epochs=3).replace(optimizer=adam),
        "Poisson equation": steep.task("poisson", steps=1000).replace(optimizer=adam),
    }
    studies = {name: lab.compare(recipe, ["levenberg-marquardt"], name=name) for name, recipe in recipes.items()}
    return {
        f"{name}: test loss at equal time": scores(study, "levenberg-marquardt", at_equal_time=True)
        for name, study in studies.items()
    }


claim = Claim(
    id="levenberg-marquardt",
    statement="On mini-batches, with the damping adapted and the system solved in as many dimensions as there are "
    "examples, it is ahead of first-order methods in time as well.",
    source="abstract and numerical results, loss against seconds; no one size is given",
    paper_scale="Classification with networks of one hidden layer (MNIST, CIFAR-10, webspam, Covertype)",
    our_scale="MLP 1-16-16-16-1 on 10 000 examples for 3 epochs; a PINN 2-32-32-1 for 1000 steps; 8 paired seeds, all "
    "arms tuned, cosine schedule in all",
    quantities=(
        Quantity("1-D regression: test loss at equal time", better="lower"),
        Quantity("Poisson equation: test loss at equal time", better="lower"),
    ),
    experiment=experiment,
)

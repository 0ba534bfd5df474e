"""Sven: the paper's 1-D regression against tuned Adam, at equal steps and at equal time."""

from functools import partial

import torch

import steep
from steep.evidence.claims import Claim, Quantity, scores


def experiment(lab):
    recipe = steep.task("function-1d", epochs=3).replace(optimizer=partial(torch.optim.Adam, lr=1e-2))
    study = lab.compare(recipe, ["sven"])
    return {
        "test loss at equal steps": scores(study, "sven"),
        "test loss at equal time": scores(study, "sven", at_equal_time=True),
    }


claim = Claim(
    id="sven",
    statement="On regression it converges faster and lower than first-order methods, Adam included.",
    source="abstract; section on numerical experiments, 1-D regression; the authors' later results table (validation "
    "loss 5.1e-7, Adam 3.3e-5)",
    paper_scale="The same function and network, 20 epochs, 10 seeds, learning rates from a grid",
    our_scale="10 000 examples, MLP 1-16-16-16-1, 3 epochs, 8 paired seeds, all arms tuned, cosine schedule in all",
    quantities=(
        Quantity("test loss at equal steps", better="lower", size=65.0),
        Quantity("test loss at equal time", better="lower"),
    ),
    experiment=experiment,
)

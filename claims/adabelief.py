"""AdaBelief: the paper's 2-D functions, step for step against Adam, and a small CNN on digits against SGD and AdamW."""

from functools import partial

import torch

import steep
from steep.evidence.claims import Claim, Quantity, columns, errors, scores
from steep.optim.adabelief import AdaBelief

FUNCTIONS = {  # (f, start); the minimum is 0
    "|x| + |y|": (lambda x, y: x.abs() + y.abs(), (2.0, 1.0)),
    "|x + y| + |x - y| / 10": (lambda x, y: (x + y).abs() + (x - y).abs() / 10, (2.0, 1.0)),
    "(x + y)² + (x - y)² / 10": (lambda x, y: (x + y) ** 2 + (x - y) ** 2 / 10, (2.0, 1.0)),
    "Beale": (
        lambda x, y: (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2,
        (1.0, 1.5),
    ),
    "Rosenbrock": (lambda x, y: (1 - x) ** 2 + 100 * (y - x**2) ** 2, (-1.5, 2.0)),
}


def steps(name, kind, limit):
    """Steps at the default learning rate until the function is within 0.01 of its minimum."""
    f, start = FUNCTIONS[name]
    point = torch.tensor(start, requires_grad=True)
    optimizer = kind([point])
    for step in range(1, limit + 1):
        optimizer.zero_grad()
        f(*point).backward()
        optimizer.step()
        if f(*point.detach()) < 0.01:
            return step
    return None


def toys(name, limit):
    kinds = {"AdaBelief": partial(AdaBelief, foreach=False), "Adam": partial(torch.optim.Adam, foreach=False)}
    return {label: steps(name, kind, limit) for label, kind in kinds.items()}


def experiment(lab):
    rows = lab.each(list(FUNCTIONS), partial(toys, limit=10 if lab.smoke else 10_000))
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
    recipe = steep.task("digits-image", epochs=12).replace(optimizer=sgd)
    study = lab.compare(recipe, ["adabelief"])
    return {
        "steps to the minimum, against Adam": columns(rows, list(FUNCTIONS), "AdaBelief", "Adam"),
        "test accuracy, against SGD": scores(study, "adabelief", "accuracy"),
        "test error, against AdamW": errors(study, "adabelief", examples=359, against="adamw"),
    }


claim = Claim(
    id="adabelief",
    statement="Converges as fast as adaptive methods, and faster than Adam on 2-D functions; generalises as SGD does.",
    source="abstract; trajectories on 2-D functions; ImageNet with ResNet-18 (70.08 %, SGD 69.76 %, Adam at best "
    "66.54 %: from memory)",
    paper_scale="Five 2-D functions; VGG, ResNet and DenseNet on CIFAR, ResNet-18 on ImageNet",
    our_scale="The functions; a CNN of 24 thousand weights on 1797 digits, 12 epochs, 8 paired seeds, all arms tuned",
    quantities=(
        Quantity("steps to the minimum, against Adam", better="lower", exact=True),
        Quantity("test accuracy, against SGD", better="higher", scale="difference", null=-0.005, size=0.0),
        Quantity("test error, against AdamW", better="lower", size=33.46 / 29.92),
    ),
    experiment=experiment,
)

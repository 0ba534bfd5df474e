"""What the claims of AdamP and SGDP share: a CNN with BatchNorm, and how much its scale-invariant weights grow."""

from torch import nn

import steep
from steep.evidence.claims import columns, errors, scores

NORM = "norm of the convolutions' weights at the end"


def network():
    def block(i, o):
        return [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(1, 16), *block(16, 32), *block(32, 64), nn.Flatten(), nn.Linear(64, 10))


def measure(lab, recipe, id, method, baseline):
    """The quantities of both claims, for optimizers with one learning rate; the comparison tunes its arms."""
    recipe = recipe.replace(model=network, optimizer=baseline)

    def norms(seed):
        """Both start from the same weights."""
        found = {}
        for name, optimizer in (("method", method), ("baseline", baseline)):
            model = steep.fit(lab.shorter(recipe.replace(optimizer=optimizer)), seed=seed, progress=False).model
            found[name] = sum(float(m.weight.detach().square().sum()) for m in model if isinstance(m, nn.Conv2d)) ** 0.5
        return found

    seeds = list(range(6))
    study = lab.compare(recipe, [id])
    return {
        NORM: columns(lab.each(seeds, norms), seeds, "method", "baseline"),
        "test error": errors(study, id, examples=359),
        "test loss": scores(study, id),
    }

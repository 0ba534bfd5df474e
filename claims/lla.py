"""LLA: the shape of the Hessian's spectrum on other data tells how accurate the model is there."""

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

import steep
from steep.evidence.claims import Claim, Pairs, Quantity
from steep.probes.lla import hessian_spectrum


def shifts(x, y, seed):
    """The test digits, noisier and noisier, turned, and with labels that are not theirs."""
    g = torch.Generator().manual_seed(seed)
    noisy = {f"noise {s}": (x + s * torch.randn(x.shape, generator=g), y) for s in (0.0, 0.2, 0.4, 0.6, 1.0)}
    turned = torch.rot90(x.view(-1, 8, 8), dims=(1, 2)).flatten(1)
    return noisy | {"turned": (turned, y), "half turned": (x.flip(1), y), "shuffled": (x, y.roll(1))}


def measure(seed):
    recipe = steep.task("digits", epochs=20)
    model = steep.fit(recipe, seed=seed, progress=False, device="cpu").model.double()
    test = [batch[:2] for batch in recipe.data(torch.Generator().manual_seed(seed)).test]
    x, y = torch.cat([b[0] for b in test]).double(), torch.cat([b[1] for b in test])
    accuracies, found = [], []
    for images, labels in shifts(x, y, seed).values():
        with torch.no_grad():
            accuracies.append(float((model(images).argmax(1) == labels).double().mean()))
        spectrum = hessian_spectrum(
            model, lambda m, a=images, b=labels: F.cross_entropy(m(a), b), torch.Generator().manual_seed(0), steps=40
        )
        found.append(spectrum.criteria())
    of = {"r_e": [c.r_e for c in found], "K": [c.k_h for c in found]}
    return {name: -float(spearmanr(values, accuracies).statistic) for name, values in of.items()}


def experiment(lab):
    seeds = list(range(6))
    rows = lab.each(seeds, measure)
    nothing = [0.0] * len(rows)
    return {
        f"rank correlation of {name} with the error": Pairs([row[name] for row in rows], nothing, seeds[: len(rows)])
        for name in ("r_e", "K")
    }


claim = Claim(
    id="lla",
    statement="Both criteria of the Hessian's spectrum are larger on data where the model is less accurate.",
    source="abstract; tables of pretrained models on other data sets",
    paper_scale="ImageNet models and others, tested on data sets they were not trained on",
    our_scale="MLP on 8 x 8 digits, its test set under 8 shifts (noise, rotation, shuffled labels), 6 trained models; "
    "agreement would be a rank correlation of 0.7 with the error",
    quantities=tuple(
        Quantity(f"rank correlation of {name} with the error", better="higher", size=0.7, scale="difference")
        for name in ("r_e", "K")
    ),
    experiment=experiment,
)

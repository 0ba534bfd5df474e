"""Hessian alignment: whether a classifier stops using the bit that is right in the domains of training only."""

import torch
import torch.nn.functional as F
from torch import nn

import steep
from steep.evidence.claims import Claim, Pairs, Quantity
from steep.losses.hessian_alignment import HessianAlignment

SEEDS, STEPS, ANNEAL, L2 = list(range(8)), 1500, 100, 1e-3
RECIPE = steep.task("two-bit")
OURS = {"HGP": "hgp", "Hutchinson": "hutchinson", "exact diagonal": "exact"}
WEIGHTS = {"ERM": 0.0, "IRM": 1e3, "V-REx": 1e3, "gradients only": 1e3} | dict.fromkeys(OURS, 1e3)


def cross_entropy(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


def irm(logits, labels):
    """Squared slope of each domain's loss in a factor of the logits (IRMv1), averaged."""
    scale = torch.ones((), requires_grad=True)
    slopes = [
        torch.autograd.grad(F.cross_entropy(z * scale, y), scale, create_graph=True)[0]
        for z, y in zip(logits, labels, strict=True)
    ]
    return torch.stack(slopes).square().mean()


def penalty_of(arm, model, seed):
    """``penalty(logits, labels, losses)`` of lists with an entry for each domain."""
    if arm == "ERM":
        return lambda logits, labels, losses: 0.0
    if arm == "IRM":
        return lambda logits, labels, losses: irm(logits, labels)
    if arm == "V-REx":
        return lambda logits, labels, losses: torch.stack(losses).var(correction=0)
    kind, alpha = OURS.get(arm, "hgp"), float(arm in OURS)
    generator = torch.Generator().manual_seed(seed)
    align = HessianAlignment(
        model.layers[-1], cross_entropy, generator, kind=kind, alpha=alpha, beta=1.0, probes=100, detach=False
    )
    return lambda logits, labels, losses: align.penalty(losses)


def accuracy(model, loader):
    x, y, _ = next(iter(loader))
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def train(arm, seed, steps):
    """Accuracies in the domains of training and in the test's; all domains are seen whole in every step."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, data = RECIPE.model(), RECIPE.data(torch.Generator().manual_seed(seed))
    x, y, _ = data.train.dataset[:]
    members = [data.domains == domain for domain in (0, 1)]
    labels, penalty = [y[m] for m in members], penalty_of(arm, model, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
    for step in range(steps):
        weight = WEIGHTS[arm] if step >= ANNEAL else min(1.0, WEIGHTS[arm])
        output = model(x)
        logits = [output[m] for m in members]
        losses = [F.cross_entropy(z, t) for z, t in zip(logits, labels, strict=True)]
        squares = sum(p.square().sum() for p in model.parameters())
        total = torch.stack(losses).mean() + L2 * squares + weight * penalty(logits, labels, losses)
        optimizer.zero_grad()
        (total / max(1.0, weight)).backward()
        optimizer.step()
    return accuracy(model, data.train), accuracy(model, data.test)


def measure(seed, steps):
    found = {arm: train(arm, seed, steps) for arm in WEIGHTS}
    return {f"{arm} {name}": value for arm, pair in found.items() for name, value in zip(("train", "test"), pair)}


def experiment(lab):
    rows = lab.each(SEEDS, lambda seed: measure(seed, 150 if lab.smoke else STEPS))
    lab.notes["mean accuracy"] = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}

    def against(ours, rival):
        return Pairs([row[f"{ours} test"] for row in rows], [row[f"{rival} test"] for row in rows], SEEDS[: len(rows)])

    return {f"test accuracy, {ours} over {rival}": against(ours, rival) for ours, rival, _ in QUANTITIES}


QUANTITIES = (("HGP", "ERM", 0.54), ("Hutchinson", "ERM", 0.54), ("exact diagonal", "ERM", 0.54))

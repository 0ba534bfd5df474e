"""Hessian alignment: whether a classifier stops using the bit that is right in the domains of training only."""

import torch
import torch.nn.functional as F

import steep
from steep.evidence.claims import Claim, Quantity, columns
from steep.losses.hessian_alignment import HessianAlignment, by_domain
from steep.tasks.networks import MLP

SEEDS, STEPS, ANNEAL, L2 = list(range(8)), 1500, 100, 1e-3
KINDS = {"HGP": "hgp", "Hutchinson": "hutchinson", "exact diagonal": "exact"}
WEIGHTS = {"ERM": 0.0, "IRM": 1e3, "V-REx": 1e3, "gradients alone": 1e3, **dict.fromkeys(KINDS, 1e3)}


def loss_of(output, target):
    return F.binary_cross_entropy_with_logits(output.squeeze(1), target.float(), reduction="none")


def irm(output, target, domains):
    """Squared slope of each domain's loss in a factor of the outputs (IRMv1), averaged."""
    scale = torch.ones((), requires_grad=True)
    each = by_domain(loss_of(output * scale, target), domains)
    return torch.stack([torch.autograd.grad(loss, scale, create_graph=True)[0] for loss in each]).square().mean()


def penalty_of(arm, model, seed):
    """``penalty(output, target, domains)`` of an arm, all on the mean losses of the domains."""
    if arm == "ERM":
        return lambda output, target, domains: 0.0
    if arm == "IRM":
        return irm
    if arm == "V-REx":
        return lambda output, *rest: torch.stack(by_domain(loss_of(output, rest[0]), rest[1])).var(correction=0)
    align = HessianAlignment(
        model.layers[-1],
        loss_of,
        torch.Generator().manual_seed(seed),
        kind=KINDS.get(arm, "hgp"),
        alpha=float(arm in KINDS),
        beta=1.0,
        probes=100,
        detach=False,
    )
    return lambda output, target, domains: align.penalty(by_domain(loss_of(output, target), domains))


def accuracy(model, loader):
    x, y, _ = loader.dataset[:]
    with torch.no_grad():
        return float(((model(x).squeeze(1) > 0) == (y > 0)).double().mean())


def train(arm, seed, steps):
    """Accuracies in the domains of training and in that of the test; every step sees all examples."""
    data = steep.task("two-bit").data(torch.Generator().manual_seed(seed))
    x, y, _ = data.train.dataset[:]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MLP(2, 32, 32, 1)
    penalty, optimizer = penalty_of(arm, model, seed), torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
    for step in range(steps):
        weight = WEIGHTS[arm] if step >= ANNEAL else 1.0
        output = model(x)
        total = loss_of(output, y).mean() + L2 * sum(p.square().sum() for p in model.parameters())
        total = total + weight * penalty(output, y, data.domains)
        optimizer.zero_grad()
        (total / max(1.0, weight)).backward()
        optimizer.step()
    return accuracy(model, data.train), accuracy(model, data.test)


def measure(seed, steps):
    found = {arm: train(arm, seed, steps) for arm in WEIGHTS}
    return {arm: test for arm, (_, test) in found.items()} | {f"{arm}, train": t for arm, (t, _) in found.items()}


def experiment(lab):
    rows = lab.each(SEEDS, lambda seed: measure(seed, 150 if lab.smoke else STEPS))
    lab.notes["mean accuracy"] = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    pairs = {f"test accuracy, {kind} against ERM": columns(rows, SEEDS, kind, "ERM") for kind in KINDS}
    return pairs | {"test accuracy, HGP against IRM": columns(rows, SEEDS, "HGP", "IRM")}


claim = Claim(
    id="hessian-alignment",
    statement="Under a severe correlation shift, aligning the head's gradients and Hessians across domains finds the "
    "invariant classifier, which the plain mean of the losses does not, and is no worse than IRM.",
    source="abstract; experiments on ColoredMNIST (severe correlation shift)",
    paper_scale="ColoredMNIST, 25 000 images in each of two domains, MLP 392-390-390-1, 501 steps, 10 restarts",
    our_scale="its two bits without the images (task two-bit: domains of e = 0.2 and 0.1, tested at 0.9, no sampling "
    "noise), MLP 2-32-32-1, Adam at 3e-3, 1500 full-batch steps, weight 1 for 100 of them, then 1000: of 100, 1000 and "
    "10000 the smallest that works for HGP and Hutchinson on two other seeds (IRM and V-REx work at 100 too), 8 paired "
    "seeds; right in 75 % of the test is who uses the invariant bit, in 10 % who uses the other; 54 points must be "
    "exceeded. Aligning gradients alone is measured beside it",
    quantities=(
        *(
            Quantity(f"test accuracy, {kind} against ERM", better="higher", scale="difference", null=0.54)
            for kind in KINDS
        ),
        Quantity("test accuracy, HGP against IRM", better="higher", scale="difference", null=-0.01),
    ),
    experiment=experiment,
)

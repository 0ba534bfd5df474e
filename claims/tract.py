"""TrAct: epochs until digits are learned, as they are and at uneven contrast, each arm at its best learning rate."""

import math
import statistics
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from steep.backward.tract import TrAct
from steep.evidence.claims import Claim, Quantity, columns

EPOCHS, LIMIT, BATCH, EVERY, TARGET = 30, 15, 64, 4, 0.05  # of the schedule, and at most trained
OPTIMIZERS = {
    "SGD": (partial(torch.optim.SGD, momentum=0.9), (0.02, 0.05, 0.07, 0.1, 0.14, 0.2, 0.4)),
    "Adam": (torch.optim.Adam, (0.002, 0.005, 0.007, 0.01, 0.014, 0.02, 0.04)),
}
IMAGES = {"plain": "digits", "uneven": "digits of uneven contrast"}
ARMS = ("TrAct", "ordinary")


def digits(seed, images):
    """1437 of the digits, standardised over all; "uneven": each image times a factor of its own in [0.3, 1.5]."""
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    g = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(x), generator=g)[:1437]
    x = ((x - x.mean()) / x.std()).float()[chosen]
    contrast = torch.empty(len(x), 1).uniform_(0.3, 1.5, generator=g)
    return x * contrast if images == "uneven" else x, y[chosen]


def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def epochs_to_target(seed, arm, optimizer, images, lr, epochs):
    """Epochs until the loss over all training images is `TARGET`, to `EVERY` batches; `None` if not in `epochs`."""
    x, y = digits(seed, images)
    model = network(seed)
    if arm == "TrAct":
        TrAct(model)
    descent = OPTIMIZERS[optimizer][0](model.parameters(), lr=lr)
    g = torch.Generator().manual_seed(seed)
    batches = [chosen for _ in range(EPOCHS) for chosen in torch.randperm(len(x), generator=g).split(BATCH)]
    per_epoch = len(batches) // EPOCHS
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(descent, len(batches))
    for step, chosen in enumerate(batches[: epochs * per_epoch], 1):
        descent.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        descent.step()
        schedule.step()
        if step % EVERY == 0:
            with torch.no_grad():
                if F.cross_entropy(model(x), y) <= TARGET:
                    return step / per_epoch
    return None


def all_rates(seed, epochs):
    """Epochs to the target at every learning rate."""
    return {
        f"{arm} {optimizer} {images} {lr}": epochs_to_target(seed, arm, optimizer, images, lr, epochs)
        for arm in ARMS
        for optimizer, (_, rates) in OPTIMIZERS.items()
        for images in IMAGES
        for lr in rates
    }


def best_rate(rows, arm, optimizer, images):
    """The one that reached the target soonest on average over the tuning seeds (their logarithms)."""

    def average(lr):
        found = [row[f"{arm} {optimizer} {images} {lr}"] for row in rows]
        return statistics.mean(math.log(2 * EPOCHS if value is None else value) for value in found)

    return min(OPTIMIZERS[optimizer][1], key=average)


def experiment(lab):
    epochs = 1 if lab.smoke else LIMIT
    tuned = lab.each([1000, 1001, 1002, 1003], lambda seed: all_rates(seed, epochs), "tuning")
    cases = [(optimizer, images) for optimizer in OPTIMIZERS for images in IMAGES]
    best = {(arm, *case): best_rate(tuned, arm, *case) for arm in ARMS for case in cases}
    lab.notes["learning rates"] = {" ".join(key): lr for key, lr in best.items()}

    def measure(seed):
        return {" ".join(key): epochs_to_target(seed, *key, lr, epochs) for key, lr in best.items()}

    seeds = list(range(12))
    rows = lab.each(seeds, measure, "measured")
    return {
        f"epochs to a training loss of {TARGET}, {optimizer}, {IMAGES[images]}": columns(
            rows, seeds, f"TrAct {optimizer} {images}", f"ordinary {optimizer} {images}"
        )
        for optimizer, images in cases
    }


claim = Claim(
    id="tract",
    statement="It takes 1.25 to 4 times fewer epochs to train as far, with several optimizers and the learning rates "
    "left as they were, because faint images influence the first layer as much as strong ones.",
    source="abstract; figures and tables of CIFAR and ImageNet",
    paper_scale="ResNet-18 and ViT on CIFAR-10, 100 to 800 epochs; AlexNet, ResNet, VGG and DeiT on ImageNet",
    our_scale="8 x 8 digits, MLP 64-64-64-10, batches of 64, cosine schedule over 30 epochs, 12 paired seeds, each "
    "arm at that of 7 learning rates which is best for it on 4 other seeds; the training loss, not accuracy",
    quantities=tuple(
        Quantity(
            f"epochs to a training loss of {TARGET}, {optimizer}, {name}",
            better="lower",
            size=1.25,
        )
        for optimizer in OPTIMIZERS
        for name in IMAGES.values()
    ),
    experiment=experiment,
)

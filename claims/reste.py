"""ReSTE: the equilibrium of estimating error and gradient stability along o_end, and accuracy against STE (o_end 1)."""

import math
from functools import partial
from itertools import pairwise

import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW

import steep
from steep.evidence.claims import Claim, Quantity, columns
from steep.models.reste import apply_reste


class Block(nn.Module):
    """x + norm(relu(layer(x))), the order of the paper's residual networks."""

    def __init__(self, layer, norm):
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x):
        return x + self.norm(F.relu(self.layer(x)))


def mlp():
    stem = nn.Linear(64, 128), nn.ReLU(), nn.BatchNorm1d(128)
    blocks = (Block(nn.Linear(128, 128, bias=False), nn.BatchNorm1d(128)) for _ in range(3))
    return nn.Sequential(*stem, *blocks, nn.Linear(128, 10))


def cnn():
    stem = nn.Conv1d(1, 32, 5, stride=2, padding=2), nn.ReLU(), nn.BatchNorm1d(32)
    blocks = (Block(nn.Conv1d(32, 32, 3, padding=1, bias=False), nn.BatchNorm1d(32)) for _ in range(4))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.BatchNorm1d(32), nn.Linear(32, 10))


TASKS = {  # o_end = 1 is STE; learning rates are its best of 0.001, 0.002, 0.005, ... 0.04, on seeds from 100 on
    "digits": ("digits", 20, mlp, 0.01, (1, 2, 3, 5, 8)),
    "MNIST-1D": ("mnist1d", 8, cnn, 0.02, (1, 3, 8)),
}


class Indicators:
    """Notes the logarithms of both indicators after each backward, at the o that it had."""

    def __init__(self, handle):
        self.handle, self.seen = handle, []

    def step(self):
        self.seen.append([math.log(self.handle.estimating_error()), math.log(self.handle.gradient_instability())])


def train(recipe, network, o_end, seed):
    """Test accuracy, and the geometric means of both indicators over the steps."""
    noted = []

    def build(run):
        model = network()
        handle = apply_reste(model, total_steps=run.total_steps, bits="1W1A", o_end=o_end)
        noted.append(run.attach(Indicators(handle)))  # before the handle, which moves o
        run.attach(handle)
        return model

    result = steep.fit(recipe.replace(model=steep.deferred(build)), seed=seed, evaluate_every=10**9, progress=False)
    error, variance = (math.exp(sum(logs) / len(logs)) for logs in zip(*noted[-1].seen, strict=True))
    return result.test["accuracy"], error, variance


def swept(recipe, network, sweep, seed):
    """Smallest factor from one o_end to the next by which the error falls and the variance rises; accuracies."""
    runs = [train(recipe, network, o_end, seed) for o_end in sweep]
    return {
        "error falls": min(before[1] / after[1] for before, after in pairwise(runs)),
        "variance rises": min(after[2] / before[2] for before, after in pairwise(runs)),
        "stays": 1.0,
        **{f"accuracy at {o_end}": accuracy for o_end, (accuracy, *_) in zip(sweep, runs, strict=True)},
    }


def experiment(lab):
    seeds, found = list(range(8, 16)), {}
    for name, (task, epochs, network, lr, sweep) in TASKS.items():
        recipe = lab.shorter(steep.task(task, epochs=epochs).replace(optimizer=partial(AdamW, lr=lr, fused=True)))
        rows = lab.each(seeds, partial(swept, recipe, network, sweep), name)
        found |= {
            f"{name}: estimating error, from one o_end to the next": columns(rows, seeds, "error falls", "stays"),
            f"{name}: variance of gradients, from one o_end to the next": columns(
                rows, seeds, "variance rises", "stays"
            ),
            f"{name}: test accuracy, o_end = 3 against STE": columns(rows, seeds, "accuracy at 3", "accuracy at 1"),
            f"{name}: test accuracy, o_end = 3 against 8": columns(rows, seeds, "accuracy at 3", "accuracy at 8"),
        }
    return found


FACTOR, GAIN = {"better": "higher"}, {"better": "higher", "scale": "difference"}

claim = Claim(
    id="reste",
    statement="A larger o_end lowers the estimating error and raises the variance of gradients; between STE (o_end 1) "
    "and too sharp an estimator there is an equilibrium, near o_end = 3, of best accuracy.",
    source="sections on the equilibrium and on ReSTE, with their figures; ablation of o_end on CIFAR-10",
    paper_scale="ResNet-20, ResNet-18 and VGG-small on CIFAR-10, ResNet-18 on ImageNet; 1W1A (86.75 % with ResNet-20), "
    "1W32A",
    our_scale="1W1A; o_end 1, 2, 3, 5, 8 on digits (three residual binary layers of width 128, 20 epochs) and 1, 3, 8 "
    "on MNIST-1D (four residual binary convolutions of width 32, 8 epochs), AdamW at the learning rate that is best "
    "for STE on other seeds, 8 paired seeds; indicators are geometric means over the steps, at the present o, and the "
    "smallest change from one o_end to the next counts; the best accuracy is looked for at 3 alone, as published",
    quantities=tuple(
        quantity
        for task in ("digits", "MNIST-1D")
        for quantity in (
            Quantity(f"{task}: estimating error, from one o_end to the next", **FACTOR),
            Quantity(f"{task}: variance of gradients, from one o_end to the next", **FACTOR),
            Quantity(f"{task}: test accuracy, o_end = 3 against STE", **GAIN),
            Quantity(f"{task}: test accuracy, o_end = 3 against 8", **GAIN),
        )
    ),
    experiment=experiment,
)

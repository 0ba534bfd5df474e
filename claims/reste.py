"""ReSTE: the equilibrium of estimating error and gradient stability along o_end, and accuracy against STE (o_end = 1)."""

from itertools import pairwise

import torch.nn.functional as F
from torch import nn

import steep
from steep.evidence.claims import Claim, Quantity, columns
from steep.models.reste import apply_reste

SWEEP = (1.0, 2.0, 3.0, 5.0, 8.0)  # 1 is STE, 3 what the paper settles on


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


class Indicators:
    """Notes the two indicators after each epoch's last backward, at the o that it had."""

    def __init__(self, handle, every):
        self.handle, self.every, self.errors, self.variances = handle, every, [], []

    def step(self):
        if (self.handle.steps + 1) % self.every == 0:
            self.errors.append(self.handle.estimating_error())
            self.variances.append(self.handle.gradient_instability())


def train(recipe, network, o_end, seed):
    """Test accuracy, and the means of both indicators over the epochs."""
    seen = []

    def build(run):
        model = network()
        handle = apply_reste(model, total_steps=run.total_steps, bits="1W1A", o_end=o_end)
        seen.append(run.attach(Indicators(handle, min(run.steps_per_epoch, run.total_steps))))
        run.attach(handle)
        return model

    result = steep.fit(recipe.replace(model=steep.late(build)), seed=seed, evaluate_every=10**9, progress=False)
    errors, variances = seen[-1].errors, seen[-1].variances
    return result.test["accuracy"], sum(errors) / len(errors), sum(variances) / len(variances)


def sweep(recipe, network, seed):
    """Smallest factor from one o_end to the next by which the error falls and the variance rises; accuracies."""
    runs = [train(recipe, network, o_end, seed) for o_end in SWEEP]
    return {
        "error falls": min(before[1] / after[1] for before, after in pairwise(runs)),
        "variance rises": min(after[2] / before[2] for before, after in pairwise(runs)),
        "stays": 1.0,
        **{f"accuracy at {o_end:g}": accuracy for o_end, (accuracy, *_) in zip(SWEEP, runs, strict=True)},
    }


def experiment(lab):
    seeds, found = list(range(8)), {}
    tasks = {
        "digits": (steep.task("digits").replace(**adamw(DIGITS_LR)), mlp),
        "MNIST-1D": (steep.task("mnist1d").replace(**adamw(MNIST1D_LR)), cnn),
    }
    for name, (recipe, network) in tasks.items():
        rows = lab.each(seeds, lambda seed, r=recipe, n=network: sweep(lab.shorter(r), n, seed), name)
        found |= {
            f"{name}: estimating error, from one o_end to the next": columns(rows, seeds, "error falls", "stays"),
            f"{name}: variance of gradients, from one o_end to the next": columns(
                rows, seeds, "variance rises", "stays"
            ),
            f"{name}: test accuracy, o_end = 3 against STE": columns(rows, seeds, "accuracy at 3", "accuracy at 1"),
            f"{name}: test accuracy, o_end = 3 against 8": columns(rows, seeds, "accuracy at 3", "accuracy at 8"),
        }
    return found

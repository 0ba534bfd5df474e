"""What `fit` costs over the same loop written by hand, at a step of about 2 ms. Goal: a ratio of at most 1.05.

Both loops take turns, one epoch each, in one process and one thread; CPU seconds of training alone (the hand-written
loop evaluates nothing, `fit` only after its last step). On a shared machine that ratio wanders by some hundredths
from run to run; the cost itself, in microseconds a step, shows on a model too small to hide it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

import steep
from steep.evidence.runs.jobs import hardware, versions

STEPS, BATCH = 100, 64


USUAL, TINY = (784, 256, 256, 128), (4, 4, 4, 4)


def network(widths: Sequence[int]) -> nn.Module:
    hidden = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(widths[-1], 10))


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, target, reduction="none")


def data(generator: torch.Generator, features: int) -> steep.Data:
    x, y = torch.randn(STEPS * BATCH, features, generator=generator), torch.arange(STEPS * BATCH) % 10
    return steep.Data(steep.tensor_loader(x, y, BATCH, shuffle=True), steep.tensor_loader(x[:64], y[:64], 64))


def optimizer(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def by_hand(widths: Sequence[int]) -> float:
    """CPU seconds of the loop a user would write, which also keeps every step's loss."""
    net, loader, history = network(widths), data(torch.Generator().manual_seed(0), widths[0]).train, []
    opt = optimizer(net.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
    started = time.process_time()
    for x, y, _ in loader:
        opt.zero_grad()
        mean = loss(net(x), y).mean()
        mean.backward()
        opt.step()
        schedule.step()
        history.append(mean.item())
    return time.process_time() - started


def by_fit(widths: Sequence[int]) -> float:
    recipe = steep.Recipe(
        data=partial(data, features=widths[0]),
        model=partial(network, widths),
        loss=loss,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR,
        budget=steep.Budget(epochs=1),
    )
    return steep.fit(recipe, device="cpu", progress=False, evaluate_every=STEPS).cpu_seconds


def take_turns(widths: Sequence[int], rounds: int) -> list[tuple[float, float]]:
    """CPU seconds of both loops, by hand and by `fit`."""
    by_hand(widths), by_fit(widths)
    turns = [(by_hand, by_fit) if k % 2 else (by_fit, by_hand) for k in range(rounds)]
    times = [{loop: loop(widths) for loop in turn} for turn in turns]
    return [(turn[by_hand], turn[by_fit]) for turn in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pairs, tiny = (take_turns(widths, arguments.rounds) for widths in (USUAL, TINY))
    cost = (min(b for _, b in tiny) - min(a for a, _ in tiny)) / STEPS  # noise only ever adds
    result = {
        "ratio": median(b / a for a, b in pairs),
        "cost of a step, us": 1e6 * cost,
        "ratio at a step of 2 ms": 1 + cost / 2e-3,
        "ratio of the fastest": min(b for _, b in pairs) / min(a for a, _ in pairs),
        "step by hand, ms": 1e3 * median(a for a, _ in pairs) / STEPS,
        "rounds": arguments.rounds,
        "versions": versions(),
        "hardware": hardware(),
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

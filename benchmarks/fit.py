"""What `fit` costs over the same loop written by hand, at a step of about 2 ms. Goal: a ratio of at most 1.03.

Both loops take turns, one epoch each, in one process and one thread; CPU seconds of training alone (the hand-written
loop evaluates nothing, `fit` leaves evaluation out of its clock).
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

import steep
from steep.evidence.jobs import hardware, versions

STEPS, BATCH = 100, 64


def model() -> nn.Module:
    widths = (784, 256, 256, 128)
    hidden = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(128, 10))


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, target, reduction="none")


def data(generator: torch.Generator) -> steep.Data:
    x, y = torch.randn(STEPS * BATCH, 784, generator=generator), torch.arange(STEPS * BATCH) % 10
    return steep.Data(steep.tensor_loader(x, y, BATCH, shuffle=True), steep.tensor_loader(x[:64], y[:64], 64))


def optimizer(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def by_hand() -> float:
    """CPU seconds of the loop a user would write, which also keeps every step's loss."""
    net, loader, history = model(), data(torch.Generator().manual_seed(0)).train, []
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


def by_fit() -> float:
    recipe = steep.Recipe(
        data=data,
        model=model,
        loss=loss,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR,
        budget=steep.Budget(epochs=1),
    )
    return steep.fit(recipe, device="cpu", progress=False).cpu_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    by_hand(), by_fit()
    pairs = [(by_hand(), by_fit()) if k % 2 else (by_fit(), by_hand())[::-1] for k in range(arguments.rounds)]
    result = {
        "ratio": median(b / a for a, b in pairs),
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

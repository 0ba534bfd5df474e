"""Step times of M-FAC over `torch.optim.AdamW(fused=True)`, on CPU, and how they grow with the window.

Parameters: 12 matrices of 768 x 768 (7.1M numbers). Windows of 4 to 32 gradients, all full before time is taken. All
optimizers take turns, one step each, in one process and one thread; CPU seconds, median over the rounds. A step reads
the window twice, so that growth is linear in m; the slope is a least-squares fit of time against m, and "per gradient
read" is the slope over the time of copying one gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from steep.evidence.runs.jobs import hardware, versions
from steep.optim.m_fac import MFAC

SHAPES = [(768, 768)] * 12
WINDOWS = (4, 8, 16, 32)


class Timed:
    """One optimizer with parameters of its own; all share two sets of gradients, used in turn."""

    def __init__(self, make: Callable[[list[nn.Parameter]], Optimizer], grads: list[list[torch.Tensor]]):
        g = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(0.05 * torch.randn(shape, generator=g)) for shape in SHAPES]
        self.grads, self.optimizer = grads, make(self.params)
        self.times: list[float] = []

    def turn(self, t: int) -> None:
        for p, g in zip(self.params, self.grads[t % 2], strict=True):
            p.grad = g
        started = time.process_time()
        self.optimizer.step()
        self.times.append(time.process_time() - started)


def copying(grads: list[torch.Tensor], rounds: int) -> float:
    targets, times = [torch.empty_like(g) for g in grads], []
    for _ in range(rounds):
        started = time.process_time()
        for target, g in zip(targets, grads, strict=True):
            target.copy_(g)
        times.append(time.process_time() - started)
    return median(times)


def measure(rounds: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    grads = [[0.01 * torch.randn(shape, generator=g) for shape in SHAPES] for _ in range(2)]
    fused = Timed(lambda p: AdamW(p, fused=True), grads)
    ours = {m: Timed(lambda p, m=m: MFAC(p, ngrads=m), grads) for m in WINDOWS}  # type: ignore[misc]
    for m, one in ours.items():
        for t in range(m):
            one.turn(t)
        one.times.clear()
    for t in range(rounds):
        for one in (fused, *ours.values()):
            one.turn(t)
    reference, times = median(fused.times), {m: median(one.times) for m, one in ours.items()}
    slope, start = np.polyfit(WINDOWS, [times[m] for m in WINDOWS], 1)
    return {
        "AdamW fused step, ms": 1e3 * reference,
        "ratio by window": {str(m): round(value / reference, 2) for m, value in times.items()},
        "ms per gradient of the window": 1e3 * slope,
        "ms without window": 1e3 * start,
        "time of 32 over 8": round(times[32] / times[8], 2),
        "per gradient read": round(slope / copying(grads[0], rounds), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(arguments.rounds)
    result |= {"rounds": arguments.rounds, "load": os.getloadavg(), "versions": versions(), "hardware": hardware()}
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

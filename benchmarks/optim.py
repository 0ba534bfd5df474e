"""Step times of steep's optimizers and their published peers over `torch.optim.AdamW(fused=True)`, on CPU.

Two sets of parameters: 12 matrices of 768 x 768 (7.1M numbers), and the 200 tensors of a residual network of 66
convolutions, each with a normalization layer (0.9M numbers), two of a kind of most shapes. As a third, 200 matrices no
two of which have one shape (0.9M numbers), the worst case for rules that look at rows. All optimizers take turns, one
step each, in one process and one thread; CPU seconds, median over the rounds. Gradients change from step to step.

Goals: AdaBelief and diffGrad 1.2 compiled and 4 eager, AdamP 2 and 6.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from steep.evidence.runs.jobs import hardware, versions
from steep.optim.adabelief import AdaBelief
from steep.optim.adamp import SGDP, AdamP
from steep.optim.diffgrad import DiffGrad

Shapes = list[tuple[int, ...]]


def residual_network() -> Shapes:
    stages = ((16, 26), (32, 22), (64, 18))
    layers = [[(width, width, 3, 3), (width,), (width,)] for width, depth in stages for _ in range(depth)]
    return [shape for layer in layers for shape in layer] + [(10, 64), (10,)]


SETS: dict[str, Shapes] = {
    "12 matrices": [(768, 768)] * 12,
    "200 tensors": residual_network(),
    "200 shapes": [(20 + i // 2, 70 + i % 7 - i // 20) for i in range(200)],
}

OURS: dict[str, Callable[..., Optimizer]] = {"AdaBelief": AdaBelief, "DiffGrad": DiffGrad, "AdamP": AdamP, "SGDP": SGDP}
WAYS: dict[str, dict[str, Any]] = {"compiled": {"compile": True}, "eager": {}, "loop": {"foreach": False}}


def optimizers() -> dict[str, Callable[..., Optimizer]]:
    """By name, in the order of their turns; weight decay is on wherever AdamW has it."""
    ours = {
        f"{name}, {way}": lambda p, make=make, options=options: make(p, **options)
        for name, make in OURS.items()
        for way, options in WAYS.items()
    }
    references = {
        "AdamW, foreach": lambda p: AdamW(p, foreach=True),
        "SGD momentum, fused": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    }
    return {"AdamW, fused": lambda p: AdamW(p, fused=True), **ours, **peers(), **references}


def peers() -> dict[str, Callable[..., Optimizer]]:
    """The authors' packages, where they are installed."""
    found: dict[str, Callable[..., Optimizer]] = {}
    with contextlib.suppress(ImportError):
        import adabelief_pytorch

        found["AdaBelief, adabelief-pytorch"] = lambda p: quietly(
            adabelief_pytorch.AdaBelief, p, weight_decay=1e-2, rectify=False
        )
    with contextlib.suppress(ImportError):
        import adamp

        found["AdamP, adamp"] = lambda p: adamp.AdamP(p, weight_decay=1e-2)
        found["SGDP, adamp"] = lambda p: adamp.SGDP(p, lr=0.1, momentum=0.9, weight_decay=1e-5, nesterov=True)
    return found


def quietly(make: Callable[..., Optimizer], *args: Any, **options: Any) -> Optimizer:
    with contextlib.redirect_stdout(io.StringIO()):
        return make(*args, **options)


class Timed:
    """One optimizer with parameters of its own and two sets of gradients, used in turn."""

    def __init__(self, make: Callable[..., Optimizer], shapes: Shapes):
        g = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(0.05 * torch.randn(shape, generator=g)) for shape in shapes]
        self.grads = [[0.01 * torch.randn(shape, generator=g) for shape in shapes] for _ in range(2)]
        self.optimizer = make(self.params)
        self.times: list[float] = []
        started = time.perf_counter()
        self.turn(0)
        self.first = time.perf_counter() - started

    def turn(self, t: int) -> None:
        for p, g in zip(self.params, self.grads[t % 2], strict=True):
            p.grad = g
        started = time.process_time()
        self.optimizer.step()
        self.times.append(time.process_time() - started)


def measure(shapes: Shapes, rounds: int) -> dict[str, Any]:
    timed = {name: Timed(make, shapes) for name, make in optimizers().items()}
    for t in range(1, rounds + 2):
        for one in timed.values():
            one.turn(t)
    medians = {name: median(one.times[2:]) for name, one in timed.items()}
    fastest = {name: min(one.times[2:]) for name, one in timed.items()}
    reference = "AdamW, fused"
    return {
        "AdamW fused step, ms": 1e3 * medians[reference],
        "ratio": {name: round(value / medians[reference], 2) for name, value in medians.items()},
        "ratio of the fastest": {name: round(value / fastest[reference], 2) for name, value in fastest.items()},
        "first step with compilation, s": {n: round(c.first, 1) for n, c in timed.items() if "compiled" in n},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {name: measure(SETS[name], arguments.rounds) for name in arguments.sets}
    result |= {"rounds": arguments.rounds, "load": os.getloadavg(), "versions": versions(), "hardware": hardware()}
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

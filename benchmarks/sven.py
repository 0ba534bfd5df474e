"""What a step of Sven costs over a plain step (forward, backward, SGD), and how exact it is.

The arms take turns, one step each, in one process and one thread; CPU seconds. Goals: whole step <= 3.0 on
the MLP, <= 2.5 on the CNN, peak memory <= 1.3. Reported besides: the Gram matrix alone, a small transformer, the route
of the paper's first code (the whole Jacobian by `torch.func.jacrev`, then its SVD), the first step, which compares
itself with an ordinary backward and holds more memory for it, and how a step of the MLP grows over a decade of examples
and over a decade of parameters (slope in logarithms; goals: 2.1 and 1.05).

    python benchmarks/sven.py --out sven.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from steep.backward.sven import Sven
from steep.evidence.runs.jobs import hardware, versions
from steep.tasks.networks import MLP, SmallCNN, Transformer

RTOL = 1e-3


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    return MLP(784, 256, 256, 10), torch.randn(128, 784), torch.randint(10, (128,))


def cnn() -> tuple[nn.Module, Tensor, Tensor]:
    return SmallCNN(3, 10, (32, 64, 128), groups=8), torch.randn(64, 3, 32, 32), torch.randint(10, (64,))


def transformer() -> tuple[nn.Module, Tensor, Tensor]:
    model = Transformer(96, 32, width=128, depth=2, tied=False)
    return model, torch.randint(96, (32, 32)), torch.randint(96, (32, 32))


class Case:
    """A model, a batch, and the arms that take a step on it."""

    def __init__(self, build: Callable[[], tuple[nn.Module, Tensor, Tensor]]):
        torch.manual_seed(0)
        self.model, self.x, self.y = build()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6)
        self.sven: Sven | None = None

    def losses(self, output: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, -2), self.y.flatten(), reduction="none").view(len(self.x), -1).mean(1)

    def plain(self) -> None:
        self.optimizer.zero_grad()
        self.losses(self.model(self.x)).mean().backward()
        self.optimizer.step()

    def gram(self) -> None:
        assert self.sven is not None
        self.optimizer.zero_grad()
        self.sven.engine.rows(self.losses(self.model(self.x))).gram()

    def step(self) -> None:
        assert self.sven is not None
        self.optimizer.zero_grad()
        self.sven(self.losses(self.model(self.x)))
        self.optimizer.step()

    def watch(self) -> None:
        self.sven = Sven(self.model, rtol=RTOL)

    def jacobian(self) -> Tensor:
        params = {name: p.detach() for name, p in self.model.named_parameters()}
        call = torch.func.functional_call
        found = torch.func.jacrev(lambda p: self.losses(call(self.model, p, self.x)), chunk_size=16)(params)
        return torch.cat([j.flatten(1) for j in found.values()], 1)

    def update_by_svd(self) -> Tensor:
        u, s, vh = torch.linalg.svd(self.jacobian(), full_matrices=False)
        kept = s > RTOL * s[0]
        residuals = self.losses(self.model(self.x)).detach()
        return (vh.T * torch.where(kept, 1 / s, 0.0)) @ (u.T @ residuals)

    def error(self) -> float:
        """Relative distance of Sven's float32 update from the SVD of the Jacobian in float64."""
        assert self.sven is not None
        self.optimizer.zero_grad()
        self.sven(self.losses(self.model(self.x)))
        found = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]).double()
        floating = self.x.is_floating_point()
        self.model.double()
        self.x = self.x.double() if floating else self.x
        expected = self.update_by_svd()
        self.model.float()
        self.x = self.x.float() if floating else self.x
        return ((found - expected).norm() / expected.norm()).item()


def seconds(arm: Callable[[], Any]) -> float:
    started = time.process_time()
    arm()
    return time.process_time() - started


def peak(arm: Callable[[], Any]) -> int:
    """Bytes of the CPU allocator in use at most, over those at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        arm()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    used = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        used += event.nbytes()
        most = max(most, used)
    return most


def memory(case: Case, arm: Callable[[], Any]) -> int:
    """Peak of a step together with the parameters and the batch, which live throughout."""
    case.optimizer.zero_grad()
    held = sum(t.numel() * t.element_size() for t in (*case.model.parameters(), case.x, case.y))
    return held + peak(arm)


def measure(build: Callable[[], tuple[nn.Module, Tensor, Tensor]], repetitions: int) -> dict[str, Any]:
    case = Case(build)
    plain_memory = [memory(case, case.plain) for _ in range(3)][-1]
    case.watch()
    first_memory = memory(case, case.step)
    result: dict[str, Any] = {"examples": len(case.x), "parameters": sum(p.numel() for p in case.model.parameters())}
    arms = {"plain": case.plain, "gram": case.gram, "sven": case.step}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repetitions + 3):
        for name, arm in arms.items():
            taken = seconds(arm)
            if turn >= 3:
                times[name].append(taken)
    ms = {name: 1e3 * median(values) for name, values in times.items()}
    result["milliseconds"] = ms | {"eigh": 1e3 * median(_eigh_times(len(case.x)))}
    result["sven / plain"] = ms["sven"] / ms["plain"]
    result["gram / plain"] = ms["gram"] / ms["plain"]
    result["memory: sven / plain"] = memory(case, case.step) / plain_memory
    result["memory: first step / plain"] = first_memory / plain_memory
    result["memory: plain, MiB"] = plain_memory / 2**20
    assert case.sven is not None
    result["kept rank"] = case.sven.kept_rank
    return result


def _eigh_times(size: int) -> list[float]:
    j = torch.randn(size, 2 * size, dtype=torch.float64)
    gram = j @ j.T
    return [seconds(lambda: torch.linalg.eigh(gram)) for _ in range(20)]


def with_jacobian(build: Callable[[], tuple[nn.Module, Tensor, Tensor]], result: dict[str, Any]) -> None:
    """The route through the whole Jacobian: time of one update, and the error against it in float64."""
    case = Case(build)
    taken = seconds(case.update_by_svd)
    case.watch()
    result["jacobian and SVD / sven"] = 1e3 * taken / result["milliseconds"]["sven"]
    result["relative error of the update"] = case.error()


def growth(repetitions: int = 15) -> dict[str, Any]:
    """Milliseconds of a Sven step of the MLP, and the slope of their logarithms, by examples and by parameters."""
    by_examples = {b: mlp_step(256, b, repetitions) for b in (32, 57, 101, 180, 320)}
    by_parameters = dict(mlp_step(width, 64, repetitions) for width in (72, 120, 196, 310, 480))
    return {
        "examples": {b: ms for b, (_, ms) in by_examples.items()},
        "exponent of examples": slope({b: ms for b, (_, ms) in by_examples.items()}),
        "parameters": by_parameters,
        "exponent of parameters": slope(by_parameters),
    }


def mlp_step(width: int, batch: int, repetitions: int) -> tuple[int, float]:
    """Parameters, and median milliseconds of a Sven step."""
    case = Case(lambda: (MLP(784, width, width, 10), torch.randn(batch, 784), torch.randint(10, (batch,))))
    case.watch()
    times = [seconds(case.step) for _ in range(repetitions + 3)][3:]
    return sum(p.numel() for p in case.model.parameters()), 1e3 * median(times)


def slope(milliseconds: dict[int, float]) -> float:
    x, y = (torch.tensor(list(t), dtype=torch.float64).log() for t in (milliseconds.keys(), milliseconds.values()))
    return (torch.cov(torch.stack([x, y]))[0, 1] / x.var()).item()


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor, Tensor]], int]] = {
    "mlp": (mlp, 200),
    "cnn": (cnn, 15),
    "transformer": (transformer, 15),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--no-jacobian", action="store_true", help="leave out the slow route (a minute)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    for name in options.cases:
        build, repetitions = CASES[name]
        figures[name] = measure(build, repetitions)
        if not options.no_jacobian:
            with_jacobian(build, figures[name])
        print(name, json.dumps(figures[name], indent=2))
    figures["growth"] = growth()
    print("growth", json.dumps(figures["growth"], indent=2))
    if options.out:
        report = {"figures": figures, "hardware": hardware(), "versions": versions()}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

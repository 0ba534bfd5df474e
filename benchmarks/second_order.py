"""Levenberg-Marquardt with its defaults against tuned Adam and tuned L-BFGS on regressions, at three time budgets.

Every budget (a ninth, a third and all of `--steps` steps of Adam) is a comparison of its own by the usual protocol:
equal tuning, paired seeds, schedules stretched to the budget, verdicts at equal CPU time. Of Levenberg-Marquardt only
the learning rate is tuned. Reported as measured; `--store` keeps the runs.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sven_regression import LBFGS, row
from torch import nn

import steep
from steep.evidence.runs.jobs import hardware, versions

TASKS = (
    *("function-1d", "polynomial", "poisson", "digits-autoencoder"),
    *("uci:yacht", "uci:energy", "uci:concrete", "uci:airfoil", "uci:autompg"),
)
SHARES = {"T/9": 9, "T/3": 3, "T": 1}


def in_float64(recipe: steep.Recipe) -> steep.Recipe:
    """The same recipe in double precision."""

    def data(generator: torch.Generator) -> steep.Data:
        made = recipe.data(generator)
        for loader in filter(None, (made.train, made.val, made.test)):
            x, y, indices = loader.dataset.tensors
            loader.dataset.tensors = (x.double(), y.double(), indices)
        return made

    def model() -> nn.Module:
        assert not isinstance(recipe.model, steep.deferred)
        return recipe.model().double()

    return recipe.replace(data=data, model=model)


def measure(recipe: steep.Recipe, steps: int, store: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """By budget and arm: what was chosen, the test losses, and the verdicts."""
    found: dict[str, Any] = {}
    for name, share in SHARES.items():
        study = steep.compare(
            recipe.replace(budget=steep.Budget(steps=max(10, steps // share))),
            ["levenberg-marquardt", LBFGS],
            trials=arguments.trials,
            seeds=arguments.seeds,
            workers=arguments.workers,
            out=store / name.replace("/", "-"),
            progress=False,
        )
        found[name] = {arm.name: row(arm) for arm in study.arms}
        at_time = {n: r["equal time"]["verdict"] for n, r in found[name].items() if "equal time" in r}
        print(f"{recipe.name} {name}: {json.dumps(at_time)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--precision", choices=["float32", "float64"], default="float32")
    parser.add_argument("--store", type=Path, default=Path("out/second-order"))
    parser.add_argument("--out", type=Path, default=Path("out/second-order.json"))
    arguments = parser.parse_args()
    result: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    result |= {"steps of Adam at T": arguments.steps, "versions": versions(), "hardware": hardware()}
    for name in arguments.tasks:
        recipe = steep.task(name).replace(optimizer=partial(torch.optim.Adam, lr=1e-2))
        key = f"{name} {arguments.precision}"
        recipe = in_float64(recipe) if arguments.precision == "float64" else recipe
        result[key] = measure(recipe, arguments.steps, arguments.store / key.replace(":", "-"), arguments)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Sven against tuned Adam and tuned L-BFGS on its paper's regressions and on a photograph, with the usual protocol.

Equal tuning budgets, 8 paired seeds, equal steps and equal time; the report (loss against steps and seconds) is in the
store. The recipe is Adam with a cosine schedule. `--out` keeps the figures; `--store` the runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import steep
import steep.evidence.study
from steep.evidence.runs.jobs import hardware, versions

TASKS = {"function-1d": 5, "polynomial": 5, "photo": 10}  # epochs


def adam(parameters, lr=1e-2):
    return torch.optim.Adam(parameters, lr=lr)


def train_with_lbfgs(recipe, *, lr=0.1, max_iter=3, history_size=10, line_search=True):
    """L-BFGS on each mini-batch, with a strong Wolfe line search; constant learning rate."""

    def build(parameters):
        search = "strong_wolfe" if line_search else None
        return torch.optim.LBFGS(parameters, lr=lr, max_iter=max_iter, history_size=history_size, line_search_fn=search)

    return recipe.replace(optimizer=build, scheduler=None)


LBFGS = steep.Method(
    id="lbfgs",
    paper=steep.Paper("On the limited memory BFGS method for large scale optimization", year=1989),
    changes="optim",
    make=train_with_lbfgs,
    apply=train_with_lbfgs,
    search_space={
        "lr": steep.log_uniform(0.03, 1.0),
        "max_iter": steep.choice(1, 3, 5),
        "line_search": steep.choice(True, False),
    },
)


def row(arm: steep.evidence.study.ArmResult) -> dict:
    finals = [run.test.get("loss") for run in arm.runs]
    judged = {"equal steps": arm.scores, "equal time": arm.scores_at_equal_time}
    return {
        "chosen": dict(arm.hyper),
        "test losses": finals,
        "diverged": sum(run.outcome == "diverged" for run in arm.runs),
        "seconds": [run.cpu_seconds for run in arm.runs],
        **{
            when: {k: getattr(scores["loss"], k) for k in ("estimate", "low", "high", "p_holm", "won", "verdict")}
            for when, scores in judged.items()
            if scores
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--store", type=Path, default=Path("out/sven-regression"))
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = {"versions": versions(), "hardware": hardware(), "tasks": {}}
    for name in arguments.tasks:
        recipe = steep.task(name).replace(optimizer=adam, budget=steep.Budget(epochs=TASKS[name]))
        study = steep.compare(
            recipe, ["sven", LBFGS], trials=arguments.trials, seeds=arguments.seeds, out=arguments.store / name
        )
        result["tasks"][name] = {arm.name: row(arm) for arm in study.arms}
        print(name, json.dumps({k: v.get("equal steps") for k, v in result["tasks"][name].items()}, indent=1))
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""kill -9 at random moments over a running `steep compare`: nothing is lost, and nothing finished is made twice.

A tiny study with 2 workers is killed, half of the time as a whole (its process group) and half of the time one worker
alone, at moments drawn uniformly over three quarters of the length of an undisturbed run (so that most starts are
killed, the shortest before their workers are there), and started again with the same command. Each time it ends, its
table is compared with that of the undisturbed run, and a fresh store begins, until the kills are used up. Equal are:
the runs at equal steps and examples (every step's loss by its digest, scores, hyper-parameters), trials, chosen
hyper-parameters, and comparisons at equal steps. Runs at equal time are left apart: their number of steps comes from
measured seconds, which no two executions share.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from steep.evidence.runs.jobs import hardware, versions
from steep.evidence.runs.store import Store
from steep.evidence.study import ArmResult, RunRecord, Study
from steep.utils.files import write_atomic

RECIPE = """
import torch
from torch import nn
import steep

def data(generator):
    x = torch.randn(120, 4, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + 0.3 * torch.randn(120, generator=generator)
    return steep.split_loaders(x, y, generator, batch_size=16)

recipe = steep.Recipe(
    data=data,
    model=lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
    loss=lambda output, target: (output.squeeze(-1) - target).square(),
    optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
    budget=steep.Budget(steps=30),
    name="tiny",
)
"""
MEASURED = {"seconds", "cpu_seconds", "preparation_seconds", "other_seconds", "peak_memory", "versions", "hardware"}
Seen = dict[Path, tuple[int, int, bytes]]


def unmeasured(run: RunRecord) -> dict[str, Any]:
    """A run without its measured times and memory."""
    values = {k: v for k, v in asdict(run).items() if k not in MEASURED}
    curve = [{k: v for k, v in point.items() if k not in MEASURED} for point in run.curve]
    return json.loads(json.dumps(values | {"curve": curve}))


def _arm(arm: ArmResult) -> dict[str, Any]:
    scores = {name: asdict(comparison) for name, comparison in arm.scores.items()}
    runs = {part: [unmeasured(r) for r in getattr(arm, part)] for part in ("trials", "runs", "equal_examples")}
    return {"name": arm.name, "hyper": arm.hyper, "scores": scores} | runs


def table(study: Study) -> str:
    """Everything of a study that is not measured, as text."""
    return json.dumps([_arm(arm) for arm in study.arms], sort_keys=True)


class Watch:
    """Run files as first seen: one that is written again has another inode or time of writing, if not content."""

    def __init__(self, store: Path):
        self.runs, self.seen = store / "runs", Seen()

    def problems(self) -> list[str]:
        """What is wrong: run files that changed, vanished or are not whole."""
        now = {path: _state(path) for path in self.runs.glob("*.json")} if self.runs.exists() else {}
        wrong = [f"{path.name} changed or vanished" for path, state in self.seen.items() if now.get(path) != state]
        wrong += [f"{path.name} is not whole" for path, (_, _, text) in now.items() if not _whole(text)]
        self.seen |= now
        return wrong


def _state(path: Path) -> tuple[int, int, bytes]:
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, path.read_bytes()


def _whole(text: bytes) -> bool:
    try:
        return bool(json.loads(text))
    except ValueError:
        return False


def start(recipe: Path, out: Path, trials: int, seeds: int) -> subprocess.Popen[bytes]:
    """The command that is killed, in a process group of its own."""
    sizes = ["--trials", str(trials), "--seeds", str(seeds), "--workers", "2"]
    command = [sys.executable, "-m", "steep", "compare", f"{recipe}:recipe", "--methods", "adabelief", *sizes]
    log = open(out.with_suffix(".log"), "ab")  # noqa: SIM115 (the child's)
    with log:
        return subprocess.Popen([*command, "--out", str(out)], start_new_session=True, stdout=log, stderr=log)


def kill(process: subprocess.Popen[bytes], whole: bool, choice: random.Random) -> bool:
    """Kill the group, or one worker; False if there is no worker yet."""
    if whole:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if _is_worker(p)]
    if workers:
        choice.choice(workers).kill()
    return bool(workers)


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any("popen_loky" in part for part in process.cmdline())
    except psutil.Error:
        return False


def killed_until_done(
    recipe: Path, out: Path, kills: int, length: float, choice: random.Random, sizes: tuple[int, int]
) -> dict[str, Any]:
    """One study, killed at most `kills` times, brought to its end."""
    found: dict[str, Any] = {"group": 0, "worker": 0, "errors": 0, "wrong": []}
    watch, process = Watch(out), start(recipe, out, *sizes)
    try:
        while True:
            left = found["group"] + found["worker"] < kills
            try:
                process.wait(choice.uniform(0, 0.75 * length) if left else 600)
            except subprocess.TimeoutExpired:
                whole = choice.random() < 0.5
                if kill(process, whole, choice):
                    found["group" if whole else "worker"] += 1
            found["wrong"] += watch.problems()
            if process.poll() == 0:
                found["drafts"] = len(list(out.rglob("*.part")))
                found["runs"] = len(watch.seen)
                return found
            if process.poll() is not None:
                found["errors"] += process.returncode != -signal.SIGKILL
                if found["errors"] > 5:
                    raise RuntimeError(out.with_suffix(".log").read_text()[-3000:])
                process = start(recipe, out, *sizes)
    finally:
        if process.poll() is None:
            kill(process, True, choice)


def measure(kills: int, folder: Path, trials: int = 4, seeds: int = 6, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Undisturbed once, then killed studies until `kills` are used up; after each, what came of all so far."""
    recipe, sizes = folder / "tiny.py", (trials, seeds)
    recipe.write_text(RECIPE)
    began = time.monotonic()
    if start(recipe, folder / "whole", *sizes).wait() != 0:
        raise RuntimeError((folder / "whole.log").read_text()[-3000:])
    length, expected = time.monotonic() - began, table(Store(folder / "whole").study())
    for found in killed_studies(recipe, folder, kills, length, expected, sizes, seed):
        yield found | {"undisturbed_seconds": length}


def killed_studies(
    recipe: Path, folder: Path, kills: int, length: float, expected: str, sizes: tuple[int, int], seed: int
) -> Iterator[dict[str, Any]]:
    """Killed studies until `kills` are used up, each compared with the `expected` table."""
    choice, studies = random.Random(seed), list[dict[str, Any]]()
    while (left := kills - sum(s["group"] + s["worker"] for s in studies)) > 0:
        out = folder / f"killed{len(studies)}"
        found = killed_until_done(recipe, out, left, length, choice, sizes)
        studies.append(found | {"same_table": table(Store(out).study()) == expected})
        yield summary(studies)


def summary(studies: list[dict[str, Any]]) -> dict[str, Any]:
    total = {name: sum(s[name] for s in studies) for name in ("group", "worker", "errors", "drafts", "runs")}
    wrong = [sentence for s in studies for sentence in s["wrong"]]
    same = sum(s["same_table"] for s in studies)
    kills = total["group"] + total["worker"]
    return {"kills": kills, "studies": len(studies), "same_table": same, **total, "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for found in measure(arguments.kills, Path(folder)):
            result = json.dumps({**found, "versions": versions(), "hardware": hardware()}, indent=1)
            write_atomic(arguments.out, result + "\n")
            print(result, flush=True)


if __name__ == "__main__":
    main()

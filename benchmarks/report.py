"""The report of a study of 10 methods and 8 seeds: at most 3 MB, built in at most 5 s, opened without script errors.

The study is made up, in the shape of a real one: 25 evaluations a run, 8 tuning trials an arm, runs at equal time,
and a picture of 400 x 300 pixels for each run. Nothing about it is cached when the clock starts.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from steep.evidence.report import page
from steep.evidence.runs.jobs import hardware, versions
from steep.evidence.statistics import paired
from steep.evidence.study import ArmResult, Comparison, RunRecord, Study

METHODS, SEEDS, TRIALS, EVALUATIONS = 10, 8, 8, 25
METRICS = {"loss": False, "accuracy": True}


def run(arm: str, role: str, level: float, seed: int, random: np.random.Generator) -> RunRecord:
    """A run whose loss falls to about `level`."""
    final = level * math.exp(0.2 * math.sin(seed) + 0.05 * random.normal())
    curve = [
        {"step": 27 * i, "examples": 1726 * i, "seconds": 0.031 * i * random.uniform(0.9, 1.1), "cpu_seconds": 0.03 * i}
        | {
            "loss": final + math.exp(-i / 3) * random.uniform(0.9, 1.1),
            "accuracy": 1 - final * random.uniform(0.9, 1.1),
        }
        for i in range(1, EVALUATIONS + 1)
    ]
    scores = {"loss": final, "accuracy": 1 - final}
    return RunRecord(
        key=f"{arm}-{role}-{seed}",
        arm=arm,
        role=role,
        methods=[]
        if arm in ("baseline", "A/A")
        else [(arm, {"lr": random.uniform(), "weight_decay": random.uniform()})],
        lr_scale=random.uniform(0.1, 10),
        seed=seed,
        split_seed=seed,
        budget={"epochs": 40, "steps": None, "seconds": None},
        outcome="finished",
        curve=curve,
        val={"loss": curve[-1]["loss"], "accuracy": curve[-1]["accuracy"]},
        test=scores,
        seconds=curve[-1]["seconds"],
        cpu_seconds=0.75,
        peak_memory=240_000_000,
        steps=675,
        examples=43_150,
        digest="0" * 24,
        picture=f"pictures/{arm.replace('/', '-')}.png",
        versions=versions(),
        hardware=hardware(),
    )


def compared(runs: list[RunRecord], baseline: list[RunRecord]) -> dict[str, Comparison]:
    return {
        score: paired.compare(
            [r.test[score] for r in runs],
            [r.test[score] for r in baseline],
            score=score,
            higher_is_better=higher,
            relative=score == "loss",
        )
        for score, higher in METRICS.items()
    }


def arm(name: str, level: float, random: np.random.Generator, baseline: list[RunRecord]) -> ArmResult:
    runs, timed = ([run(name, role, level, s, random) for s in range(SEEDS)] for role in ("confirm", "equal-time"))
    trials = [run(name, "tune", level * random.uniform(1, 3), 1000 + s, random) for s in range(TRIALS)]
    return ArmResult(
        name=name,
        summary=f"What {name} changes, in one sentence of the usual length, from its docstring.",
        paper="https://arxiv.org/abs/2010.07468",
        hyper=dict(trials[0].methods[0][1] if trials[0].methods else {"lr_scale": trials[0].lr_scale}),
        trials=trials,
        runs=runs,
        equal_time=timed if baseline else (),
        scores=compared(runs, baseline or runs) if baseline else {},
        scores_at_equal_time=compared(timed, baseline) if baseline else {},
        time_to_target=[random.uniform(0.2, 0.8) for _ in range(SEEDS)],
    )


def study() -> Study:
    random = np.random.default_rng(0)
    first = arm("baseline", 0.1, random, [])
    names = [(f"method-{i}", 0.1 * 1.15 ** (i - 5)) for i in range(METHODS)] + [("A/A", 0.1)]
    arms = [first, *(arm(name, level, random, list(first.runs)) for name, level in names)]
    target = {"target_loss": 0.1, "target_picture": "pictures/baseline.png"}
    command = f"steep compare digits --methods {' '.join(name for name, _ in names[:-1])}"
    return Study("digits", "digits", arms, "loss", METRICS, list(range(SEEDS)), command=command, **target)


def draw(folder: Path, names: list[str]) -> None:
    """A picture for each arm, with the grain of a photograph."""
    folder.mkdir()
    y, x = np.mgrid[0:300, 0:400]
    for i, name in enumerate(names):
        waves = np.stack([np.sin(x * f / (9 + i)) * np.cos(y * f / 7) for f in (1, 2, 3)], -1) * 90 + 128
        grain = np.random.default_rng(i).normal(0, 6, waves.shape)
        Image.fromarray((waves + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{name.replace('/', '-')}.png")


def opened(file: Path) -> dict[str, Any]:
    """What a browser says of the page, and the seconds until its curves are drawn; nothing without a browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return {}
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        return {}
    with sync_playwright() as driver:
        tab = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]).new_page()
        errors: list[str] = []
        tab.on("console", lambda message: errors.append(message.text))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        started = time.perf_counter()
        tab.goto(file.as_uri())
        tab.wait_for_selector("html[data-charts=ready]")
        return {"script errors": errors, "seconds until drawn": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    made = study()
    with tempfile.TemporaryDirectory() as store:
        draw(Path(store) / "pictures", [a.name for a in made.arms])
        wall, cpu = time.perf_counter(), time.process_time()
        file = page.write(made, store)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        result = {
            "methods": METHODS,
            "seeds": SEEDS,
            "runs": sum(len(a.trials) + len(a.runs) + len(a.equal_time) for a in made.arms),
            "seconds": wall,
            "CPU seconds": cpu,
            "MB": file.stat().st_size / 1e6,
            **opened(file),
            "versions": versions(),
            "hardware": hardware(),
        }
    print(json.dumps(result, indent=1))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

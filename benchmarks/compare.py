"""What `steep compare` itself costs on a study of digits, and what a second worker gains. Goals: 1.7 times, 3 %.

- workers: wall seconds of one study with one worker over the same with two, each in a store of its own, in turns;
- bookkeeping: CPU seconds of parent and workers that went neither into training and evaluating nor into starting their
  processes (Python, imports and first-use costs of torch; measured in processes that do nothing else), as a share of
  all. What starting takes is reported as a share of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from steep.evidence.runs.jobs import hardware, versions
from steep.evidence.runs.store import Store

PARENT = "import steep.evidence.compare"
WORKER = """
import os
from steep.evidence.runs.jobs import start_worker
start_worker(os.getppid())
"""


def spent(command: list[str]) -> tuple[float, float]:
    """Wall seconds, and CPU seconds of all processes."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def idle(code: str) -> float:
    """CPU seconds of a process that does no more than start."""
    return median(spent([sys.executable, "-c", code])[1] for _ in range(3))


def study(workers: int, out: Path, trials: int, seeds: int) -> tuple[float, float]:
    methods = ["--methods", "adabelief", "ps-kd", "--trials", str(trials), "--seeds", str(seeds)]
    command = [sys.executable, "-m", "steep", "compare", "digits", *methods, "--workers", str(workers)]
    return spent([*command, "--out", str(out)])


def trained(store: Path) -> float:
    """CPU seconds of building, training and evaluating, over all runs of a store."""
    return sum(r.cpu_seconds + r.preparation_seconds + r.other_seconds for r in Store(store).records())


def measure(rounds: int, trials: int, seeds: int) -> dict[str, Any]:
    walls: dict[int, list[float]] = {1: [], 2: []}
    shares, starting = [], []
    with tempfile.TemporaryDirectory() as folder:
        for k in range(rounds):
            for workers in walls:
                out = Path(folder) / f"{k}-{workers}"
                wall, cpu = study(workers, out, trials, seeds)
                started = idle(PARENT) + workers * idle(WORKER)
                walls[workers].append(wall)
                shares.append((cpu - trained(out) - started) / cpu)
                starting.append(started / cpu)
    gained = [one / two for one, two in zip(walls[1], walls[2], strict=True)]
    return {
        "one worker / two": median(gained),
        "bookkeeping, share of CPU seconds": median(shares),
        "starting processes, share of CPU seconds": median(starting),
        "wall seconds": walls,
        "all shares": shares,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.rounds, arguments.trials, arguments.seeds)
    result |= {"versions": versions(), "hardware": hardware()}
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Are the verdicts of `compare` worth their 5 %? Simulated studies, judged by the very functions that judge real ones.

A study has a baseline and up to six arms over paired seeds; a run's score is an effect of its split, shared by the runs
of a pair, plus noise of its own. Splits make for a correlation of 0.77 between the runs of a pair under Gaussian noise,
as measured on digits (AdamW against SGD, validation loss). Per kind of noise and number of seeds:

- false verdicts: studies without any effect in which at least one arm of the family "helps" or "hurts";
- coverage: arms with a known effect whose 95 % interval contains it;
- power: arms given exactly the minimum detectable effect that "help", the rest of the family null;
- time to target: false verdicts over times of which one in five is censored.

    python benchmarks/validity.py --studies 1000 --out validity.json
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from steep.evidence import statistics
from steep.evidence.study import Comparison

Array = NDArray[np.float64]
Rng = np.random.Generator
Row = dict[str, Any]

FAMILIES = (1, 3, 6)
SPLIT_SD = (0.77 / (1 - 0.77)) ** 0.5
EFFECT = 0.5


def gaussian(rng: Rng, shape: tuple[int, int]) -> Array:
    return rng.standard_normal(shape)


def heavy_tailed(rng: Rng, shape: tuple[int, int]) -> Array:
    """Student's t with 2 degrees of freedom: no variance."""
    return rng.standard_t(2, shape)


def skewed(rng: Rng, shape: tuple[int, int]) -> Array:
    """Most runs alike, a few much worse."""
    return rng.lognormal(sigma=1.0, size=shape)


def heteroscedastic(rng: Rng, shape: tuple[int, int]) -> Array:
    """Some splits are noisier than others, for all arms."""
    return rng.standard_normal(shape) * rng.lognormal(sigma=1.0, size=shape[1])


def diverging(rng: Rng, shape: tuple[int, int]) -> Array:
    """One run in ten diverges."""
    return np.where(rng.random(shape) < 0.1, np.inf, rng.standard_normal(shape))


def tied(rng: Rng, shape: tuple[int, int]) -> Array:
    """Coarse noise: many differences are equal, many are zero."""
    return np.round(rng.standard_normal(shape))


NOISES = (gaussian, heavy_tailed, skewed, heteroscedastic, diverging, tied)
Noise = Callable[[Rng, tuple[int, int]], Array]


def study(rng: Rng, noise: Noise, seeds: int, *, arms: int, effect: float) -> dict[str, Comparison]:
    """Losses of `arms` arms against one baseline; the first arm has the effect."""
    loss = SPLIT_SD * rng.standard_normal(seeds) + noise(rng, (1 + arms, seeds))
    loss[1] -= effect
    baseline, *others = loss.tolist()
    return {f"arm {i}": statistics.compare(arm, baseline) for i, arm in enumerate(others)}


def decided(family: Mapping[str, Comparison]) -> bool:
    return any(c.verdict in ("helps", "hurts") for c in family.values())


def row(hits: Iterable[bool], **what: Any) -> Row:
    """How often, with an exact 95 % interval of the rate."""
    outcomes = list(hits)
    test = scipy.stats.binomtest(sum(outcomes), len(outcomes))
    ci = test.proportion_ci()
    return {**what, "count": test.k, "of": test.n, "rate": test.statistic, "low": float(ci.low), "high": float(ci.high)}


def false_verdicts(rng: Rng, noise: Noise, seeds: int, studies: int) -> list[Row]:
    made = [list(study(rng, noise, seeds, arms=max(FAMILIES), effect=0).items()) for _ in range(studies)]
    return [
        row((decided(statistics.adjust(dict(s[:arms]))) for s in made), noise=noise.__name__, seeds=seeds, arms=arms)
        for arms in FAMILIES
    ]


def coverage(rng: Rng, noise: Noise, seeds: int, studies: int) -> Row:
    made = (study(rng, noise, seeds, arms=1, effect=EFFECT)["arm 0"] for _ in range(studies))
    return row((c.low <= EFFECT <= c.high for c in made), noise=noise.__name__, seeds=seeds)


def power(rng: Rng, seeds: int, arms: int, studies: int) -> Row:
    sd = 2**0.5  # of a difference of two runs
    if seeds < statistics.seeds_needed(arms):
        return {"seeds": seeds, "arms": arms, "effect": None, "rate": None}
    effect = statistics.minimum_detectable_effect(sd, seeds, statistics.ALPHA / arms)
    made = (study(rng, gaussian, seeds, arms=arms, effect=effect) for _ in range(studies))
    return row((statistics.adjust(s)["arm 0"].verdict == "helps" for s in made), seeds=seeds, arms=arms, effect=effect)


def censored_times(rng: Rng, seeds: int) -> list[float | None]:
    return [t if rng.random() < 0.8 else None for t in rng.lognormal(size=seeds).tolist()]


def time_to_target(rng: Rng, seeds: int, studies: int) -> Row:
    pairs = ((censored_times(rng, seeds), censored_times(rng, seeds)) for _ in range(studies))
    return row((decided({"arm": statistics.paired_time_to_target(*pair)}) for pair in pairs), seeds=seeds)


def simulate(studies: int, seeds: Sequence[int], seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    started = time.process_time()
    return {
        "false verdicts": [r for noise in NOISES for n in seeds for r in false_verdicts(rng, noise, n, studies)],
        "coverage": [coverage(rng, noise, n, studies) for noise in NOISES for n in seeds],
        "power": [power(rng, n, arms, studies) for n in seeds for arms in FAMILIES],
        "time to target": [time_to_target(rng, n, studies) for n in seeds],
        "seed": seed,
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def show(results: Mapping[str, Any]) -> None:
    for title, rows in results.items():
        if isinstance(rows, list):
            print(f"\n{title}")
            for r in rows:
                print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in r.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[6, 8, 16], help="numbers of pairs")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--smoke", action="store_true", help="20 studies of 6 and 8 pairs")
    args = parser.parse_args()
    results = simulate(20, [6, 8], args.seed) if args.smoke else simulate(args.studies, args.seeds, args.seed)
    show(results)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Are the verdicts of `compare` worth their 5 %? Simulated studies, judged by the very functions that judge real ones.

A study has a baseline and up to ten arms over paired seeds; a run's score is an effect of its split, shared by the runs
of a pair, plus noise of its own. Splits make for a correlation of 0.77 between the runs of a pair under Gaussian noise,
as measured on digits (AdamW against SGD, validation loss). Per kind of noise and number of seeds:

- false verdicts: studies without any effect in which at least one arm of the family "helps" or "hurts";
- coverage: arms with a known effect whose 95 % interval contains it;
- power: arms given exactly the minimum detectable effect that "help", the rest of the family null;
- sequential: false verdicts of families that are analysed after 4, 8 and 16 pairs;
- sequential power: an arm given the effect that the last analysis can detect: how often it "helps", after how many
  pairs, how often its interval contains the effect, and its estimate over the effect;
- beyond the assumption: false verdicts and coverage where means are equal but only the baseline's noise is skewed, so
  that "the method changes nothing" is false;
- time to target: false verdicts over times of which one in five is censored.

Kinds of noise are made up, or "recorded": drawn from the paired differences of the A/A controls of real studies, each
on a scale of its own. `--stores` reads such studies, keeps their differences in the result, and tests that their
controls are null at the nominal rate; without it the differences are those of the result file that is there.

    python benchmarks/validity.py --studies 1000 --stores out/digits out/photo --out validity.json
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from steep.evidence.runs.store import Store
from steep.evidence.statistics import paired
from steep.evidence.statistics import power as powers
from steep.evidence.statistics.sequential import InterimAnalysis, planned_analyses, stopping_points
from steep.evidence.study import Comparison

Array = NDArray[np.float64]
Rng = np.random.Generator
Row = dict[str, Any]

FAMILIES = (1, 3, 6, 10)
RESULTS = Path(__file__).parent / "results" / "validity.json"
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


def lopsided(rng: Rng, shape: tuple[int, int]) -> Array:
    """The baseline is now and then much worse, the arms never are; equal means."""
    runs = 0.3 * rng.standard_normal(shape)
    runs[0] = rng.lognormal(sigma=1.0, size=shape[1]) - np.exp(0.5)
    return runs


def recorded(rng: Rng, shape: tuple[int, int], *, differences: Sequence[float]) -> Array:
    """As real runs had it."""
    return rng.choice(differences, shape) * rng.choice([-1, 1], shape)


NOISES = (gaussian, heavy_tailed, skewed, heteroscedastic, diverging, tied)
Noise = Callable[[Rng, tuple[int, int]], Array]


def study(rng: Rng, noise: Noise, seeds: int, *, arms: int, effect: float) -> dict[str, Comparison]:
    """Losses of `arms` arms against one baseline; the first arm has the effect."""
    loss = SPLIT_SD * rng.standard_normal(seeds) + noise(rng, (1 + arms, seeds))
    loss[1] -= effect
    baseline, *others = loss.tolist()
    return {f"arm {i}": paired.compare(arm, baseline) for i, arm in enumerate(others)}


def decided(family: Mapping[str, Comparison]) -> bool:
    return any(c.verdict in ("helps", "hurts") for c in family.values())


def row(hits: Iterable[bool], **what: Any) -> Row:
    """How often, with an exact 95 % interval of the rate."""
    outcomes = list(hits)
    test = scipy.stats.binomtest(sum(outcomes), len(outcomes))
    ci = test.proportion_ci()
    return {**what, "count": test.k, "of": test.n, "rate": test.statistic, "low": float(ci.low), "high": float(ci.high)}


def false_verdicts(rng: Rng, name: str, noise: Noise, seeds: int, studies: int) -> list[Row]:
    made = [list(study(rng, noise, seeds, arms=max(FAMILIES), effect=0).items()) for _ in range(studies)]
    return [
        row((decided(paired.adjust(dict(s[:arms]))) for s in made), noise=name, seeds=seeds, arms=arms)
        for arms in FAMILIES
    ]


def sequential(rng: Rng, name: str, noise: Noise, arms: int, studies: int) -> Row:
    """False verdicts of any arm at any interim analysis."""
    analyses = planned_analyses(16, arms, sequential=True)
    made = (group_sequential(rng, noise, arms, analyses)[0] for _ in range(studies))
    return row(map(decided, made), noise=name, arms=arms)


def group_sequential(
    rng: Rng, noise: Noise, arms: int, analyses: Sequence[InterimAnalysis], effect: float = 0
) -> tuple[dict[str, Comparison], dict[str, InterimAnalysis]]:
    """Every arm at the analysis that stopped it, and these analyses; the first arm has the effect."""
    split = SPLIT_SD * rng.standard_normal(analyses[-1].pairs)
    loss = split + noise(rng, (1 + arms, analyses[-1].pairs))
    loss[1] -= effect
    baseline, *others = loss.tolist()
    found: dict[str, Comparison] = {}

    def judged(analysis: InterimAnalysis, going: Sequence[str]) -> Mapping[str, Comparison]:
        n = analysis.pairs
        alone = {name: paired.compare(others[int(name)][:n], baseline[:n], alpha=analysis.alpha) for name in going}
        found.update(paired.adjust(alone, arms))
        return found

    return found, stopping_points(analyses, [str(i) for i in range(arms)], judged)


def sequential_power(rng: Rng, name: str, noise: Noise, arms: int, studies: int) -> Row:
    analyses = planned_analyses(16, arms, sequential=True)
    effect = powers.minimum_detectable_effect(2**0.5, analyses[-1].pairs, analyses[-1].alpha / arms)
    made = [group_sequential(rng, noise, arms, analyses, effect) for _ in range(studies)]
    first = [found["0"] for found, _ in made]
    return row(
        (c.verdict == "helps" for c in first),
        noise=name,
        arms=arms,
        effect=effect,
        pairs=float(np.mean([stopped_at["0"].pairs for _, stopped_at in made])),
        coverage=float(np.mean([c.low <= effect <= c.high for c in first])),
        estimate_over_effect=float(np.mean([c.estimate for c in first]) / effect),
    )


def coverage(rng: Rng, name: str, noise: Noise, seeds: int, studies: int) -> Row:
    made = (study(rng, noise, seeds, arms=1, effect=EFFECT)["arm 0"] for _ in range(studies))
    return row((c.low <= EFFECT <= c.high for c in made), noise=name, seeds=seeds)


def beyond(rng: Rng, seeds: int, studies: int) -> list[Row]:
    made = (study(rng, lopsided, seeds, arms=1, effect=0) for _ in range(studies))
    verdicts = row(map(decided, made), rate_of="false verdicts", noise="lopsided", seeds=seeds)
    return [verdicts, {"rate_of": "coverage", **coverage(rng, "lopsided", lopsided, seeds, studies)}]


def power(rng: Rng, seeds: int, arms: int, studies: int) -> Row:
    sd = 2**0.5  # of a difference of two runs
    if seeds < powers.seeds_needed(arms):
        return {"seeds": seeds, "arms": arms, "effect": None, "rate": None}
    effect = powers.minimum_detectable_effect(sd, seeds, powers.ALPHA / arms)
    made = (study(rng, gaussian, seeds, arms=arms, effect=effect) for _ in range(studies))
    return row((paired.adjust(s)["arm 0"].verdict == "helps" for s in made), seeds=seeds, arms=arms, effect=effect)


def censored_times(rng: Rng, seeds: int) -> list[float | None]:
    return [t if rng.random() < 0.8 else None for t in rng.lognormal(size=seeds).tolist()]


def time_to_target(rng: Rng, seeds: int, studies: int) -> Row:
    pairs = ((censored_times(rng, seeds), censored_times(rng, seeds)) for _ in range(studies))
    return row((decided({"arm": paired.paired_time_to_target(*pair)}) for pair in pairs), seeds=seeds)


def controls(stores: Iterable[Path]) -> list[Row]:
    """The A/A control of every real study."""
    found: list[Row] = []
    for store in stores:
        study = Store(store).study()
        c = study.arms[-1].scores[study.primary]
        found.append({"recipe": study.recipe, "p": c.p, "verdict": c.verdict, "differences": list(c.differences)})
    return found


def scaled_differences(made: Sequence[Row]) -> list[float]:
    """Finite differences of all controls, each study's divided by their root mean square, halved as two runs' are."""
    scaled = [np.array([d for d in row["differences"] if np.isfinite(d)]) for row in made]
    parts = [d / np.sqrt(2 * np.mean(d**2)) for d in scaled if len(d) and np.any(d)]
    return np.concatenate(parts).tolist() if parts else []


def simulate(studies: int, seeds: Sequence[int], seed: int, made: Sequence[Row] = ()) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    started = time.process_time()
    noises: dict[str, Noise] = {noise.__name__: noise for noise in NOISES}
    if differences := scaled_differences(made):
        noises["recorded"] = partial(recorded, differences=differences)
    judged = [c["verdict"] in paired.DECIDED for c in made if c["verdict"] != "too few seeds"]
    return {
        "false verdicts": [r for k, f in noises.items() for n in seeds for r in false_verdicts(rng, k, f, n, studies)],
        "sequential": [sequential(rng, k, f, arms, studies) for k, f in noises.items() for arms in FAMILIES],
        "controls of real studies": [row(judged, studies=len(judged))] if judged else [],
        "coverage": [coverage(rng, k, f, n, studies) for k, f in noises.items() for n in seeds],
        "power": [power(rng, n, arms, studies) for n in seeds for arms in FAMILIES],
        "time to target": [time_to_target(rng, n, studies) for n in seeds],
        "sequential power": [sequential_power(rng, "gaussian", gaussian, arms, studies) for arms in FAMILIES],
        "beyond the assumption": [r for n in seeds for r in beyond(rng, n, studies)],
        "real studies": list(made),
        "seed": seed,
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def show(results: Mapping[str, Any]) -> None:
    for title, rows in results.items():
        if isinstance(rows, list):
            print(f"\n{title}")
            for r in rows:
                shown = {k: v for k, v in r.items() if k != "differences"}
                print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[6, 8, 16], help="numbers of pairs")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation")
    parser.add_argument("--stores", type=Path, nargs="*", default=[], help="directories of real studies")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--smoke", action="store_true", help="20 studies of 6 and 8 pairs")
    args = parser.parse_args()
    made = controls(args.stores) or json.loads(RESULTS.read_text()).get("real studies", [])
    studies, seeds = (20, [6, 8]) if args.smoke else (args.studies, args.seeds)
    results = simulate(studies, seeds, args.seed, made)
    show(results)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Are the verdicts of `compare` worth their 5 %? Simulated studies, judged by the very functions that judge real ones.

A study has a baseline and up to ten arms over paired seeds; a run's score is an effect of its split, shared by the runs
of a pair, plus noise of its own: of a made-up shape, or as it was recorded, 12 trainings of digits on each of 24 splits
(or those of `--store DIR`, their arms' effects taken out), drawn without replacement. Per kind of noise and number of
seeds:

- false verdicts: studies without any effect in which at least one arm of the family "helps" or "hurts". The attainable
  p-values are multiples of 2 / 2^n, so that the rate is 0.031 for 6 pairs and 0 where `seeds_needed` is not met;
- coverage: arms with a known effect whose 95 % interval contains it;
- power: arms given exactly the minimum detectable effect that "help", the rest of the family null;
- sequential: the same for looks at 4, 8 and 16 pairs, with the pairs an arm takes on average;
- time to target: false verdicts over censored times, and over simulated curves racing to the control's final loss;
- beyond the assumption: arms whose mean is the baseline's but whose noise is not. "Changes nothing" is false there, and
  the interval's symmetry too: the rates are what they are;
- real trainings: the A/A controls of the recorded trainings, and of every finished comparison below `--stores DIR...`,
  which must show a difference at the attainable rate.

    python benchmarks/validity.py --studies 1000 --out benchmarks/results/validity.json
    python benchmarks/validity.py --stores ~/studies
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from numpy.typing import NDArray

import steep
from steep.evidence import statistics
from steep.evidence.assemble import TWIN, finals, seconds_to, target
from steep.evidence.power import ALPHA, minimum_detectable_effect, seeds_needed
from steep.evidence.sequential import Look, followed, planned
from steep.evidence.store import open_store
from steep.evidence.study import Comparison, RunRecord

Array = NDArray[np.float64]
Rng = np.random.Generator
Row = dict[str, Any]
Noise = Callable[[Rng, tuple[int, int]], Array]

FAMILIES = (1, 3, 6, 10)
SPLITS, RUNS, EPOCHS = 24, 12, 16  # of the recorded trainings
SPLIT_SD = (0.77 / (1 - 0.77)) ** 0.5  # measured on digits, AdamW against SGD: a correlation of 0.77 in a pair
EFFECT = 0.5
SD = 2**0.5  # of a difference of two runs
PAIRS = 16  # of a group-sequential study


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
    """The baseline now and then much worse, the arms never; equal means."""
    runs = 0.3 * rng.standard_normal(shape)
    runs[0] = rng.lognormal(sigma=1.0, size=shape[1]) - math.exp(0.5)
    return runs


MADE_UP = (gaussian, heavy_tailed, skewed, heteroscedastic, diverging, tied)


def record(splits: int = SPLITS, runs: int = RUNS, epochs: int = EPOCHS) -> Array:
    """Logarithms of test losses `(splits, runs)` of trainings of digits: other initialisation and order in each run."""
    torch.set_num_threads(1)
    recipe = steep.task("digits").replace(budget=steep.Budget(epochs=epochs))

    def loss(split: int, run: int) -> float:
        seed = split + 1000 * run
        made = steep.fit(recipe, seed=seed, split_seed=split, evaluate_every=10**9, device="cpu", progress=False)
        return math.log(made.test["loss"])

    return np.array([[loss(split, run) for run in range(runs)] for split in range(splits)])


def read(directory: Path) -> Array:
    """Logarithms of final test losses `(seeds, arms)` of a finished study, the arms' effects taken out."""
    arms = [finals(arm.runs, "loss") for arm in open_store(directory).study().arms]
    whole = [np.log(np.array(losses, dtype=float)) for losses in arms if len(losses) == len(arms[0]) and all(losses)]
    return np.array([own - np.median(own - whole[0]) for own in whole]).T


def recorded(losses: Array) -> Noise:
    """Noise of real runs, in standard deviations of a run within its split."""
    scaled = losses / np.sqrt(losses.var(axis=1, ddof=1).mean())

    def draw(rng: Rng, shape: tuple[int, int]) -> Array:
        runs, seeds = shape
        return rng.permuted(rng.choice(scaled, seeds, replace=False), axis=1)[:, :runs].T

    draw.__name__ = "recorded"
    return draw


def study(rng: Rng, noise: Noise, seeds: int, *, arms: int, effect: float) -> Array:
    """Losses `(1 + arms, seeds)` of a baseline and its arms; the first arm has the effect."""
    loss = SPLIT_SD * rng.standard_normal(seeds) + noise(rng, (1 + arms, seeds))
    loss[1] -= effect
    return loss


def judged(loss: Array, arms: Iterable[int], alpha: float = ALPHA) -> dict[str, Comparison]:
    """Each arm against the baseline, alone."""
    return {str(i): statistics.compare(loss[i].tolist(), loss[0].tolist(), alpha=alpha) for i in arms}


def decided(family: Mapping[str, Comparison]) -> bool:
    return any(c.verdict in statistics.DECIDED for c in family.values())


def row(hits: Iterable[bool], **what: Any) -> Row:
    """How often, with an exact 95 % interval of the rate."""
    outcomes = list(hits)
    test = scipy.stats.binomtest(sum(outcomes), len(outcomes))
    ci = test.proportion_ci()
    return {**what, "count": test.k, "of": test.n, "rate": test.statistic, "low": float(ci.low), "high": float(ci.high)}


def attainable(pairs: int, alpha: float = ALPHA) -> float:
    """The largest level at most alpha that an exact test of so many pairs can have."""
    return math.floor(alpha * 2 ** (pairs - 1)) / 2 ** (pairs - 1)


def false_verdicts(rng: Rng, noise: Noise, seeds: int, studies: int, families: Sequence[int]) -> list[Row]:
    every = range(1, 1 + max(families))
    made = [judged(study(rng, noise, seeds, arms=max(families), effect=0), every) for _ in range(studies)]
    return [
        row(
            (decided(statistics.adjust(dict(list(s.items())[:arms]))) for s in made),
            noise=noise.__name__,
            seeds=seeds,
            arms=arms,
            decidable=seeds >= seeds_needed(arms),
        )
        for arms in families
    ]


def coverage(rng: Rng, noise: Noise, seeds: int, studies: int) -> Row:
    made = (judged(study(rng, noise, seeds, arms=1, effect=EFFECT), [1])["1"] for _ in range(studies))
    exact = 1 - attainable(seeds)
    return row((c.low <= EFFECT <= c.high for c in made), noise=noise.__name__, seeds=seeds, exact=exact)


def power(rng: Rng, noise: Noise, seeds: int, arms: int, studies: int) -> Row:
    what = {"noise": noise.__name__, "seeds": seeds, "arms": arms}
    if seeds < seeds_needed(arms):
        return {**what, "effect": None, "rate": None}
    effect = minimum_detectable_effect(SD, seeds, ALPHA / arms)
    made = (judged(study(rng, noise, seeds, arms=arms, effect=effect), range(1, 1 + arms)) for _ in range(studies))
    return row((statistics.adjust(s)["1"].verdict == "helps" for s in made), **what, effect=effect)


def looked(loss: Array, looks: Sequence[Look]) -> tuple[dict[str, Comparison], dict[str, Look]]:
    """A group-sequential study: every arm's comparison at the look that ended it, and these looks."""
    arms, last = len(loss) - 1, dict[str, Comparison]()

    def verdicts(look: Look, going: Sequence[str]) -> dict[str, Comparison]:
        alone = judged(loss[:, : look.pairs], map(int, going), look.alpha)
        last.update(statistics.adjust(alone, family=arms))
        return last

    ended = followed(looks, [str(i + 1) for i in range(arms)], verdicts)
    return last, ended


def sequential(rng: Rng, noise: Noise, arms: int, studies: int) -> Row:
    """False verdicts and coverage of the design, then power and pairs at the effect that its last look promises."""
    looks = planned(PAIRS, arms, sequential=True)
    null = [looked(study(rng, noise, PAIRS, arms=arms, effect=0), looks)[0] for _ in range(studies)]
    effect = minimum_detectable_effect(SD, PAIRS, looks[-1].alpha / arms)
    planted = [looked(study(rng, noise, PAIRS, arms=arms, effect=effect), looks) for _ in range(studies)]
    return row(
        map(decided, null),
        noise=noise.__name__,
        arms=arms,
        alphas=[look.alpha for look in looks],
        coverage=float(np.mean([c["1"].low <= effect <= c["1"].high for c, _ in planted])),
        effect=effect,
        power=float(np.mean([c["1"].verdict == "helps" for c, _ in planted])),
        estimate_over_effect=float(np.mean([c["1"].estimate for c, _ in planted]) / effect),
        pairs=float(np.mean([ended["1"].pairs for _, ended in planted])),
    )


def censored_times(rng: Rng, seeds: int) -> list[float | None]:
    return [t if rng.random() < 0.8 else None for t in rng.lognormal(size=seeds).tolist()]


def racing(rng: Rng, splits: Array) -> list[RunRecord]:
    """Runs with simulated curves: a power law whose height has an effect of the split and one of the run."""
    steps = np.arange(1, 26)
    loss = np.exp(splits + 0.3 * rng.standard_normal(len(splits)) - np.log(steps)[:, None] / 2).T
    loss *= np.exp(0.02 * rng.standard_normal(loss.shape))

    def run(values: Array) -> RunRecord:
        pace = rng.lognormal(sigma=0.1)
        curve = [{"step": k, "cpu_seconds": pace * k, "loss": v} for k, v in zip(steps.tolist(), values, strict=True)]
        final = {"loss": float(values[-1])}
        return RunRecord("", "", "confirm", (), 1.0, 0, 0, {}, "finished", curve=curve, val=final)

    return [run(values) for values in loss]


def raced(rng: Rng, seeds: int) -> Comparison:
    splits = 0.5 * rng.standard_normal(seeds)
    arm, baseline, twin = (racing(rng, splits) for _ in range(3))
    level = target(twin)
    return statistics.paired_time_to_target(*([seconds_to(level, run) for run in runs] for runs in (arm, baseline)))


def time_to_target(rng: Rng, seeds: int, studies: int) -> list[Row]:
    pairs = ((censored_times(rng, seeds), censored_times(rng, seeds)) for _ in range(studies))
    times = (decided({"arm": statistics.paired_time_to_target(*pair)}) for pair in pairs)
    curves = (decided({"arm": raced(rng, seeds)}) for _ in range(studies))
    return [row(times, noise="censored", seeds=seeds), row(curves, noise="curves", seeds=seeds)]


def controls_of_recorded(losses: Array, seeds: int) -> list[Row]:
    """The recorded trainings as A/A studies, each run used once and in the order in which it was made."""
    first = range(0, len(losses) - seeds + 1, seeds)
    pairs = [losses[i : i + seeds, k : k + 2].T for i in first for k in range(0, losses.shape[1] - 1, 2)]
    return [{"source": "recorded", "pairs": seeds, "p": judged(pair, [1])["1"].p} for pair in pairs]


def controls_of_stores(directories: Iterable[Path]) -> list[Row]:
    """The A/A control of every finished comparison below the directories, judged afresh at 5 %."""
    paths = sorted({path for directory in directories for path in directory.rglob("study.json")})
    found = []
    for path in paths:
        made = open_store(path.parent).study()
        twin = next(arm for arm in made.arms if arm.name == TWIN)
        c = twin.scores[made.primary]
        found.append({"source": made.recipe, "pairs": len(c.differences), "p": statistics.sign_flip_p(c.differences)})
    return found


def null_at_the_nominal_rate(controls: Sequence[Row]) -> Row:
    """How many controls show a difference, and how probable as many are, given how few p-values few pairs have."""
    expected, counts = [attainable(c["pairs"]) for c in controls], np.ones(1)
    for p in expected:
        counts = np.convolve(counts, [1 - p, p])
    hits = [c["p"] <= ALPHA for c in controls]
    return row(hits, nominal=float(np.mean(expected)), chance_of_as_many=float(counts[sum(hits) :].sum()))


def real_trainings(controls: Sequence[Row]) -> dict[str, Any]:
    by_source = {source: [c for c in controls if c["source"] == source] for source in {c["source"] for c in controls}}
    rows = {source: null_at_the_nominal_rate(found) for source, found in sorted(by_source.items())}
    return {"controls": list(controls), "by source": rows, "all": null_at_the_nominal_rate(controls)}


def simulate(studies: int, seeds: Sequence[int], seed: int, losses: Array) -> dict[str, Any]:
    rng, started = np.random.default_rng(seed), time.process_time()
    splits, runs = losses.shape
    real = recorded(losses)
    kinds: list[tuple[Noise, list[int], list[int]]] = [(noise, list(seeds), list(FAMILIES)) for noise in MADE_UP]
    kinds.append((real, [n for n in seeds if n <= splits], [m for m in FAMILIES if m < runs]))
    bell_and_real = [kinds[0], kinds[-1]]
    return {
        "false verdicts": [
            r for noise, ns, ms in kinds for n in ns for r in false_verdicts(rng, noise, n, studies, ms)
        ],
        "coverage": [coverage(rng, noise, n, studies) for noise, ns, _ in kinds for n in ns],
        "power": [power(rng, noise, n, m, studies) for noise, ns, ms in bell_and_real for n in ns for m in ms],
        "sequential": [
            sequential(rng, noise, m, studies) for noise, ns, ms in kinds[:2] + kinds[-1:] if PAIRS in ns for m in ms
        ],
        "time to target": [r for n in seeds for r in time_to_target(rng, n, studies)],
        "beyond the assumption": [
            r
            for n in seeds
            for r in (*false_verdicts(rng, lopsided, n, studies, [1]), coverage(rng, lopsided, n, studies))
        ],
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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[6, 8, 16], help="numbers of pairs")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation")
    parser.add_argument("--store", type=Path, help="finished comparison whose runs give the noise, instead of digits")
    parser.add_argument("--stores", type=Path, nargs="+", help="only test the A/A controls of the comparisons below")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--smoke", action="store_true", help="20 studies of 6 and 8 pairs, 8 splits")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.stores:
        results: dict[str, Any] = {"real trainings": real_trainings(controls_of_stores(args.stores))}
        show(results["real trainings"] | {"all": [results["real trainings"]["all"]]})
    else:
        sizes = {"splits": 8, "runs": 4, "epochs": 2} if args.smoke else {}
        losses = read(args.store) if args.store else record(**sizes)
        seeds = [6, 8] if args.smoke else args.seeds
        controls = [c for n in seeds for c in controls_of_recorded(losses, n)]
        results = simulate(20 if args.smoke else args.studies, seeds, args.seed, losses)
        results |= {"real trainings": real_trainings(controls), "recorded log losses": losses.round(5).tolist()}
        show(results | {"real trainings": [results["real trainings"]["all"]], "recorded log losses": None})
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How many trials and seeds fit into the time there is, how long it will take, and what it could show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from steep.evidence.runs.shared import Agree
from steep.evidence.statistics.power import minimum_detectable_effect, seeds_needed
from steep.evidence.statistics.sequential import InterimAnalysis, planned
from steep.evidence.tuning import EXTRA_SEEDS

SEEDS, TRIALS = 8, 8
SEQUENTIAL_SEEDS = 16  # at most
LADDER = ((16, 16), (16, 12), (8, 12), (8, 8), (4, 8), (4, 6), (2, 6))  # (trials, seeds), most to least


@dataclass(frozen=True)
class Plan:
    """What a comparison will run.

    Args:
        trials: tuning trials per arm.
        seeds: paired confirmation seeds, at most.
        runs: trainings in all (an upper bound: some serve twice, and arms may be decided before the last seed; only
            runs at equal examples, of methods that see other numbers of them, come on top).
        seconds: how long they should take.
        effect: smallest difference it would show in 4 of 5 studies, in standard deviations of the paired difference.
        looks: after how many pairs verdicts are read; one look, unless the study is group-sequential.
    """

    trials: int
    seeds: int
    runs: int
    seconds: float
    effect: float
    interim_analyses: tuple[InterimAnalysis, ...]


def tuning_runs(trials: int) -> int:
    """Trainings that tune one arm: the trials, and the finalists on further seeds."""
    count = trials // 4
    return trials + (count * EXTRA_SEEDS if count > 1 else 0)


def plan_of(
    run_seconds: Mapping[str, float],
    tuned: Mapping[str, bool],
    trials: int,
    seeds: int,
    workers: int,
    *,
    sequential: bool = False,
) -> Plan:
    """Cost of that many trials and seeds.

    Args:
        run_seconds: expected seconds of one run, by arm, the baseline first.
        tuned: whether the arm has anything to tune.
    """
    baseline, *others = run_seconds.values()
    tune = {name: tuning_runs(trials) if tuned[name] else 1 for name in run_seconds}
    slower = sum(abs(seconds / baseline - 1) > 0.05 for seconds in others)  # get equal-time runs too
    work = sum(tune[name] * seconds for name, seconds in run_seconds.items())
    work += seeds * (sum(run_seconds.values()) + baseline + slower * baseline)
    runs = sum(tune.values()) + seeds * (len(run_seconds) + 1 + slower)
    analyses = tuple(planned(seeds, max(1, len(others)), sequential=sequential))
    effect = minimum_detectable_effect(1.0, seeds, analyses[-1].alpha / max(1, len(others)))
    return Plan(trials, seeds, runs, work / workers, effect, analyses)


def choose(
    run_seconds: Mapping[str, float],
    tuned: Mapping[str, bool],
    workers: int,
    *,
    minutes: float | None,
    trials: int | None,
    seeds: int | None,
    sequential: bool = False,
) -> Plan:
    """The largest plan that fits, or the standard one where no time is given; what the user fixed stays fixed.

    Raises:
        ValueError: not even the smallest plan fits.
    """
    needed = seeds_needed(max(1, len(run_seconds) - 1))
    plan = partial(plan_of, run_seconds, tuned, workers=workers, sequential=sequential)
    if minutes is None:
        return plan(trials or TRIALS, seeds or max(SEQUENTIAL_SEEDS if sequential else SEEDS, needed))
    steps = {(trials or t, seeds or max(s, needed)): None for t, s in LADDER}
    plans = [plan(t, s) for t, s in steps]
    fitting = next((plan for plan in plans if plan.seconds <= 60 * minutes), None)
    if fitting is None:
        raise ValueError(
            f"{minutes:g} minutes are too few: the smallest comparison of these arms ({plans[-1].trials} trials, "
            f"{plans[-1].seeds} seeds) takes about {plans[-1].seconds / 60:.1f}. "
            "Give more minutes, fewer methods or a smaller budget"
        )
    return fitting


def agreed(
    agree: Agree,
    run_seconds: Mapping[str, float],
    tuned: Mapping[str, bool],
    workers: int,
    *,
    minutes: float | None,
    trials: int | None,
    seeds: int | None,
    sequential: bool,
) -> Plan:
    """The trials and seeds that the first machine has chosen: others may have more workers, or fewer."""
    request = f"trials and seeds for {minutes, trials, seeds, sequential} at {dict(run_seconds)}"
    fixed = agree(request, None)
    if fixed is None:
        plan = choose(run_seconds, tuned, workers, minutes=minutes, trials=trials, seeds=seeds, sequential=sequential)
        fixed = agree(request, (plan.trials, plan.seeds))
    trials, seeds = fixed
    return choose(run_seconds, tuned, workers, minutes=None, trials=trials, seeds=seeds, sequential=sequential)

"""How many trials and seeds fit into the given time, how long they will take, and what they could show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from steep.evidence.budgets import SAME
from steep.evidence.runs.jobs import DryRun
from steep.evidence.runs.shared import Agree
from steep.evidence.statistics.power import FEWEST_SEEDS, minimum_detectable_effect, seeds_needed
from steep.evidence.statistics.sequential import InterimAnalysis, planned_analyses
from steep.evidence.tuning import EXTRA_SEEDS
from steep.recipe import Budget

SEEDS, TRIALS = 8, 8
SEQUENTIAL_SEEDS = 16  # at most
RUN_SECONDS, REPORT_SECONDS = 0.05, 1.0  # a run's way through a worker and the store; the report (measured)
LADDER = ((16, 16), (16, 12), (8, 12), (8, 8), (4, 8), (4, 6), (2, 6))  # (trials, seeds), most to least


@dataclass(frozen=True)
class Plan:
    """What a comparison will run.

    Args:
        trials: tuning trials per arm.
        seeds: paired confirmation seeds, at most.
        runs: training runs in all. An upper bound, as some runs serve twice and arms may stop before the last seed;
            only runs at equal examples, of methods that see other numbers of examples, are not counted.
        seconds: how long they should take.
        effect: smallest difference it would show in 4 of 5 studies, in standard deviations of the paired difference.
        interim_analyses: after how many pairs verdicts are read; one, unless the study is group-sequential.
    """

    trials: int
    seeds: int
    runs: int
    seconds: float
    effect: float
    interim_analyses: tuple[InterimAnalysis, ...]


def tuning_runs(trials: int) -> int:
    """Training runs that tune one arm: the trials, and the finalists on further seeds."""
    count = trials // 4
    return trials + (count * EXTRA_SEEDS if count > 1 else 0)


def fixed_budget(budget: Budget, baseline: DryRun) -> tuple[int, Budget]:
    """The steps of every run at equal steps, and the budget that has no limit in seconds.

    A limit in seconds becomes what the baseline can do in that time, unless another limit is reached before.
    """
    in_time = max(1, round(budget.seconds / baseline.step_seconds)) if budget.seconds else None
    if in_time is None or (baseline.total_steps is not None and baseline.total_steps <= in_time):
        assert baseline.total_steps is not None  # a budget has a limit
        return baseline.total_steps, replace(budget, seconds=None)
    return in_time, Budget(steps=in_time)


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
    other_pace = sum(abs(seconds / baseline - 1) > SAME for seconds in others)  # these are run at equal time too
    work = sum(tune[name] * seconds for name, seconds in run_seconds.items())
    work += seeds * (sum(run_seconds.values()) + baseline + other_pace * baseline)
    runs = sum(tune.values()) + seeds * (len(run_seconds) + 1 + other_pace)
    analyses = tuple(planned_analyses(seeds, max(1, len(others)), sequential=sequential))
    effect = minimum_detectable_effect(1.0, seeds, analyses[-1].alpha / max(1, len(others)))
    seconds = (work + RUN_SECONDS * runs) / workers + REPORT_SECONDS
    return Plan(trials, seeds, runs, seconds, effect, analyses)


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
    """The largest plan that fits, or the default plan if no time is given. What the user fixed stays fixed.

    Raises:
        ValueError: not even the smallest plan fits.
    """
    needed = seeds_needed(max(1, len(run_seconds) - 1))
    plan = partial(plan_of, run_seconds, tuned, workers=workers, sequential=sequential)
    if minutes is None:
        return plan(trials or TRIALS, seeds or max(SEQUENTIAL_SEEDS if sequential else SEEDS, needed))
    sizes = dict.fromkeys((trials or t, seeds or max(s, needed)) for t, s in LADDER)
    plans = [plan(t, s) for t, s in sizes]
    fitting = next((plan for plan in plans if plan.seconds <= 60 * minutes), None)
    if fitting is None:
        raise ValueError(
            f"{minutes:g} minutes are too few: the smallest comparison of these arms ({plans[-1].trials} trials, "
            f"{plans[-1].seeds} seeds) takes about {_duration(plans[-1].seconds)}. "
            "Allow more minutes, or choose fewer methods or a smaller budget"
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
    """The plan with the trials and seeds that the first machine chose; others may have another number of workers."""
    request = f"trials and seeds for {minutes, trials, seeds, sequential} at {dict(run_seconds)}"
    fixed = agree(request, None)
    if fixed is None:
        plan = choose(run_seconds, tuned, workers, minutes=minutes, trials=trials, seeds=seeds, sequential=sequential)
        fixed = agree(request, (plan.trials, plan.seeds))
    trials, seeds = fixed
    return choose(run_seconds, tuned, workers, minutes=None, trials=trials, seeds=seeds, sequential=sequential)


def announcement(plan: Plan, arms: Sequence[str], left_out: Mapping[str, str], workers: int) -> str:
    """What will be run, how long it will take and what it can show, before it starts."""
    lines = [
        f"{plan.runs} training runs of {', '.join(arms)} and an A/A control: "
        f"{_counted(plan.trials, 'tuning trial')} per arm, then {_counted(plan.seeds, 'paired seed')}, "
        "at equal steps, time and examples.",
        *([_design(plan)] if len(plan.interim_analyses) > 1 else []),
        f"Estimated time: {_duration(plan.seconds)} with {_counted(workers, 'worker')}. "
        "You can stop at any time; rerun the same command to resume.",
        _power(plan, max(1, len(arms) - 1)),
    ]
    return "\n".join(lines + [f"Left out: {name}: {reason}" for name, reason in left_out.items()])


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _design(plan: Plan) -> str:
    """The interim analyses and what each may spend, in a sentence."""
    able = [f"{a.pairs} pairs ({100 * a.alpha:.1f} %)" for a in plan.interim_analyses if a.alpha]
    idle = [str(a.pairs) for a in plan.interim_analyses if not a.alpha]
    too_few = f" {' and '.join(idle)} pairs are too few to decide anything." if idle else ""
    return f"Verdicts are read after {' and '.join(able)}, 5 % in all; arms stop once they are decided.{too_few}"


def _power(plan: Plan, methods: int) -> str:
    """What the seeds can show, in a sentence."""
    if plan.seeds < FEWEST_SEEDS:
        return f"{plan.seeds} seeds give numbers but no verdict, which takes at least {FEWEST_SEEDS} seeds."
    if plan.seeds < seeds_needed(methods):
        return f"{plan.seeds} seeds cannot show a difference among {methods} methods; it takes {seeds_needed(methods)}."
    return f"Detectable: differences of {plan.effect:.1f} standard deviations of the paired difference or more."

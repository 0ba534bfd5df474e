"""From runs to a study: scores, paired comparisons, verdicts, controls, and what the reader must be warned of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from steep.evidence.arms import BASELINE, Arm
from steep.evidence.statistics import paired
from steep.evidence.statistics.power import FEWEST_SEEDS, seeds_needed
from steep.evidence.statistics.sequential import InterimAnalysis
from steep.evidence.study import ArmResult, Comparison, RunRecord, Study
from steep.recipe import Recipe

CONTROL = "A/A"
WANDERED = 1.5  # wall over CPU seconds: largest over smallest of an arm's runs

Records = Mapping[str, Sequence[RunRecord]]
Ended = Mapping[str, InterimAnalysis]


def assemble(
    planned: Sequence[Arm],
    choices: Mapping[str, tuple[Mapping[str, Any], Sequence[RunRecord]]],
    runs: Records,
    equal: Mapping[str, Records],
    metrics: Mapping[str, bool],
    ended: Ended,
) -> list[ArmResult]:
    """The arms of a finished study: the baseline first, the A/A control last.

    Args:
        contenders: the arms as planned.
        choices: per arm, the chosen hyper-parameters and the tuning trials.
        runs: confirmation runs by arm, the twin's among them, in the order of the seeds.
        equal: runs at "equal-time" and at "equal-examples", for the arms that have any.
        metrics: score names, mapped to whether higher is better.
        ended: per arm but the baseline, the look that ended it.
    """
    at_steps = compared(runs, metrics, ended)
    at_time = compared({**runs, **equal["equal-time"]}, metrics, ended)
    at_examples = compared({**runs, **equal["equal-examples"]}, metrics, ended)
    level, unchanged = target(runs[CONTROL]), choices[BASELINE][1][0].digest
    times = {unit: {c.name: [to(level, run) for run in runs[c.name]] for c in planned} for unit, to in TO.items()}
    raced = _raced(times, ended) if level is not None else {}
    arms = [
        ArmResult(
            name=c.name,
            summary=" + ".join(method.summary for method in c.entries),
            paper=next((method.paper.link for method in c.entries), None),
            hyper=dict(choices[c.name][0]),
            trials=choices[c.name][1],
            runs=runs[c.name],
            equal_time=equal["equal-time"].get(c.name, ()),
            equal_examples=equal["equal-examples"].get(c.name, ()),
            scores=at_steps.get(c.name, {}),
            scores_at_equal_time=at_time.get(c.name, {}),
            scores_at_equal_examples=at_examples.get(c.name, {}),
            time_to_target=times["seconds"][c.name],
            steps_to_target=times["steps"][c.name],
            to_target=raced.get(c.name, {}),
            did_nothing=c.name != BASELINE and choices[c.name][1][0].digest == unchanged != "",
        )
        for c in planned
    ]
    control = "The baseline against itself: same splits, other initialisation and order. It must show no difference."
    return [*arms, ArmResult(CONTROL, control, hyper=arms[0].hyper, runs=runs[CONTROL], scores=at_steps[CONTROL])]


def compared(
    runs: Records, metrics: Mapping[str, bool], ended: Ended, family: int | None = None
) -> dict[str, dict[str, Comparison]]:
    """By arm and score: the comparison with the baseline on the arm's seeds, methods judged as one family.

    Args:
        ended: per arm but the baseline, the look at which it is judged.
        family: number of methods, where those in `runs` are not all.
    """
    found: dict[str, dict[str, Comparison]] = {name: {} for name in runs if name != BASELINE}
    for score, higher in metrics.items():
        relative = score == "loss" and all(v > 0 for name in runs for v in finals(runs[name], score) if v is not None)
        alone = {
            name: paired.compare(
                finals(runs[name], score),
                finals(runs[BASELINE][: len(runs[name])], score),
                score=score,
                higher_is_better=higher,
                relative=relative,
                alpha=ended[name].alpha,
            )
            for name in found
        }
        for name, comparison in _as_family(alone, ended, family).items():
            found[name][score] = comparison
    return found


def _as_family(alone: Mapping[str, Comparison], ended: Ended, family: int | None = None) -> dict[str, Comparison]:
    """Methods judged as one family, look by look; the twin by itself."""
    methods = {name: c for name, c in alone.items() if name != CONTROL}
    judged = dict(alone)
    for analysis in {ended[name] for name in methods}:
        here = {name: c for name, c in methods.items() if ended[name] == analysis}
        judged |= paired.adjust(here, family or len(methods))
    return judged


def _raced(times: Mapping[str, Mapping[str, Sequence[float | None]]], ended: Ended) -> dict[str, dict[str, Comparison]]:
    """By arm and unit: times to target against the baseline's, the methods of each unit judged as one family."""
    found: dict[str, dict[str, Comparison]] = {}
    for unit, by_arm in times.items():
        alone = {
            name: paired.paired_time_to_target(
                own, by_arm[BASELINE][: len(own)], score=f"{unit} to target", alpha=ended[name].alpha
            )
            for name, own in by_arm.items()
            if name != BASELINE
        }
        for name, comparison in _as_family(alone, ended).items():
            found.setdefault(name, {})[unit] = comparison
    return found


def finals(runs: Sequence[RunRecord], score: str) -> list[float | None]:
    """Final test scores, `None` for runs that diverged."""
    values = [run.test.get(score, math.nan) for run in runs]
    return [value if math.isfinite(value) else None for value in values]


def target(control: Sequence[RunRecord]) -> float | None:
    """Median final validation loss of the baseline's twin, what arms race to; `None` where half of its runs diverged.

    Not of the baseline: its runs would then be compared with a target that they have set themselves.
    """
    losses = [loss if math.isfinite(loss := run.val.get("loss", math.inf)) else math.inf for run in control]
    middle = median(losses)
    return middle if math.isfinite(middle) else None


def _first(level: float | None, run: RunRecord) -> Mapping[str, float] | None:
    """The first evaluation at which the validation loss was at most `level`; `None` if it never was."""
    return next((point for point in run.curve if level is not None and point["loss"] <= level), None)


def steps_to(level: float | None, run: RunRecord) -> float | None:
    """Steps until the validation loss was at most `level`; `None` if it never was."""
    point = _first(level, run)
    return None if point is None else point["step"]


def seconds_to(level: float | None, run: RunRecord) -> float | None:
    """The same in CPU seconds, which do not depend on what else the machine does; preparation counts."""
    point = _first(level, run)
    return None if point is None else run.preparation_seconds + point["cpu_seconds"]


TO = {"steps": steps_to, "seconds": seconds_to}


def warnings(study: Study, recipe: Recipe) -> Iterator[str]:
    """What a reader must know before believing the table."""
    control = study.arms[-1].scores[study.primary]
    if control.verdict in paired.DECIDED:
        yield (
            f"The A/A control is not null (p = {control.p:.3f}): by chance in one study of twenty, or because the "
            "seeds are not independent. Repeat with other seeds before you decide."
        )
    pairs, methods = len(study.seeds), len(study.arms) - 2
    if methods and FEWEST_SEEDS <= pairs < seeds_needed(methods):
        needed = seeds_needed(methods)
        yield f"{pairs} seeds cannot show any difference among {methods} methods; it takes at least {needed}."
    yield from _reported(study)
    if recipe.rounds is not None:
        yield "The recipe's rounds own the optimizer, so the baseline was not tuned; add it as a method of its own."
    yield from _wandered(study)
    for arm in study.arms:
        diverged = sum(run.outcome == "diverged" for run in arm.runs)
        if diverged:
            yield f"{arm.name}: {diverged} of {len(arm.runs)} runs diverged; they count as worse than any that did not."


def _reported(study: Study) -> Iterator[str]:
    """How often verdicts were read, where it was more than once."""
    for analysis in study.interim_analyses[:-1]:
        if analysis["decided"]:
            yield (
                f"Decided at the interim analysis after {analysis['pairs']} of "
                f"{study.interim_analyses[-1]['pairs']} pairs: {', '.join(analysis['decided'])}. "
                "The intervals allow for that; the estimates lean away from zero, as those of early stops do."
            )
    if study.earlier:
        yield (
            f"Verdicts were read in this store after {', '.join(map(str, study.earlier))} pairs too. Looking again "
            "with other numbers of pairs makes false verdicts more frequent than 5 %: plan the looks with --sequential."
        )


def _wandered(study: Study) -> Iterator[str]:
    """Whether the load of the machine changed: within arms, as some wait for data or use several threads by nature."""
    ratios = [
        [run.seconds / run.cpu_seconds for run in (*arm.runs, *arm.equal_time) if run.cpu_seconds] for arm in study.arms
    ]
    worst = max((r for r in ratios if r), key=lambda r: max(r) / min(r), default=[1.0])
    if max(worst) > WANDERED * min(worst):
        yield (
            f"The load of the machine changed during the study (wall over CPU seconds from {min(worst):.2f} to "
            f"{max(worst):.2f}). Equal time is counted in CPU seconds, which this hardly changes; still, "
            "trust results at equal time less than those at equal steps."
        )

"""From runs to a study: scores, paired comparisons, verdicts, controls, and what the reader must be warned of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from steep.evidence import statistics
from steep.evidence.contenders import BASELINE, Contender
from steep.evidence.study import Arm, Comparison, RunRecord, Study
from steep.recipe import Recipe

TWIN = "A/A"
WANDERED = 1.5  # wall over CPU seconds: largest over smallest of a study's runs

Records = Mapping[str, Sequence[RunRecord]]


def assemble(
    contenders: Sequence[Contender],
    choices: Mapping[str, tuple[Mapping[str, Any], Sequence[RunRecord]]],
    runs: Records,
    equal_time: Records,
    metrics: Mapping[str, bool],
) -> list[Arm]:
    """The arms of a finished study: the baseline first, the A/A control last.

    Args:
        contenders: the arms as planned.
        choices: per arm, the chosen hyper-parameters and the tuning trials.
        runs: confirmation runs by arm, the twin's among them, in the order of the seeds.
        equal_time: runs at equal time, for the arms that have any.
        metrics: score names, mapped to whether higher is better.
    """
    at_steps = _compared(runs, metrics)
    at_time = _compared({**runs, **equal_time}, metrics)
    level, unchanged = target(runs[BASELINE]), choices[BASELINE][1][0].digest
    arms = [
        Arm(
            name=c.name,
            summary=" + ".join(card.summary for card in c.cards),
            paper=next((card.paper.link for card in c.cards), None),
            hyper=dict(choices[c.name][0]),
            trials=choices[c.name][1],
            runs=runs[c.name],
            equal_time=equal_time.get(c.name, ()),
            scores=at_steps.get(c.name, {}),
            scores_at_equal_time=at_time.get(c.name, {}),
            time_to_target=[time_to(level, run) for run in runs[c.name]],
            did_nothing=c.name != BASELINE and choices[c.name][1][0].digest == unchanged != "",
        )
        for c in contenders
    ]
    twin = "The baseline against itself: same splits, other initialisation and order. It must show no difference."
    return [*arms, Arm(TWIN, twin, hyper=arms[0].hyper, runs=runs[TWIN], scores=at_steps[TWIN])]


def _compared(runs: Records, metrics: Mapping[str, bool]) -> dict[str, dict[str, Comparison]]:
    """By arm and score: the comparison with the baseline, methods judged as one family, the twin by itself."""
    found: dict[str, dict[str, Comparison]] = {name: {} for name in runs if name != BASELINE}
    for score, higher in metrics.items():
        relative = score == "loss" and all(v > 0 for name in runs for v in finals(runs[name], score) if v is not None)
        alone = {
            name: statistics.compare(
                finals(runs[name], score),
                finals(runs[BASELINE], score),
                score=score,
                higher_is_better=higher,
                relative=relative,
            )
            for name in found
        }
        family = statistics.adjust({name: c for name, c in alone.items() if name != TWIN})
        for name in found:
            found[name][score] = family.get(name, alone[name])
    return found


def finals(runs: Sequence[RunRecord], score: str) -> list[float | None]:
    """Final test scores, `None` for runs that diverged."""
    values = [run.test.get(score, math.nan) for run in runs]
    return [value if math.isfinite(value) else None for value in values]


def target(baseline: Sequence[RunRecord]) -> float | None:
    """Median final validation loss of the baseline: what arms race to."""
    losses = [run.val["loss"] for run in baseline if run.val]
    return median(losses) if losses else None


def time_to(level: float | None, run: RunRecord) -> float | None:
    """Training seconds until the validation loss was at most `level`; `None` if it never was."""
    if level is None:
        return None
    return next((point["seconds"] for point in run.curve if point["loss"] <= level), None)


def warnings(study: Study, recipe: Recipe) -> Iterator[str]:
    """What a reader must know before believing the table."""
    twin = study.arms[-1].scores[study.primary]
    if twin.verdict in ("helps", "hurts"):
        yield (
            f"The A/A control is not null (p = {twin.p:.3f}): by chance in one study of twenty, or because the seeds "
            "are not independent. Repeat with other seeds before you decide."
        )
    pairs, methods = len(study.seeds), len(study.arms) - 2
    if methods and statistics.FEWEST_SEEDS <= pairs < statistics.seeds_needed(methods):
        needed = statistics.seeds_needed(methods)
        yield f"{pairs} seeds cannot show any difference among {methods} methods; it takes at least {needed}."
    if recipe.rounds is not None:
        yield "The recipe's rounds own the optimizer, so the baseline was not tuned; add it as a method of its own."
    ratios = [run.seconds / run.cpu_seconds for arm in study.arms for run in arm.runs if run.cpu_seconds]
    if ratios and max(ratios) > WANDERED * min(ratios):
        yield (
            f"The load of the machine changed during the study (wall over CPU seconds from {min(ratios):.2f} to "
            f"{max(ratios):.2f}): trust results at equal time less than those at equal steps."
        )
    for arm in study.arms:
        diverged = sum(run.outcome == "diverged" for run in arm.runs)
        if diverged:
            yield f"{arm.name}: {diverged} of {len(arm.runs)} runs diverged; they count as worse than any that did not."

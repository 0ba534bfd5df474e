"""From runs to a study: scores, paired comparisons, verdicts, controls, and warnings for the reader."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from steep.evidence.arms import Arm
from steep.evidence.statistics import paired
from steep.evidence.statistics.power import FEWEST_SEEDS, seeds_needed
from steep.evidence.statistics.sequential import InterimAnalysis
from steep.evidence.study import BASELINE, CONTROL, ArmResult, Comparison, RunRecord, Study
from steep.evidence.tuning import Tuned
from steep.recipe import Recipe

LOAD_CHANGED = 1.5  # largest over smallest ratio of wall to CPU seconds among an arm's runs

Records = Mapping[str, Sequence[RunRecord]]
StoppedAt = Mapping[str, InterimAnalysis]


def assemble(
    arms: Sequence[Arm],
    tuned: Mapping[str, Tuned],
    runs: Records,
    equal: Mapping[str, Records],
    metrics: Mapping[str, bool],
    stopped_at: StoppedAt,
) -> list[ArmResult]:
    """The arms of a finished study: the baseline first, the A/A control last.

    Args:
        arms: the baseline first.
        tuned: by arm, the chosen hyper-parameters and the tuning trials.
        runs: confirmation runs by arm, the control's among them, in the order of the seeds.
        equal: runs at "equal-time" and at "equal-examples", for the arms that have any.
        metrics: score names, mapped to whether higher is better.
        stopped_at: for each arm but the baseline, the analysis at which it stopped.
    """
    at_steps = compared(runs, metrics, stopped_at)
    at_time = compared({**runs, **equal["equal-time"]}, metrics, stopped_at)
    at_examples = compared({**runs, **equal["equal-examples"]}, metrics, stopped_at)
    level = target(runs[CONTROL])
    times = {unit: {arm.name: [to(level, run) for run in runs[arm.name]] for arm in arms} for unit, to in TO.items()}
    to_target = _to_target(times, stopped_at) if level is not None else {}
    results = [
        ArmResult(
            name=arm.name,
            summary=" + ".join(method.summary for method in arm.entries),
            paper=next((method.paper.link for method in arm.entries), None),
            hyper=dict(tuned[arm.name].hyper),
            trials=tuned[arm.name].trials,
            runs=runs[arm.name],
            equal_time=equal["equal-time"].get(arm.name, ()),
            equal_examples=equal["equal-examples"].get(arm.name, ()),
            scores=at_steps.get(arm.name, {}),
            scores_at_equal_time=at_time.get(arm.name, {}),
            scores_at_equal_examples=at_examples.get(arm.name, {}),
            time_to_target=times["seconds"][arm.name],
            steps_to_target=times["steps"][arm.name],
            to_target=to_target.get(arm.name, {}),
            did_nothing=arm.name != BASELINE
            and _same(tuned[arm.name].trials[0], tuned[BASELINE].trials[0])
            and all(map(_may_be_same, runs[arm.name], runs[BASELINE])),
        )
        for arm in arms
    ]
    what = "The baseline against itself: same splits, other initialisation and order. It must show no difference."
    return [*results, ArmResult(CONTROL, what, hyper=results[0].hyper, runs=runs[CONTROL], scores=at_steps[CONTROL])]


def _same(run: RunRecord, other: RunRecord) -> bool:
    """Whether two runs went the same way and ended with the same scores, bit for bit."""
    went = run.digest == other.digest != ""  # empty where a run diverged
    return went and (run.val, run.test) == (other.val, other.test)


def _may_be_same(run: RunRecord, baseline: RunRecord) -> bool:
    """Whether a pair does not show a difference; under other learning rates it must not be the same."""
    return _same(run, baseline) or (run.outcome == baseline.outcome and run.lr_scale != baseline.lr_scale)


def compared(
    runs: Records, metrics: Mapping[str, bool], stopped_at: StoppedAt, family: int | None = None
) -> dict[str, dict[str, Comparison]]:
    """By arm and score: the comparison with the baseline on the arm's seeds, with the methods judged as one family.

    Args:
        stopped_at: for each arm but the baseline, the analysis at which it is judged.
        family: number of methods in the family, where `runs` does not have all of them.
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
                alpha=stopped_at[name].alpha,
            )
            for name in found
        }
        for name, comparison in _as_family(alone, stopped_at, family).items():
            found[name][score] = comparison
    return found


def _as_family(
    alone: Mapping[str, Comparison], stopped_at: StoppedAt, family: int | None = None
) -> dict[str, Comparison]:
    """Methods judged as one family, analysis by analysis; the control by itself."""
    methods = {name: c for name, c in alone.items() if name != CONTROL}
    judged = dict(alone)
    for analysis in {stopped_at[name] for name in methods}:
        here = {name: c for name, c in methods.items() if stopped_at[name] == analysis}
        judged |= paired.adjust(here, family or len(methods))
    return judged


def _to_target(
    times: Mapping[str, Mapping[str, Sequence[float | None]]], stopped_at: StoppedAt
) -> dict[str, dict[str, Comparison]]:
    """By arm and unit: times to target against the baseline's, with the methods of each unit judged as one family."""
    found: dict[str, dict[str, Comparison]] = {}
    for unit, by_arm in times.items():
        alone = {
            name: paired.paired_time_to_target(
                own, by_arm[BASELINE][: len(own)], score=f"{unit} to target", alpha=stopped_at[name].alpha
            )
            for name, own in by_arm.items()
            if name != BASELINE
        }
        for name, comparison in _as_family(alone, stopped_at).items():
            found.setdefault(name, {})[unit] = comparison
    return found


def finals(runs: Sequence[RunRecord], score: str) -> list[float | None]:
    """Final test scores, `None` for runs that diverged."""
    values = [run.test.get(score, math.nan) for run in runs]
    return [value if math.isfinite(value) else None for value in values]


def target(control: Sequence[RunRecord]) -> float | None:
    """Median final validation loss of the A/A control, the target of all arms; `None` if half of its runs diverged.

    It is not the baseline's, whose runs would then be compared with a target that they have set themselves.
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
    """The same in CPU seconds, which depend little on the load of the machine; preparation counts."""
    point = _first(level, run)
    return None if point is None else run.preparation_seconds + point["cpu_seconds"]


TO = {"steps": steps_to, "seconds": seconds_to}


def warnings(study: Study, recipe: Recipe) -> Iterator[str]:
    """What a reader must know before believing the table."""
    control = study.arms[-1].scores[study.primary]
    if control.verdict in paired.DECIDED:
        yield (
            f"The A/A control differs from the baseline (p = {control.p:.3f}). This happens by chance in one study of "
            "twenty, or because the seeds are not independent. Repeat the study with other seeds before you decide."
        )
    pairs, methods = len(study.seeds), len(study.arms) - 2
    if methods and FEWEST_SEEDS <= pairs < seeds_needed(methods):
        needed = seeds_needed(methods)
        yield f"{pairs} seeds cannot show any difference among {methods} methods; it takes at least {needed}."
    yield from _early_verdicts(study)
    if recipe.rounds is not None:
        yield "The recipe's rounds own the optimizer, so the baseline was not tuned. To tune it, add it as a method."
    yield from _changed_load(study)
    for arm in study.arms:
        diverged = sum(run.outcome == "diverged" for run in arm.runs)
        if diverged:
            yield f"{arm.name}: {diverged} of {len(arm.runs)} runs diverged; they rank below every run that finished."


def _early_verdicts(study: Study) -> Iterator[str]:
    """Which arms an interim analysis decided, and whether verdicts were read before."""
    for analysis in study.interim_analyses[:-1]:
        if analysis["decided"]:
            yield (
                f"Decided at the interim analysis after {analysis['pairs']} of "
                f"{study.interim_analyses[-1]['pairs']} pairs: {', '.join(analysis['decided'])}. "
                "The intervals account for it; the estimates are biased away from zero, as after any early stop."
            )
    if study.earlier:
        yield (
            f"Verdicts of this store were also read after {', '.join(map(str, study.earlier))} pairs. Reading them "
            "again after other numbers of pairs makes false verdicts more frequent than 5 %. Plan such analyses "
            "with --sequential."
        )


def _changed_load(study: Study) -> Iterator[str]:
    """Whether the load of the machine changed, within arms: some of them wait for data or use several threads."""
    ratios = [
        [run.seconds / run.cpu_seconds for run in (*arm.runs, *arm.equal_time) if run.cpu_seconds] for arm in study.arms
    ]
    worst = max((r for r in ratios if r), key=lambda r: max(r) / min(r), default=[1.0])
    if max(worst) > LOAD_CHANGED * min(worst):
        yield (
            f"The load of the machine changed during the study (the ratio of wall to CPU seconds ranged from "
            f"{min(worst):.2f} to {max(worst):.2f}). Equal time is measured in CPU seconds, which the load hardly "
            "changes. Still, trust results at equal time less than those at equal steps."
        )


def analysis_results(
    analyses: Sequence[InterimAnalysis], stopped_at: StoppedAt, runs: Records, score: str
) -> list[dict[str, Any]]:
    """The planned analyses as plain values: which were made, and which arms each decided."""
    methods = {name: analysis for name, analysis in stopped_at.items() if name != CONTROL}
    verdicts = compared(runs, {score: False}, stopped_at) if methods else {}
    decided = {name for name in methods if verdicts[name][score].verdict in paired.DECIDED}
    return [
        {
            **asdict(analysis),
            "made": analysis.alpha > 0 and analysis.pairs <= len(runs[BASELINE]),
            "decided": [name for name in methods if name in decided and methods[name] == analysis],
        }
        for analysis in analyses
    ]

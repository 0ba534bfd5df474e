"""Is a published method better than what you do now, on your training? The protocol, from top to bottom."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from rich.console import Console

from steep.card import cards
from steep.evidence import report, tuning
from steep.evidence.assemble import TWIN, assemble, target, warnings
from steep.evidence.contenders import BASELINE, Contender, MethodLike, contenders, own_card
from steep.evidence.jobs import Check, Job, picture, preflight
from steep.evidence.planning import Plan, choose
from steep.evidence.pool import Failure, Pool
from steep.evidence.progress import StudyProgress
from steep.evidence.source import Source, from_name, from_value
from steep.evidence.statistics import FEWEST_SEEDS, seeds_needed
from steep.evidence.store import Store
from steep.evidence.study import RunRecord, Study
from steep.needs import UnmetNeed
from steep.recipe import Budget, Recipe
from steep.tracking import as_log
from steep.training import NonFinite

TWIN_SEED = 500_000  # the twin's initialisation and order start here; its splits are the baseline's
SAME_TIME = 0.05  # arms within 5 % of the baseline's cost need no runs of their own at equal time


def compare(
    recipe: Recipe | str,
    methods: Sequence[MethodLike] | str,
    *,
    minutes: float | None = None,
    seeds: int | None = None,
    trials: int | None = None,
    workers: int | None = None,
    out: str | os.PathLike[str] = "steep-compare",
    score: str = "loss",
    progress: bool = True,
    command: str = "",
    log: str | None = None,
) -> Study:
    """Compare methods with a recipe, with equal tuning, paired seeds and controls, and write the report.

    Every arm is tuned with the same number of trials; then all arms are trained on fresh seeds that share split,
    initialisation and data order, at equal steps and at equal time. The same call goes on where it was stopped.

    Args:
        recipe: a recipe, a task's name, ``file.py:recipe`` or ``package.module:recipe``.
        methods: ids ("a+b" joins two), ``(id, hyper)`` pairs, cards, functions of a recipe, or "all".
        minutes: plan trials and seeds to fit.
        seeds: paired confirmation seeds; 8 by default. Fewer than 6 give numbers, but no verdict.
        trials: tuning trials per arm; 8 by default.
        workers: processes of one thread each; the number of cores by default.
        out: directory that keeps the runs, the tables and the report.
        score: what verdicts are about: "loss" or the recipe's metric.
        progress: show on standard error what will be run, and how far it is.
        command: what to type to get this study again, for the report.
        log: log every training that is run to this Accelerate tracker ("tensorboard", "wandb", "mlflow", ...), in the
            folder `log` of `out`.

    Raises:
        UnknownName, RecipeError: the recipe or a method cannot be found.
        UnmetNeed, ValueError, TypeError: a method does not fit the recipe.
        StoreError: `out` is a file, not writable, or in use.
        RunError: a training raised.

    Example:
        >>> import steep, tempfile
        >>> with tempfile.TemporaryDirectory() as out:
        ...     tiny = steep.task("digits").replace(budget=steep.Budget(steps=5))
        ...     study = steep.compare(tiny, ["adabelief"], seeds=2, trials=1, workers=1, out=out, progress=False)
        >>> study.arms[2].name, study.arms[2].scores["loss"].verdict
        ('adabelief', 'too few seeds')
    """
    as_log(log)
    named = methods if not isinstance(methods, str) else [methods]
    own = {c.id: c for c in (own_card(m) for m in named if not isinstance(m, (str, tuple)))}
    if isinstance(recipe, str) and own:
        raise ValueError("methods that are functions or cards need the recipe itself, not its name")
    source = from_name(recipe) if isinstance(recipe, str) else from_value(recipe, own)
    loaded, _ = source.load()
    metrics = {"loss": False} | ({loaded.metric.name: loaded.metric.higher_is_better} if loaded.metric else {})
    if score not in metrics:
        raise ValueError(f"score={score!r} is not among this recipe's scores: {', '.join(metrics)}")
    wanted = [c.id for c in cards().values() if c.plug is not None] if methods == "all" else named
    arms, workers = contenders(loaded, wanted), workers or os.cpu_count() or 1
    console = Console(stderr=True, quiet=not progress)
    store = Store(out)
    with store.lock(), StudyProgress(console) as bar, Pool(source, store, workers, bar.done, log) as pool:
        comparison = _Comparison(loaded, source, store, pool, arms)
        checks, left_out = comparison.check(lenient=methods == "all")
        steps = comparison.fix_steps(checks[BASELINE])
        cost = {name: c.step_seconds * steps + c.other_seconds for name, c in checks.items()}
        tuned = {arm.name: bool(arm.space) for arm in comparison.arms}
        plan = choose(cost, tuned, workers, minutes=minutes, trials=trials, seeds=seeds)
        console.print(_announcement(plan, comparison.arms, left_out, workers))
        bar.expect(plan.runs)
        choices = comparison.tune(plan, score, metrics[score])
        chosen = {name: choice for name, (choice, _) in choices.items()}
        runs = comparison.confirm(chosen, range(plan.seeds))
        equal_time = comparison.at_equal_time(chosen, runs, steps)
    study = Study(
        recipe=loaded.name,
        source=source.name if isinstance(recipe, str) else "",
        arms=assemble(comparison.arms, choices, runs, equal_time, metrics),
        primary=score,
        metrics=metrics,
        seeds=list(range(plan.seeds)),
        left_out=left_out,
        target_loss=target(runs[BASELINE]),
        target_picture=picture(loaded, None, store, "target") if loaded.picture else None,
        command=command,
    )
    study = replace(study, warnings=list(warnings(study, loaded)))
    store.put_study(study)
    report.write(study, store.directory)
    return study


@dataclass
class _Comparison:
    """The steps of the protocol, over one recipe and one store."""

    recipe: Recipe
    source: Source
    store: Store
    pool: Pool
    arms: list[Contender]

    def check(self, lenient: bool) -> tuple[dict[str, Check], dict[str, str]]:
        """Train every arm for a moment. Arms that do not fit are left out if `lenient`, else the error is raised."""
        results = self.pool.apply(preflight, [(arm, self.source) for arm in self.arms])
        found = {arm.name: result for arm, result in zip(self.arms, results, strict=True)}
        errors = {name: error for name, error in found.items() if isinstance(error, Failure)}
        checks = {name: check for name, check in found.items() if isinstance(check, Check)}
        for name, error in errors.items():
            if error.kind == NonFinite.__name__ and name != BASELINE:
                checks[name] = checks[BASELINE]  # diverging with the defaults is a result, not a misfit
            elif name == BASELINE or not lenient:
                raise (UnmetNeed if error.kind == UnmetNeed.__name__ else ValueError)(f"{name}: {error.message}")
        self.arms = [arm for arm in self.arms if arm.name in checks]
        return checks, {name: errors[name].message for name in found if name not in checks}

    def fix_steps(self, check: Check) -> int:
        """Steps of every run at equal steps. A budget in seconds becomes what the baseline can do in that time."""
        if check.total_steps is None:
            steps = max(1, round((self.recipe.budget.seconds or 0) / check.step_seconds))
            self.recipe = self.recipe.replace(budget=Budget(steps=steps))
            return steps
        self.recipe = self.recipe.replace(budget=replace(self.recipe.budget, seconds=None))
        return check.total_steps

    def tune(self, plan: Plan, score: str, higher: bool) -> dict[str, tuple[dict[str, Any], list[RunRecord]]]:
        """For each arm, what to set its hyper-parameters to, and the trials that say so."""
        return {arm.name: self._tune(arm, plan, score, higher) for arm in self.arms}

    def _tune(self, arm: Contender, plan: Plan, score: str, higher: bool) -> tuple[dict[str, Any], list[RunRecord]]:
        context = f"{self.source.hash} {self.pool.code(self._job(arm, 'tune', {}, 0))} {self.recipe.budget}"
        study = tuning.open_study(self.store.directory, arm, context)
        tried = tuning.proposals(study, arm, plan.trials)
        trials = self.pool.run([self._job(arm, "tune", chosen, tuning.FIRST_SEED) for chosen in tried])
        costs = [tuning.cost(trial, score, higher) for trial in trials]
        tuning.tell(study, costs)
        last = tuning.finalists(costs, plan.trials)
        seeds = range(tuning.FIRST_SEED + 1, tuning.FIRST_SEED + 1 + tuning.EXTRA_SEEDS)
        more = self.pool.run([self._job(arm, "tune", tried[i], seed) for seed in seeds for i in last])
        again = {i: [tuning.cost(r, score, higher) for r in more[k :: len(last)]] for k, i in enumerate(last)}
        return tried[tuning.best(costs, again)], trials

    def _job(self, contender: Contender, role: str, chosen: Mapping[str, Any], seed: int, **changes: Any) -> Job:
        methods, lr_scale = contender.settings(chosen)
        return replace(Job(contender.name, role, methods, seed, seed, self.recipe.budget, lr_scale), **changes)

    def confirm(self, chosen: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, list[RunRecord]]:
        """Every arm and the baseline's twin on fresh paired seeds, seed by seed, so that drift hits all arms alike."""
        baseline = self.arms[0]
        twin = [self._job(baseline, "twin", chosen[BASELINE], TWIN_SEED + s, split_seed=s, arm=TWIN) for s in seeds]
        jobs = [self._job(arm, "confirm", chosen[arm.name], s) for s in seeds for arm in self.arms]
        return _by_arm(self.pool.run([*jobs, *twin]))

    def at_equal_time(
        self, chosen: Mapping[str, Mapping[str, Any]], runs: Mapping[str, list[RunRecord]], steps: int
    ) -> dict[str, list[RunRecord]]:
        """Arms that cost more or less than the baseline, once more, with as many steps as fit into its time."""
        ratios = {arm.name: cost_ratio(runs[arm.name], runs[BASELINE]) for arm in self.arms[1:]}
        other = [arm for arm in self.arms[1:] if (r := ratios[arm.name]) and abs(r - 1) > SAME_TIME]
        budgets = {arm.name: Budget(steps=max(1, round(steps / (ratios[arm.name] or 1)))) for arm in other}
        seeds = [r.seed for r in runs[BASELINE]]
        return _by_arm(
            self.pool.run(
                [
                    self._job(arm, "equal-time", chosen[arm.name], s, budget=budgets[arm.name])
                    for s in seeds
                    for arm in other
                ]
            )
        )


def cost_ratio(runs: Sequence[RunRecord], baseline: Sequence[RunRecord]) -> float | None:
    """Median over the seeds of the CPU seconds of an arm over those of the baseline; None if no pair finished."""
    pairs = [(a.cpu_seconds, b.cpu_seconds) for a, b in zip(runs, baseline, strict=True) if a.seconds and b.seconds]
    return median(a / b for a, b in pairs) if pairs else None


def _by_arm(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    found: dict[str, list[RunRecord]] = {}
    for record in records:
        found.setdefault(record.arm, []).append(record)
    return found


def _announcement(plan: Plan, arms: Sequence[Contender], left_out: Mapping[str, str], workers: int) -> str:
    lines = [
        f"{plan.runs} trainings of {', '.join(a.name for a in arms)} and an A/A control: "
        f"{plan.trials} tuning trials an arm, then {plan.seeds} paired seeds, at equal steps and at equal time.",
        f"About {plan.seconds / 60:.1f} minutes with {workers} worker{'s' if workers > 1 else ''}.",
        _power(plan, max(1, len(arms) - 1)),
    ]
    return "\n".join(lines + [f"Left out: {name}: {reason}" for name, reason in left_out.items()])


def _power(plan: Plan, methods: int) -> str:
    """What the seeds can show, in a sentence."""
    if plan.seeds < FEWEST_SEEDS:
        return f"{plan.seeds} seeds give numbers, but no verdict: that takes at least {FEWEST_SEEDS}."
    if plan.seeds < seeds_needed(methods):
        return f"{plan.seeds} seeds cannot show a difference among {methods} methods: it takes {seeds_needed(methods)}."
    return f"It can show differences of {plan.effect:.1f} standard deviations (of the paired difference) or more."

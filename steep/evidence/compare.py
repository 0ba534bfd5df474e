"""Is a published method better than what you do now, on your training? The protocol, from top to bottom."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console

from steep.evidence import tuning
from steep.evidence.arms import BASELINE, Arm, MethodLike, make_arms, own_method
from steep.evidence.assemble import CONTROL, assemble, compared, target, warnings
from steep.evidence.budgets import in_its_time, on_its_examples, steps_for
from steep.evidence.planning import Plan, agreed
from steep.evidence.report import page
from steep.evidence.runs.dry_runs import DryRuns
from steep.evidence.runs.jobs import Check, Job, dry_run, picture
from steep.evidence.runs.progress import StudyProgress
from steep.evidence.runs.shared import Agree, alone, join
from steep.evidence.runs.source import Source, from_name, from_value
from steep.evidence.runs.store import Store
from steep.evidence.runs.workers import Failure, Workers
from steep.evidence.statistics.paired import DECIDED
from steep.evidence.statistics.power import FEWEST_SEEDS, seeds_needed
from steep.evidence.statistics.sequential import InterimAnalysis, followed
from steep.evidence.study import Comparison, RunRecord, Study
from steep.loop.tracking import as_log
from steep.loop.training import NonFinite
from steep.method import methods as all_methods
from steep.recipe import Budget, Recipe
from steep.requires import UnmetRequirement

CONTROL_SEED = 500_000  # the twin's initialisation and order start here; its splits are the baseline's
EQUAL = {"equal-time": in_its_time, "equal-examples": on_its_examples}


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
    sequential: bool = False,
    progress: bool = True,
    command: str = "",
    log: str | None = None,
    storage: str | None = None,
) -> Study:
    """Compare methods with a recipe, with equal tuning, paired seeds and controls, and write the report.

    Every arm is tuned with the same number of trials; then all arms are trained on fresh seeds that share split,
    initialisation and data order, at equal steps, at equal time and, where a method sees others, at equal numbers of
    examples. The same call goes on where it was stopped.

    Args:
        recipe: a recipe, a task's name, ``file.py:recipe`` or ``package.module:recipe``.
        methods: ids ("a+b" joins two), ``(id, hyper)`` pairs, `Method` objects, functions of a recipe, or "all".
        minutes: plan trials and seeds to fit.
        seeds: paired confirmation seeds; 8 by default (16 if `sequential`). Fewer than 6 give numbers, but no verdict.
        trials: tuning trials per arm; 8 by default.
        workers: processes of one thread each; the number of cores by default.
        out: directory that keeps the runs, the tables and the report.
        score: what verdicts are about: "loss" or the recipe's metric.
        sequential: look at a quarter, half and all of the seeds, and end arms that are decided before; false verdicts
            stay at 5 % in all. Worth it where effects are large.
        progress: show on standard error what will be run, and how far it is.
        command: what to type to get this study again, for the report.
        log: log every training that is run to this Accelerate tracker ("tensorboard", "wandb", "mlflow", ...), in the
            folder `log` of `out`.
        storage: URL of a database (``sqlite:///FILE``, ``postgresql://USER@HOST/DATABASE``), to share the trainings
            with all who make the same call with it, each with an `out` of its own.

    Raises:
        UnknownName, RecipeError: the recipe or a method cannot be found.
        UnmetRequirement, ValueError, TypeError: a method does not fit the recipe.
        StoreError: `out` is a file, not writable, or in use; `storage` is no URL or cannot be reached.
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
    own = {c.id: c for c in (own_method(m) for m in named if not isinstance(m, (str, tuple)))}
    if isinstance(recipe, str) and own:
        raise ValueError("methods that are functions or `Method` objects need the recipe itself, not its name")
    source = from_name(recipe) if isinstance(recipe, str) else from_value(recipe, own)
    loaded, _ = source.load()
    metrics = {"loss": False} | ({loaded.metric.name: loaded.metric.higher_is_better} if loaded.metric else {})
    if score not in metrics:
        raise ValueError(f"score={score!r} is not among this recipe's scores: {', '.join(metrics)}")
    wanted = [c.id for c in all_methods().values() if c.is_arm] if methods == "all" else named
    arms, workers = make_arms(loaded, wanted), workers or os.cpu_count() or 1
    console = Console(stderr=True, quiet=not progress)
    joined = join(storage, f"steep {loaded.name[:100]} {source.hash}") if storage is not None else nullcontext()
    store = Store(out)
    with (
        joined as shared,
        store.lock(),
        StudyProgress(console) as bar,
        Workers(source, store, workers, bar.done, log, shared) as pool,
    ):
        store.put_source(source.hash, source.text())
        if command:
            store.put_command(command)
        agree = shared.agree if shared else alone
        comparison = _Comparison(loaded, source, store, pool, arms, agree)
        checks, left_out = comparison.check(lenient=methods == "all")
        steps = comparison.fix_steps(checks[BASELINE])
        cost = {name: c.step_seconds * steps + c.other_seconds for name, c in checks.items()}
        tuned = {arm.name: bool(arm.search_space) for arm in comparison.arms}
        plan = agreed(agree, cost, tuned, workers, minutes=minutes, trials=trials, seeds=seeds, sequential=sequential)
        console.print(_announcement(plan, comparison.arms, left_out, workers))
        bar.expect(plan.runs)
        choices = comparison.tune(plan, score, metrics[score])
        chosen = {name: choice for name, (choice, _) in choices.items()}
        runs, ended = comparison.confirm(chosen, plan.interim_analyses, score, metrics[score])
        equal = {role: comparison.at_equal(role, chosen, runs) for role in EQUAL}
    study = Study(
        recipe=loaded.name,
        source=source.name if isinstance(recipe, str) else "",
        arms=assemble(comparison.arms, choices, runs, equal, metrics, ended),
        primary=score,
        metrics=metrics,
        seeds=[run.seed for run in runs[BASELINE]],
        left_out=left_out,
        target_loss=target(runs[CONTROL]),
        target_picture=picture(loaded, None, store, "target") if loaded.picture else None,
        interim_analyses=_analyses(plan.interim_analyses, ended, runs, score),
        command=command,
    )
    study = replace(study, earlier=_earlier(store, study))
    study = replace(study, warnings=list(warnings(study, loaded)))
    store.put_study(study)
    page.write(study, store.directory)
    return study


@dataclass
class _Comparison:
    """The steps of the protocol, over one recipe and one store."""

    recipe: Recipe
    source: Source
    store: Store
    pool: Workers
    arms: list[Arm]
    agree: Agree = alone

    def check(self, lenient: bool) -> tuple[dict[str, Check], dict[str, str]]:
        """Train every arm for a moment. Arms that do not fit are left out if `lenient`, else the error is raised."""
        found = self._dry_runs()
        errors = {name: error for name, error in found.items() if isinstance(error, Failure)}
        checks = {name: check for name, check in found.items() if isinstance(check, Check)}
        for name, error in errors.items():
            if error.kind == NonFinite.__name__ and name != BASELINE:
                checks[name] = checks[BASELINE]  # diverging with the defaults is a result, not a misfit
            elif name == BASELINE or not lenient:
                raise (UnmetRequirement if error.kind == UnmetRequirement.__name__ else ValueError)(
                    f"{name}: {error.message}"
                )
        self.arms = [arm for arm in self.arms if arm.name in checks]
        return checks, {name: errors[name].message for name in found if name not in checks}

    def _dry_runs(self) -> dict[str, Check | Failure]:
        """By arm; measured once for a store, so that a comparison which goes on is planned as it was."""
        first = {arm.name: self._job(arm, "dry-run", arm.defaults(), 0) for arm in self.arms}
        keys = {name: job.key(self.source, self.pool.code(job)) for name, job in first.items()}
        known = DryRuns(self.store.directory, keys, self.agree)
        missing = [arm for arm in self.arms if arm.name not in known.checks]
        results = self.pool.apply(dry_run, [(arm, self.source) for arm in missing])
        known.add({arm.name: r for arm, r in zip(missing, results, strict=True) if isinstance(r, Check)})
        fresh = {arm.name: result for arm, result in zip(missing, results, strict=True)}
        return {arm.name: known.checks.get(arm.name) or fresh[arm.name] for arm in self.arms}

    def fix_steps(self, check: Check) -> int:
        """Steps of every run at equal steps. A limit in seconds becomes what the baseline can do in that time."""
        budget = self.recipe.budget
        in_time = max(1, round(budget.seconds / check.step_seconds)) if budget.seconds else None
        if in_time is None or (check.total_steps is not None and check.total_steps <= in_time):
            assert check.total_steps is not None  # a budget has a limit
            self.recipe = self.recipe.replace(budget=replace(budget, seconds=None))
            return check.total_steps
        self.recipe = self.recipe.replace(budget=Budget(steps=in_time))
        return in_time

    def tune(self, plan: Plan, score: str, higher: bool) -> dict[str, tuple[dict[str, Any], list[RunRecord]]]:
        """For each arm, what to set its hyper-parameters to, and the trials that say so.

        The trials of all arms are run together, so that no worker idles at the end of each arm.
        """
        tried = {arm.name: self._proposed(arm, plan.trials) for arm in self.arms}
        trials = self._tried(tried, [tuning.FIRST_SEED])
        costs = {name: [tuning.cost(trial, score, higher) for trial in found] for name, found in trials.items()}
        for arm in self.arms:
            tuning.keep(self.store.directory, arm, self._context(arm), tried[arm.name], costs[arm.name])
        last = {name: tuning.finalists(found, plan.trials) for name, found in costs.items()}
        seeds = range(tuning.FIRST_SEED + 1, tuning.FIRST_SEED + 1 + tuning.EXTRA_SEEDS)
        more = self._tried({name: [tried[name][i] for i in chosen] for name, chosen in last.items()}, seeds)
        again = {name: [tuning.cost(r, score, higher) for r in found] for name, found in more.items()}
        best = {name: tuning.best(costs[name], tuning.by_trial(last[name], again.get(name, []))) for name in tried}
        return {name: (tried[name][i], trials[name]) for name, i in best.items()}

    def _context(self, arm: Arm) -> str:
        return f"{self.source.hash} {self.pool.code(self._job(arm, 'tune', {}, 0))} {self.recipe.budget}"

    def _proposed(self, arm: Arm, trials: int) -> list[dict[str, Any]]:
        return self.agree(f"{trials} trials of {arm.name}, {self._context(arm)}", tuning.proposals(arm, trials))

    def _tried(self, chosen: Mapping[str, list[dict[str, Any]]], seeds: Sequence[int]) -> dict[str, list[RunRecord]]:
        """By arm, seed by seed."""
        arms = [(arm, hyper) for arm in self.arms for hyper in chosen[arm.name]]
        return _by_arm(self.pool.run([self._job(arm, "tune", hyper, seed) for seed in seeds for arm, hyper in arms]))

    def _job(self, make_arm: Arm, role: str, chosen: Mapping[str, Any], seed: int, **changes: Any) -> Job:
        methods, lr_scale = make_arm.settings(chosen)
        return replace(Job(make_arm.name, role, methods, seed, seed, self.recipe.budget, lr_scale), **changes)

    def confirm(
        self, chosen: Mapping[str, Mapping[str, Any]], analyses: Sequence[InterimAnalysis], score: str, higher: bool
    ) -> tuple[dict[str, list[RunRecord]], dict[str, InterimAnalysis]]:
        """Every arm and the baseline's twin on fresh paired seeds, up to the looks that end them; and these looks."""
        runs: dict[str, list[RunRecord]] = {name: [] for name in (*(arm.name for arm in self.arms), CONTROL)}
        methods = [arm.name for arm in self.arms[1:]]

        def judged(analysis: InterimAnalysis, going: Sequence[str]) -> dict[str, Comparison]:
            for record in self.pool.run(self._pairs(chosen, going, range(len(runs[BASELINE]), analysis.pairs))):
                runs[record.arm].append(record)
            pairs = {name: runs[name] for name in (BASELINE, *going)}
            found = compared(pairs, {score: higher}, dict.fromkeys(going, analysis), len(methods))
            return {name: comparisons[score] for name, comparisons in found.items()}

        ended = followed(analyses, methods, judged)
        last = next(analysis for analysis in analyses if analysis.pairs == len(runs[BASELINE]))
        return runs, ended | {CONTROL: last}

    def _pairs(self, chosen: Mapping[str, Mapping[str, Any]], going: Sequence[str], seeds: Sequence[int]) -> list[Job]:
        """Seed by seed, so that drift of the machine hits all arms alike."""
        baseline, *others = self.arms
        arms = [baseline, *(arm for arm in others if arm.name in going)]
        jobs = [[self._job(arm, "confirm", chosen[arm.name], s) for arm in arms] for s in seeds]
        control = [
            self._job(baseline, "aa-control", chosen[BASELINE], CONTROL_SEED + s, split_seed=s, arm=CONTROL)
            for s in seeds
        ]
        return [job for same_seed, control in zip(jobs, control, strict=True) for job in (*same_seed, control)]

    def at_equal(
        self, role: str, chosen: Mapping[str, Mapping[str, Any]], runs: Mapping[str, list[RunRecord]]
    ) -> dict[str, list[RunRecord]]:
        """Arms whose time (or examples) differ from the baseline's, once more on their seeds, with steps that fit."""
        steps = {arm.name: steps_for(EQUAL[role], runs[arm.name], runs[BASELINE]) for arm in self.arms[1:]}
        jobs = [
            self._job(arm, role, chosen[arm.name], run.seed, budget=Budget(steps=n))
            for i, run in enumerate(runs[BASELINE])
            for arm in self.arms[1:]
            if (n := steps[arm.name]) and i < len(runs[arm.name])
        ]
        return _by_arm(self.pool.run(jobs))


def _by_arm(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    found: dict[str, list[RunRecord]] = {}
    for record in records:
        found.setdefault(record.arm, []).append(record)
    return found


def _analyses(
    analyses: Sequence[InterimAnalysis],
    ended: Mapping[str, InterimAnalysis],
    runs: Mapping[str, list[RunRecord]],
    score: str,
) -> list[dict[str, Any]]:
    """The planned looks as plain values: which were made, and which arms each decided."""
    methods = {name: analysis for name, analysis in ended.items() if name != CONTROL}
    verdicts = compared(runs, {score: False}, ended) if methods else {}
    decided = {name for name in methods if verdicts[name][score].verdict in DECIDED}
    return [
        {
            **asdict(analysis),
            "made": analysis.alpha > 0 and analysis.pairs <= len(runs[BASELINE]),
            "decided": [name for name in methods if name in decided and methods[name] == analysis],
        }
        for analysis in analyses
    ]


def _earlier(store: Store, study: Study) -> list[int]:
    """Numbers of pairs after which verdicts about these very runs were read in this store before."""
    if not (store.directory / "study.json").exists():
        return []
    before = store.study()
    if before.arms[0].runs[0].key != study.arms[0].runs[0].key:
        return []
    return sorted({*before.earlier, len(before.seeds)} - {len(study.seeds)})


def _announcement(plan: Plan, arms: Sequence[Arm], left_out: Mapping[str, str], workers: int) -> str:
    lines = [
        f"{plan.runs} trainings of {', '.join(a.name for a in arms)} and an A/A control: "
        f"{plan.trials} tuning trials an arm, then {plan.seeds} paired seeds, at equal steps, time and examples.",
        *([_design(plan)] if len(plan.interim_analyses) > 1 else []),
        f"About {plan.seconds / 60:.1f} minutes with {workers} worker{'s' if workers > 1 else ''}.",
        _power(plan, max(1, len(arms) - 1)),
    ]
    return "\n".join(lines + [f"Left out: {name}: {reason}" for name, reason in left_out.items()])


def _design(plan: Plan) -> str:
    """The looks, and what each may spend, in a sentence."""
    analyses = [
        f"{analysis.pairs} pairs ({100 * analysis.alpha:.1f} %)" for analysis in plan.interim_analyses if analysis.alpha
    ]
    idle = [str(analysis.pairs) for analysis in plan.interim_analyses if not analysis.alpha]
    nothing = f" {' and '.join(idle)} pairs are too few to decide anything." if idle else ""
    return f"Verdicts are read after {' and '.join(analyses)}, 5 % in all; arms that are decided stop.{nothing}"


def _power(plan: Plan, methods: int) -> str:
    """What the seeds can show, in a sentence."""
    if plan.seeds < FEWEST_SEEDS:
        return f"{plan.seeds} seeds give numbers, but no verdict: that takes at least {FEWEST_SEEDS}."
    if plan.seeds < seeds_needed(methods):
        return f"{plan.seeds} seeds cannot show a difference among {methods} methods: it takes {seeds_needed(methods)}."
    return f"It can show differences of {plan.effect:.1f} standard deviations (of the paired difference) or more."

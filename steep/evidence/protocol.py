"""The steps of a comparison: dry runs, plan, tuning, confirmation on paired seeds, runs at equal time and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from steep.evidence import tuning
from steep.evidence.arms import Arm
from steep.evidence.assemble import compared
from steep.evidence.budgets import at_equal_examples, at_equal_time, steps_for
from steep.evidence.fitting import misfits
from steep.evidence.planning import Plan, agreed, fixed_budget
from steep.evidence.runs.dry_runs import DryRuns
from steep.evidence.runs.jobs import DryRun, Job, dry_run
from steep.evidence.runs.shared import Agree
from steep.evidence.runs.source import Source
from steep.evidence.runs.store import Store
from steep.evidence.runs.workers import Failure, Traceback, Workers
from steep.evidence.statistics.sequential import InterimAnalysis, stopping_points
from steep.evidence.study import BASELINE, CONTROL, Comparison, RunRecord
from steep.evidence.tuning import Tuned
from steep.loop.training import NonFinite, RunError
from steep.method import Method
from steep.recipe import Budget, Recipe
from steep.requires import UnmetRequirement

CONTROL_SEED = 500_000  # the control's initialisation and order start here; its splits are the baseline's
STEP_RULES = {"equal-time": at_equal_time, "equal-examples": at_equal_examples}  # by role

Records = dict[str, list[RunRecord]]


class Confirmation(NamedTuple):
    """Confirmation runs by arm, and the analysis at which each arm but the baseline stopped."""

    runs: Records
    stopped_at: Mapping[str, InterimAnalysis]


@dataclass
class Protocol:
    """The steps of a comparison over one recipe and one store, in the order in which `compare` takes them."""

    recipe: Recipe
    source: Source
    store: Store
    workers: Workers
    arms: list[Arm]
    score: str
    higher_is_better: bool
    agree: Agree
    own: Mapping[str, Method]

    # Dry runs and plan -----------------------------------------------------------------------------------------------

    def dry_run(self, lenient: bool) -> tuple[dict[str, DryRun], dict[str, str]]:
        """Train every arm for a moment. Arms that do not fit are left out if `lenient`; else their error is raised."""
        found = self._dry_runs()
        errors = {name: error for name, error in found.items() if isinstance(error, Failure)}
        dry_runs = {name: run for name, run in found.items() if isinstance(run, DryRun)}
        for name, error in errors.items():
            if error.kind == NonFinite.__name__ and name != BASELINE:
                dry_runs[name] = dry_runs[BASELINE]  # diverging with the defaults is a result, not a misfit
            elif name == BASELINE or not lenient:
                kind = UnmetRequirement if error.kind == UnmetRequirement.__name__ else RunError
                raise kind(f"{name}: {error.message}") from Traceback(error.traceback)
        self.arms = [arm for arm in self.arms if arm.name in dry_runs]
        return dry_runs, {name: errors[name].message for name in found if name not in dry_runs}

    def leave_out(self, lenient: bool) -> dict[str, str]:
        """Leave out, or refuse, the arms that one batch shows not to fit: sooner than workers are there to try them."""
        found = misfits(self.recipe, self.own, self.arms)
        if found and not lenient:
            name, error = next(iter(found.items()))
            raise type(error)(f"{name}: {error}")
        self.arms = [arm for arm in self.arms if arm.name not in found]
        return {name: str(error) for name, error in found.items()}

    def _dry_runs(self) -> dict[str, DryRun | Failure]:
        """By arm. They are measured once for a store, so that a resumed comparison gets the same plan."""
        first = {arm.name: self._job(arm, "dry-run", arm.defaults(), 0) for arm in self.arms}
        keys = {name: job.key(self.source, self.workers.code(job)) for name, job in first.items()}
        kept = DryRuns(self.store.directory, keys, self.agree)
        missing = [arm for arm in self.arms if arm.name not in kept.known]
        results = self.workers.apply(dry_run, [(arm, self.source) for arm in missing])
        fresh = {arm.name: result for arm, result in zip(missing, results, strict=True)}
        kept.add({name: result for name, result in fresh.items() if isinstance(result, DryRun)})
        return {arm.name: kept.known.get(arm.name) or fresh[arm.name] for arm in self.arms}

    def plan(self, dry_runs: Mapping[str, DryRun], **limits: Any) -> Plan:
        """Trials and seeds within the limits (see `planning.agreed`); fixes the steps of all runs at equal steps."""
        steps, budget = fixed_budget(self.recipe.budget, dry_runs[BASELINE])
        self.recipe = self.recipe.replace(budget=budget)
        seconds = {name: run.step_seconds * steps + run.other_seconds for name, run in dry_runs.items()}
        tuned = {arm.name: bool(arm.search_space) for arm in self.arms}
        return agreed(self.agree, seconds, tuned, self.workers.count, **limits)

    # Tuning ----------------------------------------------------------------------------------------------------------

    def tune(self, trials: int) -> dict[str, Tuned]:
        """For each arm the chosen setting, and the trials that it was chosen from.

        The trials of all arms are run together, so that no worker idles at the end of each arm.
        """
        tried = {arm.name: self._proposed(arm, trials) for arm in self.arms}
        records = self._tried(tried, [tuning.FIRST_SEED])
        costs = {name: [self._cost(record) for record in found] for name, found in records.items()}
        storage = tuning.database(self.store.directory)
        for arm in self.arms:
            tuning.keep(storage, arm, self._context(arm), tried[arm.name], costs[arm.name])
        last = {name: tuning.finalists(found, trials) for name, found in costs.items()}
        seeds = range(tuning.FIRST_SEED + 1, tuning.FIRST_SEED + 1 + tuning.EXTRA_SEEDS)
        more = self._tried({name: [tried[name][i] for i in chosen] for name, chosen in last.items()}, seeds)
        again = {name: [self._cost(record) for record in found] for name, found in more.items()}
        best = {name: tuning.best(costs[name], tuning.by_trial(last[name], again.get(name, []))) for name in tried}
        return {name: Tuned(tried[name][i], records[name]) for name, i in best.items()}

    def _proposed(self, arm: Arm, trials: int) -> list[dict[str, Any]]:
        return self.agree(f"{trials} trials of {arm.name}, {self._context(arm)}", tuning.proposals(arm, trials))

    def _context(self, arm: Arm) -> str:
        return f"{self.source.hash} {self.workers.code(self._job(arm, 'tune', {}, 0))} {self.recipe.budget}"

    def _tried(self, settings: Mapping[str, list[dict[str, Any]]], seeds: Sequence[int]) -> Records:
        """By arm, seed by seed."""
        arms = [(arm, hyper) for arm in self.arms for hyper in settings[arm.name]]
        return _by_arm(self.workers.run([self._job(arm, "tune", hyper, seed) for seed in seeds for arm, hyper in arms]))

    def _cost(self, record: RunRecord) -> float:
        return tuning.cost(record, self.score, self.higher_is_better)

    # Confirmation ----------------------------------------------------------------------------------------------------

    def confirm(self, tuned: Mapping[str, Tuned], analyses: Sequence[InterimAnalysis]) -> Confirmation:
        """Every arm and the A/A control on fresh paired seeds, each up to the interim analysis that stops it."""
        runs: Records = {name: [] for name in (*(arm.name for arm in self.arms), CONTROL)}
        methods = [arm.name for arm in self.arms[1:]]

        def judged(analysis: InterimAnalysis, going: Sequence[str]) -> dict[str, Comparison]:
            for record in self.workers.run(self._pairs(tuned, going, range(len(runs[BASELINE]), analysis.pairs))):
                runs[record.arm].append(record)
            pairs = {name: runs[name] for name in (BASELINE, *going)}
            metrics = {self.score: self.higher_is_better}
            found = compared(pairs, metrics, dict.fromkeys(going, analysis), len(methods))
            return {name: comparisons[self.score] for name, comparisons in found.items()}

        stopped_at = stopping_points(analyses, methods, judged)
        last = next(analysis for analysis in analyses if analysis.pairs == len(runs[BASELINE]))
        return Confirmation(runs, {**stopped_at, CONTROL: last})

    def _pairs(self, tuned: Mapping[str, Tuned], going: Sequence[str], seeds: Sequence[int]) -> list[Job]:
        """Seed by seed, so that drift of the machine hits all arms alike."""
        baseline, *others = self.arms
        arms = [baseline, *(arm for arm in others if arm.name in going)]
        return [
            job
            for seed in seeds
            for job in (
                *(self._job(arm, "confirm", tuned[arm.name].hyper, seed) for arm in arms),
                self._control_job(tuned[BASELINE].hyper, seed),
            )
        ]

    def _control_job(self, hyper: Mapping[str, Any], seed: int) -> Job:
        """The baseline once more, on the split of `seed` with another initialisation and order."""
        job = self._job(self.arms[0], "aa-control", hyper, CONTROL_SEED + seed)
        return replace(job, split_seed=seed, arm=CONTROL)

    def at_equal(self, role: str, tuned: Mapping[str, Tuned], runs: Mapping[str, Sequence[RunRecord]]) -> Records:
        """Arms whose time (or examples) differ from the baseline's, once more on their seeds, with steps that fit."""
        steps = {arm.name: steps_for(STEP_RULES[role], runs[arm.name], runs[BASELINE]) for arm in self.arms[1:]}
        jobs = [
            replace(self._job(arm, role, tuned[arm.name].hyper, run.seed), budget=Budget(steps=n))
            for i, run in enumerate(runs[BASELINE])
            for arm in self.arms[1:]
            if (n := steps[arm.name]) and i < len(runs[arm.name])
        ]
        return _by_arm(self.workers.run(jobs))

    def _job(self, arm: Arm, role: str, chosen: Mapping[str, Any], seed: int) -> Job:
        methods, lr_scale = arm.settings(chosen)
        return Job(arm.name, role, methods, seed, seed, self.recipe.budget, lr_scale)


def _by_arm(records: Sequence[RunRecord]) -> Records:
    found: Records = {}
    for record in records:
        found.setdefault(record.arm, []).append(record)
    return found

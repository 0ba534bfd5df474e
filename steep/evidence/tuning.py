"""Equal tuning for every arm: the published defaults, then scrambled Sobol points over the arm's space."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import QMCSampler
from optuna.trial import TrialState

from steep.card import Choice, Range
from steep.evidence.contenders import Contender
from steep.evidence.study import RunRecord

FIRST_SEED = 1_000_000  # tuning seeds start here; confirmation never uses them
EXTRA_SEEDS = 2  # on which the finalists are run again


def distribution(values: Range | Choice) -> BaseDistribution:
    """Optuna's name for a range."""
    if isinstance(values, Choice):
        return CategoricalDistribution(values.options)
    if values.integer:
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def open_study(directory: Path, arm: Contender, context: str) -> optuna.Study:
    """The arm's Optuna study in the store's SQLite file; an unfinished one goes on where it was."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)  # QMCSampler, since 2022
    seed = int.from_bytes(hashlib.sha256(arm.name.encode()).digest()[:4], "big")
    return optuna.create_study(
        storage=f"sqlite:///{directory / 'optuna.db'}",
        study_name=f"{arm.name} {context}",
        sampler=QMCSampler(qmc_type="sobol", scramble=True, seed=seed),
        load_if_exists=True,
    )


def proposals(study: optuna.Study, arm: Contender, trials: int) -> list[dict[str, Any]]:
    """What to try: the defaults first, then Sobol points; those of an interrupted study are the same again."""
    if not arm.space:
        return [{}]
    space = {name: distribution(values) for name, values in arm.space.items()}
    known = study.trials
    if not known:
        study.enqueue_trial(arm.defaults())
    for _ in range(trials - sum(t.state != TrialState.WAITING for t in known)):
        study.ask(space)
    return [dict(trial.params) for trial in study.trials[:trials]]


def tell(study: optuna.Study, values: Sequence[float]) -> None:
    """Enter the scores of the first trials (a diverged one as failed)."""
    for trial, value in zip(study.trials, values, strict=False):
        if trial.state == TrialState.RUNNING:
            diverged = not math.isfinite(value)
            study.tell(trial.number, None if diverged else value, TrialState.FAIL if diverged else None)


def cost(record: RunRecord, score: str, higher_is_better: bool) -> float:
    """What tuning minimises: the validation score, signed; infinite for a run that diverged."""
    value = record.val.get(score, math.nan)
    if not math.isfinite(value):
        return math.inf
    return -value if higher_is_better else value


def finalists(costs: Sequence[float], trials: int) -> list[int]:
    """The quarter of the trials that is run on further seeds; none where one trial is a quarter."""
    count = trials // 4
    order = sorted(range(len(costs)), key=lambda i: costs[i])
    return [i for i in order[:count] if math.isfinite(costs[i])] if count > 1 else []


def by_trial(trials: Sequence[int], costs: Sequence[float]) -> dict[int, Sequence[float]]:
    """Costs of the finalists on their further seeds, given seed by seed."""
    return {trial: costs[k :: len(trials)] for k, trial in enumerate(trials)}


def best(costs: Sequence[float], again: Mapping[int, Sequence[float]]) -> int:
    """The trial with the lowest mean cost, among the finalists where there are any."""
    if again:
        return min(again, key=lambda i: costs[i] + sum(again[i]))
    return min(range(len(costs)), key=lambda i: costs[i])

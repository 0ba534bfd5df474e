"""Equal tuning for every arm: the published defaults, then scrambled Sobol points over its search space."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import QMCSampler
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

from steep.evidence.arms import Arm
from steep.evidence.study import RunRecord
from steep.method import Choice, Range

FIRST_SEED = 1_000_000  # tuning seeds start here; confirmation never uses them
EXTRA_SEEDS = 2  # on which the finalists are run again


class Tuned(NamedTuple):
    """What tuning chose for an arm, and the trials it chose from."""

    hyper: Mapping[str, Any]
    trials: Sequence[RunRecord]


def _distribution(values: Range | Choice) -> BaseDistribution:
    """A range in Optuna's terms."""
    if isinstance(values, Choice):
        return CategoricalDistribution(values.options)
    if values.integer:
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def proposals(arm: Arm, trials: int) -> list[dict[str, Any]]:
    """Settings to try: the defaults first, then Sobol points. A larger number of trials begins with the same ones."""
    if not arm.search_space:
        return [{}]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed = int.from_bytes(hashlib.sha256(arm.name.encode()).digest()[:4], "big")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=ExperimentalWarning)  # QMCSampler, since 2022
        # in memory: a study on disk that was killed during a trial would propose other points when resumed
        study = optuna.create_study(sampler=QMCSampler(qmc_type="sobol", scramble=True, seed=seed))
    study.enqueue_trial(arm.defaults())
    return [study.ask(_distributions(arm)).params for _ in range(trials)]


def _distributions(arm: Arm) -> dict[str, BaseDistribution]:
    return {name: _distribution(values) for name, values in arm.search_space.items()}


def database(directory: Path) -> RDBStorage:
    """The store's SQLite file of Optuna studies. Opening it takes a while, so once is enough for all arms."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return RDBStorage(f"sqlite:///{directory / 'optuna.db'}")


def keep(storage: RDBStorage, arm: Arm, context: str, tried: Sequence[dict[str, Any]], costs: Sequence[float]) -> None:
    """Record an arm's trials in an Optuna study of its own; a diverged trial counts as failed."""
    study = optuna.create_study(storage=storage, study_name=f"{arm.name} {context}", load_if_exists=True)
    known = len(study.trials)
    for params, value in zip(tried[known:], costs[known:], strict=True):
        failed = not math.isfinite(value)
        state, values = (TrialState.FAIL, None) if failed else (TrialState.COMPLETE, [value])
        study.add_trial(create_trial(params=params, distributions=_distributions(arm), state=state, values=values))


def cost(record: RunRecord, score: str, higher_is_better: bool) -> float:
    """What tuning minimises: the validation score, negated if higher is better; infinite for a diverged run."""
    value = record.val.get(score, math.nan)
    if not math.isfinite(value):
        return math.inf
    return -value if higher_is_better else value


def finalists(costs: Sequence[float], trials: int) -> list[int]:
    """Indices of the best quarter of the trials, which are run on further seeds; empty if a quarter is one trial."""
    count = trials // 4  # a single finalist would win whatever its further seeds say
    order = sorted(range(len(costs)), key=lambda i: costs[i])
    return [i for i in order[:count] if math.isfinite(costs[i])] if count > 1 else []


def by_trial(trials: Sequence[int], costs: Sequence[float]) -> dict[int, Sequence[float]]:
    """Costs of the finalists by trial, from costs that are listed seed by seed."""
    return {trial: costs[k :: len(trials)] for k, trial in enumerate(trials)}


def best(costs: Sequence[float], again: Mapping[int, Sequence[float]]) -> int:
    """The trial with the lowest mean cost, among the finalists where there are any."""
    if again:
        return min(again, key=lambda i: costs[i] + sum(again[i]))
    return min(range(len(costs)), key=lambda i: costs[i])

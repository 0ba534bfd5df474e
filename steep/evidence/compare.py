"""Is a published method better than what you do now, on your training run? The protocol, from top to bottom."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from rich.console import Console

from steep.evidence.arms import ADAMW, MethodLike, make_arms, own_method
from steep.evidence.assemble import analysis_results, assemble, target, warnings
from steep.evidence.planning import Plan, announcement
from steep.evidence.protocol import STEP_RULES, Confirmation, Protocol, Records
from steep.evidence.report import page
from steep.evidence.runs.jobs import picture
from steep.evidence.runs.progress import StudyProgress
from steep.evidence.runs.shared import alone, join
from steep.evidence.runs.source import Source, from_name, from_value
from steep.evidence.runs.store import Store
from steep.evidence.runs.workers import Workers
from steep.evidence.study import BASELINE, CONTROL, Study
from steep.evidence.tuning import Tuned
from steep.loop.tracking import as_log
from steep.method import Method
from steep.method import methods as all_methods
from steep.recipe import Recipe
from steep.utils.validation import check_ranges, require_whole


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

    Every arm is tuned with the same number of trials. Then all arms are trained on fresh seeds that share split,
    initialisation and data order: at equal steps, at equal time and, for methods that see another number of examples,
    at equal examples. You can stop at any time; repeat the same call to resume.

    Args:
        recipe: a recipe, a task's name, ``file.py:recipe`` or ``package.module:recipe``.
        methods: ids, with fixed hyper-parameters ("adabelief:lr=1e-3", or ``("adabelief", {"lr": 1e-3})``); several
            joined by "+"; functions from recipe to recipe and `Method` objects, or their places ("my.py:method"); or
            "all" for every method that fits the recipe.
        minutes: choose trials and seeds that fit into this time.
        seeds: paired confirmation seeds; 8 by default (16 if `sequential`). Fewer than 6 give numbers, but no verdict.
        trials: tuning trials per arm; 8 by default.
        workers: processes of one thread each; the number of cores by default.
        out: directory that keeps the runs, the tables and the report.
        score: what verdicts are about: "loss" or the recipe's metric.
        sequential: analyse after a quarter, half and all of the seeds, and stop arms once they are decided; false
            verdicts stay at 5 % in all. Worth it where effects are large.
        progress: show on standard error what will be run, and how far it is.
        command: the shell command that makes this study, for the report.
        log: log every run to this Accelerate tracker ("tensorboard", "wandb", "mlflow", ...), in the folder `log` of
            `out`.
        storage: URL of a database (``sqlite:///FILE``, ``postgresql://USER@HOST/DATABASE``), to divide the runs among
            all who make the same call with it, each with an `out` of its own.

    Raises:
        UnknownName, RecipeError: the recipe or a method cannot be found.
        UnmetRequirement, ValueError, TypeError: a method does not fit the recipe.
        StoreError: `out` is a file, not writable, in use or of another format; `storage` cannot be used or reached.
        RunError: a training run raised.

    Example:
        >>> import steep, tempfile
        >>> with tempfile.TemporaryDirectory() as out:
        ...     tiny = steep.task("digits").replace(budget=steep.Budget(steps=5))
        ...     study = steep.compare(tiny, ["adabelief"], seeds=2, trials=1, workers=1, out=out, progress=False)
        >>> study.arms[2].name, study.arms[2].scores["loss"].verdict
        ('adabelief', 'too few seeds')
    """
    as_log(log)  # refuses an unknown tracker before anything is trained
    _check_limits(minutes, seeds=seeds, trials=trials, workers=workers)
    source, loaded, own = _load(recipe, methods)
    metrics = _metrics(loaded, score)
    arms, count, store = make_arms(loaded, _requested(methods)), workers or os.cpu_count() or 1, Store(out)
    with ExitStack() as stack:
        shared = stack.enter_context(join(storage, _study_name(loaded, source))) if storage is not None else None
        stack.enter_context(store.lock())
        bar = stack.enter_context(StudyProgress(Console(stderr=True, quiet=not progress)))
        processes = stack.enter_context(Workers(source, store, count, bar.done, log, shared))
        _keep_origin(store, source, command)
        agree = shared.agree if shared else alone
        protocol = Protocol(loaded, source, store, processes, arms, score, metrics[score], agree, own)
        left_out = protocol.leave_out(lenient=methods == "all")
        names = [arm.name for arm in protocol.arms]
        bar.begin("dry runs", f"Trying each for a moment: {', '.join(names)}.", len(names))
        dry_runs, failed = protocol.dry_run(lenient=methods == "all")
        left_out |= failed
        plan = protocol.plan(dry_runs, minutes=minutes, trials=trials, seeds=seeds, sequential=sequential)
        bar.begin("training runs", announcement(plan, [arm.name for arm in protocol.arms], left_out, count), plan.runs)
        tuned = protocol.tune(plan.trials)
        confirmed = protocol.confirm(tuned, plan.interim_analyses)
        equal = {role: protocol.at_equal(role, tuned, confirmed.runs) for role in STEP_RULES}
    name = source.name if isinstance(recipe, str) else ""
    reference = ADAMW.id if ADAMW.id in [arm.name for arm in arms] and ADAMW.id not in _requested(methods) else ""
    texts = {"source": name, "command": command, "reference": reference}
    study = _study(protocol, plan, tuned, confirmed, equal, metrics, left_out=left_out, **texts)
    store.put_study(study)
    page.write(study, store.directory)
    return study


def _check_limits(minutes: float | None, **counts: int | None) -> None:
    if minutes is not None:
        check_ranges({"minutes": minutes}, {"minutes": "(0, inf)"})
    for name, value in counts.items():
        if value is not None:
            require_whole(name, value, 1)


def _requested(methods: Sequence[MethodLike] | str) -> list[MethodLike]:
    if methods == "all":
        return [method.id for method in all_methods().values() if method.is_arm]
    pair = isinstance(methods, tuple) and len(methods) == 2 and isinstance(methods[1], Mapping)
    single = pair or isinstance(methods, (str, Method)) or callable(methods)
    return [methods] if single else list(methods)  # type: ignore[list-item]


def _load(recipe: Recipe | str, methods: Sequence[MethodLike] | str) -> tuple[Source, Recipe, Mapping[str, Method]]:
    """How a worker process loads the recipe and the user's own methods; the recipe; and these methods' entries."""
    own = [own_method(method) for method in _requested(methods) if not isinstance(method, (str, tuple))]
    if not isinstance(recipe, (str, Recipe)):
        raise TypeError(f"compare takes a steep.Recipe, or the name of one, got {recipe!r}")
    if not isinstance(recipe, str):
        source = from_value(recipe, {method.id: method for method in own})
    elif own:
        raise ValueError("methods that are functions or `Method` objects need the recipe itself, not its name")
    else:
        source = from_name(recipe)
    return source, *source.load()


def _metrics(recipe: Recipe, score: str) -> dict[str, bool]:
    """The recipe's scores, `score` among them, each with whether higher is better."""
    metrics = {"loss": False} | ({recipe.metric.name: recipe.metric.higher_is_better} if recipe.metric else {})
    if score not in metrics:
        raise ValueError(f"score={score!r} is not among this recipe's scores: {', '.join(metrics)}")
    return metrics


def _study_name(recipe: Recipe, source: Source) -> str:
    """How machines find the study that they share in a database."""
    return f"steep {recipe.name[:100]} {source.hash}"


def _keep_origin(store: Store, source: Source, command: str) -> None:
    store.put_source(source.hash, source.text())
    if command:
        store.put_command(command)


def _study(
    protocol: Protocol,
    plan: Plan,
    tuned: Mapping[str, Tuned],
    confirmed: Confirmation,
    equal: Mapping[str, Records],
    metrics: Mapping[str, bool],
    **given: Any,
) -> Study:
    """The finished study, with everything that a reader must be warned of."""
    recipe, store, (runs, stopped_at) = protocol.recipe, protocol.store, confirmed
    study = Study(
        recipe=recipe.name,
        arms=assemble(protocol.arms, tuned, runs, equal, metrics, stopped_at),
        primary=protocol.score,
        metrics=metrics,
        seeds=[run.seed for run in runs[BASELINE]],
        target_loss=target(runs[CONTROL]),
        target_picture=picture(recipe, None, store, "target") if recipe.picture else None,
        interim_analyses=analysis_results(plan.interim_analyses, stopped_at, runs, protocol.score),
        **given,
    )
    study = replace(study, earlier=_earlier(store, study))
    return replace(study, warnings=list(warnings(study, recipe)))


def _earlier(store: Store, study: Study) -> list[int]:
    """Other numbers of pairs after which verdicts about these very runs have been read in this store."""
    if not (store.directory / "study.json").exists():
        return []
    before = store.study()
    if before.arms[0].runs[0].key != study.arms[0].runs[0].key:
        return []
    return sorted({*before.earlier, len(before.seeds)} - {len(study.seeds)})

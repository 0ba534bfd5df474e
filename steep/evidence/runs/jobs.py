"""One training run of a study: what defines it, and how a worker process executes it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer

from steep.evidence.arms import Arm, Methods, adamw, find_method
from steep.evidence.runs.source import Source
from steep.evidence.runs.store import Store
from steep.evidence.study import RunRecord
from steep.fit import EVALUATIONS, Result, fit
from steep.loop.tracking import Log
from steep.loop.training import NonFinite
from steep.method import Method
from steep.recipe import Budget, Recipe, compose
from steep.splits import split_loaders
from steep.utils.files import write_atomic
from steep.utils.randomness import generator
from steep.version import __version__

DRY_RUN_SECONDS = 0.3
SAVE_EVERY = 30.0  # seconds between checkpoints: short runs make none


@dataclass(frozen=True)
class Job:
    """Everything that defines a run; see `RunRecord` for the fields."""

    arm: str
    role: str
    methods: Methods
    seed: int
    split_seed: int
    budget: Budget
    lr_scale: float = 1.0

    def key(self, source: Source, code: str) -> str:
        """Content address. Role and arm are left out, so a run serves every arm and role that asks for its content."""
        content = {k: v for k, v in asdict(self).items() if k not in ("arm", "role")}
        text = json.dumps([content, source.name, source.hash, code], sort_keys=True, default=repr)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


class ScaledOptimizer:
    """An optimizer factory with scaled learning rates, which is how a recipe's own optimizer is tuned."""

    def __init__(self, factory: Callable[[Iterable[Any]], Optimizer], factor: float):
        self.factory, self.factor = factory, factor

    def __call__(self, parameters: Iterable[Any]) -> Optimizer:
        optimizer = self.factory(parameters)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.factor
        return optimizer


def arm_recipe(
    recipe: Recipe,
    own: Mapping[str, Method],
    methods: Methods,
    lr_scale: float,
    budget: Budget,
) -> Recipe:
    """The recipe that an arm trains: the budget first, so that methods see their horizon, then the methods in order."""
    recipe = recipe.replace(budget=budget)
    if lr_scale != 1.0:
        recipe = recipe.replace(optimizer=ScaledOptimizer(recipe.optimizer, lr_scale))
    return compose(recipe, [(own.get(id) or find_method(id), dict(hyper)) for id, hyper in methods])


_WARM_UP = Recipe(  # pays the first-use costs of Accelerate, autograd and fused kernels, so that no measured run does
    data=lambda generator: split_loaders(torch.zeros(10, 1), torch.zeros(10, 1), generator, batch_size=2),
    model=lambda: nn.Linear(1, 1),
    loss=lambda output, target: (output - target).square().squeeze(1),
    optimizer=adamw(),
    budget=Budget(steps=2),
)


def start_worker(parent: int) -> None:
    """Prepare a worker process: one thread, first-use costs paid, and an end when its parent ends."""
    torch.set_num_threads(1)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    fit(_WARM_UP, device="cpu", progress=False)


def _die_with(parent: int) -> None:
    while os.getppid() == parent:  # a parent that is killed cannot tell its workers to stop
        time.sleep(0.5)
    os._exit(1)


@cache
def _load(source: Source) -> Any:
    return source.load()


@dataclass(frozen=True)
class DryRun:
    """What a dry run of an arm measured: seconds per step, seconds of everything else, steps of a whole run."""

    step_seconds: float
    other_seconds: float
    total_steps: int | None


def dry_run(arm: Arm, source: Source) -> DryRun:
    """Train an arm with its defaults for a moment, to see whether it fits the recipe and how fast it is."""
    recipe, own = _load(source)
    methods, _ = arm.settings(arm.defaults())
    limit = min(DRY_RUN_SECONDS, recipe.budget.seconds or DRY_RUN_SECONDS)
    recipe.data(generator(0, "split"))  # so that what only the first run of a process pays is not counted for each
    started = time.perf_counter()
    brief = arm_recipe(recipe, own, methods, 1.0, replace(recipe.budget, seconds=limit))
    trained = fit(brief, evaluate_every=sys.maxsize, progress=False)
    building = time.perf_counter() - started - trained.seconds - trained.other_seconds
    evaluation = trained.other_seconds / 2  # a dry run evaluates once on the validation and once on the test data
    return DryRun(trained.cpu_seconds / trained.steps, building + evaluation * EVALUATIONS, trained.horizon)


def run_job(job: Job, source: Source, directory: str, code: str, log: str | None = None) -> RunRecord:
    """Train, score and store one run, and log it if asked to. Divergence is a result; any other error is raised.

    Returns:
        The record, which is in the store by then.
    """
    torch.set_num_threads(1)
    store, key = Store(directory), job.key(source, code)
    recipe, own = _load(source)
    settings = {k: v for k, v in asdict(job).items() if k != "budget"} | {"key": key, "budget": asdict(job.budget)}
    started = time.process_time()
    made = arm_recipe(recipe, own, job.methods, job.lr_scale, job.budget)
    applying = time.process_time() - started  # a method may do its work here, before the run that it is part of
    try:
        trained = fit(
            made,
            seed=job.seed,
            split_seed=job.split_seed,
            checkpoint=store.checkpoint_path(key),
            save_every=SAVE_EVERY,
            progress=False,
            log=_log(job, log, store, key) if log else None,
        )
        trained.preparation_seconds += applying
        outcome = _finished(trained, recipe, store, key)
    except NonFinite as error:
        outcome = {"outcome": "diverged", "message": str(error)}
    record = RunRecord(
        **settings,
        **outcome,
        source=source.name,
        source_hash=source.hash,
        versions=versions(),
        hardware=hardware(),
    )
    store.put(record)
    return record


def _log(job: Job, tracker: str, store: Store, key: str) -> Log:
    """Where a run of a study is logged: in the store's folder `log`, under a name that ends with its key."""
    name = re.sub(r"[^\w.+-]", "-", f"{job.arm}-{job.role}-{job.seed}-{key}")
    hyper = {f"{id}.{k}": v for id, given in job.methods for k, v in given.items()}
    config = {"arm": job.arm, "role": job.role, "split_seed": job.split_seed, "lr_scale": job.lr_scale, **hyper}
    return Log(tracker, store.directory / "log", name, config)


def _finished(trained: Result, recipe: Recipe, store: Store, key: str) -> dict[str, Any]:
    costs = {
        k: getattr(trained, k)
        for k in ("steps", "examples", "seconds", "cpu_seconds", "preparation_seconds", "other_seconds", "peak_memory")
    }
    return costs | {
        "outcome": "finished",
        "curve": trained.history.evaluations,
        "val": trained.val,
        "test": trained.test,
        "digest": _digest(trained.history.losses),
        "picture": picture(recipe, trained.model, store, key) if recipe.picture else None,
    }


def _digest(losses: list[float]) -> str:
    """Hash of every step's loss, bit for bit."""
    return hashlib.sha256(struct.pack(f"{len(losses)}d", *losses)).hexdigest()[:24]


def picture(recipe: Recipe, model: Any, store: Store, name: str) -> str:
    """Draw the recipe's picture of a model (of the target, for `None`) as a PNG; returns its path in the store."""
    assert recipe.picture is not None
    path = store.directory / "pictures" / f"{name}.png"
    with torch.no_grad():
        buffer = io.BytesIO()
        _image(recipe.picture(model)).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
    return f"pictures/{path.name}"


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy())


@cache
def versions() -> dict[str, str]:
    return {"steep": __version__, "torch": torch.__version__, "python": platform.python_version()}


@cache
def hardware() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count(), "gpu": gpu}

"""One comparison on several machines: its trainings are trials of an Optuna study in a database that all can reach.

A trial carries the content address of a training. It waits, is claimed by one machine, kept alive by Optuna's
heartbeat, and finished with the run's record; a trial whose machine went silent fails, and its training is enqueued
again. Two machines may enqueue the same training at the same moment: of the trials of one address, the first that has
not failed counts, and only trials that count are claimed. Optuna numbers trials in the order in which they become
visible, so that all machines see the same one. What machines must agree on (seconds per step, the plan, the proposals
of tuning) is written the same way: the first to write it counts.
"""

from __future__ import annotations

import re
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import URL, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from steep.evidence.runs.jobs import Job
from steep.evidence.runs.store import StoreError

BEAT, GRACE = 10, 60  # seconds between signs of life; of silence, until a machine's trainings are given to others
ATTEMPTS = 5  # to create the tables, which others may be creating at the same moment
EXAMPLES = "write sqlite:///FILE for processes of one machine, postgresql://USER@HOST/DATABASE for several machines"
OPTIONS = {"sqlite": {"timeout": 60}, "postgresql": {"connect_timeout": 10}}  # seconds

Agree = Callable[[str, Any], Any]


def alone(name: str, value: Any) -> Any:
    """How one machine agrees with itself."""
    return value


class Shared:
    """The trials of a study that machines share; see `join`."""

    def __init__(self, storage: RDBStorage, name: str):
        self.storage = storage
        self.study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        self.claimed: dict[str, int] = {}  # trial ids by key

    def agree(self, name: str, value: Any) -> Any:
        """What the first machine said about `name`, which is `value` if none has; JSON values, `None` says nothing."""
        key = f"agreed: {name}"
        if value is not None and key not in self._counting():
            self.study.add_trial(create_trial(state=TrialState.PRUNED, user_attrs={"key": key, "value": value}))
        said = self._counting().get(key)
        return said.user_attrs["value"] if said else None

    def trials_of(self, jobs: Mapping[str, Job]) -> dict[str, FrozenTrial]:
        """The jobs' trials that count. Those of silent machines fail, and what has no trial is enqueued."""
        fail_stale_trials(self.study)
        known = self._counting()
        for key, job in jobs.items():
            if key not in known:
                told = {"key": key, "arm": job.arm, "role": job.role, "seed": job.seed}
                self.study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=told))
        known = self._counting()
        return {key: known[key] for key in jobs if key in known}

    def _counting(self) -> dict[str, FrozenTrial]:
        found: dict[str, FrozenTrial] = {}
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state != TrialState.FAIL:
                found.setdefault(trial.user_attrs["key"], trial)
        return found

    def claim(self, trials: Mapping[str, FrozenTrial], most: int) -> list[str]:
        """Take up to that many of the trainings that nobody has; their keys."""
        mine: list[str] = []
        for key, trial in trials.items():
            if len(mine) < most and trial.state == TrialState.WAITING and self._claim(trial._trial_id):
                self.claimed[key] = trial._trial_id
                mine.append(key)
        return mine

    def _claim(self, trial: int) -> bool:
        self.storage.record_heartbeat(trial)  # first, as a running trial that never gave a sign of life never fails
        with suppress(UpdateFinishedTrialError):
            return self.storage.set_trial_state_values(trial, TrialState.RUNNING)
        return False

    def finish(self, key: str, run: Mapping[str, Any], loss: float) -> None:
        """Hand over a run that was claimed."""
        trial = self.claimed.pop(key)
        with suppress(UpdateFinishedTrialError):  # it was given to another machine, as this one had been silent
            self.storage.set_trial_user_attr(trial, "run", run)
            self.storage.set_trial_state_values(trial, TrialState.COMPLETE, [loss])

    def release(self) -> None:
        """Give back what was claimed and will not be finished here."""
        while self.claimed:
            _, trial = self.claimed.popitem()
            with suppress(UpdateFinishedTrialError):
                self.storage.set_trial_state_values(trial, TrialState.FAIL)

    def beat(self, stop: threading.Event) -> None:
        """Give signs of life until told to stop, whatever happens to the database."""
        while not stop.wait(BEAT):
            for trial in list(self.claimed.values()):
                with suppress(StorageInternalError, SQLAlchemyError):
                    self.storage.record_heartbeat(trial)


def finished(trials: Mapping[str, FrozenTrial]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The runs that are there, by key."""
    return ((key, t.user_attrs["run"]) for key, t in trials.items() if t.state == TrialState.COMPLETE)


@contextmanager
def join(url: str, name: str) -> Iterator[Shared]:
    """Take part in the study of that name in a database.

    Raises:
        StoreError: not the URL of a SQLite file or a PostgreSQL database, no driver for it, or it cannot be reached.
    """
    place = database(url)
    where = place.render_as_string()  # without its password
    shared, stop = Shared(_storage(place, where), name), threading.Event()
    heart = threading.Thread(target=shared.beat, args=(stop,), daemon=True)
    heart.start()
    try:
        yield shared
    except (StorageInternalError, SQLAlchemyError) as error:
        raise StoreError(
            f"lost the database {where} ({_reason(error)}): finished trainings are kept, and the same command goes on"
        ) from error
    finally:
        stop.set()
        heart.join()
        shared.storage.engine.dispose()


def database(url: str) -> URL:
    """The database that a URL names, with the driver that is used.

    Raises:
        StoreError: it is malformed, or names something else than a SQLite file or a PostgreSQL database.
    """
    try:
        place = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise StoreError(f"--storage is not the URL of a database: {EXAMPLES}") from error
    backend = place.get_backend_name()
    if backend not in OPTIONS or place.drivername not in (backend, "sqlite+pysqlite", "postgresql+psycopg"):
        raise StoreError(f"--storage with the driver {place.drivername!r} is not supported: {EXAMPLES}")
    if backend == "sqlite" and place.database in (None, "", ":memory:"):
        raise StoreError(f"--storage names no file, so that nothing would be shared: {EXAMPLES}")
    return place.set(drivername="postgresql+psycopg") if place.drivername == "postgresql" else place


def _storage(place: URL, where: str) -> RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)  # heartbeats, since 2021
    options = {"connect_args": OPTIONS[place.get_backend_name()]}
    try:
        create_engine(place, **options).connect().close()
    except ImportError as error:
        raise StoreError("--storage with PostgreSQL needs psycopg: pip install 'steep[postgres]'") from error
    except SQLAlchemyError as error:
        raise StoreError(f"cannot reach the database {where}: {_reason(error)}") from error
    try:
        storage = _created(place.render_as_string(hide_password=False), options | {"pool_pre_ping": True})
    except (SQLAlchemyError, StorageInternalError, RuntimeError) as error:
        raise StoreError(f"cannot use the database {where}: {_reason(error)}") from error
    if place.get_backend_name() == "sqlite":
        _one_at_a_time(storage)
    return storage


def _created(url: str, options: dict[str, Any]) -> RDBStorage:
    for attempt in range(ATTEMPTS):
        try:
            return RDBStorage(url, options, heartbeat_interval=BEAT, grace_period=GRACE)
        except (SQLAlchemyError, StorageInternalError, AssertionError):  # Optuna asserts that others are done
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError("not reached")


def _one_at_a_time(storage: RDBStorage) -> None:
    """Have SQLite lock before it reads: else two processes read that a trial waits, and both claim it."""

    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # sqlite3 then leaves BEGIN to the next function

    storage.engine.dispose()
    event.listen(storage.engine, "connect", connected)
    event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))


def _reason(error: BaseException) -> str:
    """The database's own words, on one line."""
    cause = getattr(error, "orig", None) or getattr(error.__cause__, "orig", None) or error
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__)


def without_passwords(words: Iterable[str]) -> list[str]:
    """A command's words, to be shown to anybody: PostgreSQL finds a password in PGPASSWORD or ~/.pgpass too."""
    return [re.sub(r"(://[^:/@]*):[^@]*@", r"\1@", word) for word in words]

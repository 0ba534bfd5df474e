"""One comparison on several machines: its runs are trials of an Optuna study in a database that all machines can reach.

A trial carries the content address of a run. It waits, is claimed by one machine, is kept alive by Optuna's heartbeat,
and ends with the run's record. A trial whose machine fell silent fails, and its run is enqueued again. Two machines may
enqueue the same run at the same moment: of the trials of one address, the first that has not failed counts, and only
trials that count are claimed. Optuna numbers trials in the order in which they become visible, so all machines see the
same one. What machines must agree on (seconds per step, the plan, the proposals of tuning) is written the same way:
the first to write it counts.
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
from steep.evidence.runs.store import FORMAT, StoreError, refuse_other_format

BEAT, GRACE = 10, 60  # seconds between heartbeats; of silence, after which a machine's runs are given to others
ATTEMPTS = 5  # to create the tables, which other machines may be creating at the same moment
EXAMPLES = "write sqlite:///FILE for processes of one machine, postgresql://USER@HOST/DATABASE for several machines"
FORMAT_ATTRIBUTE = "steep format"  # of a study; format 1 had none
OPTIONS = {"sqlite": {"timeout": 60}, "postgresql": {"connect_timeout": 10}}  # seconds

Agree = Callable[[str, Any], Any]  # a name and this machine's value, to the value that counts for all machines


def alone(name: str, value: Any) -> Any:
    """The `Agree` of a machine that shares nothing: its own value counts."""
    return value


class SharedStudy:
    """The trials of a study that machines share; see `join`."""

    def __init__(self, storage: RDBStorage, name: str):
        self.storage = storage
        self.study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        self.claimed: dict[str, int] = {}  # trial ids by key

    def agree(self, name: str, value: Any) -> Any:
        """What the first machine gave for `name`: `value`, if this is the first. `None` only asks. Values are JSON."""
        key = f"agreed: {name}"
        if value is not None and key not in self._counting():
            self.study.add_trial(create_trial(state=TrialState.PRUNED, user_attrs={"key": key, "value": value}))
        first = self._counting().get(key)
        return first.user_attrs["value"] if first else None

    def trials_of(self, jobs: Mapping[str, Job]) -> dict[str, FrozenTrial]:
        """The jobs' trials that count. Trials of silent machines fail first, and jobs without a trial are enqueued."""
        fail_stale_trials(self.study)
        known = self._counting()
        for key, job in jobs.items():
            if key not in known:
                attributes = {"key": key, "arm": job.arm, "role": job.role, "seed": job.seed}
                self.study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=attributes))
        known = self._counting()
        return {key: known[key] for key in jobs if key in known}

    def _counting(self) -> dict[str, FrozenTrial]:
        found: dict[str, FrozenTrial] = {}
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state != TrialState.FAIL:
                found.setdefault(trial.user_attrs["key"], trial)
        return found

    def claim(self, trials: Mapping[str, FrozenTrial], most: int) -> list[str]:
        """Claim up to `most` of the waiting trials; returns their keys."""
        mine: list[str] = []
        for key, trial in trials.items():
            if len(mine) < most and trial.state == TrialState.WAITING and self._claim(trial._trial_id):
                self.claimed[key] = trial._trial_id
                mine.append(key)
        return mine

    def _claim(self, trial: int) -> bool:
        self.storage.record_heartbeat(trial)  # before it runs: Optuna never fails a running trial without a heartbeat
        with suppress(UpdateFinishedTrialError):
            return self.storage.set_trial_state_values(trial, TrialState.RUNNING)
        return False

    def finish(self, key: str, run: Mapping[str, Any], loss: float) -> None:
        """Write the record of a run that was claimed."""
        trial = self.claimed.pop(key)
        with suppress(UpdateFinishedTrialError):  # this machine had been silent, and another one got the run
            self.storage.set_trial_user_attr(trial, "run", run)
            self.storage.set_trial_state_values(trial, TrialState.COMPLETE, [loss])

    def release(self) -> None:
        """Give back the claimed runs that will not be finished here."""
        while self.claimed:
            _, trial = self.claimed.popitem()
            with suppress(UpdateFinishedTrialError):
                self.storage.set_trial_state_values(trial, TrialState.FAIL)

    def beat(self, stop: threading.Event) -> None:
        """Send heartbeats until told to stop, whatever happens to the database."""
        while not stop.wait(BEAT):
            for trial in list(self.claimed.values()):
                with suppress(StorageInternalError, SQLAlchemyError):
                    self.storage.record_heartbeat(trial)


def finished(trials: Mapping[str, FrozenTrial]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The finished runs, by key."""
    return ((key, t.user_attrs["run"]) for key, t in trials.items() if t.state == TrialState.COMPLETE)


@contextmanager
def join(url: str, name: str) -> Iterator[SharedStudy]:
    """Take part in the study of that name in a database.

    Raises:
        StoreError: not the URL of a SQLite file or a PostgreSQL database, no driver for it, it cannot be reached, or
            the study in it was written in another format.
    """
    place = database(url)
    where = place.render_as_string()  # without its password
    shared, stop = SharedStudy(_storage(place, where), name), threading.Event()
    _check_format(shared.study, where)
    heart = threading.Thread(target=shared.beat, args=(stop,), daemon=True)
    heart.start()
    try:
        yield shared
    except (StorageInternalError, SQLAlchemyError) as error:
        raise StoreError(
            f"lost the database {where} ({_reason(error)}). Finished runs are kept; rerun the same command to resume"
        ) from error
    finally:
        stop.set()
        heart.join()
        shared.storage.engine.dispose()


def _check_format(study: optuna.Study, where: str) -> None:
    """Mark a new study with the format; refuse one that holds trials in another, before anything is written."""
    if FORMAT_ATTRIBUTE not in study.user_attrs and not study.get_trials(deepcopy=False):
        study.set_user_attr(FORMAT_ATTRIBUTE, FORMAT)
    refuse_other_format(study.user_attrs.get(FORMAT_ATTRIBUTE, 1), f"the study in {where}", "--storage")


def database(url: str) -> URL:
    """The database that a URL names, with the driver to use.

    Raises:
        StoreError: the URL is malformed, or names neither a SQLite file nor a PostgreSQL database.
    """
    try:
        place = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise StoreError(f"--storage is not the URL of a database: {EXAMPLES}") from error
    backend = place.get_backend_name()
    if backend not in OPTIONS or place.drivername not in (backend, "sqlite+pysqlite", "postgresql+psycopg"):
        raise StoreError(f"--storage with the driver {place.drivername!r} is not supported: {EXAMPLES}")
    if backend == "sqlite" and place.database in (None, "", ":memory:"):
        raise StoreError(f"--storage names no file, so nothing would be shared: {EXAMPLES}")
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
        except (SQLAlchemyError, StorageInternalError, AssertionError):  # Optuna asserts that nobody else creates them
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError("not reached")


def _one_at_a_time(storage: RDBStorage) -> None:
    """Make SQLite lock before it reads. Otherwise two processes read that a trial waits, and both claim it."""

    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # sqlite3 then leaves BEGIN to the listener below

    storage.engine.dispose()
    event.listen(storage.engine, "connect", connected)
    event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))


def _reason(error: BaseException) -> str:
    """The database's own message, on one line."""
    cause = getattr(error, "orig", None) or getattr(error.__cause__, "orig", None) or error
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__)


def without_passwords(words: Iterable[str]) -> list[str]:
    """A command's words as a report may show them. PostgreSQL also finds passwords in PGPASSWORD or ~/.pgpass."""
    return [re.sub(r"(://[^:/@]*):[^@]*@", r"\1@", word) for word in words]

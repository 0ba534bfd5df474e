"""Runs jobs in worker processes of one thread each. A run that is in the store is not repeated."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, as_completed, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, TypeVar

from loky import ProcessPoolExecutor
from loky.process_executor import TerminatedWorkerError

from steep.evidence.runs.jobs import Job, run_job, start_worker
from steep.evidence.runs.shared import SharedStudy, finished
from steep.evidence.runs.source import Source, code_version
from steep.evidence.runs.store import Store
from steep.evidence.study import RunRecord
from steep.loop.training import RunError
from steep.utils.places import sentence

T = TypeVar("T")
POLL = 1.0  # seconds between queries for what other machines have done
RESTARTS = 3  # of all workers, when the system kills one of them (out of memory)


@dataclass(frozen=True)
class Failure:
    """An exception in a worker, as plain values, since not every exception can be pickled."""

    kind: str
    message: str
    traceback: str


class Traceback(Exception):
    """The traceback of an error in a worker, shown as the cause of the error that is raised here."""


class Workers:
    """Worker processes that fill one store; use it as a context manager.

    Args:
        count: processes. Each has one thread: on small models two processes are faster than two threads of one.
        advanced: called once for every finished job, whether it was run or found in the store.
        log: name of an Accelerate tracker, to log every run.
        shared: the study that other machines share, to divide the runs among them.
    """

    def __init__(
        self,
        source: Source,
        store: Store,
        count: int,
        advanced: Callable[[], None] = lambda: None,
        log: str | None = None,
        shared: SharedStudy | None = None,
    ):
        self.source, self.store, self.count, self.advanced, self.log = source, store, count, advanced, log
        self.shared = shared
        self._versions: dict[tuple[str, ...], str] = {}

    def __enter__(self) -> Workers:
        self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.executor.shutdown(wait=kind is None, kill_workers=kind is not None)

    def _start(self) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self.executor = ProcessPoolExecutor(
            self.count,
            initializer=_initialize,
            initargs=(os.getpid(), multiprocessing.get_start_method()),
            env=threads,
            timeout=None,
        )

    def code(self, job: Job) -> str:
        """Version of the code that a job executes."""
        ids = tuple(id for id, _ in job.methods)
        if ids not in self._versions:
            self._versions[ids] = code_version(ids)
        return self._versions[ids]

    def run(self, jobs: Sequence[Job]) -> list[RunRecord]:
        """The records of the jobs, in their order. Missing runs are started in that order as workers become free.

        Raises:
            RunError: a run raised, or the system kept killing workers. Finished runs are kept.
        """
        keys = [job.key(self.source, self.code(job)) for job in jobs]
        wanted = dict(zip(keys, jobs, strict=True))
        found = self._run_shared(wanted, self.shared) if self.shared else self._run_here(wanted, keys)
        return [replace(found[key], arm=job.arm, role=job.role) for key, job in zip(keys, jobs, strict=True)]

    def _run_here(self, jobs: dict[str, Job], keys: Sequence[str]) -> dict[str, RunRecord]:
        found = {key: record for key in keys if (record := self.store.get(key)) is not None}
        for key in keys:
            if key in found:
                self.advanced()
        missing = {key: job for key, job in jobs.items() if key not in found}
        self._retry(lambda: self._run_missing(missing, found))
        return found

    def _run_shared(self, jobs: dict[str, Job], shared: SharedStudy) -> dict[str, RunRecord]:
        """The same, divided among machines: each runs what it has claimed, and all take the record that counts."""
        found: dict[str, RunRecord] = {}
        self._retry(lambda: self._run_claimed(jobs, found, shared))
        return found

    def _run_claimed(self, jobs: dict[str, Job], found: dict[str, RunRecord], shared: SharedStudy) -> None:
        running: dict[Future[Any], str] = {}
        try:
            while missing := {key: job for key, job in jobs.items() if key not in found}:
                trials = shared.trials_of(missing)
                for key, run in finished(trials):
                    found[key] = self.store.unpack(key, run)
                    self.advanced()
                claimed = shared.claim(trials, self.count - len(running))
                for key in claimed:
                    if (record := self.store.get(key)) is not None:
                        self._hand_over(record, shared)
                    else:
                        running[self._submit(jobs[key])] = key
                if not claimed or len(running) == self.count:
                    for future in _done(running):
                        self._hand_over(self._result(future, jobs[running.pop(future)]), shared)
        except BaseException:
            shared.release()
            raise

    def _hand_over(self, record: RunRecord, shared: SharedStudy) -> None:
        shared.finish(record.key, self.store.pack(record), record.val.get("loss", math.inf))

    def _submit(self, job: Job) -> Future[Any]:
        where = str(self.store.directory)
        return self.executor.submit(_guarded, run_job, job, self.source, where, self.code(job), self.log)

    def _retry(self, attempt: Callable[[], T]) -> T:
        """What `attempt` returns. Where the system kills a worker, all are replaced and it is called again."""
        for _ in range(RESTARTS):
            with suppress(TerminatedWorkerError):
                return attempt()
            self.executor.shutdown(wait=True, kill_workers=True)  # waits, so that no worker is still writing
            self._start()
        try:
            return attempt()
        except TerminatedWorkerError as error:
            raise RunError(
                f"the system killed a worker {RESTARTS + 1} times. Is there enough memory for {self.count} runs at "
                "once (see --workers)? Finished runs are kept; rerun the same command to resume"
            ) from error

    def _run_missing(self, jobs: dict[str, Job], found: dict[str, RunRecord]) -> None:
        """Add the jobs' records to `found`. What killed workers had stored, but not returned, comes from the store."""
        kept = {key: self.store.get(key) for key in jobs if key not in found}
        found |= {key: record for key, record in kept.items() if record is not None}
        futures = {self._submit(job): key for key, job in jobs.items() if key not in found}
        for future in as_completed(futures):
            key = futures[future]
            found[key] = self._result(future, jobs[key])
            self.advanced()

    def _result(self, future: Future[Any], job: Job) -> Any:
        result = future.result()
        if isinstance(result, Failure):
            raise RunError(f"{job.arm}, seed {job.seed}: {result.message}") from Traceback(result.traceback)
        return result

    def apply(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a function in the workers; a call that raised gives a `Failure`."""

        def attempt() -> list[Any]:
            futures = [self.executor.submit(_guarded, function, *args) for args in arguments]
            for _ in as_completed(futures):
                self.advanced()
            return [future.result() for future in futures]

        return self._retry(attempt)


def _done(running: dict[Future[Any], str]) -> set[Future[Any]]:
    """What has finished by the time other machines' work is queried again."""
    if not running:
        time.sleep(POLL)
    return wait(running, POLL, FIRST_COMPLETED).done


def _initialize(parent: int, start_method: str) -> None:
    # loky makes its own method the default of this process, which loaders with workers of their own cannot use
    multiprocessing.set_start_method(start_method, force=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    start_worker(parent)


def _guarded(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as error:
        return Failure(type(error).__name__, sentence(error), traceback.format_exc())

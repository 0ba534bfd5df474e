"""Runs jobs in worker processes of one thread each; what is in the store is not run again."""

from __future__ import annotations

import math
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
from steep.evidence.runs.shared import Shared, finished
from steep.evidence.runs.source import Source, code_version
from steep.evidence.runs.store import Store
from steep.evidence.study import RunRecord
from steep.loop.training import RunError

T = TypeVar("T")
POLL = 1.0  # seconds between looks at what other machines have done
RESTARTS = 3  # of the whole pool, when the system kills a worker (out of memory)


@dataclass(frozen=True)
class Failure:
    """An exception of a worker, as plain values: its own pickling may fail."""

    kind: str
    message: str
    place: str


class Workers:
    """Worker processes over one store; use it as a context manager.

    Args:
        workers: processes. Each has one thread: on small models two threads of one process are slower
            than two processes.
        advanced: called once for every job done, found in the store or run.
        log: an Accelerate tracker's name, to log every training that is run.
        shared: the study of other machines, to share the trainings with them.
    """

    def __init__(
        self,
        source: Source,
        store: Store,
        workers: int,
        advanced: Callable[[], None] = lambda: None,
        log: str | None = None,
        shared: Shared | None = None,
    ):
        self.source, self.store, self.workers, self.advanced, self.log = source, store, workers, advanced, log
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
            self.workers, initializer=_start, initargs=(os.getpid(),), env=threads, timeout=None
        )

    def code(self, job: Job) -> str:
        """Version of the code a job executes."""
        ids = tuple(id for id, _ in job.methods)
        if ids not in self._versions:
            self._versions[ids] = code_version(ids)
        return self._versions[ids]

    def run(self, jobs: Sequence[Job]) -> list[RunRecord]:
        """The jobs' records, in their order; missing ones are run, in that order as workers become free.

        Raises:
            RunError: a training raised, or the system ended workers again and again. What has finished is kept.
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
        self._insist(lambda: self._run_missing(missing, found))
        return found

    def _run_shared(self, jobs: dict[str, Job], shared: Shared) -> dict[str, RunRecord]:
        """The same among machines: what is claimed is run here, and all take the record that counts."""
        found: dict[str, RunRecord] = {}
        self._insist(lambda: self._take_part(jobs, found, shared))
        return found

    def _take_part(self, jobs: dict[str, Job], found: dict[str, RunRecord], shared: Shared) -> None:
        running: dict[Future[Any], str] = {}
        try:
            while missing := {key: job for key, job in jobs.items() if key not in found}:
                trials = shared.trials_of(missing)
                for key, run in finished(trials):
                    found[key] = self.store.unpack(key, run)
                    self.advanced()
                claimed = shared.claim(trials, self.workers - len(running))
                for key in claimed:
                    if (record := self.store.get(key)) is not None:
                        self._hand_over(record, shared)
                    else:
                        running[self._submit(jobs[key])] = key
                if not claimed or len(running) == self.workers:
                    for future in _done(running):
                        self._hand_over(self._result(future, jobs[running.pop(future)]), shared)
        except BaseException:
            shared.release()
            raise

    def _hand_over(self, record: RunRecord, shared: Shared) -> None:
        shared.finish(record.key, self.store.pack(record), record.val.get("loss", math.inf))

    def _submit(self, job: Job) -> Future[Any]:
        where = str(self.store.directory)
        return self.executor.submit(_guarded, run_job, job, self.source, where, self.code(job), self.log)

    def _insist(self, attempt: Callable[[], T]) -> T:
        """What `attempt` returns, after another with new workers where the system killed one."""
        for _ in range(RESTARTS):
            with suppress(TerminatedWorkerError):
                return attempt()
            self.executor.shutdown(wait=True, kill_workers=True)  # so that none is still writing
            self._start()
        try:
            return attempt()
        except TerminatedWorkerError as error:
            raise RunError(
                f"the system ended a worker {RESTARTS + 1} times (does the memory suffice for {self.workers} trainings "
                "at once? see --workers); what has finished is kept, and the same command goes on"
            ) from error

    def _run_missing(self, jobs: dict[str, Job], found: dict[str, RunRecord]) -> None:
        """Add to `found` what it lacks; what a killed pool had kept, but not handed over, is taken from the store."""
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
            raise RunError(f"{job.arm}, seed {job.seed}: {result.kind}: {result.message} ({result.place})")
        return result

    def apply(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a function in the workers; a call that raised gives a `Failure`."""

        def attempt() -> list[Any]:
            futures = [self.executor.submit(_guarded, function, *args) for args in arguments]
            return [future.result() for future in futures]

        return self._insist(attempt)


def _done(running: dict[Future[Any], str]) -> set[Future[Any]]:
    """What has finished by the next look at other machines' work."""
    if not running:
        time.sleep(POLL)
    return wait(running, POLL, FIRST_COMPLETED).done


def _start(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    start_worker(parent)


def _guarded(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return Failure(type(error).__name__, str(error), f"{frame.filename}, line {frame.lineno}")

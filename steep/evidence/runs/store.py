"""The runs of a study on disk. Each is one JSON file, written whole or not at all, and is never repeated."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from steep.evidence.study import ArmResult, Comparison, RunRecord, Study
from steep.utils.files import write_atomic

FORMAT = 2  # 1: roles and fields had other names


class StoreError(ValueError):
    """A store that cannot be used: not a directory, not writable, in use, or written in another format."""


class Store:
    """A directory of runs, pictures and checkpoints, and the study assembled from them.

    Args:
        directory: created if absent.

    Raises:
        StoreError: it is a file, cannot be written to, or was written in another format.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise StoreError(f"the store {self.directory} is a file: give a directory")
        mark = self.directory / "store.json"
        if mark.exists():
            _read(mark)  # refuses another format before anything is written
        try:
            for folder in ("runs", "pictures", "checkpoints"):
                (self.directory / folder).mkdir(parents=True, exist_ok=True)
            write_atomic(mark, _text({}))
        except OSError as error:
            raise StoreError(f"the store {self.directory} cannot be written to: {error.strerror or error}") from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store for one comparison; the system releases the lock even if the process is killed."""
        lock = FileLock(self.directory / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise StoreError(
                f"another compare is using the store {self.directory}: wait for it, or choose another --out"
            ) from None
        try:
            for draft in self.directory.rglob(".*.part"):  # left by a process that was killed while it wrote
                draft.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    def run_path(self, key: str) -> Path:
        return self.directory / "runs" / f"{key}.json"

    def checkpoint_path(self, key: str) -> Path:
        return self.directory / "checkpoints" / f"{key}.pt"

    def get(self, key: str) -> RunRecord | None:
        """The run with that content address, or `None`."""
        path = self.run_path(key)
        return _record(_read(path)) if path.exists() else None

    def put(self, record: RunRecord) -> None:
        """Keep a run, so that it is never repeated."""
        write_atomic(self.run_path(record.key), _text(record.to_json()))
        _flush(self.directory / "runs")  # the record must survive a loss of power before the checkpoint is deleted
        self.checkpoint_path(record.key).unlink(missing_ok=True)

    def records(self) -> list[RunRecord]:
        """Every run in the store."""
        return [_record(_read(path)) for path in sorted((self.directory / "runs").glob("*.json"))]

    def pack(self, record: RunRecord) -> dict[str, Any]:
        """A run and its picture as plain values, for another machine's store."""
        picture = (self.directory / record.picture).read_bytes() if record.picture else b""
        return {"format": FORMAT, "run": record.to_json(), "picture": base64.b64encode(picture).decode()}

    def unpack(self, key: str, packed: Mapping[str, Any]) -> RunRecord:
        """Keep the run that counts for all machines, in place of this machine's own."""
        refuse_other_format(packed["format"], "a run in the shared database", "--storage")
        path = self.directory / "pictures" / f"{key}.png"
        picture = f"pictures/{path.name}" if packed["picture"] else None
        record = replace(_record(packed["run"]), key=key, picture=picture)
        if self.get(key) != record:
            if packed["picture"]:
                write_atomic(path, base64.b64decode(packed["picture"]))
            self.put(record)
        return record

    def put_source(self, hash: str, text: str) -> None:
        """Keep the source text of a recipe."""
        path = self.directory / "sources" / f"{hash}.txt"
        if not path.exists():
            write_atomic(path, text)

    def put_command(self, command: str) -> None:
        """Keep the command that resumes the comparison."""
        write_atomic(self.directory / "command.txt", command + "\n")

    def command(self) -> str:
        """The command that started the comparison.

        Raises:
            StoreError: no comparison was started here from the command line.
        """
        path = self.directory / "command.txt"
        if not path.exists():
            raise StoreError(f"nothing to resume in {self.directory}: no `steep compare` was started there")
        return path.read_text().strip()

    def put_study(self, study: Study) -> None:
        write_atomic(self.directory / "study.json", _text(asdict(study)))

    def study(self) -> Study:
        """The study last assembled here.

        Raises:
            StoreError: no comparison has finished in this store.
        """
        path = self.directory / "study.json"
        if not path.exists():
            raise StoreError(
                f"no finished comparison in {self.directory}: run `steep compare ... --out {self.directory}`"
            )
        values = _read(path)
        arms = [_arm(arm) for arm in values.pop("arms")]
        return Study(arms=arms, **_known(Study, values))


def open_store(directory: str | os.PathLike[str]) -> Store:
    """A store that already exists.

    Raises:
        StoreError: there is none.
    """
    if not Path(directory).is_dir():
        raise StoreError(f"no store at {directory}: run `steep compare ... --out {directory}` first")
    return Store(directory)


def _flush(folder: Path) -> None:
    """Make new file names in a folder survive a loss of power, on systems where a folder can be opened."""
    if os.name == "nt":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps({"format": FORMAT, **values}, indent=1)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}): delete it, and the run will be repeated") from error
    refuse_other_format(values.pop("format", 0), str(path), "--out")
    return values


def refuse_other_format(found: int, what: str, option: str) -> None:
    """Raise `StoreError` if `what` was not written in this format; the message says which `option` to change."""
    if found > FORMAT:
        raise StoreError(
            f"{what} was written by a newer steep (format {found}; this one reads {FORMAT}): upgrade steep"
        )
    if found < FORMAT:
        raise StoreError(
            f"{what} was written by an older steep (format {found}; this one reads {FORMAT}): choose another {option}, "
            "or use the steep that wrote it"
        )


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    return {key: value for key, value in values.items() if key in names}


def _record(values: Mapping[str, Any]) -> RunRecord:
    known = _known(RunRecord, values)
    return RunRecord(**known | {"methods": [(id, hyper) for id, hyper in known["methods"]]})


def _arm(values: dict[str, Any]) -> ArmResult:
    for key in ("trials", "runs", "equal_time", "equal_examples"):
        values[key] = [_record(r) for r in values.get(key, ())]
    for key in ("scores", "scores_at_equal_time", "scores_at_equal_examples", "to_target"):
        values[key] = {name: Comparison(**_known(Comparison, c)) for name, c in values.get(key, {}).items()}
    return ArmResult(**_known(ArmResult, values))

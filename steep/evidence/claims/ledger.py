"""The outcomes of claims: one JSON file per claim, and whether the code has changed since it was run.

An entry keeps every measured value. Its verdict is recomputed from them whenever it is read, so that the rule and the
entries cannot disagree. Its fingerprint covers the claim's file, the method's file, the tasks and methods that the
claim names, and every file of steep that these import; docstrings, comments and a claim's texts do not count.
"""

from __future__ import annotations

import ast
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from steep.evidence.claims.claim import Claim, Lab, Pairs, Quantity
from steep.evidence.claims.verdicts import QuantityResult, judge, overall
from steep.evidence.runs.jobs import hardware, versions
from steep.evidence.runs.source import ROOT, code_of, hashed, import_file, imported
from steep.method import UnknownName, method, methods
from steep.tasks import tasks
from steep.utils.files import write_atomic
from steep.utils.validation import nearest

FORMAT = 1
NOT_MEASURING = {  # these only show or keep results, so changing them changes no measured value
    *(ROOT / f"{name}.py" for name in ("__init__", "__main__", "loop/console")),
    *(ROOT / "cli").glob("*.py"),
    *(ROOT / "evidence" / f"{name}.py" for name in ("claims/ledger", "claims/verdicts")),
    *(ROOT / "evidence" / "runs" / f"{name}.py" for name in ("progress", "store", "workers")),
    *(ROOT / "evidence" / "report").glob("*.py"),
    *(ROOT / "testing").glob("*.py"),
}
TEXTS = frozenset({"statement", "source", "paper_scale", "our_scale", "reason"})  # of a claim; they measure nothing
State = Literal["current", "stale", "never run"]


class ClaimError(ValueError):
    """A folder, a file of claims or a ledger entry that cannot be used; the message says where and why."""


def load_claims(folder: Path) -> dict[str, tuple[Claim, Path]]:
    """The claim of every file in a folder, by id, with the file.

    Raises:
        ClaimError: no such folder, or a file that does not hold exactly one claim of its name.
    """
    if not folder.is_dir():
        raise ClaimError(
            f"no folder of claims at {folder.absolute()}: claims/ and ledger/ are in steep's repository and not in the "
            "installed package; change to a checkout of it, or give --claims DIR"
        )
    found = (_load(path) for path in sorted(folder.glob("[!_]*.py")))
    return {claim.id: (claim, path) for claim, path in found}


def _load(path: Path) -> tuple[Claim, Path]:
    held = [value for value in vars(import_file(path)).values() if isinstance(value, Claim)]
    if len(held) != 1:
        raise ClaimError(f"{path} holds {len(held)} claims: it must hold one, about the method of its name")
    if held[0].id != path.stem.replace("_", "-"):
        raise ClaimError(f"{path} holds the claim of {held[0].id!r}: name the file {held[0].id.replace('-', '_')}.py")
    method(held[0].id)
    return held[0], path


def choose(claims: Mapping[str, tuple[Claim, Path]], ids: Sequence[str]) -> list[tuple[Claim, Path]]:
    """The claims asked for, all of them for no ids.

    Raises:
        UnknownName: there is no claim of that id.
    """
    for id in ids:
        if id not in claims:
            raise UnknownName(f"no claim about {id!r}{nearest(id, claims)}")
    return [claims[id] for id in ids or claims]


def fingerprint(claim: Claim, path: Path) -> str:
    """Hash of the code that decides what the claim measures."""
    named = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    makers: dict[str, Callable[..., Any]] = {method.id: method.make for method in methods().values()}
    makers |= {task.name: getattr(task.build, "func", task.build) for task in tasks().values()}  # it may be a partial
    used = [_file(make) for name, make in makers.items() if name in named | {claim.id}]
    files = imported([path, *used]) - NOT_MEASURING - {path.resolve()}
    return hashed(code_of(path, TEXTS), *sorted(code_of(file) for file in files))


def _file(made: Callable[..., Any]) -> Path:
    return Path(sys.modules[made.__module__].__file__ or "")


@dataclass(frozen=True)
class Entry:
    """An entry of the ledger.

    Args:
        claim: the claim's texts as they were when it was run.
        fingerprint: of the code at that time.
        date: when the run ended, in UTC.
        versions, hardware: what it ran on.
        cpu_seconds: of this process and its workers, without results that were already in the store.
        notes: settings chosen in tuning, warnings, outcome of the A/A control.
        quantities: each with its values and its verdict.
    """

    claim: Mapping[str, Any]
    fingerprint: str
    date: str
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]
    cpu_seconds: float
    notes: Mapping[str, Any]
    quantities: Sequence[QuantityResult]

    @property
    def verdict(self) -> str:
        return overall(self.quantities)

    def to_json(self) -> dict[str, Any]:
        values = {key: value for key, value in vars(self).items() if key != "quantities"}
        return {"format": FORMAT, "verdict": self.verdict, **values, "quantities": [asdict(j) for j in self.quantities]}


def run(claim: Claim, path: Path, store: Path, *, workers: int = 1) -> Entry:
    """Run a claim, or resume it, and judge what it measured."""
    code = fingerprint(claim, path)
    lab = Lab(store / claim.id, workers=workers, code=code)
    torch.set_num_threads(1)
    began = _cpu()
    found = claim.measure(lab)
    return Entry(
        claim={name: getattr(claim, name) for name in sorted(TEXTS | {"id"})},
        fingerprint=code,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        hardware=hardware(),
        cpu_seconds=round(_cpu() - began, 1),
        notes=lab.notes,
        quantities=[judge(q, found[q.name]) for q in claim.quantities if q.name in found],
    )


def _cpu() -> float:
    """CPU seconds of this process and of its workers that have ended."""
    return sum(os.times()[:4])


def smoke(claim: Claim) -> dict[str, Pairs]:
    """Run a claim's experiment as small as possible and keep nothing, to check that it still works."""
    with TemporaryDirectory() as folder:
        return claim.measure(Lab(Path(folder), smoke=True))


def entry_path(ledger: Path, id: str) -> Path:
    return ledger / f"{id}.json"


def write(entry: Entry, ledger: Path) -> None:
    """Write an entry; infinite numbers are written as null."""
    text = json.dumps(_finite(entry.to_json()), indent=1, allow_nan=False)
    write_atomic(entry_path(ledger, entry.claim["id"]), text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(ledger: Path, id: str) -> Entry | None:
    """The entry of that claim, judged anew, or `None`.

    Raises:
        ClaimError: it is damaged, or of a newer version.
    """
    path = entry_path(ledger, id)
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        if values.pop("format") > FORMAT:
            raise ClaimError(f"{path} was written by a newer steep (this one reads format {FORMAT}): upgrade steep")
        del values["verdict"]
        judged = [judge(Quantity(**j["quantity"]), Pairs(**j["pairs"])) for j in values.pop("quantities")]
        return Entry(quantities=judged, **values)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ClaimError(f"{path} is damaged ({error!r}): delete it and run `steep claims {id}`") from error


def state(claim: Claim, path: Path, entry: Entry | None) -> State:
    """Whether the ledger's entry was measured with the present code."""
    if entry is None:
        return "never run"
    return "current" if entry.fingerprint == fingerprint(claim, path) else "stale"

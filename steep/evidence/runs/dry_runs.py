"""The dry runs of a store's arms. They are kept, so that a study which is resumed gets the same plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steep.evidence.runs.jobs import DryRun
from steep.evidence.runs.shared import Agree, alone
from steep.utils.files import write_atomic


class DryRuns:
    """The dry runs of a store's arms.

    Args:
        directory: of the store.
        keys: by arm, the content address of what was trained.
        agree: makes machines that share the study use the same measurement.
    """

    def __init__(self, directory: Path, keys: Mapping[str, str], agree: Agree = alone):
        self.path, self.keys, self.agree = directory / "dry_runs.json", keys, agree
        self._all: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else {}
        agreed = {key: agree(key, self._all.get(key)) for key in keys.values()}
        self._all |= {key: found for key, found in agreed.items() if found is not None}

    @property
    def known(self) -> dict[str, DryRun]:
        """By arm, for the arms that have been run."""
        return {name: DryRun(**self._all[key]) for name, key in self.keys.items() if key in self._all}

    def add(self, found: Mapping[str, DryRun]) -> None:
        """Keep what was measured, unless another machine had measured it before."""
        self._all |= {self.keys[name]: self.agree(self.keys[name], asdict(run)) for name, run in found.items()}
        write_atomic(self.path, json.dumps(self._all, indent=1))

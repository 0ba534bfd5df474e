"""What the first moments of the arms showed, kept in the store: a plan made from them is the same when it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steep.evidence.runs.jobs import Check
from steep.evidence.runs.shared import Agree, alone
from steep.utils.files import write_atomic


class DryRuns:
    """The checks of a store's arms.

    Args:
        directory: of the store.
        keys: by arm, the content address of what was trained for a moment.
        agree: what is said to other machines about an address, mapped to what counts for all.
    """

    def __init__(self, directory: Path, keys: Mapping[str, str], agree: Agree = alone):
        self.path, self.keys, self.agree = directory / "dry_runs.json", keys, agree
        self._all: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else {}
        said = {key: agree(key, self._all.get(key)) for key in keys.values()}
        self._all |= {key: check for key, check in said.items() if check is not None}

    @property
    def checks(self) -> dict[str, Check]:
        """By arm, as far as they are known."""
        return {name: Check(**self._all[key]) for name, key in self.keys.items() if key in self._all}

    def add(self, checks: Mapping[str, Check]) -> None:
        self._all |= {self.keys[name]: self.agree(self.keys[name], asdict(check)) for name, check in checks.items()}
        write_atomic(self.path, json.dumps(self._all, indent=1))

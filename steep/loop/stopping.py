"""Early stopping: when a run ends before its budget, and which of its weights it ends with."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from steep.recipe import EarlyStopping


class Stopper:
    """Follows one score of a run, and keeps the state of its parts where that was best.

    Args:
        rule: the recipe's.
        every: steps between two looks.
        higher_is_better: the score's direction.
        parts: what is restored, each with `state_dict` and `load_state_dict`.
    """

    def __init__(self, rule: EarlyStopping, every: int, higher_is_better: bool, parts: Mapping[str, Any]):
        self.rule, self.every, self.sign, self.parts = rule, every, -1 if higher_is_better else 1, parts
        self.best: dict[str, float] | None = None  # the entry of the history
        self.state: dict[str, Any] | None = None
        self.waited = 0  # looks since the best one

    @property
    def stopped(self) -> bool:
        return self.waited >= self.rule.patience

    def look(self, entry: dict[str, float]) -> None:
        """Judge an evaluation; one that is not finite is no improvement."""
        if not self._improves(entry[self.rule.score]):
            self.waited += 1
            return
        self.best, self.waited = dict(entry), 0
        if self.rule.restore_best:
            self.state = {name: copy.deepcopy(part.state_dict()) for name, part in self.parts.items()}

    def _improves(self, score: float) -> bool:
        if not math.isfinite(score):
            return False
        return self.best is None or self.sign * (self.best[self.rule.score] - score) > self.rule.min_delta

    def restore(self) -> None:
        """Put the parts back to where the score was best, if the rule says so and there was one."""
        for name, state in (self.state or {}).items():
            self.parts[name].load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "state": self.state, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.state, self.waited = state["best"], state["state"], state["waited"]

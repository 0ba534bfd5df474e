"""When a run is saved, and what the user reads when it stops early."""

from __future__ import annotations

import time
from pathlib import Path

from steep.loop import checkpoint as checkpoints
from steep.loop.training import Training


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: the run stopped between two steps and left a checkpoint."""


class Saver:
    """Writes checkpoints, where a path is given, and never one with parameters that are not finite."""

    def __init__(self, training: Training, path: Path | None, seconds: float):
        self.training, self.path, self.seconds, self.last = training, path, seconds, time.monotonic()
        self.saved: int | None = None  # the step that the file is of

    def resume(self) -> None:
        """Go on from the file, if there is one."""
        if self.path is not None and self.path.exists():
            self.training.load_state_dict(checkpoints.load(self.path), self.path)
            self.saved = self.training.step

    def save(self) -> bool:
        """Save, unless a parameter is not finite: the file then keeps the last good state. Whether it was saved."""
        if self.path is None or not all(p.isfinite().all() for p in self.training.model.parameters()):
            return False
        with self.training.stopwatch.pause():
            checkpoints.save(self.path, self.training.state_dict())
        self.last, self.saved = time.monotonic(), self.training.step
        return True

    def save_if_due(self) -> None:
        if time.monotonic() - self.last >= self.seconds:
            self.save()

    def stop(self) -> None:
        self.path = self.path or Path("steep-interrupted.pt")  # nobody loses a run to Ctrl-C for want of a path
        again = f"resume with fit(recipe, ..., checkpoint={str(self.path)!r})"
        if self.save():
            raise Interrupted(f"stopped after step {self.training.step}; {again}")
        bad = f"stopped after step {self.training.step}, where a parameter is not finite, so nothing was saved"
        raise Interrupted(f"{bad}; {again}, which is of step {self.saved}" if self.saved is not None else bad)

    def way_back(self) -> str:
        if self.path is None:
            return "No checkpoint was kept; pass fit(..., checkpoint=PATH) to keep one"
        if self.saved is None:
            return "It happened before the first checkpoint"
        return f"The last finite checkpoint is {self.path}, of step {self.saved}"

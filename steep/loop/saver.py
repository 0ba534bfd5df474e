"""When a run is saved, and what the user reads when it stops early."""

from __future__ import annotations

import time
from pathlib import Path

from steep.loop import checkpoint as checkpoints
from steep.loop.training import Training


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: the run stopped between two steps and left a checkpoint."""


class Saver:
    """Writes checkpoints, where a path is given."""

    def __init__(self, training: Training, path: Path | None, seconds: float):
        self.training, self.path, self.seconds, self.last = training, path, seconds, time.monotonic()

    def save(self) -> None:
        """Save, unless a parameter is not finite: the file then keeps the last good state."""
        if self.path is not None and all(p.isfinite().all() for p in self.training.model.parameters()):
            with self.training.stopwatch.pause():
                checkpoints.save(self.path, self.training.state_dict())
            self.last = time.monotonic()

    def save_if_due(self) -> None:
        if time.monotonic() - self.last >= self.seconds:
            self.save()

    def stop(self) -> None:
        self.path = self.path or Path("steep-interrupted.pt")  # nobody loses a run to Ctrl-C for want of a path
        checkpoints.save(self.path, self.training.state_dict())
        again = f"fit(recipe, ..., checkpoint={str(self.path)!r})"
        raise Interrupted(f"stopped after step {self.training.step}; go on with {again}")

    def way_back(self) -> str:
        if self.path is None:
            return "No checkpoint was kept; pass fit(..., checkpoint=PATH) to keep one"
        known = self.path.exists()
        return f"The last finite checkpoint is {self.path}" if known else "It happened before the first checkpoint"

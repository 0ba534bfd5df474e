"""Accelerate: `Backward` takes the place of `accelerator.backward`.

Like that method, it applies the gradient scaler's factor and one over the steps of gradient accumulation, and leaves
DDP's reducer at work (or off within `accelerator.accumulate`). The losses are a vector, which a rule turns into the
gradient.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from steep.adapters._attached import ELSEWHERE, Attached
from steep.adapters._batches import Batches
from steep.adapters.distributed import GlobalBatch
from steep.loop import checkpoint
from steep.loop.training import requires_closure
from steep.requires import UnmetRequirement

__all__ = ["Backward", "Batches"]

_FILE = "steep.pt"


class Backward:
    """A backward rule and other parts of a training run under an `Accelerator`.

    Call it with the losses instead of ``accelerator.backward(loss)``, and `step` after ``optimizer.step()``. Rule and
    parts are built before or after `accelerator.prepare`. `accelerator.save_state` and `load_state` take their state
    along, in a file that is read without unpickling. A method on the loader wraps the prepared loader:
    ``EfficientTrain(Batches(loader), ...)``. In several processes a rule on the per-example engine sees the
    batch of all processes (`GlobalBatch`).

    Args:
        accelerator: the one that prepared, or will prepare, model and optimizer.
        model: what is trained.
        parts: objects with a `step()`, a state or requirements: losses, handles of models, loaders, schedules.
            Optimizers are only checked; the loop steps them.
        rule: backward rule; the ordinary mean by default.

    Raises:
        UnmetRequirement: the accelerator lacks what a part requires; names it and the line to change.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from steep.backward.sven import Sven
        >>> accelerator, model = Accelerator(cpu=True), torch.nn.Linear(3, 1)
        >>> backward = Backward(accelerator, model, rule=Sven(model))
        >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
        >>> x, y = torch.randn(4, 3), torch.randn(4)
        >>> with accelerator.accumulate(model):
        ...     optimizer.zero_grad()
        ...     backward(model(x).squeeze(-1) - y)
        ...     optimizer.step()
        ...     backward.step()
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, *parts: Any, rule: Any = None):
        if accelerator.num_processes > 1 and hasattr(rule, "engine") and not isinstance(rule, GlobalBatch):
            rule = GlobalBatch(rule)
        self.accelerator = accelerator
        for part in parts:
            _check_closure(part, accelerator)
        stepped = [part for part in parts if not isinstance(part, Optimizer)]
        # unlike Lightning and the Trainer, this loop passes whatever the user computes, so a dict of tasks as well
        refused = {requirement: line for requirement, line in ELSEWHERE.items() if requirement != "tasks"}
        self.attached = Attached("Accelerate", model, rule, stepped, refused)
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def __call__(self, losses: Tensor | dict[str, Tensor]) -> None:
        """Fill ``.grad`` from the losses of a batch, or of a part of it under gradient accumulation."""
        scaler = self.accelerator.scaler
        scale = scaler.get_scale() if scaler is not None else 1.0
        self.attached.backward(losses, scale / self.accelerator.gradient_accumulation_steps)

    def step(self) -> None:
        """Step the parts; nothing happens until gradient accumulation is complete."""
        if self.accelerator.sync_gradients:
            self.attached.step()

    def _save(self, models: Any, weights: Any, directory: str) -> None:
        if self.accelerator.is_main_process:
            checkpoint.save(Path(directory) / _FILE, {"parts": self.attached.state_dict()})

    def _load(self, models: Any, directory: str) -> None:
        self.attached.load_state_dict(checkpoint.load(Path(directory) / _FILE)["parts"])


def _check_closure(part: Any, accelerator: Accelerator) -> None:
    if accelerator.scaler is None or not isinstance(part, Optimizer):
        return
    inner = getattr(part, "optimizer", part)
    if "closure" in getattr(inner, "requires", ()) or requires_closure(inner):
        raise UnmetRequirement(
            f"{type(inner).__name__} needs a closure, which a gradient scaler cannot give: use mixed_precision='bf16'"
        )

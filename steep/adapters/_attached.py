"""What every host trainer does for methods: check requirements, call the rule, step the parts, save their state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from steep.adapters._sharding import check_sharding
from steep.adapters.distributed import GlobalBatch
from steep.batches import Batch
from steep.loop.checkpoint import CheckpointError
from steep.recipe import Mean
from steep.requires import REQUIREMENTS, Facts, UnmetRequirement, check_losses, check_requirements

OF_THE_BATCH = frozenset({"indices", "classes", "images"})
ELSEWHERE = {
    "clients": "the method owns the outer loop; iterate over it, with this model as its model, or use steep.fit",
    "tasks": "use a plain loop or Accelerate, where a rule is given the dict itself",
    "val_batch": "use steep.fit, which has the validation loader",
}


class Attached:
    """A backward rule and the other parts of a training run, for a host that knows nothing of them.

    Args:
        host: its name, for messages.
        model: what is trained.
        rule: backward rule; the ordinary mean where it is `None`.
        parts: whatever has `step()`, `state_dict()` or `requires`: losses, handles, loaders, optimizers.
        refused: requirements that the host cannot meet, and the line to change for each.

    Raises:
        UnmetRequirement: naming the part, what is missing and the line to change.
    """

    def __init__(self, host: str, model: nn.Module, rule: Any, parts: Iterable[Any], refused: Mapping[str, str]):
        self.host, self.model, self.refused = host, model, refused
        self.rule = Mean() if rule is None else rule
        self.parts: list[Any] = []
        self._saw_batch = self._saw_shards = False
        self.check(self.rule)
        for part in parts:
            self.add(part)

    def add(self, part: Any) -> None:
        """Check a part, and step and save it from now on."""
        self.check(part)
        self.parts.append(part)

    @property
    def requires(self) -> frozenset[str]:
        return frozenset().union(*(getattr(part, "requires", ()) for part in (self.rule, *self.parts)))

    def check(self, part: Any) -> None:
        """Refuse a part that the host cannot serve."""
        name, requires = _name(part), set(getattr(part, "requires", ()))
        if hasattr(part, "__next__"):  # owns the outer loop, whatever it declares
            requires.add("clients")
        for requirement in sorted(requires & set(self.refused)):
            raise UnmetRequirement(
                f"{name} needs {REQUIREMENTS[requirement].what}, which {self.host} cannot give: "
                f"{self.refused[requirement]}"
            )
        check_requirements(name, requires & {"independent_examples"}, Facts(self.model, None, None))  # type: ignore[arg-type]

    @property
    def looks_at_batches(self) -> bool:
        """Whether anything attached requires something of a batch."""
        return bool(OF_THE_BATCH & self.requires)

    def look_at(self, batch: Batch) -> None:
        """Check the first batch for what the parts require, and give the indices to a rule that asks for them."""
        if "indices" in getattr(self.rule, "requires", ()):
            self.rule.indices = batch.indices  # type: ignore[union-attr]
        if not self._saw_batch:
            for part in (self.rule, *self.parts):
                requires = OF_THE_BATCH & set(getattr(part, "requires", ()))
                check_requirements(_name(part), requires, Facts(self.model, None, batch))  # type: ignore[arg-type]
            self._saw_batch = True

    def backward(self, losses: Any, scale: float) -> None:
        """Have the rule fill ``.grad``.

        Args:
            losses: shape (B,), as the loss returned them; a dict of vectors for rules of several tasks.
            scale: product of the gradient scaler's factor and one over the number of accumulated batches.
        """
        if not self._saw_shards:  # at the first step, since a host shards the model after the parts are built
            check_sharding(self.model.parameters(), self.rule, *self.parts)
            self._saw_shards = True
        if isinstance(losses, Tensor):
            vector = _name(self.rule) if "losses" in getattr(self.rule, "requires", ()) else None
            check_losses(losses, len(losses) if losses.ndim else 1, required_by=vector)
        if hasattr(self.rule, "engine") and not isinstance(self.rule, GlobalBatch) and _processes() > 1:
            raise UnmetRequirement(
                f"{_name(self.rule)} needs the losses of all {_processes()} processes: attach "
                f"steep.adapters.distributed.GlobalBatch({_name(self.rule)}(...))"
            )
        self.rule(losses, scale=scale)

    def step(self) -> None:
        """Step every part that changes over time; call it once after each optimizer step."""
        for part in (self.rule, *self.parts):
            if hasattr(part, "step"):
                part.step()

    def _stateful(self) -> dict[str, Any]:
        named = {"rule": self.rule} | {f"part{i} {_name(part)}": part for i, part in enumerate(self.parts)}
        return {name: part for name, part in named.items() if hasattr(part, "state_dict")}

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._stateful().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        parts = self._stateful()
        if set(parts) != set(state):
            raise CheckpointError(
                f"the checkpoint holds the state of {sorted(state)}, but attached are {sorted(parts)}: attach the same"
            )
        for name, part in parts.items():
            part.load_state_dict(state[name])


def _name(part: Any) -> str:
    return getattr(part, "__name__", type(part).__name__)


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

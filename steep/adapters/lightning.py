"""Lightning: `SteepModule`, a mixin that puts a backward rule in the place of ``loss.backward()``.

Lightning's automatic optimization stays as it is: it calls `backward` on what `training_step` returned, inside the
closure that it hands to the optimizer, so an optimizer that needs a closure called again gets one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steep.adapters._attached import ELSEWHERE, Attached
from steep.batches import as_batch
from steep.loop.checkpoint import CheckpointError
from steep.loop.training import requires_closure
from steep.requires import UnmetRequirement

_Host: Any = object  # for mypy: the mixin's other attributes are the LightningModule's


class SteepModule(_Host):
    """Mixin for a `LightningModule`: write ``class Net(SteepModule, LightningModule)`` and call `attach` at the end of
    ``__init__``. `training_step` then returns one loss per example, shape (B,), alone or under "loss".

    Parts that are modules (a loss with a memory) should be attributes of the module too, so that Lightning moves and
    saves them; those given to `attach` are stepped after each optimizer step. Learning-rate schedulers are Lightning's;
    ask for ``"interval": "step"``. What you override of `on_fit_start`, `on_train_start`, `on_train_batch_start`,
    `on_save_checkpoint` and `on_load_checkpoint` must call `super()`.

    Checkpoints hold the state of rule and parts and torch's random numbers, and nothing that needs unpickling:
    ``trainer.fit(model, ckpt_path=..., weights_only=True)``.

    Raises:
        UnmetRequirement: from `attach` or before the first step; names what is missing and the line to change.

    Example:
        >>> import torch
        >>> from lightning import LightningModule
        >>> from steep.backward.sven import Sven
        >>> class Net(SteepModule, LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(3, 1)
        ...         self.attach(rule=Sven(self.layer))
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = batch
        ...         return self.layer(x).squeeze(-1) - y  # residuals, shape (B,)
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.5)
    """

    _attached: Attached
    _random: Mapping[str, Any] | None = None

    def attach(self, *parts: Any, rule: Any = None) -> None:
        """Use these in training.

        Args:
            parts: objects with a `step()`, a state or requirements: losses, handles of models, loaders.
            rule: backward rule; the ordinary mean by default.
        """
        self._attached = Attached("Lightning", self, rule, parts, ELSEWHERE)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Called by Lightning with the losses divided by the accumulation and multiplied by the gradient scaler."""
        scaler, share = _scaler(self.trainer), self.trainer.accumulate_grad_batches
        scale = (scaler.get_scale() if scaler is not None else 1.0) / share
        # Lightning has divided and multiplied the losses already; the rule is given them as they were
        self._attached.backward(loss if scale == 1.0 else loss / scale, scale)

    def on_fit_start(self) -> None:
        """Put back the random numbers of a checkpoint, before the first epoch's order is drawn."""
        super().on_fit_start()
        if self._random is not None:
            torch.set_rng_state(self._random["cpu"])
            if self._random["cuda"]:
                torch.cuda.set_rng_state_all(self._random["cuda"])
            self._random = None

    def on_train_start(self) -> None:
        """Check the optimizers."""
        super().on_train_start()
        for optimizer in self.trainer.optimizers:
            self._attached.check(optimizer)
            if "closure" in getattr(optimizer, "requires", ()) or requires_closure(optimizer):
                _check_closure(type(optimizer).__name__, self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Check what the first batch holds."""
        if self._attached.looks_at_batches:  # others may yield anything: `training_step` is the user's own
            self._attached.look_at(as_batch(batch))
        return super().on_train_batch_start(batch, batch_idx)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step the optimizer, whose closure returns the mean of the losses, and then the parts."""

        def closure() -> Tensor | None:
            losses = optimizer_closure()
            return None if losses is None else losses.mean()

        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        self._attached.step()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        checkpoint["steep"] = self._attached.state_dict()
        checkpoint["steep_random"] = {"cpu": torch.get_rng_state(), "cuda": cuda}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "steep" not in checkpoint:
            raise CheckpointError(
                "the checkpoint was written without SteepModule: it lacks the state of rule and parts"
            )
        self._attached.load_state_dict(checkpoint["steep"])
        self._random = checkpoint["steep_random"]


def _scaler(trainer: Any) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _check_closure(name: str, trainer: Any) -> None:
    """Refuse an optimizer that calls its closure again where Lightning withholds it or accumulates gradients."""
    if _scaler(trainer) is not None:
        raise UnmetRequirement(
            f"{name} needs a closure, which Lightning's precision='16-mixed' calls once and withholds: use 'bf16-mixed'"
        )
    count = trainer.accumulate_grad_batches
    if count > 1:
        raise UnmetRequirement(
            f"{name} needs a closure for the whole batch, but accumulate_grad_batches={count} gives it one for the "
            "last part: set it to 1 with a larger batch_size"
        )

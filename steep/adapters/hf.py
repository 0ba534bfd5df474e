"""Hugging Face Trainer: `SteepMixin` gives its `training_step` a vector of losses and a backward rule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback

from steep.adapters._attached import ELSEWHERE, Attached
from steep.adapters._batches import Batches, size_of
from steep.batches import Batch, Indexed
from steep.loop import checkpoint as checkpoints
from steep.loop.training import requires_closure
from steep.requires import UnmetRequirement

_FILE = "steep.pt"
_Host: Any = object  # for mypy: the mixin's other attributes are the Trainer's
_NO_CLOSURE = "the Trainer calls optimizer.step() without one; use Lightning, Accelerate or a plain loop"


class SteepMixin(_Host):
    """Mixin for a Hugging Face `Trainer`: write ``class MyTrainer(SteepMixin, Trainer)``.

    The gradient is that of the mean over all examples of a step, however they are split by gradient accumulation.
    Checkpoints hold the state of rule and parts in `steep.pt`, read without unpickling. Where a part needs indices,
    every example gets its position in the training set; the model does not see it.

    Args:
        rule: backward rule; the ordinary mean by default.
        loss: ``loss(logits, labels) -> (B,)``, with `indices=` where it needs them. Without it, the model's own loss or
            `compute_loss_func` is used, which should then return one number per example.
        parts: other objects with a `step()`, a state or requirements.
        sampler: ``sampler(dataset) -> Sampler`` of the training data.
        data: ``data(loader) -> loader``: a method on batches of the training loader, such as
            ``lambda batches: EfficientTrain(batches, total_steps=...)``.
        args, kwargs: the Trainer's; steep's optimizers go into ``optimizers=(optimizer, scheduler)``.

    Raises:
        UnmetRequirement: the Trainer lacks what a part requires; names it and the line to change.
    """

    train_dataset: Any
    train_loader: Any = None

    def __init__(
        self,
        *args: Any,
        rule: Any = None,
        loss: Callable[..., Tensor] | None = None,
        parts: tuple[Any, ...] = (),
        sampler: Callable[[Dataset], Sampler] | None = None,
        data: Callable[[Any], Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.loss, self.sampler, self.data, self._examples = loss, sampler, data, 0
        self._input = getattr(self.model, "main_input_name", "input_ids")
        if isinstance(loss, nn.Module):
            loss.to(self.args.device)
        parts = parts if loss is None else (loss, *parts)
        self.attached = Attached("the Trainer", self.model, rule, parts, {**ELSEWHERE, "closure": _NO_CLOSURE})
        if self.args.n_gpu > 1:
            raise UnmetRequirement("per-example losses need one GPU per process: start the script with torchrun")
        if "indices" in self.attached.requires and self.train_dataset is not None:
            self.train_dataset = Indexed(self.train_dataset)
        self.add_callback(_Steps(self.attached))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "indices" not in self._signature_columns:  # the Trainer drops columns that the model does not take
            self._signature_columns: list[str] = [*self._signature_columns, "indices"]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return super()._get_train_sampler(train_dataset) if self.sampler is None else self.sampler(dataset)

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if self.data is None:
            return loader
        self.attached.parts = [part for part in self.attached.parts if part is not self.train_loader]
        self.train_loader = self.data(Batches(loader))
        self.attached.add(self.train_loader)
        return self.train_loader

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._examples = sum(size_of(batch) for batch in batches)  # of the step, for parts of unlike size
        return batches, items

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        indices = inputs.pop("indices", None)
        if self.loss is None:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        if isinstance(self.loss, nn.Module):
            self.loss.train(model.training)
        memory = {"indices": indices} if "indices" in getattr(self.loss, "requires", ()) and model.training else {}
        losses = self.loss(outputs["logits"], labels, **memory)
        return (losses, outputs) if return_outputs else losses

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward, losses, and the rule in the place of `accelerator.backward`."""
        model.train()
        getattr(self.optimizer, "train", bool)()
        inputs = self._prepare_inputs(inputs)
        self.attached.look_at(Batch(inputs.get(self._input), inputs.get("labels"), inputs.get("indices")))
        with self.compute_loss_context_manager():
            losses = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        share = 1.0 if losses.ndim == 0 and self._is_scaled(num_items_in_batch) else size_of(inputs) / self._examples
        scaler = self.accelerator.scaler
        self.attached.backward(losses, share * (scaler.get_scale() if scaler is not None else 1.0))
        return losses.detach().mean() * share

    def _is_scaled(self, items: Any) -> bool:
        """Whether a scalar loss is that of the whole step already, as the Trainer decides it."""
        if self.loss is not None or self.loss_is_scaled_for_ga is not None:
            return self.loss is None and self.loss_is_scaled_for_ga
        return items is not None and (self.model_accepts_loss_kwargs or self.compute_loss_func is not None)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            checkpoints.save(Path(output_dir) / _FILE, {"parts": self.attached.state_dict()})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.attached.load_state_dict(checkpoints.load(Path(checkpoint) / _FILE)["parts"])


class _Steps(TrainerCallback):
    """Checks the optimizer, and steps the parts after it."""

    def __init__(self, attached: Attached):
        self.attached = attached

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        self.attached.check(optimizer)
        if requires_closure(optimizer):
            raise UnmetRequirement(f"{type(optimizer).__name__} needs a closure: {_NO_CLOSURE}")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.attached.step()

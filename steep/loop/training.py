"""A recipe's parts, built for one run, and one step of them. `fit` is the loop around it."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer

from steep.batches import Batch, as_batch, forward, logits, tensors
from steep.loop.checkpoint import check_same_model
from steep.loop.checks import check_batch_norm, check_part, explained
from steep.loop.epochs import Epochs
from steep.loop.groups import build_in_groups
from steep.loop.measure import Stopwatch
from steep.loop.modes import evaluating, start_training
from steep.loop.schedules import build_schedule
from steep.loop.scoring import score
from steep.loop.stopping import Stopper
from steep.recipe import Recipe, Run
from steep.requires import Facts, check_losses, check_requirements, weighted
from steep.roles import param_roles
from steep.splits import Data
from steep.utils.loaders import release
from steep.utils.randomness import Stream, current_state, generator, set_current_state


@dataclass
class History:
    """Mean training loss of every step, and one entry per evaluation."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)


class NonFinite(ArithmeticError):
    """A loss became NaN or infinite; the message names the step, the examples and the way back."""


class RunError(RuntimeError):
    """A run of a comparison raised an error; the message names the arm, the seed and the place."""


def accelerator(device: str | None, precision: str, **trackers: Any) -> Accelerator:
    """Accelerate's view of this process; its state is reset, so that one process can run several precisions."""
    if precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"precision={precision!r} must be 'no', 'bf16' or 'fp16'")
    if device not in (None, "cpu"):
        raise ValueError(f"device={device!r} must be None (the accelerator, if there is one) or 'cpu'")
    AcceleratorState._reset_state(reset_partial_state=True)
    found = Accelerator(cpu=device == "cpu", mixed_precision=precision, **trackers)
    if found.num_processes > 1:
        raise ValueError(f"fit runs in one process, not in {found.num_processes}: start it without a launcher")
    return found


class Training:
    """Everything one run is made of: built in the order data, model, loss, rule, optimizer, scheduler, rounds."""

    def __init__(self, recipe: Recipe, seed: int, split_seed: int, accelerator: Accelerator, accumulate: int = 1):
        started = time.process_time()
        self.recipe, self.accelerator, self.accumulate = recipe, accelerator, accumulate
        self.device = accelerator.device
        data = check_part(recipe.data(generator(split_seed, "split")), "data", Data)
        if len(data.train) == 0 or len(data.val) == 0:
            raise ValueError("the data are empty: the train and val loaders need at least one batch each")
        self.run = Run(
            data, seed, len(data.train), recipe.budget.total_steps(len(data.train)), generator(seed, "parts")
        )
        # set before loss and rule are built, which may look at the model; unwrapped, so that they see its own layers
        self.run.model = model = check_part(recipe.build("model", self.run), "model", nn.Module)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(f"{type(model).__name__} has no parameter to train (none at all, or all are frozen)")
        self.loss = recipe.build("loss", self.run)
        if isinstance(self.loss, nn.Module):
            self.loss = self.loss.to(self.device)
        self.score = recipe.build("score", self.run) or self.loss
        if isinstance(self.score, nn.Module):
            self.score = self.score.to(self.device)
        self.model = accelerator.prepare_model(model)
        self.rule = recipe.build("backward", self.run)(self.model)
        # after the model is on its device: optimizers make state beside the parameters they are given
        plain = self._optimizer()
        self.scheduler = build_schedule(recipe.scheduler, plain, self.run) if recipe.scheduler else None
        # Accelerate's wrapper costs 0.2 ms a step; only a gradient scaler needs it
        self.optimizer = accelerator.prepare_optimizer(plain) if accelerator.scaler is not None else plain
        self.stopwatch, self.history, self.examples = Stopwatch(), History(), 0
        self.elapsed = self._before = 0  # steps of the budget
        self.rounds = self._rounds(seed)
        self.owned = [plain, self.loss, self.score, self.rule, *self.run.parts]
        start_training([self.model, *self.owned])
        changing = (self.scheduler, self.run.data.train, self.loss, *self.run.parts)
        self.steps = [part.step for part in changing if hasattr(part, "step")]
        self.named = {"loss": self.loss, "rule": self.rule, "optimizer": plain, "rounds": self.rounds}
        self.requires = {name: frozenset(getattr(part, "requires", ())) for name, part in self.named.items()}
        self.uses_closure = "closure" in self.requires["optimizer"] or requires_closure(plain)
        self.rule_uses_closure = "closure" in self.requires["rule"]
        self.stopper: Stopper | None = None
        self.stopper = self._stopper()
        self.preparation_seconds = time.process_time() - started
        self.vector_for = next(
            (_name(self.named[k]) for k, requires in self.requires.items() if "losses" in requires), None
        )

    def _optimizer(self) -> Optimizer:
        """The recipe's, over `_trainable`, in the recipe's groups."""
        named = self._trainable()
        if not self.recipe.groups:
            return check_part(self.recipe.optimizer(list(named.values())), "optimizer", Optimizer)
        return build_in_groups(self.recipe.optimizer, named, param_roles(self.model), self.recipe.groups)

    def _trainable(self) -> dict[str, nn.Parameter]:
        """The model's parameters that train, and the loss's own (a temperature, proxies of classes), by name."""
        own = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        loss = self.loss.named_parameters(prefix="loss") if isinstance(self.loss, nn.Module) else ()
        taken = set(own.values())
        beside = {name: p for name, p in loss if p.requires_grad and p not in taken}
        if beside and self.recipe.rounds is not None:
            raise ValueError(
                f"{_name(self.loss)} has {len(beside)} parameters of its own, but the recipe's rounds train the "
                "model's only: freeze them with requires_grad_(False), or make them part of the model"
            )
        return {**own, **beside}

    def _check_trained(self) -> None:
        """Refuse what got a gradient that no optimizer follows; called once, after the first step."""
        for part in (self.rule, *self.run.parts):
            if not isinstance(part, nn.Module):
                continue
            optimizers = [self.named["optimizer"], *(v for v in vars(part).values() if isinstance(v, Optimizer))]
            trained = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
            idle = [name for name, p in part.named_parameters() if p.grad is not None and p not in trained]
            if idle:
                raise ValueError(
                    f"{_name(part)} has parameters that no optimizer trains, although they get gradients: "
                    f"{', '.join(idle[:3])}. Freeze them with requires_grad_(False), or give the part an optimizer of "
                    "its own that its step() steps"
                )

    def _stopper(self) -> Stopper | None:
        rule, metric = self.recipe.early_stopping, self.recipe.metric
        if rule is None:
            return None
        parts = {name: part for name, part in self._stateful().items() if name not in ("train", "rounds", "scheduler")}
        higher = rule.score != "loss" and metric is not None and metric.higher_is_better
        return Stopper(rule, rule.every or self.run.steps_per_epoch, higher, parts)

    def _rounds(self, seed: int) -> Iterator[Tensor | float]:
        if self.recipe.rounds is None:
            return Epochs(self.run.data.train, self.train_step, Stream(seed, "order"))
        return self.recipe.rounds(self.model, self.run, self.losses)

    def check(self) -> None:
        """Compare what the parts need with what the first batch shows.

        Raises:
            UnmetRequirement: naming the part, what is missing and the line to change.
        """
        with Stream(0, "check").active():  # or this one batch more would change the order of all others
            batch = as_batch(next(iter(self.run.data.train)))
            data = self.run.data
            loaders = data.clients if self.recipe.rounds is not None and data.clients else [data.train]
            check_batch_norm(self.model, loaders, self.accumulate, self._placed(batch))
        facts = Facts(self.model, self.run.data, batch)
        for part in (*self.named.values(), self.run.data.train, *self.run.parts):
            check_requirements(_name(part), getattr(part, "requires", ()), facts)

    @property
    def step(self) -> int:
        return len(self.history.losses)

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """One loss per example of a batch: forward pass and loss, checked. The `local_step` of outer loops."""
        return self._forward(model, batch)[0]

    def _forward(self, model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        """The losses of a batch, and their mean."""
        batch = self._placed(batch)
        self.examples += batch.size
        losses = self._evaluate(model, batch)
        check_losses(losses, batch.size, required_by=self.vector_for)
        if not losses.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "the losses depend on no parameter of the model: were they computed under no_grad, detached, or from "
                "an argmax?"
            )
        mean = losses.detach().mean().item()  # waits for the device: the price of stopping before a bad step
        if not math.isfinite(mean):
            raise NonFinite(self._diagnosis(batch, losses))
        return losses, mean

    def _placed(self, item: Any) -> Batch:
        batch = as_batch(item)
        return batch if self.device.type == "cpu" else send_to_device(batch, self.device)

    def _evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        if "indices" in self.requires["rule"]:
            self.rule.indices = batch.indices
        try:
            output = forward(model, batch.x)
        except Exception as error:
            raise explained(error, "model", batch.x)  # noqa: B904  (the same error)
        if "classes" in self.requires["loss"]:
            output = logits(output)
        try:
            losses = self.loss(output, batch.y, **self._asked(batch))
        except Exception as error:
            raise explained(error, "loss", output, batch.y)  # noqa: B904
        return losses if batch.weights is None else weighted(losses, batch.weights)

    def _asked(self, batch: Batch) -> dict[str, Any]:
        """What the loss needs to know of the examples beside their targets."""
        requires, domains = self.requires["loss"], self.run.data.domains
        asked = {"indices": batch.indices} if "indices" in requires else {}
        if "domains" in requires and domains is not None and batch.indices is not None:
            asked["domains"] = domains[batch.indices.cpu()]
        return asked

    def _backward(self, batch: Batch, scale: float) -> float:
        """Have the rule fill ``.grad``, and return the batch's mean loss."""
        losses, mean = self._forward(self.model, batch)
        again = {"closure": lambda: self._evaluate(self.model, self._placed(batch))} if self.rule_uses_closure else {}
        self.rule(losses, scale=scale, **again)
        return mean

    def gradient(self, batch: Batch) -> float:
        """Fill ``.grad`` from one batch, in `accumulate` parts, clip it, and return the batch's mean loss."""
        self.optimizer.zero_grad()
        scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler is not None else 1.0
        if self.accumulate == 1:
            mean = self._backward(batch, scale)
        else:
            shares = [(part, part.size / batch.size) for part in batch.split(self.accumulate)]
            mean = sum(self._backward(part, scale * share) * share for part, share in shares)
        if self.recipe.max_grad_norm is not None:  # Accelerate's, which takes the scale of mixed precision off before
            parameters = [p for group in self.named["optimizer"].param_groups for p in group["params"]]
            self.accelerator.clip_grad_norm_(parameters, self.recipe.max_grad_norm)
        return mean

    def train_step(self, batch: Batch) -> float:
        """One optimizer step; the mean loss it started from."""
        if self.uses_closure:
            means: list[float] = []

            def closure() -> float:
                means.append(self.gradient(batch))
                return means[-1]

            self.optimizer.step(closure)
            return means[0]
        mean = self.gradient(batch)
        self.optimizer.step()
        return mean

    def advance(self) -> None:
        """Do one step (or round), then step everything that changes over a run.

        What has the run's length for its horizon is stepped once for every step of the budget that has passed:
        the optimizer's, unless the batches change in size and the training loader counts them in batches of its own.
        """
        losses = next(self.rounds)
        if self.step == 0:
            self._check_trained()
        self.history.losses.append(losses if isinstance(losses, float) else losses.mean().item())
        if hasattr(self.rule, "step"):
            self.rule.step()
        self._before, self.elapsed = self.elapsed, self._elapsed()
        for _ in range(self.elapsed - self._before):
            for step in self.steps:
                step()

    def _elapsed(self) -> int:
        steps = getattr(self.run.data.train, "elapsed", self.step)
        return steps if self.run.horizon is None else min(steps, self.run.horizon)

    def passed(self, every: int) -> bool:
        """Whether a multiple of so many steps of the budget has been reached since the step before."""
        return self.elapsed // every > self._before // every

    def due(self, every: int) -> bool:
        """Whether it is time for an evaluation: every so many steps, and where early stopping wants to look."""
        return self.passed(every) or (self.stopper is not None and self.passed(self.stopper.every))

    def finished(self) -> bool:
        """Whether the budget is used up, or early stopping ends the run before."""
        horizon, seconds = self.run.horizon, self.recipe.budget.seconds
        if self.stopper is not None and self.stopper.stopped:
            return True
        return (horizon is not None and self.elapsed >= horizon) or (
            seconds is not None and self.stopwatch.read()[0] >= seconds
        )

    def evaluate(self, loader: Any) -> dict[str, float]:
        """Held-out scores, in evaluation mode, with evaluation weights, on the same random numbers every time."""
        with self.stopwatch.pause(), Stream(self.run.seed, "evaluation").active(), evaluating(self.model, self.owned):
            return score(self.model, loader, self.score, self.recipe.metric, self.device)

    def record(self) -> dict[str, float]:
        """Evaluate on the validation data and enter it into the history."""
        seconds, cpu_seconds = self.stopwatch.read()
        entry = {"step": self.step, "examples": self.examples, "seconds": seconds, "cpu_seconds": cpu_seconds}
        entry |= self.evaluate(self.run.data.val)
        self.history.evaluations.append(entry)
        if self.stopper is not None and (self.finished() or self.passed(self.stopper.every)):
            self.stopper.look(entry)
        return entry

    def end(self) -> dict[str, float]:
        """The evaluation that the run ends with: the last one, or early stopping's best, whose weights are restored."""
        if self.stopper is None or self.stopper.state is None or self.stopper.best is None:
            return self.history.evaluations[-1]
        self.stopper.restore()
        return self.stopper.best

    def close(self) -> None:
        """End the worker processes of loaders, also in the middle of an epoch."""
        if hasattr(self.rounds, "close"):
            self.rounds.close()
        for loader in (self.run.data.train, self.run.data.val, self.run.data.test, *self.run.data.clients):
            release(loader)

    def _stateful(self) -> dict[str, Any]:
        parts = {"model": self.model, "train": self.run.data.train}  # before the rounds, which replay batches
        parts |= {f"part{i}": part for i, part in enumerate(self.run.parts)}
        parts |= {**self.named, "scheduler": self.scheduler, "stopper": self.stopper}
        return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}

    def state_dict(self) -> dict[str, Any]:
        seconds, cpu_seconds = self.stopwatch.read()
        return {
            "parts": {name: part.state_dict() for name, part in self._stateful().items()},
            "random": {
                "default": current_state(),
                "parts": self.run.generator.get_state(),
            },
            "history": asdict(self.history),
            "cost": {"examples": self.examples, "seconds": seconds, "cpu_seconds": cpu_seconds},
        }

    def load_state_dict(self, state: dict[str, Any], path: Any) -> None:
        check_same_model(state["parts"]["model"], self.model.state_dict(), path)
        parts = self._stateful()
        if set(parts) != set(state["parts"]):
            raise ValueError(
                f"{path} is of another recipe: it holds {sorted(state['parts'])}, this one {sorted(parts)}"
            )
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        self.history, self.examples = History(**state["history"]), state["cost"].pop("examples")
        self.elapsed = self._elapsed()
        self.stopwatch = Stopwatch(**state["cost"])
        self.run.generator.set_state(state["random"]["parts"])
        set_current_state(state["random"]["default"])

    def _diagnosis(self, batch: Batch, losses: Tensor) -> str:
        bad = ~losses.detach().isfinite()
        rows = bad.nonzero().flatten().tolist() if losses.ndim else list(range(batch.size))
        examples = batch.indices[rows].tolist() if batch.indices is not None else rows
        return (
            f"the loss is not finite at step {self.step} for example{'s' if len(rows) > 1 else ''} "
            f"{_shorten(examples)}{'' if batch.indices is not None else ' of the batch'}: {self._culprit(batch)}"
        )

    def _culprit(self, batch: Batch) -> str:
        for name, value in tensors(batch):
            if not value.isfinite().all():
                return f"the {name} of this batch contain NaN or inf; clean the data"
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                return (
                    f"parameter {name!r} is not finite, so an earlier gradient or step was not; lower the learning rate"
                )
        return (
            "inputs, targets and parameters are finite, so it is the forward pass or the loss; lower the learning rate"
        )


def _name(part: Any) -> str:
    return getattr(part, "__name__", type(part).__name__)


def _shorten(items: list[int], most: int = 8) -> str:
    return f"{items[:most]}" + (f" and {len(items) - most} more" if len(items) > most else "")


def requires_closure(optimizer: Any) -> bool:
    """Whether an optimizer's `step` cannot do without a closure, as `torch.optim.LBFGS`'s."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty

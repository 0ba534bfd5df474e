"""Federated training in one process: many clients, one server, and the messages between them.

A method is a subclass of `Federation`: two pure functions of explicit state, and a dataclass's fields for its
hyper-parameters. Everything else stands here and only moves what the two functions exchange::

    client_step(state, received, batches, *, ...) -> (state, message)      # on a client
    server_step(state, messages, *, ...)          -> (state, broadcast)    # on the server

States and messages are flat dicts of tensors and plain numbers, so that they can be pickled, saved and sent as they
are. Tensors that belong together share a prefix (``"parameter.0.weight"``): `put` and `take` add and strip it. A
client's ``message["losses"]`` is for monitoring only; no `server_step` reads it, and a back-end that sends messages
to another machine may drop it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from steep.loop.epochs import generators
from steep.requires import REQUIREMENTS, UnmetRequirement
from steep.splits import Loader, count_examples
from steep.utils.randomness import Stream
from steep.utils.randomness import generator as generator_of
from steep.utils.validation import require

Tensors = dict[str, Tensor]
State = dict[str, Any]
Message = dict[str, Any]
Step = Callable[..., tuple[State, Message]]


# ---- messages


def put(group: str, tensors: Mapping[str, Tensor]) -> Message:
    """The tensors under the names they have in a message: ``"weight"`` becomes ``"group.weight"``."""
    return {f"{group}.{name}": tensor for name, tensor in tensors.items()}


def take(group: str, message: Mapping[str, Any]) -> Tensors:
    """The tensors of one group of a message, under their own names; empty where there are none."""
    return {key[len(group) + 1 :]: value for key, value in message.items() if key.startswith(f"{group}.")}


def mean(group: str, messages: Sequence[Message], weights: Sequence[float] | None = None) -> Tensors:
    """Weighted mean of one group over messages; integers are rounded.

    Raises:
        ValueError: no message, or weights that are not all positive.
    """
    if not messages:
        raise ValueError("messages is empty: a round needs the message of at least one client")
    weights = [1.0] * len(messages) if weights is None else weights
    if not min(weights) > 0:
        raise ValueError(f"weights={list(weights)} must be positive")
    return {name: _mean([take(group, m)[name] for m in messages], weights) for name in take(group, messages[0])}


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    stacked, total = torch.stack(list(tensors)), sum(weights)
    # sums of half-precision tensors are taken in float32, so that there is one rounding and not one per client
    kind = torch.promote_types(stacked.dtype, torch.float32)
    shares = torch.tensor([w / total for w in weights], dtype=kind, device=stacked.device)
    average = torch.tensordot(shares, stacked.to(kind), dims=1)
    if not stacked.is_floating_point():
        average = average.round()
    # constants (masks, tables) come back as they were: rounding would let them drift over the rounds
    return torch.where((stacked == stacked[0]).all(0), stacked[0], average.to(stacked.dtype))


# ---- arithmetic on dicts of tensors; nothing is changed in place


def add(x: Tensors, y: Tensors, factor: float = 1.0) -> Tensors:
    """``x + factor * y``."""
    return dict(zip(x, torch._foreach_add(list(x.values()), [y[name] for name in x], alpha=factor), strict=True))


def scale(x: Tensors, factor: float | Tensor) -> Tensors:
    """``factor * x``."""
    return dict(zip(x, torch._foreach_mul(list(x.values()), factor), strict=True))


def zeros(x: Tensors) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in x.items()}


def norm(x: Tensors) -> Tensor:
    """Euclidean norm of all tensors together, 0-d."""
    return get_total_norm(list(x.values()))


def clip(gradient: Tensors, max_norm: float) -> Tensors:
    """The gradient, shortened to `max_norm` where it is longer, as in `torch.nn.utils.clip_grad_norm_`."""
    if max_norm == math.inf:
        return gradient
    return scale(gradient, (max_norm / (norm(gradient) + 1e-6)).clamp(max=1.0))


def descend(x: Tensors, gradient: Tensors, lr: float, weight_decay: float = 0.0) -> Tensors:
    """One step of SGD, ``x - lr * (gradient + weight_decay * x)``."""
    return add(x, add(gradient, x, weight_decay) if weight_decay else gradient, -lr)


# ---- the model, as a function


def trainable(model: nn.Module) -> Tensors:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def copies(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def snapshot(model: nn.Module) -> Message:
    """Copies of the trainable parameters (group ``parameter``) and the buffers (group ``buffer``)."""
    return put("parameter", copies(trainable(model))) | put("buffer", copies(dict(model.named_buffers())))


@torch.no_grad()
def overwrite(own: Tensors, given: Tensors) -> None:
    """Copy `given` into the tensors of the same names, in place."""
    if given:
        torch._foreach_copy_([own[name] for name in given], list(given.values()))


class Evaluation(NamedTuple):
    """A batch at a point: its losses, the gradient of their mean, and the buffers after the forward pass."""

    losses: Tensor
    gradient: Tensors
    buffers: Tensors


class Oracle:
    """The first-order oracle of a client: `Evaluation` as a function of parameters, buffers and a batch alone.

    The model is only the place of the computation: its tensors are overwritten at each call.

    Args:
        model: any module.
        local_step: ``local_step(model, batch) -> losses``, one number per example, forward pass and loss only.
    """

    def __init__(self, model: nn.Module, local_step: Callable[[nn.Module, Any], Tensor]):
        self.model, self.local_step, self.parameters = model, local_step, trainable(model)

    def __call__(self, parameters: Tensors, buffers: Tensors, batch: Any) -> Evaluation:
        overwrite(self.parameters, parameters)
        if buffers:  # looked up at each call: a module may replace its buffers in the forward pass
            overwrite(dict(self.model.named_buffers()), buffers)
        with torch.enable_grad():
            losses = self.local_step(self.model, batch)
            # autograd.grad, not backward: whatever the user keeps in .grad stays
            own = [self.parameters[name] for name in parameters]
            gradient = torch.autograd.grad(losses.mean(), own, materialize_grads=True)
        after = copies(dict(self.model.named_buffers())) if buffers else {}
        return Evaluation(losses.detach().reshape(-1), dict(zip(parameters, gradient, strict=True)), after)


# ---- the rounds


@dataclass(eq=False)
class Federation:
    """Iterator over communication rounds, clients and server in this process.

    Each item is one round: clients are sampled uniformly without replacement, each does its `client_step` from the
    latest broadcast, the server does its `server_step`, and the model holds the result. The item is the detached
    losses that the clients saw, one per example. A round that fails changes no state.

    All randomness is a function of one seed, the round and the client (data order apart from the forward pass's). It
    does not depend on where clients run or in which order, and two methods of equal seed sample the same clients
    and give them the same batches. A client starts a fresh pass over its loader each round.

    A method defines `client_step` and `server_step` as static methods, and as fields the hyper-parameters that it
    adds or whose default differs. A step names, as keyword-only arguments, the hyper-parameters that it reads; it may
    also ask for the ``oracle`` and for ``num_clients``. The first state of a client is ``{"examples": n}``.

    The arguments and errors are those that `FedAvg` documents; it adds `weighted` only.
    """

    requires = frozenset({"clients"})
    client_step: ClassVar[Step]
    server_step: ClassVar[Step]

    model: nn.Module = field(repr=False)
    clients: Sequence[Loader] = field(repr=False)
    local_step: InitVar[Callable[[nn.Module, Any], Tensor]]
    _: KW_ONLY
    generator: InitVar[torch.Generator]
    fraction: float = 0.25
    local_steps: int = 20
    lr: float = 0.1
    lr_decay: float = 1.0
    weight_decay: float = 0.0
    clip_norm: float = math.inf

    def __post_init__(self, local_step: Callable[[nn.Module, Any], Tensor], generator: torch.Generator) -> None:
        self._check()
        self.oracle, self.num_clients = Oracle(self.model, local_step), len(self.clients)
        self.on_client, self.on_server = self._bound(self.client_step), self._bound(self.server_step)
        self.seed, self.round = int(torch.randint(2**62, (), generator=generator)), 0
        self.states: list[State] = [{"examples": _examples(i, loader)} for i, loader in enumerate(self.clients)]
        self.server: State = snapshot(self.model) | {"lr": self.lr}
        self.broadcast: Message = self.server

    def _check(self) -> None:
        """Refuse hyper-parameters out of range; a method extends it by its own."""
        require("lr", self.lr, self.lr > 0, "positive")
        require("lr_decay", self.lr_decay, 0 < self.lr_decay <= 1, "in (0, 1]")
        require("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        require("clip_norm", self.clip_norm, self.clip_norm > 0, "positive (math.inf: no clipping)")
        if len(self.clients) == 0:
            raise UnmetRequirement(
                f"{type(self).__name__} needs {REQUIREMENTS['clients'].what}: {REQUIREMENTS['clients'].remedy}"
            )
        require("fraction", self.fraction, 0 < self.fraction <= 1, "in (0, 1]")
        whole = isinstance(self.local_steps, int) and self.local_steps >= 1
        require("local_steps", self.local_steps, whole, "an integer >= 1")

    def _bound(self, step: Step) -> Step:
        """The step with its keyword-only arguments filled in by name, from this object's attributes."""
        parameters = inspect.signature(step).parameters.values()
        return partial(step, **{p.name: getattr(self, p.name) for p in parameters if p.kind is p.KEYWORD_ONLY})

    def __iter__(self) -> Federation:
        return self

    def __next__(self) -> Tensor:
        try:
            done = {i: self._visit(i) for i in self.sample()}
            messages = [message for _, message in done.values()]
            self.server, self.broadcast = self.on_server(self.server, messages)
        finally:
            self._load()  # the oracle has left a client's tensors in the model, also where the round failed
        for i, (state, _) in done.items():
            self.states[i] = state
        self.round += 1
        return torch.cat([message["losses"] for message in messages])

    def sample(self) -> list[int]:
        """The clients of the coming round, in ascending order."""
        count = max(1, round(self.fraction * len(self.clients)))
        order = torch.randperm(len(self.clients), generator=generator_of(self.seed, f"sample {self.round}"))
        return sorted(order[:count].tolist())

    def _visit(self, i: int) -> tuple[State, Message]:
        order, noise = (Stream(self.seed, f"{name} {self.round} {i}") for name in ("order", "noise"))
        batches = local_batches(self.clients[i], self.local_steps, order)
        with noise.active():  # dropout; apart from the order, which must not depend on what the model draws
            state, message = self.on_client(self.states[i], self.broadcast, batches)
        if not all(tensor.isfinite().all() for tensor in take("parameter", message).values()):
            raise ArithmeticError(
                f"client {i} sends a model that is not finite in round {self.round}, which is left undone: lower lr"
            )
        return state, message

    def _load(self) -> None:
        overwrite(trainable(self.model), take("parameter", self.broadcast))
        overwrite(dict(self.model.named_buffers()), take("buffer", self.broadcast))

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "round": self.round,
            "server": self.server,
            "broadcast": self.broadcast,
            "clients": list(self.states),
            "loaders": [[g.get_state() for g in generators(loader)] for loader in self.clients],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; the model gets its tensors too.

        Raises:
            ValueError: `state` is of another number of clients.
        """
        if len(state["clients"]) != len(self.clients):
            raise ValueError(f"the state is of {len(state['clients'])} clients, this has {len(self.clients)}")
        device = next(self.model.parameters()).device
        self.seed, self.round = state["seed"], state["round"]
        self.server, self.broadcast = _on(device, state["server"]), _on(device, state["broadcast"])
        self.states = [_on(device, client) for client in state["clients"]]
        for loader, saved in zip(self.clients, state["loaders"], strict=True):
            for generator, position in zip(generators(loader), saved, strict=True):
                generator.set_state(position)
        self._load()


def local_batches(loader: Loader, steps: int, order: Stream) -> Iterator[Any]:
    """`steps` batches of a client, pass after pass over its loader, in the order that the stream draws."""
    batches: Iterator[Any] = iter(())
    for _ in range(steps):
        with order.active():  # only while the loader draws: between batches the generator is the forward pass's
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
                batch = next(batches)
        yield batch


def _examples(i: int, loader: Loader) -> int:
    with Stream(0, "count").active():  # loaders that must be iterated to be counted draw an order
        count = count_examples(loader) if len(loader) > 0 else 0
    if count == 0:
        raise ValueError(f"clients[{i}] has no data: leave it out, or give it at least one batch")
    return count


def _on(device: torch.device, state: State) -> State:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in state.items()}

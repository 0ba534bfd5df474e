"""Federated training in one process: many clients, one server, and the messages between them.

A method is two pure functions of explicit state; what is here only moves what they exchange::

    client_step(state, received, batches) -> (state, message)      # on a client
    server_step(state, messages)          -> (state, broadcast)    # on the server

States and messages are flat dicts of tensors and plain numbers, so that they can be pickled, saved and sent as they
are. Tensors that belong together share a prefix (``"parameter.0.weight"``): `put` and `take` add and strip it. A
client's ``message["losses"]`` is for whoever watches the training; no `server_step` reads it, and a back-end that
leaves the machine may drop it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from steep.batches import Loader, count_examples
from steep.loop.epochs import generators
from steep.requires import REQUIREMENTS, UnmetRequirement
from steep.utils.randomness import Stream
from steep.utils.randomness import generator as generator_of
from steep.utils.validation import require

Tensors = dict[str, Tensor]
State = dict[str, Any]
Message = dict[str, Any]
ClientStep = Callable[[State, Message, Iterator[Any]], tuple[State, Message]]
ServerStep = Callable[[State, Sequence[Message]], tuple[State, Message]]


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
        if buffers:
            overwrite(dict(self.model.named_buffers()), buffers)
        with torch.enable_grad():
            losses = self.local_step(self.model, batch)
            # autograd.grad, not backward: whatever the user keeps in .grad stays
            own = [self.parameters[name] for name in parameters]
            gradient = torch.autograd.grad(losses.mean(), own, materialize_grads=True)
        after = copies(dict(self.model.named_buffers())) if buffers else {}
        return Evaluation(losses.detach().reshape(-1), dict(zip(parameters, gradient, strict=True)), after)


# ---- the rounds


class Federation:
    """Iterator over communication rounds, clients and server in this process.

    Each item is one round: clients are sampled uniformly without replacement, each does its `client_step` from the
    latest broadcast, the server does its `server_step`, and the model holds the result. The item is the detached
    losses that the clients saw, one per example. A round that fails changes no state.

    All randomness is a function of one seed, the round and the client (data order apart from the forward pass's). It
    does not depend on where clients run or in which order, and two methods of equal seed sample the same clients
    and give them the same batches. A client starts a fresh pass over its loader each round.

    Args:
        model: the server's model; between rounds it holds the latest parameters (trainable ones) and buffers.
        clients: one training loader per client.
        client_step, server_step: the method. A client's first state is ``{"examples": n}``.
        generator: draws the seed, once.
        lr: learning rate of the first round, ``server["lr"]``; the server broadcasts it beside the model.
        fraction: share of the clients in each round, at least one.
        local_steps: batches given to each sampled client.

    Raises:
        UnmetRequirement: no clients.
        ValueError: a client without data, or an argument out of range.
    """

    requires = frozenset({"clients"})

    def __init__(
        self,
        model: nn.Module,
        clients: Sequence[Loader],
        client_step: ClientStep,
        server_step: ServerStep,
        *,
        generator: torch.Generator,
        lr: float,
        fraction: float,
        local_steps: int,
    ):
        if len(clients) == 0:
            raise UnmetRequirement(
                f"{type(self).__name__} needs {REQUIREMENTS['clients'].what}: {REQUIREMENTS['clients'].remedy}"
            )
        require("fraction", fraction, 0 < fraction <= 1, "in (0, 1]")
        require("local_steps", local_steps, isinstance(local_steps, int) and local_steps >= 1, "an integer >= 1")
        self.model, self.loaders, self.fraction, self.local_steps = model, clients, fraction, local_steps
        self.client_step, self.server_step = client_step, server_step
        self.seed, self.round = int(torch.randint(2**62, (), generator=generator)), 0
        self.clients: list[State] = [{"examples": _examples(i, loader)} for i, loader in enumerate(clients)]
        self.server: State = snapshot(model) | {"lr": lr}
        self.broadcast: Message = self.server

    def __iter__(self) -> Federation:
        return self

    def __next__(self) -> Tensor:
        try:
            done = {i: self._visit(i) for i in self.sample()}
            messages = [message for _, message in done.values()]
            self.server, self.broadcast = self.server_step(self.server, messages)
        finally:
            self._load()
        for i, (state, _) in done.items():
            self.clients[i] = state
        self.round += 1
        return torch.cat([message["losses"] for message in messages])

    def sample(self) -> list[int]:
        """The clients of the coming round, in ascending order."""
        count = max(1, round(self.fraction * len(self.clients)))
        order = torch.randperm(len(self.clients), generator=generator_of(self.seed, f"sample {self.round}"))
        return sorted(order[:count].tolist())

    def _visit(self, i: int) -> tuple[State, Message]:
        order, noise = (Stream(self.seed, f"{name} {self.round} {i}") for name in ("order", "noise"))
        batches = local_batches(self.loaders[i], self.local_steps, order)
        with noise.active():
            state, message = self.client_step(self.clients[i], self.broadcast, batches)
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
            "clients": list(self.clients),
            "loaders": [[g.get_state() for g in generators(loader)] for loader in self.loaders],
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
        self.clients = [_on(device, client) for client in state["clients"]]
        for loader, saved in zip(self.loaders, state["loaders"], strict=True):
            for generator, position in zip(generators(loader), saved, strict=True):
                generator.set_state(position)
        self._load()


def local_batches(loader: Loader, steps: int, order: Stream) -> Iterator[Any]:
    """`steps` batches of a client, pass after pass over its loader, in the order that the stream draws."""
    batches: Iterator[Any] = iter(())
    for _ in range(steps):
        with order.active():
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
                batch = next(batches)
        yield batch


def check_local_sgd(lr: float, lr_decay: float, weight_decay: float, clip_norm: float) -> None:
    """Raise `ValueError` for hyper-parameters of local SGD that are out of range."""
    require("lr", lr, lr > 0, "positive")
    require("lr_decay", lr_decay, 0 < lr_decay <= 1, "in (0, 1]")
    require("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
    require("clip_norm", clip_norm, clip_norm > 0, "positive (math.inf: no clipping)")


def _examples(i: int, loader: Loader) -> int:
    with Stream(0, "count").active():  # loaders that must be iterated to be counted draw an order
        count = count_examples(loader) if len(loader) > 0 else 0
    if count == 0:
        raise ValueError(f"clients[{i}] has no data: leave it out, or give it at least one batch")
    return count


def _on(device: torch.device, state: State) -> State:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in state.items()}

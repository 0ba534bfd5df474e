"""FedAvg: sampled clients train the server's model on their own data, the server averages what comes back.

With N clients of n_i examples, S of them sampled, K local steps and learning rate lr, each round is::

    client i:  x = x^t;  K times: x <- x - lr * grad f_i(x; batch)         (P,)
    server:    x^{t+1} = sum_i n_i x_i / sum_i n_i                         over the sampled clients

Paper: McMahan, Moore, Ramage, Hampson, Aguera y Arcas (2017), Algorithm 1. It counts local work in epochs E over
batches of B examples; here it is `local_steps` = E n_i / B, equal for all clients, so that arms of a comparison do
equal work. The paper's fraction is 0.1 of 100 to 1000 clients; the default of 0.25 is for tens of clients. Buffers
(BatchNorm's statistics) are averaged like parameters; the paper does not mention them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steep.method import Method, Paper, log_uniform
from steep.rounds._federated import Federation, Message, Oracle, State, clip, descend, mean, put, take


@dataclass(kw_only=True, eq=False)
class FedAvg(Federation):
    """Federated averaging: clients run SGD on their own data, the server averages their models.

    The baseline of federated learning: cheap and stateless. On clients of unlike data the local models drift towards
    optima of their own, and the drift grows with the number of local steps.

    Args:
        model: the server's model; holds the averaged model after each round.
        clients: one training loader per client.
        local_step: ``local_step(model, batch) -> losses``, shape (B,): forward pass and loss only.
        generator: draws the seed of all sampling and data order, once.
        fraction: share of the clients sampled in each round, in (0, 1]. Default 0.25 (paper: 0.1 of many).
        local_steps: batches per sampled client and round, at least 1. Default 20.
        lr: local learning rate, positive. Default 0.1 (paper: tuned per task, 0.05 to 0.2 typical).
        lr_decay: factor on `lr` after each round, in (0, 1]. Default 1 (paper: 0.99 on CIFAR-10).
        weighted: weight clients by their number of examples, as published; equally otherwise. Default true.
        weight_decay: of the local steps, at least 0. Default 0.
        clip_norm: longest local gradient, positive. Default infinity: no clipping.

    Raises:
        UnmetRequirement: no clients.
        ValueError: an argument out of range, or a client without data.

    Paper: Communication-Efficient Learning of Deep Networks from Decentralized Data, arXiv 1602.05629.

    Example:
        >>> import torch, steep
        >>> from torch.nn.functional import cross_entropy
        >>> x, y = torch.randn(64, 8), torch.randint(3, (64,))
        >>> clients = steep.dirichlet_clients(x, y, torch.Generator(), clients=4, alpha=0.5, batch_size=8)
        >>> model = torch.nn.Linear(8, 3)
        >>> def local_step(model, batch):
        ...     return cross_entropy(model(batch[0]), batch[1], reduction="none")
        >>> rounds = FedAvg(model, clients, local_step, generator=torch.Generator(), local_steps=5)
        >>> for round, losses in zip(range(3), rounds):
        ...     pass  # `model` holds the average; `losses` are those of the round
    """

    weighted: bool = True

    @staticmethod
    def client_step(
        state: State,
        received: Message,
        batches: Iterable[Any],
        *,
        oracle: Oracle,
        weight_decay: float,
        clip_norm: float,
    ) -> tuple[State, Message]:
        """Local SGD from the received model; the state stays as it is."""
        x, buffers, losses = take("parameter", received), take("buffer", received), []
        for batch in batches:
            seen = oracle(x, buffers, batch)
            x, buffers = descend(x, clip(seen.gradient, clip_norm), received["lr"], weight_decay), seen.buffers
            losses.append(seen.losses)
        sent = {"losses": torch.cat(losses), "examples": state["examples"]}
        return state, put("parameter", x) | put("buffer", buffers) | sent

    @staticmethod
    def server_step(
        state: State, messages: Sequence[Message], *, weighted: bool, lr_decay: float
    ) -> tuple[State, Message]:
        """Average the clients' models; what the server knows is what it broadcasts."""
        weights = [message["examples"] for message in messages] if weighted else None
        x, buffers = (mean(group, messages, weights) for group in ("parameter", "buffer"))
        state = put("parameter", x) | put("buffer", buffers) | {"lr": state["lr"] * lr_decay}
        return state, state


method = Method(
    id="fedavg",
    paper=Paper(
        "Communication-Efficient Learning of Deep Networks from Decentralized Data", arxiv="1602.05629", year=2017
    ),
    changes="rounds",
    good_for={"devices"},
    make=FedAvg,
    search_space={"lr": log_uniform(1e-2, 1.0)},
    test_values={"fraction": 1.0, "clip_norm": 0.5},
    formula="client: x <- x - lr grad f_i(x), K times;  server: x = sum_i n_i x_i / sum_i n_i",
)

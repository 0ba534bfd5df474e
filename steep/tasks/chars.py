"""A character language model of the English text that comes with every Python: the help topics in `pydoc_data`.

The text (about half a million characters; it differs a little between versions of Python) is cut into windows that
do not overlap; a random 2 % of them are for validation (few, because it is scored often) and 8 % for testing. An
example is a window, and its loss is the mean over its positions, in nats per character.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor, nn

from steep.recipe import Budget, Recipe, accuracy
from steep.splits import Data
from steep.tasks import Task
from steep.tasks._parts import adamw, cross_entropy, loaders
from steep.tasks.networks import Transformer


@cache
def _corpus() -> tuple[Tensor, str]:
    """The text as character ids, (length,), and the characters in the order of their ids."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = "".join(sorted(set(text)))
    ids = {character: i for i, character in enumerate(alphabet)}
    return torch.tensor([ids[character] for character in text]), alphabet


def _data(generator: torch.Generator, context: int, batch_size: int) -> Data:
    text, _ = _corpus()
    windows = text[: len(text) // (context + 1) * (context + 1)].view(-1, context + 1)
    windows = windows[torch.randperm(len(windows), generator=generator)]
    val, test = len(windows) // 50, len(windows) // 12
    parts = windows.split([len(windows) - val - test, val, test])
    return loaders(*((part[:, :-1], part[:, 1:]) for part in parts), batch_size=batch_size)


def _model(context: int) -> nn.Module:
    return Transformer(len(_corpus()[1]), context)


def _chars(*, context: int = 32, batch_size: int = 32, steps: int = 400) -> Recipe:
    return Recipe(
        data=partial(_data, context=context, batch_size=batch_size),
        model=partial(_model, context=context),
        loss=cross_entropy,
        **adamw(4e-3),
        metric=accuracy,
        budget=Budget(steps=steps),
        name="chars",
    )


ORIGIN = "Help texts of Python (pydoc_data), PSF licence; come with Python."
CHARS = Task(
    "chars", "Next character of Python's help texts; decoder-only transformer; nats per character.", _chars, data=ORIGIN
)

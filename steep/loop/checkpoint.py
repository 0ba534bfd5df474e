"""Exact resume: everything a run is made of, in one file that is whole or absent.

Files hold tensors and plain Python only and are read with ``weights_only=True``: nothing is unpickled.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steep.utils.files import write_atomic

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: truncated, of another model, or of a newer version."""


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write `state` to `path` atomically: a crash leaves the previous checkpoint as it was."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomic(path, buffer.getvalue())


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is truncated, no checkpoint of steep, or of a newer format.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is truncated or no checkpoint of steep: delete it to start afresh ({error})"
        ) from error
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path} holds no checkpoint of steep: give another path")
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"{path} was written by a newer steep (format {state['format']}, this one reads {FORMAT}): upgrade steep"
        )
    return state


def check_same_model(saved: Mapping[str, Tensor], model: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise `CheckpointError` unless two state dicts have the same names and shapes."""
    for name in [*model, *saved]:
        ours, theirs = (tuple(d[name].shape) if name in d else None for d in (model, saved))
        if ours != theirs:
            raise CheckpointError(
                f"{path} is of another model: {name!r} is {_shape(theirs)} there and {_shape(ours)} here. "
                "Build the model it was saved from, or give another path"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {shape}"

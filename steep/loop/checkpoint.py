"""Exact resume: everything a run is made of, in one file that is whole or absent.

Files hold tensors and plain Python only and are read with ``weights_only=True``: nothing is unpickled.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steep.utils.files import write_atomic

FORMAT = 2  # 2: the states of NumPy's and Python's generators beside torch's
LEAVES = (Tensor, bool, int, float, str, bytes, NoneType, torch.Size, torch.dtype, torch.device)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: truncated, of another model, or of a newer version; or a state that cannot be
    written as one."""


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write `state` to `path` atomically: a crash leaves the previous checkpoint as it was.

    Raises:
        CheckpointError: the state holds something that `load` would not read; the message names its place.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **_plain(state, ())}, buffer)
    write_atomic(path, buffer.getvalue())


def _plain(value: Any, place: tuple[Any, ...]) -> Any:
    """The value with NumPy's numbers as Python's; what needs no change stays the same object.

    A dict of torch's state must stay what it is: it carries its version in an attribute, which a copy would lack.
    """
    if isinstance(value, np.generic):
        return _plain(value.item(), place)
    if isinstance(value, LEAVES):
        return value
    if isinstance(value, Mapping):
        items = {_plain(k, place): _plain(v, (*place, k)) for k, v in value.items()}
        return value if _same(items.items(), value.items()) else items
    if isinstance(value, (list, tuple)):
        inner = [_plain(v, (*place, i)) for i, v in enumerate(value)]
        if all(a is b for a, b in zip(inner, value, strict=True)):
            return value
        return inner if isinstance(value, list) else tuple(inner)
    raise CheckpointError(
        f"cannot save {'.'.join(map(str, place))}: a {type(value).__name__} is neither a tensor, a number, a text, nor "
        "a dict or list of these. Have state_dict() return such values, from which load_state_dict() makes the object"
    )


def _same(ours: Iterable[tuple[Any, Any]], theirs: Iterable[tuple[Any, Any]]) -> bool:
    return all(a is c and b is d for (a, b), (c, d) in zip(ours, theirs, strict=True))


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is truncated, no checkpoint of steep, or of a newer format.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        raise CheckpointError(f"the checkpoint {path} is a folder: give a file in it")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # the file is whole, but torch will not build what is in it
        raise CheckpointError(
            f"{path} is no checkpoint of this version of steep: it holds objects that are not read, because that "
            f"could run code. Give another path ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} is truncated, or no checkpoint at all: give another path ({error})") from error
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path} holds no checkpoint of steep: give another path")
    if state["format"] < FORMAT:
        raise CheckpointError(
            f"{path} was written by an older steep (format {state['format']}, this one reads {FORMAT}): finish the run "
            "with that version, or give another path to start afresh"
        )
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"{path} was written by a newer steep (format {state['format']}, this one reads {FORMAT}): upgrade steep"
        )
    return state


def check_same_model(saved: Mapping[str, Tensor], model: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise `CheckpointError` unless two state dicts have the same names and shapes."""
    for name in [*model, *saved]:
        if name.endswith("_extra_state"):  # a module's own, of any type
            continue
        ours, theirs = (tuple(d[name].shape) if name in d else None for d in (model, saved))
        if ours != theirs:
            raise CheckpointError(
                f"{path} is of another model: {name!r} is {_shape(theirs)} there and {_shape(ours)} here. "
                "Build the model it was saved from, or give another path"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {shape}"

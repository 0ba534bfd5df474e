"""Where an error comes from, as one sentence: what was raised, at which line of the user's code, and during what."""

from __future__ import annotations

import linecache
import sysconfig
import traceback
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
_FOREIGN = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def is_ours(error: BaseException) -> bool:
    """Whether steep itself raised the error, so that its message says everything."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)


def users_line(error: BaseException) -> tuple[str, int] | None:
    """File and line of the user's code that the error passed through last, if it did."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not (frame.filename.startswith(("<", *_FOREIGN)) or Path(frame.filename).is_relative_to(PACKAGE)):
            return frame.filename, frame.lineno or 0
    return None


def sentence(error: BaseException) -> str:
    """The error's message; of an error that steep did not raise, also its kind, its place and its notes.

    Example:
        >>> sentence(ValueError("lr=-1 must be positive"))
        'ValueError: lr=-1 must be positive'
    """
    message = str(error).strip() or "no message"
    if is_ours(error):
        return message
    place = users_line(error)
    where = []
    if place is not None:
        file, line = place
        code = linecache.getline(file, line).strip()
        where.append(f"{file}, line {line}: {code}" if code and not str(error).strip() else f"{file}, line {line}")
    where += getattr(error, "__notes__", [])
    return f"{type(error).__name__}: {message}" + (f" ({'; '.join(where)})" if where else "")

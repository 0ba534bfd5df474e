"""Finds the files of a package of methods, and lets the package export what they define without importing them all."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any


def files(package: str) -> dict[str, str]:
    """Public modules of a package and of its sub-folders: name of the file to name of the module.

    Args:
        package: such as "steep.optim"; one that does not exist has no files.

    Raises:
        ValueError: two files of one name, in different sub-folders.
    """
    try:
        parent = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            return {}
        raise
    found: dict[str, str] = {}
    for info in pkgutil.walk_packages(parent.__path__, f"{package}.", onerror=_raise):
        if info.ispkg or "._" in info.name:
            continue
        file = info.name.rpartition(".")[2]
        if found.setdefault(file, info.name) != info.name:
            raise ValueError(f"{found[file]} and {info.name} have the same name: rename one of them")
    return found


def _raise(package: str) -> None:
    """Have the error of a sub-folder's `__init__` through, which pkgutil would pass over."""
    importlib.import_module(package)


def exports(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package: what its files name in ``__all__``, or else the public classes and
    functions that they define.

    Example:
        >>> from steep.optim import AdaBelief
        >>> AdaBelief.__module__
        'steep.optim.adabelief'
    """

    def get(name: str) -> Any:
        if not name.startswith("_"):
            found = files(package)
            if name in found:
                return importlib.import_module(found[name])
            # a class's own file first, so that as a rule no other is imported
            for file in sorted(found, key=lambda file: _squeezed(file) not in _squeezed(name)):
                module = importlib.import_module(found[file])
                if name in _public(module):
                    return getattr(module, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({name for module in files(package).values() for name in _public(importlib.import_module(module))})

    return get, names


def _squeezed(name: str) -> str:
    return name.replace("_", "").lower()


def _public(module: ModuleType) -> list[str]:
    """The names in a module's ``__all__``; without one, the classes and functions that it defines itself.

    Names that begin with an underscore are not public.
    """
    names = vars(module).get("__all__")
    if names is None:
        # what a module imports is another's: its `__module__` says so
        own = (name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__)
        names = [name for name in own if callable(getattr(module, name))]
    return [name for name in names if not name.startswith("_")]

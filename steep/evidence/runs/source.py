"""Where a recipe comes from, how a worker process loads it again, and which code a run depends on."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import torch

from steep.method import PACKAGES, Method, UnknownName
from steep.method import methods as all_methods
from steep.recipe import Recipe
from steep.tasks import task, tasks
from steep.utils.validation import nearest
from steep.version import __version__

ROOT = Path(__file__).parents[2]  # of the package


class RecipeError(ValueError):
    """A recipe that cannot be loaded; the message says where and why."""


@dataclass(frozen=True)
class Source:
    """A recipe that any process can load: by name, or pickled by value for recipes made in memory.

    Args:
        name: what the user typed, or the recipe's name.
        hash: of the recipe's own source.
        payload: the pickled recipe and the user's own methods, or `None` where `name` is enough.
    """

    name: str
    hash: str
    payload: bytes | None = field(default=None, repr=False)

    def load(self) -> tuple[Recipe, Mapping[str, Method]]:
        """The recipe, and the entries of the user's own methods."""
        return cloudpickle.loads(self.payload) if self.payload is not None else (load_recipe(self.name), {})

    def text(self) -> str:
        """The recipe in readable form, kept with the runs: its file, or a description of a recipe made in memory."""
        if self.payload is not None:
            recipe, own = self.load()
            return "\n".join([describe(recipe), *map(describe, own.values())])
        if _is_task(self.name):
            return f"steep.task({self.name!r})  # of steep {__version__}"
        return _file_of(self.name.rpartition(":")[0]).read_text()


def from_name(name: str) -> Source:
    """Source of ``task``, ``file.py:recipe`` or ``package.module:recipe``."""
    load_recipe(name)  # fails early, with the real reason, rather than in a worker
    if _is_task(name):
        package = Path(inspect.getfile(importlib.import_module("steep.tasks"))).parent
        return Source(name, hashed(name, *(code_of(path) for path in sorted(package.glob("*.py")))))
    place, _, attribute = name.rpartition(":")
    return Source(name, hashed(attribute, code_of(_file_of(place))))


def _file_of(place: str) -> Path:
    return Path(place) if _is_file(place) else Path(inspect.getfile(importlib.import_module(place)))


def from_value(recipe: Recipe, own: Mapping[str, Method]) -> Source:
    """Source of a recipe made in memory, with the user's own methods in the comparison.

    Raises:
        RecipeError: it cannot be pickled (it holds an open file, a lock or the like).
    """
    try:
        payload = cloudpickle.dumps((recipe, dict(own)))
    except Exception as error:
        raise RecipeError(
            f"the recipe cannot be sent to a worker process ({error}): build such objects inside its factories"
        ) from error
    return Source(recipe.name, hashed(describe(recipe), *map(describe, own.values())), payload)


def load_recipe(name: str) -> Recipe:
    """The recipe that `name` stands for.

    Raises:
        UnknownName: no such task.
        RecipeError: no such file or module, it raises while imported, or it holds no such recipe.
    """
    if _is_task(name):
        return task(name)
    if ":" not in name:
        hint = ", or give the recipe in it: FILE.py:NAME" if name.endswith(".py") else ""
        raise UnknownName(f"unknown task {name!r}{nearest(name, tasks())}{hint}")
    value = attribute_of(name, (Recipe,))
    recipe = value() if inspect.isfunction(value) else value
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"{name} is a {type(recipe).__name__}, not a steep.Recipe or a function that returns one")
    return recipe


def attribute_of(name: str, kinds: tuple[type, ...]) -> Any:
    """What FILE.py:NAME or PACKAGE.MODULE:NAME stands for.

    Args:
        kinds: of what the message names where there is no such attribute.

    Raises:
        RecipeError: no such file, module or attribute, or it raises while imported.
    """
    place, _, attribute = name.rpartition(":")
    module = _import(place)
    value = getattr(module, attribute, None)
    if value is None:
        found = [key for key, other in vars(module).items() if isinstance(other, kinds)]
        kind = kinds[0].__name__.lower()
        raise RecipeError(f"{place} has no {kind} {attribute!r}{nearest(attribute, found)}")
    return value


def content_of(name: str) -> str:
    """The text of the file in FILE.py:NAME; "" where there is none, and of a module, which is imported once."""
    place = Path(name.rpartition(":")[0])
    return place.read_text() if _is_file(str(place)) and place.is_file() else ""


def _is_task(name: str) -> bool:
    return name.partition(":")[0] in tasks()


def _is_file(place: str) -> bool:
    return place.endswith(".py") or os.sep in place


def _import(place: str) -> ModuleType:
    try:
        return import_file(Path(place)) if _is_file(place) else _import_module(place)
    except RecipeError:
        raise
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename}, line {frame.lineno}"
        raise RecipeError(f"{place} raised {type(error).__name__} while it was imported: {error} ({where})") from error


def _import_module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            raise RecipeError(f"no module {name!r}: give FILE.py:NAME or an importable PACKAGE.MODULE:NAME") from error
        raise


def import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RecipeError(f"no recipe file at {path}")
    sys.path.insert(0, str(path.resolve().parent))  # so that it can import its neighbours
    spec = importlib.util.spec_from_file_location(_module_name(path), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)  # no worker could import it by name
    return module


def _module_name(path: Path) -> str:
    """The file's own name, by which the worker processes of a loader can import it too, unless that is taken."""
    importlib.invalidate_caches()
    try:
        found = importlib.util.find_spec(path.stem)
    except (ImportError, ValueError, AttributeError):
        found = None
    ours = found is not None and found.origin is not None and Path(found.origin).resolve() == path.resolve()
    return path.stem if ours else f"steep_recipe_{path.stem}"


def code_version(methods: Iterable[str]) -> str:
    """Hash of all code of steep that a run executes: `fit`, the methods' files, and everything these import.

    Comments and docstrings do not count, so that only a change of the code makes runs stale.
    """
    known = all_methods()
    ids = sorted(set(methods))
    own = [Path(inspect.getfile(known[id].make)) for id in ids if id in known]
    own += [_file_of(id.rpartition(":")[0]) for id in ids if ":" in id]
    files = sorted(imported([ROOT / "fit.py", *own]))
    return hashed(torch.__version__, *(code_of(path) for path in files))


def imported(paths: Sequence[Path]) -> set[Path]:
    """These files and every file of steep that they import, directly or indirectly."""
    found: set[Path] = set()
    waiting = [path.resolve() for path in paths]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imports(path)
    return found


def _imports(path: Path) -> tuple[Path, ...]:
    return _imported_by(path, path.read_text())


@cache  # by content: a file may change while the process goes on, as in a notebook
def _imported_by(path: Path, text: str) -> tuple[Path, ...]:
    return tuple(_imported_modules(path, text))


def _imported_modules(path: Path, text: str) -> Iterator[Path]:
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            if node.module.removeprefix("steep.") in PACKAGES:  # which export what their files define
                package = importlib.import_module(node.module)
                names += [getattr(getattr(package, alias.name, None), "__module__", "") for alias in node.names]
        yield from _modules(names)
        if ROOT not in path.parents:  # a claim may import its neighbours
            yield from (file for name in names if (file := path.with_name(f"{name}.py").resolve()).is_file())


def _modules(names: Sequence[str]) -> Iterator[Path]:
    """The files of those names that are modules or packages of steep."""
    for name in names:
        first, *rest = name.split(".")
        place = ROOT.joinpath(*rest)
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if first == "steep" and file.is_file():
                yield file


def code_of(path: Path, texts: frozenset[str] = frozenset()) -> str:
    """A file's syntax tree, without comments, docstrings and the keyword arguments named in `texts`."""
    return _code(path.read_text(), texts)


@cache
def _code(text: str, texts: frozenset[str]) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            node.keywords = [keyword for keyword in node.keywords if keyword.arg not in texts]
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    return ast.dump(tree)


def describe(value: Any, depth: int = 6) -> str:
    """A text that is the same for equal recipes in different processes: source code, captured values, settings."""
    if depth == 0:
        return type(value).__name__
    inner = functools.partial(describe, depth=depth - 1)
    if isinstance(value, functools.partial):
        return f"partial({inner(value.func)}, {inner(value.args)}, {inner(value.keywords)})"
    if inspect.isfunction(value):
        captured = [cell.cell_contents for cell in value.__closure__ or ()]
        return f"{_source(value)} {inner(captured)} {inner(value.__defaults__)}"
    if isinstance(value, torch.Tensor):
        return hashed(value.detach().cpu().numpy().tobytes().hex(), str(value.shape))
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k}: {inner(v)}' for k, v in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(inner, value))}]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}({', '.join(inner(getattr(value, f.name)) for f in dataclasses.fields(value))})"
    if isinstance(value, type) or inspect.isbuiltin(value):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (int, float, str, bool, type(None))):
        return repr(value)
    return f"{type(value).__qualname__}({inner(getattr(value, '__dict__', {}))})"


def _source(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        code = function.__code__
        return f"{code.co_code.hex()} {code.co_consts} {code.co_names}"


def hashed(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]

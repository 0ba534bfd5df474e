"""A method's entry: what it is, which component it changes, what it requires, and what it is tuned over.

A method's file ends with a `Method`. Nothing registers it: `methods()` walks the packages of methods with their
sub-folders (and the entry-point group ``steep.methods`` for third parties) and collects every `Method` it finds.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from torch import Tensor

from steep._discovery import files
from steep.apply import BY_COMPONENT, sgd
from steep.recipe import Recipe
from steep.requires import REQUIREMENTS
from steep.utils.validation import nearest

PURPOSES = {  # what readers look for
    "faster": "a lower loss in fewer steps or less time",
    "better": "better scores on new examples",
    "smaller": "smaller or cheaper models",
    "memory": "less memory while training",
    "noise": "wrong labels and outliers",
    "domains": "data from elsewhere: other sites, cameras, years",
    "devices": "data that stay on many machines",
    "equations": "equations and other conditions to be met exactly",
    "insight": "seeing what a model or a training run does",
}
PACKAGES = ("data", "models", "losses", "backward", "optim", "rounds", "sampling", "solvers", "probes", "systems")


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    title: str
    arxiv: str | None = None
    year: int | None = None
    url: str | None = None

    @property
    def link(self) -> str | None:
        return self.url or (f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None)


@dataclass(frozen=True)
class Range:
    """An interval of numbers to tune over; `log` means uniform in the logarithm."""

    low: float
    high: float
    log: bool = False
    integer: bool = False


@dataclass(frozen=True)
class Choice:
    """A finite set of values to tune over."""

    options: tuple[Any, ...]


def log_uniform(low: float, high: float) -> Range:
    return Range(low, high, log=True)


def uniform(low: float, high: float) -> Range:
    return Range(low, high)


def integer(low: int, high: int, *, log: bool = False) -> Range:
    return Range(low, high, log=log, integer=True)


def choice(*options: Any) -> Choice:
    return Choice(options)


@dataclass(frozen=True)
class Method:
    """A method's entry, at the end of its file.

    Args:
        id: name used on the command line, with hyphens.
        paper: the publication.
        changes: the component, and so the package: "optim", "backward", "losses", ...; "systems" for compositions.
        make: the class or function whose keyword arguments are the hyper-parameters.
        apply: ``apply(recipe, **hyper) -> recipe``, where the component's own way into a recipe will not do (see
            `steep.apply`). Solvers, samplers and probes have none and are no arms of `compare`.
        sgd_lr: for rules whose gradient is the step itself: plain SGD follows, with this learning rate by default.
        preset: defaults in a recipe, where they differ from those of `make`.
        search_space: ranges to tune over, by hyper-parameter; the published defaults are always tried first.
        requires: what the training run must offer, out of `steep.requires.REQUIREMENTS`, beside what ``make.requires``.
        test_values: for hyper-parameters whose other values cannot be guessed (names, `None`), one other value that
            must change the training run; the common checks try it.
        good_for: what its paper says it is good for, out of `PURPOSES`.
        performance_flags: hyper-parameters that change speed or memory, not the result.
        wraps: the method builds on what the component was before instead of replacing it.
        formula: the update in one or two lines of plain text, for ``steep show``.
    """

    id: str
    paper: Paper
    changes: str
    make: Callable[..., Any]
    apply: Callable[..., Recipe] | None = None
    sgd_lr: float | None = None
    preset: Mapping[str, Any] = field(default_factory=dict)
    search_space: Mapping[str, Range | Choice] = field(default_factory=dict)
    requires: frozenset[str] | set[str] = frozenset()
    test_values: Mapping[str, Any] = field(default_factory=dict)
    good_for: frozenset[str] | set[str] = frozenset()
    performance_flags: frozenset[str] | set[str] = frozenset()
    wraps: bool = False
    formula: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "requires", frozenset(self.requires) | getattr(self.make, "requires", frozenset()))
        unknown = self.requires - set(REQUIREMENTS)
        if unknown:
            raise ValueError(
                f"method {self.id!r}: unknown requirements {sorted(unknown)}; known: {sorted(REQUIREMENTS)}"
            )
        if set(self.good_for) - set(PURPOSES):
            raise ValueError(
                f"method {self.id!r}: good_for={sorted(self.good_for)} must be among {', '.join(PURPOSES)}"
            )
        if self.changes not in PACKAGES:
            raise ValueError(f"method {self.id!r}: changes={self.changes!r} must be one of {PACKAGES}")
        for name in ("search_space", "preset", "test_values"):
            stray = set(getattr(self, name)) - set(self.hyper)
            if stray:
                raise ValueError(f"method {self.id!r}: {name} has {sorted(stray)}, which {self.make.__name__} lacks")

    @property
    def hyper(self) -> dict[str, Any]:
        """Hyper-parameters and their defaults: `preset`, and the rest from the signature of `make`."""
        parameters = inspect.signature(self.make).parameters.values()
        own = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        rate = {} if self.sgd_lr is None else {"lr": self.sgd_lr}
        return {**rate, **own, **self.preset}

    @property
    def summary(self) -> str:
        """First paragraph of the method's docstring, on one line."""
        doc = inspect.getdoc(self.make) or ""
        return " ".join(doc.split("\n\n")[0].split())

    @property
    def is_arm(self) -> bool:
        """Whether there is a way for it into a recipe, so that `compare` can have it as an arm."""
        return self.apply is not None or self.changes in BY_COMPONENT

    def check(self, hyper: Mapping[str, Any]) -> None:
        """Raise `TypeError` for a method that is no arm, an unknown hyper-parameter, or a value of the wrong type."""
        if not self.is_arm:
            raise TypeError(f"{self.id!r} is used on its own (see `steep show {self.id}`), not as an arm of a recipe")
        for name, value in hyper.items():
            if name not in self.hyper:
                raise TypeError(f"{self.id!r} has no hyper-parameter {name!r}{nearest(name, self.hyper)}")
            if _wrong_type(value, self.hyper[name]):
                kind = type(self.hyper[name]).__name__
                raise TypeError(f"{self.id!r}: {name}={value!r} must be of type {kind}, like its default")

    def __call__(self, recipe: Recipe, **hyper: Any) -> Recipe:
        """The recipe with this method in it.

        Raises:
            TypeError: an unknown hyper-parameter, a value of the wrong type, or a method that is no arm.
            ValueError: a value out of range.
        """
        if not isinstance(recipe, Recipe):
            raise TypeError(
                f"a method takes a steep.Recipe, got {recipe!r}; in a loop of your own, use {self.make.__name__} itself"
            )
        self.check(hyper)
        # arms are compared by the loss the user wrote, whatever a method trains on
        recipe, hyper = recipe.replace(score=recipe.score or recipe.loss), {**self.preset, **hyper}
        if self.apply is not None:
            found = self.apply(recipe, **hyper)
            if not isinstance(found, Recipe):
                raise TypeError(f"{self.id!r} must return a steep.Recipe, but returned {found!r}")
            return found
        if self.sgd_lr is not None:
            recipe = sgd(recipe, hyper.pop("lr", self.sgd_lr))
        return BY_COMPONENT[self.changes](recipe, self.make, **hyper)


def _wrong_type(value: Any, default: Any) -> bool:
    """Whether a value cannot stand where `default` stands: no number for a number, no text for a text, ..."""
    if isinstance(default, bool):
        return not isinstance(value, bool)
    kinds: dict[type, tuple[type, ...]] = {int: (int,), float: (int, float, Tensor), str: (str,), tuple: (tuple, list)}
    allowed = kinds.get(type(default))
    return allowed is not None and (isinstance(value, bool) or not isinstance(value, allowed))


def _entries(module: str) -> list[Method]:
    return [value for value in vars(importlib.import_module(module)).values() if isinstance(value, Method)]


@cache
def methods() -> dict[str, Method]:
    """Every method, by id, in the order of the packages; third parties' last.

    Raises:
        ValueError: two methods with one id.
    """
    own = (found for package in PACKAGES for module in files(f"steep.{package}").values() for found in _entries(module))
    others = (point.load() for point in entry_points(group="steep.methods"))
    found: dict[str, Method] = {}
    for entry in (value for source in (own, others) for value in source if isinstance(value, Method)):
        if found.setdefault(entry.id, entry) is not entry:
            raise ValueError(
                f"two methods share the id {entry.id!r}: {found[entry.id].paper.title!r} and {entry.paper.title!r}"
            )
    return found


def method(id: str) -> Method:
    """The method of that id. Only its own file is imported, where that is named after the id.

    Raises:
        UnknownName: no such method; the message names the nearest ones.
    """
    for package in PACKAGES:
        file = files(f"steep.{package}").get(id.replace("-", "_"))
        for entry in _entries(file) if file else ():
            if entry.id == id:
                return entry
    found = methods()
    if id not in found:
        raise UnknownName(f"unknown method {id!r}{nearest(id, found)}")
    return found[id]


class UnknownName(KeyError):
    """A method or task that does not exist; prints its message without `KeyError`'s quotes."""

    def __str__(self) -> str:
        return str(self.args[0])

"""What a method says about itself, and how its card is found.

A method's file ends with a `Card`: the paper, the noun it changes, how it plugs into a recipe, what it
needs, and the ranges it may be tuned over. Nothing registers it: `cards()` walks the rooms (and the
entry-point group ``steep.methods`` for third parties) and collects every `Card` it finds.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from steep.needs import NEEDS

if TYPE_CHECKING:
    from steep.recipe import Recipe

ROOMS = ("data", "models", "losses", "backward", "optim", "rounds", "sampling", "solvers", "probes", "systems")


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
class Card:
    """A method's own account of itself.

    Args:
        id: name used on the command line, with hyphens.
        paper: the publication.
        changes: the room (noun) the method changes, or ``"systems"`` for a composition.
        make: the class or function whose keyword arguments are the hyper-parameters.
        plug: ``plug(recipe, **hyper) -> recipe``; ``None`` for solvers, samplers and probes, which are
            no arms of `compare`.
        space: ranges to tune over, by hyper-parameter; the published defaults are always tried first.
        needs: what the training must offer, out of `steep.needs.NEEDS`.
        variants: for hyper-parameters whose other values cannot be guessed (names, `None`), one other value that must
            change the training; the common checks try it.
        neutral: hyper-parameters that change speed or memory, not the result.
        wraps: the method builds on what the noun held before instead of replacing it.
        formula: the update in one or two lines of plain text, for ``steep show``.
    """

    id: str
    paper: Paper
    changes: str
    make: Callable[..., Any]
    plug: Callable[..., Recipe] | None = None
    space: Mapping[str, Range | Choice] = field(default_factory=dict)
    needs: frozenset[str] | set[str] = frozenset()
    variants: Mapping[str, Any] = field(default_factory=dict)
    neutral: frozenset[str] | set[str] = frozenset()
    wraps: bool = False
    formula: str = ""

    def __post_init__(self) -> None:
        unknown = set(self.needs) - set(NEEDS)
        if unknown:
            raise ValueError(f"card {self.id!r}: unknown needs {sorted(unknown)}; known: {sorted(NEEDS)}")
        if self.changes not in ROOMS:
            raise ValueError(f"card {self.id!r}: changes={self.changes!r} is not a room; rooms: {ROOMS}")
        stray = set(self.space) - set(self.hyper)
        if stray:
            raise ValueError(f"card {self.id!r}: space names {sorted(stray)}, which {self.make.__name__} lacks")

    @property
    def hyper(self) -> dict[str, Any]:
        """Hyper-parameters and their defaults, read from the signature of `make`."""
        parameters = inspect.signature(self.make).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}

    @property
    def summary(self) -> str:
        """First paragraph of the method's docstring, on one line."""
        doc = inspect.getdoc(self.make) or ""
        return " ".join(doc.split("\n\n")[0].split())

    def apply(self, recipe: Recipe, **hyper: Any) -> Recipe:
        """The recipe with this method in it.

        Raises:
            TypeError: an unknown hyper-parameter, a value of the wrong type, or a card without a plug.
        """
        if self.plug is None:
            raise TypeError(f"{self.id!r} is used on its own (see `steep show {self.id}`), not as an arm of a recipe")
        for name in hyper:
            if name not in self.hyper:
                raise TypeError(f"{self.id!r} has no hyper-parameter {name!r}{nearest(name, self.hyper)}")
            if wrong_type(hyper[name], self.hyper[name]):
                kind = type(self.hyper[name]).__name__
                raise TypeError(f"{self.id!r}: {name}={hyper[name]!r} must be of type {kind}, like its default")
        return self.plug(recipe.replace(score=recipe.score or recipe.loss), **hyper)


def wrong_type(value: Any, default: Any) -> bool:
    """Whether a value cannot stand where `default` stands: no number for a number, no text for a text, ..."""
    if isinstance(default, bool):
        return not isinstance(value, bool)
    kinds: dict[type, tuple[type, ...]] = {int: (int,), float: (int, float, Tensor), str: (str,), tuple: (tuple, list)}
    allowed = kinds.get(type(default))
    return allowed is not None and (isinstance(value, bool) or not isinstance(value, allowed))


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'a' or 'b'?"``, or what there is when nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; there is: {', '.join(known) or 'nothing'}"


def _modules(room: str) -> Iterable[ModuleType]:
    try:
        package = importlib.import_module(f"steep.{room}")
    except ModuleNotFoundError as error:
        if error.name == f"steep.{room}":
            return
        raise
    for info in pkgutil.iter_modules(package.__path__):
        if not info.name.startswith("_"):
            yield importlib.import_module(f"steep.{room}.{info.name}")


@cache
def cards() -> dict[str, Card]:
    """Every card, by id, in the order of the rooms; third parties' last.

    Raises:
        ValueError: two cards with one id.
    """
    own = (value for room in ROOMS for module in _modules(room) for value in vars(module).values())
    others = (point.load() for point in entry_points(group="steep.methods"))
    found: dict[str, Card] = {}
    for card in (value for source in (own, others) for value in source if isinstance(value, Card)):
        if found.setdefault(card.id, card) is not card:
            raise ValueError(
                f"two methods share the id {card.id!r}: {found[card.id].paper.title!r} and {card.paper.title!r}"
            )
    return found


def card(id: str) -> Card:
    """The card of that id.

    Raises:
        KeyError: no such method; the message names the nearest ones.
    """
    found = cards()
    if id not in found:
        raise UnknownName(f"unknown method {id!r}{nearest(id, found)}")
    return found[id]


class UnknownName(KeyError):
    """A method or task that does not exist; prints its message without `KeyError`'s quotes."""

    def __str__(self) -> str:
        return str(self.args[0])

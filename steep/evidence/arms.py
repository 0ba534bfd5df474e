"""The arms of a comparison before they are run: their methods, what is fixed and what is tuned."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch.optim import Optimizer

from steep.evidence.runs.source import RecipeError, attribute_of, content_of
from steep.evidence.study import BASELINE
from steep.method import Choice, Method, Paper, Range, log_uniform
from steep.method import method as by_id
from steep.method import methods as all_methods
from steep.recipe import Recipe

LR_SCALE = log_uniform(0.1, 10.0)  # factor on the learning rate that the recipe came with

Methods = tuple[tuple[str, Mapping[str, Any]], ...]  # ids (or function names), each with its hyper-parameters
MethodLike = str | tuple[str, Mapping[str, Any]] | Method | Callable[[Recipe], Recipe]


def adamw(*, lr: float = 1e-3, weight_decay: float = 1e-2) -> Callable[[Iterable[Any]], Optimizer]:
    """Torch's fused AdamW, which every study tunes as a reference beside your own recipe."""
    return partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay, fused=True)


ADAMW = Method(
    id="adamw",
    paper=Paper("Decoupled Weight Decay Regularization", arxiv="1711.05101", year=2019),
    changes="optim",
    make=adamw,
    apply=lambda recipe, **hyper: recipe.replace(optimizer=adamw(**hyper)),
    search_space={"lr": log_uniform(1e-4, 1e-1), "weight_decay": log_uniform(1e-5, 1e-1)},
)


def find_method(id: str) -> Method:
    """The method of that id; of the fused AdamW which every study tunes as a reference; or of FILE.py:NAME.

    Raises:
        UnknownName: no such method.
        RecipeError: no such file, or no method in it.
    """
    if id == ADAMW.id:
        return ADAMW
    return _method_of(id, content_of(id)) if ":" in id else by_id(id)


@cache  # by content too: a file may change while the process goes on, as in a notebook
def _method_of(place: str, content: str) -> Method:
    """The entry of a method in a user's file, under the name of its place, so that every process can find it."""
    value = attribute_of(place, (Method,))
    if isinstance(value, type) or not (isinstance(value, Method) or callable(value)):
        raise RecipeError(f"{place} is {value!r}, not a steep.Method or a function from recipe to recipe")
    return replace(own_method(value), id=place)


def parse(spec: str) -> list[tuple[str, dict[str, Any]]]:
    """Ids and fixed hyper-parameters of an arm: ``id``, ``id:name=value,name=value``, and several joined by "+".

    Raises:
        ValueError: an empty id, or several that are not joined.

    Example:
        >>> parse("sven:rank=64,rtol=1e-4+mine.py:method")
        [('sven', {'rank': 64, 'rtol': 0.0001}), ('mine.py:method', {})]
    """
    return [_part(part, spec) for part in re.split(r"\+(?![0-9])", spec)]  # not the sign of an exponent


def _part(part: str, spec: str) -> tuple[str, dict[str, Any]]:
    head, _, last = part.rpartition(":")
    id, settings = (head, re.split(r",(?=[A-Za-z_]\w*=)", last)) if "=" in last else (part, [])
    if not id or id != id.strip():
        raise ValueError(
            f"{spec!r}: a method's id is missing; methods are given as 'sven' or, joined, 'sven+adabelief'"
        )
    if head in all_methods() and "=" not in last:
        raise ValueError(f"{spec!r}: write a hyper-parameter as {head}:{last}=VALUE")
    if "," in id:
        raise ValueError(f"{spec!r} is not the id of a method: separate several by spaces, as in sven adabelief")
    return id, {name.strip(): literal(text) for name, _, text in (s.partition("=") for s in settings)}


def literal(text: str) -> Any:
    """A value as it is typed: a number, a tuple, `None`, ..., or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@dataclass(frozen=True)
class Arm:
    """An arm before it is run: methods with their fixed hyper-parameters, and the ranges of the others.

    Names in `search_space` are hyper-parameters (``id.name`` where several methods are joined), or "lr_scale", the
    factor on the learning rate of the recipe's own optimizer. `own` is the entry of a method from outside steep.
    """

    name: str
    methods: Methods = ()
    search_space: Mapping[str, Range | Choice] = field(default_factory=dict)
    own: Method | None = None

    @property
    def entries(self) -> list[Method]:
        """The entries of the arm's methods, in the order in which they are applied."""
        return [self.own if self.own and self.own.id == id else find_method(id) for id, _ in self.methods]

    def settings(self, chosen: Mapping[str, Any]) -> tuple[Methods, float]:
        """Methods with all their hyper-parameters, and the factor on the learning rate."""
        methods = tuple((id, {**fixed, **self._chosen_for(id, chosen)}) for id, fixed in self.methods)
        return methods, chosen.get("lr_scale", 1.0)

    def defaults(self) -> dict[str, Any]:
        """The published value of everything that is tuned, and 1 for "lr_scale"."""
        published = {self._prefix(method.id) + k: v for method in self.entries for k, v in method.hyper.items()}
        return {name: published.get(name, 1.0) for name in self.search_space}

    def _prefix(self, id: str) -> str:
        return f"{id}." if len(self.methods) > 1 else ""

    def _chosen_for(self, id: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The chosen hyper-parameters of one method, by their names without prefix."""
        names = next((method.hyper for method in self.entries if method.id == id), {})
        return {name: chosen[self._prefix(id) + name] for name in names if self._prefix(id) + name in chosen}


def own_method(method: Method | Callable[[Recipe], Recipe]) -> Method:
    """The entry of a method from outside steep; a function's arguments with a default are its hyper-parameters."""
    if isinstance(method, Method):
        return method
    name = getattr(method, "__name__", type(method).__name__)
    return Method(id=name, paper=Paper(name), changes="systems", make=method, apply=method)


def make_arm(method: MethodLike) -> Arm:
    """An arm from text (see `parse`), an ``(id, hyper)`` pair, a `Method`, or a function of a recipe.

    Raises:
        UnknownName: no such method.
        RecipeError: no such file, or no method in it.
        TypeError: no such hyper-parameter, one of the wrong type, or something else.
        ValueError: a text that `parse` does not understand.
    """
    if isinstance(method, str):
        parts = parse(method)
    elif isinstance(method, tuple):
        parts = _of_pair(method)
    elif isinstance(method, Method) or (callable(method) and not isinstance(method, type)):
        own = own_method(method)
        arm = Arm(own.id, ((own.id, {}),), own=own)
        return replace(arm, search_space=_search_space(arm))
    else:
        raise TypeError(f"{method!r} is no method: give its id, (id, {{name: value}}), a steep.Method or a function")
    for id, fixed in parts:
        find_method(id).check(fixed)
    arm = Arm("+".join(_typed(id, fixed) for id, fixed in parts), tuple(parts))
    return replace(arm, search_space=_search_space(arm))


def _of_pair(pair: tuple[Any, ...]) -> list[tuple[str, dict[str, Any]]]:
    """``(id, hyper)``, or ``("a+b", {"a.lr": 0.1})`` with the names of both."""
    if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], Mapping):
        raise TypeError(f"{pair!r} must be (id, {{name: value}}), such as ('adabelief', {{'lr': 1e-3}})")
    ids, given = [id for id, _ in parse(pair[0])], pair[1]
    if len(ids) == 1:
        return [(ids[0], dict(given))]
    owners = {name: next((id for id in ids if name.startswith(f"{id}.")), None) for name in given}
    lost = [name for name, id in owners.items() if id is None]
    if lost:
        raise TypeError(f"{lost[0]!r} in {pair!r} belongs to neither: write '{ids[0]}.{lost[0]}'")
    return [(id, {n.removeprefix(f"{id}."): v for n, v in given.items() if owners[n] == id}) for id in ids]


def _typed(id: str, fixed: Mapping[str, Any]) -> str:
    """An id and its fixed hyper-parameters as they are typed."""
    return f"{id}:{','.join(f'{name}={value}' for name, value in fixed.items())}" if fixed else id


def _search_space(arm: Arm) -> dict[str, Range | Choice]:
    fixed = dict(arm.methods)
    space = {
        arm._prefix(method.id) + name: values
        for method in arm.entries
        for name, values in method.search_space.items()
        if name not in fixed[method.id]
    }
    # a method that sets a learning rate of its own leaves nothing of the recipe's to scale
    own_rate = any(method.changes in ("optim", "rounds") or "lr" in method.hyper for method in arm.entries)
    return space if own_rate else {**space, "lr_scale": LR_SCALE}


def make_arms(recipe: Recipe, methods: Sequence[MethodLike]) -> list[Arm]:
    """Baseline, tuned AdamW (where the recipe's rounds leave the optimizer to it), then the methods.

    Raises:
        ValueError: the same arm twice.
    """
    baseline = Arm(BASELINE, (), {} if recipe.rounds else {"lr_scale": LR_SCALE})
    reference = [] if recipe.rounds else [Arm(ADAMW.id, ((ADAMW.id, {}),), ADAMW.search_space)]
    if "all" in methods:
        raise ValueError("'all' stands for every method that fits the recipe: give it alone")
    arms = [baseline, *reference, *(make_arm(m) for m in methods if m != ADAMW.id)]
    names = [arm.name for arm in arms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"{twice!r} is given twice: give each method once (or join different ones with '+')")
    return arms

"""A paper's claim as an experiment that anyone can run: what is claimed, of which size, and what to measure.

A claim file states one `Claim` about one method. Its `experiment` gets a `Lab`, which runs comparisons by the protocol
of `compare` or measures one case after the other, and keeps finished results. It returns, for each quantity of the
claim, the method's and the baseline's values case by case; `verdicts` judges those.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from steep.evidence.arms import MethodLike
from steep.evidence.assemble import finals
from steep.evidence.compare import compare
from steep.evidence.study import BASELINE, Study
from steep.method import UnknownName
from steep.recipe import Budget, Recipe
from steep.utils.files import write_atomic
from steep.utils.validation import nearest


@dataclass(frozen=True)
class Quantity:
    """One thing a claim says: what gets better by how much.

    Args:
        name: what is measured, at what point, with its unit.
        better: the direction in which the method is claimed to move it.
        size: the claimed gain, as a factor or as a difference; `None` if only a direction is claimed.
        scale: "ratio" (gain 1.5: one and a half times better) or "difference" (gain 0.01: one point of accuracy).
        null: the gain that must be exceeded: 1 for ratios and 0 for differences, or a margin below it where the claim
            is "no worse".
        exact: nothing is random; each case stands for itself (a deterministic function, an identity).
    """

    name: str
    better: Literal["lower", "higher"]
    size: float | None = None
    scale: Literal["ratio", "difference"] = "ratio"
    null: float | None = None
    exact: bool = False

    @property
    def nothing(self) -> float:
        """The gain that must be exceeded."""
        return self.null if self.null is not None else float(self.scale == "ratio")

    def __post_init__(self) -> None:
        for name, allowed in (("better", ("lower", "higher")), ("scale", ("ratio", "difference"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{self.name}: {name}={getattr(self, name)!r} must be one of {allowed}")
        if self.size is not None and self.size < self.nothing:
            raise ValueError(f"{self.name}: size={self.size} must be at least {self.nothing}, which is no gain")


@dataclass(frozen=True)
class Pairs:
    """A quantity's values case by case, the method's and the baseline's; `None` if a run diverged or missed its target.

    Cases are seeds, or names of what was measured.
    """

    method: Sequence[float | None]
    baseline: Sequence[float | None]
    cases: Sequence[int | str]

    def __post_init__(self) -> None:
        if not len(self.method) == len(self.baseline) == len(self.cases) > 0:
            raise ValueError(
                "method, baseline and cases must be equally many, at least one, got "
                f"{len(self.method)}, {len(self.baseline)} and {len(self.cases)}"
            )


@dataclass(frozen=True)
class Claim:
    """What a paper says about its method, and how it is put to the test here.

    Args:
        id: the method's.
        statement: the claim, in a sentence or two.
        source: its place in the paper.
        paper_scale: data, models and numbers of runs in the paper.
        our_scale: the same here.
        quantities: what the claim says; all of them must hold.
        experiment: ``experiment(lab) -> {quantity's name: Pairs}``; `None` if the claim cannot be tested here.
        reason: why it cannot be tested.

    Example:
        >>> Claim(
        ...     id="sven", statement="Faster.", source="abstract", paper_scale="large", our_scale="small",
        ...     quantities=(Quantity("steps", better="lower", size=2.0),),
        ...     experiment=lambda lab: {"steps": Pairs([10.0], [20.0], ["quadratic"])},
        ... ).quantities[0].nothing
        1.0
    """

    id: str
    statement: str
    source: str
    paper_scale: str
    our_scale: str
    quantities: tuple[Quantity, ...]
    experiment: Callable[[Lab], Mapping[str, Pairs]] | None
    reason: str = ""

    def __post_init__(self) -> None:
        if not self.quantities:
            raise ValueError(f"claim {self.id!r} needs at least one quantity")
        if (self.experiment is None) == (not self.reason):
            raise ValueError(f"claim {self.id!r} needs an experiment, or the reason why there can be none")

    def measure(self, lab: Lab) -> dict[str, Pairs]:
        """Run the experiment.

        Raises:
            ValueError: it does not return exactly the quantities of the claim.
        """
        found = dict(self.experiment(lab)) if self.experiment else {}
        names = [q.name for q in self.quantities] if self.experiment else []
        if sorted(found) != sorted(names):
            raise ValueError(f"the experiment of claim {self.id!r} measured {sorted(found)}, not {sorted(names)}")
        return found


@dataclass
class Lab:
    """Where an experiment runs. Finished results are kept in `store`, so that a killed claim can be resumed.

    Args:
        store: folder of this claim.
        smoke: run everything once, as small as possible, to check that it works.
        workers: number of processes for comparisons.
        code: version of the code, part of the key of a kept case.
        notes: settings and warnings of the comparisons, for the ledger.
    """

    store: Path
    smoke: bool = False
    workers: int = 1
    code: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    def compare(
        self, recipe: Recipe, methods: Sequence[MethodLike], *, name: str = "study", seeds: int = 8, trials: int = 8
    ) -> Study:
        """`steep.compare`: tuned baseline and arms, paired seeds, controls. A smoke run trains 2 steps on 2 seeds."""
        if self.smoke:
            recipe, seeds, trials = recipe.replace(budget=Budget(steps=2)), 2, 1
        study = compare(
            recipe,
            methods,
            seeds=seeds,
            trials=trials,
            workers=self.workers,
            out=self.store / name,
            progress=False,
        )
        self.notes[name] = {
            "chosen": {arm.name: dict(arm.hyper) for arm in study.arms},
            "warnings": list(study.warnings),
            "A/A": study.arms[-1].scores[study.primary].verdict,
        }
        return study

    def shorter(self, recipe: Recipe) -> Recipe:
        """The recipe; in a smoke run, with a budget of 2 steps."""
        return recipe.replace(budget=Budget(steps=2)) if self.smoke else recipe

    def each(
        self, cases: Sequence[int | str], measure: Callable[[Any], Mapping[str, float | None]], name: str = "cases"
    ) -> list[dict[str, float | None]]:
        """``measure(case)`` for every case, finished ones from the store; a smoke run takes the first."""
        return [self._kept(case, measure, name) for case in (cases[:1] if self.smoke else cases)]

    def _kept(self, case: int | str, measure: Callable[[Any], Mapping[str, float | None]], name: str) -> Any:
        key = hashlib.sha256(json.dumps([self.code, name, case, self.smoke]).encode()).hexdigest()[:24]
        path = self.store / "cases" / f"{key}.json"
        if not path.exists():
            write_atomic(path, json.dumps({"name": name, "case": case, "values": dict(measure(case))}))
        return json.loads(path.read_text())["values"]


def scores(
    study: Study, arm: str, score: str = "loss", *, against: str = BASELINE, at_equal_time: bool = False
) -> Pairs:
    """Final test scores of two arms of a comparison, on its paired seeds."""
    method, other = (
        (found.equal_time or found.runs) if at_equal_time else found.runs
        for found in (_arm(study, arm), _arm(study, against))
    )
    return Pairs(finals(method, score), finals(other, score), list(study.seeds))


def errors(study: Study, arm: str, *, examples: int, against: str = BASELINE) -> Pairs:
    """Error rates, for ratios: gains in points of accuracy do not carry over from a hard problem to an easy one.

    Half of one of the `examples` in the test set is added, so that a run without errors has a ratio.
    """
    accuracy = scores(study, arm, "accuracy", against=against)
    method, other = (
        [None if value is None else 1 - value + 0.5 / examples for value in values]
        for values in (accuracy.method, accuracy.baseline)
    )
    return Pairs(method, other, accuracy.cases)


def cpu_seconds(study: Study, arm: str, *, against: str = BASELINE) -> Pairs:
    """CPU seconds that two arms spent on training; `None` for runs that diverged."""
    method, other = ([r.cpu_seconds or None for r in _arm(study, name).runs] for name in (arm, against))
    return Pairs(method, other, list(study.seeds))


def columns(
    rows: Sequence[Mapping[str, float | None]], cases: Sequence[int | str], method: str, baseline: str
) -> Pairs:
    """`Pairs` from two columns of what `Lab.each` returned."""
    return Pairs([row[method] for row in rows], [row[baseline] for row in rows], list(cases)[: len(rows)])


def _arm(study: Study, name: str) -> Any:
    found = {arm.name: arm for arm in study.arms}
    if name not in found:
        raise UnknownName(f"the comparison has no arm {name!r}{nearest(name, found)}")
    return found[name]

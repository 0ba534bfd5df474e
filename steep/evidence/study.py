"""What a comparison found: runs, arms and the study they make up. Plain values; reports are drawn from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunRecord:
    """One training, as stored in one JSON file.

    Args:
        key: content address: of recipe source, methods, hyper-parameters, seeds, budget and code.
        arm: name of the arm it was made for.
        role: "tune", "confirm", "twin" (the A/A control), "equal-time" or "equal-examples".
        methods: ids (or function names) applied to the recipe, with their hyper-parameters.
        lr_scale: factor on the learning rate of a recipe's own optimizer.
        outcome: "finished", "diverged" (a loss became NaN or infinite) or "failed" (with `message`).
        preparation_seconds: CPU seconds before the first step, for data, model and what a method makes beforehand.
        other_seconds: CPU seconds of evaluating and saving.
        curve: one entry per evaluation: step, examples, seconds, cpu_seconds, loss and the metric.
        val, test: final scores ("loss" and the metric's name); empty unless finished.
        digest: hash of every step's loss: equal digests are equal trajectories.
        source, source_hash: the recipe's name, and the hash of its source, whose text the store keeps under that name.
        picture: path of a PNG, relative to the store, for recipes that draw one.
    """

    key: str
    arm: str
    role: str
    methods: Sequence[tuple[str, Mapping[str, Any]]]
    lr_scale: float
    seed: int
    split_seed: int
    budget: Mapping[str, float | None]
    outcome: str
    message: str = ""
    curve: Sequence[Mapping[str, float]] = ()
    val: Mapping[str, float] = field(default_factory=dict)
    test: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    preparation_seconds: float = 0.0
    other_seconds: float = 0.0
    peak_memory: int | None = None
    steps: int = 0
    examples: int = 0
    digest: str = ""
    picture: str | None = None
    source: str = ""
    source_hash: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Comparison:
    """An arm against the tuned baseline over paired seeds; differences are signed so that positive is better.

    With `relative`, differences are of logarithms: 0.10 reads "loss 10 % lower" (exp(-0.10) of the baseline's).

    Args:
        differences: one per pair of seeds, in the order of the seeds; infinite where one of a pair diverged.
        estimate, low, high: mean difference and its 95 % interval.
        p, p_holm: exact sign-flip test, and adjusted over the arms of the study.
        mde: smallest difference that this many pairs would have shown in 4 of 5 studies.
        won: pairs in which the arm was better.
        verdict: "helps", "hurts", "no evidence" or "too few seeds".
        alpha: share of the 5 % that the look which ended the arm could spend (all of it, unless the study is
            group-sequential). `p_holm` is scaled by it, so that 0.05 decides; the interval has level 1 - alpha, which
            covers in 95 % of studies at least, whatever look ended them.
    """

    score: str
    relative: bool
    differences: Sequence[float]
    estimate: float
    low: float
    high: float
    p: float
    p_holm: float
    mde: float
    won: int
    verdict: str
    alpha: float = 0.05


@dataclass(frozen=True)
class ArmResult:
    """One way to train: what was tried in tuning, what was chosen, and the confirmation runs.

    Args:
        name: "baseline", "adamw", a method's id, several joined by "+", or "A/A".
        summary: one sentence on the method, from its card.
        paper: link, where there is one.
        hyper: chosen hyper-parameters ("lr_scale" among them where the recipe's own optimizer is kept).
        trials: tuning runs, the published defaults first.
        runs: confirmation runs in the order of the seeds; those of the first seeds where a look ended the arm early.
        equal_time: runs given as many steps as fit into the baseline's CPU seconds; empty where `runs` serve.
        equal_examples: runs given as many steps as see the baseline's number of examples; empty where `runs` serve.
        scores: by score name ("loss", the metric), against the baseline at equal steps; empty for the baseline.
        scores_at_equal_time: the same at equal time.
        scores_at_equal_examples: the same at equal examples.
        time_to_target: per seed, CPU seconds (preparation among them) until the validation loss reached the study's
            `target_loss`; None = never.
        steps_to_target: the same in steps.
        to_target: "steps" and "seconds" to target against the baseline's by signed ranks, each a family of its own;
            empty for baseline and control, and where there is no target.
        did_nothing: the trajectory with default settings equals the unchanged recipe's bit for bit.
    """

    name: str
    summary: str = ""
    paper: str | None = None
    hyper: Mapping[str, Any] = field(default_factory=dict)
    trials: Sequence[RunRecord] = ()
    runs: Sequence[RunRecord] = ()
    equal_time: Sequence[RunRecord] = ()
    equal_examples: Sequence[RunRecord] = ()
    scores: Mapping[str, Comparison] = field(default_factory=dict)
    scores_at_equal_time: Mapping[str, Comparison] = field(default_factory=dict)
    scores_at_equal_examples: Mapping[str, Comparison] = field(default_factory=dict)
    time_to_target: Sequence[float | None] = ()
    steps_to_target: Sequence[float | None] = ()
    to_target: Mapping[str, Comparison] = field(default_factory=dict)
    did_nothing: bool = False


@dataclass(frozen=True)
class Study:
    """A finished comparison.

    Args:
        recipe: the recipe's name.
        source: how to name the recipe on the command line; empty for a recipe made in memory.
        arms: the baseline first, then the others; the A/A control last.
        primary: the score that verdicts are about ("loss" unless asked otherwise).
        metrics: every score, mapped to whether higher is better.
        seeds: confirmation seeds, as many as the arm with most of them had.
        left_out: methods not run, with the reason.
        target_loss: median final validation loss of the A/A control: the baseline on other seeds, so that no arm's own
            runs set its target. None where half of them diverged.
        target_picture: PNG path, relative to the store, for recipes that draw one.
        warnings: sentences the reader must see.
        looks: for each planned look its "pairs", "alpha" (what it could spend of the 5 %; 0: it could decide nothing)
            and "decided", the arms whose verdict it brought; the last entry with "made" ended the study. One look,
            unless the study is group-sequential.
        earlier: other numbers of pairs after which verdicts were read in this store before.
        command: what to type to get this study again.
    """

    recipe: str
    source: str
    arms: Sequence[ArmResult]
    primary: str
    metrics: Mapping[str, bool]
    seeds: Sequence[int]
    left_out: Mapping[str, str] = field(default_factory=dict)
    target_loss: float | None = None
    target_picture: str | None = None
    warnings: Sequence[str] = ()
    interim_analyses: Sequence[Mapping[str, Any]] = ()
    earlier: Sequence[int] = ()
    command: str = ""

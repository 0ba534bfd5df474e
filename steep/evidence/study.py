"""What a comparison found: runs, arms and the study they make up. Plain values, from which reports are rendered."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BASELINE = "baseline"  # name of the arm that trains the recipe as it came
CONTROL = "A/A"  # name of the arm that trains the baseline once more, as if it were a method


@dataclass(frozen=True)
class RunRecord:
    """One training run, as stored in one JSON file.

    Args:
        key: content address: of recipe source, methods, hyper-parameters, seeds, budget and code.
        arm: name of the arm it was made for.
        role: "tune", "confirm", "aa-control", "equal-time" or "equal-examples".
        methods: ids (or function names) applied to the recipe, with their hyper-parameters.
        lr_scale: factor on the learning rate of a recipe's own optimizer.
        outcome: "finished", or "diverged" where a loss became NaN or infinite; `message` then says at which step.
        preparation_seconds: CPU seconds before the first step: applying methods, loading data, building the model, and
            whatever a method prepares.
        other_seconds: CPU seconds of evaluation and saving.
        curve: one entry per evaluation: step, examples, seconds, cpu_seconds, loss and the metric.
        val, test: final scores ("loss" and the metric's name); empty unless finished.
        digest: hash of every step's loss: equal digests are equal trajectories.
        source, source_hash: the recipe's name, and the hash of its source; the store keeps the source's text under it.
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

    @property
    def total_cpu_seconds(self) -> float:
        """Of preparation and training; 0 unless finished."""
        return self.preparation_seconds + self.cpu_seconds

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
        mde: minimum detectable effect: the smallest difference that this many pairs would show in 4 of 5 studies.
        won: number of pairs in which the arm was better.
        verdict: "helps", "hurts", "no evidence" or "too few seeds".
        alpha: share of the 5 % that was available to the interim analysis at which the arm stopped (all of it, unless
            the study is group-sequential). `p_holm` is scaled by it, so that 0.05 remains the threshold. The interval
            has level 1 - alpha; over studies it covers the true difference in at least 95 %, whenever they stopped.
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
    """What one arm gave: its tuning trials, the chosen setting, its confirmation runs, and how they compare.

    Args:
        name: "baseline", "adamw", a method's id, several joined by "+", or "A/A".
        summary: the first paragraph of the method's docstring.
        paper: link, where there is one.
        hyper: chosen hyper-parameters ("lr_scale" among them where the recipe's own optimizer is kept).
        trials: tuning runs, the published defaults first.
        runs: confirmation runs in the order of the seeds; fewer of them where an interim analysis stopped the arm.
        equal_time: runs with as many steps as fit into the baseline's CPU seconds; empty where `runs` already do.
        equal_examples: runs with as many steps as see the baseline's number of examples; empty where `runs` already do.
        scores: by score name ("loss", the metric), against the baseline at equal steps; empty for the baseline.
        scores_at_equal_time: the same at equal time.
        scores_at_equal_examples: the same at equal examples.
        time_to_target: per seed, CPU seconds (preparation among them) until the validation loss reached the study's
            `target_loss`; None = never.
        steps_to_target: the same in steps.
        to_target: "steps" and "seconds" to target, compared with the baseline's by signed ranks; each is a family of
            its own. Empty for the baseline and the control, and where there is no target.
        did_nothing: with its default settings, and in every pair at one learning rate, losses and scores equal those
            of the unchanged recipe, bit for bit.
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
        seeds: confirmation seeds of the arm that had most of them.
        left_out: methods that were not run, with the reason.
        target_loss: median final validation loss of the A/A control. The control is the baseline on other seeds, so no
            arm's own runs set its target. None where half of the control's runs diverged.
        target_picture: PNG path, relative to the store, for recipes that draw one.
        warnings: sentences the reader must see.
        interim_analyses: for each planned analysis its "pairs", its "alpha" (share of the 5 % available to it; 0 where
            it could decide nothing), "decided" (the arms it decided), and whether it was "made". One analysis, after
            all pairs, unless the study is group-sequential.
        earlier: other numbers of pairs after which verdicts of this store have been read before.
        command: the shell command that makes this study.
        reference: name of the arm that `compare` added, unasked; "" where there is none.
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
    reference: str = ""

"""From runs to a study: targets, times to target, families over several analyses, warnings. Runs are made up."""

import math
from dataclasses import replace

import pytest

from steep.evidence.arms import Arm
from steep.evidence.assemble import _changed_load, _early_verdicts, assemble, compared, seconds_to, steps_to, target
from steep.evidence.statistics.paired import holm
from steep.evidence.statistics.sequential import InterimAnalysis
from steep.evidence.study import BASELINE, CONTROL, ArmResult, RunRecord, Study
from steep.evidence.tuning import Tuned

ONLY, HALF, LAST = InterimAnalysis(8, 0.05), InterimAnalysis(8, 3 / 128), InterimAnalysis(16, 0.05 - 3 / 128)


def run(loss, *, reached=5, pace=0.1, preparation=0.0, seed=0, role="confirm"):
    """A run whose validation loss is 9 until `reached` steps, then `loss`."""
    curve = [
        {"step": k, "cpu_seconds": pace * k, "seconds": 99.0, "loss": loss if k >= reached else 9.0}
        for k in range(1, 11)
    ]
    return RunRecord(
        "", "", role, (), 1.0, seed, seed, {}, "finished", curve=curve, val={"loss": loss}, test={"loss": loss},
        seconds=2.0, cpu_seconds=1.0, preparation_seconds=preparation, steps=10, examples=100, digest=f"{loss}",
    )  # fmt: skip


DIVERGED = RunRecord("", "", "confirm", (), 1.0, 0, 0, {}, "diverged")
SPLITS = [1.0, 1.3, 0.9, 1.1, 1.2, 0.8, 1.05, 0.95] * 2


def runs(gains, **how):
    return [run(split * math.exp(-gain), **how) for split, gain in zip(SPLITS, gains, strict=False)]


NOISE = [0.02, -0.03, 0.01, -0.02, 0.03, -0.01, 0.02, -0.02]
GAINS = [0.2, 0.3, 0.1, 0.25, 0.15, 0.3, 0.35, 0.2]


# Targets.


def test_the_target_is_the_controls_median_and_diverged_runs_count_as_never_there():
    assert target([run(1.0), run(3.0), run(2.0)]) == 2.0
    assert target([run(1.0), DIVERGED, run(2.0)]) == 2.0
    assert target([run(1.0), DIVERGED, run(math.nan)]) is None


def test_times_are_those_of_the_first_evaluation_there_and_preparation_counts():
    assert steps_to(1.0, run(1.0, reached=4)) == 4
    assert seconds_to(1.0, run(1.0, reached=4, preparation=2.0)) == pytest.approx(
        2.4
    )  # CPU seconds, not the 99 of the wall
    for to in (steps_to, seconds_to):
        assert to(0.5, run(1.0)) is to(None, run(1.0)) is to(1.0, DIVERGED) is None


def assembled(found, equal=None, stopped_at=None):
    arms = [Arm(name) for name in found if name != CONTROL]
    tuned = {arm.name: Tuned({}, [run(7.0)]) for arm in arms}
    stopped_at = dict.fromkeys([*found][1:], ONLY) | (stopped_at or {})
    equal = {"equal-time": {}, "equal-examples": {}} | (equal or {})
    return {arm.name: arm for arm in assemble(arms, tuned, found, equal, {"loss": False}, stopped_at)}


def test_times_to_target_are_judged_by_ranks_as_a_family_for_each_unit():
    found = {
        BASELINE: runs(NOISE, reached=8),
        "sooner": runs([0.5] * 8, reached=3, pace=0.3),  # fewer steps, but as many seconds
        "never": runs([-5.0] * 8),
        "lost": [DIVERGED] * 8,
        CONTROL: [run(9.0 - 1e-9)] * 8,
    }
    arms = assembled(found)
    assert arms["sooner"].steps_to_target == [3] * 8
    assert arms["sooner"].time_to_target == pytest.approx([0.9] * 8)
    assert arms["sooner"].to_target["steps"].verdict == "helps"
    assert arms["sooner"].to_target["seconds"].verdict == "hurts"  # 0.9 s against 0.8 s
    assert arms["sooner"].to_target["steps"].differences == pytest.approx([math.log(8 / 3)] * 8)
    for name in ("never", "lost"):
        assert arms[name].time_to_target == arms[name].steps_to_target == [None] * 8
        assert {unit: c.verdict for unit, c in arms[name].to_target.items()} == {"steps": "hurts", "seconds": "hurts"}
    for unit in ("steps", "seconds"):
        p = [arms[name].to_target[unit].p for name in ("sooner", "never", "lost")]
        assert [arms[name].to_target[unit].p_holm for name in ("sooner", "never", "lost")] == holm(p)
        assert arms["sooner"].to_target[unit].score == f"{unit} to target"
    assert arms[BASELINE].to_target == arms[CONTROL].to_target == {}


def test_without_a_target_there_are_no_times_to_it():
    arms = assembled({BASELINE: runs(NOISE), "arm": runs(GAINS), CONTROL: [DIVERGED] * 8})
    assert arms["arm"].to_target == {}
    assert arms["arm"].time_to_target == [None] * 8


def test_the_baselines_own_runs_do_not_move_the_target():
    control = runs(NOISE)
    good, bad = ({BASELINE: runs([g] * 8), "arm": runs(GAINS), CONTROL: control} for g in (0.9, -0.9))
    assert assembled(good)["arm"].time_to_target == assembled(bad)["arm"].time_to_target


# Families, interim analyses and equal budgets.


def test_arms_are_paired_with_the_seeds_they_had_and_judged_at_their_analysis():
    found = {
        BASELINE: runs([0.0] * 16),
        "early": runs(GAINS),
        "late": runs(NOISE * 2),
        CONTROL: runs(NOISE[::-1] * 2),
    }
    arms = assembled(found, stopped_at={"early": HALF, "late": LAST, CONTROL: LAST})
    early, late, control = (arms[name].scores["loss"] for name in ("early", "late", CONTROL))
    assert early.differences == pytest.approx(GAINS)
    assert (early.verdict, early.alpha, early.p) == ("helps", 3 / 128, 1 / 128)
    assert early.p_holm == pytest.approx(2 * (1 / 128) * 0.05 / (3 / 128))  # Holm over both, scaled to the whole 5 %
    assert len(late.differences) == 16
    assert late.p_holm == pytest.approx(min(1, 2 * late.p * 0.05 / LAST.alpha))
    assert control.p_holm == pytest.approx(min(1, control.p * 0.05 / LAST.alpha))  # the control is in no family


def test_interim_verdicts_count_the_arms_that_have_stopped():
    pairs = {BASELINE: runs([0.0] * 8), "left": runs(GAINS)}
    alone, of_three = (compared(pairs, {"loss": False}, {"left": ONLY}, family)["left"]["loss"] for family in (None, 3))
    assert of_three.p_holm == 3 * alone.p_holm == 3 * alone.p


def test_scores_at_equal_time_and_examples_are_those_of_the_runs_made_for_them():
    found = {BASELINE: runs([0.0] * 8), "arm": runs(GAINS), "same": runs(NOISE), CONTROL: runs(NOISE)}
    worse = runs([-g for g in GAINS])
    arm = assembled(found, {"equal-examples": {"arm": worse}})["arm"]
    assert arm.scores["loss"].verdict == arm.scores_at_equal_time["loss"].verdict == "helps"
    assert arm.scores_at_equal_examples["loss"].verdict == "hurts"
    assert (arm.equal_examples, arm.equal_time) == (worse, ())
    same = assembled(found, {"equal-time": {"arm": worse}})["same"]
    assert same.scores_at_equal_time == same.scores_at_equal_examples == same.scores


# Warnings.


def a_study(arms=(), **changes):
    return Study("r", "r", arms, "loss", {"loss": False}, list(range(8)), **changes)


def loaded(ratio):
    return replace(run(1.0), seconds=ratio, cpu_seconds=1.0)


def test_a_machine_whose_load_changed_is_early_verdicts():
    wandering = ArmResult(BASELINE, runs=[loaded(1.0), loaded(1.2)], equal_time=[loaded(1.6)])
    [sentence] = _changed_load(a_study([wandering]))
    assert "from 1.00 to 1.60" in sentence
    assert "CPU seconds" in sentence


def test_an_arm_that_waits_or_uses_threads_by_nature_is_no_change_of_load():
    assert (
        list(
            _changed_load(
                a_study([ArmResult(BASELINE, runs=[loaded(1.0)] * 3), ArmResult("waits", runs=[loaded(3.0)] * 3)])
            )
        )
        == []
    )
    assert list(_changed_load(a_study([ArmResult("lost", runs=[DIVERGED])]))) == []


def test_early_stops_and_earlier_verdicts_are_reported():
    analyses = [
        {"pairs": 8, "alpha": 0.02, "made": True, "decided": ["good"]},
        {"pairs": 16, "alpha": 0.03, "made": True, "decided": ["other"]},
    ]
    [stop] = _early_verdicts(a_study(interim_analyses=analyses))
    assert stop.startswith("Decided at the interim analysis after 8 of 16 pairs: good.")
    assert "biased away from zero" in stop
    [again] = _early_verdicts(a_study(earlier=[6, 8]))
    assert "also read after 6, 8 pairs" in again
    assert "--sequential" in again
    assert list(_early_verdicts(a_study())) == []

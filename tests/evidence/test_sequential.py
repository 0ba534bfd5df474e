"""Interim analyses: what they spend, which arms they stop, and that the protocol around them keeps its promises."""

import dataclasses
import json
import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

import steep
from steep.evidence.runs.store import Store
from steep.evidence.statistics.paired import adjust, compare
from steep.evidence.statistics.sequential import InterimAnalysis, planned_analyses, stopping_points


@pytest.mark.parametrize("methods", [1, 2, 3, 6, 10, 20])
@pytest.mark.parametrize("pairs", [6, 8, 12, 16, 24, 32])
def test_analyses_never_spend_more_than_five_per_cent_and_only_what_they_can_use(pairs, methods):
    analyses = planned_analyses(pairs, methods, sequential=True)
    assert [analysis.pairs for analysis in analyses] == [pairs // 4, pairs // 2, pairs]
    assert sum(analysis.alpha for analysis in analyses) == pytest.approx(0.05)
    for analysis in analyses[:-1]:
        smallest = 2.0 ** (1 - pairs // (pairs // analysis.pairs))
        assert (analysis.alpha / smallest).is_integer()  # whole p-values: nothing is given away
        assert analysis.alpha == 0 or analysis.alpha / methods >= smallest  # Holm's first step can be made
        assert analysis.alpha <= 0.05 * analysis.pairs / pairs


def test_four_pairs_can_spend_nothing_and_a_single_analysis_spends_all():
    assert planned_analyses(16, 1, sequential=True)[0] == InterimAnalysis(4, 0)
    assert planned_analyses(16, 1, sequential=False) == [InterimAnalysis(16, 0.05)]


def alphas(pairs, methods):
    return [analysis.alpha for analysis in planned_analyses(pairs, methods, sequential=True)]


def test_what_analyses_of_4_8_and_16_pairs_spend_by_hand():
    assert [analysis.pairs for analysis in planned_analyses(16, 1, sequential=True)] == [4, 8, 16]
    three = 3 / 128  # the p-values of 8 pairs are multiples of 1 / 128, and 0.025 holds three
    assert alphas(16, 1) == pytest.approx([0, three, 0.05 - three])
    assert alphas(16, 3) == pytest.approx([0, three, 0.05 - three])
    assert alphas(16, 4) == [0, 0, 0.05]  # Holm's first step at 8 pairs would need four
    assert alphas(32, 10) == pytest.approx([0, 0.025 - 0.025 % (1 / 32768), 0.025 + 0.025 % (1 / 32768)])


def sign_flip_levels(sizes):
    """Exact p-values of all sign patterns of these sizes, written without the code under test."""
    signs = np.array(list(product((1, -1), repeat=len(sizes))))
    sums = np.abs(signs @ sizes)
    order = np.sort(sums)
    return signs, 1 - np.searchsorted(order, sums - 1e-9) / len(sums)


@pytest.mark.parametrize("heavy", [False, True])
def test_the_total_error_is_at_most_five_per_cent_exactly(heavy):
    """Over all 65 536 signs of given sizes, which are equally likely if the arm changes nothing."""
    rng = np.random.default_rng(1)
    sizes = np.abs(rng.standard_t(2, 16) if heavy else rng.standard_normal(16))
    _, half, whole = alphas(16, 1)
    early = np.repeat(sign_flip_levels(sizes[:8])[1] <= half, 256)
    signs, p = sign_flip_levels(sizes)
    late = p <= whole
    assert np.mean(early) == 3 / 128
    assert 0.035 < np.mean(early | late) <= 0.05
    design = planned_analyses(16, 1, sequential=True)
    for i in rng.choice(np.flatnonzero(early | late), 10).tolist() + rng.integers(0, len(signs), 10).tolist():
        verdict, stopped_at = one_arm(signs[i] * sizes, design)
        assert (verdict in ("helps", "hurts")) == (early | late)[i]
        assert stopped_at.pairs == (8 if early[i] else 16)


def one_arm(d, design):
    last = {}

    def judged(analysis, going):
        alone = compare((-d[: analysis.pairs]).tolist(), [0.0] * analysis.pairs, alpha=analysis.alpha)
        last.update(adjust({"arm": alone}))
        return last

    stopped_at = stopping_points(design, ["arm"], judged)
    return last["arm"].verdict, stopped_at["arm"]


def test_the_interval_of_an_analysis_excludes_zero_exactly_when_it_decides_and_covers_over_all():
    rng, design, effect = np.random.default_rng(2), planned_analyses(16, 1, sequential=True), 1.2
    covered = []
    for _ in range(400):
        d = rng.standard_normal(16) + effect
        for analysis in design[1:]:
            c = compare((-d[: analysis.pairs]).tolist(), [0.0] * analysis.pairs, alpha=analysis.alpha)
            assert (c.verdict == "helps") == (c.low > 0)
            if c.verdict == "helps":
                break
        covered.append(c.low <= effect <= c.high)
    assert np.mean(covered) >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 400)


def test_an_arm_that_is_decided_is_not_analysed_again():
    analyses, asked = [InterimAnalysis(4, 0), InterimAnalysis(8, 0.02), InterimAnalysis(16, 0.03)], []
    clear, even = [1.0, 2.0, 1.5, 1.2, 0.9, 1.1, 1.3, 0.7] * 2, [1.0, -1.0] * 8

    def judged(analysis, going):
        asked.append((analysis.pairs, list(going)))
        differences = {"clear": clear, "even": even}
        alone = {
            name: compare([0.0] * analysis.pairs, differences[name][: analysis.pairs], alpha=analysis.alpha)
            for name in going
        }
        return adjust(alone, 2)

    assert stopping_points(analyses, ["clear", "even"], judged) == {"clear": analyses[1], "even": analyses[2]}
    assert asked == [(8, ["clear", "even"]), (16, ["even"])]


def test_nothing_is_made_once_all_are_decided():
    analyses = [InterimAnalysis(8, 0.02), InterimAnalysis(16, 0.03)]
    asked = []

    def judged(analysis, going):
        asked.append(analysis.pairs)
        return {
            name: compare([0.0] * analysis.pairs, [1.0 + i for i in range(analysis.pairs)], alpha=analysis.alpha)
            for name in going
        }

    stopping_points(analyses, ["a"], judged)
    assert asked == [8]


def test_a_share_of_the_error_makes_p_larger_and_the_interval_wider():
    arm, baseline = [0.7, 0.5, 0.6, 0.8, 0.6, 0.5, 0.4, 0.9], [0.9, 0.6, 0.7, 0.9, 0.9, 0.6, 0.45, 0.92]
    whole, share = (compare(arm, baseline, alpha=alpha) for alpha in (0.05, 0.02))
    assert share.p_holm == pytest.approx(whole.p_holm * 2.5)
    assert share.low < whole.low
    assert share.high > whole.high
    assert (whole.verdict, share.verdict) == ("helps", "helps")
    assert compare(arm, baseline, alpha=0.005).verdict == "no evidence"  # 8 pairs have no p-value below 0.0078


def test_arms_decided_before_count_in_the_family():
    alone = {"a": compare([0.0] * 8, [1.0 + i for i in range(8)])}
    assert adjust(alone, 3)["a"].p_holm == pytest.approx(3 * alone["a"].p)
    with pytest.raises(ValueError, match="at least the 2 comparisons given, got 1"):
        adjust({**alone, "b": alone["a"]}, 1)


def recipe():
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([1.0, -2.0, 0.5])
    return steep.Recipe(
        data=lambda g: steep.split_loaders(x, y, g, batch_size=8, val=1 / 6, test=1 / 6),
        model=lambda: nn.Linear(3, 1),
        loss=lambda output, target: (output.squeeze(-1) - target).square(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        budget=steep.Budget(steps=12),
        name="tiny",
    )


def fast(recipe):
    """Far better than the baseline."""
    return recipe.replace(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))


def same(recipe):
    """The baseline."""
    return recipe


def sequential(out):
    return steep.compare(recipe(), [fast, same], trials=1, workers=1, out=out, sequential=True, progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("sequential")
    return sequential(out), out


def test_a_clear_method_stops_early_and_an_idle_one_goes_on(finished):
    study, out = finished
    assert [(analysis["pairs"], analysis["made"]) for analysis in study.interim_analyses] == [
        (4, False),
        (8, True),
        (16, True),
    ]
    arms = {arm.name: arm for arm in study.arms}
    made = {name: len(arm.runs) for name, arm in arms.items()}
    assert made["fast"] == 8
    assert made["baseline"] == made["same"] == made["A/A"] == 16
    assert all(len(arm.equal_time) in (0, len(arm.runs)) for arm in study.arms)
    assert arms["fast"].scores["loss"].verdict == "helps"
    assert arms["same"].did_nothing
    early = next(analysis for analysis in study.interim_analyses if "fast" in analysis["decided"])
    assert early["pairs"] == made["fast"]
    assert any("Decided at the interim analysis" in warning for warning in study.warnings)
    assert math.isclose(sum(analysis["alpha"] for analysis in study.interim_analyses), 0.05)
    kept, made = (json.dumps(dataclasses.asdict(s)) for s in (Store(out).study(), study))
    assert kept == made


def test_a_sequential_study_is_resumed_where_it_was(finished):
    study, out = finished
    files = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    again = sequential(out)
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()} == files
    assert (again.interim_analyses, again.earlier) == (study.interim_analyses, [])
    assert [arm.scores for arm in again.arms] == [arm.scores for arm in study.arms]


def test_reading_verdicts_again_with_more_seeds_is_reported(tmp_path):
    def study(seeds):
        return steep.compare(recipe(), [fast], seeds=seeds, trials=1, workers=1, out=tmp_path, progress=False)

    assert study(6).earlier == []
    again = study(8)
    assert again.earlier == [6]
    assert any("also read after 6 pairs" in warning for warning in again.warnings)

"""The group-sequential design: what looks may spend, that all of them together spend 5 %, and which one ends an arm."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steep.evidence.power import minimum_detectable_effect, seeds_needed
from steep.evidence.sequential import Look, followed, planned
from steep.evidence.statistics import adjust, compare


def alphas(pairs, methods):
    return [look.alpha for look in planned(pairs, methods, sequential=True)]


def test_a_study_that_is_not_sequential_has_one_look_that_spends_all():
    assert planned(8, 3, sequential=False) == [Look(8, 0.05)]


def test_what_looks_at_4_8_and_16_pairs_spend_by_hand():
    assert [look.pairs for look in planned(16, 1, sequential=True)] == [4, 8, 16]
    three = 3 / 128  # the p-values of 8 pairs are multiples of 1 / 128, and 0.025 holds three
    assert alphas(16, 1) == pytest.approx([0, three, 0.05 - three])
    assert alphas(16, 3) == pytest.approx([0, three, 0.05 - three])
    assert alphas(16, 4) == [0, 0, 0.05]  # Holm's first step at 8 pairs would need four
    assert alphas(32, 10) == pytest.approx([0, 0.025 - 0.025 % (1 / 32768), 0.025 + 0.025 % (1 / 32768)])


@given(st.integers(1, 64), st.integers(1, 30))
def test_looks_spend_five_per_cent_in_all_and_nothing_that_can_decide_nothing(pairs, methods):
    looks = planned(pairs, methods, sequential=True)
    assert sum(look.alpha for look in looks) == pytest.approx(0.05)
    for look, share in zip(looks, (1 / 4, 1 / 2, 1), strict=True):
        assert sum(e.alpha for e in looks if e.pairs <= look.pairs) <= 0.05 * share + 1e-12
        assert look is looks[-1] or look.alpha == 0 or look.alpha / methods >= 2 / 2**look.pairs
    assert pairs < seeds_needed(methods) or 2 / 2**pairs <= looks[-1].alpha / methods


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
    design = planned(16, 1, sequential=True)
    for i in rng.choice(np.flatnonzero(early | late), 10).tolist() + rng.integers(0, len(signs), 10).tolist():
        verdict, ended = one_arm(signs[i] * sizes, design)
        assert (verdict in ("helps", "hurts")) == (early | late)[i]
        assert ended.pairs == (8 if early[i] else 16)


def one_arm(d, design):
    last = {}

    def judged(look, going):
        alone = compare((-d[: look.pairs]).tolist(), [0.0] * look.pairs, alpha=look.alpha)
        last.update(adjust({"arm": alone}))
        return last

    return (lambda ended: (last["arm"].verdict, ended["arm"]))(followed(design, ["arm"], judged))


def test_interval_of_a_look_excludes_zero_exactly_when_the_look_decides_and_covers_in_all():
    rng, design, effect = np.random.default_rng(2), planned(16, 1, sequential=True), 1.2
    covered = []
    for _ in range(400):
        d = rng.standard_normal(16) + effect
        for look in design[1:]:
            c = compare((-d[: look.pairs]).tolist(), [0.0] * look.pairs, alpha=look.alpha)
            assert (c.verdict == "helps") == (c.low > 0)
            if c.verdict == "helps":
                break
        covered.append(c.low <= effect <= c.high)
    assert np.mean(covered) >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 400)


def test_arms_stop_where_they_are_decided_and_others_go_on():
    seen = []

    def judged(look, going):
        seen.append((look.pairs, list(going)))
        ups = {"early": [1.0] * 16, "late": [1.0, -1.0] * 4 + [5.0] * 8, "never": [1.0, -1.0] * 8}
        alone = {a: compare([-x for x in ups[a][: look.pairs]], [0.0] * look.pairs, alpha=look.alpha) for a in going}
        return adjust(alone, family=3)

    ended = followed(planned(16, 3, sequential=True), ["early", "late", "never"], judged)
    assert {name: look.pairs for name, look in ended.items()} == {"early": 8, "late": 16, "never": 16}
    assert seen == [(8, ["early", "late", "never"]), (16, ["late", "never"])]  # 4 pairs are passed over


def test_a_study_without_methods_makes_the_first_look_that_could_decide():
    seen = []
    assert followed(planned(16, 1, sequential=True), [], lambda look, going: seen.append(look.pairs) or {}) == {}
    assert seen == [8]


# Verdicts of a look.

PAIRS = [0.2, 0.3, 0.1, 0.25, 0.15, 0.3, 0.35, 0.2]


def eight(gains=PAIRS, alpha=0.05):
    return compare([-g for g in gains], [0.0] * len(gains), alpha=alpha)


def test_a_look_with_a_share_judges_at_that_share_and_reports_p_on_the_scale_of_all():
    assert eight(alpha=1 / 128).verdict == "helps"  # p is exactly what may be spent
    assert eight(alpha=1 / 128).p_holm == pytest.approx(0.05)
    assert eight(alpha=0.9 / 128).verdict == "no evidence"
    assert eight(alpha=0.025).p_holm == pytest.approx(2 / 128)
    assert eight(alpha=0.025).p == 1 / 128
    assert eight(alpha=1 / 128).low == min(PAIRS)
    assert eight(alpha=0.9 / 128).low == -math.inf
    sd = np.std(PAIRS, ddof=1)
    assert eight(alpha=0.025).mde == minimum_detectable_effect(sd, 8, 0.025)


def test_arms_that_are_absent_count_as_members_of_the_family_that_show_nothing():
    c = eight()
    assert adjust({"a": c}, family=3)["a"].p_holm == 3 / 128
    assert adjust({"a": c, "b": eight([1, -1] * 4)}, family=7)["a"].verdict == "no evidence"
    assert adjust({"a": c}, family=1) == adjust({"a": c}) == {"a": c}
    with pytest.raises(ValueError, match="family must be at least the 2 comparisons given, got 1"):
        adjust({"a": c, "b": c}, family=1)
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\), got 0"):
        eight(alpha=0)


@pytest.mark.parametrize("methods", [1, 3, 5])
def test_false_verdicts_of_a_sequential_family(methods):
    rng, design, wrong, studies = np.random.default_rng(methods), planned(16, methods, sequential=True), 0, 150
    for _ in range(studies):
        loss = rng.standard_normal((1 + methods, 16))
        found = {}

        def judged(look, going, loss=loss, found=found):
            base = loss[0, : look.pairs].tolist()
            alone = {i: compare(loss[int(i), : look.pairs].tolist(), base, alpha=look.alpha) for i in going}
            found.update(adjust(alone, family=methods))
            return found

        followed(design, [str(i + 1) for i in range(methods)], judged)
        wrong += any(c.verdict in ("helps", "hurts") for c in found.values())
    assert wrong / studies <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)

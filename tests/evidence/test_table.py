"""The verdicts in words and the terminal table, against texts written by hand."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from steep.evidence.report import rows, sentences, table, wording
from steep.evidence.study import ArmResult, Comparison, RunRecord, Study

METRICS = {"loss": False, "accuracy": True}


def compared(estimate: float, low: float, high: float, verdict: str = "no evidence", **changes: Any) -> Comparison:
    """A relative comparison of the loss over 8 pairs, unless asked otherwise."""
    sign = 1.0 if estimate > 0 else -1.0
    defaults: dict[str, Any] = {
        "score": "loss",
        "relative": True,
        "differences": [sign] * 8,
        "p": 0.0078,
        "p_holm": 0.016,
        "mde": -math.log(0.88),
        "won": 8 if sign > 0 else 0,
    }
    return Comparison(estimate=estimate, low=low, high=high, verdict=verdict, **{**defaults, **changes})


def lower(percent: float) -> float:
    """The difference that reads "`percent` % lower"."""
    return -math.log(1 - percent / 100)


def higher(percent: float) -> float:
    return -math.log(1 + percent / 100)


def run(loss: float | None, seed: int = 0, **changes: Any) -> RunRecord:
    """A confirmation run; one that diverged where the loss is None."""
    scores = {} if loss is None else {"loss": loss, "accuracy": 1 - loss}
    costs = {"cpu_seconds": 2.0, "peak_memory": 1000} | changes
    outcome = "diverged" if loss is None else "finished"
    return RunRecord(f"k{seed}", "x", "confirm", (), 1.0, seed, seed, {}, outcome, test=scores, **costs)


def arm(name: str, c: Comparison | None = None, timed: Comparison | None = None, **changes: Any) -> ArmResult:
    scores = {} if c is None else {c.score: c}
    return ArmResult(name, scores=scores, scores_at_equal_time={} if timed is None else {timed.score: timed}, **changes)


def study(*arms: ArmResult, primary: str = "loss", **changes: Any) -> Study:
    baseline = ArmResult("baseline", runs=[run(0.4), run(0.2), run(0.3)])
    return Study("digits", "digits", [baseline, *arms], primary, METRICS, list(range(8)), **changes)


def shown(of: Study, width: int = 100, **console: Any) -> str:
    file = io.StringIO()
    Console(file=file, width=width, **console).print(table.render(of))
    return file.getvalue()


HELPS = compared(lower(41), lower(35), lower(47), "helps")
HURTS = compared(higher(20), higher(30), higher(10), "hurts")
UNCLEAR = compared(lower(3), higher(5), lower(12), won=5, p_holm=0.4)


# Numbers in words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("c", "higher_is_better", "words", "bounds", "short"),
    [
        (HELPS, False, "41 % lower", "35 to 47 %", "−41 % [−47, −35]"),
        (HURTS, False, "20 % higher", "10 to 30 %", "+20 % [+10, +30]"),
        (UNCLEAR, False, "3.0 % lower", "12 % lower to 5.0 % higher", "−3.0 % [−12, +5.0]"),
        # the same differences of a score that should rise: positive is better, hence higher
        (compared(math.log(1.2), math.log(1.1), math.log(1.3)), True, "20 % higher", "10 to 30 %", "+20 % [+10, +30]"),
        (compared(math.log(0.8), math.log(0.7), math.log(0.9)), True, "20 % lower", "10 to 30 %", "−20 % [−30, −10]"),
        # from tenfold on in times
        (compared(math.log(50), math.log(8), math.log(400)), False, "50 times lower", "8 to 400 times",
         "÷50 [÷400, ÷8]"),
        (compared(-math.log(50), -math.log(400), math.log(2)), False, "50 times higher",
         "2 times lower to 400 times higher", "×50 [÷2, ×400]"),
        (compared(lower(89), lower(80), lower(99.7)), False, "89 % lower", "80 to 99.7 %", "−89 % [−99.7, −80]"),
        # absolute differences have no unit
        (compared(0.012, 0.008, 0.016, relative=False), True, "0.012 higher", "0.008 to 0.016",
         "+0.012 [+0.008, +0.016]"),
        (compared(0.012, -0.008, 0.016, relative=False), False, "0.012 lower", "0.016 lower to 0.008 higher",
         "−0.012 [−0.016, +0.008]"),
        (compared(0.0, 0.0, 0.0), False, "unchanged", "0 to 0", "0 % [0, 0]"),
        # a diverged run is infinitely bad
        (compared(higher(20), -math.inf, higher(10)), False, "20 % higher", "10 % higher to unbounded",
         "+20 % [+10, +∞]"),
    ],
)  # fmt: skip
def test_differences_read_as_changes_of_the_score(
    c: Comparison, higher_is_better: bool, words: str, bounds: str, short: str
) -> None:
    assert wording.worded(c, higher_is_better) == words
    assert wording.interval(c, higher_is_better) == bounds
    assert wording.compact(c, higher_is_better) == short


def test_too_few_pairs_show_no_interval() -> None:
    c = compared(lower(41), -math.inf, math.inf, "too few seeds")
    assert wording.compact(c, False) == "−41 %"
    assert wording.compact(compared(math.nan, -math.inf, math.inf), False) == "undefined"


def test_percentages_keep_the_digits_that_matter() -> None:
    found = [wording.worded(compared(lower(p), 0, 1), False) for p in (0.04, 0.4, 5.23, 9.97, 41.2)]
    assert found == ["0.04 % lower", "0.4 % lower", "5.2 % lower", "10 % lower", "41 % lower"]


def test_the_detectable_difference_is_an_improvement() -> None:
    assert wording.detectable(compared(0.1, 0, 1, mde=math.log(2)), False) == "50 %"  # half the loss
    assert wording.detectable(compared(0.1, 0, 1, mde=math.log(2)), True) == "100 %"  # twice the accuracy
    assert wording.detectable(compared(0.1, 0, 1, mde=0.02, relative=False), True) == "0.02"


@pytest.mark.parametrize(("p", "text"), [(0.0156, "0.016"), (0.0004, "< 0.001"), (1.0, "1"), (math.nan, "–")])
def test_p_values(p: float, text: str) -> None:
    assert wording.significance(p) == text


@pytest.mark.parametrize(("value", "text"), [(0.946, "0.9460"), (1234.0, "1234"), (None, "–"), (math.nan, "–")])
def test_numbers_keep_four_digits(value: float | None, text: str) -> None:
    assert wording.number(value) == text


# Sentences ----------------------------------------------------------------------------------------------------------


def test_sentence_of_a_method_that_helps() -> None:
    assert sentences.sentences(study(arm("sven", HELPS, UNCLEAR))) == [
        "sven helps: test loss 41 % lower (95 % interval 35 to 47 %, better in 8 of 8 seeds, p = 0.016 after Holm) "
        "at equal steps; no evidence at equal time (detectable: 12 % or more)"
    ]


def test_sentence_of_a_method_that_hurts() -> None:
    assert sentences.sentences(study(arm("sam", HURTS, HELPS))) == [
        "sam hurts: test loss 20 % higher (95 % interval 10 to 30 %, worse in 8 of 8 seeds, p = 0.016 after Holm) "
        "at equal steps; helps at equal time (test loss 41 % lower)"
    ]


def test_sentence_without_evidence_names_the_detectable_difference() -> None:
    assert sentences.sentences(study(arm("adan", UNCLEAR))) == [
        "adan shows no evidence of a difference: test loss 3.0 % lower (95 % interval 12 % lower to 5.0 % higher, "
        "better in 5 of 8 seeds, p = 0.4 after Holm, detectable: 12 % or more) at equal steps"
    ]


def test_sentence_with_too_few_seeds_gives_numbers_but_no_verdict() -> None:
    c = compared(lower(41), -math.inf, math.inf, "too few seeds", differences=[0.5, 0.6], won=2, p_holm=0.5)
    assert sentences.sentences(study(arm("sven", c))) == [
        "sven has too few seeds for a verdict: test loss 41 % lower (better in 2 of 2 seeds, p = 0.5 after Holm) "
        "at equal steps"
    ]


def test_sentence_names_the_runs_that_did_not_finish() -> None:
    own = compared(-math.inf, -math.inf, higher(10), "hurts", differences=[-math.inf] * 5 + [-0.1] * 3)
    theirs = compared(lower(5), higher(5), math.inf, differences=[math.inf] + [0.05] * 7, mde=math.inf)
    of = study(arm("wild", own), arm("calm", theirs))
    calm, wild = sentences.sentences(of)
    assert wild == (
        "wild hurts: 5 of 8 runs did not finish (worse in 8 of 8 seeds, p = 0.016 after Holm) at equal steps"
    )
    assert "test loss 5.0 % lower, 1 of 8 of the baseline's runs did not finish" in calm
    assert "unbounded to 5.0 % higher" in calm
    assert "detectable difference unknown" in calm


def test_sentence_says_when_the_seeds_could_not_show_anything() -> None:
    assert (
        "too few seeds to detect any difference"
        in sentences.sentences(study(arm("x", compared(0.1, 0, 1, mde=math.inf))))[0]
    )


def test_sentence_about_the_metric_where_it_is_primary() -> None:
    c = compared(0.012, 0.008, 0.016, "helps", relative=False, score="accuracy")
    assert (
        "test accuracy 0.012 higher (95 % interval 0.008 to 0.016"
        in sentences.sentences(study(arm("sven", c), primary="accuracy"))[0]
    )


@pytest.mark.parametrize(
    ("c", "start"),
    [
        (UNCLEAR, "A/A (the baseline against itself) shows no difference, as it should: test loss 3.0 % lower"),
        (HELPS, "A/A (the baseline against itself) helps, which it should not: treat the other verdicts with caution:"),
    ],
)
def test_control_is_spoken_of_as_a_control(c: Comparison, start: str) -> None:
    [sentence] = sentences.sentences(study(arm("A/A", c)))
    assert sentence.startswith(start)
    assert "after Holm" not in sentence  # it is no member of the family


def test_did_nothing_outranks_the_verdict() -> None:
    of = study(arm("noop", HELPS, did_nothing=True))
    assert sentences.sentences(of) == [
        "noop did nothing: every loss and every score equal the unchanged recipe's bit for bit"
    ]
    row = table.cells(of.arms[1], of)
    assert row["equal steps"] == "did nothing"


def test_nothing_to_say_of_a_study_without_methods() -> None:
    assert sentences.sentences(study()) == []
    assert sentences.sentences(Study("r", "r", [], "loss", METRICS, [])) == []
    assert sentences.sentences(study(arm("lost"))) == ["lost could not be compared: no pair of runs"]


# Table --------------------------------------------------------------------------------------------------------------


def test_arms_are_ranked_between_baseline_and_control() -> None:
    nan = compared(math.nan, -math.inf, math.inf)
    arms = [arm("A/A", HELPS), arm("lost"), arm("worse", HURTS), arm("nan", nan), arm("best", HELPS)]
    assert [a.name for a in rows.ranked(study(*arms))] == ["baseline", "best", "worse", "lost", "nan", "A/A"]
    assert [a.name for a in rows.methods(study(*arms))] == ["best", "worse", "lost", "nan"]


def test_medians_count_unfinished_runs_as_worst() -> None:
    losses: Sequence[float | None] = (0.1, None, 0.3)
    runs = ArmResult("x", runs=[run(loss) for loss in losses])
    assert rows.median_test(runs, "loss", False) == 0.3
    assert rows.median_test(runs, "accuracy", True) == 0.7
    assert math.isnan(rows.median_test(ArmResult("x"), "loss", False))


def test_row_of_an_arm() -> None:
    costs = [{"cpu_seconds": 3.0, "peak_memory": 1500}, {"cpu_seconds": 5.0, "peak_memory": None}, {"cpu_seconds": 3.0}]
    runs = [run(loss, **cost) for loss, cost in zip((0.1, 0.2, 0.3), costs, strict=True)]
    of = study(arm("sven", HELPS, UNCLEAR, runs=runs))
    assert table.cells(of.arms[1], of) == {
        "arm": "sven",
        "test loss": "0.2000",
        "test accuracy": "0.8000",
        "difference (95 %)": "−41 % [−47, −35]",
        "p (Holm)": "0.016",
        "equal steps": "helps",
        "equal time": "no evidence",
        "CPU": "1.5×",
        "memory": "1.25×",
    }


def test_row_of_an_arm_that_never_finished() -> None:
    of = study(arm("wild", runs=[run(None), run(None)]))
    row = table.cells(of.arms[1], of)
    assert (row["test loss"], row["CPU"], row["equal steps"]) == ("unfinished", "–", "")


def full() -> Study:
    names = ["sven", "adabelief", "nm-gradient-flow", "efficienttrain"]
    arms = [arm(name, HELPS, HURTS, runs=[run(0.2)]) for name in names]
    return study(
        *arms,
        arm("A/A", UNCLEAR, runs=[run(0.3)]),
        left_out={"sdae": "needs val_batch"},
        warnings=["The load of the machine changed."],
    )


@pytest.mark.parametrize("width", [100, 80, 60, 40])
def test_table_fits_the_terminal(width: int) -> None:
    lines = shown(full(), width).splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "helps" in text
    assert "needs val_batch" in text
    assert "The load of the machine" in text


def test_narrow_tables_leave_out_costs_first() -> None:
    wide, narrow, narrowest = (shown(full(), width) for width in (100, 80, 60))
    assert "memory" in wide
    assert "CPU" in wide
    assert "accuracy" in wide
    assert "memory" not in "".join(narrow.splitlines()[:2])
    assert "Left out at this width: memory (see --json, or a wider terminal)." in narrow
    assert "Left out" not in wide
    assert "(Holm)" in narrow
    assert "hurts" in narrow
    assert "(Holm)" not in "".join(narrowest.splitlines()[:2])
    assert "−41 % [−47, −35]" in narrowest
    assert all(len(line.split("  ")) > 1 for line in wide.splitlines()[:3])


def test_one_line_for_each_arm_baseline_first_control_last() -> None:
    lines = shown(full()).splitlines()
    assert [line.split()[0] for line in lines[2:8]] == [
        "baseline", "sven", "adabelief", "nm-gradient-flow", "efficienttrain", "A/A"
    ]  # fmt: skip


def test_table_reads_without_colour_and_in_ascii() -> None:
    coloured = shown(full(), force_terminal=True, color_system="standard")
    assert "\x1b[32m" in coloured
    assert "\x1b[2m" in coloured
    plain = shown(full())
    assert "\x1b" not in plain
    assert "helps" in plain
    assert "hurts" in plain

    class Ascii(io.StringIO):
        encoding = "ascii"

    file = Ascii()
    Console(file=file, width=100).print(table.render(full()))
    assert "-41 % [-47, -35]" in file.getvalue()
    file.getvalue().encode("ascii")


def test_names_are_not_taken_for_markup() -> None:
    assert "[bold]x[/bold]" in shown(study(arm("[bold]x[/bold]", HELPS), left_out={"[red]y": "[/]"}))


def test_flags_methods_that_did_nothing_below_the_table() -> None:
    text = " ".join(shown(study(arm("noop", HELPS, did_nothing=True))).split())
    assert "- noop did nothing: every loss and every score equal" in text


def test_table_of_an_empty_study() -> None:
    assert shown(Study("r", "r", [], "loss", METRICS, [])).strip() == ""
    assert "baseline" in shown(study())


def test_columns_are_dropped_in_this_order() -> None:
    found = table.all_cells(full())
    all_headings = list(found[0])
    order, before = [], all_headings
    for width in range(200, 0, -1):
        headings, _ = table._fitting(found, width)
        order += [h for h in before if h not in headings]
        before = headings
    assert order == ["memory", "CPU", "test accuracy", "p (Holm)", "equal time"]
    assert before == ["arm", "test loss", "difference (95 %)", "equal steps"]

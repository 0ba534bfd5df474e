"""The report: what it says, that it is one safe file, and that its curves are drawn in a real browser."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from steep.evidence.report import axes, curves, figures, pictures, rows, wording
from steep.evidence.report import page as report
from steep.evidence.report.exports import csv as csv_of
from steep.evidence.report.exports import markdown
from steep.evidence.report.reproduce import command
from steep.evidence.report.sentences import headline, sentences, statement
from steep.evidence.report.table import cells
from steep.evidence.statistics import paired
from steep.evidence.study import ArmResult, Comparison, RunRecord, Study

NASTY = "</script><script>document.title='hacked'</script><img src=x onerror=alert(1)>\"'{{7*7}}"
METRICS = {"loss": False, "accuracy": True}


# A synthetic study --------------------------------------------------------------------------------------------------


def record(
    name: str, seed: int, level: float = 1.0, speed: float = 1.0, diverged: bool = False, **changes: Any
) -> RunRecord:
    """A run whose loss falls to about `level` / 10; the seed's split is the same for every arm."""
    split = np.random.default_rng(seed).normal(0, 0.2)
    own = np.random.default_rng([seed, *name.encode()]).normal(0, 0.03)
    final = 0.1 * level * math.exp(split + own)
    curve = [
        {"step": 20 * i, "examples": 640 * i, "seconds": 0.1 * i * speed * (1 + 0.01 * seed), "cpu_seconds": 0.1 * i}
        | {"loss": final + math.exp(-i / 3), "accuracy": 1 - final}
        for i in range(1, 26)
    ]
    costs: dict[str, Any] = {"seconds": curve[-1]["seconds"], "cpu_seconds": 2.5, "steps": 500, "examples": 16000}
    fields: dict[str, Any] = {
        "methods": [] if name in ("baseline", "A/A") else [(name, {"lr": 0.01, "rank": 8})],
        "split_seed": seed,
        "curve": [] if diverged else curve,
        "val": {} if diverged else {"loss": curve[-1]["loss"], "accuracy": 1 - final},
        "test": {} if diverged else {"loss": final, "accuracy": 1 - final},
        "versions": {"torch": "2.13"},
        "hardware": {"cores": 2, "gpu": None},
        "peak_memory": 80_000_000,
    }
    outcome = "diverged" if diverged else "finished"
    message = "the loss is not finite at step 3" if diverged else ""
    return RunRecord(
        f"{name}-{seed}", name, "confirm", lr_scale=1.0, seed=seed, budget={"steps": 500}, outcome=outcome,
        message=message, **({} if diverged else costs), **(fields | changes),
    )  # fmt: skip


def compared(runs: Sequence[RunRecord], baseline: Sequence[RunRecord]) -> dict[str, Comparison]:
    return {
        score: paired.compare(
            [r.test.get(score) for r in runs],
            [r.test.get(score) for r in baseline],
            score=score,
            higher_is_better=higher,
            relative=score == "loss",
        )
        for score, higher in METRICS.items()
    }


def make_study(methods: dict[str, dict[str, Any]], seeds: int = 8, **changes: Any) -> Study:
    """Methods are given as what `record` takes beside name and seed; "diverges" lists seeds that diverge."""
    base = [record("baseline", s) for s in range(seeds)]
    arms = [ArmResult("baseline", runs=base, hyper={"lr_scale": 1.0}, trials=base[:2], time_to_target=[2.0] * seeds)]
    for name, given in [*methods.items(), ("A/A", {})]:
        options = dict(given)
        lost, noop = options.pop("diverges", ()), options.pop("did_nothing", False)
        runs = [record(name, s, diverged=s in lost, **options) for s in range(seeds)]
        scores = compared(runs, base)
        arms.append(
            ArmResult(
                name,
                summary=f"What {name} changes.",
                paper="https://arxiv.org/abs/2010.07468",
                hyper={"lr": 0.01, "rank": 8},
                trials=[replace(runs[0], methods=[(name, {"lr": 0.5, "rank": 2})]), runs[-1]] if name != "A/A" else [],
                runs=runs,
                equal_time=[record(name, s, **{**options, "speed": 0.9}) for s in range(seeds)],
                scores=scores,
                scores_at_equal_time={} if name == "A/A" else scores,
                time_to_target=[1.0 + 0.1 * s if s % 2 else None for s in range(seeds)],
                did_nothing=noop,
            )
        )
    fields: dict[str, Any] = {"command": "steep compare digits --methods sven", "target_loss": 0.101} | changes
    source = fields.pop("source", "digits")
    return Study("digits", source, arms, "loss", METRICS, list(range(seeds)), **fields)


def draw(folder: Path, size: tuple[int, int] = (60, 40)) -> Path:
    """A PNG of noise."""
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "drawn.png")
    return folder / "drawn.png"


def with_pictures(study: Study, name: str) -> Study:
    arms = [replace(a, runs=[replace(r, picture=name) if r.test else r for r in a.runs]) for a in study.arms]
    return replace(study, arms=arms, target_picture=name)


@pytest.fixture(scope="module")
def usual() -> Study:
    """One method that helps, one that hurts and diverges at times, one without effect, one that did nothing."""
    methods: dict[str, dict[str, Any]] = {
        "sven": {"level": 0.6, "speed": 2.0},
        "wild": {"level": 2.0, "diverges": (1, 4)},
        "same": {},
    }
    return make_study(
        {**methods, "noop": {"did_nothing": True}},
        left_out={"sdae": "it needs val_batch"},
        warnings=["The load changed."],
    )


@pytest.fixture(scope="module")
def page(usual: Study, tmp_path_factory: pytest.TempPathFactory) -> str:
    return report.html(usual, tmp_path_factory.mktemp("store"))


def text_of(page: str) -> str:
    """What a reader sees: no styles, scripts or tags, single spaces."""
    bare = re.sub(r"<(style|script)\b.*?</\1>", " ", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", bare).replace("\u202f", " ").split())


# What it says -------------------------------------------------------------------------------------------------------


def test_page_opens_with_the_conclusion_in_words(usual: Study, page: str) -> None:
    text = text_of(page)
    assert "Of 4 methods, 1 helps, 1 hurts, 1 shows no evidence of a difference and 1 did nothing." in text
    for arm in rows.ranked(usual)[1:]:
        said = statement(arm, usual)
        assert said.finding in text.replace("&#39;", "'")
        assert said.support.lower() in text.lower()
    assert text.index("Of 4 methods") < text.index("How large is the difference?") < text.index("In numbers")


def test_page_says_first_what_won_and_what_each_method_came_to(usual: Study, page: str) -> None:
    text = text_of(page)
    c = usual.arms[1].scores["loss"]
    sure = f"(95 % interval {wording.interval(c, False)})"
    assert (
        f"Most helpful: sven , test loss {wording.worded(c, False)} {sure}, for 1× the CPU time, at equal steps;"
        in text
    )
    assert report._glance(usual) == [
        ("helps", [("sven", wording.compact(c, False).split(" [")[0])]),
        ("hurts", [("wild", wording.compact(usual.arms[2].scores["loss"], False).split(" [")[0])]),
        ("no evidence", [("same", wording.compact(usual.arms[3].scores["loss"], False).split(" [")[0])]),
        ("did nothing", [("noop", "")]),
    ]
    assert text.index("Most helpful: sven") < text.index("A/A control") < text.index("How large is the difference?")
    assert 'class="helps"><dt class="badge">helps' in page


def test_glance_says_where_equal_time_or_examples_differ(rich: Study) -> None:
    study = make_study({"sven": {"level": 0.6}})
    timed = {"loss": replace(study.arms[1].scores["loss"], verdict="hurts")}
    study = replace(study, arms=[study.arms[0], replace(study.arms[1], scores_at_equal_time=timed), study.arms[2]])
    assert report._glance(study)[0][1][0][1].endswith(" % (equal time: hurts)")
    assert report._glance(rich)[0][1][0][1].endswith(" % (equal examples: hurts)")


def test_a_control_that_is_not_null_raises_an_alarm(tmp_path: Path) -> None:
    study = make_study({"sven": {}})
    for verdict, alarmed in (("hurts", True), ("no evidence", False)):
        control = replace(study.arms[2], scores={"loss": replace(study.arms[2].scores["loss"], verdict=verdict)})
        page = report.html(replace(study, arms=[*study.arms[:2], control]), tmp_path)
        assert ('<div class="control alarm"><dt class="badge">A/A control' in page) is alarmed


def test_nothing_is_praised_where_nothing_helps() -> None:
    assert report._best(make_study({"same": {}})) is None
    assert report._best(make_study({"sven": {"level": 0.5}}, seeds=3)) is None


def test_each_row_has_its_command_and_what_it_gives(usual: Study, page: str) -> None:
    text = text_of(page)
    for arm in usual.arms:
        steps = command(arm.runs[0], "digits")
        scores = ", ".join(f"test {name} {wording.number(value)}" for name, value in arm.runs[0].test.items())
        assert f"{arm.name} {scores} {steps}" in text
        timed = (arm.equal_time or arm.runs)[0]
        scores = ", ".join(f"test {name} {wording.number(value)}" for name, value in timed.test.items())
        assert not arm.equal_time or f" equal time, {scores} {command(timed, 'digits')}" in text


def test_recipe_made_in_memory_is_said_to_have_no_command(tmp_path: Path) -> None:
    study = make_study({"sven": {}}, source="", command="")
    text = text_of(report.html(study, tmp_path))
    assert "The recipe was made in memory" in text
    assert "digits (made in memory)" in text
    assert "steep fit digits" not in text + markdown(study) + csv_of(study)


def test_page_shows_every_row_of_the_table(usual: Study, page: str) -> None:
    text = text_of(page)
    for arm in usual.arms:
        assert " ".join(filter(None, cells(arm, usual).values())) in text


def test_page_shows_controls_warnings_left_out_costs_tuning_and_command(page: str) -> None:
    text = text_of(page)
    for words in (
        "A/A (the baseline against itself)",
        "noop did nothing",
        "wild : 2 of 8 confirmation runs did not finish",
        "The load changed.",
        "sdae it needs val_batch",
        "steep compare digits --methods sven",
        "ms per step",
        "lr=0.01, rank=8",
        "diverged: the loss is not finite at step 3",
        "16 000",
        "torch 2.13",
        "cores 2",
        "4 of 8",  # of sven's seeds reached the target
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([], "No method was compared"),
        (["helps"], "m0 helps"),
        (["hurts", "hurts"], "Both methods hurt"),
        (["hurts"] * 3, "All 3 methods hurt"),
        (["helps", "helps", "no evidence"], "Of 3 methods, 2 help and 1 shows no evidence of a difference"),
        (["too few seeds"], "m0 has too few seeds for a verdict"),
    ],
)
def test_headline_counts_verdicts(verdicts: list[str], expected: str) -> None:
    scored = compared([record("x", 0)], [record("baseline", 0)])["loss"]
    arms = [ArmResult(f"m{i}", scores={"loss": replace(scored, verdict=v)}) for i, v in enumerate(verdicts)]
    assert headline(Study("r", "r", [ArmResult("baseline"), *arms], "loss", METRICS, [0])) == expected


def test_a_reference_that_nobody_asked_for_is_not_counted() -> None:
    helps = replace(compared([record("x", 0)], [record("baseline", 0)])["loss"], verdict="helps")
    arms = [ArmResult(name, scores={"loss": helps}) for name in ("sven", "adamw")]
    study = Study("r", "r", [ArmResult("baseline"), *arms], "loss", METRICS, [0])
    assert headline(study) == "Both methods help"
    assert headline(replace(study, reference="adamw")) == "sven helps"


def test_what_was_tried_once_is_not_called_tuned(usual: Study, tmp_path: Path) -> None:
    assert "tuned with the same number of trials" in text_of(report.html(usual, tmp_path))
    once = replace(usual, arms=[replace(arm, trials=arm.trials[:1]) for arm in usual.arms])
    text = text_of(report.html(once, tmp_path))
    assert "with its published settings and the baseline with yours, without tuning" in text
    assert "tuned with" not in text
    assert "tuned baseline" not in text


def test_chosen_trial_is_marked(page: str) -> None:
    chosen = re.findall(r'<tr class="best">(.*?)</tr>', page, flags=re.S)
    assert len(chosen) == 5  # every arm but the control has one
    assert all("lr=0.01, rank=8" in row or "lr × 1" in row for row in chosen)
    assert not any("rank=2" in row for row in chosen)


def test_chosen_trial_of_joined_methods_is_found() -> None:
    methods = [("a", {"lr": 0.1, "k": 3}), ("b", {"lr": 0.2})]
    run = record("a+b", 0, methods=methods)
    study = make_study({"a+b": {}}, seeds=1)
    arm = replace(study.arms[1], hyper={"a.lr": 0.1, "b.lr": 0.2}, trials=[record("a+b", 1), run])
    found = figures.tuning(replace(study, arms=[study.arms[0], arm]))["rows"][1]
    assert [chosen for _, _, chosen in found["runs"]] == [False, True]


# One safe file ------------------------------------------------------------------------------------------------------


def test_names_and_texts_are_escaped(tmp_path: Path) -> None:
    study = make_study({NASTY: {"diverges": (0,)}}, seeds=6, left_out={NASTY: NASTY}, warnings=[NASTY], command=NASTY)
    arms = [replace(a, summary=NASTY, paper="javascript:alert(1)", hyper={NASTY: NASTY}) for a in study.arms]
    study = replace(study, recipe=NASTY, source=NASTY, arms=arms)
    page = report.html(study, tmp_path)
    assert "<img" not in page
    assert "javascript:alert" not in page
    assert "hacked'</script>" not in page
    assert "{{7*7}}" in text_of(page)
    assert page.count("</script>") == 3  # data, Plotly, our own
    names = [arm["name"] for arm in curves_in(page)["arms"]]
    assert names == ["baseline", NASTY, "A/A"]


def test_page_needs_no_network(page: str) -> None:
    bare = page.replace(report._compressed_plotly(), "")
    links = re.findall(r'<a href="([^"]*)"', bare)
    inside = {link for link in links if link.startswith("#")}
    assert inside
    assert all(f'id="{link[1:]}"' in bare for link in inside)
    assert set(links) - inside == {"https://arxiv.org/abs/2010.07468"}
    without_links = re.sub(r"<a [^>]*>", "", bare)
    assert not re.search(r"https?:|//cdn|@import|<link rel=.stylesheet", without_links)
    assert all(source.startswith("data:") for source in re.findall(r'\bsrc="([^"]*)', without_links))


def test_page_of_ten_methods_with_pictures_is_small(tmp_path: Path) -> None:
    y, x = np.mgrid[0:300, 0:400]
    waves = np.stack([np.sin(x * f / 9) * np.cos(y * f / 7) for f in (1, 2, 3)], -1) * 90 + 128
    grain = np.random.default_rng(0).normal(0, 6, waves.shape)  # such as a photograph has
    Image.fromarray((waves + grain).clip(0, 255).astype(np.uint8)).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > 200_000
    study = with_pictures(make_study({f"method-{i}": {"level": 1 + i / 9} for i in range(10)}), "large.png")
    assert len(report.html(study, tmp_path).encode()) <= 3_000_000


def test_plotly_survives_compression() -> None:
    script = gzip.decompress(base64.b64decode(report._compressed_plotly())).decode()
    assert "Plotly" in script
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", report._compressed_plotly())


# Pictures -----------------------------------------------------------------------------------------------------------


def embedded(page: str) -> Iterable[bytes]:
    return (base64.b64decode(data) for data in re.findall(r'src="data:image/\w+;base64,([^"]+)"', page))


def test_small_pictures_are_embedded_byte_for_byte(usual: Study, tmp_path: Path) -> None:
    path = draw(tmp_path)
    page = report.html(with_pictures(usual, path.name), tmp_path)
    assert list(embedded(page)) == [path.read_bytes()] * 7  # target, baseline, four methods, control
    assert "For every arm, the seed with the median test loss" in text_of(page)


def test_large_pictures_are_made_smaller(tmp_path: Path) -> None:
    draw(tmp_path, (900, 300))
    uri = pictures.picture(tmp_path, "drawn.png")
    assert uri is not None
    assert uri.startswith("data:image/webp;base64,")
    small = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert small.size == (pictures.PIXELS, pictures.PIXELS // 3)


def test_each_picture_comes_from_the_seed_with_the_median_loss(tmp_path: Path) -> None:
    study = with_pictures(make_study({"sven": {}}, seeds=7), draw(tmp_path).name)
    for arm, run, _ in pictures.pictures(study, tmp_path):
        assert run.test["loss"] == np.median([r.test["loss"] for r in arm.runs])


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_missing_or_damaged_pictures_are_said_to_be_missing(
    content: bytes | None, usual: Study, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "gone.png").write_bytes(content)
    page = report.html(with_pictures(usual, "gone.png"), tmp_path)
    assert text_of(page).count("picture missing") == 6


def test_pictures_outside_the_store_are_not_read(tmp_path: Path) -> None:
    draw(tmp_path)
    (tmp_path / "store").mkdir()
    assert pictures.picture(tmp_path / "store", "../drawn.png") is None
    assert pictures.picture(tmp_path, "drawn.png") is not None


# What some studies have more of -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rich() -> Study:
    """A study with runs at equal examples, times to target judged as a family, preparation, and two analyses."""
    study = make_study({"sven": {"level": 0.6}, "same": {}})
    base, sven, same, control = study.arms
    faster = paired.compare([1.0] * 8, [2.0] * 8, score="seconds to target", higher_is_better=False, relative=False)
    examples = [record("sven", s, level=1.5) for s in range(8)]
    sven = replace(
        sven,
        runs=[replace(run, preparation_seconds=1.25) for run in sven.runs],
        equal_examples=[replace(run, role="equal-examples", key=f"{run.key}-e") for run in examples],
        scores_at_equal_examples=compared(examples, base.runs),
        to_target={"seconds": replace(faster, p_holm=0.123), "steps": replace(faster, p_holm=0.045, won=7)},
    )
    analyses = [{"pairs": 4, "made": True}, {"pairs": 8, "made": True}, {"pairs": 16, "made": False}]
    return replace(study, arms=[base, sven, same, control], interim_analyses=analyses)


def test_equal_examples_are_shown_where_they_take_other_runs(rich: Study, usual: Study) -> None:
    assert [cells(arm, rich)["equal examples"] for arm in rich.arms] == ["", "hurts", "", ""]
    assert "equal examples" not in cells(usual.arms[1], usual)
    strips = {row["name"]: [strip["when"] for strip in row["strips"]] for row in figures.forest(rich)["rows"]}
    assert strips["sven"] == ["equal steps", "equal time", "equal examples"]
    assert strips["same"] == ["equal steps", "equal time"]
    own = [run.curve[-1]["loss"] for run in dict(rows.kinds(rich.arms[1]))["equal examples"]]
    assert series(rich, "sven", x="examples")["mid"][-1] == pytest.approx(np.median(own), rel=1e-4)


def test_times_to_target_judged_as_a_family_are_taken_as_they_are(rich: Study, usual: Study) -> None:
    rows = {row["name"]: row for row in figures.times_to_target(rich)["rows"]}
    assert (rows["sven"]["sooner"], rows["sven"]["fewer"]) == ("8 of 8 (p = 0.12)", "7 of 8 (p = 0.045)")
    assert rows["same"]["fewer"] == rows["baseline"]["sooner"] == ""
    assert figures.times_to_target(usual)["steps"] is False


def test_arms_that_stopped_early_are_timed_on_their_own_seeds() -> None:
    study = make_study({"sven": {}}, seeds=8)
    sven = replace(study.arms[1], time_to_target=[1.0, 1.5, None])
    rows = figures.times_to_target(replace(study, arms=[study.arms[0], sven]))["rows"]
    assert rows[1]["sooner"].startswith("2 of 3 ")


def test_page_shows_what_a_study_has_more_of(rich: Study, page: str, tmp_path: Path) -> None:
    text, lines = text_of(report.html(rich, tmp_path)), csv_of(rich)
    for words in (
        "in fewer steps",
        "Holm-corrected across methods",
        "Verdicts were read after 4 and 8 pairs of seeds, of 16 planned",
        "preparation",
        "1.25",
        "equal examples, test loss",
    ):
        assert words in text, words
    assert not any(words in text_of(page) for words in ("in fewer steps", "Verdicts were read after", "1.25"))
    assert lines.count(",equal-examples,") == 8


# Incomplete studies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "study",
    [
        Study("r", "r", [], "loss", METRICS, []),
        Study("r", "r", [ArmResult("baseline")], "loss", METRICS, [0]),
        make_study({}),
        make_study({"sven": {}}, seeds=1),
        make_study({"sven": {"diverges": range(8)}}),
        make_study({"sven": {"curve": []}}),
        make_study({"sven": {"peak_memory": None, "hardware": {}, "versions": {}}}, target_loss=None),
        replace(make_study({"sven": {"level": 0.9}}), primary="accuracy"),
        replace(make_study({"sven": {}}), metrics={"loss": False}),
    ],
    ids=["empty", "no runs", "no methods", "one seed", "diverged", "no curve", "unmeasured", "accuracy", "no metric"],
)
def test_incomplete_studies_have_a_report(study: Study, tmp_path: Path) -> None:
    path = report.write(study, tmp_path)
    page = path.read_text(encoding="utf-8")
    assert headline(study) in text_of(page)
    assert not re.search(r"\b(nan|None|Infinity|undefined%)\b", text_of(page))
    if study.arms and any(run.curve for run in study.arms[0].runs):
        assert curves_in(page)["arms"][0]["name"] == "baseline"


def test_one_seed_gives_numbers_without_a_verdict(tmp_path: Path) -> None:
    text = text_of(report.html(make_study({"sven": {"level": 0.5}}, seeds=1), tmp_path))
    assert "sven has too few seeds for a verdict" in text
    assert "Better in 1 of 1 seeds" in text
    assert (
        "1 fresh seed, with the same split, initialisation and data order as the baseline. Verdicts are about" in text
    )


def test_a_missing_control_is_reported(tmp_path: Path) -> None:
    study = make_study({"sven": {}})
    study = replace(study, arms=study.arms[:-1])
    assert "There is no A/A control in this study" in text_of(report.html(study, tmp_path))


# Axes and rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3e-4, 7e-4), (-97, 1234), (0.5, 0.51), (1e6, 3e6), (-2, -1)])
def test_nice_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = axes.nice(low, high)
    assert 2 <= len(ticks) <= 6
    assert low <= ticks[0]
    assert ticks[-1] <= high
    steps = np.diff(ticks)
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert np.allclose(steps, steps[0])
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-6


@pytest.mark.parametrize(("low", "high"), [(0.9, 1.1), (0.3, 4), (1e-9, 1e9), (2, 300)])
def test_logarithmic_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = axes.nice_log(low, high)
    assert 2 <= len(ticks) <= 7
    assert low <= ticks[0]
    assert ticks[-1] <= high


def test_axis_places_values_and_clips_those_beyond() -> None:
    axis = axes.Axis(1, 100, log=True)
    assert [axis.at(v) for v in (0.1, 1, 10, 100, 1000, math.inf)] == [0, 0, 50, 100, 100, 100]
    assert [axis.beyond(v) for v in (0.1, 1, 100, math.inf)] == [-1, 0, 0, 1]


def test_better_lies_left_for_losses_and_right_for_accuracies(usual: Study) -> None:
    def helped(study: Study) -> tuple[float, float]:
        drawn = figures.forest(study)
        row = next(row for row in drawn["rows"] if row["name"] == "sven")
        return row["strips"][0]["mid"], drawn["zero"]

    mid, zero = helped(usual)
    assert mid < zero
    mid, zero = helped(replace(usual, primary="accuracy"))
    assert mid > zero


def test_axis_holds_every_interval_that_is_not_cut_off() -> None:
    drawn = figures.forest(make_study({"m": {"level": 0.2}}))["axis"]
    assert drawn.low < math.log(0.2)
    assert 0 < drawn.high < 0.5
    rising = figures.forest(replace(make_study({"m": {"level": 8.0}}), primary="accuracy"))["axis"]
    assert rising.low < -0.5
    assert 0 < rising.high < 0.2


def test_forest_row_agrees_with_its_comparison(usual: Study) -> None:
    drawn = figures.forest(usual)
    c = usual.arms[1].scores["loss"]
    strip = next(row for row in drawn["rows"] if row["name"] == "sven")["strips"][0]
    axis = drawn["axis"]
    assert strip["ends"] == [axis.at(-c.high), axis.at(-c.low)]
    assert strip["mid"] == axis.at(-c.estimate)
    assert strip["ends"][0] < strip["mid"] < strip["ends"][1]
    assert len(strip["dots"]) == 8
    assert strip["verdict"] == "helps"
    assert strip["undetectable"] == [axis.at(-c.mde), axis.at(c.mde)]


def test_far_worse_arms_end_in_arrows_and_do_not_squeeze_the_others() -> None:
    arms = {f"m{i}": {"level": 1 + i / 50} for i in range(4)}
    drawn = figures.forest(make_study({**arms, "awful": {"level": 1e4}, "best": {"level": 0.5}}))
    strips = {row["name"]: row["strips"][0] for row in drawn["rows"]}
    assert strips["awful"]["beyond"] == [1, 1]
    assert strips["awful"]["mid"] is None
    assert strips["best"]["beyond"] == []
    assert strips["best"]["mid"] is not None
    assert drawn["axis"].high < math.log(100)


def test_forest_ticks_are_per_cent_or_factors() -> None:
    narrow = figures.forest(make_study({"m": {"level": 0.9}}))["axis"].ticks
    wide = figures.forest(make_study({"m": {"level": 0.01}}))["axis"].ticks
    assert all(label == "0 %" or re.fullmatch(r"[−+][\d.]+ %", label) for _, label in narrow)
    assert all(label == "1" or re.fullmatch(r"[×÷]\d+", label) for _, label in wide)


@pytest.mark.parametrize("level", [0.01, 0.3, 0.9, 0.999, 1.5, 2.4, 1e3])
def test_labels_of_the_forest_are_apart_and_keep_zero(level: float) -> None:
    axis = figures.forest(make_study({"m": {"level": level}}))["axis"]
    assert len(axis.ticks) >= 2
    assert axis.at(0) in [at for at, _ in axis.ticks]
    assert all(later - earlier >= 14 for (earlier, _), (later, _) in itertools.pairwise(axis.ticks))


def test_unreached_targets_count_as_longest() -> None:
    study = make_study({"sven": {}}, seeds=4)
    times: dict[str, list[float | None]] = {"baseline": [1.0, 2.0, 3.0, None], "sven": [0.5, None, None, None]}
    arms = [replace(arm, time_to_target=times.get(arm.name, [])) for arm in study.arms]
    base, sven = figures.times_to_target(replace(study, arms=arms))["rows"]
    assert (base["median"], base["reached"], base["sooner"]) == ("2 s", "3 of 4", "")
    assert (sven["median"], sven["reached"]) == ("not reached", "1 of 4")
    assert sven["sooner"].startswith("1 of 4 (p = ")
    assert len(sven["dots"]) == 1
    assert sven["mid"] is None


# Curves -------------------------------------------------------------------------------------------------------------


def curves_in(page: str) -> dict[str, Any]:
    """The data that the page's script draws."""
    found = re.search(r'<script type="application/json" id="curves">(.*?)</script>', page, flags=re.S)
    assert found is not None
    return json.loads(found.group(1), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def series(study: Study, name: str, y: str = "loss", x: str = "step") -> dict[str, list[float]]:
    return next(arm for arm in curves.curves(study)["arms"] if arm["name"] == name)["series"][y][x]


def test_curves_are_median_and_quartiles(usual: Study) -> None:
    losses = np.array([[entry["loss"] for entry in run.curve] for run in usual.arms[1].runs])
    drawn = series(usual, "sven")
    assert drawn["x"] == [20 * i for i in range(1, 26)]
    for key, q in (("low", 0.25), ("mid", 0.5), ("high", 0.75)):
        np.testing.assert_allclose(drawn[key], np.quantile(losses, q, axis=0), rtol=1e-4)


def test_diverged_runs_count_as_worst_in_curves(usual: Study) -> None:
    finished = [run for run in usual.arms[2].runs if run.curve]
    losses = np.array([[entry["loss"] for entry in run.curve] for run in finished] + [[1e9] * 25] * 2)
    np.testing.assert_allclose(series(usual, "wild")["mid"], np.quantile(losses, 0.5, axis=0), rtol=1e-4)
    mostly = make_study({"wild": {"diverges": range(5)}})
    assert series(mostly, "wild")["mid"] == []


def test_seconds_show_the_runs_at_equal_time(usual: Study) -> None:
    drawn = series(usual, "sven", x="seconds")
    assert len(drawn["x"]) == curves.POINTS
    assert drawn["x"][-1] == pytest.approx(
        np.median([r.curve[-1]["seconds"] for r in usual.arms[1].equal_time]), rel=1e-4
    )


def test_ratio_is_the_paired_comparison_with_the_baseline(usual: Study) -> None:
    drawn = series(usual, "sven", "ratio")
    pairs = zip(usual.arms[1].runs, usual.arms[0].runs, strict=True)
    logs = [math.log(a.curve[-1]["loss"] / b.curve[-1]["loss"]) for a, b in pairs]
    low, high = paired.interval(logs)
    assert drawn["mid"][-1] == pytest.approx(math.exp(np.mean(logs)), rel=1e-4)
    assert drawn["low"][-1] == pytest.approx(math.exp(low), rel=1e-4)
    assert drawn["high"][-1] == pytest.approx(math.exp(high), rel=1e-4)
    assert drawn["mid"][-1] < 0.7


def test_ratio_pairs_by_split_not_by_position(usual: Study) -> None:
    sven = usual.arms[1]
    shuffled = replace(usual, arms=[usual.arms[0], replace(sven, runs=sven.runs[::-1]), *usual.arms[2:]])
    assert series(shuffled, "sven", "ratio") == series(usual, "sven", "ratio")


def test_losses_below_zero_have_neither_ratio_nor_logarithm() -> None:
    study = make_study({"sven": {}})
    below = [{**entry, "loss": -entry["loss"]} for entry in study.arms[0].runs[0].curve]
    runs = [replace(study.arms[0].runs[0], curve=below), *study.arms[0].runs[1:]]
    drawn = curves.curves(replace(study, arms=[replace(study.arms[0], runs=runs), *study.arms[1:]]))
    assert drawn["log"] is False
    assert "ratio" not in drawn["y"]


def test_arms_differ_in_colour_or_dash() -> None:
    study = make_study({f"m{i}": {} for i in range(18)}, seeds=1)
    styles = curves.styles(study).values()
    assert len({(style["colour"], style["dash"]) for style in styles}) == 20
    assert sum(style["shown"] for style in styles) == 1 + curves.SHOWN


# Markdown and CSV ---------------------------------------------------------------------------------------------------


def test_all_three_files_are_written(usual: Study, tmp_path: Path) -> None:
    assert report.write(usual, tmp_path) == tmp_path / "report.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.csv", "report.html", "report.md"]


def test_markdown_has_sentences_table_and_settings(usual: Study) -> None:
    text = markdown(usual)
    assert text.startswith("# digits: Of 4 methods, 1 helps")
    for sentence in sentences(usual):
        assert f"- {sentence}" in text.replace("&lt;", "<")
    assert "| sven | lr=0.01, rank=8 |" in text
    assert "\n    steep compare digits --methods sven\n    steep fit digits --steps 500 --seed 0 --threads 1\n" in text
    assert "\n    steep fit digits --method sven --set lr=0.01 --set rank=8 --steps 500 --seed 0 --threads 1\n" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| ")}
    assert widths == {10, 3}


def test_markdown_escapes_names() -> None:
    text = markdown(make_study({"a|b<script>\nnext": {}}, seeds=1))
    assert "a\\|b&lt;script&gt; next" in text
    shown = [line for line in text.splitlines() if not line.startswith("    ")]  # what is indented is code
    assert "<script>" not in "\n".join(shown)


def test_csv_holds_every_run(usual: Study) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_of(usual))))
    assert len(rows) == sum(len(a.trials) + len(a.runs) + len(a.equal_time) for a in usual.arms)
    sven = next(row for row in rows if row["arm"] == "sven" and row["key"] == "sven-3")
    assert float(sven["test_loss"]) == usual.arms[1].runs[3].test["loss"]
    assert sven["methods"] == "sven(lr=0.01, rank=8)"
    assert sven["command"] == command(usual.arms[1].runs[3], "digits")
    lost = next(row for row in rows if row["outcome"] == "diverged")
    assert (lost["test_loss"], lost["message"]) == ("", "the loss is not finite at step 3")


# In a browser -------------------------------------------------------------------------------------------------------

QUIET = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
QUIET += ["disable-component-update", "disable-sync"]
DRAWN = """[...document.querySelectorAll("#plot .cartesianlayer path, #plot text")]
  .map((e) => [e.getAttribute("d") ?? e.textContent, e.style.stroke, e.style.strokeDasharray, e.style.fill]).join()"""
OUTSIDE = """[...document.querySelectorAll("body *")].filter((e) => {
    const box = e.getBoundingClientRect();
    const out = box.width && (box.right > innerWidth + 1 || box.left < -1);
    return out && !e.closest(".wide, #plot, #js-plotly-tester, input");
  }).map((e) => e.outerHTML.slice(0, 120))"""
CONTRAST = """(names) => names.map((name) => {
    const light = (colour) => {
      const probe = document.body.appendChild(document.createElement("i"));
      probe.style.color = `var(${colour})`;
      const [r, g, b] = getComputedStyle(probe).color.match(/[0-9.]+/g).map((v) => v / 255)
        .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
      probe.remove();
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const [a, b] = [light(name), light("--paper")];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  })"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: the page's script is not run")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium: the page's script is not run")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=[f"--{option}" for option in QUIET])
        yield chromium
        chromium.close()


class Tab:
    """The page in the browser, with what its console said and what it asked the network for."""

    def __init__(self, browser: Any, page: str, folder: Path, before: str = "", **context: Any):
        path = folder / "page.html"
        path.write_text(page, encoding="utf-8")
        self.said: list[str] = []
        self.page = browser.new_context(**context).new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog {dialog.message}"))
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        if before:
            self.page.add_init_script(before)
        self.page.goto(path.as_uri())
        if 'id="curves"' in page:
            self.page.wait_for_selector("html[data-charts]")

    def drawn(self) -> Any:
        return self.page.evaluate(DRAWN)

    def choose(self, name: str, value: str) -> None:
        self.page.locator(f'#view input[name="{name}"][value="{value}"]').dispatch_event("click")

    def outside(self) -> Any:
        """Elements that reach out of the window, and whether the page can be moved sideways."""
        return self.page.evaluate(OUTSIDE), self.page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three methods, one with a hostile name, with pictures."""
    folder = tmp_path_factory.mktemp("store")
    methods: dict[str, dict[str, Any]] = {"sven": {"level": 0.6}, NASTY: {"diverges": (2,)}, "ps-kd": {"level": 1.3}}
    study = make_study(methods, warnings=[NASTY], left_out={NASTY: NASTY}, command=NASTY, source=NASTY)
    return report.html(with_pictures(study, draw(folder).name), folder)


def test_browser_obeys_every_control(browser: Any, hostile: str, tmp_path: Path) -> None:
    tab = Tab(browser, hostile, tmp_path, viewport={"width": 1200, "height": 900})
    first = tab.drawn()
    assert first.count("rgb(0, 114, 178)") == 2  # the first method's line and band
    for name, value, back in (
        ("y", "accuracy", "loss"), ("y", "ratio", "loss"), ("x", "examples", "step"), ("x", "seconds", "step"),
        ("scale", "linear", "log"), ("bands", "hidden", "shown"), *(("arm", str(i), str(i)) for i in range(5)),
    ):  # fmt: skip
        tab.choose(name, value)
        assert tab.drawn() != first, f"{name}={value} changes nothing"
        tab.choose(name, back)
        assert tab.drawn() == first, f"{name}={back} does not bring it back"
    for button, arms, lines in (("none", 0, 0), ("all", 5, 5 + 5 + 1)):  # with their bands, and the target
        tab.page.get_by_role("button", name=button).click()
        assert tab.page.locator("#plot .scatterlayer path.js-line").count() == lines
        assert tab.page.locator("#view [name=arm]:checked").count() == arms
    tab.choose("y", "accuracy")
    assert tab.page.locator("#scales:disabled").count() == 1
    filtered = "getComputedStyle(document.querySelector('.error')).filter"
    assert tab.page.evaluate(filtered) == "none"
    tab.page.locator("#errors").check()
    assert tab.page.evaluate(filtered) == "brightness(4)"
    assert tab.page.title() == "digits: what helps?"  # NASTY did not run
    assert tab.page.locator("img:not([src^='data:'])").count() == 0
    assert tab.said == []
    assert [url for url in tab.requests if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_shows_the_page_on_a_phone(browser: Any, hostile: str, scheme: str, tmp_path: Path) -> None:
    tab = Tab(browser, hostile, tmp_path, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    tab.page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    assert tab.outside() == ([], 0)
    tab.page.set_viewport_size({"width": 320, "height": 600})
    assert tab.outside()[1] == 0
    assert min(tab.page.evaluate(CONTRAST, ["--ink", "--muted", "--helps", "--hurts", "--link"])) >= 4.5
    assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 24, 27)"
    )
    assert tab.said == []


def test_browser_prints_the_table_and_unfolds_the_rest(browser: Any, page: str, tmp_path: Path) -> None:
    tab = Tab(browser, page, tmp_path, color_scheme="dark")
    tab.page.emulate_media(media="print")
    folds = tab.page.locator("details")
    assert folds.count() > 2
    tab.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.page.locator("details:not([open])").count() == tab.page.locator("details.screen").count() > 0
    assert all(row.is_visible() for row in tab.page.locator("#numbers tbody tr").all())
    for words in (
        "It must show no difference",
        "it needs val_batch",
        "lr=0.01, rank=8",
        "steep fit digits --method sven",
    ):
        assert tab.page.get_by_text(words).first.is_visible(), words
    for hidden in ("nav", "details.screen", "#view button", "#bands"):
        assert not tab.page.locator(hidden).first.is_visible(), hidden
    assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    tab.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.page.locator("details[open]").count() == 0
    assert tab.page.pdf(format="A4").startswith(b"%PDF")
    assert tab.said == []


def test_browser_runs_no_script_but_the_pages_own(browser: Any, page: str, tmp_path: Path) -> None:
    injected = "<script>document.title = 'hacked'</script><img src=x onerror=\"document.title = 'hacked'\"></main>"
    tab = Tab(browser, page.replace("</main>", injected), tmp_path)
    assert tab.page.get_attribute("html", "data-charts") == "ready"
    assert tab.page.title() == "digits: what helps?"
    assert sum("Content Security Policy" in words for words in tab.said) >= 2


def test_browser_without_decompression_says_so(browser: Any, page: str, tmp_path: Path) -> None:
    tab = Tab(browser, page, tmp_path, before="delete globalThis.DecompressionStream")
    assert tab.page.get_attribute("html", "data-charts") == "failed"
    assert tab.page.get_by_text("The curves could not be drawn").is_visible()


def test_browser_shows_studies_without_curves(browser: Any, tmp_path: Path) -> None:
    study = make_study({"sven": {"curve": []}}, target_loss=None)
    study = replace(study, arms=[replace(a, runs=[replace(r, curve=[]) for r in a.runs]) for a in study.arms])
    tab = Tab(browser, report.html(study, tmp_path), tmp_path)
    assert tab.page.locator("#numbers").is_visible()
    assert tab.page.locator("#learning").count() == 0
    assert tab.said == []

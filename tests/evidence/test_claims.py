"""Claims: what they may say, how the lab keeps what has finished, and every claim of the repository as a smoke run."""

import json
from pathlib import Path

import pytest

import steep
from steep.evidence.claims import Claim, Lab, Pairs, Quantity, columns, cpu_seconds, errors, ledger, scores
from steep.evidence.study import ArmResult, RunRecord, Study
from steep.method import PACKAGES

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "claims").glob("[!_]*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_claim_runs_at_its_smallest(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = sorted((ROOT / "ledger").iterdir())
    claim, _ = ledger._load(path)
    try:
        found = ledger.smoke(claim)
    except FileNotFoundError as absent:
        if "STEEP_DATA" not in str(absent):  # what a task's loader says of real data that are not there
            raise
        pytest.skip(str(absent))
    assert set(found) == {q.name for q in claim.quantities if claim.experiment}
    assert all(len(pairs.cases) >= 1 for pairs in found.values())
    assert sorted((ROOT / "ledger").iterdir()) == before


def test_every_method_has_a_claim_of_its_name():
    package = Path(steep.__file__).parent
    own = {c.id for c in steep.methods().values() if Path(ledger._file(c.make)).is_relative_to(package)}
    assert own == {path.stem.replace("_", "-") for path in FILES}
    assert PACKAGES


def test_claim_files_are_short():
    assert all(len(path.read_text().splitlines()) <= 130 for path in FILES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"better": "larger"}, "better='larger' must be one of"),
        ({"scale": "percent"}, "scale='percent' must be one of"),
        ({"size": 0.9}, "size=0.9 must be at least 1.0, which is no gain"),
        ({"size": -0.2, "scale": "difference", "null": -0.1}, "size=-0.2 must be at least -0.1"),
    ],
)
def test_quantities_that_say_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Quantity("loss", **{"better": "lower", **changes})


def claim(experiment, **changes):
    fields = dict.fromkeys(("statement", "source", "paper_scale", "our_scale"), "")
    return Claim(id="sven", quantities=(Quantity("loss", better="lower"),), experiment=experiment, **fields, **changes)


def test_claims_need_quantities_and_an_experiment_or_a_reason():
    with pytest.raises(ValueError, match="needs an experiment, or the reason"):
        claim(None)
    with pytest.raises(ValueError, match="needs an experiment, or the reason"):
        claim(lambda lab: {}, reason="too large")
    with pytest.raises(ValueError, match="at least one quantity"):
        Claim("sven", "", "", "", "", (), None, reason="too large")
    assert claim(None, reason="needs ImageNet").measure(Lab(Path("unused"))) == {}


def test_pairs_must_be_pairs():
    with pytest.raises(ValueError, match="got 1, 2 and 1"):
        Pairs([1.0], [1.0, 2.0], [0])
    with pytest.raises(ValueError, match="at least one, got 0, 0 and 0"):
        Pairs([], [], [])


def test_an_experiment_must_measure_just_what_is_claimed():
    one = Pairs([1.0], [2.0], [0])
    with pytest.raises(ValueError, match=r"measured \['los'\], not \['loss'\]"):
        claim(lambda lab: {"los": one}).measure(Lab(Path("unused")))
    assert claim(lambda lab: {"loss": one}).measure(Lab(Path("unused"))) == {"loss": one}


def test_finished_cases_are_kept_and_not_measured_again(tmp_path):
    seen = []

    def measure(case):
        seen.append(case)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return {"a": case / 2, "b": None}

    with pytest.raises(KeyboardInterrupt):
        Lab(tmp_path, code="1").each(range(4), measure)
    rows = Lab(tmp_path, code="1").each(range(4), measure)
    assert seen == [0, 1, 2, 2, 3]
    assert rows == [{"a": case / 2, "b": None} for case in range(4)]
    assert rows == Lab(tmp_path, code="1").each(range(4), measure)
    assert len(seen) == 5
    assert not list(tmp_path.rglob("*.part"))


def test_kept_cases_are_known_by_code_name_and_size(tmp_path):
    for lab, name in ((Lab(tmp_path, code="1"), "x"), (Lab(tmp_path, code="2"), "x"), (Lab(tmp_path, code="1"), "y")):
        lab.each([0], lambda case: {"a": 1.0}, name)
    Lab(tmp_path, code="1", smoke=True).each([0], lambda case: {"a": 1.0}, "x")
    files = list((tmp_path / "cases").iterdir())
    assert len(files) == 4
    assert json.loads(files[0].read_text())["values"] == {"a": 1.0}


def test_a_smoke_run_takes_one_case_and_two_steps(tmp_path):
    lab = Lab(tmp_path, smoke=True)
    rows = lab.each(range(9), lambda case: {"a": float(case), "b": 1.0})
    assert columns(rows, range(9), "a", "b") == Pairs([0.0], [1.0], [0])
    recipe = steep.task("digits")
    assert lab.shorter(recipe).budget == steep.Budget(steps=2)
    assert Lab(tmp_path).shorter(recipe) is recipe


def run(loss, accuracy, seconds):
    fields = {"key": "", "arm": "", "role": "confirm", "methods": (), "lr_scale": 1.0, "seed": 0, "split_seed": 0}
    scored = {} if loss is None else {"loss": loss, "accuracy": accuracy}
    outcome = "finished" if scored else "diverged"
    return RunRecord(**fields, budget={}, outcome=outcome, test=scored, cpu_seconds=seconds)


@pytest.fixture
def study():
    arms = [
        ArmResult("baseline", runs=[run(1.0, 0.5, 2.0), run(2.0, 1.0, 2.0)]),
        ArmResult("rival", runs=[run(4.0, 0.5, 1.0), run(5.0, 0.5, 1.0)]),
        ArmResult(
            "x", runs=[run(0.5, 0.75, 3.0), run(None, None, 0.0)], equal_time=[run(0.7, 0.5, 2.0), run(0.8, 0.5, 2.0)]
        ),
    ]
    return Study("r", "r", arms, "loss", {"loss": False, "accuracy": True}, [3, 4])


def test_values_of_a_comparison_are_paired_by_seed(study):
    assert scores(study, "x") == Pairs([0.5, None], [1.0, 2.0], [3, 4])
    assert scores(study, "x", "accuracy", against="rival") == Pairs([0.75, None], [0.5, 0.5], [3, 4])
    assert scores(study, "x", at_equal_time=True) == Pairs([0.7, 0.8], [1.0, 2.0], [3, 4])
    assert scores(study, "rival", at_equal_time=True) == Pairs([4.0, 5.0], [1.0, 2.0], [3, 4])
    assert cpu_seconds(study, "x") == Pairs([3.0, None], [2.0, 2.0], [3, 4])
    assert errors(study, "x", examples=10) == Pairs([0.3, None], [0.55, 0.05], [3, 4])
    with pytest.raises(steep.UnknownName, match="no arm 'rivall'; did you mean 'rival'"):
        scores(study, "rivall")

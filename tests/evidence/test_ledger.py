"""The ledger: what makes an entry stale, what is written, what is refused, and the command that fills it."""

import json
import math
import sys
from pathlib import Path

import pytest

import steep
from steep import cli
from steep.evidence.claims import Pairs, Quantity, ledger
from steep.evidence.claims.ledger import ClaimError, fingerprint, imported, load_claims, read, run, state, write

ROOT = Path(__file__).parents[2]
CLAIM = '''"""About Sven."""
from pathlib import Path

from steep.evidence.claims import Claim, Pairs, Quantity, columns


def measure(seed):
    """A log of what was measured."""
    with open(Path(__file__).with_suffix(".log"), "a") as log:
        log.write(f"{seed} ")
    return {"sven": 0.5, "sgd": 1.0}


def experiment(lab):
    return {"loss": columns(lab.each(range(6), measure), range(6), "sven", "sgd")}


claim = Claim(
    id="sven",
    statement="Better.",
    source="abstract",
    paper_scale="large",
    our_scale="small",
    quantities=(Quantity("loss", better="lower", size=1.5),),
    experiment=experiment,
)
'''


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "sven.py").write_text(CLAIM)
    return tmp_path / "claims"


def code(folder, old="", new=""):
    """Fingerprint of the claim with a text replaced; in a folder of its own, as the code of a path is cached."""
    assert old in CLAIM
    version = folder.parent / f"version{len(list(folder.parent.glob('version*')))}"
    version.mkdir()
    (version / "sven.py").write_text(CLAIM.replace(old, new) if old else CLAIM)
    return fingerprint(*load_claims(version)["sven"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("from pathlib", "# a comment\nfrom pathlib"),
        ('"""A log of what was measured."""', '"""Another docstring."""'),
        ('statement="Better."', 'statement="Much better."'),
        ('paper_scale="large"', 'paper_scale="ImageNet"'),
        ("return {", "\n    return {"),
    ],
)
def test_comments_docstrings_and_texts_do_not_make_an_entry_stale(folder, old, new):
    assert code(folder, old, new) == code(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [("0.5", "0.6"), ("size=1.5", "size=1.6"), ('better="lower"', 'better="higher"'), ("range(6)", "range(7)")],
)
def test_a_change_of_the_claim_makes_it_stale(folder, old, new):
    assert code(folder, old, new) != code(folder)


@pytest.mark.parametrize(
    ("changed", "stale"),
    [
        ("backward/sven.py", True),  # the method
        ("per_example/engine.py", True),  # what it imports
        ("fit.py", True),  # the kernel
        ("evidence/statistics/paired.py", True),  # the protocol
        ("evidence/claims/claim.py", True),
        ("optim/adabelief.py", False),  # another method
        ("cli/catalog.py", False),  # only shows
        ("evidence/report/page.py", False),
        ("tasks/digits.py", False),  # a task it does not name
    ],
)
def test_code_that_a_claim_depends_on_makes_it_stale(folder, monkeypatch, changed, stale):
    before, real = fingerprint(*load_claims(folder)["sven"]), ledger.code_of
    edited = Path(steep.__file__).parent / changed
    assert edited.exists()
    monkeypatch.setattr(ledger, "code_of", lambda path, *rest: "edited" if path == edited else real(path, *rest))
    assert (fingerprint(*load_claims(folder)["sven"]) != before) == stale


def test_what_a_claim_imports_by_a_package_or_beside_itself_belongs_to_it(tmp_path):
    (tmp_path / "_shared.py").write_text("RATE = 1\n")
    (tmp_path / "a.py").write_text("from _shared import RATE\nfrom steep.optim import AdaBelief, SGDP\n")
    root = Path(steep.__file__).parent
    found = imported([tmp_path / "a.py"])
    assert {tmp_path / "_shared.py", root / "optim/adabelief.py", root / "optim/adamp.py"} <= found
    assert root / "optim/diffgrad.py" not in found


def test_tasks_and_methods_that_a_claim_names_belong_to_it(folder, monkeypatch):
    named = "def experiment(lab):\n    names = ['digits', 'adabelief', 'function-1d']\n"
    (folder / "sven.py").write_text(CLAIM.replace("def experiment(lab):\n", named))
    claim, path = load_claims(folder)["sven"]
    seen, real = set(), ledger.code_of
    monkeypatch.setattr(ledger, "code_of", lambda path, *rest: seen.add(path.name) or real(path, *rest))
    fingerprint(claim, path)
    assert {"digits.py", "adabelief.py", "sven_regression.py", "_foreach.py", "sven.py"} <= seen
    assert "ps_kd.py" not in seen


def test_imports_are_followed_through_packages_functions_and_relative_names(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import json\ndef f():\n    from steep.tasks import digits\n")
    names = {p.relative_to(ROOT / "steep").as_posix() for p in imported([path]) if p != path}
    assert {"tasks/__init__.py", "tasks/digits.py", "tasks/_parts.py", "batches.py", "rounds/fedavg.py"} <= names
    assert "tasks/photo.py" not in names
    assert imported([tmp_path / "y.py"][:0]) == set()


def test_an_entry_survives_writing_and_is_judged_anew_when_read(folder, tmp_path):
    claim, path = load_claims(folder)["sven"]
    entry = run(claim, path, tmp_path / "store")
    write(entry, tmp_path / "ledger")
    again = read(tmp_path / "ledger", "sven")
    assert again.verdict == entry.verdict == "reproduced"
    assert again.quantities[0].pairs.method == [0.5] * 6
    assert again.quantities[0].gain == pytest.approx(2.0)
    file = tmp_path / "ledger" / "sven.json"
    written = json.loads(file.read_text())
    assert written["verdict"] == "reproduced"
    assert {"torch", "steep", "python"} <= set(written["versions"])
    assert written["claim"]["paper_scale"] == "large"
    assert written["date"].endswith("+00:00")
    written["verdict"] = written["quantities"][0]["verdict"] = "not reproduced"  # the values decide, not this
    file.write_text(json.dumps(written))
    assert read(tmp_path / "ledger", "sven").verdict == "reproduced"
    assert not list((tmp_path / "ledger").glob("*.part"))


def test_infinite_numbers_and_diverged_runs_are_valid_json(folder, tmp_path):
    claim, path = load_claims(folder)["sven"]
    entry = run(claim, path, tmp_path / "store")
    lost = ledger.judge(Quantity("loss", better="lower"), Pairs([1.0] * 6, [None] * 6, range(6)))
    write(ledger.Entry(**{**vars(entry), "quantities": [lost]}), tmp_path)
    assert "Infinity" not in (tmp_path / "sven.json").read_text()
    assert read(tmp_path, "sven").quantities[0].low == math.inf


def test_damaged_and_newer_entries_are_refused(tmp_path):
    assert read(tmp_path, "sven") is None
    (tmp_path / "sven.json").write_text('{"format": 1, "verd')
    with pytest.raises(ClaimError, match="is damaged .*delete it and run `steep claims sven`"):
        read(tmp_path, "sven")
    (tmp_path / "sven.json").write_text('{"format": 1}')
    with pytest.raises(ClaimError, match="is damaged"):
        read(tmp_path, "sven")
    (tmp_path / "sven.json").write_text('{"format": 99}')
    with pytest.raises(ClaimError, match="written by a newer steep"):
        read(tmp_path, "sven")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sven.py", "x = 1\n", "holds 0 claims"),
        ("sven.py", CLAIM + "import dataclasses\nother = dataclasses.replace(claim)\n", "holds 2 claims"),
        ("seven.py", CLAIM, "name the file sven.py"),
        ("svne.py", CLAIM.replace('id="sven"', 'id="svne"'), "unknown method 'svne'; did you mean 'sven'"),
        ("sven.py", "1 / 0\n", "division by zero"),
    ],
)
def test_files_that_hold_no_proper_claim_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, KeyError, ArithmeticError), match=message):
        load_claims(tmp_path)


def test_the_ledger_of_the_repository_says_what_its_values_say():
    claims = load_claims(ROOT / "claims")
    for path in sorted((ROOT / "ledger").glob("*.json")):
        written = json.loads(path.read_text())
        entry = read(ROOT / "ledger", path.stem)
        assert path.stem in claims
        assert entry.verdict == written["verdict"]
        assert [j.verdict for j in entry.quantities] == [q["verdict"] for q in written["quantities"]]
        claim = claims[path.stem][0]
        names = [q.name for q in claim.quantities if claim.experiment]
        if state(*claims[path.stem], entry) == "current":
            assert [j.quantity.name for j in entry.quantities] == names


def steep_claims(monkeypatch, *arguments):
    """Exit code of ``steep claims ARGUMENTS``."""
    monkeypatch.setattr(sys, "argv", ["steep", "claims", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def test_the_command_runs_what_is_new_or_changed_and_nothing_else(monkeypatch, capsys, folder, tmp_path):
    options = ("--claims", folder, "--out", tmp_path / "out")
    log, book = folder / "sven.log", tmp_path / "ledger"
    assert steep_claims(monkeypatch, *options, "--list") == 0
    assert "never run" in capsys.readouterr().out
    assert steep_claims(monkeypatch, *options, "--smoke") == 0
    assert "sven: loss" in capsys.readouterr().out
    assert log.read_text() == "0 "
    assert not book.exists()
    assert not (tmp_path / "out").exists()
    assert steep_claims(monkeypatch, "sven", *options) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "current" in shown
    assert "reproduced" in shown
    assert log.read_text() == "0 0 1 2 3 4 5 "
    assert (book / "sven.json").exists()
    assert steep_claims(monkeypatch, *options) == 0
    assert log.read_text() == "0 0 1 2 3 4 5 "
    (folder / "sven.py").write_text(CLAIM.replace("0.5", "0.9"))
    assert steep_claims(monkeypatch, *options, "--list") == 0
    assert "stale" in capsys.readouterr().out
    assert steep_claims(monkeypatch, *options, "--ledger", tmp_path / "other") == 0
    assert "same direction" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "other" / "sven.json").exists()


def test_the_command_says_where_claims_are_looked_for(monkeypatch, capsys, folder, tmp_path):
    monkeypatch.chdir(tmp_path / "claims")
    assert steep_claims(monkeypatch) == 2
    assert f"no folder of claims at {tmp_path}/claims/claims" in (error := capsys.readouterr().err)
    assert "give --claims DIR" in error
    assert steep_claims(monkeypatch, "svenn", "--claims", folder) == 2
    assert "no claim about 'svenn'; did you mean 'sven'" in capsys.readouterr().err

"""The command line as a newcomer meets it: right input, wrong input, exit codes."""

import csv
import html
import json
import shlex
import sys
from pathlib import Path

import pytest

import steep
from steep import cli
from steep.cli.training import with_settings
from steep.evidence.runs.store import Store


def run(monkeypatch, *arguments):
    """Exit code of ``steep ARGUMENTS``."""
    monkeypatch.setattr(sys, "argv", ["steep", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch, steep\n"
        "def data(g):\n"
        "    x = torch.randn(60, 3, generator=g)\n"
        "    return steep.split_loaders(x, x.sum(1), g, batch_size=8)\n"
        "recipe = steep.Recipe(data=data, model=lambda: torch.nn.Linear(3, 1),\n"
        "    loss=lambda o, t: (o.squeeze(-1) - t).square(),\n"
        "    optimizer=lambda p: torch.optim.SGD(p, lr=0.1), budget=steep.Budget(steps=8), name='mine')\n"
    )
    return f"{path}:recipe"


def test_list_names_every_method_and_task(monkeypatch, capsys):
    assert run(monkeypatch, "list") == 0
    shown = capsys.readouterr().out
    assert all(id in shown for id in steep.methods())
    assert run(monkeypatch, "list", "tasks") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("digits", "photo:NAME", "uci:NAME"))
    assert run(monkeypatch, "list", "nonsense") == 2


@pytest.mark.parametrize("id", ["adabelief", "sven", "ps-kd", "fedspeed", "efficienttrain", "nm-gradient-flow"])
def test_show_tells_formula_defaults_needs_and_paper(monkeypatch, capsys, id):
    assert run(monkeypatch, "show", id) == 0
    shown = capsys.readouterr().out
    method = steep.method(id)
    assert method.paper.arxiv in shown
    assert all(name in shown for name in method.hyper)
    assert all(steep.requires.REQUIREMENTS[requirement].what.split(" (")[0] in shown for requirement in method.requires)


def test_unknown_names_end_with_one_line_and_exit_code_2(monkeypatch, capsys):
    assert run(monkeypatch, "show", "svne") == 2
    assert "unknown method 'svne'; did you mean 'sven'" in capsys.readouterr().err
    assert run(monkeypatch, "fit", "digitz") == 2
    assert "did you mean 'digits'" in capsys.readouterr().err
    assert run(monkeypatch, "compare", "digits", "--methods", "adabelief", "svne", "--out", "unused") == 2
    assert "unknown method 'svne'" in capsys.readouterr().err


def test_fit_trains_with_and_without_methods(monkeypatch, capsys, recipe_file, tmp_path):
    assert run(monkeypatch, "fit", recipe_file) == 0
    plain = capsys.readouterr().out
    assert plain.startswith("mine: test loss")
    assert "(8 steps" in plain
    assert run(monkeypatch, "fit", recipe_file, "--method", "adabelief", "--set", "lr=0.05", "--steps", 5) == 0
    assert "(5 steps" in capsys.readouterr().out
    path = tmp_path / "run.pt"
    assert run(monkeypatch, "fit", recipe_file, "--checkpoint", path) == 0
    assert path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "adabelief", "--set", "lr"), "write name=value"),
        (("--set", "lr=1"), "write name=value"),
        (("--method", "adabelief", "--set", "lr=-1"), "lr=-1"),
        (("--method", "adabelief", "--set", "lr=high"), "lr='high' must be of type float"),
        (("--method", "adabelief", "--set", "lrr=1"), "no hyper-parameter 'lrr'; did you mean 'lr'"),
        (("--method", "adabelief", "--method", "diffgrad"), "both replace the recipe's optim"),
        (("--method", "ps-kd"), "needs class labels"),
        (("--steps", "0"), "steps=0 must be a whole number"),
        (("--precision", "fp8"), "precision='fp8'"),
        (("--seconds", "-1"), "seconds=-1.0 must lie"),
        (("--log", "tensorbord"), "log='tensorbord' is no tracker"),
    ],
)
def test_fit_with_wrong_input(monkeypatch, capsys, recipe_file, arguments, message):
    assert run(monkeypatch, "fit", recipe_file, *arguments) == 2
    assert message in capsys.readouterr().err


def test_compare_prints_table_verdicts_and_the_reports_path_and_report_prints_them_again(
    monkeypatch, capsys, recipe_file, tmp_path
):
    out = tmp_path / "out"
    options = ("--seeds", 2, "--trials", 1, "--workers", 1, "--out", out, "--log", "tensorboard")
    assert run(monkeypatch, "compare", recipe_file, "--methods", "adabelief", "sgdp", *options) == 0
    shown = capsys.readouterr()
    assert "2 seeds give numbers but no verdict" in shown.err
    assert "adabelief" in shown.out
    assert "report.html" in shown.out
    assert "--methods adabelief sgdp" in Store(out).study().command
    logged = {path.name.rpartition("-")[2] for path in (out / "log").iterdir()}
    assert logged == {record.key for record in Store(out).records()}
    (out / "report.md").unlink()
    (out / "report.csv").write_text("old")
    assert run(monkeypatch, "report", out) == 0
    assert "sgdp" in capsys.readouterr().out
    assert all("sgdp" in (out / f"report.{kind}").read_text() for kind in ("md", "csv", "html"))
    assert run(monkeypatch, "report", tmp_path / "absent") == 2
    assert "no store at" in capsys.readouterr().err


def test_every_line_of_the_report_repeats_its_run_bit_for_bit(monkeypatch, capsys, recipe_file, tmp_path):
    out = tmp_path / "out"
    options = ("--seeds", 2, "--trials", 2, "--workers", 1, "--out", out)
    assert run(monkeypatch, "compare", recipe_file, "--methods", "adabelief", "sven+sgdp", *options) == 0
    capsys.readouterr()
    rows = list(csv.DictReader((out / "report.csv").open()))
    assert len(rows) >= 2 * 4 + 2 * 5  # trials and confirmation runs of four arms, and the control's
    for row in rows:
        assert run(monkeypatch, *shlex.split(row["command"])[1:], "--json") == 0
        again = json.loads(capsys.readouterr().out)
        assert (again["test"]["loss"], again["val"]["loss"]) == (float(row["test_loss"]), float(row["val_loss"]))
        assert again["steps"] == int(row["steps"])
    lines = " ".join(row["command"] for row in rows)
    assert all(option in lines for option in ("--lr-scale", "--split-seed", "--method adabelief", "--set sgdp.lr="))
    page = html.unescape((out / "report.html").read_text())
    shown = [row["command"] for row in rows if row["role"] in ("confirm", "aa-control") and row["split_seed"] == "0"]
    assert len(shown) == 5
    assert all(f"<code>{line}</code>" in page for line in shown)


def test_hyper_parameters_of_several_methods_are_told_apart():
    found = dict(with_settings(["adabelief", "ps-kd"], ["adabelief.lr=0.1", "ps-kd.alpha_T=0.5"]))
    assert found == {"adabelief": {"lr": 0.1}, "ps-kd": {"alpha_T": 0.5}}
    assert with_settings(["x:a=1"], ["schedule=static", "n=2", "rate=None"]) == [
        ("x", {"a": 1, "schedule": "static", "n": 2, "rate": None})
    ]


def test_runs_lists_and_filters_and_resume_goes_on(monkeypatch, capsys, recipe_file, tmp_path):
    arguments = ["--methods", "sgdp", "--trials", 1, "--seeds", 2, "--workers", 1, "--out", tmp_path / "out"]
    assert run(monkeypatch, "compare", recipe_file, *arguments) == 0
    first = capsys.readouterr().out
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()}

    assert run(monkeypatch, "runs", tmp_path / "out", "--json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {r["source"] for r in found} == {recipe_file}
    (kept_text,) = (tmp_path / "out" / "sources").iterdir()
    assert {r["source_hash"] for r in found} == {kept_text.stem}
    assert kept_text.read_text() == Path(recipe_file.removesuffix(":recipe")).read_text()
    assert {r["key"] for r in found} == {path.stem for path in kept}
    assert run(monkeypatch, "runs", tmp_path / "out", "--json", "--arm", "sgdp", "--role", "confirm", "--seed", 1) == 0
    (only,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (only["arm"], only["role"], only["seed"]) == ("sgdp", "confirm", 1)
    assert run(monkeypatch, "runs", tmp_path / "out", "--outcome", "diverged") == 0
    assert "sgdp" not in capsys.readouterr().out
    assert run(monkeypatch, "runs", tmp_path / "out") == 0
    assert "sgdp" in capsys.readouterr().out

    (tmp_path / "out" / "study.json").unlink()  # as if it had been killed before the end
    assert run(monkeypatch, "compare", "--resume", tmp_path / "out") == 0
    assert capsys.readouterr().out == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()} == kept


def test_what_cannot_be_resumed_or_listed_is_told(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "compare") == 2
    assert "give a recipe and --methods, or --resume DIR" in capsys.readouterr().err
    assert run(monkeypatch, "compare", "--resume", tmp_path / "none") == 2
    assert "no store at" in capsys.readouterr().err
    Store(tmp_path / "empty")
    assert run(monkeypatch, "compare", "--resume", tmp_path / "empty") == 2
    assert "nothing to resume" in capsys.readouterr().err


def test_a_store_of_a_newer_version_is_refused_before_anything_is_written(monkeypatch, capsys, tmp_path):
    (tmp_path / "store.json").write_text('{"format": 99}')
    assert run(monkeypatch, "runs", tmp_path) == 2
    assert "written by a newer steep" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["store.json"]


def test_methods_are_found_by_words_component_purpose_and_requirement(monkeypatch, capsys):
    def found(*options):
        assert run(monkeypatch, "list", *options, "--json") == 0
        return {row["id"] for row in json.loads(capsys.readouterr().out)}

    everything = steep.methods().values()
    assert found() == {m.id for m in everything}
    assert found("--changes", "backward") == {m.id for m in everything if m.changes == "backward"}
    assert found("--for", "equations") == {m.id for m in everything if "equations" in m.good_for} != set()
    assert found("--requires", "clients") == {"fedavg", "fedspeed"}
    assert found("--search", "BELIEF adam") == {"adabelief"}
    assert run(monkeypatch, "list", "tasks", "--search", "handwritten") == 0
    shown = capsys.readouterr().out
    assert "digits" in shown
    assert "poisson" not in shown


def test_every_table_can_be_had_as_json(monkeypatch, capsys, recipe_file, tmp_path):
    assert run(monkeypatch, "show", "sven", "--json") == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert {row["hyper-parameter"] for row in shown["hyper"]} == set(steep.method("sven").hyper)
    options = ("--seeds", 1, "--trials", 1, "--workers", 1, "--out", tmp_path / "out", "--json")
    assert run(monkeypatch, "compare", recipe_file, "-m", "sgdp:lr=0.01", *options) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["arm"] for row in rows} == {"baseline", "adamw", "sgdp:lr=0.01", "A/A"}
    assert run(monkeypatch, "report", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out) == rows
    record = next(r for r in Store(tmp_path / "out").records() if r.arm == "sgdp:lr=0.01")
    assert dict(record.methods)["sgdp"]["lr"] == 0.01


def test_methods_in_a_users_file_are_arms_and_their_runs_are_repeated(monkeypatch, capsys, recipe_file, tmp_path):
    file = tmp_path / "ideas.py"
    file.write_text(
        "def scaled(recipe, factor=2.0):\n"
        "    'The loss, scaled.'\n"
        "    return recipe.replace(loss=lambda o, t: factor * recipe.loss(o, t))\n"
    )
    arms = (f"{file}:scaled", f"{file}:scaled:factor=0.5", f"sgdp+{file}:scaled")
    out = tmp_path / "out"
    options = ("--seeds", 2, "--trials", 1, "--workers", 1, "--out", out)
    assert run(monkeypatch, "compare", recipe_file, "--methods", *arms, *options) == 0
    capsys.readouterr()
    rows = [row for row in csv.DictReader((out / "report.csv").open()) if row["role"] == "confirm"]
    assert {row["arm"] for row in rows} == {"baseline", "adamw", *arms}
    losses = {row["arm"]: row["test_loss"] for row in rows if row["seed"] == "0"}
    assert len({losses[arm] for arm in ("baseline", *arms)}) == 4
    for row in rows[-3:]:
        assert run(monkeypatch, *shlex.split(row["command"])[1:], "--json") == 0
        assert json.loads(capsys.readouterr().out)["test"]["loss"] == float(row["test_loss"])
    file.write_text(file.read_text().replace("factor * ", "factor ** 2 * "))  # other code: nothing of the old is used
    assert run(monkeypatch, "compare", recipe_file, "--methods", *arms, *options) == 0
    again = {r.key for r in Store(out).records() if r.arm == arms[0] and r.role == "confirm"}
    assert len(again) == 4


def test_trained_weights_are_saved_with_ties(monkeypatch, capsys, tmp_path):
    (tmp_path / "tied.py").write_text(
        "import torch, steep\n"
        "class Tied(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)\n"
        "        self.b.weight = self.a.weight\n"
        "    def forward(self, x):\n"
        "        return self.b(self.a(x))\n"
        "x = torch.ones(8, 3)\n"
        "recipe = steep.Recipe(data=lambda g: steep.split_loaders(x, x, g, batch_size=2), model=Tied,\n"
        "    loss=lambda o, t: (o - t).square().mean(1), budget=steep.Budget(steps=3),\n"
        "    optimizer=lambda p: torch.optim.SGD(p, lr=0.1))\n"
    )
    path = tmp_path / "weights.safetensors"
    assert run(monkeypatch, "fit", f"{tmp_path}/tied.py:recipe", "--save", path) == 0
    import safetensors.torch

    from steep.evidence.runs.source import load_recipe

    result = steep.fit(load_recipe(f"{tmp_path}/tied.py:recipe"), progress=False)
    model = type(result.model)()
    safetensors.torch.load_model(model, path)
    assert all((p == q).all() for p, q in zip(model.parameters(), result.model.parameters(), strict=True))
    assert model.b.weight is model.a.weight
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".py" and p.name != "__pycache__"] == [path.name]


def test_version_traceback_and_completion(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == f"steep {steep.__version__}"
    for arguments in (("--traceback", "show", "svne"), ("show", "svne", "--traceback")):
        assert run(monkeypatch, *arguments) == 2
        shown = capsys.readouterr().err
        assert "Traceback (most recent call last)" in shown
        assert shown.strip().endswith("did you mean 'sven'?")
    monkeypatch.setenv("_STEEP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "steep show ada")
    monkeypatch.setenv("COMP_CWORD", "2")
    monkeypatch.setattr(sys, "argv", ["steep"])
    with pytest.raises(SystemExit):
        cli.app(prog_name="steep")
    assert set(capsys.readouterr().out.split()) == {"adabelief", "adadagrad", "adamp"}


def test_runs_fit_into_80_columns(monkeypatch, capsys, recipe_file, tmp_path):
    options = ("--seeds", 1, "--trials", 2, "--workers", 1, "--out", tmp_path / "out")
    assert run(monkeypatch, "compare", recipe_file, "-m", "adabelief", *options) == 0
    capsys.readouterr()
    assert run(monkeypatch, "runs", tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["arm", "role", "seed", "settings", "steps", "val", "loss", "test", "CPU", "s", "key"]
    rows = [line for line in lines[1:] if not line.startswith(" ")]
    assert sum(len(line.split()[-1]) == 6 for line in rows) == len(list(Store(tmp_path / "out").records()))

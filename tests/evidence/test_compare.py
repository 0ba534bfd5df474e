"""compare end to end on small recipes: planted effects found, controls null, nothing repeated, clear refusals."""

import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import psutil
import pytest
import torch

import steep
from steep.evidence import tuning
from steep.evidence.arms import make_arm, make_arms, own_method
from steep.evidence.budgets import at_equal_time
from steep.evidence.planning import (
    REPORT_SECONDS,
    RUN_SECONDS,
    announcement,
    choose,
    fixed_budget,
    plan_of,
    tuning_runs,
)
from steep.evidence.runs.dry_runs import DryRuns
from steep.evidence.runs.jobs import DryRun, Job, run_job
from steep.evidence.runs.source import RecipeError, code_version, describe, from_name, from_value, load_recipe
from steep.evidence.runs.store import Store, StoreError, open_store
from steep.evidence.runs.workers import Workers
from steep.evidence.statistics.power import minimum_detectable_effect
from steep.evidence.study import BASELINE, RunRecord
from steep.loop.training import RunError
from steep.method import Method, Paper

RECIPE = """
import torch
from torch import nn
import steep

def data(generator):
    x = torch.randn(120, 4, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + 0.3 * torch.randn(120, generator=generator)
    return steep.split_loaders(x, y, generator, batch_size=16)

recipe = steep.Recipe(
    data=data,
    model=lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
    loss=lambda output, target: (output.squeeze(-1) - target).square(),
    optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
    budget=steep.Budget(steps=30),
    name="planted",
)
number = 3
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "planted.py"
    path.write_text(RECIPE)
    return path


def quick(recipe, methods, out, **changes):
    return steep.compare(recipe, methods, out=out, **{"workers": 1, "trials": 1, "progress": False} | changes)


def doubled_rate(recipe):
    """A planted improvement: the recipe's learning rate is far too small."""
    return recipe.replace(optimizer=lambda p: torch.optim.SGD(p, lr=0.03))


def nothing(recipe):
    """A method that does nothing."""
    return recipe


def exploding(recipe):
    """A method that diverges."""
    return recipe.replace(optimizer=lambda p: torch.optim.SGD(p, lr=1e9))


def halved(recipe):
    """A planted harm: targets are scaled, but held-out data are scored by the recipe's own loss."""
    return recipe.replace(loss=lambda o, t: (o.squeeze(-1) - 0.2 * t).square())


class Average:
    """The mean of the weights so far, for evaluation alone."""

    def __init__(self, model):
        self.model, self.count = model, 0
        self.mean = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def step(self):
        self.count += 1
        for name, p in self.model.named_parameters():
            self.mean[name] += (p - self.mean[name]) / (self.count + 1)

    @contextlib.contextmanager
    def eval_weights(self):
        own = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self._put(self.mean)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights):
        for name, p in self.model.named_parameters():
            p.copy_(weights[name])

    def state_dict(self):
        return {"count": self.count, "mean": self.mean}

    def load_state_dict(self, state):
        self.count, self.mean = state["count"], state["mean"]


def averaged(recipe):
    """A planted harm that training does not show: averaged weights lag behind."""

    def build(run):
        model = recipe.build("model", run)
        run.attach(Average(model))
        return model

    return recipe.replace(model=steep.deferred(build))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """One study of planted effects, shared by the tests that read it."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.py").write_text(RECIPE)
    recipe = load_recipe(f"{folder / 'planted.py'}:recipe")
    methods = [doubled_rate, nothing, exploding, halved, averaged]
    return quick(recipe, methods, folder / "store", workers=2), folder / "store"


def arm(study, name):
    return next(a for a in study.arms if a.name == name)


@pytest.mark.xdist_group("planted")
def test_planted_effects_are_found_and_signed(planted):
    study, _ = planted
    assert arm(study, "doubled_rate").scores["loss"].verdict == "helps"
    assert arm(study, "halved").scores["loss"].verdict == "hurts"
    assert arm(study, "halved").scores["loss"].high < 0 < arm(study, "doubled_rate").scores["loss"].low
    assert arm(study, "nothing").scores["loss"].verdict == "no evidence"
    assert arm(study, "nothing").did_nothing
    assert not arm(study, "doubled_rate").did_nothing


@pytest.mark.xdist_group("planted")
def test_what_acts_at_evaluation_alone_has_not_done_nothing(planted):
    study, _ = planted
    mine, baseline = arm(study, "averaged"), study.arms[0]
    assert mine.trials[0].digest == baseline.trials[0].digest
    assert mine.scores["loss"].verdict == "hurts"
    assert not mine.did_nothing


@pytest.mark.xdist_group("planted")
def test_the_control_is_there_and_differs_from_the_baseline(planted):
    study, _ = planted
    control = study.arms[-1]
    assert control.name == "A/A"
    assert [r.split_seed for r in control.runs] == list(study.seeds)
    assert all(d != 0 for d in control.scores["loss"].differences)
    assert not set(study.seeds) & {r.seed for r in control.runs}


@pytest.mark.xdist_group("planted")
def test_a_diverging_method_is_censored_not_dropped(planted):
    study, _ = planted
    lost = arm(study, "exploding")
    assert {r.outcome for r in lost.runs} == {"diverged"}
    assert len(lost.scores["loss"].differences) == len(study.seeds)
    assert lost.scores["loss"].verdict == "hurts"
    assert any("exploding: 8 of 8 runs diverged" in w for w in study.warnings)


@pytest.mark.xdist_group("planted")
def test_pairs_share_split_initialisation_and_first_batch(planted):
    study, _ = planted
    a, b = study.arms[0].runs, arm(study, "halved").runs
    assert [r.seed for r in a] == [r.seed for r in b] == list(study.seeds)
    assert all(r.seed < tuning.FIRST_SEED for r in a)
    same = arm(study, "nothing").runs
    assert [r.digest for r in a] == [r.digest for r in same]


@pytest.mark.xdist_group("planted")
def test_the_study_on_disk_is_the_study(planted):
    study, out = planted
    again = Store(out).study()
    assert again.arms[1].scores.keys() == study.arms[1].scores.keys()
    assert again.arms[1].scores["loss"].p == study.arms[1].scores["loss"].p
    assert again.arms[1].runs[0].test == study.arms[1].runs[0].test
    assert (out / "report.html").exists()
    assert len(Store(out).records()) == len(list((out / "runs").glob("*.json")))


@pytest.fixture(scope="module")
def repeated(tmp_path_factory):
    """A study, the same with more seeds, and the run files of the store after each."""
    folder = tmp_path_factory.mktemp("repeated")
    (folder / "planted.py").write_text(RECIPE)
    studies, files = [], []
    for seeds in (2, 5):
        studies.append(quick(f"{folder / 'planted.py'}:recipe", ["adabelief"], folder / "out", seeds=seeds))
        files.append(written(folder / "out"))
    return studies, files


def written(store):
    """When each run file of a store was written."""
    return {path: path.stat().st_mtime_ns for path in (store / "runs").iterdir()}


def test_finished_runs_are_never_repeated(repeated):
    (first, second), (before, after) = repeated
    assert {path: time for path, time in after.items() if path in before} == before
    assert first.arms[0].runs[0].digest == second.arms[0].runs[0].digest
    assert len(after) > len(before)


def test_fewer_than_six_seeds_give_numbers_but_no_verdict(repeated):
    found = arm(repeated[0][1], "adabelief").scores["loss"]
    assert len(found.differences) == 5
    assert found.verdict == "too few seeds"
    assert math.isfinite(found.estimate)


class Twice(torch.optim.SGD):
    """Reads the gradient of each batch twice, and so counts every example twice."""

    def step(self, closure):
        closure()
        return super().step(closure)


def twice(recipe):
    """A planted cost: two forward passes a step."""
    return recipe.replace(optimizer=lambda p: Twice(p, lr=0.01))


def test_an_arm_that_sees_more_examples_is_run_again_at_equal_examples(recipe_file, tmp_path):
    study = quick(load_recipe(f"{recipe_file}:recipe"), [twice, nothing], tmp_path / "out", seeds=2)
    found, base = arm(study, "twice"), study.arms[0]
    assert [r.examples for r in found.runs] == [2 * r.examples for r in base.runs]
    assert [r.steps for r in found.equal_examples] == [15, 15]
    assert [r.seed for r in found.equal_examples] == [0, 1]
    assert [r.examples for r in found.equal_examples] == pytest.approx([r.examples for r in base.runs], rel=0.05)
    assert found.scores_at_equal_examples["loss"].differences != found.scores["loss"].differences
    assert arm(study, "nothing").equal_examples == ()
    assert arm(study, "nothing").scores_at_equal_examples == arm(study, "nothing").scores


def test_a_budget_in_seconds_stands_for_the_same_steps_when_the_study_goes_on(recipe_file, tmp_path):
    recipe, out = load_recipe(f"{recipe_file}:recipe").replace(budget=steep.Budget(seconds=0.02)), tmp_path / "out"
    first = quick(recipe, [nothing], out, seeds=1)
    files = set((out / "runs").iterdir())
    second = quick(recipe, [nothing], out, seeds=1)
    assert second.arms[0].runs[0].steps == first.arms[0].runs[0].steps > 1
    assert [r.digest for a in second.arms for r in a.runs] == [r.digest for a in first.arms for r in a.runs]
    assert {r.key for a in second.arms for r in a.runs} <= {p.stem for p in files}


@pytest.mark.parametrize(
    ("budget", "total", "steps"),
    [
        (steep.Budget(seconds=2.0), None, 200),
        (steep.Budget(steps=1000, seconds=2.0), 1000, 200),  # the limit that is reached first
        (steep.Budget(steps=100, seconds=2.0), 100, 100),
        (steep.Budget(steps=100), 100, 100),
    ],
)
def test_the_first_limit_of_a_budget_ends_it(budget, total, steps):
    dry_run = DryRun(step_seconds=0.01, other_seconds=0.0, total_steps=total)
    assert fixed_budget(budget, dry_run) == (steps, steep.Budget(steps=steps))


def test_dry_runs_are_kept_by_what_was_trained(tmp_path):
    DryRuns(tmp_path, {"a": "key"}).add({"a": DryRun(0.1, 0.2, 3)})
    assert DryRuns(tmp_path, {"b": "key", "c": "other"}).known == {"b": DryRun(0.1, 0.2, 3)}


def test_workers_end_with_a_parent_that_is_killed_and_the_study_is_resumed(recipe_file, tmp_path, repeated):
    """The parent alone is killed; `test_kills` kills process groups and workers, again and again."""
    sizes = ["--trials", "1", "--seeds", "2", "--workers", "1", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "steep", "compare", f"{recipe_file}:recipe", "--methods", "adabelief", *sizes]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list(tmp_path.glob("out/runs/*.json"))) < 2:
        time.sleep(0.05)
    orphans = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert orphans
    assert psutil.wait_procs(orphans, timeout=10)[1] == []
    before = written(tmp_path / "out")
    study = quick(f"{recipe_file}:recipe", ["adabelief"], tmp_path / "out", seeds=2)
    assert {path: time for path, time in written(tmp_path / "out").items() if path in before} == before
    for a, b in zip(study.arms, repeated[0][0].arms, strict=True):
        assert (a.name, a.hyper) == (b.name, b.hyper)
        assert [r.digest for r in a.runs] == [r.digest for r in b.runs]
        assert {name: c.differences for name, c in a.scores.items()} == {
            name: c.differences for name, c in b.scores.items()
        }


def test_ctrl_c_keeps_what_is_finished(recipe_file, tmp_path):
    command = [
        sys.executable,
        "-m",
        "steep",
        "compare",
        f"{recipe_file}:recipe",
        "--methods",
        "adabelief",
        "--workers",
        "1",
    ]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # even if ignored by us
    arguments = [*command, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    deadline = time.time() + 120
    while time.time() < deadline and not list(tmp_path.glob("out/runs/*.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Finished runs are kept" in message
    assert list(tmp_path.glob("out/runs/*.json"))


def test_methods_with_fixed_hyper_parameters_and_joined_methods():
    fixed = make_arm(("adabelief", {"lr": 0.5}))
    assert "lr" not in fixed.search_space
    assert fixed.settings({})[0] == (("adabelief", {"lr": 0.5}),)
    joined = make_arm("adabelief+ps-kd")
    assert {"adabelief.lr", "ps-kd.alpha_T"} <= set(joined.search_space)
    methods, lr_scale = joined.settings({"adabelief.lr": 0.3, "ps-kd.alpha_T": 0.7})
    assert dict(methods)["adabelief"]["lr"] == 0.3
    assert dict(methods)["ps-kd"] == {"alpha_T": 0.7}
    assert lr_scale == 1.0
    assert make_arm("ps-kd").search_space.keys() == {"alpha_T", "lr_scale"}


def test_a_method_of_ones_own_is_an_arm_with_its_space():
    def faster(recipe, *, rate=0.1):
        return recipe.replace(optimizer=lambda p: torch.optim.SGD(p, lr=rate))

    mine = Method(
        "mine", Paper("Mine"), "optim", faster, apply=faster, search_space={"rate": steep.log_uniform(0.01, 1)}
    )
    arm_ = make_arm(mine)
    assert arm_.search_space == mine.search_space
    assert arm_.settings({"rate": 0.2}) == ((("mine", {"rate": 0.2}),), 1.0)
    assert arm_.defaults() == {"rate": 0.1}
    assert own_method(nothing).summary == "A method that does nothing."


def test_an_arm_given_twice(regression):
    with pytest.raises(ValueError, match="'adabelief' is given twice"):
        make_arms(regression, ["adabelief", "adabelief"])


def test_all_takes_what_fits_and_says_why_the_rest_does_not(recipe_file, tmp_path):
    study = quick(f"{recipe_file}:recipe", "all", tmp_path / "out", seeds=1)
    names = {a.name for a in study.arms}
    assert {BASELINE, "adamw", "adabelief", "A/A"} <= names
    assert "class labels" in study.left_out["ps-kd"]
    assert "images" in study.left_out["efficienttrain"]
    assert "clients" in study.left_out["fedspeed"]


def test_two_compares_on_one_store_at_once(recipe_file, tmp_path):
    with Store(tmp_path / "out").lock(), pytest.raises(StoreError, match="another compare is using the store"):
        quick(f"{recipe_file}:recipe", ["adabelief"], tmp_path / "out")


def test_stores_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file: give a directory"):
        Store(tmp_path / "file")
    with pytest.raises(StoreError, match="no store at"):
        open_store(tmp_path / "absent")
    with pytest.raises(StoreError, match="no finished comparison"):
        Store(tmp_path / "new").study()

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(StoreError, match="cannot be written to: Permission denied"):
        Store(tmp_path / "locked")


def test_a_store_of_a_newer_version_and_a_damaged_run(tmp_path):
    store = Store(tmp_path)
    store.run_path("new").write_text(json.dumps({"format": 99}))
    with pytest.raises(StoreError, match="written by a newer steep"):
        store.get("new")
    store.run_path("cut").write_text('{"form')
    with pytest.raises(StoreError, match=r"cut\.json is damaged .*delete it"):
        store.get("cut")


def store_of_format_1(folder):
    """As the version wrote it that called the A/A control a twin, and interim analyses looks."""
    run = {"key": "k", "arm": "A/A", "role": "twin", "methods": [], "lr_scale": 1.0, "seed": 500_000, "split_seed": 0}
    study = {"recipe": "planted", "source": "", "arms": [], "primary": "loss", "metrics": {"loss": False}, "seeds": [0]}
    files = {
        "store.json": {"format": 1},
        "preflights.json": {},
        "runs/k.json": {"format": 1, **run, "budget": {"steps": 1}, "outcome": "finished"},
        "study.json": {"format": 1, **study, "looks": [{"pairs": 8, "alpha": 0.05, "made": True, "decided": []}]},
    }
    for name, values in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(values))
    return {folder / name: (folder / name).read_text() for name in files}


def test_a_store_of_the_previous_format_is_refused_and_left_alone(recipe_file, tmp_path):
    files = store_of_format_1(tmp_path / "old")
    told = (
        r"old/store\.json was written by an older steep \(format 1; .*\): choose another --out, or use the steep that"
    )
    for use in (
        lambda: Store(tmp_path / "old"),
        lambda: open_store(tmp_path / "old"),
        lambda: quick(f"{recipe_file}:recipe", ["adabelief"], tmp_path / "old"),
    ):
        with pytest.raises(StoreError, match=told):
            use()
    assert {path: path.read_text() for path in (tmp_path / "old").rglob("*") if path.is_file()} == files


def test_a_full_disk_while_a_run_is_kept_leaves_no_half_file(tmp_path, monkeypatch):
    store = Store(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    record = RunRecord("key", "a", "confirm", (), 1.0, 0, 0, {}, "finished")
    with pytest.raises(OSError, match="No space left"):
        store.put(record)
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (None, "recipe", "no recipe file at"),
        ("x = 1", "recipe", r"has no recipe 'recipe'; there is: nothing"),
        (RECIPE, "recpe", r"has no recipe 'recpe'; did you mean 'recipe'"),
        (RECIPE, "number", "is a int, not a steep.Recipe"),
        ("1 / 0", "recipe", r"raised ZeroDivisionError while it was imported: division by zero \(.*bad\.py, line 1\)"),
        ("import nowhere_at_all", "recipe", "raised ModuleNotFoundError"),
    ],
)
def test_recipe_files_that_cannot_be_loaded(tmp_path, text, name, message):
    path = tmp_path / "bad.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(f"{path}:{name}")


def test_recipe_names_that_do_not_exist():
    with pytest.raises(steep.UnknownName, match="unknown task 'digts'; did you mean 'digits'"):
        load_recipe("digts")
    with pytest.raises(steep.UnknownName, match=r"FILE\.py:NAME"):
        load_recipe("mine.py")
    with pytest.raises(RecipeError, match=r"no module 'not_a_package\.sub'"):
        load_recipe("not_a_package.sub:recipe")


def test_a_module_path_and_a_function_that_returns_a_recipe(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text(RECIPE + "\ndef build():\n    return recipe\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_recipe("my_module:recipe").name == load_recipe("my_module:build").name == "planted"


def test_a_recipe_that_cannot_be_sent_to_a_worker(regression):
    lock = threading.Lock()
    with pytest.raises(RecipeError, match="cannot be sent to a worker"):
        from_value(regression.replace(picture=lambda model: lock), {})


def test_functions_need_the_recipe_itself(tmp_path):
    with pytest.raises(ValueError, match="need the recipe itself"):
        steep.compare("digits", [nothing], out=tmp_path)


def test_scores_that_do_not_exist(recipe_file, tmp_path):
    with pytest.raises(ValueError, match="score='accuracy' is not among this recipe's scores: loss"):
        quick(f"{recipe_file}:recipe", ["adabelief"], tmp_path, score="accuracy")


def test_a_method_that_does_not_fit_is_refused_by_name(recipe_file, tmp_path):
    with pytest.raises(steep.UnmetRequirement, match="ps-kd: PSKD needs class labels"):
        quick(f"{recipe_file}:recipe", ["ps-kd"], tmp_path / "a")
    with pytest.raises(ValueError, match=r"adabelief:lr=-1.0: lr=-1.0 must"):
        quick(f"{recipe_file}:recipe", [("adabelief", {"lr": -1.0})], tmp_path / "b")


def test_descriptions_tell_recipes_apart(regression):
    assert describe(regression) == describe(regression.replace())
    assert describe(regression) != describe(regression.replace(budget=steep.Budget(epochs=5)))
    rates = [regression.replace(optimizer=lambda p, lr=lr: torch.optim.SGD(p, lr=lr)) for lr in (0.1, 0.2)]
    assert describe(rates[0]) != describe(rates[1])


def test_code_versions_depend_on_the_methods_own_file_only():
    assert code_version(["ps-kd"]) == code_version(["ps-kd"])
    assert code_version(["ps-kd"]) != code_version(["adabelief"]) != code_version([])


# ---- tuning and planning


def test_trials_are_kept_once_and_a_study_that_was_cut_off_goes_on(tmp_path):
    arm_, costs = make_arm("adabelief"), [1.0, math.inf, 3.0, 4.0]
    tried = tuning.proposals(arm_, 4)
    tuning.keep(tuning.database(tmp_path), arm_, "context", tried[:2], costs[:2])
    for _ in range(2):
        tuning.keep(tuning.database(tmp_path), arm_, "context", tried, costs)
    study = optuna.load_study(study_name="adabelief context", storage=f"sqlite:///{tmp_path / 'optuna.db'}")
    assert [t.params for t in study.trials] == tried
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert [t.value for t in study.trials] == [1.0, None, 3.0, 4.0]


def test_tuning_starts_with_the_defaults_and_is_the_same_again():
    arm_ = make_arm("adabelief")
    first = tuning.proposals(arm_, 8)
    assert first[0] == {name: arm_.defaults()[name] for name in first[0]}
    assert len({tuple(p.values()) for p in first}) == 8
    assert tuning.proposals(arm_, 8) == first
    assert tuning.proposals(arm_, 12)[:8] == first
    assert tuning.proposals(make_arm("adamp"), 8)[1:] != first[1:]
    for proposal in first:
        for name, value in proposal.items():
            assert arm_.search_space[name].low <= value <= arm_.search_space[name].high


def test_the_best_trial_is_best_on_average_over_the_finalists_seeds():
    assert tuning.finalists([3.0, 1.0, 2.0, math.inf], 8) == [1, 2]
    assert tuning.finalists([3.0, 1.0], 4) == []
    assert tuning.best([3.0, 1.0, 2.0], {}) == 1
    assert tuning.best([3.0, 1.0, 2.0], {1: [5.0, 5.0], 2: [2.0, 2.0]}) == 2


def test_costs_are_signed_and_diverged_runs_cost_infinitely():
    run = RunRecord("k", "a", "tune", (), 1.0, 0, 0, {}, "finished", val={"loss": 2.0, "accuracy": 0.9})
    assert tuning.cost(run, "loss", False) == 2.0
    assert tuning.cost(run, "accuracy", True) == -0.9
    assert tuning.cost(RunRecord("k", "a", "tune", (), 1.0, 0, 0, {}, "diverged"), "loss", False) == math.inf


def test_plans_fit_the_time_or_are_refused():
    seconds, tuned = {"baseline": 1.0, "adamw": 1.0, "sven": 3.0}, dict.fromkeys(("baseline", "adamw", "sven"), True)
    assert tuning_runs(8) == 12
    assert tuning_runs(4) == 4
    standard = choose(seconds, tuned, 1, minutes=None, trials=None, seeds=None)
    assert (standard.trials, standard.seeds) == (8, 8)
    training = 12 * 5 + 8 * (5 + 1 + 1)
    assert standard.seconds == pytest.approx(training + RUN_SECONDS * standard.runs + REPORT_SECONDS)
    two = choose(seconds, tuned, 2, minutes=None, trials=None, seeds=None)
    assert two.seconds == pytest.approx((standard.seconds - REPORT_SECONDS) / 2 + REPORT_SECONDS)
    small = choose(seconds, tuned, 1, minutes=1.3, trials=None, seeds=None)
    assert small.seconds <= 78
    assert (small.trials, small.seeds) < (8, 8)
    large = choose(seconds, tuned, 1, minutes=60, trials=None, seeds=None)
    assert (large.trials, large.seeds) == (16, 16)
    assert choose(seconds, tuned, 1, minutes=60, trials=3, seeds=None).trials == 3
    with pytest.raises(ValueError, match=r"0\.1 minutes are too few: .*takes about"):
        choose(seconds, tuned, 1, minutes=0.1, trials=None, seeds=None)


def test_many_methods_get_more_seeds_because_fewer_could_show_nothing():
    many = {f"m{i}": 1.0 for i in range(12)}
    plan = choose(many, dict.fromkeys(many, True), 1, minutes=None, trials=None, seeds=None)
    assert 2 / 2**plan.seeds * 11 <= 0.05 < 2 / 2 ** (plan.seeds - 1) * 11


def test_sequential_plans_have_more_seeds_and_say_when_verdicts_are_read():
    two = {"baseline": 1.0, "m": 1.0}
    plan = choose(two, dict.fromkeys(two, True), 1, minutes=None, trials=None, seeds=None, sequential=True)
    assert [analysis.pairs for analysis in plan.interim_analyses] == [4, 8, 16]
    assert plan.effect == minimum_detectable_effect(1.0, 16, plan.interim_analyses[-1].alpha)
    text = announcement(plan, ["adabelief"], {}, 2)
    assert "Verdicts are read after 8 pairs (2.3 %) and 16 pairs (2.7 %), 5 % in all" in text
    assert "4 pairs are too few to decide anything" in text
    fixed = choose(two, dict.fromkeys(two, True), 1, minutes=None, trials=None, seeds=None)
    assert [analysis.pairs for analysis in fixed.interim_analyses] == [8]
    assert "Verdicts are read" not in announcement(fixed, ["adabelief"], {}, 2)
    assert choose(two, two, 1, minutes=None, trials=None, seeds=12, sequential=True).seeds == 12


def test_plans_say_what_they_could_show():
    plan = plan_of({"baseline": 1.0, "m": 1.0}, {"baseline": True, "m": True}, 8, 8, 1)
    assert 1.0 < plan.effect < 1.5  # about 1.2 standard deviations at 8 pairs
    text = announcement(plan, ["adabelief"], {"x": "why"}, 2)
    assert "standard deviations" in text
    assert "Left out: x: why" in text
    assert "no verdict" in announcement(plan_of({"b": 1.0}, {"b": True}, 8, 3, 1), [], {}, 1)


def test_a_worker_killed_by_the_system_is_replaced_and_its_run_made_again(tmp_path):
    path = tmp_path / "mortal.py"
    death = "import os, pathlib\nmark = pathlib.Path(__file__).with_suffix('.mark')\n"
    dying = "    if not mark.exists():\n        mark.touch()\n        os.kill(os.getpid(), 9)\n"
    path.write_text(death + RECIPE.replace("def data(generator):\n", "def data(generator):\n" + dying))
    jobs = [Job("baseline", "confirm", (), seed, seed, steep.Budget(steps=3)) for seed in (0, 1)]
    with Workers(from_name(f"{path}:recipe"), Store(tmp_path / "out"), 1) as workers:
        records = workers.run(jobs)
    assert [r.outcome for r in records] == ["finished", "finished"]
    assert [r.seed for r in records] == [0, 1]
    assert (tmp_path / "mortal.mark").exists()


def test_workers_killed_again_and_again_end_the_comparison_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("steep.evidence.runs.workers.RESTARTS", 1)
    path = tmp_path / "mortal.py"
    dying = "    import os\n    os.kill(os.getpid(), 9)\n"
    path.write_text(RECIPE.replace("def data(generator):\n", "def data(generator):\n" + dying))
    with (
        pytest.raises(RunError, match=r"killed a worker 2 times\. Is there enough memory for 1 runs"),
        Workers(from_name(f"{path}:recipe"), Store(tmp_path / "out"), 1) as workers,
    ):
        workers.run([Job("baseline", "confirm", (), 0, 0, steep.Budget(steps=3))])


def test_a_run_that_raises_names_arm_seed_and_place_and_keeps_the_others(tmp_path):
    path = tmp_path / "picky.py"
    picky = "    if generator.initial_seed() == bad:\n        raise RuntimeError('no such luck')\n"
    bad = "from steep.utils.randomness import stream_seed\nbad = stream_seed(1, 'split')\n"
    path.write_text(bad + RECIPE.replace("def data(generator):\n", "def data(generator):\n" + picky))
    jobs = [Job("baseline", "confirm", (), seed, seed, steep.Budget(steps=3)) for seed in (0, 1)]
    store = Store(tmp_path / "out")
    with (
        pytest.raises(RunError, match=r"baseline, seed 1: RuntimeError: no such luck \(.*picky\.py, line"),
        Workers(from_name(f"{path}:recipe"), store, 1) as workers,
    ):
        workers.run(jobs)
    assert [r.seed for r in store.records()] == [0]


def test_what_a_method_does_before_the_run_is_on_the_clock(regression, tmp_path):
    def slow(recipe):
        end = time.process_time() + 0.4
        while time.process_time() < end:
            pass
        return recipe

    source = from_value(regression, {"slow": own_method(slow)})
    plain, late = (
        run_job(Job("arm", "confirm", methods, 0, 0, regression.budget), source, str(tmp_path), "code")
        for methods in ((), (("slow", {}),))
    )
    assert late.preparation_seconds - plain.preparation_seconds > 0.3
    assert late.total_cpu_seconds - late.cpu_seconds == late.preparation_seconds
    assert late.test == plain.test
    assert at_equal_time(late, plain) < 0.5 * plain.steps

"""Methods: their entries, how they are applied to a recipe, how they are found, and what their packages export."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import steep
from steep import _discovery
from steep.method import PACKAGES, Method, Paper, method, methods


class Optimizer:
    """A thing.

    More.
    """

    def __init__(self, parameters, *, lr=0.1, name="x", flag=False):
        pass


def make_method(**changes):
    values = {"id": "thing", "paper": Paper("A thing", arxiv="1234.56789"), "changes": "optim", "make": Optimizer}
    return Method(**values | changes)


# ---- entries


def test_hyper_parameters_and_summary_are_read_from_the_code():
    c = make_method()
    assert c.hyper == {"lr": 0.1, "name": "x", "flag": False}
    assert c.summary == "A thing."
    assert c.paper.link == "https://arxiv.org/abs/1234.56789"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requires": {"gpu"}}, r"unknown requirements \['gpu'\]"),
        ({"changes": "kitchen"}, "must be one of"),
        ({"search_space": {"momentum": steep.uniform(0, 1)}}, r"search_space has \['momentum'\]"),
    ],
)
def test_entries_that_contradict_themselves(changes, message):
    with pytest.raises(ValueError, match=message):
        make_method(**changes)


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"lrr": 1.0}, r"no hyper-parameter 'lrr'; did you mean 'lr'"),
        ({"lr": "high"}, r"lr='high' must be of type float"),
        ({"lr": True}, "lr=True must be of type float"),
        ({"flag": 1}, "flag=1 must be of type bool"),
        ({"name": 3}, "name=3 must be of type str"),
    ],
)
def test_hyper_parameters_are_checked_before_anything_runs(regression, hyper, message):
    entry = make_method(apply=lambda recipe, **h: recipe)
    entry(regression, lr=1)
    with pytest.raises(TypeError, match=message):
        entry(regression, **hyper)


def test_a_method_with_no_way_into_a_recipe_is_no_arm(regression):
    with pytest.raises(TypeError, match="used on its own"):
        make_method(changes="solvers")(regression)


def test_unknown_methods_and_tasks_name_the_nearest():
    with pytest.raises(steep.UnknownName, match="unknown method 'adabeleif'; did you mean 'adabelief'") as error:
        method("adabeleif")
    assert str(error.value).startswith("unknown method")  # not KeyError's quoted repr
    with pytest.raises(steep.UnknownName, match="did you mean 'digits'"):
        steep.task("digit")


def test_applying_a_method_pins_the_score_to_the_recipes_own_loss(regression):
    entry = make_method(apply=lambda recipe, **h: recipe.replace(loss=lambda o, t: 0 * o.squeeze(-1) + 7))
    result = steep.fit(entry(regression), progress=False)
    assert set(result.history.losses) == {7.0}
    assert result.test["loss"] != 7.0


def test_a_deferred_loss_still_scores_when_a_method_replaces_it(regression):
    base = regression.replace(
        loss=steep.deferred(lambda run: lambda o, t: (o.squeeze(-1) - t).square() * run.total_steps)
    )
    entry = make_method(apply=lambda recipe, **h: recipe.replace(loss=regression.loss))
    ours, plain = (steep.fit(r, progress=False) for r in (entry(base), regression))
    assert ours.history.losses == plain.history.losses
    assert ours.test["loss"] == pytest.approx(20 * plain.test["loss"])


def test_compose_refuses_two_that_replace_the_same_component(regression):
    one = make_method(apply=lambda recipe, **h: recipe.replace(name=recipe.name + "1"))
    two = make_method(id="other", apply=lambda recipe, **h: recipe.replace(name=recipe.name + "2"))
    with pytest.raises(ValueError, match="'thing' and 'other' both replace the recipe's optim"):
        steep.compose(regression, [(one, {}), (two, {})])
    wrapping = make_method(id="other", wraps=True, apply=two.apply)
    assert steep.compose(regression, [(one, {}), (wrapping, {})]).name == "regression12"


# ---- application to a recipe


class Rule:
    """A rule.

    Args:
        model: of the losses.
        power: of the losses.
    """

    def __init__(self, model, power=2.0):
        self.power = power

    def __call__(self, losses, *, scale=1.0):
        (losses**self.power).mean().mul(scale).backward()


def test_a_rule_whose_gradient_is_the_step_has_sgd_behind_it_and_its_presets(regression):
    entry = make_method(changes="backward", make=Rule, sgd_lr=0.01, preset={"power": 1.0})
    assert entry.hyper == {"lr": 0.01, "power": 1.0}
    by_hand = regression.replace(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.02))
    ours, plain = (steep.fit(r, progress=False).history.losses for r in (entry(regression, lr=0.02), by_hand))
    assert ours == plain
    assert steep.fit(entry(regression, power=2.0), progress=False).history.losses != plain
    with pytest.raises(ValueError, match=r"lr=0.0 must lie in \(0, inf\)"):
        entry(regression, lr=0.0)


def test_a_constructor_gets_the_facts_of_the_run_it_asks_for(regression):
    seen = {}

    class Loss(nn.Module):
        def __init__(self, loss, head, num_examples, *, total_steps, steps_per_epoch, generator, factor=1.0):
            super().__init__()
            seen.update(vars() | {"self": None, "__class__": None})
            self.loss, self.factor = loss, factor

        def forward(self, output, target):
            return self.factor * self.loss(output, target)

    recipe = make_method(changes="losses", make=Loss)(regression, factor=3.0)
    result = steep.fit(recipe, progress=False)
    assert (seen["num_examples"], seen["total_steps"], seen["steps_per_epoch"]) == (40, 20, 5)
    assert seen["loss"] is regression.loss
    assert seen["head"] is result.model[3]
    assert isinstance(seen["generator"], torch.Generator)
    plain = steep.fit(regression, progress=False)
    assert result.history.losses[0] == pytest.approx(3 * plain.history.losses[0])
    assert result.test["loss"] < 2 * plain.test["loss"]  # scored by the recipe's own loss


def test_a_handle_is_attached_to_the_run(regression):
    class Handle:
        def __init__(self, model, *, total_steps, share=0.5):
            self.model, self.total_steps, self.count = model, total_steps, 0
            handles.append(self)

        def step(self):
            self.count += 1

    handles = []
    result = steep.fit(make_method(changes="models", make=Handle)(regression), progress=False)
    (handle,) = handles
    assert handle.model is result.model
    assert handle.count == handle.total_steps == 20


# ---- discovery


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `found` with a method in a sub-folder, and a private file that would raise."""
    files = {
        "__init__.py": "from steep._discovery import exports\n__getattr__, __dir__ = exports(__name__)\n",
        "near.py": "import sys\nclass Near: pass\ndef _helper(): pass\nfrom pathlib import Path\n",
        "_private.py": "raise RuntimeError('a private file was imported')\n",
        "deep/__init__.py": "",
        "deep/_hidden/__init__.py": "",
        "deep/_hidden/no.py": "raise RuntimeError('a private folder was imported')\n",
        "deep/far.py": "class Far: pass\ndef apply_far(): pass\n",
    }
    for name, text in files.items():
        (tmp_path / "found" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "found" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "found"
    for name in [name for name in sys.modules if name.partition(".")[0] == "found"]:
        del sys.modules[name]


def test_files_in_sub_folders_are_found_and_private_ones_are_not(package):
    assert _discovery.files("found") == {"near": "found.near", "far": "found.deep.far"}
    assert _discovery.files("steep.no_such_package") == {}


def test_two_files_of_one_name_are_refused(package):
    (package / "deep" / "near.py").write_text("")
    with pytest.raises(ValueError, match=r"found.*near and found.*near have the same name"):
        _discovery.files("found")


def test_a_sub_folder_that_cannot_be_imported_is_not_passed_over(package):
    (package / "deep" / "__init__.py").write_text("import no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        _discovery.files("found")


def test_a_package_exports_what_its_files_define_and_imports_only_what_is_asked_for(package):
    import found

    assert found.Far.__module__ == "found.deep.far"
    assert "found.near" not in sys.modules
    assert found.apply_far is found.far.apply_far
    assert dir(found) == ["Far", "Near", "apply_far"]
    for name in ("Path", "sys", "_helper", "_private", "Nowhere"):
        with pytest.raises(AttributeError, match=f"module 'found' has no attribute '{name}'"):
            getattr(found, name)


def test_asking_for_one_method_imports_no_other():
    code = """
import sys, steep
from steep.optim import AdaBelief
assert steep.method("sven").id == "sven"
from steep.method import PACKAGES
packages = tuple(f"steep.{p}." for p in PACKAGES)
print(sorted(name for name in sys.modules if name.startswith(packages) and "._" not in name))
print(sorted({"optuna", "plotly", "matplotlib", "sklearn", "pandas", "transformers"} & set(sys.modules)))
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == ["['steep.backward.sven', 'steep.optim.adabelief']", "[]"]


def test_every_method_file_holds_an_entry_of_its_name():
    names = {name for package in PACKAGES for name in _discovery.files(f"steep.{package}")}
    assert names <= {id.replace("-", "_") for id in methods()}
    assert method("sgdp").make.__name__ == "SGDP"  # one of two in a file

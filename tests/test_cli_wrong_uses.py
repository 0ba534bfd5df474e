"""What users get wrong on the command line: one sentence with the value and the remedy, exit code 2, no traceback."""

import re
import sys

import pytest

from steep import cli
from steep.evidence.runs.store import Store

RECIPE = """
import torch, steep
from torch import nn
from torch.nn import functional as F

def data(generator):
    x = torch.randn(60, 3, generator=generator)
    return steep.split_loaders(x, x.sum(1), generator, batch_size=8)

def make(**parts):
    whole = dict(data=data, model=lambda: nn.Linear(3, 1), loss=lambda o, t: (o.squeeze(-1) - t).square(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1), budget=steep.Budget(steps=8), name="mine")
    return steep.Recipe(**{**whole, **parts})

def failing(output, target):
    assert output.shape == target.shape
    return output

def dividing(output, target):
    return output / 0 if len(output) == 1 / 0 else output

recipe = make()
number = 3
wide = make(model=lambda: nn.Linear(4, 1))
narrow = make(loss=lambda o, t: (o.reshape(4) - t).square())
asserting = make(loss=failing)
zero = make(loss=dividing)
mean = make(loss=lambda o, t: (o.squeeze(-1) - t).square().mean())
no_model = make(model=lambda: None)
no_data = make(data=lambda generator: {}["train"])
metric = make(metric=steep.Metric("bad", lambda o, t: o.nothing))
name_error = make(loss=lambda o, t: undefined)

def needs_arguments(x):
    return make()

def method(recipe, strength=1.0):
    return recipe

def raising(recipe):
    raise RuntimeError("not today")

def returning_nothing(recipe):
    return None

class Klass:
    pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wrong")
    (path / "my.py").write_text(RECIPE)
    (path / "broken.py").write_text("recipe = steep.Recipe(\n")
    (path / "missing.py").write_text("import no_such_library\n")
    (path / "raises.py").write_text("1 / 0\n")
    (path / "exits.py").write_text("import sys; sys.exit(3)\n")
    (path / "empty.py").write_text("")
    (path / "text.pt").write_text("no checkpoint")
    (path / "file").write_text("")
    Store(path / "store")
    return path


def fit(*options, recipe="my.py:recipe"):
    return ("fit", recipe, *options)


def compare(*options, recipe="my.py:recipe", methods=("adabelief",)):
    return ("compare", recipe, "--methods", *methods, *options, "--out", "out")


def of(recipe, message):
    return {f"fit {recipe}": (fit(recipe=recipe), message), f"compare {recipe}": (compare(recipe=recipe), message)}


COMMANDS = {
    "no such command": (("train",), r"No such command 'train'"),
    "no such option": (("list", "--al"), r"No such option"),
    "no such list": (("list", "arms"), r"'arms' must be methods or tasks"),
    "list of an unknown component": (("list", "--changes", "optimizers"), r"'optimizers' is unknown; did you mean"),
    "list of an unknown requirement": (("list", "--requires", "index"), r"'index' is unknown; did you mean 'indices'"),
    "tasks by component": (("list", "tasks", "--changes", "optim"), r"--changes is about methods"),
    "show of nothing": (("show",), r"Missing argument"),
    "show of an unknown method": (("show", "adabeleif"), r"unknown method 'adabeleif'; did you mean 'adabelief'"),
    "show of a task": (("show", "digits"), r"unknown method 'digits'"),
    "runs of no store": (("runs", "nowhere"), r"no store at"),
    "runs of a file": (("runs", "file"), r"file"),
    "runs of an unknown arm": (("runs", "store", "--arm", "sven"), r"--arm 'sven' is none of"),
    "runs of an unknown role": (("runs", "store", "--role", "tuning"), r"--role 'tuning' is none of .*tune"),
    "runs of an unknown outcome": (
        ("runs", "store", "--outcome", "ok"),
        r"--outcome 'ok' is none of diverged, finished",
    ),
    "runs of a word for a seed": (("runs", "store", "--seed", "one"), r"valid integer"),
    "report of no store": (("report", "nowhere"), r"no store at"),
    "report of nothing": (("report", "store"), r"store"),
    "resume of no store": (("resume", "nowhere"), r"no store at"),
    "resume of nothing": (("resume", "store"), r"nothing to resume"),
    "claims of no folder": (("claims", "--claims", "nowhere"), r"no folder of claims"),
    "claims with no worker": (("claims", "--workers", "0"), r"greater than or equal to 1"),
}
RECIPES = {
    **of("digit", r"unknown task 'digit'; did you mean 'digits"),
    **of("nowhere.py:recipe", r"no recipe file at nowhere.py"),
    **of("my.py", r"give the recipe in it: FILE.py:NAME"),
    **of("my.py:recipes", r"no recipe 'recipes'; did you mean 'recipe'"),
    **of("my.py:", r"no recipe ''"),
    **of("my.py:number", r"is a int, not a steep.Recipe"),
    **of("my.py:Klass", r"not a steep.Recipe"),
    **of("my.py:needs_arguments", r"needs_arguments.*argument"),
    **of("my.py:raising", r"argument"),
    **of("broken.py:recipe", r"SyntaxError.*broken.py"),
    **of("missing.py:recipe", r"no_such_library.*missing.py, line 1"),
    **of("raises.py:recipe", r"ZeroDivisionError.*raises.py, line 1"),
    **of("exits.py:recipe", r"SystemExit.*exits.py, line 1"),
    **of("empty.py:recipe", r"no recipe 'recipe'"),
    **of("no.such.module:recipe", r"no module 'no.such.module'"),
    **of("photo:beach", r"unknown task 'photo:beach'"),
    **of("my.py:wide", r"mat1 and mat2.*while the model was called with a tensor float32 \(8, 3\)"),
    **of("my.py:narrow", r"RuntimeError.*my.py, line 25; while the loss was called with a tensor float32 \(8, 1\)"),
    **of("my.py:asserting", r"AssertionError.*my.py, line 16: assert output.shape == target.shape"),
    **of("my.py:zero", r"ZeroDivisionError: division by zero \(.*my.py, line 20"),
    **of("my.py:no_model", r"Recipe.model must return a torch.nn.Module, but returned None"),
    **of("my.py:no_data", r"KeyError: 'train' \(.*my.py, line 30"),
    **of("my.py:name_error", r"NameError: name 'undefined' is not defined \(.*my.py, line 32"),
    "a metric that raises": (fit(recipe="my.py:metric"), r"AttributeError.*my.py, line 31; while the metric 'bad'"),
    "a metric that raises, compared": (compare(recipe="my.py:metric"), r"AttributeError.*my.py, line 31"),
    "a mean, where losses are needed": (compare(recipe="my.py:mean", methods=("sven",)), r"one loss per example"),
}
NUMBERS = {
    f"{command.__name__} {option} {value}": (
        command(option, value),
        rf"{message or option.strip('-').replace('-', '_')}",
    )
    for command, option, values, message in [
        (fit, "--seed", ("-1", "0.5", "nan"), "seed=-1 must be|valid integer"),
        (fit, "--split-seed", ("-1",), "split_seed=-1 must be"),
        (fit, "--epochs", ("0", "-1", "nan", "inf", "ten"), "epochs=|valid number"),
        (fit, "--steps", ("0", "-5", "1.5"), "steps=|valid integer"),
        (fit, "--seconds", ("0", "nan", "inf"), "seconds="),
        (fit, "--lr-scale", ("0", "-1", "nan", "inf"), "--lr-scale="),
        (fit, "--accumulate", ("0", "-2"), "accumulate=.* must be a whole number of at least 1"),
        (fit, "--evaluate-every", ("0", "-2"), "evaluate_every=.* must be"),
        (fit, "--threads", ("0", "-1"), "--threads=.* must be"),
        (compare, "--seeds", ("0", "-1", "x"), "seeds=.* must be|valid integer"),
        (compare, "--trials", ("0", "-1"), "trials=.* must be"),
        (compare, "--workers", ("0", "-3"), "workers=.* must be"),
        (compare, "--minutes", ("0", "-1", "nan", "inf"), "minutes=.* must lie"),
    ]
    for value in values
}
FITS = {
    "unknown method": (fit("--method", "adabelif"), r"unknown method 'adabelif'"),
    "a setting without a method": (fit("--set", "lr=1"), r"write name=value for one --method"),
    "a setting without a value": (fit("--method", "adabelief", "--set", "lr"), r"write name=value"),
    "a setting of another method": (fit("--method", "adabelief", "--set", "sven.lr=1"), r"write name=value"),
    "an unknown setting": (fit("--method", "adabelief", "--set", "beta=1"), r"no hyper-parameter 'beta'"),
    "a setting of another type": (fit("--method", "adabelief", "--set", "lr=fast"), r"lr='fast' must be of type float"),
    "a setting out of range": (fit("--method", "adabelief:lr=-1"), r"lr=-1 must lie"),
    "two of one kind": (fit("--method", "adabelief", "--method", "adamp"), r"both replace the recipe's optim"),
    "a probe": (fit("--method", "ntk"), r"'ntk' is used on its own"),
    "a requirement": (fit("--method", "ps-kd"), r"needs class labels"),
    "a class for a method": (fit("--method", "my.py:Klass"), r"not a steep.Method or a function"),
    "a method that raises": (fit("--method", "my.py:raising"), r"RuntimeError: not today \(.*my.py, line 41"),
    "a method that returns nothing": (
        fit("--method", "my.py:returning_nothing"),
        r"must return a steep.Recipe, but returned None",
    ),
    "an own method's unknown setting": (fit("--method", "my.py:method:speed=1"), r"no hyper-parameter 'speed'"),
    "an unknown device": (fit("--device", "gpu"), r"device='gpu' must be"),
    "an unknown precision": (fit("--precision", "fp8"), r"precision='fp8' must be"),
    "an unknown tracker": (fit("--log", "tensorbord"), r"log='tensorbord' is no tracker"),
    "a checkpoint that is a folder": (fit("--checkpoint", "store"), r"store.* is a folder"),
    "a checkpoint that is a program": (fit("--checkpoint", "my.py"), r"my.py .*no checkpoint"),
    "a checkpoint that is a text": (fit("--checkpoint", "text.pt"), r"text.pt .*no checkpoint"),
    "saved as something else": (fit("--save", "model.pt"), r"--save model.pt must end in .safetensors"),
    "saved to a folder": (fit("--save", "store"), r"--save store is a folder"),
    "saved to no folder": (fit("--save", "nowhere/m.safetensors"), r"there is no folder .*nowhere; create it first"),
}
COMPARISONS = {
    "no recipe": (("compare",), r"give a recipe and --methods"),
    "no methods": (("compare", "my.py:recipe"), r"give a recipe and --methods"),
    "unknown method": (compare(methods=("adabelif",)), r"unknown method 'adabelif'"),
    "joined by a comma": (compare(methods=("sven,adabelief",)), r"separate several by spaces"),
    "an open join": (compare(methods=("sven+",)), r"a method's id is missing"),
    "a join of two optimizers": (compare(methods=("adabelief+adamp",)), r"both replace the recipe's optim"),
    "all and one": (compare(methods=("all", "adabelief")), r"'all' stands for every method"),
    "twice": (compare(methods=("adabelief", "adabelief")), r"'adabelief' is given twice"),
    "a value without a name": (compare(methods=("adabelief:lr",)), r"write a hyper-parameter as adabelief:lr=VALUE"),
    "an unknown value": (compare(methods=("adabelief:beta=1",)), r"no hyper-parameter 'beta'"),
    "a text for a number": (compare(methods=("adabelief:lr=fast",)), r"lr='fast' must be of type float"),
    "a number out of range": (compare(methods=("adabelief:lr=-1",)), r"lr=-1 must lie"),
    "a method in no file": (compare(methods=("nowhere.py:method",)), r"no recipe file at nowhere.py"),
    "no such method in a file": (compare(methods=("my.py:methods",)), r"no method 'methods'"),
    "a recipe for a method": (compare(methods=("my.py:recipe",)), r"not a steep.Method or a function"),
    "an arm without clients": (compare(methods=("fedavg",)), r"fedavg.*clients"),
    "an arm without classes": (compare(methods=("adabelief", "ps-kd")), r"ps-kd: PSKD needs class labels"),
    "a probe": (compare(methods=("ntk",)), r"'ntk' is used on its own"),
    "an unknown score": (compare("--score", "accuracy"), r"score='accuracy' is not among this recipe's scores: loss"),
    "an unknown tracker": (compare("--log", "nothing"), r"log='nothing' is no tracker"),
    "out is a file": (("compare", "my.py:recipe", "-m", "sgdp", "--out", "file"), r"the store file is a file"),
    "storage of no kind": (compare("--storage", "here"), r"not the URL of a database"),
    "storage without a driver": (compare("--storage", "oracle://x/y"), r"oracle"),
    "resume with no store": (("compare", "--resume", "nowhere"), r"no store at"),
}
CASES = {**COMMANDS, **RECIPES, **NUMBERS, **FITS, **COMPARISONS}


@pytest.mark.parametrize(("arguments", "message"), CASES.values(), ids=CASES)
def test_a_wrong_use_is_one_sentence(monkeypatch, capsys, folder, arguments, message):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["steep", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = capsys.readouterr()
    assert stop.value.code == 2, shown
    assert "Traceback" not in shown.err
    last = shown.err.strip().splitlines()[-1]
    assert re.search(message, last), shown.err
    assert "delete" not in last


def test_the_list_is_long():
    assert len(CASES) >= 100

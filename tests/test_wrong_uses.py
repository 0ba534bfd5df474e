"""What users get wrong in Python ends early, in an error of steep's own that says what is wrong and what to do."""

import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import steep
from steep.backward import LevenbergMarquardt, Spring, Sven
from steep.linalg import cg
from steep.losses import PSKD
from steep.optim import AdaBelief, AdamP
from steep.probes import empirical_ntk
from steep.solvers import minimize

ROOT = Path(steep.__file__).parent
X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3
NAN, INF = float("nan"), float("inf")


def cross_entropy(output, target):
    return F.cross_entropy(output, target, reduction="none")


def loaders(generator=None):
    return steep.Data(steep.tensor_loader(X[:16], Y[:16], 8, shuffle=True), steep.tensor_loader(X[16:], Y[16:], 8))


def recipe(**changes):
    parts = {
        "data": loaders,
        "model": lambda: nn.Linear(4, 3),
        "loss": cross_entropy,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "budget": steep.Budget(steps=2),
    }
    return steep.Recipe(**{**parts, **changes})


def fit(changes=None, **options):
    return steep.fit(recipe(**(changes or {})), progress=False, **options)


def on(train, **changes):
    """A run on other training data."""
    return lambda: fit({"data": lambda g: steep.Data(train, loaders().val), **changes})


def run(id, **hyper):
    return lambda: steep.fit(steep.method(id)(recipe(), **hyper), progress=False)


def split(*arguments, **options):
    generator = torch.Generator().manual_seed(0)
    return lambda: steep.split_loaders(*(arguments or (X, Y)), generator, **{"batch_size": 8, **options})


def compare(methods, source=None, **options):
    def call(tmp_path):
        return steep.compare(source or recipe(), methods, out=tmp_path / "out", progress=False, workers=1, **options)

    return call


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


class NoLength(Dataset):
    def __getitem__(self, i):
        return X[i], Y[i]


class WithNorm(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


class Frozen(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)
        self.requires_grad_(False)


triples = TensorDataset(X, Y, torch.arange(24) // 4)
weighted = TensorDataset(X, Y, torch.ones(24))
quadruples = TensorDataset(X, Y, Y, Y)

RECIPES = {
    "data is a Data": (lambda: recipe(data=loaders()), r"Recipe.data must be a factory"),
    "model is a module": (lambda: recipe(model=nn.Linear(4, 3)), r"Recipe.model must be a factory.*model=lambda"),
    "model is a number": (lambda: recipe(model=3), r"Recipe.model must be a factory"),
    "model returns a class": (lambda: fit({"model": lambda: nn.Linear}), r"model.*nn.Module"),
    "loss is a name": (lambda: recipe(loss="mse"), r"Recipe.loss.*'mse'"),
    "loss is a class": (lambda: recipe(loss=nn.MSELoss), r"Recipe.loss.*MSELoss"),
    "optimizer is an optimizer": (
        lambda: recipe(optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)),
        r"Recipe.optimizer must be a factory",
    ),
    "optimizer returns nothing": (lambda: fit({"optimizer": lambda parameters: None}), r"optimizer.*None"),
    "optimizer is a name": (lambda: recipe(optimizer="adam"), r"Recipe.optimizer must be a factory"),
    "scheduler is a name": (lambda: recipe(scheduler="cosine"), r"Recipe.scheduler.*'cosine'"),
    "scheduler is built": (
        lambda: recipe(scheduler=torch.optim.lr_scheduler.StepLR(torch.optim.SGD([X.clone()], lr=1), 3)),
        r"Recipe.scheduler",
    ),
    "scheduler lacks an argument": (
        lambda: fit({"scheduler": torch.optim.lr_scheduler.ExponentialLR}),
        r"lacks gamma: write scheduler=functools.partial\(ExponentialLR, gamma",
    ),
    "scheduler follows a score": (
        lambda: fit({"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}),
        r"ReduceLROnPlateau follows a validation score",
    ),
    "rule is a rule": (lambda: recipe(backward=3), r"Recipe.backward must be a factory"),
    "metric is a function": (lambda: recipe(metric=cross_entropy), r"Recipe.metric must be a steep.Metric"),
    "metric called loss": (lambda: steep.Metric("loss", cross_entropy), r"must not be called 'loss'"),
    "metric is a mean": (
        lambda: fit({"metric": steep.Metric("mean", lambda o, t: (o.argmax(-1) == t).float().mean())}),
        r"'mean' must return one number per example",
    ),
    "metric returns a float": (lambda: fit({"metric": steep.Metric("zero", lambda o, t: 0.0)}), r"'zero' must return"),
    "budget is a number": (lambda: recipe(budget=10), r"Recipe.budget.*steep.Budget"),
    "budget without a limit": (lambda: steep.Budget(), r"needs a limit: epochs, steps or seconds"),
    "no steps": (lambda: steep.Budget(steps=0), r"steps=0 must be"),
    "steps of a half": (lambda: steep.Budget(steps=1.5), r"steps=1.5 must be a whole number"),
    "nan epochs": (lambda: steep.Budget(epochs=NAN), r"epochs=nan must"),
    "infinite epochs": (lambda: steep.Budget(epochs=INF), r"epochs=inf must"),
    "epochs in words": (lambda: steep.Budget(epochs="ten"), r"epochs='ten' must be a"),
    "negative seconds": (lambda: steep.Budget(seconds=-1), r"seconds=-1 must"),
    "unknown part": (lambda: recipe().replace(optimiser=None), r"no part 'optimiser'; did you mean 'optimizer'"),
    "seconds only, with a schedule": (
        lambda: fit({"budget": steep.Budget(seconds=1), "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR}),
        r"needs a horizon",
    ),
}
FITS = {
    "the recipe's factory": (lambda: steep.fit(recipe), r"fit takes a steep.Recipe"),
    "a model": (lambda: steep.fit(nn.Linear(2, 2)), r"fit takes a steep.Recipe"),
    "seed of a half": (lambda: fit(seed=0.5), r"seed=0.5 must be a whole number"),
    "negative seed": (lambda: fit(seed=-1), r"seed=-1 must be"),
    "negative split seed": (lambda: fit(split_seed=-3), r"split_seed=-3 must be"),
    "unknown precision": (lambda: fit(precision="half"), r"precision='half' must be 'no', 'bf16' or 'fp16'"),
    "unknown device": (lambda: fit(device="tpu"), r"device='tpu' must be"),
    "no parts": (lambda: fit(accumulate=0), r"accumulate=0 must be"),
    "half parts": (lambda: fit(accumulate=1.5), r"accumulate=1.5 must be"),
    "never evaluated": (lambda: fit(evaluate_every=0), r"evaluate_every=0 must be"),
    "evaluated every half step": (lambda: fit(evaluate_every=0.5), r"evaluate_every=0.5 must be"),
    "saved at negative times": (lambda: fit(save_every=-1.0), r"save_every=-1.0 must"),
    "unknown tracker": (lambda: fit(log="tensorbord"), r"tensorbord"),
    "model frozen": (lambda: fit({"model": Frozen}), r"no parameter to train"),
    "data returns loaders": (
        lambda: fit({"data": lambda g: (loaders().train, loaders().val)}),
        r"must return a steep.Data",
    ),
    "data without generator": (lambda: fit({"data": lambda: loaders()}), r"data.*generator"),
    "a mean as loss, and Sven": (
        lambda: steep.fit(steep.method("sven")(recipe(loss=F.cross_entropy)), progress=False),
        r"needs one loss per example.*reduction='none'",
    ),
    "loss of another shape": (
        lambda: fit({"loss": lambda o, t: F.cross_entropy(o, t, reduction="none")[:3]}),
        r"one number per example, shape \(8,\), but returned \(3,\)",
    ),
    "loss of integers": (lambda: fit({"loss": lambda o, t: o.argmax(-1)}), r"must return a floating-point tensor"),
    "loss of floats": (lambda: fit({"loss": lambda o, t: 1.0}), r"must return a floating-point tensor, got float"),
    "loss without a graph": (
        lambda: fit({"loss": lambda o, t: cross_entropy(o.detach(), t)}),
        r"depend on no parameter of the model",
    ),
    "inputs with NaN": (on([(X[:8] * NAN, Y[:8])]), r"the inputs of this batch contain NaN"),
    "diverging": (
        lambda: fit(
            {
                "loss": lambda o, t: (o[:, 0] - t).square(),
                "optimizer": lambda p: torch.optim.SGD(p, lr=1e30),
                "budget": steep.Budget(steps=20),
            }
        ),
        r"not finite.*lower the learning rate",
    ),
    "two methods on one part": (
        lambda: steep.compose(recipe(), [(steep.method("adabelief"), {}), (steep.method("adamp"), {})]),
        r"both replace the recipe's optim",
    ),
}
LOADERS = {
    "a generator": (on(x for x in [(X, Y)]), r"can be read only once"),
    "an iterable data set": (on(DataLoader(Stream(), 8)), r"number of batches of train is unknown.*__len__"),
    "a data set without length": (
        on(DataLoader(NoLength(), 8, sampler=iter(range(8)))),
        r"number of batches of train is unknown",
    ),
    "a data set": (on(TensorDataset(X, Y)), r"TensorDataset.* is no loader: give a DataLoader"),
    "a tensor": (on(X), r"inputs without targets|batch"),
    "None": (on(None), r"train is None, which is no loader"),
    "nothing": (on([]), r"the data are empty"),
    "no example left by drop_last": (
        on(DataLoader(TensorDataset(X, Y), 32, drop_last=True)),
        r"data are empty|no batch",
    ),
    "inputs alone": (on(DataLoader(TensorDataset(X), 8)), r"inputs without targets.*steep.adapt"),
    "one tensor": (on([X[:8]]), r"inputs without targets.*steep.adapt"),
    "lengths as indices": (on(DataLoader(triples, 8)), r"comes twice in an epoch.*steep.adapt"),
    "weights as indices": (on(DataLoader(weighted, 8)), r"cannot be the examples' indices.*weights"),
    "four parts": (on(DataLoader(quadruples, 8)), r"steep.adapt"),
    "a string": (on(["abc"]), r"steep.adapt"),
    "None in a list": (on([None]), r"steep.adapt"),
    "a dict without targets": (on([{"x": X, "z": Y}]), r"no targets.*steep.adapt"),
    "a dict with two": (on([{"x": X, "label": Y, "target": Y}]), r"several that could be the targets"),
    "arrays": (on([(X.numpy(), Y.numpy())]), r"NumPy array.*steep expects tensors"),
    "examples not joined": (on(DataLoader(TensorDataset(X, Y), 8, collate_fn=list)), r"not joined to one batch"),
    "one example": (on([(X[0], Y[0])]), r"no batch dimension"),
    "BatchNorm and one example": (
        on(DataLoader(TensorDataset(X[:17], Y[:17]), 8), model=WithNorm),
        r"last batch of an epoch has one example.*drop_last=True",
    ),
    "adapt without a function": (lambda: steep.adapt(loaders().train, None), r"adapt\(loader, function\) got"),
    "adapt without a loader": (lambda: steep.adapt(3, len), r"adapt\(loader, function\) got"),
    "adapt to nothing": (on(steep.adapt(loaders().train, lambda item: None)), r"None"),
    "weights that do not fit": (
        on([steep.Batch(X[:8], Y[:8], weights=torch.ones(7))]),
        r"weights of shape \(7,\) need one loss per example",
    ),
    "negative weights": (on([steep.Batch(X[:8], Y[:8], weights=-torch.ones(8))]), r"weights.*at least 0"),
    "arrays to split": (split(X.numpy(), Y), r"not a tensor: use torch.as_tensor"),
    "lengths that differ": (split(X, Y[:7]), r"24.*7|7.*24"),
    "an empty part": (split(X, Y, val=0.01), r"val"),
    "parts over one": (split(X, Y, val=0.6, test=0.6), r"val.*test"),
    "a batch larger than the data": (lambda: steep.tensor_loader(X, Y, 100), r"batch_size=100 must lie between"),
    "batches of none": (lambda: steep.tensor_loader(X, Y, 0), r"batch_size=0 must be"),
    "clients of a bad alpha": (
        lambda: steep.dirichlet_clients(X, Y, torch.Generator(), clients=3, alpha=0.0, batch_size=2),
        r"alpha=0.0 must lie",
    ),
    "domains of another length": (
        lambda: steep.Data(loaders().train, loaders().val, domains=torch.zeros(3)),
        r"domains must have shape \(16,\)",
    ),
}
METHODS = {
    "unknown": (lambda: steep.method("adabelif"), r"unknown method 'adabelif'; did you mean 'adabelief'"),
    "unknown task": (lambda: steep.task("digit"), r"digit.*did you mean 'digits'"),
    "unknown hyper-parameter": (run("adabelief", beta=0.9), r"no hyper-parameter 'beta'; did you mean 'betas'"),
    "a text for a number": (run("adabelief", lr="high"), r"lr='high' must be of type float"),
    "negative rate": (run("adabelief", lr=-1.0), r"lr=-1.0 must lie"),
    "nan rate": (run("adabelief", lr=NAN), r"lr=nan must lie"),
    "one beta": (run("adabelief", betas=(0.9,)), r"betas=\(0.9,\) must be 2 numbers"),
    "beta of one": (run("adabelief", betas=(0.9, 1.0)), r"betas\[1\]=1.0 must lie"),
    "a probe as an arm": (run("ntk"), r"used on its own"),
    "applied to a model": (lambda: steep.method("adabelief")(nn.Linear(2, 2)), r"takes a steep.Recipe"),
    "needs indices": (
        lambda: steep.fit(
            steep.method("ps-kd")(recipe(data=lambda g: steep.Data(DataLoader(TensorDataset(X, Y), 8), loaders().val))),
            progress=False,
        ),
        r"needs the index of every example.*steep.Indexed",
    ),
    "needs clients": (run("fedavg"), r"needs training data divided among clients.*dirichlet_clients"),
    "needs images": (run("efficienttrain"), r"expected square images"),
    "needs independent examples": (
        lambda: steep.fit(steep.method("sven")(recipe(model=WithNorm)), progress=False),
        r"needs examples that do not influence each other.*GroupNorm",
    ),
    "optimizer without parameters": (lambda: AdaBelief([]), r"empty parameter list|no parameters"),
    "optimizer on a model": (lambda: AdaBelief(nn.Linear(2, 2)), r"parameters"),
    "optimizer on a tensor": (lambda: AdamP(X), r"parameters|iterable"),
    "rule on parameters": (lambda: Sven(nn.Linear(2, 2).parameters()), r"need the model itself, an nn.Module"),
    "rule with a bad rank": (lambda: Sven(nn.Linear(2, 2), rank=0), r"rank=0 must"),
    "rule with a bad rtol": (lambda: Sven(nn.Linear(2, 2), rtol=2.0), r"rtol=2.0 must lie"),
    "rule on a mean": (lambda: Sven(nn.Linear(4, 1))(X.mean()), r"one loss per example|loss"),
    "rule on foreign losses": (lambda: Sven(nn.Linear(4, 1))(torch.rand(4)), r"depend on no parameter that trains"),
    "rule on an array": (lambda: Sven(nn.Linear(4, 1))(np.ones(4)), r"losses is a ndarray, not a tensor"),
    "system of an array": (lambda: cg(lambda v: v, np.ones(3)), r"b is a ndarray, not a tensor"),
    "minimum from a list": (lambda: minimize(lambda x: x.square().sum(), [1.0]), r"x is a list, not a tensor"),
    "kernel of an array": (lambda: empirical_ntk(nn.Linear(4, 1), X.numpy()), r"x is a ndarray, not a tensor"),
    "rule on losses of nothing": (
        lambda: Spring(nn.Linear(4, 1))(torch.zeros(0, requires_grad=True)),
        r"empty|no losses|0",
    ),
    "damping below zero": (lambda: LevenbergMarquardt(nn.Linear(4, 1), damping=-1.0), r"damping=-1.0 must"),
    "memory of no examples": (lambda: PSKD(0, total_steps=3, steps_per_epoch=1), r"num_examples=0 must"),
    "roles of nothing": (
        lambda: steep.param_roles(nn.Linear(2, 2), overrides={"3.*": "norm"}),
        r"matches no parameter",
    ),
    "an unknown role": (
        lambda: steep.param_roles(nn.Linear(2, 2), overrides={"*": "big"}),
        r"'big'] ?is not a role|not a role",
    ),
    "groups of an unknown role": (lambda: steep.param_groups(nn.Linear(2, 2), {"norms": {}}), r"fits no parameter"),
}
COMPARISONS = {
    "two in one text": (compare("adabelief,sven"), r"separate several by spaces"),
    "unknown": (compare(["adabelif"]), r"unknown method 'adabelif'; did you mean"),
    "twice": (compare(["adabelief", "adabelief"]), r"twice|adabelief"),
    "a pair of a name and a function": (compare([("mine", lambda r: r)]), r"must be \(id, {name: value}\)"),
    "all and another": (compare(["all", "adabelief"]), r"'all' stands for every method"),
    "a join without an end": (compare(["sven+"]), r"a method's id is missing"),
    "a value without a name": (compare(["adabelief:lr"]), r"write a hyper-parameter as adabelief:lr=VALUE"),
    "a method in no file": (compare(["nowhere.py:method"]), r"nowhere.py"),
    "no seeds": (compare(["adabelief"], seeds=0), r"seeds=0 must"),
    "half a trial": (compare(["adabelief"], trials=0.5), r"trials=0.5 must"),
    "no minutes": (compare(["adabelief"], minutes=0), r"minutes=0 must"),
    "nan minutes": (compare(["adabelief"], minutes=NAN), r"minutes=nan must"),
    "unknown score": (compare(["adabelief"], score="accuracy"), r"accuracy.*loss"),
    "unknown hyper-parameter": (compare([("adabelief", {"beta": 1})]), r"no hyper-parameter 'beta'"),
    "a recipe that does not exist": (compare(["adabelief"], "nowhere.py:recipe"), r"nowhere.py"),
    "a task that does not exist": (compare(["adabelief"], "digit"), r"digit.*did you mean 'digits'"),
    "a model for a recipe": (compare(["adabelief"], nn.Linear(2, 2)), r"[Rr]ecipe"),
    "an arm that needs what is missing": (compare(["fedavg"]), r"fedavg.*clients"),
}
GROUPS = {"recipe": RECIPES, "fit": FITS, "loader": LOADERS, "method": METHODS, "compare": COMPARISONS}
CASES = [(f"{group}: {name}", *case) for group, cases in GROUPS.items() for name, case in cases.items()]


@pytest.mark.parametrize(("use", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
@pytest.mark.filterwarnings("ignore:train and val share")
def test_a_wrong_use_is_one_clear_sentence(use, message, tmp_path):
    arguments = (tmp_path,) if use.__code__.co_argcount else ()
    with pytest.raises((TypeError, ValueError, KeyError, OSError, ArithmeticError), match=message) as caught:
        use(*arguments)
    last = traceback.extract_tb(caught.value.__traceback__)[-1].filename
    ours = Path(last).is_relative_to(ROOT) or last.endswith(
        "torch/optim/optimizer.py"
    )  # optimizers keep torch's contract
    assert ours, f"raised in {last}: {caught.value}"


def test_the_list_is_long():
    assert len(CASES) >= 100

"""Every task keeps the contract of a recipe: cheap to list, seeded, picklable, one loss per example, trainable."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import steep
from steep import tasks as package
from steep.tasks import Task, task, tasks
from steep.tasks._files import data_directory

NAMES = [name for known in tasks().values() for name in known.names]
FILES = {"uci": "tabular/yacht.npz", "mnist10k": "image/mnist10k.npz"} | {
    f"uci:{name}": f"tabular/{name}.npz" for name in tasks()["uci"].variants
}


def recipe_of(name):
    if name in FILES and not (data_directory() / FILES[name]).exists():
        pytest.skip(f"needs {FILES[name]} in STEEP_DATA")
    return task(name)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def contents(loader):
    batches = list(loader)
    order = torch.cat([b[2] for b in batches]).argsort()
    return [torch.cat([b[i] for b in batches])[order] for i in (0, 1)]


@pytest.fixture(params=[n for n in NAMES if ":" not in n or n in ("uci:power", "photo:flower", "mnist1d:mlp")])
def recipe(request):
    return recipe_of(request.param)


def test_tasks_are_found_by_walking_the_modules():
    modules = {p.stem for p in Path(package.__path__[0]).glob("[!_]*.py")}
    defining = {
        m for m in modules for value in vars(sys.modules[f"steep.tasks.{m}"]).values() if isinstance(value, Task)
    }
    assert modules - defining == {"networks"}
    assert all(name == found.name for name, found in tasks().items())


def test_listing_loads_no_data_library():
    code = "import sys, steep.tasks as t; t.tasks(); print({'sklearn', 'scipy.ndimage', 'PIL'} & set(sys.modules))"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert listed.stdout.strip() == "set()", listed.stderr


def test_names_with_variants_reach_build():
    assert task("mnist1d").name == task("mnist1d:cnn").name == "mnist1d:cnn"
    assert task("mnist1d:mlp").name == "mnist1d:mlp"
    assert task("uci:kin40k").name == "uci:kin40k"


def test_options_reach_build():
    assert len(task("polynomial", examples=500, batch_size=50).data(generator()).train) == 10
    assert task("chars", steps=7).budget.steps == 7
    with pytest.raises(TypeError, match="widht"):
        task("digits", widht=3)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("digit", "'digits'"), ("uci:yatch", "'uci:yacht'"), ("photo:chna", "'photo:china'"), ("digits:", "'digits'")],
)
def test_an_unknown_name_brings_the_nearest(wrong, near):
    with pytest.raises(steep.UnknownName) as caught:
        task(wrong)
    assert str(caught.value).startswith(f"unknown task {wrong!r}; did you mean")
    assert near in str(caught.value)


def test_two_tasks_of_one_name_are_refused(monkeypatch):
    import steep.tasks.digits as module

    monkeypatch.setattr(module, "SECOND", Task("digits", "", module._digits), raising=False)
    with pytest.raises(ValueError, match="two tasks share the name 'digits'"):
        tasks.__wrapped__()


@pytest.mark.parametrize("found", tasks().values(), ids=lambda found: found.name)
def test_summaries_are_one_sentence(found):
    assert 20 < len(found.summary) < 120
    assert found.summary.endswith(".")


def test_recipes_can_be_pickled(recipe):
    copy = pickle.loads(pickle.dumps(recipe))
    assert copy.name == recipe.name
    assert copy.budget == recipe.budget
    torch.manual_seed(0)
    before = recipe.model().state_dict()
    torch.manual_seed(0)
    assert all(torch.equal(v, before[k]) for k, v in copy.model().state_dict().items())


def test_the_split_depends_on_the_generator_alone(recipe):
    torch.manual_seed(1)
    first = recipe.data(generator(5))
    torch.manual_seed(2)
    again, other = recipe.data(generator(5)), recipe.data(generator(6))
    for part in ("train", "val"):
        (x, y), (x2, y2), (x3, y3) = (contents(getattr(d, part)) for d in (first, again, other))
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
        assert recipe.name == "rosenbrock" or not (torch.equal(x, x3) and torch.equal(y, y3))


def test_one_loss_and_one_score_per_example(recipe):
    data = recipe.data(generator())
    x, y, indices = next(iter(data.train))
    model = recipe.model()
    output = model(x)
    losses = recipe.loss(output, y)
    assert losses.shape == indices.shape == (len(x),)
    assert losses.isfinite().all()
    one = torch.stack([recipe.loss(model(x[i : i + 1]), y[i : i + 1])[0] for i in range(2)])
    torch.testing.assert_close(losses[:2], one, rtol=1e-4, atol=1e-5)
    if y.is_floating_point():
        assert output.shape == y.shape, "a target of another shape would broadcast"
    if recipe.metric:
        assert recipe.metric.function(output, y).shape == (len(x),)
        assert recipe.metric.higher_is_better == (recipe.metric.name == "accuracy")


def test_runs_are_equal_bit_for_bit_and_seeds_differ(recipe):
    recipe = recipe.replace(budget=steep.Budget(steps=3))
    runs = [steep.fit(recipe, seed=seed, split_seed=0, progress=False, evaluate_every=9) for seed in (0, 0, 1)]
    assert runs[0].history.losses == runs[1].history.losses
    assert runs[0].history.losses != runs[2].history.losses
    assert runs[0].val.keys() == runs[0].test.keys() == {"loss", *([recipe.metric.name] if recipe.metric else [])}


def test_the_learning_rate_falls_to_zero_over_the_budget(recipe):
    optimizer = recipe.optimizer(recipe.model().parameters())
    if recipe.rounds is not None:
        assert recipe.scheduler is None
        return
    scheduler = recipe.scheduler(optimizer, 10)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_evaluation_is_not_dearer_than_training(recipe):
    """25 evaluations are made in a training run: they must not dominate the wall time."""
    data = recipe.data(generator())
    horizon = recipe.budget.total_steps(len(data.train))
    if recipe.rounds is not None:
        return
    batch = len(next(iter(data.train))[0])
    validated = 25 * steep.splits.count_examples(data.val)
    assert validated < 3 * 1.5 * horizon * batch, "a training step costs three forward passes"

"""Common checks that every method must pass: ours and anybody's.

``check_method(card)`` runs them all; ``checks(card)`` yields them by name, to be parametrised over:

    @pytest.mark.parametrize(("name", "check"), steep.testing.checks(my_card))
    def test_common(name, check):
        check()

A check that fails raises `AssertionError` with a sentence that says what a user would have met. They run the method
in a tiny recipe that offers everything a method may need: labelled images, indices, clients, domains, a small network.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import io
import math
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steep.batches import Data, dirichlet_clients, split_loaders
from steep.fit import Result, fit
from steep.loop.training import NonFinite, Training, accelerator
from steep.method import Choice, Method, Range
from steep.recipe import Budget, Recipe
from steep.requires import REQUIREMENTS
from steep.testing import optimizers as optimizer_contract

STEPS = 24  # three epochs, so that memories of an earlier epoch and phases of a schedule come into play
ROUNDS = 6  # of methods with an outer loop, each of many steps

Check = Callable[[], None]


def tiny_recipe(dtype: torch.dtype = torch.float32) -> Recipe:
    """Three classes of 8 x 8 images (64 for training, 8 a batch), a convolution, GroupNorm, two linear layers."""
    numbers = torch.Generator().manual_seed(0)
    patterns = torch.randn(3, 1, 8, 8, generator=numbers)
    labels = torch.arange(96) % 3
    images = (patterns[labels] + torch.randn(96, 1, 8, 8, generator=numbers)).to(dtype)

    def data(generator: torch.Generator) -> Data:
        split = split_loaders(images, labels, generator, batch_size=8, val=1 / 6, test=1 / 6)
        clients = dirichlet_clients(images, labels, generator, clients=8, alpha=1.0, batch_size=4)
        return dataclasses.replace(split, clients=clients, domains=torch.arange(64) % 4)

    def model() -> nn.Module:
        body = (nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        return nn.Sequential(*body, nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)).to(dtype)

    return Recipe(
        data=data,
        model=model,
        loss=lambda output, target: F.cross_entropy(output, target, reduction="none"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        budget=Budget(steps=STEPS),
        name="tiny",
    )


def steps(method: Method) -> int:
    """Length of the checks' trainings, in optimizer steps or rounds."""
    return ROUNDS if method.changes == "rounds" else STEPS


def recipe_for(method: Method) -> Recipe:
    """The tiny recipe, as long as suits the method."""
    return tiny_recipe().replace(budget=Budget(steps=steps(method)))


def checks(method: Method) -> Iterator[tuple[str, Check]]:
    """The checks that apply to a method, by name."""
    wanted = [*DESCRIBING, *(TRAINING if method.is_arm else ())]
    if method.changes == "rounds":  # state grows until every client has been visited
        wanted.remove(leaks_nothing)
    if isinstance(method.make, type) and issubclass(method.make, torch.optim.Optimizer):
        wanted += optimizer_contract.CHECKS
    for check in wanted:
        yield check.__name__, functools.partial(check, method)


def check_method(method: Method) -> None:
    """Run every check that applies; the first that fails raises `AssertionError`.

    Example:
        >>> import steep
        >>> steep.testing.check_method(steep.method("ps-kd"))
    """
    for name, check in checks(method):
        try:
            check()
        except Exception as error:
            raise AssertionError(f"{method.id}: {name}: {error}") from error


def run(method: Method, recipe: Recipe | None = None, **hyper: Any) -> Result:
    """Train the tiny recipe with the method in it."""
    return fit(method(recipe or recipe_for(method), **hyper), progress=False, device="cpu")


def trajectory(result: Result) -> tuple[list[float], list[Tensor]]:
    """Every step's loss, and the final parameters and buffers."""
    return result.history.losses, list(result.model.state_dict().values())


def same(a: tuple[list[float], list[Tensor]], b: tuple[list[float], list[Tensor]]) -> bool:
    """Whether two trajectories are equal bit for bit."""
    return a[0] == b[0] and len(a[1]) == len(b[1]) and all(map(torch.equal, a[1], b[1]))


# ---- what a method says about itself


def documented(method: Method) -> None:
    doc = inspect.getdoc(method.make) or ""
    assert method.summary, "has no docstring"
    missing = [name for name in method.hyper if name not in doc]
    assert not missing, f"its docstring does not say what {missing} are"
    assert method.paper.link, "its paper has no link"


def tunable(method: Method) -> None:
    for name, values in method.search_space.items():
        assert contains(values, method.hyper[name]), f"the default {name}={method.hyper[name]!r} is outside {values}"


def contains(values: Range | Choice, value: Any) -> bool:
    """Whether `value` is among the values to tune over."""
    if isinstance(values, Choice):
        return value in values.options
    return isinstance(value, (int, float)) and values.low <= value <= values.high


# ---- in a training


def learns_something_else(method: Method) -> None:
    result, baseline = run(method), fit(recipe_for(method), progress=False, device="cpu")
    assert all(map(math.isfinite, result.history.losses)), "its loss is not finite on an easy problem"
    assert not same(trajectory(result), trajectory(baseline)), "does nothing: the training is the baseline's"


def deterministic(method: Method) -> None:
    assert same(trajectory(run(method)), trajectory(run(method))), "two seeded runs differ"


def resumes_exactly(method: Method) -> None:
    for stop in (1, steps(method) // 2, steps(method) - 2):
        assert same(resumed(method, stop), straight(method)), f"a run resumed at step {stop} differs"


def leaves_callers_random_numbers_alone(method: Method) -> None:
    before = torch.get_rng_state()
    run(method)
    assert torch.equal(before, torch.get_rng_state()), "draws from the caller's generator"


def leaks_nothing(method: Method) -> None:
    training = start(method)
    counts = []
    for step in range(steps(method)):
        training.advance()
        if step >= steps(method) // 2:
            gc.collect()
            counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
    half = len(counts) // 2
    assert min(counts[half:]) <= max(counts[:half]), f"the number of live tensors grows: {counts}"


def every_flag_has_an_effect(method: Method) -> None:
    default = trajectory(run(method))
    dead = [
        name for name in method.hyper if name not in method.performance_flags and not _has_effect(method, name, default)
    ]
    assert not dead, (
        f"changing {dead} changes nothing (name them in Method.performance_flags, or give Method.test_values)"
    )


def performance_flags_change_nothing(method: Method) -> None:
    default = run(method)
    for name in method.performance_flags:
        for value in _others(method, name):
            other = run(method, **{name: value})
            _assert_close(trajectory(other), trajectory(default), f"{name}={value!r} changes the result")


def refuses_bad_values(method: Method) -> None:
    for name, default in method.hyper.items():
        if isinstance(default, bool) or not isinstance(default, (int, float)) or name == "seed":
            continue
        _assert_refused(method, name, math.nan)
        _assert_refused(method, name, "a lot")


def refuses_unmet_requirements(method: Method) -> None:
    for requirement, recipe in poorer_recipes().items():
        if requirement in method.requires:
            _assert_raises(functools.partial(run, method, recipe), REQUIREMENTS[requirement].what.split(" (")[0])


def can_be_sent_to_a_worker(method: Method) -> None:
    sent = cloudpickle.loads(cloudpickle.dumps(method(recipe_for(method))))
    assert same(trajectory(fit(sent, progress=False, device="cpu")), trajectory(run(method))), "differs once pickled"


def start(method: Method, recipe: Recipe | None = None, **hyper: Any) -> Training:
    """The parts of a training with the method in it, before its first step."""
    torch.manual_seed(0)
    training = Training(method(recipe or recipe_for(method), **hyper), 0, 0, accelerator("cpu", "no"))
    training.check()
    return training


def straight(method: Method) -> tuple[list[float], list[Tensor]]:
    """The trajectory of an undisturbed training."""
    with torch.random.fork_rng():
        training = start(method)
        for _ in range(steps(method)):
            training.advance()
        return training.history.losses, list(training.model.state_dict().values())


def resumed(method: Method, stop: int) -> tuple[list[float], list[Tensor]]:
    """The trajectory of a training that was saved at step `stop`, and went on in new objects."""
    with torch.random.fork_rng():
        first = start(method)
        for _ in range(stop):
            first.advance()
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        second = start(method)
        second.load_state_dict(state, "memory")
        for _ in range(steps(method) - stop):
            second.advance()
        return second.history.losses, list(second.model.state_dict().values())


def poorer_recipes() -> dict[str, Recipe]:
    """The tiny recipe without one thing a method may need, by the name of the need."""
    whole = tiny_recipe()

    def scalar(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    def coupled() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def without(change: Callable[[Any], Any]) -> Callable[[torch.Generator], Data]:
        def data(generator: torch.Generator) -> Data:
            full = whole.data(generator)
            train, val = ([change(batch) for batch in loader] for loader in (full.train, full.val))
            return Data(train, val)

        return data

    return {
        "losses": whole.replace(loss=scalar),
        "independent_examples": whole.replace(model=coupled),
        "indices": whole.replace(data=without(lambda batch: batch[:2])),
        "clients": whole.replace(data=without(lambda batch: batch)),
        "domains": whole.replace(data=without(lambda batch: batch)),
        "images": whole.replace(
            data=without(lambda batch: (batch[0].flatten(1), *batch[1:])),
            model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
        ),
        "classes": whole.replace(
            data=without(lambda batch: (batch[0], batch[1].float(), batch[2])),
            loss=lambda output, target: (output[:, 0] - target).square(),
        ),
    }


def has_compiler() -> bool:
    """Whether `torch.compile` finds a C++ compiler."""
    return any(map(shutil.which, ("g++", "clang++", "c++")))


def _others(method: Method, name: str) -> list[Any]:
    """Other values of a hyper-parameter that should be allowed."""
    default, values = method.hyper[name], method.search_space.get(name)
    if name == "compile" and not has_compiler():
        return []
    if name in method.test_values:
        return [method.test_values[name]]
    if isinstance(values, Choice):
        return [v for v in values.options if v != default]
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, tuple):
        return [(default[0] / 2, *default[1:])]
    if name == "eps":
        return [1e-2]
    if isinstance(default, int):
        return [default + 1, max(1, default // 2)]
    return [default * 0.5, default * 0.9] if default else [0.1]


def _has_effect(method: Method, name: str, default: tuple[list[float], list[Tensor]]) -> bool:
    for value in _others(method, name):
        try:
            changed = trajectory(run(method, **{name: value}))
        except ValueError:
            continue  # a guess outside the allowed range
        except NonFinite:
            return True
        if not same(changed, default):
            return True
    return False


def _assert_refused(method: Method, name: str, value: Any) -> None:
    _assert_raises(lambda: run(method, **{name: value}), name)


def _assert_raises(action: Callable[[], Any], says: str) -> None:
    """The action must raise a `ValueError` or `TypeError` whose message contains `says`."""
    try:
        action()
    except (ValueError, TypeError) as error:
        assert says in str(error), f"the message does not mention {says!r}: {error}"
        return
    raise AssertionError(f"accepts what it cannot use, where the message should mention {says!r}")


def _assert_close(a: tuple[list[float], list[Tensor]], b: tuple[list[float], list[Tensor]], message: str) -> None:
    for p, q in zip(a[1], b[1], strict=True):
        assert torch.allclose(p.double(), q.double(), rtol=1e-4, atol=1e-5), message


DESCRIBING = (documented, tunable)
TRAINING = (
    learns_something_else,
    deterministic,
    resumes_exactly,
    leaves_callers_random_numbers_alone,
    leaks_nothing,
    every_flag_has_an_effect,
    performance_flags_change_nothing,
    refuses_bad_values,
    refuses_unmet_requirements,
    can_be_sent_to_a_worker,
)

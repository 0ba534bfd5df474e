"""Common checks that every method must pass: ours and anybody's.

``check_method(method)`` runs them all; ``checks(method)`` yields them by name, to be parametrised over:

    @pytest.mark.parametrize(("name", "check"), steep.testing.checks(my_method))
    def test_common(name, check):
        check()

A check that fails raises `AssertionError` with a sentence that says what a user would have met. They run the method
in a tiny recipe that offers everything a method may require: labelled images, indices, clients, domains, a small
network. What a run with the defaults gives is computed once and shared by the checks of a method.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import io
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steep.fit import Result, fit
from steep.loop.training import NonFinite, Training, accelerator
from steep.method import Choice, Method, Range
from steep.recipe import Budget, Recipe
from steep.requires import REQUIREMENTS
from steep.splits import Data, dirichlet_clients, split_loaders
from steep.testing import handles, optimizers, rules
from steep.utils.randomness import stream_seed

STEPS = 24  # three epochs, so that memories of an earlier epoch and phases of a schedule come into play
ROUNDS = 4  # of methods with an outer loop, each of many steps

Check = Callable[[], None]
Trajectory = tuple[list[float], list[Tensor]]


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


class Subject:
    """A method under test, and the runs of it that several checks look at, each made when it is first asked for."""

    def __init__(self, method: Method):
        self.method = method
        self.steps = ROUNDS if method.changes == "rounds" else STEPS
        self.recipe = tiny_recipe().replace(budget=Budget(steps=self.steps))

    def run(self, recipe: Recipe | None = None, **hyper: Any) -> Result:
        """Train the tiny recipe with the method in it."""
        return fit(self.method(recipe or self.recipe, **hyper), progress=False, device="cpu")

    def trajectory(self, **hyper: Any) -> Trajectory:
        return trajectory(self.run(**hyper))

    @functools.cached_property
    def default(self) -> Trajectory:
        """The trajectory with the defaults."""
        return self.trajectory()

    def start(self, **hyper: Any) -> Training:
        """The parts of a training run with the method in it, before its first step; the random state is `fit`'s."""
        torch.manual_seed(stream_seed(0, "model"))
        training = Training(self.method(self.recipe, **hyper), 0, 0, accelerator("cpu", "no"))
        training.check()
        return training


def checks(method: Method) -> Iterator[tuple[str, Check]]:
    """The checks that apply to a method, by name."""
    wanted = [*DESCRIBING, *(TRAINING if method.is_arm else ())]
    if method.changes == "rounds":  # state grows until every client has been visited
        wanted.remove(leaks_nothing)
    subject = Subject(method)
    for check in wanted:
        yield check.__name__, functools.partial(check, subject)
    for contract in _contract(method):
        yield contract.__name__, functools.partial(contract, method)


def _contract(method: Method) -> Sequence[Callable[[Method], None]]:
    """The checks of the PyTorch type that a method is of."""
    if isinstance(method.make, type) and issubclass(method.make, torch.optim.Optimizer):
        return optimizers.CHECKS
    if method.changes == "models":
        return handles.CHECKS
    return rules.CHECKS if method.changes == "backward" and method.apply is None else ()


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


def trajectory(result: Result) -> Trajectory:
    """Every step's loss, and the final parameters and buffers."""
    return result.history.losses, list(result.model.state_dict().values())


def same(a: Trajectory, b: Trajectory) -> bool:
    """Whether two trajectories are equal bit for bit."""
    return a[0] == b[0] and len(a[1]) == len(b[1]) and all(map(torch.equal, a[1], b[1]))


# ---- what a method says about itself


def documented(subject: Subject) -> None:
    method = subject.method
    doc = inspect.getdoc(method.make) or ""
    assert method.summary, "has no docstring"
    missing = [name for name in method.hyper if name not in doc and not (name == "lr" and method.sgd_lr is not None)]
    assert not missing, f"its docstring does not say what {missing} are"
    assert method.paper.link, "its paper has no link"


def tunable(subject: Subject) -> None:
    for name, values in subject.method.search_space.items():
        default = subject.method.hyper[name]
        assert contains(values, default), f"the default {name}={default!r} is outside {values}"


def contains(values: Range | Choice, value: Any) -> bool:
    """Whether `value` is among the values to tune over."""
    if isinstance(values, Choice):
        return value in values.options
    return isinstance(value, (int, float)) and values.low <= value <= values.high


# ---- in a training run


def learns_something_else(subject: Subject) -> None:
    assert all(map(math.isfinite, subject.default[0])), "its loss is not finite on an easy problem"
    assert not same(subject.default, _baseline(subject.steps)), "does nothing: the run is the baseline's"


@functools.cache
def _baseline(steps: int) -> Trajectory:
    return trajectory(fit(tiny_recipe().replace(budget=Budget(steps=steps)), progress=False, device="cpu"))


def deterministic(subject: Subject) -> None:
    assert same(subject.default, subject.trajectory()), "two seeded runs differ"


def resumes_exactly(subject: Subject) -> None:
    steps = len(subject.default[0])
    for stop in sorted({1, steps // 2, steps - 2}):
        assert same(resumed(subject, stop), subject.default), f"a run resumed at step {stop} differs"


def leaves_callers_random_numbers_alone(subject: Subject) -> None:
    before = torch.get_rng_state()
    subject.run(subject.recipe.replace(budget=Budget(steps=min(4, subject.steps))))
    assert torch.equal(before, torch.get_rng_state()), "draws from the caller's generator"


def leaks_nothing(subject: Subject) -> None:
    with torch.random.fork_rng():
        training, counts = subject.start(), []
        gc.collect()
        gc.freeze()  # what is there already need not be walked again: that made this check ten times as slow
        try:
            for step in range(subject.steps):
                training.advance()
                if step >= subject.steps // 2:
                    gc.collect()
                    counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
        finally:
            gc.unfreeze()
    half = len(counts) // 2
    assert min(counts[half:]) <= max(counts[:half]), f"the number of live tensors grows: {counts}"


def every_flag_has_an_effect(subject: Subject) -> None:
    method = subject.method
    dead = [name for name in method.hyper if name not in method.performance_flags and not _has_effect(subject, name)]
    assert not dead, f"changing {dead} changes nothing (name them in performance_flags, or give test_values)"


def performance_flags_change_nothing(subject: Subject) -> None:
    for name in subject.method.performance_flags - {"compile"}:  # kernels take seconds to build: tests of their own
        for value in _others(subject.method, name):
            other = subject.trajectory(**{name: value})
            _assert_close(other, subject.default, f"{name}={value!r} changes the result")


def refuses_bad_values(subject: Subject) -> None:
    for name, default in subject.method.hyper.items():
        if isinstance(default, bool) or not isinstance(default, (int, float)) or name == "seed":
            continue
        for value in (math.nan, "a lot"):
            _assert_raises(functools.partial(subject.trajectory, **{name: value}), name)


def refuses_unmet_requirements(subject: Subject) -> None:
    for requirement, recipe in poorer_recipes().items():
        if requirement in subject.method.requires:
            says = REQUIREMENTS[requirement].what.split(" (")[0]
            _assert_raises(functools.partial(subject.run, recipe), says)


def can_be_sent_to_a_worker(subject: Subject) -> None:
    sent = cloudpickle.loads(cloudpickle.dumps(subject.method(subject.recipe)))
    assert same(trajectory(fit(sent, progress=False, device="cpu")), subject.default), "differs once pickled"


def resumed(subject: Subject, stop: int) -> Trajectory:
    """The trajectory of a run that was saved at step `stop`, and went on in new objects."""
    with torch.random.fork_rng():
        first = subject.start()
        for _ in range(stop):
            first.advance()
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        second = subject.start()
        second.load_state_dict(state, "memory")
        while not second.finished():
            second.advance()
        return second.history.losses, list(second.model.state_dict().values())


def poorer_recipes() -> dict[str, Recipe]:
    """The tiny recipe without one thing a method may require, by the name of the requirement."""
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


def _has_effect(subject: Subject, name: str) -> bool:
    for value in _others(subject.method, name):
        try:
            if _differs(subject, **{name: value}):
                return True
        except ValueError:
            continue  # a guess outside the allowed range
        except NonFinite:
            return True
    return False


def _differs(subject: Subject, **hyper: Any) -> bool:
    """Whether a run leaves the trajectory with the defaults; it ends at the first loss that differs."""
    losses, final = subject.default
    with torch.random.fork_rng():
        training = subject.start(**hyper)
        for expected in losses:
            if training.finished():
                return True
            training.advance()
            if training.history.losses[-1] != expected:
                return True
        return not training.finished() or not all(map(torch.equal, training.model.state_dict().values(), final))


def _assert_raises(action: Callable[[], Any], says: str) -> None:
    """The action must raise a `ValueError` or `TypeError` whose message contains `says`."""
    try:
        action()
    except (ValueError, TypeError) as error:
        assert says in str(error), f"the message does not mention {says!r}: {error}"
        return
    raise AssertionError(f"accepts what it cannot use, where the message should mention {says!r}")


def _assert_close(a: Trajectory, b: Trajectory, message: str) -> None:
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

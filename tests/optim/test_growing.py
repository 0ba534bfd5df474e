"""Batches that grow: every example once an epoch, time by examples, budgets and schedules of `fit`, exact resume."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import steep
from steep.loop.training import Training
from steep.optim._growing import GrowingBatches


def loader(n=10, batch_size=2, shuffle=False):
    return steep.tensor_loader(torch.arange(float(n)), torch.arange(n), batch_size, shuffle=shuffle)


def sizes(batches, then=()):
    """Sizes of the batches of an epoch; after each of the first ones, what the next are to grow to."""
    found, then = [], list(then)
    for batch in batches:
        found.append(len(batch[0]))
        if then:
            batches.grow(then.pop(0))
    return found


# ---- the loader


def test_a_size_holds_from_the_next_batch_on_and_never_shrinks():
    batches = GrowingBatches(loader(20))
    assert sizes(batches, [2.0, 3.0, 1.0, 4.5]) == [2, 2, 3, 3, 5, 5]
    assert sizes(batches) == [5, 5, 5, 5]


@pytest.mark.parametrize("size", [0.0, math.nan, math.inf, -math.inf])
def test_demands_that_mean_nothing_keep_the_size(size):
    batches = GrowingBatches(loader())
    batches.grow(size)
    assert batches.batch_size == 2


@pytest.mark.parametrize(("maximum", "most"), [(None, 10), (7, 7), (100, 10)])
def test_growth_ends_at_the_maximum_and_at_all_examples(maximum, most):
    batches = GrowingBatches(loader(), maximum=maximum)
    batches.grow(1e9)
    assert batches.batch_size == batches.maximum == most


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_example_comes_once_an_epoch(shuffle):
    batches = GrowingBatches(loader(23, shuffle=shuffle), initial=3)
    for _ in range(3):
        seen = []
        for x, y, index in batches:
            assert torch.equal(x.long(), y)
            seen += index.tolist()
            batches.grow(len(seen) / 2)
        assert sorted(seen) == list(range(23))


@pytest.mark.parametrize(("n", "size"), [(10, 2), (10, 3), (11, 4), (97, 8), (8, 8)])
def test_batches_that_keep_their_size_are_the_plain_loaders_and_steps_are_time(n, size):
    plain, batches = loader(n, size, shuffle=True), GrowingBatches(loader(n, size, shuffle=True))
    for epoch in range(3):
        torch.manual_seed(epoch)
        expected = [index.tolist() for *_, index in plain]
        torch.manual_seed(epoch)
        for step, (*_, index) in enumerate(batches, 1):
            assert index.tolist() == expected[step - 1]
            assert batches.elapsed == epoch * len(plain) + step
    assert len(batches) == len(plain)


def test_time_goes_by_examples():
    batches, elapsed = GrowingBatches(loader(64, 8), initial=4), []
    for _ in batches:
        elapsed.append(batches.elapsed)
        batches.grow(2 ** len(elapsed) * 4)
    assert elapsed == [0, 1, 3, 7, 8]  # after 4, 12, 28, 60 and 64 examples, in batches of 8
    assert batches.elapsed == 8


@pytest.mark.parametrize(("total_steps", "examples"), [(1, 3), (2, 6), (4, 10), (6, 16), (9, 23)])
@pytest.mark.parametrize("size", [2, 3, 7, 10])
def test_the_last_batch_is_cut_where_the_training_ends(total_steps, examples, size):
    """Ten examples are four batches of three, the last one short."""
    batches, given = GrowingBatches(loader(10, 3), initial=size, total_steps=total_steps), 0
    while batches.elapsed < total_steps:
        for x, *_ in batches:
            given += len(x)
            if batches.elapsed >= total_steps:
                break
    assert given == examples


def test_the_loader_is_left_as_it_was():
    plain = loader(20)
    batches = GrowingBatches(plain, initial=4)
    for _ in batches:
        batches.grow(8)
        assert plain.sampler.batch_size == 2
        assert len(plain) == 10
    assert sizes(plain) == [2] * 10


def test_batches_may_be_given_up_in_mid_epoch():
    batches = GrowingBatches(loader())
    next(iter(batches))
    assert sizes(batches) == [2] * 5
    assert batches.elapsed == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_that_collate_and_fetch_ahead_grow_too(workers):
    data = TensorDataset(torch.arange(40.0), torch.arange(40))
    batches = GrowingBatches(DataLoader(data, batch_size=2, shuffle=True, num_workers=workers, prefetch_factor=None))
    found = sizes(batches, [8] * 40)
    assert sum(found) == 40
    assert found[0] == 2
    assert 8 in found


def test_a_batch_sampler_of_ones_own_grows_too():
    data = TensorDataset(torch.arange(10.0), torch.arange(10))
    own = DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 3, drop_last=False))
    assert sizes(GrowingBatches(own), [4]) == [3, 4, 3]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"initial": 1}, "initial=1 must be a whole number of at least 2"),
        ({"initial": 2.5}, "initial=2.5 must be a whole number"),
        ({"initial": 4, "maximum": 3}, "maximum=3 must be a whole number of at least 4"),
        ({"maximum": 8.0}, "maximum=8.0 must be a whole number"),
    ],
)
def test_sizes_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        GrowingBatches(loader(), **wrong)


def test_single_examples_are_no_batches_to_start_with():
    with pytest.raises(ValueError, match="initial=1 must be a whole number of at least 2"):
        GrowingBatches(loader(batch_size=1))


def test_loaders_whose_batch_size_cannot_be_set():
    with pytest.raises(ValueError, match="batch size of list cannot be set: use a DataLoader"):
        GrowingBatches(list(loader()))
    data = TensorDataset(torch.arange(10.0), torch.arange(10))
    with pytest.raises(ValueError, match="drop_last=True must be False"):
        GrowingBatches(DataLoader(data, batch_size=2, drop_last=True))


@pytest.mark.parametrize("stop", [1, 3, 5, 6])
def test_sizes_in_mid_epoch_come_again_after_loading(stop):
    first = GrowingBatches(loader(30))
    found = []
    for x, *_ in first:
        found.append(len(x))
        first.grow(len(found) + 1)
        if len(found) == stop:
            break
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = GrowingBatches(loader(30))
    second.load_state_dict(state)
    assert second.state_dict() == state
    iterator = iter(second)
    assert [len(next(iterator)[0]) for _ in range(stop)] == found
    assert second.elapsed == first.elapsed
    assert second.batch_size == first.batch_size == stop + 1
    assert len(next(iterator)[0]) == min(stop + 1, 30 - sum(found))


def test_long_epochs_are_kept_short():
    batches = GrowingBatches(loader(1000))
    iterator = iter(batches)
    for _ in range(400):
        next(iterator)
    assert batches.state_dict() == {"batch_size": 2, "epochs": 0, "sizes": [[2, 400]]}


class Curious:
    """A loader with a state and feedback of its own around another."""

    steps, heard = 0, ()

    def __init__(self, inner):
        self.inner, self.sampler = inner, inner.sampler

    def __iter__(self):
        return iter(self.inner)

    def __len__(self):
        return len(self.inner)

    def step(self):
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]

    def report(self, *what):
        self.heard = what


def test_the_wrapped_loader_keeps_its_own_step_state_and_feedback():
    batches = GrowingBatches(Curious(loader()))
    batches.step()
    batches.report("indices", "losses")
    other = GrowingBatches(Curious(loader()))
    other.load_state_dict(batches.state_dict())
    assert (other.loader.steps, batches.heard) == (1, ("indices", "losses"))
    assert len(GrowingBatches(loader()).dataset) == 10
    assert sizes(batches, [5]) == [2, 5, 3]


def test_copies_and_pickles():
    batches = GrowingBatches(loader())
    batches.grow(4)
    for clone in (copy.deepcopy(batches), pickle.loads(pickle.dumps(batches))):
        clone.grow(8)
        assert sizes(clone) == [8, 2]
        assert (batches.batch_size, batches.elapsed) == (4, 0)


# ---- in a training run


class Doubling:
    """The plain mean; every second step doubles the batch size."""

    def __init__(self, model, batches, every=2):
        self.batches, self.every, self.steps, self.rates = batches, every, 0, []

    def __call__(self, losses, *, scale=1.0):
        (losses.mean() * scale).backward()

    def step(self):
        self.steps += 1
        if self.steps % self.every == 0:
            self.batches.grow(2 * self.batches.batch_size)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class Watching(torch.optim.lr_scheduler.LambdaLR):
    """A line from 1 to 0 that notes each rate."""

    def __init__(self, optimizer, total_steps):
        self.rates = []
        super().__init__(optimizer, lambda step: 1 - step / total_steps)

    def step(self):
        super().step()
        self.rates.append(self.get_last_lr()[0])


def growing(regression, every=2, **sizes):
    """The regression recipe (40 examples for training, 5 batches of 8) with batches that double."""

    def data(generator):
        plain = regression.data(generator)
        total = regression.budget.total_steps(len(plain.train))
        train = GrowingBatches(plain.train, total_steps=total, **sizes)
        return steep.Data(train, plain.val, plain.test)

    deferred = steep.deferred(lambda run: lambda model: Doubling(model, run.data.train, every))
    return regression.replace(data=data, backward=deferred)


@pytest.mark.parametrize("every", [1, 2, 1000])
@pytest.mark.parametrize("initial", [2, 8, 20])
@pytest.mark.parametrize(
    ("budget", "examples"),
    [
        ({"epochs": 4}, 160),
        ({"epochs": 2.5}, 104),
        ({"steps": 7}, 56),
        ({"steps": 1}, 8),
        ({"epochs": 4, "steps": 3}, 24),
    ],
)
def test_a_budget_is_as_many_examples_whatever_the_batches(regression, every, initial, budget, examples):
    recipe = regression.replace(budget=steep.Budget(**budget))
    result = steep.fit(growing(recipe, every, initial=initial), progress=False)
    assert result.examples == examples
    assert result.steps == result.horizon == recipe.budget.total_steps(5)


def test_updates_are_fewer_than_steps_of_the_budget(regression):
    result = steep.fit(growing(regression), progress=False)
    assert (result.steps, len(result.history.losses)) == (20, 4 + 2 + 1 + 1)  # 8 8 16 8, 32 8, 40, 40


def test_batches_that_keep_their_size_train_as_the_plain_loader(regression):
    plain, ours = (steep.fit(r, progress=False) for r in (regression, growing(regression, every=1000)))
    assert ours.history.losses == plain.history.losses
    assert [e["step"] for e in ours.history.evaluations] == [e["step"] for e in plain.history.evaluations]


@pytest.mark.parametrize("initial", [2, 8])
def test_schedules_and_parts_go_by_examples_and_the_rule_by_updates(regression, initial):
    made = []

    def scheduler(optimizer, total_steps):
        made.append(Watching(optimizer, total_steps))
        return made[-1]

    class Counting:
        count = 0

        def step(self):
            self.count += 1

    def model(run):
        made.append(run.attach(Counting()))
        return regression.model()

    recipe = growing(regression.replace(scheduler=scheduler, model=steep.deferred(model)), initial=initial)
    rules, build = [], recipe.backward.build
    recipe = recipe.replace(backward=steep.deferred(lambda run: lambda m: rules.append(build(run)(m)) or rules[-1]))
    result = steep.fit(recipe, progress=False)
    counting, watching = made
    assert counting.count == 20
    assert len(watching.rates) == 20 + 1  # one at the start
    assert watching.rates[-1] == pytest.approx(0)
    assert rules[0].steps == len(result.history.losses) != 20


def test_evaluations_are_as_many_as_with_plain_batches(regression):
    recipe = regression.replace(budget=steep.Budget(epochs=20))
    for changed in (recipe, growing(recipe, every=1000, initial=2)):
        result = steep.fit(changed, progress=False, evaluate_every=10)
        assert [e["examples"] for e in result.history.evaluations] == list(range(80, 801, 80))


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 6, 7])
def test_resume_is_exact_when_the_size_changed_in_mid_epoch(regression, tmp_path, stop, monkeypatch):
    recipe = growing(regression, initial=4)
    whole = steep.fit(recipe, progress=False)
    advance, path = Training.advance, tmp_path / "c.pt"

    def interrupted(training):
        if training.step == stop:
            raise KeyboardInterrupt
        advance(training)

    monkeypatch.setattr(Training, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        steep.fit(recipe, progress=False, checkpoint=path, evaluate_every=1)
    monkeypatch.undo()
    assert path.exists() == (stop > 1)  # the first batch is less than a step of the budget
    again = steep.fit(recipe, progress=False, checkpoint=path)
    assert again.history.losses == whole.history.losses
    assert (again.examples, again.steps, again.test) == (whole.examples, whole.steps, whole.test)


def test_only_a_late_backward_may_be_no_callable(regression):
    with pytest.raises(TypeError, match=r"Recipe.optimizer must be a factory"):
        regression.replace(optimizer=steep.deferred(lambda run: torch.optim.SGD))
    with pytest.raises(TypeError, match=r"Recipe.backward must be a factory"):
        regression.replace(backward=3)


def test_a_late_backward_sees_the_run(regression):
    seen = []

    def build(run):
        seen.append(run.total_steps)
        return steep.Mean

    result = steep.fit(regression.replace(backward=steep.deferred(build)), progress=False)
    assert seen == [20]
    assert result.history.losses == steep.fit(regression, progress=False).history.losses
    assert isinstance(result.model, nn.Module)


def test_a_loader_that_has_iterated_takes_a_loaded_state_whole():
    def after(count):
        batches = GrowingBatches(loader(20))
        for i, _ in zip(range(count), batches, strict=False):
            batches.grow(2 + i)
        return batches

    state, fresh, used = after(3).state_dict(), after(0), after(5)
    for batches in (fresh, used):
        batches.load_state_dict(copy.deepcopy(state))
    assert used.state_dict() == fresh.state_dict() == state
    assert used.elapsed == fresh.elapsed == 0  # until the epoch's first batches have come again
    assert [len(x) for x, *_ in used] == [len(x) for x, *_ in fresh]

"""Three generators, one stream: what a run draws depends on its seed alone, and the caller's draws on nothing of it."""

import random
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import steep
from steep.utils.loaders import is_all_torch
from steep.utils.randomness import Stream

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))


def draw():
    return float(torch.rand(())), np.random.rand(), random.random()


def drawn(stream, count=3):
    with stream.active():
        return [draw() for _ in range(count)]


def test_streams_of_equal_name_are_equal_and_others_are_not():
    numbers = drawn(Stream(0, "order"))
    assert numbers == drawn(Stream(0, "order"))
    for other in (drawn(Stream(1, "order")), drawn(Stream(0, "parts"))):
        assert all(
            a != b for ours, theirs in zip(numbers, other, strict=True) for a, b in zip(ours, theirs, strict=True)
        )


def test_a_stream_goes_on_where_it_was_left():
    whole, parts = drawn(Stream(0, "order"), 6), Stream(0, "order")
    assert [n for _ in range(3) for n in drawn(parts, 2)] == whole


def test_the_state_of_a_stream_is_restored_exactly():
    stream, other = Stream(0, "order"), Stream(5, "order")
    drawn(stream, 5)
    other.state = stream.state
    expected = drawn(stream)
    assert drawn(other) == expected


def test_a_stream_leaves_the_callers_generators_alone():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = [draw() for _ in range(4)]
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    found = [draw()]
    drawn(Stream(0, "order"))
    with pytest.raises(ZeroDivisionError), Stream(0, "order").active():
        draw() and 1 / 0
    assert found + [draw() for _ in range(3)] == expected


class Augmented(Dataset):
    """Adds noise from all three generators to each example."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        noise = random.gauss(0, 0.1) + float(np.random.normal(0, 0.1)) + 0.1 * float(torch.randn(()))
        return X[i] + noise, X[i].sum()


class Noisy(nn.Linear):
    """Draws from all three generators in its forward pass too."""

    def forward(self, x):
        if self.training:
            x = x + random.gauss(0, 0.1) + np.random.normal(0, 0.1) + 0.1 * torch.randn(())
        return super().forward(x)


def recipe(workers=0, **changes):
    def data(generator):
        return steep.Data(
            DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=workers), [(X[:5], X[:5].sum(1))]
        )

    return steep.Recipe(
        data=data,
        model=lambda: Noisy(3, 1),
        loss=lambda output, target: (output.squeeze(-1) - target).square(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        budget=steep.Budget(steps=10),
    ).replace(**changes)


def losses(recipe, **options):
    return steep.fit(recipe, progress=False, **options).history.losses


@pytest.mark.parametrize("workers", [0, 2])
def test_runs_of_equal_seed_are_equal_whatever_was_drawn_before(workers):
    first = losses(recipe(workers))
    draw()
    assert losses(recipe(workers)) == first
    assert all(a != b for a, b in zip(losses(recipe(workers), seed=1), first, strict=True))


def test_the_order_and_the_noise_of_data_do_not_depend_on_what_a_method_draws():
    """Paired arms: the batches are equal bit for bit, though one arm's rule draws from all generators."""

    class Drawing(steep.Mean):
        def __call__(self, losses, *, scale=1.0):
            draw()
            super().__call__(losses, scale=scale)

    def batches(backward):
        seen = []

        class Watching(nn.Linear):
            def forward(self, x):
                if self.training:
                    seen.append(x.clone())
                return super().forward(x)

        steep.fit(recipe(model=lambda: Watching(3, 1), backward=backward), progress=False)
        return torch.cat(seen)

    assert torch.equal(batches(Drawing), batches(steep.Mean))


class Stop(Exception):
    """The end of a run that is killed."""


class Loss(nn.Module):
    """Squared error, which fails at its `left`-th training batch."""

    def __init__(self, left):
        super().__init__()
        self.left = left

    def forward(self, output, target):
        if self.training:
            self.left -= 1
            if self.left < 0:
                raise Stop
        return (output.squeeze(-1) - target).square()


@pytest.mark.parametrize("steps", [1, 4, 6, 9])
def test_resume_is_exact_in_all_generators(tmp_path, steps):
    path = tmp_path / "run.pt"
    with pytest.raises(Stop):
        losses(recipe(loss=Loss(steps)), checkpoint=path, evaluate_every=1)
    assert losses(recipe(loss=Loss(99)), checkpoint=path, evaluate_every=1) == losses(recipe())


def test_fit_leaves_the_callers_generators_alone_even_between_a_pair_of_normal_numbers():
    def both():
        return np.random.standard_normal(), draw()  # NumPy's legacy generator keeps the second of two normal numbers

    np.random.seed(3), random.seed(3), torch.manual_seed(3)
    expected = [both() for _ in range(3)]
    np.random.seed(3), random.seed(3), torch.manual_seed(3)
    found = [both()]
    losses(recipe())
    with pytest.raises(ValueError, match="no parameter"):
        losses(recipe(model=nn.Identity))
    assert found + [both() for _ in range(2)] == expected


def test_a_second_thread_is_refused_and_a_run_inside_a_run_is_not():
    inside = threading.Event()

    def slow(generator):
        inside.set()
        release.wait(10)
        return recipe().data(generator)

    release = threading.Event()
    thread = threading.Thread(target=lambda: losses(recipe(data=slow)))
    thread.start()
    inside.wait(10)
    try:
        with pytest.raises(RuntimeError, match="another thread of this process.*use processes instead"):
            losses(recipe())
    finally:
        release.set()
        thread.join()

    outer = recipe(model=steep.deferred(lambda run: steep.fit(recipe(), progress=False).model))
    assert len(losses(outer)) == 10


def test_loaders_of_torch_alone_are_told_from_those_that_may_draw_elsewhere():
    class Own(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return X[i]

    tensors = torch.utils.data.TensorDataset(X, X)
    assert is_all_torch(steep.tensor_loader(X, X, 4, shuffle=True))
    assert is_all_torch(DataLoader(tensors, 4, shuffle=True))
    own_sampler = type("Own", (torch.utils.data.RandomSampler,), {"__module__": "mine"})
    for loader in (
        DataLoader(Own(), 2),
        DataLoader(tensors, 4, collate_fn=lambda batch: batch),
        DataLoader(tensors, 4, sampler=own_sampler(tensors)),
        DataLoader(tensors, 4, num_workers=1),
        steep.adapt(DataLoader(tensors, 4), lambda item: item),
        [(X, X)],
    ):
        assert not is_all_torch(loader)


def test_torchs_part_of_a_stream_is_the_same_by_both_ways():
    whole, part = Stream(0, "order"), Stream(0, "order")
    for _ in range(2):
        with whole.active():
            first = torch.rand(3)
        outside = random.getstate(), torch.get_rng_state()
        with part.active_in_torch():
            assert torch.equal(torch.rand(3), first)
        assert random.getstate() == outside[0]
        assert torch.equal(torch.get_rng_state(), outside[1])
    assert torch.equal(whole.state["torch"], part.state["torch"])

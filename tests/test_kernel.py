"""Recipes, batches, streams, files and measures: the small pieces everything stands on."""

import errno
import functools
import os
import resource
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import steep
from steep.batches import Batch
from steep.loop.measure import Stopwatch
from steep.loop.modes import evaluating
from steep.loop.scoring import score
from steep.splits import _dirichlet, count_examples
from steep.utils.files import write_atomic
from steep.utils.randomness import Stream, stream_seed

# ---- recipes


def test_deferred_parts_see_the_run_and_are_stepped_and_saved(regression, tmp_path):
    class Counting:
        def __init__(self, total):
            self.total, self.count = total, 0

        def step(self):
            self.count += 1

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    made = []

    def build(run):
        made.append(run.attach(Counting(run.total_steps)))
        return regression.model()

    recipe = regression.replace(model=steep.deferred(build))
    steep.fit(recipe, checkpoint=tmp_path / "c.pt", progress=False)
    assert (made[0].total, made[0].count) == (20, 20)
    steep.fit(recipe, checkpoint=tmp_path / "c.pt", progress=False)
    assert made[1].count == 20


def test_a_loss_module_starts_afresh_in_every_run(regression):
    class Counting(nn.Module):
        calls = 0

        def forward(self, output, target):
            self.calls += 1
            return (output.squeeze(-1) - target).square() + self.calls

    recipe = regression.replace(loss=Counting(), score=regression.loss)
    first, second = (steep.fit(recipe, progress=False) for _ in range(2))
    assert first.history.losses == second.history.losses


def test_evaluation_weights_are_used_for_scores_and_put_back(regression):
    from contextlib import contextmanager

    class Zeroed(torch.optim.SGD):
        @contextmanager
        def eval_weights(self):
            kept = [p.detach().clone() for p in self.param_groups[0]["params"]]
            for p in self.param_groups[0]["params"]:
                p.detach().zero_()
            yield
            for p, value in zip(self.param_groups[0]["params"], kept, strict=True):
                p.detach().copy_(value)

    recipe = regression.replace(optimizer=lambda p: Zeroed(p, lr=0.1), scheduler=None)
    result = steep.fit(recipe, progress=False)
    plain = steep.fit(
        regression.replace(optimizer=lambda p: torch.optim.SGD(p, lr=0.1), scheduler=None), progress=False
    )
    assert result.history.losses == plain.history.losses
    assert len({e["loss"] for e in result.history.evaluations}) == 1  # a model of zeros never changes


# ---- batches


def test_split_loaders_divide_everything_once():
    x = torch.arange(50.0).unsqueeze(1)
    data = steep.split_loaders(x, x.squeeze(1), torch.Generator().manual_seed(0), batch_size=7)
    parts = [torch.cat([b[0] for b in loader]).squeeze(1) for loader in (data.train, data.val, data.test)]
    assert [len(p) for p in parts] == [30, 10, 10]
    assert torch.equal(torch.cat(parts).sort().values, x.squeeze(1))
    assert data.num_examples == 30


def test_loader_indices_name_the_example():
    x = torch.randn(20, 2)
    for batch in steep.tensor_loader(x, torch.zeros(20), 6, shuffle=True):
        assert torch.equal(batch[0], x[batch[2]])


def test_indexed_adds_the_index():
    plain = torch.utils.data.TensorDataset(torch.arange(5.0), torch.arange(5.0) * 2)
    assert steep.Indexed(plain)[3] == (torch.tensor(3.0), torch.tensor(6.0), 3)
    assert len(steep.Indexed(plain)) == 5


def test_examples_are_counted_without_a_dataset_too():
    assert count_examples([(torch.zeros(3, 1), torch.zeros(3)), (torch.zeros(2, 1), torch.zeros(2))]) == 5


@pytest.mark.parametrize("alpha", [0.1, 100.0])
def test_dirichlet_clients_divide_everything_once(alpha):
    y = torch.arange(200) % 4
    x = torch.arange(200.0).unsqueeze(1)
    clients = steep.dirichlet_clients(x, y, torch.Generator().manual_seed(1), clients=8, alpha=alpha, batch_size=5)
    seen = torch.cat([b[0] for loader in clients for b in loader]).squeeze(1)
    assert torch.equal(seen.sort().values, x.squeeze(1))
    assert min(count_examples(c) for c in clients) >= 2
    shares = [torch.cat([b[1] for b in c]).bincount(minlength=4) / count_examples(c) for c in clients]
    skew = torch.stack([s.max() for s in shares]).mean()
    assert skew > 0.6 if alpha < 1 else skew < 0.45


@pytest.mark.parametrize("alpha", [1e-320, 1e-300, 1e-3])
def test_with_a_small_alpha_each_class_is_one_clients(alpha):
    x, y = torch.zeros(1000, 1), torch.arange(1000) % 100
    owners = steep.dirichlet_clients(
        x, y, torch.Generator().manual_seed(0), clients=2, alpha=alpha, batch_size=5, smallest=0
    )
    classes = [set(client.dataset.tensors[1].tolist()) for client in owners]
    assert not classes[0] & classes[1]
    assert 30 < len(classes[0]) < 70  # 100 fair coins


@pytest.mark.parametrize("alpha", [0.05, 0.7, 5.0, 1e300])
def test_shares_have_the_moments_of_the_dirichlet_distribution(alpha):
    numbers, k, n = torch.Generator().manual_seed(0), 4, 4000
    shares = torch.stack([_dirichlet(alpha, k, numbers) for _ in range(n)])
    torch.testing.assert_close(shares.sum(1), torch.ones(n, dtype=torch.float64))
    variance = (k - 1) / k**2 / (k * alpha + 1)
    assert (shares.mean(0) - 1 / k).abs().max() < 5 * (variance / n) ** 0.5 + 1e-12
    assert abs(shares.var(0).mean() / variance - 1) < 0.1 or alpha == 1e300


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"alpha": 0}, r"alpha=0 must lie in \(0, inf\)"),
        ({"alpha": float("inf")}, "alpha=inf must lie in"),
        ({"alpha": float("nan")}, "alpha=nan must lie in"),
        ({"clients": 0}, "clients=0 must be a whole number of at least 1"),
        ({"smallest": -1}, "smallest=-1"),
        ({"clients": 5}, "9 examples cannot give 5 clients 2 each"),
    ],
)
def test_dirichlet_clients_refuse_what_cannot_be(wrong, says):
    given = {"clients": 2, "alpha": 1.0, "batch_size": 1} | wrong
    with pytest.raises(ValueError, match=says):
        steep.dirichlet_clients(torch.zeros(9, 1), torch.zeros(9).long(), torch.Generator(), **given)


def test_split_sizes_are_the_rounded_fractions_or_an_error():
    for size in range(2, 45):
        for val in (0.01, 0.2, 0.5, 0.97):
            for test in (0.0, 0.01, 0.2, 0.45):
                if val + test >= 1:
                    continue
                x, wanted = torch.arange(float(size)).unsqueeze(1), (round(size * val), round(size * test))
                possible = wanted[0] > 0 and (wanted[1] > 0 or test == 0) and size - sum(wanted) > 0
                split = functools.partial(
                    steep.split_loaders, x, x[:, 0], torch.Generator(), batch_size=1, val=val, test=test
                )
                if not possible:
                    with pytest.raises(ValueError, match=r"leave none for (train|val|test)"):
                        split()
                    continue
                data = split()
                assert count_examples(data.val) == wanted[0]
                assert (0 if data.test is None else count_examples(data.test)) == wanted[1]
                assert data.num_examples == size - sum(wanted)


# ---- streams, scores, files, measures


def test_streams_are_independent_of_each_other_and_of_the_caller():
    a, b = Stream(0, "a"), Stream(0, "b")
    with a.active():
        first = torch.rand(3)
    with b.active():
        torch.rand(100)
    with a.active():
        second = torch.rand(3)
    whole = torch.rand(6, generator=torch.Generator().manual_seed(stream_seed(0, "a")))
    assert torch.equal(torch.cat([first, second])[:3], whole[:3])
    assert not torch.equal(first, second)
    assert stream_seed(0, "a") != stream_seed(0, "b") != stream_seed(1, "b")


def test_scores_are_means_over_examples_not_over_batches():
    model = nn.Identity()
    loader = [Batch(torch.ones(3, 1), torch.zeros(3)), Batch(torch.full((1, 1), 5.0), torch.zeros(1))]
    found = score(model, loader, lambda o, t: o.squeeze(1), None, torch.device("cpu"))
    assert found["loss"] == pytest.approx((3 * 1 + 5) / 4)
    with pytest.raises(ValueError, match="empty"):
        score(model, [], lambda o, t: o, None, torch.device("cpu"))


def test_evaluating_restores_each_modules_own_mode():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    with evaluating(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
    assert [m.training for m in model.modules()] == [True, True, False]


def test_atomic_writes_leave_the_old_file_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "a" / "file.txt"
    write_atomic(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_file_size_limit_like_a_full_disk_leaves_the_old_checkpoint(regression, tmp_path):
    path = tmp_path / "run.pt"
    steep.fit(regression, checkpoint=path, progress=False)
    kept = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError, match="File too large"):
            steep.loop.checkpoint.save(path, {"big": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == kept


def test_a_stopwatch_leaves_pauses_out():
    watch = Stopwatch(10.0, 5.0)
    watch.start()
    with watch.pause():
        time.sleep(0.2)
        paused = watch.read()
    assert paused[0] < 10.1
    assert watch.read()[0] < 10.15
    assert watch.read()[1] >= 5.0


def test_importing_steep_is_cheap_and_leaves_optuna_alone():
    code = "import sys, steep; assert not {'optuna', 'plotly', 'sklearn', 'scipy.stats'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_loss_gets_the_domains_of_its_batchs_examples():
    x, domains = torch.arange(12.0).unsqueeze(1), torch.arange(12) // 4
    seen = []

    class ByDomain(nn.Module):
        requires = frozenset({"domains"})

        def forward(self, output, target, *, domains=None):
            if torch.is_grad_enabled():
                seen.append((target.int().tolist(), domains.tolist()))
            return (output.squeeze(1) - target) ** 2

    steep.fit(
        steep.Recipe(
            data=lambda g: steep.Data(
                steep.tensor_loader(x, x[:, 0], 4, shuffle=True), [(x + 1, x[:, 0])], domains=domains
            ),
            model=lambda: nn.Linear(1, 1),
            loss=ByDomain(),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
            budget=steep.Budget(epochs=2),
        ),
        progress=False,
    )
    assert len(seen) == 6
    assert all(found == [i // 4 for i in examples] for examples, found in seen)
    assert len({tuple(found) for _, found in seen}) > 1

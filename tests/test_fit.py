"""fit: equals the loop written by hand, resumes bit for bit, stops cleanly, and says what is wrong."""

import functools
import math
import os
import signal

import pytest
import torch
from torch import nn

import steep
from steep.utils.randomness import Stream, generator, stream_seed

fit = functools.partial(steep.fit, progress=False)


def parameters(result):
    return [p.detach().clone() for p in result.model.parameters()]


def assert_same(a, b):
    assert a.history.losses == b.history.losses
    for p, q in zip(parameters(a), parameters(b), strict=True):
        assert torch.equal(p, q)
    assert a.test == b.test


def test_equals_the_loop_written_by_hand(regression):
    recipe = regression.replace(budget=steep.Budget(epochs=2))
    result = fit(recipe, seed=3)

    data = recipe.data(generator(3, "split"))
    order = Stream(3, "order")
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(3, "model"))
        model = recipe.model()
        optimizer = recipe.optimizer(list(model.parameters()))
        scheduler = recipe.scheduler(optimizer, 10)
        losses = []
        for _ in range(2):
            with order.active():
                batches = list(data.train)
            for x, y, _ in batches:
                optimizer.zero_grad()
                loss = recipe.loss(model(x), y).mean()
                loss.backward()
                optimizer.step()
                scheduler.step()
                losses.append(loss.item())
    assert result.history.losses == losses
    for p, q in zip(parameters(result), model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_two_runs_are_equal_and_seeds_matter(regression):
    assert_same(fit(regression, seed=1), fit(regression, seed=1))
    assert fit(regression, seed=1).history.losses != fit(regression, seed=2).history.losses


def test_split_seed_alone_changes_only_the_split(regression):
    a, b = fit(regression, seed=1, split_seed=7), fit(regression, seed=2, split_seed=7)
    assert a.history.losses != b.history.losses
    assert_same(fit(regression, seed=7), fit(regression, seed=7, split_seed=7))


def test_global_generator_is_left_alone(regression):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fit(regression)
    assert torch.equal(before, torch.get_rng_state())


def test_evaluating_more_often_changes_nothing(regression):
    often, seldom = fit(regression, evaluate_every=1), fit(regression, evaluate_every=10**9)
    assert_same(often, seldom)
    assert len(often.history.evaluations) == 20
    assert len(seldom.history.evaluations) == 1


def test_a_method_that_draws_numbers_sees_the_same_batches(regression):
    seen = []

    class Drawing(steep.Mean):
        def __call__(self, losses, *, scale=1.0):
            torch.rand(7)
            super().__call__(losses, scale=scale)

    def recording(output, target):
        seen.append(target.clone())
        return (output.squeeze(-1) - target).square()

    plain = regression.replace(loss=recording, score=regression.loss)
    fit(plain)
    fit(plain.replace(backward=Drawing))
    half = len(seen) // 2
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


def stopping_after(recipe, steps):
    """The recipe, interrupted with Ctrl-C's signal during its `steps`-th step."""
    calls = []

    class Interrupting(steep.Mean):
        def __call__(self, losses, *, scale=1.0):
            calls.append(1)
            if len(calls) == steps:
                os.kill(os.getpid(), signal.SIGINT)
            super().__call__(losses, scale=scale)

    return recipe.replace(backward=Interrupting)


@pytest.mark.parametrize("steps", [1, 6, 10, 13])
def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_goes_on_bit_for_bit(regression, tmp_path, steps):
    path = tmp_path / "run.pt"
    with pytest.raises(steep.Interrupted, match=rf"after step {steps}; resume with .*run\.pt"):
        fit(stopping_after(regression, steps), seed=4, checkpoint=path)
    resumed = fit(regression, seed=4, checkpoint=path)
    straight = fit(regression, seed=4)
    assert_same(resumed, straight)
    for a, b in zip(resumed.history.evaluations, straight.history.evaluations, strict=True):
        assert {k: v for k, v in a.items() if "seconds" not in k} == {k: v for k, v in b.items() if "seconds" not in k}
    assert resumed.examples == straight.examples
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resume_is_exact_with_a_users_own_generator_and_workers_random_augmentation(regression, tmp_path):
    class Noisy(torch.utils.data.Dataset):
        def __init__(self):
            self.x = torch.arange(30.0).reshape(10, 3) / 30

        def __len__(self):
            return 10

        def __getitem__(self, i):
            return self.x[i] + torch.rand(3), self.x[i].sum()

    def data(g):
        own = torch.Generator().manual_seed(9)
        train = torch.utils.data.DataLoader(Noisy(), batch_size=4, shuffle=True, generator=own)
        return steep.Data(train, steep.tensor_loader(torch.rand(6, 3, generator=g), torch.zeros(6), 6))

    recipe = regression.replace(data=data)
    path = tmp_path / "run.pt"
    with pytest.raises(steep.Interrupted):
        fit(stopping_after(recipe, 5), checkpoint=path)
    assert_same(fit(recipe, checkpoint=path), fit(recipe))


def test_without_a_path_ctrl_c_saves_to_the_working_directory(regression, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(steep.Interrupted, match=r"steep-interrupted\.pt"):
        fit(stopping_after(regression, 2))
    assert (tmp_path / "steep-interrupted.pt").exists()


def test_budgets_end_where_they_say(regression):
    assert fit(regression.replace(budget=steep.Budget(epochs=1.5))).steps == 8  # ceil(1.5 * 5)
    assert fit(regression.replace(budget=steep.Budget(steps=3))).steps == 3
    assert fit(regression.replace(budget=steep.Budget(epochs=3, steps=4))).steps == 4
    timed = fit(regression.replace(budget=steep.Budget(steps=10**6, seconds=0.1)))
    assert 1 <= timed.steps < 10**6
    assert timed.seconds >= 0.1


@pytest.mark.parametrize("limits", [{}, {"epochs": 0}, {"steps": -1}, {"seconds": math.nan}])
def test_budgets_that_make_no_sense(limits):
    with pytest.raises(ValueError, match="budget"):
        steep.Budget(**limits)


def test_a_schedule_needs_a_horizon(regression):
    with pytest.raises(ValueError, match="steps or epochs beside seconds"):
        fit(regression.replace(budget=steep.Budget(seconds=1.0)))


def test_accumulation_equals_the_whole_batch(regression):
    def no_dropout():
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def data(g):
        x = torch.randn(22, 3, generator=g, dtype=torch.float64)
        return steep.split_loaders(x, x.sum(1), g, batch_size=5, val=0.3, test=0.0)

    recipe = regression.replace(model=no_dropout, data=data)
    whole, parts = fit(recipe), fit(recipe, accumulate=3)
    for p, q in zip(parameters(whole), parameters(parts), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="accumulate=0"):
        fit(recipe, accumulate=0)


def test_closure_optimizers_get_a_closure(regression):
    recipe = regression.replace(
        optimizer=lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3), scheduler=None, budget=steep.Budget(steps=6)
    )
    result = fit(recipe)
    assert result.history.losses[-1] < 0.5 * result.history.losses[0]
    assert result.examples > 6 * 8  # every evaluation of the closure counts


def test_bf16_runs_in_mixed_precision(regression):
    seen = set()

    def loss(output, target):
        seen.add(output.dtype)
        return (output.squeeze(-1).float() - target).square()

    result = fit(regression.replace(loss=loss, budget=steep.Budget(steps=2)), precision="bf16", device="cpu")
    assert all(p.dtype == torch.float32 for p in result.model.parameters())
    plain = fit(regression.replace(budget=steep.Budget(steps=2)), device="cpu")
    assert result.history.losses != plain.history.losses
    assert math.isclose(result.history.losses[0], plain.history.losses[0], rel_tol=0.05)


def test_peak_memory_sees_a_large_activation(regression):
    class Wasteful(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.ones(8_000_000).mean()

    plain = fit(regression)
    wasteful = fit(regression.replace(model=lambda: Wasteful(3, 1)))
    if plain.peak_memory is None:
        pytest.skip("peak memory is not known on this system")
    assert wasteful.peak_memory - plain.peak_memory > 20_000_000


# ---- bad input: each message is read


def nan_data(g):
    x = torch.randn(20, 3, generator=g)
    data = steep.split_loaders(x, x.sum(1), g, batch_size=20 - 8)
    data.train.dataset.tensors[0][3] = math.nan
    return data


def test_nan_in_the_data_names_step_and_examples(regression):
    with pytest.raises(
        steep.NonFinite, match=r"not finite at step 0 for example \[3\]: the inputs of this batch contain NaN"
    ):
        fit(regression.replace(data=nan_data))


def test_a_nan_loss_is_told_from_bad_data(regression):
    with pytest.raises(steep.NonFinite, match="it is the forward pass or the loss.*pass fit"):
        fit(regression.replace(loss=lambda o, t: o.squeeze(-1) * math.inf))


def test_a_nan_gradient_names_the_parameter_and_the_last_good_checkpoint(regression, tmp_path):
    class Poison(steep.Mean):
        calls = 0

        def __call__(self, losses, *, scale=1.0):
            super().__call__((losses * math.nan) if Poison.calls == 7 else losses, scale=scale)
            Poison.calls += 1

    path = tmp_path / "good.pt"
    with pytest.raises(
        steep.NonFinite, match=r"step 8 .*parameter '0.weight' is not finite.*finite checkpoint is .*good"
    ):
        fit(regression.replace(backward=Poison), checkpoint=path, evaluate_every=1)
    saved = steep.loop.checkpoint.load(path)
    assert all(v.isfinite().all() for v in saved["parts"]["model"].values())
    assert len(saved["history"]["losses"]) == 7


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"loss": lambda o, t: (o - t).square()},
            ValueError,
            r"one number per example, shape \(8,\), but returned \(8, 8\)",
        ),
        ({"loss": lambda o, t: o[:3, 0]}, ValueError, r"shape \(8,\), but returned \(3,\)"),
        ({"loss": lambda o, t: t.long()}, ValueError, "floating-point tensor, got torch.int64"),
        ({"model": lambda: nn.ReLU()}, ValueError, "ReLU has no parameter to train"),
        ({"model": lambda: nn.Linear(3, 1).requires_grad_(False)}, ValueError, "all are frozen"),
    ],
)
def test_losses_and_models_that_cannot_work(regression, changes, error, message):
    with pytest.raises(error, match=message):
        fit(regression.replace(**changes))


def test_a_scalar_loss_will_do_for_the_mean_but_not_where_a_vector_is_needed(regression):
    def scalar(output, target):
        return (output.squeeze(-1) - target).square().mean()

    class Vector(steep.Mean):
        requires = frozenset({"losses"})

    assert fit(regression.replace(loss=scalar)).history.losses == fit(regression).history.losses
    with pytest.raises(ValueError, match=r"Vector needs one loss per example .* returned a scalar: .*reduction='none'"):
        fit(regression.replace(loss=scalar, backward=Vector))


def test_batchnorm_under_a_per_example_rule(regression):
    class PerExample(steep.Mean):
        requires = frozenset({"losses", "independent_examples"})

    recipe = regression.replace(model=lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    with pytest.raises(steep.UnmetRequirement, match=r"PerExample needs examples .*1 \(BatchNorm1d\).*GroupNorm"):
        fit(recipe.replace(backward=PerExample))
    frozen = recipe.replace(model=lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 1)))
    fit(frozen.replace(backward=PerExample))


def test_missing_indices_name_the_line_to_change(regression):
    class Remembering(nn.Module):
        requires = frozenset({"indices"})

        def forward(self, output, target, *, indices):
            return (output.squeeze(-1) - target).square()

    def bare(g):
        dataset = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randn(8))
        return steep.Data(torch.utils.data.DataLoader(dataset, batch_size=4), torch.utils.data.DataLoader(dataset))

    recipe = regression.replace(loss=Remembering(), score=regression.loss)
    with pytest.raises(steep.UnmetRequirement, match=r"Remembering needs the index .*Indexed"):
        fit(recipe.replace(data=bare))

    def indexed(g):
        plain = bare(g)
        train = torch.utils.data.DataLoader(steep.Indexed(plain.train.dataset), batch_size=4)
        return steep.Data(train, plain.val)

    assert fit(recipe.replace(data=indexed)).steps == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(0, 3), torch.zeros(0), 1), "no examples"),
        ((torch.zeros(4, 3), torch.zeros(4), 5), "batch_size=5 must lie between 1 and the number of examples, 4"),
        ((torch.zeros(4, 3), torch.zeros(3), 2), "differ in length: 4 and 3"),
    ],
)
def test_data_that_cannot_be_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        steep.tensor_loader(*arguments)


def test_a_loader_without_batches(regression):
    def dropped(g):
        dataset = torch.utils.data.TensorDataset(torch.randn(4, 3), torch.randn(4))
        loader = torch.utils.data.DataLoader(dataset, batch_size=8, drop_last=True)
        return steep.Data(loader, loader)

    with pytest.raises(ValueError, match="data are empty"):
        fit(regression.replace(data=dropped))


def test_a_model_instead_of_a_factory(regression):
    with pytest.raises(TypeError, match="must be a factory"):
        regression.replace(model=nn.Linear(3, 1))


@pytest.mark.parametrize(
    ("argument", "message"), [({"precision": "fp8"}, "precision='fp8'"), ({"device": "tpu"}, "device='tpu'")]
)
def test_devices_and_precisions_that_do_not_exist(regression, argument, message):
    with pytest.raises(ValueError, match=message):
        fit(regression, **argument)


def test_checkpoints_that_cannot_be_used(regression, tmp_path):
    path = tmp_path / "run.pt"
    fit(regression, checkpoint=path)
    whole = path.read_bytes()

    with pytest.raises(
        steep.CheckpointError, match=r"another model: '0.weight' is of shape \(8, 3\) there and of shape \(9, 3\)"
    ):
        fit(regression.replace(model=lambda: nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 1))), checkpoint=path)
    with pytest.raises(ValueError, match="of another recipe"):
        fit(regression.replace(scheduler=None), checkpoint=path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(steep.CheckpointError, match=r"run\.pt is truncated"):
        fit(regression, checkpoint=path)
    torch.save({"format": 99}, path)
    with pytest.raises(steep.CheckpointError, match="newer steep .format 99"):
        fit(regression, checkpoint=path)
    torch.save([1], path)
    with pytest.raises(steep.CheckpointError, match="no checkpoint of steep"):
        fit(regression, checkpoint=path)


class Tempered(nn.Module):
    """Squared error at a temperature that is learned."""

    def __init__(self):
        super().__init__()
        self.log_t = nn.Parameter(torch.ones(()))

    def forward(self, output, target):
        return (output.squeeze(-1) - target).square() * torch.exp(-self.log_t) + self.log_t


def test_parameters_of_a_loss_are_trained_with_the_models(regression, tmp_path):
    recipe = regression.replace(loss=(loss := Tempered()), score=regression.loss)
    seen = []

    def optimizer(parameters):
        parameters = list(parameters)
        seen.append(parameters)
        return torch.optim.Adam(parameters, lr=0.05)

    result = fit(recipe.replace(optimizer=optimizer), checkpoint=tmp_path / "run.pt")
    assert len(seen[0]) == 5
    assert seen[0][-1] != 1.0
    assert loss.log_t == 1.0  # the recipe's own is a pattern
    with pytest.raises(steep.Interrupted):
        fit(stopping_after(recipe.replace(optimizer=optimizer), 7), checkpoint=tmp_path / "other.pt")
    assert_same(fit(recipe.replace(optimizer=optimizer), checkpoint=tmp_path / "other.pt"), result)


def test_a_loss_that_looks_at_the_model_adds_no_parameter_twice(regression):
    class Looking(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, output, target):
            return (output.squeeze(-1) - target).square()

    recipe = regression.replace(loss=steep.deferred(lambda run: Looking(run.model[3])))
    assert fit(recipe).history.losses == fit(regression).history.losses


class Scaling(nn.Module):
    """The mean's gradient, times a learnable factor."""

    def __init__(self, model):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, losses, *, scale=1.0):
        (losses.mean() * self.factor * scale).backward()


def test_parameters_of_a_rule_that_nobody_trains_are_refused(regression):
    with pytest.raises(ValueError, match=r"Scaling has parameters that no optimizer trains, .*: factor. Freeze them"):
        fit(regression.replace(backward=Scaling))

    def frozen(model):
        return Scaling(model).requires_grad_(False)

    assert fit(regression.replace(backward=frozen)).history.losses == fit(regression).history.losses

    class OwnOptimizer(Scaling):
        def __init__(self, model):
            super().__init__(model)
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

    fit(regression.replace(backward=OwnOptimizer, budget=steep.Budget(steps=2)))


def test_rounds_refuse_a_loss_with_parameters_of_its_own(regression):
    def rounds(model, run, local_step):
        return iter([torch.zeros(1)] * 30)

    with pytest.raises(ValueError, match="Tempered has 1 parameters of its own, but the recipe's rounds"):
        fit(regression.replace(loss=Tempered(), rounds=rounds))


def one_cycle(optimizer, total_steps):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=total_steps)


def sequential(optimizer, total_steps):
    kinds = torch.optim.lr_scheduler
    parts = [kinds.LinearLR(optimizer, 0.1, total_iters=3), kinds.CosineAnnealingLR(optimizer, total_steps - 3)]
    return kinds.SequentialLR(optimizer, parts, [3])


def cyclic(optimizer, total_steps):
    return torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, 4, cycle_momentum=False)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"scheduler": one_cycle}, {}),
        ({"scheduler": sequential}, {}),
        ({"scheduler": cyclic}, {}),
        ({"scheduler": None, "optimizer": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3)}, {"accumulate": 3}),
    ],
)
def test_runs_with_other_schedules_and_closures_go_on_exactly(regression, tmp_path, changes, options):
    recipe, path, steps = regression.replace(**changes), tmp_path / "run.pt", []

    def breaking(output, target):
        if torch.is_grad_enabled():
            steps.append(1)
            if len(steps) == 13:
                raise ConnectionError
        return recipe.loss(output, target)

    whole = fit(recipe, **options)
    with pytest.raises(ConnectionError):
        fit(recipe.replace(loss=breaking, score=recipe.loss), checkpoint=path, evaluate_every=1, **options)
    parts = fit(recipe, checkpoint=path, **options)
    assert torch.load(path, weights_only=True)["cost"]["examples"] > 0
    assert parts.history.losses == whole.history.losses
    assert parts.test == whole.test


def test_a_metric_that_is_always_nan_is_reported_as_such(regression):
    metric = steep.Metric("nothing", lambda output, target: torch.full((len(target),), float("nan")))
    result = fit(regression.replace(metric=metric))
    assert math.isnan(result.test["nothing"])
    assert math.isfinite(result.test["loss"])

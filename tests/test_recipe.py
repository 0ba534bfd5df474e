"""What a recipe says of its optimizer's steps: clipping, parameter groups, and when to stop."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import steep

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3


def data(generator):
    return steep.Data(steep.tensor_loader(X[:16], Y[:16], 8), steep.tensor_loader(X[16:], Y[16:], 8))


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


def loss(output, target):
    return 5 * F.cross_entropy(output, target, reduction="none")


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


def recipe(**changes):
    base = steep.Recipe(data=data, model=network, loss=loss, optimizer=sgd, budget=steep.Budget(steps=6))
    return base.replace(**changes)


def fit(recipe, **options):
    return steep.fit(recipe, progress=False, **options)


def weights(result):
    return torch.cat([p.detach().flatten() for p in result.model.parameters()])


def by_hand(optimizer, *, max_norm=None, steps=6):
    """The recipe's run as a plain loop. Returns its model, and whether each step was clipped."""
    model, clipped = fit(recipe(budget=steep.Budget(steps=1)).replace(optimizer=frozen)).model, []
    opt = optimizer(model)
    for step in range(steps):
        rows = slice(0, 8) if step % 2 == 0 else slice(8, 16)
        opt.zero_grad()
        loss(model(X[rows]), Y[rows]).mean().backward()
        if max_norm:
            clipped.append(float(nn.utils.clip_grad_norm_(model.parameters(), max_norm)) > max_norm)
        opt.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), clipped


def frozen(parameters):
    """An optimizer that leaves the model as it was initialised."""
    return torch.optim.SGD(parameters, lr=0.0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_clipped_once_for_each_step(accumulate):
    expected, clipped = by_hand(lambda model: sgd(model.parameters()), max_norm=2.5)
    assert any(clipped)
    assert not all(clipped)
    torch.testing.assert_close(weights(fit(recipe(max_grad_norm=2.5), accumulate=accumulate)), expected)


def test_what_an_optimizer_evaluates_again_is_clipped_too():
    norms = []

    class Probing(torch.optim.LBFGS):
        def step(self, closure):
            def watched():
                value = closure()
                norms.append(float(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]).norm()))
                return value

            return super().step(watched)

    fit(recipe(max_grad_norm=0.3, optimizer=lambda p: Probing(p, lr=0.1, max_iter=3), budget=steep.Budget(steps=2)))
    assert len(norms) > 2
    assert max(norms) <= 0.3 + 1e-6
    assert max(norms) > 0.29


def test_a_rule_that_makes_whole_steps_is_not_clipped():
    free, clipped = (fit(steep.method("sven")(recipe(max_grad_norm=norm))) for norm in (None, 1e-3))
    assert torch.equal(weights(free), weights(clipped))


GROUPS = {"norm": {"weight_decay": 0.0}, "bias": {"weight_decay": 0.0}, "3.*": {"lr_scale": 0.1}}


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.5)


def test_groups_by_role_and_by_name_are_those_written_by_hand():
    def hand(model):
        first, norm, _, last = model
        return torch.optim.AdamW(
            [
                {"params": [first.weight]},
                {"params": [first.bias, *norm.parameters()], "weight_decay": 0.0},
                {"params": [last.weight], "lr": 0.05 * 0.1},
                {"params": [last.bias], "lr": 0.05 * 0.1, "weight_decay": 0.0},
            ],
            lr=0.05,
            weight_decay=0.5,
        )

    result = fit(recipe(optimizer=adamw, groups=GROUPS))
    torch.testing.assert_close(weights(result), by_hand(hand)[0])
    for key in GROUPS:  # each of them matters
        fewer = {k: v for k, v in GROUPS.items() if k != key}
        assert not torch.allclose(weights(fit(recipe(optimizer=adamw, groups=fewer))), weights(result))


def test_a_schedule_and_a_tuned_rate_scale_all_groups():
    from steep.evidence.runs.jobs import ScaledOptimizer

    rates = []

    def watched(parameters):
        optimizer = adamw(parameters)
        optimizer.register_step_post_hook(lambda opt, *_: rates.append([g["lr"] for g in opt.param_groups]))
        return optimizer

    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    fit(recipe(optimizer=ScaledOptimizer(watched, 2.0), groups={"head": {"lr_scale": 0.1}}, scheduler=cosine))
    assert rates[0] == [pytest.approx(0.1), pytest.approx(0.01)]
    assert rates[-1][0] < rates[0][0]
    for whole, tenth in rates:
        assert tenth == pytest.approx(whole / 10)


def test_parameters_of_a_loss_have_a_group_by_their_name():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, output, target):
            return F.cross_entropy(output * self.temperature, target, reduction="none")

    steps = []

    def watched(parameters):
        optimizer = adamw(parameters)
        optimizer.register_step_post_hook(
            lambda opt, *_: steps.append([(len(g["params"]), g["lr"]) for g in opt.param_groups])
        )
        return optimizer

    fit(recipe(loss=Scaled(), optimizer=watched, groups={"loss.temperature": {"lr_scale": 10.0}}))
    assert steps[0] == [(6, 0.05), (1, 0.5)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": {"embedding": {"lr_scale": 2.0}}}, "'embedding' fits no parameter; this model has bias, head, hid"),
        ({"groups": {"2.weight": {"lr_scale": 2.0}}}, "'2.weight' fits no parameter; did you mean .*'0.weight'"),
        ({"groups": {"norm": {"lr": 0.1}}}, "'norm' sets lr=0.1: write lr_scale, a factor on the optimizer's lr"),
        ({"groups": {"norm": {"lr_scale": 0}}}, r"lr_scale=0 must lie in \(0, inf\)"),
        ({"groups": {"norm": {"decay": 0}}}, "SGD has no option 'decay'; did you mean"),
        ({"groups": {"norm": 3}}, "groups=.* must map roles or patterns to options"),
        ({"groups": ["norm"]}, "groups=.* must map roles or patterns to options"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm=0.0 must lie in \(0, inf\)"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan"),
        (
            {"max_grad_norm": 1.0, "rounds": lambda *_: iter(())},
            "rounds, .* its max_grad_norm would have",
        ),
        ({"early_stopping": 5}, "early_stopping=5 must be a steep.EarlyStopping"),
        (
            {"early_stopping": steep.EarlyStopping(score="accuracy")},
            "follows 'accuracy', but the recipe is scored by l",
        ),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fit(recipe(**changes))


@pytest.mark.parametrize(
    "wrong", [{"patience": 0}, {"patience": 2.5}, {"min_delta": -1.0}, {"min_delta": float("nan")}, {"every": 0}]
)
def test_wrong_patience_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        steep.EarlyStopping(**wrong)


def scripted(scores):
    """A metric that gives these numbers, one for each evaluation."""
    left = iter(scores)
    return steep.Metric("script", lambda output, target: torch.full((len(target),), next(left)))


LONG = steep.Budget(epochs=20)


@pytest.mark.parametrize(
    ("rule", "scores", "epochs", "best"),
    [
        ({"patience": 2}, [0.1, 0.5, 0.4, 0.5, 9.0], 4, 2),
        ({"patience": 2, "min_delta": 0.2}, [0.1, 0.5, 0.6, 0.65, 9.0], 4, 2),
        ({"patience": 1}, [0.3, 0.2, 9.0], 2, 1),
        ({"patience": 2}, [float("nan"), 0.2, float("nan"), 0.1, 9.0], 4, 2),
    ],
)
def test_it_stops_after_so_many_epochs_without_improvement(rule, scores, epochs, best):
    stopping = steep.EarlyStopping(**rule, score="script")
    base = recipe(budget=LONG, metric=scripted(scores))
    result = fit(base.replace(early_stopping=stopping), evaluate_every=1000)
    assert result.steps == 2 * epochs  # two batches in an epoch
    assert result.val["script"] == pytest.approx(scores[best - 1])
    exactly = fit(recipe(budget=steep.Budget(epochs=best)))
    assert torch.equal(weights(result), weights(exactly))


def test_a_lower_loss_is_better_and_the_last_weights_are_kept_on_request():
    stopping = steep.EarlyStopping(patience=3)
    rising = recipe(budget=LONG, optimizer=lambda p: torch.optim.SGD(p, lr=3.0))
    best, last = (
        fit(rising.replace(early_stopping=steep.EarlyStopping(patience=3, restore_best=restore)))
        for restore in (True, False)
    )
    curve = [entry["loss"] for entry in best.history.evaluations]
    assert best.steps == last.steps < 40
    assert best.val["loss"] == min(curve) < curve[-1] == last.val["loss"]
    plain = fit(rising.replace(budget=steep.Budget(steps=last.steps)))
    assert torch.equal(weights(last), weights(plain))
    assert stopping.restore_best


def test_evaluations_of_ones_own_change_nothing():
    rising = recipe(
        budget=LONG, optimizer=lambda p: torch.optim.SGD(p, lr=3.0), early_stopping=steep.EarlyStopping(patience=3)
    )
    often, seldom = fit(rising, evaluate_every=1), fit(rising, evaluate_every=7)
    assert often.steps == seldom.steps
    assert torch.equal(weights(often), weights(seldom))


def test_a_run_that_ends_first_gives_its_best_weights_too():
    rising = recipe(budget=steep.Budget(steps=9), optimizer=lambda p: torch.optim.SGD(p, lr=3.0))
    result = fit(rising.replace(early_stopping=steep.EarlyStopping(patience=50)))
    curve = [entry["loss"] for entry in result.history.evaluations]
    assert result.steps == 9
    assert result.val["loss"] == min(curve) != curve[-1]


def test_a_run_that_was_killed_goes_on_exactly(tmp_path):
    def build(end=None):
        calls = []

        def optimizer(parameters):
            adam = torch.optim.Adam(parameters, lr=0.3)
            adam.register_step_post_hook(lambda *_: calls.append(1))
            return adam

        def breaking(output, target):
            if len(calls) == end:
                raise ConnectionError
            return loss(output, target)

        return recipe(
            budget=LONG, loss=breaking, score=loss, optimizer=optimizer, early_stopping=steep.EarlyStopping(patience=3)
        )

    whole, path = fit(build()), tmp_path / "run.pt"
    assert 12 < whole.steps < 40
    for end in (3, whole.steps - 9):  # before and after the best look
        with pytest.raises(ConnectionError):
            fit(build(end), checkpoint=path, evaluate_every=1)
    parts = fit(build(), checkpoint=path)
    assert parts.steps == whole.steps
    assert torch.equal(weights(parts), weights(whole))
    again = fit(build(0), checkpoint=path)  # a run that has stopped is not trained on
    assert again.steps == whole.steps
    assert torch.equal(weights(again), weights(whole))

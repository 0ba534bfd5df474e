"""What the engine promises around the rows: refusals, hooks, memory, checks, accumulation into `.grad`."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from steep.per_example import Dense, PerExample, closed_form
from steep.per_example._layers import RULES
from steep.requires import UnmetRequirement


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def mlp(*widths, dtype=torch.float64):
    layers = [m for i, o in itertools.pairwise(widths) for m in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def losses_of(model, x):
    return model(x).square().flatten(1).sum(1)


def jacobian(model, x):
    """By `torch.func`, which knows nothing of hooks."""
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    found = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, x).square().flatten(1).sum(1))(params)
    return torch.cat([j.flatten(1) for j in found.values()], 1)


def hooks_of(model):
    return [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


# ---- bad input


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.SyncBatchNorm(4)])
def test_batch_norm_in_training_mode_is_refused_with_its_name_and_the_way_out(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(norm), nn.Flatten())
    engine = PerExample(model)
    if isinstance(norm, nn.SyncBatchNorm):
        norm.forward = nn.BatchNorm2d(4).forward  # SyncBatchNorm itself needs a process group
    with pytest.raises(
        UnmetRequirement, match=rf"1\.0 \({type(norm).__name__}\) is in training mode: .*GroupNorm.*eval mode"
    ):
        engine.rows(losses_of(model, torch.randn(5, 3, 6, 6)))


def test_batch_norm_without_running_statistics_is_refused_in_evaluation_mode_too():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    engine = PerExample(model)
    with pytest.raises(UnmetRequirement, match="BatchNorm1d"):
        engine.rows(losses_of(model, torch.randn(5, 3)))


def test_batch_norm_of_the_data_couples_no_parameters():
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    rows = PerExample(model).rows(losses_of(model, x))
    j = jacobian(nn.Sequential(model[1]), F.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(rows.gram(), j @ j.T)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda m, x: losses_of(m, x).mean(), r"got shape \(\) .*reduction='none'"),
        (lambda m, x: m(x)[None], r"got shape \(1, 5, 2\)"),
        (lambda m, x: m(x)[:, :0], r"got shape \(5, 0\)"),
        (lambda m, x: losses_of(m, x).long(), "torch.int64"),
        (lambda m, x: losses_of(m, x[:0]), r"got shape \(0,\)"),
        (lambda m, x: losses_of(m, x).detach(), "no parameter that trains"),
        (lambda m, x: x.clone().requires_grad_().sum(1), "no parameter that trains"),
    ],
)
def test_losses_that_are_no_vector_of_the_model(losses, message):
    model = mlp(3, 4, 2)
    engine = PerExample(model)
    with pytest.raises(ValueError, match=message):
        engine.rows(losses(model, torch.randn(5, 3, dtype=torch.float64)))


def test_an_input_modified_in_place_is_refused_with_the_layers_name():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[1].weight.requires_grad_(False)  # so that autograd itself would not notice
    engine = PerExample(model)
    hidden = model[0](torch.randn(5, 3))
    losses = model[1](hidden).square().sum(1)
    hidden.detach().mul_(2)
    with pytest.raises(RuntimeError, match="input of layer '1' was modified in place"):
        engine.rows(losses)


def test_a_state_modified_in_place_is_refused_too():
    model = nn.GRU(3, 4, batch_first=True)
    engine = PerExample(model)
    x, state = torch.randn(5, 2, 3), torch.zeros(1, 5, 4)
    losses = model(x, state)[0].square().sum((1, 2))
    state.add_(1)
    with pytest.raises(RuntimeError, match="modified"):  # by autograd or the engine
        engine.rows(losses)


@pytest.mark.parametrize("changed", [0, 2])
def test_parameters_changed_between_forward_and_rows_are_refused_with_the_layers_name(changed):
    model = mlp(3, 4, 2)
    engine = PerExample(model)
    losses = losses_of(model, torch.randn(5, 3, dtype=torch.float64))
    optimizer = torch.optim.SGD(model[changed].parameters(), 0.1)
    model(torch.randn(5, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=rf"a parameter of layer '{changed}' was changed between the forward"):
        engine.rows(losses)


def test_rows_outlive_an_optimizers_step_or_say_that_they_do_not():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    rows, j = PerExample(model).rows(losses_of(model, x)), jacobian(model, x)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    torch.testing.assert_close(rows.gram(), j @ j.T)
    model = nn.Sequential(nn.Linear(3, 4), Scale(4), nn.Linear(4, 2)).double()
    rows = PerExample(model).rows(losses_of(model, x))
    rows.gram()
    with torch.no_grad():
        model[1].weight.add_(1)
    with pytest.raises(RuntimeError, match="a parameter of a Scale was changed while its rows were still in use"):
        rows.gram()


def test_several_gpus_in_one_process_are_refused():
    model = nn.DataParallel(mlp(3, 4, 2))
    assert PerExample(model).rows(losses_of(model, torch.randn(5, 3, dtype=torch.float64))).gram().shape == (5, 5)
    model.device_ids = [0, 1]  # as where there are two
    with pytest.raises(ValueError, match="use DistributedDataParallel"):
        PerExample(nn.Sequential(model))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(3, 4), nn.Linear(4, 2), reentrant
        self.middle = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4))

    def forward(self, x):
        hidden = torch.utils.checkpoint.checkpoint(self.middle, self.first(x), use_reentrant=self.reentrant)
        return self.last(torch.tanh(hidden))


def test_checkpointed_segments():
    model, x = Checkpointed(False).double(), torch.randn(5, 3, dtype=torch.float64)
    engine = PerExample(model)
    plain = nn.Sequential(model.first, model.middle, nn.Tanh(), model.last)
    j = jacobian(plain, x)[:, [*range(16), *range(j_end := 16 + 40 + 16 + 36, j_end + 10), *range(16, j_end)]]
    for _ in range(2):
        rows = engine.rows(losses_of(model, x))
        torch.testing.assert_close(rows.gram(), j @ j.T)
    assert engine.left_to_autograd == set()
    assert {type(part).__name__ for part in rows.parts} == {"Outer", "Dense"}


def test_segments_checkpointed_where_nothing_can_be_seen_are_refused_with_the_way_out():
    model = Checkpointed(True)
    engine = PerExample(model)
    with pytest.raises(UnmetRequirement, match="give it use_reentrant=False"):
        engine.rows(losses_of(model, torch.randn(5, 3)))


def test_gradients_may_be_turned_off_after_the_forward_but_not_in_it():
    model, x = mlp(3, 4, 2), torch.randn(5, 3, dtype=torch.float64)
    engine = PerExample(model)
    losses, j = losses_of(model, x), jacobian(model, x)
    with torch.no_grad():
        rows = engine.rows(losses)
        torch.testing.assert_close(rows.gram(), j @ j.T)
        rows.backward(torch.ones(5))
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), j.sum(0))
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            losses = losses_of(model, x)
        with pytest.raises(ValueError, match="under no_grad"):
            engine.rows(losses)


@pytest.mark.parametrize("layer", [nn.Embedding(7, 4, sparse=True), nn.EmbeddingBag(7, 4, sparse=True)])
def test_layers_with_sparse_gradients_have_dense_rows(layer):
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(4, 2)).double()
    tokens = torch.randint(7, (5, 1))
    rows = PerExample(model).rows(losses_of(model, tokens))
    j = jacobian(nn.Sequential(nn.Embedding(7, 4, _weight=layer.weight), nn.Flatten(), model[2]), tokens)
    torch.testing.assert_close(rows.gram(), j @ j.T)
    assert not any(g.is_sparse for g in rows.vjp(torch.ones(5)))


# ---- hooks and memory


def test_hooks_go_with_the_engine_or_on_request():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2), nn.ReLU())
    engine = PerExample(model)
    assert len(hooks_of(model)) == 3 + 2  # the layers' and the model's own
    engine.remove()
    assert not hooks_of(model)
    engine = PerExample(model)
    del engine
    gc.collect()
    assert not hooks_of(model)


def test_copies_and_pickles_of_the_model_are_not_watched():
    model = mlp(3, 4, 2)
    engine = PerExample(model)
    x = torch.randn(5, 3, dtype=torch.float64)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        out = other(x)
        torch.testing.assert_close(out, model(x))
        assert not out.grad_fn.metadata
    assert engine.rows(losses_of(model, x)).gram().shape == (5, 5)


def test_nothing_is_recorded_without_grad():
    model = mlp(3, 4, 2)
    engine = PerExample(model)
    with torch.no_grad():
        assert model(torch.randn(5, 3, dtype=torch.float64)).grad_fn is None
    model.requires_grad_(False)
    out = model(torch.randn(5, 3, dtype=torch.float64).requires_grad_())
    assert not out.grad_fn.metadata
    assert engine.left_to_autograd == set()


class Spy(nn.Module):
    """Watches whether the memory of what passed through it is still held by anything, autograd included."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        y = x * 2
        self.seen += [StorageWeakRef(t.untyped_storage()) for t in (x, y)]
        return y

    def alive(self):
        gc.collect()
        return sum(not ref.expired() for ref in self.seen)


def test_a_forward_that_is_never_used_leaves_nothing_behind():
    spy = Spy()
    model = nn.Sequential(nn.Linear(3, 4), spy, nn.Linear(4, 2))
    engine = PerExample(model)
    out = model[2](spy(torch.tanh(model[0](torch.randn(5, 3)))))
    assert spy.alive() == 2
    del out
    assert spy.alive() == 0
    del engine


@pytest.mark.parametrize("outside", [False, True])
def test_activations_are_let_go_although_the_losses_live_on(outside):
    spy = Spy()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), spy, nn.LayerNorm(4), nn.Conv1d(2, 2, 2), nn.Linear(3, 2))
    if outside:
        model.register_parameter("scale", nn.Parameter(torch.ones(())))
    engine = PerExample(model)
    held = []
    for _ in range(3):
        losses = losses_of(model, torch.randn(5, 2, 3)) * (model.scale if outside else 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = engine.rows(losses)
        rows.gram()
        rows.backward(torch.ones(5))
        del rows
        held.append(losses)
    assert spy.alive() == (6 if outside else 2)  # the check of the first batch and autograd's share keep the graph


def test_plain_training_is_not_changed_by_the_hooks():
    x = torch.randn(5, 3, dtype=torch.float64)
    grads = []
    for watch in (False, True):
        torch.manual_seed(1)
        model = mlp(3, 8, 2)
        engine = PerExample(model) if watch else None
        losses_of(model, x).mean().backward()
        grads.append([p.grad for p in model.parameters()])
        del engine
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class Largest(TorchDispatchMode):
    """The most elements that any result had."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // 4)
        return result


def attend(x):
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 100), nn.ReLU(), nn.Linear(100, 10)), (64, 200)),
        (
            nn.Sequential(
                nn.Conv2d(3, 32, 3), nn.GroupNorm(4, 32), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 128, 3, stride=4)
            ),
            (64, 3, 10, 10),
        ),
        (
            nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)),
            (64, 8, 64),
        ),
    ],
)
def test_nowhere_a_matrix_of_the_size_of_the_jacobian(model, x):
    engine = PerExample(model)
    for _ in range(2):
        losses = losses_of(model, torch.randn(x))
        with Largest() as largest:
            rows = engine.rows(losses)
            rows.gram()
            rows.norms()
            rows.backward(torch.ones(64))
        assert largest.numel < 0.5 * 64 * sum(p.numel() for p in model.parameters())


# ---- graphs out of the ordinary


def test_two_forwards_make_one_loss():
    model = mlp(3, 6, 2)
    a, b = torch.randn(2, 5, 3, dtype=torch.float64)
    engine = PerExample(model)
    rows = engine.rows((model(a) - model(b)).square().sum(1))

    def distance(params):
        call = torch.func.functional_call
        return (call(model, params, a) - call(model, params, b)).square().sum(1)

    found = torch.func.jacrev(distance)({k: p.detach() for k, p in model.named_parameters()})
    j = torch.cat([t.flatten(1) for t in found.values()], 1)
    torch.testing.assert_close(rows.gram(), j @ j.T)


def test_the_first_of_two_forwards_is_not_forgotten():
    model = mlp(3, 6, 2)
    a, b = torch.randn(5, 3, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    engine = PerExample(model)
    losses_a, losses_b = losses_of(model, a), losses_of(model, b)
    for losses, x in ((losses_a, a), (losses_b, b)):
        j = jacobian(model, x)
        torch.testing.assert_close(engine.rows(losses).gram(), j @ j.T)
    assert engine.left_to_autograd == set()


def test_rows_of_two_forwards_together():
    model = mlp(3, 6, 2)
    x = torch.randn(8, 3, dtype=torch.float64)
    engine = PerExample(model)
    with pytest.warns(UserWarning, match="called with 4 examples for 8 losses"):
        rows = engine.rows(torch.cat([losses_of(model, x[:4]), losses_of(model, x[4:])]))
    j = jacobian(model, x)
    torch.testing.assert_close(rows.gram(), j @ j.T)


@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_compiled_model(compiled_first):
    """Compiled in pieces where the layers' hooks are; as a whole, and left to autograd, where they came after it."""
    torch._dynamo.reset()
    model, x = mlp(3, 6, 2), torch.randn(5, 3, dtype=torch.float64)
    compiled = torch.compile(model, backend="aot_eager")
    if compiled_first:
        compiled(x)
    engine, j = PerExample(model), jacobian(model, x)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            rows = engine.rows(losses_of(compiled, x))
            torch.testing.assert_close(rows.gram(), j @ j.T)
    assert {type(part).__name__ for part in rows.parts} == {"Blocks" if compiled_first else "Outer"}
    assert any("each step takes" in str(w.message) for w in told) == compiled_first


def test_two_losses_of_one_forward():
    model = mlp(3, 6, 2)
    x = torch.randn(5, 3, dtype=torch.float64)
    engine = PerExample(model)
    losses_a, losses_b = model(x).square().unbind(1)
    a = engine.rows(losses_a, retain_graph=True)
    b = engine.rows(losses_b)
    j = jacobian(model, x)
    total = torch.cat([(p + q).flatten() for p, q in zip(a.vjp(torch.ones(5)), b.vjp(torch.ones(5)), strict=True)])
    torch.testing.assert_close(total, j.sum(0))
    with pytest.raises(RuntimeError, match="second time"):
        engine.rows(losses_b)


def test_several_engines_do_not_disturb_each_other():
    model = mlp(3, 6, 2)
    x = torch.randn(5, 3, dtype=torch.float64)
    engines = [PerExample(model), PerExample(model)]
    losses = losses_of(model, x)
    a, b = engines[0].rows(losses, retain_graph=True).gram(), engines[1].rows(losses).gram()
    assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:each step takes")
def test_layers_changed_after_the_engine_was_made():
    model = mlp(3, 6, 6, 2)
    x = torch.randn(5, 3, dtype=torch.float64)
    engine = PerExample(model)
    model[2] = nn.Linear(6, 6).double()
    nn.utils.parametrizations.weight_norm(model[0])
    for _ in range(2):
        j = jacobian(model, x)
        torch.testing.assert_close(engine.rows(losses_of(model, x)).gram(), j @ j.T)


def test_parameters_may_be_frozen_and_thawed_between_steps():
    model = mlp(3, 6, 2)
    x = torch.randn(5, 3, dtype=torch.float64)
    engine = PerExample(model)
    for train in (True, False, True):
        model[0].requires_grad_(train)
        rows = engine.rows(losses_of(model, x))
        j = jacobian(model, x)
        torch.testing.assert_close(rows.gram(), j @ j.T)
        assert len(rows.params) == (4 if train else 2)


def test_functional_calls_of_a_watched_model():
    model = mlp(3, 6, 2)
    engine = PerExample(model)
    x = torch.randn(5, 3, dtype=torch.float64)
    params = {k: p.detach() for k, p in model.named_parameters()}

    def one(p, xi):
        return torch.func.functional_call(model, p, xi[None]).square().sum()

    grads = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(params, x)
    j = torch.cat([g.flatten(1) for g in grads.values()], 1)
    torch.testing.assert_close(engine.rows(losses_of(model, x)).gram(), j @ j.T)


def test_mixed_precision():
    model, x = mlp(8, 16, 16, 4, dtype=torch.float32), torch.randn(6, 8)
    engine = PerExample(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(x).float().square().sum(1)
    rows = engine.rows(losses)
    j = jacobian(model, x).double()
    assert engine.left_to_autograd == set()
    assert (rows.gram() - j @ j.T).norm() < 0.03 * (j @ j.T).norm()
    assert all(g.dtype == torch.float32 for g in rows.vjp(torch.ones(6)))


def test_float32_is_as_exact_as_float32_can_be():
    model, x = mlp(20, 50, 50, 10, dtype=torch.float32), torch.randn(16, 20)
    gram = PerExample(model).rows(losses_of(model, x)).gram()
    j = jacobian(model.double(), x.double())
    assert (gram - j @ j.T).norm() < 1e-6 * (j @ j.T).norm()


# ---- the check of the first batch


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, dtype=torch.float64))

    def forward(self, x):
        return x * self.weight


@pytest.fixture
def rule_for_scale():
    """Registers a rule with a factor, and forgets it again."""

    def register(factor):
        @closed_form(Scale)
        def scale(layer, x, grad, batch):
            yield Dense((layer.weight,), factor * (x * grad).reshape(batch, -1, len(layer.weight)).sum(1))

    yield register
    RULES.pop(Scale, None)


def test_a_third_partys_rule_is_used(rule_for_scale):
    rule_for_scale(1.0)
    model, x = nn.Sequential(Scale(3), nn.Linear(3, 2).double()), torch.randn(5, 4, 3, dtype=torch.float64)
    rows = PerExample(model).rows(losses_of(model, x))
    assert sorted(type(part).__name__ for part in rows.parts) == ["Dense", "Outer"]
    j = jacobian(model, x)
    torch.testing.assert_close(rows.gram(), j @ j.T)


def test_a_wrong_rule_is_noticed_named_and_replaced(rule_for_scale):
    rule_for_scale(1.5)
    model, x = nn.Sequential(Scale(3), nn.Linear(3, 2).double()), torch.randn(5, 3, dtype=torch.float64)
    j = jacobian(model, x)
    wrong = PerExample(model, check=False).rows(losses_of(model, x)).gram()
    assert (wrong - j @ j.T).norm() > 1e-3 * (j @ j.T).norm()
    engine = PerExample(model)
    with pytest.warns(UserWarning, match=r"0\.weight"):
        rows = engine.rows(losses_of(model, x))
    torch.testing.assert_close(rows.gram(), j @ j.T)
    assert engine.left_to_autograd == {"0.weight"}
    torch.testing.assert_close(engine.rows(losses_of(model, x)).gram(), j @ j.T)


def test_a_wrong_rule_is_noticed_where_its_gradient_is_next_to_nothing(rule_for_scale):
    rule_for_scale(1.5)
    model, x = nn.Sequential(Scale(3), nn.Linear(3, 2).double()), torch.randn(5, 3, dtype=torch.float64)
    model[1].weight.data.mul_(1e-7)
    engine = PerExample(model)
    with pytest.warns(UserWarning, match=r"0\.weight"):
        engine.rows(losses_of(model, x))


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2).double()

    def forward(self, x):
        return self.linear(x.transpose(0, 1)).transpose(0, 1)


def test_a_layer_whose_output_fits_a_later_batch_by_accident_is_checked_then():
    model = TimeFirst()
    engine = PerExample(model)
    for length in (4, 5, 5, 4):  # of 5 examples
        x = torch.randn(5, length, 3, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = engine.rows(losses_of(model, x))
        j = jacobian(model, x)
        torch.testing.assert_close(rows.gram(), j @ j.T)
    assert engine.left_to_autograd == {"linear.weight", "linear.bias"}


def test_a_value_that_seems_to_be_shared_by_a_later_batch_is_checked_then():
    model = mlp(3, 2)
    model.bias = nn.Parameter(torch.randn(3, dtype=torch.float64))
    engine = PerExample(model)
    for batch in (5, 4, 5):  # of 4 positions
        x = torch.randn(4, batch, 3, dtype=torch.float64)
        losses = model[0](torch.tanh(x + model.bias).transpose(0, 1)).square().sum((1, 2))
        rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
        j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(engine.rows(losses).gram(), j @ j.T)
    assert engine.left_to_autograd == {"bias"}


def test_an_odd_batch_does_not_make_the_others_slow():
    model, x = mlp(3, 4, 2), torch.randn(6, 3, dtype=torch.float64)
    engine = PerExample(model)
    for chosen in (slice(None), slice(0, 4), slice(None)):
        rows = engine.rows(losses_of(model, x)[chosen])
        j = jacobian(model, x)[chosen]
        torch.testing.assert_close(rows.gram(), j @ j.T)
    assert {type(part).__name__ for part in rows.parts} == {"Outer"}


def test_running_a_layer_again_does_not_change_its_buffers():
    class Counting(Scale):
        def __init__(self):
            super().__init__(3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x * self.weight

    model, x = nn.Sequential(Counting(), nn.Linear(3, 2).double()), torch.randn(5, 3, dtype=torch.float64)
    rows = PerExample(model).rows(losses_of(model, x))
    assert {type(part).__name__ for part in rows.parts} == {"Outer", "Blocks"}
    plain = Scale(3)
    plain.weight = model[0].weight
    j = jacobian(nn.Sequential(plain, model[1]), x)
    torch.testing.assert_close(rows.gram(), j @ j.T)
    assert model[0].calls == 1


def test_the_check_waits_for_a_finite_batch(rule_for_scale):
    rule_for_scale(2.0)
    model, x = nn.Sequential(Scale(3), nn.Linear(3, 2).double()), torch.randn(5, 3, dtype=torch.float64)
    engine = PerExample(model)
    assert engine.rows(losses_of(model, x * torch.nan)).gram().isnan().all()
    assert engine.left_to_autograd == set()
    with pytest.warns(UserWarning, match=r"0\.weight"):
        engine.rows(losses_of(model, x))


# ---- what is done with rows


def test_backward_adds_to_grad_and_wakes_the_hooks_of_the_parameters():
    model = mlp(3, 4, 2)
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    seen = []
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    x, w = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    engine = PerExample(model)
    engine.rows(losses_of(model, x)).backward(w)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(torch.cat([g.flatten() for g in once]), w @ jacobian(mlp_of(model), x))
    engine.rows(losses_of(model, x)).backward(w)
    assert model.unused.grad is None
    assert len(seen) == 2
    for p, g in zip([p for p in model.parameters() if p.grad is not None], once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


def mlp_of(model):
    return nn.Sequential(*model.children())


def test_restricted_rows_are_rows_with_columns_set_to_zero():
    model = nn.Sequential(nn.Conv2d(2, 6, 2), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(24, 4)).double()
    model.register_parameter("scale", nn.Parameter(torch.tensor(2.0, dtype=torch.float64)))
    x = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    engine = PerExample(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = engine.rows(losses_of(mlp_of(model), x) * model.scale)
    part = rows.restrict(0.5, torch.Generator().manual_seed(0))
    names = {name: k for k, (name, _) in enumerate(model.named_parameters())}
    grads = part.vjp(torch.ones(5, dtype=torch.float64))
    kept = {name: grads[k].reshape(grads[k].shape[0] if grads[k].ndim else 1, -1).any(1) for name, k in names.items()}
    assert [int(kept[n].sum()) for n in ("0.weight", "1.weight", "3.weight", "scale")] == [3, 3, 2, 1]
    assert torch.equal(kept["0.weight"], kept["0.bias"])
    assert torch.equal(kept["3.weight"], kept["3.bias"])
    full = rows.vjp(torch.ones(5, dtype=torch.float64))
    for name, k in names.items():
        mask = kept[name].view(-1, *[1] * (full[k].ndim - 1)) if full[k].ndim else kept[name][0]
        torch.testing.assert_close(grads[k], full[k] * mask)
    columns = torch.cat([(g != 0).flatten() for g in grads]).double()
    j = torch.stack([torch.cat([g.flatten() for g in rows.vjp(one)]) for one in torch.eye(5, dtype=torch.float64)])
    torch.testing.assert_close(part.gram(), (j * columns) @ j.T)
    torch.testing.assert_close(part.norms(), (j * columns).norm(dim=1))


def test_every_output_neuron_has_the_same_chance_to_be_kept():
    model = mlp(3, 10, 2)
    rows = PerExample(model).rows(losses_of(model, torch.randn(5, 3, dtype=torch.float64)))
    generator = torch.Generator().manual_seed(0)
    draws = 400
    counts = sum((rows.restrict(0.3, generator).vjp(torch.ones(5))[1] != 0).double() for _ in range(draws))
    assert counts.sum() == 3 * draws
    spread = (draws * 0.3 * 0.7) ** 0.5
    assert (counts - 0.3 * draws).abs().max() < 4 * spread

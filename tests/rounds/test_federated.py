"""Messages, arithmetic, the oracle and the rounds of `steep.rounds._federated`, with toy methods only."""

import copy
import io
import math
import pickle
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from steep import UnmetRequirement, tensor_loader
from steep.rounds import _federated as fed
from steep.utils.randomness import Stream


def losses_of(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def make_clients(sizes=(7, 12, 6, 10), batch_size=4, seed=0, shuffle=True):
    torch.manual_seed(seed)
    return [
        tensor_loader(torch.randn(n, 6), torch.randint(3, (n,)), min(n, batch_size), shuffle=shuffle) for n in sizes
    ]


def make_model(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(dropout), nn.Tanh(), nn.Linear(5, 3))


class Toy(fed.Federation):
    """Local SGD and a plain mean; a client also counts its visits in its state."""

    @staticmethod
    def client_step(state, received, batches, *, oracle):
        x, buffers, losses = fed.take("parameter", received), fed.take("buffer", received), []
        for batch in batches:
            seen = oracle(x, buffers, batch)
            x, buffers = fed.descend(x, seen.gradient, received["lr"]), seen.buffers
            losses.append(seen.losses)
        state = state | {"visits": state.get("visits", 0) + 1}
        return state, fed.put("parameter", x) | fed.put("buffer", buffers) | {"losses": torch.cat(losses)}

    @staticmethod
    def server_step(state, messages):
        x = fed.put("parameter", fed.mean("parameter", messages)) | fed.put("buffer", fed.mean("buffer", messages))
        return x | {"lr": state["lr"]}, x | {"lr": state["lr"]}


def make_rounds(model=None, clients=None, *, local_step=losses_of, seed=0, **hyper):
    model, clients = model or make_model(), clients or make_clients()
    hyper = {"fraction": 0.5, "local_steps": 3, "lr": 0.1} | hyper
    return Toy(model, clients, local_step, generator=torch.Generator().manual_seed(seed), **hyper)


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


# ---- messages


def test_put_and_take_are_inverse_and_groups_do_not_mix():
    x = {"0.weight": torch.ones(2), "bias": torch.zeros(())}
    message = fed.put("parameter", x) | fed.put("parameters", {"bias": torch.ones(1)}) | {"parameter": 3, "lr": 0.1}
    assert equal(fed.take("parameter", message), x)
    assert fed.take("dual", message) == {}


def test_mean_is_the_weighted_mean():
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=(3, 2, 5)), [1, 5, 2]
    messages = [{"x.w": torch.from_numpy(v), "x.s": torch.tensor(float(v[0, 0]))} for v in values]
    found = fed.mean("x", messages, weights)
    np.testing.assert_allclose(found["w"].numpy(), np.average(values, axis=0, weights=weights), rtol=1e-6)
    assert found["s"].shape == ()
    np.testing.assert_allclose(fed.mean("x", messages)["w"].numpy(), values.mean(0), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mean_does_not_depend_on_the_order_and_keeps_the_dtype(dtype):
    torch.manual_seed(0)
    messages = [{"x.w": torch.randn(50).to(dtype)} for _ in range(6)]
    forth, back = fed.mean("x", messages)["w"], fed.mean("x", messages[::-1])["w"]
    assert forth.dtype == dtype
    torch.testing.assert_close(forth, back)


def test_mean_in_low_precision_is_as_exact_as_its_dtype():
    torch.manual_seed(0)
    values = 100 + torch.randn(7, 200)
    found = fed.mean("x", [{"x.w": v.bfloat16()} for v in values])["w"]
    exact = values.bfloat16().double().mean(0)
    assert ((found.double() - exact).abs() <= 0.5 * 2**-7 * exact).all()  # one rounding, not one per client


def test_mean_leaves_constants_alone_and_rounds_integers():
    table = torch.tensor([0.1, float("-inf"), 1 / 3])
    messages = [{"b.table": table, "b.count": torch.tensor(n), "b.on": torch.tensor(True)} for n in (3, 4, 6)]
    found = fed.mean("b", messages, [1, 3, 7])
    assert torch.equal(found["table"], table)
    assert found["count"].item() == round((3 + 12 + 42) / 11)
    assert found["count"].dtype == torch.int64
    assert found["on"].dtype == torch.bool


def test_mean_of_nothing_and_bad_weights_are_refused():
    with pytest.raises(ValueError, match=r"messages is empty: .* at least one client"):
        fed.mean("x", [])
    with pytest.raises(ValueError, match=r"weights=\[1, 0\] must be positive"):
        fed.mean("x", [{"x.w": torch.ones(1)}] * 2, [1, 0])


# ---- arithmetic


def tensors(seed):
    torch.manual_seed(seed)
    return {"w": torch.randn(4, 3), "b": torch.randn(3), "s": torch.randn(())}


def test_arithmetic_matches_tensor_by_tensor_and_changes_nothing():
    x, y = tensors(0), tensors(1)
    reversed_y = dict(reversed(y.items()))
    before = copy.deepcopy((x, y))
    sums, scaled = fed.add(x, reversed_y, -0.3), fed.scale(x, torch.tensor(2.5))
    for name in x:
        torch.testing.assert_close(sums[name], x[name] - 0.3 * y[name])
        torch.testing.assert_close(scaled[name], 2.5 * x[name])
    flat = torch.cat([t.flatten() for t in x.values()])
    torch.testing.assert_close(fed.norm(x), flat.norm())
    assert equal(x, before[0])
    assert equal(y, before[1])
    assert all((t == 0).all() for t in fed.zeros(x).values())


@pytest.mark.parametrize("max_norm", [0.5, 100.0, math.inf])
def test_clip_is_torchs(max_norm):
    gradient = tensors(2)
    parameters = [nn.Parameter(torch.zeros_like(t)) for t in gradient.values()]
    for p, g in zip(parameters, gradient.values(), strict=True):
        p.grad = g.clone()
    nn.utils.clip_grad_norm_(parameters, max_norm)
    for p, g in zip(parameters, fed.clip(gradient, max_norm).values(), strict=True):
        torch.testing.assert_close(g, p.grad)


def test_descend_is_torchs_sgd():
    x, gradient = tensors(3), tensors(4)
    parameters = [nn.Parameter(t.clone()) for t in x.values()]
    for p, g in zip(parameters, gradient.values(), strict=True):
        p.grad = g.clone()
    torch.optim.SGD(parameters, lr=0.3, weight_decay=0.1).step()
    for p, t in zip(parameters, fed.descend(x, gradient, 0.3, 0.1).values(), strict=True):
        torch.testing.assert_close(t, p.detach())


# ---- oracle


def groups(model):
    message = fed.snapshot(model)
    return fed.take("parameter", message), fed.take("buffer", message)


def test_oracle_gives_autograds_gradient_wherever_the_model_stood():
    model, batch = make_model(1), next(iter(make_clients(shuffle=False)[1]))
    x, buffers = groups(model)
    losses = losses_of(model, batch)
    losses.mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for tensor in [*model.parameters(), model[1].running_mean]:
        tensor.data.add_(1.0)
    with torch.no_grad():  # a caller's mode does not matter
        seen = fed.Oracle(model, losses_of)(x, buffers, batch)
    assert torch.equal(seen.losses, losses)
    assert equal(seen.gradient, expected)
    assert not seen.losses.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_oracle_is_pure_and_returns_the_buffers_after_the_pass():
    model, batch = make_model(1), next(iter(make_clients(shuffle=False)[1]))
    x, buffers = groups(model)
    before = copy.deepcopy((x, buffers))
    oracle = fed.Oracle(model, losses_of)
    first, second = oracle(x, buffers, batch), oracle(x, buffers, batch)
    assert equal(x, before[0])
    assert equal(buffers, before[1])
    assert equal(first.buffers, second.buffers)
    assert first.buffers["1.num_batches_tracked"] == 1
    batch_mean = model[0](batch[0]).mean(0).detach()
    torch.testing.assert_close(first.buffers["1.running_mean"], 0.1 * batch_mean)


def test_oracle_with_frozen_unused_and_shared_parameters():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)
            self.unused, self.a, self.b = (nn.Parameter(torch.ones(6)) for _ in range(3))

        def forward(self, x):
            return (x * self.frozen + self.a + self.b).sum(1)

    model = Odd()
    x, buffers = groups(model)
    assert list(x) == ["unused", "a", "b"]
    gradient = fed.Oracle(model, lambda m, b: m(b[0]))(x, buffers, (torch.randn(3, 6),)).gradient
    assert (gradient["unused"] == 0).all()
    moved = fed.descend(x, fed.clip(gradient, math.inf), 0.1)
    assert torch.equal(moved["a"], torch.full((6,), 0.9))
    assert torch.equal(moved["b"], torch.full((6,), 0.9))


def test_oracle_sees_buffers_that_the_model_replaces():
    class Replacing(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(6))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return x @ self.w * self.calls

    model = Replacing()
    oracle, (x, buffers) = fed.Oracle(model, lambda m, b: m(b[0])), groups(model)
    batch = (torch.ones(2, 6),)
    once = oracle(x, buffers, batch)
    twice = oracle(x, once.buffers, batch)
    assert (once.buffers["calls"], twice.buffers["calls"]) == (1, 2)
    assert torch.equal(oracle(x, buffers, batch).losses, once.losses)


# ---- batches


def test_local_batches_pass_over_the_data_again_and_again():
    loader = make_clients((10,), batch_size=4)[0]
    outside = torch.get_rng_state()
    batches = list(fed.local_batches(loader, 7, Stream(1, "order")))
    assert torch.equal(torch.get_rng_state(), outside)
    assert [len(b[0]) for b in batches] == [4, 4, 2, 4, 4, 2, 4]
    seen = [torch.cat([b[2] for b in part]).tolist() for part in (batches[:3], batches[3:6])]
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(10))
    assert seen[0] != seen[1]
    again, other = (
        torch.cat([b[2] for b in fed.local_batches(loader, 3, Stream(seed, "order"))]).tolist() for seed in (1, 2)
    )
    assert again == seen[0]
    assert other != seen[0]


# ---- rounds


def test_a_round_yields_losses_and_leaves_the_servers_model_in_the_model():
    rounds = make_rounds()
    losses = next(rounds)
    sizes = [sum(len(b[0]) for b in fed.local_batches(loader, 3, Stream(0, ""))) for loader in rounds.clients]
    assert losses.ndim == 1
    assert not losses.requires_grad
    visited = [i for i, state in enumerate(rounds.states) if "visits" in state]
    assert len(losses) == sum(sizes[i] for i in visited)
    assert len(visited) == 2
    assert equal(fed.snapshot(rounds.model), {k: v for k, v in rounds.broadcast.items() if k != "lr"})
    assert rounds.broadcast["buffer.1.num_batches_tracked"] == 3


def test_clients_keep_their_state_and_the_others_keep_none():
    rounds = make_rounds(fraction=0.25)
    sampled = Counter()
    for _ in range(5):
        sampled.update(rounds.sample())
        next(rounds)
    assert [state.get("visits", 0) for state in rounds.states] == [sampled[i] for i in range(4)]
    assert [state["examples"] for state in rounds.states] == [7, 12, 6, 10]


def test_sampling_is_uniform_without_replacement():
    rounds = make_rounds(clients=make_clients((4,) * 10), fraction=0.3)
    count, pairs, trials = Counter(), Counter(), 3000
    for rounds.round in range(trials):
        chosen = rounds.sample()
        assert len(set(chosen)) == 3
        count.update(chosen)
        pairs[chosen[0], chosen[1]] += 1
    sigma = (trials * 0.3 * 0.7) ** 0.5
    assert max(abs(count[i] - 0.3 * trials) for i in range(10)) < 4 * sigma
    assert max(abs(count[i] - 0.3 * trials) for i in range(10)) > 0.2 * sigma  # drawn, not dealt in turn
    assert len(pairs) > 30


@pytest.mark.parametrize(("fraction", "count"), [(1.0, 4), (0.5, 2), (0.01, 1)])
def test_at_least_one_client_is_sampled(fraction, count):
    assert len(make_rounds(fraction=fraction).sample()) == count


def test_the_order_of_the_clients_does_not_matter():
    forth, back = make_rounds(fraction=1.0, seed=3), make_rounds(fraction=1.0, seed=3)
    back.sample = lambda: [3, 1, 0, 2]
    for _ in range(2):
        next(forth), next(back)
    for a, b in zip(forth.model.parameters(), back.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_random_numbers_are_the_rounds_own():
    a, b = (make_rounds(make_model(dropout=0.5), seed=1) for _ in range(2))
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = [next(a) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(22)
    second = [next(b) for _ in range(2)]
    assert all(map(torch.equal, first, second))
    other = next(make_rounds(make_model(dropout=0.5), seed=2))
    assert other.shape != first[0].shape or not torch.equal(other, first[0])


def orders_of(rounds_count=2, dropout=0.0, **hyper):
    """The indices of every batch, in the order in which they were seen."""
    seen = []

    def recording(model, batch):
        seen.append(batch[2].tolist())
        return losses_of(model, batch)

    rounds = make_rounds(make_model(dropout=dropout), local_step=recording, **hyper)
    for _ in range(rounds_count):
        next(rounds)
    return seen


def test_data_order_does_not_depend_on_what_the_model_draws():
    assert orders_of(local_steps=5, dropout=0.0) == orders_of(local_steps=5, dropout=0.5)


def test_each_client_has_a_new_order_in_each_round():
    seen = orders_of(3, clients=make_clients((12, 12)), fraction=1.0, local_steps=3)
    visits = [tuple(index for batch in seen[i : i + 3] for index in batch) for i in range(0, 18, 3)]
    assert len(set(visits)) == 6
    assert all(sorted(visit) == list(range(12)) for visit in visits)


def test_every_message_and_state_is_plain_tensors_and_numbers():
    rounds = make_rounds()
    sent = []
    step = rounds.on_client
    rounds.on_client = lambda *args: sent.append(step(*args)) or sent[-1]
    next(rounds)
    for content in [part for pair in sent for part in pair] + [rounds.server, rounds.broadcast]:
        assert all(isinstance(v, torch.Tensor | float | int) for v in content.values())
        assert not any(v.requires_grad for v in content.values() if isinstance(v, torch.Tensor))
        buffer = io.BytesIO()
        torch.save(content, buffer)
        buffer.seek(0)
        assert equal(torch.load(buffer, weights_only=True), content)


def test_clients_elsewhere_give_the_same_round():
    """What a back-end does: pickle state and broadcast, compute on another copy of the model, pickle the answer."""
    here, there = make_rounds(fraction=1.0), make_rounds(fraction=1.0)
    away = partial(Toy.client_step, oracle=fed.Oracle(make_model(seed=99), losses_of))

    def remote(state, received, batches):
        return pickle.loads(pickle.dumps(away(*pickle.loads(pickle.dumps((state, received))), batches)))

    there.on_client = remote
    for _ in range(3):
        assert torch.equal(next(here), next(there))
    assert equal(here.server, there.server)


def test_resume_is_exact_with_loaders_that_have_their_own_generator():
    def make(seed):
        torch.manual_seed(0)
        sets = [TensorDataset(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(4)]
        own = [torch.Generator().manual_seed(seed + i) for i in range(4)]
        clients = [DataLoader(s, batch_size=2, shuffle=True, generator=g) for s, g in zip(sets, own, strict=True)]
        return make_rounds(make_model(seed, dropout=0.3), clients, seed=seed)

    straight = make(1)
    expected = [next(straight) for _ in range(6)]
    first = make(1)
    found = [next(first) for _ in range(3)]
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    next(first)  # the saved state is not touched by going on
    buffer.seek(0)
    second = make(7)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert second.model[1].num_batches_tracked == 9
    found += [next(second) for _ in range(3)]
    assert all(map(torch.equal, found, expected))
    assert equal(fed.snapshot(second.model), fed.snapshot(straight.model))
    assert [s.get("visits") for s in second.states] == [s.get("visits") for s in straight.states]


def test_state_dict_is_not_changed_by_later_rounds():
    rounds = make_rounds()
    next(rounds)
    saved = rounds.state_dict()
    frozen = copy.deepcopy(saved)
    next(rounds)
    assert saved["round"] == frozen["round"] == 1
    assert equal(saved["server"], frozen["server"])
    assert saved["clients"] == frozen["clients"]


def test_a_failed_round_changes_nothing_and_can_be_done_again():
    fail = []

    def failing(model, batch):
        if fail:
            fail.append(1)
            if len(fail) > 4:  # in the middle of the second client
                raise RuntimeError("no power")
        return losses_of(model, batch)

    rounds, undisturbed = make_rounds(local_step=failing), make_rounds()
    next(rounds), next(undisturbed)
    before, clients = fed.snapshot(rounds.model), list(rounds.states)
    fail.append(1)
    with pytest.raises(RuntimeError, match="no power"):
        next(rounds)
    assert equal(fed.snapshot(rounds.model), before)
    assert rounds.states == clients
    fail.clear()
    assert torch.equal(next(rounds), next(undisturbed))


def test_a_model_that_is_not_finite_is_refused_before_it_is_averaged():
    rounds = make_rounds(local_step=lambda m, b: losses_of(m, b) * (float("nan") if rounds.round == 1 else 1))
    next(rounds)
    before = fed.snapshot(rounds.model)
    with pytest.raises(ArithmeticError, match=r"client \d sends a model that is not finite in round 1.*lower lr"):
        next(rounds)
    assert equal(fed.snapshot(rounds.model), before)


def test_the_models_mode_and_gradients_are_left_alone():
    model = make_model()
    model[2].eval()
    model[0].weight.grad = torch.ones(5, 6)
    next(make_rounds(model))
    assert model.training
    assert not model[2].training
    assert torch.equal(model[0].weight.grad, torch.ones(5, 6))
    assert all(p.requires_grad for p in model.parameters())


# ---- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fraction": 0.0}, r"fraction=0.0 must be in \(0, 1\]"),
        ({"fraction": 1.5}, r"fraction=1.5 must be in \(0, 1\]"),
        ({"fraction": float("nan")}, r"fraction=nan must be in \(0, 1\]"),
        ({"local_steps": 0}, r"local_steps=0 must be an integer >= 1"),
        ({"local_steps": 2.5}, r"local_steps=2.5 must be an integer >= 1"),
        ({"lr": 0.0}, r"^lr=0.0 must be positive"),
        ({"lr_decay": 1.1}, r"^lr_decay=1.1 must be in \(0, 1\]"),
        ({"weight_decay": -1.0}, r"^weight_decay=-1.0 must be at least 0"),
        ({"clip_norm": 0.0}, r"^clip_norm=0.0 must be positive \(math.inf: no clipping\)"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        make_rounds(**change)


def test_no_clients_is_an_unmet_requirement_with_its_remedy():
    with pytest.raises(UnmetRequirement, match=r"Toy needs training data divided among clients: .*dirichlet_clients"):
        Toy(make_model(), (), losses_of, generator=torch.Generator())


def test_a_step_that_names_an_unknown_hyper_parameter_is_refused():
    class Wrong(Toy):
        @staticmethod
        def server_step(state, messages, *, momentum):
            return state, state

    with pytest.raises(AttributeError, match="momentum"):
        Wrong(make_model(), make_clients(), losses_of, generator=torch.Generator())


def test_a_client_without_data_is_named():
    empty = DataLoader(TensorDataset(torch.randn(3, 6)), batch_size=4, drop_last=True)
    with pytest.raises(ValueError, match=r"clients\[2\] has no data"):
        make_rounds(clients=[*make_clients((4, 4)), empty])


def test_examples_are_counted_without_drawing():
    class Batches(list):
        def __iter__(self):
            torch.randperm(3)
            return super().__iter__()

    batches = Batches([(torch.randn(4, 6), torch.zeros(4).long()), (torch.randn(2, 6), torch.zeros(2).long())])
    model = make_model()
    before = torch.get_rng_state()
    rounds = make_rounds(model, [batches])
    assert torch.equal(torch.get_rng_state(), before)
    assert rounds.states == [{"examples": 6}]


def test_state_of_other_clients_is_refused():
    with pytest.raises(ValueError, match="the state is of 4 clients, this has 2"):
        make_rounds(clients=make_clients((4, 4))).load_state_dict(make_rounds().state_dict())

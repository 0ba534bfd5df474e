"""Hessian alignment against closed forms of a softmax head; its estimates, limits, schedule and place in a recipe."""

import copy
import io
import itertools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

import steep
from steep.linalg import rademacher
from steep.losses import hessian_alignment
from steep.losses.hessian_alignment import HessianAlignment, by_domain, method
from steep.recipe import Run

KINDS = ("hgp", "hutchinson", "exact")


def cross_entropy(output, target):
    return F.cross_entropy(output, target, reduction="none")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def aligned(head, loss=cross_entropy, seed=0, **hyper):
    return HessianAlignment(head, loss, generator(seed), **hyper)


def examples(n=30, inputs=4, classes=3, domains=3, seed=0):
    """Inputs, classes and domains of unequal size, float64."""
    g = generator(seed)
    x, y = torch.randn(n, inputs, generator=g).double(), torch.randint(classes, (n,), generator=g)
    return x, y, torch.arange(n).square() % 7 % domains


def network(inputs=4, hidden=3, classes=3, seed=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes)).double()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# -- against an independent reference -----------------------------------------------------------------------------


class Reference:
    """The loss in NumPy, from the closed forms of a softmax head: gradient mean (p - y) ⊗ φ, Hessian mean S ⊗ φφᵀ."""

    def __init__(self, model, x, y, domains, kind, alpha, beta, detach):
        self.weights = [p.detach().numpy().copy() for p in model.parameters()]  # W1, b1, W2, b2
        self.x, self.y, self.domains = x.numpy(), np.eye(3)[y.numpy()], domains.numpy()
        self.kind, self.alpha, self.beta, self.detach = kind, alpha, beta, detach

    def parts(self, weights, members):
        """Mean loss, gradient and curvature (diagonal, or Hessian) of a domain by W2 and b2, flat."""
        w1, b1, w2, b2 = weights
        phi, y = np.tanh(self.x[members] @ w1.T + b1), self.y[members]
        z = phi @ w2.T + b2
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        phi = np.c_[phi, np.ones(len(phi))]  # the bias
        g = np.einsum("nc,nf->cf", p - y, phi) / len(y)
        s = np.einsum("nc,cd->ncd", p, np.eye(3)) - np.einsum("nc,nd->ncd", p, p)
        h = np.einsum("ncd,nf,ng->cfdg", s, phi, phi) / len(y)
        return -(y * np.log(p)).sum(1).mean(), g.ravel(), h.reshape(g.size, g.size)

    def statistics(self, weights):
        found = [self.parts(weights, self.domains == d) for d in np.unique(self.domains)]
        losses, g, h = (np.array(values) for values in zip(*found, strict=True))
        mean = g.mean(0)
        if self.kind == "hgp":
            return losses.mean(), g, mean, np.einsum("eij,ej->ei", h, g), h.mean(0) @ mean
        diagonals = np.einsum("eii->ei", h)
        return losses.mean(), g, mean, diagonals, diagonals.mean(0)

    def value(self, weights, constants=None):
        loss, g, mean, h, mean_h = self.statistics(weights)
        mean, mean_h = constants or (mean, mean_h)
        spread = self.alpha * ((h - mean_h) ** 2).sum(1) + self.beta * ((g - mean) ** 2).sum(1)
        return loss + spread.mean()

    def gradient(self, eps=1e-5):
        """By central differences; what is detached stays what it is at these weights."""
        _, _, mean, _, mean_h = self.statistics(self.weights)
        constants, found = (mean, mean_h) if self.detach else None, []
        for k, weight in enumerate(self.weights):
            slope = np.zeros_like(weight)
            for index in np.ndindex(weight.shape):
                sides = []
                for sign in (1, -1):
                    moved = [w.copy() for w in self.weights]
                    moved[k][index] += sign * eps
                    sides.append(self.value(moved, constants))
                slope[index] = (sides[0] - sides[1]) / (2 * eps)
            found.append(slope)
        return found


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("kind", ["hgp", "exact"])
def test_three_steps_equal_numpy_written_from_the_formula(kind, detach):
    (x, y, domains), model = examples(), network()
    settings = {"kind": kind, "alpha": 30.0, "beta": 3.0, "detach": detach}
    loss, reference = aligned(model[-1], **settings), Reference(model, x, y, domains, **settings)
    for _ in range(3):
        value = loss(model(x), y, domains=domains)
        assert value.shape == ()
        model.zero_grad()
        value.backward()
        np.testing.assert_allclose(value.item(), reference.value(reference.weights), rtol=1e-10)
        for p, w, slope in zip(model.parameters(), reference.weights, reference.gradient(), strict=True):
            np.testing.assert_allclose(p.grad, slope, rtol=1e-6, atol=1e-8)
            w -= 0.3 * slope
            with torch.no_grad():
                p -= 0.3 * p.grad
        loss.step()


@pytest.mark.parametrize("kind", ["hgp", "exact"])
def test_curvatures_equal_the_closed_form_to_rounding(kind):
    (x, y, domains), model = examples(), network()
    loss, reference = aligned(model[-1], kind=kind), Reference(model, x, y, domains, kind, 1, 1, True)
    _, g, _, h, _ = reference.statistics(reference.weights)
    order = np.r_[np.arange(12).reshape(3, 4)[:, :3].ravel(), np.arange(12).reshape(3, 4)[:, 3]]  # weights, then biases
    for k, each in enumerate(by_domain(cross_entropy(model(x), y), domains)):
        gradient = loss._gradient(each)
        np.testing.assert_allclose(gradient.detach(), g[k][order], atol=1e-10)
        np.testing.assert_allclose(loss._curvature(gradient).detach(), h[k][order], atol=1e-10)


class Parameters(nn.Module):
    def __init__(self, *values):
        super().__init__()
        self.values = nn.ParameterList(nn.Parameter(v) for v in values)


def quadratic(p=6, seed=0):
    """A head of two tensors with p numbers, and ``loss(A, b) = ½ θᵀAθ - bᵀθ`` of it."""
    values = torch.randn(p, generator=generator(seed)).double()
    head = Parameters(values[:2].clone().view(1, 2), values[2:].clone())

    def loss(a, b):
        theta = torch.cat([v.flatten() for v in head.values])
        return theta @ a @ theta / 2 - b @ theta

    return head, values, loss


def matrices(count, p=6, seed=1):
    g = generator(seed)
    found = [torch.randn(p, p, generator=g).double() for _ in range(count)]
    return [a + a.T for a in found], [torch.randn(p, generator=g).double() for _ in range(count)]


def test_of_quadratic_losses_everything_is_known():
    head, theta, quad = quadratic()
    (a, b), alpha, beta = matrices(3), 0.3, 0.7
    g = torch.stack([m @ theta - v for m, v in zip(a, b, strict=True)])
    h, mean = torch.stack([m @ r for m, r in zip(a, g, strict=True)]), g.mean(0)
    spread = beta * (g - mean).square().sum() / 3
    h_mean, diagonals = torch.stack(a).mean(0) @ mean, torch.stack([m.diagonal() for m in a])
    expected = {
        "hgp": alpha * (h - h_mean).square().sum() / 3 + spread,
        "exact": alpha * (diagonals - diagonals.mean(0)).square().sum() / 3 + spread,
    }
    for kind, value in expected.items():
        loss = aligned(head, kind=kind, alpha=alpha, beta=beta)
        found = loss.penalty([quad(m, v) for m, v in zip(a, b, strict=True)])
        torch.testing.assert_close(found.detach(), value, rtol=1e-12, atol=1e-12)


# -- Hutchinson's estimates -----------------------------------------------------------------------------------------


def estimate(a, probes, seed=0):
    """Diagonal of A found by Hutchinson."""
    head, _, quad = quadratic()
    loss = aligned(head, kind="hutchinson", probes=probes, seed=seed)
    return loss._curvature(loss._gradient(quad(a, torch.zeros(6).double()))).detach()


def test_all_sign_vectors_give_the_exact_diagonal(monkeypatch):
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)))
    monkeypatch.setattr(hessian_alignment, "rademacher", lambda n, g: signs.flatten())
    a = matrices(1)[0][0]
    torch.testing.assert_close(estimate(a, 64), a.diagonal(), rtol=1e-12, atol=1e-12)


def test_a_diagonal_hessian_needs_one_probe():
    a = torch.arange(1.0, 7.0).diag().double()
    torch.testing.assert_close(estimate(a, 1), a.diagonal(), rtol=1e-12, atol=1e-12)


def test_the_estimate_is_unbiased_and_its_variance_falls_with_the_probes():
    a, probes, repeats = matrices(1)[0][0], 5, 500
    found = torch.stack([estimate(a, probes, seed) for seed in range(repeats)])
    others = (a.square().sum(1) - a.diagonal().square()) / probes  # of an entry's variance
    z = (found.mean(0) - a.diagonal()) / (others / repeats).sqrt()
    assert z.abs().max() < 4
    torch.testing.assert_close(found.var(0), others, rtol=0.3, atol=0)


def test_many_probes_find_a_softmax_heads_diagonal():
    (x, y, domains), model = examples(), network()
    each = by_domain(cross_entropy(model(x), y), domains)[0]
    exact, many = (aligned(model[-1], kind=kind, probes=20_000) for kind in ("exact", "hutchinson"))
    expected, found = (loss._curvature(loss._gradient(each)).detach() for loss in (exact, many))
    assert ((found - expected).norm() / expected.norm()) < 0.03


def test_each_domain_has_probes_of_its_own(monkeypatch):
    drawn = []

    def recorded(n, g):
        drawn.append(rademacher(n, g))
        return drawn[-1]

    monkeypatch.setattr(hessian_alignment, "rademacher", recorded)
    (x, y, domains), model = examples(), network()
    aligned(model[-1], kind="hutchinson", probes=7)(model(x), y, domains=domains)
    assert [len(z) for z in drawn] == [7 * 12] * 3
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


# -- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_without_weights_it_is_the_mean_of_the_domains_mean_losses(kind):
    (x, y, domains), model = examples(), network()
    plain = torch.stack([F.cross_entropy(model(x[domains == d]), y[domains == d]) for d in range(3)]).mean()
    loss = aligned(model[-1], kind=kind, alpha=0.0, beta=0.0, probes=2)
    value = loss(model(x), y, domains=domains)
    torch.testing.assert_close(value, plain, rtol=1e-14, atol=0)
    expected = gradients(model, plain)
    torch.testing.assert_close(gradients(model, loss(model(x), y, domains=domains)), expected, rtol=1e-12, atol=1e-15)


def test_alpha_zero_is_the_variance_of_the_gradients():
    (x, y, domains), model = examples(), network()
    each = by_domain(cross_entropy(model(x), y), domains)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, model[-1].parameters(), create_graph=True)])
        for loss in each
    ]
    expected = torch.stack(rows).var(0, correction=0).sum()
    found = aligned(model[-1], alpha=0.0, beta=1.0).penalty(each)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["hgp", "exact"])
def test_equal_domains_have_no_penalty_and_no_gradient_of_it(kind):
    (x, y, _), model = examples(), network()
    loss = aligned(model[-1], kind=kind, alpha=1.0, beta=1.0)
    penalty = loss.penalty([cross_entropy(model(x), y).mean() for _ in range(2)])
    assert penalty.item() == 0
    assert not gradients(model, penalty).any()


def test_a_gradient_of_zero_is_no_trouble():
    head = Parameters(torch.zeros(2).double())
    loss = aligned(head, alpha=1.0, beta=1.0)
    penalty = loss.penalty([head.values[0].square().sum(), 2 * head.values[0].square().sum()])
    assert penalty.item() == 0
    assert gradients(head, penalty).tolist() == [0, 0]


def test_detaching_the_mean_matters_for_hgp_alone():
    (x, y, domains), model = examples(), network()

    def of(kind, detach):
        loss = aligned(model[-1], kind=kind, alpha=10.0, beta=10.0, detach=detach, probes=3)
        return loss(model(x), y, domains=domains), gradients(model, loss(model(x), y, domains=domains))

    for kind in ("exact", "hgp"):
        (value, g), (other_value, other) = (of(kind, detach) for detach in (True, False))
        assert torch.equal(value, other_value)
        assert torch.allclose(g, other, rtol=1e-9, atol=1e-12) == (kind == "exact")


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_linear_in_the_head_has_no_curvature(kind):
    (x, _, domains), model = examples(), network()

    def margin(output, target):
        return output.sum(1)

    curved, flat = (
        aligned(model[-1], margin, kind=kind, alpha=alpha, beta=1.0, probes=3)(model(x), None, domains=domains)
        for alpha in (5.0, 0.0)
    )
    assert torch.equal(curved, flat)
    model[0].requires_grad_(False)
    frozen = aligned(model[-1], margin, kind=kind, alpha=5.0, beta=1.0, probes=3)(model(x), None, domains=domains)
    assert torch.equal(frozen, flat)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_of_the_head_are_left_out(kind):
    (x, y, domains), model = examples(), network()
    model[-1].bias.requires_grad_(False)
    loss = aligned(model[-1], kind=kind, alpha=1.0, beta=1.0, probes=3)
    gradient = loss._gradient(by_domain(cross_entropy(model(x), y), domains)[0])
    assert len(gradient) == 9
    loss(model(x), y, domains=domains).backward()
    assert model[-1].bias.grad is None


# -- what is differentiated how often -------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    """Doubles; has no second derivative."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * grad


class Doubled(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return Once.apply(self.module(x))


@pytest.mark.parametrize("kind", KINDS)
def test_features_need_no_second_derivative_but_the_head_does(kind):
    (x, y, domains), model = examples(), network()
    features = nn.Sequential(Doubled(model[0]), model[1], model[2])
    loss = aligned(model[2], kind=kind, alpha=1.0, beta=1.0, probes=3)
    loss(features(x), y, domains=domains).backward()
    assert model[0].weight.grad.abs().sum() > 0
    for head, output in ((model[2], Once.apply(model(x))), (model, model[1:](Once.apply(model[0](x))))):
        with pytest.raises(ValueError, match="must be twice differentiable .* marked with @once_differentiable"):
            aligned(head, kind=kind, probes=3)(output, y, domains=domains)


@pytest.mark.parametrize("kind", KINDS)
def test_an_operation_without_a_second_derivative_is_named(kind):
    model = nn.MultiheadAttention(4, 1, batch_first=True)
    loss = aligned(model, lambda output, target: output.square().sum((1, 2)), kind=kind, probes=2)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(ValueError, match=r"twice diff.*not implemented"):
        loss(model(*3 * [torch.randn(6, 5, 4)], need_weights=False)[0], None, domains=torch.arange(6) % 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_trains_the_features(kind):
    (x, y, domains), model = examples(), network()
    loss = aligned(model[-1], kind=kind, alpha=1.0, beta=0.0, probes=3)
    penalty = loss.penalty(by_domain(cross_entropy(model(x), y), domains))
    (slope,) = torch.autograd.grad(penalty, model[0].weight)
    assert slope.abs().max() > 1e-6


def test_without_gradients_it_is_the_plain_losses():
    (x, y, _), model = examples(), network()
    with torch.no_grad():
        assert torch.equal(aligned(model[-1])(model(x), y), cross_entropy(model(x), y))


# -- schedule and state ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.5, 1.0, 50.0])
def test_weight_is_one_at_first_and_divides_the_whole_loss_above_one(weight):
    (x, y, domains), model = examples(), network()
    loss = aligned(model[-1], alpha=1.0, beta=1.0, weight=weight, anneal_steps=2)
    each = by_domain(cross_entropy(model(x), y), domains)
    mean, penalty = torch.stack(each).mean(), loss.penalty(each)
    for w in (1.0, 1.0, weight, weight):
        assert loss.penalty_weight == w
        expected = (mean + w * penalty) / max(w, 1.0)
        torch.testing.assert_close(loss(model(x), y, domains=domains), expected, rtol=1e-14, atol=0)
        loss.step()


def test_probes_change_the_loss_and_the_generator_decides_which():
    (x, y, domains), model = examples(), network()

    def values(seed, probes):
        loss = aligned(model[-1], kind="hutchinson", alpha=1.0, probes=probes, seed=seed)
        return [loss(model(x), y, domains=domains).item() for _ in range(2)]

    assert values(0, 3) == values(0, 3)
    assert values(0, 3)[0] != values(0, 3)[1]
    assert values(0, 3) != values(1, 3)
    assert values(0, 3) != values(0, 4)


def test_state_holds_the_steps_and_the_generator_and_nothing_of_the_head():
    (x, y, domains), model = examples(), network()
    settings = {"kind": "hutchinson", "alpha": 1.0, "probes": 3, "weight": 9.0, "anneal_steps": 2}
    loss = aligned(model[-1], **settings)
    assert list(loss.parameters()) == []
    assert list(loss.state_dict()) == ["_extra_state"]
    for _ in range(2):
        loss(model(x), y, domains=domains)
        loss.step()
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other = aligned(model[-1], seed=5, **settings)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.penalty_weight == 9.0
    assert torch.equal(loss(model(x), y, domains=domains), other(model(x), y, domains=domains))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_with_their_model_go_their_own_ways(copied):
    (x, y, domains), model = examples(), network()
    loss = aligned(model[-1], kind="hutchinson", alpha=1.0, probes=3, weight=9.0, anneal_steps=1)
    second_model, clone = copied((model, loss))
    clone(second_model(x), y, domains=domains).backward()
    assert model[0].weight.grad is None
    assert second_model[0].weight.grad is not None
    clone.step()
    assert (loss.penalty_weight, clone.penalty_weight) == (1.0, 9.0)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "hessian"}, "kind='hessian' must be one of hgp, hutchinson, exact"),
        ({"alpha": -1.0}, r"alpha=-1.0 must lie in \[0, inf\)"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"weight": float("inf")}, "weight=inf"),
        ({"probes": 0}, "probes=0 must be a whole number of at least 1"),
        ({"probes": 2.5}, "probes=2.5"),
        ({"anneal_steps": -1}, "anneal_steps=-1 must be a whole number of at least 0"),
    ],
)
def test_hyper_parameters_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        aligned(nn.Linear(2, 2), **wrong)


def test_a_head_that_does_not_train():
    with pytest.raises(ValueError, match=r"the head \(Tanh\) has no parameter that trains"):
        aligned(nn.Tanh())


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        (torch.zeros(30).long(), r"domain\(s\) \[0\] only, two are needed"),
        (torch.zeros(29).long(), r"shape \(B,\), got \(30,\) and torch.int64 \(29,\)"),
        (torch.zeros(30), "integer domains"),
    ],
)
def test_domains_that_do_not_fit(domains, message):
    (x, y, _), model = examples(), network()
    with pytest.raises(ValueError, match=message):
        aligned(model[-1])(model(x), y, domains=domains)


def test_a_loss_that_is_reduced_or_has_no_domains():
    (x, y, domains), model = examples(), network()
    with pytest.raises(ValueError, match=r"losses and integer domains must both have shape \(B,\), got \(\)"):
        aligned(model[-1], F.cross_entropy)(model(x), y, domains=domains)
    with pytest.raises(TypeError, match=r"domains=\.\.\."):
        aligned(model[-1])(model(x), y)


def test_a_single_loss_a_vector_and_a_constant_are_refused():
    (x, y, _), model = examples(), network()
    losses, loss = cross_entropy(model(x), y), aligned(model[-1])
    with pytest.raises(ValueError, match="at least two to align"):
        loss.penalty([losses.mean()])
    for wrong in (losses, losses.mean().detach()):
        with pytest.raises(ValueError, match="must be 0-d and depend on the head"):
            loss.penalty([wrong, wrong])


def test_a_head_outside_the_graph_is_named():
    (x, y, domains), model = examples(), network()
    with pytest.raises(ValueError, match=r"parameter of shape \(3, 3\) is not in the graph"):
        aligned(nn.Linear(3, 3))(model(x), y, domains=domains)


# -- in a recipe ----------------------------------------------------------------------------------------------------


def two_bit(steps=5, **changes):
    return steep.task("two-bit", steps=steps).replace(**changes)


def fitted(recipe, seed=0):
    return steep.fit(recipe, seed=seed, progress=False, device="cpu", evaluate_every=10**6)


def test_the_loss_is_given_the_domain_of_every_example():
    seen = []

    class Asks(nn.Module):
        requires = frozenset({"domains"})

        def forward(self, output, target, *, domains):
            seen.append((domains, target))
            return cross_entropy(output, target)

    result = fitted(two_bit(1, loss=steep.deferred(lambda run: Asks()), score=cross_entropy))
    assert len(seen) == result.steps == 1
    data = steep.task("two-bit").data(steep.utils.randomness.generator(0, "split"))
    _, y, _ = data.train.dataset[:]
    for domain in (0, 1):
        assert (seen[0][0] == domain).sum() == 80
    ours, theirs = (torch.stack(pair).unique(dim=1, return_counts=True)[1] for pair in (seen[0], (data.domains, y)))
    assert torch.equal(ours, theirs)


def test_a_recipes_module_is_copied_for_every_run():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, output, target):
            self.calls += 1
            return cross_entropy(output, target)

    loss = Counts()
    fitted(two_bit(loss=loss))
    fitted(method(two_bit(loss=loss)))
    assert loss.calls == 0


def test_the_loss_in_a_recipe_is_the_recipes_own_with_the_last_linear_layer():
    recipe = two_bit(3)
    plain, off = fitted(recipe), fitted(method(recipe, alpha=0.0, beta=0.0))
    np.testing.assert_allclose(off.history.losses, plain.history.losses, rtol=1e-5)
    assert fitted(method(recipe, beta=10.0)).history.losses[0] > plain.history.losses[0] + 1e-4
    assert off.test.keys() == plain.test.keys()


def test_a_model_without_a_linear_layer_has_no_head():
    recipe = two_bit(model=lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(2)))
    with pytest.raises(ValueError, match=r"Sequential has no nn.Linear to be its head.*steep.deferred"):
        fitted(method(recipe))


def test_data_without_domains_are_refused_by_name():
    def bare(g):
        data = two_bit().data(g)
        return steep.Data(data.train, data.val)

    with pytest.raises(steep.UnmetRequirement, match="HessianAlignment needs the domain of every training example"):
        fitted(method(two_bit(data=bare)))
    data = two_bit().data(generator())
    with pytest.raises(ValueError, match=r"domains must have shape \(160,\), one for each example, got \(80,\)"):
        steep.Data(data.train, data.val, domains=data.domains[:80])


def test_a_rule_that_needs_a_vector_refuses_it_by_name():
    recipe = steep.method("coherence")(method(two_bit()))
    with pytest.raises(ValueError, match="needs one loss per example"):
        fitted(recipe)


def test_run_knows_no_model_before_it_is_built():
    data = two_bit().data(generator())
    assert Run(data, 0, 1, 1, generator()).model is None


# -- learning -------------------------------------------------------------------------------------------------------


def test_finds_the_invariant_bit_where_the_mean_loss_finds_the_other():
    """Two bits, 3 paired seeds: accuracy in the test's domain 0.75 against 0.10."""
    recipe = two_bit(200, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2), scheduler=None)
    ours = method(recipe, alpha=1.0, beta=1.0, weight=1e3, anneal_steps=50)
    for seed in range(3):
        plain, aligned_ = (fitted(r, seed).test["accuracy"] for r in (recipe, ours))
        assert plain < 0.2
        assert aligned_ > 0.7

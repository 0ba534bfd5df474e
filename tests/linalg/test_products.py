"""Curvature products against matrices written out by `torch.func`, over models that trip double backwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from steep.linalg import fisher, fisher_vp, flatten, ggn, ggn_vp, hessian, hvp, on_vectors, unflatten

B = 6


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, 4)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).mean((1, 2)))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.other = nn.Linear(3, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x).tanh()


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (3,)),
    "linear": (lambda: nn.Linear(3, 3), (3,)),
    "cnn": (lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.GroupNorm(1, 3), nn.SiLU(), nn.Flatten()), (2, 2, 2)),
    "attention": (Attention, (5, 4)),
    "unused": (Unused, (3,)),
}


class Case:
    def __init__(self, name):
        build, shape = MODELS[name]
        self.model, self.x, self.y = build().double(), torch.randn(B, *shape).double(), torch.randint(3, (B,))
        self.params = {k: p.detach() for k, p in self.model.named_parameters()}
        self.v = {k: torch.randn_like(p) for k, p in self.params.items()}
        self.flat = flatten(self.params)

    def outputs(self, params):
        return functional_call(self.model, params, (self.x,))

    def losses(self, params):
        return F.cross_entropy(self.outputs(params), self.y, reduction="none")

    def loss(self, params):
        return self.losses(params).mean()

    def of_flat(self, function):
        """The same function of one vector; attention by its formula, as `torch.func` needs it too."""

        def call(vector):
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return function(unflatten(vector, self.params))

        return call


@pytest.fixture(params=MODELS)
def case(request):
    return Case(request.param)


def close(found, case, matrix):
    assert list(found) == list(case.params)
    assert all(t.shape == case.params[k].shape for k, t in found.items())
    torch.testing.assert_close(flatten(found), matrix @ flatten(case.v), rtol=1e-9, atol=1e-11)


def test_hvp(case):
    close(hvp(case.loss, case.params, case.v), case, torch.func.hessian(case.of_flat(case.loss))(case.flat))


def jacobian(case, function):
    return torch.func.jacrev(case.of_flat(function))(case.flat)


def test_ggn(case):
    j = jacobian(case, case.outputs).flatten(0, 1)
    p = case.outputs(case.params).softmax(1).detach()
    blocks = torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p)) / B
    found = ggn_vp(case.outputs, lambda o: F.cross_entropy(o, case.y), case.params, case.v)
    close(found, case, j.T @ blocks @ j)


def test_empirical_fisher(case):
    j = jacobian(case, case.losses)
    close(fisher_vp(case.losses, case.params, case.v), case, j.T @ j / B)


def test_the_hessian_of_a_model_without_curvature_is_its_gauss_newton_matrix():
    case = Case("linear")
    found = ggn_vp(case.outputs, lambda o: F.cross_entropy(o, case.y), case.params, case.v)
    torch.testing.assert_close(flatten(found), flatten(hvp(case.loss, case.params, case.v)))


def test_the_fisher_of_targets_drawn_from_the_model_tends_to_the_gauss_newton_matrix():
    case = Case("mlp")
    exact = flatten(ggn_vp(case.outputs, lambda o: F.cross_entropy(o, case.y), case.params, case.v))
    p, draws = case.outputs(case.params).softmax(1).detach(), 300
    generator, products = torch.Generator().manual_seed(0), []
    for _ in range(draws):
        case.y = torch.multinomial(p, 1, generator=generator).squeeze(1)
        products.append(flatten(fisher_vp(case.losses, case.params, case.v)))
    products = torch.stack(products)
    error = (products.mean(0) - exact) / (products.std(0) / draws**0.5)
    assert error.square().mean() < 2  # 1 expected; of about 31 numbers
    assert (products[0] - exact).norm() > 5 * (products.mean(0) - exact).norm()


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_a_product_is_reused_without_evaluating_the_function_again(kind):
    case, calls = Case("mlp"), []

    def counted(function):
        return lambda p: calls.append(1) or function(p)

    product = {
        "hessian": lambda: hessian(counted(case.loss), case.params),
        "ggn": lambda: ggn(counted(case.outputs), lambda o: F.cross_entropy(o, case.y), case.params),
        "fisher": lambda: fisher(counted(case.losses), case.params),
    }[kind]()
    columns = on_vectors(product, case.params)
    n = len(case.flat)
    matrix = torch.stack([columns(e) for e in torch.eye(n, dtype=torch.float64)])
    torch.testing.assert_close(matrix, matrix.T)
    assert calls == [1]
    if kind != "hessian":
        assert torch.linalg.eigvalsh(matrix)[0] > -1e-12


def test_neither_parameters_nor_their_gradients_are_touched():
    model = MODELS["mlp"][0]()
    x = torch.randn(B, 3)
    params = dict(model.named_parameters())
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():  # a probe may well be called from an evaluation
        found = hvp(lambda p: functional_call(model, p, (x,)).square().mean(), params, params)
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(params.values(), before, strict=True))
    assert not any(t.requires_grad for t in found.values())


def test_a_function_of_none_of_the_parameters_has_no_curvature():
    params = {"w": torch.ones(2)}
    x = torch.ones(3, requires_grad=True)
    assert hvp(lambda p: x.square().sum(), params, params)["w"].eq(0).all()
    assert hvp(lambda p: p["w"].sum(), params, params)["w"].eq(0).all()
    assert ggn_vp(lambda p: x.sum(), torch.square, params, params)["w"].eq(0).all()


def test_bad_input():
    case = Case("mlp")
    with pytest.raises(ValueError, match=r"must return a number, got shape \(6,\): reduce it"):
        hvp(case.losses, case.params, case.v)
    with pytest.raises(ValueError, match=r"one loss per example, shape \(B,\), got \(\)"):
        fisher_vp(case.loss, case.params, case.v)
    with pytest.raises(ValueError, match=r"names of params; only in one of them: \['0.weight', 'other'\]"):
        hvp(case.loss, case.params, {"other" if k == "0.weight" else k: t for k, t in case.v.items()})


def test_vectors_there_and_back():
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(()), "c": torch.randn(0)}
    vector = flatten(tensors)
    assert vector.shape == (7,)
    assert all(torch.equal(t, tensors[k]) for k, t in unflatten(vector, tensors).items())
    with pytest.raises(ValueError, match=r"expected a vector of 7 entries, got shape \(6,\)"):
        unflatten(vector[:6], tensors)


def test_products_agree_with_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    case = Case("mlp")
    data = [(case.x, case.y)]
    loss = nn.CrossEntropyLoss()
    v = flatten(case.v)
    ours = {
        "HessianLinearOperator": hvp(case.loss, case.params, case.v),
        "GGNLinearOperator": ggn_vp(case.outputs, lambda o: F.cross_entropy(o, case.y), case.params, case.v),
        "EFLinearOperator": fisher_vp(case.losses, case.params, case.v),
    }
    for name, found in ours.items():
        params = [p for p in case.model.parameters() if p.requires_grad]
        theirs = getattr(curvlinops, name)(case.model, loss, params, data) @ v
        torch.testing.assert_close(flatten(found), theirs)

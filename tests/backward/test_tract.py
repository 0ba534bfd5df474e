"""TrAct: against NumPy and the least squares it solves, both closed forms, limits, what must not change, the peer."""

import copy
import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import steep
from steep.backward import tract
from steep.backward.coherence import CoherentGradient
from steep.backward.tract import TrAct, _patches, _weight_gradient
from steep.recipe import compose


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


CONVOLUTIONS = {
    "1d": (nn.Conv1d, (2, 4, 3), {"padding": 1}, (2, 9)),
    "2d": (nn.Conv2d, (2, 4, 3), {}, (2, 6, 5)),
    "3d": (nn.Conv3d, (2, 3, 2), {"stride": (1, 2, 1), "bias": False}, (2, 4, 5, 3)),
    "patches": (nn.Conv2d, (3, 5, 4), {"stride": 4}, (3, 8, 8)),
    "oblong": (nn.Conv2d, (1, 3, (2, 3)), {"stride": (2, 1), "padding": (0, 2), "dilation": (3, 1)}, (1, 9, 5)),
    "dilated": (nn.Conv1d, (3, 4, 3), {"dilation": 2, "stride": 3}, (3, 14)),
    "groups": (nn.Conv2d, (4, 6, 2), {"groups": 2, "dilation": 2, "padding": 1}, (4, 5, 5)),
    "depthwise": (nn.Conv1d, (3, 6, 4), {"groups": 3}, (3, 11)),
    "reflect": (nn.Conv2d, (2, 3, 3), {"padding": 2, "padding_mode": "reflect"}, (2, 5, 4)),
    "circular": (nn.Conv1d, (2, 3, 3), {"padding": 1, "padding_mode": "circular"}, (2, 6)),
    "same": (nn.Conv2d, (2, 3, 4), {"padding": "same"}, (2, 5, 5)),
    "few rows": (nn.Conv2d, (6, 4, 5), {}, (6, 5, 5)),
}


def layer_and_input(name, batch=5):
    if name == "linear":
        return nn.Linear(4, 3).double(), torch.randn(9, 4).double()
    if name == "wide":
        return nn.Linear(12, 3, bias=False).double(), torch.randn(5, 12).double()
    if name == "sequence":
        return nn.Linear(4, 3).double(), torch.randn(3, 5, 4).double()
    kind, sizes, options, shape = CONVOLUTIONS[name]
    return kind(*sizes, **options).double(), torch.randn(batch, *shape).double()


LAYERS = ("linear", "wide", "sequence", *CONVOLUTIONS)


def padded(layer, x):
    """By NumPy, from the words of torch's documentation."""
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in layer.padding]
    mode = {"zeros": "constant", "reflect": "reflect", "circular": "wrap"}[layer.padding_mode]
    return np.pad(x, [(0, 0), (0, 0), *sides], mode=mode)


def numpy_gradient(layer, x, g, lam):
    """The formula, one output position after the other, in NumPy."""
    x, g, weight = (t.detach().numpy() for t in (x, g, layer.weight))
    if isinstance(layer, nn.Linear):
        return formula(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]), lam)
    x, gradients = padded(layer, x), []
    wide, high = x.shape[1] // layer.groups, len(weight) // layer.groups
    for group in range(layer.groups):
        seen, slopes = [], []
        for example, place in itertools.product(range(len(x)), np.ndindex(*g.shape[2:])):
            window = tuple(
                slice(p * s, p * s + (k - 1) * d + 1, d)
                for p, s, k, d in zip(place, layer.stride, layer.kernel_size, layer.dilation, strict=True)
            )
            seen.append(x[(example, slice(group * wide, (group + 1) * wide), *window)].flatten())
            slopes.append(g[(example, slice(group * high, (group + 1) * high), *place)])
        gradients.append(formula(np.array(seen), np.array(slopes), lam))
    return np.concatenate(gradients).reshape(weight.shape)


def formula(x, g, lam):
    return g.T @ x @ np.linalg.inv(x.T @ x / len(x) + lam * np.eye(x.shape[1]))


def gradients(layer, x, g):
    """Outputs, and gradients of input, weight and bias."""
    x = x.clone().requires_grad_()
    z = layer(x)
    return z.detach(), torch.autograd.grad(z, [x, *layer.parameters()], g)


def taught(layer, x, g):
    """The weight's gradient where the input is data."""
    return torch.autograd.grad(layer(x), layer.weight, g)[0]


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def close(found, expected, **kwargs):
    torch.testing.assert_close(found, torch.as_tensor(expected).to(found.dtype), **kwargs)


# ---- the formula


@pytest.mark.parametrize("name", LAYERS)
def test_equals_numpy(name):
    layer, x = layer_and_input(name)
    g = torch.randn_like(layer(x))
    TrAct(layer, lam=0.3)
    close(taught(layer, x, g), numpy_gradient(layer, x, g, 0.3), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chunk", [1, 100])
@pytest.mark.parametrize("name", LAYERS)
def test_pieces_make_the_whole(name, chunk, monkeypatch):
    layer, x = layer_and_input(name)
    g = torch.randn_like(layer(x))
    whole = _weight_gradient(layer, x, g, 0.1)
    monkeypatch.setattr(tract, "CHUNK", chunk)
    close(_weight_gradient(layer, x, g, 0.1), whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wide", [False, True])
def test_three_steps_equal_numpy(wide):
    """Least squares of a linear map by SGD with momentum, whose gradients are written down."""
    n = 12 if wide else 4
    model = nn.Sequential(nn.Linear(n, 2)).double()
    w, b = (p.detach().numpy().copy() for p in model.parameters())
    TrAct(model, lam=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    speed_w, speed_b = 0 * w, 0 * b
    for _ in range(3):
        x, y = torch.randn(8, n).double(), torch.randn(8, 2).double()
        optimizer.zero_grad()
        (model(x) - y).square().sum(1).mean().backward()
        optimizer.step()
        g = 2 * (x.numpy() @ w.T + b - y.numpy()) / 8
        speed_w, speed_b = 0.5 * speed_w + formula(x.numpy(), g, 0.2), 0.5 * speed_b + g.sum(0)
        w, b = w - 0.1 * speed_w, b - 0.1 * speed_b
        close(model[0].weight.detach(), w, rtol=1e-9, atol=1e-12)
        close(model[0].bias.detach(), b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "wide"])
def test_it_is_the_weight_that_fits_a_step_on_the_outputs(name):
    """The regularised least squares by stacking both terms into one, without bias as in the paper."""
    layer, x = layer_and_input(name)
    layer.bias = None
    g, lam, b = torch.randn_like(layer(x)), 0.3, len(x)
    TrAct(layer, lam=lam)
    weight = layer.weight.detach()
    target = torch.cat([x @ weight.T - b * g, (lam * b) ** 0.5 * weight.T])
    fitted = torch.linalg.lstsq(torch.cat([x, (lam * b) ** 0.5 * eye(x.shape[1])]), target).solution.T
    close(weight - taught(layer, x, g), fitted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("b", [1, 6, 7, 8, 40])
def test_both_closed_forms_are_the_same(b):
    x, g, lam = torch.randn(b, 7).double(), torch.randn(b, 3).double(), 0.1
    found = _weight_gradient(nn.Linear(7, 3), x, g, lam)
    close(found, g.T @ x @ torch.linalg.inv(x.T @ x / b + lam * eye(7)), rtol=1e-9, atol=1e-12)
    close(found, g.T @ torch.linalg.inv(x @ x.T / b + lam * eye(b)) @ x, rtol=1e-9, atol=1e-12)
    second = eye(b) - x @ x.T / b @ torch.linalg.inv(x @ x.T / b / lam + eye(b)) / lam  # as in the paper
    close(found, g.T @ second @ x / lam, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", LAYERS)
def test_a_large_lambda_gives_the_ordinary_gradient(name):
    layer, x = layer_and_input(name)
    g = torch.randn_like(layer(x))
    ordinary = taught(layer, x, g)
    TrAct(layer, lam=1e9)
    close(1e9 * taught(layer, x, g), ordinary, rtol=1e-6, atol=1e-7)


def test_white_inputs_give_the_ordinary_gradient_over_one_plus_lambda():
    x = torch.linalg.qr(torch.randn(20, 6).double())[0] * 20**0.5
    layer, g = nn.Linear(6, 3).double(), torch.randn(20, 3).double()
    TrAct(layer, lam=0.25)
    close(taught(layer, x, g), g.T @ x / 1.25)


def test_turns_of_the_inputs_turn_it_and_units_belong_to_lambda():
    x, g, layer = torch.randn(9, 5).double(), torch.randn(9, 3).double(), nn.Linear(5, 3).double()
    found = _weight_gradient(layer, x, g, 0.1)
    turn = torch.linalg.qr(torch.randn(5, 5).double())[0]
    close(_weight_gradient(layer, x @ turn, g, 0.1), found @ turn)
    close(_weight_gradient(layer, 10 * x, g, 10.0), found / 10)


def test_faint_inputs_move_their_outputs_as_strong_ones_do():
    """Two orthogonal images, one of a tenth of the contrast: at a small lambda its output follows its gradient."""
    x, layer = torch.diag(torch.tensor([1.0, 0.1])).double(), nn.Linear(2, 1, bias=False).double()
    g = torch.ones(2, 1).double()
    ordinary, found = taught(layer, x, g), _weight_gradient(layer, x, g, 1e-6)
    assert (x @ ordinary.T)[1] == pytest.approx(0.01)
    close(x @ found.T, 2 * g, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["linear", "wide", "2d", "groups"])
def test_linear_in_the_loss_and_added_to_grad(name):
    layer, x = layer_and_input(name)
    TrAct(layer)
    layer(x).square().mean().backward()
    once = layer.weight.grad.clone()
    layer(x).square().mean().mul(3).backward()
    close(layer.weight.grad, 4 * once)


@pytest.mark.parametrize("name", ["1d", "patches", "groups", "circular"])
def test_patches_times_weights_are_the_outputs(name):
    layer, x = layer_and_input(name)
    a = _patches(layer, x)
    weight = layer.weight.reshape(layer.groups, -1, a.shape[-1])
    z = (a @ weight.mT).unflatten(1, (len(x), -1)).permute(1, 0, 3, 2).flatten(1, 2)
    close(z + layer.bias[:, None], layer(x).flatten(2))


# ---- what must not change


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_other_gradients_are_bit_identical(name):
    layer, x = layer_and_input(name)
    g = torch.randn_like(layer(x))
    z, (dx, dw, *db) = gradients(layer, x, g)
    handle = TrAct(layer, lam=0.3)
    with pytest.warns(UserWarning, match="requires a gradient"):
        found, (dx_, dw_, *db_) = gradients(layer, x, g)
    assert torch.equal(found, z)
    assert torch.equal(layer(x), z)
    assert all(map(torch.equal, (dx_, *db_), (dx, *db)))
    close(dw_, numpy_gradient(layer, x, g, 0.3), rtol=1e-9, atol=1e-11)  # the ordinary gradient is taken off again
    handle.remove()
    assert torch.equal(taught(layer, x, g), dw)


def test_parameters_and_state_stay_and_removing_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    before, keys, own = dict(model.named_parameters()), list(model.state_dict()), vars(model[0]).keys()
    types = [type(m) for m in model]
    handle = TrAct(model)
    for _ in range(2):
        assert all(p is before[name] for name, p in model.named_parameters())
        assert list(model.state_dict()) == keys
        assert [type(m) for m in model] == types
        model(torch.randn(3, 1, 4, 4))
    handle.remove()
    handle.remove()
    assert vars(model[0]).keys() == own
    assert not any("forward" in vars(m) for m in model.modules())
    assert handle.layers == {}


@pytest.mark.filterwarnings("error")
def test_without_a_gradient_of_the_weight_nothing_happens():
    layer, x = layer_and_input("linear")
    x.requires_grad_()
    g = torch.randn(9, 3).double()
    TrAct(layer)
    with torch.no_grad():
        assert layer(x).grad_fn is None
    layer.weight.requires_grad_(False)
    dx, db = torch.autograd.grad(layer(x), [x, layer.bias], g)
    close(db, g.sum(0))
    close(dx, g @ layer.weight)


@pytest.mark.parametrize("name", ["linear", "2d"])
def test_a_single_example_without_batch(name):
    layer, x = layer_and_input(name)
    g = torch.randn_like(layer(x[0]))
    TrAct(layer)
    close(taught(layer, x[0], g), numpy_gradient(layer, x[:1], g[None], 0.1))


def test_inputs_in_any_memory_layout():
    layer, x = layer_and_input("2d")
    g = torch.randn_like(layer(x))
    expected = numpy_gradient(layer, x, g, 0.1)
    TrAct(layer)
    for strange in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        close(taught(layer, strange, g.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["linear", "wide"])
def test_what_is_not_finite_stays_so(name, value):
    layer, x = layer_and_input(name)
    x[0, 0] = value
    TrAct(layer)
    assert not taught(layer, x, torch.ones_like(layer(x))).isfinite().any()


@pytest.mark.parametrize("name", ["linear", "sequence", "2d", "same"])
@pytest.mark.parametrize("batched", [True, False])
def test_an_in_place_activation_may_follow(name, batched):
    layer, x = layer_and_input(name)
    x = x if batched else x[0]
    z = layer(x).detach()
    TrAct(layer)
    found = torch.autograd.grad(F.relu(layer(x), inplace=True).sum(), layer.weight)[0]
    close(found, _weight_gradient(layer, x, (z > 0).double(), 0.1))


# ---- precision


def test_a_lambda_lost_in_rounding_is_not_passed_over():
    x, g = torch.full((8, 4), 1000.0), torch.ones(8, 3)
    assert _weight_gradient(nn.Linear(4, 3), x, g, 1e-4).isnan().all()
    assert _weight_gradient(nn.Linear(4, 3), x, g, 1.0).isfinite().all()


@pytest.mark.parametrize("name", ["linear", "wide", "2d", "groups"])
def test_autocast_solves_in_float32(name):
    """Inputs with a large mean, whose covariance bfloat16 could not hold beside lambda."""
    layer, x = layer_and_input(name, batch=16)
    x = x + 5
    g = torch.randn_like(layer(x)).bfloat16().double()
    expected = _weight_gradient(layer, x.float().double(), g, 0.1)
    layer = layer.float()
    TrAct(layer)
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x.float())
        found = torch.autograd.grad(z, layer.weight, g.bfloat16())[0]  # backward under autocast too
    assert z.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision(dtype):
    layer, x = layer_and_input("2d")
    layer, x = layer.to(dtype), x.to(dtype)
    g = torch.randn(5, 4, 4, 3).to(dtype)
    expected = _weight_gradient(layer, x.double(), g.double(), 0.1)
    TrAct(layer)
    found = taught(layer, x, g)
    assert found.dtype == dtype
    assert (found - expected).norm() < 2 * torch.finfo(dtype).eps * expected.norm()


# ---- which layer


class Backwards(nn.Module):
    """Registers its layers in another order than it uses them."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(3, 2), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.body(x).tanh())


def test_the_first_layer_is_the_one_that_a_forward_reaches_first():
    model, x = Backwards(), torch.randn(8, 5)
    model(x).sum().backward()
    ordinary = model.head.weight.grad.clone()
    model.zero_grad()
    handle = TrAct(model)
    assert set(handle.layers) == {"head", "body"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x).sum().backward()
    assert handle.layers == {"body": model.body}
    assert torch.equal(model.head.weight.grad, ordinary)
    assert "forward" not in vars(model.head)
    assert "['body']" in repr(handle)


def test_a_layer_by_name():
    model, x = Backwards(), torch.randn(8, 5)
    handle = TrAct(model, layer="head")
    with pytest.warns(UserWarning, match="'head' requires a gradient.*layer="):
        z = model(x)
    assert handle.layers == {"head": model.head}
    z.sum().backward()
    seen = model.body(x).tanh().detach().double()
    close(model.head.weight.grad, _weight_gradient(model.head, seen, torch.ones(8, 2).double(), 0.1), rtol=1e-4, atol=0)


class Own(nn.Linear):
    def forward(self, input):
        return super().forward(2 * input)


@pytest.mark.parametrize(
    ("model", "option", "message"),
    [
        (Backwards(), {"layer": "boddy"}, "layer='boddy' must be .* of the model.*: 'head', 'body'"),
        (nn.Sequential(nn.ReLU()), {}, "layer=None must be .*there is none"),
        (nn.Sequential(Own(2, 2), nn.Linear(2, 2)), {"layer": "0"}, "layer='0' must be .*forward: '1'"),
        (Backwards(), {"lam": 0.0}, r"lam=0.0 must lie in \(0, inf\)"),
        (Backwards(), {"lam": -1.0}, "lam=-1.0 must lie"),
        (Backwards(), {"lam": float("nan")}, "lam=nan must lie"),
        (Backwards(), {"lam": "x"}, "lam='x' must be a number"),
    ],
    ids=["unknown", "none", "own forward", "zero", "negative", "nan", "text"],
)
def test_what_cannot_be_used_is_refused(model, option, message):
    with pytest.raises(ValueError, match=message):
        TrAct(model, **option)
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_second_handle_on_a_layer_is_refused():
    model = Backwards()
    TrAct(model, layer="body")
    with pytest.raises(ValueError, match="layer='body' must be .*: 'head'"):
        TrAct(model, layer="body")


# ---- together with the rest of torch


def test_derivatives_through_the_input_are_kept():
    """A penalty on the input's gradient: its part of the weight's gradient is the ordinary one."""
    layer, x = nn.Linear(4, 3).double(), torch.randn(9, 4).double().requires_grad_()

    def penalty():
        z = layer(x).tanh().sum()
        return torch.autograd.grad(z, x, create_graph=True)[0].square().mean()

    def parts(by_hand):
        """Through z, and through the weight that carries the gradient back to x."""
        z = F.linear(x, by_hand[0], layer.bias)
        slope = (1 - z.tanh().square()) @ by_hand[1]
        return torch.autograd.grad(slope.square().mean(), [z, by_hand[1]])

    weights = [layer.weight.detach().clone().requires_grad_() for _ in range(2)]
    dz, through = parts(weights)
    TrAct(layer)
    with pytest.warns(UserWarning, match="requires a gradient"):
        found = torch.autograd.grad(penalty(), layer.weight)[0]
    close(found, through + formula(x.detach().numpy(), dz.numpy(), 0.1))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("settled", [False, True])
def test_copies_have_a_handle_of_their_own(copied, settled):
    model, x = Backwards().double(), torch.randn(8, 5).double()
    handle = TrAct(model)
    if settled:
        model(x)
    other = copied(model)
    handle.remove()
    for m in (model, other):
        m(x).sum().backward()
    g = (model.head.weight.sum(0) * (1 - model.body(x).tanh().square())).detach()
    close(model.body.weight.grad, g.T @ x)
    close(other.body.weight.grad, formula(x.numpy(), g.numpy(), 0.1))
    assert torch.equal(other.head.weight.grad, model.head.weight.grad)


def test_a_parametrised_weight():
    layer, x = layer_and_input("linear")
    TrAct(layer)
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    g = torch.randn_like(layer(x))
    found = torch.autograd.grad(layer(x), layer.parametrizations.weight.original, g)[0]
    close(found, 2 * numpy_gradient(layer, x, g, 0.1))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.filterwarnings("ignore:each step takes")
def test_rules_over_examples_see_the_changed_rows():
    """A rule of per-example gradients that clips nothing is their mean, with one covariance for all."""
    model, x = Backwards().double(), torch.randn(8, 5).double()
    TrAct(model)
    model(x).square().sum(1).mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    rule = CoherentGradient(model, clip=0.0)
    for _ in range(2):
        model.zero_grad()
        rule(model(x).square().sum(1))
        for p, e in zip(model.parameters(), expected, strict=True):
            close(p.grad, e, rtol=1e-9, atol=1e-11)


def test_compiled():
    model, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True)), torch.randn(4, 1, 5, 5)
    TrAct(model)
    expected = torch.autograd.grad(model(x).sum(), model[0].weight)[0]
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(torch.autograd.grad(fast(x).sum(), model[0].weight)[0], expected)


@pytest.mark.filterwarnings("ignore:TrAct is for a first layer")
def test_functional_gradients():
    layer, x = layer_and_input("linear")
    TrAct(layer)
    params = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(p, x):
        return torch.func.functional_call(layer, p, x).square().sum()

    z = layer(x).detach()
    for of_x in (False, True):
        found, *dx = torch.func.grad(loss, argnums=(0, 1) if of_x else (0,))(params, x)
        close(found["weight"], numpy_gradient(layer, x, 2 * z, 0.1))
        close(found["bias"], 2 * z.sum(0))
        assert not of_x or torch.allclose(dx[0], 2 * z @ params["weight"])


@pytest.mark.filterwarnings("ignore:each step takes")
def test_wraps_another_rule():
    recipe = steep.testing.tiny_recipe()
    both = compose(recipe, [(steep.method("coherence"), {"clip": 0.0}), (steep.method("tract"), {})])
    alone = steep.method("tract")(recipe)
    together, found = (steep.fit(r, progress=False, device="cpu").history.losses for r in (both, alone))
    np.testing.assert_allclose(together, found, rtol=1e-3)


# ---- the peer, and learning


@pytest.mark.parametrize("name", ["linear", "wide", "2d", "patches", "few rows"])
def test_equals_the_authors_code(name):
    peer = pytest.importorskip("torch_tract", reason="the authors' package torch-tract is not installed")
    layer, x = layer_and_input(name)
    g = torch.randn_like(layer(x))
    theirs = peer.TrAct(layer, l=0.2)
    expected = torch.autograd.grad(theirs(x), theirs.weight, g)[0]
    TrAct(layer, lam=0.2)
    close(taught(layer, x, g), expected, rtol=1e-9, atol=1e-11)


def digits_loss(seed, handle):
    """Training loss of an MLP on the digits after three epochs of SGD with momentum."""
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    g = torch.Generator().manual_seed(seed)
    x = ((x - x.mean()) / x.std()).float()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    if handle:
        TrAct(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        for chosen in torch.randperm(len(x), generator=g).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(model(x), y).item()


def test_learns_the_digits_faster():
    for seed in range(3):
        assert digits_loss(seed, True) < 0.75 * digits_loss(seed, False)

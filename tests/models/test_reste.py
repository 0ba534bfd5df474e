"""Binary weights and activations: estimators and steps against their formulas and STE, and what the handle leaves."""

import dataclasses
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import steep
from steep.models._signs import sign
from steep.models.reste import BITS, EDE, FDA, STE, ApproxSign, ReSTE, apply_reste, method
from steep.per_example import PerExample
from steep.testing import handles

ESTIMATORS = {"reste": ReSTE(), "ste": STE(), "approxsign": ApproxSign(), "ede": EDE(), "fda": FDA()}
NAMES = list(ESTIMATORS)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mlp(seed=0, dtype=torch.float64):
    """Seeded, without touching the global generator; the second layer becomes binary by default."""
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).to(
        dtype
    )
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter.copy_(0.6 * random(*parameter.shape, seed=100 * seed + k, dtype=dtype))
    return model


def sgd(model, lr=0.3):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)


def batch(t, dtype=torch.float64):
    return random(8, 6, seed=2 * t, dtype=dtype), random(8, 3, seed=2 * t + 1, dtype=dtype)


def train(model, handle, optimizer, steps, first=0, dtype=torch.float64, parts=1):
    """Least squares on batches that depend on the step alone; each batch in `parts` equal parts."""
    for t in range(first, first + steps):
        x, y = batch(t, dtype)
        optimizer.zero_grad()
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (0.5 * (model(xs) - ys).square().sum(1).mean() / parts).backward()
        optimizer.step()
        if handle is not None:
            handle.step()


def latent(layer):
    return layer.parametrizations.weight.original


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def at(value):
    return torch.tensor(value, dtype=torch.float64)


# -- against an independent reference -----------------------------------------------------------------------------


def reference_slope(name, z, progress):
    """The slopes of the papers, one number at a time."""
    size = abs(z)
    if name == "reste":
        o = 1 + 2 * (1 - math.cos(math.pi / 2 * progress))
        if size > 1.5:
            return 0.0
        return 0.1 ** (1 / o) / 0.1 if size <= 0.1 else size ** ((1 - o) / o) / o
    if name == "ste":
        return float(size <= 1)
    if name == "approxsign":
        return 2 - 2 * size if size < 1 else 0.0
    if name == "ede":
        t = 10 ** (-1 + 2 * progress)
        return max(1 / t, 1) * t * (1 - math.tanh(t * z) ** 2)
    n = 9 + int(9 * progress)
    return 4 * 0.1 / math.pi * sum(math.cos((2 * i + 1) * 0.1 * z) for i in range(n + 1)) if size <= 1 else 0.0


def signs(z):
    return np.where(z >= 0, 1.0, -1.0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NAMES)
def test_five_steps_equal_numpy_written_from_the_formula(name, bits):
    model = mlp()
    w0, w, b, w2 = (p.detach().numpy().copy() for p in model.parameters())
    handle = apply_reste(model, total_steps=5, bits=bits, estimator=name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(5):
        slope = np.vectorize(lambda z, p=step / 5: reference_slope(name, z, p))
        x, y = (v.numpy() for v in batch(step))
        a = x @ w0.T
        s = signs(a) if bits.endswith("1A") else a
        scale = np.abs(w).mean()
        used = scale * signs(w) if bits.startswith("1W") else w
        h = s @ used.T + b
        d_out = (np.tanh(h) @ w2.T - y) / 8
        d_h = d_out @ w2 * (1 - np.tanh(h) ** 2)
        d_used, d_s = d_h.T @ s, d_h @ used
        d_w = d_used
        if bits.startswith("1W"):
            d_w = scale * d_used * slope(w) + (d_used * signs(w)).sum() * signs(w) / w.size
        d_a = d_s * slope(a) if bits.endswith("1A") else d_s
        w0, w, b, w2 = w0 - 0.3 * d_a.T @ x, w - 0.3 * d_w, b - 0.3 * d_h.sum(0), w2 - 0.3 * d_out.T @ np.tanh(h)
        train(model, handle, optimizer, 1, first=step)
        found = latent(model[1]) if bits.startswith("1W") else model[1].weight
        for mine, theirs in zip((w0, w, b, w2), (model[0].weight, found, model[1].bias, model[3].weight), strict=True):
            np.testing.assert_allclose(theirs.detach(), mine, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("z", "slope"),
    [(0.0, 10**0.5), (0.05, 10**0.5), (0.1, 10**0.5), (0.16, 1.25), (0.25, 1.0), (1.0, 0.5), (1.44, 5 / 12), (1.51, 0)],
)
def test_slopes_of_reste_at_o_2(z, slope):
    for value in (z, -z):
        assert ReSTE().slope(at(value), at(2.0)).item() == pytest.approx(slope)


@pytest.mark.parametrize(
    ("estimator", "sharpness", "z", "soft", "slope"),
    [
        (STE(), 1.0, 0.5, 0.5, 1.0),
        (STE(), 1.0, 1.2, 1.0, 0.0),
        (STE(t=1.5), 1.0, 1.2, 1.2, 1.0),
        (ApproxSign(), 1.0, 0.25, 0.4375, 1.5),
        (ApproxSign(), 1.0, -0.25, -0.4375, 1.5),
        (ApproxSign(), 1.0, 3.0, 1.0, 0.0),
        (EDE(), 0.1, 1.0, 10 * math.tanh(0.1), 1 - math.tanh(0.1) ** 2),
        (EDE(), 4.0, 0.25, math.tanh(1), 4 * (1 - math.tanh(1) ** 2)),
        (FDA(), 0.0, 0.5, 4 / math.pi * math.sin(0.05), 0.4 / math.pi * math.cos(0.05)),
        (FDA(), 9.0, 0.0, 0.0, 4 / math.pi),
    ],
)
def test_values_of_the_other_estimators(estimator, sharpness, z, soft, slope):
    assert estimator.soft(at(z), at(sharpness)).item() == pytest.approx(soft)
    assert estimator.slope(at(z), at(sharpness)).item() == pytest.approx(slope)


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_slope_is_the_soft_signs_derivative(name, progress):
    estimator = ESTIMATORS[name]
    sharpness = at(estimator.at(progress))
    z = torch.linspace(-0.98, 0.98, 50, dtype=torch.float64).requires_grad_()
    (derivative,) = torch.autograd.grad(estimator.soft(z, sharpness).sum(), z)
    outside = z.abs() > (0.1 if name == "reste" else 0)  # within m ReSTE has the secant's
    torch.testing.assert_close(estimator.slope(z, sharpness)[outside], derivative[outside])


@pytest.mark.parametrize("o", [1.0, 1.7, 3.0, 8.0])
def test_slope_of_reste_adds_up_to_its_soft_sign(o):
    """Continuous at m by value, not by slope."""
    edges = torch.linspace(0, 1.5, 300_001, dtype=torch.float64)
    middles = (edges[1:] + edges[:-1]) / 2
    total = (ReSTE().slope(middles, at(o)) * (edges[1] - edges[0])).cumsum(0)
    beyond = edges[1:] >= 0.1
    torch.testing.assert_close(total[beyond], ReSTE().soft(edges[1:][beyond], at(o)), rtol=1e-4, atol=1e-4)
    below, above = (ReSTE().slope(at(z), at(o)) for z in (0.1, 0.1 + 1e-12))
    assert float(below / above) == pytest.approx(o)


@pytest.mark.parametrize("name", NAMES)
def test_soft_signs_are_odd_and_slopes_even(name):
    estimator, z = ESTIMATORS[name], 2 * random(100)
    sharpness = at(estimator.at(0.6))
    assert torch.equal(estimator.soft(-z, sharpness), -estimator.soft(z, sharpness))
    assert torch.equal(estimator.slope(-z, sharpness), estimator.slope(z, sharpness))
    assert (estimator.slope(z, sharpness) >= 0).all()


def test_closed_form_of_the_cosines():
    z = torch.cat([random(200), torch.zeros(1, dtype=torch.float64)])
    for n in (0, 1, 9, 18):
        wanted = 0.4 / math.pi * sum(torch.cos((2 * i + 1) * 0.1 * z) for i in range(n + 1)) * (z.abs() <= 1)
        torch.testing.assert_close(FDA().slope(z, at(float(n))), wanted)


def test_sign_is_one_at_zero_and_keeps_nan():
    z = torch.tensor([-2.0, -1e-30, -0.0, 0.0, 1e-30, math.inf, -math.inf, math.nan])
    assert torch.equal(sign(z)[:-1], torch.tensor([-1.0, -1, 1, 1, 1, 1, -1]))
    assert sign(z)[-1].isnan()
    assert sign(z.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_slopes_vanish_far_out_and_are_finite(name):
    z = torch.tensor([-math.inf, -1e30, -40.0, 10 * math.pi, 1e30, math.inf])
    for progress in (0.0, 0.5, 1.0):
        slope = ESTIMATORS[name].slope(z, at(ESTIMATORS[name].at(progress)))
        torch.testing.assert_close(slope, torch.zeros(6), atol=1e-2, rtol=0)


@pytest.mark.parametrize("bits", BITS)
def test_inputs_that_are_not_finite_show_in_the_output(bits):
    model = mlp()
    apply_reste(model, total_steps=5, bits=bits)
    x = batch(0)[0]
    x[2, 3] = math.nan
    assert model(x).isfinite().all(1).tolist() == [True, True, False, *[True] * 5]


# -- exact properties ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_o_of_1_is_the_clipped_straight_through_estimator_bit_for_bit(bits):
    power, clipped = mlp(), mlp()
    for model, hyper in ((power, {"o_end": 1.0}), (clipped, {"estimator": STE(t=1.5)})):
        train(model, apply_reste(model, total_steps=8, bits=bits, **hyper), sgd(model), 8)
    same(power.state_dict(), clipped.state_dict())


def test_exponent_follows_its_schedule_and_stays_at_the_end():
    model = mlp()
    handle = apply_reste(model, total_steps=4, bits="1W1A", o_end=5.0)
    seen = []
    for _ in range(6):
        seen.append(handle.sharpness)
        buffers = [b for n, b in model.named_buffers() if n.endswith("sharpness")]
        assert [b.item() for b in buffers] == [seen[-1]] * 2
        handle.step()
    wanted = [1 + 4 * (1 - math.cos(math.pi / 2 * min(1, t / 4))) for t in range(6)]
    assert seen == pytest.approx(wanted)
    assert handle.steps == 6
    assert "steps=6" in repr(handle)
    handle.remove()
    assert handle.steps == -1


def test_other_schedules():
    assert [EDE().at(p) for p in (0, 0.25, 0.5, 1)] == pytest.approx([0.1, 10**-0.5, 1, 10])
    assert [FDA().at(p) for p in (0, 0.1, 0.12, 0.5, 1)] == [9, 9, 10, 13, 18]
    assert STE().at(0.3) == ApproxSign().at(0.7) == 1


def test_as_o_grows_the_error_vanishes_and_the_slope_at_m_becomes_that_of_the_step():
    z = random(100)
    errors = [(ReSTE().soft(z, at(o)) - sign(z)).norm().item() for o in (1e2, 1e4, 1e6)]
    assert errors[0] > 50 * errors[1] > 2500 * errors[2]
    assert ReSTE().slope(at(0.1), at(1e6)).item() == pytest.approx(10.0, rel=1e-4)


@pytest.mark.parametrize("std", [0.05, 0.3])
def test_error_of_weights_below_1_falls_with_o_and_variance_of_slopes_rises(std):
    z = (std * random(500)).clamp(-0.99, 0.99)
    errors = [(ReSTE().soft(z, at(o)) - sign(z)).norm().item() for o in (1.0, 2.0, 3.0, 5.0, 8.0)]
    variances = [ReSTE().slope(z, at(o)).var().item() for o in (1.0, 2.0, 3.0, 5.0, 8.0)]
    assert errors == sorted(errors, reverse=True)
    assert len({*errors}) == 5
    assert variances == sorted(variances)
    assert variances[0] == 0


def test_indicators_equal_numpy():
    model = mlp()
    handle = apply_reste(model, total_steps=4, skip=("first",))
    with pytest.raises(ValueError, match="number of gradients=0 must be positive: call this between backward"):
        handle.gradient_instability()
    train(model, handle, sgd(model), 2)
    o = 1 + 2 * (1 - math.cos(math.pi / 4))
    weights = [latent(model[k]).detach().numpy() for k in (1, 3)]
    error = sum(np.sqrt(((np.sign(w) * (np.abs(w) ** (1 / o) - 1)) ** 2).sum()) for w in weights)
    instability = sum(np.abs(latent(model[k]).grad.numpy()).var(ddof=1) for k in (1, 3))
    assert handle.estimating_error() == pytest.approx(error)
    assert handle.gradient_instability() == pytest.approx(instability)
    activations = apply_reste(mlp(), total_steps=4, bits="32W1A")
    with pytest.raises(ValueError, match="number of binary weights=0 must be positive"):
        activations.estimating_error()


def test_weights_are_signs_times_their_mean_magnitude():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).double()
    w = model[1].weight.detach().clone()
    w[0, 0, 0, 0] = 0.0
    with torch.no_grad():
        model[1].weight.copy_(w)
    apply_reste(model, total_steps=3)
    torch.testing.assert_close(model[1].weight, torch.where(w >= 0, w.abs().mean(), -w.abs().mean()))


@pytest.mark.parametrize("layer", [nn.Conv1d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 2), nn.Conv3d(3, 4, 1)])
def test_convolutions_take_signs_before_they_pad(layer):
    model = nn.Sequential(layer).double()
    x = random(2, 3, *[5] * (layer.weight.ndim - 2))
    w, b = layer.weight.detach().clone(), layer.bias.detach()
    apply_reste(model, total_steps=3, bits="1W1A", skip=())
    convolve = getattr(F, f"conv{layer.weight.ndim - 2}d")
    wanted = convolve(torch.sign(x), torch.sign(w) * w.abs().mean(), b, padding=layer.padding)
    torch.testing.assert_close(model(x), wanted)


def test_latent_weights_beyond_t_get_the_scales_gradient_only():
    model = mlp()
    with torch.no_grad():
        model[1].weight[0, 0] = 1.6
    apply_reste(model, total_steps=4)
    (0.5 * (model(batch(0)[0]) - batch(0)[1]).square().sum(1).mean()).backward()
    w = latent(model[1])
    through_scale = w.grad[0, 0] * sign(w)
    assert w.grad[0, 0] != 0
    assert not torch.isclose(w.grad, through_scale)[w.abs() < 1.5].any()


def test_clip_bounds_latent_weights_from_the_first_step_on():
    model = mlp()
    before = model[1].weight.detach().clone()
    handle = apply_reste(model, total_steps=4, clip=0.3)
    assert torch.equal(latent(model[1]), before)
    for t in range(4):
        train(model, handle, sgd(model), 1, first=t)
        assert latent(model[1]).abs().max() == 0.3
    assert model[0].weight.abs().max() > 0.3


# -- the handle ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", handles.DEPENDING_ON_SETTINGS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("estimator", NAMES)
def test_handle_keeps_the_contract_in_every_setting(bits, estimator, check):
    clip = None if bits == "32W1A" else 0.1
    check(dataclasses.replace(method, preset={"bits": bits, "estimator": estimator, "clip": clip}))


@pytest.mark.parametrize("bits", BITS[1:])
@pytest.mark.parametrize("check", [c for c in handles.CHECKS if c not in handles.DEPENDING_ON_SETTINGS])
def test_handle_of_binary_activations_keeps_the_contract(bits, check):
    check(dataclasses.replace(method, preset={"bits": bits}))


@pytest.mark.parametrize("name", NAMES[1:])
def test_compiled_model_is_one_graph_for_the_whole_schedule(name):
    preset = {"bits": "1W1A", "estimator": name}
    handles.compiles_to_one_graph_for_the_whole_schedule(dataclasses.replace(method, preset=preset))


@pytest.mark.parametrize("bits", BITS)
def test_a_layer_that_is_binary_already_is_refused(bits):
    apply_reste(model := mlp(), total_steps=8, bits=bits)
    with pytest.raises(ValueError, match="layer '1': its (weight is parametrized|inputs are binary) already"):
        apply_reste(model, total_steps=8, bits="32W1A")


@pytest.mark.parametrize("bits", BITS)
def test_what_was_merged_loads_into_a_merged_model_and_binarizes_to_itself(bits):
    model, other = mlp(), mlp(seed=1)
    handle = apply_reste(model, total_steps=6, bits=bits)
    train(model, handle, sgd(model), 3)
    handle.merge()
    x = batch(9)[0]
    apply_reste(other, total_steps=1, bits=bits).merge()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    apply_reste(other, total_steps=1, bits=bits)
    torch.testing.assert_close(other(x), model(x))


def test_handle_can_be_pickled_with_a_model_of_binary_activations():
    """Not with parametrized weights, which torch refuses to pickle."""
    model = mlp()
    handle = apply_reste(model, total_steps=6, bits="32W1A")
    train(model, handle, sgd(model), 3)
    other, other_handle = pickle.loads(pickle.dumps((model, handle)))
    for m, h in ((model, handle), (other, other_handle)):
        train(m, h, sgd(m), 3, first=3)
    same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes_are_kept(dtype, name):
    model = mlp(dtype=dtype)
    handle = apply_reste(model, total_steps=4, bits="1W1A", estimator=name)
    train(model, handle, sgd(model), 3, dtype=dtype)
    assert model[1].weight.dtype == latent(model[1]).dtype == latent(model[1]).grad.dtype == dtype
    assert model(batch(0, dtype)[0]).dtype == dtype
    handle.merge()
    assert model[1].weight.dtype == dtype
    assert len(model[1].weight.abs().unique()) == 1


def test_half_precision_of_autocast_trains():
    model = mlp(dtype=torch.float32)
    apply_reste(model, total_steps=4, bits="1W1A")
    x, y = batch(0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = (model(x) - y).square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_frozen_weights_stay_and_are_binary():
    model = mlp()
    model[1].weight.requires_grad_(False)
    before = model[1].weight.clone()
    handle = apply_reste(model, total_steps=4)
    train(model, handle, sgd(model), 4)
    assert torch.equal(latent(model[1]), before)
    assert len(model[1].weight.abs().unique()) == 1


@pytest.mark.parametrize("bits", BITS)
def test_gram_matrix_of_the_engine_knows_binary_layers(bits):
    model = mlp()
    apply_reste(model, total_steps=4, bits=bits)
    engine = PerExample(model)
    x, y = batch(0)
    losses = (model(x) - y).square().sum(1)
    gram = engine.rows(losses, retain_graph=True).gram()
    parameters = list(model.parameters())
    each = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    j = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in each])
    torch.testing.assert_close(gram, j @ j.T)


# -- which layers -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.stem = nn.Conv1d(16, 16, 3)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2), "norm": nn.LayerNorm(16), "ffn": nn.Linear(16, 16)})
            for _ in range(2)
        )
        self.head = nn.Linear(16, 10)


@pytest.mark.parametrize(
    ("skip", "chosen"),
    [
        (("first", "last"), ["blocks.0.ffn", "blocks.1.ffn"]),
        (("last",), ["stem", "blocks.0.ffn", "blocks.1.ffn"]),
        ((), ["stem", "blocks.0.ffn", "blocks.1.ffn", "head"]),
        (("first", "head", "blocks.1.*"), ["blocks.0.ffn"]),
        (["*.ffn"], ["stem", "head"]),
    ],
)
def test_layers_that_become_binary(skip, chosen):
    assert list(apply_reste(Net(), total_steps=4, skip=skip).layers) == chosen


@pytest.mark.parametrize("bits", BITS)
def test_encoder_layer_computes_the_same_in_eval_mode(bits):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True, activation="gelu")
    apply_reste(layer, total_steps=4, bits=bits, skip=())
    x = random(2, 5, 16, dtype=torch.float32)
    wanted = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), wanted)


def test_warns_once_where_all_inputs_have_one_sign():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 3)).double()
    apply_reste(model, total_steps=4, bits="1W1A")
    with pytest.warns(UserWarning, match="layer '2': no input of its first batch is negative"):
        model(batch(0)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(batch(0)[0])
        fine = mlp()
        apply_reste(fine, total_steps=4, bits="1W1A")
        fine(batch(0)[0])


# -- settings -----------------------------------------------------------------------------------------------------


def weights_after(**hyper):
    model = mlp()
    handle = apply_reste(model, **({"total_steps": 8} | hyper))
    train(model, handle, sgd(model), 8)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "hyper",
    [
        {"total_steps": 16},
        *({"bits": bits} for bits in BITS[1:]),
        *({"estimator": name} for name in NAMES[1:]),
        {"estimator": STE(t=0.5)},
        {"o_end": 2.0},
        {"t": 0.5},
        {"m": 0.3},
        {"clip": 0.5},
        {"skip": ()},
    ],
    ids=str,
)
def test_every_setting_changes_the_training_run(hyper):
    changed, default = weights_after(**hyper), weights_after()
    assert not torch.equal(changed.sort().values, default.sort().values)


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"total_steps": 0}, r"total_steps=0 must be a whole number of at least 1"),
        ({"total_steps": 9.5}, r"total_steps=9.5 must be"),
        ({"bits": "2W2A"}, r"bits='2W2A' must be one of \('1W32A', '1W1A', '32W1A'\)"),
        ({"estimator": "sigmoid"}, r"estimator='sigmoid' must be one of \('reste', 'ste'"),
        ({"estimator": 3}, r"estimator=3 must be one of .*, or an object like these"),
        ({"o_end": 0.9}, r"o_end=0.9 must lie in \[1, inf\)"),
        ({"o_end": math.inf}, r"o_end=inf must lie in"),
        ({"t": 0.0}, r"t=0.0 must lie in \(0, inf\)"),
        ({"m": 0.0}, r"m=0.0 must lie in \(0, inf\)"),
        ({"m": 1.5}, r"m=1.5 must be less than t=1.5"),
        ({"clip": 0.0}, r"clip=0.0 must be positive and finite, or None"),
        ({"clip": math.nan}, r"clip=nan must be"),
        ({"clip": 1.0, "bits": "32W1A"}, r"clip=1.0 must be None where weights stay real"),
        ({"skip": "last"}, r"skip='last' must be a sequence"),
        ({"skip": ("2.wieght",)}, r"skip: '2.wieght' matches no Linear layer or convolution"),
        ({"skip": ("*",)}, r"skip=\('\*',\) leaves none of the layers \['0', '1', '3'\]"),
    ],
    ids=str,
)
def test_bad_values_are_refused_and_leave_the_model_alone(hyper, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        apply_reste(model, **({"total_steps": 8} | hyper))
    same(model.state_dict(), mlp().state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: STE(t=-1.0), r"t=-1.0 must lie in \(0, inf\)"),
        (lambda: EDE(start=0.0), r"start=0.0 must lie in \(0, inf\)"),
        (lambda: EDE(end=math.nan), r"end=nan must lie in"),
        (lambda: FDA(start=-1), r"start=-1 must lie in \[0, inf\)"),
        (lambda: FDA(frequency=2.0), r"frequency=2.0 must lie in"),
    ],
    ids=range(5),
)
def test_bad_values_of_estimators_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_estimator_of_the_users_own():
    class Triangle:
        def at(self, progress):
            return 1 + progress

        def soft(self, z, sharpness):
            return z.clamp(-1, 1)

        def slope(self, z, sharpness):
            return (1 - (sharpness * z).abs()).clamp(min=0)

    model = mlp()
    handle = apply_reste(model, total_steps=4, estimator=Triangle())
    train(model, handle, sgd(model), 2)
    assert handle.sharpness == 1.5
    assert not torch.equal(latent(model[1]), mlp()[1].weight)


# -- resume and fit -----------------------------------------------------------------------------------------------


DIGITS, LABELS = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
DIGITS = (DIGITS / 16).float()


class Block(nn.Module):
    """x + norm(relu(linear(x))), the paper's order."""

    def __init__(self, width):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, x):
        return x + self.norm(F.relu(self.linear(x)))


def network(width, depth):
    stem = nn.Linear(64, width), nn.ReLU(), nn.BatchNorm1d(width)
    return nn.Sequential(*stem, *(Block(width) for _ in range(depth)), nn.Linear(width, 10))


def digits_recipe(epochs=3):
    return steep.Recipe(
        data=lambda g: steep.split_loaders(DIGITS[:300], LABELS[:300], g, batch_size=32),
        model=lambda: network(16, 1),
        loss=lambda output, target: F.cross_entropy(output, target, reduction="none"),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        metric=steep.accuracy,
        budget=steep.Budget(epochs=epochs),
    )


def test_fit_gives_the_horizon_of_the_budget():
    result = steep.fit(method(digits_recipe(), bits="1W1A"), progress=False)
    layer = result.model[3].linear
    assert int(layer.input_sign.steps) == int(layer.parametrizations.weight[0].steps) == result.steps == 18
    assert layer.input_sign.sharpness.item() == 3.0
    assert len(layer.weight.abs().unique()) == 1


def test_entry_wraps_another_method_on_the_model_and_requires_a_horizon():
    recipe = steep.compose(digits_recipe(), [(method, {"skip": ("first", "last")}), (method, {"skip": ("0", "3.*")})])
    model = steep.fit(recipe, progress=False).model
    assert len(model[3].linear.weight.abs().unique()) == len(model[4].weight.abs().unique()) == 1
    with pytest.raises(ValueError, match="horizon"):
        steep.fit(method(digits_recipe().replace(budget=steep.Budget(seconds=1))), progress=False)


# -- does it help? ------------------------------------------------------------------------------------------------


def trained(seed, bits):
    """A network trained with `bits`, and the examples kept from it; "real" is binarised only afterwards."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(DIGITS), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network(64, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    handle = None if bits == "real" else apply_reste(model, total_steps=250, bits=bits)
    for _ in range(250):
        chosen = order[torch.randint(900, (64,), generator=generator)]
        optimizer.zero_grad()
        F.cross_entropy(model(DIGITS[chosen]), LABELS[chosen]).backward()
        optimizer.step()
        if handle is not None:
            handle.step()
    (handle or apply_reste(model, total_steps=1, bits="1W1A")).merge()
    with torch.no_grad():
        return float((model.eval()(DIGITS[order[900:]]).argmax(1) == LABELS[order[900:]]).double().mean())


def test_binary_networks_learn_what_rounding_a_trained_one_loses():
    for seed in range(3):
        rounded, weights, both = (trained(seed, bits) for bits in ("real", "1W32A", "1W1A"))
        assert weights > 0.93
        assert both > 0.9
        assert both - rounded > 0.05


@pytest.mark.parametrize("bits", ["1W32A", "1W1A", "32W1A"])
def test_a_handle_says_which_numbers_are_binary(bits):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    assert repr(apply_reste(model, bits=bits, total_steps=3)).startswith(f"Binarization({bits}, ")

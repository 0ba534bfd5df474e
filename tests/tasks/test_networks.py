"""The tasks' networks against formulas written out in NumPy, and the properties that methods rely on."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from steep.requires import coupling_layers
from steep.tasks.networks import MLP, Block, FourierFeatures, SmallCNN, Transformer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def arrays(model):
    return {name: p.detach().numpy().astype(np.float64) for name, p in model.named_parameters()}


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def layer_norm(x, weight, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def test_mlp_is_its_formula():
    model, x = MLP(6, 5, 4, 2, activation=nn.Tanh), torch.randn(3, 2, 3)
    w = list(arrays(model).values())
    h = x.numpy().reshape(3, 6).astype(np.float64)
    h = np.tanh(h @ w[0].T + w[1])
    h = np.tanh(h @ w[2].T + w[3])
    np.testing.assert_allclose(model(x).detach(), h @ w[4].T + w[5], atol=1e-6)


def test_mlp_takes_the_activation_it_is_given():
    assert [type(m) for m in MLP(4, 3, 3, 1).layers] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert [type(m) for m in MLP(4, 3, 1, activation=nn.GELU).layers] == [nn.Linear, nn.GELU, nn.Linear]
    assert [type(m) for m in MLP(4, 1).layers] == [nn.Linear]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 28])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_cnn_takes_every_size(size, dimensions):
    model = SmallCNN(2, 10, (4, 8, 8), dimensions=dimensions)
    x = torch.randn(3, 2, *[size] * dimensions)
    assert model(x).shape == (3, 10)


def test_cnn_is_its_formula_on_a_single_pixel():
    """On one pixel, only the middle of each kernel is used and pooling does nothing."""
    model, x = SmallCNN(3, 2, (4, 8), groups=2), torch.randn(5, 3, 1, 1)
    p = arrays(model)
    h = x.numpy()[:, :, 0, 0].astype(np.float64)
    for conv, norm in (("layers.0", "layers.1"), ("layers.4", "layers.5")):
        h = h @ p[f"{conv}.weight"][:, :, 1, 1].T + p[f"{conv}.bias"]
        groups = h.reshape(5, 2, -1)
        groups = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 1e-5)
        h = np.maximum(groups.reshape(h.shape) * p[f"{norm}.weight"] + p[f"{norm}.bias"], 0)
    np.testing.assert_allclose(model(x).detach(), h @ p["head.weight"].T + p["head.bias"], atol=1e-5)


def test_cnn_averages_over_positions():
    model = SmallCNN(1, 4, (4,))
    x = torch.randn(2, 1, 6, 6)
    pooled = model.layers(x)
    assert len(model.layers) == 3, "one block: the last pooling is left to the average"
    torch.testing.assert_close(model(x), model.head(pooled.mean((2, 3))))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (MLP(6, 5, 2), torch.randn(4, 6)),
        (SmallCNN(1, 3, (4, 8)), torch.randn(4, 1, 7, 7)),
        (SmallCNN(1, 3, (4, 8), dimensions=1), torch.randn(4, 1, 9)),
        (Transformer(9, 6, width=8), torch.randint(9, (4, 5))),
    ],
    ids=["mlp", "cnn", "cnn1d", "transformer"],
)
def test_examples_do_not_influence_each_other(model, x):
    assert coupling_layers(model) == []
    alone = torch.cat([model(x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(model(x), alone, rtol=1e-4, atol=1e-5)


def test_block_is_its_formula():
    block, x = Block(8, 2), torch.randn(3, 5, 8)
    p, h = arrays(block), x.numpy().astype(np.float64)
    z = layer_norm(h, p["norm1.weight"], p["norm1.bias"])
    q, k, v = np.split(z @ p["qkv.weight"].T + p["qkv.bias"], 3, axis=-1)
    heads = []
    for i in (slice(0, 4), slice(4, 8)):
        scores = q[..., i] @ k[..., i].transpose(0, 2, 1) / math.sqrt(4)
        scores[:, np.triu_indices(5, 1)[0], np.triu_indices(5, 1)[1]] = -np.inf
        heads.append(softmax(scores) @ v[..., i])
    h = h + np.concatenate(heads, -1) @ p["out.weight"].T + p["out.bias"]
    z = layer_norm(h, p["norm2.weight"], p["norm2.bias"]) @ p["mlp.0.weight"].T + p["mlp.0.bias"]
    z = z * 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
    np.testing.assert_allclose(block(x).detach(), h + z @ p["mlp.2.weight"].T + p["mlp.2.bias"], atol=1e-5)


def test_transformer_is_causal_and_knows_positions():
    model, tokens = Transformer(11, 8, width=16), torch.tensor([[1, 2, 3, 4, 5, 6]])
    changed = tokens.clone()
    changed[0, 3] = 9
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-6)
    assert ((before - after)[:, 3:].abs().amax(-1) > 1e-3).all()
    same = model(torch.full((1, 4), 7))
    assert (same[0, 0] - same[0, 1]).abs().max() > 1e-3, "equal tokens at different positions must differ"


def test_tied_head_is_the_embedding():
    tied, free = Transformer(11, 8, width=16), Transformer(11, 8, width=16, tied=False)
    count = [sum(p.numel() for p in m.parameters()) for m in (tied, free)]
    assert count[1] - count[0] == 11 * 16
    assert tied.head.weight is tied.token.weight
    tied(torch.tensor([[1, 2]])).square().sum().backward()
    assert (tied.token.weight.grad[3:].abs().sum(1) > 0).all(), "unseen tokens get the head's gradient"


def test_tied_logits_start_with_variance_one():
    logits = Transformer(500, 16, width=64)(torch.randint(500, (8, 16)))
    other = logits.detach()[..., 250:]
    assert 0.7 < other.var() < 1.3


def test_transformer_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="width=10 must be a multiple of heads=4"):
        Transformer(5, 5, width=10, heads=4)


def test_depth_and_heads_have_an_effect():
    assert len(Transformer(5, 5, depth=3).blocks) == 3
    one, two = Block(8, 1), Block(8, 2)
    two.load_state_dict(one.state_dict())
    x = torch.randn(2, 4, 8)
    assert (one(x) - two(x)).abs().max() > 1e-4


def test_fourier_features_are_their_formula_and_fixed():
    features, x = FourierFeatures(2, 3, scale=5.0), torch.rand(4, 2)
    phase = 2 * np.pi * x.numpy() @ features.frequencies.numpy()
    np.testing.assert_allclose(features(x), np.concatenate([np.sin(phase), np.cos(phase)], 1), atol=1e-5)
    assert list(features.parameters()) == []
    assert list(features.state_dict()) == ["frequencies"]


def test_fourier_features_see_differences_only():
    """Their inner product depends on x - y alone: the kernel is stationary (arXiv 2006.10739, section 4)."""
    features, x, y = FourierFeatures(2, 64, scale=2.0), torch.rand(1, 2), torch.rand(1, 2)
    shift = torch.tensor([[0.3, -0.2]])
    kernel = (features(x) @ features(y).T).item()
    assert (features(x + shift) @ features(y + shift).T).item() == pytest.approx(kernel, abs=1e-3)
    assert (features(x) @ features(x).T).item() == pytest.approx(64, rel=1e-5)


def test_fourier_scale_is_the_standard_deviation():
    assert FourierFeatures(2, 4000, scale=3.0).frequencies.std().item() == pytest.approx(3.0, rel=0.05)

"""Gradient statistics against NumPy, and the ranks and scalings that gradients of language models must have."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from steep.probes.layer_gradient import (
    _STATISTICS,
    Projection,
    attention_projections,
    layer_difference,
    layer_gradients,
    relative_difference,
    response_loss,
    response_start,
    stages,
    top_layers,
)
from steep.tasks.networks import Transformer


@pytest.fixture
def lm():
    torch.manual_seed(0)
    return Transformer(11, 12, width=8, depth=3, heads=2).double()


@pytest.fixture
def examples():
    generator = torch.Generator().manual_seed(1)
    lengths = ((8, 3), (12, 7), (5, 4), (9, 1))
    return [(torch.randint(11, (t,), generator=generator), start) for t, start in lengths]


def by_hand(model, tokens, start):
    """Gradients of the mean cross-entropy of the response, split by hand: kind -> layers of matrices."""
    model.zero_grad()
    logits = model(tokens[None])[0]
    losses = [-F.log_softmax(logits[t - 1], 0)[tokens[t]] for t in range(start, len(tokens))]
    loss = sum(losses) / len(losses)
    loss.backward()
    found = {"q": [], "k": [], "v": [], "o": []}
    for block in model.blocks:
        g = block.qkv.weight.grad.numpy().copy()
        for kind, part in zip("qkv", (g[:8], g[8:16], g[16:]), strict=True):
            found[kind].append(part)
        found["o"].append(block.out.weight.grad.numpy().copy())
    model.zero_grad()
    return found, loss.item()


def test_statistics_are_numpys(lm, examples):
    found = layer_gradients(lm, examples, response_loss)
    for e, example in enumerate(examples):
        expected, loss = by_hand(lm, *example)
        assert found.losses[e].item() == pytest.approx(loss)
        for kind, matrices in expected.items():
            for depth, g in enumerate(matrices):
                s = np.linalg.svd(g, compute_uv=False)
                numbers = {
                    "nuclear": s.sum(),
                    "frobenius": np.sqrt((g**2).sum()),
                    "largest": s.max(),
                    "ratio": s.max() / s.sum(),
                    "per_loss": s.sum() / loss,
                    "mean": g.mean(),
                    "max": g.max(),
                    "min": g.min(),
                }
                assert set(numbers) == set(_STATISTICS)
                for name, value in numbers.items():
                    assert found.values[name][kind][e, depth].item() == pytest.approx(value, rel=1e-9, abs=1e-13)
    for name in _STATISTICS:
        torch.testing.assert_close(found.curve("v", name), found.values[name]["v"].mean(0))


def test_norms_are_ordered_and_ratios_bounded_by_the_rank(lm, examples):
    values = layer_gradients(lm, examples, response_loss).values
    for kind in "qkvo":
        nuclear, frobenius, largest = (values[name][kind] for name in ("nuclear", "frobenius", "largest"))
        assert (nuclear >= frobenius - 1e-12).all()
        assert (frobenius >= largest - 1e-12).all()
        assert (values["ratio"][kind] >= 1 / 8 - 1e-12).all()
        assert (values["ratio"][kind] <= 1 + 1e-12).all()


def test_one_token_response_gives_the_last_output_matrix_rank_one(lm, examples):
    tokens = examples[1][0]
    one, many = (layer_gradients(lm, [(tokens, start)], response_loss) for start in (len(tokens) - 1, 3))
    assert one.curve("o", "ratio")[-1].item() == pytest.approx(1, abs=1e-10)
    assert one.curve("o")[-1].item() == pytest.approx(one.curve("o", "frobenius")[-1].item())
    assert one.curve("o", "ratio")[0] < 0.99  # earlier layers are reached through every position
    assert many.curve("o", "ratio")[-1] < 0.99


def test_rank_is_at_most_the_number_of_positions_that_the_loss_reaches(lm, examples):
    tokens, ranks = examples[1][0], []
    for length in (1, 2, 3):
        found = by_hand(lm, tokens, len(tokens) - length)[0]["o"][-1]
        ranks.append(np.linalg.matrix_rank(found))
    assert ranks == [1, 2, 3]


def test_scaling_the_loss_scales_the_norms_and_nothing_else(lm, examples):
    plain = layer_gradients(lm, examples, response_loss)
    scaled = layer_gradients(lm, examples, lambda model, example: 5 * response_loss(model, example))
    for kind in "qkvo":
        for name in ("nuclear", "frobenius", "largest", "mean", "max", "min"):
            torch.testing.assert_close(scaled.curve(kind, name), 5 * plain.curve(kind, name))
        for name in ("ratio", "per_loss"):
            torch.testing.assert_close(scaled.curve(kind, name), plain.curve(kind, name))
        a, b = (found.curve(kind) for found in (plain, scaled))
        torch.testing.assert_close(layer_difference(b), 5 * layer_difference(a))
        assert relative_difference(a, b).item() == pytest.approx(4)


def test_mean_of_gradients_is_the_gradient_of_the_mean(lm, examples):
    """The means of entries are linear in the gradient: over the examples they are those of one backward."""
    found = layer_gradients(lm, examples, response_loss).curve("k", "mean")
    (sum(response_loss(lm, e) for e in examples) / len(examples)).backward()
    expected = torch.stack([block.qkv.weight.grad[8:16].mean() for block in lm.blocks])
    torch.testing.assert_close(found, expected)


# ---- curves


def test_differences_of_curves():
    flat, curve = torch.full((6,), 2.0), torch.tensor([4.0, 1.0, 1.0, 3.0, 2.0, 2.0])
    assert layer_difference(flat) == 0
    assert layer_difference(curve).item() == pytest.approx((3 + 0 + 2 + 1 + 0) / 5)
    assert relative_difference(curve, curve) == 0
    assert relative_difference(flat, curve).item() == pytest.approx((2 + 1 + 1 + 1) / 2 / 6)
    assert relative_difference(curve, flat).item() == pytest.approx((2 / 4 + 1 + 1 + 1 / 3) / 6)
    assert top_layers(flat, torch.tensor([2.0, 7.0, 1.0, 2.0, 2.0, 5.0]), 3) == [1, 5, 2]
    assert sorted(top_layers(flat, curve, 50)) == list(range(6))


@pytest.mark.parametrize(
    ("layers", "sizes"),
    [(26, (7, 13, 6)), (28, (7, 14, 7)), (32, (10, 10, 12)), (42, (12, 18, 12)), (6, (2, 2, 2)), (4, (1, 2, 1))],
)
def test_stages_divide_the_depth(layers, sizes):
    numbers = torch.arange(layers)
    parts = [numbers[part] for part in stages(layers).values()]
    assert tuple(map(len, parts)) == sizes
    assert torch.equal(torch.cat(parts), numbers)
    assert list(stages(layers)) == ["early", "middle", "late"]


def test_examples_with_gradients_that_are_not_finite_count_in_no_curve(lm, examples):
    def loss(model, example):
        value = response_loss(model, example)
        return value * torch.nan if example is examples[1] else value

    found = layer_gradients(lm, examples, loss)
    rest = layer_gradients(lm, [e for e in examples if e is not examples[1]], response_loss)
    assert found.used.tolist() == [True, False, True, True]
    assert torch.equal(found.curve("q"), rest.curve("q"))


def test_ratio_of_a_zero_gradient_is_left_out():
    model = nn.Linear(2, 2)
    x = [torch.zeros(2), torch.ones(2)]
    found = layer_gradients(model, x, lambda m, x: m(x).sum(), groups={"w": "weight"})
    assert found.curve("w", "ratio").item() == pytest.approx(1)
    assert found.values["nuclear"]["w"][0] == 0


# ---- which matrices


def test_kinds_of_the_usual_models():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    found = attention_projections(encoder)
    assert [len(found[kind]) for kind in "qkvo"] == [2, 2, 2, 2]
    assert found["k"][1] == Projection("layers.1.self_attn.in_proj_weight", 1, 3)
    assert found["o"][0] == Projection("layers.0.self_attn.out_proj.weight")


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Qwen2", "Bert"])
def test_kinds_of_transformers_models(family):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
    if family == "GPT2":
        sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 20}
    elif family in ("Llama", "Qwen2"):
        sizes |= {"num_key_value_heads": 1, "intermediate_size": 16}
    else:
        sizes |= {"intermediate_size": 16}
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**sizes, attn_implementation="eager")
    kind = "BertForMaskedLM" if family == "Bert" else family + "LMHeadModel" * (family == "GPT2")
    model = getattr(transformers, kind if family in ("Bert", "GPT2") else family + "ForCausalLM")(config)
    found = attention_projections(model)
    assert [len(found[kind]) for kind in "qkvo"] == [2, 2, 2, 2]
    values = layer_gradients(model, [(torch.arange(6), 3)], response_loss)
    assert all((values.curve(kind) > 0).all() for kind in "qvo")
    if family == "GPT2":  # stored transposed: the columns are the stacked outputs
        response_loss(model.eval(), (torch.arange(6), 3)).backward()
        g = model.transformer.h[1].attn.c_attn.weight.grad[:, 16:]
        assert values.curve("v")[1].item() == pytest.approx(torch.linalg.svdvals(g).sum().item(), rel=1e-4)


def test_groups_by_pattern_and_by_projection_are_the_same(lm, examples):
    default = layer_gradients(lm, examples, response_loss)
    own = {"k": [Projection(f"blocks.{i}.qkv.weight", 1, 3) for i in range(3)], "o": "blocks.*.out.weight"}
    found = layer_gradients(lm, examples, response_loss, groups=own)
    for kind in own:
        assert torch.equal(found.curve(kind), default.curve(kind))
    whole = layer_gradients(lm, examples, response_loss, groups={"qkv": "*.qkv.weight"})
    squares = sum(default.values["frobenius"][kind].square() for kind in "qkv")
    torch.testing.assert_close(whole.values["frobenius"]["qkv"].square(), squares)


# ---- where the response begins


@pytest.mark.parametrize(
    ("offsets", "characters", "start"),
    [
        ([(0, 3), (3, 5), (5, 8)], 5, 2),
        ([(0, 0), (0, 3), (3, 5), (5, 8), (0, 0)], 5, 3),  # special tokens at both ends
        ([(0, 3), (3, 6), (6, 8)], 5, 2),  # a token across the border is the prompt's
        ([(0, 0), (0, 2), (3, 5)], 2, 2),  # the space between belongs to no token
    ],
)
def test_response_starts_after_the_last_token_that_begins_in_the_prompt(offsets, characters, start):
    assert response_start(offsets, characters) == start


def test_prompt_tokens_do_not_count_in_the_loss(lm, examples):
    tokens, _ = examples[1]
    logits = lm(tokens[None])[0]
    expected = F.cross_entropy(logits[4:-1], tokens[5:])
    torch.testing.assert_close(response_loss(lm, (tokens, 5)), expected)


# ---- manners


def test_nothing_is_left_behind_and_runs_are_equal(lm, examples):
    lm.train()
    lm.blocks[1].eval()
    lm.head.weight.grad = torch.ones_like(lm.head.weight)
    state, modes = {k: v.clone() for k, v in lm.state_dict().items()}, [m.training for m in lm.modules()]
    numbers = torch.get_rng_state()
    with torch.no_grad():
        first, second = (layer_gradients(lm, examples, response_loss) for _ in range(2))
    assert torch.equal(first.curve("q"), second.curve("q"))
    assert all(torch.equal(v, state[k]) for k, v in lm.state_dict().items())
    assert modes == [m.training for m in lm.modules()]
    assert torch.equal(lm.head.weight.grad, torch.ones_like(lm.head.weight))
    assert all(p.grad is None for name, p in lm.named_parameters() if p is not lm.head.weight)
    assert torch.equal(numbers, torch.get_rng_state())


def test_dropout_is_off():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    a, b = (layer_gradients(model, torch.ones(1, 4), lambda m, x: m(x).sum(), groups={"w": "*.weight"}) for _ in "ab")
    assert torch.equal(a.curve("w"), b.curve("w"))


def test_half_precision_is_decomposed_in_single():
    model = nn.Linear(4, 3).bfloat16()
    x = torch.randn(1, 4).bfloat16()
    found = layer_gradients(model, x, lambda m, x: m(x).square().sum(), groups={"w": "weight"})
    assert found.curve("w", "ratio").item() == pytest.approx(1, abs=0.02)


LINEAR = nn.Linear(2, 2)
BOTH = torch.ones(2, 2)


def total(model, x):
    return model(x).sum()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer_gradients(LINEAR, BOTH, total), "found no regular attention"),
        (lambda: layer_gradients(LINEAR, BOTH, total, groups={"w": "*.weights"}), "groups['w']='*.weights' must name"),
        (lambda: layer_gradients(LINEAR, BOTH, total, groups={"w": [Projection("x")]}), "must name parameters"),
        (lambda: layer_gradients(LINEAR, BOTH[:0], total, groups={"w": "weight"}), "number of examples=0"),
        (lambda: layer_gradients(LINEAR, BOTH, lambda m, x: m(x), groups={"w": "weight"}), "got shape (2,)"),
        (
            lambda: layer_gradients(LINEAR, BOTH, lambda m, x: x.sum(), groups={"w": "weight"}),
            "a number that depends on no parameter",
        ),
        (
            lambda: layer_gradients(nn.Linear(2, 2).requires_grad_(False), BOTH, total, groups={"w": "weight"}),
            "but weight are: requires_grad_() them",
        ),
        (
            lambda: layer_gradients(LINEAR, BOTH, total, groups={"w": "weight"}).curve("w", "rank"),
            "statistic='rank' must be one of nuclear,",
        ),
        (lambda: layer_gradients(LINEAR, BOTH, total, groups={"w": "weight"}).curve("q"), "kind='q' must be one of w"),
        (lambda: layer_difference(torch.ones(1)), "number of layers=1 must be at least 2"),
        (lambda: relative_difference(torch.ones(2), torch.ones(3)), "got shapes (2,) and (3,)"),
        (lambda: top_layers(torch.ones(2), torch.ones(2), 0), "k=0 must lie in [1, inf)"),
        (lambda: stages(2), "layers=2 must lie in [3, inf)"),
        (lambda: response_loss(LINEAR, (torch.arange(4), 0)), "start=0 must be in 1 .. 3"),
        (lambda: response_loss(LINEAR, (torch.arange(4), 4)), "start=4 must be in 1 .. 3"),
        (lambda: response_start([(0, 3), (0, 0)], 3), "no token begins at or after character 3"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)

"""Examples that influence each other are refused with the operation's name; what only looks like it is not."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steep.per_example import PerExample
from steep.requires import UnmetRequirement

B = 5


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Between(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, between=torch.tanh, width=4):
        super().__init__()
        self.between = between
        self.first, self.last = nn.Linear(3, width).double(), nn.Linear(width, 2).double()

    def forward(self, x):
        return self.last(self.between(self.first(x)))


def batch(size=B):
    return torch.randn(size, 3, dtype=torch.float64)


def squares(out):
    return out.square().flatten(1).sum(1)


def jacobian(losses, model):
    params = [p for p in model.parameters() if p.requires_grad]

    def row(loss):
        found = torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    return torch.stack([row(loss) for loss in losses])


def exact(engine, model, forward):
    losses = forward()
    j = jacobian(losses, model)
    torch.testing.assert_close(engine.rows(losses).gram(), j @ j.T)


def by_hand(x):
    return (x - x.mean(0)) / (x.var(0) + 1e-5).sqrt()


MIXING_LAYERS = {
    "Softmax": lambda x: x.softmax(0),
    "Mean": lambda x: torch.tanh(x - x.mean(0)),
    "Var": by_hand,
    "NativeBatchNorm": lambda x: F.batch_norm(x, None, None, training=True),
    "Sum": lambda x: x * torch.tanh(x.sum(0)),
    "Cumsum": lambda x: x.cumsum(0),
    "LinalgVectorNorm": lambda x: F.normalize(x, dim=0),
}


@pytest.mark.parametrize("name", MIXING_LAYERS)
def test_an_operation_over_the_batch_between_layers(name):
    model = Between(MIXING_LAYERS[name])
    engine = PerExample(model)
    with pytest.raises(UnmetRequirement, match=rf"through '{name}', after layer 'first' \(Linear\): .*GroupNorm"):
        engine.rows(squares(model(batch())))


MIXING_LOSSES = {
    "Mean": lambda out: squares(out) - squares(out).mean(),
    "Mm": lambda out: F.cross_entropy(out @ out.T, torch.arange(len(out)), reduction="none"),
    "Sub": lambda out: squares(out - out.roll(1, 0)),
    "Div": lambda out: squares(out) / squares(out).max(),
    "LogSoftmax": lambda out: -F.log_softmax(squares(out), 0),
    "Sort": lambda out: squares(out).sort().values.diff(append=torch.zeros(1, dtype=out.dtype)),
}


@pytest.mark.parametrize("name", MIXING_LOSSES)
def test_a_loss_over_the_batch(name):
    model = Between()
    engine = PerExample(model)
    name_or_reduction = "Max" if name == "Div" else "Slice|Sub" if name == "Sort" else name
    with pytest.raises(
        UnmetRequirement, match=rf"through '({name_or_reduction})', after layer 'last'.*independent=False"
    ):
        engine.rows(MIXING_LOSSES[name](model(batch())))


def test_tokens_enter_through_an_embedding():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.BatchNorm1d(8).eval(), nn.Linear(8, 2)).double()
    engine = PerExample(model)
    out = model(torch.randint(7, (B, 2)))
    with pytest.raises(UnmetRequirement, match="through 'Softmax', after layer '3'"):
        engine.rows(squares(out.softmax(0)))


def test_a_refusal_is_not_forgotten():
    model = Between()
    engine, x = PerExample(model), batch()
    for _ in range(2):
        with pytest.raises(UnmetRequirement):
            engine.rows(MIXING_LOSSES["Mean"](model(x)))
    exact(engine, model, lambda: squares(model(x)))
    assert engine.left_to_autograd == set()


@pytest.mark.filterwarnings("ignore:each step takes")
@pytest.mark.parametrize("name", MIXING_LOSSES)
def test_on_request_the_vector_is_taken_as_it_is(name):
    model = Between()
    engine, x = PerExample(model, independent=False), batch()
    for _ in range(2):
        exact(engine, model, lambda: MIXING_LOSSES[name](model(x)))


@pytest.mark.filterwarnings("ignore:each step takes")
def test_on_request_batch_norm_is_left_to_autograd_and_what_follows_it_is_not():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    engine, x = PerExample(model, independent=False), batch()
    for _ in range(2):
        exact(engine, model, lambda: squares(model(x)))
    assert engine.left_to_autograd == {"0.weight", "0.bias"}


def test_the_request_needs_the_check_and_outlives_a_copy():
    with pytest.raises(ValueError, match="independent=False needs check=True"):
        PerExample(Between(), check=False, independent=False)
    engine = PerExample(nn.Linear(3, 2), independent=False)
    assert not copy.deepcopy(engine).independent
    assert not pickle.loads(pickle.dumps(engine)).independent


# ---- what is shared without being mixed


def positions(learned):
    """As many positions as examples: shapes cannot tell them apart."""
    model = nn.Module()
    model.token, model.head = nn.Embedding(7, 4), nn.Linear(4, 2)
    model.position = nn.Embedding(B, 4) if learned else nn.Linear(1, 4)
    where = torch.arange(B) if learned else torch.linspace(0, 1, B, dtype=torch.float64)[:, None]
    model.forward = lambda x: model.head(model.token(x) * (1 + torch.tanh(model.position(where))))
    return model.double(), torch.randint(7, (B, B))


def weights_from_a_network():
    model = nn.Module()
    model.net = nn.Linear(2, 3)
    where = torch.randn(B, 2, dtype=torch.float64)
    model.forward = lambda x: x @ model.net(where).T
    return model.double(), batch()


@pytest.mark.filterwarnings("ignore:each step takes")
@pytest.mark.parametrize("build", [lambda: positions(True), lambda: positions(False), weights_from_a_network])
def test_what_no_example_owns_is_not_mixing(build):
    model, x = build()
    engine = PerExample(model)
    for _ in range(2):
        exact(engine, model, lambda: squares(model(x)))


@pytest.mark.filterwarnings("ignore:each step takes")
@pytest.mark.parametrize("reorder", [lambda losses: losses.sort().values, lambda losses: losses.flip(0)])
def test_losses_in_another_order_are_not_mixed(reorder):
    model = Between()
    engine, x = PerExample(model), batch()
    exact(engine, model, lambda: reorder(squares(model(x))))


def test_statistics_that_no_gradient_passes_are_constants():
    model = Between()
    engine, x = PerExample(model), batch()
    exact(engine, model, lambda: squares(model(x)) / squares(model(x)).detach().mean())
    assert engine.left_to_autograd == set()


def test_one_example_mixes_with_nobody():
    model = Between(lambda x: torch.tanh(x - 0.5 * x.mean(0)))
    engine, x = PerExample(model), batch(1)
    exact(engine, model, lambda: squares(model(x)))


@pytest.mark.parametrize("reduce", [torch.flatten, lambda out: out[:3].square().sum(1)])
def test_losses_of_another_length_than_the_batch_are_exact_and_told(reduce):
    model = Between()
    engine, x = PerExample(model), batch()
    losses = reduce(model(x))
    with pytest.warns(UserWarning, match=rf"the model was called with 5 examples for {len(losses)} losses"):
        rows = engine.rows(losses)
    j = jacobian(reduce(model(x)), model)
    torch.testing.assert_close(rows.gram(), j @ j.T)


def test_dropping_or_permuting_examples_changes_no_other_row():
    """What is promised of independent examples, of layers with everything that could couple them."""
    model = nn.Sequential(nn.Conv1d(2, 4, 2), nn.InstanceNorm1d(4, affine=True), nn.BatchNorm1d(4).eval())
    model.append(nn.Flatten()).append(nn.Linear(12, 2)).double()
    engine, x = PerExample(model), torch.randn(B, 2, 4, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gram = engine.rows(squares(model(x))).gram()
        for chosen in (torch.randperm(B), torch.tensor([0, 3, 4])):
            part = engine.rows(squares(model(x[chosen]))).gram()
            torch.testing.assert_close(part, gram[chosen][:, chosen])


def test_what_is_refused_before_the_first_layer_is_said_too():
    """A decoder whose memory is made by the embedding that its own tokens go through (Bart)."""
    transformers = pytest.importorskip("transformers", reason="needs the extra steep[hf]")
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SIDES.items()}
    rates = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.BartConfig(vocab_size=20, d_model=8, max_position_embeddings=8, **sizes, **rates, **ids)
    model = transformers.BartForConditionalGeneration(config).double()
    tokens = torch.randint(3, 20, (4, 6))

    def losses(memory):
        out = model(encoder_outputs=(memory,), decoder_input_ids=tokens).logits
        return F.cross_entropy(out.transpose(1, 2), tokens, reduction="none").mean(1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, memory = PerExample(model), model.model.shared(tokens)
        with pytest.raises(UnmetRequirement, match="examples influence each other through 'Embedding': compute it"):
            engine.rows(losses(memory - memory.mean(0)))


SIDES = {"layers": 1, "attention_heads": 2, "ffn_dim": 8}

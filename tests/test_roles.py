"""`param_roles` over a zoo of models: every module type, tied, parametrized, pruned, frozen and foreign parameters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from steep.roles import ROLES, param_roles
from steep.tasks.networks import MLP, SmallCNN, Transformer


def roles_of(*layers, **options):
    """Roles of a sequence of layers, without the numbers in front of their names."""
    found = param_roles(nn.Sequential(*layers), **options)
    return {name.removeprefix("0."): role for name, role in found.items() if name.startswith("0.")}


class LlamaRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


class MatrixNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias, self.gain = (nn.Parameter(torch.zeros(s)) for s in ((2, 2), (2,), ()))


END = nn.Linear(3, 3)  # so that the layer under test is not the last one
BIASED = {"bias": "bias"}
ZOO = [
    (nn.Linear(3, 3), {"weight": "hidden"} | BIASED),
    (nn.Linear(3, 3, bias=False), {"weight": "hidden"}),
    (nn.Embedding(5, 3), {"weight": "embedding"}),
    (nn.EmbeddingBag(5, 3), {"weight": "embedding"}),
    (nn.Conv1d(2, 2, 3), {"weight": "convolution"} | BIASED),
    (nn.Conv2d(4, 4, 3, groups=2), {"weight": "convolution"} | BIASED),
    (nn.Conv2d(4, 2, 1, bias=False), {"weight": "convolution"}),
    (nn.ConvTranspose3d(2, 2, 3), {"weight": "convolution"} | BIASED),
    *((norm, {"weight": "norm", "bias": "norm"}) for norm in (nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.BatchNorm2d(3))),
    (nn.SyncBatchNorm(3), {"weight": "norm", "bias": "norm"}),
    (nn.InstanceNorm1d(3, affine=True), {"weight": "norm", "bias": "norm"}),
    (nn.RMSNorm(3), {"weight": "norm"}),
    (nn.BatchNorm1d(3, affine=False), {}),
    (LlamaRMSNorm(), {"weight": "norm"}),
    (MatrixNorm(), {"weight": "other"}),
    (nn.PReLU(), {"weight": "other"}),
    (nn.Bilinear(2, 2, 2), {"weight": "other", "bias": "other"}),
    (Own(), {"weight": "other", "bias": "other", "gain": "other"}),
    (
        nn.LSTM(2, 3, proj_size=2),
        {f"weight_{k}_l0": "hidden" for k in ("ih", "hh", "hr")} | {f"bias_{k}_l0": "bias" for k in ("ih", "hh")},
    ),
    (
        nn.GRUCell(2, 3),
        {"weight_ih": "hidden", "weight_hh": "hidden", "bias_ih": "bias", "bias_hh": "bias"},
    ),
    (
        nn.MultiheadAttention(4, 2),
        {"in_proj_weight": "hidden", "in_proj_bias": "bias", "out_proj.weight": "hidden", "out_proj.bias": "bias"},
    ),
    (
        nn.MultiheadAttention(4, 2, kdim=3, vdim=5, bias=False, add_bias_kv=True),
        {f"{k}_proj_weight": "hidden" for k in "qkv"}
        | {"out_proj.weight": "hidden", "bias_k": "bias", "bias_v": "bias"},
    ),
]


@pytest.mark.parametrize(("layer", "expected"), ZOO, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "")
def test_module_types(layer, expected):
    assert roles_of(layer, END) == expected


@pytest.mark.parametrize(
    "model",
    [
        MLP(4, 3, 2),
        SmallCNN(1, 3),
        Transformer(7, 5),
        nn.Transformer(8, 2, 1, 1, 8),
        nn.Sequential(*(layer for layer, _ in ZOO)),
    ],
    ids=["mlp", "cnn", "transformer", "nn.Transformer", "zoo"],
)
def test_every_parameter_has_one_role_in_the_models_order(model):
    assert list(param_roles(model)) == [name for name, _ in model.named_parameters()]
    assert set(param_roles(model).values()) <= set(ROLES)


def test_the_last_linear_is_the_head():
    roles = param_roles(MLP(4, 3, 3, 2))
    assert [role for role in roles.values() if role != "bias"] == ["hidden", "hidden", "head"]
    assert param_roles(nn.Linear(2, 2))["weight"] == "head"


def test_a_network_without_linear_layers_has_no_head():
    assert set(param_roles(nn.Sequential(nn.Conv2d(1, 2, 3), nn.MultiheadAttention(4, 2))).values()) == {
        "convolution",
        "hidden",
        "bias",
    }


class HeadFirst(nn.Module):
    """Defines its head before its body, has a layer it never calls, and takes two inputs."""

    def __init__(self):
        super().__init__()
        self.head, self.body, self.spare = nn.Linear(3, 2), nn.Linear(3, 3), nn.Linear(3, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, y=0.0):
        return self.head(self.drop(self.body(x)) + y)


@pytest.mark.parametrize("example", [torch.ones(1, 3), (torch.ones(1, 3), 1.0), {"x": torch.ones(1, 3), "y": 2.0}])
def test_an_example_finds_the_head_by_the_order_of_calls(example):
    model = HeadFirst()
    assert param_roles(model)["spare.weight"] == "head"
    roles = param_roles(model, example=example)
    assert [roles[f"{name}.weight"] for name in ("head", "body", "spare")] == ["head", "hidden", "hidden"]


def test_tracing_leaves_no_trace():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    param_roles(model, example=torch.ones(4, 3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model] == [True, False, True]
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_tracing_a_model_that_fails_removes_its_hooks():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(5, 2))
    with pytest.raises(RuntimeError):
        param_roles(model, example=torch.ones(4, 3))
    assert not any(m._forward_hooks for m in model.modules())
    assert model.training


def test_a_tied_embedding_is_reported_once_as_embedding():
    roles = param_roles(Transformer(7, 5, depth=1))
    assert roles["token.weight"] == "embedding"
    assert "head.weight" not in roles
    assert "head" not in roles.values()
    assert "also head.weight" in str(roles)
    free = param_roles(Transformer(7, 5, depth=1, tied=False))
    assert (free["token.weight"], free["head.weight"]) == ("embedding", "head")


def test_a_tie_is_an_embedding_whatever_was_defined_first():
    model = nn.ModuleDict({"head": nn.Linear(3, 5, bias=False), "token": nn.Embedding(5, 3)})
    model["head"].weight = model["token"].weight
    assert param_roles(model) == {"head.weight": "embedding"}


def test_a_shared_module_is_reported_once():
    shared = nn.Linear(3, 3)
    roles = param_roles(nn.ModuleDict({"a": shared, "b": shared, "end": nn.Linear(3, 2)}))
    assert list(roles) == ["a.weight", "a.bias", "end.weight", "end.bias"]
    assert roles["a.weight"] == "hidden"
    assert "also b.weight" in str(roles)


def test_a_fused_projection_is_hidden():
    assert param_roles(Transformer(7, 5, depth=1))["blocks.0.qkv.weight"] == "hidden"


def test_parametrized_weights_keep_their_role_under_the_new_name():
    layer = parametrizations.orthogonal(nn.Linear(3, 3))
    assert roles_of(layer, END) == {"bias": "bias", "parametrizations.weight.original": "hidden"}
    assert roles_of(layer)["parametrizations.weight.original"] == "head"
    conv = parametrizations.spectral_norm(nn.Conv1d(2, 2, 3, bias=False))
    assert param_roles(conv) == {"parametrizations.weight.original": "convolution"}
    embedding = parametrizations.weight_norm(nn.Embedding(5, 3))
    assert roles_of(embedding, END)["parametrizations.weight.original1"] == "embedding"


def test_magnitudes_of_weight_norm_are_no_matrix():
    roles = roles_of(parametrizations.weight_norm(nn.Linear(3, 4)), END)
    assert roles["parametrizations.weight.original0"] == "other"
    assert roles["parametrizations.weight.original1"] == "hidden"


def test_a_parametrization_that_owns_a_layer_does_not_become_the_head():
    class Low(nn.Module):
        def __init__(self):
            super().__init__()
            self.delta = nn.Linear(3, 3, bias=False)

        def forward(self, weight):
            return weight + self.delta.weight

    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Low())
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    assert param_roles(layer) == {
        "parametrizations.weight.original": "head",
        "parametrizations.weight.0.delta.weight": "hidden",
        "parametrizations.bias.original": "bias",
    }


def test_pruned_weights_keep_their_role():
    layer = prune.random_unstructured(nn.Linear(3, 3), "weight", 0.5)
    assert roles_of(layer, END) == {"bias": "bias", "weight_orig": "hidden"}


def test_frozen_parameters_are_included():
    model = MLP(4, 3, 2)
    model.requires_grad_(False)
    assert len(param_roles(model)) == 4


def test_overrides_by_name_and_pattern_later_ones_win():
    model = nn.Sequential(Own(), Own(), nn.Linear(2, 2))
    roles = param_roles(model, overrides={"*.gain": "norm", "1.*": "other", "1.weight": "hidden", "2.weight": "hidden"})
    assert [roles[name] for name in ("0.gain", "1.gain", "1.weight", "2.weight")] == [
        "norm",
        "other",
        "hidden",
        "hidden",
    ]
    assert roles["0.weight"] == "other"


def test_wrong_overrides_are_refused():
    with pytest.raises(ValueError, match=r"overrides\['\*'\]='matrix' is not a role; roles: embedding, head"):
        param_roles(nn.Linear(2, 2), overrides={"*": "matrix"})
    with pytest.raises(ValueError, match=r"'weigth' matches no parameter; did you mean 'weight'\?"):
        param_roles(nn.Linear(2, 2), overrides={"weigth": "hidden"})


def test_the_table_shows_names_roles_shapes_and_overrides():
    model = nn.Sequential(nn.Embedding(5, 3), Own())
    lines = str(param_roles(model, overrides={"1.gain": "bias"})).splitlines()
    assert [line.split() for line in lines] == [
        ["0.weight", "embedding", "5", "x", "3"],
        ["1.weight", "other", "2", "x", "2"],
        ["1.bias", "other", "2"],
        ["1.gain", "bias", "scalar"],
    ]
    assert len({line.index(role) for line, role in zip(lines, ("emb", "other", "other", "bias"), strict=True)}) == 1, (
        "aligned"
    )
    assert str(param_roles(nn.ReLU())) == "no parameters"


def test_roles_split_a_model_into_parameter_groups():
    """What it is for: matrices to one optimizer, the rest to another; together they are the whole model."""
    model = Transformer(7, 5)
    roles = param_roles(model)
    matrices = [p for name, p in model.named_parameters() if roles[name] == "hidden"]
    rest = [p for name, p in model.named_parameters() if roles[name] != "hidden"]
    assert len(matrices) == 2 * 4
    assert all(p.ndim == 2 for p in matrices)
    assert {id(p) for p in matrices + rest} == {id(p) for p in model.parameters()}


def test_a_functional_model_is_all_other():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, 2))

        def forward(self, x):
            return F.linear(x, self.w)

    assert param_roles(Functional(), example=torch.ones(1, 2)) == {"w": "other"}


def test_the_linear_maps_of_gpt2_are_matrices():
    transformers = pytest.importorskip("transformers", reason="needs the extra steep[hf]")
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=6, **ids)
    roles = param_roles(transformers.GPT2LMHeadModel(config))
    assert roles["transformer.h.0.attn.c_attn.weight"] == roles["transformer.h.0.mlp.c_proj.weight"] == "hidden"
    assert roles["transformer.h.0.attn.c_attn.bias"] == "bias"
    assert "other" not in roles.values()

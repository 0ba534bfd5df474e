"""Two processes on gloo equal one on their concatenated batch, and say what they exchange."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from two_processes import CASES, RULES, TRANSFORMERS, WORKS, batch, in_two, mixed, trained

from steep.adapters._sharding import check_sharding
from steep.adapters.distributed import GlobalBatch, sharded
from steep.backward.spring import Spring
from steep.backward.sven import Sven
from steep.optim.adabelief import AdaBelief
from steep.optim.adamp import AdamP

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def two():
    """What both processes return, which do all their work in one start."""
    return in_two(WORKS)


@pytest.mark.filterwarnings("ignore:each step takes")
@pytest.mark.parametrize("split", [6, 5], ids=["even", "uneven"])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_two_processes_equal_one_on_the_concatenated_batch(kind, name, split, two):
    model = mixed(kind)
    whole = trained(model, model, RULES[name](model), slice(None))
    start = mixed(kind).state_dict()
    moved = max(float((whole[k] - start[k]).abs().max()) for k in whole)
    for state, _ in (found["cases"][split, kind, name] for found in two):
        assert moved > 1e-3
        for key in whole:
            torch.testing.assert_close(state[key], whole[key], rtol=1e-7, atol=1e-9)


def test_what_is_exchanged_are_the_layers_factors(two):
    """B (i + o) numbers of eight bytes per linear layer, B losses, and two integers: the length and the shapes."""
    factors = 6 * ((6 + 7) + (7 + 1)) * 8
    assert two[0]["cases"][6, "mlp", "sven"][1] == factors + 6 * 8 + 2 * 8
    assert two[0]["cases"][6, "mlp", "mean"][1] == 8
    rows = 6 * sum(p.numel() for p in mixed("conv").parameters()) * 8
    assert two[0]["cases"][6, "conv", "sven"][1] < 1.5 * rows  # small layers: their rows are what is kept


def test_unlike_shapes_are_refused_in_every_process(two):
    for text, lengths in (found["refusals"] for found in two):
        assert "unlike shapes" in text
        assert "pad the batches" in text
        assert lengths == [1, 2]


def test_a_rule_whose_global_batch_is_unknown_is_refused():
    with pytest.raises(TypeError, match="not built on the per-example engine"):
        GlobalBatch(lambda losses, scale=1.0: None)
    with pytest.raises(TypeError, match="Spring needs more of the global batch than its Gram matrix"):
        GlobalBatch(Spring(nn.Linear(2, 1)))
    with pytest.raises(ValueError, match=r"shape \(B,\), got \(\).*reduction='none'"):
        GlobalBatch(Sven(nn.Linear(2, 1)))(torch.zeros(()))


def test_the_rules_own_state_is_reached():
    rule = GlobalBatch(Sven(nn.Linear(2, 1), seed=5))
    assert rule.requires >= {"losses", "independent_examples"}
    rule.load_state_dict(rule.state_dict())
    assert "Sven" in repr(rule)


def test_sharded_parameters_are_stepped_by_elementwise_methods_and_refused_by_the_rest(two):
    model = mixed("mlp")
    optimizer = AdaBelief(model.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(5):
        x, y = batch(step)
        optimizer.zero_grad()
        (model(x).squeeze(-1) - y).square().mean().backward()
        optimizer.step()
    for texts, state in (found["shards"] for found in two):
        assert "AdamP needs whole parameters" in texts[0]
        assert "DistributedDataParallel" in texts[1]
        for key, value in model.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-7, atol=1e-9)


def test_whole_parameters_are_never_refused():
    check_sharding(nn.Linear(2, 2).parameters(), AdamP, Sven)
    model = nn.Linear(2, 2)
    optimizer = sharded(AdaBelief, model.parameters(), lr=0.1)
    before = model.weight.detach().clone()
    optimizer.step(lambda: model(torch.ones(1, 2)).sum().backward())
    assert not torch.equal(before, model.weight)
    optimizer.zero_grad()
    assert model.weight.grad is None
    assert repr(optimizer).startswith("ShardedAdaBelief")


@pytest.mark.parametrize("host", ["accelerate", "trainer"])
def test_hosts_in_two_processes_equal_one(host, two):
    if host == "trainer" and not TRANSFORMERS:
        pytest.skip("needs the extra steep[hf]")
    model = mixed("mlp")
    whole = trained(model, model, Sven(model), slice(None))
    for processes, state in (found[host] for found in two):
        assert processes == 2
        for key, value in whole.items():
            torch.testing.assert_close(state[key], value, rtol=1e-7, atol=1e-9)

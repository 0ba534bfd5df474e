"""Two processes on gloo equal one on their concatenated batch, and say what they exchange."""

import datetime
import tempfile
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

import steep
from steep.adapters.distributed import Exchange, GlobalBatch, check_sharding, sharded
from steep.backward.sven import Sven
from steep.needs import UnmetNeed
from steep.optim.adabelief import AdaBelief
from steep.optim.adamp import AdamP

LIMIT = 60  # seconds

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def _enter(rank, world, path, work):
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=LIMIT)
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=world, timeout=limit)
    try:
        torch.save(work(rank), f"{path}/{rank}")
    finally:
        dist.destroy_process_group()


def in_two(work):
    """What `work(rank)` returns in each of two processes, which are ended when they take too long."""
    with tempfile.TemporaryDirectory() as path:
        context = start_processes(_enter, (2, path, work), 2, join=False, start_method="spawn")
        end = time.monotonic() + LIMIT
        try:
            while not context.join(timeout=1):
                assert time.monotonic() < end, "the processes hang"
        finally:
            for process in context.processes:
                process.kill()
        return [torch.load(f"{path}/{rank}") for rank in range(2)]


def mixed(kind):
    """Models whose parts are kept in every way: factors, patches, rows, tokens, tied weights, no rule at all."""
    torch.manual_seed(3)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1))
    if kind == "conv":
        shape = nn.Unflatten(1, (1, 1, 6))
        return nn.Sequential(shape, nn.Conv2d(1, 40, (1, 3)), nn.Tanh(), nn.GroupNorm(2, 40), nn.Flatten(), nn.Linear(160, 1))
    return Tied()


class Tied(nn.Module):
    """An embedding tied to a linear layer, and one without a rule."""

    def __init__(self):
        super().__init__()
        self.table, self.back, self.odd = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.Bilinear(5, 5, 1)
        self.back.weight = self.table.weight

    def forward(self, x):
        h = torch.tanh(self.back(self.table(x.abs().mul(9).long() % 5).mean(1)))
        return self.odd(h, h)


RULES = {
    "mean": lambda model: steep.Mean(),
    "sven": Sven,
    "sven, some rows": partial(Sven, param_fraction=0.5),
    "sven, micro-batches": partial(Sven, micro_batch=3, rank=3),
}


def batch(step, count=12):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(count, 6, generator=generator), torch.randn(count, generator=generator)


def trained(model, call, rule, cut, steps=4):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        x, y = (t[cut] for t in batch(step))
        optimizer.zero_grad()
        rule(call(x).squeeze(-1) - y if not isinstance(getattr(rule, "rule", rule), steep.Mean) else
             (call(x).squeeze(-1) - y).square())
        optimizer.step()
    return model.state_dict()


CASES = [("mlp", name) for name in RULES] + [("conv", "sven"), ("conv", "sven, some rows"), ("tied", "sven"), ("tied", "sven, some rows")]


def _all_cases(rank):
    found = {}
    for split in (6, 5):  # even, uneven
        cut = slice(0, split) if rank == 0 else slice(split, 12)
        for kind, name in CASES:
            model = mixed(kind)
            rule = GlobalBatch(RULES[name](model))
            state = trained(model, DistributedDataParallel(model), rule, cut)
            found[split, kind, name] = state, rule.sent_bytes
    return found


@pytest.fixture(scope="module")
def two():
    return in_two(_all_cases)


@pytest.mark.filterwarnings("ignore:each step takes")
@pytest.mark.parametrize("split", [6, 5], ids=["even", "uneven"])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_two_processes_equal_one_on_the_concatenated_batch(kind, name, split, two):
    model = mixed(kind)
    whole = trained(model, model, RULES[name](model), slice(None))
    start = mixed(kind).state_dict()
    moved = max(float((whole[k] - start[k]).abs().max()) for k in whole)
    for state, _ in (found[split, kind, name] for found in two):
        assert moved > 1e-3
        for key in whole:
            torch.testing.assert_close(state[key], whole[key], rtol=1e-4, atol=2e-5 * max(1.0, moved))


def test_what_is_exchanged_are_the_layers_factors(two):
    """B (i + o) numbers of four bytes per linear layer, B losses, and two integers: the length and the shapes."""
    factors = 6 * ((6 + 7) + (7 + 1)) * 4
    assert two[0][6, "mlp", "sven"][1] == factors + 6 * 4 + 2 * 8
    assert two[0][6, "mlp", "mean"][1] == 8
    rows = 6 * sum(p.numel() for p in mixed("conv").parameters()) * 4
    assert two[0][6, "conv", "sven"][1] < 1.5 * rows  # small layers: their rows are what is kept


def _refusals(rank):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    rule, text = GlobalBatch(Sven(model)), ""
    try:
        rule(model(torch.randn(2, 3 + rank, 4)).square().mean((1, 2)))
    except ValueError as error:
        text = str(error)
    return text, Exchange().lengths(torch.zeros(rank + 1))


def test_unlike_shapes_are_refused_in_every_process():
    for text, lengths in in_two(_refusals):
        assert "unlike shapes" in text
        assert "pad the batches" in text
        assert lengths == [1, 2]


def test_a_rule_whose_global_batch_is_unknown_is_refused():
    with pytest.raises(TypeError, match="not built on the per-example engine"):
        GlobalBatch(lambda losses, scale=1.0: None)


def test_the_rules_own_state_is_reached():
    rule = GlobalBatch(Sven(nn.Linear(2, 1), seed=5))
    assert rule.needs >= {"losses", "independent_examples"}
    rule.load_state_dict(rule.state_dict())
    assert "Sven" in repr(rule)


def _fsdp(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = mixed("mlp")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    texts = []
    for refused in (AdamP, Sven):
        with pytest.raises(UnmetNeed) as error:
            check_sharding(model.parameters(), refused)
        texts.append(str(error.value))
    with pytest.raises(UnmetNeed):
        sharded(AdamP, model.parameters())
    optimizer = sharded(AdaBelief, model.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(5):
        x, y = (t[6 * rank : 6 * rank + 6] for t in batch(step))
        optimizer.zero_grad()
        (model(x).squeeze(-1) - y).square().mean().backward()
        optimizer.step()
    return texts, {k: v.full_tensor() for k, v in model.state_dict().items()}


def test_sharded_parameters_are_stepped_by_elementwise_methods_and_refused_by_the_rest():
    model = mixed("mlp")
    optimizer = AdaBelief(model.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(5):
        x, y = batch(step)
        optimizer.zero_grad()
        (model(x).squeeze(-1) - y).square().mean().backward()
        optimizer.step()
    for texts, state in in_two(_fsdp):
        assert "AdamP needs whole parameters" in texts[0]
        assert "DistributedDataParallel" in texts[1]
        for key, value in model.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)


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

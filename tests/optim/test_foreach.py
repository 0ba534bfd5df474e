"""The ways of running one update rule agree, on every kind of parameter; state is kept exactly; refusals say why."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from steep.optim import _foreach as foreach
from steep.optim.adabelief import AdaBelief
from steep.optim.adamp import SGDP, AdamP
from steep.optim.diffgrad import DiffGrad
from steep.utils.validation import check_ranges

OPTIMIZERS = [AdaBelief, DiffGrad, AdamP, SGDP]
SHAPES = [(), (3,), (1,), (4, 5), (2, 3, 3, 3), (4, 5), (1, 7), (7, 1), (0, 3), (400, 400), (4, 5)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensors(shapes, seed=0, dtype=torch.float64):
    g = generator(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def parameters(shapes=SHAPES, dtype=torch.float64):
    return [nn.Parameter(t) for t in tensors(shapes, 99, dtype)]


def advance(optimizer, steps, without=()):
    """Steps with prescribed gradients; `without` maps a step to the parameters that have none then."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in steps:
        for i, (p, g) in enumerate(zip(params, tensors([p.shape for p in params], t, params[0].dtype), strict=True)):
            p.grad = None if i in dict(without).get(t, ()) else g
        optimizer.step()
    return params


def assert_close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


GAPS = {2: (3, 9), 3: (0, 1, 2, 3), 4: (5,)}


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_buckets_agree_with_the_loop(make, dtype, tolerance, maximize):
    options = {"weight_decay": 0.1, "maximize": maximize, "lr": 0.01}
    loop = advance(make(parameters(dtype=dtype), foreach=False, **options), range(7), GAPS.items())
    joined = advance(make(parameters(dtype=dtype), foreach=True, **options), range(7), GAPS.items())
    default = advance(make(parameters(dtype=dtype), **options), range(7), GAPS.items())
    assert_close(joined, loop, tolerance)
    assert all(map(torch.equal, default, joined))


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("size", [1, 7, 50])
def test_size_of_the_pieces_does_not_matter(make, size, monkeypatch):
    whole = advance(make(parameters(SHAPES[:8])), range(4))
    monkeypatch.setattr(foreach, "_piece_size", lambda group, device: size)
    assert_close(advance(make(parameters(SHAPES[:8])), range(4)), whole, 1e-12)


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("flag", [None, False])
def test_layout_in_memory_does_not_matter(make, flag):
    """Transposed and channels-last parameters, with gradients laid out otherwise."""
    shapes = [(4, 5), (2, 3, 4, 4), (6,)]
    plain = advance(make(parameters(shapes), foreach=flag), range(4))
    odd = parameters(shapes)
    odd[0] = nn.Parameter(odd[0].detach().t().contiguous().t())
    odd[1] = nn.Parameter(odd[1].detach().to(memory_format=torch.channels_last))
    odd[2] = nn.Parameter(odd[2].detach().repeat_interleave(2)[::2])
    assert not any(p.is_contiguous() for p in odd)
    assert_close(advance(make(odd, foreach=flag), range(4)), plain, 1e-13)


def test_state_lies_end_to_end_and_need_not():
    optimizer = AdaBelief(parameters([(3,), (4, 5), (2,)]))
    params = advance(optimizer, range(2))
    first, second = (optimizer.state[p]["exp_avg"] for p in params[:2])
    assert second.data_ptr() == first.data_ptr() + first.nbytes
    other = AdaBelief(parameters([(3,), (4, 5), (2,)]))
    scattered = advance(other, range(2))
    for p in scattered:
        other.state[p] = {name: value.clone() for name, value in other.state[p].items()}
    for a, b in zip(advance(optimizer, range(2, 6)), advance(other, range(2, 6)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a]["exp_avg_var"], other.state[b]["exp_avg_var"])


def test_neighbours_in_memory_by_chance_are_not_one_vector():
    tensor = torch.arange(6.0)
    joined = foreach._end_to_end((tensor[:2], tensor[2:3], tensor[3:]), torch.float32)
    assert joined is not None
    assert torch.equal(joined, tensor)
    assert foreach._end_to_end((tensor[:2], tensor[3:]), torch.float32) is None
    assert foreach._end_to_end((tensor[:2], tensor[2:]), torch.float64) is None
    assert foreach._end_to_end((tensor[:4].view(2, 2).t(), tensor[4:]), torch.float32) is None
    memory = bytearray(24)
    alone = torch.frombuffer(memory, dtype=torch.float32, count=2)
    neighbour = torch.frombuffer(memory, dtype=torch.float32, count=4, offset=8)
    assert neighbour.data_ptr() == alone.data_ptr() + alone.nbytes
    assert foreach._end_to_end((alone, neighbour), torch.float32) is None


def test_buckets_are_filled_and_large_tensors_stay_alone():
    rows = [(torch.empty(n),) for n in (3, 4, 3, 5, 70_000, 2, 10, 11)]
    sizes = [[t.numel() for (t,) in bucket] for bucket in foreach._join(rows, 10)]
    assert sizes == [[3, 4, 3], [70_000], [5, 2], [11], [10]]
    assert [len(bucket) for bucket in foreach._join(rows, 0)] == [1] * 8
    assert [len(bucket) for bucket in foreach._join(rows, 2**20)] == [1, 7]


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flag", [None, False])
def test_half_precision_is_float32_but_for_the_rounding_of_the_parameters(make, dtype, flag):
    shapes = [(3,), (4, 5), (4, 5)]
    half = make(parameters(shapes, dtype), foreach=flag, eps=1e-10)
    single = make([nn.Parameter(p.detach().float()) for p in parameters(shapes, dtype)], foreach=flag, eps=1e-10)
    params = [optimizer.param_groups[0]["params"] for optimizer in (half, single)]
    for t in range(5):
        for a, b, g in zip(*params, tensors(shapes, t, dtype), strict=True):
            a.grad, b.grad = g, g.float()
        half.step()
        single.step()
        with torch.no_grad():
            for a, b in zip(*params, strict=True):
                b.copy_(b.to(dtype))  # round as the half-precision parameter was
                assert torch.equal(a.float(), b)
    for state in half.state.values():
        assert {value.dtype for value in state.values()} == {torch.float32}


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_loading_keeps_the_float32_state_of_half_precision_parameters(make):
    optimizer = make(parameters([(3,), (4, 5)], torch.bfloat16))
    advance(optimizer, range(4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    clone = make(parameters([(3,), (4, 5)], torch.bfloat16))
    clone.load_state_dict(torch.load(file, weights_only=True))
    for old, new in zip(optimizer.state.values(), clone.state.values(), strict=True):
        assert old.keys() == new.keys()
        for name, value in old.items():
            assert new[name].dtype == torch.float32
            assert torch.equal(new[name], value)
    plain = torch.optim.Adam(parameters([(3,)], torch.bfloat16))
    clone = make(parameters([(3,)], torch.bfloat16))
    advance(clone, range(1))
    plain.load_state_dict(clone.state_dict())
    assert any(v.dtype == torch.bfloat16 for s in plain.state.values() for v in s.values())  # what torch does by itself


def test_loading_honours_the_users_hooks():
    optimizer = AdaBelief(parameters([(3,)], torch.bfloat16))
    advance(optimizer, range(3))

    def reset_means(_, state_dict):
        state = {i: {**s, "exp_avg": torch.zeros_like(s["exp_avg"])} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    clone = AdaBelief(parameters([(3,)], torch.bfloat16))
    clone.register_load_state_dict_pre_hook(reset_means)
    clone.load_state_dict(optimizer.state_dict())
    (state,) = clone.state.values()
    assert not state["exp_avg"].any()
    assert state["exp_avg_var"].any()


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_go_on_alike_and_apart(make, duplicate):
    optimizer = make(parameters())
    advance(optimizer, range(3))
    clone = duplicate(optimizer)
    before = [p.detach().clone() for p in advance(clone, range(0))]
    ours = advance(optimizer, range(3, 6))
    assert all(map(torch.equal, advance(clone, range(0)), before))
    assert_close(advance(clone, range(3, 6)), ours, 0)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_groups_keep_their_own_settings(make):
    a, b = parameters([(4, 5), (4, 5)])
    c, d = parameters([(4, 5), (4, 5)])
    grouped = make([{"params": [a]}, {"params": [b], "lr": 1e-3, "weight_decay": 0.5, "foreach": False}], lr=1e-2)
    advance(grouped, range(3))
    first, second = make([c], lr=1e-2), make([d], lr=1e-3, weight_decay=0.5)
    for t in range(3):
        c.grad, d.grad = tensors([c.shape, d.shape], t)
        first.step()
        second.step()
    assert_close([a, b], [c, d], 1e-13)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_learning_rate_may_be_a_tensor_and_change(make):
    number, tensor = make(parameters(), lr=0.01), make(parameters(), lr=torch.tensor(0.01, dtype=torch.float64))
    for optimizer in (number, tensor):
        advance(optimizer, range(2))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        advance(optimizer, range(2, 3))
        schedule.step()
    assert float(tensor.param_groups[0]["lr"]) == pytest.approx(0.005)
    assert_close(advance(tensor, range(3, 5)), advance(number, range(3, 5)), 1e-12)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_refusals_come_before_any_change(make):
    good, embedding = nn.Parameter(torch.ones(3)), nn.Embedding(5, 2, sparse=True)
    optimizer = make([good, *embedding.parameters()])
    good.grad = torch.ones(3)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(
        RuntimeError, match=rf"{make.__name__} needs dense gradients, got torch.sparse_coo: use sparse="
    ):
        optimizer.step()
    assert torch.equal(good, torch.ones(3))
    assert not any(optimizer.state[p] for p in (good, embedding.weight))
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=rf"{make.__name__} needs real parameters, got torch.complex64: optimize"):
        make([p]).step()


def test_sharded_parameters_are_refused():
    class Sharded(nn.Parameter):
        def to_local(self):
            return self

    p = Sharded(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"AdaBelief cannot step sharded parameters \(Sharded\): use DDP"):
        AdaBelief([p]).step()


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_skipped_step_leaves_everything_as_it_was(make):
    """`GradScaler` skips the step where a gradient is not finite; without it the parameter shows the NaN."""
    (p,) = params = parameters([(4, 5)], torch.float32)
    optimizer, scaler = make(params), torch.amp.GradScaler("cpu")
    for scale in (1.0, float("inf")):
        optimizer.zero_grad()
        scaler.scale((p * tensors([p.shape], 1, torch.float32)[0]).sum() * scale).backward()
        before = p.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(p, before[0])
    for name, value in optimizer.state[p].items():
        assert torch.equal(value, before[1][0][name])
    p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert p.isnan().all()


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_changing_set_of_gradients_holds_no_more_memory(make):
    optimizer = make(parameters(SHAPES[:8]))
    sizes = set()
    for t in range(40):
        missing = [i for i in range(8) if torch.rand((), generator=generator(100 * t + i)) < 0.4]
        advance(optimizer, range(t, t + 1), {t: missing}.items())
        scratch = optimizer._scratch
        sizes.add((len(scratch.parts), sum(m.numel() for m in scratch.held.values())))
    assert max(parts for parts, _ in sizes) <= 5 * 8  # columns times shapes
    assert max(numbers for _, numbers in sizes) <= 6 * 120


@pytest.mark.parametrize(
    ("ranges", "values", "message"),
    [
        ({"a": "[0, 1)"}, {"a": 0}, None),
        ({"a": "[0, 1)"}, {"a": 1}, r"a=1 must lie in \[0, 1\)"),
        ({"a": "(0, 1]"}, {"a": 0.0}, r"a=0.0 must lie in \(0, 1\]"),
        ({"a": "(0, 1]"}, {"a": torch.tensor(1.0)}, None),
        ({"a": "(0, 1]"}, {"a": torch.ones(2)}, r"a=tensor\(\[1., 1.\]\) must be a number in \(0, 1\]"),
        ({"a": "[0, inf)"}, {"a": float("inf")}, r"a=inf must lie in \[0, inf\)"),
        ({"a": "[0, inf)"}, {"a": float("nan")}, r"a=nan must lie in \[0, inf\)"),
        ({"a": "[0, inf)"}, {"a": None}, r"a=None must be a number in \[0, inf\)"),
        ({"a": ("[0, 1)", "(0, 1)")}, {"a": [0, 0.5]}, None),
        ({"a": ("[0, 1)", "(0, 1)")}, {"a": (0.5, 0)}, r"a\[1\]=0 must lie in \(0, 1\)"),
        ({"a": ("[0, 1)", "(0, 1)")}, {"a": 0.5}, r"a=0.5 must be 2 numbers in \[0, 1\), \(0, 1\)"),
        ({"a": ("[0, 1)", "(0, 1)")}, {"a": (0.5,)}, r"a=\(0.5,\) must be 2 numbers"),
    ],
)
def test_ranges(ranges, values, message):
    if message is None:
        check_ranges(values, ranges)
        return
    with pytest.raises(ValueError, match=message):
        check_ranges(values, ranges)

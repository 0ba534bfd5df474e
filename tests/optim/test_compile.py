"""What `compile=True` promises, for every optimizer that has it: eager numbers, from kernels that are built once."""

import pytest
import torch
from torch import nn

from steep.method import methods
from steep.optim import _foreach as foreach
from steep.optim.adabelief import AdaBelief
from steep.optim.diffgrad import DiffGrad

# a worker that compiles pays seconds for its first kernel: one of several workers should
pytestmark = pytest.mark.xdist_group("compile")

COMPILABLE = [id for id, m in methods().items() if m.changes == "optim" and "compile" in m.hyper]
SHAPES = [(5, 3, 2)] * 4 + [
    (11,),
    (80_000,),
]  # joined in a bucket; a vector of another length; a tensor that stays alone
FIRST = (0, 1, 5)  # parameters with a gradient at the first step; then all have one, in calls of other lengths
OPTIONS = {  # in float64, so that in float32 the kernels are those of the common checks
    "adabelief": {"amsgrad": True, "decoupled": False},
    "diffgrad": {"maximize": True, "weight_decay": 0.1},
    "adamp": {"nesterov": True, "maximize": True},
    "sgdp": {"nesterov": False},
}
PROJECTS_SOME = {"adamp": {"delta": 0.3}, "sgdp": {"delta": 0.3}}  # of the random gradients below, and not all


def shapes(id):
    """With a tensor that is too large to share a bucket: a matrix, but where that would take two more kernels."""
    return [*SHAPES, (80_000,) if id in PROJECTS_SOME else (400, 200)]


def randoms(shapes, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def path(id, dtype, compile, **options):
    """Parameters and state after each of six steps; every number that may change in a training run changes."""
    params = [nn.Parameter(w) for w in randoms(shapes(id), 99, dtype)]
    optimizer = methods()[id].make(params, compile=compile, **options)
    group, found = optimizer.param_groups[0], []
    for t in range(6):
        group["lr"] = 1e-3 * (t + 1)
        for name in {"betas", "momentum"} & group.keys():
            group[name] = (0.9 - 0.01 * t, 0.99) if name == "betas" else 0.9 - 0.01 * t
        for i, (p, g) in enumerate(zip(params, randoms(shapes(id), t, dtype), strict=True)):
            p.grad = g if t > 0 or i in FIRST else None
        kernels = foreach._kernels.cache_info().misses
        with torch.compiler.set_stance("fail_on_recompile" if compile and t > 0 else "default"):
            optimizer.step()
        assert t == 0 or foreach._kernels.cache_info().misses == kernels
        state = {
            f"{i} {name}": value.clone() for i, p in enumerate(params) for name, value in optimizer.state[p].items()
        }
        found.append({**{str(i): p.detach().clone() for i, p in enumerate(params)}, **state})
    return found


# float64 shows a wrong formula best; in float32, which the common checks compile too, a method of each kind is enough
CASES = [(id, torch.float64) for id in COMPILABLE] + [(id, torch.float32) for id in ("adabelief", "diffgrad", "adamp")]


@pytest.mark.parametrize(("id", "dtype"), CASES, ids=str)
def test_compiled_path_agrees_and_is_not_rebuilt(id, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    options = {**PROJECTS_SOME.get(id, {}), **(OPTIONS.get(id, {}) if dtype == torch.float64 else {})}
    eager = path(id, dtype, compile=False, **options)
    for ours, plain in zip(path(id, dtype, compile=True, **options), eager, strict=True):
        assert ours.keys() == plain.keys()
        for name, value in plain.items():
            torch.testing.assert_close(
                ours[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
    decisions = [float(value) for step in eager for name, value in step.items() if "projected" in name]
    assert (id in PROJECTS_SOME) == (0 < sum(decisions) < len(decisions))


@pytest.mark.parametrize("compile", [False, True])
def test_autograd_notices_that_the_parameters_changed(compile):
    (p,) = params = [nn.Parameter(torch.ones(70_000))]
    loss = p.square().sum()
    p.grad = torch.ones_like(p)
    AdaBelief(params, compile=compile).step()
    assert not torch.equal(p, torch.ones_like(p))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_missing_compiler_is_reported(monkeypatch):
    p = nn.Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    broken = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with (
        torch._inductor.config.patch(broken),
        pytest.raises(
            RuntimeError, match=r"compile=True failed .*no-such-compiler.* install one, or pass compile=False"
        ),
    ):
        DiffGrad([p], compile=True, maximize=True).step()
    assert torch.equal(p, torch.ones(5))

"""Torch's optimizer contract, to the letter: checks for every optimizer of ours and anybody's."""

from __future__ import annotations

import copy
import io

import torch
from torch import Tensor

from steep.method import Method


def grads(parameters: list[Tensor], seed: int) -> None:
    numbers = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=numbers, dtype=torch.float32).to(p.dtype)


def some(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(1)
    shapes = ((), (3,), (4, 5), (2, 3, 3, 3))
    tensors = [torch.randn(shape, generator=numbers).to(dtype) for shape in shapes]
    return [t.requires_grad_() for t in [*tensors, torch.randn(6, 4, generator=numbers).to(dtype).t()]]


def steps(optimizer: torch.optim.Optimizer, parameters: list[Tensor], count: int, seed: int = 0) -> None:
    for i in range(count):
        grads(parameters, seed + i)
        optimizer.step()


def calls_a_closure_at_once_with_gradients_on(method: Method) -> None:
    (p,) = parameters = [torch.ones(3, requires_grad=True)]
    seen = []

    def closure() -> Tensor:
        seen.append((torch.is_grad_enabled(), p.detach().clone()))
        p.grad = None
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        returned = method.make(parameters).step(closure)
    assert seen, "does not call the closure"
    assert seen[0][0], "calls the closure with gradients off"
    assert torch.equal(seen[0][1], torch.ones(3)), "moves before it calls the closure"
    assert returned is not None, "does not return the closure's loss"
    assert float(torch.as_tensor(returned).detach()) == 3.0, "does not return the closure's loss"


def skips_parameters_without_gradient(method: Method) -> None:
    parameters = some()
    optimizer = method.make(parameters)
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    assert all(map(torch.equal, before, parameters)), "moves parameters that have no gradient"
    grads(parameters[:2], 0)
    optimizer.step()
    assert not torch.equal(before[1], parameters[1]), "does not move a parameter that has a gradient"
    assert all(map(torch.equal, before[2:], parameters[2:])), "moves parameters that have no gradient"


def leaves_gradients_alone(method: Method) -> None:
    parameters = some()
    optimizer = method.make(parameters)
    grads(parameters, 0)
    before = [p.grad.clone() for p in parameters if p.grad is not None]
    optimizer.step()
    after = [p.grad for p in parameters if p.grad is not None]
    assert all(map(torch.equal, before, after)), "changes .grad"


def refuses_sparse_gradients(method: Method) -> None:
    p = torch.zeros(4, 2, requires_grad=True)
    p.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (4, 2), check_invariants=True)
    try:
        method.make([p]).step()
    except RuntimeError as error:
        assert "sparse" in str(error), f"the message does not mention sparse gradients: {error}"
        return
    assert not torch.equal(p, torch.zeros(4, 2)), "silently ignores sparse gradients"


def state_survives_saving(method: Method) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        parameters = some(dtype)
        optimizer = method.make(parameters)
        steps(optimizer, parameters, 6)
        others = [p.detach().clone().requires_grad_() for p in parameters]
        clone = method.make(others)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        clone.load_state_dict(torch.load(file, weights_only=True))
        steps(optimizer, parameters, 6, seed=6)
        steps(clone, others, 6, seed=6)
        assert all(map(torch.equal, parameters, others)), f"differs after saving and loading ({dtype})"


def copies_and_groups(method: Method) -> None:
    parameters = some()
    optimizer = method.make([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 1e-5}])
    steps(optimizer, parameters, 2)
    clone = copy.deepcopy(optimizer)
    assert repr(clone) == repr(optimizer), "its copy reads differently"
    moved = [p.detach().clone() for p in parameters]
    grads([p for group in clone.param_groups for p in group["params"]], 5)
    clone.step()
    assert all(map(torch.equal, moved, parameters)), "its deep copy moves the original's parameters"
    moved_little = max(float((p - q).detach().abs().max()) for p, q in zip(parameters[2:], some()[2:], strict=True))
    assert moved_little < 1e-3, "ignores a group's own learning rate"


CHECKS = (
    calls_a_closure_at_once_with_gradients_on,
    skips_parameters_without_gradient,
    leaves_gradients_alone,
    refuses_sparse_gradients,
    state_survives_saving,
    copies_and_groups,
)

"""The contract of handles: checks for every method that changes a model in place, ours and anybody's.

``method.make(model, ...)`` returns a handle with `remove`, `merge` and, if it follows a schedule, `step`. The settings
that are checked are the defaults and the method's `preset`; ``dataclasses.replace(method, preset=...)`` checks others.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from steep.method import Method
from steep.utils.signatures import required_arguments

STEPS = 6

ARGUMENTS: dict[str, Callable[[], Any]] = {
    "total_steps": lambda: STEPS,
    "steps_per_epoch": lambda: 2,
    "num_examples": lambda: 8,
    "generator": lambda: torch.Generator().manual_seed(0),
}
"""What is given for the arguments without a default, by name."""


def models(seed: int = 0) -> list[nn.Sequential]:
    """Networks from (B, 64) to (B, 3) with four weighted layers each, two of them without biases."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [build(bias) for build in (_linear, _convolutional) for bias in (True, False)]


def _linear(bias: bool) -> nn.Sequential:
    hidden = (m for _ in range(3) for m in (nn.Linear(64, 64, bias), nn.Tanh()))
    return nn.Sequential(*hidden, nn.Linear(64, 3, bias))


def _convolutional(bias: bool) -> nn.Sequential:
    hidden = (m for _ in range(3) for m in (nn.Conv1d(64, 64, 3, padding=1, bias=bias), nn.Tanh()))
    return nn.Sequential(nn.Unflatten(1, (64, 1)), *hidden, nn.Flatten(), nn.Linear(64, 3, bias))


def apply(method: Method, model: nn.Module) -> Any:
    """The method's handle of a model."""
    _, *others = required_arguments(method.make)
    return method.make(model, **{name: ARGUMENTS[name]() for name in others}, **method.preset)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def train(
    model: nn.Module, handle: Any, optimizer: torch.optim.Optimizer, first: int, last: int, parts: int = 1
) -> None:
    """Steps `first` to `last` of least squares, on batches that depend on the step alone, in so many parts each."""
    for t in range(first, last):
        x, y = (some.chunk(parts) for some in _batch(model, t))
        optimizer.zero_grad()
        for inputs, targets in zip(x, y, strict=True):
            ((model(inputs) - targets).square().mean() / parts).backward()
        optimizer.step()
        if hasattr(handle, "step"):
            handle.step()


def _batch(model: nn.Module, step: int) -> tuple[Tensor, Tensor]:
    dtype, numbers = next(model.parameters()).dtype, torch.Generator().manual_seed(step)
    return torch.randn(8, 64, generator=numbers).to(dtype), torch.randn(8, 3, generator=numbers).to(dtype)


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model.eval()(_batch(model, 99)[0])


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states have the same names, in the same order, and are equal bit for bit."""
    return list(a) == list(b) and all(map(torch.equal, a.values(), b.values()))


def structure(model: nn.Module) -> list[Any]:
    """Types of the modules, and the names of what they own, in order."""
    return [(type(m), list(m._parameters), list(m._buffers), list(m._modules)) for m in model.modules()]


def weighted(model: nn.Module) -> list[Any]:
    """Its layers that have weights."""
    return [m for m in model.modules() if hasattr(m, "weight")]


def refused(method: Method, model: nn.Module) -> bool:
    try:
        apply(method, model)
    except ValueError:
        return True
    return False


def remove_gives_the_dense_model_back(method: Method) -> None:
    for model, plain in zip(models(), models(), strict=True):
        before, parameters = structure(model), list(model.parameters())
        apply(method, model).remove()
        assert same(model.state_dict(), plain.state_dict()), "remove() does not undo what applying did"
        optimizer = optimizer_of(model)
        handle = apply(method, model)
        train(model, handle, optimizer, 0, STEPS)
        trained = [p.detach().clone() for p in parameters]
        handle.remove()
        assert list(map(id, model.parameters())) == list(map(id, parameters)), (
            "remove() leaves other parameters than before, or in another order"
        )
        assert all(map(torch.equal, parameters, trained)), "remove() changes the weights that were trained"
        assert structure(model) == before, "remove() leaves other modules than before"
        plain.load_state_dict(model.state_dict())
        assert torch.equal(outputs(model), outputs(plain)), "after remove() the model computes something else"


def merge_leaves_plain_modules_that_compute_the_same(method: Method) -> None:
    for model in models():
        before, parameters = structure(model), list(model.parameters())
        handle = apply(method, model)
        train(model, handle, optimizer_of(model), 0, STEPS)
        expected = outputs(model)
        handle.merge()
        assert torch.equal(outputs(model), expected), "merge() changes the outputs"
        assert structure(model) == before, "merge() leaves other modules than before"
        assert list(map(id, model.parameters())) == list(map(id, parameters)), "merge() leaves other parameters"
        copied = pickle.loads(pickle.dumps(model))
        assert torch.equal(outputs(copied), expected), "a merged model computes something else once pickled"


def does_nothing_once_it_is_gone(method: Method) -> None:
    for leave in ("remove", "merge"):
        for model in models():
            handle = apply(method, model)
            train(model, handle, optimizer_of(model), 0, STEPS)
            getattr(handle, leave)()
            before = snapshot(model)
            for call in ("remove", "step", "merge"):
                getattr(handle, call, lambda: None)()
            assert same(model.state_dict(), before), f"changes the model after {leave}()"


def state_survives_saving(method: Method) -> None:
    for whole, first, second in zip(models(), models(), models(seed=1), strict=True):
        train(whole, apply(method, whole), optimizer_of(whole), 0, STEPS)
        handle, optimizer = apply(method, first), optimizer_of(first)
        train(first, handle, optimizer, 0, STEPS // 2)
        file = io.BytesIO()
        torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        handle, optimizer = apply(method, second), optimizer_of(second)
        second.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        train(second, handle, optimizer, STEPS // 2, STEPS)
        assert same(whole.state_dict(), second.state_dict()), "goes on differently after saving and loading"


def copies_are_independent(method: Method) -> None:
    for model in models():
        handle = apply(method, model)
        train(model, handle, optimizer_of(model), 0, 2)
        other, other_handle = copy.deepcopy((model, handle))
        before = snapshot(model)
        train(other, other_handle, optimizer_of(other), 2, STEPS)
        assert same(model.state_dict(), before), "training a deep copy changes the original"
        train(model, handle, optimizer_of(model), 2, STEPS)
        assert same(model.state_dict(), other.state_dict()), "a deep copy goes on differently"
        expected = outputs(model)
        other_handle.remove()
        assert torch.equal(outputs(model), expected), "removing the method from a deep copy changes the original"


def takes_optimizers_made_before_and_after(method: Method) -> None:
    for model, other in zip(models(), models(), strict=True):
        before = optimizer_of(model)
        train(model, apply(method, model), before, 0, STEPS)
        handle = apply(method, other)
        train(other, handle, optimizer_of(other), 0, STEPS)
        assert same(model.state_dict(), other.state_dict()), "an optimizer made before it trains something else"


def refuses_a_second_handle(method: Method) -> None:
    for model in models():
        handle = apply(method, model)
        before, expected, modules = snapshot(model), outputs(model), structure(model)
        assert refused(method, model), "can be applied twice to the same model"
        assert structure(model) == modules, "changes a model that it refuses"
        assert same(model.state_dict(), before), "changes a model that it refuses"
        assert torch.equal(outputs(model), expected), "changes a model that it refuses"
        handle.remove()
        apply(method, model)  # once it is removed it can be applied again


def refuses_models_without_an_eligible_layer(method: Method) -> None:
    assert refused(method, nn.Sequential(nn.Embedding(8, 8), nn.LayerNorm(8), nn.PReLU())), (
        "accepts a model that has no layer for it"
    )


def changes_all_layers_or_none(method: Method) -> None:
    for model in models():
        prune.identity(weighted(model)[2], "weight")  # torch refuses to parametrize it
        before, modules = snapshot(model), structure(model)
        if refused(method, model):
            assert structure(model) == modules, "changes some layers before it refuses another"
            assert same(model.state_dict(), before), "changes some layers before it refuses another"


def stepping_touches_neither_parameters_nor_optimizer(method: Method) -> None:
    for model in models():
        handle, optimizer = apply(method, model), optimizer_of(model)
        for t in range(STEPS if hasattr(handle, "step") else 0):
            train(model, None, optimizer, t, t + 1)
            parameters = list(model.parameters())
            before: list[Any] = copy.deepcopy([(p.detach(), p.grad) for p in parameters])
            state = copy.deepcopy(optimizer.state_dict()["state"])
            handle.step()
            assert list(map(id, model.parameters())) == list(map(id, parameters)), "step() makes other parameters"
            for p, (weight, gradient) in zip(parameters, before, strict=True):
                assert torch.equal(p, weight), "step() changes a parameter"
                found: Any = p.grad
                assert torch.equal(found, gradient), "step() changes a gradient"
            for key, slots in optimizer.state_dict()["state"].items():
                assert same(slots, state[key]), "step() changes the optimizer's state"


def frozen_weights_stay(method: Method) -> None:
    for model, other in zip(models(), models(), strict=True):
        weights = [layer.weight for layer in weighted(model)]
        before = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.requires_grad_(False)
        model.append(nn.Linear(3, 3))  # something must train
        other.append(copy.deepcopy(model[-1]))
        handle = apply(method, model)
        apply(method, other)
        assert torch.equal(outputs(model), outputs(other)), "leaves layers with frozen weights out"
        train(model, handle, optimizer_of(model), 0, STEPS)
        handle.remove()
        assert all(map(torch.equal, weights, before)), "changes frozen weights"
        assert not any(weight.requires_grad for weight in weights), "leaves frozen weights that train"


def tied_weights_stay_tied(method: Method) -> None:
    for model, untied in zip(models(), models(), strict=True):
        layers, copies = weighted(model), weighted(untied)
        with torch.no_grad():
            copies[2].weight.copy_(copies[1].weight)
        layers[2].weight = layers[1].weight
        handle, parameters = apply(method, model), list(map(id, model.parameters()))
        apply(method, untied)
        assert torch.equal(outputs(model), outputs(untied)), "a tied weight computes something else than an equal one"
        train(model, handle, optimizer_of(model), 0, STEPS)
        handle.remove()
        assert layers[2].weight is layers[1].weight, "weights that were tied are no longer"
        assert sorted(map(id, model.parameters())) == sorted(parameters), "remove() leaves other parameters"


def modes_are_the_users(method: Method) -> None:
    for model, other in zip(models(), models(), strict=True):
        apply(method, model.eval())
        assert not any(m.training for m in model), "applying it puts layers into training mode"
        apply(method, other)
        assert all(m.training for m in other), "applying it puts layers into evaluation mode"
        x, _ = _batch(model, 0)
        assert torch.equal(model(x), other(x)), "computes something else in evaluation mode"


def keeps_the_models_dtype(method: Method) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        for model, converted in zip(models(), models(), strict=True):
            first, later = apply(method, model.to(dtype)), apply(method, converted)
            for each, handle in ((model, first), (converted.to(dtype), later)):
                train(each, handle, optimizer_of(each), 0, STEPS)
                assert outputs(each).dtype == dtype, f"gives other outputs than {dtype}"
                handle.merge()
                assert all(t.dtype == dtype for t in each.state_dict().values()), f"leaves other weights than {dtype}"


def accumulated_parts_are_the_whole_batch(method: Method) -> None:
    # without biases, sums of signs are often zero up to rounding, and so are their signs in binary networks
    for whole, parts in zip(models()[::2], models()[::2], strict=True):
        for model, count in ((whole.double(), 1), (parts.double(), 4)):
            train(model, apply(method, model), torch.optim.SGD(model.parameters(), lr=0.05), 0, STEPS, count)
        assert close(whole.parameters(), parts.parameters()), "gradients of parts of a batch do not add up to its own"


def per_example_gradients_average_to_the_batchs(method: Method) -> None:
    for model in models()[::2]:
        handle = apply(method, model.double())
        train(model, handle, optimizer_of(model), 0, 1)
        (x, y), parameters = _batch(model, 1), dict(model.named_parameters())
        buffers = dict(model.named_buffers())
        gradients = torch.autograd.grad((model(x) - y).square().mean(), list(parameters.values()))
        each = torch.func.vmap(torch.func.grad(functools.partial(_loss, model, buffers)), (None, 0, 0))(
            {name: p.detach() for name, p in parameters.items()}, x, y
        )
        assert close([each[name].mean(0) for name in parameters], gradients), "torch.func sees other gradients"


def _loss(model: nn.Module, buffers: dict[str, Tensor], parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return (torch.func.functional_call(model, (parameters, buffers), (x[None],)) - y[None]).square().mean()


def compiles_to_one_graph_for_the_whole_schedule(method: Method) -> None:
    graphs = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    plain, model = models()[0].double(), models()[0].double()
    train(plain, apply(method, plain), optimizer_of(plain), 0, STEPS)
    handle, optimizer = apply(method, model), optimizer_of(model)
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    train(compiled, handle, optimizer, 0, STEPS)
    assert len(graphs) == 1, f"the model is compiled {len(graphs)} times: its schedule is in the code"
    assert close(plain.parameters(), model.parameters()), "trains differently once compiled"


def close(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(torch.allclose(p, q, rtol=1e-7, atol=1e-9) for p, q in zip(a, b, strict=True))


DEPENDING_ON_SETTINGS = (
    remove_gives_the_dense_model_back,
    merge_leaves_plain_modules_that_compute_the_same,
    state_survives_saving,
    copies_are_independent,
    per_example_gradients_average_to_the_batchs,
)
CHECKS = (
    *DEPENDING_ON_SETTINGS,
    does_nothing_once_it_is_gone,
    takes_optimizers_made_before_and_after,
    refuses_a_second_handle,
    refuses_models_without_an_eligible_layer,
    changes_all_layers_or_none,
    stepping_touches_neither_parameters_nor_optimizer,
    accumulated_parts_are_the_whole_batch,
    frozen_weights_stay,
    tied_weights_stay_tied,
    modes_are_the_users,
    keeps_the_models_dtype,
    compiles_to_one_graph_for_the_whole_schedule,
)

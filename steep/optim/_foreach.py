"""One update rule over many tensors: gathered from an optimizer, run in buckets of cache size, compiled once.

A method writes its mathematics once, for one tensor; `sweep` runs it over a parameter group in one of three ways,
which agree up to rounding:

- ``foreach=False``: tensor by tensor, the reference;
- ``foreach=True`` (and None): small tensors joined in a bucket and large ones cut into pieces, so that a rule's many
  operations find their operands in the cache and its intermediates are small. On CPU that beats ``torch._foreach_*``,
  where each operation streams all parameters through memory;
- ``compile=True``: the same buckets through kernels of ``torch.compile``, built in seconds and good for every length
  and every value of the scalars. One graph over a list of 200 tensors took three minutes to compile and ran no faster.

Measured on CPU (`benchmarks/optim.py`); on other devices buckets are larger and pieces whole, which is untested.

State is laid end to end when it is made, so that a bucket of it is a view. Parameters and gradients are not: those in
a bucket are copied in and out through scratch memory, which stays with the optimizer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors
from torch.optim import Optimizer

Row = tuple[Tensor, ...]  # a parameter, its gradient, its state; or a column of such rows
Scalars = Callable[[int], Mapping[str, Any]]
Number = float | Tensor  # a scalar of a rule: a tensor where the rule is compiled

GRAD = 1  # the place of the gradient in a row; never written
ALONE = 2**16  # elements above which a tensor is worth calls of its own
BUCKET = 2**18  # elements in a bucket, at most
MARGIN = 272  # elements by which each name's state starts further into its memory than the one before: vectors at equal
# places of their pages made a compiled step a fifth slower, and offset 0 would need kernels of its own


class RowRule(NamedTuple):
    """An update that looks at rows and whole tensors, in three stages, on stacks (k, rows, columns) of k equal shapes.

    `measure(param, grad, *state, u)` updates the state, fills u (of the parameter's shape) with what is to be taken off
    the parameter, and returns numbers per row, (k, rows, n). It and `apply` may be given some of the rows at a time.
    `decide(numbers, param, *per_tensor)` sees all rows, of `param` only for its shape, and returns (k, rows, m).
    `apply(param, u, decided)` updates the parameter.
    """

    measure: Callable[..., Tensor]
    decide: Callable[..., Tensor]
    apply: Callable[..., None]


def ema_(average: Tensor, value: Tensor, beta: float | Tensor) -> Tensor:
    """average = beta average + (1 - beta) value, in place."""
    if torch.compiler.is_compiling():  # there lerp_ would compare its weight with 1/2 at every element
        return average.add_((value - average) * (1 - beta))
    return average.lerp_(value, 1 - beta)


def descend_(param: Tensor, step_size: Any, numerator: Tensor, denominator: Tensor | None = None) -> None:
    """param = param - step_size numerator / denominator, in place."""
    if torch.compiler.is_compiling():  # there step_size is a tensor, which alpha and value must not be
        param.sub_(step_size * (numerator if denominator is None else numerator / denominator))
    elif denominator is None:
        param.sub_(numerator, alpha=step_size)
    else:
        param.addcdiv_(numerator, denominator, value=-step_size)


def sweep(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    update: Callable[..., None],
    names: Sequence[str],
    scalars: Scalars,
    params: Iterable[Tensor] | None = None,
) -> None:
    """One step of an elementwise rule: ``update(param, grad, *state, **scalars(t))``, on flat tensors, in place.

    Args:
        optimizer: owner of the state; what is missing is made, of zeros, beside the count of steps t = 1, 2, ...
        group: the parameter group; its "foreach" and "compile" say how to run.
        update: the rule; must not write to the gradient.
        names: state of the parameter's shape, in the order in which `update` takes it.
        scalars: numbers, flags and None by name, given t. When compiled, numbers arrive as 0-d float64 tensors.
        params: those of the group to step, where they have a gradient; all by default.

    Raises:
        RuntimeError: a sparse gradient, a complex parameter, or no compiler.
    """
    bind = cache(lambda t, device: _bind(update, scalars(t), group, device))
    for t, rows in _gather(optimizer, group["params"] if params is None else params, names):
        device = rows[0][0].device
        for _, flats in _buckets(optimizer, group, rows):
            for piece in _pieces(flats, 0, _piece_size(group, device)):
                bind(t, device)(*piece)


def sweep_rows(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    rule: RowRule,
    names: Sequence[str],
    scalars: Scalars,
    params: Iterable[Tensor],
    per_tensor: Sequence[str] = (),
) -> None:
    """One step of a rule in stages; arguments as for `sweep`.

    Args:
        params: of at least two dimensions; the first one counts rows.
        per_tensor: further state, 0-d, of which `decide` is given (k,).
    """
    stages = (_whole(rule, len(per_tensor)), rule.apply) if group["compile"] else rule
    bind = cache(lambda t, device: [_bind(stage, scalars(t), group, device) for stage in stages])
    for t, alike in _gather(optimizer, params, names, per_tensor, by_shape=True):
        device, rows = alike[0][0].device, alike[0][0].shape[0]
        *first, apply = bind(t, device)
        for k, flats in _buckets(optimizer, group, alike):
            flats, flags = flats[: len(names) + 2], flats[len(names) + 2 :]
            u = _scratch(optimizer).memory("u", flats[0].numel(), flats[0])
            stacks = [flat.view(k, rows, -1) for flat in (*flats, u)]
            size = max(1, _piece_size(group, device) // stacks[0].shape[2])
            if group["compile"]:
                decided = first[0](u.new_ones(k, rows, 1), *stacks, *flags)
            else:
                numbers = [first[0](*piece) for piece in _pieces(stacks, 1, size)]
                decided = first[1](torch.cat(numbers, 1), stacks[0], *flags)
            for piece in _pieces([stacks[0], stacks[-1], decided], 1, size):
                apply(*piece)


@cache
def _whole(rule: RowRule, flags: int) -> Callable[..., Tensor]:
    """`measure` and `decide` as one function, to be compiled."""

    def measure_and_decide(ones: Tensor, param: Tensor, grad: Tensor, *rest: Tensor, **scalars: Any) -> Tensor:
        # an operand that depends on the row keeps the compiler from a second pass over the elements for the state
        numbers = rule.measure(param, grad * ones, *rest[: len(rest) - flags], **scalars)
        return rule.decide(numbers, param, *rest[len(rest) - flags :], **scalars)

    return measure_and_decide


def _pieces(tensors: list[Tensor], dim: int, size: int) -> Iterable[Sequence[Tensor]]:
    # most tensors are one piece: not split, because that would cost as much as a small operation
    return [tensors] if tensors[0].shape[dim] <= size else zip(*(t.split(size, dim) for t in tensors), strict=True)


def _piece_size(group: Mapping[str, Any], device: torch.device) -> int:
    """Elements per call. Eager on CPU: few enough for the threads' caches, yet worth a call per operation."""
    whole = group["compile"] or group["foreach"] is False or device.type != "cpu"
    return sys.maxsize if whole else 2**17 * torch.get_num_threads()


def _gather(
    optimizer: Optimizer,
    params: Iterable[Tensor],
    names: Sequence[str],
    per_tensor: Sequence[str] = (),
    by_shape: bool = False,
) -> list[tuple[int, list[Row]]]:
    """Count a step of every parameter that has a gradient; (t, rows) for those that can share a call."""
    # an empty parameter has nothing to step
    members = [(p, g, optimizer.state[p]) for p in params if (g := p.grad) is not None and g.numel() > 0]
    kinds = [(type(p), g.layout, p.dtype, p.device, p.shape if by_shape else None) for p, g, _ in members]
    fresh: dict[Any, list[tuple[Tensor, dict[str, Tensor]]]] = {}
    for kind, (p, _, s) in zip(kinds, members, strict=True):  # all of them before any state is made or changed
        check_kind(optimizer, *kind[:3])
        if not s:
            fresh.setdefault(kind, []).append((p, s))
    for alike in fresh.values():
        _make_state(alike, names, per_tensor)
    calls: dict[Any, list[Row]] = {}
    for t, kind, (p, g, s) in zip(_count([s["step"] for _, _, s in members]), kinds, members, strict=True):
        calls.setdefault((t, kind), []).append((p, g, *[s[name] for name in (*names, *per_tensor)]))
    return [(int(t), rows) for (t, _), rows in calls.items()]


def _count(steps: list[Tensor]) -> list[float]:
    if steps:
        torch._foreach_add_(steps, torch.ones((), device="cpu"), alpha=1.0)  # a tensor: far faster than a number
    return torch.stack(steps).tolist() if steps else []


def check_kind(optimizer: Optimizer, param: type, layout: torch.layout, dtype: torch.dtype) -> None:
    """Raise `RuntimeError` for a sharded or complex parameter and for a sparse gradient, with the way out."""
    if layout is torch.strided and not dtype.is_complex and not hasattr(param, "to_local"):
        return
    owner = type(optimizer).__name__
    if hasattr(param, "to_local"):
        raise RuntimeError(
            f"{owner} cannot step sharded parameters ({param.__name__}): use DDP, which keeps them whole, or "
            "steep.adapters.distributed.sharded for an elementwise rule"
        )
    if layout is not torch.strided:
        raise RuntimeError(f"{owner} needs dense gradients, got {layout}: use sparse=False, or torch.optim.SparseAdam")
    if dtype.is_complex:
        raise RuntimeError(f"{owner} needs real parameters, got {dtype}: optimize torch.view_as_real(parameter)")


def _make_state(fresh: list[tuple[Tensor, dict[str, Tensor]]], names: Sequence[str], per_tensor: Sequence[str]) -> None:
    """Zeros for parameters that have no state yet: one buffer per name, the parameters' parts end to end."""
    for _, s in fresh:  # counted on the CPU, as in torch, so that reading the count does not wait for a device
        s["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
    params = [p for p, _ in fresh]
    scalars = [p.new_empty(()) for p in params]
    for i, (name, like) in enumerate((*((n, params) for n in names), *((n, scalars) for n in per_tensor))):
        margin = (i + 1) * MARGIN
        flat = params[0].new_zeros(margin + sum(t.numel() for t in like), dtype=working_dtype(params[0].dtype))[margin:]
        for (_, s), part in zip(fresh, _unflatten_dense_tensors(flat, like), strict=True):
            s[name] = part


def _buckets(optimizer: Optimizer, group: Mapping[str, Any], rows: list[Row]) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield the number of rows in a bucket and its columns as one vector each; changes of these go to the rows."""
    dtype = working_dtype(rows[0][0].dtype)
    size = 0 if group["foreach"] is False else min(BUCKET, _piece_size(group, rows[0][0].device))
    for i, bucket in enumerate(_join(rows, size)):
        flats: list[Tensor] = []
        copied: list[tuple[Row, Row]] = []
        for c, tensors in enumerate(zip(*bucket, strict=True)):
            flat = _end_to_end(tensors, dtype)
            if flat is None:
                scratch = (
                    _scratch(optimizer) if len(bucket) > 1 else Scratch()
                )  # the copy of a large tensor is not kept
                flat, parts = scratch.copy(tensors, dtype, c, (id(group), i, rows[0][0].shape))
                copied += [(tensors, parts)] if c != GRAD else []
            flats.append(flat)
        yield len(bucket), flats
        for tensors, parts in copied:
            torch._foreach_copy_(tensors, parts)


def _join(rows: list[Row], size: int) -> Iterator[list[Row]]:
    """Rows in buckets of up to `size` elements; a large tensor stays alone, so as not to be copied."""
    bucket: list[Row] = []
    left = size
    for row in rows:
        n = row[0].numel()
        if n > min(ALONE, size):
            yield [row]
            continue
        if n > left:
            yield bucket
            bucket, left = [], size
        bucket.append(row)
        left -= n
    if bucket:
        yield bucket


def _end_to_end(tensors: Row, dtype: torch.dtype) -> Tensor | None:
    """The tensors as one vector that shares their memory, if they lie there one after the other."""
    if len(tensors) == 1:
        return tensors[0].view(-1) if tensors[0].dtype == dtype and tensors[0].is_contiguous() else None
    start = end = tensors[0].data_ptr()
    for t in tensors:
        if t.data_ptr() != end or t.dtype != dtype or not t.is_contiguous():
            return None
        end += t.nbytes
    storage = tensors[0].untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():  # neighbours by chance
        return None
    return tensors[0].as_strided(((end - start) // dtype.itemsize,), (1,))


class Scratch:
    """The memory an optimizer works in. A cache: neither in `state_dict` nor in copies of the optimizer."""

    def __init__(self) -> None:
        self.held: dict[Any, Tensor] = {}
        self.parts: dict[Any, tuple[tuple[torch.Size, ...], Tensor, Row]] = {}

    def memory(self, use: Any, size: int, like: Tensor) -> Tensor:
        """A vector for `use`, of what was left there; of the device and dtype of `like`."""
        key = (use, like.device, like.dtype)
        if key not in self.held or self.held[key].numel() < size:
            self.held[key] = like.new_empty(size)
        return self.held[key][:size]

    def copy(self, tensors: Row, dtype: torch.dtype, use: Any, place: Any) -> tuple[Tensor, Row]:
        """The tensors copied into one vector, and its parts in their shapes; all places share the memory for `use`."""
        key = (use, tensors[0].device, dtype, place)
        shapes = tuple([t.shape for t in tensors])
        if key not in self.parts or self.parts[key][0] != shapes:
            flat = self.memory(use, sum(t.numel() for t in tensors), tensors[0].new_empty((), dtype=dtype))
            self.parts[key] = shapes, flat, tuple(_unflatten_dense_tensors(flat, list(tensors)))
        _, flat, parts = self.parts[key]
        torch._foreach_copy_(parts, tensors)
        return flat, parts


def _scratch(optimizer: Optimizer) -> Scratch:
    return vars(optimizer).setdefault("_scratch", Scratch())


def _bind(function: Callable[..., Any], scalars: Mapping[str, Any], group: Any, device: torch.device) -> Any:
    """`function` with its scalars, compiled if the group says so; numbers are then data, so that they may change."""
    if not group["compile"]:
        return partial(function, **scalars)
    numbers = {k: v for k, v in scalars.items() if v is not None and not isinstance(v, bool)}
    flags = tuple((k, v) for k, v in scalars.items() if k not in numbers)
    values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    torch._dynamo.mark_static(values)
    return partial(_run_compiled, _kernels(function, tuple(numbers), flags), values)


def _run_compiled(kernels: Callable[[Any], Any], numbers: Tensor, param: Tensor, *tensors: Tensor) -> Any:
    # .data: views of parameters of other dimensions would need kernels of their own, their data do not; the price is
    # to tell autograd of the change
    data = [t.data for t in (param, *tensors)]
    sizes = [n for t in data for n in t.shape]
    kernel = kernels((param.dtype, *[(n == 1, sizes.index(n)) for n in sizes]))  # 1 and equal sizes compile apart
    try:
        result = kernel(numbers, *data)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise RuntimeError(
            f"compile=True failed ({str(error).splitlines()[0]}): it needs a compiler (on CPU one of C++, such as g++; "
            "on GPU Triton); install one, or pass compile=False"
        ) from error
    torch.autograd.graph.increment_version(param)
    return result


@cache
def _kernels(function: Callable[..., Any], names: tuple[str, ...], flags: Any) -> Callable[[Any], Any]:
    """A kernel of `function` for each kind of tensors."""

    def call(numbers: Tensor, *tensors: Tensor) -> Any:
        return function(*tensors, **dict(zip(names, numbers.unbind(), strict=True)), **dict(flags))

    # torch keeps a limited number of variants per code object, so every kind gets a code object of its own
    def kernel(kind: Any) -> Any:
        own = FunctionType(call.__code__.replace(), globals(), "kernel", None, call.__closure__)
        return torch.compile(own, fullgraph=True, dynamic=True)

    return cache(kernel)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state and arithmetic: float32 for half precision, where eps and small moments would vanish."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype

"""One update rule over many tensors: gathered from an optimizer, run in buckets of cache size, compiled once.

A method writes its mathematics once, as ``update(param, grad, *state, **scalars)``: in place, never writing to `grad`,
for one flat tensor (elementwise rules) or for a stack (k, rows, columns) of k equal shapes (rules that look at rows).
`gather` collects its arguments and `sweep` runs it in one of three ways that agree up to rounding:

- ``foreach=False``: tensor by tensor, the reference;
- ``foreach=True`` (and None): small tensors joined in a bucket and large ones cut into pieces, so that the operations
  of one rule find their operands in the cache. On CPU this beats ``torch._foreach_*`` on large tensors, where every
  operation streams all parameters through memory;
- ``compile=True``: the same buckets through one kernel of ``torch.compile``, built in seconds for every length and
  every learning rate. A graph over a list of 200 tensors took three minutes to compile and ran no faster.

State is laid end to end when it is made, so that a bucket of it is a view; where it no longer is (after a change of
the parameters that have gradients, say), it is copied in and out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim import Optimizer

Row = tuple[Tensor, ...]  # a parameter, its gradient, its state
Update = Callable[..., None]
Ranges = Mapping[str, "str | tuple[str, ...]"]

GRAD = 1  # the column of a row that is never written
ALONE = 2**16  # elements from which on a tensor is worth calls of its own


def check_ranges(group: Mapping[str, Any], ranges: Ranges) -> None:
    """Raise `ValueError` for the first hyper-parameter of `group` outside its interval, e.g. ``{"lr": "[0, inf)"}``."""
    for name, allowed in ranges.items():
        if isinstance(allowed, str):
            _check(name, group[name], allowed)
            continue
        if not isinstance(group[name], Sequence) or len(group[name]) != len(allowed):
            raise ValueError(f"{name}={group[name]!r} must be {len(allowed)} numbers")
        for i, (value, interval) in enumerate(zip(group[name], allowed, strict=True)):
            _check(f"{name}[{i}]", value, interval)


def _check(name: str, value: Any, allowed: str) -> None:
    low, high = map(float, allowed[1:-1].split(","))
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}={value!r} must be a number in {allowed}") from None
    above = number >= low if allowed[0] == "[" else number > low
    below = number <= high if allowed[-1] == "]" else number < high
    if not (above and below):
        raise ValueError(f"{name}={value!r} must lie in {allowed}")


def working_dtype(param: Tensor) -> torch.dtype:
    """The dtype of state and arithmetic: float32 for half precision, where eps and small moments underflow."""
    return torch.float32 if param.dtype in (torch.float16, torch.bfloat16) else param.dtype


def load_exactly(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """`Optimizer.load_state_dict`, without its cast of the state of half-precision parameters to half precision."""
    seen: list[Mapping[str, Any]] = []
    hook = optimizer.register_load_state_dict_pre_hook(lambda _, final: seen.append(final))
    try:
        Optimizer.load_state_dict(optimizer, dict(state_dict))
    finally:
        hook.remove()
    ids, params = (chain.from_iterable(g["params"] for g in gs) for gs in (seen[0]["param_groups"], optimizer.param_groups))
    for i, p in zip(ids, params, strict=True):
        for name, value in seen[0]["state"].get(i, {}).items():
            if name != "step" and working_dtype(p) != p.dtype:
                optimizer.state[p][name] = value.to(p.device, working_dtype(p))


def gather(
    optimizer: Optimizer,
    params: Iterable[Tensor],
    names: Sequence[str],
    *,
    per_tensor: Sequence[str] = (),
    stacked: bool = False,
) -> Iterator[tuple[int, list[Row]]]:
    """Count one step of every parameter that has a gradient; yield (step, rows) for those that can share a call.

    Args:
        optimizer: owner of the state; state that is missing is made, of zeros.
        params: parameters of one group.
        names: state of the parameter's shape, in the order in which the update takes it.
        per_tensor: further state, 0-d.
        stacked: share calls among equal shapes only.

    Raises:
        RuntimeError: a sparse gradient or a complex parameter.
    """
    state = optimizer.state
    kinds: dict[Any, list[tuple[Tensor, Tensor, dict[str, Tensor]]]] = {}
    for p in params:
        if (g := p.grad) is not None:
            kind = (p.device, p.dtype, g.layout, p.shape if stacked else None)
            kinds.setdefault(kind, []).append((p, g, state[p]))
    for _, dtype, layout, _ in kinds:
        _check_kind(type(optimizer).__name__, dtype, layout)
    for members in kinds.values():
        fresh = [(p, s) for p, _, s in members if not s]
        if fresh:
            _make_state(fresh, names, per_tensor)
        steps = [s["step"] for _, _, s in members]
        torch._foreach_add_(steps, torch.tensor(1.0), alpha=1.0)
        shared: dict[float, list[Row]] = {}
        for t, (p, g, s) in zip(torch.stack(steps).tolist(), members, strict=True):
            shared.setdefault(t, []).append((p, g, *[s[name] for name in (*names, *per_tensor)]))
        yield from ((int(t), rows) for t, rows in shared.items())


def _check_kind(owner: str, dtype: torch.dtype, layout: torch.layout) -> None:
    if layout is not torch.strided:
        raise RuntimeError(f"{owner} needs dense gradients, got {layout}: use sparse=False, or torch.optim.SparseAdam")
    if dtype.is_complex:
        raise RuntimeError(f"{owner} needs real parameters, got {dtype}: optimize torch.view_as_real(parameter)")


def _make_state(fresh: list[tuple[Tensor, dict[str, Tensor]]], names: Sequence[str], per_tensor: Sequence[str]) -> None:
    params = [p for p, _ in fresh]
    scalars = [p.new_empty(()) for p in params]
    for _, s in fresh:
        s["step"] = torch.zeros(())
    for name, like in (*((n, params) for n in names), *((n, scalars) for n in per_tensor)):
        flat = params[0].new_zeros(sum(t.numel() for t in like), dtype=working_dtype(params[0]))
        for (_, s), piece in zip(fresh, _unflatten_dense_tensors(flat, like), strict=True):
            s[name] = piece


def sweep(
    update: Update,
    rows: list[Row],
    *,
    foreach: bool | None,
    compile: bool,
    stacked: bool = False,
    **scalars: float | bool | None,
) -> None:
    """Run `update` over rows of one device and dtype (and one shape, if `stacked`).

    Args:
        update: called with one tensor per column of `rows` and with `scalars`.
        rows: what `gather` yields.
        foreach: share calls among tensors; None is True.
        compile: compile `update`; its numbers then arrive as 0-d float64 tensors, its flags and None as they are.
        stacked: give tensors as (k, rows, columns), with (k,) for 0-d state, instead of flat.
        scalars: the update's hyper-parameters.
    """
    param = rows[0][0]
    size = _bucket_size(param.device, compile) if foreach is not False else 0
    run = _compiled(update, scalars, param.device) if compile else partial(update, **scalars)
    for bucket in _buckets(rows, size):
        columns = tuple(zip(*bucket, strict=True))
        flats = [_flat(column, working_dtype(param)) for column in columns]
        if stacked:
            run(*[_as_stack(flat, column) for flat, column in zip(flats, columns, strict=True)])
        elif compile or not size:
            run(*flats)
        else:
            for piece in zip(*(flat.split(size) for flat in flats), strict=True):
                run(*piece)
        for i, (flat, column) in enumerate(zip(flats, columns, strict=True)):
            if i != GRAD and flat.data_ptr() != column[0].data_ptr():
                torch._foreach_copy_(column, _unflatten_dense_tensors(flat, column))


def _bucket_size(device: torch.device, compile: bool) -> int:
    """Elements in a bucket. Eager on CPU: a column fits the cache of each thread, yet is worth a call per operation."""
    return 2**17 * torch.get_num_threads() if device.type == "cpu" and not compile else 2**20


def _buckets(rows: list[Row], size: int) -> Iterator[list[Row]]:
    """Rows joined up to `size` elements; a tensor large enough to be worth a call stays alone, so as not to be copied."""
    bucket: list[Row] = []
    room = 0
    for row in rows:
        n = row[0].numel()
        if n > min(ALONE, size):
            yield [row]
            continue
        if n > room and bucket:
            yield bucket
            bucket, room = [], size
        bucket.append(row)
        room = (room or size) - n
    if bucket:
        yield bucket


def _flat(column: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The tensors as one vector: a view where they lie end to end in memory, else a copy."""
    first = column[0]
    start = end = first.data_ptr()
    for t in column:
        if t.data_ptr() != end or t.dtype != dtype or not t.is_contiguous():
            return _flatten_dense_tensors(column).to(dtype)
        end += t.nbytes
    storage = first.untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():  # neighbours by chance, of different storages
        return _flatten_dense_tensors(column)
    return first.as_strided(((end - start) // first.itemsize,), (1,))


def _as_stack(flat: Tensor, column: Sequence[Tensor]) -> Tensor:
    shape = column[0].shape
    return flat.view(len(column), shape[0], shape[1:].numel()) if len(shape) > 1 else flat.view(len(column), *shape)


def _compiled(update: Update, scalars: Mapping[str, Any], device: torch.device) -> Update:
    """`update` with its scalars bound, compiled; numbers are passed as data, so that they may change freely."""
    numbers = {k: v for k, v in scalars.items() if v is not None and not isinstance(v, bool)}
    flags = tuple((k, v) for k, v in scalars.items() if k not in numbers)
    return partial(_kernel(update, tuple(numbers), flags), torch.tensor(list(numbers.values()), dtype=torch.float64, device=device))


@cache
def _kernel(update: Update, names: tuple[str, ...], flags: tuple[tuple[str, Any], ...]) -> Update:
    def call(numbers: Tensor, *tensors: Tensor) -> None:
        update(*tensors, **dict(zip(names, numbers.unbind(), strict=True)), **dict(flags))

    # torch keeps a limited number of variants of one code object: every set of flags gets a code object of its own
    own = FunctionType(call.__code__.replace(), globals(), update.__name__, None, call.__closure__)
    kernel = torch.compile(own, fullgraph=True, dynamic=True)

    def guarded(*tensors: Tensor) -> None:
        try:
            kernel(*tensors)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise RuntimeError(
                "compile=True needs a working compiler (a C++ compiler such as g++ on CPU, Triton on GPU): "
                "install one, or pass compile=False"
            ) from error

    return guarded

"""How operators treat a window axis (see :mod:`dissect.windows`): what maps entries, what moves them, what reduces them.

An operator that is not here sees the newest entry of a window alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dissect import ledger
from dissect.context import Context, Refused, Value
from dissect.converters import pointwise
from dissect.ledger import Axes, Axis
from dissect.meeting import side_by_side
from dissect.registry import find, windowed
from dissect.tokens import attended, ended
from dissect.windows import count, kept, known, located, masked, meet, share, windows

aten = torch.ops.aten
Convert = Callable[..., Any]

BLOCKED = -1e4  # what is added to a score that must not count, or less


@windowed(*pointwise.KEEPS_ZERO, *pointwise.OTHER, aten.prelu.default, aten.copy.default, broadcast=True)
def elementwise(ctx: Context, convert: Convert, *args: Any, target: Any = None, **kwargs: Any) -> Value:
    """Entry by entry; an operand over time becomes a window where it meets one."""
    target = target or ctx.node.target
    given = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Value)]
    met = meet(ctx, given, "values for each weight")
    moving = [value for value in met if not value.constant]
    out = ledger.broadcast([value.axes for value in moving])
    like = next((value for value in moving if value.time is not None), moving[0])
    whole: frozenset[int] = frozenset()
    for at, value in enumerate(met):
        if value.constant and windows(out) and len(value.shape) <= len(out):
            table = of_time(value, out)
            if table is not None and blocks_the_future(blocking(target, args, value, table)):
                whole |= {held.row for held in held_by(like)}
            met[at] = (
                slanted(ctx, value, out) if table is not None and by_distance(table) else located(ctx, value, out, like)
            )
    ready = iter(met)
    args = tuple(next(ready) if isinstance(arg, Value) else arg for arg in args)
    kwargs = {key: next(ready) if isinstance(arg, Value) else arg for key, arg in kwargs.items()}
    result: Value = convert(ctx, *args, **kwargs)
    zeros = [bool(held_by(value)) and all(held.zero for held in held_by(value)) for value in moving]
    first = isinstance(args[0], Value) and not args[0].constant and zeros[0]
    zero = first and (target in pointwise.KEEPS_ZERO or target in (aten.div.Tensor, aten.div.Scalar, aten.mul.Scalar))
    zero = any(zeros) and not result.clock.wild if target is aten.mul.Tensor else zero
    timing = result.clock.but(newest=result.clock.newest - whole) if result.time is not None else result.clock
    weights = all(held.weights for value in moving for held in held_by(value))
    return replace(result, axes=known(result.axes, zero=zero, weights=weights), timing=timing)


def held_by(value: Value) -> list[Any]:
    return [factor.window for factor in windows(value.axes)]


def of_time(value: Value, out: Axes) -> Tensor | None:
    """A constant as a matrix, frames by keys, if it is one: the same for whatever else it may have dimensions for."""
    assert value.tensor is not None
    pad = len(out) - value.tensor.dim()
    time, key = out.time, out.window
    if time is None or key is None or min(time, key) < pad or not out[time].is_time or out[key].kinds != "K":
        return None
    table = value.tensor.movedim((time - pad, key - pad), (-2, -1))
    table = table.reshape(-1, *table.shape[-2:])
    if 1 in table.shape[1:] or not torch.equal(table, table[:1].expand_as(table)):
        return None
    return table[0]


def by_distance(table: Tensor) -> bool:
    """Of the past, the matrix knows nothing but how long ago."""
    past = torch.ones(table.shape, dtype=torch.bool).tril()
    table = torch.where(past, table, torch.zeros_like(table))
    return torch.equal(table[1:, 1:], table[:-1, :-1])


def slanted(ctx: Context, value: Value, out: Axes) -> Value:
    """The newest frame's row of such a matrix."""
    assert out.time is not None
    assert value.tensor is not None
    dim = out.time - (len(out) - value.tensor.dim())
    last = value.shape[dim] - 1
    tensor = value.tensor.narrow(dim, last, 1)
    return Value(
        ctx.graph.call_function(torch.narrow, (value.node, dim, last, 1)),
        ledger.plain(tensor.shape),
        None,
        value.dtype,
        tensor,
    )


def blocks_the_future(hidden: Tensor) -> bool:
    """No frame sees a key that comes after it: a window of the past is all that there is."""
    return bool(hidden[torch.ones(hidden.shape, dtype=torch.bool).triu(1)].all())


def blocking(target: Any, args: Sequence[Any], value: Value, table: Tensor) -> Tensor:
    """Which scores a matrix of the clip sets out of reach."""
    none = torch.zeros_like(table, dtype=torch.bool)
    if target is aten.add.Tensor:
        return table <= BLOCKED
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.ScalarOther, aten.where.self):
        fill = args[2].tensor if isinstance(args[2], Value) else torch.tensor(args[2])
        hidden = ~table.bool() if target in (aten.where.ScalarOther, aten.where.self) else table.bool()
        first = 0 if target in (aten.where.ScalarOther, aten.where.self) else 1
        return hidden if fill is not None and args[first] is value and bool((fill <= BLOCKED).all()) else none
    return none


@windowed(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten._reshape_copy.default,
    aten.view_copy.default,
    aten.permute.default,
    aten.permute_copy.default,
    aten.transpose.int,
    aten.transpose_copy.int,
    aten.movedim.int,
    aten.swapaxes.default,
    aten.t.default,
    aten.numpy_T.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze_copy.dim,
    aten.squeeze_copy.default,
    aten.unsqueeze.default,
    aten.unsqueeze_copy.default,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.detach_.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.to.dtype_layout,
    aten.to.device,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    torch.ops.dissect.dropout.default,
    aten.layer_norm.default,
)
def same_entries(ctx: Context, convert: Convert, *args: Any, **kwargs: Any) -> Any:
    """What moves or renames dimensions does so with a window too."""
    return convert(ctx, *args, **kwargs)


@windowed(aten.expand.default, aten.expand_copy.default)
def expand(ctx: Context, convert: Convert, x: Value, size: Sequence[int], implicit: bool = False) -> Value:
    """A broadcast over plain dimensions."""
    shape = ctx.out_shape
    narrow = Axes((*[Axis()] * (len(shape) - len(x.axes)), *x.axes.dims))
    axes = Axes(
        tuple(
            axis if axis.size == length else ledger.plain_axis(length)
            for axis, length in zip(narrow.dims, shape, strict=True)
        )
    )
    y = ctx.reframe(x, narrow)
    sizes = [axis.space for axis in axes.dims if not axis.dropped]
    return ctx.call(torch.Tensor.expand, (y, (-1, *sizes)), axes, x.clock, x.dtype)


@windowed(aten.cat.default, aten.stack.default, broadcast=True)
def beside(ctx: Context, convert: Convert, values: Sequence[Value], dim: int = 0) -> Value:
    """Side by side along another dimension."""
    values = [value for value in values if value.shape != (0,)]
    cat = ctx.node.target is aten.cat.default
    dim %= len(values[0].shape) + (not cat)
    along = [value for value in values if cat and not value.constant and "K" in value.axes[dim].kinds]
    if along:
        size = along[0].shape[dim]
        many = sum(not value.constant for value in values) > 1
        if not (many or attended(ctx.node, dim, size) or ended(ctx.node, dim, size)):
            raise Refused("a concatenation along a window of positions", clipwise=True)
        values = [side_by_side(ctx, value, dim) for value in values]
    result: Value = convert(ctx, meet(ctx, values, "values beside a window"), dim)
    return replace(result, axes=known(result.axes))


@windowed(aten.linear.default)
def linear(ctx: Context, convert: Convert, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """Over features, entry by entry."""
    if "K" in x.axes[len(x.axes) - 1].kinds:
        raise Refused("a linear layer over a window of positions", clipwise=True)
    result: Value = convert(ctx, x, weight, bias)
    return replace(result, axes=known(result.axes, zero=bias is None and all(held.zero for held in held_by(x))))


@windowed(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def points(ctx: Context, convert: Convert, x: Value, weight: Value, *args: Any) -> Value:
    """A convolution of points, entry by entry."""
    if any(size > 1 for size in weight.shape[2:]) or x.shape[2:] != ctx.out_shape[2:]:
        raise Refused("a convolution over a window of positions", clipwise=True)
    result: Value = convert(ctx, x, weight, *args)
    return replace(result, axes=known(result.axes))


_REDUCED = {
    aten.mean.dim: 0.0,
    aten.sum.dim_IntList: 0.0,
    aten.amax.default: float("-inf"),
    aten.max.dim: float("-inf"),
    aten.amin.default: float("inf"),
    aten.min.dim: float("inf"),
}


@windowed(*_REDUCED)
def reduce(
    ctx: Context, convert: Convert, x: Value, dims: Any = None, *args: Any, target: Any = None, **kwargs: Any
) -> Any:
    """A reduction of the window leaves out the entries that are no positions."""
    rank = len(x.axes)
    over = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    chosen = [dim % rank for dim in over if "K" in x.axes[dim % rank].kinds]
    given = () if dims is None else (dims,)
    target = target or ctx.node.target
    fill = _REDUCED[target]
    for dim in chosen:
        if fill or not all(held.zero for held in held_by(replace(x, axes=Axes((x.axes[dim],))))):
            x = masked(ctx, x, fill, dim)
    result = convert(ctx, x, *given, *args, **kwargs)
    if target is aten.mean.dim:
        for dim in chosen:
            _, size, _ = kept(x.axes, dim)
            part = ctx.graph.call_function(share, (count(ctx, windows(Axes((x.axes[dim],)))[0]), size, result.node))
            result = ctx.call(torch.mul, (result, part), result.axes, result.clock, result.dtype)
    return result


@windowed(
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
)
def pooled(ctx: Context, convert: Convert, x: Value, sizes: Sequence[int]) -> Any:
    """A global pool is a mean of the window."""
    dims = list(range(len(x.axes) - len(sizes), len(x.axes)))
    if {*sizes} == {1}:
        return reduce(ctx, find(aten.mean.dim) or convert, x, dims, True, target=aten.mean.dim)
    if any("K" in x.axes[dim].kinds for dim in dims):
        raise Refused("a pool over a window of positions", clipwise=True)
    return convert(ctx, x, sizes)


@windowed(aten.linalg_vector_norm.default)
def norm(
    ctx: Context, convert: Convert, x: Value, order: Any = 2, dims: Any = None, *args: Any, **kwargs: Any
) -> Value:
    """A norm over other dimensions, entry by entry."""
    over = range(len(x.axes)) if dims is None else [dims] if isinstance(dims, int) else dims
    if any("K" in x.axes[dim].kinds for dim in over):
        raise Refused("a norm over a window of positions", clipwise=True)
    result: Value = convert(ctx, x, order, dims, *args, **kwargs)
    return replace(result, axes=known(result.axes, zero=all(held.zero for held in held_by(x))))

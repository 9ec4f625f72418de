"""Entries of a frame picked, or written, by what the clip shows: gathers, scatters, tables, buckets, diagonals.

The operands' dimensions must be each other's; the dimension that is picked from lies inside the frame, or is a window of
the clip's positions. Written over time, an index would name frames that a stream has forgotten, or has not seen yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dissect.context import Context, Refused, Value
from dissect.converters.sorting import inside
from dissect.ledger import Axes, plain_axis
from dissect.meeting import side_by_side
from dissect.registry import converter
from dissect.timing import Timing

aten = torch.ops.aten


def matched(ctx: Context, values: Sequence[Value], dim: int) -> tuple[list[Value], int, Timing]:
    """Operands that agree in batch and time, as frame tensors; where ``dim`` stands in them; their timing."""
    values, timing = ctx.align(values)
    like = next(value for value in values if not value.constant)
    dim %= len(like.axes)
    for value in values:
        at = inside(ctx, replace(value, axes=like.axes) if value.constant else value, dim, "a choice of entries")
        axes = like.axes if value.constant else value.axes
        if len(value.shape) != len(like.shape) or any(
            axis.size != value.shape[at] or (not value.constant and axes[at] != axis)
            for at, axis in enumerate(like.axes.dims)
            if not axis.plain or not (value.constant or axes[at].plain)
        ):
            raise Refused("entries picked or written for some frames or rows only", "give an index for every frame")
    return [wide(ctx, value, like) if value.constant else value for value in values], at, timing


def wide(ctx: Context, value: Value, like: Value) -> Value:
    """A constant as frame tensors, a row for each of ``like``."""
    dims = (plain_axis(size) if axis.plain else axis for axis, size in zip(like.axes.dims, value.shape, strict=True))
    axes = Axes(tuple(dims))
    node = ctx.graph.call_function(repeated, (ctx.conform(value, axes).node, like.node, axes.frame))
    return Value(node, axes, like.timing, value.dtype)


def repeated(x: Tensor, like: Tensor, frame: Sequence[int]) -> Tensor:
    """The same frame for each row of ``like``."""
    return x.reshape(1, *frame).expand(like.shape[0], *frame)


def entries(ctx: Context, x: Value, first: int, given: Sequence[tuple[int, Tensor]]) -> Value:
    """Entries of several neighbouring dimensions of a frame, or in a shape of the index's own: a matrix's upper half."""
    parts: list[Tensor] = []
    for dim, tensor in given:
        if dim != first + len(parts):
            raise Refused("an index of dimensions that are no neighbours", "permute them next to each other first")
        parts += tensor.nonzero().unbind(1) if tensor.dtype == torch.bool else [tensor]
    dims = range(first, first + len(parts))
    if not all(x.axes[dim].plain for dim in dims):
        raise Refused(
            "an index of several dimensions one of which is time or the batch", "choose frames by an index of their own"
        )
    flat = torch.zeros((), dtype=torch.long)
    for dim, part in zip(dims, parts, strict=True):
        flat = flat * x.shape[dim] + part % x.shape[dim]
    before, behind = x.axes.dims[:first], x.axes.dims[dims.stop :]
    size = prod(x.shape[dim] for dim in dims)
    x = ctx.reframe(ctx.sure(x), Axes((*before, plain_axis(size), *behind)))
    at = x.axes.kept(first)
    assert at is not None
    chosen = ctx.constant(flat.flatten(), "index")
    axes = x.axes.replace(first, plain_axis(flat.numel()))
    y = ctx.call(torch.index_select, (x, at + 1, chosen), axes, x.clock, x.dtype)
    return ctx.reframe(y, Axes((*before, *map(plain_axis, flat.shape), *behind)))


@converter(aten.gather.default)
def gather(ctx: Context, x: Value, dim: int, index: Value, *, sparse_grad: bool = False) -> Value:
    """Over time, from the window of all positions."""
    dim %= len(index.axes)
    if not x.constant and "N" not in x.axes[dim].kinds:
        x = side_by_side(ctx, ctx.sure(x), dim)
    (x, index), at, timing = matched(ctx, [x, index], dim)
    return ctx.call(torch.gather, (x, at, index), index.axes, timing.plain(), x.dtype)


@converter(aten.scatter.src, aten.scatter_add.default, aten.scatter_reduce.two)
def scatter(ctx: Context, x: Value, dim: int, index: Value, source: Value, *args: Any, **kwargs: Any) -> Value:
    (x, index, source), at, timing = matched(ctx, [x, index, source], dim)
    return ctx.call(ctx.node.target, (x, at, index, source, *args), x.axes, timing.plain(), x.dtype, **kwargs)  # type: ignore[arg-type]


@converter(aten.scatter.value)
def scatter_number(ctx: Context, x: Value, dim: int, index: Value, number: float) -> Value:
    (x, index), at, timing = matched(ctx, [x, index], dim)
    return ctx.call(torch.scatter, (x, at, index, number), x.axes, timing.plain(), x.dtype)


@converter(aten.embedding.default)
def embedding(ctx: Context, table: Value, index: Value, *_: Any) -> Value:
    """A row of a table for every index."""
    if not table.constant or index.constant:
        raise Refused("a table that the clip gives", "gather from it along a dimension inside the frame")
    index = ctx.settled(index)
    axes = Axes((*index.axes.dims, plain_axis(table.shape[1])))
    return ctx.call(F.embedding, (index, table), axes, index.clock.plain(), table.dtype)


@converter(aten.bucketize.Tensor)
def bucketize(ctx: Context, x: Value, limits: Value, *, out_int32: bool = False, right: bool = False) -> Value:
    """How many limits lie below each value (``right``: or at it)."""
    if not limits.constant or len(limits.shape) != 1:
        raise Refused("buckets whose limits the clip gives", "compare with each limit by itself")
    x = ctx.settled(x)
    dtype = torch.int32 if out_int32 else torch.int64
    return ctx.call(counted, (x, limits, right, dtype), x.axes, x.clock.plain().but(nonneg=True), dtype)


@converter(aten.searchsorted.Tensor)
def searchsorted(
    ctx: Context,
    limits: Value,
    x: Value,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Value | None = None,
) -> Value:
    if sorter is not None:
        raise Refused("limits in an order of their own", "sort them first")
    return bucketize(ctx, x, limits, out_int32=out_int32, right=right or side == "right")


def counted(x: Tensor, limits: Tensor, right: bool, dtype: torch.dtype) -> Tensor:
    """The limits that a value has passed; what is no number has passed all."""
    each = x.reshape(x.shape[0], -1, 1)
    ahead = each < limits if right else each <= limits
    return ahead.logical_not().sum(-1).to(dtype).reshape(x.shape)


@converter(aten.diagonal.default)
def diagonal(ctx: Context, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    rank = len(x.axes)
    both = dim1 % rank, dim2 % rank
    first, second = (inside(ctx, x, dim, "a diagonal") for dim in both)
    left = (axis for dim, axis in enumerate(x.axes.dims) if dim not in both)
    axes = Axes((*left, plain_axis(ctx.out_shape[-1])))
    x = ctx.settled(x)
    return ctx.call(slanted, (x, offset, first, second, ctx.out_shape[-1]), axes, x.clock, x.dtype)


def slanted(x: Tensor, offset: int, first: int, second: int, count: int) -> Tensor:
    """A diagonal as every so-many-th entry of the flattened matrix."""
    x = x.movedim((first, second), (-2, -1))
    width = x.shape[-1]
    start = offset if offset >= 0 else -offset * width
    return x.flatten(-2)[..., start : start + count * (width + 1) : width + 1][..., :count]

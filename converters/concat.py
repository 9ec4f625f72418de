"""Concatenation, splitting, stacking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dissect import ledger
from dissect.context import Context, Refused, Value
from dissect.converters.indexing import select, slice_
from dissect.converters.time_axis import cat_time
from dissect.ledger import Axes, Axis
from dissect.meeting import side_by_side
from dissect.registry import converter, patient
from dissect.tokens import attended

aten = torch.ops.aten


def beside(value: Tensor, like: Tensor, frame: Sequence[int]) -> Tensor:
    """A constant as a frame tensor with as many rows as ``like``."""
    return value.expand(like.shape[0], *frame)


@converter(aten.cat.default)
def cat(ctx: Context, values: Sequence[Value], dim: int = 0) -> Value:
    values = [value for value in values if value.shape != (0,)]
    if len(values) == 1:
        return values[0]
    rank = len(values[0].shape)
    dim %= rank
    values = [value for value in values if value.shape[dim]] or values[:1]  # a shift of 3 // 8 channels is of none
    if len(values) == 1:
        return values[0]
    moving = [value for value in values if not value.constant]
    timed = [value for value in moving if value.axes[dim].is_time]
    joined = any(value.time is None and not silent(value) for value in values)
    if timed and not (len(timed) == 1 and joined and attended(ctx.node, dim, timed[0].shape[dim])):
        return cat_time(ctx, values, dim)
    if any("N" in value.axes[dim].kinds for value in moving):
        raise Refused("a concatenation along the batch", "keep the batch in a dimension of its own")
    values = [side_by_side(ctx, value, dim) for value in values]
    values, timing = ctx.align(values)
    like = next(value for value in values if not value.constant)
    base = ledger.broadcast([value.axes.replace(dim, Axis()) for value in values if not value.constant])
    axes = base.replace(dim, ledger.plain_axis(sum(value.shape[dim] for value in values)))
    at = base.kept(dim)
    assert at is not None
    values = [
        value if value.constant else wide(ctx, value, base.replace(dim, ledger.plain_axis(value.shape[dim])))
        for value in values
    ]
    whole = [value for value in values if not value.constant]
    zeros = [value for value in values if value.constant and silent(value)]
    if len(whole) == 1 and len(zeros) == len(values) - 1:
        before = sum(value.shape[dim] for value in values[: values.index(whole[0])])
        after = sum(value.shape[dim] for value in values) - before - whole[0].shape[dim]
        widths = [0, 0] * (len(axes.frame) - 1 - at) + [before, after]
        fill = whole[0].clock.fill
        return ctx.call(
            F.pad, (whole[0], widths), axes, timing.but(fill=fill, nonneg=whole[0].clock.nonneg), like.dtype
        )
    parts = []
    for value in values:
        if value.constant:
            own = base.replace(dim, ledger.plain_axis(value.shape[dim]))
            node = ctx.graph.call_function(beside, (ctx.conform(value, own).node, like.node, own.frame))
            value = Value(node, value.axes, None, value.dtype)
        parts.append(value.node)
    nonneg = all(value.clock.nonneg for value in whole) and len(whole) == len(values)
    fill = 0.0 if len(whole) == len(values) and all(value.clock.fill == 0.0 for value in whole) else None
    return ctx.call(torch.cat, (parts, at + 1), axes, timing.but(nonneg=nonneg, fill=fill), ctx.node.meta["val"].dtype)


def silent(value: Value) -> bool:
    """Zeros that no training reaches."""
    return value.tensor is not None and not value.tensor.any() and value.name is None


def wide(ctx: Context, value: Value, axes: Axes) -> Value:
    """A value under another ledger, whose dimensions of one entry may be wide there."""
    same = Axes(
        tuple(
            axis if axis.size == mine.size or axis.dropped else Axis()
            for axis, mine in zip(axes.dims, value.axes.dims, strict=True)
        )
    )
    value = ctx.reframe(value, same)
    if same.frame == axes.frame:
        return ctx.reframe(value, axes)
    return ctx.call(torch.Tensor.expand, (value, (-1, *axes.frame)), axes, value.clock, value.dtype)


@converter(aten.stack.default)
def stack(ctx: Context, values: Sequence[Value], dim: int = 0) -> Value:
    from dissect.converters.shape import expand, unsqueeze

    dim %= len(values[0].shape) + 1
    first = values[0]
    if (
        len(values) > 1
        and not first.constant
        and all(value.node is first.node for value in values)
        and first.time is None
    ):
        return expand(ctx, unsqueeze(ctx, first, dim), ctx.out_shape)  # copies, of which one may be at every frame
    return cat(
        ctx, [standing(ctx, value, dim) if value.constant else unsqueeze(ctx, value, dim) for value in values], dim
    )


def standing(ctx: Context, value: Value, dim: int) -> Value:
    """A constant with one more dimension."""
    assert value.tensor is not None
    tensor = value.tensor.unsqueeze(dim)
    node = ctx.graph.call_function(torch.unsqueeze, (value.node, dim))
    return Value(node, ledger.plain(tensor.shape), None, value.dtype, tensor)


@converter(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.tensor_split.sections)
def split(ctx: Context, x: Value, sizes: Any, dim: int = 0) -> tuple[Value, ...]:
    dim %= len(x.axes)
    if len(ctx.node.meta["val"]) == 1:
        return (x,)
    if x.axes[dim].is_time:
        return Later(
            [int(val.shape[dim]) for val in ctx.node.meta["val"]],
            lambda start, size: slice_(ctx, x, dim, start, start + size),
        )  # type: ignore[return-value]
    if not x.axes[dim].plain:
        raise Refused(
            "splitting the batch"
            if "T" not in x.axes[dim].kinds
            else f"splitting an axis that merges time with {'the batch' if 'N' in x.axes[dim].kinds else 'others'}"
        )
    x = ctx.sure(x)
    at = x.axes.kept(dim)
    assert at is not None
    start, parts = 0, []
    for val in ctx.node.meta["val"]:
        size = int(val.shape[dim])
        axes = x.axes.replace(dim, ledger.plain_axis(size))
        parts.append(ctx.call(torch.narrow, (x, at + 1, start, size), axes, x.clock, x.dtype))
        start += size
    return tuple(parts)


@converter(aten.unbind.int)
def unbind(ctx: Context, x: Value, dim: int = 0) -> tuple[Value, ...]:
    sizes = [1] * x.shape[dim % len(x.axes)]
    return Later(sizes, lambda index, _: select(ctx, x, dim, index))  # type: ignore[return-value]


class Later:
    """The parts of a tensor, each made when it is asked for: those that nobody reads cost nothing."""

    def __init__(self, sizes: Sequence[int], make: Callable[[int, int], Value]) -> None:
        self.sizes = sizes
        self.make = make

    def __getitem__(self, index: int) -> Value:
        return self.make(sum(self.sizes[:index]), self.sizes[index])


patient(
    aten.cat.default,
    aten.stack.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
)

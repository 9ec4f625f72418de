"""Sums, means and extremes over dimensions; over time they become a window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dissect.context import Context, Refused, Value
from dissect.converters.sorting import inside, place
from dissect.global_pool import pool_time
from dissect.ledger import Axes, Axis
from dissect.registry import converter

aten = torch.ops.aten
_REDUCE: dict[str, Callable[..., torch.Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "max": torch.amax,
    "min": torch.amin,
}


def reduce(ctx: Context, x: Value, kind: str, dims: Sequence[int] | int | None, keepdim: bool) -> Value:
    """Reduce inside the frame first, then over time."""
    rank = len(x.axes)
    chosen = sorted(
        {
            dim % rank
            for dim in (range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims)
        }
    )
    if any("N" in x.axes[dim].kinds for dim in chosen):
        raise Refused(f"a {kind} over the batch", "reduce over the other dimensions only")
    over_time = any("T" in x.axes[dim].kinds for dim in chosen)
    inner = [kept + 1 for dim in chosen if (kept := x.axes.kept(dim)) is not None]
    ended = [Axis() if dim in chosen else axis for dim, axis in enumerate(x.axes.dims)]
    axes = Axes(tuple(axis for dim, axis in enumerate(ended) if keepdim or dim not in chosen))
    y = ctx.settled(x)
    if inner:
        y = ctx.call(_REDUCE[kind], (y, inner, keepdim), axes, y.clock.plain().but(nonneg=y.clock.nonneg), x.dtype)
    if not over_time:
        return Value(y.node, axes, y.timing, y.dtype)
    # a pure time axis is no dimension of a frame: keepdim gives it back with size 1
    bare = Axes(
        tuple(
            axis
            for dim, axis in enumerate(ended)
            if not (dim in chosen and x.axes[dim].dropped) and (keepdim or dim not in chosen)
        )
    )
    y = Value(y.node, bare, y.timing, y.dtype)
    return ctx.reframe(pool_time(ctx, y, kind, bare), axes)


def number(ctx: Context, x: Value) -> Value:
    """What is counted or averaged: masks and whole numbers in the dtype of the result."""
    dtype = ctx.node.meta["val"].dtype
    if x.dtype.is_floating_point or x.dtype == dtype:
        return x
    return ctx.call(aten.to.dtype, (x, dtype), x.axes, x.clock, dtype)


@converter(aten.max.default, aten.min.default, aten.mean.default, aten.sum.default, aten.prod.default)
def of_everything(ctx: Context, x: Value, *_: Any, **__: Any) -> Value:
    raise Refused(
        "a reduction of the whole tensor, rows of the batch and all",
        "name the dimensions, as x.amax((1, 2, 3, 4), keepdim=True); a loss is best left out of what the network returns",
    )


@converter(aten.mean.dim)
def mean(ctx: Context, x: Value, dims: Any, keepdim: bool = False, *, dtype: Any = None) -> Value:
    return reduce(ctx, number(ctx, x), "mean", dims, keepdim)


@converter(aten.sum.dim_IntList)
def sum_(ctx: Context, x: Value, dims: Any, keepdim: bool = False, *, dtype: Any = None) -> Value:
    return reduce(ctx, number(ctx, x), "sum", dims, keepdim)


@converter(aten.prod.dim_int)
def prod(ctx: Context, x: Value, dim: int, keepdim: bool = False, *, dtype: Any = None) -> Value:
    at = inside(ctx, x, dim, "a product")
    x = ctx.settled(number(ctx, x))
    kept = (Axis(),) if keepdim else ()
    axes = Axes((*x.axes.dims[: dim % len(x.axes)], *kept, *x.axes.dims[dim % len(x.axes) + 1 :]))
    return ctx.call(torch.prod, (x, at, keepdim), axes, x.clock.plain(), x.dtype)


@converter(aten.any.default, aten.any.dim, aten.any.dims)
def any_(ctx: Context, x: Value, dims: Any = None, keepdim: bool = False) -> Value:
    return truth(ctx, x, "max", dims, keepdim)


@converter(aten.all.default, aten.all.dim, aten.all.dims)
def all_(ctx: Context, x: Value, dims: Any = None, keepdim: bool = False) -> Value:
    return truth(ctx, x, "min", dims, keepdim)


def truth(ctx: Context, x: Value, kind: str, dims: Any, keepdim: bool) -> Value:
    """Whether some entry is true, or every one: the extreme of ones and zeros, which may be a window's."""
    x = ctx.settled(x)
    clock = x.clock.plain().but(nonneg=True)
    set_ = ctx.call(torch.ne, (x, 0), x.axes, clock, torch.bool)
    ones = ctx.call(aten.to.dtype, (set_, torch.float32), x.axes, clock, torch.float32)
    y = reduce(ctx, ones, kind, dims, keepdim)
    return ctx.call(torch.gt, (y, 0), y.axes, y.clock.plain(), torch.bool)


@converter(aten.amax.default)
def amax(ctx: Context, x: Value, dims: Any = (), keepdim: bool = False) -> Value:
    return reduce(ctx, x, "max", list(dims), keepdim)


@converter(aten.amin.default)
def amin(ctx: Context, x: Value, dims: Any = (), keepdim: bool = False) -> Value:
    return reduce(ctx, x, "min", list(dims), keepdim)


@converter(aten.max.dim)
def max_dim(ctx: Context, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value | None]:
    return reduce(ctx, x, "max", dim, keepdim), place(ctx, x, dim, keepdim, torch.argmax)


@converter(aten.min.dim)
def min_dim(ctx: Context, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value | None]:
    return reduce(ctx, x, "min", dim, keepdim), place(ctx, x, dim, keepdim, torch.argmin)

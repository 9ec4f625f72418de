"""Operators that move or rename dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from dissect import ledger
from dissect.context import Context, Refused, Value
from dissect.converters import pointwise
from dissect.ledger import Axes, Axis
from dissect.registry import converter, patient
from dissect.sinking import widened

aten = torch.ops.aten
_ELEMENTWISE = {*pointwise.KEEPS_ZERO, *pointwise.OTHER}


@converter(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten._reshape_copy.default,
    aten.view_copy.default,
)
def reshape(ctx: Context, x: Value, *_: Any) -> Value:
    return ctx.reframe(x, ledger.reshape(x.axes, ctx.out_shape))


@converter(aten.permute.default, aten.permute_copy.default)
def permute(ctx: Context, x: Value, dims: Sequence[int]) -> Value:
    dims = [dim % len(x.axes) for dim in dims]
    axes = Axes(tuple(x.axes[dim] for dim in dims))
    order = [kept for dim in dims if (kept := x.axes.kept(dim)) is not None]
    if order == sorted(order):
        return Value(x.node, axes, x.timing, x.dtype)
    return ctx.call(torch.permute, (x, (0, *[at + 1 for at in order])), axes, x.clock, x.dtype)


@converter(aten.transpose.int, aten.transpose_copy.int, aten.movedim.int, aten.swapaxes.default)
def transpose(ctx: Context, x: Value, first: int, second: int) -> Value:
    dims = list(range(len(x.axes)))
    first, second = first % len(dims), second % len(dims)
    dims[first], dims[second] = dims[second], dims[first]
    return permute(ctx, x, dims)


@converter(aten.t.default, aten.numpy_T.default)
def t(ctx: Context, x: Value) -> Value:
    return permute(ctx, x, list(range(len(x.axes)))[::-1])


@converter(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze_copy.dim, aten.squeeze_copy.default)
def squeeze(ctx: Context, x: Value, dims: int | Sequence[int] | None = None) -> Value:
    rank = len(x.axes)
    chosen = range(rank) if dims is None else [dim % rank for dim in ([dims] if isinstance(dims, int) else dims)]
    gone = {dim for dim in chosen if x.axes[dim].size == 1}
    axes = x.axes
    for dim in sorted(gone, reverse=True):
        if "N" in axes[dim].kinds and (axes[dim].kinds != "N" or dim + 1 == len(axes)):
            raise Refused("squeezing the batch away", "keep the batch dimension")
        axes = ledger.without(axes, dim)
    return ctx.reframe(x, axes)


@converter(aten.unsqueeze.default, aten.unsqueeze_copy.default)
def unsqueeze(ctx: Context, x: Value, dim: int) -> Value:
    dim %= len(x.axes) + 1
    if dim < len(x.axes) and ledger.alone(x.axes, dim) and len(x.axes[dim].factors) > 1:  # gives a batch of one its own
        batch, *rest = x.axes[dim].factors
        dims = (*x.axes.dims[:dim], Axis((batch,)), Axis(tuple(rest)), *x.axes.dims[dim + 1 :])
        return ctx.reframe(x, Axes(dims))
    return ctx.reframe(x, Axes((*x.axes.dims[:dim], Axis(), *x.axes.dims[dim:])))


def broadcasts(user: fx.Node, node: fx.Node) -> bool:
    """Whether an operator has other operands that decide its result's shape without what ``node`` repeats.

    One is an elementwise operator, another a concatenation along a dimension that is not repeated.
    """
    shape, free = node.meta["val"].shape, None
    if user.target is aten.cat.default:
        free = (user.args[1] if len(user.args) > 1 else 0) % len(shape)  # type: ignore[operator]
        before = node.args[0].meta["val"].shape  # type: ignore[union-attr]
        if len(before) < len(shape) - free or before[free - len(shape)] != shape[free]:
            return False
    elif user.target not in _ELEMENTWISE:
        return False
    sizes = [1] * len(shape)
    for arg in user.all_input_nodes:
        value = (arg.args[0] if widened(arg) else arg).meta.get("val")  # type: ignore[union-attr]
        if isinstance(value, torch.Tensor) and len(value.shape) <= len(shape):
            for dim, size in enumerate(value.shape, len(shape) - len(value.shape)):
                sizes[dim] = max(sizes[dim], size)
    return all(mine == its or dim == free for dim, (mine, its) in enumerate(zip(shape, sizes, strict=True)))


@converter(aten.expand.default, aten.expand_copy.default)
def expand(ctx: Context, x: Value, size: Sequence[int], implicit: bool = False) -> Value:
    """A broadcast: over time it costs nothing, since a frame has no time axis; nor does one that its reader does itself."""
    shape = ctx.out_shape
    if all(broadcasts(user, ctx.node) for user in ctx.node.users):
        pad = len(shape) - len(x.axes)
        return ctx.reframe(x, Axes((*[Axis()] * pad, *x.axes.dims))) if pad else x
    pad = len(shape) - len(x.axes)
    dims = [Axis()] * pad + list(x.axes.dims)
    axes = Axes(tuple(dims))
    wide: list[Axis] = []
    repeats: list[int] = []
    clock = x.clock
    for axis, length in zip(dims, shape, strict=True):
        if axis.is_time and axis.size == 1 < length:
            wide.append(Axis((ledger.Factor("T", length),)))
            clock = clock.but(still=True)
        elif axis.size == length:
            wide.append(axis)
            if not axis.dropped:
                repeats.append(-1)
        elif not ctx.flat and length == x.clock.length(ctx.frames) and axes.time is None:
            wide.append(Axis((ledger.Factor("T", length),)))
            axes = Axes(tuple(wide))
            ctx.broadcast_back([x, Value(x.node, axes, x.timing, x.dtype)])
        else:
            wide.append(ledger.plain_axis(length))
            repeats.append(length)
    out = Axes(tuple(wide))
    base = Axes(
        tuple(
            axis if axis.size == old.size else (axis if axis.is_time else Axis())
            for axis, old in zip(wide, dims, strict=True)
        )
    )
    y = ctx.reframe(x, base)
    if all(repeat == -1 for repeat in repeats):
        return Value(y.node, out, clock, x.dtype)
    return ctx.call(torch.Tensor.expand, (y, (-1, *repeats)), out, clock, x.dtype)


patient(
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.expand.default,
)

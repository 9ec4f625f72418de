"""Single entries of a window (see :mod:`dissect.windows`): cut from it, selected, chosen by constant indices."""

from __future__ import annotations

from collections.abc import Callable
from math import lcm
from typing import Any

import torch
from torch import Tensor

from dissect import ledger
from dissect.context import Context, Refused, Value
from dissect.ledger import Axes
from dissect.meeting import side_by_side
from dissect.registry import windowed
from dissect.windows import count, picked, windows

aten = torch.ops.aten
Convert = Callable[..., Any]


@windowed(
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.slice.Tensor,
)
def cut(ctx: Context, convert: Convert, x: Value, *args: Any, **kwargs: Any) -> Any:
    """Cutting another dimension; a cut through the window falls back to its newest entry."""
    at = 0 if ctx.node.target in (aten.unbind.int, aten.slice.Tensor) else 1
    dim = kwargs.get("dim", args[at] if len(args) > at else 0) % len(x.axes)
    if "K" in x.axes[dim].kinds:
        raise Refused("a cut through a window of positions", clipwise=True)
    return convert(ctx, x, *args, **kwargs)


@windowed(aten.select.int)
def select(ctx: Context, convert: Convert, x: Value, dim: int, index: int) -> Value:
    """One entry of a window: that position of the clip, counted from its end, or from the first that there is."""
    dim %= len(x.axes)
    if "K" not in x.axes[dim].kinds:
        return convert(ctx, x, dim, index)
    if x.axes[dim].kinds != "K":  # a token of them all
        return convert(ctx, side_by_side(ctx, x, dim), dim, index)
    at = x.axes.kept(dim)
    assert at is not None
    axes = Axes((*x.axes.dims[:dim], *x.axes.dims[dim + 1 :]))
    if index < 0 or index == x.shape[dim] - 1:
        return ctx.call(torch.select, (x, at + 1, index % x.shape[dim]), axes, x.clock, x.dtype)
    known = count(ctx, windows(Axes((x.axes[dim],)))[0])
    return ctx.call(entry, (x, known, at + 1, index), axes, x.clock, x.dtype)


@windowed(aten.index.Tensor, aten.index_select.default)
def chosen(ctx: Context, convert: Convert, x: Value, *args: Any) -> Value:
    """Entries of a window by constant indices: those positions of a clip as long as the example."""
    given = [(args[0] % len(x.axes), args[1])] if isinstance(args[0], int) else [*enumerate(args[0])]
    named = [(dim, index) for dim, index in given if index is not None]
    dim, index = named[0]
    if len(named) > 1 or x.axes[dim].kinds != "K" or not index.constant or index.tensor.dim() != 1:
        if any("K" in x.axes[dim].kinds for dim, _ in named):
            raise Refused("entries of a window of positions, chosen by what the clip shows", clipwise=True)
        result: Value = convert(ctx, x, *args)
        return result
    at = x.axes.kept(dim)
    assert at is not None
    ctx.grain = lcm(ctx.grain, ctx.frames)
    where = index.tensor.nonzero().flatten() if index.tensor.dtype == torch.bool else index.tensor % x.shape[dim]
    axes = x.axes.replace(dim, ledger.plain_axis(where.numel()))
    return ctx.call(torch.index_select, (x, at + 1, ctx.constant(where, "index")), axes, x.clock, x.dtype)


def entry(x: Tensor, count: Tensor, dim: int, index: int) -> Tensor:
    """Of each row the entry ``index`` places behind the first that is a position."""
    size = x.shape[dim]
    at = (index + size - count.long().clamp(min=1)).clamp(max=size - 1)
    return picked(x, at, dim).squeeze(dim)

"""Operators that order the values of a dimension, or say where one stands: inside a frame they are what they are.

Over time they order a window of all positions: where the clip ends, a place in the window is that place in the clip.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from math import lcm
from typing import Any

import torch
from torch import Tensor, fx

from dissect.context import Context, Refused, Value
from dissect.ledger import Axes, plain_axis
from dissect.registry import converter
from dissect.windows import count, masked, picked, window, windows

aten = torch.ops.aten


def inside(ctx: Context, x: Value, dim: int | None, what: str = "an order") -> int:
    """Where a dimension of the original stands in a frame tensor; refuses batch and time."""
    if dim is None:
        raise Refused(f"{what} of all elements mixes the rows of the batch", "give it a dimension")
    axis = x.axes[dim % len(x.axes)]
    at = x.axes.kept(dim % len(x.axes))
    if not axis.plain or at is None:
        over = (
            "time, by places in the clip, which a stream does not have" if {"T", "K"} & set(axis.kinds) else "the batch"
        )
        raise Refused(f"{what} over {over}", "end the network before it, and do it with the outputs, outside")
    return at + 1


def shaped(ctx: Context, x: Value, dim: int, size: int, keepdim: bool = True) -> Axes:
    dim %= len(x.axes)
    kept = (plain_axis(size),) if keepdim else ()
    return Axes((*x.axes.dims[:dim], *kept, *x.axes.dims[dim + 1 :]))


@converter(aten.argmax.default, aten.argmin.default)
def arg(ctx: Context, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    largest = ctx.node.target is aten.argmax.default
    if dim is not None:
        x, _ = lasting(ctx, x, dim, f"the place of the {'largest' if largest else 'smallest'}", largest)
    at = inside(ctx, x, dim)
    assert dim is not None
    x = ctx.settled(x)
    target = torch.argmax if largest else torch.argmin
    return ctx.call(target, (x, at, keepdim), shaped(ctx, x, dim, 1, keepdim), x.clock.plain(), torch.int64)


@converter(aten.argsort.default, aten.argsort.stable)
def argsort(ctx: Context, x: Value, *args: Any, **kwargs: Any) -> Value:
    return sort(ctx, x, *args, **kwargs)[1]


@converter(aten.sort.default, aten.sort.stable)
def sort(
    ctx: Context, x: Value, *args: Any, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Value, Value]:
    given: list[Any] = [*args, *(dim, descending)[len(args) :]]
    dim, descending = given
    x, there = lasting(ctx, x, dim, "the values in order", descending)
    at = inside(ctx, x, dim)
    return pair(ctx, x, torch.sort, (at, descending), x.axes, there, x.shape[dim])


@converter(aten.topk.default)
def topk(
    ctx: Context, x: Value, k: int, dim: int = -1, largest: bool = True, ordered: bool = True
) -> tuple[Value, Value]:
    what = f"the {k} {'largest' if largest else 'smallest'}"
    x, there = lasting(ctx, x, dim, what, largest)
    at = inside(ctx, x, dim)
    return pair(ctx, x, torch.topk, (k, at, largest, ordered), shaped(ctx, x, dim, k), there, x.shape[dim])


def lasting(ctx: Context, x: Value, dim: int, what: str, low: bool) -> tuple[Value, fx.Node | None]:
    """Over time, the window of all positions as a dimension of the frame; of tokens, of all of them.

    Entries that do not exist yet are the lowest numbers (``low``), or the highest. The second result is how many do, None
    where nothing was done. Where somebody asks for places, they are those of the clip where the window is full.
    """
    dim %= len(x.axes)
    axis = x.axes[dim]
    if "T" not in axis.kinds or "N" in axis.kinds:
        return x, None
    places = isinstance(ctx.node.meta["val"], Tensor) or asked(ctx.node, 1)  # the operators of one result give places
    if places and not axis.kinds.startswith("T"):
        raise Refused(
            "places among entries that stand in front of time", "bring time to the front: x.transpose(1, 2).flatten(1)"
        )
    if places:
        ctx.grain = lcm(ctx.grain, ctx.frames)
    x = window(ctx, ctx.sure(x), what, placed=places)
    there = None
    if x.axes.window is not None:
        (held,) = windows(x.axes)
        there = count(ctx, held)
        if x.shape[dim] > held.size:
            there = ctx.graph.call_function(operator.mul, (there, x.shape[dim] // held.size))
        x = masked(ctx, x, float("-inf") if low else float("inf"))
    return replace(x, axes=x.axes.replace(dim, plain_axis(x.shape[dim]))), there


@converter(aten.kthvalue.default)
def kthvalue(ctx: Context, x: Value, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Value, Value]:
    x, there = lasting(ctx, x, dim, f"number {k} in order", False)
    at = inside(ctx, x, dim)
    return pair(ctx, x, smallest, (k, at, keepdim), shaped(ctx, x, dim, 1, keepdim), there, x.shape[dim])


@converter(aten.median.dim)
def median(ctx: Context, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    x, there = lasting(ctx, x, dim, "the value in the middle", False)
    at = inside(ctx, x, dim)
    axes = shaped(ctx, x, dim, 1, keepdim)
    if there is not None:
        return pair(ctx, x, middle_of, (there, at, keepdim), axes)
    return pair(ctx, x, middle, (at, keepdim), axes)


@converter(aten.mode.default)
def mode(ctx: Context, x: Value, dim: int = -1, keepdim: bool = False) -> tuple[Value, Value]:
    at = inside(ctx, x, dim)
    return pair(ctx, x, commonest, (at, keepdim), shaped(ctx, x, dim, 1, keepdim))


def smallest(x: Tensor, k: int, dim: int, keepdim: bool) -> tuple[Tensor, Tensor]:
    """The k-th smallest value and its place."""
    values, places = (part.narrow(dim, k - 1, 1) for part in torch.topk(x, k, dim, False))
    return (values, places) if keepdim else (values.squeeze(dim), places.squeeze(dim))


def middle(x: Tensor, dim: int, keepdim: bool) -> tuple[Tensor, Tensor]:
    """The median (the lower of two); no number where there is one that is none."""
    values, places = smallest(x, (x.shape[dim] + 1) // 2, dim, keepdim)
    if x.is_floating_point():
        values = torch.where(x.isnan().any(dim, keepdim), torch.nan, values)
    return values, places


def middle_of(x: Tensor, count: Tensor, dim: int, keepdim: bool) -> tuple[Tensor, Tensor]:
    """The median of the first ``count`` values in order, for each row; the others are plus infinity."""
    values, places = torch.topk(x, x.shape[dim], dim, False)
    at = (count.long().clamp(min=1) - 1) // 2
    values, places = picked(values, at, dim), picked(places, at, dim)
    return (values, places) if keepdim else (values.squeeze(dim), places.squeeze(dim))


def commonest(x: Tensor, dim: int, keepdim: bool) -> tuple[Tensor, Tensor]:
    """The value that is there most often, of several the smallest, and its last place."""
    moved = x.movedim(dim, -1)
    each = moved.reshape(-1, moved.shape[-1])
    counts = (each.unsqueeze(2) == each.unsqueeze(1)).sum(2)
    best = counts == counts.amax(1, True)
    values = torch.where(best, each, each.amax(1, True)).amin(1)
    index = torch.arange(moved.shape[-1], device=x.device)
    places = torch.where(each == values.unsqueeze(1), index, -1).amax(1)
    values, places = (part.reshape(moved.shape[:-1]) for part in (values, places))
    return (values.unsqueeze(dim), places.unsqueeze(dim)) if keepdim else (values, places)


def asked(node: fx.Node, index: int) -> bool:
    """Somebody uses that result of the operator."""
    return any(user.target is operator.getitem and user.args[1] == index and user.users for user in node.users)


def pair(
    ctx: Context, x: Value, target: Any, args: tuple[Any, ...], axes: Axes, there: fx.Node | None = None, size: int = 0
) -> tuple[Value, Value]:
    """An operator that gives values and their places; ``there``: how many of ``size`` entries there are yet, the last ones."""
    x = ctx.settled(x)
    both = ctx.call(target, (x, *args), axes, x.clock.plain(), x.dtype)
    values, places = (ctx.graph.call_function(operator.getitem, (both.node, index)) for index in range(2))
    if there is not None:
        places = ctx.graph.call_function(known, (places, there, size))
    return Value(values, axes, both.timing, x.dtype), Value(places, axes, both.timing, torch.int64)


def known(places: Tensor, count: Tensor, size: int) -> Tensor:
    """Places in a window, the oldest of the last ``count`` in place of those that do not exist yet."""
    first = (size - count.long()).clamp(max=size - 1)
    return torch.maximum(places, first.reshape(-1, *[1] * (places.dim() - 1)))


def place(ctx: Context, x: Value, dim: int, keepdim: bool, target: Any) -> Value | None:
    """Where a maximum or minimum stands, for the operators that give both; None where nobody asks."""
    if not asked(ctx.node, 1):
        return None
    x, _ = lasting(ctx, x, dim, "its place", target is torch.argmax)
    at = inside(ctx, x, dim)
    x = ctx.settled(x)
    return ctx.call(target, (x, at, keepdim), shaped(ctx, x, dim, 1, keepdim), x.clock.plain(), torch.int64)

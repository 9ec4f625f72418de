"""Results so far along a dimension of the frame: products, maxima, sums of exponentials.

ONNX has a running sum alone, so that the others double their reach at every step: after k of them an entry has taken in
``2 ** k`` entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dissect.context import Context, Value
from dissect.converters.reduction import number
from dissect.converters.sorting import inside, pair
from dissect.registry import converter

aten = torch.ops.aten
Parts = tuple[Tensor, ...]


@converter(aten.cumprod.default)
def cumprod(ctx: Context, x: Value, dim: int, *, dtype: Any = None) -> Value:
    at = inside(ctx, x, dim, "a running product")
    x = ctx.settled(number(ctx, x))
    return ctx.call(product, (x, at), x.axes, x.clock.plain(), x.dtype)


@converter(aten.logcumsumexp.default)
def logcumsumexp(ctx: Context, x: Value, dim: int) -> Value:
    at = inside(ctx, x, dim, "a running sum")
    x = ctx.settled(x)
    return ctx.call(logarithm, (x, at), x.axes, x.clock.plain(), x.dtype)


@converter(aten.cummax.default, aten.cummin.default)
def cummax(ctx: Context, x: Value, dim: int) -> tuple[Value, Value]:
    at = inside(ctx, x, dim, "an extreme so far")
    return pair(ctx, x, extreme, (at, ctx.node.target is aten.cummax.default), x.axes)


def doubled(parts: Parts, dim: int, join: Callable[[Parts, Parts], Parts]) -> Parts:
    """Every entry joined with all that stand before it."""
    size, reach = parts[0].shape[dim], 1
    while reach < size:
        early = tuple(part.narrow(dim, 0, size - reach) for part in parts)
        late = tuple(part.narrow(dim, reach, size - reach) for part in parts)
        first = (part.narrow(dim, 0, reach) for part in parts)
        parts = tuple(torch.cat(both, dim) for both in zip(first, join(early, late), strict=True))
        reach *= 2
    return parts


def product(x: Tensor, dim: int) -> Tensor:
    return doubled((x,), dim, lambda early, late: (early[0] * late[0],))[0]


def logarithm(x: Tensor, dim: int) -> Tensor:
    return doubled((x,), dim, lambda early, late: (torch.logaddexp(early[0], late[0]),))[0]


def extreme(x: Tensor, dim: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The largest (or smallest) value so far and its last place."""
    shape = [-1 if at == dim else 1 for at in range(x.dim())]
    places = torch.arange(x.shape[dim], device=x.device).reshape(shape).expand_as(x)

    def join(early: Parts, late: Parts) -> Parts:
        new = late[0] >= early[0] if largest else late[0] <= early[0]
        if x.is_floating_point():
            new = new | late[0].isnan()
        return tuple(torch.where(new, after, before) for before, after in zip(early, late, strict=True))

    values, places = doubled((x, places), dim, join)
    return values, places

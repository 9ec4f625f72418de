"""Divisions by how much has been summed so far, as a clip network writes them: ``x.cumsum(2) / torch.arange(1, T + 1)``.

So has a cumulative norm, whose count is of entries: ``C, 2 * C, 3 * C, ...``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dissect.context import Context, Value
from dissect.holding import RunningSum
from dissect.ledger import Axes, Axis


def counted(ctx: Context, x: Value, by: Value) -> Value:
    """The divisor as the stream's own count, if it is 1, 2, 3, ... times a number along the time of ``x``; else as it is."""
    time = x.time if not x.constant else None
    if time is None or by.tensor is None or not x.axes[time].is_time or x.shape[time] < 3:
        return by
    at = time - len(x.shape)
    if by.tensor.dim() < -at or by.shape[at] != x.shape[time]:
        return by
    numbers = torch.arange(1, x.shape[time] + 1, dtype=by.tensor.dtype).reshape(-1, *[1] * (-at - 1))
    each = by.tensor.flatten()[0]
    if each == 0 or not torch.equal(by.tensor, (each * numbers).expand_as(by.tensor)):
        return by
    x = ctx.settled(x)
    axes = Axes(tuple(axis if {"N", "T"} & set(axis.kinds) else Axis() for axis in x.axes.dims))
    ones = ctx.gate(ctx.call(one_each, (x, len(axes.frame)), axes, x.clock.plain(), x.dtype))
    ctx.row("the number of frames so far", exact=ctx.exact, reason="" if ctx.exact else "of every frame so far")
    timing = ones.clock.plain().but(nonneg=True, endless=True)
    count = ctx.primitive("count", RunningSum(axes.frame, x.clock.stride), (ones,), axes, timing, x.dtype)
    count = ctx.call(torch.clamp_min, (count, 1.0), axes, count.clock, x.dtype)
    return count if each == 1 else ctx.call(torch.mul, (count, each.item()), axes, count.clock, x.dtype)


def one_each(x: Tensor, dims: int) -> Tensor:
    """A one for each frame, ``(rows, 1, ...)``."""
    return torch.ones_like(x.reshape(x.shape[0], -1)[:, :1]).reshape(-1, *[1] * dims)

"""Adaptive pools: as many bins as are asked for, whatever the length."""

from __future__ import annotations

from math import lcm

import torch

from dissect.context import Context, Refused, Value
from dissect.converters.convolution import strided
from dissect.converters.pooling import pool_taps, spaced
from dissect.global_pool import policy, pool_time
from dissect.ledger import plain_axis
from dissect.registry import converter

aten = torch.ops.aten


@converter(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default)
def adaptive_avg_pool(ctx: Context, x: Value, size: list[int]) -> Value:
    return adaptive(ctx, x, "mean", list(size))


def adaptive(ctx: Context, x: Value, kind: str, size: list[int]) -> Value:
    """An adaptive pool: global where it leaves one position, a sliding pool where its bins are even."""
    dims = len(size)
    channels = len(x.shape) - dims
    axes = x.axes
    time = None
    inner: list[int] = []
    sizes: list[int] = []
    for at in range(dims):
        axis = x.axes[channels + at]
        if axis.is_time:
            time = at
        elif not axis.plain:
            raise Refused("an adaptive pool over an axis that merges time with space")
        else:
            inner.append(at)
            sizes.append(size[at])
            axes = axes.replace(channels + at, plain_axis(size[at]))
    y = x
    if any(sizes[i] != x.shape[channels + at] for i, at in enumerate(inner)):
        lead = len(x.axes.frame) - len(inner)
        clock = x.clock.but(fill=x.clock.fill if x.clock.fill == 0.0 else None)
        y = ctx.call(adaptive_space, (x, kind, lead, tuple(sizes)), axes, clock, x.dtype)
    if time is None:
        return y
    positions, wanted = x.shape[channels + time], size[time]
    if wanted > 1:  # the length of its bins follows that of the clip
        ctx.grain = lcm(ctx.grain, ctx.frames)
    further = (ctx.preset == "d3d" and y.clock.removed > 1) or policy(ctx) == "cumulative"
    if wanted == positions and not (wanted == 1 and further):
        return y
    out = axes.sized((*axes.shape[: channels + time], wanted, *axes.shape[channels + time + 1 :]))
    if wanted == 1:
        return ctx.reframe(pool_time(ctx, y, kind, out), out.replace(channels + time, plain_axis(1)))
    if positions % wanted:
        raise Refused(
            f"an adaptive pool of {positions} positions to {wanted} has bins of uneven length, which follow no stream",
            "use a clip length that the pool divides evenly",
        )
    step = positions // wanted
    clock = y.clock
    ages = [index * clock.stride for index in reversed(range(step))]
    timing = strided(ctx, clock.plain(), step).but(length=clock.length.then(-step, step), old=clock.old + ages[0])
    if ctx.exact:
        timing = timing.but(delay=clock.delay + clock.stride * (step - 1))
    ctx.row(
        f"pool over {step} frames",
        exact=ctx.exact,
        reason="" if ctx.exact else "past only",
        kernel=step,
        stride=step,
        padding=(0, 0),
    )
    return pool_taps(ctx, y, kind, ages, False, True, False, (0, 0), False, out, timing)


def adaptive_space(x: torch.Tensor, kind: str, lead: int, size: tuple[int, ...]) -> torch.Tensor:
    """An adaptive pool inside the frame; a global one is a plain reduction."""
    if all(length == 1 for length in size):
        dims = list(range(lead + 1, x.dim()))
        return x.mean(dims, keepdim=True) if kind == "mean" else x.amax(dims, keepdim=True)
    lengths = [int(length) for length in x.shape[lead + 1 :]]
    if all(length % wanted == 0 for length, wanted in zip(lengths, size, strict=True)):
        names = {"mean": "avg_pool", "max": "max_pool"}
        steps = tuple(length // wanted for length, wanted in zip(lengths, size, strict=True))
        return spaced(x, f"{names[kind]}{len(size)}d", lead, {"kernel_size": steps, "stride": steps})
    for at, (length, wanted) in enumerate(
        zip(lengths, size, strict=True)
    ):  # bins of uneven size, one dimension after another
        dim = lead + 1 + at
        bins = [(index * length // wanted, -(-(index + 1) * length // wanted)) for index in range(wanted)]
        parts = [x.narrow(dim, start, stop - start) for start, stop in bins]
        x = torch.cat(
            [part.mean(dim, keepdim=True) if kind == "mean" else part.amax(dim, keepdim=True) for part in parts], dim
        )
    return x


@converter(aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
def adaptive_max_pool(ctx: Context, x: Value, size: list[int]) -> tuple[Value, None]:
    return adaptive(ctx, x, "max", list(size)), None

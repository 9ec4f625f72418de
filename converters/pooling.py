"""Pools over space and time: sliding, global, adaptive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from dissect.context import Context, Refused, Value
from dissect.converters.convolution import spread, strided
from dissect.global_pool import pool_time
from dissect.ledger import plain_axis
from dissect.origins import reached
from dissect.primitives import WindowReduce
from dissect.registry import converter, patient

aten = torch.ops.aten
_GROWING = (
    *(aten.conv_transpose1d.default, aten.conv_transpose3d.input),
    *(aten.upsample_nearest1d.default, aten.upsample_nearest3d.default, aten._upsample_nearest_exact3d.default),
    *(aten.upsample_linear1d.default, aten.upsample_trilinear3d.default),
    *(
        aten.upsample_nearest3d.vec,
        aten.upsample_trilinear3d.vec,
        aten.upsample_nearest1d.vec,
        aten.upsample_linear1d.vec,
    ),
)


@converter(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
def max_pool(
    ctx: Context, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Value:
    def space(dims: int, pick: Any) -> tuple[Any, dict[str, Any]]:
        size, step, pads, gap = (pick(setting) for setting in settings)
        return f"max_pool{dims}d", {
            "kernel_size": size,
            "stride": step,
            "padding": pads,
            "dilation": gap,
            "ceil_mode": ceil_mode,
        }

    settings = pool_settings(ctx, x, kernel, stride, padding, dilation)
    return pool(ctx, x, "max", settings, ceil_mode, True, None, space)


@converter(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def avg_pool(
    ctx: Context,
    x: Value,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    def space(dims: int, pick: Any) -> tuple[Any, dict[str, Any]]:
        size, step, pads, _ = (pick(setting) for setting in settings)
        extra: dict[str, Any] = {"divisor_override": 1} if divisor_override and dims > 1 else {}
        return f"avg_pool{dims}d", {
            "kernel_size": size,
            "stride": step,
            "padding": pads,
            "ceil_mode": ceil_mode,
            "count_include_pad": count_include_pad or bool(divisor_override),
            **extra,
        }

    settings = pool_settings(ctx, x, kernel, stride, padding, 1)
    return pool(ctx, x, "mean", settings, ceil_mode, count_include_pad, divisor_override, space)


def pool_settings(
    ctx: Context, x: Value, kernel: Any, stride: Any, padding: Any, dilation: Any
) -> tuple[list[int], ...]:
    dims = {"1d": 1, "2d": 2, "3d": 3}[str(ctx.node.target).split(".")[1][-2:]]
    size = spread(kernel, dims)
    step = list(size) if not isinstance(stride, int) and not stride else spread(stride, dims)
    settings = size, step, spread(padding, dims), spread(dilation, dims)
    if len(x.shape) == dims + 1 and (size[0], step[0], settings[2][0]) == (1, 1, 0):  # (1, h, w) of (N * T, C, H, W)
        return tuple(setting[1:] for setting in settings)
    if len(x.shape) != dims + 2:
        raise Refused("a pool of an input without a batch dimension", "give the network clips with a batch dimension")
    return settings


def pool(
    ctx: Context,
    x: Value,
    kind: str,
    settings: tuple[list[int], ...],
    ceil_mode: bool,
    include_pad: bool,
    divisor: int | None,
    space: Any,
) -> Value:
    """A sliding pool: inside the frame first, then over time (maxima and means part that way)."""
    kernel, stride, padding, dilation = settings
    dims = len(kernel)
    channels = len(x.shape) - dims
    sliding = any(
        axis.is_time and 1 < size < axis.size and pad == 0 and not ceil_mode
        for axis, size, pad in zip(x.axes.dims[channels:], kernel, padding, strict=True)
    )
    if not (x.clock.first and sliding):
        x = ctx.sure(x)
    spatial = list(range(channels, len(x.shape)))
    for dim in spatial:
        if not x.axes[dim].plain and not x.axes[dim].is_time:
            raise Refused("a pool over an axis that merges time with space")
    time = next((at for at, dim in enumerate(spatial) if x.axes[dim].is_time), None)
    inner = [at for at in range(dims) if at != time]
    for at in inner:
        if x.shape[channels + at] == ctx.out_shape[channels + at] == 1 and padding[at] == 0 and not divisor:
            kernel[at] = stride[at] = 1  # of a single entry nothing is made, whatever a ceil_mode looks at behind it
    axes = x.axes.sized((*x.shape[:channels], *ctx.out_shape[channels:]))

    def pick(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(values[at] for at in inner)

    trivial = all((kernel[at], stride[at], padding[at]) == (1, 1, 0) for at in inner)
    scale = divisor or 1.0
    if divisor and not trivial and len(inner) == 1:  # there is no divisor for a pool over one dimension
        if ceil_mode:
            raise Refused("a pool over one dimension of space with divisor_override and ceil_mode")
        scale = divisor / kernel[inner[0]]
    y = x
    frame_axes = axes if time is None else axes.replace(channels + time, x.axes[channels + time])
    if not trivial:
        target, options = space(len(inner), pick)
        clock = x.clock.but(fill=x.clock.fill if x.clock.fill == 0.0 else None)
        lead = len(x.axes.frame) - len(inner)
        y = ctx.call(spaced, (x, target, lead, options), frame_axes, clock, x.dtype)
    if time is None:
        return ctx.call(torch.div, (y, scale), axes, y.timing, y.dtype) if divisor else y
    size, step, pad, gap = kernel[time], stride[time], padding[time], dilation[time]
    positions = x.axes[channels + time].size
    if size == positions and pad == 0 and gap == 1 and size > 1 and not (step == size and grows(ctx.node)):
        total = pool_time(ctx, y, "sum" if divisor else kind, axes)
        total = ctx.reframe(total, axes.replace(channels + time, plain_axis(1)))
        axes = total.axes
        return ctx.call(torch.div, (total, scale), axes, total.timing, total.dtype) if divisor else total
    facts: dict[str, Any] = {"kernel": size, "stride": step, "padding": (pad, pad), "dilation": gap}
    clock = y.clock
    reach = (size - 1) * gap
    add = 2 * pad - reach - 1
    if ceil_mode:  # the last window starts inside the clip or its left padding
        add = min(add + step - 1, pad - 1)
    length = clock.length.then(add, step)
    if not ctx.exact:
        taps = ctx.settings.get("depth", 1 if ctx.preset == "d3d" and not ctx.in_head else size)
        if (size, step) != (1, 1):
            reasons = [f"{taps} of {size} frames"] if taps < size else ["past only"] if size > 1 else []
            reasons += ["temporal stride removed"] if step > 1 else []
            ctx.row(
                "every frame" if taps == 1 else f"pool over {taps} frames",
                exact=False,
                reason=", ".join(reasons),
                **facts,
            )
        size = min(taps, size)
        reach = (size - 1) * gap
        ages = [index * gap * clock.stride for index in reversed(range(size))]
        timing = strided(ctx, clock.plain(), step).but(length=length, old=clock.old + ages[0], nonneg=clock.nonneg)
        widen = (0, 0)
        delay = 0
    else:
        if (size, step) != (1, 1):
            ctx.row(
                f"pool over {size} frame{'s' * (size > 1)}"
                + (f", {gap * clock.stride} apart" if clock.stride * gap > 1 else ""),
                exact=True,
                **facts,
            )
        ages = [index * gap * clock.stride for index in reversed(range(size))]
        delay = clock.delay + clock.stride * (reach - pad)
        if clock.first:
            delay, ages, clock = clock.read(delay, ages)
        elif delay < 0:
            y, delay = ctx.delay(ctx.gate(y), -delay), 0
            clock = y.clock
        timing = clock.plain().but(
            stride=clock.stride * step,
            delay=delay,
            length=length,
            old=clock.old + ages[0],
            removed=clock.removed * step,
            nonneg=clock.nonneg,
        )
        widen = (pad, pad)
    y = pool_taps(
        ctx, y, kind, ages, pad > 0 or ceil_mode, include_pad or not pad, ceil_mode, widen, bool(divisor), axes, timing
    )
    return ctx.call(torch.div, (y, scale), axes, timing, y.dtype) if divisor else y


patient(
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default),
)


def grows(node: fx.Node) -> bool:
    """Whether its time is made longer again further on, as in a decoder: then its one position is no end of time."""
    return any(user.target in _GROWING and longer(user) for user in reached(node.users, lambda at: at.users))


def longer(node: fx.Node) -> bool:
    """Whether an operator on clips ``(N, C, T, ...)`` gives more positions than it gets: ``nn.Upsample(1)`` does not."""
    after, before = node.meta["val"].shape, node.args[0].meta["val"].shape  # type: ignore[union-attr]
    return bool(after[2] > before[2])


def pool_taps(
    ctx: Context,
    y: Value,
    kind: str,
    ages: list[int],
    edges: bool,
    include_pad: bool,
    ceil_mode: bool,
    widen: tuple[int, int],
    summed: bool,
    axes: Any,
    timing: Any,
) -> Value:
    """The temporal part of a pool over the given ages; ``edges``: some windows look past the clip."""
    clock = y.clock
    if len(ages) == 1:
        return Value(y.node, axes, timing, y.dtype)
    extra: dict[str, Any] = {}
    if kind == "max":
        # Before position 0 fresh caches hold zeros; a zero padding of the network's own (fill) counts as a value.
        open_ends = edges or (not ctx.exact and (clock.fill != 0.0 or clock.padding == (0, 0)))
        hollow = ctx.exact and widen[0] > 0 and ages[-2] - ages[-1] > clock.stride  # no tap need be in a short clip
        zeros_do = clock.nonneg and not hollow
        if open_ends and zeros_do and ctx.exact:
            y = ctx.gate(y)
        elif open_ends and not zeros_do:
            extra["masks"] = tuple(ctx.inside(clock, age) for age in ages)
        if hollow:
            extra["here"] = ctx.inside(timing)
        reduce = WindowReduce("max", ages)
    else:
        if edges or not ctx.exact:
            y = ctx.gate(y)
        divisor = 1.0 if summed else float(len(ages))
        if not summed and (not include_pad or (ceil_mode and ctx.exact)):
            gap = ages[-2] - ages[-1] if len(ages) > 1 else clock.stride
            if gap == clock.stride:
                extra["count"] = ctx.inside(clock, positions=len(ages), widen=widen if include_pad else (0, 0))
                divisor = 1.0
        if "count" not in extra:  # a mean of what was seen has no use for a filling
            y = ctx.filled(y)
        reduce = WindowReduce("mean", ages, divisor)
    history = ctx.history(y, ages[0])
    return ctx.primitive("pool", reduce, (history,), axes, timing, y.dtype, **extra)


def spaced(x: torch.Tensor, name: str, lead: int, options: dict[str, Any]) -> torch.Tensor:
    """A spatial pool of a frame tensor with ``lead`` dimensions before its spatial ones."""
    target = getattr(F, name)
    if lead == 1:
        return target(x, **options)
    if lead == 0:
        return target(x.unsqueeze(1), **options).squeeze(1)
    y = target(x.flatten(0, lead - 1), **options)
    return y.reshape(*x.shape[:lead], *y.shape[1:])

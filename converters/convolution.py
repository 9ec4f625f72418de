"""Convolutions, over space, over time, or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dissect.context import Context, Refused, Value
from dissect.converters.crowded import crowded, grouped, lifted, rowwise
from dissect.converters.linear import points
from dissect.converters.stacked import stacked_conv
from dissect.convolution import FrameConv, TemporalConv
from dissect.primitives import WindowReduce
from dissect.registry import converter, patient

aten = torch.ops.aten


def spread(value: int | Sequence[int], dims: int) -> list[int]:
    """ATen's short form of a setting: one number stands for every dimension."""
    given = [value] if isinstance(value, int) else list(value)
    return given * dims if len(given) == 1 else given


@converter(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def conv(
    ctx: Context,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    dims = len(weight.shape) - 2
    pads = [(side, side) for side in spread(padding, dims)]
    return convolve(ctx, x, weight, bias, spread(stride, dims), pads, spread(dilation, dims), groups)


@converter(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
def conv_named(
    ctx: Context,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: str = "valid",
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    dims = len(weight.shape) - 2
    spacing = spread(dilation, dims)
    totals = [
        (size - 1) * step if padding == "same" else 0 for size, step in zip(weight.shape[2:], spacing, strict=True)
    ]
    return convolve(
        ctx,
        x,
        weight,
        bias,
        spread(stride, dims),
        [(total // 2, total - total // 2) for total in totals],
        spacing,
        groups,
    )


@converter(aten.convolution.default)
def convolution(
    ctx: Context,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Value:
    if transposed:
        from dissect.converters.transposed import conv_transpose

        return conv_transpose(ctx, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(ctx, x, weight, bias, stride, padding, dilation, groups)


def convolve(
    ctx: Context,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: list[int],
    padding: list[tuple[int, int]],
    dilation: list[int],
    groups: int,
    out: Sequence[int] = (),
) -> Value:
    """A convolution whose input may carry time in one of its kernel's dimensions, merged with the batch, or not at all."""
    dims = len(weight.shape) - 2
    if len(x.shape) != dims + 2:
        raise Refused(
            "a convolution of an input without a batch dimension", "give the network clips with a batch dimension"
        )
    if not weight.constant or (bias is not None and not bias.constant):
        raise Refused(
            "a convolution whose kernel is computed from the clip", "write it as a sum of weighted and shifted frames"
        )
    stacked = "T" in x.axes[1].kinds
    for dim, axis in enumerate(x.axes.dims):
        point = dim > 1 and (weight.shape[dim], stride[dim - 2], padding[dim - 2]) == (1, 1, (0, 0))
        if dim and not axis.plain and not (dim == 1 and stacked) and not (dim > 1 and axis.is_time) and not point:
            names = dict.fromkeys({"N": "the batch", "T": "time"}.get(kind, "space") for kind in axis.kinds)
            raise Refused(f"a convolution over an axis that merges {' and '.join(names)}")
    if crowded(x) and not stacked:
        return convolve_crowd(ctx, x, weight, bias, stride, padding, dilation, groups)
    time = next((dim - 2 for dim in range(2, dims + 2) if x.axes[dim].is_time), None)
    space = [dim for dim in range(dims) if dim != time]
    if not x.clock.first or time is None or padding[time] != (0, 0) or weight.shape[2 + time] == 1:
        x = ctx.sure(x)
    if bias is not None and (time is None or (weight.shape[2 + time] == 1 and padding[time] == (0, 0))):
        x = ctx.settled(x)  # a bias is what this layer makes of a padding before the stream
    settings: dict[str, Any] = {
        "time": time,
        "stride": [stride[dim] for dim in space],
        "padding": [padding[dim] for dim in space],
        "dilation": [dilation[dim] for dim in space],
        "groups": groups,
    }
    if stacked and crowded(x):
        return points(ctx, x, weight, bias, settings["padding"], groups)
    if stacked:
        return stacked_conv(ctx, x, weight, bias, settings)
    axes = x.axes.replace(1, type(x.axes[1])()).sized((x.shape[0], *(out or ctx.out_shape[1:])))
    if time is None:
        return build(ctx, FrameConv, x, x, weight, bias, axes, x.clock.plain(), settings)
    kernel, step, spacing, pads = weight.shape[2 + time], stride[time], dilation[time], padding[time]
    facts, clock = {"kernel": kernel, "stride": step, "padding": pads, "dilation": spacing}, x.clock
    if kernel == 1 and pads == (0, 0):
        if step > 1:
            ctx.row(
                "temporal stride removed",
                exact=ctx.exact,
                reason="" if ctx.exact else "every frame is computed",
                **facts,
            )
        timing = strided(ctx, clock.plain(), step).but(length=clock.length.then(-1, step))
        return build(ctx, FrameConv, x, x, weight, bias, axes, timing, settings)
    reach = (kernel - 1) * spacing
    left, right = pads[0] + clock.padding[0], pads[1] + clock.padding[1]
    causal = not ctx.exact and left >= reach and right <= 0
    kept = ctx.depth(kernel)
    fold: list[int] | None = None
    if kept < kernel or ctx.preset == "d3d":
        centre = kernel - 1 if ctx.preset == "causal" or causal or ctx.exact else kernel // 2
        newest = max(centre, kept - 1)
        fold = [min(max(tap - newest, 1 - kept), 0) + kept - 1 for tap in range(kernel)]
    taps = kernel if fold is None else kept
    added = ctx.skip == "sum" and taps > 1
    ages = [(taps - 1 - tap) * spacing * clock.stride for tap in range(taps)]
    length = clock.length.then(pads[0] + pads[1] - reach - 1, step)
    if not ctx.exact:
        timing = strided(ctx, clock.plain(), step).but(length=length, old=clock.old + ages[0])
        whole = taps == kernel and causal and step == 1
        if left >= reach and right > 0 and step == 1:  # all taps lie in the past: a crop of the rest makes it causal
            timing = timing.but(spare=(right, len(ctx.rows) if taps == kernel else -1))
        decision = f"{taps} of {kernel} taps" if taps < kernel else f"{taps} taps, past only"
        ctx.row(
            f"the sum of {taps} frames, 1 of {kernel} taps" if added else decision,
            exact=whole,
            reason="" if whole else _why(taps, kernel, step, causal),
            **facts,
        )
    else:
        delay = clock.delay + clock.stride * (reach - pads[0])
        if pads != (0, 0):
            x = ctx.gate(x)
        if clock.first:
            delay, ages, clock = clock.read(delay, ages)
        elif delay < 0:
            x, delay = ctx.delay(x, -delay), 0
            clock = x.clock
        timing = clock.plain().but(
            stride=clock.stride * step,
            delay=delay,
            length=length,
            old=clock.old + ages[0],
            removed=clock.removed * step,
        )
        whole = taps == kernel
        decision = f"{taps} taps" + (f", {spacing * clock.stride} frames apart" if spacing * clock.stride > 1 else "")
        ctx.row(decision, exact=whole, reason="" if whole else f"{taps} of {kernel} taps by override", **facts)
    if taps == 1:
        return build(ctx, FrameConv, x, x, weight, bias, axes, timing, settings, fold)
    known = ctx.history(ctx.filled(x), ages[0])
    if added:
        total = ctx.primitive("skip", WindowReduce("sum", ages), (known,), x.axes, clock.plain(), x.dtype)
        return build(ctx, FrameConv, x, total, weight, bias, axes, timing, settings, [0] * kernel, taps)
    return build(ctx, TemporalConv, x, known, weight, bias, axes, timing, {**settings, "ages": ages}, fold)


def convolve_crowd(
    ctx: Context,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: list[int],
    padding: list[tuple[int, int]],
    dilation: list[int],
    groups: int,
) -> Value:
    """A convolution of rows that carry more than the batch."""
    dims = len(weight.shape) - 2
    time = next((dim for dim in range(dims) if x.axes[dim + 2].is_time), None)
    if time is None or (weight.shape[2 + time] == 1 and padding[time] == (0, 0)):
        return rowwise(ctx, x, lambda y: convolve(ctx, y, weight, bias, stride, padding, dilation, groups))
    out, count = ctx.out_shape[1:], x.axes[0].space
    if dims < 3:

        def over(y: Value, taps: Value) -> Value:
            shape = (out[0], count, *out[1:])
            return convolve(ctx, y, taps, bias, [1, *stride], [(0, 0), *padding], [1, *dilation], groups, shape)

        return lifted(ctx, x, weight, over)

    def beside(y: Value, taps: Value, shared: Value | None) -> Value:
        shape = (count * out[0], *out[1:])
        return convolve(ctx, y, taps, shared, stride, padding, dilation, groups * count, shape)

    return grouped(ctx, x, weight, bias, beside)


def strided(ctx: Context, timing: Any, step: int) -> Any:
    """The timing after a temporal stride: kept as spacing, or, in ``d3d``, removed for good."""
    ctx.doubt(timing if step > 1 else None)  # the last position that is taken need not be the newest
    spacing = 1 if ctx.preset == "d3d" else timing.stride * step
    return timing.but(stride=spacing, removed=timing.removed * step, spare=(0, -1))


def _why(taps: int, kernel: int, step: int, causal: bool) -> str:
    reasons = ["dropped taps folded"] if taps < kernel else [] if causal else ["taps moved into the past"]
    if step > 1:
        reasons.append("temporal stride removed")
    return ", ".join(reasons) or "right padding removed"


def folded(weight: torch.Tensor, time: int, fold: list[int], frames: int = 1) -> torch.Tensor:
    """The kernel with each tap added to the one it is folded into; a still scene gives what it gave before.

    ``frames``: how many of them are added up before the kernel meets them; it gives each its share.
    """
    shape = list(weight.shape)
    shape[2 + time] = max(fold) + 1
    index = torch.tensor(fold, device=weight.device)
    kept = weight.new_zeros(shape).index_add(2 + time, index, weight)
    return kept if frames == 1 else kept / frames


def build(
    ctx: Context,
    kind: Any,
    x: Value,
    known: Any,
    weight: Value,
    bias: Value | None,
    axes: Any,
    timing: Any,
    settings: dict[str, Any],
    fold: list[int] | None = None,
    frames: int = 1,
) -> Value:
    """Emit the convolution: with its own weights at the layer's path, or with weights passed as arguments."""

    def module(weight: torch.Tensor | None, bias: torch.Tensor | None) -> FrameConv:
        if weight is not None and fold is not None:
            weight = folded(weight, settings["time"], fold, frames)
        return kind(weight, bias, **settings)

    layer = ctx.layer(module, {"weight": weight, "bias": bias})
    if layer is not None:
        return ctx.module(*layer, (known,), axes, timing, x.dtype)
    how = (weight.node, settings["time"], fold, frames)
    node = weight.node if fold is None else ctx.graph.call_function(folded, how)
    return ctx.primitive("conv", module(None, None), (known, node, bias), axes, timing, x.dtype)


patient(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)

"""Transposed convolutions, over space, over time, or both.

Over time with stride f, output position j of the original is the sum of the taps k with
``(j + p - k * dilation) % f == 0``, each on the input position ``(j + p - k * dilation) / f``. In the stream that is a
plain convolution over the last frames, once every frame between two positions is set to zero: the zeros take out the
taps of the other phases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dissect.context import Context, Refused, Value
from dissect.converters.convolution import spread
from dissect.converters.crowded import crowded, grouped, lifted, rowwise
from dissect.converters.upsampling import spaced
from dissect.convolution import FrameConv, TemporalConv
from dissect.ledger import Axis
from dissect.primitives import Gate
from dissect.registry import converter
from dissect.timing import Timing

aten = torch.ops.aten


@converter(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def conv_transpose(
    ctx: Context,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    out: Sequence[int] = (),
) -> Value:
    dims = len(weight.shape) - 2
    if len(x.shape) != dims + 2:
        raise Refused(
            "a transposed convolution of an input without a batch dimension",
            "give the network clips with a batch dimension",
        )
    if not weight.constant or (bias is not None and not bias.constant):
        raise Refused("a transposed convolution whose kernel is computed from the clip")
    for dim, axis in enumerate(x.axes.dims[1:], 1):
        if not axis.plain and not (dim > 1 and axis.is_time):
            raise Refused("a transposed convolution over an axis that merges time with others")
    steps, pads, extra, gaps = (spread(setting, dims) for setting in (stride, padding, output_padding, dilation))
    if crowded(x):
        return crowd_transpose(ctx, x, weight, bias, steps, pads, extra, groups, gaps)
    time = next((dim - 2 for dim in range(2, dims + 2) if x.axes[dim].is_time), None)
    space = [dim for dim in range(dims) if dim != time]
    settings: dict[str, Any] = {
        "time": time,
        "stride": [steps[dim] for dim in space],
        "padding": [(pads[dim], pads[dim]) for dim in space],
        "dilation": [gaps[dim] for dim in space],
        "groups": groups,
        "transposed": True,
        "output_padding": [extra[dim] for dim in space],
    }
    axes = x.axes.replace(1, Axis()).sized((x.shape[0], *(out or ctx.out_shape[1:])))
    x = ctx.settled(x)
    if time is None or (weight.shape[2 + time], steps[time], pads[time], extra[time]) == (1, 1, 0, 0):
        return build(ctx, x, [0], weight, bias, axes, x.clock.plain(), settings)
    kernel, step, pad, gap = weight.shape[2 + time], steps[time], pads[time], gaps[time]
    reach = (kernel - 1) * gap
    clock = x.clock
    length = clock.length.then(reach + extra[time] - 2 * pad - step, 1, step)
    facts: dict[str, Any] = {"kernel": kernel, "stride": step, "padding": (pad, pad), "dilation": gap}
    if not ctx.exact:
        return folded(ctx, x, weight, bias, axes, clock.plain().but(length=length), settings, step, pad, gap, facts)
    frames = spaced(clock.stride, step)
    if step == 1:
        x = ctx.gate(x)
    else:
        due = ctx.inside(clock, phase=True)
        x = ctx.primitive("gate", Gate(), (x, due), x.axes, clock.but(fill=0.0), x.dtype)
    ages = [tap * gap * frames for tap in reversed(range(kernel))]
    timing = clock.plain().but(
        stride=frames,
        delay=clock.delay + pad * frames,
        length=length,
        old=clock.old + ages[0],
        removed=max(1, clock.removed // step),
    )
    ctx.row(f"{kernel} tap{'s' * (kernel > 1)}" + (f" by {step} phases" if step > 1 else ""), exact=True, **facts)
    return build(ctx, x, ages, weight, bias, axes, timing, settings)


def crowd_transpose(
    ctx: Context,
    x: Value,
    weight: Value,
    bias: Value | None,
    steps: list[int],
    pads: list[int],
    extra: list[int],
    groups: int,
    gaps: list[int],
) -> Value:
    """A transposed convolution of rows that carry more than the batch."""
    dims = len(steps)
    if not any(x.axes[dim + 2].is_time for dim in range(dims)):
        return rowwise(ctx, x, lambda y: conv_transpose(ctx, y, weight, bias, steps, pads, extra, groups, gaps))
    out, count = ctx.out_shape[1:], x.axes[0].space
    if dims < 3:

        def over(y: Value, taps: Value) -> Value:
            shape = (out[0], count, *out[1:])
            return conv_transpose(ctx, y, taps, bias, [1, *steps], [0, *pads], [0, *extra], groups, [1, *gaps], shape)

        return lifted(ctx, x, weight, over)
    shape = (count * out[0], *out[1:])
    return grouped(
        ctx,
        x,
        weight,
        bias,
        lambda y, w, b: conv_transpose(ctx, y, w, b, steps, pads, extra, groups * count, gaps, shape),
    )


def folded(
    ctx: Context,
    x: Value,
    weight: Value,
    bias: Value | None,
    axes: Any,
    timing: Timing,
    settings: dict[str, Any],
    step: int,
    pad: int,
    gap: int,
    facts: dict[str, Any],
) -> Value:
    """Without the stride that it makes good, it is a convolution: taps on positions of the past, a mean over phases."""
    if timing.removed % step:
        raise Refused(
            f"a transposed convolution of stride {step} over time where no stride of {step} came before: "
            "a step cannot give more outputs than it is given frames",
            "upsample by what strides took out before, or after the stream",
        )
    kernel = facts["kernel"]
    # Each tap serves one phase only, and there meets the position this far ahead of the output's own:
    places = [-((tap * gap - pad) // step) for tap in range(kernel)]
    newest = places[0] if ctx.preset == "causal" else min(places[0], 0)
    kept = min(ctx.depth(places[0] - places[-1] + 1), newest - places[-1] + 1) if newest >= places[-1] else 1
    if kept > 1 and ctx.skip == "sum":
        raise Refused(
            "a transposed convolution has no sum of frames", f"leave it out: --set '{ctx.path}: skip=concat' (or none)"
        )
    fold = [max(0, min(newest - place, kept - 1)) for place in places]
    ages = [age * timing.stride for age in reversed(range(kept))]
    reasons = ["taps moved into the past"] if places[0] > newest or (ctx.preset == "causal" and newest) else []
    reasons += ["dropped taps folded"] if kept < newest - places[-1] + 1 else []
    reasons += [f"mean over {step} phases, since the stride before was removed"] if step > 1 else []
    stride = 1 if ctx.preset == "d3d" else spaced(timing.stride, step)
    timing = timing.but(stride=stride, removed=timing.removed // step, old=timing.old + ages[0])
    reason = ", ".join(reasons) or "what reaches beyond the clip's end removed"
    ctx.row(f"{kept} position{'s' * (kept > 1)} of the past", exact=False, reason=reason, **facts)
    return build(ctx, x, ages, weight, bias, axes, timing, settings, (fold, step))


def averaged(weight: Tensor, time: int, fold: list[int], phases: int) -> Tensor:
    """The kernel by positions, newest first: the sum of the taps that meet each, over the number of phases."""
    shape = list(weight.shape)
    shape[2 + time] = max(fold) + 1
    index = torch.tensor(fold, device=weight.device)
    return weight.new_zeros(shape).index_add(2 + time, index, weight) / phases


def build(
    ctx: Context,
    x: Value,
    ages: list[int],
    weight: Value,
    bias: Value | None,
    axes: Any,
    timing: Timing,
    settings: dict[str, Any],
    fold: tuple[list[int], int] | None = None,
) -> Value:
    """Emit the convolution over the values of the given ages, with the layer's own weights where it has some."""
    single = len(ages) == 1

    def module(weight: Tensor | None, bias: Tensor | None) -> FrameConv:
        if weight is not None and fold is not None:
            weight = averaged(weight, settings["time"], *fold)
        return FrameConv(weight, bias, **settings) if single else TemporalConv(weight, bias, ages=ages, **settings)

    source = x if single else ctx.history(ctx.filled(x), ages[0])
    layer = ctx.layer(module, {"weight": weight, "bias": bias})
    if layer is not None:
        return ctx.module(*layer, (source,), axes, timing, x.dtype)
    node = weight.node if fold is None else ctx.graph.call_function(averaged, (weight.node, settings["time"], *fold))
    return ctx.primitive("conv", module(None, None), (source, node, bias), axes, timing, x.dtype)

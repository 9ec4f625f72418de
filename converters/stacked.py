"""Frames stacked on channels: a convolution over ``T * C`` channels looks at the whole clip at once, as a window of its frames."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dissect.context import Context, Refused, Value
from dissect.convolution import FrameConv, TemporalConv
from dissect.ledger import Axis, Factor, plain_axis
from dissect.meeting import side_by_side


class StackedConv(TemporalConv):
    """A convolution whose input channels are frames times features, in either order; its weight keeps that layout."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None, *, before: int, after: int, **settings: Any) -> None:
        super().__init__(weight, bias, **settings)
        self.before, self.after = before, after

    def taps(self, weight: Tensor) -> Tensor:
        """One kernel a frame, oldest first: ``(frames, out, features, *spatial)``."""
        parts = weight.unflatten(1, (self.before, len(self.ages), self.after))
        return parts.movedim(2, 0).flatten(2, 3)


def stacked_conv(ctx: Context, x: Value, weight: Value, bias: Value | None, settings: dict[str, Any]) -> Value:
    """A convolution of an input with time in its channels: a window of all positions."""
    from dissect.converters.convolution import build  # which asks this file for stacked frames

    factors = x.axes[1].factors
    at = next(index for index, factor in enumerate(factors) if factor.kind == "T")
    if any("T" in axis.kinds for axis in x.axes.dims[2:]) or any(factor.kind not in "TS" for factor in factors):
        raise Refused(
            "a convolution of frames that are stacked on channels with others",
            "convolve every frame by itself, or all together",
        )
    positions = factors[at].size
    if positions == 1 and ctx.frames == 1:
        raise Refused("a convolution over the channels of a clip of one frame", "give the example more frames")
    if settings["groups"] != 1 or positions == 1:  # each group sees some of the frames: all are features of the newest
        x = side_by_side(ctx, ctx.sure(x), 1)
        axes = x.axes.replace(1, plain_axis(1)).sized((x.shape[0], *ctx.out_shape[1:]))
        return build(ctx, FrameConv, x, x, weight, bias, axes, x.clock.plain(), settings)
    before = after = 1
    for index, factor in enumerate(factors):
        before *= factor.size if index < at else 1
        after *= factor.size if index > at else 1
    x = ctx.settled(ctx.sure(x))
    if x.axes[1].dropped:  # a frame is one channel, which its frame tensor has to have
        x = ctx.reframe(x, x.axes.replace(1, Axis((*factors, Factor("S", 1)))))
    clock = x.clock
    stride = (
        clock.removed if ctx.preset == "d3d" else clock.stride
    )  # a fixed layer keeps its clip: the same frames, as far apart
    ages = [index * stride for index in reversed(range(positions))]
    axes = x.axes.replace(1, plain_axis(1)).sized((x.shape[0], *ctx.out_shape[1:]))
    timing = clock.plain().but(old=clock.old + ages[0])
    if ctx.exact:
        timing = timing.but(delay=clock.delay + ages[0], length=clock.length.then(-positions))
    ctx.row(
        f"convolution over a window of {positions}",
        exact=ctx.exact,
        reason="" if ctx.exact else "the last positions",
        kernel=positions,
    )
    known = ctx.history(ctx.filled(x), ages[0])

    def kind(weight: Tensor | None, bias: Tensor | None, **given: Any) -> StackedConv:
        return StackedConv(weight, bias, before=before, after=after, **given)

    return build(ctx, kind, x, known, weight, bias, axes, timing, {**settings, "ages": ages})

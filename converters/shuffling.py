"""Shuffles of channels, and between channels and space; inside a frame nothing changes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dissect.context import Context, Refused, Value
from dissect.ledger import Axes, plain_axis
from dissect.registry import converter

aten = torch.ops.aten


@converter(aten.pixel_shuffle.default, aten.pixel_unshuffle.default)
def pixel_shuffle(ctx: Context, x: Value, factor: int) -> Value:
    if any(not axis.plain for axis in x.axes.dims[-3:]):
        raise Refused("a pixel shuffle between time and space", "shuffle channels into height and width only")
    down = ctx.node.target is aten.pixel_unshuffle.default
    axes = Axes((*x.axes.dims[:-3], *map(plain_axis, ctx.out_shape[-3:])))
    return ctx.call(shuffled, (x, down, len(x.axes.frame) - 3, factor), axes, x.clock, x.dtype)


@converter(aten.channel_shuffle.default)
def channel_shuffle(ctx: Context, x: Value, groups: int) -> Value:
    if not x.axes[1].plain or x.axes[0].space > 1:
        raise Refused(
            "a channel shuffle over an axis that merges channels with others", "give it channels of their own"
        )
    return ctx.call(interleaved, (x, groups), x.axes, x.clock, x.dtype)


def shuffled(x: Tensor, down: bool, lead: int, factor: int) -> Tensor:
    """A pixel shuffle, or its inverse, of a frame tensor with ``lead`` dimensions before its channels."""
    target = F.pixel_unshuffle if down else F.pixel_shuffle
    y: Tensor = target(x.flatten(0, lead) if lead else x, factor)
    return y.reshape(*x.shape[: lead + 1], *y.shape[1:]) if lead else y


def interleaved(x: Tensor, groups: int) -> Tensor:
    """Channels dealt out: one of each group in turn."""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, -1).transpose(1, 2).reshape(x.shape)

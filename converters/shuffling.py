"""Shuffles of channels, and between channels and space; inside a frame nothing changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dissect.ledger import Axes, plain_axis
from dissect.registry import converter
from dissect.rewrite import Context, Refused, Value

aten = torch.ops.aten


@converter(aten.pixel_shuffle.default, aten.pixel_unshuffle.default)
def pixel_shuffle(ctx: Context, x: Value, factor: int) -> Value:
    if any(not axis.plain for axis in x.axes.dims[-3:]):
        raise Refused("a pixel shuffle between time and space", "shuffle channels into height and width only")
    target = F.pixel_unshuffle if "unshuffle" in str(ctx.node.target) else F.pixel_shuffle
    axes = Axes((*x.axes.dims[:-3], *map(plain_axis, ctx.out_shape[-3:])))
    return ctx.call(shuffled, (x, target, len(x.axes.frame) - 3, factor), axes, x.clock, x.dtype)


@converter(aten.channel_shuffle.default)
def channel_shuffle(ctx: Context, x: Value, groups: int) -> Value:
    if not x.axes[1].plain or x.axes[0].space > 1:
        raise Refused(
            "a channel shuffle over an axis that merges channels with others", "give it channels of their own"
        )
    return ctx.call(interleaved, (x, groups), x.axes, x.clock, x.dtype)


def shuffled(x: Tensor, target: Any, lead: int, factor: int) -> Tensor:
    """A pixel shuffle of a frame tensor with ``lead`` dimensions before its channels."""
    if lead == 0:
        return target(x, factor)
    y = target(x.flatten(0, lead), factor)
    return y.reshape(*x.shape[: lead + 1], *y.shape[1:])


def interleaved(x: Tensor, groups: int) -> Tensor:
    """Channels dealt out: one of each group in turn."""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, -1).transpose(1, 2).reshape(x.shape)

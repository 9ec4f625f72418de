"""Max pools that say where their maxima stood, and their inverses (SegNet).

A place is counted within a frame. Offline, a 3D pool counts it within the clip; a frame's own places are handed on to
an inverse whose frames are as large, for there the frames before count the same.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dissect.context import Context, Refused, Value
from dissect.converters.convolution import spread
from dissect.converters.picking import matched
from dissect.converters.sorting import pair
from dissect.ledger import Axes, plain_axis
from dissect.registry import converter

aten = torch.ops.aten
_POOLS = (aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)
_FIX = "pool every frame by itself (a temporal kernel of 1), and give the places to the inverse alone"


@converter(*_POOLS)
def max_pool(
    ctx: Context, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> tuple[Value, Value]:
    deep = ctx.node.target is _POOLS[1]
    settings = [spread(given, 2 + deep) for given in (kernel, stride or kernel, padding, dilation)]
    framed(x, 2 + deep)
    if deep and [given[0] for given in settings[:3]] != [1, 1, 0]:
        raise Refused("a pool with indices over time: places in the clip, which a stream does not have", _FIX)
    if deep and any(reader.target is not aten.max_unpool3d.default for reader in readers(ctx.node)):
        raise Refused("places of maxima in the clip, which a stream does not have", _FIX)
    shape = ctx.node.meta["val"][0].shape[-2:]
    axes = Axes((*x.axes.dims[:-2], *(plain_axis(int(size)) for size in shape)))
    return pair(ctx, x, located, (*(tuple(given[-2:]) for given in settings), ceil_mode), axes)


@converter(aten.max_unpool2d.default)
def unpool(ctx: Context, x: Value, places: Value, size: Sequence[int]) -> Value:
    framed(x, 2)
    (x, places), _, timing = matched(ctx, [x, places], -1)
    axes = Axes((*x.axes.dims[:-2], *map(plain_axis, size[-2:])))
    return ctx.call(put_back, (x, places, tuple(size[-2:])), axes, timing.plain(), x.dtype)


@converter(aten.max_unpool3d.default)
def unpool3d(
    ctx: Context, x: Value, places: Value, size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Value:
    framed(x, 3)
    pooled = pooled_by(ctx.node.args[1])
    if pooled is None or size[0] != x.shape[2] or size[1] * size[2] != pooled[-2] * pooled[-1]:
        raise Refused(
            "places of maxima in a clip of another size: a frame's maxima would come to lie in other frames",
            "give the inverse the indices of the pool itself, and the pool's input size",
        )
    (x, places), _, timing = matched(ctx, [x, places], -1)
    axes = Axes((*x.axes.dims[:-2], *map(plain_axis, size[1:])))
    return ctx.call(put_back, (x, places, tuple(size[1:])), axes, timing.plain(), x.dtype)


def framed(x: Value, dims: int) -> None:
    """Refuses what is no picture a frame: ``(N * T, C, H, W)``, or, with three dimensions, ``(N, C, T, H, W)``."""
    if len(x.shape) != dims + 2:
        raise Refused("a pool of an input without a batch dimension", "give the network clips with a batch dimension")
    if dims == 3 and not x.axes[2].is_time:
        raise Refused(
            "a pool with indices whose third dimension is not time", "merge time with the batch, and pool in 2D"
        )
    if not x.axes[1].plain or any(not axis.plain for axis in x.axes.dims[-2:]):
        raise Refused("a pool with indices over time: places in the clip, which a stream does not have", _FIX)


def readers(node: fx.Node) -> list[fx.Node]:
    """Who reads a pool's places."""
    places = (user for user in node.users if user.target is operator.getitem and user.args[1] == 1)
    return [reader for place in places for reader in place.users]


def pooled_by(places: Any) -> list[int] | None:
    """The shape of what the pool with these places took in; None where they come from elsewhere."""
    pool = places.args[0] if isinstance(places, fx.Node) and places.target is operator.getitem else None
    if not isinstance(pool, fx.Node) or pool.target not in _POOLS or not isinstance(pool.args[0], fx.Node):
        return None
    return [int(size) for size in pool.args[0].meta["val"].shape]


def located(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    """Maxima and their places, of frame tensors ``(rows, ..., C, H, W)``."""
    lead = x.shape[1:-2]
    each = x.flatten(0, -4) if len(lead) > 1 else x
    parts = F.max_pool2d(each, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
    values, places = (part.reshape(-1, *lead, *part.shape[2:]) for part in parts)
    return values, places


def put_back(x: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
    """Each value at its place of a frame of ``size``, zeros elsewhere."""
    lead = x.shape[1:-2]
    values, at = (part.reshape(-1, *lead, part.shape[-2] * part.shape[-1]) for part in (x, places))
    empty = torch.zeros((x.shape[0], *lead, size[0] * size[1]), dtype=x.dtype, device=x.device)
    return empty.scatter(-1, at, values).reshape(-1, *lead, *size)

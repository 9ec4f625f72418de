"""Patches and points of a frame: ``F.grid_sample``, ``F.unfold``, ``F.fold`` of frames merged with the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dissect.context import Context, Refused, Value
from dissect.converters.crowded import crowded, rowwise
from dissect.converters.picking import matched
from dissect.ledger import Axes, plain_axis
from dissect.registry import converter

aten = torch.ops.aten
_MODES = ("bilinear", "nearest", "bicubic")
_PADDINGS = ("zeros", "border", "reflection")


def by_frame(x: Value, what: str) -> None:
    """Refuses where a dimension behind the first is not inside the frame."""
    if any(not axis.plain for axis in x.axes.dims[1:]):
        raise Refused(
            f"{what} that takes time for a dimension of the picture, or for channels",
            "merge time with the batch: x.transpose(1, 2).flatten(0, 1)",
        )


@converter(aten.grid_sampler_2d.default, aten.grid_sampler.default)
def grid_sample(ctx: Context, x: Value, grid: Value, mode: int, padding: int, align: bool) -> Value:
    """Points of a frame, at places that it may give itself."""
    if len(x.shape) != 4:
        raise Refused("points between frames, at times that the clip gives", "sample every frame by itself")
    for value in (x, grid):
        if not value.constant:
            by_frame(value, "a sampling")
    (x, grid), _, timing = matched(ctx, [x, grid], 1)
    axes = Axes((x.axes[0], x.axes[1], grid.axes[1], grid.axes[2]))
    options = (_MODES[mode], _PADDINGS[padding], align)
    return ctx.call(sampled, (x, grid, *options), axes, timing.plain(), x.dtype)


def sampled(x: Tensor, grid: Tensor, mode: str, padding: str, align: bool) -> Tensor:
    """Points of frame tensors; a crowd in front of the channels samples as rows."""
    y = F.grid_sample(x.flatten(0, -4), grid.flatten(0, -4), mode, padding, align)
    return y.reshape(*x.shape[:-2], *y.shape[2:])


@converter(aten.im2col.default)
def im2col(
    ctx: Context,
    x: Value,
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Value:
    """Patches of a frame: ``(N, C, H, W)`` to ``(N, C * kernel, places)``."""
    if len(x.shape) != 4:
        raise Refused("patches of an input without a batch dimension", "give the network clips with a batch dimension")
    by_frame(x, "an unfolding")
    if crowded(x):
        return rowwise(ctx, x, lambda each: im2col(ctx, each, kernel, dilation, padding, stride))
    out = Axes((x.axes[0], *map(plain_axis, ctx.out_shape[1:])))
    return ctx.call(patches, (x, kernel, dilation, padding, stride), out, x.clock, x.dtype)


@converter(aten.col2im.default)
def col2im(
    ctx: Context,
    x: Value,
    size: Sequence[int],
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Value:
    """Patches summed up where they lie on each other: ``(N, C * kernel, places)`` to ``(N, C, H, W)``."""
    if len(x.shape) != 3:
        raise Refused("patches of an input without a batch dimension", "give the network clips with a batch dimension")
    by_frame(x, "a folding")
    if crowded(x):
        return rowwise(ctx, x, lambda each: col2im(ctx, each, size, kernel, dilation, padding, stride))
    out = Axes((x.axes[0], *map(plain_axis, ctx.out_shape[1:])))
    return ctx.call(folded, (x, size, kernel, dilation, padding, stride), out, x.clock, x.dtype)


def patches(
    x: Tensor, kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """``F.unfold``: rows of the patches first, then columns, so that nothing is above rank 4."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
    channels, high, wide = x.shape[1:]
    down, right = (
        (size - gap * (taps - 1) - 1) // step + 1
        for size, gap, taps, step in zip((high, wide), dilation, kernel, stride, strict=True)
    )

    def taps(count: int, gap: int, places: int, step: int) -> list[slice]:
        return [slice(at * gap, at * gap + (places - 1) * step + 1, step) for at in range(count)]

    rows = [x[:, :, tap].reshape(-1, channels, 1, down * wide) for tap in taps(kernel[0], dilation[0], down, stride[0])]
    x = torch.cat(rows, 2).reshape(-1, channels * kernel[0], down, wide)
    columns = [
        x[..., tap].reshape(-1, channels * kernel[0], 1, down * right)
        for tap in taps(kernel[1], dilation[1], right, stride[1])
    ]
    return torch.cat(columns, 2).reshape(-1, channels * kernel[0] * kernel[1], down * right)


def folded(
    x: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Tensor:
    """``F.fold``: columns of the patches first, then rows."""
    channels = x.shape[1] // (kernel[0] * kernel[1])
    down, right = (
        (length + 2 * pad - gap * (taps - 1) - 1) // step + 1
        for length, pad, gap, taps, step in zip(size, padding, dilation, kernel, stride, strict=True)
    )
    x = x.reshape(-1, channels * kernel[0], kernel[1], down * right)
    parts = [x[:, :, tap].reshape(-1, channels * kernel[0] * down, right) for tap in range(kernel[1])]
    x = laid(parts, size[1], dilation[1], padding[1], stride[1])
    x = x.reshape(-1, channels, kernel[0], down * size[1])
    parts = [x[:, :, tap].reshape(-1, channels, down, size[1]).transpose(2, 3) for tap in range(kernel[0])]
    return laid(parts, size[0], dilation[0], padding[0], stride[0]).transpose(2, 3)


def laid(parts: Sequence[Tensor], size: int, gap: int, padding: int, step: int) -> Tensor:
    """The parts, one a tap, on a last dimension of ``size``: ``step`` apart, each tap ``gap`` further, summed up."""
    total = None
    for tap, part in enumerate(parts):
        if step > 1:
            part = F.pad(part.unsqueeze(-1), (0, step - 1)).flatten(-2)[..., : (part.shape[-1] - 1) * step + 1]
        start = tap * gap - padding
        part = F.pad(part, (start, size - start - part.shape[-1]))
        total = part if total is None else total + part
    assert total is not None
    return total

"""Normalisations: by running statistics, by the statistics of the frame, or by those of the clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dissect.context import Context, Refused, Value
from dissect.converters.crowded import crowded, grouped, rowwise
from dissect.converters.statistics import moments
from dissect.meeting import positions, side_by_side
from dissect.registry import converter

aten = torch.ops.aten


class BatchNorm(nn.modules.batchnorm._NormBase):
    """Batch norm of frame tensors of any rank; over ``N * T`` rows it is the original's over ``(N, C, T, ...)``."""

    def __init__(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> None:
        super().__init__(running_mean.numel(), eps, momentum, affine=weight is not None)
        if weight is not None:
            self.weight = nn.Parameter(weight)
        if bias is not None:
            self.bias = nn.Parameter(bias)
        self.running_mean = running_mean
        self.running_var = running_var

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum or 0.0,
            self.eps,
        )


@converter(aten._native_batch_norm_legit_no_training.default)
def batch_norm_running(
    ctx: Context,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value,
    var: Value,
    momentum: float,
    eps: float,
) -> tuple[Value, None, None]:
    x = on_channels(ctx, x)
    if not x.axes[1].plain:
        raise Refused("a batch norm over an axis that merges time with channels")
    if crowded(x):
        factors = (weight, bias, mean, var)
        return rowwise(ctx, x, lambda y: batch_norm_running(ctx, y, *factors, momentum, eps)[0]), None, None

    def kind(**tensors: Tensor | None) -> nn.Module:
        return BatchNorm(**tensors, momentum=momentum, eps=eps)  # type: ignore[arg-type]

    timing = x.clock
    if timing.delay < 0:
        x = ctx.settled(x)
        timing = x.clock
    timing = timing.plain()
    layer = ctx.layer(kind, {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var})
    if layer is not None:
        path, module = layer
        counter = ctx.captured.state.get(f"{path}.num_batches_tracked")
        if counter is not None:
            module.get_buffer("num_batches_tracked").copy_(counter)
        return ctx.module(path, module, (x,), x.axes, timing, x.dtype), None, None
    y = ctx.call(F.batch_norm, (x, mean, var, weight, bias, False, momentum, eps), x.axes, timing, x.dtype)
    return y, None, None


@converter(aten.layer_norm.default)
def layer_norm(
    ctx: Context,
    x: Value,
    shape: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> Value:
    rank = len(x.shape)
    inner = range(rank - len(shape), rank)
    if any("N" in x.axes[dim].kinds for dim in inner):
        raise Refused("a layer norm over the batch", "keep the batch in a dimension of its own")
    if any("T" in x.axes[dim].kinds for dim in inner):
        own = [None if factor is None else ctx.conform(factor, x.axes) for factor in (weight, bias)]
        dims = [kept + 1 for dim in inner if (kept := x.axes.kept(dim)) is not None]
        return normalise(ctx, x, None, dims, prod(axis.space for axis in x.axes.dims[: inner[0]]), eps, *own)
    x = ctx.settled(x)

    def kind(weight: Tensor | None, bias: Tensor | None) -> nn.Module:
        norm = nn.LayerNorm(list(shape), eps, elementwise_affine=weight is not None, bias=bias is not None)
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                setattr(norm, name, nn.Parameter(tensor))
        return norm

    layer = ctx.layer(kind, {"weight": weight, "bias": bias})
    if layer is not None:
        return ctx.module(*layer, (x,), x.axes, x.clock.plain(), x.dtype)
    return ctx.call(F.layer_norm, (x, list(shape), weight, bias, eps), x.axes, x.clock.plain(), x.dtype)


@converter(aten.group_norm.default)
def group_norm(
    ctx: Context,
    x: Value,
    groups: int,
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> Value:
    x = on_channels(ctx, x)
    own_channels(x, "group")
    if crowded(x):
        more = groups * x.axes[0].space
        return grouped(ctx, x, weight, bias, lambda y, w, b: group_norm(ctx, y, more, w, b, eps))
    if any("T" in axis.kinds for axis in x.axes.dims[2:]):
        return normalise(ctx, x, (groups, -1), [2], groups, eps, *channelwise(ctx, x, weight, bias))
    x = ctx.settled(x)

    def kind(weight: Tensor, bias: Tensor) -> nn.Module:
        norm = nn.GroupNorm(groups, len(weight), eps)
        norm.weight, norm.bias = nn.Parameter(weight), nn.Parameter(bias)
        return norm

    layer = None if weight is None or bias is None else ctx.layer(kind, {"weight": weight, "bias": bias})
    if layer is not None:
        return ctx.module(*layer, (x,), x.axes, x.clock.plain(), x.dtype)
    return ctx.call(F.group_norm, (x, groups, weight, bias, eps), x.axes, x.clock.plain(), x.dtype)


@converter(aten.instance_norm.default)
def instance_norm(
    ctx: Context,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value | None,
    var: Value | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn: bool = True,
) -> Value:
    own_channels(x, "instance")
    if crowded(x) and use_input_stats:
        settings = (None, None, True, momentum, eps)
        return grouped(ctx, x, weight, bias, lambda y, w, b: instance_norm(ctx, y, w, b, *settings))
    if not use_input_stats:
        if crowded(x):
            return rowwise(
                ctx, x, lambda y: instance_norm(ctx, y, weight, bias, mean, var, use_input_stats, momentum, eps)
            )
        x = ctx.settled(x)
        return ctx.call(
            F.batch_norm, (x, mean, var, weight, bias, False, momentum, eps), x.axes, x.clock.plain(), x.dtype
        )
    if not any("T" in axis.kinds for axis in x.axes.dims[2:]):
        x = ctx.settled(x)
        return ctx.call(
            F.instance_norm, (x, None, None, weight, bias, True, momentum, eps), x.axes, x.clock.plain(), x.dtype
        )
    return channel_norm(ctx, x, weight, bias, eps)


@converter(aten._native_batch_norm_legit.no_stats)
def batch_norm_without_statistics(
    ctx: Context, x: Value, weight: Value | None, bias: Value | None, training: bool, momentum: float, eps: float
) -> tuple[Value, None, None]:
    """By the statistics of the batch, which is one clip in a stream: each row is a batch of its own."""
    own_channels(x, "batch", crowd=False)
    if all(axis.plain for axis in x.axes.dims[2:]) and x.time is None and prod(x.axes.frame) == x.shape[1]:
        raise Refused(
            "a batch norm without running statistics that normalises by the rows of the batch alone",
            "keep running statistics (track_running_stats=True), and train them",
        )
    return channel_norm(ctx, x, weight, bias, eps), None, None


@converter(aten.rms_norm.default)
def rms_norm(
    ctx: Context, x: Value, shape: Sequence[int], weight: Value | None = None, eps: float | None = None
) -> Value:
    if any(not axis.plain for axis in x.axes.dims[len(x.axes) - len(shape) :]):
        raise Refused("an RMS norm over time", "normalise over channels or space only")
    x = ctx.settled(x)
    return ctx.call(F.rms_norm, (x, list(shape), weight, eps), x.axes, x.clock.plain(), x.dtype)


def on_channels(ctx: Context, x: Value) -> Value:
    """Frames stacked on channels as a window of them: a channel is a feature of one frame."""
    return side_by_side(ctx, ctx.sure(x), 1) if x.axes[1].kinds in ("TS", "ST") else x


def own_channels(x: Value, name: str, crowd: bool = True) -> None:
    if not x.axes[1].plain or (crowded(x) and not crowd):
        raise Refused(
            f"a{'n' * (name[0] in 'aeiou')} {name} norm over an axis that merges channels with others",
            "give it channels of their own",
        )


def channelwise(ctx: Context, x: Value, *factors: Value | None) -> list[Value | None]:
    """Weights a channel, as they multiply a frame tensor."""
    shape = (-1, *[1] * (len(x.axes.frame) - 1))
    return [
        factor and replace(factor, node=ctx.graph.call_function(torch.reshape, (factor.node, shape)))
        for factor in factors
    ]


def channel_norm(ctx: Context, x: Value, weight: Value | None, bias: Value | None, eps: float) -> Value:
    """Every channel by its own mean and variance, over all that is no channel."""
    dims = list(range(2, len(x.axes.frame) + 1))
    return normalise(ctx, x, None, dims, x.shape[1], eps, *channelwise(ctx, x, weight, bias))


def normalise(
    ctx: Context,
    x: Value,
    view: Sequence[int] | None,
    dims: Sequence[int],
    size: int,
    eps: float,
    weight: Value | None,
    bias: Value | None,
) -> Value:
    """Each position by mean and variance over ``dims`` of the frame (seen as ``view``) and time; ``size`` means."""
    x = ctx.settled(x)
    over_time = (positions(x.axes) or 1) > 1
    both, _ = moments(ctx, x, view, dims, size, over_time, back=True)
    timing = x.clock
    if over_time:
        (x, both), timing = ctx.align([x, both])
    return ctx.call(standardised, (x, both, view, list(dims), eps, weight, bias), x.axes, timing.plain(), x.dtype)


def standardised(
    x: Tensor,
    both: Tensor,
    view: Sequence[int] | None,
    dims: Sequence[int],
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    y = x if view is None else x.reshape(x.shape[0], *view)
    shape = [1 if dim in dims else size for dim, size in enumerate(y.shape)]
    mean, variance = (part.reshape(shape) for part in both.chunk(2, 1))
    y = ((y - mean) * torch.rsqrt(variance + eps)).reshape(x.shape)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias

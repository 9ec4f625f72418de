"""Normalisations: by running statistics, or by the statistics of the frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dissect.registry import converter
from dissect.rewrite import Context, Refused, Value

aten = torch.ops.aten


class BatchNorm(nn.modules.batchnorm._NormBase):
    """Batch norm of frame tensors of any rank; over ``N * T`` rows it is the original's over ``(N, C, T, ...)``."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float) -> None:
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
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum or 0.0, self.eps)


@converter(aten._native_batch_norm_legit_no_training.default)
def batch_norm_running(
    ctx: Context, x: Value, weight: Value | None, bias: Value | None, mean: Value, var: Value, momentum: float, eps: float
) -> tuple[Value, None, None]:
    if not x.axes[1].plain:
        raise Refused("a batch norm over an axis that merges time with channels")

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
            module.num_batches_tracked.copy_(counter)  # type: ignore[union-attr,operator]
        return ctx.module(path, module, (x,), x.axes, timing, x.dtype), None, None
    y = ctx.call(F.batch_norm, (x, mean, var, weight, bias, False, momentum, eps), x.axes, timing, x.dtype)
    return y, None, None


@converter(aten.layer_norm.default)
def layer_norm(
    ctx: Context, x: Value, shape: Sequence[int], weight: Value | None = None, bias: Value | None = None, eps: float = 1e-5, cudnn: bool = True
) -> Value:
    inner = range(len(x.shape) - len(shape), len(x.shape))
    if any(not x.axes[dim].plain for dim in inner):
        raise Refused("a layer norm over time normalises by the whole clip", "normalise over channels or space only")
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

"""Modules marked with ``dissect.per_frame``: called as they are, on one frame."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dissect.context import Context, Refused, Value
from dissect.ledger import Axes, plain_axis
from dissect.opaque import module_of
from dissect.registry import converter


class Unit(nn.Module):
    """An opaque module on frame tensors; ``time`` is where it expects a time axis of one frame."""

    def __init__(self, module: nn.Module, time: int | None) -> None:
        super().__init__()
        # Not a child: it shares this module's own tables, so that keys stay those of the original.
        self._modules, self._parameters, self._buffers = module._modules, module._parameters, module._buffers
        self.__dict__["unit"] = module
        self.time = time

    def forward(self, x: Tensor) -> Tensor:
        unit = self.__dict__["unit"]
        y: Tensor = unit(x) if self.time is None else unit(x.unsqueeze(self.time)).squeeze(self.time)
        return y


@converter(torch.ops.dissect.per_frame.default)
def per_frame(ctx: Context, x: Value, index: int) -> Value:
    path, module = module_of(index)
    time = x.time
    if time is not None and time > 0 and not x.axes[time].is_time:
        raise Refused("an opaque module over an axis that merges time with space")
    if any("N" in axis.kinds for axis in x.axes.dims[1:]):
        raise Refused("an opaque module whose input has its batch elsewhere than first")
    shape = ctx.out_shape
    dims = [x.axes[0]]
    for dim, size in enumerate(shape[1:], 1):
        dims.append(x.axes[dim] if dim == time else plain_axis(size))
    if shape[0] != x.shape[0] or (time and (len(shape) <= time or shape[time] != x.shape[time])):
        raise Refused("an opaque module that changes the batch or the number of frames")
    x = ctx.settled(x)
    ctx.row("as it is, on one frame", exact=True, reason="marked per_frame")
    return ctx.module(
        path, Unit(module, time or None), (x,), Axes(tuple(dims)), x.clock.plain(), ctx.node.meta["val"].dtype
    )

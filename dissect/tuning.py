"""Tuning: the lowered step as ONNX Runtime runs it fastest.

Lowering decides what is computed, tuning in which form: histories as slots, a convolution over time as one for each
frame whose sums ONNX Runtime fuses, channels as many as its blocked layout takes, the clock's answers split once. The
caches change their shapes; what they mean does not, and a fresh stream is still all zeros. The law: a tuned step gives
what the step form gives, to rounding. Each rule stands in ``docs/lowering.md`` with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dissect.flattening import flatten
from dissect.forms import Cache, fresh
from dissect.gating import shared, steady
from dissect.lowering import LoweredConv
from dissect.primitives import Tap
from dissect.slots import slotted
from dissect.squeezing import shapes_of
from dissect.stepgraph import layer_of
from dissect.widening import MULTIPLE, widen

__all__ = ["Tuned", "tune"]

#: channels below which NCHWc convolutions read the plain layout: the smallest block there is
BLOCK = 8
#: channels that every blocked layout takes: the largest block there is
WIDEST = 16

Shapes = Mapping[fx.Node, tuple[int, ...]]


@dataclass(frozen=True)
class Tuned:
    """A step, frames and caches in, outputs and new caches out, and what its caches are."""

    module: fx.GraphModule
    caches: tuple[Cache, ...]


def tune(
    module: fx.GraphModule,
    caches: Sequence[Cache],
    frames: Sequence[Tensor],
    *,
    live: bool = False,
    blocked: bool = True,
) -> Tuned:
    """Rewrite a lowered step, in place. ``frames`` are like those that it will get.

    ``live``: the stream has no end and its warm-up does not matter, see :func:`dissect.gating.steady`.
    ``blocked``: for a runtime with a blocked layout on a CPU; without it, convolutions over time stay whole.
    """
    dtype = next((frame.dtype for frame in frames if frame.is_floating_point()), torch.get_default_dtype())

    def given() -> list[Tensor]:
        return [*frames, *fresh(kept, len(frames[0]), dtype)]

    kept = steady(module, caches) if live else tuple(caches)
    kept = flatten(module, given(), kept)
    shapes = shapes_of(module, given())
    if blocked:
        kept = widen(module, kept, shapes)
        shapes = shapes_of(module, given())
    shared(module, {node: len(shape) for node, shape in shapes.items()})
    if blocked:
        split(module)
        append(module, shapes)
        onto(module, shapes)
    kept = slotted(module, kept)
    module.recompile()
    return Tuned(module, kept)


def split(module: fx.GraphModule) -> None:
    """Convolve frame by frame, with the sum running along, what would else be joined first.

    Pictures have fewer channels than a block; some frames of them together still fit in one.
    """
    for layer in module.modules():
        if not isinstance(layer, LoweredConv) or layer.pieces is None or len(layer.pieces) > 1 or layer.conv.dims != 2:
            continue
        ages = layer.pieces[0]
        run = max(1, (BLOCK - 1) // layer.width)
        layer.split([ages[start : start + run] for start in range(0, len(ages), run)])


class Append(nn.Module):
    """Channels of zeros appended in blocked layout: a depthwise convolution of zeros makes them, for a padding leaves it."""

    def __init__(self, channels: int, times: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.times = times
        self.weight = nn.Parameter(torch.zeros(channels, 1, 1, 1, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, *[F.conv2d(x, self.weight, groups=len(self.weight))] * self.times], 1)


def append(module: fx.GraphModule, shapes: Shapes) -> None:
    """Pad channels with zeros as a shortcut does that has no weights ("type A"), without leaving the blocked layout."""
    for node in list(module.graph.nodes):
        if node.target is not F.pad or len(node.args) != 2:
            continue
        source, widths = node.args
        shape = shapes.get(source, ())
        if len(shape) != 4 or list(widths[:5]) != [0] * 5 or len(widths) != 6 or prod(shape[2:]) == 1:
            continue
        if shape[1] % WIDEST == 0 and widths[5] % shape[1] == 0:
            path = f"append_{node.name}"
            module.add_submodule(path, Append(shape[1], widths[5] // shape[1], _dtype(module)))
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.call_module(path, (source,)))
            module.graph.erase_node(node)


class Passage(nn.Module):
    """A cached value added to a convolution's result, itself as a convolution: ONNX Runtime then fuses the sum.

    Such a sum takes only what is in blocked layout. The cached value stands in front, for the reason that
    :meth:`~dissect.lowering.LoweredConv.forward` gives.
    """

    def __init__(self, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1, 1, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor, total: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, groups=len(self.weight)) + total


def onto(module: fx.GraphModule, shapes: Shapes) -> None:
    """Let the sum of a convolution's result and a skip connection be one that ONNX Runtime fuses into a convolution."""
    for node in list(module.graph.nodes):
        if node.target is not torch.ops.aten.add.Tensor or len(node.args) != 2 or node.kwargs:
            continue
        for conv, other in (node.args, node.args[::-1]):
            if not _fuses(module, conv, other, shapes):
                continue
            layer = module.get_submodule(str(conv.target))
            channels = shapes[other][1]
            with module.graph.inserting_before(node):
                if isinstance(layer_of(module, other), Tap) and channels % MULTIPLE == 0:
                    path = f"passage_{node.name}"
                    module.add_submodule(path, Passage(channels, _dtype(module)))
                    node.replace_all_uses_with(module.graph.call_module(path, (other, conv)))
                elif isinstance(layer, LoweredConv) and len(layer.kernels) > 1:
                    node.replace_all_uses_with(module.graph.call_module(str(conv.target), (conv.args[0], other)))
            break
    module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def _fuses(module: fx.GraphModule, conv: object, other: object, shapes: Shapes) -> bool:
    """Whether a sum of the two is one that ONNX Runtime can fuse into the convolution."""
    layer = layer_of(module, conv)
    if not isinstance(conv, fx.Node) or not isinstance(layer, LoweredConv) or not isinstance(other, fx.Node):
        return False
    if layer.conv.dims != 2 or len(conv.users) > 1 or len(conv.args) > 1:
        return False
    return shapes.get(conv) == shapes.get(other) and prod(shapes[conv][2:]) > 1


def _dtype(module: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())

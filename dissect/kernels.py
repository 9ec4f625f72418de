"""Convolutions whose kernels are computed from the clip, as sums of weighted and shifted frames.

Each clip has a kernel of its own, so public code merges the batch with the channels and convolves in as many groups:
``F.conv2d(x.view(1, n * c, t, h * w), kernel.view(n * c, 1, 3, 1), groups=n * c)``. With the rows apart again, it is a
product of that kernel with the values under its taps. The law is that of :mod:`dissect.rewording`: the graph computes
what it computed before.

Source: TAM (TANet), TAdaConv, CondConv, ODConv, and the cross-correlation of trackers.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from math import prod
from typing import Any

import torch
from torch import fx

from dissect.unwrapping import derived
from dissect.values import Value

__all__ = ["CONVOLUTIONS", "settings_of", "weighted"]

aten = torch.ops.aten
CONVOLUTIONS = {
    overload for packet in (aten.conv1d, aten.conv2d, aten.conv3d) for overload in (packet.default, packet.padding)
}


def weighted(node: fx.Node, trace: Mapping[str, Value]) -> bool:
    """Say a convolution with a kernel for every row, which a walk has refused, as products; whether it is one."""
    if node.target not in CONVOLUTIONS or node.name in trace:
        return False
    x, weight, bias, stride, padding, dilation, groups = settings_of(node)
    known = trace.get(x.name), trace.get(weight.name)
    if any(value is None for value in known) or known[1].constant:  # type: ignore[union-attr]
        return False
    rows = _rows(known[1])  # type: ignore[arg-type]
    size, kernel, out = ([int(length) for length in of.meta["val"].shape] for of in (x, weight, node))
    if rows < 2 or size[0] != 1 or groups % rows or size[1] % rows:
        return False
    dims, own = len(kernel) - 2, groups // rows
    taps = [(length - 1) * gap for length, gap in zip(kernel[2:], dilation, strict=True)]
    pads = [(total // 2, total - total // 2) if padding == "same" else (0, 0) for total in taps]
    if not isinstance(padding, str):
        pads = [(side, side) for side in padding]
    emit = _Emitter(node)
    with node.graph.inserting_before(node):
        y = emit(aten.reshape.default, x, [rows, size[1] // rows, *size[2:]])
        if any(side for pair in pads for side in pair):
            y = emit(aten.pad.default, y, [side for pair in reversed(pads) for side in pair])
        for dim in range(dims):
            width = taps[dim] + 1
            if (width, stride[dim]) == (1, 1):
                continue
            y = emit(aten.unfold.default, y, 2 + dim, width, stride[dim])
            if dilation[dim] > 1:
                y = emit(aten.slice.Tensor, y, 2 + dims, 0, width, dilation[dim])
            y = emit(aten.permute.default, y, [0, 1, 2 + dims, *range(2, 2 + dims)])
            shape = [int(length) for length in y.meta["val"].shape]
            y = emit(aten.reshape.default, y, [rows, shape[1] * shape[2], *shape[3:]])
        count = prod(kernel[2:])
        wide = [rows, own, kernel[0] // groups, kernel[1] * count]
        if wide[2:] == [1, count]:  # depthwise
            y = emit(aten.reshape.default, y, [rows, own, count, *out[2:]])
            scale = emit(aten.reshape.default, weight, [rows, own, count, *[1] * dims])
            y = emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, y, scale), [2])
        else:
            y = emit(aten.reshape.default, y, [rows, own, wide[3], prod(out[2:])])
            y = emit(aten.matmul.default, emit(aten.reshape.default, weight, wide), y)
            y = emit(aten.reshape.default, y, [rows, out[1] // rows, *out[2:]])
        if bias is not None:
            shift = emit(aten.reshape.default, bias, [rows, out[1] // rows, *[1] * dims])
            y = emit(aten.add.Tensor, y, shift)
        node.target, node.args, node.kwargs = aten.reshape.default, (y, out), {}
    return True


class _Emitter:
    """Emits operators that help to say what ``node`` says."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.count = 0

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        self.count += 1
        return derived(self.node, target, args, f"taps_{self.count}")


def settings_of(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, list[int], Any, list[int], int]:
    """The operands and settings of a convolution, with a number for each dimension."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | dict(node.kwargs)
    settings: Any = [given.get(argument.name, argument.default_value) for argument in schema]
    dims = len(settings[1].meta["val"].shape) - 2

    def each(value: Any) -> Any:
        if isinstance(value, (str, int)):
            return value if isinstance(value, str) else [value] * dims
        return list(value) * dims if len(value) == 1 else list(value)

    x, weight, bias, stride, padding, dilation, groups = settings
    return x, weight, bias, each(stride), each(padding), each(dilation), groups


def _rows(weight: Value) -> int:
    """How many kernels lie behind each other in front: one for each row of the batch, or for each of its frames."""
    factors = weight.axes[0].factors
    return prod(factor.size for factor in takewhile(lambda factor: not factor.inner, factors))

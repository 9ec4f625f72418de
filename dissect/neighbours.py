"""Indexing with positions that follow the frame: a band of a matrix of all pairs of frames, a histogram of each frame.

Networks that find shot boundaries compare each frame with its neighbours by making the matrix of all pairs and taking a
band of it, and count the colours of all frames in one scatter, every frame at an offset of its own. Both are written with
numbers of frames, which a stream does not have, and mean something of a frame and its neighbours, which it has. The law:
the graph computes what it computed before. Source: TransNet V2 (Soucek and Lokoc, 2020).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from dissect.capturing import Captured
from dissect.unwrapping import derived

__all__ = ["neighbours"]

aten = torch.ops.aten


def neighbours(captured: Captured) -> Captured:
    """The graph with such bands as windows and such scatters as sums; ``captured`` changes, and keeps its nodes' names."""
    for node in list(captured.graph.nodes):
        if node.target is aten.index.Tensor:
            _band(node)
        elif node.target is aten.scatter_add.default:
            _histogram(node)
    captured.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    return captured


def _band(node: fx.Node) -> None:
    """``pad(x @ y.mT, (p, p))[b, t, t + k]`` as ``sum(x[t] * pad(y)[t + k])``: windows of ``y`` against ``x``."""
    padded, indices = node.args[0], node.args[1]
    if not isinstance(padded, fx.Node) or padded.target not in (aten.pad.default, aten.constant_pad_nd.default):
        return
    given: tuple[Any, ...] = padded.args
    product, widths = given[0], list(given[1])
    if len(widths) != 2 or widths[0] < 0 or any(bool(value) and value != "constant" for value in given[2:]):
        return
    if not isinstance(product, fx.Node) or product.target not in (aten.bmm.default, aten.matmul.default):
        return
    places = [fixed(index) for index in indices] if isinstance(indices, (list, tuple)) else []
    if len(places) != 3 or any(place is None or place.dim() != 3 for place in places):
        return
    batch, frames, wide = node.meta["val"].shape
    grid = torch.meshgrid(torch.arange(batch), torch.arange(frames), torch.arange(wide), indexing="ij")
    wanted = (grid[0], grid[1], grid[1] + grid[2])
    if not all(
        torch.equal(p.expand(batch, frames, wide), w) for p, w in zip(places, wanted, strict=True) if p is not None
    ):
        return
    if wide != widths[0] + widths[1] + 1:
        return
    x, transposed = product.args
    if not isinstance(transposed, fx.Node) or not isinstance(x, fx.Node):
        return
    with node.graph.inserting_before(node):
        y = _new(node, aten.transpose.int, (transposed, 1, 2))
        y = _new(node, aten.constant_pad_nd.default, (y, [0, 0, *widths], 0.0))
        y = _new(node, aten.unfold.default, (y, 1, wide, 1))
        y = _new(node, aten.mul.Tensor, (y, _new(node, aten.unsqueeze.default, (x, 3))))
    node.target, node.args = aten.sum.dim_IntList, (y, [2])


def _histogram(node: fx.Node) -> None:
    """A scatter of ones over ``bin + frame * count`` as a sum, for each frame, over the entries that are in each bin."""
    zeros, dim, index, ones = node.args
    places = through(index)
    if places is None or places.target is not aten.add.Tensor or dim != 0:
        return
    bins, offset = places.args[:2]
    if not isinstance(bins, fx.Node) or bins.meta["val"].dim() != 2:
        return
    start, added, shift = fixed(zeros), fixed(ones), fixed(offset)
    if start is None or added is None or shift is None or bool(start.any()) or not bool((added == 1).all()):
        return
    frames = bins.meta["val"].shape[0]
    count = start.numel() // frames
    if not torch.equal(shift.flatten(), torch.arange(frames) * count) or start.numel() % frames:
        return
    kind = node.meta["val"].dtype
    with node.graph.inserting_before(node):
        every = _new(node, aten.arange.default, (count,))
        there = _new(node, aten.eq.Tensor, (_new(node, aten.unsqueeze.default, (bins, 2)), every))
        total = _new(node, aten.sum.dim_IntList, (_new(node, aten.to.dtype, (there, torch.float32)), [1]))
        total = _new(node, aten.to.dtype, (total, kind))
    node.target, node.args = aten.reshape.default, (total, [frames * count])


def through(value: Any) -> fx.Node | None:
    """The node behind flattening reshapes and conversions."""
    while isinstance(value, fx.Node) and value.target in (aten.view.default, aten.reshape.default, aten.to.dtype):
        value = value.args[0]
    return value if isinstance(value, fx.Node) else None


def fixed(value: Any) -> Tensor | None:
    """The tensor that a node computes from nothing but numbers; None where it depends on an input or a parameter."""
    if not isinstance(value, fx.Node):
        return None
    if value.op != "call_function":
        return None
    parts: list[Tensor] = []

    def known(node: fx.Node) -> Any:
        part = fixed(node)
        if part is None:
            raise LookupError(node.name)
        parts.append(part)
        return part

    try:
        args, kwargs = fx.node.map_arg((value.args, dict(value.kwargs)), known)
    except LookupError:
        return None
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = value.target(*args, **kwargs)  # type: ignore[operator]
    return result if isinstance(result, Tensor) else None


def _new(node: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    return derived(node, target, args, "of_neighbours")

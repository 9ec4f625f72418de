"""Centring: at which frame of the stream each position of the original's values has its middle tap.

In ``d3d`` and ``causal`` a kernel's middle tap stays where it is and strides are gone, so that position i of a value of
the original is imitated at frame ``centre + i * removed``, with ``removed`` the product of the strides before it. Only an
operator that looks ahead and behind by different amounts moves the centre. Integers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from dissect.values import Dissected, Value

__all__ = ["centres", "named_centres"]

aten = torch.ops.aten
_CONV: dict[Any, int] = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
_POOL: dict[Any, int] = {
    aten.max_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool3d.default: 3,
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
}


def named_centres(dissected: Dissected) -> dict[str, int]:
    """The frame of position 0 of every value that has a time axis, by the name of its node in the captured graph."""
    found: dict[str, int] = {}
    for node in dissected.captured.graph.nodes:
        value = dissected.trace.get(node.name)
        if value is None or value.constant or value.time is None:
            continue
        known = [found[arg.name] for arg in node.all_input_nodes if arg.name in found]
        found[node.name] = max(known, default=0)
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.name not in found:
            continue
        before = dissected.trace[source.name]
        found[node.name] += _moved(node, before) * before.clock.removed
    return found


def centres(dissected: Dissected) -> dict[int, int]:
    """The same for every output that has a time axis, by its number."""
    named = named_centres(dissected)
    output = next(node for node in dissected.captured.graph.nodes if node.op == "output")
    return {
        index: named[leaf.name]
        for index, leaf in enumerate(output.args[0])
        if isinstance(leaf, fx.Node) and leaf.name in named
    }


def _moved(node: fx.Node, before: Value) -> int:
    """By how many positions of its input an operator's position 0 has its middle tap behind that of the input's."""
    dims = _CONV.get(node.target) or _POOL.get(node.target)
    if dims is None or before.time is None:
        if node.target is aten.slice.Tensor and before.time is not None:
            return _first(node, before)
        return 0
    at = before.time - (len(before.shape) - dims)
    if at < 0:
        return 0
    if node.target in _CONV:
        weight = node.args[1].meta["val"]  # type: ignore[union-attr]
        size, pad, gap = weight.shape[2 + at], _setting(node, 4, 0, at), _setting(node, 5, 1, at)
    else:
        size, pad = _setting(node, 1, 1, at), _setting(node, 3, 0, at)
        gap = _setting(node, 4, 1, at) if "max_pool" in str(node.target) else 1
    return int(size // 2 * gap - pad)


def _first(node: fx.Node, before: Value) -> int:
    """The position at which a slice of time begins."""
    dim = node.args[1] if len(node.args) > 1 else 0
    start = node.args[2] if len(node.args) > 2 else 0
    if not isinstance(dim, int) or dim % len(before.shape) != before.time or not isinstance(start, int):
        return 0
    return start if start >= 0 else max(0, start + before.shape[before.time])


def _setting(node: fx.Node, index: int, default: int, at: int) -> int:
    """One dimension's value of an argument that may be left out, or be one number for all."""
    value: Any = node.args[index] if len(node.args) > index else default
    if not isinstance(value, Sequence):
        return int(value)
    return int(value[at] if len(value) > 1 else value[0]) if value else default

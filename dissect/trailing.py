"""``x[:, -3:]``, the last three frames, or ``x[:, -1:]``: values of the clip's end, and no stream that begins late.

At the end of a clip both are the same numbers. A clip of another length ends with three frames, too, while a stream whose
first frames are cropped has as many as the clip has more. Only a few are taken for the end: what a network cuts off
by the length of another tensor (``skip[:, :, -out.size(2):]``) is most of the clip, and goes on with the stream. So does
what a convolution or a pool takes: it would be a volume at every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from dissect.capturing import Captured
from dissect.origins import reached
from dissect.unrolling import duplicate
from dissect.unwrapping import derived
from dissect.values import Value

__all__ = ["convolved", "trailing"]

aten = torch.ops.aten
_JOINS = (aten.cat.default, aten.stack.default, aten.slice_scatter.default, aten.select_scatter.default)


def trailing(captured: Captured, trace: Mapping[str, Value]) -> Captured | None:
    """The graph with the last few frames said one by one; None where there are none. ``trace``: a walk's values."""
    found = {node.name for node in captured.graph.nodes if _few(node, trace)}
    if not found:
        return None
    captured = duplicate(captured)
    for node in [node for node in captured.graph.nodes if node.name in found]:
        args: Any = node.args
        source, dim, start = args[:3]
        with captured.graph.inserting_before(node):
            frames = [
                derived(node, aten.select.int, (source, dim, at), f"frame_{at - start}") for at in range(start, 0)
            ]
        node.target, node.args, node.kwargs = aten.stack.default, (frames, dim), {}
    return captured


def _few(node: fx.Node, trace: Mapping[str, Value]) -> bool:
    """Whether a node is the last few frames, one or more and at most half of the clip's."""
    if node.target is not aten.slice.Tensor:
        return False
    given: tuple[Any, ...] = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    source, dim, start, stop, step = given
    value: Any = trace.get(source.name) if isinstance(source, fx.Node) else None
    if value is None or value.constant or not isinstance(start, int) or step != 1:
        return False
    dim %= len(value.axes)
    size = value.shape[dim]
    whole = stop is None or (isinstance(stop, int) and stop >= size)
    if not (value.axes[dim].is_time and whole and -size <= 2 * start <= -2):
        return False
    return not any(user.target in _JOINS for user in node.users) and not convolved(node)


def convolved(node: fx.Node) -> bool:
    """Whether a pool, or a convolution of more than points, stands anywhere behind a node."""
    return any(
        "_pool" in str(user.target) or ("conv" in str(user.target) and not _points(user))
        for user in reached(node.users, lambda at: at.users)
    )


def _points(node: fx.Node) -> bool:
    """A convolution that is a linear layer for each position."""
    weight = node.args[1] if len(node.args) > 1 else None
    steps: Any = node.args[3] if len(node.args) > 3 else 1
    alone = isinstance(weight, fx.Node) and all(size == 1 for size in weight.meta["val"].shape[2:])
    return alone and all(step == 1 for step in (steps if isinstance(steps, (list, tuple)) else [steps]))

"""Assignments through a mask as choices: ``y[mask] = z`` becomes ``torch.where(mask, z, y)``.

``z`` may be one number, or what elementwise operators make of entries picked by the same mask, ``y[mask] = 2 * x[mask]``.
As many entries as a mask has are no tensor that a stream could hold; computed everywhere and chosen by the mask, they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

__all__ = ["chosen"]

aten = torch.ops.aten


def chosen(graph: fx.Graph) -> None:
    """Rewrite every such assignment of a functional graph, in place."""
    found = False
    for node in list(graph.nodes):
        if node.target is aten.index_put.default:
            found = _choice(graph, node) or found
    if found:
        graph.eliminate_dead_code()


def _choice(graph: fx.Graph, node: fx.Node) -> bool:
    base, indices, value, *more = node.args
    mask = indices[0] if isinstance(indices, (list, tuple)) and len(indices) == 1 else None
    if not isinstance(base, fx.Node) or not isinstance(value, fx.Node) or not _is_mask(mask):
        return False
    assert isinstance(mask, fx.Node)
    spare = len(_val(base).shape) - len(_val(mask).shape)
    made: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(node):
        whole = _whole(graph, value, mask, spare, _val(base).shape, made)
        if whole is None:
            return False
        if more and more[0]:
            whole = _emit(graph, node, aten.add.Tensor, (base, whole))
        for _ in range(spare):
            mask = _emit(graph, node, aten.unsqueeze.default, (mask, -1))
        result = _emit(graph, node, aten.where.self, (mask, whole, base))
    node.replace_all_uses_with(result)
    return True


def _whole(
    graph: fx.Graph, value: fx.Node, mask: fx.Node, spare: int, shape: Any, made: dict[fx.Node, fx.Node]
) -> fx.Node | None:
    """What the picked entries are entries of; None where they are not elementwise so."""
    if value in made:
        return made[value]
    if not _picked(value):
        sizes = _val(value).shape
        return value if len(sizes) <= spare or sizes.numel() == 1 else None
    if value.target is aten.index.Tensor:
        source, indices = value.args
        if not isinstance(source, fx.Node) or not isinstance(indices, (list, tuple)) or len(indices) != 1:
            return None
        return source if _same(indices[0], mask) and _val(source).shape == shape else None
    if torch.Tag.pointwise not in getattr(value.target, "tags", ()):
        return None
    parts = {read: _whole(graph, read, mask, spare, shape, made) for read in value.all_input_nodes}
    if any(part is None for part in parts.values()):
        return None
    args, kwargs = map_arg((value.args, value.kwargs), lambda read: parts[read])
    made[value] = _emit(graph, value, value.target, args, kwargs)
    return made[value]


def _val(node: Any) -> Any:
    return node.meta["val"]


def _is_mask(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(_val(node), Tensor) and _val(node).dtype == torch.bool


def _picked(node: fx.Node) -> bool:
    """It has as many entries as a mask."""
    return any(not isinstance(size, int) and not _known(size) for size in _val(node).shape)


def _known(size: Any) -> bool:
    expression = getattr(getattr(size, "node", None), "expr", None)
    return expression is not None and expression.is_number


def _same(one: Any, other: Any) -> bool:
    """Whether two nodes of a functional graph are one value."""
    if one is other or not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
        return bool(one is other or (not isinstance(one, fx.Node) and not isinstance(other, fx.Node) and one == other))
    if one.op != "call_function" or other.op != "call_function" or one.target is not other.target:
        return False
    if torch.Tag.nondeterministic_seeded in getattr(one.target, "tags", ()):
        return False
    first, one_spec = torch.utils._pytree.tree_flatten((one.args, one.kwargs))
    second, other_spec = torch.utils._pytree.tree_flatten((other.args, other.kwargs))
    return one_spec == other_spec and all(_same(a, b) for a, b in zip(first, second, strict=True))


def _emit(graph: fx.Graph, like: fx.Node, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
    """A node with its shape, at the place in the user's code where ``like`` stands."""
    node = graph.call_function(target, args, kwargs or {})
    known = [read.meta["val"] for read in node.all_input_nodes]
    mode = next(value.fake_mode for value in known if hasattr(value, "fake_mode"))
    with mode:
        values = map_arg((node.args, node.kwargs), lambda read: read.meta["val"])
        node.meta = {**like.meta, "val": target(*values[0], **values[1])}
    return node

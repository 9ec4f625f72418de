"""Numbers that a network takes from how many rows its batch has: ``y / x.size(0)``, ``mask.sum()`` of a mask of ones.

A capture keeps such a number as it was for the batch that stood for any other. Law: no false alarm costs more than one
further capture, which tells whether the number really follows from the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isclose, prod
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from dissect.capturing import Captured

__all__ = ["counted_alike", "counts_rows", "sums"]

_ARITHMETIC = {
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "pow",
    "true_divide",
    "floor_divide",
    "remainder",
    "fmod",
    "full",
    "new_full",
}
_MOST = 1e9  # entries of a batch
_SUMS = {"sum", "count_nonzero", "norm", "linalg_vector_norm", "prod", "std", "var"}


def counts_rows(captured: Captured) -> bool:
    """Whether a number of the network might be a count of the capture's rows, or of all entries that these have."""
    rows = captured.batch
    if any(_follows(number, rows) for _, number in _numbers(captured)):
        return True
    return any(rows in shape for _, shape, _ in sums(captured.graph))


def counted_alike(one: Captured, other: Captured) -> bool:
    """Whether two captures, of as many rows as they have, count the same."""
    if dict(_numbers(one)) != dict(_numbers(other)):
        return False
    taken, others = ({name: count for name, _, count in sums(each.graph)} for each in (one, other))
    return taken == others


def _follows(number: float, rows: int) -> bool:
    """A multiple of ``rows``, one over it, or the root of either."""
    ways = [abs(number), number * number]
    ways += [1 / way for way in ways if way]
    counts = [way / rows for way in ways if rows <= way < _MOST]
    return any(isclose(count, round(count), rel_tol=1e-12) for count in counts)


def _numbers(captured: Captured) -> Iterator[tuple[tuple[str, int], float]]:
    """Each number that the network computes with, by node and place."""
    for node in captured.graph.nodes:
        if node.op == "placeholder" and node.name in captured.tensors:
            name, tensor = captured.tensors[node.name]
            if tensor.numel() == 1 and not isinstance(tensor, torch.nn.Parameter) and "lifted" in name:
                yield (node.name, 0), float(tensor)
        if _packet(node) in _ARITHMETIC:
            leaves: list[Any] = pytree.tree_leaves(node.args[-1:] if "full" in _packet(node) else node.args)
            for at, leaf in enumerate(leaves):
                if isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
                    yield (node.name, at), float(leaf)


def sums(graph: fx.Graph) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Each reduction of what does not depend on the inputs: its name, the shape that it takes, and how many entries become one."""
    moving: set[fx.Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        made = _packet(node).startswith("new_") or _packet(node).endswith("_like")
        if node.op == "placeholder" or (not made and any(source in moving for source in sources)):
            moving.add(node)
        elif _packet(node) in _SUMS and sources:
            shape = tuple(sources[0].meta["val"].shape)
            yield node.name, shape, prod(shape) // max(1, node.meta["val"].numel())


def _packet(node: fx.Node) -> str:
    return str(getattr(node.target, "overloadpacket", "")).removeprefix("aten.")

"""Copies of one function in a captured graph, compared node by node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree  # the specs that torch.export itself hands out

__all__ = ["Differ", "alike", "operands", "said", "shape_of"]


class Differ(Exception):
    """The copies are not the same function."""


def shape_of(node: fx.Node) -> Any:
    """The shape and kind of a node's value, or of each of its values."""
    read: Callable[[Any], Any] = lambda value: (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value  # noqa: E731
    return pytree.tree_map(read, node.meta.get("val"))


def operands(node: fx.Node) -> list[fx.Node]:
    """What a node reads, operand by operand."""
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]


def alike(node: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes are one operator with the same settings, whatever they read."""
    if node.op != "call_function" or node.target is not other.target or shape_of(node) != shape_of(other):
        return False
    (one, spec), (two, other_spec) = (pytree.tree_flatten((at.args, dict(at.kwargs))) for at in (node, other))
    if spec != other_spec or len(one) != len(two):
        return False
    return all(
        isinstance(b, fx.Node) if isinstance(a, fx.Node) else type(a) is type(b) and a == b
        for a, b in zip(one, two, strict=True)
    )


def said(node: fx.Node) -> Any:
    """What a node computes: equal for nodes that compute the same."""
    leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
    return node.target, str(spec), tuple((type(leaf), leaf) for leaf in leaves)

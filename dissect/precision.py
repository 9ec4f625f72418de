"""One precision: a stream's floats are of one type, as its caches are.

A network may compute a part of itself in another: in half precision, where mixed precision is switched on in its forward, or
in double, where some of its weights are. What is narrower than the clip is computed like the clip, and so is what is
wider because of its weights. Activations that a network widens itself, as ``softmax(dtype=torch.float64)`` does, stay wide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

__all__ = ["unify"]

_NARROW = (torch.float16, torch.bfloat16)


def unify(graph: fx.Graph, inputs: Collection[str], tensors: dict[str, tuple[str, Tensor]]) -> torch.dtype | None:
    """Make ``graph`` and ``tensors`` one of one float type; the narrowest that it had beside it, else None.

    ``inputs`` are the placeholders of the clip, whose floats say the type; without any, most of the weights do.
    """
    used = {node.name: node for node in graph.nodes if node.op == "placeholder" and node.users}
    weights = {name: tensor for name, (_, tensor) in tensors.items() if name in used and tensor.is_floating_point()}
    given = [dtype for name in inputs if name in used for dtype in _floats(used[name])]
    usual = given or [dtype for dtype, _ in Counter(tensor.dtype for tensor in weights.values()).most_common(1)]
    if not usual:
        return None
    own = usual[0]
    kinds = {dtype for node in graph.nodes for dtype in _floats(node)}
    narrow = {dtype for dtype in kinds.intersection(_NARROW) if dtype.itemsize < own.itemsize}
    strange = narrow | {tensor.dtype for tensor in weights.values()} - {own}
    if not strange:
        return None
    alike = dict.fromkeys(strange, own)
    for name, tensor in weights.items():
        if tensor.dtype in alike:
            cast = tensor.detach().to(own)
            kept = torch.nn.Parameter(cast, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else cast
            tensors[name] = (tensors[name][0], kept)
    for node in graph.nodes:
        _retype(node, alike)
    return max(narrow, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def _floats(node: fx.Node) -> list[torch.dtype]:
    values = pytree.tree_leaves(node.meta.get("val"))
    return [value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _retype(node: fx.Node, alike: Mapping[torch.dtype, torch.dtype]) -> None:
    """Every type that a node asks for, and that of what it gives."""

    def said(value: Any) -> Any:
        return alike.get(value, value) if isinstance(value, torch.dtype) else value

    def made(value: Any) -> Any:
        return value.to(alike[value.dtype]) if isinstance(value, Tensor) and value.dtype in alike else value

    if node.op == "call_function":
        node.args = fx.node.map_aggregate(node.args, said)
        node.kwargs = fx.node.map_aggregate(node.kwargs, said)
    if "val" in node.meta:
        node.meta["val"] = pytree.tree_map(made, node.meta["val"])

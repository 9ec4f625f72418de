"""What all passes over the graph of a step ask: the layer behind a node, its place, and which inputs are the caches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from dissect.forms import Cache

__all__ = ["REDUCTIONS", "held", "layer_of", "put"]

REDUCTIONS = {torch.mean, torch.sum, torch.amax, torch.amin}


def layer_of(module: fx.GraphModule, node: object) -> nn.Module | None:
    """The module that a node calls; None for what calls none."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return module.get_submodule(str(node.target))


def put(module: nn.Module, path: str, layer: nn.Module) -> None:
    """Put ``layer`` where the module at ``path`` was."""
    owner, _, leaf = path.rpartition(".")
    setattr(module.get_submodule(owner), leaf, layer)


def held(graph: fx.Graph, caches: Sequence[Cache]) -> dict[fx.Node, Cache]:
    """The placeholders of ``caches``, which are the graph's last ones, in order."""
    given = [node for node in graph.nodes if node.op == "placeholder"]
    return dict(zip(given[len(given) - len(caches) :], caches, strict=True))

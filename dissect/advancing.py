"""Advance: one graph over many clips at once, node by node, so that a layer can be changed before anything reads it.

Each node is computed once for each clip; values that no later node reads are dropped. So a network is rebuilt layer by
layer in the time of one pass, with the values at one place of the network in memory and no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, fx

__all__ = ["Advance"]


class Advance:
    """A graph module's run over ``given``, one tuple of placeholder values for each clip, halted where one likes."""

    def __init__(self, module: fx.GraphModule, given: Iterable[Sequence[Any]]) -> None:
        self.interpreter = fx.Interpreter(module, garbage_collect_values=False)
        self.nodes: list[fx.Node] = list(module.graph.nodes)
        self.place = {node: place for place, node in enumerate(self.nodes)}
        self.at = 0
        self.kept: frozenset[fx.Node] = frozenset()
        taken = [node for node in self.nodes if node.op == "placeholder"]
        self.values: list[dict[fx.Node, Any]] = [dict(zip(taken, values, strict=True)) for values in given]
        last: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            for read in node.all_input_nodes:
                last[read] = node
        self.ends: dict[fx.Node, list[fx.Node]] = {}
        for read, node in last.items():
            self.ends.setdefault(node, []).append(read)

    def before(self, node: fx.Node) -> bool:
        """Compute everything in front of a node; False where the node itself was passed already."""
        if self.place[node] < self.at:
            return False
        while self.nodes[self.at] is not node:
            self.step()
        return True

    def step(self) -> fx.Node:
        """Compute the next node, and drop what nothing reads any more."""
        node = self.nodes[self.at]
        self.at += 1
        if node.op in ("placeholder", "output"):
            return node
        for env in self.values:
            self.interpreter.env = env
            env[node] = self.interpreter.run_node(node)
            for read in self.ends.get(node, ()):
                env.pop(read, None)
        return node

    def read(self, index: int, node: Any) -> Any:
        """The value of a node (or of nodes in a tuple) for clip number ``index``."""
        return fx.node.map_arg(node, self.values[index].__getitem__)

    def of(self, node: fx.Node) -> list[Tensor]:
        """The values of a node that still has readers, clip by clip."""
        return [env[node] for env in self.values]

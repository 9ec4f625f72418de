"""Flattening: values at a single point, ``(B, C, 1, 1)``, as vectors ``(B, C)``.

After a global pool nothing of space is left, and a convolution is a matrix product, which costs a runtime less. A cache
of such values, read by pools and delays alone, is flat too. The law: every value is what it was, reshaped.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from dissect.converters.adaptive import adaptive_space
from dissect.forms import Cache
from dissect.primitives import Gate, History, Tap, WindowReduce
from dissect.squeezing import Drop, Squeeze, shapes_of
from dissect.stepgraph import REDUCTIONS, held, layer_of
from dissect.windows import share

__all__ = ["flatten"]


def flatten(module: fx.GraphModule, args: Sequence[Tensor], caches: Sequence[Cache]) -> tuple[Cache, ...]:
    """Flatten every value at a single point, in place, for inputs like ``args``; returns the caches as they are now."""
    return _Flatten(module, shapes_of(module, args), caches).run()


class _Flatten(Squeeze):
    """Drops every dimension of a value at a single point but the rows and the channels."""

    def __init__(self, module: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]], caches: Sequence[Cache]) -> None:
        super().__init__(module, shapes)
        self.held = held(module.graph, caches)
        self.flat: set[fx.Node] = set()
        (results,) = (node for node in module.graph.nodes if node.op == "output")
        self.news = set(results.args[0][len(results.args[0]) - len(caches) :])

    def run(self) -> tuple[Cache, ...]:  # type: ignore[override]
        super().run()
        done = []
        for argument, cache in self.held.items():
            shape = cache.spec.shape[:1] if argument in self.flat else cache.spec.shape
            done.append(replace(cache, spec=replace(cache.spec, shape=shape)))
        return tuple(done)

    def cache_of(self, node: fx.Node) -> list[fx.Node]:
        """The cache of a history of points that only pools and delays read."""
        layer = layer_of(self.module, node)
        if not isinstance(layer, History) or type(layer) is not History or layer.depth == 0:
            return []
        caches: Any = node.kwargs.get("caches", ())
        readers = [reader for known in node.users if known.args[1] == 0 for reader in known.users]
        fit = all(isinstance(layer_of(self.module, reader), (Tap, WindowReduce)) for reader in readers)
        return [cache for cache in caches if fit and cache in self.held]

    def spare(self, node: fx.Node, not_these: Sequence[int] = ()) -> Drop:
        shape = self.shapes.get(node, ())
        points = len(shape) > 2 and all(size == 1 for size in shape[2:]) and not any(dim > 1 for dim in not_these)
        return tuple(range(2, len(shape))) if points and node.op not in ("placeholder", "get_attr") else ()

    def concerned(self, node: fx.Node) -> bool:
        return bool(self.spare(node)) or any(self.drops.get(arg) for arg in node.all_input_nodes)

    def dropped(self, shape: tuple[int, ...], ones: Sequence[int]) -> Drop | None:
        return tuple(ones) if len(ones) == len(shape) - 2 else None

    def reduced(self, node: fx.Node) -> Drop | None:
        source, dims, keepdim = node.args[:3]
        over = {int(dim) % len(self.shapes[source]) for dim in dims}  # type: ignore[arg-type, index, union-attr]
        if keepdim and not self.drops[source] and set(self.spare(node)) == over - {1}:  # type: ignore[index]
            self.made[node] = self.graph.call_function(node.target, (self.made[source], sorted(over), False))  # type: ignore[arg-type, index]
            return self.spare(node)
        return super().reduced(node)

    def rewritten(self, node: fx.Node) -> Drop | None:
        source: Any = node.args[0] if node.args else None
        if node.op == "output":
            leaves: Any = node.args[0]
            flat = tuple(self.made[leaf] if leaf in self.news else self.of(leaf, ()) for leaf in leaves)
            self.made[node] = self.graph.output(flat)
            return ()
        if isinstance(layer := layer_of(self.module, node), History):
            kept = self.cache_of(node)
            if not kept or not self.drops[source]:
                return None
            self.flat.update(kept)
            layer.frame = layer.frame[:1]
            return self.passed(node, self.spare(source))
        if node.target is operator.getitem and self.drops.get(source):
            return self.passed(node, self.drops[source])
        if isinstance(layer_of(self.module, node), (Tap, WindowReduce, Gate)):
            return self.passed(node, self.drops[source])
        if node.target is share:  # it has the rank of its last operand
            self.made[node] = self.graph.node_copy(node, self.made.__getitem__)
            like: Any = node.args[2]
            return self.drops[like]
        if node.target is adaptive_space and self.spare(node) and not self.drops[source]:
            drop = self.spare(node)
            over = torch.mean if node.args[1] == "mean" else torch.amax
            self.made[node] = self.graph.call_function(over, (self.made[source], list(drop), False))
            return drop
        if node.target not in REDUCTIONS and not any(self.drops[read] for read in node.all_input_nodes):
            return None  # a convolution gave the point: nothing may stand between it and its activation
        return super().rewritten(node)

    def passed(self, node: fx.Node, drop: Drop) -> Drop:
        """The same node, its first argument and its caches without ``drop``, the others as they are."""
        source = node.args[0]

        def operand(arg: fx.Node) -> fx.Node:
            return self.of(arg, drop) if arg is source and arg in self.shapes else self.made[arg]

        self.made[node] = self.graph.node_copy(node, operand)
        return drop

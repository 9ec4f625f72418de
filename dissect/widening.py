"""Widening: channels as many as a blocked layout takes.

ONNX Runtime's blocked layout (NCHWc) takes depthwise convolutions, and inputs of others, only where the channels are a multiple
of 4; without it a depthwise convolution is many times slower. So channels of zeros are added: their weights
are zero wherever they are read. What is tied to them channel by channel (norms, activations, gates, caches,
squeeze-and-excitation) grows with them; where that meets an input, an output or an operator that it does not know, nothing is
changed. The law: every value is what it was, beside zeros. ``benchmarks/lowering.py`` measures it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dissect.converters.adaptive import adaptive_space
from dissect.converters.pooling import spaced
from dissect.forms import Cache
from dissect.lowering import Affine, LoweredConv
from dissect.primitives import Gate, History, Tap, WindowReduce
from dissect.stepgraph import REDUCTIONS, held, layer_of

__all__ = ["widen"]

MULTIPLE = 4
#: input channels below which a convolution reads the plain layout anyway
PLAIN = 8

aten = torch.ops.aten
_SAFE = {  # elementwise, and finite at zero
    aten.relu.default,
    aten.sigmoid.default,
    aten.silu.default,
    aten.tanh.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.hardtanh.default,
    aten.gelu.default,
    aten.leaky_relu.default,
    aten.relu6.default,
    aten.clamp.default,
    aten.mul.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
    torch.mul,
    torch.add,
    torch.sub,
}
_TIED = (Gate, Tap, WindowReduce, History, Affine)


class _Classes:
    """Nodes whose channels are one and the same, and which of these sets must stay as they are."""

    def __init__(self) -> None:
        self.parent: dict[Any, Any] = {}
        self.fixed: set[Any] = set()

    def of(self, item: Any) -> Any:
        while (above := self.parent.setdefault(item, item)) is not item:
            item = above
        return item

    def tie(self, one: Any, other: Any) -> None:
        one, other = self.of(one), self.of(other)
        if one is not other:
            self.parent[one] = other
            if one in self.fixed:
                self.fixed.add(other)

    def fix(self, item: Any) -> None:
        self.fixed.add(self.of(item))

    def is_fixed(self, item: Any) -> bool:
        return self.of(item) in self.fixed


def widen(
    module: fx.GraphModule, caches: Sequence[Cache], shapes: Mapping[fx.Node, tuple[int, ...]]
) -> tuple[Cache, ...]:
    """Add channels of zeros where they pay, in place; returns the caches as they are now."""
    work = _Widening(module, caches, shapes)
    for node in module.graph.nodes:
        work.relate(node)
    return work.apply()


class _Widening:
    def __init__(
        self, module: fx.GraphModule, caches: Sequence[Cache], shapes: Mapping[fx.Node, tuple[int, ...]]
    ) -> None:
        self.module, self.caches, self.shapes = module, caches, shapes
        self.held = held(module.graph, caches)
        self.classes = _Classes()
        #: for each class, the channels that some convolution would like to have more of
        self.wanted: list[tuple[Any, int]] = []

    # Which channels are tied to which.

    def channels(self, node: fx.Node) -> int | None:
        shape = self.shapes.get(node, ())
        return shape[1] if len(shape) > 1 else None

    def relate(self, node: fx.Node) -> None:
        layer = layer_of(self.module, node)
        if node.op == "placeholder":
            if node not in self.held:
                self.classes.fix(node)
        elif node.op == "output":
            values: Any = node.args[0]
            for leaf in values[: len(values) - len(self.caches)]:
                self.classes.fix(leaf)
        elif isinstance(layer, LoweredConv):
            self.convolution(node, layer)
        elif isinstance(layer, _TIED):
            self.classes.tie(node, node.args[0])
            if isinstance(layer, Affine):
                self.classes.tie(node, str(node.target))
            if isinstance(layer, History) and (
                not layer.frame
                or any(self.held[held].spec.shape[0] != layer.depth * layer.frame[0] for held in self.histories(node))
            ):
                self.classes.fix(node)
        elif node.target is operator.getitem:
            self.classes.tie(node, node.args[0])
        elif isinstance(layer, nn.Linear) and len(self.shapes.get(node.args[0], ())) == 2:  # type: ignore[arg-type]
            self.classes.fix(node)
            self.classes.tie(node.args[0], (node.target, "in"))
        elif self.tied(node):
            for source in node.all_input_nodes:
                if self.channels(source) == self.channels(node):
                    self.classes.tie(node, source)
        else:
            for other in (node, *node.all_input_nodes):
                self.classes.fix(other)

    def histories(self, node: fx.Node) -> list[fx.Node]:
        caches: Any = node.kwargs.get("caches", ())
        return [held for held in caches if held in self.held]

    def convolution(self, node: fx.Node, layer: LoweredConv) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        name = str(node.target)
        deep = layer.depthwise
        if len(node.args) > 1 or layer.conv.transposed or (layer.conv.groups > 1 and not deep):
            for other in (node, *node.all_input_nodes):
                self.classes.fix(other)
            return
        self.classes.tie(source, (name, "in"))
        self.classes.tie(node, (name, "out"))
        if deep:
            self.classes.tie(node, source)
        wide = layer.width
        if wide % MULTIPLE and layer.conv.dims == 2 and (deep or wide >= PLAIN) and self.spread(node):
            self.wanted.append((node if deep else source, wide))

    def spread(self, node: fx.Node) -> bool:
        """More than one point: at a single one there is nothing to gain."""
        return any(size > 1 for size in self.shapes.get(node, ())[2:])

    def tied(self, node: fx.Node) -> bool:
        """Whether an operator does the same to every channel, from dimension 1 to dimension 1."""
        shape = self.shapes.get(node, ())
        sources = [source for source in node.all_input_nodes if source in self.shapes]
        if node.op != "call_function" or len(shape) < 2 or len(sources) != len(node.all_input_nodes):
            return False
        if node.target in _SAFE:
            return all(
                len(self.shapes[source]) == len(shape) and self.shapes[source][1] in (1, shape[1])
                for source in sources
                if source.op != "get_attr" or self.shapes[source]
            )
        (source,) = sources if len(sources) == 1 else (None,)
        if source is None or len(self.shapes[source]) < 2 or self.shapes[source][1] != shape[1]:
            return False
        if node.target in REDUCTIONS:
            dims = node.args[1] if len(node.args) > 1 else None
            rank = len(self.shapes[source])
            return isinstance(dims, (list, tuple)) and all(int(dim) % rank > 1 for dim in dims)
        if node.target is spaced or node.target is adaptive_space:
            return bool(node.args[2] == 1)
        sizes: Any = node.args[1] if node.target is torch.reshape else ()
        return tuple(sizes[:2]) == (-1, shape[1])

    # What becomes of them.

    def apply(self) -> tuple[Cache, ...]:
        more: dict[Any, int] = {}
        for item, wide in self.wanted:
            if not self.classes.is_fixed(item):
                more[self.classes.of(item)] = -wide % MULTIPLE
        if not more:
            return tuple(self.caches)
        changed: dict[fx.Node, Cache] = {}
        done: set[str] = set()
        for node in self.module.graph.nodes:
            extra = more.get(self.classes.of(node), 0)
            if node.target is torch.reshape and extra:
                rows, channels, *rest = node.args[1]
                node.args = (node.args[0], (rows, channels + extra, *rest))
            if node.op != "call_module":
                continue
            layer = self.module.get_submodule(str(node.target))
            if isinstance(layer, History) and extra:
                layer.frame = (layer.frame[0] + extra, *layer.frame[1:])
                for held in self.histories(node):
                    spec = self.held[held].spec
                    shape = (layer.depth * layer.frame[0], *spec.shape[1:])
                    changed[held] = replace(self.held[held], spec=replace(spec, shape=shape))
            if str(node.target) in done:
                continue
            done.add(str(node.target))
            taken = more.get(self.classes.of(node.args[0]), 0) if isinstance(node.args[0], fx.Node) else 0
            if isinstance(layer, LoweredConv):
                layer.widen(taken, extra)
            elif isinstance(layer, Affine) and extra:
                layer.factor, layer.shift = (padded(held, extra) for held in (layer.factor, layer.shift))
            elif isinstance(layer, nn.Linear) and taken:
                layer.weight = padded(layer.weight, taken, 1)
        return tuple({**self.held, **changed}.values())


def padded(weight: Tensor, extra: int, dim: int = 0) -> nn.Parameter:
    """A weight with ``extra`` zeros more along one dimension."""
    widths = [0, 0] * (weight.dim() - 1 - dim) + [0, extra]
    return nn.Parameter(F.pad(weight.detach(), widths), requires_grad=False)

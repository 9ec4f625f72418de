"""Squeezing: a step without dimensions of size 1 that only make its tensors rank 5.

Where time has ended but its dimension stays (a global pool before a 1x1x1 convolution, as in squeeze-excitation), a
frame is ``(B, C, 1, 1, 1)``. :func:`squeeze` drops as many of the ones as rank 4 takes, and with them the third
dimension of the convolutions in between. :func:`flatten` drops all of them where nothing else is left: at a single point
a convolution is a matrix product, which costs a runtime less. The law: every value is what it was, reshaped. An
operator that the pass does not know gets its operands in their own shapes.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from dissect.converters.pooling import adaptive_space
from dissect.forms import Cache
from dissect.lowering import Affine, LoweredConv
from dissect.primitives import Gate, History, Tap, WindowReduce

__all__ = ["flatten", "shapes_of", "squeeze"]

RANK = 4
_ELEMENTWISE = {torch.mul, torch.div, torch.add, torch.sub}
_PARTS = {torch.ops.aten.slice.Tensor, torch.narrow}
_REDUCTIONS = {torch.mean, torch.sum, torch.amax, torch.amin}
Drop = tuple[int, ...]


class _Shapes(fx.Interpreter):
    """The shape of every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        return value


def shapes_of(module: fx.GraphModule, args: Sequence[Tensor]) -> dict[fx.Node, tuple[int, ...]]:
    """The shape of every tensor in a run on ``args``."""
    shapes = _Shapes(module)
    with torch.no_grad():
        shapes.run(*args)
    return shapes.shapes


def squeeze(module: fx.GraphModule, args: Sequence[Tensor]) -> None:
    """Rewrite ``module``, in place, for inputs like ``args``."""
    shapes = shapes_of(module, args)
    if any(len(shape) > RANK for node, shape in shapes.items() if node.op != "get_attr"):
        _Squeeze(module, shapes).run()


def flatten(module: fx.GraphModule, args: Sequence[Tensor], caches: Sequence[Cache]) -> tuple[Cache, ...]:
    """Make every value at a single point, ``(B, C, 1, 1)``, one of ``(B, C)``, in place; returns the caches as they are now."""
    return _Flatten(module, shapes_of(module, args), caches).run()


class _Squeeze:
    def __init__(self, module: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]]) -> None:
        self.module, self.shapes = module, shapes
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        self.drops: dict[fx.Node, Drop] = {}

    def run(self) -> None:
        for node in self.module.graph.nodes:
            drop = self.rewritten(node)
            if drop is None:
                self.made[node] = self.graph.node_copy(node, lambda arg: self.of(arg, ()))
                drop = ()
            self.drops[node] = drop
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        self.module.graph = self.graph

    def of(self, node: fx.Node, drop: Drop) -> fx.Node:
        """The value of ``node`` without the dimensions ``drop``."""
        if self.drops.get(node, ()) == drop:
            return self.made[node]
        return self.graph.call_function(torch.reshape, (self.made[node], self.without(node, drop)))

    def without(self, node: fx.Node, drop: Drop) -> tuple[int, ...]:
        """Its shape without ``drop``, for any batch."""
        left = [size for dim, size in enumerate(self.shapes[node]) if dim not in drop]
        return tuple(left) if 0 in drop else (-1, *left[1:])

    def spare(self, node: fx.Node, not_these: Sequence[int] = ()) -> Drop:
        """The dimensions to drop: ones, from the front, as many as are too many."""
        shape = self.shapes.get(node, ())
        ones = [dim for dim in range(2, len(shape)) if shape[dim] == 1 and dim not in not_these]
        return tuple(ones[: max(0, len(shape) - RANK)])

    def concerned(self, node: fx.Node) -> bool:
        """Whether ``node`` has something to drop, by itself or because it reads what has."""
        reads = [arg for arg in node.all_input_nodes if arg in self.shapes]
        return bool(self.spare(node)) or any(self.drops[arg] for arg in reads)

    def rewritten(self, node: fx.Node) -> Drop | None:
        """Emit ``node`` squeezed and say what it lost; None where it stays as it is."""
        if not self.concerned(node):
            return None
        if node.target is torch.reshape:
            drop = self.spare(node)
            value = node.args[0]
            assert isinstance(value, fx.Node)
            shape = self.without(node, drop)
            same = value in self.shapes and shape == self.without(value, self.drops[value]) and shape[0] == -1
            self.made[node] = (
                self.made[value] if same else self.graph.call_function(torch.reshape, (self.made[value], shape))
            )
            return drop
        if node.op == "call_module":
            return self.layer(node, self.module.get_submodule(str(node.target)))
        if node.op != "call_function":
            return None
        if node.target in _ELEMENTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            return self.copied(node, self.spare(node))
        if node.target is torch.cat:
            return self.cat(node)
        if node.target in _PARTS and isinstance(node.args[1], int):
            return self.part(node, node.args[1])
        if node.target in _REDUCTIONS and len(node.args) > 2:
            return self.reduced(node)
        if node.target is torch.select and isinstance(node.args[0], fx.Node):
            return self.selected(node, node.args[0])
        if node.target is adaptive_space:
            return self.adaptive(node)
        return None

    def copied(self, node: fx.Node, drop: Drop) -> Drop:
        """The same operator on squeezed operands; those of a lower rank stand at the end, as they broadcast."""
        rank = len(self.shapes[node])

        def operand(arg: fx.Node) -> fx.Node:
            skip = rank - len(self.shapes.get(arg, ()))
            return self.of(arg, tuple(dim - skip for dim in drop if dim >= skip))

        self.made[node] = self.graph.node_copy(node, operand)
        return drop

    def layer(self, node: fx.Node, layer: nn.Module) -> Drop | None:
        source = node.args[0]
        if not isinstance(source, fx.Node) or source not in self.shapes:
            return None
        before, after = self.shapes[source], self.shapes.get(node, ())
        if isinstance(layer, Affine) and len(before) == len(after) > RANK:
            return self.copied(node, self.spare(node))
        if not isinstance(layer, LoweredConv) or layer.pieces is not None or layer.conv.transposed:
            return None
        layer = self.own(node, layer)
        conv, kernels = layer.conv, layer.kernels
        trivial = [
            dim
            for dim in range(2, len(before))
            if before[dim] == after[dim] == kernels[0].shape[dim] == 1 and conv.padding[dim - 2] == (0, 0)
        ]
        drop = self.dropped(before, trivial)
        if drop is None:
            return None
        kept = [dim - 2 for dim in range(2, len(before)) if dim not in drop]
        conv.stride = tuple(conv.stride[dim] for dim in kept)
        conv.padding = tuple(conv.padding[dim] for dim in kept)
        conv.dilation = tuple(conv.dilation[dim] for dim in kept)
        for index, kernel in enumerate(kernels):
            shape = [size for dim, size in enumerate(kernel.shape) if dim not in drop]
            kernels[index] = nn.Parameter(kernel.detach().reshape(shape), requires_grad=False)
        return self.copied(node, drop)

    def own(self, node: fx.Node, layer: LoweredConv) -> LoweredConv:
        """The layer, or a copy of it where it is called elsewhere too: its dimensions are this call's."""
        calls = [other for other in self.module.graph.nodes if (other.op, other.target) == (node.op, node.target)]
        if len(calls) > 1:
            layer = copy.deepcopy(layer)
            node.target = f"squeezed_{node.name}"
            self.module.add_submodule(node.target, layer)
        return layer

    def dropped(self, shape: tuple[int, ...], trivial: Sequence[int]) -> Drop | None:
        """Which of a convolution's dimensions that do nothing go; None where those would not be enough."""
        drop = tuple(trivial[: len(shape) - RANK])
        return drop if len(shape) - len(drop) <= RANK else None

    def cat(self, node: fx.Node) -> Drop | None:
        parts, dim = node.args
        if not isinstance(parts, (list, tuple)) or not isinstance(dim, int):
            return None
        drop = self.spare(node, (dim,))
        new = [self.of(part, drop) for part in parts if isinstance(part, fx.Node)]
        self.made[node] = self.graph.call_function(torch.cat, (new, dim - sum(gone < dim for gone in drop)))
        return drop

    def part(self, node: fx.Node, dim: int) -> Drop:
        drop = self.spare(node, (dim,))
        self.copied(node, drop)
        source, _, *rest = self.made[node].args
        self.made[node].args = (source, dim - sum(gone < dim for gone in drop), *rest)
        return drop

    def reduced(self, node: fx.Node) -> Drop | None:
        source, dims, keepdim = node.args[:3]
        if not isinstance(source, fx.Node) or not isinstance(dims, (list, tuple)):
            return None
        before = self.shapes[source]
        rank = len(before)
        over = {int(dim) % rank for dim in dims if isinstance(dim, int)}
        if keepdim and self.drops[source] == () and set(self.spare(node)) == over - {1}:
            self.made[node] = self.graph.call_function(node.target, (self.of(source, ()), sorted(over), False))  # type: ignore[arg-type]
            return self.spare(node)
        drop = self.spare(source)
        left = [dim - sum(gone < dim for gone in drop) for dim in sorted(over - set(drop))]
        value = self.of(source, drop)
        made = self.graph.call_function(node.target, (value, left, keepdim)) if left else value  # type: ignore[arg-type]
        if keepdim:
            self.made[node] = made
            return drop
        shape = self.without(node, ())
        self.made[node] = self.graph.call_function(torch.reshape, (made, shape)) if set(drop) - over else made
        return ()

    def selected(self, node: fx.Node, source: fx.Node) -> Drop | None:
        """The only entry of a dimension is what is left when it is dropped."""
        drop = self.drops[source] or self.spare(source)
        if drop != (node.args[1],):
            return None
        self.made[node] = self.of(source, drop)
        return ()

    def adaptive(self, node: fx.Node) -> Drop | None:
        source, kind, lead, size = node.args
        if not isinstance(source, fx.Node) or not isinstance(lead, int) or not isinstance(size, (list, tuple)):
            return None
        drop = self.spare(source, range(lead + 1))
        left = tuple(length for at, length in enumerate(size) if lead + 1 + at not in drop)
        if any(self.shapes[node][dim] != 1 for dim in drop) or not left:
            return None
        self.made[node] = self.graph.call_function(adaptive_space, (self.of(source, drop), kind, lead, left))
        return drop


class _Flatten(_Squeeze):
    """Drops every dimension of a value at a single point but the rows and the channels."""

    def __init__(self, module: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]], caches: Sequence[Cache]) -> None:
        super().__init__(module, shapes)
        given = [node for node in module.graph.nodes if node.op == "placeholder"]
        self.held = dict(zip(given[len(given) - len(caches) :], caches, strict=True))
        self.flat: set[fx.Node] = set()
        (results,) = (node for node in module.graph.nodes if node.op == "output")
        self.news = set(results.args[0][len(results.args[0]) - len(caches) :])

    def run(self) -> tuple[Cache, ...]:  # type: ignore[override]
        super().run()
        done = []
        for held, cache in self.held.items():
            shape = cache.spec.shape[:1] if held in self.flat else cache.spec.shape
            done.append(replace(cache, spec=replace(cache.spec, shape=shape)))
        return tuple(done)

    def cache_of(self, node: fx.Node) -> list[fx.Node]:
        """The cache of a history of points that only pools and delays read."""
        layer = self.layer_of(node)
        if not isinstance(layer, History) or type(layer) is not History or layer.depth == 0:
            return []
        caches: Any = node.kwargs.get("caches", ())
        readers = [reader for known in node.users if known.args[1] == 0 for reader in known.users]
        fit = all(isinstance(self.layer_of(reader), (Tap, WindowReduce)) for reader in readers)
        return [cache for cache in caches if fit and cache in self.held]

    def layer_of(self, node: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def spare(self, node: fx.Node, not_these: Sequence[int] = ()) -> Drop:
        shape = self.shapes.get(node, ())
        points = len(shape) > 2 and all(size == 1 for size in shape[2:]) and not any(dim > 1 for dim in not_these)
        return tuple(range(2, len(shape))) if points and node.op not in ("placeholder", "get_attr") else ()

    def dropped(self, shape: tuple[int, ...], trivial: Sequence[int]) -> Drop | None:
        return tuple(trivial) if len(trivial) == len(shape) - 2 else None

    def rewritten(self, node: fx.Node) -> Drop | None:
        source: Any = node.args[0] if node.args else None
        if node.op == "output":
            leaves: Any = node.args[0]
            flat = tuple(self.made[leaf] if leaf in self.news else self.of(leaf, ()) for leaf in leaves)
            self.made[node] = self.graph.output(flat)
            return ()
        if node.op == "call_module" and isinstance(layer := self.layer_of(node), History):
            held = self.cache_of(node)
            if not held or not self.drops[source]:
                return None
            self.flat.update(held)
            layer.frame = layer.frame[:1]
            return self.passed(node, self.spare(source))
        if node.target is operator.getitem and self.drops.get(source):
            return self.passed(node, self.drops[source])
        if isinstance(self.layer_of(node), (Tap, WindowReduce, Gate)):
            return self.passed(node, self.drops[source])
        if node.target is adaptive_space and self.spare(node) and not self.drops[source]:
            drop = self.spare(node)
            over = torch.mean if node.args[1] == "mean" else torch.amax
            self.made[node] = self.graph.call_function(over, (self.made[source], list(drop), False))
            return drop
        if node.target not in _REDUCTIONS and not any(self.drops[read] for read in node.all_input_nodes):
            return None  # a convolution gave the point: nothing may stand between it and its activation
        return super().rewritten(node)

    def passed(self, node: fx.Node, drop: Drop) -> Drop:
        """The same node, its first argument and its caches without ``drop``, the others as they are."""
        source = node.args[0]

        def operand(arg: fx.Node) -> fx.Node:
            return self.of(arg, drop) if arg is source and arg in self.shapes else self.made[arg]

        self.made[node] = self.graph.node_copy(node, operand)
        return drop

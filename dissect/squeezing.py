"""Squeezing: a step without dimensions of size 1 that only make its tensors rank 5.

Where time has ended but its dimension stays (a global pool before a 1x1x1 convolution, as in squeeze-excitation), a
frame is ``(B, C, 1, 1, 1)``. The pass drops as many of the ones as rank 4 takes, and with them the third dimension of
the convolutions in between. The law: every value is what it was, reshaped. An operator that it does not know gets
its operands in their own shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from dissect.converters.pooling import adaptive_space
from dissect.lowering import Affine, LoweredConv

__all__ = ["squeeze"]

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


def squeeze(module: fx.GraphModule, args: Sequence[Tensor]) -> None:
    """Rewrite ``module``, in place, for inputs like ``args``."""
    shapes = _Shapes(module)
    with torch.no_grad():
        shapes.run(*args)
    if any(len(shape) > RANK for node, shape in shapes.shapes.items() if node.op != "get_attr"):
        _Squeeze(module, shapes.shapes).run()


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
        shape = self.shapes[node]
        ones = [dim for dim in range(2, len(shape)) if shape[dim] == 1 and dim not in not_these]
        return tuple(ones[: max(0, len(shape) - RANK)])

    def rewritten(self, node: fx.Node) -> Drop | None:
        """Emit ``node`` squeezed and say what it lost; None where it stays as it is."""
        reads = [arg for arg in node.all_input_nodes if arg in self.shapes]
        if len(self.shapes.get(node, ())) <= RANK and not any(self.drops[arg] for arg in reads):
            return None
        if node.target is torch.reshape:
            drop = self.spare(node)
            value = node.args[0]
            assert isinstance(value, fx.Node)
            self.made[node] = self.graph.call_function(torch.reshape, (self.made[value], self.without(node, drop)))
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
        if not isinstance(layer, LoweredConv) or layer.ages is not None or layer.conv.transposed:
            return None
        conv, kernels = layer.conv, layer.kernels
        trivial = [
            dim
            for dim in range(2, len(before))
            if before[dim] == after[dim] == kernels[0].shape[dim] == 1
            and (conv.stride[dim - 2], conv.padding[dim - 2]) == (1, (0, 0))
        ]
        drop = tuple(trivial[: len(before) - RANK])
        if len(before) - len(drop) > RANK:
            return None
        kept = [dim - 2 for dim in range(2, len(before)) if dim not in drop]
        conv.stride = tuple(conv.stride[dim] for dim in kept)
        conv.padding = tuple(conv.padding[dim] for dim in kept)
        conv.dilation = tuple(conv.dilation[dim] for dim in kept)
        for index, kernel in enumerate(kernels):
            shape = [size for dim, size in enumerate(kernel.shape) if dim not in drop]
            kernels[index] = nn.Parameter(kernel.detach().reshape(shape), requires_grad=False)
        return self.copied(node, drop)

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

    def adaptive(self, node: fx.Node) -> Drop | None:
        source, kind, lead, size = node.args
        if not isinstance(source, fx.Node) or not isinstance(lead, int) or not isinstance(size, (list, tuple)):
            return None
        drop = self.spare(source, range(lead + 1))
        left = tuple(length for at, length in enumerate(size) if lead + 1 + at not in drop)
        if any(self.shapes[node][dim] != 1 for dim in drop) or not left:
            return None
        self.made[node] = self.graph.call_function(adaptive_space, (self.of(source, drop), kind, lead, left))  # type: ignore[arg-type]
        return drop

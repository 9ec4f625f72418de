"""Squeezing: a step without tensors of rank 5.

Where time has ended but its dimension stays (a global pool before a 1x1x1 convolution, as in squeeze-excitation), a
frame is ``(B, C, 1, 1, 1)``. The pass drops as many of the ones as rank 4 takes, and with them the third dimension of
the convolutions in between. Where a frame holds a window of feature maps, ``(B, C, K, H, W)``, there are no ones, and
its last two dimensions become one. The law: every value is what it was, reshaped. An operator that the pass does not
know gets its operands in their own shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dissect.converters import pointwise
from dissect.converters.adaptive import adaptive_space
from dissect.converters.indexing import sides
from dissect.converters.pooling import spaced
from dissect.lowering import Affine, LoweredConv
from dissect.stepgraph import REDUCTIONS
from dissect.windows import filled, share

__all__ = ["Drop", "Squeeze", "shapes_of", "squeeze"]

RANK = 4
_ELEMENTWISE = {torch.mul, torch.div, torch.add, torch.sub, *pointwise.KEEPS_ZERO, *pointwise.OTHER}
_PARTS = {torch.ops.aten.slice.Tensor, torch.narrow}
_NORMALISED = {torch.softmax, torch.log_softmax}
MERGED = -1  # in a Drop: the last two dimensions are one
Drop = tuple[int, ...]


def moved(dim: int, drop: Drop) -> int:
    """Where a dimension stands once those of ``drop`` are gone."""
    return dim - sum(0 <= gone < dim for gone in drop)


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
        Squeeze(module, shapes).run()


class Squeeze:
    """One walk over a graph that emits it anew; ``drops`` says which dimensions each value has lost."""

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
        if MERGED in drop:
            left[-2:] = [left[-2] * left[-1]]
        return tuple(left) if 0 in drop else (-1, *left[1:])

    def spare(self, node: fx.Node, not_these: Sequence[int] = ()) -> Drop:
        """The dimensions to drop: ones, from the front, as many as are too many; or else the last two as one."""
        shape = self.shapes.get(node, ())
        rank = len(shape)
        ones = [dim for dim in range(2, rank) if shape[dim] == 1 and dim not in not_these]
        drop = tuple(ones[: max(0, rank - RANK)])
        if rank - len(drop) == RANK + 1 and not {rank - 2, rank - 1} & {*drop, *not_these}:
            return (MERGED, *drop)
        return drop

    def concerned(self, node: fx.Node) -> bool:
        """Whether ``node`` has something to drop, by itself or because it reads what has."""
        reads = [arg for arg in node.all_input_nodes if arg in self.shapes]
        return len(self.shapes.get(node, ())) > RANK or any(self.drops[arg] for arg in reads)

    def rewritten(self, node: fx.Node) -> Drop | None:
        """Emit ``node`` squeezed and say what it lost; None where it stays as it is."""
        if not self.concerned(node):
            return None
        if node.target is torch.reshape or self.still(node):
            drop = self.spare(node)
            value = node.args[0]
            assert isinstance(value, fx.Node)
            shape = self.without(node, drop)
            same = value in self.shapes and shape == self.without(value, self.drops[value]) and shape[0] == -1
            made = self.made[value]
            self.made[node] = made if same else self.graph.call_function(torch.reshape, (made, shape))
            return drop
        if node.op == "call_module":
            return self.layer(node, self.module.get_submodule(str(node.target)))
        if node.op != "call_function":
            return None
        if node.target in _ELEMENTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            return self.copied(node, self.spare(node))
        if node.target is filled:
            return self.first(node, self.spare(node))
        if node.target is share:
            like = node.args[2]
            assert isinstance(like, fx.Node)
            self.made[node] = self.graph.node_copy(
                node, lambda arg: self.of(arg, self.spare(arg) if arg is like else ())
            )
            return self.spare(node)
        if node.target is torch.cat:
            return self.cat(node)
        if node.target in (*_PARTS, *_NORMALISED) and isinstance(node.args[1], int):
            return self.part(node, node.args[1])
        if node.target is torch.select and isinstance(node.args[1], int):
            return self.selected(node, node.args[1])
        if node.target in REDUCTIONS and len(node.args) > 2:
            return self.reduced(node)
        if node.target is adaptive_space:
            return self.adaptive(node)
        if node.target is spaced:
            return self.pooled(node)
        if node.target is F.pad:
            return self.padded(node)
        return None

    def still(self, node: fx.Node) -> bool:
        """A permutation that moves nothing but ones, which is a view."""
        if node.target is not torch.permute:
            return False
        source, order = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(order, (list, tuple))
        moving = [int(dim) for dim in order if dim == 0 or self.shapes[source][int(dim)] > 1]  # type: ignore[arg-type]
        return moving[0] == 0 and moving == sorted(moving)

    def copied(self, node: fx.Node, drop: Drop) -> Drop:
        """The same operator on squeezed operands; those of a lower rank stand at the end, as they broadcast."""
        shape = self.shapes[node]

        def operand(arg: fx.Node) -> fx.Node:
            own = self.shapes.get(arg, ())
            skip = len(shape) - len(own)
            gone = tuple(dim - skip for dim in drop if dim >= skip)
            if MERGED not in drop or prod(own[-2:]) == 1:
                return self.of(arg, (MERGED, *gone) if MERGED in drop and len(own) > 1 else gone)
            if own[-2:] == shape[-2:]:
                return self.of(arg, (MERGED, *gone))
            ones = tuple(dim for dim in range(2, len(own) - 2) if own[dim] == 1)
            sizes = (*[-1] * (len(own) - 2 - len(ones)), *shape[-2:])
            wide = self.graph.call_function(torch.Tensor.expand, (self.of(arg, ones), sizes))
            flat = self.without(arg, gone)[:-2] if len(own) > 1 else ()
            return self.graph.call_function(torch.reshape, (wide, (*flat, shape[-2] * shape[-1])))

        self.made[node] = self.graph.node_copy(node, operand)
        return drop

    def first(self, node: fx.Node, drop: Drop) -> Drop:
        """The same operator on its squeezed first operand, whose shape it keeps; the others as they are."""
        self.made[node] = self.graph.node_copy(node, lambda arg: self.of(arg, drop if arg is node.args[0] else ()))
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
        drop = self.dropped(before, [dim for dim in range(2, len(before)) if before[dim] == after[dim] == 1])
        if drop is None:
            return None
        layer = self.own(node, layer)
        conv, kernels = layer.conv, layer.kernels
        for index, kernel in enumerate(kernels):  # of one position, one tap meets it, the others its padding
            for dim in drop:
                tap, step = divmod(conv.padding[dim - 2][0], conv.dilation[dim - 2])
                met = kernel.narrow(dim, min(tap, kernel.shape[dim] - 1), 1)
                kernel = met if step == 0 and tap < kernel.shape[dim] else torch.zeros_like(met)
            shape = [size for dim, size in enumerate(kernel.shape) if dim not in drop]
            kernels[index] = nn.Parameter(kernel.detach().reshape(shape).clone(), requires_grad=False)
        kept = [dim - 2 for dim in range(2, len(before)) if dim not in drop]
        conv.stride = tuple(conv.stride[dim] for dim in kept)
        conv.padding = tuple(conv.padding[dim] for dim in kept)
        conv.dilation = tuple(conv.dilation[dim] for dim in kept)
        return self.copied(node, drop)

    def dropped(self, shape: tuple[int, ...], ones: Sequence[int]) -> Drop | None:
        """Which of a convolution's single positions go; None where those would not be enough."""
        drop = tuple(ones[: len(shape) - RANK])
        return drop if len(shape) - len(drop) <= RANK else None

    def own(self, node: fx.Node, layer: LoweredConv) -> LoweredConv:
        """The layer, or a copy of it where it is called elsewhere too: its dimensions are this call's."""
        calls = [other for other in self.module.graph.nodes if (other.op, other.target) == (node.op, node.target)]
        if len(calls) > 1:
            layer = copy.deepcopy(layer)
            node.target = f"squeezed_{node.name}"
            self.module.add_submodule(node.target, layer)
        return layer

    def cat(self, node: fx.Node) -> Drop | None:
        parts, dim = node.args
        if not isinstance(parts, (list, tuple)) or not isinstance(dim, int):
            return None
        drop = self.spare(node, (dim,))
        new = [self.of(part, drop) for part in parts if isinstance(part, fx.Node)]
        self.made[node] = self.graph.call_function(torch.cat, (new, moved(dim, drop)))
        return drop

    def part(self, node: fx.Node, dim: int) -> Drop:
        drop = self.spare(node, (dim,))
        self.copied(node, drop)
        source, _, *rest = self.made[node].args
        self.made[node].args = (source, moved(dim, drop), *rest)
        return drop

    def selected(self, node: fx.Node, dim: int) -> Drop | None:
        """One entry of a dimension: of one that is dropped, there is no other."""
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return None
        drop = self.spare(source, [at for at in (dim,) if self.shapes[source][at] > 1])
        value = self.of(source, drop)
        if dim not in drop:
            value = self.graph.call_function(torch.select, (value, moved(dim, drop), node.args[2]))
        self.made[node] = value
        return tuple(gone - (gone > dim) for gone in drop if gone != dim)

    def reduced(self, node: fx.Node) -> Drop | None:
        source, dims, keepdim = node.args[:3]
        if not isinstance(source, fx.Node) or not isinstance(dims, (list, tuple)):
            return None
        before = self.shapes[source]
        rank = len(before)
        over = {int(dim) % rank for dim in dims if isinstance(dim, int)}
        last = {rank - 2, rank - 1} & over
        if len(last) == 1 and len(over) > 1 and MERGED in self.spare(source):  # all others first, then that one
            first = self.graph.call_function(node.target, (source, sorted(over - last), True))  # type: ignore[arg-type]
            self.shapes[first] = tuple(1 if dim in over - last else size for dim, size in enumerate(before))
            kept = self.reduced(first)
            assert kept is not None
            self.drops[first] = kept
            shape = tuple(size for dim, size in enumerate(self.shapes[first]) if dim not in over - last)
            rows = self.graph.call_function(torch.reshape, (self.made[first], (-1, *shape[1:])))
            at = [dim - sum(gone < dim for gone in over - last) for dim in last]
            made = self.graph.call_function(node.target, (rows, at, keepdim))  # type: ignore[arg-type]
            self.graph.erase_node(first)
            if keepdim:
                made = self.graph.call_function(torch.reshape, (made, self.without(node, self.spare(node))))
            self.made[node] = made
            return self.spare(node) if keepdim else ()
        drop = self.spare(source, () if len(last) != 1 else (rank - 1,))
        merged = MERGED in drop
        left = [moved(dim, drop) for dim in sorted(over - set(drop)) if not merged or dim != rank - 1]
        value = self.of(source, drop)
        made = self.graph.call_function(node.target, (value, left, keepdim)) if left else value  # type: ignore[arg-type]
        if keepdim:
            self.made[node] = made
            return drop
        shape = self.without(node, ())
        changed = {gone for gone in drop if gone != MERGED} - over or (merged and not last)
        self.made[node] = self.graph.call_function(torch.reshape, (made, shape)) if changed else made
        return ()

    def adaptive(self, node: fx.Node) -> Drop | None:
        source, kind, lead, size = node.args
        if not isinstance(source, fx.Node) or not isinstance(lead, int) or not isinstance(size, (list, tuple)):
            return None
        grown = [dim for dim, length in enumerate(self.shapes[node]) if dim > lead and length != 1]
        drop = self.spare(source, (*range(lead + 1), *grown))
        left = tuple(length for at, length in enumerate(size) if lead + 1 + at not in drop)
        if not left or MERGED in drop:
            return None
        self.made[node] = self.graph.call_function(adaptive_space, (self.of(source, drop), kind, lead, left))
        return drop

    def padded(self, node: fx.Node) -> Drop | None:
        """A padding with a constant, without dimensions of one position that it leaves alone."""
        source, widths, *rest = node.args
        if (
            not isinstance(source, fx.Node)
            or not isinstance(widths, (list, tuple))
            or rest[:1] not in ([], ["constant"])
        ):
            return None
        pairs = sides(len(self.shapes[node]), widths)
        drop = self.spare(node, [dim for dim, pair in pairs.items() if pair != (0, 0)])
        if MERGED in drop:
            return None
        flat = [width for dim, pair in pairs.items() if dim not in drop for width in pair]
        self.made[node] = self.graph.call_function(F.pad, (self.of(source, drop), flat, *rest), node.kwargs)
        return drop

    def pooled(self, node: fx.Node) -> Drop | None:
        """A pool in space without the dimensions of one position that its window leaves alone."""
        source, name, lead, options = node.args
        if not isinstance(source, fx.Node) or not isinstance(lead, int) or not isinstance(options, dict):
            return None
        before, after = self.shapes[source], self.shapes[node]
        sizes, pads = options["kernel_size"], options["padding"]
        alone = [at for at, size in enumerate(sizes) if size == 1 and pads[at] == 0]
        drop = self.dropped(before, [at for at in (lead + 1 + at for at in alone) if before[at] == after[at] == 1])
        left = [at for at in range(len(sizes)) if lead + 1 + at not in (drop or ())]
        if drop is None or not left or ("divisor_override" in options and len(left) == 1):
            return None
        picked = {
            key: tuple(value[at] for at in left) if isinstance(value, tuple) else value
            for key, value in options.items()
        }
        target = f"{str(name)[:-2]}{len(left)}d"
        self.made[node] = self.graph.call_function(spaced, (self.of(source, drop), target, lead, picked))
        return drop

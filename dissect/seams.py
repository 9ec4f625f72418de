"""What is laid behind each other along one axis, treated alike, and cut apart again, without the axis.

Coordinate attention pools a clip over all axes but one, for each of its axes, joins the vectors, sends them through one
layer of 1x1x1, and splits what comes out where it was joined: ``torch.split(f(torch.cat([t, h, w], 2)), [T, H, W], 2)``. The
positions of time, rows and columns would be one axis, which is none of them. ``f`` looks at one position at a time, so it is
done part by part. The law is that of :mod:`dissect.rewording`: the graph computes what it computed before.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from dissect.kernels import CONVOLUTIONS, settings_of
from dissect.unwrapping import derived
from dissect.values import Value

__all__ = ["unjoined"]

aten = torch.ops.aten
_NORM = aten._native_batch_norm_legit_no_training.default
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


class _Joined(Exception):
    """Something that needs the parts together."""


def unjoined(node: fx.Node, trace: Mapping[str, Value]) -> bool:
    """Say a concatenation of time with another axis part by part; whether it is one, and everything behind it allows it."""
    if node.target is not aten.cat.default:
        return False
    given: Any = (*node.args, 0)
    parts: Sequence[fx.Node] = given[0]
    values = [trace.get(part.name) for part in parts]
    dim = given[1] % node.meta["val"].dim()
    if any(value is None or value.constant for value in values):
        return False
    kinds = {value.axes[dim].kinds for value in values if value is not None and value.shape[dim] > 1}
    if "T" not in kinds or len(kinds) < 2:
        return False
    joined = _Parts(node, parts, dim)
    try:
        joined.apart()
    except _Joined:
        for made in reversed(joined.made):
            node.graph.erase_node(made)
        return False
    return True


class _Parts:
    """The parts of everything that is made of a concatenation."""

    def __init__(self, node: fx.Node, parts: Sequence[fx.Node], dim: int) -> None:
        self.node, self.dim = node, dim
        self.sizes = [int(part.meta["val"].shape[dim]) for part in parts]
        self.seams = [0, *accumulate(self.sizes)]
        self.parts: dict[fx.Node, list[fx.Node]] = {node: list(parts)}
        self.made: list[fx.Node] = []
        self.done: list[tuple[fx.Node, fx.Node]] = []  # what stands for what was cut out

    def apart(self) -> None:
        """Rewrite all of it; raises :class:`_Joined` where that cannot be."""
        for node in list(self.node.graph.nodes):
            if not any(read in self.parts for read in node.all_input_nodes):
                continue
            if node.target in _SPLITS:
                self.split(node)
            elif node.target is aten.slice.Tensor:
                self.slice(node)
            else:
                self.map(node)
        for node, part in self.done:
            node.replace_all_uses_with(part)

    def map(self, node: fx.Node) -> None:
        """An operator that looks at one position at a time."""
        if node.kwargs or not self.positionwise(node):
            raise _Joined
        made: list[fx.Node] = []
        with node.graph.inserting_before(node):
            for index in range(len(self.sizes)):
                args = fx.node.map_arg(
                    node.args, lambda read: self.parts[read][len(made)] if read in self.parts else read
                )
                made.append(derived(node, node.target, args, f"part_{index}"))
        self.made += made
        self.parts[node] = made

    def positionwise(self, node: fx.Node) -> bool:
        value: Any = node.meta.get("val")
        args: Any = node.args
        if node.target is operator.getitem:
            return bool(args[1] == 0 and args[0].target is _NORM)
        if node.target is _NORM:
            value = value[0]
        if not isinstance(value, Tensor) or value.dim() <= self.dim or value.shape[self.dim] != self.seams[-1]:
            return False
        alone = args[0] in self.parts and not any(read in self.parts for read in node.all_input_nodes[1:])
        if node.target in CONVOLUTIONS:
            _, weight, _, stride, padding, _, _ = settings_of(node)
            at = self.dim - 2
            kernel = weight.meta["val"].shape[self.dim] if at >= 0 else 0
            return alone and kernel == 1 and stride[at] == 1 and (padding == "valid" or padding[at] == 0)
        if node.target in (_NORM, aten.batch_norm.default):
            return alone and self.dim != 1
        if node.target is aten.linear.default:
            return alone and self.dim != value.dim() - 1
        if torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target is torch.ops.dissect.dropout.default:
            return all(self.meets(read, value.dim()) for read in node.all_input_nodes)
        return False

    def meets(self, node: fx.Node, rank: int) -> bool:
        """Whether every position meets its own part of it, or the same."""
        shape = node.meta["val"].shape
        at = self.dim - (rank - len(shape))
        return len(shape) == rank if node in self.parts else at < 0 or shape[at] == 1

    def split(self, node: fx.Node) -> None:
        args: Any = (*node.args, 0)
        sizes = [int(part.shape[args[2]]) for part in node.meta["val"]]
        dims = node.meta["val"][0].dim()
        if args[2] % dims != self.dim or sizes != self.sizes:
            raise _Joined
        for user in node.users:
            if user.target is not operator.getitem:
                raise _Joined
            index: Any = user.args[1]
            self.done.append((user, self.parts[args[0]][index]))

    def slice(self, node: fx.Node) -> None:
        args: Any = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
        source, dim, start, stop, step = args
        if dim % node.meta["val"].dim() != self.dim or step != 1:
            raise _Joined
        first, last, _ = slice(start, stop).indices(self.seams[-1])
        cuts = list(zip(self.seams, self.seams[1:], strict=False))
        if (first, last) not in cuts:
            raise _Joined
        self.done.append((node, self.parts[source][cuts.index((first, last))]))

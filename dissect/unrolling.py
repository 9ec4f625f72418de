"""Unrolling undone: a loop over frames that a capture wrote out becomes one node again.

``torch.stack([f(x[:, :, t]) for t in range(T)], 2)`` is captured as T copies of ``f``, one a frame. Where all copies
are one function of their frame, with the same parameters and constants, in the order of the frames, one copy stands
for all: ``f`` between :func:`frame_of` and :func:`frames_to`. The law: the graph computes what it computed before.
Copies are compared node by node; what differs anywhere but in the index of the frame is left as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree  # the specs that torch.export itself hands out

from dissect.capturing import Captured
from dissect.copies import Differ, shape_of
from dissect.inputs import Inputs

__all__ = [
    "SUMS",
    "Frame",
    "Loop",
    "duplicate",
    "ends",
    "frame_in",
    "frame_of",
    "frames_to",
    "instead",
    "loops",
    "rolled",
    "together",
    "unlisted",
    "value_written",
]

aten = torch.ops.aten
#: what a chain of an operator is over an axis
SUMS: dict[Any, Any] = {
    aten.add.Tensor: aten.sum.dim_IntList,
    aten.maximum.default: aten.amax.default,
    aten.minimum.default: aten.amin.default,
}


def frame_of(x: Tensor, dim: int, keepdim: bool) -> Tensor:
    """Marks the one frame that stands for every frame of ``x`` along ``dim``."""
    return x.narrow(dim, 0, 1) if keepdim else x.select(dim, 0)


def frames_to(x: Tensor, dim: int, count: int, stacked: bool) -> Tensor:
    """Marks the end of a loop over ``count`` frames: its results stacked, or concatenated, along ``dim``."""
    return torch.stack([x] * count, dim) if stacked else torch.cat([x] * count, dim)


@dataclass(frozen=True)
class Frame:
    """One frame of a tensor, ``x[dim, index]``, or several, ``x[dim, index : index + width]``."""

    source: fx.Node
    dim: int
    index: int
    keepdim: bool
    width: int = 1


@dataclass(frozen=True)
class Loop:
    """A loop that was written out.

    end        the node that puts the copies' results together
    copies     the results, in the order of the frames
    sources    the tensors, and dimensions, whose frames the copies take
    shared     activations that all copies take as they are
    inside     the nodes of the copies
    """

    end: fx.Node
    copies: tuple[fx.Node, ...]
    sources: tuple[tuple[fx.Node, int], ...]
    shared: tuple[fx.Node, ...]
    inside: frozenset[fx.Node] = frozenset()


def unlisted(captured: Captured, inputs: Inputs) -> Captured:
    """One placeholder for each tensor of ``inputs``: a list of frames becomes one tensor and its frames."""
    captured = duplicate(captured)
    graph = captured.graph
    given = [node for node in graph.nodes if node.op == "placeholder" and node.name in captured.inputs]
    names = []
    for unit in inputs.units:
        count = unit.axes[0].size if unit is not None and unit.listed else 1
        nodes, given = given[:count], given[count:]
        if unit is None:
            continue
        if not unit.listed:
            names.append(nodes[0].name)
            continue
        with graph.inserting_before(nodes[0]):
            whole = graph.create_node("placeholder", f"{nodes[0].name}_frames", name=f"{nodes[0].name}_frames")
        whole.meta["val"] = torch.stack([node.meta["val"] for node in nodes], 1)
        last = next(node for node in reversed(graph.nodes) if node.op == "placeholder")
        with graph.inserting_after(last):
            for index, node in reversed(list(enumerate(nodes))):
                frame = graph.create_node(
                    "call_function", aten.select.int, (whole, 1, index), name=f"{node.name}_frame"
                )
                frame.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(frame)
        for node in nodes:
            graph.erase_node(node)
        names.append(whole.name)
    return replace(captured, inputs=tuple(names))


def duplicate(captured: Captured) -> Captured:
    """The same network with a graph of its own."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in captured.graph.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].name = node.name  # a copy is renamed where the name is a builtin's, as `input` is
    return replace(captured, graph=graph)


def loops(captured: Captured) -> list[Loop]:
    """The loops over frames that a graph holds."""
    for node in list(captured.graph.nodes):
        _set_apart(captured, node)
    found = []
    for node in captured.graph.nodes:
        for copies in ends(node):
            try:
                matcher = _Matcher(captured, len(copies))
                matcher.match(copies)
            except Differ:
                continue
            if matcher.sources and not _lengthens(node, matcher.wide) and not _neighbours(node, copies):
                inside = frozenset(part for row in matcher.seen for part in row if len(set(row)) > 1)
                found.append(Loop(node, tuple(copies), tuple(matcher.sources), tuple(matcher.shared), inside))
    return found


def rolled(captured: Captured, found: Sequence[Loop]) -> Captured:
    """The graph with one copy in place of the loops ``found``; ``captured`` is what :func:`unlisted` gave, and changes."""
    graph = captured.graph
    clones: dict[tuple[fx.Node, ...], fx.Node] = {}
    gone: set[fx.Node] = set()
    for loop in found:
        if loop.end in gone or gone.intersection(loop.copies):
            continue  # it goes over the results of another; the next round takes it
        gone.add(loop.end)
        matcher = _Matcher(captured, len(loop.copies), clones)
        with graph.inserting_before(loop.end):
            body = matcher.match(loop.copies, build=True)
            assert body is not None
            result = together(loop.end, loop.end, body, len(loop.copies))
        instead(loop.end, result)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    graph.lint()
    return captured


def together(end: fx.Node, way: fx.Node, body: fx.Node, count: int, start: int = 0) -> fx.Node:
    """The results of ``count`` rounds, from the one that stands for all, put together as the operator ``way`` does it.

    ``end`` is the value that it becomes; the first ``start`` results are left out.
    """
    graph = end.graph
    stacked, chain = way.target is not aten.cat.default, way.target in SUMS
    at = 2 if way.target is aten.select_scatter.default else 1
    along: Any = way.args[at] if len(way.args) > at else 0
    dim = 1 if chain else along % way.meta["val"].dim()
    calls: list[tuple[Any, tuple[Any, ...], str]] = [(frames_to, (dim, count, stacked), "")]
    if start:
        size = 1 if stacked else body.meta["val"].shape[dim]
        calls.append((aten.slice.Tensor, (dim, start * size, count * size), "_later"))
    if chain:
        calls.append((SUMS[way.target], ([dim],), "_all"))
    result = body
    for target, args, suffix in calls:
        value = target(result.meta["val"], *args)
        result = graph.create_node("call_function", target, (result, *args), name=f"rolled_{end.name}{suffix}")
        result.meta = {**end.meta, "val": value}
    return result


def instead(node: fx.Node, result: fx.Node) -> None:
    """``result`` in the place of ``node``, which has the same value, under its name."""
    name = node.name
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
    result.name = name


def _lengthens(node: fx.Node, wide: set[tuple[int, int]]) -> bool:
    """Whether a node puts windows behind each other along time again: pieces that stay frames are no loop."""
    if node.target is not aten.cat.default:
        return False
    along: Any = node.args[1] if len(node.args) > 1 else 0
    value = node.args[0][0].meta["val"]  # type: ignore[index, union-attr]
    dim = along % value.dim()
    return (dim, value.dim()) in wide and value.shape[dim] > 1


def _neighbours(node: fx.Node, copies: Sequence[fx.Node]) -> bool:
    """Whether the copies are shifts of a clip as they are, joined with no dimension of their own: no windows of a loop."""
    first = frames_in(copies[0])
    return first is not None and first.width > 1 and node.target is not aten.stack.default


def _set_apart(captured: Captured, node: fx.Node) -> None:
    """One part in front of a loop's results, or behind them, that is made otherwise than all others: joined to the rest.

    ``torch.stack([*frames, torch.zeros_like(frames[0])])`` is a stack of the frames, and zeros behind it.
    """
    if node.target not in (aten.stack.default, aten.cat.default) or len(node.args[0]) < 3:  # type: ignore[arg-type]
        return
    parts: list[Any] = list(node.args[0])  # type: ignore[arg-type]
    kinds = [_kind(part) for part in parts]
    spots = [at for at in (0, len(parts) - 1) if kinds.count(kinds[at]) == 1]
    if len(spots) != 1 or len(set(kinds)) != 2:
        return
    others = tuple(part for at, part in enumerate(parts) if at != spots[0])
    if all(frames_in(part) for part in others) and _Matcher(captured, len(others)).frames(others) is None:
        return  # a frame again and again in front of the clip, or frames in no order: no loop
    if len({(part.target, str(part.args)) for part in parts if isinstance(part, fx.Node)}) < len(parts):
        return  # a frame again and again is no loop
    along: Any = node.args[1] if len(node.args) > 1 else 0
    dim = along % node.meta["val"].dim()
    with node.graph.inserting_before(node):
        alone = parts[spots[0]]
        rest = node.graph.create_node("call_function", node.target, (others, dim), name=f"{node.name}_loop")
        rest.meta = {**node.meta, "val": node.target([part.meta["val"] for part in others], dim)}
        if node.target is aten.stack.default:
            value = alone.meta["val"]
            alone = node.graph.create_node(
                "call_function", aten.unsqueeze.default, (alone, dim), name=f"{node.name}_alone"
            )
            alone.meta = {**node.meta, "val": value.unsqueeze(dim)}
    node.target = aten.cat.default
    node.args = ([alone, rest] if spots[0] == 0 else [rest, alone], dim)


def _kind(part: Any) -> Any:
    """How a part is made: the operator, and the shape."""
    return (part.target if part.op == "call_function" else part, shape_of(part)) if isinstance(part, fx.Node) else None


def ends(node: fx.Node) -> Iterator[list[fx.Node]]:
    """The copies that a node may put together."""
    if node.op != "call_function":
        return
    if node.target in (aten.stack.default, aten.cat.default):
        parts: list[Any] = list(node.args[0])  # type: ignore[arg-type]
        if len(parts) > 1 and all(isinstance(part, fx.Node) for part in parts):
            yield parts
    elif node.target is aten.select_scatter.default and not any(
        user.target is node.target and user.args[0] is node for user in node.users
    ):
        size = node.meta["val"].shape[node.args[2]]
        written: dict[int, fx.Node] = {}
        end: Any = node
        while isinstance(end, fx.Node) and end.target is node.target and end.args[2] == node.args[2]:
            written.setdefault(end.args[3] % size, value_written(end.args[1]))
            end = end.args[0]
        if len(written) == size > 1:
            yield [written[index] for index in range(size)]
    elif node.target in SUMS and not any(user.target is node.target and user.args[0] is node for user in node.users):
        terms: list[Any] = []
        at: Any = node
        while isinstance(at, fx.Node) and at.target is node.target and not at.kwargs and len(at.args) == 2:
            if at is not node and len(at.users) > 1:
                break  # somebody reads what it came to on the way
            terms.append(at.args[1])
            at = at.args[0]
        terms.append(at)
        terms = [term for term in reversed(terms) if term != 0]
        if len(terms) > 1 and all(isinstance(term, fx.Node) for term in terms):
            yield terms


def value_written(node: Any) -> fx.Node:
    """What a copy writes into a tensor of the same shape."""
    whole = node.target is aten.copy.default and shape_of(node) == shape_of(node.args[1])
    return node.args[1] if whole else node  # type: ignore[no-any-return]


def frame_in(node: fx.Node) -> Frame | None:
    """The node as one frame of a tensor, if it is that."""
    found = frames_in(node)
    return found if found is not None and found.width == 1 else None


def frames_in(node: fx.Node) -> Frame | None:
    """The node as one frame of a tensor, or several neighbours, if it is that."""
    args: Any = node.args
    if node.target is aten.select.int:
        size = args[0].meta["val"].shape[args[1]]
        return Frame(args[0], args[1] % args[0].meta["val"].dim(), args[2] % size, False)
    if node.target is aten.slice.Tensor:
        source, dim, start, stop = (*args, *(0, None, None)[len(args) - 1 :])[:4]
        value = source.meta["val"]
        first, last, _ = slice(start, stop).indices(value.shape[dim])
        part = 0 < last - first < value.shape[dim] and (len(args) < 5 or args[4] == 1)
        return Frame(source, dim % value.dim(), first, True, last - first) if part else None
    if node.target is operator.getitem and isinstance(args[0], fx.Node):
        owner, index = args
        source = owner.args[0]
        if owner.target is aten.unbind.int:
            value = source.meta["val"]
            return Frame(source, (owner.args[1] if len(owner.args) > 1 else 0) % value.dim(), index, False)
        if owner.target in (aten.split.Tensor, aten.chunk.default, aten.split_with_sizes.default):
            value = source.meta["val"]
            dim = (owner.args[2] if len(owner.args) > 2 else 0) % value.dim()
            ones = all(part.shape[dim] == 1 for part in owner.meta["val"])
            return Frame(source, dim, index, True) if ones and value.shape[dim] > 1 else None
    return None


class _Matcher:
    """Compares copies node by node, in step; ``build`` writes the one that stands for all."""

    def __init__(
        self, captured: Captured, count: int, clones: dict[tuple[fx.Node, ...], fx.Node] | None = None
    ) -> None:
        self.captured = captured
        self.count = count
        self.clones = {} if clones is None else clones
        self.seen: set[tuple[fx.Node, ...]] = set()
        self.sources: list[tuple[fx.Node, int]] = []
        self.shared: list[fx.Node] = []
        self.wide: set[tuple[int, int]] = set()  # dimension and rank of what the copies take several frames of
        self.constants: dict[fx.Node, bool] = {}

    def match(self, copies: Sequence[fx.Node], build: bool = False) -> fx.Node | None:
        """Walk from ``copies`` down to their frames; raises Differ where they part. Post-order, without recursion."""
        stack: list[tuple[tuple[fx.Node, ...], bool]] = [(tuple(copies), False)]
        while stack:
            row, ready = stack.pop()
            if row in self.seen and (not build or row in self.clones):
                continue
            first = row[0]
            if all(node is first for node in row):
                if not self.constant(first):
                    self.shared.append(first)
                self.seen.add(row)
                self.clones[row] = first
                continue
            frames = self.frames(row)
            if frames is not None:
                self.seen.add(row)
                if build and row not in self.clones:
                    self.clones[row] = self.marked(row, frames)
                continue
            children = self.children(row)
            if ready:
                self.seen.add(row)
                if build and row not in self.clones:
                    self.clones[row] = self.cloned(row)
                continue
            stack.append((row, True))
            stack.extend((child, False) for child in children)
        return self.clones[tuple(copies)] if build else None

    def constant(self, node: fx.Node) -> bool:
        """Whether a node depends on parameters alone."""
        queue, seen = [node], set()
        while queue:
            at = queue.pop()
            if at in seen or self.constants.get(at):
                continue
            seen.add(at)
            if at.op == "placeholder" and at.name not in self.captured.tensors:
                return False
            queue.extend(at.all_input_nodes)
        self.constants.update(dict.fromkeys(seen, True))
        return True

    def frames(self, row: tuple[fx.Node, ...]) -> list[Frame] | None:
        """The row as frames of one tensor, evenly spaced and in order, if it is that."""
        found = [frames_in(node) for node in row]
        first = found[0]
        if first is None or self.constant(first.source):
            return None
        frames = [frame for frame in found if frame is not None]
        if len(frames) != len(row) or any(
            (f.source, f.dim, f.keepdim, f.width) != (first.source, first.dim, first.keepdim, first.width)
            for f in frames
        ):
            return None
        step = frames[1].index - first.index
        if step < 1 or 2 * (frames[-1].index - first.index + first.width) < first.source.meta["val"].shape[first.dim]:
            return None
        if any(frame.index != first.index + step * at for at, frame in enumerate(frames)):
            return None
        if len(frames) < first.width > step:  # x[:, :-1] beside x[:, 1:]: neighbours of every frame, not two windows
            return None
        if first.width > 1:
            self.wide.add((first.dim, first.source.meta["val"].dim()))
        if (first.source, first.dim) not in self.sources:
            self.sources.append((first.source, first.dim))
        return frames

    def children(self, row: tuple[fx.Node, ...]) -> list[tuple[fx.Node, ...]]:
        """The rows that a row's nodes read; raises Differ where the nodes are not the same operator with the same settings."""
        first = row[0]
        if first.target is frame_of:  # frames of a loop that is rolled: what differs between them is no frame of it
            raise Differ
        flat = [pytree.tree_flatten((node.args, dict(node.kwargs))) for node in row]
        for node, (leaves, spec) in zip(row, flat, strict=True):
            same = (
                node.op == "call_function" == first.op
                and node.target is first.target
                and spec == flat[0][1]
                and len(leaves) == len(flat[0][0])
            )
            if not same or shape_of(node) != shape_of(first):
                raise Differ
        children = []
        for column in zip(*(leaves for leaves, _ in flat), strict=True):
            if all(isinstance(leaf, fx.Node) for leaf in column):
                children.append(tuple(column))
            elif any(isinstance(leaf, fx.Node) for leaf in column) or any(
                type(leaf) is not type(column[0]) or leaf != column[0] for leaf in column
            ):
                raise Differ
        return children

    def marked(self, row: tuple[fx.Node, ...], frames: list[Frame]) -> fx.Node:
        graph, first = row[0].graph, frames[0]
        source, size = first.source, first.source.meta["val"].shape[first.dim]
        step = frames[1].index - first.index
        if first.width > 1:
            source, step = self.windows(row[0], first, frames[-1], step), 1
            return self.mark(row[0], source, first.dim, False)
        stop = frames[-1].index + 1 if frames[-1].index + step < size else size
        if (first.index, step, stop) != (0, 1, size):
            part = (source, first.dim, first.index, stop, step)
            value = source.meta["val"]
            source = graph.create_node("call_function", aten.slice.Tensor, part, name=f"rolled_{row[0].name}_part")
            source.meta = {**row[0].meta, "val": aten.slice.Tensor(value, *part[1:])}
        return self.mark(row[0], source, first.dim, first.keepdim)

    def mark(self, like: fx.Node, source: fx.Node, dim: int, keepdim: bool) -> fx.Node:
        """The frame of ``source`` that stands for every frame."""
        frame = like.graph.create_node("call_function", frame_of, (source, dim, keepdim), name=f"rolled_{like.name}")
        frame.meta = dict(like.meta)
        return frame

    def windows(self, like: fx.Node, first: Frame, last: Frame, step: int) -> fx.Node:
        """Windows of several frames, one for each copy, on a dimension of their own behind that of time."""
        source, dim, node = first.source, first.dim, first.source
        size = source.meta["val"].shape[dim]
        stop = last.index + first.width
        stop = stop if stop + step <= size else size
        rank = source.meta["val"].dim()
        order = [*range(dim + 1), rank, *range(dim + 1, rank)]
        calls: list[tuple[Any, tuple[Any, ...]]] = []
        if (first.index, stop) != (0, size):
            calls.append((aten.slice.Tensor, (dim, first.index, stop)))
        calls += [(aten.unfold.default, (dim, first.width, step)), (aten.permute.default, (order,))]
        for target, args in calls:
            value = target(node.meta["val"], *args)
            name = f"rolled_{like.name}_{str(target).split('.')[1]}"
            node = like.graph.create_node("call_function", target, (node, *args), name=name)
            node.meta = {**like.meta, "val": value}
        return node

    def cloned(self, row: tuple[fx.Node, ...]) -> fx.Node:
        first = row[0]
        children = iter([self.clones[child] for child in self.children(row)])
        leaves, spec = pytree.tree_flatten((first.args, dict(first.kwargs)))
        args, kwargs = pytree.tree_unflatten(
            [next(children) if isinstance(leaf, fx.Node) else leaf for leaf in leaves], spec
        )
        node = first.graph.create_node("call_function", first.target, args, kwargs, name=f"rolled_{first.name}")
        node.meta = dict(first.meta)
        return node

"""The builder of the template graph: it emits nodes, installs modules at their paths, and keeps shapes in the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from dissect import ledger
from dissect.capturing import Captured
from dissect.ledger import Axes, Axis, alike
from dissect.origins import op_name, source_of
from dissect.plan import Row
from dissect.primitives import Primitive
from dissect.timing import Timing
from dissect.values import Refused, Value

__all__ = ["Builder"]


class Builder:
    """The template under construction, and the captured node at hand."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.node: fx.Node = next(iter(captured.graph.nodes))
        self.path = ""
        self.rows: list[Row] = []
        self.element_size = 4
        self.readers = {
            captured.tensors[node.name][0]: len(node.users)
            for node in captured.graph.nodes
            if node.op == "placeholder" and node.name in captured.tensors
        }
        taken = {name.partition(".")[0] for name, _ in captured.tensors.values()}
        # where primitives live: a name that no module of the network's own has
        self.home = next(name for name in ("temporal", *map("temporal_{}".format, range(1, 99))) if name not in taken)
        self._gets: dict[str, fx.Node] = {}
        self._installed: set[str] = set()

    # -- facts

    @property
    def source(self) -> str:
        return source_of(self.node)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape that the original operator gave for the example."""
        return tuple(int(size) for size in self.node.meta["val"].shape)

    def row(self, decision: str, *, exact: bool, reason: str = "", **facts: Any) -> None:
        """Record what becomes of the node at hand."""
        op = op_name(self.node.target)
        verdict = "exact" if exact else "approximate"
        self.rows.append(Row(self.path, op, decision, verdict, reason, source=self.source, **facts))

    def bytes(self, frame: Iterable[int]) -> int:
        """Bytes of one frame tensor of one stream."""
        size = self.element_size
        for length in frame:
            size *= length
        return size

    # -- building

    def arg(self, value: Any) -> Any:
        return map_aggregate(value, lambda leaf: leaf.node if isinstance(leaf, Value) else leaf)

    def call(
        self,
        target: Callable[..., Any],
        args: Sequence[Any],
        axes: Axes,
        timing: Timing | None,
        dtype: torch.dtype,
        **kwargs: Any,
    ) -> Value:
        """Emit one frame-wise operator."""
        node = self.graph.call_function(target, self.arg(tuple(args)), self.arg(kwargs))
        return Value(node, axes, timing, dtype)

    def module(
        self,
        path: str,
        module: nn.Module,
        args: Sequence[Any],
        axes: Axes,
        timing: Timing,
        dtype: torch.dtype,
        **kwargs: Any,
    ) -> Value:
        """Emit a call of ``module``, installed at ``path``."""
        node = self.graph.call_module(self.install(path, module), self.arg(tuple(args)), self.arg(kwargs))
        node.meta["path"], node.meta["frame"] = self.path, axes.frame
        return Value(node, axes, timing, dtype)

    def primitive(
        self,
        name: str,
        module: Primitive,
        args: Sequence[Any],
        axes: Axes,
        timing: Timing,
        dtype: torch.dtype,
        **kwargs: Any,
    ) -> Value:
        """Emit a primitive without parameters; it is installed under ``home``, named after the layer."""
        return self.module(self.free(name), module, args, axes, timing, dtype, **kwargs)

    def free(self, name: str) -> str:
        stem = f"{self.home}.{(self.path or 'top').replace('.', '_')}_{name}"
        path, count = stem, 1
        while path in self._installed:
            count += 1
            path = f"{stem}_{count}"
        return path

    def layer(
        self, kind: Callable[..., nn.Module], weights: Mapping[str, Value | None]
    ) -> tuple[str, nn.Module] | None:
        """The module for a layer whose tensors are all its own: its original path and ``kind(**tensors)``.

        None where the tensors are computed, shared with an earlier use, or named otherwise; they are then passed as arguments.
        """
        given = {leaf: value for leaf, value in weights.items() if value is not None}
        paths = set()
        for leaf, value in given.items():
            if value.name is None or value.name.rpartition(".")[2] != leaf or self.readers[value.name] > 1:
                return None
            paths.add(value.name.rpartition(".")[0])
        if len(paths) != 1:
            return None
        path = paths.pop()
        if not path or path in self._installed or any(self.has(f"{path}.{leaf}") for leaf in given):
            return None
        tensors = {leaf: None if value is None else value.tensor.detach().clone() for leaf, value in weights.items()}  # type: ignore[union-attr]
        return path, kind(**tensors)

    def install(self, path: str, module: nn.Module) -> str:
        owner, _, leaf = path.rpartition(".")
        parent = self.container(owner)
        old = parent._modules.get(leaf)
        if old is not None:
            for name, child in old.named_children():
                module.add_module(name, child)
        parent.add_module(leaf, module)
        self._installed.add(path)
        return path

    def container(self, path: str) -> nn.Module:
        module = self.root
        for atom in path.split(".") if path else ():
            if atom not in module._modules:
                module.add_module(atom, nn.Module())
            child = module._modules[atom]
            assert child is not None
            module = child
        return module

    def has(self, name: str) -> bool:
        owner, _, leaf = name.rpartition(".")
        module: nn.Module | None = self.root
        for atom in owner.split(".") if owner else ():
            module = module._modules.get(atom) if module is not None else None
        return module is not None and (leaf in module._parameters or leaf in module._buffers)

    def get(self, name: str, tensor: Tensor) -> fx.Node:
        """A parameter or buffer by its original name; installed only if a node reads it in the end."""
        if name not in self._gets:
            self._gets[name] = self.graph.create_node("get_attr", name)
        return self._gets[name]

    def constant(self, tensor: Tensor, name: str = "constant") -> Value:
        """A new constant tensor."""
        path = self.free(name)
        self._installed.add(path)
        owner, _, leaf = path.rpartition(".")
        self.container(owner).register_buffer(leaf, tensor, persistent=False)
        node = self.graph.create_node("get_attr", path)
        return Value(node, ledger.plain(tensor.shape), None, tensor.dtype, tensor)

    # -- shapes

    def reframe(self, value: Value, axes: Axes) -> Value:
        """The same numbers under another ledger: a reshape of the frame tensor where its shape changes."""
        if value.constant:
            raise TypeError("a constant is reshaped as it is")
        if value.axes.frame == axes.frame:
            return replace(value, axes=axes)
        node = self.graph.call_function(torch.reshape, (value.node, (-1, *axes.frame)))
        return replace(value, node=node, axes=axes)

    def broadcast(self, values: Sequence[Value]) -> tuple[list[Value], Axes]:
        """Operands of an elementwise operator as frame tensors that broadcast; the result's ledger."""
        moving = [value for value in values if not value.constant]
        out = ledger.broadcast([value.axes for value in moving])
        shape = torch.broadcast_shapes(*[value.shape for value in values])
        if len(shape) > len(out):
            out = Axes((*(Axis() for _ in range(len(shape) - len(out))), *out.dims))
        out = Axes(
            tuple(
                axis if axis.size == size else ledger.plain_axis(size)
                for axis, size in zip(out.dims, shape, strict=True)
            )
        )
        operands = []
        for value in values:
            if value.constant:
                operands.append(self.conform(value, out))
                continue
            wanted = ledger.aligned_shape(value.axes, out)
            if wanted != value.axes.frame:
                value = replace(value, node=self.graph.call_function(torch.reshape, (value.node, (-1, *wanted))))
            operands.append(value)
        return operands, out

    def conform(self, value: Value, out: Axes) -> Value:
        """A constant as an operand of a frame tensor with ledger ``out``: batch and time dimensions are taken out.

        Refuses a constant that differs from frame to frame or from row to row.
        """
        assert value.tensor is not None
        tensor, node = value.tensor, value.node
        pad = len(out) - tensor.dim()
        shape: list[int] = []
        for dim, axis in enumerate(out.dims):
            if dim < pad:
                if not axis.dropped:
                    shape.append(1)
                continue
            at = dim - pad
            if not set(axis.kinds) <= {"S", "K"} and tensor.shape[at] > 1:
                tensor, node = self.shared(tensor, node, at, axis)
            if not axis.dropped:
                shape.append(tensor.shape[at])
        while shape and shape[0] == 1 and len(shape) > 1:
            shape.pop(0)
        if tensor.dim() and tuple(tensor.shape) != tuple(shape):
            node = self.graph.call_function(torch.reshape, (node, tuple(shape)))
        return replace(value, node=node, tensor=tensor)

    def shared(self, tensor: Tensor, node: fx.Node, dim: int, axis: Axis) -> tuple[Tensor, fx.Node]:
        """A constant over an axis that carries batch or time: what all rows and frames have in common of it.

        Refuses one that differs between them.
        """
        sizes = [factor.size for factor in axis.factors]
        before, after = tensor.shape[:dim], tensor.shape[dim + 1 :]
        if len(sizes) > 1:
            tensor = tensor.reshape(*before, *sizes, *after)
            node = self.graph.call_function(torch.reshape, (node, tuple(tensor.shape)))
        for index, factor in enumerate(axis.factors):
            if factor.inner or factor.size == 1:
                continue
            at = dim + index
            if not alike(tensor, tensor.narrow(at, 0, 1)):
                where = "frame to frame of the clip (a position in the clip has no meaning in a stream)"
                raise Refused(
                    f"a constant that differs from {where if factor.kind == 'T' else 'row to row of the batch'}",
                    clipwise=factor.kind == "T",
                )
            tensor = tensor.narrow(at, 0, 1)
            node = self.graph.call_function(torch.narrow, (node, at, 0, 1))
        if len(sizes) > 1:
            tensor = tensor.reshape(*before, axis.space, *after)
            node = self.graph.call_function(torch.reshape, (node, tuple(tensor.shape)))
        return tensor, node

"""The rewrite: one walk over the captured graph that traces time, plans, and builds the dissected graph.

The result is one template graph on frame tensors (see :mod:`dissect.ledger`) in which only temporal
primitives mix time; :mod:`dissect.forms` turns it into the clip form and the step form. Converters do
the work of each operator through :class:`Context`; they name primitives and know nothing of caches.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

from dissect import ledger
from dissect.capturing import Captured
from dissect.carried import carried
from dissect.carrying import FILLED, Carrying, recurring
from dissect.errors import DissectError, Refusal
from dissect.holding import FirstHistory
from dissect.inputs import Inputs
from dissect.ledger import Axes, Axis, LedgerError
from dissect.meeting import ends_met, spread
from dissect.plan import Branches, Options, Row
from dissect.primitives import Clock, CumulativeMean, Gate, History, Primitive, Query, Tap, WindowReduce
from dissect.registry import find, is_patient
from dissect.timing import Timing, joined
from dissect.unrolling import Loop, loops, rolled, unlisted
from dissect.unwrapping import unwrapped
from dissect.windows import apply, outward

__all__ = ["Context", "Dissected", "Refused", "Value", "converted", "rewrite"]


@dataclass(frozen=True)
class Value:
    """A tensor during the walk.

    node     its frame tensor in the template graph (for a constant: the constant, in its original shape)
    axes     the ledger of the original tensor
    timing   where its positions lie; None for a constant (a parameter, or what is computed from those alone)
    tensor   a constant's value
    name     a parameter's or buffer's original name
    """

    node: fx.Node
    axes: Axes
    timing: Timing | None
    dtype: torch.dtype
    tensor: Tensor | None = None
    name: str | None = None

    @property
    def constant(self) -> bool:
        return self.timing is None

    @property
    def shape(self) -> tuple[int, ...]:
        """The original tensor's shape, with the batch of the capture and the example's clip length."""
        return self.axes.shape

    @property
    def time(self) -> int | None:
        return self.axes.time

    @property
    def clock(self) -> Timing:
        assert self.timing is not None
        return self.timing


class Refused(Exception):
    """Raised by a converter: this operator has no streaming form.

    ``clipwise``: it has one over a window of all positions, for it tells one position of the clip from another.
    """

    def __init__(self, reason: str, fix: str = "", clipwise: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.fix = fix
        self.clipwise = clipwise


@dataclass(frozen=True)
class Output:
    """One leaf of the network's result: its value, or a Python constant.

    ``own`` is the original's ledger where that merges time with other axes; the value has it on an axis of its own.
    """

    value: Value | None
    literal: Any = None
    own: Axes | None = None


@dataclass(frozen=True)
class Dissected:
    """The template graph and all that was learnt on the way."""

    root: nn.Module
    graph: fx.Graph
    inputs: Inputs
    placeholders: tuple[fx.Node, ...]
    outputs: tuple[Output, ...]
    rows: tuple[Row, ...]
    refusals: tuple[Refusal, ...]
    captured: Captured
    trace: Mapping[str, Value]
    grain: int = 1
    doubted: frozenset[str] = frozenset()
    home: str = "temporal"

    @property
    def time_dims(self) -> tuple[int | None, ...]:
        """The dimension of time of each dense input, None where it has none."""
        return tuple(unit.time for unit in self.inputs.groups)


class _Poison:
    """Stands for the result of a refused operator, so that one walk finds all refusals."""


POISON = _Poison()


class Context:
    """What a converter sees: the node at hand, the options, and the tools to build its frame-wise form."""

    def __init__(self, captured: Captured, options: Options) -> None:
        self.captured = captured
        self.options = options
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.node: fx.Node = next(iter(captured.graph.nodes))
        self.path = ""
        self.rows: list[Row] = []
        self.frames = 0
        self.like: fx.Node | None = None
        self.clock: tuple[Clock, fx.Node] | None = None
        self.branches: Branches | None = None
        self.temporal: set[Any] = set()
        self.heads: set[Any] = set()  # nodes where a head begins
        self.element_size = 4
        # clip lengths that differ from the example's by a multiple of this keep what was read off its sizes
        self.grain = 1
        self.readers = {
            captured.tensors[node.name][0]: len(node.users)
            for node in captured.graph.nodes
            if node.op == "placeholder" and node.name in captured.tensors
        }
        # products across time of which every position is wanted, not the newest alone
        self.whole: frozenset[str] = frozenset()
        self.waitable: set[int] = set()  # rows of global pools, which can wait for the whole clip
        self.matrices: dict[str, frozenset[int]] = {}  # such products so far, and the rows that hang on them
        taken = {name.partition(".")[0] for name, _ in captured.tensors.values()}
        # where primitives live: a name that no module of the network's own has
        self.home = next(name for name in ("temporal", *map("temporal_{}".format, range(1, 99))) if name not in taken)
        self._histories: dict[tuple[fx.Node, bool], tuple[History, fx.Node]] = {}
        self._gates: dict[tuple[Any, ...], Value] = {}
        self._masks: dict[int, fx.Node] = {}
        self._gets: dict[str, fx.Node] = {}
        self._installed: set[str] = set()

    # -- facts

    @property
    def preset(self) -> str:
        return self.options.preset

    @property
    def exact(self) -> bool:
        """Positions stay where they are, and the clip's edges are kept by gates and delays."""
        return self.options.preset == "exact"

    @property
    def source(self) -> str:
        return source_of(self.node)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape that the original operator gave for the example."""
        return tuple(int(size) for size in self.node.meta["val"].shape)

    @property
    def settings(self) -> dict[str, Any]:
        """The overrides for the layer at hand."""
        return self.options.of(self.path)

    def row(self, decision: str, *, exact: bool, reason: str = "", **facts: Any) -> None:
        """Record what becomes of the node at hand."""
        op = op_name(self.node.target)
        verdict = "exact" if exact else "approximate"
        self.rows.append(Row(self.path, op, decision, verdict, reason, source=self.source, **facts))

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
            if not torch.equal(tensor, tensor.narrow(at, 0, 1).expand_as(tensor)):
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

    # -- time

    def align(self, values: Sequence[Value]) -> tuple[list[Value], Timing]:
        """Bring operands to one delay (they wait for the latest); refuses operands of different strides."""
        moving = [value for value in values if not value.constant]
        if len(moving) > 1:
            moving = ends_met(self, moving)
        if not self.exact:
            moving = [self.sure(value) for value in moving]
        carrying = [value for value in moving if value.time is not None or value.clock.running]
        self.broadcast_back(moving)
        strides = {value.clock.stride for value in carrying}
        if len(strides) > 1:
            raise Refused(
                f"its operands have temporal strides {' and '.join(map(str, sorted(strides)))}, so their positions do not meet",
            )
        ready = [self.settled(value) for value in moving]
        latest = max(value.clock.delay + (value.clock.wait if len(moving) > 1 else 0) for value in ready)
        waits = [latest - value.clock.delay for value in ready]
        if any(waits):
            self.row(f"wait {max(waits)} frames to meet", exact=True)
        done = iter([self.delay(value, latest - value.clock.delay) for value in ready])
        out = [value if value.constant else next(done) for value in values]
        clocks = [value.clock for value in out if not value.constant]
        leading = [
            value.clock for value in out if not value.constant and (value.time is not None or value.clock.running)
        ]
        return out, clocks[0] if len(clocks) == 1 else joined(leading[:1] + clocks)

    def sure(self, value: Any) -> Any:
        """The value once its positions are certain: delayed by what it must still wait, its front filled."""
        if not isinstance(value, Value) or value.constant:
            return value
        clock = value.clock
        if clock.still:
            return spread(self, value)
        if clock.first:
            value = self.delay(value, -clock.delay)
            value = replace(value, timing=value.clock.but(first=False))
        late = self.delay(value, clock.wait)
        return late if self.exact else replace(late, timing=late.clock.but(delay=clock.delay, wait=0))

    def broadcast_back(self, values: Sequence[Value]) -> None:
        """Note a value of the whole clip that meets single frames: offline, they see the clip's future through it."""
        frames = [value.time is not None or value.clock.running for value in values]
        if not any(frames):
            return
        for index in frozenset().union(
            *(value.clock.pooled for value, moves in zip(values, frames, strict=True) if not moves)
        ):
            row = self.rows[index]
            reason = "window of the past, broadcast back onto every frame"
            if self.exact and index in self.waitable:
                reason += f"; --set '{row.path}: wait=true' buys exactness with delay"
            self.rows[index] = replace(row, verdict="approximate", reason=reason, future=True)

    def settled(self, value: Value) -> Value:
        """A value whose position 0 is not before the stream (it is, behind a zero padding): delayed until it is not."""
        return self.delay(value, -value.clock.delay) if value.clock.delay < 0 else value

    def confirmed(self, value: Any) -> Any:
        """The value with what it must wait until it is certain that the clip has its positions (see :meth:`sure`).

        A crop of the clip's end, or a stride that drops a rest, takes away positions whose frames have been seen.
        """
        if not self.exact or not isinstance(value, Value) or value.constant:
            return value
        return replace(value, timing=value.clock.certain(self.frames))

    def mixes(self, value: Value) -> None:
        """Note that something reads the past positions of ``value``: rows that are exact at the newest alone lose that."""
        reason = "window of the past, where each frame of the offline network sees the whole clip"
        for index in value.clock.newest:
            self.rows[index] = replace(self.rows[index], verdict="approximate", reason=reason, future=True)

    def history(self, value: Value, depth: int) -> fx.Node:
        """The last ``depth`` values of ``value`` and the present one, for primitives that read the past."""
        self.mixes(value)
        return self._history(value, depth)

    def _history(self, value: Value, depth: int) -> fx.Node:
        key = (value.node, value.clock.first)
        if key not in self._histories:
            module = FirstHistory(value.axes.frame, 0) if value.clock.first else History(value.axes.frame, 0)
            path = self.install(self.free("history"), module)
            late = (self.ask(Query(1, 1, None)),) if value.clock.first else ()
            node = self.graph.call_module(path, (value.node, *late))
            node.meta["path"] = self.path
            self._histories[key] = (module, node)
        module, node = self._histories[key]
        module.depth = max(module.depth, depth)
        return node

    def delay(self, value: Value, frames: int) -> Value:
        """The value as it was ``frames`` frames ago."""
        if frames == 0 or value.constant:
            return value
        source = self._gates.get(gated(value, 0.0), value)
        bare = ledger.bare(value.axes)
        history = self._history(self.reframe(source, bare), frames)
        clock = value.clock
        timing = clock.delayed(frames).but(fill=clock.fill if clock.fill == 0.0 else None, padding=(0, 0), first=False)
        axes = value.axes.windowed(lambda window: replace(window, lag=window.lag + frames))
        tap = Tap(frames, scalar=not bare.frame)
        return self.reframe(self.primitive("delay", tap, (history,), bare, timing, value.dtype), axes)

    def ask(self, query: Query) -> fx.Node:
        """The clock's answer to a question, ``(rows,)``."""
        if self.clock is None:
            clock = Clock()
            assert self.like is not None
            node = self.graph.call_module(self.install(f"{self.home}.clock", clock), (self.like,))
            node.meta["path"] = "clock"
            self.clock = (clock, node)
        index = self.clock[0].ask(query)
        if index not in self._masks:
            self._masks[index] = self.graph.call_function(operator.getitem, (self.clock[1], index))
        return self._masks[index]

    def inside(
        self, timing: Timing, shift: int = 0, positions: int = 1, phase: bool = False, widen: tuple[int, int] = (0, 0)
    ) -> fx.Node:
        """How many of the last ``positions`` positions, seen from ``shift`` frames ago, are the value's own (1 or 0, for one)."""
        length = timing.length.then(widen[0] + widen[1] - 1) if self.exact else None
        delay = timing.delay - widen[0] * timing.stride
        return self.ask(Query(delay, timing.stride, length, shift, positions, phase))

    def gate(self, value: Value, fill: float = 0.0) -> Value:
        """The value with ``fill`` outside its positions, as a padding shows it. Presets without delay need none."""
        if value.clock.fill == fill:
            return value
        if not self.exact:
            if fill == 0.0:  # nothing but the zeros of fresh caches lies before position 0
                return replace(value, timing=value.clock.but(fill=0.0))
            value = self.delay(value, 0)
        key = gated(value, fill)
        if key not in self._gates:
            mask = self.inside(value.clock)
            timing = value.clock.but(fill=fill, wild=False)
            self._gates[key] = self.primitive(
                "gate", Gate(fill, value.clock.wild), (value, mask), value.axes, timing, value.dtype
            )
        return replace(self._gates[key], axes=value.axes)

    def pool_time(
        self, value: Value, kind: str, axes: Axes, *, op: str = "", count: int | None = None, scale: float = 1.0
    ) -> Value:
        """A mean, sum, max or min over all of time becomes one over a window, or cumulative, or none.

        ``value`` is already reduced inside the frame; ``axes`` is the ledger of the result.
        """
        clock = value.clock
        positions = count if count is not None else clock.length(self.frames)
        settings = self.settings
        policy = settings.get("pool", "window" if "window" in settings else self.options.pool)
        window = settings.get("window", self.options.window)
        if self.preset == "d3d":
            positions = min(positions * clock.removed, self.frames)
        positions, given = (window, True) if window is not None else (positions, False)
        stride = clock.stride
        value = self.settled(value)
        clock = value.clock
        timing = clock.plain()
        facts: dict[str, Any] = {"kernel": count or clock.length(self.frames), "stride": stride}
        if policy == "none" or (policy == "window" and positions == 1):
            exact = policy == "window" and not given
            why = "" if exact else "every frame for itself"
            self.row("per frame", exact=exact, reason=why, **facts)
            return replace(value, axes=axes, timing=timing)
        if policy == "cumulative":
            self.mixes(value)
            value = self.settled(value)
            phased = self.exact and stride > 1
            masked = (self.inside(clock, phase=phased),) if self.exact else ()
            before = CumulativeMean(value.axes.frame, kind="mean" if kind == "sum" else kind)
            # The first frames that it took in hold what stands before the stream, and it never forgets them.
            timing = timing.but(pooled=frozenset({len(self.rows)}), endless=clock.endless or clock.old > 0)
            out = self.primitive("pool", before, (value, *masked), axes, timing, value.dtype)
            self.row(
                "cumulative " + kind,
                exact=self.exact,
                reason="" if self.exact else "over all frames so far",
                **facts,
            )
            return out if kind != "sum" else self.call(torch.mul, (out, facts["kernel"]), axes, out.timing, out.dtype)
        wait = self.exact and bool(settings.get("wait"))
        if wait:  # everything within reach on both sides: for a clip as long as the example's, all of it
            timing = timing.but(delay=clock.delay + (positions - 1) * stride, new=clock.new)
            positions = 2 * positions - 1
        ages = tuple(index * stride for index in reversed(range(positions)))
        exact = self.exact and not given
        if not wait:
            timing = timing.but(pooled=frozenset({len(self.rows)}))
            self.waitable.add(len(self.rows))
        note = f"window of {positions}" + (f" at stride {stride}" if stride > 1 else "")
        if kind in ("max", "min"):
            masks = () if clock.nonneg and kind == "max" else tuple(self.inside(clock, age) for age in ages)
            value = self.gate(value) if not masks else value
            extra: dict[str, Any] = {"masks": masks} if masks else {}
            reduce = WindowReduce(kind, ages)
        else:
            value = self.gate(value)
            seen = self.inside(clock, positions=positions)
            whole = kind == "sum" and self.exact
            extra = {} if whole else {"count": seen}
            reduce = WindowReduce("sum" if whole else "mean", ages)
        history = self.history(value, ages[0])
        out = self.primitive(
            "pool", reduce, (history,), axes, timing.but(old=clock.old + ages[0]), value.dtype, **extra
        )
        if not value.axes.frame:  # a history has a dimension for it
            out = replace(out, node=self.graph.call_function(torch.reshape, (out.node, (-1,))))
        self.row(
            f"{note}, {kind}",
            exact=exact,
            reason="" if exact else "the last positions instead of the clip's",
            **facts,
        )
        if kind == "sum" and not self.exact:
            return self.call(torch.mul, (out, facts["kernel"]), axes, out.timing, out.dtype)
        return out

    def bytes(self, frame: Iterable[int]) -> int:
        """Bytes of one frame tensor of one stream."""
        size = self.element_size
        for length in frame:
            size *= length
        return size

    @property
    def in_head(self) -> bool:
        """The node at hand belongs to a head, which keeps all of its taps."""
        assert self.branches is not None
        return bool(self.heads) and self.branches.any_above(self.node, self.heads)

    @property
    def stem(self) -> bool:
        """The node at hand is (or would be) a temporal convolution that none stands above, outside of every branch."""
        assert self.branches is not None
        others = self.temporal - {self.node}
        return not self.branches.in_branch(self.node) and not self.branches.any_above(self.node, others)

    @property
    def skip(self) -> str:
        """How the convolution at hand takes in what it cached; a stem has its frames side by side, unless told otherwise."""
        free = self.preset != "d3d" or self.stem or self.in_head
        asked: str = self.settings.get("skip", "concat" if free else self.options.skip)
        return asked

    def depth(self, kernel: int) -> int:
        """Taps that the preset keeps of a temporal convolution with ``kernel`` taps, unless an override says otherwise."""
        settings = self.settings
        asked: int | None = 1 if settings.get("skip") == "none" else settings.get("depth")
        if self.preset == "d3d" and asked is None and not self.in_head:
            assert self.branches is not None
            if self.stem:
                asked = self.options.stem
            else:
                first = self.branches.first(self.node, self.temporal - {self.node})
                asked = 2 if first and self.skip != "none" else 1
        self.temporal.add(self.node)
        return min(kernel, asked if asked is not None else kernel)

    def filled(self, value: Value) -> Value:
        """The value with what a convolution or a pool shall see before the first frame: zeros, or that frame again."""
        if self.exact or self.settings.get("fill", self.options.fill) == "zeros":
            return value
        return replace(value, timing=value.clock.but(first=True))


def gated(value: Value, fill: float) -> tuple[Any, ...]:
    """What a gate is known by: slices of one tensor are one node with positions of their own."""
    clock = value.clock
    return value.node, fill, clock.delay, clock.stride, clock.length


def op_name(target: Any) -> str:
    """``aten.conv3d`` for ``torch.ops.aten.conv3d.default``."""
    if callable(target) and not isinstance(target, torch._ops.OpOverload) and hasattr(target, "__name__"):
        return str(target.__name__)
    return re.sub(r"\.(default|Tensor|int|dim|using_ints|padding|Scalar|vec|input)$", "", str(target))


def source_of(node: fx.Node) -> str:
    """``file.py:12`` of the user's own line that made a node, where the graph knows it."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    for file, line in reversed(lines):
        if "torch" not in Path(file).parts:
            return f"{Path(file).name}:{line}"
    return ""


def path_of(node: fx.Node, captured: Captured) -> str:
    """The module path of a node: where its parameters live, or the module that ran it."""
    for arg in node.all_input_nodes:
        held = captured.tensors.get(arg.name)
        if held is not None and arg.op == "placeholder" and node.meta.get("nn_module_stack") is None:
            return held[0].rpartition(".")[0]
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return re.sub(r"@\d+$", "", paths[-1]) if paths else ""


def _merges(captured: Captured) -> tuple[dict[Any, list[Any]], list[Any], list[Any]]:
    aten = torch.ops.aten
    active: dict[Any, list[Any]] = {}
    merges, strided = [], []
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            if node.name in captured.inputs:
                active[node] = []
        elif node.op == "call_function" and node.target not in FILLED:
            reads = [arg for arg in dict.fromkeys(node.all_input_nodes) if arg in active]
            if not reads:
                continue
            active[node] = reads
            shape = getattr(node.meta.get("val"), "shape", None)
            wide = [arg for arg in reads if getattr(arg.meta.get("val"), "shape", None) is not None]
            sums = node.target is aten.add.Tensor and all(arg.meta["val"].shape == shape for arg in wide)
            if len(wide) > 1 and (sums or node.target is aten.cat.default):
                merges.append(node)
            before = getattr(wide[0].meta["val"], "shape", ()) if wide else ()
            if (
                shape is not None
                and len(shape) == len(before)
                and len(shape) > 3
                and any(after < size for after, size in zip(shape[2:], before[2:], strict=True))
            ):
                strided.append(node)
    return active, merges, strided


def rewrite(captured: Captured, options: Options, inputs: Inputs) -> Dissected:
    """The template of a captured network; refusals are collected, not raised."""
    work = unwrapped(unlisted(captured, inputs))
    while True:
        found, chained = loops(work), recurring(work)
        if not found and not chained:
            break
        trace = _walk(work, options, inputs).trace
        over_time = [loop for loop in found if _over_time(loop, trace)]
        if over_time:
            work = rolled(work, over_time)
            continue
        chains = [loop for loop in chained if _over_time(loop, trace)]
        if not chains:
            break
        work = carried(work, chains[0])
    done = _walk(work, options, inputs)
    whole: frozenset[str] = frozenset()
    again = done
    while again.doubted - whole and not again.refusals:
        # More than the newest position is read of what was made of a whole window: perhaps windows all along will do.
        whole |= again.doubted
        again = _walk(work, options, inputs, whole)
    if not again.refusals and all(row.verdict == "exact" for row in again.rows):
        done = again
    return replace(done, captured=captured)


def _over_time(loop: Loop | Carrying, trace: Mapping[str, Value]) -> bool:
    """Whether a loop goes over the frames of its sources, and takes nothing else that has frames."""
    sources = [(trace.get(node.name), dim) for node, dim in loop.sources]
    shared = [trace.get(node.name) for node in loop.shared]
    return all(value is not None and value.axes[dim].is_time for value, dim in sources) and all(
        value is not None and value.time is None for value in shared
    )


def _walk(captured: Captured, options: Options, inputs: Inputs, whole: frozenset[str] = frozenset()) -> Dissected:
    """One walk over the graph; ``whole`` names products across time that every position of a window asks."""
    ctx = Context(captured, options)
    ctx.whole = whole
    active, merges, strided = _merges(captured)
    ctx.branches = Branches(active, merges, strided)
    values: dict[fx.Node, Any] = {}
    refusals: list[Refusal] = []
    outputs: list[Output] = []
    ctx.frames = inputs.frames
    placeholders: list[fx.Node] = []
    users = [node for node in captured.graph.nodes if node.op == "placeholder" and node.name in captured.inputs]
    for node, unit in zip(users, inputs.tensors, strict=True):
        placeholder = ctx.graph.placeholder(node.name)
        clock = Timing(fill=0.0, nonneg=not unit.dtype.is_floating_point)
        if unit.rate > 1:
            spacing = 1 if options.preset == "d3d" else unit.rate
            clock = clock.but(stride=spacing, removed=unit.rate, length=clock.length.then(-1, unit.rate))
        placeholders.append(placeholder)
        values[node] = Value(placeholder, unit.sized(captured.batch).inner, clock, unit.dtype)
        if unit.timed and unit.dtype.is_floating_point:
            ctx.element_size = unit.dtype.itemsize
        if ctx.like is None and unit.timed:
            ctx.like = placeholder
    for node in captured.graph.nodes:
        ctx.node = node
        if node.op == "placeholder":
            if node.name in captured.tensors:
                name, tensor = captured.tensors[node.name]
                values[node] = Value(
                    ctx.get(name, tensor), ledger.plain(tensor.shape), None, tensor.dtype, tensor, name
                )
            continue
        if node.op == "output":
            flat = node.args[0]
            outputs = [Output(values[leaf]) if isinstance(leaf, fx.Node) else Output(None, leaf) for leaf in flat]
            continue
        try:
            values[node] = converted(ctx, node, values)
        except (Refused, LedgerError) as refused:
            refusals.append(Refusal(ctx.path, op_name(node.target), str(refused), refused.fix, ctx.source))
            values[node] = POISON
    if not refusals:
        _finish(ctx, values, outputs)
    trace = {node.name: value for node, value in values.items() if isinstance(value, Value)}
    return Dissected(
        ctx.root,
        ctx.graph,
        inputs,
        tuple(placeholders),
        tuple(outputs),
        tuple(ctx.rows),
        tuple(refusals),
        captured,
        trace,
        ctx.grain,
        frozenset(
            name for name, rows in ctx.matrices.items() if ctx.exact and any(ctx.rows[row].future for row in rows)
        ),
        ctx.home,
    )


def converted(ctx: Context, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """One captured node, its arguments' values known."""
    ctx.node, ctx.path = node, path_of(node, ctx.captured)
    args, kwargs = map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    return map_aggregate(_convert(ctx, node, list(args), dict(kwargs)), ctx.confirmed)


def _convert(ctx: Context, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if node.op == "get_attr" or node.op == "call_module":
        raise Refused(
            "control flow that depends on data (a sub-graph) has no step form", "take the branch out of the forward"
        )
    leaves: list[Any] = []
    map_aggregate((args, kwargs), leaves.append)
    if any(leaf is POISON for leaf in leaves):
        return POISON
    if node.target is operator.getitem:
        return args[0][args[1]]
    held = [leaf for leaf in leaves if isinstance(leaf, Value)]
    if all(value.constant for value in held):
        return _constant(ctx, node, args, kwargs)
    found = find(node.target)
    if found is None:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise Refused("control flow inside the graph has no step form", "take it out of the forward")
        raise Refused(
            "no converter for this operator",
            f"register one with @dissect.converter(torch.ops.{op_name(node.target)}...) in a file given by --rules",
        )
    if not is_patient(node.target):
        args, kwargs = map_aggregate((args, kwargs), ctx.sure)
    return apply(ctx, found, args, kwargs)


def _constant(ctx: Context, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """An operator on constants alone: evaluated now, and emitted, so that training reaches the parameters behind it."""
    tensors, tensor_kwargs = map_aggregate(
        (args, kwargs), lambda leaf: leaf.tensor if isinstance(leaf, Value) else leaf
    )
    if "device" in kwargs:
        tensor_kwargs = {**tensor_kwargs, "device": torch.device("cpu")}
    with torch.no_grad():
        result = node.target(*tensors, **tensor_kwargs)  # type: ignore[operator]
    emitted = ctx.graph.call_function(node.target, ctx.arg(tuple(args)), ctx.arg(kwargs))  # type: ignore[arg-type]
    if isinstance(result, Tensor):
        return Value(emitted, ledger.plain(result.shape), None, result.dtype, result)
    if isinstance(result, (tuple, list)):
        parts = []
        for index, part in enumerate(result):
            item = ctx.graph.call_function(operator.getitem, (emitted, index))
            parts.append(
                Value(item, ledger.plain(part.shape), None, part.dtype, part) if isinstance(part, Tensor) else part
            )
        return tuple(parts)
    return result


def _finish(ctx: Context, values: Mapping[fx.Node, Any], outputs: list[Output]) -> None:
    """Bring the outputs to one delay, write the output node, install what is read, drop what is not."""
    outputs[:] = [replace(output, value=ctx.sure(output.value)) for output in outputs]
    moving = [output.value for output in outputs if output.value is not None and not output.value.constant]
    if not moving:
        raise DissectError("the network's output does not depend on the clip; there is nothing to stream")
    ctx.path = "output"
    latest = max(0, *(value.clock.delay for value in moving))
    for index, output in enumerate(outputs):
        if output.value is not None and not output.value.constant:
            value = outward(ctx, output.value)
            if value.time is not None and value.shape[value.time] > 1:
                ctx.mixes(value)
            late = any(
                clip <= value.clock.last(clip) for clip in range(1, max(ctx.frames, 64)) if value.clock.length(clip) > 0
            )
            if ctx.exact and late and not (ctx.clock and ctx.clock[0].flushes):
                value = ctx.gate(value)  # no layer asks when the clip ends, but the flush must be told
            value = ctx.delay(value, latest - value.clock.delay)
            apart = ledger.apart(value.axes)
            outputs[index] = Output(replace(value, axes=apart), own=None if apart is value.axes else value.axes)
    ctx.graph.output(tuple(output.value.node for output in outputs if output.value is not None))
    ctx.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    live = {node.target for node in ctx.graph.nodes if node.op == "get_attr"}
    for name, tensor in ctx.captured.tensors.values():
        if name in live and not ctx.has(name):
            owner, _, leaf = name.rpartition(".")
            home = ctx.container(owner)
            if name in ctx.captured.state and isinstance(ctx.captured.state[name], nn.Parameter):
                home.register_parameter(leaf, nn.Parameter(tensor.detach().clone()))
            else:
                home.register_buffer(leaf, tensor.detach().clone(), persistent=name in ctx.captured.state)
    if ctx.clock is not None:
        clock = ctx.clock[0]
        # Length expressions are linear in whole periods, so an age may turn back by one once every delay lies behind it.
        clock.period = lcm(*(query.stride for query in clock.queries)) if clock.flushes or clock.phased else 1
        reach = max(query.delay + query.shift + query.stride * (query.positions + 1) for query in clock.queries)
        clock.settled = -(-(max(reach, 0) + 1) // clock.period) * clock.period
    _account(ctx)


def _account(ctx: Context) -> None:
    """Write each live cache into the row of the layer that first asked for it."""
    for node in ctx.graph.nodes:
        module = ctx.root.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(module, Primitive) or isinstance(module, Clock) or not module.specs:
            continue
        size = sum(ctx.bytes(spec.shape) for spec in module.specs)
        for index, row in enumerate(ctx.rows):
            if row.path == node.meta["path"] and not row.cache_bytes:
                ctx.rows[index] = replace(row, cache_shape=module.specs[0].shape, cache_bytes=size)
                break

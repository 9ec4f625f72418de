"""What a converter sees: :class:`Context`, a builder that knows the options and the time of every value."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dissect import ledger
from dissect.building import Builder
from dissect.capturing import Captured
from dissect.holding import FirstHistory, FrontHistory, counted
from dissect.meeting import ends_met, spread
from dissect.plan import Branches, Options, Settings
from dissect.primitives import Clock, Gate, History, Query, Tap
from dissect.timing import Front, Timing, joined
from dissect.values import Refused, Value

__all__ = ["Context", "Refused", "Value"]


class Context(Builder):
    """What a converter sees: the node at hand, the options, and the tools to build its frame-wise form."""

    def __init__(self, captured: Captured, options: Options) -> None:
        super().__init__(captured)
        self.options = options
        self.frames = 0
        self.like: fx.Node | None = None
        self.clock: tuple[Clock, fx.Node] | None = None
        self.branches: Branches | None = None
        self.temporal: set[Any] = set()
        self.heads: set[Any] = set()  # nodes where a head begins
        # clip lengths that differ from the example's by a multiple of this keep what was read off its sizes
        self.grain = 1
        # products across time of which every position is wanted, not the newest alone
        self.whole: frozenset[str] = frozenset()
        self.flat = False  # copies as many as there are frames are no frames
        self.heard: set[tuple[str, str]] = set()  # overrides asked for: path and setting
        self.waitable: set[int] = set()  # rows of global pools, which can wait for the whole clip
        self.matrices: dict[str, frozenset[int]] = {}  # such products so far, and the rows that hang on them
        self._histories: dict[tuple[fx.Node, Front | None], tuple[History, fx.Node]] = {}
        self._gates: dict[tuple[Any, ...], Value] = {}
        self._masks: dict[int, fx.Node] = {}

    # -- options

    @property
    def preset(self) -> str:
        return self.options.preset

    @property
    def exact(self) -> bool:
        """Positions stay where they are, and the clip's edges are kept by gates and delays."""
        return self.options.preset == "exact"

    @property
    def settings(self) -> Settings:
        """The overrides for the layer at hand."""
        return Settings(self.options.of(self.path), self.path, self.heard)

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
                "bring them to one rate before they meet: stride, pool or resample the faster one",
            )
        ready = [value if value.clock.first else self.settled(value) for value in moving]
        latest = max(
            max(value.clock.settles, value.clock.delay + (value.clock.wait if len(moving) > 1 else 0))
            for value in ready
        )
        waits = [latest - value.clock.settles for value in ready]
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
        late = self.delay(value, max(clock.wait, clock.settles - clock.delay) if clock.first else clock.wait)
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
        """A value whose position 0 is not before the stream (it is, behind a padding), nor before it is known: delayed until it is not."""
        return self.delay(value, value.clock.settles - value.clock.delay)

    def confirmed(self, value: Any) -> Any:
        """The value with what it must wait until it is certain that the clip has its positions (see :meth:`sure`).

        A crop of the clip's end, or a stride that drops a rest, takes away positions whose frames have been seen.
        """
        if not self.exact or not isinstance(value, Value) or value.constant:
            return value
        return replace(value, timing=value.clock.certain(self.frames))

    def mixes(self, value: Value) -> None:
        """Note that something reads the past positions of ``value``: rows that are exact at the newest alone lose that."""
        self.doubt(value.clock)

    def doubt(self, clock: Timing | None) -> None:
        """The same, of a value with that timing."""
        reason = "window of the past, where each frame of the offline network sees the whole clip"
        for index in clock.newest if clock else ():
            self.rows[index] = replace(self.rows[index], verdict="approximate", reason=reason, future=True)

    def history(self, value: Value, depth: int) -> fx.Node:
        """The last ``depth`` values of ``value`` and the present one, for primitives that read the past."""
        self.mixes(value)
        return self._history(value, depth)

    def _history(self, value: Value, depth: int) -> fx.Node:
        key = (value.node, value.clock.first)
        if key not in self._histories:
            front, dtype = value.clock.first, counted(value.dtype)
            module: History
            if front is None:
                module = History(value.axes.frame, 0, dtype)
            elif front == Front():
                module = FirstHistory(value.axes.frame, 0, dtype)
            else:
                module = FrontHistory(value.axes.frame, front, dtype)
            path = self.install(self.free("history"), module)
            late = (self.ask(Query(front.known + front.stride, 1, None)),) if front else ()
            node = self.graph.call_module(path, (self.cast(value, module.dtype).node, *late))
            node.meta["path"] = self.path
            self._histories[key] = (module, node)
        module, node = self._histories[key]
        module.depth = max(module.depth, depth)
        return node

    def delay(self, value: Value, frames: int) -> Value:
        """The value as it was ``frames`` frames ago."""
        if frames == 0 or value.constant:
            return value
        assert not value.clock.first or frames >= value.clock.settles - value.clock.delay, "some of it is not known yet"
        source = value if value.clock.first else self._gates.get(gated(value, 0.0), value)
        bare = ledger.bare(value.axes)
        history = self._history(self.reframe(source, bare), frames)
        clock = value.clock
        timing = clock.delayed(frames).but(fill=clock.fill if clock.fill == 0.0 else None, padding=(0, 0), first=None)
        axes = value.axes.windowed(lambda window: replace(window, lag=window.lag + frames))
        tap = Tap(frames, scalar=not bare.frame)
        late = self.primitive("delay", tap, (history,), bare, timing, counted(value.dtype) or value.dtype)
        return self.reframe(self.cast(late, value.dtype), axes)

    def cast(self, value: Value, dtype: torch.dtype | None) -> Value:
        """The value in another dtype (None: its own)."""
        if dtype in (None, value.dtype):
            return value
        return self.call(torch.ops.aten.to.dtype, (value, dtype), value.axes, value.timing, dtype)

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

    # -- the paper's rules

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
        asked: int | None = settings.get("depth")
        asked = 1 if settings.get("skip") == "none" else asked
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
        return replace(value, timing=value.clock.but(first=Front()))


def gated(value: Value, fill: float) -> tuple[Any, ...]:
    """What a gate is known by: slices of one tensor are one node with positions of their own."""
    clock = value.clock
    return value.node, fill, clock.delay, clock.stride, clock.length

"""Cadence: which layers of a stream are due at which frame, where the network has temporal strides.

A dense stream gives an output at every frame. Offline, a network with strides has a position only every few frames, and
its late layers are needed only there. This says, node by node, at which frames a value is *due*: those at which an
output, or the history of something that is due, needs it. The law: at the frames at which an output is due, the native
step gives what the dense step gives, from caches that hold due values alone.

Frames are counted modulo the ``period``, the least common multiple of the outputs' strides; a frame's place in it is
its *phase*. Demand is followed from the outputs to the inputs. A history is due at evenly spaced phases, so that what was
``age`` frames ago is the ``ceil(age / gap)``-th value it kept, whatever the phase, and one graph serves all phases. What
keeps a cache of any other kind runs at every frame, as it does in a dense stream.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import gcd, lcm
from typing import Any

import torch
from torch import Tensor, fx, nn

from dissect import forms
from dissect.contract import CADENCES
from dissect.convolution import TemporalConv
from dissect.holding import Hold
from dissect.primitives import CacheSpec, Clock, CumulativeMean, History, Primitive
from dissect.recurrence import Recurrent
from dissect.stream import Stream
from dissect.values import Dissected, Output

__all__ = ["CADENCES", "Due", "Native", "native"]

#: what holds its values where the clock's mask is 0, and so need not run there
_HELD = (CumulativeMean, Hold, Recurrent)


@dataclass(frozen=True)
class Due:
    """The frames ``t`` with ``t % gap == start``."""

    start: int = 0
    gap: int = 1

    def at(self, time: int) -> bool:
        return time % self.gap == self.start


class Native:
    """A stream at its network's own rate: a step form whose caches are written only when they are due.

    step        one frame and the caches in, outputs and new caches out; of these only what is due at a frame counts
    cache_list  its caches, which know when they are due; ``outputs`` says when each output that moves exists
    period      frames after which everything repeats
    """

    def __init__(self, dissected: Dissected, due: Mapping[fx.Node, Due], period: int) -> None:
        self.dissected = dissected
        self.period = period
        self.step = forms.build(dissected, "step").eval()
        self._due = due
        dues = [due[node] for node in dissected.graph.nodes for _ in _specs(dissected, node)]
        self.cache_list = tuple(
            replace(cache, due=(when.start, when.gap))
            for cache, when in zip(forms.caches_of(dissected), dues, strict=True)
        )
        self.outputs = tuple(_due_of(output) for output in dissected.outputs if output.moves)

    @property
    def due(self) -> tuple[Due, ...]:
        """When each cache is written."""
        return tuple(Due(*cache.due) for cache in self.cache_list)

    def caches(self, stream: Stream, batch: int = 1) -> tuple[Tensor, ...]:
        """The caches of ``batch`` fresh streams, in the type that the given stream's have: zeros, batch first."""
        like = next((cache for cache in stream.caches() if cache.is_floating_point()), torch.empty(0))
        return forms.fresh(self.cache_list, batch, like.dtype, like.device)

    def phase(self, phase: int) -> fx.GraphModule:
        """The step without what is not due at ``phase``, to count what a frame costs; runtimes prune their own graph."""
        graph = fx.Graph()
        nodes: dict[fx.Node, fx.Node] = {}
        result = graph.graph_copy(self.step.graph, nodes)
        assert isinstance(result, tuple)
        moving = iter(self.outputs)
        dues = [next(moving) if output.moves else None for output in self.dissected.outputs if output.value is not None]
        kept = [value for value, when in zip(result, (*dues, *self.due), strict=True) if when and when.at(phase)]
        graph.output(tuple(kept))
        due = {str(node.target): when for node, when in self._due.items()}
        for node in nodes.values():
            history = self.dissected.root.get_submodule(str(node.target)) if str(node.target) in due else None
            if isinstance(history, History) and history.depth and not due[str(node.target)].at(phase):
                # It takes no value now, and its readers read its cache alone.
                with graph.inserting_before(node):
                    cache = next(iter(node.kwargs["caches"]))  # type: ignore[arg-type]
                    some = graph.call_function(torch.narrow, (cache, 1, 0, (*history.frame, 1)[0]))
                node.args = (some, *node.args[1:])
        graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        return fx.GraphModule(self.step.__dict__["run"], graph)


def native(stream: Stream) -> Native | None:
    """The stream at its network's own rate; None where that is every frame."""
    dissected = stream.dissected
    wanted = {output: _due_of(output) for output in dissected.outputs if output.moves}
    period = lcm(*(due.gap for due in wanted.values()))
    if period == 1:
        return None
    due = _demand(dissected, wanted, period)
    return Native(_spaced(dissected, due), due, period)


def _due_of(output: Output) -> Due:
    assert output.value is not None
    clock = output.value.clock
    return Due(clock.delay % clock.stride, clock.stride)


def _module(dissected: Dissected, node: fx.Node) -> nn.Module | None:
    return dissected.root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _specs(dissected: Dissected, node: fx.Node) -> tuple[CacheSpec, ...]:
    """The caches that a node keeps."""
    module = _module(dissected, node)
    return module.specs if isinstance(module, Primitive) else ()


def _ages(module: nn.Module | None) -> tuple[int, ...] | None:
    """The ages that a reader of a history reads; None for one that does not say."""
    if not isinstance(module, Primitive) or module.specs:
        return None
    if isinstance(ages := getattr(module, "ages", None), tuple):
        return ages
    age = getattr(module, "age", None)
    return (age,) if isinstance(age, int) else None


def _demand(dissected: Dissected, wanted: Mapping[Output, Due], period: int) -> dict[fx.Node, Due]:
    """When each node that keeps caches is due."""
    every = frozenset(range(period))
    needed: dict[fx.Node, frozenset[int]] = {}

    def need(nodes: Iterable[fx.Node], phases: Iterable[int]) -> None:
        for node in nodes:
            needed[node] = needed.get(node, frozenset()) | frozenset(phases)

    for output, due in wanted.items():
        assert output.value is not None
        need([output.value.node], range(due.start, period, due.gap))
    found: dict[fx.Node, Due] = {}
    for node in reversed(dissected.graph.nodes):
        phases = needed.get(node, frozenset())
        module = _module(dissected, node)
        history = next((arg for arg in node.all_input_nodes if isinstance(_module(dissected, arg), History)), None)
        if isinstance(module, History) or (isinstance(module, Primitive) and module.specs):
            held = _phase_of(dissected, node, module, period)
            if type(module) is History:
                found[node] = _evenly(phases, period)
            elif held is not None and phases <= set(range(held.start, period, held.gap)):
                found[node] = held
            else:
                found[node] = Due()
            phases = frozenset(range(found[node].start, period, found[node].gap))
        elif history is not None:
            ages = _ages(module)
            need([history], every if ages is None else {(phase - age) % period for phase in phases for age in ages})
        need((arg for arg in node.all_input_nodes if arg is not history), phases)
    return found


def _evenly(phases: frozenset[int], period: int) -> Due:
    """The sparsest evenly spaced frames that hold all of ``phases``."""
    if not phases:
        return Due(0, period)
    first = min(phases)
    gap = gcd(period, *(phase - first for phase in phases))
    return Due(first % gap, gap)


def _phase_of(dissected: Dissected, node: fx.Node, module: nn.Module, period: int) -> Due | None:
    """When a value that is held between positions takes a new one: as the clock's mask says that it was given."""
    if not isinstance(module, _HELD):
        return None
    for mask in node.all_input_nodes:
        clock = _module(dissected, mask.args[0]) if mask.args and isinstance(mask.args[0], fx.Node) else None
        if isinstance(clock, Clock) and isinstance(mask.args[1], int):
            query = clock.queries[mask.args[1]]
            if query.phase and period % query.stride == 0:
                return Due((query.delay + query.shift) % query.stride, query.stride)
    return None


def _spaced(dissected: Dissected, due: Mapping[fx.Node, Due]) -> Dissected:
    """The template over histories that keep due values alone; parameters are shared with the given one."""
    kept: dict[int, Any] = {id(tensor): tensor for tensor in (*dissected.root.parameters(), *dissected.root.buffers())}
    spaced = replace(dissected, root=copy.deepcopy(dissected.root, kept))
    for node, when in due.items():
        history = _module(spaced, node)
        if when.gap == 1 or not isinstance(history, History):
            continue
        history.depth = 0
        for reader in node.users:
            module: Any = _module(spaced, reader)
            ages = _ages(module)
            assert ages is not None, "what does not say what it reads gets every frame"
            slots = tuple(-(-age // when.gap) for age in ages)
            history.depth = max(history.depth, *slots)
            if hasattr(module, "ages"):
                module.ages = slots
            else:
                (module.age,) = slots
            if isinstance(module, TemporalConv):
                module.spacing = slots[0] - slots[1]
    return spaced

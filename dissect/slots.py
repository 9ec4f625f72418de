"""Slots: a history's past as a cache for each frame, so that little of it is copied from one step to the next.

A cache of H frames stacked is cut and joined anew in every step: it is copied twice. As H slots, the newest of them is
the value itself, the others move on by one copy, and a reader takes the frames it needs and no others. A history of
short frames stays stacked, because every slot is an operator more; it is joined once, for its reader and for its new cache.
The law: a reader sees what it saw. ``benchmarks/lowering.py`` measures it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from dissect.convolution import TemporalConv
from dissect.forms import Cache
from dissect.holding import Taps
from dissect.lowering import LoweredConv
from dissect.primitives import History, Known, Tap, WindowReduce
from dissect.stepgraph import held, layer_of, put
from dissect.windows import Gather

__all__ = ["Joined", "Slots", "slotted"]

#: values in a frame from which on a slot is cheaper than two more copies of it: 16 KiB of float32
WORTH = 4096
_READERS = (LoweredConv, TemporalConv, Tap, WindowReduce, Gather, Taps)


class Slots(Known):
    """The values of every age, oldest first, a tensor each."""

    def __init__(self, values: Sequence[Tensor]) -> None:
        self.values = tuple(values)
        self.newest = self.values[-1]

    def tap(self, age: int) -> Tensor:
        return self.values[-1 - age]


class Joined(Known):
    """The values of every age stacked in one tensor; those of the past, and the newest, also for themselves.

    Who reads the past alone is given the past alone: in the native cadence there may be no newest value to wait for.
    """

    def __init__(self, values: Tensor, past: Tensor, newest: Tensor) -> None:
        self.values, self.past, self.newest = values, past, newest

    def tap(self, age: int) -> Tensor:
        return self.newest if age == 0 else self.run(age, 1)

    def run(self, age: int, count: int) -> Tensor:
        """``count`` values, the oldest of them ``age`` frames old."""
        channels = self.newest.shape[1]
        last = age + 1 - count
        source = self.past if last > 0 else self.values
        stop = source.shape[1] - (last - (last > 0)) * channels
        return source if count * channels == source.shape[1] else source[:, stop - count * channels : stop]

    def stacked(self, ages: Sequence[int]) -> Tensor:
        falling = tuple(ages) == tuple(range(ages[0], ages[-1] - 1, -1))
        return self.run(ages[0], len(ages)) if falling else super().stacked(ages)


class SlotHistory(nn.Module):
    """A :class:`~dissect.primitives.History` of one step whose past is a cache for each frame, oldest first."""

    def forward(self, x: Tensor, caches: tuple[Tensor, ...], frames: None = None) -> Any:
        x = x.unsqueeze(1) if x.dim() == 1 else x
        return Slots((*caches, x)), (*caches[1:], x)


class JoinedHistory(nn.Module):
    """A :class:`~dissect.primitives.History` of one step whose past is one cache, joined with the newest value once."""

    def forward(self, x: Tensor, caches: tuple[Tensor], frames: None = None) -> Any:
        x = x.unsqueeze(1) if x.dim() == 1 else x
        values = torch.cat([caches[0], x], 1)
        return Joined(values, caches[0], x), (values[:, x.shape[1] :],)


def slotted(module: fx.GraphModule, caches: Sequence[Cache]) -> tuple[Cache, ...]:
    """Give every history that gains by it a cache for each frame, in place; returns the caches as they are now.

    ``caches`` are those of ``module``'s last arguments and results, in order.
    """
    graph = module.graph
    (results,) = (node for node in graph.nodes if node.op == "output")
    outputs = len(results.args[0]) - len(caches)
    made: list[Any] = list(results.args[0][:outputs])
    kept: list[Cache] = []
    for (argument, cache), new in zip(held(graph, caches).items(), results.args[0][outputs:], strict=True):
        node = _history(module, argument)
        if node is None:
            kept.append(cache)
            made.append(new)
            continue
        history = module.get_submodule(str(node.target))
        assert isinstance(history, History)
        if history.depth > 1 and prod(history.frame) < WORTH:
            put(module, str(node.target), JoinedHistory())
            kept.append(cache)
            made.append(new)
            continue
        put(module, str(node.target), SlotHistory())
        frame = (cache.spec.shape[0] // history.depth, *cache.spec.shape[1:])
        with graph.inserting_before(argument):
            slots = tuple(graph.placeholder(f"{argument.name}_{age}") for age in range(history.depth, 0, -1))
        node.kwargs = {**node.kwargs, "caches": slots}
        with graph.inserting_after(new):
            made += [graph.call_function(operator.getitem, (new.args[0], at)) for at in range(history.depth)]
        kept += [replace(cache, spec=replace(cache.spec, shape=frame))] * history.depth
        graph.erase_node(argument)
    results.args = (tuple(made),)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    return named(kept)


def named(caches: Sequence[Cache]) -> tuple[Cache, ...]:
    """The caches numbered in their order; names of one length sort as the numbers do."""
    digits = max(3, len(str(len(caches) - 1)))
    return tuple(replace(cache, name=f"cache_{at:0{digits}d}.{cache.path}") for at, cache in enumerate(caches))


def _history(module: fx.GraphModule, argument: fx.Node) -> fx.Node | None:
    """The history that reads a cache, if all its own readers take what a :class:`Known` gives."""
    (node, *others) = argument.users
    if others or type(layer_of(module, node)) is not History:
        return None
    known = [user for user in node.users if user.args[1] == 0]
    readers = [reader for read in known for reader in read.users]
    if all(isinstance(layer_of(module, reader), _READERS) for reader in readers):
        return node
    return None

"""Gating: the clock's answers as a step wants them.

The clock answers all questions at once, ``(rows, questions)``; a gate takes its column and gives it the rank of what it
masks, three operators beside the multiplication. :func:`shared` gives every reader its answer at the rank that it
needs by one split, and counts as what a sum is to be multiplied with. The law: every value is what it was, to rounding.

A live stream past its warm-up lies inside every value's positions. :func:`steady` takes that for granted: gates and
masks vanish, and with them the clock, unless something turns with the phase of a stride. Outputs during the warm-up
are then not the original's, and there is no flush.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import is_not
from typing import Any

import torch
from torch import Tensor, fx, nn

from dissect.errors import ExportError
from dissect.forms import Cache
from dissect.primitives import Clock, Gate, WindowReduce, unforgetting
from dissect.stepgraph import held, layer_of, put

__all__ = ["shared", "steady"]


@dataclass(frozen=True)
class Form:
    """A form in which answers are wanted: their rank, and whether as one over the count (at least 1) that they are."""

    rank: int
    share: bool


class Answers(nn.Module):
    """A clock's answers one by one, then those that ``wanted`` lists (a form, and the questions), one by one."""

    def __init__(self, clock: Clock, wanted: Mapping[Form, Sequence[int]]) -> None:
        super().__init__()
        self.clock = clock
        self.wanted = [(form, tuple(questions)) for form, questions in wanted.items()]

    def forward(self, like: Tensor, caches: tuple[Tensor, ...], frames: None = None) -> Any:
        table, new = self.clock.told(like, caches)
        found = [table[:, index] for index in range(table.shape[1])]
        for form, questions in self.wanted:
            picked = (
                table if questions == tuple(range(table.shape[1])) else table.index_select(1, torch.tensor(questions))
            )
            picked = 1 / picked.clamp(min=1) if form.share else picked
            picked = picked.reshape(-1, len(questions), *[1] * (form.rank - 2)) if form.rank > 2 else picked
            found += picked.split(1, 1) if len(questions) > 1 else [picked]
        return tuple(found), new


def shared(module: fx.GraphModule, ranks: Mapping[fx.Node, int]) -> None:
    """Let gates and pools take their answers from one split, in place; ``ranks`` are those of the graph's tensors."""
    clock = _clock(module)
    if clock is None:
        return
    wanted: dict[Form, list[int]] = {}
    readers: list[tuple[fx.Node, fx.Node, int, Form]] = []
    for question, answer in _answers(clock):
        for reader in answer.users:
            layer = layer_of(module, reader)
            rank = ranks.get(reader, 0)
            if not isinstance(layer, (Gate, WindowReduce)) or rank < 2:
                continue
            form = Form(rank, share=reader.kwargs.get("count") is answer)
            questions = wanted.setdefault(form, [])
            if question not in questions:
                questions.append(question)
            readers.append((reader, answer, question, form))
    if not wanted:
        return
    layer = module.get_submodule(str(clock.target))
    assert isinstance(layer, Clock)
    put(module, str(clock.target), Answers(layer, wanted))
    first, start = {}, len(layer.queries)
    for form, questions in wanted.items():
        first[form] = start
        start += len(questions)
    tuple_of = next(user for user in clock.users if user.args[1] == 0)
    for reader, answer, question, form in readers:
        with module.graph.inserting_after(answer):
            at = first[form] + wanted[form].index(question)
            own = module.graph.call_function(operator.getitem, (tuple_of, at))
        if form.share:
            reader.kwargs = {**reader.kwargs, "count": None}
            with module.graph.inserting_after(reader):
                product = module.graph.call_function(torch.mul, (reader, own))
            reader.replace_all_uses_with(product, delete_user_cb=partial(is_not, product))
        else:
            reader.replace_input_with(answer, own)
    module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def steady(module: fx.GraphModule, caches: Sequence[Cache]) -> tuple[Cache, ...]:
    """Take the stream to be past its warm-up and to have no end, in place; returns the caches that are left.

    Raises :class:`~dissect.ExportError` where a layer never forgets what it saw during the warm-up.
    """
    for name in unforgetting(module):
        raise ExportError(
            f"{name}: live=True leaves out what keeps the warm-up from it, and it never forgets; "
            "export the stream without live=True"
        )
    clock = _clock(module)
    if clock is None:
        return tuple(caches)
    layer = module.get_submodule(str(clock.target))
    assert isinstance(layer, Clock)
    asked = [(answer, layer.queries[question]) for question, answer in _answers(clock)]
    settled = {answer: query.positions for answer, query in asked if not query.phase and not query.since}
    for answer, positions in settled.items():
        for reader in list(answer.users):
            _settle(module, reader, answer, positions, settled)
    module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    if any(answer.users for _, answer in _answers(clock)):
        return tuple(caches)
    (results,) = (node for node in module.graph.nodes if node.op == "output")
    values: Any = results.args[0]
    count = len(values) - len(caches)
    kept = [at for at, cache in enumerate(caches) if cache.spec.role == "cache"]
    results.args = ((*values[:count], *(values[count + at] for at in kept)),)
    module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    for node, cache in held(module.graph, caches).items():
        if cache.spec.role != "cache":
            module.graph.erase_node(node)
    return tuple(caches[at] for at in kept)


def _settle(
    module: fx.GraphModule, reader: fx.Node, answer: fx.Node, positions: int, settled: Mapping[fx.Node, int]
) -> None:
    """Give one reader of an answer that no longer changes what it becomes."""
    layer = layer_of(module, reader)
    if isinstance(layer, Gate):
        masked: Any = reader.args[0]
        reader.replace_all_uses_with(masked)
        module.graph.erase_node(reader)
    elif isinstance(layer, WindowReduce) and reader.kwargs.get("count") is answer:
        reader.kwargs = {**reader.kwargs, "count": None}
        with module.graph.inserting_after(reader):
            mean = module.graph.call_function(torch.mul, (reader, 1 / positions))
        reader.replace_all_uses_with(mean, delete_user_cb=partial(is_not, mean))
    elif isinstance(layer, WindowReduce):
        masks: Any = reader.kwargs.get("masks", ())
        if all(mask in settled for mask in masks):
            reader.kwargs = {**reader.kwargs, "masks": (), "here": None}


def _clock(module: fx.GraphModule) -> fx.Node | None:
    """The one node that is the clock."""
    return next((node for node in module.graph.nodes if isinstance(layer_of(module, node), Clock)), None)


def _answers(clock: fx.Node) -> list[tuple[int, fx.Node]]:
    """Each answer's question, by number, and its node."""
    answers = [user for user in clock.users if user.args[1] == 0]
    return [(int(str(node.args[1])), node) for together in answers for node in together.users]

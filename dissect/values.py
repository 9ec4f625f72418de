"""What the walk of :mod:`dissect.rewrite` hands from operator to operator, and what it gives in the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dissect.capturing import Captured
from dissect.errors import Refusal
from dissect.inputs import Inputs
from dissect.ledger import Axes
from dissect.plan import Row
from dissect.timing import Timing

__all__ = ["POISON", "Dissected", "Output", "Refused", "Value"]


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

    @property
    def moves(self) -> bool:
        """Whether it depends on the clip; a step model has no other outputs."""
        return self.value is not None and not self.value.constant


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
    heard: frozenset[tuple[str, str]] = frozenset()

    @property
    def time_dims(self) -> tuple[int | None, ...]:
        """The dimension of time of each dense input, None where it has none."""
        return tuple(unit.time for unit in self.inputs.groups)


class _Poison:
    """Stands for the result of a refused operator, so that one walk finds all refusals."""


POISON = _Poison()

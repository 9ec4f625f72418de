"""Recurrence: values that a layer carries from frame to frame, and the cells that make them.

The law of :mod:`dissect.primitives` holds: carried values are caches, one evaluation of the cell a frame.
Parameters keep the original's names (``weight_ih_l0``). Source of the cells: the documentation of ``torch.nn.GRU``,
``torch.nn.LSTM`` and ``torch.nn.RNN``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dissect.primitives import CacheSpec, Primitive, lifted

__all__ = ["KINDS", "FrameRecurrence", "Kind", "Loop", "Recurrence", "Recurrent"]

States = tuple[Tensor, ...]


def gru(x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> States:
    """The GRU cell."""
    (h,) = states
    reset_x, update_x, new_x = F.linear(x, w_ih, b_ih).chunk(3, -1)
    reset_h, update_h, new_h = F.linear(h, w_hh, b_hh).chunk(3, -1)
    update = torch.sigmoid(update_x + update_h)
    new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
    return (new + update * (h - new),)


def lstm(
    x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None, w_hr: Any = None
) -> States:
    """The LSTM cell, with the projection of its output where there is one."""
    h, c = states
    enter, forget, cell, leave = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(cell)
    h = torch.sigmoid(leave) * torch.tanh(c)
    return (h if w_hr is None else F.linear(h, w_hr)), c


def rnn_tanh(x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> States:
    """Elman's cell with tanh."""
    return (torch.tanh(F.linear(x, w_ih, b_ih) + F.linear(states[0], w_hh, b_hh)),)


def rnn_relu(x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> States:
    """Elman's cell with ReLU."""
    return (torch.relu(F.linear(x, w_ih, b_ih) + F.linear(states[0], w_hh, b_hh)),)


@dataclass(frozen=True)
class Kind:
    """One recurrent operator: its cell, ATen's kernel for a whole sequence, and how many caches a layer has."""

    name: str
    cell: Callable[..., States]
    fused: Callable[..., Any]
    states: int = 1


KINDS = {
    "gru": Kind("gru", gru, torch.gru),
    "lstm": Kind("lstm", lstm, torch.lstm, 2),
    "rnn_tanh": Kind("rnn_tanh", rnn_tanh, torch.rnn_tanh),
    "rnn_relu": Kind("rnn_relu", rnn_relu, torch.rnn_relu),
}


class Recurrent(Primitive):
    """A primitive with values of its own that it carries from frame to frame: subclasses say what one frame does.

    ``carried`` are their shapes without the batch. A fresh cache is zero whatever the first value is, since it holds the
    difference from ``first``. With ``mask`` they are held where it is 0. The result is ``(outputs, carried values)``,
    each ``(rows, ...)``.
    """

    def __init__(self, carried: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.carried = tuple(tuple(shape) for shape in carried)

    @property
    def specs(self) -> tuple[CacheSpec, ...]:  # type: ignore[override]
        return tuple(CacheSpec(shape) for shape in self.carried)

    def once(self, inputs: Sequence[Tensor], states: States, held: Sequence[Any]) -> tuple[States, States]:
        """Outputs and new values of one frame, ``(N, ...)`` each; ``held`` are the constants it was given."""
        raise NotImplementedError

    def forward(
        self,
        inputs: Sequence[Tensor],
        held: Sequence[Any] = (),
        first: Sequence[Tensor | None] = (),
        mask: Tensor | None = None,
        caches: States | None = None,
        frames: int | None = None,
    ) -> Any:
        batch = inputs[0].shape[0] // (frames or 1)
        if caches is None:
            caches = tuple(inputs[0].new_zeros((batch, *shape)) for shape in self.carried)
        start = [None] * len(caches) if not first else list(first)
        states = tuple(cache if at is None else cache + at for cache, at in zip(caches, start, strict=True))
        chunked = [x.reshape(batch, frames, *x.shape[1:]) for x in inputs] if frames else []
        due = None if mask is None or frames is None else mask.reshape(batch, frames)
        steps = []
        for time in range(frames or 1):
            now = [x[:, time] for x in chunked] if frames else list(inputs)
            outputs, new = self.once(now, states, held)
            if mask is not None:
                on = mask if due is None else due[:, time]
                new = tuple(torch.where(lifted(on, a) > 0, a, b) for a, b in zip(new, states, strict=True))
            states = new
            steps.append((*outputs, *states))
        rows = tuple(torch.stack(parts, 1).flatten(0, 1) for parts in zip(*steps, strict=True)) if frames else steps[0]
        return rows, tuple(state if at is None else state - at for state, at in zip(states, start, strict=True))


class Recurrence(Recurrent):
    """A recurrent layer of several levels over time; parameters have the original's names.

    Input ``(rows, *rest, features)``; result ``(output, *carried values)`` where each level carries ``h`` (and ``c``).
    ``stepwise``: somebody reads ``c`` of every frame, which no kernel for whole sequences gives.
    """

    def __init__(
        self,
        kind: str,
        levels: int,
        biases: bool,
        dropout: float,
        carried: Sequence[Sequence[int]],
        weights: Mapping[str, Tensor],
        stepwise: bool = False,
    ) -> None:
        super().__init__(carried)
        self.kind = kind
        self.levels = levels
        self.biases = biases
        self.dropout = dropout
        self.stepwise = stepwise
        self.names = tuple(weights)
        for name, tensor in weights.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def weights(self, held: Sequence[Tensor]) -> list[list[Tensor]]:
        """Each level's tensors, in the order of ATen."""
        flat = list(held) or [getattr(self, name) for name in self.names]
        size = len(flat) // self.levels
        return [self.arranged(flat[level * size : (level + 1) * size]) for level in range(self.levels)]

    def arranged(self, tensors: list[Any]) -> list[Any]:
        return tensors if self.biases else [*tensors[:2], None, None, *tensors[2:]]

    def once(self, inputs: Sequence[Tensor], states: States, held: Sequence[Any]) -> tuple[States, States]:
        count = KINDS[self.kind].states
        (x,) = inputs
        shape = x.shape[:-1]
        x = x.flatten(0, -2)
        new: list[Tensor] = []
        for level, weights in enumerate(self.weights(held)):
            before = states[level * count : (level + 1) * count]
            after = KINDS[self.kind].cell(x, tuple(state.flatten(0, -2) for state in before), *weights)
            x = after[0]
            new += [state.reshape(old.shape) for state, old in zip(after, before, strict=True)]
            if self.dropout and self.training and level + 1 < self.levels:
                x = F.dropout(x, self.dropout)
        return (x.reshape(*shape, x.shape[-1]),), tuple(new)

    def forward(
        self,
        inputs: Sequence[Tensor],
        held: Sequence[Any] = (),
        first: Sequence[Tensor | None] = (),
        mask: Tensor | None = None,
        caches: States | None = None,
        frames: int | None = None,
    ) -> Any:
        if frames is None or mask is not None or first or self.stepwise:
            return super().forward(inputs, held, first, mask, caches, frames)
        return self.sequence(inputs[0], held, caches, frames)

    def sequence(self, x: Tensor, held: Sequence[Any], caches: States | None, frames: int) -> Any:
        """A whole chunk by ATen's kernels, level by level; of ``c`` only the last value is known, and given for every frame."""
        kind = KINDS[self.kind]
        batch, rest = x.shape[0] // frames, x.shape[1:-1]
        x = x.reshape(batch, frames, *rest, x.shape[-1]).movedim(1, 0).flatten(1, -2)
        if caches is None:
            caches = tuple(x.new_zeros((batch, *shape)) for shape in self.carried)
        outputs: list[Tensor] = []
        new: list[Tensor] = []
        for level, weights in enumerate(self.weights(held)):
            before = [
                cache.flatten(0, -2).unsqueeze(0) for cache in caches[level * kind.states : (level + 1) * kind.states]
            ]
            flat = [weight for weight in weights if weight is not None]
            given = before if kind.states > 1 else before[0]
            x, *after = kind.fused(x, given, flat, self.biases, 1, 0.0, self.training, False, False)
            new += [state.reshape(batch, *rest, state.shape[-1]) for state in after]
            outputs.append(self.rows(x, batch, rest))
            outputs += [state.repeat_interleave(frames, 0) for state in new[len(new) - kind.states + 1 :]]
            if self.dropout and self.training and level + 1 < self.levels:
                x = F.dropout(x, self.dropout)
        return (self.rows(x, batch, rest), *outputs), tuple(new)

    @staticmethod
    def rows(x: Tensor, batch: int, rest: Sequence[int]) -> Tensor:
        return x.reshape(x.shape[0], batch, *rest, x.shape[-1]).movedim(0, 1).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"{self.kind}, levels={self.levels}, carried={self.carried}"


class Loop(Recurrent):
    """A recurrence whose cell is a graph of its own: inputs, carried values and constants to outputs and new carried values."""

    def __init__(self, body: nn.Module, carried: Sequence[Sequence[int]]) -> None:
        super().__init__(carried)
        self.body = body

    def once(self, inputs: Sequence[Tensor], states: States, held: Sequence[Any]) -> tuple[States, States]:
        outputs, new = self.body(*states, *inputs, *held)
        return outputs, new


class FrameRecurrence(nn.Module):
    """A recurrent layer over tokens of one frame: ``(rows, *rest, L, features)`` to its output and last hidden values."""

    def __init__(
        self, kind: str, levels: int, biases: bool, dropout: float, both: bool, weights: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.kind = kind
        self.levels = levels
        self.biases = biases
        self.dropout = dropout
        self.both = both
        self.names = tuple(weights)
        for name, tensor in weights.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self, x: Tensor, held: Sequence[Tensor], first: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``first``: initial values, ``(rows or 1, levels, *rest, hidden)``; so are the last ones."""
        rest = x.shape[:-2]
        given = [at.expand(x.shape[0], *at.shape[1:]).movedim(1, 0).flatten(1, -2) for at in first]
        kernel = KINDS[self.kind].fused
        flat = list(held) or [getattr(self, name) for name in self.names]
        states = given if len(given) > 1 else given[0]
        y, *last = kernel(
            x.flatten(0, -3), states, flat, self.biases, self.levels, self.dropout, self.training, self.both, True
        )
        return y.reshape(*rest, *y.shape[-2:]), *(h.reshape(h.shape[0], *rest, h.shape[-1]).movedim(0, 1) for h in last)

    def extra_repr(self) -> str:
        return f"{self.kind}, levels={self.levels}" + (", both directions" if self.both else "")

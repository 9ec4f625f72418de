"""Moves the caches of streams between the rows of a table, in host memory or on a device.

Law: after :meth:`Mover.move`, each target row holds what its source row held before it, whatever the order; a fresh
stream's row holds zeros; no other row has changed. Caches never leave the device: there, an ONNX graph of two gathers
does the copying, since ONNX Runtime is all that a runner has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dissect.binding import Table
from dissect.sessions import CPU, CUDA, open_session
from dissect.tensors import Tensor
from dissect.wire import record

__all__ = ["Move", "Mover"]

_TYPES = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "uint16": 4,
    "int16": 5,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "float64": 11,
    "uint32": 12,
    "uint64": 13,
}


@dataclass(frozen=True)
class Move:
    """A stream from one row and turn to another; without a source, a fresh stream."""

    row: int
    turn: int
    source: tuple[int, int] | None = None


class Mover:
    """Moves rows of one table."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self._sessions: dict[str, Any] = {}

    def move(self, moves: Sequence[Move]) -> None:
        """Makes all ``moves`` at once; no two of them have one target."""
        if not moves:
            return
        for cache in range(len(self.table.contract.caches)):
            pairs = [(self._place(cache, move.row, move.turn), move.source) for move in moves]
            steps = [(to, None if source is None else self._place(cache, *source)) for to, source in pairs]
            if self.table.home.resident:
                self._on_device(cache, steps)
            else:
                self._in_host_memory(cache, steps)

    def _place(self, cache: int, row: int, turn: int) -> tuple[int, int]:
        return self.table.place(turn, cache), row

    def _in_host_memory(self, cache: int, steps: Sequence[tuple[tuple[int, int], tuple[int, int] | None]]) -> None:
        arrays = [buffer.array for buffer in self.table.buffers[cache]]
        overwritten = {to for to, _ in steps}
        held = {source: arrays[source[0]][source[1]].copy() for _, source in steps if source in overwritten}  # type: ignore[index]
        for (side, row), source in steps:
            target = arrays[side]
            assert target is not None
            if source is None:
                target[row] = 0
            elif source in held:
                target[row] = held[source]
            else:
                target[row] = arrays[source[0]][source[1]]  # type: ignore[index]

    def _on_device(self, cache: int, steps: Sequence[tuple[tuple[int, int], tuple[int, int] | None]]) -> None:
        table = self.table
        pair = table.buffers[cache]
        orders = [np.arange(table.rows, dtype=np.int64) + side * table.rows for side in range(2)]
        for (side, row), source in steps:
            orders[side][row] = 2 * table.rows if source is None else source[0] * table.rows + source[1]
        self._gather(pair, orders)

    def _gather(self, pair: Sequence[Tensor], orders: Sequence[NDArray[np.int64]]) -> None:
        dtype, home = pair[0].dtype, self.table.home
        if dtype.name not in self._sessions:
            beside = [(CUDA, {"device_id": home.index})] if home.device == "cuda" else CPU
            self._sessions[dtype.name] = open_session(_gathers(dtype.name), beside)
        session = self._sessions[dtype.name]
        width = pair[0].row // dtype.itemsize
        fresh = Tensor((1, width), dtype.name, home)
        binding = session.io_binding()
        for name, tensor, rows in (("first", pair[0], None), ("second", pair[1], None), ("fresh", fresh, 1)):
            shape = (rows or self.table.rows, width)
            binding.bind_input(name, home.device, home.index, dtype.type, shape, tensor.value.data_ptr())
        for name, order, tensor in zip(("new_first", "new_second"), orders, pair, strict=True):
            binding.bind_cpu_input(f"{name}_order", order)
            # The output is an input's buffer: both are read before either is written, for the join needs all of them.
            binding.bind_output(
                name, home.device, home.index, dtype.type, (self.table.rows, width), tensor.value.data_ptr()
            )
        session.run_with_iobinding(binding)


def _gathers(dtype: str) -> bytes:
    """``new_x = Gather(Concat(first, second, fresh), new_x_order)`` for both sets, as an ONNX file."""
    nodes = [_node("Concat", ["first", "second", "fresh"], "all")]
    nodes += [_node("Gather", ["all", f"{name}_order"], name) for name in ("new_first", "new_second")]
    given = [_info(name, _TYPES[dtype], 2) for name in ("first", "second", "fresh")]
    given += [_info(f"{name}_order", _TYPES["int64"], 1) for name in ("new_first", "new_second")]
    made = [_info(name, _TYPES[dtype], 2) for name in ("new_first", "new_second")]
    graph = b"".join(
        [
            *(record(1, node) for node in nodes),
            record(2, "gathers"),
            *(record(11, info) for info in given),
            *(record(12, info) for info in made),
        ]
    )
    return record(1, 8) + record(7, graph) + record(8, record(1, "") + record(2, 17))


def _node(kind: str, inputs: Sequence[str], output: str) -> bytes:
    axis = record(1, "axis") + record(3, 0) + record(20, 2)  # an attribute of type INT
    return b"".join(record(1, name) for name in inputs) + record(2, output) + record(4, kind) + record(5, axis)


def _info(name: str, dtype: int, rank: int) -> bytes:
    dims = b"".join(record(1, record(2, f"{name}_{dim}")) for dim in range(rank))
    return record(1, name) + record(2, record(1, record(1, dtype) + record(2, dims)))

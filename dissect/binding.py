"""A step model's buffers, bound once: the frame, the caches in several buffers in turn, the outputs.

A step reads a cache from one buffer and writes the next of its ring (:mod:`dissect.rings`); no cache is ever read from and
written to one buffer, which ONNX Runtime accepts and gets wrong where a reader comes after the writer. On a CPU
every buffer is a numpy array that ONNX Runtime reads and writes in place. On a device the caches stay there: only
frames go up and outputs come down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from dissect.errors import StreamError
from dissect.opening import StepModel
from dissect.rings import Rings
from dissect.sessions import Home, first_line, home_of
from dissect.tensors import Tensor, read_only

__all__ = ["RESET", "BoundStep", "Table"]

RESET = "reset"

_DTYPES = {
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    **{f"tensor({name})": name for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
}


class Table:
    """The caches of ``rows`` streams, and buffers for ``batch`` of them that step together, without clocks.

    A *turn* says in which buffer each cache of a stream is: it counts the stream's steps, and repeats after ``turns`` of
    them. Rows that step together lie side by side and are at one turn; after :meth:`run` they are at the next.
    """

    def __init__(self, model: StepModel, rows: int, batch: int) -> None:
        self.model, self.rows, self.batch = model, rows, batch
        contract = self.contract = model.contract
        self.home = home_of(model.sessions[0])
        self._rings = Rings(contract.caches, model.moved, contract.period)
        self.turns = self._rings.turns
        declared, size = _declared(model)
        for spec in contract.inputs:
            if spec.name in size:
                _check_batch(spec.name, size[spec.name], batch)
        self.frames = [Tensor(_sized(spec.shape, batch), spec.dtype, self.home) for spec in contract.inputs]
        rings = {
            first: [
                Tensor(_sized(contract.caches[first].shape, rows), contract.caches[first].dtype, self.home)
                for _ in range(self._rings.sizes[first])
            ]
            for first in dict.fromkeys(self._rings.first)
        }
        self.buffers = [rings[first] for first in self._rings.first]
        # What is recorded as a CUDA graph ends on the device: a replay copies nothing.
        self._outside = self.home if self.home.graphs else Home()
        shapes = [_fixed(spec.name, size[spec.name], batch) for spec in contract.outputs]
        self._results = [
            [
                Tensor(shape, declared[spec.name], self._outside)
                for spec, shape in zip(contract.outputs, shapes, strict=True)
            ]
            for _ in range(2)
        ]
        self._views = [
            [None if result.array is None else read_only(result.array) for result in results]
            for results in self._results
        ]
        self._reset = Tensor((batch,), "bool", self.home) if RESET in declared else None
        self._pending = np.zeros(rows, bool)
        phases = range(contract.period)
        self._due = [[contract.output_due(spec, phase) for spec in contract.outputs] for phase in phases]
        self._result_side = _sides(self._due, self.turns)
        self._taken = [{entry.name for entry in session.get_inputs()} for session in model.sessions]
        self._bindings: dict[tuple[int, int, int], tuple[Any, Any]] = {}

    def place(self, turn: int, cache: int) -> int:
        """The one of its ``buffers`` in which a cache of a stream at ``turn`` is."""
        return self._rings.place(turn, cache)

    def results(self, turn: int) -> list[NDArray[Any] | None]:
        """The outputs of a run at ``turn``, ``(batch, ...)`` each and read only; None for one that is not due then.

        The next run that makes them but one overwrites them.
        """
        due, side = self._due[turn % self.contract.period], self._result_side[turn]
        if self.home.graphs:
            found = [self._results[side[at]][at].value.numpy() if there else None for at, there in enumerate(due)]
            return [None if array is None else read_only(array) for array in found]
        return [self._views[side[at]][at] if there else None for at, there in enumerate(due)]

    def run(self, turn: int, start: int, count: int) -> None:
        """One step of the ``count`` rows from ``start``, which are at ``turn``, on the first ``count`` frames."""
        assert 0 <= start <= start + count <= self.rows, "ONNX Runtime would write beyond the table"
        assert count <= self.batch
        pending = self._pending[start : start + count]
        told = self._reset is not None and bool(pending.any())
        if told:
            self._tell(pending)
        key = (turn, start, count)
        found = self._bindings.get(key)
        if found is None:
            found = self._bindings[key] = self._bound(turn, start, count)
        binding, options = found
        session = self.model.sessions[turn % self.contract.period]
        if self.home.rebind:
            self._bind_inputs(binding, turn, start, count)
        try:
            session.run_with_iobinding(binding, options)
        except Exception as error:  # ONNX Runtime's errors share no base below Exception
            raise StreamError(f"ONNX Runtime could not run the step: {first_line(error)}") from error
        if told:
            pending[:] = False
            self._tell(pending)

    def clear(self, turn: int, rows: NDArray[np.intp]) -> None:
        """Makes ``rows`` fresh streams, at ``turn``: zeros in every cache, whatever was there, NaN included."""
        if self.home.resident and self._reset is not None:
            self._pending[rows] = True  # the graph clears them at the next step; no cache leaves the device
            return
        for cache in self.caches(turn):
            if self.home.resident and len(rows) == self.rows:
                cache.fill(np.zeros(cache.shape, cache.dtype))
            else:
                cache.write(rows, 0)

    def caches(self, turn: int) -> list[Tensor]:
        """The tensors in which the caches of streams at ``turn`` are."""
        return [buffers[self.place(turn, at)] for at, buffers in enumerate(self.buffers)]

    def read(self, turn: int, rows: NDArray[np.intp]) -> list[NDArray[Any]]:
        """A copy of every cache's ``rows`` in host memory."""
        values = [cache.read(rows) for cache in self.caches(turn)]
        if self._pending[rows].any():
            for value in values:
                value[self._pending[rows]] = 0
        return values

    def write(self, turn: int, rows: NDArray[np.intp], values: Sequence[NDArray[Any]]) -> None:
        """Overwrites every cache's ``rows`` with what :meth:`read` gave, maybe for other rows."""
        for cache, value in zip(self.caches(turn), values, strict=True):
            cache.write(rows, value)
        self._pending[rows] = False

    def copy_one(self, turn: int, rows: NDArray[np.intp], source: int, target: int) -> None:
        """Copies ``rows`` of one cache into another of its shape and dtype."""
        caches = self.caches(turn)
        caches[target].write(rows, caches[source].read(rows))

    def _tell(self, pending: NDArray[np.bool_]) -> None:
        assert self._reset is not None
        told = np.zeros(self.batch, bool)
        told[: len(pending)] = pending
        self._reset.fill(told)

    def _bound(self, turn: int, start: int, count: int) -> tuple[Any, Any]:
        """A binding of these rows' buffers, and the options that it is run with."""
        phase = turn % self.contract.period
        binding = self.model.sessions[phase].io_binding()
        for at, (cache, new) in enumerate(zip(self.contract.caches, self.caches(turn + 1), strict=True)):
            if phase % cache.due[1] == cache.due[0] and at not in self.model.moved:
                _bind(binding.bind_output, cache.output, new, start, count, self.home)
        for at, output in enumerate(self.contract.outputs):
            if self._due[phase][at]:
                result = self._results[self._result_side[turn][at]][at]
                _bind(binding.bind_output, output.name, result, 0, count, self._outside)
        self._bind_inputs(binding, turn, start, count)
        options = None
        if self.home.graphs:
            # Recording runs the step more than once; it is the same step each time, for no buffer is read and written.
            options = ort.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(len(self._bindings) + 1))
        return binding, options

    def _bind_inputs(self, binding: Any, turn: int, start: int, count: int) -> None:
        taken = self._taken[turn % self.contract.period]
        for spec, frame in zip(self.contract.inputs, self.frames, strict=True):
            if spec.name in taken:
                _bind(binding.bind_input, spec.name, frame, 0, count, self.home)
        for cache_spec, cache in zip(self.contract.caches, self.caches(turn), strict=True):
            if cache_spec.input in taken:
                _bind(binding.bind_input, cache_spec.input, cache, start, count, self.home)
        if self._reset is not None:
            _bind(binding.bind_input, RESET, self._reset, 0, count, self.home)


class BoundStep:
    """``batch`` streams that step together: frames in, :meth:`run`, outputs out. ``turn`` is where they begin."""

    def __init__(self, model: StepModel, batch: int, turn: int = 0) -> None:
        self.table = Table(model, batch, batch)
        self.batch, self.turn = batch, turn
        self.frames = self.table.frames
        self._every = np.arange(batch)

    @property
    def results(self) -> list[NDArray[Any] | None]:
        """The outputs of the last :meth:`run`, as :meth:`Table.results` gives them."""
        return self.table.results((self.turn - 1) % self.table.turns)

    def run(self) -> None:
        """One step of every stream, on the frames that were filled in."""
        self.table.run(self.turn, 0, self.batch)
        self.turn = (self.turn + 1) % self.table.turns

    def clear(self, rows: NDArray[np.intp]) -> None:
        """Makes ``rows`` fresh streams, at phase 0: they are all, or the others are at it too."""
        self._turn_to(0)
        self.table.clear(self.turn, rows)

    def read(self, rows: NDArray[np.intp]) -> list[NDArray[Any]]:
        """A copy of every cache's ``rows`` in host memory."""
        return self.table.read(self.turn, rows)

    def write(self, rows: NDArray[np.intp], values: Sequence[NDArray[Any]], phase: int | None = None) -> None:
        """Overwrites every cache's ``rows`` with what :meth:`read` gave, maybe for other rows; all of them at ``phase``."""
        if phase is not None:
            self._turn_to(phase)
        self.table.write(self.turn, rows, values)

    def _turn_to(self, phase: int) -> None:
        period = self.table.contract.period
        self.turn = (self.turn + phase - self.turn % period) % self.table.turns

    def copy_one(self, source: int, target: int) -> None:
        """Copies one cache into another of its shape and dtype, every row."""
        self.table.copy_one(self.turn, self._every, source, target)


def _sides(due: list[list[bool]], turns: int) -> list[list[int]]:
    """For each turn, which of two buffers each value was last written to; both start at 0."""
    side = [0] * len(due[0])
    sides = []
    for turn in range(turns):
        sides.append(list(side))
        side = [before ^ now for before, now in zip(side, due[turn % len(due)], strict=True)]
    return sides


def _bind(bind: Any, name: str, tensor: Tensor, start: int, count: int, home: Home) -> None:
    """Binds ``count`` rows of a tensor from ``start`` on."""
    pointer = tensor.value.data_ptr() + start * tensor.row
    bind(name, home.device, home.index, tensor.dtype.type, (count, *tensor.shape[1:]), pointer)


def _sized(shape: Sequence[int | str], batch: int) -> tuple[int, ...]:
    return (batch, *(int(size) for size in shape[1:]))


def _fixed(name: str, shape: list[Any], batch: int) -> tuple[int, ...]:
    """The shape of a graph's output for ``batch`` streams; only its first size may be open."""
    if not shape or not all(isinstance(size, int) for size in shape[1:]):
        raise StreamError(
            f"{name}: the graph gives it the shape {shape}, not 'batch' followed by fixed sizes; "
            "export the step model again."
        )
    return _sized(shape, batch)


def _check_batch(name: str, shape: list[Any], batch: int) -> None:
    if shape and isinstance(shape[0], int) and shape[0] != batch:
        raise StreamError(
            f"{name}: the graph's batch is fixed at {shape[0]}, so it cannot run {batch}; ask for batch={shape[0]}, "
            "or export the step model again with an open batch."
        )


def _declared(model: StepModel) -> tuple[dict[str, str], dict[str, list[Any]]]:
    """The numpy dtypes and the shapes of the graphs' inputs and outputs, after checking that they are the contract's."""
    contract = model.contract
    graph = [entry for session in model.distinct for entry in (*session.get_inputs(), *session.get_outputs())]
    declared = {entry.name: _DTYPES.get(entry.type, entry.type) for entry in graph}
    expected = {spec.name: spec.dtype for spec in contract.inputs}
    for at, cache in enumerate(contract.caches):
        expected |= {cache.input: cache.dtype} | ({} if at in model.moved else {cache.output: cache.dtype})
    expected |= {spec.name: declared.get(spec.name, "") for spec in contract.outputs}
    # No layer that is ever due reads it, or none but the one that moved it on.
    unused = {name for name in expected if (contract.period > 1 or model.moved) and name not in declared}
    for name, dtype in expected.items():
        if name not in unused and (name not in declared or declared[name] != dtype):
            found = f"is {declared[name]} in the graph" if name in declared else "is not in the graph"
            raise StreamError(
                f"{name} ({dtype or 'output'}) {found}: the file was changed after its export; export it again."
            )
    for spec in contract.outputs:
        if declared[spec.name].startswith("tensor("):
            raise StreamError(f"{spec.name}: numpy has no {declared[spec.name]}; export the output as float32.")
    if extra := {entry.name for session in model.distinct for entry in session.get_inputs()} - set(expected) - {RESET}:
        raise StreamError(f"The graph wants inputs that its metadata do not name: {sorted(extra)}; export it again.")
    return declared, {entry.name: entry.shape for entry in graph}

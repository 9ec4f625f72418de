"""A step model's buffers, bound once: the frame, the caches in two sets in turn, the outputs.

A step reads one set of caches and writes the other, then the sets change places; no cache is ever read from and
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

from dissect.contract import Contract, InputSpec
from dissect.errors import StreamError
from dissect.sessions import Home, first_line, home_of

__all__ = ["RESET", "BoundStep", "Tensor", "checked"]

RESET = "reset"
_ALIGNMENT = 64

_DTYPES = {
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    **{f"tensor({name})": name for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
}


class Tensor:
    """A zeroed tensor at ``home``. In host memory :attr:`array` is the tensor itself; on a device there is no array."""

    def __init__(self, shape: Sequence[int], dtype: str, home: Home) -> None:
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        array = _zeros(self.shape, self.dtype)
        self.value = ort.OrtValue.ortvalue_from_numpy(array, home.device, home.index)
        self.array: NDArray[Any] | None = None if home.resident else array

    def read(self, rows: NDArray[np.intp]) -> NDArray[Any]:
        """A copy of ``rows``, ``(len(rows), ...)``, in host memory."""
        array = self.value.numpy() if self.array is None else self.array
        taken: NDArray[Any] = array[rows]  # an index array: always a copy
        return taken

    def write(self, rows: NDArray[np.intp], values: NDArray[Any] | int) -> None:
        """Overwrites ``rows``; on a device, unless they are all rows, by one round trip of the tensor."""
        if self.array is not None:
            self.array[rows] = values
            return
        whole = self.value.numpy().copy()
        whole[rows] = values
        self.value.update_inplace(whole)

    def fill(self, values: NDArray[Any]) -> None:
        """Overwrites the whole tensor with ``values``: its shape (a leading 1 may lack), its kind of dtype."""
        if self.array is not None:
            np.copyto(self.array, values, casting="same_kind")
        else:
            self.value.update_inplace(np.ascontiguousarray(values, self.dtype).reshape(self.shape))


class BoundStep:
    """``batch`` streams of one session, without clocks: frames in, :meth:`run`, outputs out."""

    def __init__(self, session: Any, contract: Contract, batch: int) -> None:
        self.session, self.contract, self.batch = session, contract, batch
        self.home = home_of(session)
        declared = _declared(session, contract)
        host = Home()
        size = {entry.name: entry.shape for entry in (*session.get_inputs(), *session.get_outputs())}
        for spec in contract.inputs:
            _check_batch(spec.name, size[spec.name], batch)

        self.frames = [Tensor(_sized(spec.shape, batch), spec.dtype, self.home) for spec in contract.inputs]
        self._sets = [
            [Tensor(_sized(spec.shape, batch), spec.dtype, self.home) for spec in contract.caches] for _ in range(2)
        ]
        self._results = [
            [Tensor(_fixed(spec.name, size[spec.name], batch), declared[spec.name], host) for spec in contract.outputs]
            for _ in range(2)
        ]
        self._views = [[_read_only(result.array) for result in results] for results in self._results]
        self._reset = Tensor((batch,), "bool", self.home) if RESET in declared else None
        self._pending = np.zeros(batch, bool)
        self._now = 0
        self._bindings = [session.io_binding() for _ in range(2)]
        for now, binding in enumerate(self._bindings):
            for cache, new in zip(contract.caches, self._sets[1 - now], strict=True):
                binding.bind_ortvalue_output(cache.output, new.value)
            for output, result in zip(contract.outputs, self._results[now], strict=True):
                binding.bind_ortvalue_output(output.name, result.value)
            self._bind_inputs(now)

    @property
    def results(self) -> list[NDArray[Any]]:
        """The outputs of the last :meth:`run`, read only; overwritten by the next but one."""
        return self._views[1 - self._now]

    def run(self) -> None:
        """One step of every stream, on the frames that were filled in."""
        if self._reset is not None and self._pending.any():
            self._reset.fill(self._pending)
        if self.home.rebind:
            self._bind_inputs(self._now)
        try:
            self.session.run_with_iobinding(self._bindings[self._now])
        except Exception as error:  # ONNX Runtime's errors share no base below Exception
            raise StreamError(f"ONNX Runtime could not run the step: {first_line(error)}") from error
        self._now = 1 - self._now
        if self._reset is not None and self._pending.any():
            self._pending[:] = False
            self._reset.fill(self._pending)

    def clear(self, rows: NDArray[np.intp]) -> None:
        """Makes ``rows`` fresh streams: zeros in every cache, whatever was there, NaN included."""
        if self.home.resident and self._reset is not None:
            self._pending[rows] = True  # the graph clears them at the next step; no cache leaves the device
        elif self.home.resident and len(rows) == self.batch:
            for cache in self._sets[self._now]:
                cache.fill(np.zeros(cache.shape, cache.dtype))
        else:
            for cache in self._sets[self._now]:
                cache.write(rows, 0)

    def read(self, rows: NDArray[np.intp]) -> list[NDArray[Any]]:
        """A copy of every cache's ``rows`` in host memory."""
        values = [cache.read(rows) for cache in self._sets[self._now]]
        if self._pending[rows].any():
            for value in values:
                value[self._pending[rows]] = 0
        return values

    def write(self, rows: NDArray[np.intp], values: Sequence[NDArray[Any]]) -> None:
        """Overwrites every cache's ``rows`` with what :meth:`read` gave, maybe for other rows."""
        for cache, value in zip(self._sets[self._now], values, strict=True):
            cache.write(rows, value)
        self._pending[rows] = False

    def copy_one(self, source: int, target: int) -> None:
        """Copies one cache into another of its shape and dtype, every row."""
        every = np.arange(self.batch)
        self._sets[self._now][target].fill(self._sets[self._now][source].read(every))

    def _bind_inputs(self, now: int) -> None:
        binding = self._bindings[now]
        for spec, frame in zip(self.contract.inputs, self.frames, strict=True):
            binding.bind_ortvalue_input(spec.name, frame.value)
        for cache_spec, cache in zip(self.contract.caches, self._sets[now], strict=True):
            binding.bind_ortvalue_input(cache_spec.input, cache.value)
        if self._reset is not None:
            binding.bind_ortvalue_input(RESET, self._reset.value)


def checked(frame: Any, target: Tensor, spec: InputSpec) -> NDArray[Any]:
    """``frame`` as an array that fits ``target``, or an error that says what it wants."""
    try:
        array: NDArray[Any] = np.asarray(frame)
    except (ValueError, TypeError, RuntimeError) as error:
        raise StreamError(f"{spec.name}: numpy makes no array of this {type(frame).__name__}: {error}") from error
    if array.shape != target.shape and not (target.shape[0] == 1 and array.shape == target.shape[1:]):
        without = f", or {target.shape[1:]}" if target.shape[0] == 1 else ""
        raise StreamError(f"{spec.name}: a frame has the shape {target.shape}{without}; this one has {array.shape}.")
    if array.dtype == target.dtype:
        return array
    if array.dtype.kind != target.dtype.kind or (
        target.dtype.kind != "f" and not np.can_cast(array.dtype, target.dtype)
    ):
        if target.dtype.kind == "f" and array.dtype.kind in "iub":
            fix = (
                "bring pixels to the range that the network was trained on first, as run.preprocess says; "
                "dissect.Preprocess does it, or frame.astype(np.float32) / 255 where that is all there is to it"
            )
        elif target.dtype == np.uint8:
            fix = "this model takes pixels as they come, 0 to 255 and not normalised"
        else:
            fix = f"convert it with frame.astype(np.{target.dtype})"
        raise StreamError(f"{spec.name}: frames are {target.dtype}, and this one is {array.dtype}: {fix}.")
    return array


def _read_only(array: NDArray[Any] | None) -> NDArray[Any]:
    assert array is not None, "results are in host memory"
    view = array.view()
    view.flags.writeable = False
    return view


def _zeros(shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros that start at a cache line, as ONNX Runtime's own buffers do: wide loads then never straddle two."""
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.zeros(count + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + count].view(dtype).reshape(shape)


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


def _declared(session: Any, contract: Contract) -> dict[str, str]:
    """The graph's inputs and outputs and their numpy dtypes, after checking that they are those of ``contract``."""
    graph = [*session.get_inputs(), *session.get_outputs()]
    declared = {entry.name: _DTYPES.get(entry.type, entry.type) for entry in graph}
    expected = {spec.name: spec.dtype for spec in contract.inputs}
    for cache in contract.caches:
        expected |= {cache.input: cache.dtype, cache.output: cache.dtype}
    expected |= {spec.name: declared.get(spec.name, "") for spec in contract.outputs}
    for name, dtype in expected.items():
        if name not in declared or declared[name] != dtype:
            found = f"is {declared[name]} in the graph" if name in declared else "is not in the graph"
            raise StreamError(
                f"{name} ({dtype or 'output'}) {found}: the file was changed after its export; export it again."
            )
    for spec in contract.outputs:
        if declared[spec.name].startswith("tensor("):
            raise StreamError(f"{spec.name}: numpy has no {declared[spec.name]}; export the output as float32.")
    if extra := {entry.name for entry in session.get_inputs()} - set(expected) - {RESET}:
        raise StreamError(f"The graph wants inputs that its metadata do not name: {sorted(extra)}; export it again.")
    return declared

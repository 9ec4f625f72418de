"""Tensors that ONNX Runtime reads and writes in place, and frames as arrays that fit them.

In host memory a tensor is a numpy array; on a device it stays there, and only what is read or written crosses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from dissect.contract import InputSpec
from dissect.errors import StreamError
from dissect.sessions import Home

__all__ = ["Tensor", "checked", "read_only"]

_ALIGNMENT = 64


class Tensor:
    """A zeroed tensor at ``home``. In host memory :attr:`array` is the tensor itself; on a device there is no array."""

    def __init__(self, shape: Sequence[int], dtype: str, home: Home) -> None:
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        array = _zeros(self.shape, self.dtype)
        self.value = ort.OrtValue.ortvalue_from_numpy(array, home.device, home.index)
        self.array: NDArray[Any] | None = None if home.resident else array
        self.row = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize  # bytes

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


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """A view of an array that nobody can write through."""
    view = array.view()
    view.flags.writeable = False
    return view


def _zeros(shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros that start at a cache line, as ONNX Runtime's own buffers do: wide loads then never straddle two."""
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.zeros(count + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + count].view(dtype).reshape(shape)

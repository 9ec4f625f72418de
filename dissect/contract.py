"""What a step model says of itself: the ``dissect.*`` entries of an ONNX file's ``metadata_props``.

The exporter writes a :class:`Contract` with :meth:`Contract.to_metadata`, the runner reads it with
:meth:`Contract.from_metadata`; the two are inverse to each other. Nothing here imports torch, onnx or
ONNX Runtime, and all timing is integer arithmetic.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from dissect.errors import StreamError

__all__ = [
    "CADENCES",
    "FORMAT_VERSION",
    "CacheSpec",
    "Contract",
    "InputSpec",
    "OutputSpec",
    "Structure",
    "leaves_of",
    "pack",
]

FORMAT_VERSION = 1
ROLES = ("cache", "age", "length")
CADENCES = ("every", "native")
PREFIX = "dissect."

Structure = int | None | list[Any] | dict[str, Any]
"""How results nest: an output's index, None where there is no tensor, or a list or dict of structures."""

_ITEMSIZE = {
    **dict.fromkeys(("bool", "int8", "uint8"), 1),
    **dict.fromkeys(("float16", "int16", "uint16"), 2),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float64", "int64", "uint64"), 8),
}


@dataclass(frozen=True)
class InputSpec:
    """One frame input: its name, its shape (``"batch"`` first, the rest fixed) and its numpy dtype name."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    rate: int = 1


@dataclass(frozen=True)
class OutputSpec:
    """One output: when it exists, and how many positions of it the offline network has.

    ``length`` is a chain of ``(add, stride)``, or ``(mul, add, stride)`` where time is upsampled; see
    :meth:`positions`. ``delay`` and ``stride`` are in frames.
    """

    name: str
    stride: int = 1
    delay: int = 0
    length: tuple[tuple[int, ...], ...] = ()

    def positions(self, frames: int) -> int:
        """The number of positions that the offline network has for a clip of ``frames`` frames."""
        count = frames
        for *mul, add, stride in self.length:
            if count <= 0:
                return 0
            count = (count * (mul[0] if mul else 1) + add) // stride + 1
        return max(count, 0)

    def last(self, frames: int) -> int:
        """The time of the last output of a stream of ``frames`` frames, flush included; -1 if there is none."""
        count = self.positions(frames)
        return self.delay + self.stride * (count - 1) if count else -1


@dataclass(frozen=True)
class CacheSpec:
    """One cache: its graph input and output, its shape (``"batch"`` first, the rest fixed), dtype, module path, role.

    The role is ``"cache"``, ``"age"`` (int64 ``(batch,)``: frames seen) or ``"length"`` (int64 ``(batch,)``:
    0 while the stream is live, the stream's length during its flush). ``due`` is ``(start, gap)``: the new cache counts
    at the frames ``t`` with ``t % gap == start``, which is every frame but in the native cadence; at others it is left.
    Where a ``scale`` is given, the numbers stand for ``scale * (number - zero_point)``; the zero point is 0 wherever
    this dissect wrote the file.
    """

    input: str
    output: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    path: str = ""
    role: str = "cache"
    due: tuple[int, int] = (0, 1)
    scale: float | None = None
    zero_point: int = 0

    @property
    def bytes(self) -> int:
        """Bytes that one stream's share of this cache takes."""
        return math.prod(int(size) for size in self.shape[1:]) * _ITEMSIZE[self.dtype]


_Spec = TypeVar("_Spec", InputSpec, OutputSpec, CacheSpec)


@dataclass(frozen=True)
class Contract:
    """All that a runner knows of a step model beyond its graph. Delay, receptive field, warm-up, stride: frames.

    ``cadence`` is ``"every"``, or ``"native"``: then outputs exist at their own positions alone, and which outputs and
    new caches count at a frame repeats with ``period`` frames (:meth:`due`).
    """

    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    caches: tuple[CacheSpec, ...] = ()
    structure: Structure = 0
    preset: str = ""
    delay: int = 0
    receptive_field: int = 1
    warmup: int = 0
    stride: int = 1
    cadence: str = "every"
    period: int = 1
    preprocess: dict[str, Any] | None = None
    labels: tuple[str, ...] | None = None
    source: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises :class:`StreamError` where the entries contradict each other."""
        if not self.inputs or not self.outputs:
            raise StreamError("The step model names no frame input or no output; export it again.")
        leaves = [leaf for leaf in leaves_of(self.structure) if leaf is not None]
        if len(leaves) != len(self.outputs) or set(leaves) != set(range(len(self.outputs))):
            raise StreamError(
                f"The structure {self.structure!r} does not name each of the {len(self.outputs)} outputs once; "
                "export the step model again."
            )
        tensors = [(spec.name, spec.shape, spec.dtype) for spec in self.inputs]
        tensors += [(cache.input, cache.shape, cache.dtype) for cache in self.caches]
        for name, shape, dtype in tensors:
            if dtype not in _ITEMSIZE:
                raise StreamError(
                    f"{name}: numpy has no dtype {dtype!r}; export the step model with one of {', '.join(_ITEMSIZE)}."
                )
            if not shape or not all(isinstance(size, int) for size in shape[1:]):
                raise StreamError(
                    f"{name}: the shape {list(shape)} is not 'batch' followed by fixed sizes; "
                    "export the step model with fixed sizes."
                )
        roles = [cache.role for cache in self.caches]
        if unknown := set(roles) - set(ROLES):
            raise StreamError(f"Caches have unknown roles {sorted(unknown)}; this dissect knows {', '.join(ROLES)}.")
        if roles.count("age") > 1 or roles.count("length") > 1 or ("length" in roles and "age" not in roles):
            raise StreamError(
                "A step model has at most one age and one length cache, and no length without an age; export it again."
            )
        gaps = [cache.due[1] for cache in self.caches]
        gaps += [output.stride for output in self.outputs] if self.period > 1 else []
        if self.cadence not in CADENCES or self.period < 1 or any(gap < 1 or self.period % gap for gap in gaps):
            raise StreamError(
                f"The cadence {self.cadence!r} of {self.period} frames does not fit its caches and outputs; "
                "export the step model again, or update dissect."
            )

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches of one stream."""
        return sum(cache.bytes for cache in self.caches)

    def role(self, role: str) -> int | None:
        """The index of the one cache that has ``role`` (``"age"`` or ``"length"``), or None."""
        return next((index for index, cache in enumerate(self.caches) if cache.role == role), None)

    def last(self, frames: int) -> int:
        """The time of the last output of any kind of a stream of ``frames`` frames; -1 if there is none."""
        return max(output.last(frames) for output in self.outputs)

    def due(self, phase: int) -> tuple[str, ...]:
        """The graph's outputs that count at frames ``t`` with ``t % period == phase``, in the order of the graph."""
        outputs = [spec.name for spec in self.outputs if self.output_due(spec, phase)]
        return (*outputs, *(spec.output for spec in self.caches if phase % spec.due[1] == spec.due[0]))

    def output_due(self, output: OutputSpec, phase: int) -> bool:
        """Whether ``output`` has a position at frames of this phase; every frame has one but in the native cadence."""
        return self.period == 1 or (phase - output.delay) % output.stride == 0

    def to_metadata(self) -> dict[str, str]:
        """The entries for ``metadata_props``; :meth:`from_metadata` gives this contract back."""
        entries = {
            "format_version": str(FORMAT_VERSION),
            "inputs": _json(
                [{"name": s.name, "shape": s.shape, "dtype": s.dtype, "rate": s.rate} for s in self.inputs]
            ),
            "outputs": _json(
                [{"name": s.name, "stride": s.stride, "delay": s.delay, "length": s.length} for s in self.outputs]
            ),
            "caches": _json(
                [
                    {
                        "input": s.input,
                        "output": s.output,
                        "shape": s.shape,
                        "dtype": s.dtype,
                        "path": s.path,
                        "role": s.role,
                        **({} if s.due == (0, 1) else {"due": s.due}),
                        **({} if s.scale is None else {"scale": s.scale, "zero_point": s.zero_point}),
                    }
                    for s in self.caches
                ]
            ),
            "structure": _json(self.structure),
            "preset": self.preset,
            "delay": str(self.delay),
            "receptive_field": str(self.receptive_field),
            "warmup": str(self.warmup),
            "stride": str(self.stride),
            "source": _json(self.source),
        }
        if self.period > 1:
            entries |= {"cadence": self.cadence, "period": str(self.period)}
        if self.preprocess is not None:
            entries["preprocess"] = _json(self.preprocess)
        if self.labels is not None:
            entries["labels"] = _json(self.labels)
        return {PREFIX + key: value for key, value in entries.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], name: str = "The file") -> Contract:
        """The contract that ``metadata`` holds; ``name`` names the file in errors.

        Raises :class:`StreamError` if the file is no step model, was written by a newer dissect, or is damaged.
        """
        version = metadata.get(PREFIX + "format_version")
        if version is None:
            raise StreamError(
                f"{name} is an ONNX model but no step model: it has no dissect.format_version. "
                "Make one with `dissect convert MODEL -o net.onnx` or dissect.export(stream, 'net.onnx')."
            )
        if not version.isdecimal() or int(version) > FORMAT_VERSION:
            raise StreamError(
                f"{name} has step format {version!r}, and this dissect reads formats up to {FORMAT_VERSION}: "
                "update it with `pip install -U dissect3d`, or convert the model again with this one."
            )
        try:
            return cls(
                inputs=_entry(metadata, "inputs", _rows(InputSpec)),
                outputs=_entry(metadata, "outputs", _rows(OutputSpec)),
                caches=_entry(metadata, "caches", _rows(CacheSpec)),
                structure=_entry(metadata, "structure"),
                preset=metadata.get(PREFIX + "preset", ""),
                delay=_entry(metadata, "delay", int),
                receptive_field=_entry(metadata, "receptive_field", int),
                warmup=_entry(metadata, "warmup", int),
                stride=_entry(metadata, "stride", int),
                cadence=metadata.get(PREFIX + "cadence", "every"),
                period=_entry(metadata, "period", int) if PREFIX + "period" in metadata else 1,
                preprocess=_entry(metadata, "preprocess") if PREFIX + "preprocess" in metadata else None,
                labels=_entry(metadata, "labels", tuple) if PREFIX + "labels" in metadata else None,
                source=_entry(metadata, "source") if PREFIX + "source" in metadata else {},
            )
        except StreamError as error:
            raise StreamError(f"{name}: {error}") from error


def leaves_of(structure: Any) -> list[Any]:
    """The output indices (and Nones) in ``structure``, in the order in which they stand."""
    if isinstance(structure, dict):
        return [leaf for part in structure.values() for leaf in leaves_of(part)]
    if isinstance(structure, (list, tuple)):
        return [leaf for part in structure for leaf in leaves_of(part)]
    return [structure]


def pack(structure: Structure, leaves: Sequence[Any]) -> Any:
    """``leaves`` nested as ``structure`` says; its lists become tuples, as a ``forward`` returns them."""
    if isinstance(structure, dict):
        return {key: pack(part, leaves) for key, part in structure.items()}
    if isinstance(structure, (list, tuple)):
        return tuple(pack(part, leaves) for part in structure)
    return None if structure is None else leaves[structure]


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _rows(spec: type[_Spec]) -> Callable[[Any], tuple[_Spec, ...]]:
    """A reader of a JSON list of objects as a tuple of ``spec``; keys that a later dissect added are passed over."""
    known = {entry.name for entry in fields(spec)}
    return lambda rows: tuple(spec(**{key: _tuples(row[key]) for key in known & row.keys()}) for row in rows)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


def _entry(metadata: Mapping[str, str], key: str, read: Callable[[Any], Any] = lambda value: value) -> Any:
    """One entry of ``metadata``, parsed; an entry that is missing or damaged is named."""
    text = metadata.get(PREFIX + key)
    if text is None:
        raise StreamError(f"the entry dissect.{key} is missing; export the step model again.")
    try:
        return read(json.loads(text))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise StreamError(f"the entry dissect.{key} is damaged ({error}); export the step model again.") from error

"""Quantising: a float step model as one of 8-bit numbers, its caches too.

ONNX Runtime's own static quantisation does the work (QDQ: activations in uint8, weights in int8, a scale for each
channel). What is ours: ranges come from real streams, stepped with caches that evolve. All slots of one history, the
value that enters it and what is joined from them share one scale, so that no cache is ever rescaled. A byte of zero means zero
in every cache, so that a fresh stream is still all zeros: uint8 from 0 for what is never negative, int8 around 0
for the rest. A cache that is computed from itself (a recurrence, a running mean) stays float, since its rounding
would add up. numpy, onnx and ONNX Runtime alone; torch is not imported.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from dissect.beside import beside
from dissect.calibrating import Frames, gives, steps, streams_of
from dissect.contract import Contract
from dissect.errors import ExportError, StreamError
from dissect.narrowing import Form, forms_of, narrowed
from dissect.quiet import quiet
from dissect.restacking import restack
from dissect.runner import Runner

__all__ = ["Agreement", "quantize"]

#: operators that ONNX Runtime computes in 8 bits
_OPERATORS = (
    "Conv Gemm MatMul Add Mul Relu Clip LeakyRelu Sigmoid MaxPool AveragePool GlobalAveragePool Concat Pad Slice Split "
    "Reshape Transpose Squeeze Unsqueeze Flatten Resize"
).split()

#: weights from which on a matrix product of vectors is worth its own scales
LARGE = 1 << 16


@dataclass(frozen=True)
class Agreement:
    """How an 8-bit step model compares with the float one it came from, over the calibration streams.

    ``steps`` outputs were compared; ``top1`` of them have their largest score at the same place (None where the output
    is no list of scores); ``error`` is the root of the mean squared difference over that of the float output.
    ``layers`` convolutions and matrix products are in 8 bits of ``weighted``; caches took ``before`` bytes a stream
    and take ``after``.
    """

    steps: int
    top1: float | None
    error: float
    layers: int
    weighted: int
    before: int
    after: int

    def __str__(self) -> str:
        same = "" if self.top1 is None else f"top-1 agreement {self.top1:.1%}, "
        return (
            f"{self.layers} of {self.weighted} layers in 8 bits, caches {self.before:,} to {self.after:,} bytes; "
            f"over {self.steps} steps: {same}relative error {self.error:.3f}"
        )


def quantize(
    model: str | os.PathLike[str] | bytes,
    output: str | os.PathLike[str],
    streams: Iterable[Any],
    *,
    keep: Sequence[str] = (),
    frames: int = 200,
    reduce_range: bool = False,
) -> Agreement:
    """Write the float step model ``model`` to ``output`` in 8 bits and say how well the two agree.

    Args:
        model: what :func:`dissect.export` wrote, or its bytes.
        output: the new file. Its contract is the old one's, but for the types of the caches.
        streams: what the ranges are taken from: paths of videos, ``.npy`` or ``.npz`` files of clips, clips as arrays, or
            iterables of frames. A few dozen streams of the kind that the model will see are enough.
        keep: patterns of layers that stay float, as ``"layer4.*"``; the last layer always does.
        frames: how many frames of each stream are used at most.
        reduce_range: weights of 7 bits, for processors whose 8-bit products saturate (x86 without VNNI).

    Raises :class:`~dissect.StreamError` for a file that is no float step model and for streams that do not fit it.
    """
    target = Path(output)
    if target.is_dir() or not target.parent.is_dir():
        raise ExportError(f"{target}: name a file in a folder that exists.")
    runner = Runner(model, providers="cpu")
    contract = Contract.from_metadata(runner.metadata)
    narrow = [cache.input for cache in contract.caches if cache.dtype == "float16" or cache.scale is not None]
    if narrow:
        raise StreamError(f"{narrow[0]} is no float32: quantise the step model as it was exported in float32.")
    held = [stream for source in streams for stream in streams_of(source, runner, frames)]
    if not held:
        raise StreamError("There is nothing to calibrate with: give videos or clips.")
    step = ir.from_proto(onnx.load_from_string(model)) if isinstance(model, bytes) else ir.load(model)
    restack(step)
    whole = _bytes(step)
    before = _Observed(contract)
    for time, _, results in steps(whole, contract, held):
        before.see(time, results)
    forms = forms_of(step.graph, contract, before.ranges)
    with tempfile.TemporaryDirectory(prefix="dissect-") as folder:
        done = _quantized(whole, contract, held, forms, _kept(step.graph, keep), reduce_range, Path(folder))
    layers = sum(_weighted(node) and not _is_float(node) for node in done.graph)
    new = narrowed(done.graph, contract, forms)
    done.metadata_props.update(new.to_metadata())
    written = _bytes(done)
    after = _Observed(new)
    for time, _, results in steps(written, new, held):
        after.see(time, results)
    with beside(target) as partial:
        partial.write_bytes(written)
        os.replace(partial, target)
    weighted = sum(_weighted(node) for node in step.graph)
    return _compared(before, after, held, contract, layers, weighted, new.cache_bytes)


class _Observed:
    """What a model's first output was at each time, stream after stream, and the range of every cache."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self.outputs: list[tuple[int, NDArray[Any]]] = []
        self.ranges: dict[str, tuple[float, float]] = {}

    def see(self, time: int, results: Mapping[str, NDArray[Any]]) -> None:
        self.outputs.append((time, results[self.contract.outputs[0].name]))
        for cache in self.contract.caches:
            if cache.dtype == "float32":
                value = results[cache.output]
                low, high = self.ranges.get(cache.input, (0.0, 0.0))
                self.ranges[cache.input] = (min(low, float(value.min())), max(high, float(value.max())))


def _quantized(
    step: bytes,
    contract: Contract,
    streams: Sequence[Sequence[Frames]],
    forms: Mapping[str, Form],
    kept: Sequence[str],
    reduce_range: bool,
    folder: Path,
) -> ir.Model:
    """The model with quantisation and its inverse written around every operator that ONNX Runtime has in 8 bits."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """What goes into the model, step by step."""

        def __init__(self) -> None:
            self.feeds = (feed for _, feed, _ in steps(step, contract, streams))

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(self.feeds, None)

    types = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}
    overrides = {
        name: [
            {
                "quant_type": types[form.dtype],
                "scale": np.array(form.scale, np.float32),
                "zero_point": np.array(0, form.dtype),
            }
        ]
        for form in forms.values()
        for name in form.tensors
    }
    (folder / "step.onnx").write_bytes(step)
    with quiet():
        quantize_static(
            folder / "step.onnx",
            folder / "quantized.onnx",
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_OPERATORS),
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(kept),
            extra_options={"TensorQuantOverrides": overrides},
        )
    return ir.load(folder / "quantized.onnx")


def _weighted(node: ir.Node) -> bool:
    return node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")


def _is_float(node: ir.Node) -> bool:
    """Whether a layer of a quantised model computes in float."""
    weight = node.inputs[1]
    maker = None if weight is None else weight.producer()
    return maker is None or maker.op_type != "DequantizeLinear"


def _path(node: ir.Node) -> str:
    """The module path of a layer, which the exporter left in the name of its weight."""
    names = [value.name or "" for value in node.inputs if value is not None and value.const_value is not None]
    return names[0].removeprefix("step.").rpartition(".")[0].removesuffix(".kernels") if names else ""


def _kept(graph: ir.Graph, patterns: Sequence[str]) -> list[str]:
    """The names of layers that stay float: those that were asked for, and the last."""
    layers = [node for node in graph if _weighted(node)]
    last = [node for node in layers if not _another_follows(node)]
    kept = [node for node in layers if any(fnmatchcase(_path(node), pattern) for pattern in patterns)]
    for pattern in patterns:
        if not any(fnmatchcase(_path(node), pattern) for node in layers):
            raise StreamError(
                f"keep={pattern!r} fits no layer; there are {', '.join(filter(None, map(_path, layers)))}."
            )
    small = [node for node in graph if not _spatial(node) and not (_weighted(node) and _weights(node) >= LARGE)]
    return [str(node.name) for node in (*kept, *last, *small)]


def _spatial(node: ir.Node) -> bool:
    """Whether a node gives maps, not vectors: those are few numbers, with much to lose and nothing to gain."""
    shape = node.outputs[0].shape
    return shape is not None and len(shape) == 4 and any(size != 1 for size in shape[2:])


def _weights(node: ir.Node) -> int:
    return max((value.const_value.size for value in node.inputs if value is not None and value.const_value), default=0)


def _another_follows(node: ir.Node) -> bool:
    """Whether a layer with weights reads what this one gave."""
    waiting, seen = list(node.outputs), set[int]()
    while waiting:
        for use in waiting.pop().uses():
            if id(use.node) in seen:
                continue
            seen.add(id(use.node))
            if _weighted(use.node):
                return True
            waiting += use.node.outputs
    return False


def _compared(
    before: _Observed,
    after: _Observed,
    streams: Sequence[Sequence[Frames]],
    contract: Contract,
    layers: int,
    weighted: int,
    narrow: int,
) -> Agreement:
    """The agreement of the first output, where it exists."""
    lengths = iter(map(len, streams))
    pairs, frames = [], 0
    for (time, old), (_, new) in zip(before.outputs, after.outputs, strict=True):
        frames = next(lengths) if time == 0 else frames
        if gives(contract, time, frames):
            pairs.append((old.astype(np.float64), new.astype(np.float64)))
    if not pairs:
        delay = contract.outputs[0].delay
        raise StreamError(f"No stream is long enough for an output, the first of which comes after {delay} frames.")
    scores = pairs[0][0].ndim == 2 and pairs[0][0].shape[1] > 1
    same = [bool((old.argmax(1) == new.argmax(1)).all()) for old, new in pairs] if scores else []
    missed = sum(float(((old - new) ** 2).sum()) for old, new in pairs)
    whole = sum(float((old**2).sum()) for old, _ in pairs)
    error = float(np.sqrt(missed / whole)) if whole else float(missed > 0)
    return Agreement(
        len(pairs), float(np.mean(same)) if scores else None, error, layers, weighted, contract.cache_bytes, narrow
    )


def _bytes(model: ir.Model) -> bytes:
    return bytes(ir.serde.serialize_model(model).SerializeToString())

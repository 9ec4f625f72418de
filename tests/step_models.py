"""Step models made by hand, operator by operator, so that the runner is tested against nothing of our own exporter."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from dissect.contract import CacheSpec, Contract, InputSpec, OutputSpec

TYPES = {
    "float16": TensorProto.FLOAT16,
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}


def allocated(run: Any, frame: Any, steps: int) -> int:
    """Bytes that ``steps`` steps of a warm runner allocate at one time, of several rounds the least."""
    peaks = []
    tracemalloc.start()
    try:
        for _ in range(5):  # of several rounds the best: other threads and the collector allocate when they like
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(steps):
                run.step(frame, copy=False)
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    return min(peaks)


class Sketch:
    """A graph under construction: operators are added one by one, each gives the name of its result."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, out: str | None = None, **attributes: object) -> str:
        name = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def const(self, value: object, dtype: str = "float32") -> str:
        name = f"k{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def model(
        self,
        contract: Contract,
        shapes: dict[str, tuple[int | str, ...]],
        reset: bool = False,
        metadata: dict[str, str] | None = None,
        batch: int | str = "batch",
    ) -> bytes:
        """The ONNX file as bytes; ``shapes`` are those of the outputs, ``metadata`` stands in for the contract's."""

        def info(name: str, dtype: str, shape: tuple[int | str, ...]) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TYPES[dtype], [batch, *shape[1:]])

        inputs = [info(spec.name, spec.dtype, spec.shape) for spec in contract.inputs]
        inputs += [info(cache.input, cache.dtype, cache.shape) for cache in contract.caches]
        if reset:
            inputs.append(info("reset", "bool", ("batch",)))
        outputs = [info(spec.name, "float32", shapes[spec.name]) for spec in contract.outputs]
        outputs += [info(cache.output, cache.dtype, cache.shape) for cache in contract.caches]
        graph = helper.make_graph(self.nodes, "step", inputs, outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        helper.set_model_props(model, contract.to_metadata() if metadata is None else metadata)
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString())


def cache(index: int, path: str, shape: tuple[int, ...] = (), dtype: str = "float32", role: str = "cache") -> CacheSpec:
    name = f"cache_{index:03d}.{path}"
    return CacheSpec(name, f"new_{name}", ("batch", *shape), dtype, path, role)


def difference(channels: int = 3, dtype: str = "float32", batch: int | str = "batch", **contract: object) -> bytes:
    """``y[t] = x[t] - x[t-1]``, delay 0, one cache."""
    g = Sketch()
    kept = cache(0, "last", (channels,))
    frame = "frame" if dtype == "float32" else g.op("Cast", "frame", to=TensorProto.FLOAT)
    g.op("Sub", frame, kept.input, out="output")
    g.op("Identity", frame, out=kept.output)
    about = Contract(
        (InputSpec("frame", ("batch", channels), dtype),),
        (OutputSpec("output", length=((-1, 1),)),),
        (kept,),
        **contract,  # type: ignore[arg-type]
    )
    return g.model(about, {"output": ("batch", channels)}, batch=batch)


def running_sum(channels: int = 3, reset: bool = False) -> bytes:
    """``y[t] = y[t-1] + x[t]``: a NaN stays for ever. With ``reset`` the graph itself clears rows that are told to."""
    g = Sketch()
    kept = cache(0, "sum", (channels,))
    before = kept.input
    if reset:
        before = g.op("Where", g.op("Unsqueeze", "reset", g.const([1], "int64")), g.const(0.0), before)
    g.op("Add", "frame", before, out="output")
    g.op("Add", "frame", before, out=kept.output)
    about = Contract((InputSpec("frame", ("batch", channels)),), (OutputSpec("output", length=((-1, 1),)),), (kept,))
    return g.model(about, {"output": ("batch", channels)}, reset=reset)


def windows(
    *kernels: tuple[int, int, int], stride: int = 1, channels: int = 2, live: bool = False, reset: bool = False
) -> bytes:
    """One output for each ``(taps, left, right)``: the sum of ``x + 1`` over a window, as a padded convolution sees it.

    The ``+ 1`` makes zero frames unlike padding, so the age (and in a flush the length) must gate what enters the
    caches, as in an ``exact`` model; a ``live`` model has neither. :func:`offline_windows` is the oracle.
    Several outputs come as ``{"first": ..., "rest": [...]}``.
    """
    g = Sketch()
    depth = max(taps for taps, _, _ in kernels) - 1
    kept = [cache(index, f"past{depth - index}", (channels,)) for index in range(depth)]
    age = cache(depth, "age", dtype="int64", role="age")
    length = cache(depth + 1, "length", dtype="int64", role="length")
    past, seen, total = [entry.input for entry in kept], age.input, length.input
    if reset:
        fresh = g.op("Unsqueeze", "reset", g.const([1], "int64"))
        past = [g.op("Where", fresh, g.const(0.0), entry) for entry in past]
        seen, total = (g.op("Where", "reset", g.const(0, "int64"), entry) for entry in (seen, total))
    now = g.op("Add", "frame", g.const(1.0))
    if not live:
        inside = g.op("Or", g.op("Equal", total, g.const(0, "int64")), g.op("Less", seen, total))
        now = g.op("Where", g.op("Unsqueeze", inside, g.const([1], "int64")), now, g.const(0.0))
        g.op("Add", seen, g.const(1, "int64"), out=age.output)
        g.op("Identity", total, out=length.output)
    line = [*past, now]
    outputs = []
    for index, (taps, left, right) in enumerate(kernels):
        name = "output" if len(kernels) == 1 else f"output_{index}"
        g.op("Sum", *line[len(line) - taps :], out=name)
        outputs.append(OutputSpec(name, stride, taps - 1 - left, ((left + right - taps, stride),)))
    for entry, value in zip(kept, line[1:], strict=True):
        g.op("Identity", value, out=entry.output)
    about = Contract(
        (InputSpec("frame", ("batch", channels)),),
        tuple(outputs),
        tuple(kept if live else [*kept, age, length]),
        structure=0 if len(kernels) == 1 else {"first": 0, "rest": list(range(1, len(kernels)))},
        preset="exact",
        delay=max(spec.delay for spec in outputs),
        receptive_field=depth + 1,
        warmup=depth,
        stride=stride,
    )
    return g.model(about, {spec.name: ("batch", channels) for spec in outputs}, reset=reset)


def offline_windows(x: NDArray[np.float32], taps: int, left: int, right: int, stride: int = 1) -> NDArray[np.float32]:
    """What :func:`windows` streams, by definition, from a whole clip ``(T, channels)``: ``(positions, channels)``."""
    padded = np.pad(x + 1, ((left, right), (0, 0)))
    return np.array([padded[p : p + taps].sum(0) for p in range(0, len(padded) - taps + 1, stride)])


def convolutions(channels: int = 32, size: int = 56, layers: int = 4, seed: int = 0) -> bytes:
    """A stack of ``layers`` residual 3x3 convolutions over two taps, each with a cache: a step that takes real time."""
    g = Sketch()
    rng = np.random.default_rng(seed)
    kept = [cache(index, f"conv{index}", (channels, size, size)) for index in range(layers)]
    value = "frame"
    for entry in kept:
        weight = g.const(rng.normal(0, 0.02, (channels, 2 * channels, 3, 3)))
        stacked = g.op("Concat", entry.input, value, axis=1)
        g.op("Identity", value, out=entry.output)
        value = g.op("Relu", g.op("Add", g.op("Conv", stacked, weight, pads=[1, 1, 1, 1]), value))
    g.op("ReduceMean", value, g.const([2, 3], "int64"), keepdims=0, out="output")
    about = Contract((InputSpec("frame", ("batch", channels, size, size)),), (OutputSpec("output"),), tuple(kept))
    return g.model(about, {"output": ("batch", channels)})

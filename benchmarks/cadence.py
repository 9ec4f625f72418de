"""A network with temporal strides at every frame, and at its own positions (``cadence="native"``), in one run.

``If`` is the other way to leave out what is not due: one graph whose branches are the phases. It copies the caches that
pass through and gives the same outputs; it is here so that the choice of one session a phase can be checked.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from measuring import Call, arguments, files, number, paired, ratio, report
from networks import NETWORKS, clip_call, step_file
from onnx import TensorProto, helper, numpy_helper

import dissect
from dissect.benchmarking import step_of
from dissect.contract import Contract
from dissect.sessions import open_session
from dissect.wire import prune

HEAD = ["network", "period", "caches, MB, every / native", "every, ms", "native, ms", "native over every"]


def branches(path: Path, threads: int) -> Call:
    """The phases of a native step model as branches of one graph, on caches in two sets in turn."""
    data = path.read_bytes()
    whole = onnx.load_from_string(data)
    contract = Contract.from_metadata({entry.key: entry.value for entry in whole.metadata_props})
    phases = [contract.due(phase) for phase in range(contract.period)]
    kinds = list(dict.fromkeys(phases))
    graph = nested(data, whole, kinds, 0)
    age = next(cache.input for cache in contract.caches if cache.role == "age")
    table = numpy_helper.from_array(np.array([kinds.index(due) for due in phases], np.int64), "kinds")
    weights = [table, *(numpy_helper.from_array(np.array(at, np.int64), f"n{at}") for at in range(len(kinds)))]
    weights.append(numpy_helper.from_array(np.array(contract.period, np.int64), "period"))
    nodes = [
        helper.make_node("Gather", [age, "n0"], ["time"]),
        helper.make_node("Mod", ["time", "period"], ["phase"]),
        helper.make_node("Gather", ["kinds", "phase"], ["kind"]),
        *(helper.make_node("Equal", ["kind", f"n{at}"], [f"is{at}"]) for at in range(len(kinds) - 1)),
        *graph.node,
        *(helper.make_node("Identity", [f"if0.{out.name}"], [out.name]) for out in whole.graph.output),
    ]
    made = helper.make_graph(nodes, "branches", whole.graph.input, whole.graph.output, weights)
    model = helper.make_model(made, opset_imports=whole.opset_import, ir_version=whole.ir_version)
    session = open_session(model.SerializeToString(), "cpu", threads)
    sets = [{c.input: np.zeros((1, *c.shape[1:]), c.dtype) for c in contract.caches} for _ in range(2)]
    frame = {spec.name: np.random.default_rng(0).random((1, *spec.shape[1:]), np.float32) for spec in contract.inputs}
    outputs = {
        out.name: np.zeros([1, *(d.dim_value for d in out.type.tensor_type.shape.dim[1:])], np.float32)
        for out in whole.graph.output[: len(contract.outputs)]
    }
    bindings = []
    for now in range(2):
        binding = session.io_binding()
        for name, value in (frame | sets[now]).items():
            binding.bind_cpu_input(name, value)
        for cache in contract.caches:
            bind(binding, cache.output, sets[1 - now][cache.input])
        for name, value in outputs.items():
            bind(binding, name, value)
        bindings.append(binding)

    def call(held: object = (sets, outputs)) -> None:  # ONNX Runtime keeps no reference to what it writes to
        session.run_with_iobinding(bindings[0])
        for name, value in frame.items():
            bindings[1].bind_cpu_input(name, value)
        bindings.reverse()

    return call


def bind(binding: object, name: str, value: np.ndarray) -> None:
    binding.bind_output(name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)  # type: ignore[attr-defined]


def nested(data: bytes, whole: onnx.ModelProto, kinds: list[tuple[str, ...]], at: int) -> onnx.GraphProto:
    """The phases from ``at`` on: this one, or one of the others."""
    if at == len(kinds) - 1:
        return branch(data, whole, kinds[at], at)
    node = helper.make_node(
        "If",
        [f"is{at}"],
        [f"if{at}.{out.name}" for out in whole.graph.output],
        then_branch=branch(data, whole, kinds[at], at),
        else_branch=nested(data, whole, kinds, at + 1),
    )
    return helper.make_graph([node], f"rest{at}", [], renamed(whole, lambda name: f"if{at}.{name}"))


def branch(data: bytes, whole: onnx.ModelProto, due: tuple[str, ...], at: int) -> onnx.GraphProto:
    """One phase; caches that are not due pass through, and outputs that are not due are zeros."""
    part = onnx.load_from_string(prune(data, due)).graph
    inner = {name: f"k{at}.{name}" for node in part.node for name in node.output}
    inner |= {tensor.name: f"k{at}.{tensor.name}" for tensor in part.initializer}
    for node in part.node:
        node.name = f"k{at}.{node.name}"
        node.input[:] = [inner.get(name, name) for name in node.input]
        node.output[:] = [inner[name] for name in node.output]
    for tensor in part.initializer:
        tensor.name = inner[tensor.name]
    nodes, weights = list(part.node), list(part.initializer)
    for out in whole.graph.output:
        if out.name in due:
            continue
        inner[out.name] = f"k{at}.pass.{out.name}"
        if out.name.startswith("new_"):
            nodes.append(helper.make_node("Identity", [out.name.removeprefix("new_")], [inner[out.name]]))
        else:
            shape = [1, *(dim.dim_value for dim in out.type.tensor_type.shape.dim[1:])]
            weights.append(numpy_helper.from_array(np.array(shape, np.int64), f"{inner[out.name]}.shape"))
            zero = helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0])
            nodes.append(
                helper.make_node("ConstantOfShape", [f"{inner[out.name]}.shape"], [inner[out.name]], value=zero)
            )
    return helper.make_graph(nodes, f"phase{at}", [], renamed(whole, inner.__getitem__), weights)


def renamed(whole: onnx.ModelProto, name: object) -> list[onnx.ValueInfoProto]:
    found = []
    for out in whole.graph.output:
        info = onnx.ValueInfoProto()
        info.CopyFrom(out)
        info.name = name(out.name)  # type: ignore[operator]
        found.append(info)
    return found


def main() -> None:
    options = arguments(
        "A network with temporal strides at every frame and at its own positions.",
        networks=["r3d_18", "r2plus1d_18", "s3d", "3D-ResNet-18"],
    )
    rows = []
    for name in options.networks:
        subject = NETWORKS[name]
        with files(options) as folder:
            paths = {at: step_file(name, "exact", at, folder) for at in ("every", "native")}
            runners = {at: dissect.Runner(path, providers="cpu", threads=options.threads) for at, path in paths.items()}
            over = branches(paths["native"], options.threads)
            window = clip_call(name, options.threads, folder)
        period = runners["native"].period

        def several(call: Call, count: int = period) -> Call:
            return lambda: [call() for _ in range(count)]

        calls = {at: several(step_of(runner)) for at, runner in runners.items()} | {"If": several(over)}
        found = paired(calls | {"window": window}, seconds=options.seconds, clock=options.clock)
        each = {at: number(times.median / (1 if at == "window" else period)) for at, times in found.items()}
        caches = " / ".join(number(runners[at].cache_bytes / 1e6) for at in ("every", "native"))
        frames = subject.clip[1]
        rows.append(
            [
                name,
                str(period),
                caches,
                each["every"],
                each["native"],
                ratio(found["native"], found["every"]),
                each["If"],
                ratio(found["If"], found["native"]),
                number(found["window"].median / frames),
            ]
        )
        print(*rows[-1], sep="  ", flush=True)
    report(options, [*HEAD, "If, ms", "If over native", "clip, ms a frame of it"], rows)


if __name__ == "__main__":
    main()

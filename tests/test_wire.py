"""ONNX files read and cut without a library, against onnx itself."""

from __future__ import annotations

import mmap
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from step_models import windows

from dissect.errors import StreamError
from dissect.wire import copies, metadata, prune, record


def model() -> bytes:
    """``a -> h -> (p, q)``; ``b`` enters ``q`` through an If that captures it; ``dead`` is read by nobody."""
    info = helper.make_tensor_value_info

    def weight(value: float, name: str) -> onnx.TensorProto:
        return numpy_helper.from_array(np.full((4,), value, np.float32), name)

    def branch(name: str, *inputs: str) -> onnx.GraphProto:
        node = helper.make_node("Add", list(inputs), [f"{name}_out"], name=f"{name}_add")
        return helper.make_graph([node], name, [], [info(f"{name}_out", TensorProto.FLOAT, [4])])

    nodes = [
        helper.make_node("Mul", ["a", "w"], ["h"]),
        helper.make_node("Add", ["h", "w"], ["p"]),
        helper.make_node("Sub", ["h", "v"], ["s"]),
        helper.make_node(
            "If", ["flag"], ["q"], then_branch=branch("then", "s", "b"), else_branch=branch("else", "b", "u")
        ),
        helper.make_node("Neg", ["w"], ["dead"]),
    ]
    inputs = [info("a", TensorProto.FLOAT, [4]), info("b", TensorProto.FLOAT, [4]), info("flag", TensorProto.BOOL, [])]
    outputs = [info(name, TensorProto.FLOAT, [4]) for name in ("p", "q")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weight(2, "w"), weight(3, "v"), weight(5, "u")])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(made, {"dissect.labels": "Köpüklü", "long": "x" * 300, "empty": ""})
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


def run(data: bytes, **feed: object) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    taken = {entry.name: feed[entry.name] for entry in session.get_inputs()}
    return dict(zip([entry.name for entry in session.get_outputs()], session.run(None, taken), strict=True))


A, B = np.arange(4, dtype=np.float32), np.full(4, 7, np.float32)


@pytest.mark.parametrize(
    ("outputs", "nodes", "weights", "inputs"),
    [
        (["p"], ["Mul", "Add"], {"w"}, ["a"]),
        (["q"], ["Mul", "Sub", "If"], {"w", "v", "u"}, ["a", "b", "flag"]),
        (["q", "p"], ["Mul", "Add", "Sub", "If"], {"w", "v", "u"}, ["a", "b", "flag"]),
    ],
)
def test_what_is_kept(outputs: list[str], nodes: list[str], weights: set[str], inputs: list[str]) -> None:
    part = onnx.load_from_string(prune(model(), outputs))
    onnx.checker.check_model(part)
    assert [node.op_type for node in part.graph.node] == nodes
    assert {tensor.name for tensor in part.graph.initializer} == weights
    assert [entry.name for entry in part.graph.input] == inputs
    assert [entry.name for entry in part.graph.output] == outputs
    assert part.opset_import == onnx.load_from_string(model()).opset_import


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("outputs", [["p"], ["q"], ["q", "p"]])
def test_the_part_gives_what_the_whole_gives(outputs: list[str], flag: bool) -> None:
    whole = run(model(), a=A, b=B, flag=np.array(flag))
    part = run(prune(model(), outputs), a=A, b=B, flag=np.array(flag))
    assert list(part) == outputs
    for name, value in part.items():
        np.testing.assert_array_equal(value, whole[name])


def test_metadata_are_those_that_onnx_reads(tmp_path: Path) -> None:
    for data in (model(), windows((3, 1, 1))):
        wanted = {entry.key: entry.value for entry in onnx.load_from_string(data).metadata_props}
        assert metadata(data) == wanted
        file = tmp_path / "net.onnx"
        file.write_bytes(data)
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert metadata(mapped) == wanted
            assert prune(mapped, [onnx.load_from_string(data).graph.output[0].name])


@pytest.mark.parametrize("data", [b"", b"no onnx at all", model()[:-7], bytes(range(256))])
def test_what_is_no_model(data: bytes) -> None:
    with pytest.raises(StreamError, match=r"no ONNX model|no output"):
        prune(data, ["p"])
    assert isinstance(metadata(data), dict)


def test_an_output_that_is_not_there() -> None:
    with pytest.raises(StreamError, match="no output 'z'"):
        prune(model(), ["p", "z"])


@pytest.mark.parametrize("content", [0, 1, 127, 128, 300, 2**40])
def test_a_number_is_written_as_protobuf_reads_it(content: int) -> None:
    assert onnx.TensorProto.FromString(record(1, content)).dims == [content]


def test_a_text_is_written_as_protobuf_reads_it() -> None:
    assert onnx.TensorProto.FromString(record(8, "é" * 200)).name == "é" * 200


def test_copies_of_inputs_are_found() -> None:
    info = partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT, shape=[4])
    nodes = [
        helper.make_node("Identity", ["a"], ["p"]),
        helper.make_node("Neg", ["b"], ["h"]),
        helper.make_node("Identity", ["h"], ["q"]),
        helper.make_node("Identity", ["b"], ["r"]),
    ]
    graph = helper.make_graph(nodes, "g", [info("a"), info("b")], [info("p"), info("q"), info("r")])
    assert copies(helper.make_model(graph).SerializeToString()) == {"p": "a", "r": "b"}
    assert copies(b"no model") == copies(b"") == {}

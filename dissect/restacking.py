"""Restacking: the sums that :mod:`dissect.tuning` wrote for float kernels, as the layers that they stand for.

A sum of convolutions over the frames of a history is free where the kernels add onto what is there. Kernels of whole
numbers round after each part, so a quantised step convolves once, over the stacked channels. The other two forms that only a
blocked layout wants (a cached value passed through a convolution, zeros made by one) become what they mean. The law:
every value is what it was, to rounding.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["constant", "drop_unread", "restack"]

_SAME = ("strides", "pads", "dilations", "group", "auto_pad")


def restack(model: ir.Model) -> None:
    """Rewrite ``model``, a step as :func:`dissect.export` writes it, in place."""
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Conv" and _passes(node):
            ir.convenience.replace_all_uses_with(node.outputs[0], _input(node))
            graph.remove(node, safe=True)
    for node in list(graph):
        if node.op_type == "Concat":
            _unappend(graph, node)
    for node in list(graph):
        if node.op_type == "Add" and not _summed_on(node):
            _join(graph, node)
    _drop_unused(graph)


def _input(node: ir.Node, index: int = 0) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _weight(node: ir.Node, index: int = 1) -> NDArray[np.float32] | None:
    """A constant input; None where there is none."""
    value = node.inputs[index] if len(node.inputs) > index else None
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _depthwise(node: ir.Node) -> bool:
    weight = _weight(node)
    return weight is not None and weight.shape[1:] == (1, 1, 1) and _groups(node) == len(weight)


def _groups(node: ir.Node) -> int:
    return node.attributes["group"].as_int() if "group" in node.attributes else 1


def _passes(node: ir.Node) -> bool:
    """A convolution that gives what it takes."""
    return len(node.inputs) == 2 and _depthwise(node) and bool(np.all(_weight(node) == 1)) and _groups(node) > 1


def _unappend(graph: ir.Graph, node: ir.Node) -> None:
    """Channels of zeros that a convolution of zeros made become a padding."""
    first, *rest = node.inputs
    makers = {id(part): part.producer() for part in rest if part is not None}
    if not rest or not all(
        maker is not None and maker.op_type == "Conv" and _depthwise(maker) and not np.any(_weight(maker))
        and maker.inputs[0] is first
        for maker in makers.values()
    ):  # fmt: skip
        return
    weight = _weight(next(maker for maker in makers.values() if maker is not None))
    assert weight is not None
    widths = np.array([0, 0, 0, 0, 0, len(weight) * len(rest), 0, 0], np.int64)
    pads = constant(graph, widths, f"{node.outputs[0].name}_pads")
    _replace(graph, node, ir.node("Pad", [first, pads]))


def _summed_on(node: ir.Node) -> bool:
    """Whether the sum goes on in a larger one, which will take this part with it."""
    uses = list(node.outputs[0].uses())
    return len(uses) == 1 and uses[0].node.op_type == "Add" and not node.outputs[0].is_graph_output()


def _leaves(value: ir.Value, top: bool = True) -> list[ir.Value]:
    """What a sum adds up, where no part of it is used elsewhere."""
    maker = value.producer()
    alone = top or (len(list(value.uses())) == 1 and not value.is_graph_output())
    if maker is None or maker.op_type != "Add" or not alone:
        return [value]
    return [leaf for part in maker.inputs if part is not None for leaf in _leaves(part, False)]


def _key(value: ir.Value) -> tuple[object, ...] | None:
    """What two convolutions must share to be one; None for what is no such convolution."""
    maker = value.producer()
    if maker is None or maker.op_type != "Conv" or len(list(value.uses())) != 1 or value.is_graph_output():
        return None
    weight = _weight(maker)
    if weight is None or _groups(maker) != 1 or (len(maker.inputs) > 2 and _weight(maker, 2) is None):
        return None
    settings = {name: maker.attributes[name].value for name in _SAME if name in maker.attributes}
    return (weight.shape[0], weight.shape[2:], tuple(sorted((name, str(value)) for name, value in settings.items())))


def _join(graph: ir.Graph, node: ir.Node) -> None:
    """The convolutions of one sum that differ only in what they read become one over stacked channels."""
    leaves = _leaves(node.outputs[0])
    alike: dict[tuple[object, ...], list[ir.Value]] = {}
    rest: list[ir.Value] = []
    for leaf in leaves:
        key = _key(leaf)
        alike.setdefault(key, []).append(leaf) if key is not None else rest.append(leaf)
    rest += [part for same in alike.values() if len(same) == 1 for part in same]
    joined = [_stacked(graph, node, same) for same in alike.values() if len(same) > 1]
    if not joined:
        return
    total = joined[0]
    for part in (*joined[1:], *rest):
        added = ir.node("Add", [total, part])
        graph.insert_before(node, added)
        total = _typed(added.outputs[0], node.outputs[0])
    _replace_value(graph, node, total)


def _stacked(graph: ir.Graph, before: ir.Node, parts: list[ir.Value]) -> ir.Value:
    makers = [maker for part in parts if (maker := part.producer()) is not None]
    name = parts[0].name
    layer = str(makers[-1].inputs[1].name).rpartition(".kernels.")[0] or name  # type: ignore[union-attr]
    weights = [weight for maker in makers if (weight := _weight(maker)) is not None]
    biases = [bias for maker in makers if (bias := _weight(maker, 2)) is not None]
    concat = ir.node("Concat", [_input(maker) for maker in makers], {"axis": 1})
    concat.outputs[0].name = f"{name}_frames"
    inputs = [concat.outputs[0], constant(graph, np.concatenate(weights, 1), f"{layer}.weight")]
    if biases:
        inputs.append(constant(graph, np.sum(biases, 0), f"{layer}.summed_bias"))
    conv = ir.node("Conv", inputs, dict(makers[0].attributes))
    conv.outputs[0].name = f"{name}_stacked"
    graph.insert_before(before, [concat, conv])
    return _typed(conv.outputs[0], parts[0])


def _typed(value: ir.Value, like: ir.Value) -> ir.Value:
    value.type, value.shape = like.type, like.shape
    return value


def constant(graph: ir.Graph, array: NDArray[np.generic], name: str) -> ir.Value:
    """A new constant of the graph."""
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)  # type: ignore[union-attr]
    graph.register_initializer(value)
    return value


def _replace(graph: ir.Graph, node: ir.Node, by: ir.Node) -> None:
    graph.insert_before(node, by)
    _replace_value(graph, node, _typed(by.outputs[0], node.outputs[0]))


def _replace_value(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    old = node.outputs[0]
    value.name, old.name = old.name, f"{old.name}_before"
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = value
    ir.convenience.replace_all_uses_with(old, value)
    graph.remove(node, safe=True)


def _drop_unused(graph: ir.Graph) -> None:
    drop_unread(graph)
    for name, value in list(graph.initializers.items()):
        if not list(value.uses()):
            graph.initializers.pop(name)


def drop_unread(graph: ir.Graph) -> None:
    """Remove the nodes whose results nobody reads, in place."""
    for node in reversed(list(graph)):
        if not any(list(value.uses()) or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)

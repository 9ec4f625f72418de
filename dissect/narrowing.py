"""Narrowing: the caches of a quantised step in 8 bits, at no cost.

All that holds the same numbers (the slots of one history, the value that enters it, what is joined from them) gets one
form, ``value = scale * number`` in uint8 or int8, so that nothing is rescaled on its way from one step to the next and
a byte of zero is a zero. Then a cache need not be turned into a float and back: the graph takes and gives the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from dissect.contract import Contract
from dissect.restacking import constant, drop_unread

__all__ = ["Form", "forms_of", "narrowed"]

#: operators that only move values, so that a cache that goes through them stays what it was
_MOVES = {"Identity", "Slice", "Concat", "Reshape", "Gather", "Split", "Squeeze", "Unsqueeze", "Transpose", "Where"}

_TYPES = {"uint8": ir.DataType.UINT8, "int8": ir.DataType.INT8}


@dataclass(frozen=True)
class Form:
    """How a group of tensors is held in 8 bits: ``value = scale * number``, so that a zero is a zero."""

    dtype: str
    scale: float
    tensors: frozenset[str]


def forms_of(graph: ir.Graph, contract: Contract, ranges: Mapping[str, tuple[float, float]]) -> dict[str, Form]:
    """For each cache that goes to 8 bits, by its input's name, its form; slots of one history share theirs."""
    values = {value.name: value for value in graph.inputs} | {value.name: value for value in graph.outputs}
    forms: dict[str, Form] = {}
    for cache in contract.caches:
        if cache.dtype != "float32" or cache.input in forms:
            continue
        group = _moved([values[cache.input], values[cache.output]], contract, values)
        mine = [other for other in contract.caches if other.input in group]
        if _feeds_back([values[other.input] for other in mine], group):
            continue
        low = min(ranges[other.input][0] for other in mine)
        high = max(ranges[other.input][1] for other in mine)
        form = Form("uint8", high / 255 or 1.0, group) if low >= 0 else Form("int8", max(-low, high) / 127, group)
        forms |= {other.input: form for other in mine}
    return forms


def _moved(seeds: Sequence[ir.Value], contract: Contract, values: Mapping[str | None, ir.Value]) -> frozenset[str]:
    """The names of all that holds the same numbers as the seeds, moved, joined or cut, from one step to the next."""
    pairs = {cache.input: cache.output for cache in contract.caches}
    pairs |= {output: given for given, output in pairs.items()}
    found: set[str] = set()
    waiting = list(seeds)
    while waiting:
        value = waiting.pop()
        if (
            value.name is None
            or value.name in found
            or value.dtype != ir.DataType.FLOAT
            or value.const_value is not None
        ):
            continue
        found.add(value.name)
        if value.name in pairs:
            waiting.append(values[pairs[value.name]])
        maker = value.producer()
        near = [use.node for use in value.uses()] + ([maker] if maker is not None else [])
        for node in near:
            if node.op_type in _MOVES:
                waiting += [part for part in (*node.inputs, *node.outputs) if part is not None]
    return frozenset(found)


def _feeds_back(seeds: Sequence[ir.Value], group: frozenset[str]) -> bool:
    """Whether what is computed from the caches of a group, and not only moved, comes back to them."""
    moved, computed = list(seeds), list[ir.Value]()
    while moved:
        for use in moved.pop().uses():
            (moved if use.node.op_type in _MOVES else computed).extend(use.node.outputs)
    reached: set[int] = set()
    while computed:
        value = computed.pop()
        if id(value) in reached:
            continue
        reached.add(id(value))
        if value.name in group:
            return True
        computed += [output for use in value.uses() for output in use.node.outputs]
    return False


def narrowed(graph: ir.Graph, contract: Contract, forms: Mapping[str, Form]) -> Contract:
    """Let the caches come and go in 8 bits, in place; returns the contract that says so."""
    inputs = {value.name: value for value in graph.inputs}
    for cache in contract.caches:
        if cache.input in forms:
            _take(graph, inputs[cache.input], forms[cache.input])
    for cache in contract.caches:
        if cache.input in forms:
            index = next(at for at, value in enumerate(graph.outputs) if value.name == cache.output)
            graph.outputs[index] = _give(graph, graph.outputs[index], cache.output, forms[cache.input])
    drop_unread(graph)
    caches = tuple(
        replace(cache, dtype=forms[cache.input].dtype, scale=forms[cache.input].scale, zero_point=0)
        if cache.input in forms
        else cache
        for cache in contract.caches
    )
    return replace(contract, caches=caches)


def _take(graph: ir.Graph, value: ir.Value, form: Form) -> None:
    """Make a graph input 8 bits wide; readers of its float get it through a DequantizeLinear."""
    shape, name = value.shape, value.name
    readers = [(use.node, use.idx) for use in value.uses()]
    value.type = ir.TensorType(_TYPES[form.dtype])
    number: ir.Value | None = None
    for node, index in readers:
        if node.op_type == "QuantizeLinear":
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
        elif node.op_type == "Identity" and node.outputs[0].is_graph_output():
            node.outputs[0].type = value.type
        else:
            if number is None:
                back = ir.node("DequantizeLinear", [value, *_parameters(graph, form)])
                back.outputs[0].name, back.outputs[0].shape = f"{name}_float", shape
                back.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
                graph.insert_before(graph[0], back)
                number = back.outputs[0]
            node.replace_input_with(index, number)


def _give(graph: ir.Graph, value: ir.Value, name: str, form: Form) -> ir.Value:
    """The 8-bit value for a graph output that is a float so far."""
    maker = value.producer()
    if maker is not None and maker.op_type == "Identity" and value.dtype == _TYPES[form.dtype]:
        return value
    narrow: ir.Value | None = None
    if maker is not None and maker.op_type == "DequantizeLinear":
        narrow = maker.inputs[0]
    node = (
        ir.node("Identity", [narrow])
        if narrow is not None
        else ir.node("QuantizeLinear", [value, *_parameters(graph, form)])
    )
    graph.append(node)
    value.name = f"{name}_float"
    out = node.outputs[0]
    out.name, out.type, out.shape = name, ir.TensorType(_TYPES[form.dtype]), value.shape
    return out


def _parameters(graph: ir.Graph, form: Form) -> list[ir.Value]:
    """Scale and zero point of a form as constants of the graph."""
    made = []
    for part, array in (("scale", np.float32(form.scale)), ("zero", np.zeros((), form.dtype))):
        name = f"{sorted(form.tensors)[0]}_{part}"
        if name not in graph.initializers:
            constant(graph, np.asarray(array), name)
        made.append(graph.initializers[name])
    return made

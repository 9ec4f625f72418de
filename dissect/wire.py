"""ONNX files on the wire: their metadata, and the part that makes some of their outputs as a model of its own.

ONNX Runtime runs every node of a graph, whatever is fetched, so a phase of a step model in the native cadence is run
from a graph that holds nothing else. This reads and writes protobuf's wire format, of which it needs very little, so
that a runner needs no other library. Law: the pruned model's outputs are the whole model's, bit for bit, for the same
inputs; weights are copied as they stand.

Source: https://protobuf.dev/programming-guides/encoding/ and the field numbers of ``onnx.proto``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from mmap import mmap

from dissect.errors import StreamError

__all__ = ["copies", "metadata", "prune", "record"]

GRAPH, METADATA = 7, 14  # of ModelProto
KEY, VALUE = 1, 2  # of StringStringEntryProto
NODE, INITIALIZER, INPUT, OUTPUT, VALUE_INFO, SPARSE = 1, 5, 11, 12, 13, 15  # of GraphProto
NODE_INPUT, NODE_OUTPUT, KIND, ATTRIBUTE = 1, 2, 4, 5  # of NodeProto
SUBGRAPH, SUBGRAPHS = 6, 11  # of AttributeProto
TENSOR_NAME, INFO_NAME, SPARSE_VALUES = 8, 1, 1

_VARINT, _WIDE, _BYTES, _NARROW = 0, 1, 2, 5
Field = tuple[int, memoryview, memoryview]
Buffer = bytes | bytearray | memoryview | mmap


def metadata(model: Buffer) -> dict[str, str]:
    """The ``metadata_props`` of an ONNX file; empty for bytes that are none, about which a session says more."""
    try:
        entries = [content for number, _, content in _fields(memoryview(model)) if number == METADATA]
        return {_name(entry, KEY): _name(entry, VALUE) for entry in entries}
    except (IndexError, ValueError):
        return {}


def copies(model: Buffer) -> dict[str, str]:
    """The graph's outputs that are an input as it came in, and which one; empty for bytes that are no ONNX file."""
    try:
        graph = next(content for number, _, content in _fields(memoryview(model)) if number == GRAPH)
        fields = list(_fields(graph))
        given = {_name(content, INFO_NAME) for number, _, content in fields if number == INPUT}
        nodes = [content for number, _, content in fields if number == NODE and _name(content, KIND) == "Identity"]
        pairs = [(_name(node, NODE_OUTPUT), _name(node, NODE_INPUT)) for node in nodes]
        return {output: source for output, source in pairs if source in given}
    except (IndexError, StopIteration, ValueError):
        return {}


def prune(model: Buffer, outputs: Sequence[str]) -> bytes:
    """``model`` with the given graph outputs alone, and the nodes, weights and inputs that they need.

    Raises :class:`StreamError` where ``model`` is no ONNX file or lacks one of ``outputs``.
    """
    try:
        fields = list(_fields(memoryview(model)))
        graph = next(content for number, _, content in fields if number == GRAPH)
        pruned = _pruned(list(_fields(graph)), outputs)
    except (IndexError, StopIteration, ValueError) as error:
        raise StreamError(f"The bytes are no ONNX model ({error or 'no graph in it'}).") from error
    return b"".join(record(GRAPH, pruned) if number == GRAPH else bytes(whole) for number, whole, _ in fields)


def record(field: int, content: bytes | str | int) -> bytes:
    """One field of a message: a number, or bytes (a message, a text) with their length."""
    if isinstance(content, int):
        return _encoded(field << 3 | _VARINT) + _encoded(content)
    content = content.encode() if isinstance(content, str) else content
    return _encoded(field << 3 | _BYTES) + _encoded(len(content)) + content


def _pruned(fields: list[Field], outputs: Sequence[str]) -> bytes:
    given = {_name(content, INFO_NAME): whole for number, whole, content in fields if number == OUTPUT}
    if missing := set(outputs) - set(given):
        raise StreamError(f"The graph has no output {sorted(missing)[0]!r}.")
    needed = set(outputs)
    kept: list[memoryview] = []
    for number, whole, content in reversed(fields):  # nodes stand in the order in which they run
        if number == NODE and needed & set(_names(content, NODE_OUTPUT)):
            needed.update(_reads(content))
            kept.append(whole)
    named = {INITIALIZER: TENSOR_NAME, INPUT: INFO_NAME, VALUE_INFO: INFO_NAME}
    parts: list[memoryview] = kept[::-1]
    for number, whole, content in fields:
        if number in named:
            parts += [whole] if _name(content, named[number]) in needed else []
        elif number == SPARSE:
            values = next(value for at, _, value in _fields(content) if at == SPARSE_VALUES)
            parts += [whole] if _name(values, TENSOR_NAME) in needed else []
        elif number not in (NODE, OUTPUT):
            parts.append(whole)
    return b"".join((*parts, *(given[name] for name in outputs)))


def _reads(node: memoryview) -> set[str]:
    """The values that a node reads, those of the graphs inside it included."""
    found = set(_names(node, NODE_INPUT))
    for number, _, attribute in _fields(node):
        if number == ATTRIBUTE:
            for at, _, graph in _fields(attribute):
                if at in (SUBGRAPH, SUBGRAPHS):
                    found |= {name for inner, _, part in _fields(graph) if inner == NODE for name in _reads(part)} | {
                        _name(part, INFO_NAME) for inner, _, part in _fields(graph) if inner == OUTPUT
                    }
    return found


def _names(message: memoryview, field: int) -> list[str]:
    return [str(content, "utf-8") for number, _, content in _fields(message) if number == field]


def _name(message: memoryview, field: int) -> str:
    return next(iter(_names(message, field)), "")


def _fields(message: memoryview) -> Iterator[Field]:
    """Number, whole record and content of each field of a message."""
    at = 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == _VARINT:
            begin = at
            _, at = _varint(message, at)
        elif kind == _BYTES:
            size, begin = _varint(message, at)
            at = begin + size
        elif kind in (_WIDE, _NARROW):
            begin, at = at, at + (8 if kind == _WIDE else 4)
        else:
            raise ValueError(f"a field of wire type {kind}")
        if at > len(message):
            raise ValueError("cut short")
        yield tag >> 3, message[start:at], message[begin:at]


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
